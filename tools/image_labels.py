"""Image-level labels as a csv: a column `id`, then one 0/1 column for each class."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tools.command import UserError, and_more, check
from tools.files import write_whole

SHOWN = 10  # faulty lines of a csv that one message lists


def write_image_labels(path: Path, classes: tuple[str, ...], image_labels: dict[str, np.ndarray]) -> None:
    """Write id -> (K,) bool, sorted by id."""
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *classes])
        for id in sorted(image_labels):
            writer.writerow([id, *image_labels[id].astype(int)])


def read_image_labels(
    path: Path, classes: tuple[str, ...], ids: Iterable[str], unfinished: bool = False
) -> dict[str, np.ndarray]:
    """Read the image-level labels of `ids`: id -> (K,) bool. The columns may be in any order.

    Empty lines and empty columns at the end, which spreadsheets add, are skipped. Raises `UserError` for a missing
    file, unknown or missing classes, values other than 0 and 1, an id that is repeated, unknown or missing, and an
    image without any class. With `unfinished`, images without a line or without a class are not yet labelled and are
    left out.
    """
    header, *rows = _read_rows(path)
    if header[:1] != ["id"] or sorted(header[1:]) != sorted(classes):
        raise UserError(
            f"{path} must begin with the line id,{','.join(classes)}, but it begins with "
            f"{','.join(header)[:200] or 'nothing'}{_header_hint(header, classes)}"
        )
    columns = [header.index(name) for name in classes]
    images, image_labels, faults = set(ids), {}, []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        id = row[0] if row[0] in images else row[0].strip()
        values = [row[column].strip() for column in columns] if len(row) == len(header) else []
        if not values or not {"0", "1"}.issuperset(values):
            fault = (
                f"expected an id and {len(classes)} values 0 or 1, found {','.join(row)[:200]}: write 1 where the "
                "class is in the image and 0 where it is not, separated by commas"
            )
        elif id in image_labels:
            fault = f"{id} is listed a second time"
        elif id not in images:
            stem = Path(id).stem
            hint = f": write {stem} without the suffix" if stem in images else " (has a spreadsheet changed the id?)"
            fault = f"there is no image images/{id}.png{hint}"
        elif "1" in values:
            image_labels[id] = np.array([value == "1" for value in values])
            continue
        elif unfinished:
            continue
        else:
            fault = f"{id} has no class: give it at least one, or remove the image"
        faults.append(f"line {number}: {fault}")
    if faults:
        raise UserError(f"{path}, {and_more(faults, SHOWN)}")
    missing = images - image_labels.keys()
    if missing and not unfinished:
        raise UserError(
            f"{path} has no line for {len(missing)} of the images, for example {min(missing)}: add the lines, or run "
            "process.py again if there are label maps"
        )
    return image_labels


def read_content(path: Path) -> bytes:
    """The bytes of the file; raises `UserError` when it is missing."""
    check(
        path.is_file(),
        f"{path} is missing: run python datasetsprocess/process.py, or label the patches (docs/own_data.md)",
    )
    return path.read_bytes()


def _read_rows(path: Path) -> list[list[str]]:
    """The lines, without empty cells at their ends; the first one, the header, without spaces around its names."""
    try:
        rows = list(csv.reader(io.StringIO(read_content(path).decode("utf-8-sig"), newline=""))) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a csv text file in UTF-8 ({error}): save it as "CSV UTF-8"') from None
    for row in rows:
        while row and not row[-1].strip():
            row.pop()
    rows[0] = [cell.strip() for cell in rows[0]]
    return rows


def _header_hint(header: list[str], classes: tuple[str, ...]) -> str:
    """What to change in the first line, as the end of a sentence; "" where the two lines say enough."""
    first, names = (header[0] if header else ""), header[1:]
    for sign, called in ((";", "semicolons"), ("\t", "tabs")):
        if sign in first:
            return f": its columns are separated by {called}; save it as a csv with commas"
    if first.lower().startswith("sep="):
        return ": remove this line"
    if first != "id":
        return ""
    missing = [name for name in classes if name not in names]
    unknown = [name for name in names if name not in classes]
    in_place = len(names) == len(classes) and all(a == b for a, b in zip(names, classes, strict=True) if a in classes)
    if missing and len(missing) == len(unknown) and (in_place or len(missing) == 1):  # renamed classes
        renamed = " and ".join(f"{old} is called {new}" for old, new in zip(unknown, missing, strict=True))
        return f": {renamed} in dataset.toml; change the name in one of the two files"
    hints = []
    if missing:
        hints.append(f"the column of {', '.join(missing)} is missing")
    if unknown:
        hints.append(f"dataset.toml has no class {', '.join(unknown)}")
    return ": " + ("; ".join(hints) or "a class has two columns")
