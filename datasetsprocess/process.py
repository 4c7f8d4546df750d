"""Write the image-level labels of a data set from its label maps, and print how frequent the classes are.

This is the only step before the scoring that reads pixel labels: all training on image-level labels uses its output.
A class is present in an image that has at least `min_pixels` pixels of it; ignored pixels (255) belong to no class.
Images and label maps that do not fit together are listed, and the image_labels.csv of their split is not written.
Where a split has no labels folder, an image_labels.csv that a person wrote is checked and kept; where it has one, a
file that differs from the label maps is replaced with --overwrite only. A test split needs no label maps unless it is
to be scored. Warnings say where the labels can hardly teach the classes (advice.py).

Reads   <root>/datasets/<dataset>/{train,test}/images/<id>.png and labels/<id>.png
Writes  <root>/datasets/<dataset>/{train,test}/image_labels.csv: id, then 0 or 1 for each class

Command: python datasetsprocess/process.py --dataset vaihingen
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any folder
from datasetsprocess.advice import FEW_PIXELS, warnings, wide_pixels
from tools.command import UserError, and_more, check, run
from tools.constants import Place, PositiveCount, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import remove_leftovers
from tools.image_labels import write_image_labels
from tools.labels import IGNORE, load_image, load_label
from tools.progress import Progress
from tools.steps import SPLITS, STEPS, command_line
from tools.workers import in_workers


@checked_constants
class Constants(Place):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    min_pixels: PositiveCount = 1  # a class counts as present from this many pixels on


def count_pixels(id: str, dataset: Dataset, split: str, min_pixels: int) -> np.ndarray | str:
    """Pixels of each class in one label map, in all and in wide regions (`wide_pixels`): (2,K) int64.

    A sentence when image or label map is wrong.
    """
    image, label = (folder / f"{id}.png" for folder in (dataset.images(split), dataset.labels(split)))
    try:
        check(label.is_file(), f"{image} has no label map {label}")
        ids, pixels = load_label(label, dataset.num_classes), load_image(image)
        check(
            ids.shape == pixels.shape[:2],
            f"{label} has {ids.shape[1]} x {ids.shape[0]} pixels, but its image has "
            f"{pixels.shape[1]} x {pixels.shape[0]}",
        )
        check(not (ids == IGNORE).all(), f"{label} is 255 (ignore) everywhere: remove it and its image")
        counts = np.bincount(ids.ravel(), minlength=dataset.num_classes)[: dataset.num_classes]
        check(
            counts.max() >= min_pixels,
            f"{label} has no class of {min_pixels} pixels or more: lower min_pixels, or remove it and its image",
        )
    except UserError as error:
        return str(error)
    return np.stack([counts, wide_pixels(ids, dataset.num_classes)])


def count_split(dataset: Dataset, split: str, args: Constants) -> tuple[dict[str, np.ndarray], list[str]]:
    """`count_pixels` of every label map of a split, id -> (2,K) int64, and a sentence for each wrong file."""
    ids, labels = dataset.ids(split), dataset.labels(split)
    known, wrong = set(ids), []
    for path in sorted(labels.glob("[!.]*.png")):
        if path.stem not in known:
            wrong.append(f"{path} has no image {dataset.images(split) / path.name}")
    for path in sorted(dataset.images(split).glob("[!.]*")):
        if path.suffix != ".png":
            wrong.append(f"{path} is no png, so no step reads it: convert it, or move it away")
    work = partial(count_pixels, dataset=dataset, split=split, min_pixels=args.min_pixels)
    workers = args.workers if len(ids) >= 256 else 0  # fewer are counted before a worker process has started
    counts = {}
    with Progress(len(ids), f"{split} label maps") as bar:
        for id, count in zip(ids, in_workers(work, ids, workers, chunk=32), strict=True):
            if isinstance(count, str):
                wrong.append(count)
            else:
                counts[id] = count
            bar.update()
    return counts, wrong


def report(dataset: Dataset, split: str, labels: dict[str, np.ndarray], pixels: np.ndarray | None) -> None:
    """Print a table of the classes, patches and labelled pixels, and the warnings on the train split.

    `pixels` as in `warnings`.
    """
    width = max(map(len, dataset.classes)) + 2
    present = np.sum(list(labels.values()), axis=0)
    print(f"  {'class':{width}}{'patches':>10}{'of patches':>13}" + ("" if pixels is None else f"{'of pixels':>12}"))
    for k, name in enumerate(dataset.classes):
        line = f"  {name:{width}}{present[k]:>10}{present[k] / len(labels):>12.1%} "
        if pixels is not None:
            share = pixels[0, k] / pixels[0].sum()
            line += f"{share:>11.2%} {' next to no pixels' if share < FEW_PIXELS else ''}"
        print(line.rstrip())
    if split == "train":
        for sentence in warnings(dataset, labels, pixels):
            print(f"warning: {sentence}")


def differs(dataset: Dataset, split: str, labels: dict[str, np.ndarray]) -> bool:
    """Whether there is an image_labels.csv of other labels."""
    if not dataset.image_labels_file(split).exists():
        return False
    try:
        before = dataset.image_labels(split)
    except UserError:
        return True
    return any((before[id] != labels[id]).any() for id in labels)


def label_split(dataset: Dataset, split: str, args: Constants) -> list[str]:
    """Write image_labels.csv of one split and print its summary; returns a sentence for each wrong file."""
    file, ids = dataset.image_labels_file(split), dataset.ids(split)
    if not dataset.labels(split).is_dir():
        if split == "test" and not file.exists():
            print(f"{split}: {len(ids)} images without label maps, which can be segmented but not scored")
            return []
        check(
            file.exists(),
            f"{dataset.labels(split)} is missing, so the classes of the {split} images are not known: label them on "
            f"the page of {command_line('datasetsprocess/label_page.py', args)}, or cut scenes with a truth",
        )
        labels = dataset.image_labels(split)
        print(f"{split}: {len(ids)} images without label maps; {file} was written by a person and is kept")
        report(dataset, split, labels, None)
        return []
    counts, wrong = count_split(dataset, split, args)
    if wrong:
        return wrong
    labels = {id: count[0] >= args.min_pixels for id, count in counts.items()}
    check(
        args.overwrite or not differs(dataset, split, labels),
        f"{file} exists and differs from the label maps with min_pixels {args.min_pixels}: --overwrite replaces "
        f"it, or move the {split} labels folder away to keep it",
    )
    write_image_labels(file, dataset.classes, labels)
    print(f"{split}: {len(ids)} images, {file}")
    report(dataset, split, labels, np.sum(list(counts.values()), axis=0))
    return []


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    splits = [split for split in SPLITS if any(dataset.images(split).glob("[!.]*"))]
    check(
        bool(splits),
        f"{dataset.folder} holds no png images in train/images or test/images: cut the scenes into patches with the "
        "data set's script in datasetsprocess first",
    )
    wrong = []
    for split in splits:
        remove_leftovers(dataset.folder / split, ".image_labels.*.tmp.csv")
        faults = label_split(dataset, split, args)
        if faults:
            print(f"{split}: {len(faults)} files are wrong, so {dataset.image_labels_file(split)} was not written")
        wrong += faults
    check(
        not wrong,
        f"{len(wrong)} files do not fit; fix or remove them, then run the same command again:\n  {and_more(wrong)}",
    )
    print(f"next: {STEPS['sam_masks'].command(args)} --download")
    print("      without a GPU and a download: --generator felzenszwalb in place of --download")


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
