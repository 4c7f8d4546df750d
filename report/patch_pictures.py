"""The pictures of one patch in the report: image, CAMs, label maps, regions and, once scored, truth and errors."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, RootModel

from report.stages import Split, Stage, load_prediction
from tools.command import UserError, check
from tools.dataset import Dataset
from tools.labels import IGNORE, load_image, load_label
from tools.map_files import load_maps
from tools.masks import load_masks
from tools.pictures import colourise, confusion_picture, contact_sheet, heat, regions, sample_ids

ERRORS = {"right": [235] * 3, "wrong": [190, 60, 0], "not counted": [128] * 3}  # they differ in brightness too
SIDE = 256  # pixels of a picture in the page
Uri = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$")]


class Panel(BaseModel):
    """One picture."""

    title: str
    source: Uri


class Sample(BaseModel):
    """One patch in the page. `score`: mIoU of this patch alone, None without truth; `result`: title of the result."""

    id: str
    split: Split
    kind: str = "sample"  # or best, median, worst
    score: float | None = None
    panels: list[Panel]
    result: str


SamplesFile = RootModel[dict[Split, list[Sample]]]  # samples.json


def panels(
    dataset: Dataset, id: str, stages: Sequence[Stage], last: Stage | None = None, with_maps: bool = False
) -> dict[str, np.ndarray]:
    """Title -> (H,W,3) uint8 picture of one patch: the image and every stage of its split, in their order.

    `last`: the stage whose errors are shown, after the truth; None opens no pixel label. `with_maps` adds the CAM of
    each class. SAM's regions stand before the first stage that was refined by them. Raises `UserError` for a bad file.
    """
    split = stages[0].split
    image = load_image(dataset.images(split) / f"{id}.png")
    size, count = image.shape[:2], dataset.num_classes
    pictures, predictions = {"image": image}, {}
    masks = dataset.sam_masks(split) / f"{id}.npz"
    for stage in stages:
        if with_maps and stage.step.folder == "cams":
            for k, activation in zip(*load_maps(stage.path / f"{id}.npz", count, size), strict=True):
                pictures[f"CAM of {dataset.classes[k]}"] = heat(image, activation)
        if "sam_masks" in stage.step.reads and "regions" not in pictures and masks.exists():
            pictures["regions"] = regions(load_masks(masks, size).unpack(), image)
        predictions[stage.title] = load_prediction(stage.path, id, count, size)
        pictures[stage.title] = colourise(predictions[stage.title], dataset.colours)
    if last is None:
        return pictures
    truth = load_label(dataset.labels(split) / f"{id}.png", count)
    check(
        size == truth.shape,
        f"{dataset.images(split) / id}.png and its label map differ in size: cut the scenes again",
    )
    counted = (truth != IGNORE) & ~np.isin(truth, np.flatnonzero(~dataset.scored))
    errors = np.select([~counted, predictions[last.title] != truth], [2, 1], 0).astype(np.uint8)
    pictures["truth"] = colourise(truth, dataset.colours)
    pictures["errors"] = colourise(errors, np.array([*ERRORS.values()]))
    return pictures


def choose(scores: dict[str, float], n: int, present: dict[str, int] | None = None) -> list[tuple[str, str]]:
    """(kind, id) of the `n` best, median and worst images; images without a score are never chosen.

    The best ones have at least two classes in the truth, where `present` counts them: a patch of one class shows
    little. Ties: more classes in the truth first.
    """
    present = present or {}
    ids = [id for id in scores if math.isfinite(scores[id])]
    ids.sort(key=lambda id: (-scores[id], -present.get(id, 0), id))
    n = min(n, math.ceil(len(ids) / 3))
    best = sorted(ids, key=lambda id: present.get(id, 0) < 2)[:n]
    others = [id for id in ids if id not in best]
    begin_of_worst = max(len(others) - n, 0)
    middle, worst = others[:begin_of_worst], others[begin_of_worst:]
    median = middle[(len(middle) - n) // 2 :][:n]
    kinds = {"best": best, "median": median, "worst": worst}
    return [(kind, id) for kind, chosen in kinds.items() for id in chosen]


def draw_split(
    dataset: Dataset, output: Path, stages: Sequence[Stage], experiment: str, number: int, failures: list[str]
) -> list[Sample]:
    """Write the pictures of one scored split to `output` -> `number` best, median and worst samples.

    Errors are those of the last stage of `experiment`. Files that cannot be read are added to `failures`.
    """
    own = [stage for stage in stages if stage.experiment == experiment] or stages
    last, split = own[-1], own[-1].split
    title = f"{last.title}, {split} split"
    confusion_picture(output / f"confusion_{split}.png", last.matrix.counts, dataset.classes, title)

    def draw(id: str, with_maps: bool = False) -> dict[str, np.ndarray]:
        try:
            return panels(dataset, id, stages, last, with_maps)
        except UserError as error:
            if str(error) not in failures:
                failures.append(str(error))
            return {}

    scores = {id: score for id, score in last.per_image.items() if all(id in stage.per_image for stage in stages)}
    rows = {id: row for id in sample_ids(sorted(scores), 8) if (row := draw(id))}
    titles = max(map(list, rows.values()), key=len, default=[])
    cells = [[row.get(title) for title in titles] for row in rows.values()]
    legend = [*dataset.legend, *ERRORS.items()]
    contact_sheet(output / f"contact_sheet_{split}.png", cells, titles, legend, names=list(rows))
    samples = []
    for kind, id in choose(scores, number, last.present):
        if packed := pack(draw(id, with_maps=True)):
            samples.append(Sample(id=id, split=split, kind=kind, score=scores[id], panels=packed, result=last.title))
    return samples


def pack(pictures: dict[str, np.ndarray]) -> list[Panel]:
    """Title -> (H,W,3) uint8 picture, for the page."""
    return [Panel(title=title, source=data_uri(picture)) for title, picture in pictures.items()]


def data_uri(picture: np.ndarray) -> str:
    """Flat colours as PNG, exactly; photographs and maps as JPEG; both with at most `SIDE` pixels a side."""
    image, file = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    flat = image.getcolors(256) is not None
    scale = SIDE / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.BOX)
    kind, options = ("png", {"optimize": True}) if flat else ("jpeg", {"quality": 80})
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
