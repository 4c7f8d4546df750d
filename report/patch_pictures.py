"""The pictures of one patch in the report: image, CAMs, label maps, regions and, once scored, truth and errors."""

import base64
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from report.score_tables import Stage, percent
from tools.command import UserError
from tools.dataset import Dataset
from tools.labels import IGNORE, load_image, load_label
from tools.pictures import colourise, heat, regions

ERRORS = {"right": [235] * 3, "wrong": [190, 60, 0], "not counted": [128] * 3}  # apart in brightness too
SIDE = 256  # pixels of a picture in the page


def load_prediction(folder: Path, id: str, num_classes: int, size: tuple[int, int]) -> np.ndarray:
    """(H,W) uint8 class ids of one image of (H,W) = size; of CAMs, the class whose map is the highest."""
    if "cams" not in folder.name:
        return load_label(folder / f"{id}.png", num_classes)
    present, maps = load_maps(folder, id, num_classes, size)
    return present.astype(np.uint8)[maps.argmax(axis=0)]


def load_maps(folder: Path, id: str, num_classes: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (k,) and maps (k,H,W) in 0..1 of one image of (H,W) = size."""
    from tools.cams import load_cams  # imports torch, which no other folder needs

    return load_cams(folder / f"{id}.npz", num_classes, size)


def panels(
    dataset: Dataset,
    split: str,
    id: str,
    stages: list[Stage],
    load_masks: Callable,
    last: Stage | None = None,
    with_maps: bool = False,
) -> dict[str, np.ndarray]:
    """Title -> (H,W,3) uint8 picture of one patch: the image and every stage, in their order.

    `last`: the stage whose errors are shown, and the truth before them; None opens no pixel label. `with_maps` adds the
    CAM of each class. `load_masks` reads a mask file; the regions stand before the first stage that was refined by
    them. Raises `UserError` for a bad file.
    """
    image = load_image(dataset.images(split) / f"{id}.png")
    size = image.shape[:2]
    shown, predictions = {"image": image}, {}
    masks = dataset.sam_masks(split) / f"{id}.npz"
    for stage in stages:
        if with_maps and "cams" in stage.name:
            for class_id, activation in zip(*load_maps(stage.folder, id, dataset.num_classes, size), strict=True):
                shown[f"CAM of {dataset.classes[class_id]}"] = heat(image, activation)
        if "refined" in stage.name and "regions" not in shown and masks.exists():
            found = load_masks(masks)
            if found.size != size:
                raise UserError(
                    f"{masks} holds masks of another size than its image: run step 9, python "
                    "PRC_SAM/get_se_map.py --overwrite"
                )
            shown["regions"] = regions(found.unpack(), image)
        predictions[stage.title] = load_prediction(stage.folder, id, dataset.num_classes, size)
        shown[stage.title] = colourise(predictions[stage.title], dataset.colours)
    if last is None:
        return shown
    truth = load_label(dataset.labels(split) / f"{id}.png", dataset.num_classes)
    if size != truth.shape:
        raise UserError(f"{dataset.images(split) / id}.png and its label map differ in size: cut the scenes again")
    counted = (truth != IGNORE) & ~np.isin(truth, np.flatnonzero(~dataset.scored))
    errors = np.select([~counted, predictions[last.title] != truth], [2, 1], 0).astype(np.uint8)
    return shown | {
        "truth": colourise(truth, dataset.colours),
        "errors": colourise(errors, np.array([*ERRORS.values()])),
    }


def choose(scores: dict[str, float], n: int, present: dict[str, int] | None = None) -> list[tuple[str, str]]:
    """(kind, id) of the `n` best, median and worst images; an image without a score is never chosen.

    Of equally good ones those come first whose truth holds more classes, when `present` tells how many.
    """
    present = present or {}
    ids = sorted(
        (id for id in scores if math.isfinite(scores[id])), key=lambda id: (-scores[id], -present.get(id, 0), id)
    )
    n = min(n, math.ceil(len(ids) / 3))
    middle = (len(ids) - n) // 2
    chosen = [("best", ids[:n]), ("median", ids[middle : middle + n]), ("worst", ids[len(ids) - n :])]
    kinds = {id: kind for kind, group in chosen for id in group}  # with very few images one may be of two kinds
    return [(kinds[id], id) for id in ids if id in kinds]


def sample(id: str, split: str, kind: str, score: float | None, pictures: dict[str, np.ndarray]) -> dict:
    """One patch for the page: its pictures title -> (H,W,3) uint8 as data URIs; no score without the truth."""
    return {
        "id": id,
        "split": split,
        "kind": kind,
        "score": percent(score),
        "panels": [{"title": title, "source": data_uri(picture)} for title, picture in pictures.items()],
    }


def data_uri(picture: np.ndarray) -> str:
    """Flat colours as PNG, exactly; photographs and maps as JPEG; both at most `SIDE` pixels large."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    flat = image.getcolors(256) is not None
    scale = SIDE / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, **({"format": "PNG", "optimize": True} if flat else {"format": "JPEG", "quality": 80}))
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
