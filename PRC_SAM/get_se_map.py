"""Step 9: regions of every patch, from SAM's automatic mask generator (method section 9).

Reads  datasets/<dataset>/<split>/images/<id>.png and a SAM checkpoint
Writes datasets/<dataset>/<split>/sam_masks/<id>.npz (described in tools/masks.py), contact_sheet.png, run.json

  python PRC_SAM/get_se_map.py --dataset vaihingen --download
  python PRC_SAM/get_se_map.py --dataset demo --generator felzenszwalb     # a stand-in that needs no checkpoint
  accelerate launch PRC_SAM/get_se_map.py --dataset potsdam                # all GPUs share the images

Run it before step 4: steps 4 and 7 need the masks. It reads no label. After an interruption the same command continues.
"""

import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.command import UserError, check, run
from tools.constants import (
    Count,
    Machine,
    MayChange,
    NonNegative,
    PositiveCount,
    Scales,
    Share,
    checked_constants,
)
from tools.files import write_whole
from tools.labels import load_image
from tools.masks import Masks, load_masks, save_masks
from tools.pictures import regions
from tools.step import Step
from tools.steps import SPLITS
from tools.workers import in_background

if TYPE_CHECKING:  # the stand-in's workers need no torch
    from PRC_SAM.generator import MaskGenerator


@checked_constants
class Constants(Machine):  # and root, overwrite, workers, samples, device
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    split: Literal["both", "train", "test"] = "both"  # both | train | test
    generator: Literal["sam", "felzenszwalb"] = "sam"  # felzenszwalb: a stand-in that needs no checkpoint
    coloured_maps: MayChange[bool] = False  # also write a picture of the regions to sam_masks/coloured/<id>.png

    # SAM; workers: threads that read and write
    model: Literal["vit_h", "vit_l", "vit_b"] = "vit_h"  # vit_h | vit_l | vit_b
    checkpoint: str = ""  # the model's file; empty: weights/<official name> under root
    download: MayChange[bool] = False  # fetch a missing official checkpoint (vit_h 2.6 GB, vit_l 1.2 GB, vit_b 0.4 GB)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that computes in it, else fp32
    images_at_once: MayChange[PositiveCount] = 4  # images that SAM encodes together, at least 1

    # SAM's own settings, by its own names and defaults
    points_per_side: Annotated[int, Field(ge=1, le=1000)] = 32  # points of the prompt grid along each side, 1 to 1000
    points_per_batch: MayChange[PositiveCount] = 64  # points decoded at once, at least 1; halved when memory is full
    pred_iou_thresh: Share = 0.88  # 0 to 1: masks with a lower predicted IoU are dropped
    stability_score_thresh: Share = 0.95  # 0 to 1: masks that change more when the mask threshold shifts are dropped
    stability_score_offset: NonNegative = 1.0  # how far the mask threshold shifts up and down for that, at least 0
    box_nms_thresh: Share = 0.7  # 0 to 1: of masks whose boxes have a higher IoU, the highest predicted IoU is kept
    crop_n_layers: Annotated[int, Field(ge=0, le=4)] = 0  # 0 to 4: layer n runs again on 4^n crops of the image
    crop_nms_thresh: Share = 0.7  # 0 to 1: box_nms_thresh between crops; masks of smaller crops are kept
    crop_overlap_ratio: Annotated[float, Field(ge=0, le=0.9)] = 512 / 1500  # 0 to 0.9 of the shorter side
    crop_n_points_downscale_factor: PositiveCount = 1  # points_per_side is divided by its n-th power in layer n
    min_mask_region_area: Count = 0  # pixels: smaller islands and holes are removed from the masks; 0: none

    # felzenszwalb; workers: worker processes
    scales: Scales = (100, 400, 1600)  # values of Felzenszwalb's `scale`, fine to coarse, above 0
    min_area: PositiveCount = 64  # pixels of the smallest region, at least 1

    def __post_init__(self) -> None:
        check(
            self.points_per_side >= self.crop_n_points_downscale_factor**self.crop_n_layers,
            f"points_per_side is {self.points_per_side}, too small for the crop layers: it is divided by "
            f"crop_n_points_downscale_factor, {self.crop_n_points_downscale_factor}, in each of {self.crop_n_layers} "
            "layers: raise points_per_side, or lower one of the others",
        )


