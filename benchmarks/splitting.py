"""Cutting scenes into patches: our way against the plain way, time and memory.

Decoding: the look-up table of all colours against the usual loop over classes, on the same truth. Splitting: synthetic
scenes of Potsdam's size and layout, LZW-compressed TIFFs with one row a strip, cut by potsdam_patch_split.py.

Command: python benchmarks/splitting.py
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import rasterio
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from datasetsprocess.scene_labels import BAND
from tools.dataset import Dataset, load_dataset
from tools.labels import ColourDecoder


@dataclass(frozen=True)
class Constants:
    size: int = 6000  # side of the square scenes in pixels
    scenes: int = 2  # scenes that are cut, of the test split
    workers: int = 2  # processes that cut
    repeats: int = 3  # of the decoding; the fastest counts
    seed: int = 0  # of the synthetic scenes


def synthetic_scene(size: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (S,S,3) and class ids (S,S) uint8: blobs of a few metres, with texture so that PNG has work to do."""
    random = np.random.default_rng(seed)
    ids, height = np.zeros((size, size), np.uint8), np.full((size, size), -np.inf, np.float32)
    for k in range(classes):
        coarse = random.standard_normal((size // 60 + 2, size // 60 + 2)).astype(np.float32)
        field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
        ids[field > height] = k
        np.maximum(height, field, out=height)
    colours = random.integers(40, 215, (classes, 3)).astype(np.float32)
    texture = cv2.GaussianBlur(random.standard_normal((size, size, 3), dtype=np.float32), (0, 0), 1.5)
    return np.clip(colours[ids] + 40 * texture, 0, 255).astype(np.uint8), ids


def loop_over_colours(rgb: np.ndarray, dataset: Dataset) -> np.ndarray:
    """The plain way: one comparison of the whole image for each class."""
    ids = np.full(rgb.shape[:2], 255, np.uint8)
    for k, colour in enumerate(dataset.colours):
        ids[(rgb == colour).all(-1)] = k
    return ids


def look_up(rgb: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Our way, with the making of the table and in the bands of rows in which scenes are read."""
    decoder = ColourDecoder(dataset.colours, dataset.ignore_colours)
    return np.concatenate([decoder(rgb[y : y + BAND]) for y in range(0, len(rgb), BAND)])


def compare_decoding(args: Constants) -> None:
    from measure import measured  # here, since it imports torch: see `time_splitting`

    for name in ("potsdam", "isaid"):
        dataset = load_dataset(name)
        _, ids = synthetic_scene(args.size, dataset.num_classes, args.seed)
        rgb = dataset.colours[ids]
        found, ours, _ = measured(partial(look_up, rgb, dataset), args.repeats)
        expected, plain, _ = measured(partial(loop_over_colours, rgb, dataset), args.repeats)
        assert (found == expected).all()
        print(
            f"decoding {ids.size / 1e6:.0f} Mpx of {dataset.num_classes} classes: look-up {ours:.2f} s, loop over "
            f"colours {plain:.2f} s, ratio {plain / ours:.1f}, equal"
        )


def write_scenes(raw: Path, names: list[str], args: Constants, dataset: Dataset) -> None:
    for number, name in enumerate(names):
        image, ids = synthetic_scene(args.size, dataset.num_classes, args.seed + number)
        for place, pixels in (
            (f"2_Ortho_RGB/top_potsdam_{name}_RGB.tif", image),
            (f"5_Labels_all/top_potsdam_{name}_label.tif", dataset.colours[ids]),
        ):
            (raw / place).parent.mkdir(parents=True, exist_ok=True)
            layout = {"compress": "lzw", "blockysize": 1}
            with rasterio.open(
                raw / place, "w", driver="GTiff", width=len(ids), height=len(ids), count=3, dtype="uint8", **layout
            ) as file:
                file.write(pixels.transpose(2, 0, 1))


def time_splitting(args: Constants) -> None:
    """Runs first, and writes the scenes in another process: Linux counts the parent's memory for a new process."""
    dataset = load_dataset("potsdam")
    names = dataset.scenes["test"][: args.scenes]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "datasets" / "potsdam" / "raw"
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=write_scenes, args=(raw, names, args, dataset))
        writer.start()
        writer.join()
        command = [
            sys.executable,
            str(ROOT / "datasetsprocess" / "potsdam_patch_split.py"),
            "--root",
            folder,
            "--missing-scenes",
            "skip",
            "--workers",
            str(args.workers),
        ]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)  # its worker processes are counted, too
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"{' '.join(command)} failed")
        patches = list((raw.parent / "test" / "images").glob("*.png"))
        size = sum(path.stat().st_size for path in patches) / len(patches)
    print(
        f"splitting {len(names)} scenes of {args.size} x {args.size} into {len(patches)} patches of "
        f"{size / 1024:.0f} KB with {args.workers} workers: {seconds:.1f} s, "
        f"{seconds / len(names):.1f} s a scene, {(used.ru_utime + used.ru_stime) / len(names):.1f} s of a core each, "
        f"at most {used.ru_maxrss / 1024:.0f} MB a process"
    )  # Linux counts in KiB


def main(args: Constants) -> None:
    time_splitting(args)
    compare_decoding(args)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
