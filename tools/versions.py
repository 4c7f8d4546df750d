"""What a run was made with: versions of the main packages, and the commit of this code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "segment-anything",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "scikit-image",
    "pillow",
)


def package_versions() -> dict[str, str]:
    """Package -> version, or "missing"; python among them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def commit() -> str:
    """The project's commit, "-dirty" where files differ from it, or "unknown" without git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return answer.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
