"""Label maps of large images by a trained segmenter: overlapping windows, logits blended.

Each scene has a record of how it was made. Where that differs now, only this scene is refused;
--overwrite segments the named scenes again, and no others.

Reads  segmenter/ and the scenes: tif, png, jpg or jp2
Writes experiments/<dataset>/<experiment>/scenes/<name>.tif: class ids, 255 for nodata;
       for png and jpg <name>.png
       scenes/overview/<name>.png: image and labels side by side, with the area of each class
       scenes/made_from/<name>.json: file, segmenter and constants, and the pixels of each class

    python segment_scene.py --dataset fields --scene FILE [FILE ...]
"""

import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from accelerate.utils import gather_object
from pydantic import BaseModel, Field
from torch import Tensor

from inference_segmentation import load_segmenter, summed_logits
from tools.command import UserError, and_more, check, run
from tools.constants import ROOT, Device, MayChange, PositiveCount, Scales, checked_constants, may_change
from tools.dataset import Dataset
from tools.files import read_json, remove_leftovers, write_json
from tools.inference import at_scales, stack_scales
from tools.labels import save_label
from tools.memory import Halving
from tools.pictures import colourise, contact_sheet, overlay
from tools.rasters import (
    LONGEST_NAME,
    SUFFIXES,
    Nodata,
    Raster,
    check_file,
    copy_world_file,
    label_tiff,
)
from tools.runs import commit, differences, package_versions
from tools.scene_windows import label_strips
from tools.step import Step

OVERVIEW = 1024  # pixels of the longer side of a picture in the overview


@checked_constants
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/scenes/
    scene: MayChange[Annotated[tuple[Path, ...], Field(min_length=1)]]  # files of the scenes
    segmenter: str = ""  # the experiment whose segmenter is used; empty: that of `experiment`
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    overlap: Annotated[float, Field(ge=0, le=0.75)] = 0.25  # of a window's side, shared with the next window
    nodata: Nodata = -1  # value of nodata pixels in all channels; -1: as stored in the file
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 5
    images_at_once: MayChange[PositiveCount] = 8  # windows of one batch; lower: less GPU memory
    device: MayChange[Device] = "auto"  # auto | cpu | cuda | cuda:1 | mps
    root: MayChange[Path] = ROOT  # the folder that holds datasets/ and experiments/
    overwrite: MayChange[bool] = False  # segment the named scenes again, and replace their results


class SceneRecord(BaseModel):
    """made_from/<name>.json, written when all other files of a scene exist."""

    image: str
    bytes: int
    modified: int  # nanoseconds
    trained: str  # start of the run that trained the segmenter
    constants: dict[str, Any]  # those that affect the result
    commit: str
    packages: dict[str, str]
    pixels: dict[str, int] = {}  # class -> its pixels
    square_metres: float | None = None  # of a pixel


class ResultFiles:
    """The files of one scene: label map, overview and record."""

    def __init__(self, scene: Path, folder: Path):
        suffix = ".png" if scene.suffix.lower() in (".png", ".jpg", ".jpeg") else ".tif"
        self.labels = folder / f"{scene.stem}{suffix}"
        self.overview = folder / "overview" / f"{scene.stem}.png"
        self.record = folder / "made_from" / f"{scene.stem}.json"


def main(args: Constants) -> None:
    check_scenes(args.scene)
    step = Step("scenes", args)
    dataset, model, halving = step.dataset, load_segmenter(step), Halving(args.images_at_once, "windows")

    def predict(windows: Tensor) -> Tensor:
        """Windows (B,3,P,P) uint8 -> logits (B,K,P,P)."""
        scales = stack_scales([at_scales(window.permute(1, 2, 0).numpy(), args.scales) for window in windows])
        work = partial(summed_logits, model, size=windows.shape[-2:], device=step.device)
        with step.accelerator.autocast():
            (logits,) = halving.predict(work, scales, fill=False)
        return logits

    size, harmless = dataset.patch_size, may_change(args)
    kinds = ("rgb", "holes", "grey") if args.grey == "repeat" else ("rgb", "holes")
    constants = {name: value for name, value in vars(args).items() if name not in harmless}
    constants |= {"segmenter": step.reads["segmenter"].parent.name, "precision": step.precision, "window": size}
    made_with: dict[str, Any] = {
        "trained": step.run_of["segmenter"].started,
        "constants": json.loads(json.dumps(constants)),  # lists in place of tuples, as in a record that is read
        "commit": commit(),
        "packages": package_versions(),
    }
    failures = []
    for scene in args.scene[step.state.process_index :: step.state.num_processes]:
        begin = time.monotonic()
        files, state = ResultFiles(scene, step.path), scene.stat()
        record = SceneRecord(
            image=str(scene.resolve()),
            bytes=state.st_size,
            modified=state.st_mtime_ns,
            **made_with,
        )
        try:
            if not args.overwrite and is_finished(files, record):
                print(f"exists already: {files.labels}")
                continue
            with Raster(scene, kinds, args.nodata) as raster:
                remove_result(files)
                strips = label_strips(
                    predict,
                    raster,
                    dataset.num_classes,
                    size=size,
                    stride=max(1, round(size * (1 - args.overlap))),
                    at_once=args.images_at_once,
                    device=step.device,
                )
                record.pixels = write_result(files, raster, strips, dataset)
                record.square_metres = raster.square_metres
            write_json(files.record, record.model_dump())
        except UserError as error:
            failures.append(str(error))
            continue
        print(f"made: {files.labels}, {time.monotonic() - begin:.0f} s")
        print(f"look at: {files.overview}")
        for line in areas(record.pixels, record.square_metres):
            print(f"  {line}")
    failures = gather_object(failures)
    check(
        not failures,
        f"{len(failures)} of {len(args.scene)} scenes could not be segmented; all others are finished:\n  "
        f"{and_more(failures)}",
    )


