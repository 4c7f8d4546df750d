"""A data set: its description, its patches on disk and their image-level labels."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.command import and_more, check
from tools.constants import ROOT
from tools.description import Layout, Method, read_description
from tools.image_labels import read_content, read_image_labels
from tools.steps import SPLITS


@dataclass(frozen=True)
class Dataset:
    """One data set: the description, and where its patches are under `folder` = <root>/datasets/<name>."""

    name: str
    title: str
    folder: Path
    patch_size: int
    stride: int
    classes: tuple[str, ...]
    colours: np.ndarray  # (K,3) uint8
    ignore_colours: np.ndarray  # (J,3) uint8
    left_out_of_mean: tuple[str, ...]  # classes that the headline mIoU leaves out, such as ISPRS's clutter
    scenes: dict[str, list[str]]  # split -> scene names; empty where the raw folders decide
    rules: dict[str, Any] = field(default_factory=dict)  # the keys of `Rules` that the description gives
    layout: Layout | None = None  # where the files of a scene are; None where [layout] is missing
    paper: dict[str, float] = field(default_factory=dict)  # the figures of `Paper`; empty where there are none
    method: Method = field(default_factory=Method)

    @property
    def num_classes(self) -> int:
        """K, including the classes that the mean leaves out."""
        return len(self.classes)

    @property
    def scored(self) -> np.ndarray:
        """(K,) bool: the classes in the headline mean."""
        return np.array([name not in self.left_out_of_mean for name in self.classes])

    @property
    def legend(self) -> list[tuple[str, list[int]]]:
        """(name, colour) of each class, for pictures."""
        return list(zip(self.classes, self.colours.tolist(), strict=True))

    @property
    def background(self) -> int | None:
        """Index of the background class that [rules] names; None if there is no such class."""
        name = self.rules.get("background")
        return self.classes.index(name) if name in self.classes else None

    def method_value(self, name: str, constant: float | None) -> tuple[float, str]:
        """A constant of the method, and where its value comes from, for run.json.

        `name` is a key of `Method`; a `constant` other than None takes precedence over the description.
        """
        if constant is not None:
            return constant, "constant"
        return getattr(self.method, name), "dataset.toml" if name in self.method.model_fields_set else "default"

    def images(self, split: str) -> Path:
        """<id>.png, three channels of 8 bits."""
        return self.folder / split / "images"

    def labels(self, split: str) -> Path:
        """<id>.png, the pixel truth as class ids, 255 = ignore."""
        return self.folder / split / "labels"

    def sam_masks(self, split: str) -> Path:
        """<id>.npz, described in tools/masks.py."""
        return self.folder / split / "sam_masks"

    def image_labels_file(self, split: str) -> Path:
        """A csv: id, then 0 or 1 for each class in its order."""
        return self.folder / split / "image_labels.csv"

    def ids(self, split: str) -> list[str]:
        """The patches of a split, sorted.

        Raises `UserError` when there are none, and for names and files that a later step could not handle.
        """
        check(split in SPLITS, f'split is "{split}", but it must be one of {", ".join(SPLITS)}')
        folder, entries = self.images(split), []
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as files:
            entries = [entry for entry in files if entry.name.lower().endswith(".png") and entry.name[0] != "."]
        check(
            bool(entries),
            f"{folder} holds no png images: cut the scenes into patches with the data set's script in datasetsprocess "
            "first",
        )
        longest = _longest_id(folder)
        faults = sorted(fault for entry in entries if (fault := _fault(entry, longest)))
        check(not faults, f"{folder} has files that the steps cannot use:\n  {and_more(faults)}")
        return sorted(entry.name[:-4] for entry in entries)

    def image_labels(self, split: str) -> dict[str, np.ndarray]:
        """Image-level labels of a split: id -> (K,) bool, one for every image of the split."""
        return read_image_labels(self.image_labels_file(split), self.classes, self.ids(split))

    def image_labels_hash(self, split: str) -> str:
        """SHA-256 of image_labels.csv, by which a step notices that the file has changed since its first run."""
        return hashlib.sha256(read_content(self.image_labels_file(split))).hexdigest()


def load_dataset(name: str, root: Path = ROOT) -> Dataset:
    """The data set that `read_description` finds under this name, with its patches under <root>/datasets/<name>."""
    description = read_description(name, Path(root))
    return Dataset(
        name=name,
        title=description.title or name,
        folder=Path(root) / "datasets" / name,
        patch_size=description.patch_size,
        stride=description.stride or description.patch_size,
        classes=tuple(entry.name for entry in description.classes),
        colours=np.array([entry.colour for entry in description.classes], np.uint8),
        ignore_colours=np.array(description.ignore_colours, np.uint8).reshape(-1, 3),
        left_out_of_mean=tuple(description.left_out_of_mean),
        scenes={split: names for split, names in description.scenes.items()},
        rules=description.rules.model_dump(exclude_unset=True),
        layout=description.layout,
        paper=description.paper.model_dump() if description.paper else {},
        method=description.method,
    )


def _longest_id(folder: Path) -> int:
    """Bytes that the file system leaves for an id: later steps write .<id>.<process>.tmp.npz before <id>.npz."""
    longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    return longest - len(f"..{2**22}.tmp.npz")


def _fault(entry: os.DirEntry, longest: int) -> str:
    """Why a later step could not handle an image, and what to do; "" for a good one. Looks at the name, not inside."""
    name, id, suffix = entry.name, entry.name[:-4], entry.name[-4:]
    try:
        bytes_of_id = len(id.encode())
    except UnicodeEncodeError:
        return f"the name {name!a} is not UTF-8: rename the file"
    if suffix != ".png":
        return f"{name} ends in {suffix}: rename it to {id}.png"
    if id.lower() == "contact_sheet":
        return f"{name} has the name that every step gives to its overview picture: rename the file"
    if bytes_of_id > longest:
        return f"the name {id[:40]}... has {bytes_of_id} bytes, but at most {longest} are possible: shorten it"
    if not entry.is_file():
        return f"{name} is not a regular file: replace it by an image, or remove it"
    return ""
