"""run.json: the record of a step, which every later step and the report read back."""

import platform
import subprocess
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tools.files import read_json

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
    "rasterio",
)


class Run(BaseModel):
    """What a folder was made with, and how far the run came."""

    model_config = ConfigDict(extra="allow")

    script: str = ""
    command: str = ""
    constants: dict[str, Any]
    # name -> when the folder that was read was started, or the hash of a file
    reads: dict[str, str] = Field({}, validation_alias=AliasChoices("reads", "inputs"))  # inputs: in version 0.1.0
    notes: dict[str, Any] = {}  # facts that later tables must show, such as a stand-in
    warnings: list[str] = []
    origins: dict[str, str] = {}  # constant that is None -> where its value comes from
    hardware: dict[str, Any] = {}  # tools.devices.device_facts
    device: str = "cpu"
    processes: int = 1
    packages: dict[str, str] = {}
    commit: str = ""
    started: str
    seconds: float = Field(ge=0)
    files: int = 0
    finished: bool
    continued: list[dict[str, Any]] = []  # the runs that continued this one

    def part(self) -> dict[str, Any]:
        """What may differ in a run that continues this one."""
        return self.model_dump(include={"script", "command", "device", "hardware", "processes", "packages", "commit"})


def read_run(folder: Path, remedy: str = "run the step again with --overwrite") -> Run:
    """The run.json of a folder; raises FileNotFoundError, and `UserError` when it is damaged."""
    return read_json(folder / "run.json", Run, remedy)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, str]:
    """Name -> "gamma: 0.7 there, 0.6 now", for each value that differs, but those of `skip`."""
    names = sorted((before.keys() | now.keys()) - set(skip))
    return {
        name: f"{name}: {before.get(name)} there, {now.get(name)} now"
        for name in names
        if before.get(name) != now.get(name)
    }


def package_versions() -> dict[str, str]:
    """Package -> version, or "missing"; python among them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def commit() -> str:
    """The project's commit, "-dirty" where files differ from it; "unknown" outside a git checkout of the project."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        answer = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:  # unpacked inside another repository
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
