"""What several tests share: the folder of real images, a small data set, and running a script as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, env=environment,
                                capture_output=True, text=True, timeout=timeout)
        assert "Traceback" not in result.stderr, result.stderr
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result

    return run
