"""Cut random patches from the scenes of iSAID for training and testing (method, "Data").

Of each scene a random number of patches is cut: random places are tried until that many are found where the background
covers less than its maximum share, or until the tries are used up. A patch is named <scene>_p<number>. Scenes smaller
than a patch are skipped. iSAID's train split trains and its val split tests, since the labels of its test split are not
published.

Reads   <raw>/{train,val}/images/P0000.png                                          red, green, blue
        <raw>/{train,val}/Semantic_masks/images/P0000_instance_color_RGB.png        colour-coded truth
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png     three channels of 8 bits
        <root>/datasets/<dataset>/{train,test}/labels/<id>.png     class ids in a palette PNG, 255 = ignore
        in the same folders run.json, scenes/<scene>.json (account of each scene), contact_sheet.png

The images are those of DOTA-v1.0: unpack part1.zip, part2.zip, ... of its train folder into <raw>/train and of its val
folder into <raw>/val; each archive contains the folder images. The masks are those of iSAID: unpack the archives of its
folder train/Semantic_masks into <raw>/train/Semantic_masks, and the same for val. Scenes may also be tif, jpg or jp2.
They must have three channels of 8 bits; an opaque alpha channel is dropped. For the few grey scenes of DOTA, use --grey
repeat.

Command: python datasetsprocess/isaid_split.py
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess.cutting import Cutting, Patch, Scene, class_id, rule_of, split_scenes
from datasetsprocess.scene_files import find_sources, scene_files
from tools.command import check, run
from tools.constants import Seed, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.rasters import Raster
from tools.steps import SPLITS

RAW_SPLITS = {"train": "train", "test": "val"}
IMAGE, TRUTH = "images/{}", "Semantic_masks/images/{}_instance_color_RGB"


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
    if min(height, width) < size:
        scene.notes["scenes smaller than a patch, skipped"] += 1
        return
    random = scene.random()
    wanted = int(random.choice(numbers))
    found: list[tuple[int, int]] = []
    for _ in range(tries):
        if len(found) == wanted:
            break
        y, x = (int(random.integers(0, length - size, endpoint=True)) for length in (height, width))
        if np.mean(scene.ids[y : y + size, x : x + size] == background) < largest[scene.split]:
            found.append((y, x))
    if len(found) < wanted:
        scene.notes[f"scenes with {'too few patches' if found else 'no patch'}, too much background"] += 1
    for number in sorted(range(len(found)), key=lambda number: found[number]):  # the file is decoded once
        yield f"p{number}", *scene.window(*found[number])


def scene_names(raw: Path) -> dict[str, list[str]]:
    """Split -> the scenes whose image or truth is in the raw folders, sorted."""
    behind = TRUTH.rpartition("{}")[2]
    names = {}
    for split, folder in RAW_SPLITS.items():
        truths = {name for name in scene_files((raw / folder / TRUTH).parent) if name.endswith(behind)}
        images = scene_files((raw / folder / IMAGE).parent)
        names[split] = sorted({*images, *(name.removesuffix(behind) for name in truths)})
    return names


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    patch_rule(dataset)  # refuse a wrong rule before anything is written
    raw = Path(args.raw) if args.raw else dataset.folder / "raw"
    scenes = dataset.scenes or scene_names(raw)
    empty = [f"{folder}/images" for split, folder in RAW_SPLITS.items() if not scenes.get(split)]
    check(
        not raw.is_dir() or args.missing_scenes == "skip" or not empty,
        f"{raw} has no scenes in {' or '.join(empty)}: unpack the archives as this script's docstring says, or cut "
        "only the other split with --missing-scenes skip",
    )
    places = {split: (f"{folder}/{IMAGE}", f"{folder}/{TRUTH}") for split, folder in RAW_SPLITS.items()}
    sources = find_sources(raw, scenes, places, args.missing_scenes)
    kinds = ("rgb", "grey") if args.grey == "repeat" else ("rgb",)
    split_scenes(args, dataset, sources, patches, partial(Raster, kinds=kinds))


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
