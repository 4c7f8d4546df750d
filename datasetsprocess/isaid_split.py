"""Cut random patches from the scenes of iSAID for training and testing (method, "Data").

Of each scene a random number of patches is cut: random places are tried until that many are found where the background
covers less than its maximum share, or until the tries are used up. A patch is named <scene>_p<number>. Scenes smaller
than a patch are skipped. iSAID's train split trains and its val split tests, since the labels of its test split are not
published.

Reads   <raw>/{train,val}/images/P0000.png                                          red, green, blue
        <raw>/{train,val}/Semantic_masks/images/P0000_instance_color_RGB.png        colour-coded truth
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png, and labels/<id>.png: class ids, 255 = ignore;
        in the same folders run.json, scenes/<scene>.json (record of each scene), contact_sheet.png

docs/data.md says which archive goes where. Scenes may also be tif, jpg or jp2. For the few grey scenes of DOTA, use
--grey repeat.

Command: python datasetsprocess/isaid_split.py
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess.cutting import Cutting, Patch, Scene, class_id, cut_layout, rule_of
from tools.command import check, run
from tools.constants import Seed, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.rasters import Raster
from tools.steps import SPLITS


@checked_constants
class Constants(Cutting):
    dataset: str = "isaid"  # isaid | the name of your own dataset.toml for scenes in this layout
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times
    seed: Seed = 0  # of the random patches


def patch_rule(dataset: Dataset) -> tuple[int, list[int], int, dict[str, float]]:
    """Background class id, possible numbers of patches, tries, and split -> maximum share of the background."""
    background, numbers, tries, largest = rule_of(dataset, "background", "patches_per_scene", "tries", "max_background")
    check(
        set(largest) == set(SPLITS),
        f'max_background in the [rules] of "{dataset.name}" must have a share for {" and ".join(SPLITS)}',
    )
    return class_id(dataset, background), numbers, tries, largest


def patches(scene: Scene) -> Iterator[Patch]:
    """Random patches of a scene in which the background leaves enough of other classes, from top to bottom."""
    background, numbers, tries, largest = patch_rule(scene.dataset)
    assert scene.ids is not None
    (height, width), size = scene.ids.shape, scene.dataset.patch_size
    if min(height, width) <= size:  # as in the release, which also takes no patch at the last row and column
        scene.notes["scenes not larger than a patch, skipped"] += 1
        return
    random = scene.random()
    wanted = int(random.choice(numbers))
    corners: list[tuple[int, int]] = []
    for _ in range(tries):
        if len(corners) == wanted:
            break
        y, x = (int(random.integers(0, length - size)) for length in (height, width))
        if np.mean(scene.ids[y : y + size, x : x + size] == background) < largest[scene.split]:
            corners.append((y, x))
    if len(corners) < wanted:
        scene.notes[f"scenes with {'too few patches' if corners else 'no patch'}, too much background"] += 1
    for number in sorted(range(len(corners)), key=corners.__getitem__):  # the file is decoded once
        yield f"p{number}", *scene.window(*corners[number])


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    patch_rule(dataset)  # refuse a wrong rule before anything is written
    kinds = ("rgb", "grey") if args.grey == "repeat" else ("rgb",)
    cut_layout(args, dataset, patches, "isaid", partial(Raster, kinds=kinds))


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
