"""The parts of the demo's synthetic scenes: canvas, materials, streets, buildings, trees, cars and clutter.

Lengths are in pixels of about 15 cm: a car has 13 x 28 pixels, a patch of 128 pixels shows part of a street.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import cv2
import numpy as np

IMSURF, BUILDING, LOWVEG, TREE, CAR, CLUTTER = range(6)  # the order of the classes in demo.toml

# Reflectance in near infrared, red, green (0 to 255) when new and when worn; strength of the fine grain. Vegetation is
# bright in the near infrared. Classes overlap on purpose: dry lawn, soil, tiles and paving have similar colours.
MATERIALS = {
    "asphalt": ((104, 106, 110), (128, 126, 126), 0.05),
    "paving": ((150, 142, 136), (128, 116, 108), 0.08),
    "gravel": ((146, 130, 116), (138, 108, 98), 0.10),
    "marking": ((205, 205, 205), (175, 175, 175), 0.04),
    "tiles": ((182, 112, 66), (160, 94, 60), 0.07),
    "slate": ((62, 70, 92), (80, 84, 100), 0.06),
    "sheet": ((112, 128, 156), (104, 116, 138), 0.04),
    "membrane": ((214, 210, 204), (190, 182, 172), 0.04),
    "mossy": ((132, 98, 92), (142, 92, 86), 0.10),
    "roof gravel": ((132, 104, 116), (126, 92, 98), 0.09),
    "lawn": ((166, 82, 82), (144, 106, 96), 0.07),
    "meadow": ((150, 92, 88), (136, 114, 100), 0.10),
    "soil": ((136, 118, 102), (150, 110, 98), 0.08),
    "young crop": ((150, 106, 96), (176, 82, 84), 0.06),
    "ripe crop": ((158, 134, 106), (148, 120, 98), 0.06),
    "forest floor": ((118, 76, 74), (112, 88, 80), 0.12),
    "broadleaf": ((192, 86, 92), (162, 90, 90), 0.16),
    "conifer": ((136, 74, 78), (118, 74, 76), 0.16),
    "autumn": ((166, 118, 96), (148, 98, 90), 0.16),
    "water": ((44, 62, 72), (54, 74, 80), 0.03),
    "clay court": ((150, 120, 92), (158, 128, 100), 0.04),
    "hard court": ((92, 86, 106), (98, 92, 108), 0.03),
    "rubble": ((150, 134, 118), (122, 108, 98), 0.16),
    "glass": ((46, 52, 58), (46, 52, 58), 0.03),
}
PITCHED_ROOFS = ["tiles", "tiles", "tiles", "slate", "sheet"]  # listed as often as they are to be drawn
FLAT_ROOFS = ["membrane", "roof gravel", "mossy", "sheet", "slate"]
TREES = ["broadleaf", "broadleaf", "broadleaf", "conifer", "autumn"]
CAR_PAINTS = np.array(
    [(222, 223, 223)] * 3
    + [(40, 40, 44)] * 2
    + [(172, 174, 178)] * 2
    + [(96, 98, 104), (190, 172, 50), (110, 56, 104), (150, 66, 52)]
)


def noise(rng: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """Smooth random field (size, size) float32, mean 0, standard deviation 1, with blobs about `grain` pixels wide."""
    cells = int(np.ceil(size / grain)) + 3
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    smooth = cv2.resize(coarse, None, fx=grain, fy=grain, interpolation=cv2.INTER_CUBIC)[:size, :size]
    return (smooth - smooth.mean()) / smooth.std()


class Canvas:
    """The ground and the objects on it: reflectance (S, S, 3), class ids (S, S), height in pixels (S, S)."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.colour = np.zeros((size, size, 3), np.float32)
        self.ids = np.zeros((size, size), np.uint8)
        self.height = np.zeros((size, size), np.float32)
        self.grain = 0.45 * noise(rng, size, 1) + 0.75 * noise(rng, size, 3)
        self.wear = 0.5 * noise(rng, size, 7) + 0.6 * noise(rng, size, 28) + 0.6 * noise(rng, size, 90)
        self.angle = rng.uniform(0, np.pi)  # between street plan and image
        self.waves = [
            (rng.normal(0, 2 * np.pi / 1100, 2), rng.uniform(0, 2 * np.pi), rng.uniform(-20, 20, 2)) for _ in range(3)
        ]

    def choose(self, options: Sequence | np.ndarray) -> Any:
        """One of the options; an option that is listed twice is twice as likely."""
        return options[int(self.rng.integers(len(options)))]

    def to_image(self, plan) -> np.ndarray:
        """Plan coordinates (..., 2), streets along the axes, to image x, y (..., 2): rotated and slightly bent."""
        plan = np.asarray(plan, np.float64)
        bent = plan + sum(shift * np.sin(plan @ wave + phase)[..., None] for wave, phase, shift in self.waves)
        c, s = np.cos(self.angle), np.sin(self.angle)
        return bent @ np.array([[c, s], [-s, c]]) + self.size / 2

    def place(self, plan, direction: float = 0) -> tuple[np.ndarray, float]:
        """Image position (2,) and angle of an object at a plan position; `direction` is its angle to the streets."""
        ahead = np.array([np.cos(direction), np.sin(direction)])
        here, there = self.to_image([plan - ahead, plan + ahead])
        return (here + there) / 2, float(np.arctan2(*(there - here)[::-1]))

    def frame(self, centre, angle: float, reach: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
        """Window of the image around a centre, and its pixels' coordinates along and across the angle."""
        (x, y), reach = np.round(centre).astype(int), int(np.ceil(reach)) + 1
        rows, columns = (slice(*np.clip((v - reach, v + reach + 1), 0, self.size)) for v in (y, x))
        dy, dx = np.ogrid[rows, columns]
        dy, dx = (dy - centre[1]).astype(np.float32), (dx - centre[0]).astype(np.float32)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return (rows, columns), dx * c + dy * s, dy * c - dx * s

    def inside(self, box) -> np.ndarray:
        """Pixels (S, S) bool inside a box (u0, v0, u1, v1) of the plan."""
        u0, v0, u1, v1 = box
        corners = np.array([(u0, v0), (u1, v0), (u1, v1), (u0, v1), (u0, v0)], float)
        outline = self.to_image(np.concatenate([np.linspace(a, b, 16) for a, b in pairwise(corners)]))
        return cv2.fillPoly(np.zeros_like(self.ids), [np.round(outline).astype(np.int32)], 1).astype(bool)

    def paint(self, window, mask, kind: int, material, height=0.0, fade: float = 0.1) -> None:
        """Cover `mask` (within `window`) with a material: a name, a list to choose from, or a colour (3,).

        `fade` is how much the brightness may differ between objects.
        """
        rng = self.rng
        if isinstance(material, list):
            material = self.choose(material)
        new, worn, grain = MATERIALS[material] if isinstance(material, str) else (material, material, 0.03)
        tint = rng.uniform(1 - fade, 1 + fade) * (1 + rng.normal(0, fade / 7, 3))
        new, worn = ((np.array(shade) * tint).astype(np.float32) for shade in (new, worn))
        wear = 1 / (1 + np.exp(-1.8 * (self.wear[window][mask] + np.float32(rng.normal(0, 0.8)))))
        texture = 1 + grain * self.grain[window][mask]
        self.colour[window][mask] = (new + wear[:, None] * (worn - new)) * texture[:, None]
        self.ids[window][mask] = kind
        self.height[window][mask] = np.broadcast_to(height, mask.shape)[mask]

    def cover(self, where, kind: int, material) -> np.ndarray:
        """Paint a box of the plan, or a mask (S, S) bool, flat on the ground; returns the mask."""
        mask = where if isinstance(where, np.ndarray) else self.inside(where)
        self.paint((slice(None), slice(None)), mask, kind, material)
        return mask


def stations(line: np.ndarray, spacing: float, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Points (m, 2) and unit tangents (m, 2) at even spacing along a line (n, 2), `margin` away from its ends."""
    steps = np.diff(line, axis=0)
    along = np.concatenate([[0], np.cumsum(np.hypot(*steps.T))])
    at = np.arange(margin, along[-1] - margin, spacing)
    points, ahead = (np.stack([np.interp(at + d, along, axis) for axis in line.T], -1) for d in (0, 1))
    return points, (ahead - points) / np.linalg.norm(ahead - points, axis=1, keepdims=True)


def roads(canvas: Canvas, cuts, half_width: float, pavement: float) -> list[np.ndarray]:
    """Paint streets along cuts of the plan: pavement, kerb, asphalt, dashes. Returns centre lines (n, 2) in pixels."""
    lines = [canvas.to_image(np.linspace(np.array(start, float), np.array(end, float), 48)) for start, end in cuts]

    def strokes(paths: list[np.ndarray], width: float) -> np.ndarray:
        fixed = [np.round(path * 16).astype(np.int32) for path in paths]  # four fractional bits
        return cv2.polylines(np.zeros_like(canvas.ids), fixed, False, 1, round(width), shift=4).astype(bool)

    for material, width in (("paving", half_width + pavement), ("marking", half_width + 1), ("asphalt", half_width)):
        canvas.cover(strokes(lines, 2 * width), IMSURF, material)
    dashes = [
        np.stack([point, point + 9 * ahead])
        for line in lines
        for point, ahead in zip(*stations(line, 22, 12), strict=True)
    ]
    canvas.cover(strokes(dashes, 2), IMSURF, "marking")
    return lines


def building(canvas: Canvas, centre, angle: float, half, height: float, roof: tuple) -> None:
    """Building; half = (along the ridge, across), roof = (pitch, material); pitch 0: flat, with machines."""
    rng, (a, b), (pitch, material) = canvas.rng, half, roof
    window, along, across = canvas.frame(centre, angle, np.hypot(a, b))
    mask = (np.abs(along) <= a) & (np.abs(across) <= b)
    canvas.paint(window, mask, BUILDING, material, height + pitch * (b - np.abs(across)), fade=0.2)
    if pitch:
        canvas.colour[window][mask & (np.mod(across, 4) < 1.4)] *= 0.8  # courses of the covering
        count, largest = int(rng.integers(1, 3)), 3  # chimneys
    else:
        rim = mask & ((np.abs(along) > a - 2.5) | (np.abs(across) > b - 2.5))
        canvas.height[window][rim] += 2
        canvas.colour[window][rim] *= rng.uniform(0.9, 1.2)
        canvas.colour[window][mask & (np.mod(along, 11) < 1.3)] *= canvas.choose([0.7, 1.25])  # seams of the sheets
        count, largest = int(rng.uniform(0.6, 1.2) * a * b / 400), 6  # vents and skylights
    for x, y in rng.uniform(-0.8, 0.8, (count, 2)) * half:
        p, q = rng.uniform(largest / 2, largest, 2)
        part = mask & (np.abs(along - x) < p) & (np.abs(across - y) < q)
        top = canvas.height[window][part].max(initial=0) + rng.uniform(2, 6)
        canvas.paint(window, part, BUILDING, ["slate", "sheet", "membrane"], top)


def tree(canvas: Canvas, centre, radius: float, material) -> None:
    """Crown with an uneven edge and surface; it covers only what is lower."""
    window, x, y = canvas.frame(centre, 0, 1.4 * radius)
    lumps = 0.16 * canvas.wear[window] + 0.10 * canvas.grain[window]
    bulge = 1 - (x * x + y * y) / radius**2 + lumps
    crown = radius * (1.1 + 0.7 * np.sqrt(np.maximum(bulge, 0)) + 0.35 * lumps)
    canvas.paint(window, (bulge > 0.12) & (crown > canvas.height[window]), TREE, material, crown, fade=0.2)


def grove(canvas: Canvas, where, spacing: float, radii=(7, 17), share: float = 1) -> None:
    """Trees about `spacing` apart on a share of the places in `where` (S, S) bool, mostly of one kind."""
    rng, main = canvas.rng, canvas.choose(TREES)
    grid = np.arange(0, canvas.size, spacing)
    centres = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2) + rng.uniform(0, spacing, (len(grid) ** 2, 2))
    x, y = np.minimum(centres.astype(int), canvas.size - 1).T
    for centre in centres[where[y, x] & (rng.random(len(centres)) < share)]:
        tree(canvas, centre, rng.uniform(*radii), main if rng.random() < 0.7 else TREES)


def car(canvas: Canvas, centre, angle: float) -> None:
    """Car of about 13 x 28 pixels with dark windows; hidden by higher objects."""
    rng = canvas.rng
    a, b = rng.normal(14, 1), rng.normal(6.6, 0.35)
    window, along, across = canvas.frame(centre, angle + rng.normal(0, 0.04), 18)
    body = ((np.abs(along) / a) ** 4 + (np.abs(across) / b) ** 4 < 1) & (canvas.height[window] < 2)
    glass = body & (np.abs(across) < b - 1.3) & (np.abs(along + 2.1) > 3.7) & (np.abs(along + 1.1) < 7.4)
    canvas.paint(window, body, CAR, canvas.choose(CAR_PAINTS), 5)
    canvas.paint(window, glass, CAR, "glass", 6)


def traffic(canvas: Canvas, line: np.ndarray, half_width: float, density: float) -> None:
    """Moving and parked cars, and on some streets rows of trees, along a centre line (n, 2)."""
    rng = canvas.rng
    trees = rng.random() < 0.2
    for point, (dx, dy) in zip(*stations(line, 36, 24), strict=True):
        for side in np.array([(dy, -dx), (-dy, dx)]):
            if rng.random() < density:
                offset = half_width * 0.45 if rng.random() < 0.4 else half_width - 7
                car(canvas, point + offset * side, np.arctan2(dy, dx))
            if trees and rng.random() < 0.5:
                tree(canvas, point + (half_width + 7) * side, rng.uniform(6, 10), "broadleaf")


def car_park(canvas: Canvas, box, full: float) -> None:
    """Rows of stalls with white lines; a share `full` of the stalls has a car."""
    u0, v0, u1, v1 = box
    canvas.cover(box, IMSURF, ["asphalt", "asphalt", "paving"])
    for v in np.arange(v0 + 20, v1 - 17, 48):
        for u in np.arange(u0 + 12, u1 - 12, 18):
            centre, angle = canvas.place((u, v), np.pi / 2)
            window, along, across = canvas.frame(centre, angle, 20)
            line = (np.abs(along) < 16) & (np.abs(across - 9) < 0.8) & (canvas.ids[window] == IMSURF)
            canvas.paint(window, line, IMSURF, "marking")
            if canvas.rng.random() < full:
                car(canvas, centre, angle + np.pi * canvas.rng.integers(2))


def clutter(canvas: Canvas, box) -> None:
    """One of the objects that are clutter in Vaihingen: water, a tennis court, containers, a building site."""
    rng, (u0, v0, u1, v1) = canvas.rng, box
    centre, angle = canvas.place(((u0 + u1) / 2, (v0 + v1) / 2))
    reach = min(u1 - u0, v1 - v0) / 2
    window, along, across = canvas.frame(centre, angle, 1.5 * reach)
    p, q = np.abs(along) / reach, np.abs(across) / reach
    kind = canvas.choose(["water", "court", "containers", "site"])
    if kind == "water":
        bays = 0.1 * np.sin(2 * np.arctan2(across, along) + rng.uniform(0, 6)) + 0.04 * canvas.wear[window]
        canvas.paint(window, np.hypot(p, q) < 0.75 + bays, CLUTTER, "water")
    elif kind == "court":
        p, q = np.maximum(p, np.abs(along) / 58), np.maximum(q, np.abs(across) / 58) / 0.55  # at most 58
        canvas.paint(window, (p < 1) & (q < 1), CLUTTER, ["clay court", "hard court"])
        ends, sides = np.abs(p - 0.8) < 0.015, (np.abs(q - 0.75) < 0.03) | (np.abs(q - 0.55) < 0.03)
        canvas.paint(window, (ends & (q < 0.78)) | (sides & (p < 0.81)) | ((p < 0.012) & (q < 0.8)), CLUTTER, "marking")
    elif kind == "containers":
        for u, v in product(np.arange(-reach, reach, 36), np.arange(-reach, reach, 16)):
            if rng.random() < 0.7:
                container = (np.abs(along - u) < 15) & (np.abs(across - v) < 6)
                colour = rng.uniform(60, 170) + rng.uniform(-35, 35, 3)
                canvas.paint(window, container, CLUTTER, colour, canvas.choose([8, 16]))
    else:
        site = (p < 1) & (q < 1) & (canvas.wear[window] < 1.2)
        canvas.paint(window, site, CLUTTER, "rubble", 5 * np.maximum(canvas.wear[window], 0))
