"""Cut the scenes of ISPRS Potsdam into patches for training and testing (method, "Data").

Test: every whole tile. Train: a tile is dropped if any of its classes covers less than a minimum share of the pixels;
the others are saved in four versions, _v0 to _v3: as they are, flipped vertically, flipped horizontally, rotated by a
random multiple of 90 degrees. A patch is named <scene>_r<row>_c<column>, then the version.

Reads   <raw>/2_Ortho_RGB/top_potsdam_<scene>_RGB.tif                               red, green, blue
        <raw>/5_Labels_all/top_potsdam_<scene>_label.tif                            full colour-coded truth
        <raw>/5_Labels_all_noBoundary/top_potsdam_<scene>_label_noBoundary.tif      for --truth eroded: boundaries are
                                                                                    black (ignored)
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png, and labels/<id>.png: class ids, 255 = ignore;
        in the same folders run.json, scenes/<scene>.json (record of each scene), contact_sheet.png

docs/data.md says which archive goes where. With 5_Labels_for_participants.zip, the truth of 24 scenes only, in
<raw>/5_Labels_all add --missing-scenes skip. The published truth of 4_12 is a faulty overlay with thousands of colours:
ignore its wrong pixels with --unknown-colours ignore, or write a dataset.toml without this scene. Scenes may also be
png, jpg or jp2.

Command: python datasetsprocess/potsdam_patch_split.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess.cutting import Cutting, Patch, Scene, class_id, cut_layout, four_versions, rule_of
from tools.command import run
from tools.constants import Seed, checked_constants
from tools.dataset import Dataset, load_dataset


@checked_constants
class Constants(Cutting):
    dataset: str = "potsdam"  # potsdam | the name of your own dataset.toml for scenes in this layout
    truth: Literal["full", "eroded"] = "full"  # which truth becomes the labels
    seed: Seed = 0  # of the random rotations


def smallest_shares(dataset: Dataset) -> np.ndarray:
    """(K,) the minimum share of the pixels of a train tile, for each class in it."""
    min_share, exceptions = rule_of(dataset, "min_share", "min_share_of")
    shares = np.full(dataset.num_classes, min_share, np.float64)
    for name, share in exceptions.items():
        shares[class_id(dataset, name)] = share
    return shares


def patches(scene: Scene) -> Iterator[Patch]:
    """The tiles of a scene; in the train split without those that show too little of a class, in four versions."""
    stride, classes, smallest = scene.dataset.stride, scene.dataset.num_classes, smallest_shares(scene.dataset)
    for row, column in scene.tiles():
        place = f"r{row:03d}_c{column:03d}"
        image, ids = scene.window(row * stride, column * stride)
        assert ids is not None
        if scene.split == "test":
            yield place, image, ids
            continue
        shares = np.bincount(ids.ravel(), minlength=classes)[:classes] / ids.size
        if ((shares > 0) & (shares < smallest)).any():
            scene.notes["tiles dropped, a class below its minimum share"] += 1
            continue
        for version, patch in enumerate(four_versions(image, ids, scene.random(row, column))):
            yield f"{place}_v{version}", *patch


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    smallest_shares(dataset)  # refuse a wrong rule before anything is written
    cut_layout(args, dataset, patches, "potsdam")


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
