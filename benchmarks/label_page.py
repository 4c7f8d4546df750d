"""How fluent the label page is with many patches: time until it is usable, blank parts while it scrolls.

Usable: all visible images are drawn and a key has set a class. Scrolling: the list moves by a part of its height in
each frame; a frame counts as blank where a visible row has no cell, and as loading where an image is still missing.
Needs Chromium.

Command: python benchmarks/label_page.py
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from measure import aerial_patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasetsprocess import label_page
from tests.browser import Browser
from tools.labels import save_image

SCROLL = """(async (frames, step) => {
  const box = grid.getBoundingClientRect(), next = () => new Promise(requestAnimationFrame), times = [];
  let blank = 0, loading = 0, before = await next();
  grid.scrollTop = 0;
  for (let frame = 0; frame < frames; frame++) {
    grid.scrollTop += grid.clientHeight * step;
    const now = await next();
    times.push(now - before);
    before = now;
    const cells = [...document.querySelectorAll(".cell")].filter(cell => {
      const { top, bottom } = cell.getBoundingClientRect();
      return bottom > box.top && top < box.bottom;
    });
    const tops = cells.map(cell => cell.getBoundingClientRect());
    blank += Math.min(...tops.map(b => b.top)) > box.top + 8 || Math.max(...tops.map(b => b.bottom)) < box.bottom - 8;
    loading += !cells.every(cell => cell.querySelector("img").complete);
  }
  times.sort((one, other) => one - other);
  return { blank, loading, median: times[frames >> 1], longest: times.at(-1) };
})"""
DRAWN = """Promise.all([...document.querySelectorAll(".cell img")].map(image => image.decode()))
  .then(() => performance.now())"""


@dataclass(frozen=True)
class Constants:
    patches: int = 10_000
    size: int = 128  # pixels
    classes: int = 6
    frames: int = 150  # of the scrolling
    steps: tuple[float, ...] = (0.1, 0.5)  # heights of the list in each frame: 0.1 is a fast wheel
    root: Path | None = None  # a folder for the made data set; None: a temporary one


def make_dataset(root: Path, args: Constants) -> Path:
    """Some synthetic patches, many times under other names."""
    random, folder = np.random.default_rng(0), root / "datasets" / "many"
    folder.mkdir(parents=True)
    names = [f'{{name = "class {k}", colour = [{40 * k}, {255 - 40 * k}, 90]}}' for k in range(args.classes)]
    (folder / "dataset.toml").write_text(f"patch_size = {args.size}\nclasses = [{', '.join(names)}]\n")
    images = folder / "train" / "images"
    for number in range(min(100, args.patches)):
        save_image(root / f"{number}.png", aerial_patch(random, args.size, 5)[0])
    images.mkdir(parents=True)
    side = int(np.ceil(np.sqrt(args.patches)))
    for number in range(args.patches):
        os.link(root / f"{number % 100}.png", images / f"scene_r{number // side:03d}_c{number % side:03d}.png")
    return folder / "train" / "label_images.html"


def main(args: Constants) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = args.root or Path(temporary)
        path = make_dataset(root, args)
        start = time.perf_counter()
        label_page.main(label_page.Constants(dataset="many", root=root))
        print(f"written in {time.perf_counter() - start:.2f} s, {path.stat().st_size / 1e6:.2f} MB")
        browser = Browser(Path(temporary) / "browser")
        try:
            page = browser.open(path)
            drawn = page.js(DRAWN)
            before = page.js("performance.now()")
            page.press("1")
            page.until("labels[0][0] === '1'")
            key = page.js("performance.now()") - before
            print(f"usable {(drawn + key) / 1e3:.2f} s after it was opened; a key takes {key:.0f} ms")
            for step in args.steps:
                scrolled = page.js(f"{SCROLL}({args.frames}, {step})")
                print(
                    f"{args.frames} frames of {step} heights: "
                    f"{scrolled['blank']} blank, {scrolled['loading']} loading; "
                    f"{scrolled['median']:.0f} ms a frame, the longest {scrolled['longest']:.0f} ms"
                )
            print(f"{page.js('document.querySelectorAll(`.cell`).length')} cells exist at the end")
        finally:
            browser.close()


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
