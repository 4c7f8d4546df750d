"""What several tests share: the folder of real images, a small data set, and running a script as a user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
# Before torch is loaded: threads that wait for each other make a busy machine many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PRC_TEST_DEVICE" not in os.environ:  # set by make test-gpu; no other test may use a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A busy or slow machine is no fault of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# These tests stop programs by Unix's signals and find their processes in /proc, or mount a disk.
LINUX_ALONE = ["test_full_disk.py", "test_interruption.py", "test_processes.py"]
collect_ignore = [] if sys.platform == "linux" else LINUX_ALONE


@pytest.fixture
def shared_data() -> Path:
    """Real aerial images beside the checkout; tests that need them skip where they are missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real test images (shared/data beside the checkout) are not here")
    return folder


@pytest.fixture(scope="session")
def run_script():
    """run_script("step.py", "--constant", value, ..., fails=False) -> CompletedProcess with text output."""

    def run(script: str, *arguments, fails: bool = False, cwd: Path = ROOT, timeout: int = 300):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert "Traceback" not in result.stderr, result.stderr
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result

    return run


TINY = """
title = "Tiny shapes"
patch_size = 64
classes = [
  {name = "ground", colour = [255, 255, 255]},
  {name = "roof", colour = [0, 0, 255]},
  {name = "tree", colour = [0, 255, 0]},
]
"""
TINY_COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0]], np.uint8)


@pytest.fixture(scope="session")
def make_tiny_dataset():
    """make_tiny_dataset(root) writes datasets/tiny: 10 train and 4 test patches of 64 px, noisy shapes on ground."""

    def make(root: Path) -> Path:
        rng, folder = np.random.default_rng(0), root / "datasets" / "tiny"
        for split, count in (("train", 10), ("test", 4)):
            for part in ("images", "labels"):
                (folder / split / part).mkdir(parents=True)
            for index in range(count):
                label = Image.new("P", (64, 64))
                label.putpalette(TINY_COLOURS.tobytes())
                draw = ImageDraw.Draw(label)
                for shape, k in ((draw.rectangle, 1), (draw.ellipse, 2)):
                    if index % 3 != k - 1:  # ground alone, or with one or both of the others
                        x, y = rng.integers(0, 36, 2)
                        shape((int(x), int(y), int(x) + 26, int(y) + 22), fill=k)
                colours = np.array([[130, 120, 100], [190, 80, 70], [50, 110, 50]])[np.array(label)]
                image = (colours + rng.normal(0, 12, colours.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / "images" / f"{split}_{index}.png")
                label.save(folder / split / "labels" / f"{split}_{index}.png")
        (folder / "dataset.toml").write_text(TINY)
        return folder

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory, make_tiny_dataset, run_script):
    """The root after process.py, get_se_map.py and steps 1 to 7, each run as a program.

    Where several processes of pytest-xdist share the tests, the first one makes it and each has a copy of its own.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _finish(tmp_path_factory.mktemp("finished") / "root", make_tiny_dataset, run_script)
    shared = tmp_path_factory.getbasetemp().parent / "finished"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            _finish(shared.with_name("beginning"), make_tiny_dataset, run_script).rename(shared)
    return shutil.copytree(shared, tmp_path_factory.mktemp("finished") / "root")


def _finish(root, make_tiny_dataset, run_script):
    from tests.steps import STEPS, options  # torch takes seconds to load, and few tests come here

    make_tiny_dataset(root)
    run_script("datasetsprocess/process.py", "--dataset", "tiny", "--root", root)
    run_script(
        "PRC_SAM/get_se_map.py", "--dataset", "tiny", "--root", root, "--generator", "felzenszwalb", "--workers", 0
    )
    for script, (_, constants, _, _) in STEPS.items():
        run_script(f"{script}.py", "--dataset", "tiny", "--root", root, *options(constants))
    return root


@pytest.fixture
def copy(finished, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "root")
