"""What a data set is: its description (dataset.toml), its patches on disk and their image-level labels."""

import csv
import hashlib
import io
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.command import UserError
from tools.constants import ROOT
from tools.files import write_whole
from tools.steps import SPLITS

MOST_SLIPS = 10  # lines of a csv that are told at once
KEYS = {
    "base",
    "title",
    "patch_size",
    "stride",
    "classes",
    "ignore_colours",
    "left_out_of_mean",
    "scenes",
    "rules",
    "paper",
}


@dataclass(frozen=True)
class Dataset:
    """One data set: the description, and where its patches lie under `folder` = <root>/datasets/<name>."""

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
    rules: dict = field(default_factory=dict)  # numbers of the rule that cuts this data set into patches
    paper: dict = field(default_factory=dict)  # the paper's figures, in per cent; empty where it gives none

    @property
    def num_classes(self) -> int:
        """K, with the classes that the mean leaves out."""
        return len(self.classes)

    @property
    def scored(self) -> np.ndarray:
        """(K,) bool: the classes in the headline mean."""
        return np.array([name not in self.left_out_of_mean for name in self.classes])

    @property
    def legend(self) -> list[tuple[str, list[int]]]:
        """(name, colour) of each class, for pictures."""
        return list(zip(self.classes, self.colours.tolist(), strict=True))

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
        """The patches of a split, sorted; raises `UserError` when there are none."""
        if split not in SPLITS:
            raise UserError(f'split is "{split}", but it must be one of {", ".join(SPLITS)}')
        ids = sorted(path.stem for path in self.images(split).glob("[!.]*.png"))  # hidden files are no images
        if not ids:
            raise UserError(
                f"{self.images(split)} holds no png images: cut the scenes into patches with the data set's "
                "script in datasetsprocess first"
            )
        return ids

    def image_labels_hash(self, split: str) -> str:
        """SHA-256 of image_labels.csv: a run that continues must read the same labels."""
        return hashlib.sha256(self.image_labels_file(split).read_bytes()).hexdigest()

    def image_labels(self, split: str) -> dict[str, np.ndarray]:
        """Image-level labels of a split: id -> (K,) bool, one for every image of the split."""
        return read_image_labels(self.image_labels_file(split), self.classes, self.ids(split))


def load_dataset(name: str, root: Path = ROOT) -> Dataset:
    """Read <root>/datasets/<name>/dataset.toml, or the description of that name which comes with the project.

    `base = "<other>"` takes every line not given from another description.
    """
    description = _read_description(name, Path(root), ())
    path = _description_file(name, Path(root))
    missing = {"patch_size", "classes"} - description.keys()
    if missing:
        raise UserError(f"{path} lacks {' and '.join(sorted(missing))}")
    return _build(name, path, Path(root) / "datasets" / name, description)


def _description_file(name: str, root: Path) -> Path:
    own, shipped = root / "datasets" / name / "dataset.toml", ROOT / "datasetsprocess" / f"{name}.toml"
    if own.exists():
        return own
    if shipped.exists():
        return shipped
    known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.toml")))
    raise UserError(f'there is no data set "{name}": write {own} (docs/own_data.md), or use one of {known}')


def _read_description(name: str, root: Path, seen: tuple[str, ...]) -> dict:
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        what = f"base of {seen[-1]}" if seen else "dataset"
        raise UserError(f'{what} is "{name}", but a data set\'s name holds only letters, digits, "_" and "-"')
    path = _description_file(name, root)
    if name in seen:
        raise UserError(f"{path}: base leads back to itself ({' -> '.join([*seen, name])})")
    try:
        description = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    unknown = description.keys() - KEYS
    if unknown:
        raise UserError(f"{path} holds the unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(KEYS))}")
    if "base" in description:
        base = _read_description(description.pop("base"), root, (*seen, name))
        if "patch_size" in description:
            base.pop("stride", None)  # it belongs to the other patch size: larger than ours, it would leave gaps
        description = base | description
    return description


def _build(name: str, path: Path, folder: Path, description: dict) -> Dataset:
    entries = description["classes"]
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and entry.keys() == {"name", "colour"} for entry in entries
    ):
        raise UserError(f'{path}: classes must be a list of {{name = "...", colour = [r, g, b]}}')
    names = tuple(str(entry["name"]) for entry in entries)
    if not 1 <= len(names) <= 250:
        raise UserError(f"{path} has {len(names)} classes, but 1 to 250 are possible")
    for entry in names:  # it must come back unchanged from a column of image_labels.csv
        if entry != entry.strip() or entry in ("", "id") or not entry.isprintable():
            raise UserError(
                f'{path}: the class "{entry}" needs another name: not id, without spaces at its ends and line breaks'
            )
    for what, kind, called in (
        ("ignore_colours", list, "list"),
        ("left_out_of_mean", list, "list"),
        ("scenes", dict, "table"),
        ("rules", dict, "table"),
        ("paper", dict, "table"),
    ):
        if not isinstance(description.get(what, kind()), kind):
            raise UserError(f"{path}: {what} is {description[what]}, but it must be a {called}")
    ignore_colours = description.get("ignore_colours", [])
    for what, colour in [(entry["name"], entry["colour"]) for entry in entries] + [
        ("ignore", c) for c in ignore_colours
    ]:
        if not (
            isinstance(colour, list) and len(colour) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in colour)
        ):
            raise UserError(f"{path}: the colour of {what} is {colour}, not three whole numbers from 0 to 255")
    colours = [tuple(entry["colour"]) for entry in entries]
    every = colours + [tuple(colour) for colour in ignore_colours]
    if len(set(names)) < len(names) or len(set(every)) < len(every):
        raise UserError(f"{path}: two classes share a name or a colour")
    patch_size = description["patch_size"]
    stride = description.get("stride", patch_size)
    for what, number in (("patch_size", patch_size), ("stride", stride)):
        if not isinstance(number, int) or number < 16:
            raise UserError(f"{path}: {what} is {number}, but it must be a whole number of at least 16 pixels")
    left_out = tuple(map(str, description.get("left_out_of_mean", [])))
    if not set(left_out) < set(names):
        raise UserError(
            f"{path}: left_out_of_mean names {', '.join(left_out)}, but it must name some of the classes, not all: "
            f"{', '.join(names)}"
        )
    return Dataset(
        name=name,
        title=description.get("title", name),
        folder=folder,
        patch_size=patch_size,
        stride=stride,
        classes=names,
        colours=np.array(colours, np.uint8).reshape(-1, 3),
        ignore_colours=np.array(ignore_colours, np.uint8).reshape(-1, 3),
        left_out_of_mean=left_out,
        scenes=description.get("scenes", {}),
        rules=description.get("rules", {}),
        # a derived or rewritten data set is not the paper's, whatever it took over from `base`
        paper=description.get("paper", {}) if (ROOT / "datasetsprocess" / f"{name}.toml").exists() else {},
    )


