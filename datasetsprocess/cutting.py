"""Cutting scenes into patches: whole tiles, versions, and the run over all scenes in processes.

A splitter in datasetsprocess names the files of each scene and yields the patches that its rule makes of one scene
(method, "Data"); everything else is here. A patch's id tells where it comes from: <scene>_r<row>_c<column> for a tile,
counted in strides, <scene>_p<number> for a random patch, and _v<version> behind it for one of the four versions.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from datasetsprocess.scene_files import Source
from datasetsprocess.scene_labels import describe, read_truth
from tools.command import UserError, check
from tools.dataset import SPLITS, Dataset
from tools.files import write_json
from tools.labels import IGNORE, load_image, load_label, save_image, save_label
from tools.rasters import KINDS, Raster
from tools.step import StepFolder

PATCH_ID = re.compile(r"(.+)_(?:r\d+_c\d+|p\d+)(?:_v\d)?")


@dataclass
class Scene:
    """An open scene as a rule sees it: class ids (H,W) uint8, windows of the image, random numbers, notes to report.

    `ids` is None where there is no truth.
    """

    name: str
    split: str
    dataset: Dataset
    seed: int
    image: Raster
    ids: np.ndarray | None
    notes: Counter = field(default_factory=Counter)

    def window(self, y: int, x: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The patch with upper left corner (y, x): image (P,P,3) uint8 and class ids (P,P) uint8."""
        size = self.dataset.patch_size
        ids = None if self.ids is None else self.ids[y : y + size, x : x + size]
        return self.image.read(y, x, size, size), ids

    def tiles(self) -> list[tuple[int, int]]:
        """Row and column of every whole tile, counted in strides; raises `UserError` when not one fits."""
        height, width = self.image.shape
        tiles = whole_tiles(height, width, self.dataset.patch_size, self.dataset.stride)
        if not tiles:
            raise UserError(
                f"{self.image.path} has {width} x {height} pixels, too few for one patch of "
                f"{self.dataset.patch_size}: leave the scene out, or set a smaller patch_size"
            )
        return tiles

    def random(self, *place: int) -> np.random.Generator:
        """Random numbers that depend on seed, scene and place alone: the same with any number of workers."""
        return np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), *place))


# place in the scene, such as "r002_c011_v1"; image (P,P,3); class ids (P,P), None without a truth
Patch = tuple[str, np.ndarray, np.ndarray | None]
Rule = Callable[[Scene], Iterable[Patch]]


