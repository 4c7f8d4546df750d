"""How every script starts and how it ends: constants from the command line, errors and signals as one sentence."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tyro

STOPPING = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; kill, a scheduler's time limit, a container that is stopped
_stopped_by: list[int] = []  # the signal that ends this run
PATIENCE = 5  # seconds that a stopped run has to leave what it is doing
EXPLAINED = {  # what torch's messages hold -> what happened and what helps
    "PytorchStreamWriter": "a checkpoint could not be written, most often because no space is left: make room",
    "unexpected pos": "a checkpoint could not be written, most often because no space is left: make room",
    "DataLoader worker (pid": "a reading process was ended by the system, most often because the memory, or a "
    "container's /dev/shm, was full: lower --workers",
    "ried to allocate": "the memory is full: lower batch_size, images_at_once or workers",
    "by peer": "another process of this run ended: see its own message",
    "remote process": "another process of this run ended: see its own message",
}


class UserError(Exception):
    """Something only the user can mend: one sentence that names the file or constant and the remedy."""


def run(main: Callable, constants: type, description: str, one_process: bool = False) -> None:
    """Fill the script's constants from the command line and call `main` with them.

    A `UserError`, a full disk or memory, or a lost process ends the program with one sentence and exit code 1; Ctrl-C
    and SIGTERM with a hint and 130 or 143. With `one_process` the first of several (torchrun) does all the work.
    PRC_TRACEBACK=1 in the environment shows the system's errors in full.
    """
    paragraphs = re.sub(r"\n(?=Reads|Writes)", "\n\n", description)  # tyro joins the lines of a paragraph
    piping = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head
    values = tyro.cli(constants, description=paragraphs)
    signal.signal(signal.SIGPIPE, piping)
    first = int(os.environ.get("RANK", 0)) == 0
    if one_process and not first:
        return
    again = "the same command" + " without --overwrite" * bool(getattr(values, "overwrite", False)) + " continues"
    try:
        with _heeding_signals(f"\nstopped; {again} with what is left\n" if first else ""):
            main(values)
    except UserError as error:
        # a reading process hands its error on wrapped in its traceback; only our sentence is for the user
        sentence = str(error).rpartition("UserError: ")[2].strip()
    except KeyboardInterrupt as error:
        _end_readers()
        sys.exit(128 + (error.args or STOPPING)[0])
    except (OSError, MemoryError, RuntimeError) as error:
        if _stopped_by:  # torch's reading processes were told to stop as well, and it takes that for a fault
            _end_readers()
            sys.exit(128 + _stopped_by[0])
        reason = _explain(error)
        if not reason or os.environ.get("PRC_TRACEBACK"):
            raise
        sentence = f"{reason}; what is finished is kept, and then {again}"
    else:
        return
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1)


def _explain(error: Exception) -> str:
    """Where the system is to blame, its own words and the file; else nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the disk'}: {error.strerror}: mend this"
    if isinstance(error, MemoryError):
        return EXPLAINED["ried to allocate"]
    return next((reason for words, reason in EXPLAINED.items() if words in str(error)), "")


@contextmanager
def _heeding_signals(farewell: str) -> Iterator[None]:
    """Both signals say `farewell` and raise KeyboardInterrupt(number), once; `PATIENCE` seconds later the run is over.

    Python hears signals between its own instructions only. A run that waits for another process or for a GPU would
    not end, so a thread watches too.
    """

    def heed(number, frame):
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        _stopped_by.append(number)
        os.write(2, farewell.encode())
        raise KeyboardInterrupt(number)

    def watch():
        received = b"\0"
        while received and received[0] not in STOPPING:  # children that end are told here as well
            received = os.read(reading, 1)
        if received:
            time.sleep(PATIENCE)
            if signal.getsignal(received[0]) is heed:  # not even heard yet
                os.write(2, farewell.encode())
            _end_readers()
            os._exit(128 + received[0])
        os.close(reading)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as it is under nohup
            signal.signal(number, heed)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_leave_signals_to_parent)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is heed:
                signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)


def _end_readers() -> None:
    """torch would wait seconds for its reading processes."""
    for process in multiprocessing.active_children():
        process.terminate()


def _leave_signals_to_parent() -> None:
    """In a forked reading process of torch, which its parent ends."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check(condition: bool, sentence: str) -> None:
    """Raise `UserError(sentence)` unless the condition holds; for constants, before any work is done."""
    if not condition:
        raise UserError(sentence)


def stop(sentence: str) -> None:
    """Raise `UserError`, where a function is wanted that takes the sentence."""
    raise UserError(sentence)
