"""Cut random patches from the scenes of iSAID for training and testing (method, "Data").

From each scene a random number of patches is wanted; random places are tried until so many are found in which the
background stays below its largest share, or the tries are used up. A patch is named <scene>_p<number>. Scenes smaller
than a patch are skipped. iSAID's train split trains and its val split tests: the labels of its test split are withheld.

Reads   <raw>/{train,val}/images/P0000.png                                          red, green, blue
        <raw>/{train,val}/Semantic_masks/images/P0000_instance_color_RGB.png        colour-coded truth
Writes  <root>/datasets/<dataset>/{train,test}/images/<id>.png     three channels of 8 bits
        <root>/datasets/<dataset>/{train,test}/labels/<id>.png     class ids in a palette PNG, 255 = ignore
        beside them run.json, scenes/<scene>.json (account of each scene), contact_sheet.png

The images are those of DOTA-v1.0: unpack the archives part1.zip, part2.zip, ... of its train and val folders into
<raw>/train and <raw>/val, each with its folder images. The masks are iSAID's: unpack the archives in its folders
train/Semantic_masks and val/Semantic_masks into those of the same name. Scenes may also be jpg or tif; they must have
three channels of 8 bits (an opaque alpha channel is dropped). A few of DOTA's scenes are grey: --grey repeat.

Command: python datasetsprocess/isaid_split.py
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
from datasetsprocess.cutting import Patch, Scene, class_id, rule_of, split_scenes
from datasetsprocess.scene_files import find_sources
from tools.command import check, run
from tools.dataset import SPLITS, Dataset, load_dataset
from tools.rasters import SUFFIXES, Raster
from tools.step import ROOT

RAW_SPLITS = {"train": "train", "test": "val"}
IMAGE, TRUTH = "images/{}", "Semantic_masks/images/{}_instance_color_RGB"


@dataclass(frozen=True)
class Constants:
    dataset: str = "isaid"  # isaid | the name of your own dataset.toml for scenes in this layout
    root: Path = ROOT  # the folder that holds datasets/
    raw: str = ""  # where the archives are unpacked; empty: <root>/datasets/<dataset>/raw
    grey: Literal["stop", "repeat"] = "stop"  # scenes with one channel: stop, or repeat it three times
    unknown_colours: Literal["stop", "ignore"] = "stop"  # a truth's colour that is no class: stop, or 255 (ignored)
    missing_scenes: Literal["stop", "skip"] = "stop"  # images or truths without the other, splits that are not there
    seed: int = 0  # of the random patches
    workers: int = min(8, os.cpu_count() or 1)  # processes; 0: none beside this one
    overwrite: bool = False  # remove the patches that are there and start anew


def patch_rule(dataset: Dataset) -> tuple[int, list[int], int, dict[str, float]]:
    """Background class id, possible numbers of patches, tries, and split -> share the background must stay below."""
    background, numbers, tries, largest = rule_of(dataset, "background", "patches_per_scene", "tries", "max_background")
    check(
        bool(numbers) and min(numbers) > 0 and tries > 0,
        f'[rules] of "{dataset.name}": patches_per_scene and tries must be above 0',
    )
    check(
        set(largest) == set(SPLITS),
        f'[rules] of "{dataset.name}": max_background needs a share for {" and ".join(SPLITS)}',
    )
    return class_id(dataset, background), numbers, tries, largest


def patches(scene: Scene) -> Iterator[Patch]:
    """Random patches of a scene in which the background leaves enough of other classes."""
    background, numbers, tries, largest = patch_rule(scene.dataset)
    (height, width), size = scene.ids.shape, scene.dataset.patch_size
    if min(height, width) < size:
        scene.notes["scenes smaller than a patch, skipped"] += 1
        return
    random = scene.random()
    wanted, found = int(random.choice(numbers)), 0
    for _ in range(tries):
        y, x = (int(random.integers(0, length - size, endpoint=True)) for length in (height, width))
        if np.mean(scene.ids[y : y + size, x : x + size] == background) < largest[scene.split]:
            yield f"p{found}", *scene.window(y, x)
            found += 1
            if found == wanted:
                return
    scene.notes[
        "scenes with fewer patches than wanted, the background too large"
        if found
        else "scenes without a patch, the background too large"
    ] += 1


def scene_names(raw: Path) -> dict[str, list[str]]:
    """Split -> the scenes of which image or truth is in the raw folders, sorted."""
    behind = TRUTH.rpartition("{}")[2]
    names = {}
    for split, folder in RAW_SPLITS.items():
        images = {path.stem for path in (raw / folder / IMAGE).parent.glob("[!.]*") if path.suffix.lower() in SUFFIXES}
        truths = {path.stem.removesuffix(behind) for path in (raw / folder / TRUTH).parent.glob(f"[!.]*{behind}.*")}
        names[split] = sorted(images | truths)
    return names


def main(constants: Constants) -> None:
    dataset = load_dataset(constants.dataset, constants.root)
    patch_rule(dataset)  # a wrong rule shows before anything is written
    raw = Path(constants.raw) if constants.raw else dataset.folder / "raw"
    scenes = dataset.scenes or scene_names(raw)
    empty = [f"{folder}/images" for split, folder in RAW_SPLITS.items() if not scenes.get(split)]
    check(
        not raw.is_dir() or constants.missing_scenes == "skip" or not empty,
        f"{raw} holds no scenes in {' or '.join(empty)}: unpack the archives as the top of this script says, or cut "
        "the split that is there with --missing-scenes skip",
    )
    places = {split: (f"{folder}/{IMAGE}", f"{folder}/{TRUTH}") for split, folder in RAW_SPLITS.items()}
    sources = find_sources(raw, scenes, places, constants.missing_scenes)
    kinds = ("rgb", "grey") if constants.grey == "repeat" else ("rgb",)
    split_scenes(constants, dataset, sources, patches, partial(Raster, kinds=kinds))


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
