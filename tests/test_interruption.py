"""Ctrl-C, SIGTERM and kill -9: a stopped step says how to continue, leaves nobody behind, and continues exactly."""

import fcntl
import os
import random
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.programs import PROGRAMS, finish, living, started, until
from tests.steps import same_results
from tests.test_splitting import describe, digests, script, small_vaihingen
from tools.workers import in_workers


@contextmanager
def stalled(file: Path):
    """A file that nobody else can open for 45 seconds. Yields a function that tells whether somebody has tried to.

    The lease on the file makes the kernel stop whoever opens it, and send SIGIO to this process.
    """
    tries, descriptor = [], os.open(file, os.O_RDWR)
    before = signal.signal(signal.SIGIO, lambda *_: tries.append(None))
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        pytest.skip(f"this file system gives no leases ({error})")
    try:
        yield lambda: bool(tries)
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def ends_well(process, number) -> bool:
    """Ctrl-C reaches all processes of a terminal, SIGTERM the first one; whether the end is as it should be."""
    start = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=30)
    until(lambda: not living(process), 10)
    assert process.returncode == 128 + number and "Traceback" not in stderr, stderr
    assert stderr.count("stopped; the same command continues with the rest") == 1, stderr
    return time.monotonic() - start < 25  # on a busy machine, too


QUICK = {("process", signal.SIGTERM), ("get_se_map", signal.SIGINT), ("train_classification", signal.SIGTERM)}
SIGNALS = [
    pytest.param(name, number, marks=() if (name, number) in QUICK else pytest.mark.long)
    for name in PROGRAMS
    for number in (signal.SIGINT, signal.SIGTERM)
]


@pytest.mark.parametrize(("name", "number"), SIGNALS)
def test_a_signal_ends_a_step_in_seconds(copy, name, number):
    program = PROGRAMS[name]
    program.remove_output(copy)
    with stalled(copy / program.late) as read, started(program.command(copy)) as process:
        until(read)
        assert ends_well(process, number)  # what a worker was writing stays half, until the next run removes it


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_at_random_moments_a_step_continues_exactly(finished, copy, name):
    program, folder, moments = PROGRAMS[name], copy / PROGRAMS[name].output, random.Random(name)
    expected = program.expected(finished, copy)
    program.remove_output(copy)
    for longest in (2.5, 0.5):  # while it loads, or any time after it has begun
        with started(program.command(copy)) as process:
            if longest < 1 and name not in ("process", "evaluate_miou"):  # these two write at their very end
                until(lambda: list(folder.glob(f"*{program.files}")) or process.poll() is not None)
            time.sleep(moments.uniform(0, longest))
            process.kill()
            until(lambda: not living(process), 15)  # whom it had started ends by itself
    finish(program.command(copy))
    assert not list(folder.rglob(".*.tmp*"))
    assert same_results(folder, expected, program.files)


@pytest.mark.parametrize("end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_stopped_or_killed_splitter_continues_exactly(tmp_path, end):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for root in (whole, cut):
        small_vaihingen(root, ("1", "2", "3"), 500, 600)
        scenes = '[scenes]\ntrain = ["1", "3"]\ntest = ["2"]\n'
        describe(root, "small", f'base = "vaihingen"\npatch_size = 16\n{scenes}')
    words = [str(script("vaihingen")), "--dataset", "small", "--workers", "1", "--root"]
    finish([*words, str(whole)])
    images = cut / "datasets" / "small" / "train" / "images"
    for patches in (1, 200):
        with started([*words, str(cut)]) as process:
            until(lambda wanted=patches: len(list(images.glob("*.png"))) >= wanted)
            if end == signal.SIGTERM:
                assert ends_well(process, end)
            else:
                process.kill()
                until(lambda process=process: not living(process), 15)
    finish([*words, str(cut)])
    assert digests(cut / "datasets") == digests(whole / "datasets")


@pytest.mark.parametrize("name", ["get_se_map", pytest.param("infer_classification", marks=pytest.mark.long)])
def test_a_worker_that_the_system_ends_is_explained(finished, copy, name):
    """As when the memory is full: a worker of a pool, and one of torch's reading processes."""
    program = PROGRAMS[name]
    program.remove_output(copy)
    with stalled(copy / program.late) as read, started(program.command(copy)) as process:
        until(read)
        for pid in living(process)[1:]:
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        until(lambda: not living(process), 10)
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert "the system ended a worker process, most often because the memory" in stderr and "continues" in stderr
    finish(program.command(copy))
    assert same_results(copy / program.output, finished / program.output, program.files)


def full_disk(number):
    time.sleep(0.05)
    if number == 3:
        raise OSError(28, "No space left on device")


def test_an_error_in_a_worker_leaves_no_second_one_in_the_pool(monkeypatch):
    """A future that is cancelled when its worker is killed would end the pool's thread with a traceback."""
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            list(in_workers(full_disk, range(200), 2))
    assert not errors


def test_workers_end_with_a_killed_program(copy):
    program = PROGRAMS["get_se_map"]
    program.remove_output(copy)
    with stalled(copy / program.late) as read, started(program.command(copy)) as process:
        until(read)
        assert len(living(process)) > 2
        process.kill()
        until(lambda: not living(process), 10)
