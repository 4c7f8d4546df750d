"""Write the image-level labels of a data set from its label maps, and print how frequent the classes are.

This is the one step before the scoring that reads pixel labels: all training on image-level labels rests on its
output. A class is present in an image from `min_pixels` pixels on; ignored pixels (255) belong to no class. Images
and label maps that do not fit together are listed, and the image_labels.csv of their split is then not written. Where
a split has no labels folder, an image_labels.csv that a person wrote is checked and kept; where it has one, a file
that says something else is replaced with --overwrite only. A test split needs no label maps unless it is to be
scored.

Reads   <root>/datasets/<dataset>/{train,test}/images/<id>.png and labels/<id>.png
Writes  <root>/datasets/<dataset>/{train,test}/image_labels.csv: id, then 0 or 1 for each class

Command: python datasetsprocess/process.py --dataset vaihingen
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.command import UserError, check, run
from tools.dataset import SPLITS, Dataset, load_dataset, write_image_labels
from tools.files import remove_leftovers
from tools.labels import IGNORE, load_image, load_label
from tools.step import ROOT
from tools.workers import worker_pool


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    root: Path = ROOT  # the folder that holds datasets/
    min_pixels: int = 1  # a class counts as present from this many pixels on
    workers: int = min(8, os.cpu_count() or 1)  # processes; 0: none beside this one
    overwrite: bool = False  # replace an image_labels.csv that says something else


def count_pixels(id: str, dataset: Dataset, split: str, min_pixels: int) -> np.ndarray | str:
    """Pixels of each class in one label map, (K,) int64; a sentence when image or label map is wrong."""
    image, label = (folder / f"{id}.png" for folder in (dataset.images(split), dataset.labels(split)))
    try:
        check(label.exists(), f"{image} has no label map {label}")
        ids, pixels = load_label(label, dataset.num_classes), load_image(image)
        check(
            ids.shape == pixels.shape[:2],
            f"{label} has {ids.shape[1]} x {ids.shape[0]} pixels, but its image has "
            f"{pixels.shape[1]} x {pixels.shape[0]}",
        )
        check((ids != IGNORE).any(), f"{label} is 255 (ignore) everywhere and has no class: remove it and its image")
        counts = np.bincount(ids.ravel(), minlength=dataset.num_classes)[: dataset.num_classes]
        check(
            (counts >= min_pixels).any(),
            f"{label} has no class of {min_pixels} pixels or more: lower min_pixels or remove it and its image",
        )
    except UserError as error:
        return str(error)
    return counts


def count_split(dataset: Dataset, split: str, constants: Constants) -> tuple[dict[str, np.ndarray], list[str]]:
    """Pixels of each class in every label map of a split, id -> (K,) int64, and a sentence for each wrong file."""
    ids = dataset.ids(split)
    images, labels = dataset.images(split), dataset.labels(split)
    wrong = [
        f"{labels / name} has no image {images / name}"
        for name in sorted({path.name for path in labels.glob("[!.]*.png")} - {f"{id}.png" for id in ids})
    ]
    wrong += [
        f"{path} is no png, so no step will read it: convert it, or move it away"
        for path in sorted(images.iterdir())
        if path.suffix != ".png" and not path.name.startswith(".")
    ]
    work = partial(count_pixels, dataset=dataset, split=split, min_pixels=constants.min_pixels)
    progress = partial(tqdm, total=len(ids), desc=f"{split} label maps", unit="image", disable=None)
    if constants.workers < 1 or len(ids) < 256:  # a few are counted before a process has started
        counts = list(progress(map(work, ids)))
    else:
        with worker_pool(constants.workers) as pool:
            counts = list(progress(pool.map(work, ids, chunksize=32)))
    wrong += [count for count in counts if isinstance(count, str)]
    return {id: count for id, count in zip(ids, counts, strict=True) if not isinstance(count, str)}, wrong


def frequencies(dataset: Dataset, labels: dict[str, np.ndarray], pixels: np.ndarray | None = None) -> str:
    """A table of the classes: patches with the class, their share, and the share of labelled pixels if known."""
    width = max(map(len, dataset.classes)) + 2
    present = sum(label.astype(np.int64) for label in labels.values())
    lines = [f"  {'class':{width}}{'patches':>10}{'of patches':>13}" + ("" if pixels is None else f"{'of pixels':>12}")]
    for k, name in enumerate(dataset.classes):
        line = f"  {name:{width}}{present[k]:>10}{present[k] / len(labels):>12.1%} "
        line += f"{pixels[k] / pixels.sum():>11.2%} " if pixels is not None else ""
        lines.append(line + ("  in every patch, so hard to locate" if present[k] == len(labels) else ""))
    return "\n".join(line.rstrip() for line in lines)


def agrees(dataset: Dataset, split: str, labels: dict[str, np.ndarray]) -> bool:
    """Whether the image_labels.csv that is there says the same."""
    try:
        before = dataset.image_labels(split)
    except UserError:
        return False
    return all((before[id] == labels[id]).all() for id in labels)


def label_split(dataset: Dataset, split: str, constants: Constants) -> list[str]:
    """Write image_labels.csv of one split and print its account; returns a sentence for each wrong file."""
    file, ids = dataset.image_labels_file(split), dataset.ids(split)
    if not dataset.labels(split).is_dir():
        if split == "test" and not file.exists():
            print(f"{split}: {len(ids)} images without label maps, which can be segmented but not scored")
            return []
        check(
            file.exists(),
            f"{dataset.labels(split)} is missing, so nothing says what the {split} images show: write {file} "
            "by hand, beginning with image_labels_blank.csv (docs/own_data.md), or cut scenes that have a truth",
        )
        labels = dataset.image_labels(split)
        print(f"{split}: {len(ids)} images without label maps; {file} was written by a person and is kept as it is")
        print(frequencies(dataset, labels))
        return []
    counts, wrong = count_split(dataset, split, constants)
    if wrong:
        return wrong
    labels = {id: count >= constants.min_pixels for id, count in counts.items()}
    if file.exists() and not constants.overwrite:
        check(
            agrees(dataset, split, labels),
            f"{file} is there and says something else than the label maps with min_pixels {constants.min_pixels}: "
            f"--overwrite replaces it, or move the {split} labels folder away to keep it",
        )
    write_image_labels(file, dataset.classes, labels)
    print(f"{split}: {len(ids)} images, {file}")
    print(frequencies(dataset, labels, sum(counts.values())))
    return []


def main(constants: Constants) -> None:
    check(constants.min_pixels >= 1, f"min_pixels is {constants.min_pixels}, but it must be 1 or more")
    check(constants.workers >= 0, f"workers is {constants.workers}, but it must be 0 or more")
    dataset = load_dataset(constants.dataset, constants.root)
    splits = [split for split in SPLITS if any(dataset.images(split).glob("[!.]*.png"))]
    check(
        bool(splits),
        f"{dataset.folder} holds no png images in train/images or test/images: cut the scenes into "
        "patches with the data set's script in datasetsprocess first",
    )
    wrong = []
    for split in splits:
        remove_leftovers(dataset.folder / split, ".image_labels.*.tmp.csv")
        found = label_split(dataset, split, constants)
        if found:
            print(f"{split}: {len(found)} files are wrong, so {dataset.image_labels_file(split)} was not written")
        wrong += found
    if wrong:
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise UserError(
            f"{len(wrong)} files do not fit; mend or remove them and run this again:\n  "
            + "\n  ".join(wrong[:20])
            + more
        )


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
