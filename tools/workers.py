"""Worker processes that are quiet when the run is stopped, gone when it is, and explained when the system ends one."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from tools.command import STOPPING, UserError


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes of one thread each, none of which outlives this process.

    An exception in the block kills the workers: what they write appears whole or not at all, so only the files under
    way are lost. Raises `UserError` when the system has ended a worker.
    """
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch threads can hang
    with _Pool(workers, context, initializer=_begin) as pool:
        try:
            yield pool
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a worker process was ended by the system, most often because the memory was full: the same "
                    "command continues with what is left, and --workers 1 needs the least memory"
                ) from None
            raise


class _Pool(ProcessPoolExecutor):
    """Its processes, which are started when work is submitted, leave the signals that stop a run to this one."""

    def submit(self, *arguments, **named) -> Future:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # a new process inherits what is blocked
        try:
            return super().submit(*arguments, **named)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """Workers share the cores among themselves: threads inside each would only fight for them."""
    import cv2

    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # loading it takes seconds, and hundreds of megabytes in each worker
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """Otherwise a worker would wait for work for ever after its parent was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
