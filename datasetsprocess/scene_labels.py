"""The truth of a whole scene, in colours or in class ids."""

from pathlib import Path
from typing import Any

import numpy as np

from tools.command import and_more, check
from tools.dataset import Dataset
from tools.labels import IGNORE, ColourDecoder
from tools.rasters import Raster

BAND = 256  # rows decoded at a time
MANY = 50  # more colours than a person chooses by hand

Unknown = dict[Any, int]  # colour (r,g,b) or number that is no class -> its pixels


def read_truth(truth: Raster, dataset: Dataset) -> tuple[np.ndarray, Unknown]:
    """Class ids (H,W) uint8 of a truth in colours or in class ids; unknown colours and numbers become 255.

    A palette image is read by colour where its palette shows the colours of the description, else by number. Raises
    `UserError` for a palette that is read by number and shows a class in the colour of another one.
    """
    height, width = truth.shape
    ids, unknown = np.empty((height, width), np.uint8), Unknown()
    bands = [ids[y : y + BAND] for y in range(0, height, BAND)]
    decode = ColourDecoder(dataset.colours, dataset.ignore_colours) if truth.kind == "rgb" else None
    for number, band in enumerate(bands):
        rows = truth.read(number * BAND, 0, len(band), width)
        band[:] = decode(rows, unknown) if decode else rows[..., 0]
    if not decode:
        counts = sum(np.bincount(band.ravel(), minlength=256) for band in bands)
        table, unknown = _decode_numbers(truth, np.asarray(counts), dataset)
        for band in bands:
            band[:] = table[band]
    return ids, unknown


def _decode_numbers(truth: Raster, counts: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, Unknown]:
    """Class ids (256,) uint8 of the numbers that a truth of one channel stores, and what is no class.

    `counts` (256,) are the pixels of each number; 255 is always ignored.
    """
    used = np.flatnonzero(counts[:IGNORE]).tolist()
    meaning: list[Any] = list(range(256))
    class_of: dict[Any, int] = {k: k for k in range(dataset.num_classes)}
    if truth.palette is not None:
        palette = [tuple(colour) for colour in truth.palette.tolist()]
        colours = {tuple(colour): k for k, colour in enumerate(dataset.colours.tolist())}
        ignored = {tuple(colour): IGNORE for colour in dataset.ignore_colours.tolist()}
        if _shows_classes(palette, used, set(colours), set(ignored)):
            meaning, class_of = palette, colours | ignored
        else:
            for number in set(used) & set(class_of):
                shown = colours.get(palette[number], number)
                check(
                    shown == number,
                    f"{truth.path} shows the number {number} in the colour of {dataset.classes[shown]}, but class "
                    f"{number} of dataset.toml is {dataset.classes[number]}: save the truth as an RGB image",
                )
    table, unknown = np.full(256, IGNORE, np.uint8), Unknown()
    for number in used:
        value = meaning[number]
        if value in class_of:
            table[number] = class_of[value]
        else:
            unknown[value] = unknown.get(value, 0) + int(counts[number])
    return table, unknown


def _shows_classes(palette: list[tuple], used: list[int], classes: set[tuple], ignored: set[tuple]) -> bool:
    """Whether a palette shows the described colours: those of all classes, or no others.

    `used` are the numbers in the image. A palette of all grey levels shows nothing.
    """
    if palette == [(level, level, level) for level in range(256)]:
        return False
    coloured = [number for number, colour in enumerate(palette) if any(colour)]
    shown = set(palette[: max([*used, *coloured], default=-1) + 1])  # without the black entries that fill a palette up
    return classes <= shown or shown <= classes | ignored


def describe(truth: Path, unknown: Unknown) -> str:
    """A sentence on the colours or numbers of a truth that are no class."""
    most = sorted(unknown, key=lambda value: (-unknown[value], str(value)))
    shown = and_more([f"{value} in {unknown[value]} pixels" for value in most], 5, ", ")
    what = "colours" if isinstance(most[0], tuple) else "numbers"
    if len(most) > MANY:
        shown += "; that many colours usually mean JPEG compression or antialiasing: export the truth without both"
    return (
        f"{truth} has {what} that are no class: {shown}. Fix the file, add a class or an ignore colour to "
        "dataset.toml, leave the scene out, or ignore these pixels (255) with --unknown-colours ignore --overwrite"
    )
