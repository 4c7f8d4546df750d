"""Work beside the main process: worker processes that end with their parent, and threads that write files."""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from tools.command import UserError, check

MOST_TEMPORARY = 74  # characters of TMPDIR: processes talk through sockets below it, whose paths hold 107


def in_workers(work: Callable[[Any], Any], items: Sequence[Any], workers: int, chunk: int = 1) -> Iterator[Any]:
    """Yield work(item) in the order of the items, computed in `workers` processes; 0 works in this process.

    Where there are workers, `work` must be picklable (a function of a module, or a `functools.partial` of one); each
    gets `chunk` items at a time. The processes have one thread each, and none outlives this process. An exception, also
    in the caller's loop, kills them: files are written whole or not at all, so only the files under way are lost.
    Raises `UserError` when the system has ended a worker, and where the workers would wait for each other without end.
    """
    if workers < 1 or len(items) < 2:
        yield from map(work, items)
        return
    folder = tempfile.gettempdir()
    check(
        sys.platform == "win32" or len(os.fsencode(folder)) <= MOST_TEMPORARY,
        f"the folder for temporary files, {folder}, has a path of more than {MOST_TEMPORARY} characters, too long for "
        "the sockets of worker processes: set TMPDIR to a shorter one, such as /tmp, or use --workers 0",
    )
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch's threads can hang
    with _Pool(min(workers, len(items)), context, initializer=_begin) as pool:
        try:
            yield from pool.map(work, items, chunksize=chunk)
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "the system ended a worker process, most often because the memory was full: the same command "
                    "continues with the rest, and --workers 1 needs the least memory"
                ) from None
            raise


class _Pool(ProcessPoolExecutor):
    """Its processes are started by `submit`. They ignore Ctrl-C, which the main process handles for them."""

    def submit(self, *arguments, **named) -> Future:
        if threading.current_thread() is threading.main_thread():  # signals are set in the main thread alone
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process inherits this
            try:
                future = super().submit(*arguments, **named)
            finally:
                signal.signal(signal.SIGINT, before)
        else:
            future = super().submit(*arguments, **named)
        # When its workers were killed, Python 3.11's pool fails at a cancelled future, with a traceback in its thread.
        # Here no future needs to be cancelled: all workers are killed instead.
        future.cancel = lambda: False  # type: ignore[method-assign]
        return future


def _begin() -> None:
    """Runs first in each worker: one thread each, since the workers share the cores."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # importing torch takes seconds, and hundreds of megabytes in each worker
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def in_background(threads: int = 2) -> Iterator[Callable[..., None]]:
    """Yield `submit(work, *arguments)`, which runs the call in a thread while the caller goes on.

    For compression and writing, which release Python's global lock. At most two calls for each thread wait or run, so
    that results cannot fill the memory. The first error of a call is raised by a later submit or at the end of the
    block, which waits for all calls.
    """
    running: deque[Future] = deque()

    def submit(work: Callable, *arguments) -> None:
        if len(running) == 2 * threads:
            running.popleft().result()
        running.append(pool.submit(work, *arguments))

    with ThreadPoolExecutor(threads) as pool:
        yield submit
        for call in running:
            call.result()
