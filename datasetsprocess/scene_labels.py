"""The truth of a whole scene, in colours or in class ids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.command import UserError
from tools.dataset import Dataset
from tools.labels import IGNORE, ColourDecoder
from tools.rasters import Raster

BAND = 256  # rows of truth decoded at a time
MANY = 50  # colours: nobody has chosen so many by hand


def read_truth(truth: Raster, dataset: Dataset) -> tuple[np.ndarray, dict]:
    """Class ids (H,W) uint8 of a truth in colours or in class ids, and what in it is no class -> pixels, now 255.

    What is no class: colours (r, g, b), or numbers where the truth has one channel. Raises `UserError` for a palette
    that shows a class in the colour of another one.
    """
    height, width = truth.shape
    unknown: dict = {}
    decode = ColourDecoder(dataset.colours, dataset.ignore_colours) if truth.kind == "rgb" else _known_ids(dataset)
    ids = np.empty((height, width), np.uint8)
    for y in range(0, height, BAND):
        ids[y : y + BAND] = decode(truth.read(y, 0, min(BAND, height - y), width), unknown)
    if truth.palette is not None:
        for k, colour in enumerate(truth.palette[: dataset.num_classes].tolist()):
            others = [other for other, own in enumerate(dataset.colours.tolist()) if own == colour and other != k]
            if others and (ids == k).any():
                raise UserError(
                    f"{truth.path} has {dataset.classes[others[0]]}'s colour at the place of {dataset.classes[k]}, "
                    f"{k}, in its palette: its numbers count otherwise than dataset.toml; save it as an RGB image"
                )
    return ids, unknown


def _known_ids(dataset: Dataset) -> Callable[[np.ndarray, dict], np.ndarray]:
    """Like `ColourDecoder`, for a truth of one channel (H,W,3 with equal values) that holds class ids and 255."""

    def decode(pixels: np.ndarray, counts: dict) -> np.ndarray:
        ids = pixels[..., 0].copy()
        unknown = (ids >= dataset.num_classes) & (ids != IGNORE)
        for id, pixels_of_it in zip(*np.unique(ids[unknown], return_counts=True), strict=True):
            counts[int(id)] = counts.get(int(id), 0) + int(pixels_of_it)
        ids[unknown] = IGNORE
        return ids

    return decode


def describe(truth: Path, colours: dict) -> str:
    """A sentence on what `read_truth` found in a truth that is no class."""
    most = sorted(colours, key=lambda colour: (-colours[colour], colour))
    shown = ", ".join(f"{colour} in {colours[colour]} pixels" for colour in most[:5])
    if len(most) > 5:
        shown += f" and {len(most) - 5} more in {sum(colours[colour] for colour in most[5:])} pixels"
    what = "colours" if isinstance(most[0], tuple) else "numbers"
    if len(most) > MANY:
        shown += "; so many come of JPEG or of smoothed edges: export it anew, lossless and without interpolation"
    return (
        f"{truth} holds {what} that are no class: {shown}. Mend the file, give them a class in dataset.toml, leave the "
        "scene out, or make these pixels 255 (ignored) with --unknown-colours ignore --overwrite"
    )
