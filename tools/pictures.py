"""Pictures for people: label maps and CAMs over images, SAM's regions, and the contact sheet that every step writes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.files import write_whole
from tools.labels import IGNORE, palette

CELL = 256  # pixels: patches are enlarged or reduced to about this size
GAP, LINE, MARGIN = 6, 24, 10
PAPER, SOFT = "#ececec", "#555555"  # the paper is not white, which is a class colour of the ISPRS data sets


def sample_ids(ids: Sequence[str], n: int) -> list[str]:
    """At most `n` of the ids, evenly spaced from the first to the last: the same ones in every step."""
    positions = np.linspace(0, len(ids) - 1, min(max(n, 0), len(ids)))
    return [ids[position] for position in positions.round().astype(int)]


def colourise(ids: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(H,W) uint8 class ids -> (H,W,3) uint8 in the class colours (K,3); 255 (ignore) is grey."""
    return palette(colours)[ids]


def overlay(image: np.ndarray, ids: np.ndarray, colours: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Blend the class colours over the image (H,W,3) with weight `alpha`; ignored pixels show the image alone."""
    weight = np.where(ids == IGNORE, 0, alpha)[..., None]
    return _blend(image, colourise(ids, colours), weight)


def heat(image: np.ndarray, activation: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """Blend one class activation map (H,W) in 0..1, dark to bright, over the image (H,W,3) uint8."""
    levels = np.rint(255 * np.clip(np.nan_to_num(activation), 0, 1)).astype(np.uint8)
    return _blend(image, cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1], alpha)


def regions(masks: np.ndarray, image: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Masks (M,H,W) bool over the image (H,W,3): one colour each, white boundaries, small masks on top of large."""
    on_top = np.full(image.shape[:2], -1, np.int32)
    for index in np.argsort([-np.count_nonzero(mask) for mask in masks], kind="stable"):
        on_top[masks[index].astype(bool)] = index
    hues = (np.arange(max(len(masks), 1)) * 0.618034 % 1 * 180).astype(np.uint8)  # golden ratio: neighbours differ
    hsv = np.stack([hues, np.full_like(hues, 190), np.full_like(hues, 240)], axis=-1)
    table = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    picture = _blend(image, table[on_top], np.where(on_top >= 0, alpha, 0)[..., None])
    boundary = np.zeros(on_top.shape, bool)
    boundary[:, 1:] |= on_top[:, 1:] != on_top[:, :-1]
    boundary[1:] |= on_top[1:] != on_top[:-1]
    picture[boundary] = 255
    return picture


def contact_sheet(
    path: Path,
    rows: Sequence[Sequence[np.ndarray | None]],
    titles: Sequence[str],
    legend: Iterable[tuple[str, Sequence[int]]] = (),
    size: int = CELL,
    *,
    names: Sequence[str] = (),
) -> None:
    """Write one PNG: a grid of pictures under column titles, with a strip of class names and colours below.

    `rows` hold (H,W,3) uint8 pictures, None for an empty cell; `names` are written above the rows. Small patches are
    enlarged by a whole factor, so that single pixels stay visible; large ones are reduced to `size` px. `legend` gives
    (name, (r, g, b)) for each class.
    """
    side = max((max(cell.shape[:2]) for row in rows for cell in row if cell is not None), default=CELL)
    cells = [[_fit(picture, side, size) for picture in row] for row in rows]
    width = max((cell.width for row in cells for cell in row if cell), default=CELL)
    heights = [max((cell.height for cell in row if cell), default=0) for row in cells]
    columns = max([len(titles), *map(len, cells)])
    strip = _legend(list(legend), columns * (width + GAP) - GAP)
    line = LINE if names else 0
    height = 2 * MARGIN + LINE + sum(heights) + (GAP + line) * len(heights) + strip.height
    sheet = Image.new("RGB", (2 * MARGIN + columns * (width + GAP) - GAP, height), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * (width + GAP), MARGIN), _shorten(title, width, font), "black", font)
    y = MARGIN + LINE
    for row, row_height, name in zip(cells, heights, names or [""] * len(cells), strict=True):
        draw.text((MARGIN, y), _shorten(name, sheet.width - 2 * MARGIN, font), SOFT, font)
        y += line
        for column, cell in enumerate(row):
            if cell:
                sheet.paste(cell, (MARGIN + column * (width + GAP), y))
        y += row_height + GAP
    sheet.paste(strip, (MARGIN, y))
    with write_whole(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def confusion_picture(path: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Write a PNG of a confusion matrix (K, K+1): per cent of each truth class; the last column is called "none"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only step 8 needs it
    from matplotlib.figure import Figure

    columns = [*classes, "none"] if counts[:, -1].any() else list(classes)
    shares = 100 * counts[:, : len(columns)] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(2.5 + 0.55 * len(columns), 2 + 0.45 * len(classes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if counts[row].any():
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else "black")
    # names are shown as they are: a "$" in one must not start mathematics
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set(xlabel="prediction", ylabel="truth")
    axes.set_title(f"{title} (% of the truth)", parse_math=False)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _blend(below: np.ndarray, above: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    return np.rint(below * (1.0 - weight) + above * weight).astype(np.uint8)


def _fit(picture: np.ndarray | None, side: int, cell: int) -> Image.Image | None:
    """The picture enlarged by a whole factor, or reduced, so that `side` pixels fit the cell."""
    if picture is None:
        return None
    image = Image.fromarray(np.ascontiguousarray(picture))
    if side <= cell:
        factor = cell // side
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, image.width * cell // side), max(1, image.height * cell // side))
    return image.resize(size, Image.Resampling.BOX)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _legend(entries: list[tuple[str, Sequence[int]]], width: int) -> Image.Image:
    """A strip of colour boxes with names, wrapped at `width` pixels; of height 0 without entries."""
    strip = Image.new("RGB", (max(width, 0), GAP + LINE * len(entries)), PAPER)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    x, y = 0, GAP
    for name, colour in entries:
        step = 20 + int(font.getlength(name)) + 16
        if x and x + step > width:
            x, y = 0, y + LINE
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=tuple(int(value) for value in colour), outline="grey")
        draw.text((x + 20, y), name, "black", font)
        x += step
    return strip.crop((0, 0, strip.width, y + LINE if entries else 0))
