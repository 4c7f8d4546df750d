"""Cut large scenes of your own into patches for training and testing (docs/own_data.md).

A scene is covered by tiles of patch_size, one beginning every stride (both from dataset.toml). Where the last tiles
would cross the border, they are moved inward (--border shift), so that every pixel is in a tile and some are in two, or
dropped (--border drop). Tiles with too much nodata are left out. A patch is named <scene>_r<row>_c<column>.

Reads   <raw>/{train,test}/images/<scene>.tif, .png, .jpg, .jp2   three channels of 8 bits
        <raw>/{train,test}/labels/<scene>.tif or .png             truth in the colours of dataset.toml, or class ids in
                                                                  one channel; a split may have no truth
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png    three channels of 8 bits
        <root>/datasets/<dataset>/{train,test}/labels/<id>.png    class ids in a palette PNG, 255 = ignore
        <root>/datasets/<dataset>/train/image_labels_blank.csv    where there is no truth: fill it in and save it as
                                                                  image_labels.csv
        in the same folders run.json, scenes/<scene>.json (record of each scene), contact_sheet.png

Labels of nodata pixels (nodata value, alpha channel or mask of the file, or --nodata) become 255.

Command: python datasetsprocess/own_patch_split.py --dataset fields
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess.cutting import Cutting, Patch, Scene, raw_folder, split_scenes
from datasetsprocess.scene_files import SCENE, find_sources, scene_files, scene_names
from tools.command import check, run
from tools.constants import Share, checked_constants
from tools.dataset import load_dataset
from tools.image_labels import write_image_labels
from tools.labels import IGNORE
from tools.rasters import SUFFIXES, Nodata, Raster, covering_starts
from tools.steps import SPLITS, command_line


@checked_constants
class Constants(Cutting):
    dataset: str = "fields"  # the name of your own dataset.toml
    border: Literal["shift", "drop"] = "shift"  # tiles that would cross the border: move them inward, or drop them
    nodata: Nodata = -1  # value of nodata pixels in all channels; -1: the nodata value stored in the file
    max_nodata: Share = 0.5  # tiles with a larger share of nodata pixels are left out, and those of nodata alone
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times


def patches(scene: Scene, border: str, max_nodata: float) -> Iterator[Patch]:
    """The tiles of a scene, without those of too much nodata."""
    size, stride = scene.dataset.patch_size, scene.dataset.stride
    inside = {(row * stride, column * stride) for row, column in scene.tiles()}  # raises if there is none
    rows, columns = (covering_starts(length, size, stride) for length in scene.image.shape)
    for row, y in enumerate(rows):
        for column, x in enumerate(columns):
            if border == "drop" and (y, x) not in inside:
                continue
            valid = scene.image.valid(y, x, size, size)
            if not valid.any() or np.mean(~valid) > max_nodata:
                scene.notes["tiles with too much nodata, left out"] += 1
                continue
            pixels, ids = scene.window(y, x)
            yield f"r{row:03d}_c{column:03d}", pixels, None if ids is None else np.where(valid, ids, IGNORE)


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    check(
        dataset.stride <= dataset.patch_size,
        f"stride is {dataset.stride} in {dataset.folder / 'dataset.toml'}, but it must be at most patch_size "
        f"({dataset.patch_size}), so that the tiles leave no gaps",
    )
    raw = raw_folder(args, dataset)
    check(
        bool(scene_files(raw / "train" / "images")),
        f"{raw / 'train' / 'images'} has no scenes ({', '.join(SUFFIXES)}): put the large images for training there "
        f"and those for testing into {raw / 'test' / 'images'}, or name another folder with --raw",
    )
    places = {split: [f"{split}/images/{SCENE}"] for split in SPLITS}
    for split in SPLITS:
        by_hand = dataset.image_labels_file(split)
        if scene_files(raw / split / "labels"):
            places[split].append(f"{split}/labels/{SCENE}")
        else:
            check(
                not (args.overwrite and by_hand.exists()),
                f"{by_hand} may be written by hand, and --overwrite would delete it: move it away first",
            )
    sources = find_sources(raw, scene_names(raw, places), places, args.missing_scenes)
    rule = partial(patches, border=args.border, max_nodata=args.max_nodata)
    kinds = ("rgb", "holes", "grey") if args.grey == "repeat" else ("rgb", "holes")
    split_scenes(args, dataset, sources, rule, partial(Raster, kinds=kinds, nodata=args.nodata))
    if sources["train"] and not sources["train"][0].truth:
        blank = dataset.folder / "train" / "image_labels_blank.csv"  # process.py names the lines that are not filled in
        no_class = np.zeros(dataset.num_classes, bool)
        write_image_labels(blank, dataset.classes, dict.fromkeys(dataset.ids("train"), no_class))
        page = command_line("datasetsprocess/label_page.py", args)
        print(f"before that, since the train scenes have no truth: {page}")
        print(f"or fill in {blank} and save it as image_labels.csv")


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
