"""Cutting scenes into patches: whole tiles, four versions, and the run over all scenes in worker processes.

A splitter in datasetsprocess finds the files of each scene and yields the patches that its rule makes of one scene
(method, "Data"); everything else is here. A patch's id says where it comes from: <scene>_r<row>_c<column> for a tile,
counted in strides, or <scene>_p<number> for a random patch; then _v<version> for one of the four versions.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from datasetsprocess.scene_files import Source, find_sources, scene_names
from datasetsprocess.scene_labels import Unknown, describe, read_truth
from tools.command import UserError, check
from tools.constants import CORES, Count, MayChange, Place, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import read_json, write_json
from tools.folders import StepFolder
from tools.labels import IGNORE, load_image, load_label, save_image, save_label
from tools.rasters import KINDS, Raster
from tools.steps import SPLITS, command_line

PATCH_ID = re.compile(r"(.+)_(?:r\d+_c\d+|p\d+)(?:_v\d)?")


@checked_constants
class Cutting(Place):
    """What every splitter has."""

    raw: str = ""  # the folder of unpacked archives or own scenes; empty: <root>/datasets/<dataset>/raw
    unknown_colours: Literal["stop", "ignore"] = "stop"  # truth colours that are no class: stop, or ignore them (255)
    missing_scenes: MayChange[Literal["stop", "skip"]] = "stop"  # scenes without image or truth: stop, or skip them
    workers: MayChange[Count] = min(8, CORES)  # worker processes of about 200 MB; 0: the main process


@dataclass
class Scene:
    """An open scene as a rule sees it.

    `ids` are the class ids (H,W) uint8 of the truth, None where there is no truth; `notes` are counts to report.
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
                f"{self.image.path} has {width} x {height} pixels, too few for one patch "
                f"of {self.dataset.patch_size} pixels: leave the scene out, or set a smaller patch_size"
            )
        return tiles

    def random(self, *place: int) -> np.random.Generator:
        """Random numbers given by seed, scene and place alone, so that the number of workers changes nothing."""
        return np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), *place))


# place in the scene, such as "r002_c011_v1"; image (P,P,3); class ids (P,P), None without a truth
Patch = tuple[str, np.ndarray, np.ndarray | None]
Rule = Callable[[Scene], Iterable[Patch]]