def main(args: Constants) -> None:
    by_sam = args.generator == "sam"
    splits = SPLITS if args.split == "both" else (args.split,)
    precision = args.precision if by_sam else ""
    steps = [Step("sam_masks", args, split=split, precision=precision, bf16_on_cpu=False) for split in splits]
    patches = [step.ids for step in steps]  # a split without images ends the run before the model is loaded
    generate = load_generator(args, steps[0]) if by_sam else None

    failures = []
    for step, ids in zip(steps, patches, strict=True):
        if generate is not None:
            step.hardware["tf32_in_decoder"] = generate.decoder_in_tf32
        else:
            step.notes["stand_in"] = "felzenszwalb regions in place of SAM masks"
        try:
            with step.output(".npz", last=step is steps[-1]):
                pending = step.pending(ids, ".npz")
                if generate is not None:
                    sam_masks(step, pending, generate)
                else:
                    images = step.dataset.images(step.split)
                    work = partial(felzenszwalb_regions, images=images, folder=step.path, args=args)
                    step.each(work, pending, f"{step.split} regions")
                step.draw(partial(picture_row, step), ["image", "regions"])
        except UserError as error:  # the other split is made all the same
            failures.append(str(error))
    check(not failures, "\n".join(failures))


def load_generator(args: Constants, step: Step) -> "MaskGenerator":
    """SAM on the device of `step`, from a checkpoint that is fetched if asked for."""
    from PRC_SAM.checkpoints import find_checkpoint, load_sam
    from PRC_SAM.generator import MaskGenerator

    with step.accelerator.main_process_first():  # the first process fetches the checkpoint, the others find it
        file = find_checkpoint(args.model, args.checkpoint, args.root, args.download)
    return MaskGenerator(load_sam(args.model, file).to(step.device), step.precision, args)


def sam_masks(step: Step, ids: Sequence[str], generate: "MaskGenerator") -> None:
    """SAM's masks of these patches; threads read the next images and write the last masks meanwhile."""

    def read(id: str) -> tuple:
        image = step.image(id)
        return id, image, generate.prepare(image)

    def write_or_fail(id: str, masks: Masks, image: np.ndarray) -> None:
        try:
            write(step.path, id, masks, image, step.args.coloured_maps)
        except UserError as error:
            step.fail(error)

    batch, threads = step.args.images_at_once, max(step.args.workers, 1)
    with (
        step.progress(len(ids), f"{step.split} SAM masks") as bar,
        ThreadPoolExecutor(threads) as readers,
        in_background(threads) as submit,
    ):
        reads = deque(readers.submit(read, id) for id in ids[: 2 * batch])
        for start in range(0, len(ids), batch):
            reads.extend(readers.submit(read, id) for id in ids[start + 2 * batch : start + 3 * batch])
            readable = []
            for _ in ids[start : start + batch]:
                try:
                    readable.append(reads.popleft().result())
                except UserError as error:
                    step.fail(error)
            all_masks = generate([prepared for _, _, prepared in readable])
            for (id, image, _), masks in zip(readable, all_masks, strict=True):
                submit(write_or_fail, id, masks, image)
            bar.update(len(ids[start : start + batch]))


def felzenszwalb_regions(id: str, images: Path, folder: Path, args: Constants) -> None:
    """Regions of one patch by the stand-in, from file to file."""
    from PRC_SAM.regions import felzenszwalb_masks

    image = load_image(images / f"{id}.png")
    try:
        masks = felzenszwalb_masks(image, args.scales, args.min_area)
    except ValueError as error:
        raise UserError(f"{images / id}.png: {error}") from None
    write(folder, id, masks, image, args.coloured_maps)


def write(folder: Path, id: str, masks: Masks, image: np.ndarray, coloured: bool) -> None:
    """Write the mask file of a patch last: its presence marks the patch as done."""
    if coloured:
        with write_whole(folder / "coloured" / f"{id}.png") as temporary:
            Image.fromarray(regions(masks.unpack(), image)).save(temporary, format="PNG")
    save_masks(folder / f"{id}.npz", masks)


def picture_row(step: Step, id: str) -> list[np.ndarray]:
    """A patch and its regions, for the contact sheet."""
    image = step.image(id)
    return [image, regions(load_masks(step.path / f"{id}.npz", image.shape[:2]).unpack(), image)]


if __name__ == "__main__":
    run(main, Constants, __doc__)
