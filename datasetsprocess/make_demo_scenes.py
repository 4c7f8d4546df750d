"""Paint the synthetic aerial scenes of the demo, in Vaihingen's raw layout.

Not part of the paper: the scenes are used by `make demo`, where Vaihingen itself is not available. A scene is built in
the order in which an aerial image arises: layout (streets and districts), ground, objects with heights, light, sensor.

Reads   the description of the data set: colours, scenes of each split
Writes  <root>/datasets/<dataset>/raw/top/top_mosaic_09cm_area<N>.tif                   8 bit: near infrared, red, green
        <root>/datasets/<dataset>/raw/gts_for_participants/top_mosaic_09cm_area<N>.tif  colour-coded truth
        <root>/datasets/<dataset>/raw/run.json

Command: python datasetsprocess/make_demo_scenes.py
"""

import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any folder
from datasetsprocess import demo_objects as draw
from datasetsprocess.demo_objects import FLAT_ROOFS, IMSURF, LOWVEG, PITCHED_ROOFS, Canvas, noise
from tools.command import check, run
from tools.constants import Place, PositiveCount, Seed, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import write_whole
from tools.folders import StepFolder


@checked_constants
class Constants(Place):
    dataset: str = "demo"  # the name of the data set: its description lists the scenes of each split
    seed: Seed = 0  # the same seed gives the same bytes, another seed gives other scenes
    size: PositiveCount = 1024  # side of a scene in pixels


# Layout: boxes (u0, v0, u1, v1) of a street plan that is larger than the image, and rotated and bent relative to it


def split(rng: np.random.Generator, box, smallest: float) -> tuple[list, list]:
    """Cut a box at random into boxes with sides of at least about 0.8 `smallest`: (boxes, cuts as pairs of points)."""
    u0, v0, u1, v1 = box
    if max(u1 - u0, v1 - v0) < 2 * smallest * rng.uniform(1, 1.3):
        return [box], []
    t = rng.uniform(0.38, 0.62)
    if u1 - u0 > v1 - v0:
        u = u0 + t * (u1 - u0)
        halves, cut = ((u0, v0, u, v1), (u, v0, u1, v1)), ((u, v0), (u, v1))
    else:
        v = v0 + t * (v1 - v0)
        halves, cut = ((u0, v0, u1, v), (u0, v, u1, v1)), ((u0, v), (u1, v))
    (boxes, cuts), (more_boxes, more_cuts) = (split(rng, half, smallest) for half in halves)
    return boxes + more_boxes, [cut, *cuts, *more_cuts]


def inset(box, margin: float) -> tuple:
    u0, v0, u1, v1 = box
    return u0 + margin, v0 + margin, u1 - margin, v1 - margin


# Districts: ground and objects of one box


def town(canvas: Canvas, box) -> None:
    """Closed rows of houses along the streets, yards inside."""
    rng = canvas.rng
    canvas.cover(box, IMSURF, "paving")
    u0, v0, u1, v1 = inset(box, 24)
    yard = inset(box, 74)
    if min(yard[2] - yard[0], yard[3] - yard[1]) > 40:
        use = rng.choice(["garden", "car park", "paved"], p=[0.5, 0.25, 0.25])
        if use == "garden":
            draw.grove(canvas, canvas.cover(yard, LOWVEG, "lawn"), 34, share=0.6)
        elif use == "car park":
            draw.car_park(canvas, yard, canvas.choose([0, 0.4]))
    usual = canvas.choose(["tiles", "slate"])
    for along_u, front, inward in ((True, v0, 1), (True, v1, -1), (False, u0, 1), (False, u1, -1)):
        at, end = (u0, u1) if along_u else (v0, v1)
        while end - at > 30:
            length, depth = min(rng.uniform(45, 100), end - at), rng.uniform(40, 52)
            middle = (at + length / 2, front + inward * depth / 2)
            at += length
            if rng.random() < 0.12:
                continue  # a gap in the row
            centre, angle = canvas.place(middle if along_u else middle[::-1], 0 if along_u else np.pi / 2)
            flat = rng.random() < 0.3
            roof = (0, FLAT_ROOFS) if flat else (0.7, [usual, usual, *PITCHED_ROOFS[2:]])
            draw.building(canvas, centre, angle, (length / 2, depth / 2), rng.uniform(26, 38), roof)


