"""Cut the scenes of ISPRS Vaihingen into patches for training and testing (method, "Data").

Test: every whole tile. Train: a random crop of each tile is enlarged to the size of the tile. Where the rare class
(car) covers enough of the crop, four versions of the crop replace the tile; otherwise the tile is saved as it is.
A patch is named <area>_r<row>_c<column>, with _v0 to _v3 for the versions: as it is, flipped vertically, flipped
horizontally, rotated by a random multiple of 90 degrees.

Reads   <raw>/top/top_mosaic_09cm_area<N>.tif                      near infrared, red, green, in this order
        <raw>/gts_for_participants/top_mosaic_09cm_area<N>.tif     full colour-coded truth
        <raw>/gts_eroded/top_mosaic_09cm_area<N>_noBoundary.tif    for --truth eroded: boundaries are black (ignored)
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png, and labels/<id>.png: class ids, 255 = ignore;
        in the same folders run.json, scenes/<area>.json (record of each scene), contact_sheet.png

docs/data.md says which archive goes where. Scenes may also be png, jpg or jp2.

Command: python datasetsprocess/vaihingen_patch_split.py
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess.cutting import Cutting, Patch, Scene, class_id, cut_layout, four_versions, rule_of
from tools.command import check, run
from tools.constants import Seed, checked_constants
from tools.dataset import Dataset, load_dataset


@checked_constants
class Constants(Cutting):
    dataset: str = "vaihingen"  # vaihingen | demo | the name of your own dataset.toml for scenes in this layout
    truth: Literal["full", "eroded"] = "full"  # which truth becomes the labels
    seed: Seed = 0  # of the random crops and rotations


def crop_rule(dataset: Dataset) -> tuple[int, float, int, int]:
    """Rare class id, the share it must exceed in a crop, smallest and largest side of the crop in pixels."""
    rare_class, rare_share, (smallest, largest) = rule_of(dataset, "rare_class", "rare_share", "crop_side")
    sides = math.ceil(smallest * dataset.patch_size), math.floor(largest * dataset.patch_size)
    check(
        0 < sides[0] <= sides[1],
        f'crop_side is [{smallest}, {largest}] in the [rules] of "{dataset.name}", but it must be two rising shares, '
        "the first above 0",
    )
    return class_id(dataset, rare_class), rare_share, *sides


def zoom(
    image: np.ndarray, ids: np.ndarray, smallest: int, largest: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random square crop of a tile, enlarged to the tile's size: image (P,P,3) bilinear, ids (P,P) by the nearest."""
    size = len(ids)
    side = int(random.integers(smallest, largest, endpoint=True))
    y, x = random.integers(0, size - side, size=2, endpoint=True)
    image, ids = image[y : y + side, x : x + side], ids[y : y + side, x : x + side]
    return (
        cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR),
        cv2.resize(ids, (size, size), interpolation=cv2.INTER_NEAREST_EXACT),
    )


def patches(scene: Scene) -> Iterator[Patch]:
    """The tiles of a scene; in the train split four versions of an enlarged crop where the rare class covers enough."""
    stride, (rare, share, smallest, largest) = scene.dataset.stride, crop_rule(scene.dataset)
    for row, column in scene.tiles():
        place = f"r{row:03d}_c{column:03d}"
        image, ids = scene.window(row * stride, column * stride)
        assert ids is not None
        if scene.split == "train":
            random = scene.random(row, column)
            crop = zoom(image, ids, smallest, largest, random)
            if np.mean(crop[1] == rare) > share:
                scene.notes["tiles zoomed in and saved in four versions"] += 1
                for version, patch in enumerate(four_versions(*crop, random)):
                    yield f"{place}_v{version}", *patch
                continue
        yield place, image, ids


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    crop_rule(dataset)  # refuse a wrong rule before anything is written
    cut_layout(args, dataset, patches, "vaihingen")


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
