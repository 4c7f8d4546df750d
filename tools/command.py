"""How every script starts and ends: constants from the command line, errors and signals as one sentence."""

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import tyro

MOST_SHOWN = 20  # items of a list that one message names
STOPPING = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; kill, a scheduler's time limit, a container that is stopped
_stopped_by: list[int] = []  # the signal that ended this run
MEMORY = (
    "the memory is full: lower micro_batch (--micro-batch; 0 is the whole batch; step 1 then needs --overwrite, "
    "because its BatchNorm depends on micro_batch), images_at_once or workers"
)
EXPLAINED = {  # part of a message of torch -> what happened and what helps
    "PytorchStreamWriter": "a checkpoint could not be written, most often because the disk is full: free some space",
    "unexpected pos": "a checkpoint could not be written, most often because the disk is full: free some space",
    "DataLoader worker (pid": "the system ended a worker process, most often because the memory, or a container's "
    "/dev/shm, was full: lower --workers",
    "ried to allocate": MEMORY,
    "out of memory": MEMORY,
    "STATUS_ALLOC_FAILED": MEMORY,  # of cuBLAS and cuDNN
    "no kernel image": "this torch has no code for the GPU's generation: use a GPU of sm_75 or newer with the torch "
    "wheel for it, or --device cpu",
    "busy or unavailable": "another program holds the GPU: wait for it, choose another GPU with --device cuda:1, or "
    "use --device cpu",
    "driver on your system is too old": "the NVIDIA driver is too old for this torch: update the driver, install the "
    "torch wheel for it, or use --device cpu",
    "by peer": "another process of this run ended: see its own message",
    "remote process": "another process of this run ended: see its own message",
}


class UserError(Exception):
    """Something that only the user can fix: one sentence that names the file or constant and the remedy."""


def run(
    main: Callable[[Any], None],
    args: type,
    description: str | None,
    *,
    then: Callable[[Any], None] | None = None,
    one_process: bool = False,
) -> None:
    """Fill the script's constants from the command line, call `main` with them, and in the main process then `then`.

    A `UserError`, a full disk or memory, or a lost process ends the program with one sentence and exit code 1; Ctrl-C
    and SIGTERM with a hint and exit code 130 or 143; a closed pipe (`| head`) silently. With `one_process` the first of
    several processes (torchrun) does all the work. PRC_TRACEBACK=1 in the environment shows errors of the system in
    full.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal must not end the run at a dash
    first = int(os.environ.get("RANK", 0)) == 0
    again = "the same command continues"
    if "--overwrite" in sys.argv:
        again = "the same command without --overwrite continues"
    try:
        values: Any = tyro.cli(args, description=re.sub(r"\n(?=Reads|Writes)", "\n\n", description or ""))
        if one_process and not first:
            return
        with _signals_as_exceptions():
            main(values)
            if then and first:
                then(values)
        sys.stdout.flush()
    except UserError as error:
        # DataLoader wraps an error of a worker process in its traceback; only our sentence is for the user
        _end("error: " + str(error).rpartition("UserError: ")[2].strip() if first else "")
    except BrokenPipeError as error:
        if error.filename:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain about the closed pipe at its end
        _end()
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        if _stopped_by or isinstance(error, KeyboardInterrupt):  # DataLoader reports its terminated workers as an error
            code = 128 + (_stopped_by or [signal.SIGINT])[0]
            _end(f"\nstopped; {again} with the rest" if first else "", code)
        reason = explain(error)
        if not reason or os.environ.get("PRC_TRACEBACK"):
            raise
        _end(f"error: {reason}; what is finished is kept, and then {again}")


def _end(message: str = "", code: int = 1) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    for process in multiprocessing.active_children():  # else DataLoader waits seconds for its worker processes
        process.terminate()
    sys.exit(code)


def explain(error: BaseException) -> str:
    """The cause and the remedy of an error of the system; empty for an error of the program."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the disk'}: {error.strerror}: fix this"
    if isinstance(error, MemoryError):
        return MEMORY
    for words, reason in EXPLAINED.items():
        if words in str(error):
            return reason
    return ""


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Both signals raise KeyboardInterrupt once; a second one ends the program at once."""

    def stop_once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        _stopped_by.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop_once:
                signal.signal(number, handler)


def check(condition: bool, sentence: str) -> None:
    """Raise `UserError(sentence)` unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def and_more(lines: Sequence[str], most: int = MOST_SHOWN, between: str = "\n  ") -> str:
    """The first lines, and how many more there are."""
    more = f"{between}and {len(lines) - most} more" if len(lines) > most else ""
    return between.join(lines[:most]) + more


def stop(sentence: str) -> None:
    """Raise `UserError`, where a function is wanted that takes the sentence."""
    raise UserError(sentence)