def suburb(canvas: Canvas, box) -> None:
    """Detached houses in gardens with drives, sheds and trees along the edges."""
    rng = canvas.rng
    canvas.cover(box, LOWVEG, "lawn")
    leafiness = canvas.choose([0, 0, 0.25, 0.6])
    u0, v0, u1, v1 = inset(box, 20)
    columns, rows = (max(1, round((end - start) / rng.uniform(84, 105))) for start, end in ((u0, u1), (v0, v1)))
    w, h = (u1 - u0) / columns, (v1 - v0) / rows
    for row, column in np.ndindex(rows, columns):
        plot = (u0 + column * w, v0 + row * h, u0 + (column + 1) * w, v0 + (row + 1) * h)
        middle = np.array([plot[0] + w / 2, plot[1] + h / 2])
        garden = canvas.cover(inset(plot, 1), LOWVEG, ["lawn"] * 7 + ["meadow"] * 2 + ["soil"])
        if rng.random() < 0.08:
            draw.clutter(canvas, inset(plot, 8))
            continue
        if rng.random() < 0.35:  # a drive on the side of the nearer street
            side = 1 if row >= rows / 2 else -1
            drive, angle = canvas.place(middle + np.array([0.4 * w, side * h / 4]), np.pi / 2)
            window, along, across = canvas.frame(drive, angle, h / 2)
            canvas.paint(window, (np.abs(along) < h / 3) & (np.abs(across) < 10), IMSURF, ["paving", "gravel"])
            if rng.random() < 0.6:
                draw.car(canvas, drive, angle)
        centre, angle = canvas.place(middle + rng.uniform(-8, 8, 2), canvas.choose([0, np.pi / 2]))
        half = rng.uniform(17, 28), rng.uniform(14, 20)
        draw.building(canvas, centre, angle, half, rng.uniform(14, 22), (0.8, PITCHED_ROOFS))
        if rng.random() < 0.3:  # a shed in a corner
            centre, angle = canvas.place(middle + rng.choice([-1, 1], 2) * (0.36 * w, 0.34 * h))
            draw.building(canvas, centre, angle, rng.uniform(6, 10, 2), 9, (0, "roof gravel"))
        edge = garden & ~canvas.inside(inset(plot, rng.uniform(12, 26)))
        draw.grove(canvas, edge, 22, radii=(5, 14), share=leafiness)


def industry(canvas: Canvas, box) -> None:
    """Large halls, car parks and stores, on paved or on green ground."""
    rng = canvas.rng
    if rng.random() < 0.3:
        canvas.cover(box, LOWVEG, ["lawn", "meadow"])
    else:
        canvas.cover(box, IMSURF, ["asphalt", "paving", "gravel"])
    for lot in split(rng, inset(box, 22), 170)[0]:
        u0, v0, u1, v1 = lot = inset(lot, 14)
        use = rng.choice(["hall", "car park", "store"], p=[0.5, 0.32, 0.18])
        if use == "hall":
            centre, angle = canvas.place(((u0 + u1) / 2, (v0 + v1) / 2))
            pitch = canvas.choose([0, 0, 0.12])
            half = (u1 - u0) / 2, (v1 - v0) / 2
            draw.building(canvas, centre, angle, half, rng.uniform(24, 36), (pitch, FLAT_ROOFS))
        elif use == "car park":
            draw.car_park(canvas, lot, canvas.choose([0, 0.2, 0.6]))  # empty ones too: markings must not imply cars
        else:
            draw.clutter(canvas, lot)


def park(canvas: Canvas, box) -> None:
    """Lawns with groves and single trees, gravel paths, a pond or a court."""
    rng, (u0, v0, u1, v1) = canvas.rng, box
    ground = canvas.cover(box, LOWVEG, ["lawn", "meadow"])
    if rng.random() < 0.4:
        canvas.cover(ground & (np.abs(noise(rng, canvas.size, 160)) < 0.05), IMSURF, "gravel")
    if rng.random() < 0.85:
        u, v = rng.uniform((0.7 * u0 + 0.3 * u1, 0.7 * v0 + 0.3 * v1), (0.3 * u0 + 0.7 * u1, 0.3 * v0 + 0.7 * v1))
        draw.clutter(canvas, (u - 55, v - 55, u + 55, v + 55))
    free = ground & (canvas.ids == LOWVEG)
    draw.grove(canvas, free & (noise(rng, canvas.size, 90) > 0.7), 17)
    draw.grove(canvas, free, 60, share=canvas.choose([0, 0.35]))


def wood(canvas: Canvas, box) -> None:
    """Dense trees with a few clearings."""
    canvas.cover(box, LOWVEG, "forest floor")
    canopy = canvas.inside(box) & (noise(canvas.rng, canvas.size, 80) > -1.9)
    draw.grove(canvas, canopy, 12, radii=(11, 19))


def fields(canvas: Canvas, box) -> None:
    """Strips of crops, meadow and bare soil with rows and wheel tracks, some surrounded by a hedge."""
    rng = canvas.rng
    ground = canvas.cover(box, LOWVEG, "meadow")
    for strip in split(rng, inset(box, 12), 130)[0]:
        crop = canvas.cover(inset(strip, 3), LOWVEG, ["young crop", "ripe crop", "soil", "meadow"])
        _, angle = canvas.place(strip[:2], canvas.choose([0, np.pi / 2]))
        _, _, across = canvas.frame((canvas.size / 2, canvas.size / 2), angle, canvas.size)  # the whole image
        rows = np.where(np.mod(across, 58) < 3, 0.87, 1 + 0.05 * np.sin(1.2 * across))
        canvas.colour[crop] *= rows[crop][:, None]
    if rng.random() < 0.25:
        draw.grove(canvas, ground & ~canvas.inside(inset(box, 34)), 30, share=0.4)