def whole_tiles(height: int, width: int, patch: int, stride: int) -> list[tuple[int, int]]:
    """Row and column of the tiles that lie wholly inside a scene; tile (r, c) begins at pixel (r, c) * stride."""
    rows, columns = ((length - patch) // stride + 1 for length in (height, width))
    return [(row, column) for row in range(rows) for column in range(columns)]


def four_versions(
    image: np.ndarray,
    ids: np.ndarray,
    random: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A square patch as it is, flipped vertically, flipped horizontally, and turned by 90, 180 or 270 degrees."""
    turns = int(random.integers(1, 4))
    ways = (lambda a: a, np.flipud, np.fliplr, lambda a: np.rot90(a, turns))
    return [(way(image), way(ids)) for way in ways]


def rule_of(dataset: Dataset, *keys: str) -> list:
    """The values of the data set's [rules]; raises `UserError` for one that is not there."""
    missing = [key for key in keys if key not in dataset.rules]
    check(
        not missing,
        f'the [rules] in the dataset.toml of "{dataset.name}" lack {", ".join(missing)}: take them from '
        "the description that comes with the project, or leave [rules] out and set base",
    )
    return [dataset.rules[key] for key in keys]


def class_id(dataset: Dataset, name: str) -> int:
    check(
        name in dataset.classes,
        f'the [rules] of "{dataset.name}" name the class {name}, but the classes are {", ".join(dataset.classes)}',
    )
    return dataset.classes.index(name)


def split_scenes(
    constants,
    dataset: Dataset,
    sources: dict[str, list[Source]],
    rule: Rule,
    open_image: Callable[[Path], Raster] = Raster,
) -> None:
    """Cut the scenes of both splits into <dataset folder>/<split>/{images,labels}; prints an account of each split.

    `constants` has unknown_colours, workers, overwrite and perhaps seed. Finished scenes of an interrupted run are
    kept, begun ones redone. `rule` and `open_image` must be picklable. Raises `UserError` at the end for scenes that
    could not be cut, and when there is no patch at all.
    """
    seed = getattr(constants, "seed", 0)  # where nothing is random, there is none
    check(seed >= 0, f"seed is {seed}, but it must be 0 or more")
    check(constants.workers >= 0, f"workers is {constants.workers}, but it must be 0 or more")
    folders = {}
    for split in SPLITS:
        if not sources[split]:
            print(f"{split}: no scenes, so no patches")
            continue
        settings = {
            "patch_size": dataset.patch_size,
            "stride": dataset.stride,
            "classes": list(dataset.classes),
            "colours": dataset.colours.tolist(),
            "ignore_colours": dataset.ignore_colours.tolist(),
            "rules": dataset.rules,
            "scenes": dataset.scenes.get(split, []),
        }
        if not sources[split][0].truth:  # patches cut before the truth came, and after, must not mix
            settings["label_maps"] = False
        folders[split] = StepFolder(dataset.folder / split, constants, settings=settings)
    failures, total = [], 0
    for split, folder in folders.items():
        done = _finished_scenes(folder.folder)
        for source in sources[split]:
            files = source.state()
            check(
                done.get(source.scene, {}).get("files", files) == files,
                f"{source.image} or its truth was replaced after it was cut: cut all anew with --overwrite",
            )
        _remove_begun(folder.folder, done)
        work = partial(
            _cut,
            rule=rule,
            open_image=open_image,
            split=split,
            dataset=dataset,
            seed=seed,
            unknown=constants.unknown_colours,
        )
        todo = [source for source in sources[split] if source.scene not in done]
        folder.each(work, todo, constants.workers, f"{split} scenes", unit="scene")
        try:
            folder.close("images/*.png")
        except UserError as error:
            failures.append(str(error))
        total += folder.run["files"]
        _account(folder, split)
        if folder.run["files"]:
            _picture(dataset, split)
    if failures:
        raise UserError("\n".join(failures))
    check(total > 0, f"not one patch was cut for {dataset.name}: the scenes are too small, or the [rules] leave none")
    print(f"next: python datasetsprocess/process.py --dataset {dataset.name}")


def _finished_scenes(folder: Path) -> dict[str, dict]:
    """Scene -> its account. One that cannot be read, as after a power cut, is none: the scene is cut again."""
    found = {}
    for path in (folder / "scenes").glob("[!.]*.json"):
        with suppress(ValueError):
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _remove_begun(folder: Path, done: Collection[str]) -> None:
    """Remove the patches of scenes that an interrupted run had begun: their files may have been replaced since."""
    for path in (*folder.glob("images/*.png"), *folder.glob("labels/*.png")):
        match = PATCH_ID.fullmatch(path.stem)
        if match and match[1] not in done:
            path.unlink()


def _cut(
    source: Source,
    rule: Rule,
    open_image: Callable[[Path], Raster],
    split: str,
    dataset: Dataset,
    seed: int,
    unknown: str,
) -> None:
    """Write the patches of one scene, then scenes/<scene>.json, which says that they are all there."""
    with open_image(source.image) as image:
        ids, colours = _read_ids(source, image, dataset) if source.truth else (None, {})
        if colours and unknown == "stop":
            raise UserError(describe(source.truth, colours))
        scene = Scene(source.scene, split, dataset, seed, image, ids)
        patches = 0
        for place, pixels, label in rule(scene):
            if label is not None:
                if (label == IGNORE).all():
                    scene.notes["patches without any labelled pixel, left out"] += 1
                    continue
                save_label(dataset.labels(split) / f"{source.scene}_{place}.png", label, dataset.colours)
            save_image(dataset.images(split) / f"{source.scene}_{place}.png", pixels)
            patches += 1
    scene.notes["pixels of unknown colours, set to 255"] += sum(colours.values())
    account = {"image": str(source.image), "truth": str(source.truth or ""), "patches": patches, "notes": +scene.notes}
    account["files"] = source.state()
    write_json(dataset.folder / split / "scenes" / f"{source.scene}.json", account)


def _read_ids(source: Source, image: Raster, dataset: Dataset) -> tuple[np.ndarray, dict]:
    """`read_truth` of a scene's truth, which must have the size of its image; closed before the image is read."""
    with Raster(source.truth, KINDS) as truth:
        if image.shape != truth.shape:
            raise UserError(
                f"{source.image} has {image.shape[1]} x {image.shape[0]} pixels but {source.truth} has "
                f"{truth.shape[1]} x {truth.shape[0]}: they must be the same scene at the same size"
            )
        return read_truth(truth, dataset)


def _account(folder: StepFolder, split: str) -> None:
    records = _finished_scenes(folder.folder).values()
    print(f"{split}: {folder.run['files']} patches of {len(records)} scenes in {folder.folder}")
    notes = Counter()
    for record in records:
        notes.update(record["notes"])
    for note, count in sorted(notes.items()):
        print(f"  {note}: {count}")


def _picture(dataset: Dataset, split: str) -> None:
    from tools.pictures import colourise, contact_sheet, sample_ids  # only here: the workers need no fonts

    ids, legend = sample_ids(dataset.ids(split), 6), zip(dataset.classes, dataset.colours, strict=True)
    rows = [[load_image(dataset.images(split) / f"{id}.png")] for id in ids]
    if dataset.labels(split).is_dir():
        for id, row in zip(ids, rows, strict=True):
            label = load_label(dataset.labels(split) / f"{id}.png", dataset.num_classes)
            row.append(colourise(label, dataset.colours))
    contact_sheet(dataset.folder / split / "contact_sheet.png", rows, ["image", "truth"][: len(rows[0])], legend)
