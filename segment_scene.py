"""Label maps of whole large images by a trained segmenter: overlapping windows, their logits blended.

Each scene has a record of how it was made. Where that differs now, only this scene is refused; --overwrite segments the
named scenes again, and no others.

Reads  segmenter/ and the scenes: tif, png, jpg or jp2
Writes experiments/<dataset>/<experiment>/scenes/<name>.tif (for png and jpg <name>.png): class ids, 255 for nodata
       scenes/overview/<name>.png: image and labels side by side, with the area of each class
       scenes/made_from/<name>.json: file, segmenter and constants, and the pixels of each class

    python segment_scene.py --dataset fields --scene FILE [FILE ...]
"""

import glob
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from accelerate.utils import gather_object
from pydantic import BaseModel, Field
from torch import Tensor

from tools.cams import at_scales, stack_scales
from tools.command import UserError, and_more, check, run
from tools.constants import ROOT, Device, MayChange, PositiveCount, Scales, checked_constants, flat, may_change
from tools.dataset import Dataset, load_dataset
from tools.devices import make_accelerator, precision_of, start_line
from tools.files import read_json, remove_leftovers, write_json
from tools.labels import save_label
from tools.pictures import colourise, contact_sheet, overlay
from tools.rasters import (
    LONGEST_NAME,
    SUFFIXES,
    Nodata,
    Raster,
    check_file,
    copy_world_file,
    write_label_tiff,
)
from tools.runs import commit, package_versions
from tools.scene_windows import Predict, Windows, label_strips
from tools.segmenter import Segmenter
from tools.step import experiment_folder, require

OVERVIEW = 1024  # pixels of the longer side of a picture in the overview


@checked_constants
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/scenes/
    scene: MayChange[Annotated[tuple[Path, ...], Field(min_length=1)]]  # files of the scenes
    segmenter: str = ""  # the experiment whose segmenter is used; empty: that of `experiment`
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    overlap: Annotated[float, Field(ge=0, le=0.75)] = 0.25  # share of a window's side that the next window covers too
    nodata: Nodata = -1  # value of nodata pixels in all channels; -1: the nodata value stored in the file
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 5
    images_at_once: MayChange[PositiveCount] = 8  # windows of one batch; lower it when the GPU's memory is short
    device: MayChange[Device] = "auto"  # auto | cpu | cuda | cuda:1 | mps
    root: MayChange[Path] = ROOT  # the folder that holds datasets/ and experiments/
    overwrite: MayChange[bool] = False  # segment the named scenes again, and replace their results


class Account(BaseModel):
    """made_from/<name>.json, written when all other files of a scene are there."""

    image: str
    bytes: int
    modified: int  # nanoseconds
    trained: str  # start of the run that trained the segmenter
    constants: dict[str, Any]  # those that affect the result
    commit: str
    packages: dict[str, str]
    pixels: dict[str, int] = {}  # class -> its pixels
    square_metres: float | None = None  # of a pixel


def main(args: Constants) -> None:
    check_scenes(args.scene)
    dataset = load_dataset(args.dataset, args.root)
    experiment = experiment_folder(args.root, args.dataset, args.experiment)
    trainer = experiment_folder(args.root, args.dataset, args.segmenter or args.experiment)
    trained = require(trainer / "segmenter", args, experiment=trainer.name)
    accelerator = make_accelerator(args.precision, args.device)
    segmenter = Segmenter(trainer / "segmenter", trained, dataset, accelerator)

    def predict(windows: Tensor) -> Tensor:
        """(B,3,P,P) uint8 -> logits (B,K,P,P)."""
        images = [at_scales(window.permute(1, 2, 0).numpy(), args.scales) for window in windows]
        return segmenter(stack_scales(images), windows.shape[-2:])

    settings = {"segmenter": trainer.name, "precision": precision_of(accelerator), "window": dataset.patch_size}
    made_with = {
        "trained": trained.started,
        "constants": json.loads(json.dumps(affecting(args) | settings)),
        "commit": commit(),
        "packages": package_versions(),
    }
    if accelerator.is_main_process:
        print(f"scenes, {start_line(accelerator, precision_of(accelerator), args.device)}")
    failures = []
    for scene in args.scene[accelerator.process_index :: accelerator.num_processes]:
        account = Account(**file_state(scene), **made_with)
        try:
            segment(scene, experiment / "scenes", account, predict, dataset, args)
        except UserError as error:
            failures.append(str(error))
    failures = gather_object(failures)
    check(
        not failures,
        f"{len(failures)} of {len(args.scene)} scenes could not be segmented; all others are finished:\n  "
        f"{and_more(failures)}",
    )


def check_scenes(scenes: Sequence[Path]) -> None:
    """Raise `UserError` for a scene that is no image file, and for names that results cannot have."""
    names = [scene.stem for scene in scenes]
    for scene, name in zip(scenes, names, strict=True):
        check_file(scene)
        check(
            scene.suffix.lower() in SUFFIXES,
            f"the scene {scene} is not one of {', '.join(SUFFIXES)}: convert it with gdal_translate",
        )
        check(names.count(name) == 1, f"two scenes are called {name} and would share a result: rename one of them")
        fits = name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME  # printable names are valid UTF-8
        check(
            fits, f"the name of the scene {name!a} is not UTF-8 or has more than {LONGEST_NAME} bytes: rename the file"
        )