# drawn without replacement until all are used, so that a scene has most kinds
DISTRICTS = (town, town, suburb, industry, industry, park, wood, fields)


# Light and sensor


def light(canvas: Canvas) -> np.ndarray:
    """Reflectance to radiance (S, S, 3): sun on the slopes, cast shadows, bluish light of the sky everywhere."""
    rng, height = canvas.rng, canvas.height
    azimuth, slope = rng.uniform(0, 2 * np.pi), rng.uniform(1.4, 2.0)  # of the sun; slope: tangent of its elevation
    sun = np.array([np.cos(azimuth), np.sin(azimuth)])
    dy, dx = np.gradient(cv2.GaussianBlur(height, (0, 0), 0.7))
    incidence = (1 - (dx * sun[0] + dy * sun[1]) / slope) / np.sqrt(1 + dx**2 + dy**2)  # 1 on level ground
    shaded = np.zeros(height.shape, bool)
    for reach in np.arange(1.5, height.max() / slope, 1.5):  # a pixel is shaded by higher ones towards the sun
        shift = np.array([[1, 0, -reach * sun[0]], [0, 1, -reach * sun[1]]], np.float32)
        towards_sun = cv2.warpAffine(height, shift, height.shape[::-1], flags=cv2.INTER_NEAREST)
        shaded |= towards_sun > height + reach * slope + 0.5
    direct = np.clip(incidence, 0.1, 1.5) * (1 - cv2.GaussianBlur(shaded.astype(np.float32), (0, 0), 0.8))
    sky = np.array([0.32, 0.39, 0.42]) * rng.uniform(0.9, 1.15)
    return canvas.colour * (sky + (1 - sky) * direct[..., None])


def sensor(rng: np.random.Generator, radiance: np.ndarray) -> np.ndarray:
    """Radiance to grey values (S, S, 3) uint8: blur, uneven light, colour cast, haze and noise."""
    size = len(radiance)
    y, x = np.mgrid[:size, :size] / size - rng.uniform(0.3, 0.7, (2, 1, 1))
    uneven = 1.04 - 0.35 * (x * x + y * y) + 0.03 * noise(rng, size, 300)
    cast = rng.uniform(0.9, 1.1) * rng.uniform(0.95, 1.05, 3)
    image = cv2.GaussianBlur(radiance, (0, 0), rng.uniform(0.5, 0.75)) * uneven[..., None] * cast + rng.uniform(2, 8, 3)
    image += rng.uniform(2.5, 4.5) * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def make_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (size, size, 3) uint8 (near infrared, red, green) and class ids (size, size) uint8."""
    canvas = Canvas(rng, size)
    reach = 0.75 * size + 60  # the rotated plan has to cover the corners of the image
    boxes, avenues = split(rng, (-reach, -reach, reach, reach), 290)
    avenues = sorted(avenues, key=np.ptp)[int(0.6 * len(avenues)) :]  # the longest; other districts meet directly
    streets: list = []
    deck: list[int] = []
    for box in boxes:
        deck = deck or list(rng.permutation(len(DISTRICTS)))
        district = DISTRICTS[deck.pop()]
        blocks, cuts = split(rng, box, {town: 170, suburb: 230}.get(district, np.inf))
        streets += cuts
        for block in blocks:
            district(canvas, block)
    roads = [(line, 16, canvas.choose([0, 0.12, 0.3])) for line in draw.roads(canvas, streets, 16, 6)]
    roads += [(line, 21, canvas.choose([0, 0.12, 0.3])) for line in draw.roads(canvas, avenues, 21, 8)]
    for road in roads:
        draw.traffic(canvas, *road)
    return sensor(rng, light(canvas)), canvas.ids


def write_scene(name: str, raw: Path, dataset: Dataset, seed: int, size: int) -> None:
    """Paint one scene and write its truth and then its image, so that a scene with an image is complete."""
    image, ids = make_scene(np.random.default_rng([seed, *name.encode()]), size)
    for folder, pixels in (("gts_for_participants", dataset.colours[ids]), ("top", image)):
        with write_whole(raw / folder / f"{name}.tif") as temporary:
            Image.fromarray(pixels).save(temporary, format="TIFF", compression="tiff_adobe_deflate")


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    check(
        dataset.num_classes == 6,
        f"dataset {dataset.name} has {dataset.num_classes} classes, but these scenes need the six of demo.toml, in the "
        "same order",
    )
    areas = [area for split in dataset.scenes.values() for area in split]
    check(
        len(areas) > 0,
        f"dataset {dataset.name} lists no scenes: its description needs a [scenes] table as in demo.toml",
    )
    check(
        args.size >= dataset.patch_size,
        f"size is {args.size}, but a scene must hold a patch of {dataset.patch_size} pixels",
    )
    with StepFolder(dataset.folder / "raw", args).open("/*.tif") as step:
        pending = step.pending([f"top/top_mosaic_09cm_area{area}" for area in areas], ".tif")
        names = [Path(id).name for id in pending]
        write = partial(write_scene, raw=step.path, dataset=dataset, seed=args.seed, size=args.size)
        step.each(write, names, "scenes", unit="scene")


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
