"""Every step as a user starts it, for tests that kill it, fill its disk or give it several processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.steps import STEPS, options

TINY = "datasets/tiny"


@dataclass(frozen=True)
class Program:
    """A step: how it is started, what it makes, and a late one of the files that it reads."""

    script: str
    constants: dict
    output: str  # folder under the root
    files: str  # suffix of what a run must leave equal
    late: str  # file under the root

    def command(self, root: Path, **constants) -> list[str]:
        words = [self.script, "--dataset", "tiny", "--root", root, *options(self.constants | constants)]
        return list(map(str, words))

    def expected(self, finished: Path, copy: Path) -> Path:
        """The folder that an undisturbed run makes. The fixtures end with step 7."""
        if any((finished / self.output).glob(f"*{self.files}")):
            return finished / self.output
        finish(self.command(copy))
        return (copy / self.output).rename(copy / "expected")

    def remove_output(self, root: Path) -> None:
        everything = self.output != f"{TINY}/train"  # there lie the images, too
        for path in (root / self.output).glob("*" if everything else f"*{self.files}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _steps() -> dict[str, Program]:
    late = {
        "generate_refined_pseudo": "experiments/tiny/prc/pseudo_labels/train_7.png",
        "inference_segmentation": f"{TINY}/test/images/test_2.png",
        "generate_refined_seg": "experiments/tiny/prc/segmentation/test_2.png",
    }
    return {
        script: Program(
            f"{script}.py",
            constants | {"workers": 2 if "generate" in script or "make" in script else 1},
            f"experiments/tiny/prc/{folder}",
            suffix,
            late.get(script, f"{TINY}/train/images/train_7.png"),
        )
        for script, (folder, constants, _, suffix) in STEPS.items()
    }


PROGRAMS = {
    "process": Program(
        "datasetsprocess/process.py", {"workers": 0}, f"{TINY}/train", ".csv", f"{TINY}/train/labels/train_7.png"
    ),
    "get_se_map": Program(
        "PRC_SAM/get_se_map.py",
        {"generator": "felzenszwalb", "workers": 2},
        f"{TINY}/train/sam_masks",
        ".npz",
        f"{TINY}/train/images/train_7.png",
    ),
    **_steps(),
    "evaluate_miou": Program(
        "evaluate_miou.py", {"workers": 0}, "experiments/tiny/prc/scores", ".csv", f"{TINY}/test/labels/test_2.png"
    ),
}


def torchrun(processes: int) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)


@contextmanager
def started(words: list[str], launcher: tuple[str, ...] = ()):
    """The program running in a session of its own; whatever is left of it is killed at the end."""
    mark = f"STARTED={uuid.uuid4()}"  # by which to know those whom it starts, in whatever session
    process = subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that run in the background ignore Ctrl-C, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.mark = mark.encode()
    try:
        yield process
    finally:
        for pid in living(process):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def living(process: subprocess.Popen) -> list[int]:
    """The processes that run of it and of all that it has started, itself first."""
    pids = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            ours = process.mark in environment.read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is another user's
            continue
        if ours:
            pids.append(int(environment.parent.name))
    return sorted(pids, key=lambda pid: (pid != process.pid, pid))


def until(condition, seconds: float = 90):
    """Wait until condition() holds, and return what it gives."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.005)
    return answer


def finish(words: list[str], launcher: tuple[str, ...] = (), fails: bool = False) -> str:
    """Run a program to its end -> stderr."""
    with started(words, launcher) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails and (launcher or "Traceback" not in stderr), stdout + stderr
    return stderr
