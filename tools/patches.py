"""Cutting scenes into patches: finding the scenes, whole tiles, versions, and the run over all scenes in processes.

A splitter in datasetsprocess names the files of each scene and yields the patches that its rule makes of one scene
(method, "Data"); everything else is here. A patch's id tells where it comes from: <scene>_r<row>_c<column> for a tile,
counted in strides, <scene>_p<number> for a random patch, and _v<version> behind it for one of the four versions.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np

from tools.command import UserError, check
from tools.dataset import SPLITS, Dataset
from tools.folders import StepFolder, write_json, write_whole
from tools.labels import IGNORE, ColourDecoder, load_image, load_label, save_label
from tools.rasters import SUFFIXES, Raster

BAND = 256  # rows of truth decoded at a time
PATCH_ID = re.compile(r"(.+)_(?:r\d+_c\d+|p\d+)(?:_v\d)?")


@dataclass
class Scene:
    """An open scene as a rule sees it: class ids (H,W) uint8, windows of the image, random numbers, notes to report."""

    name: str
    split: str
    dataset: Dataset
    seed: int
    image: Raster
    ids: np.ndarray
    notes: Counter = field(default_factory=Counter)

    def window(self, y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
        """The patch with upper left corner (y, x): image (P,P,3) uint8 and class ids (P,P) uint8."""
        size = self.dataset.patch_size
        return self.image.read(y, x, size, size), self.ids[y : y + size, x : x + size]

    def tiles(self) -> list[tuple[int, int]]:
        """Row and column of every whole tile, counted in strides; raises `UserError` when not one fits."""
        tiles = whole_tiles(*self.ids.shape, self.dataset.patch_size, self.dataset.stride)
        if not tiles:
            height, width = self.ids.shape
            raise UserError(
                f"{self.image.path} has {width} x {height} pixels, too few for one patch of "
                f"{self.dataset.patch_size}: leave the scene out, or set a smaller patch_size"
            )
        return tiles

    def random(self, *place: int) -> np.random.Generator:
        """Random numbers that depend on seed, scene and place alone: the same with any number of workers."""
        return np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), *place))


Patch = tuple[str, np.ndarray, np.ndarray]  # place in the scene, such as "r002_c011_v1"; image (P,P,3); class ids (P,P)
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


@dataclass(frozen=True)
class Source:
    """The two files of a scene."""

    scene: str
    image: Path
    truth: Path


def find_sources(
    raw: Path,
    scenes: dict[str, list[str]],
    places: dict[str, tuple[str, str]],
    missing_scenes: str,
) -> dict[str, list[Source]]:
    """The files of every scene: split -> sources.

    `places` gives the paths of image and truth below `raw` for each split, without suffix and with {} for the scene.
    Raises `UserError` that lists what is not there (with `missing_scenes` "skip" only when that is everything), for a
    scene with two files, one in both splits, and names that are no plain file names.
    """
    check(raw.is_dir(), f"{raw} is missing: unpack the archives there as the top of this script says, or set --raw")
    names = [name for split in SPLITS for name in scenes.get(split, [])]
    for name in names:
        check(
            re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
            f'the scene "{name}" needs another name: only letters, digits, "_" and "-" are possible',
        )
        check(names.count(name) == 1, f"the scene {name} is listed twice: a scene belongs to one split")
    found: dict[str, list[Source]] = {split: [] for split in SPLITS}
    missing = []
    for split in SPLITS:
        for name in scenes.get(split, []):
            paths = {place.format(name): _find(raw / place.format(name)) for place in places[split]}
            if all(paths.values()):
                found[split].append(Source(name, *paths.values()))
            missing += [place for place, path in paths.items() if not path]
    shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    if missing and (missing_scenes == "stop" or not any(found.values())):
        raise UserError(
            f"{raw} lacks {shown} ({' or '.join(SUFFIXES)}): unpack the whole archives as the top of this "
            "script says, or cut the scenes that are there with --missing-scenes skip"
        )
    if missing:
        print(f"not in {raw}, so their scenes are skipped: {shown}")
    return found


def _find(stem: Path) -> Path | None:
    files = [path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()]
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1].name} are the same scene twice: remove one of them")
    return files[0] if files else None


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


def split_scenes(constants, dataset: Dataset, sources: dict[str, list[Source]], rule: Rule) -> None:
    """Cut the scenes of both splits into <dataset folder>/<split>/{images,labels}; prints an account of each split.

    `constants` has seed, unknown_colours, workers and overwrite. Finished scenes of an interrupted run are kept, begun
    ones redone. Raises `UserError` at the end for scenes that could not be cut, and when there is no patch at all.
    """
    check(constants.seed >= 0, f"seed is {constants.seed}, but it must be 0 or more")
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
        folders[split] = StepFolder(dataset.folder / split, constants, settings=settings)
    failures, total = [], 0
    for split, folder in folders.items():
        done = {path.stem for path in (folder.folder / "scenes").glob("*.json")}
        _remove_begun(folder.folder, done)
        work = partial(
            _cut, rule=rule, split=split, dataset=dataset, seed=constants.seed, unknown=constants.unknown_colours
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


def _remove_begun(folder: Path, done: set[str]) -> None:
    """Remove the patches of scenes that an interrupted run had begun: their files may have been replaced since."""
    for path in (*folder.glob("images/*.png"), *folder.glob("labels/*.png")):
        match = PATCH_ID.fullmatch(path.stem)
        if match and match[1] not in done:
            path.unlink()


def _cut(source: Source, rule: Rule, split: str, dataset: Dataset, seed: int, unknown: str) -> None:
    """Write the patches of one scene, then scenes/<scene>.json, which says that they are all there."""
    with Raster(source.image) as image, Raster(source.truth) as truth:
        if image.shape != truth.shape:
            raise UserError(
                f"{source.image} has {image.shape[1]} x {image.shape[0]} pixels but {source.truth} has "
                f"{truth.shape[1]} x {truth.shape[0]}: they must be the same scene at the same size"
            )
        ids, colours = read_truth(truth, dataset)
        truth.close()  # a TIFF in one strip is held whole: not this one and the image at the same time
        if colours and unknown == "stop":
            raise UserError(_describe(source.truth, colours))
        scene = Scene(source.scene, split, dataset, seed, image, ids)
        patches = 0
        for place, pixels, label in rule(scene):
            if (label == IGNORE).all():
                scene.notes["patches without any labelled pixel, left out"] += 1
                continue
            save_label(dataset.labels(split) / f"{source.scene}_{place}.png", label, dataset.colours)
            save_image(dataset.images(split) / f"{source.scene}_{place}.png", pixels)
            patches += 1
    scene.notes["pixels of unknown colours, set to 255"] += sum(colours.values())
    account = {"image": str(source.image), "truth": str(source.truth), "patches": patches, "notes": +scene.notes}
    write_json(dataset.folder / split / "scenes" / f"{source.scene}.json", account)


def read_truth(truth: Raster, dataset: Dataset) -> tuple[np.ndarray, dict]:
    """Class ids (H,W) uint8 of a colour-coded truth, and the unknown colours (r, g, b) -> pixels, which become 255."""
    height, width = truth.shape
    decoder, unknown = ColourDecoder(dataset.colours, dataset.ignore_colours), {}
    ids = np.empty((height, width), np.uint8)
    for y in range(0, height, BAND):
        ids[y : y + BAND] = decoder(truth.read(y, 0, min(BAND, height - y), width), unknown)
    return ids, unknown


def _describe(truth: Path, colours: dict) -> str:
    most = sorted(colours, key=lambda colour: (-colours[colour], colour))
    shown = ", ".join(f"{colour} in {colours[colour]} pixels" for colour in most[:5])
    if len(most) > 5:
        shown += f" and {len(most) - 5} more colours in {sum(colours[colour] for colour in most[5:])} pixels"
    return (
        f"{truth} holds colours that are no class: {shown}. Mend the file, leave the scene out of [scenes] in a "
        "dataset.toml of your own, or make these pixels 255 (ignored) with --unknown-colours ignore --overwrite"
    )


def save_image(path: Path, rgb: np.ndarray) -> None:
    """Write (H,W,3) uint8 as PNG. Filter and strategy suit photographs: far faster than Pillow, files no larger."""
    png = imagecodecs.png_encode(
        np.ascontiguousarray(rgb), level=1, strategy=imagecodecs.PNG.STRATEGY.RLE, filter=imagecodecs.PNG.FILTER.AVG
    )
    with write_whole(path) as temporary:
        temporary.write_bytes(png)


def _account(folder: StepFolder, split: str) -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (folder.folder / "scenes").glob("*.json")]
    print(f"{split}: {folder.run['files']} patches of {len(records)} scenes in {folder.folder}")
    notes = Counter()
    for record in records:
        notes.update(record["notes"])
    for note, count in sorted(notes.items()):
        print(f"  {note}: {count}")


def _picture(dataset: Dataset, split: str) -> None:
    from tools.pictures import colourise, contact_sheet, sample_ids  # only here: the workers need no fonts

    rows = [
        [
            load_image(dataset.images(split) / f"{id}.png"),
            colourise(load_label(dataset.labels(split) / f"{id}.png", dataset.num_classes), dataset.colours),
        ]
        for id in sample_ids(dataset.ids(split), 6)
    ]
    legend = zip(dataset.classes, dataset.colours, strict=True)
    contact_sheet(dataset.folder / split / "contact_sheet.png", rows, ["image", "truth"], legend)