def whole_tiles(height: int, width: int, patch: int, stride: int) -> list[tuple[int, int]]:
    """Row and column of the tiles that lie wholly inside a scene; tile (r, c) begins at pixel (r, c) * stride."""
    rows, columns = (max((length - patch) // stride + 1, 0) for length in (height, width))
    return list(np.ndindex(rows, columns))


def four_versions(
    image: np.ndarray, ids: np.ndarray, random: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A square patch as it is, flipped vertically, flipped horizontally, and turned by 90, 180 or 270 degrees."""
    turns = int(random.integers(1, 4))
    ways = (lambda a: a, np.flipud, np.fliplr, lambda a: np.rot90(a, turns))
    return [(way(image), way(ids)) for way in ways]


def rule_of(dataset: Dataset, *keys: str) -> list[Any]:
    """The values of the data set's [rules]; raises `UserError` for a missing one."""
    missing = [key for key in keys if key not in dataset.rules]
    check(
        not missing,
        f'{", ".join(missing)} missing in the [rules] of "{dataset.name}": copy them from the dataset.toml that comes '
        "with the project, or set base and leave out [rules]",
    )
    return [dataset.rules[key] for key in keys]


def class_id(dataset: Dataset, name: str) -> int:
    """The id of a class that a rule names; raises `UserError` for an unknown one."""
    check(
        name in dataset.classes,
        f'the [rules] of "{dataset.name}" name the class {name}, but the classes are {", ".join(dataset.classes)}',
    )
    return dataset.classes.index(name)


def raw_folder(args: Cutting, dataset: Dataset) -> Path:
    """The folder of the raw scenes: --raw, or raw in the data set's folder."""
    return Path(args.raw) if args.raw else dataset.folder / "raw"


def cut_layout(
    args: Cutting,
    dataset: Dataset,
    rule: Rule,
    shipped: str,
    open_image: Callable[[Path], Raster] = Raster,
) -> None:
    """Cut the scenes that the data set's [layout] describes, or else that of the data set `shipped` with the project.

    Without [scenes], and where the two splits have folders of their own, the raw folder decides which scenes there are.
    """
    raw = raw_folder(args, dataset)
    layout = dataset.layout or load_dataset(shipped).layout
    assert layout is not None
    truth = getattr(args, "truth", "full")
    check(
        truth in layout.truth,
        f'truth is {truth}, but the [layout] of "{dataset.name}" has no truth.{truth}: add it, or set --truth',
    )
    places = {split: layout.places(split, truth) for split in SPLITS}
    scenes = dataset.scenes
    if places["train"][0] != places["test"][0]:
        scenes = scenes or scene_names(raw, places)
        empty = [Path(places[split][0]).parent.as_posix() for split in SPLITS if not scenes.get(split)]
        check(
            not raw.is_dir() or args.missing_scenes == "skip" or not empty,
            f"{raw} has no scenes in {' or '.join(empty)}: unpack the archives as this script's docstring says, or cut "
            "only the other split with --missing-scenes skip",
        )
    split_scenes(args, dataset, find_sources(raw, scenes, places, args.missing_scenes), rule, open_image)


class SceneRecord(BaseModel):
    """scenes/<scene>.json, written when all patches of a scene are there."""

    image: str
    truth: str
    patches: int
    notes: dict[str, int]
    files: list[list[int]]  # `Source.state` when the scene was cut


def split_scenes(
    args: Cutting,
    dataset: Dataset,
    sources: dict[str, list[Source]],
    rule: Rule,
    open_image: Callable[[Path], Raster] = Raster,
) -> None:
    """Cut the scenes of both splits into <dataset folder>/<split>/{images,labels} and print a summary of each split.

    A run that continues keeps the finished scenes and cuts the others again. `rule` and `open_image` must be picklable.
    Raises `UserError` at the end for scenes that could not be cut, and when there is no patch at all.
    """
    failures, total = [], 0
    for split in SPLITS:
        if not sources[split]:
            print(f"{split}: no scenes, so no patches")
            continue
        folder = StepFolder(dataset.folder / split, args)
        settings = _settings(dataset, split, with_truth=sources[split][0].truth is not None)
        cut = partial(_cut, args=args, dataset=dataset, split=split, rule=rule, open_image=open_image)
        try:
            with folder.open("images/*.png", settings=settings):
                records = _records(folder.path)
                for source in sources[split]:
                    check(
                        source.scene not in records or records[source.scene].files == source.state(),
                        f"{source.image} or its truth was replaced after it was cut: cut all scenes again with "
                        "--overwrite",
                    )
                _remove_begun(folder.path, records)
                todo = [source for source in sources[split] if source.scene not in records]
                folder.each(cut, todo, f"{split} scenes", unit="scene")
        except UserError as error:
            if not folder.failures:
                raise
            failures.append(str(error))
        total += folder.run.files
        records = _records(folder.path)
        print(f"{split}: {folder.run.files} patches of {len(records)} scenes in {folder.path}")
        notes = sum((Counter(record.notes) for record in records.values()), Counter())
        for note, count in sorted(notes.items()):
            print(f"  {note}: {count}")
        if folder.run.files:
            _picture(dataset, split)
    check(not failures, "\n".join(failures))
    check(total > 0, f"no patch was cut for {dataset.name}: the scenes are too small, or the [rules] drop all patches")
    print(f"next: {command_line('datasetsprocess/process.py', args)}")


def _settings(dataset: Dataset, split: str, with_truth: bool) -> dict[str, Any]:
    """What must not change while a split is cut, besides the constants."""
    settings = {
        "patch_size": dataset.patch_size,
        "stride": dataset.stride,
        "classes": list(dataset.classes),
        "colours": dataset.colours.tolist(),
        "ignore_colours": dataset.ignore_colours.tolist(),
        "rules": dataset.rules,
        "scenes": dataset.scenes.get(split, []),
    }
    return settings if with_truth else settings | {"label_maps": False}


def _records(folder: Path) -> dict[str, SceneRecord]:
    """Scene -> its record. A scene whose record is damaged, as after a power cut, is cut again."""
    records = {}
    for path in (folder / "scenes").glob("[!.]*.json"):
        with suppress(UserError):
            records[path.stem] = read_json(path, SceneRecord)
    return records


def _remove_begun(folder: Path, finished: Collection[str]) -> None:
    """Remove the patches of scenes that an interrupted run left unfinished: their files may have been replaced."""
    for path in (*folder.glob("images/*.png"), *folder.glob("labels/*.png")):
        match = PATCH_ID.fullmatch(path.stem)
        if match and match[1] not in finished:
            path.unlink()


def _cut(
    source: Source, args: Cutting, dataset: Dataset, split: str, rule: Rule, open_image: Callable[[Path], Raster]
) -> None:
    """Write the patches of one scene, then scenes/<scene>.json."""
    with open_image(source.image) as image:
        ids, unknown = _read_ids(source.truth, image, dataset) if source.truth else (None, Unknown())
        if source.truth and unknown and args.unknown_colours == "stop":
            raise UserError(describe(source.truth, unknown))
        scene = Scene(source.scene, split, dataset, getattr(args, "seed", 0), image, ids)
        patches = 0
        for place, pixels, label in rule(scene):
            name = f"{source.scene}_{place}.png"
            if label is not None:
                if (label == IGNORE).all():
                    scene.notes["patches without any labelled pixel, left out"] += 1
                    continue
                save_label(dataset.labels(split) / name, label, dataset.colours)
            save_image(dataset.images(split) / name, pixels)
            patches += 1
    scene.notes["pixels of unknown colours, set to 255"] += sum(unknown.values())
    record = SceneRecord(
        image=str(source.image),
        truth=str(source.truth or ""),
        patches=patches,
        notes=+scene.notes,
        files=source.state(),
    )
    write_json(dataset.folder / split / "scenes" / f"{source.scene}.json", record.model_dump())


def _read_ids(path: Path, image: Raster, dataset: Dataset) -> tuple[np.ndarray, Unknown]:
    """`read_truth` of a scene's truth, which must have the size of its image."""
    with Raster(path, KINDS) as truth:
        check(
            image.shape == truth.shape,
            f"{image.path} has {image.shape[1]} x {image.shape[0]} pixels but {path} has {truth.shape[1]} x "
            f"{truth.shape[0]}: image and truth must show the same scene at the same size",
        )
        return read_truth(truth, dataset)


def _picture(dataset: Dataset, split: str) -> None:
    from tools.pictures import colourise, contact_sheet, sample_ids  # here, since worker processes do without

    rows = []
    for id in sample_ids(dataset.ids(split), 6):
        rows.append([load_image(dataset.images(split) / f"{id}.png")])
        if dataset.labels(split).is_dir():
            label = load_label(dataset.labels(split) / f"{id}.png", dataset.num_classes)
            rows[-1].append(colourise(label, dataset.colours))
    titles = ["image", "truth"][: len(rows[0])]
    contact_sheet(dataset.folder / split / "contact_sheet.png", rows, titles, dataset.legend)
