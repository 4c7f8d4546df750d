"""Label maps of whole large images: overlapping windows, their logits blended, rows written as they are finished."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tools.augment import to_tensor
from tools.command import UserError, check
from tools.dataset import Dataset
from tools.files import write_json
from tools.geotiff import GEOREFERENCE, copy_world_file, write_tiff
from tools.labels import IGNORE, save_label
from tools.pictures import colourise, contact_sheet, overlay
from tools.rasters import SUFFIXES, Raster, covering_starts
from tools.step import StepFolder

TIFF = (".tif", ".tiff")
OVERVIEW = 1024  # pixels of the longer side of the overview picture
Predict = Callable[[Tensor], Tensor]  # windows (B,3,P,P) uint8 -> logits (B,K,P,P)


@dataclass(frozen=True)
class Windows:
    """How a scene is covered: windows of `size` pixels a side, one beginning every `stride`, so many `at_once`."""

    size: int
    stride: int
    at_once: int


def check_scenes(scenes: Sequence[Path]) -> None:
    """Raise `UserError` for a scene that is not there or no image file, and for two that would share a result."""
    for scene in scenes:
        check(scene.exists(), f"the scene {scene} is missing")
        check(scene.is_file(), f"the scene {scene} is a folder: name its files, such as {scene / '*.tif'}")
        check(
            scene.suffix.lower() in SUFFIXES,
            f"the scene {scene} is none of {', '.join(SUFFIXES)}: convert it, for example with gdal_translate to tif",
        )
    names = [scene.stem for scene in scenes]
    for name in names:
        check(names.count(name) == 1, f"two scenes are called {name}, and would share a result: rename one of them")


def predict_scenes(
    scenes: Sequence[Path],
    folder: StepFolder,
    predict: Predict,
    dataset: Dataset,
    windows: Windows,
    open_image: Callable[[Path], Raster],
) -> None:
    """Write <folder>/<scene>.tif (.png for png and jpg) and overview/<scene>.png of each scene of this process's share.

    made_from/<scene>.json tells of the image, so that a result is kept when the same file led to it. What is wrong with
    a scene goes to `folder.fail`.
    """
    for scene in scenes[folder.process :: folder.processes]:
        target = folder.folder / f"{scene.stem}{'.tif' if scene.suffix.lower() in TIFF else '.png'}"
        made_from = folder.folder / "made_from" / f"{scene.stem}.json"
        source = {"image": str(scene.resolve()), "bytes": scene.stat().st_size, "modified": scene.stat().st_mtime_ns}
        try:
            if target.exists() and made_from.exists():
                check(
                    json.loads(made_from.read_text(encoding="utf-8")) == source,
                    f"{target} was made from another file than {scene}, or before that was changed: move it away, or "
                    "rename the scene",
                )
                print(f"{target} is there already; remove it to have it made anew")
                continue
            with open_image(scene) as raster:
                label_scene(raster, target, predict, dataset, windows)
            write_json(made_from, source)
            print(f"{target}, at a glance in {overview_file(target)}")
        except UserError as error:
            folder.fail(error)


def label_scene(raster: Raster, target: Path, predict: Predict, dataset: Dataset, windows: Windows) -> None:
    """Predict one scene and write its label map to `target`, its georeference and its overview beside it."""
    step = -(-max(raster.shape) // OVERVIEW)
    small: list[np.ndarray] = []
    strips = _sampled(label_strips(predict, raster, dataset.num_classes, windows, target.stem), step, small)
    georeference = raster.tags(GEOREFERENCE)
    if target.suffix == ".tif":
        write_tiff(target, strips, raster.shape, dataset.colours, georeference)
    else:
        save_label(target, np.concatenate(list(strips)), dataset.colours)
    if not georeference:
        copy_world_file(raster.path, target)
    (height, width), labels = raster.shape, np.stack(small)
    image = np.concatenate([raster.read(y, 0, 1, width)[:, ::step] for y in range(0, height, step)])
    contact_sheet(
        overview_file(target),
        [[image, colourise(labels, dataset.colours), overlay(image, labels, dataset.colours)]],
        ["image", "segmentation", "both"],
        zip(dataset.classes, dataset.colours, strict=True),
        OVERVIEW,
    )


def overview_file(target: Path) -> Path:
    return target.parent / "overview" / f"{target.stem}.png"


def label_strips(
    predict: Predict, raster: Raster, num_classes: int, windows: Windows, title: str = ""
) -> Iterator[np.ndarray]:
    """Class ids of the scene's rows from top to bottom, a strip (h,W) uint8 for each row of windows; nodata is 255.

    Where windows overlap, their logits are summed with weights that fall smoothly to nothing at a window's border,
    where it sees least of the surroundings; the largest sum wins, so the weights need not add up to 1. Sums are kept
    for one row of windows at a time: K * P * W * 4 bytes. A scene smaller than a window is mirrored at its border.
    """
    size = windows.size
    height, width = raster.shape
    high, wide = max(height, size), max(width, size)
    tops, lefts = covering_starts(high, size, windows.stride), covering_starts(wide, size, windows.stride)
    weight = blending_weight(size)
    total = None
    with tqdm(total=len(tops) * len(lefts), desc=title, unit="window", disable=None) as bar:
        for top, next_top in zip(tops, [*tops[1:], high], strict=True):
            valid = raster.valid(top, 0, min(size, height), width)
            wanted = [left for left in lefts if valid[:, left : left + size].any()]
            bar.update(len(lefts) - len(wanted))
            for start in range(0, len(wanted), windows.at_once):
                batch = wanted[start : start + windows.at_once]
                logits = predict(torch.stack([_window(raster, top, left, size) for left in batch]))
                if total is None:
                    weight, total = weight.to(logits.device), logits.new_zeros(num_classes, size, wide)
                for left, window in zip(batch, logits, strict=True):
                    total[:, :, left : left + size] += weight * window
                bar.update(len(batch))
            rows = next_top - top  # no later window reaches these
            labels = np.full((rows, wide), IGNORE, np.uint8)
            if total is not None:
                labels = total[:, :rows].argmax(0).to(torch.uint8).cpu().numpy()
                kept = total[:, rows:].clone()
                total.zero_()[:, : size - rows] = kept
            labels = labels[: min(rows, height), :width]
            yield np.where(valid[: len(labels)], labels, IGNORE)


def blending_weight(size: int) -> Tensor:
    """(P,P) float32: squared sines along both sides, highest in the middle, above 0 everywhere."""
    side = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size) ** 2
    return side[:, None] * side


def _window(raster: Raster, top: int, left: int, size: int) -> Tensor:
    """(3,P,P) uint8, mirrored beyond the border of a scene that is smaller."""
    height, width = (min(size, length) for length in raster.shape)
    pixels = raster.read(top, left, height, width)
    if pixels.shape[:2] != (size, size):
        pixels = np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)), mode="reflect")
    return to_tensor(np.array(pixels))  # a mapped file's pixels cannot be written to, which torch minds


def _sampled(strips: Iterable[np.ndarray], step: int, rows: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Hand the strips on; every `step`-th pixel of every `step`-th row goes to `rows`."""
    top = 0
    for strip in strips:
        rows.extend(strip[-top % step :: step, ::step])
        top += len(strip)
        yield strip
