"""Cut large scenes of your own into patches for training and testing (docs/own_data.md).

A scene is covered by tiles of patch_size at every stride of its dataset.toml. Where they do not come out even, the last
row and column are moved inward to end at the border (--border shift), so that every pixel is in a tile and some are in
two; or what is left over is dropped (--border drop). Tiles with too little image in them are left out. A patch is named
<scene>_r<row>_c<column>.

Reads   <raw>/{train,test}/images/<scene>.tif, .png or .jpg       three channels of 8 bits
        <raw>/{train,test}/labels/<scene>.tif or .png             truth: the colours of dataset.toml, or class ids in
                                                                  one channel; a split may have none
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png    three channels of 8 bits
        <root>/datasets/<dataset>/{train,test}/labels/<id>.png    class ids in a palette PNG, 255 = ignore
        <root>/datasets/<dataset>/train/image_labels_blank.csv    to fill in and save as image_labels.csv, where there
                                                                  is no truth
        beside them run.json, scenes/<scene>.json (account of each scene), contact_sheet.png

Where pixels are no image, because the file says so (nodata value, alpha channel) or --nodata does, labels become 255.

Command: python datasetsprocess/own_patch_split.py --dataset fields
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess.cutting import Patch, Scene, split_scenes
from datasetsprocess.scene_files import find_sources
from tools.command import check, run
from tools.dataset import SPLITS, Dataset, load_dataset
from tools.image_labels import write_image_labels
from tools.labels import IGNORE
from tools.rasters import SUFFIXES, Raster, covering_starts
from tools.step import ROOT


@dataclass(frozen=True)
class Constants:
    dataset: str = "fields"  # the name of your own dataset.toml
    root: Path = ROOT  # the folder that holds datasets/
    raw: str = ""  # the folder of scenes; empty: <root>/datasets/<dataset>/raw
    border: Literal["shift", "drop"] = "shift"  # tiles over the border: moved inward, or left out
    nodata: int = -1  # pixels with this value in all channels are no image; -1: those that the file names
    max_nodata: float = 0.5  # tiles with a larger share of such pixels are left out, and those without any image
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times
    unknown_colours: Literal["stop", "ignore"] = "stop"  # a truth's colour that is no class: stop, or 255 (ignored)
    missing_scenes: Literal["stop", "skip"] = "stop"  # images without a truth where others have one, and the reverse
    workers: int = min(8, os.cpu_count() or 1)  # processes; 0: none beside this one
    overwrite: bool = False  # remove the patches that are there and start anew


def patches(scene: Scene, border: str, max_nodata: float) -> Iterator[Patch]:
    """The tiles that cover a scene and hold enough of it."""
    size, stride = scene.dataset.patch_size, scene.dataset.stride
    whole = {(row * stride, column * stride) for row, column in scene.tiles()}  # refuses a scene without any
    rows, columns = (covering_starts(length, size, stride) for length in scene.image.shape)
    for row, y in enumerate(rows):
        for column, x in enumerate(columns):
            if border == "drop" and (y, x) not in whole:
                continue
            valid = scene.image.valid(y, x, size, size)
            if not valid.any() or np.mean(~valid) > max_nodata:
                scene.notes["tiles with too little image, left out"] += 1
                continue
            pixels, ids = scene.window(y, x)
            yield f"r{row:03d}_c{column:03d}", pixels, None if ids is None else np.where(valid, ids, IGNORE)


def scene_names(folder: Path) -> list[str]:
    return sorted({path.stem for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES})


def write_blank(dataset: Dataset) -> None:
    """A csv with a line for each train patch and no class yet; every later step notices a line that was forgotten."""
    file = dataset.folder / "train" / "image_labels_blank.csv"
    write_image_labels(file, dataset.classes, {id: np.zeros(dataset.num_classes, bool) for id in dataset.ids("train")})
    print(f"before that, fill in {file} and save it as image_labels.csv: the train scenes have no truth")


def main(constants: Constants) -> None:
    check(-1 <= constants.nodata <= 255, f"nodata is {constants.nodata}, but it must be from 0 to 255, or -1")
    check(0 <= constants.max_nodata <= 1, f"max_nodata is {constants.max_nodata}, but it must be from 0 to 1")
    dataset = load_dataset(constants.dataset, constants.root)
    check(
        dataset.stride <= dataset.patch_size,
        f"stride is {dataset.stride} in {dataset.folder / 'dataset.toml'}, but more than patch_size "
        f"({dataset.patch_size}) would leave gaps",
    )
    raw = Path(constants.raw) if constants.raw else dataset.folder / "raw"
    scenes = {split: scene_names(raw / split / "images") for split in SPLITS}
    check(
        bool(scenes["train"]),
        f"{raw / 'train' / 'images'} holds no scenes ({', '.join(SUFFIXES)}): put your large images there, those to "
        f"test on into {raw / 'test' / 'images'}, or name another folder with --raw",
    )
    places = {}
    for split in SPLITS:
        truths = scene_names(raw / split / "labels")
        scenes[split] = sorted({*scenes[split], *truths})
        places[split] = (f"{split}/images/{{}}", f"{split}/labels/{{}}") if truths else (f"{split}/images/{{}}",)
        by_hand = dataset.image_labels_file(split)
        check(
            truths or not (constants.overwrite and by_hand.exists()),
            f"{by_hand} may have been written by hand, and --overwrite would remove it: move it away first",
        )
    sources = find_sources(raw, scenes, places, constants.missing_scenes)
    rule = partial(patches, border=constants.border, max_nodata=constants.max_nodata)
    kinds = ("rgb", "holes", "grey") if constants.grey == "repeat" else ("rgb", "holes")
    split_scenes(constants, dataset, sources, rule, partial(Raster, kinds=kinds, nodata=constants.nodata))
    if sources["train"] and not sources["train"][0].truth:
        write_blank(dataset)


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
