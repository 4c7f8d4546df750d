"""The truth of a whole scene, in colours or in class ids."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.command import UserError, and_more
from tools.dataset import Dataset
from tools.labels import IGNORE, ColourDecoder, colour_keys
from tools.rasters import Raster

BAND = 256  # rows decoded at a time
MANY = 50  # more colours than a person chooses by hand

Unknown = dict[Any, int]  # colour (r,g,b) or number that is no class -> its pixels
Decode = Callable[[np.ndarray, Unknown], np.ndarray]


def read_truth(truth: Raster, dataset: Dataset) -> tuple[np.ndarray, Unknown]:
    """Class ids (H,W) uint8 of a truth in colours or in class ids; unknown colours and numbers become 255.

    A palette image is read by colour where its palette shows the colours of the description, else by number. Raises
    `UserError` for a palette that is read by number and shows a class in the colour of another one.
    """
    height, width = truth.shape
    ids, unknown = np.empty((height, width), np.uint8), Unknown()
    bands = [ids[y : y + BAND] for y in range(0, height, BAND)]
    decode: Decode | None = ColourDecoder(dataset.colours, dataset.ignore_colours) if truth.kind == "rgb" else None
    for number, band in enumerate(bands):
        rows = truth.read(number * BAND, 0, len(band), width)
        band[:] = decode(rows, unknown) if decode else rows[..., 0]
    if not decode:
        decode = _decoder_of_numbers(bands, truth, dataset)
        for band in bands:
            band[:] = decode(band, unknown)
    return ids, unknown


def _decoder_of_numbers(bands: list[np.ndarray], truth: Raster, dataset: Dataset) -> Decode:
    """Like `ColourDecoder`, for the numbers (H,W) uint8 that a truth of one channel stores; 255 is always ignored."""
    palette = truth.palette
    if palette is not None:
        used = np.flatnonzero(sum(np.bincount(band.ravel(), minlength=256) for band in bands))
        if _shows_classes(palette, used, dataset):
            decoder = ColourDecoder(dataset.colours, dataset.ignore_colours)
            return partial(_decode_palette, palette=palette, decoder=decoder)
        _refuse_other_order(truth.path, palette, used, dataset)
    return partial(_decode_ids, num_classes=dataset.num_classes)


def _decode_palette(numbers: np.ndarray, unknown: Unknown, palette: np.ndarray, decoder: ColourDecoder) -> np.ndarray:
    ids, coloured = np.full(numbers.shape, IGNORE, np.uint8), numbers != IGNORE
    ids[coloured] = decoder(palette[numbers[coloured]], unknown)
    return ids


def _decode_ids(numbers: np.ndarray, unknown: Unknown, num_classes: int) -> np.ndarray:
    wrong = (numbers >= num_classes) & (numbers != IGNORE)
    for number, pixels in zip(*np.unique(numbers[wrong], return_counts=True), strict=True):
        unknown[int(number)] = unknown.get(int(number), 0) + int(pixels)
    return np.where(wrong, IGNORE, numbers).astype(np.uint8)


def _shows_classes(palette: np.ndarray, used: np.ndarray, dataset: Dataset) -> bool:
    """Whether a palette (256,3) shows the described colours: those of all classes, or no others.

    `used` are the numbers in the image. A palette of all grey levels shows nothing.
    """
    if (palette == np.arange(256)[:, None]).all():
        return False
    entries = np.concatenate([used[used != IGNORE], np.flatnonzero(palette.any(1))])
    shown = colour_keys(palette[: entries.max(initial=-1) + 1])  # without the black entries that fill a palette up
    classes = colour_keys(dataset.colours)
    described = np.concatenate([classes, colour_keys(dataset.ignore_colours)])
    return bool(np.isin(classes, shown).all() or np.isin(shown, described).all())


def _refuse_other_order(truth: Path, palette: np.ndarray, used: np.ndarray, dataset: Dataset) -> None:
    colours = dataset.colours.tolist()
    for number in used[used < dataset.num_classes].tolist():
        shown = palette[number].tolist()
        if shown in colours and colours.index(shown) != number:
            raise UserError(
                f"{truth} shows the number {number} in the colour of {dataset.classes[colours.index(shown)]}, but "
                f"class {number} of dataset.toml is {dataset.classes[number]}: save the truth as an RGB image"
            )


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
