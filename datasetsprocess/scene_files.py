"""The files of the scenes that are to be cut: image and truth, found by name."""

import re
from dataclasses import dataclass
from pathlib import Path

from tools.command import UserError, check
from tools.dataset import SPLITS
from tools.rasters import SUFFIXES


@dataclass(frozen=True)
class Source:
    """The files of a scene."""

    scene: str
    image: Path
    truth: Path | None = None

    def state(self) -> list[list[int]]:
        """Bytes and time of change of each file: another under the same name must not pass for the old one."""
        states = [path.stat() for path in (self.image, self.truth) if path]
        return [[state.st_size, state.st_mtime_ns] for state in states]


def find_sources(
    raw: Path,
    scenes: dict[str, list[str]],
    places: dict[str, tuple[str, ...]],
    missing_scenes: str,
) -> dict[str, list[Source]]:
    """The files of every scene: split -> sources.

    `places` gives the paths of image and truth, or of the image alone, below `raw` for each split, without suffix and
    with {} for the scene.
    Raises `UserError` that lists what is not there (with `missing_scenes` "skip" only when that is everything), for a
    scene with two files, one in both splits, and names that are no plain file names.
    """
    check(raw.is_dir(), f"{raw} is missing: unpack the archives there as the top of this script says, or set --raw")
    names = [name for split in SPLITS for name in scenes.get(split, [])]
    for name in names:
        check(
            re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
            f'the scene "{name}" needs another name: only letters, digits, "_" and "-" are possible',
        )
        check(names.count(name) == 1, f"the scene {name} is listed twice: a scene belongs to one split")
    found: dict[str, list[Source]] = {split: [] for split in SPLITS}
    missing = []
    for split in SPLITS:
        for name in scenes.get(split, []):
            paths = {place.format(name): _find(raw / place.format(name)) for place in places[split]}
            if all(paths.values()):
                found[split].append(Source(name, *paths.values()))
            missing += [place for place, path in paths.items() if not path]
    shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    if missing and (missing_scenes == "stop" or not any(found.values())):
        raise UserError(
            f"{raw} lacks {shown} ({' or '.join(SUFFIXES)}): put the files there under these names (the top of "
            "this script says whence), or cut the scenes that are complete with --missing-scenes skip"
        )
    if missing:
        print(f"not in {raw}, so their scenes are skipped: {shown}")
    return found


def _find(stem: Path) -> Path | None:
    files = [path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()]
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1].name} are the same scene twice: remove one of them")
    return files[0] if files else None