def write_image_labels(path: Path, classes: tuple[str, ...], labels: dict[str, np.ndarray]) -> None:
    """Write id -> (K,) bool as csv: a column `id`, then one 0/1 column for each class name."""
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *classes])
        for id in sorted(labels):
            writer.writerow([id, *labels[id].astype(int)])


def read_image_labels(
    path: Path, classes: tuple[str, ...], ids: list[str], unfinished: bool = False
) -> dict[str, np.ndarray]:
    """Read the image-level labels of `ids`: id -> (K,) bool. The columns may stand in any order.

    `unfinished`: images without a line and lines without any class are not yet labelled, and are left out.

    Raises `UserError` for a missing file, unknown or missing classes, values other than 0 and 1, an id that is given
    twice, has no image or is missing, and an image without any class. Empty lines and columns at the end, which
    spreadsheets like to leave, do not count.
    """
    if not path.exists():
        raise UserError(
            f"{path} is missing: run python datasetsprocess/process.py, or write it by hand (docs/own_data.md)"
        )
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a csv text file in UTF-8 ({error}): save it as "CSV UTF-8"') from None
    rows = [_without_empty_end(row) for row in rows]
    header = [cell.strip() for cell in rows[0]] if rows else []
    if sorted(header[1:]) != sorted(classes) or header[:1] != ["id"]:
        raise UserError(
            f"{path} must begin with the line id,{','.join(classes)}, but begins with "
            f"{','.join(header)[:200] or 'nothing'}{_header_slip(header, classes)}"
        )
    columns = [header.index(name) for name in classes]
    wanted, labels, slips = set(ids), {}, []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        id = row[0] if row[0] in wanted else row[0].strip()
        values = [row[column].strip() for column in columns] if len(row) == len(header) else []
        slip = ""
        if not values or not {"0", "1"}.issuperset(values):
            slip = (
                f"expected an id and {len(classes)} values 0 or 1, found {','.join(row)[:200]}: "
                "1 where the class is in the image, 0 where not, separated by commas"
            )
        elif id in labels:
            slip = f"{id} is given a second time"
        elif id not in wanted:
            stem = Path(id).stem
            hint = f": write {stem} alone" if stem in wanted else " (has a spreadsheet changed the id?)"
            slip = f"there is no image {id}.png beside it in images/{hint}"
        elif "1" not in values:
            slip = "" if unfinished else f"{id} has no class at all; give it one or remove the image"
        else:
            labels[id] = np.array([value == "1" for value in values])
        slips += [f"line {number}: {slip}"] if slip else []
    if slips:
        more = f"\n  and {len(slips) - MOST_SLIPS} lines more" if len(slips) > MOST_SLIPS else ""
        raise UserError(f"{path}, " + "\n  ".join(slips[:MOST_SLIPS]) + more)
    missing = wanted - labels.keys()
    if missing and not unfinished:
        raise UserError(
            f"{path} lacks {len(missing)} of the images, {min(missing)} for one: add their lines, or run process.py "
            "again where there are label maps"
        )
    return labels


def _without_empty_end(row: list[str]) -> list[str]:
    while row and not row[-1].strip():
        row = row[:-1]
    return row


def _header_slip(header: list[str], classes: tuple[str, ...]) -> str:
    """What is wrong with the first line, as the end of a sentence; "" where it must speak for itself."""
    first = header[0] if header else ""
    for sign, called in ((";", "semicolons"), ("\t", "tabs")):
        if sign in first:
            return f": its columns are separated by {called}, save it as a csv with commas"
    if first.lower().startswith("sep="):
        return ": remove this line"
    if first != "id":
        return ""
    lacking = [name for name in classes if name not in header]
    foreign = [name for name in header[1:] if name not in classes]
    return (
        (f": the column of {', '.join(lacking)} is missing" if lacking else "")
        + (f": {', '.join(foreign)} is no class of dataset.toml" if foreign else "")
        + ("" if lacking or foreign else ": a class stands twice")
    )