def affecting(args: Constants) -> dict[str, Any]:
    """The constants that affect a result."""
    speed = may_change(args)
    return {name: value for name, value in flat(args).items() if name not in speed}


def file_state(scene: Path) -> dict[str, Any]:
    """The fields of `Account` by which a replaced file is recognised."""
    state = scene.stat()
    return {"image": str(scene.resolve()), "bytes": state.st_size, "modified": state.st_mtime_ns}


def segment(scene: Path, folder: Path, account: Account, predict: Predict, dataset: Dataset, args: Constants) -> None:
    """Write the files of one scene, unless they exist. Raises `UserError` where they were made otherwise."""
    start, name = time.monotonic(), scene.stem
    target = folder / f"{name}{'.png' if scene.suffix.lower() in ('.png', '.jpg', '.jpeg') else '.tif'}"
    file = folder / "made_from" / f"{name}.json"
    if file.exists() and not args.overwrite:
        refuse_other(target, read_json(file, Account, "replace the result with --overwrite"), account)
        if target.exists():
            print(f"exists already: {target}")
            return
    remove_leftovers(folder, f"**/.{glob.escape(name)}.*.tmp*")
    kinds = ("rgb", "holes", "grey") if args.grey == "repeat" else ("rgb", "holes")
    stride = max(1, round(dataset.patch_size * (1 - args.overlap)))
    windows = Windows(dataset.patch_size, stride, args.images_at_once)
    with Raster(scene, kinds, args.nodata) as raster:
        # An interrupted run must not leave a new result with an old account or world file
        for path in (file, *(target.with_suffix(suffix) for suffix in {".tif", ".png", ".pgw"} - {target.suffix})):
            path.unlink(missing_ok=True)
        strips = label_strips(predict, raster, dataset.num_classes, windows)
        pixels = write_result(raster, target, strips, dataset)
        account = account.model_copy(update={"pixels": pixels, "square_metres": raster.square_metres})
    write_json(file, account.model_dump())
    print(f"made: {target}, {time.monotonic() - start:.0f} s")
    print(f"look at: {folder / 'overview' / f'{name}.png'}")
    print("\n".join(f"  {line}" for line in areas(pixels, account.square_metres)))


def refuse_other(target: Path, before: Account, now: Account) -> None:
    """Raise `UserError` where a result was made from or with something else."""
    old, new = before.constants, now.constants
    other = [
        f"{name}: {old.get(name)} there, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if before.trained != now.trained:
        other.append("made by another run of the segmenter")
    if (before.image, before.bytes, before.modified) != (now.image, now.bytes, now.modified):
        other.append(
            f"made from {before.image} before it was changed"
            if before.image == now.image
            else f"made from {before.image}"
        )
    check(
        not other,
        f"{target} was made otherwise ({'; '.join(other)}): replace it with --overwrite, or write to another "
        f"experiment with --experiment NAME --segmenter {new['segmenter']}",
    )


def write_result(raster: Raster, target: Path, strips: Iterable[np.ndarray], dataset: Dataset) -> dict[str, int]:
    """Write label map, georeference and overview; returns the pixels of each class."""
    step = -(-max(raster.shape) // OVERVIEW)
    rows: list[np.ndarray] = []
    counts = np.zeros(256, np.int64)
    strips = _watched(strips, step, rows, counts)
    if target.suffix == ".tif":
        write_label_tiff(target, strips, raster.shape, dataset.colours, raster.place)
    else:
        save_label(target, np.concatenate(list(strips)), dataset.colours)
        copy_world_file(raster.path, target)
    pixels = dict(zip(dataset.classes, counts.tolist(), strict=False))
    (height, width), labels = raster.shape, np.stack(rows)
    image = np.concatenate([raster.read(y, 0, 1, width)[:, ::step] for y in range(0, height, step)])
    contact_sheet(
        target.parent / "overview" / f"{target.stem}.png",
        [[image, colourise(labels, dataset.colours), overlay(image, labels, dataset.colours)]],
        ["image", "segmentation", "both"],
        zip(areas(pixels, raster.square_metres), dataset.colours, strict=True),
        OVERVIEW,
    )
    return pixels


def _watched(
    strips: Iterable[np.ndarray], step: int, rows: list[np.ndarray], counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Hand the strips on. Adds every `step`-th pixel of every `step`-th row to `rows`, and their pixels to `counts`."""
    top = 0
    for strip in strips:
        rows.extend(strip[-top % step :: step, ::step])
        counts += np.bincount(strip.ravel(), minlength=256)
        top += len(strip)
        yield strip


def areas(pixels: dict[str, int], square_metres: float | None) -> list[str]:
    """ "<class> 12.3 %, 4,567 m2" for each class: its share of the scene without nodata."""
    total = max(sum(pixels.values()), 1)
    metres = [f", {count * square_metres:,.0f} m2" if square_metres else "" for count in pixels.values()]
    return [f"{name} {count / total:.1%}{area}" for (name, count), area in zip(pixels.items(), metres, strict=True)]


if __name__ == "__main__":
    run(main, Constants, __doc__)
