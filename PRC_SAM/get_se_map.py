"""Step 9: regions of every patch, from SAM's automatic mask generator (method, section 9).

Reads  datasets/<dataset>/<split>/images/<id>.png and a SAM checkpoint
Writes datasets/<dataset>/<split>/sam_masks/<id>.npz (described in tools/masks.py), contact_sheet.png, run.json

  python PRC_SAM/get_se_map.py --dataset vaihingen --download
  python PRC_SAM/get_se_map.py --dataset demo --generator felzenszwalb     # a stand-in that needs no checkpoint
  accelerate launch PRC_SAM/get_se_map.py --dataset potsdam                # all GPUs share the images

Steps 4 and 7 need the masks. This step reads no label. After an interruption the same command continues.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tyro.conf import OmitArgPrefixes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PRC_SAM.settings import Settings
from tools.command import UserError, check, run
from tools.constants import WORKERS, Count, Machine, MayChange, PositiveCount, Scales, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import write_whole
from tools.folders import StepFolder
from tools.labels import load_image
from tools.masks import Masks, load_masks, save_masks
from tools.pictures import contact_sheet, regions, sample_ids
from tools.steps import SPLITS, STEPS, next_step


@checked_constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    split: Literal["both", "train", "test"] = "both"  # both | train | test
    generator: Literal["sam", "felzenszwalb"] = "sam"  # felzenszwalb: a stand-in that needs no checkpoint
    model: Literal["vit_h", "vit_l", "vit_b", "custom"] = "vit_h"  # custom: a file of other sizes, see checkpoints.py
    checkpoint: str = ""  # the model's file; empty: weights/<official name> under root
    download: MayChange[bool] = False  # fetch a missing official checkpoint (vit_h 2.6 GB, vit_l 1.2 GB, vit_b 0.4 GB)
    sam: OmitArgPrefixes[Settings] = Settings()  # SAM's own settings, PRC_SAM/settings.py
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that computes in it, else fp32
    scales: Scales = (100, 400, 1600)  # felzenszwalb: scales of the segmentation, fine to coarse
    min_area: PositiveCount = 64  # felzenszwalb: pixels of the smallest region
    images_at_once: MayChange[PositiveCount] = 4  # images that SAM encodes together
    workers: MayChange[Count] = WORKERS  # felzenszwalb: worker processes; sam: reading and writing threads
    coloured_maps: MayChange[bool] = False  # also write a picture of the regions to sam_masks/coloured/<id>.png


def main(args: Constants) -> None:
    # imported here, because the stand-in's workers need no torch
    from tools.devices import device_facts, process_state, set_precision, start_line

    begin = time.monotonic()
    dataset = load_dataset(args.dataset, args.root)
    splits = SPLITS if args.split == "both" else (args.split,)
    for split in splits:
        dataset.ids(split)  # a split without images ends the run before the model is loaded
    state = process_state(args.device)
    by_sam = args.generator == "sam"
    precision = set_precision(args.precision, state.device, bf16_on_cpu=False) if by_sam else ""
    if state.is_main_process:  # before the checkpoint is downloaded
        print(f"step 9, {start_line(state, precision, args.device)}", flush=True)
    generate = load_generator(args, state, precision) if by_sam else None
    settings = {"precision": precision} if by_sam else {}
    facts = device_facts(state.device) | ({"tf32_in_decoder": generate.decoder_in_tf32} if generate else {})
    notes = {} if generate else {"stand_in": "felzenszwalb regions in place of SAM masks"}
    steps, failures = [], []
    for split in splits:
        steps.append(StepFolder(dataset.sam_masks(split), args))
        try:
            with steps[-1].open(
                ".npz",
                state=state,
                notes=notes,
                settings=settings | {"split": split},
                facts={"hardware": facts},
            ) as step:
                make_masks(step, args, dataset, split, generate)
        except UserError as error:  # the other split is made all the same
            failures.append(str(error))
    check(not failures, "\n".join(failures))
    if state.is_main_process:
        print(f"made: {', '.join(f'{s.path}, {s.run.files} files' for s in steps)}, {time.monotonic() - begin:.0f} s")
        print(f"look at: {', '.join(str(step.path / 'contact_sheet.png') for step in steps)}")
        following = next_step(STEPS["sam_masks"])
        print(f"next: {following.command(args)}" if following else "")


def load_generator(args: Constants, state: Any, precision: str) -> Any:
    """A `MaskGenerator` on the device of `state`. Fetches the checkpoint if asked to."""
    from PRC_SAM.checkpoints import find_checkpoint, load_sam
    from PRC_SAM.generator import MaskGenerator

    with state.main_process_first():  # the first process fetches the checkpoint, the others find it
        file = find_checkpoint(args.model, args.checkpoint, args.root, args.download)
    sam = load_sam(args.model, file).to(state.device)
    return MaskGenerator(sam, args.sam, precision, args.images_at_once)


def make_masks(step: StepFolder, args: Constants, dataset: Dataset, split: str, generate: Callable | None) -> None:
    """Masks of all patches of a split that have none yet, and the contact sheet."""
    images, ids = dataset.images(split), dataset.ids(split)
    pending = step.pending(ids, ".npz")
    if generate:
        sam_masks(step, args, images, pending, generate)
    else:
        work = partial(felzenszwalb_regions, images=images, folder=step.path, args=args)
        step.each(work, pending, f"{split} regions")
    step.join()
    if step.is_main:
        draw_sheet(step.path, images, sample_ids(ids, args.samples))


def felzenszwalb_regions(id: str, images: Path, folder: Path, args: Constants) -> None:
    """Regions of one patch by the stand-in, from file to file."""
    from PRC_SAM.regions import felzenszwalb_masks

    image = load_image(images / f"{id}.png")
    try:
        masks = felzenszwalb_masks(image, args.scales, args.min_area)
    except ValueError as error:
        raise UserError(f"{images / id}.png: {error}") from None
    write(folder, id, masks, image, args.coloured_maps)


def sam_masks(step: StepFolder, args: Constants, images: Path, ids: list[str], generate: Any) -> None:
    """Masks of some patches by SAM, while threads read the next images and write the last masks."""
    from tools.map_files import in_background

    def read(id: str) -> tuple[np.ndarray, Any] | UserError:
        try:
            image = load_image(images / f"{id}.png")
            return image, generate.prepare(image)
        except UserError as error:
            return error

    def write_or_fail(id: str, masks: Masks, image: np.ndarray) -> None:
        try:
            write(step.path, id, masks, image, args.coloured_maps)
        except UserError as error:
            step.fail(error)

    batch, threads = args.images_at_once, max(args.workers, 1)
    with (
        step.progress(len(ids), f"{images.parent.name} SAM masks") as bar,
        ThreadPoolExecutor(threads) as readers,
        in_background(threads) as submit,
    ):
        stream = read_ahead(readers, read, ids, 2 * batch)
        while answers := list(islice(stream, batch)):
            good = [(id, *answer) for id, answer in answers if not isinstance(answer, UserError)]
            for _, answer in answers:
                if isinstance(answer, UserError):
                    step.fail(answer)
            for (id, image, _), masks in zip(good, generate([prepared for *_, prepared in good]), strict=True):
                submit(write_or_fail, id, masks, image)
            bar.update(len(answers))


def read_ahead(pool: ThreadPoolExecutor, read: Callable, ids: list[str], ahead: int) -> Iterator[tuple[str, Any]]:
    """Yield (id, read(id)) in order, while the next `ahead` ids are being read."""
    waiting: deque = deque()
    for id in ids:
        waiting.append((id, pool.submit(read, id)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for id, future in waiting:
        yield id, future.result()


def write(folder: Path, id: str, masks: Masks, image: np.ndarray, coloured: bool) -> None:
    """Write the mask file of a patch last: its presence marks the patch as done."""
    if coloured:
        with write_whole(folder / "coloured" / f"{id}.png") as temporary:
            Image.fromarray(regions(masks.unpack(), image)).save(temporary, format="PNG")
    save_masks(folder / f"{id}.npz", masks)


def draw_sheet(folder: Path, images: Path, ids: list[str]) -> None:
    """The contact sheet: images with their regions. Bad files are left out; they are among the failures."""
    rows = {}
    for id in ids:
        try:
            image = load_image(images / f"{id}.png")
            rows[id] = [image, regions(load_masks(folder / f"{id}.npz", image.shape[:2]).unpack(), image)]
        except UserError:
            continue
    contact_sheet(folder / "contact_sheet.png", list(rows.values()), ["image", "regions"], names=list(rows))


if __name__ == "__main__":
    run(main, Constants, __doc__)
