"""The files of the scenes that are cut: image and truth, found by name."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.command import UserError, and_more, check
from tools.rasters import LONGEST_NAME, SUFFIXES
from tools.steps import SPLITS

SCENE = "{scene}"  # stands for the name of a scene in a path


@dataclass(frozen=True)
class Source:
    """The files of a scene."""

    scene: str
    image: Path
    truth: Path | None = None

    def state(self) -> list[list[int]]:
        """Size in bytes and modification time of each file, by which a replaced file is recognised."""
        states = [path.stat() for path in (self.image, self.truth) if path]
        return [[state.st_size, state.st_mtime_ns] for state in states]


def find_sources(
    raw: Path,
    scenes: Mapping[str, list[str]],
    places: Mapping[str, Sequence[str]],
    missing_scenes: str,
) -> dict[str, list[Source]]:
    """The files of every scene: split -> sources.

    `places` gives for each split the paths of image and truth, or of the image alone, below `raw`, without suffix and
    with {scene} for the scene. Raises `UserError` for missing files (with `missing_scenes` "skip" only when nothing is
    complete), for a scene with two files, a scene in both splits, and a name that patches cannot have.
    """
    check(raw.is_dir(), f"{raw} is missing: unpack the archives there as this script's docstring says, or set --raw")
    names = [name for split in SPLITS for name in scenes.get(split, [])]
    for name in names:
        check(
            re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}", name) is not None,
            f'the scene "{name}" needs another name, of at most {LONGEST_NAME} letters, digits, "_" and "-": its '
            "patches are named after it",
        )
        check(names.count(name) == 1, f"the scene {name} is listed twice: a scene belongs to one split")
    sources: dict[str, list[Source]] = {split: [] for split in SPLITS}
    missing = []
    files = cache(scene_files)
    for split in SPLITS:
        for name in scenes.get(split, []):
            paths: list[Path] = []
            for pattern in places[split]:
                place = pattern.replace(SCENE, name)
                same = files((raw / place).parent).get(Path(place).name, [])
                check(len(same) < 2, f"{' and '.join(map(str, same))} are the same scene: remove one of them")
                paths += same
                if not same:
                    missing.append(place)
            if len(paths) == len(places[split]):
                sources[split].append(Source(name, *paths))
    shown = and_more(missing, 6, ", ")
    if missing and (missing_scenes == "stop" or not any(sources.values())):
        raise UserError(
            f"{raw} has no {shown} ({' or '.join(SUFFIXES)}): put the files there under these names (this script's "
            "docstring says where they come from), or cut only the complete scenes with --missing-scenes skip"
        )
    if missing:
        print(f"missing in {raw}, so their scenes are skipped: {shown}")
    return sources


def scene_names(raw: Path, places: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Split -> the scenes of which at least one file is in the raw folder, sorted; `places` as in `find_sources`."""
    names: dict[str, set[str]] = {split: set() for split in places}
    for split, patterns in places.items():
        for pattern in patterns:
            before, _, behind = Path(pattern).name.partition(SCENE)
            for file in scene_files((raw / pattern).parent):
                if file.startswith(before) and file.endswith(behind):
                    names[split].add(file.removeprefix(before).removesuffix(behind))
    return {split: sorted(scenes) for split, scenes in names.items()}


def scene_files(folder: Path) -> dict[str, list[Path]]:
    """Name without suffix -> the images of that name in a folder; hidden files are left out."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix.lower() in SUFFIXES:
            files[path.stem].append(path)
    return files