def check_scenes(scenes: Sequence[Path]) -> None:
    """Raise `UserError` for files that are no images, and for names that results cannot have."""
    names = [scene.stem for scene in scenes]
    for scene, name in zip(scenes, names, strict=True):
        check_file(scene)
        check(
            scene.suffix.lower() in SUFFIXES,
            f"the scene {scene} is not one of {', '.join(SUFFIXES)}: convert it with gdal_translate",
        )
        check(
            names.count(name) == 1,
            f"two scenes are called {name} and would share a result: rename one of them",
        )
        check(
            name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME,  # printable names are valid UTF-8
            f"the name of the scene {name!a} is not UTF-8 or has more than {LONGEST_NAME} bytes: rename the file",
        )


def is_finished(files: ResultFiles, record: SceneRecord) -> bool:
    """Whether the result of a scene exists. Raises `UserError` if it was made otherwise."""
    if not files.record.exists():
        return False
    before = read_json(files.record, SceneRecord, "replace the result with --overwrite")
    sentences = list(differences(before.constants, record.constants).values())
    if before.trained != record.trained:
        sentences.append("made by another run of the segmenter")
    if before.image != record.image:
        sentences.append(f"made from {before.image}")
    elif (before.bytes, before.modified) != (record.bytes, record.modified):
        sentences.append(f"made from {before.image} before it was changed")
    check(
        not sentences,
        f"{files.labels} was made otherwise ({'; '.join(sentences)}): replace it with --overwrite, or write to "
        f"another experiment with --experiment NAME --segmenter {record.constants['segmenter']}",
    )
    return files.labels.exists()


def remove_result(files: ResultFiles) -> None:
    """Remove the record first: an interrupted run must not leave it beside a new label map.

    Also what a killed run left, and a label map or world file of another format. The label map
    itself is replaced.
    """
    files.record.unlink(missing_ok=True)
    remove_leftovers(files.labels.parent, f"**/.{glob.escape(files.labels.stem)}.*.tmp*")
    for suffix in (".tif", ".png", ".pgw"):
        if suffix != files.labels.suffix:
            files.labels.with_suffix(suffix).unlink(missing_ok=True)


def write_result(files: ResultFiles, raster: Raster, strips: Iterable[np.ndarray], dataset: Dataset) -> dict[str, int]:
    """Write label map, georeference and overview; returns the pixels of each class."""
    step = -(-max(raster.shape) // OVERVIEW)  # the overview has every step-th row and pixel
    counts, rows, top = np.zeros(256, np.int64), [], 0
    with label_file(files.labels, raster, dataset) as write:
        for strip in strips:
            write(strip)
            counts += np.bincount(strip.ravel(), minlength=256)
            rows.append(strip[-top % step :: step, ::step].copy())  # a view would keep the strip
            top += len(strip)
    pixels = dict(zip(dataset.classes, counts[: dataset.num_classes].tolist(), strict=True))
    height, width = raster.shape
    labels = np.concatenate(rows)
    image = np.concatenate([raster.read(y, 0, 1, width)[:, ::step] for y in range(0, height, step)])
    contact_sheet(
        files.overview,
        [[image, colourise(labels, dataset.colours), overlay(image, labels, dataset.colours)]],
        ["image", "segmentation", "both"],
        zip(areas(pixels, raster.square_metres), dataset.colours, strict=True),
        OVERVIEW,
    )
    return pixels


@contextmanager
def label_file(path: Path, raster: Raster, dataset: Dataset) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield `write(strip)`, from top to bottom; the end of the block writes file and georeference."""
    if path.suffix == ".tif":
        with label_tiff(path, raster.shape, dataset.colours, raster.place) as write:
            yield write
    else:
        strips: list[np.ndarray] = []
        yield strips.append
        save_label(path, np.concatenate(strips), dataset.colours)
        copy_world_file(raster.path, path)


def areas(pixels: dict[str, int], square_metres: float | None) -> list[str]:
    """ "<class> 12.3 %, 4,567 m2" for each class: its share of the scene without nodata."""
    total = max(sum(pixels.values()), 1)
    lines = []
    for name, count in pixels.items():
        line = f"{name} {count / total:.1%}"
        if square_metres:
            line += f", {count * square_metres:,.0f} m2"
        lines.append(line)
    return lines


if __name__ == "__main__":
    run(main, Constants, __doc__)
