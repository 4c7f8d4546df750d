"""Step 9: regions of every patch, from SAM's automatic mask generator (method, section 9).

Reads  datasets/<dataset>/<split>/images/<id>.png and a SAM checkpoint
Writes datasets/<dataset>/<split>/sam_masks/<id>.npz (tools/masks.py describes them), contact_sheet.png, run.json

  python PRC_SAM/get_se_map.py --dataset vaihingen --download
  python PRC_SAM/get_se_map.py --dataset demo --generator felzenszwalb     # a stand-in that needs no checkpoint
  accelerate launch PRC_SAM/get_se_map.py --dataset potsdam                # images shared out to all GPUs

Steps 4 and 7 need the masks; nothing here looks at a label. The same command continues after an interruption.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.command import UserError, check, run
from tools.dataset import SPLITS, load_dataset
from tools.files import write_whole
from tools.labels import load_image
from tools.masks import load_masks, save_masks
from tools.pictures import contact_sheet, regions, sample_ids
from tools.step import ROOT, StepFolder, process_state


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    split: str = "both"  # both | train | test
    generator: str = "sam"  # sam | felzenszwalb (regions from scikit-image, a stand-in that needs no checkpoint)
    model: str = "vit_h"  # vit_h | vit_l | vit_b | custom (a file of other sizes, see PRC_SAM/checkpoints.py)
    checkpoint: str = ""  # the model's file; empty: weights/<official name> under root
    download: bool = False  # fetch a missing official checkpoint (vit_h 2.6 GB, vit_l 1.2 GB, vit_b 0.4 GB)
    # SAM's own settings and defaults
    points_per_side: int = 32  # points of the prompt grid along each side
    points_per_batch: int = 0  # points decoded at once; 0: 64
    pred_iou_thresh: float = 0.88  # masks of a lower predicted IoU are dropped
    stability_score_thresh: float = 0.95  # masks that change more with the cutoff are dropped
    stability_score_offset: float = 1.0  # by how much the cutoff is shifted for that
    box_nms_thresh: float = 0.7  # of masks whose boxes overlap by more, the one of higher predicted IoU stays
    crop_n_layers: int = 0  # layer n runs again on 4^n crops of the image
    crop_nms_thresh: float = 0.7  # the same between crops; masks of smaller crops stay
    crop_overlap_ratio: float = 512 / 1500  # overlap of crops, as a share of the image's shorter side
    crop_n_points_downscale_factor: int = 1  # points_per_side is divided by its n-th power in layer n
    min_mask_region_area: int = 0  # smaller islands and holes are removed from the masks, in pixels
    precision: str = "auto"  # auto (bf16 where a GPU has it) | fp32 (the reference) | bf16
    # the stand-in's settings
    scales: tuple[float, ...] = (100, 400, 1600)  # of Felzenszwalb's segmentation, fine to coarse
    min_area: int = 64  # pixels of the smallest region
    images_at_once: int = 4  # images encoded together by SAM
    workers: int = 2  # processes of the stand-in; threads that read and write beside SAM
    coloured_maps: bool = False  # also write a picture of the regions of each patch to sam_masks/coloured/<id>.png
    samples: int = 8  # patches in contact_sheet.png
    overwrite: bool = False  # start anew instead of continuing
    root: Path = ROOT  # the folder that holds datasets/ and weights/


def main(constants: Constants) -> None:
    check_constants(constants)
    dataset = load_dataset(constants.dataset, constants.root)
    splits = SPLITS if constants.split == "both" else (constants.split,)
    ids = {split: dataset.ids(split) for split in splits}
    state = process_state()
    device, generate, notes = "cpu", None, {"stand_in": "felzenszwalb regions in place of SAM masks"}
    if constants.generator == "sam":
        from PRC_SAM.checkpoints import find_checkpoint, load_sam
        from PRC_SAM.generator import MaskGenerator
        from tools.devices import set_precision

        with state.main_process_first():  # it fetches, the others find
            checkpoint = find_checkpoint(constants.model, constants.checkpoint, constants.root, constants.download)
        device, notes = state.device, {}
        constants = replace(constants, precision=set_precision(constants.precision, device, bf16_on_cpu=False))
        generate = MaskGenerator.from_constants(load_sam(constants.model, checkpoint).to(device), constants)
    failures = []
    for split in splits:
        step = StepFolder(
            dataset.sam_masks(split),
            replace(constants, split=split),
            notes=notes,
            device=str(device),
            state=state,
        )
        pending = step.pending(ids[split], ".npz")
        if generate is None:
            work = partial(_regions, images=dataset.images(split), folder=step.folder, constants=constants)
            step.each(work, pending, constants.workers, f"{split}: regions")
        else:
            _sam_masks(generate, step, dataset.images(split), pending, constants, f"{split}: SAM masks")
        step.join()
        if state.is_main_process:
            _contact_sheet(step.folder, dataset.images(split), ids[split], constants.samples)
        try:
            step.close(".npz")
        except UserError as error:  # the other split is done all the same
            failures.append(str(error))
    check(not failures, "\n".join(failures))


def check_constants(constants: Constants) -> None:
    """Raise `UserError` for a constant that cannot work, before anything is read."""
    choices = {
        "split": ("both", *SPLITS),
        "generator": ("sam", "felzenszwalb"),
        "precision": ("auto", "fp32", "bf16"),
        "model": ("vit_h", "vit_l", "vit_b", "custom"),
    }
    for name, known in choices.items():
        value = getattr(constants, name)
        check(value in known, f'{name} is "{value}", but it must be one of {", ".join(known)}')
    ranges = {
        "points_per_side": (1, 1000),
        "points_per_batch": (0, 10**6),
        "pred_iou_thresh": (0, 1),
        "stability_score_thresh": (0, 1),
        "stability_score_offset": (0, 1000),
        "box_nms_thresh": (0, 1),
        "crop_n_layers": (0, 4),
        "crop_nms_thresh": (0, 1),
        "crop_overlap_ratio": (0, 0.9),
        "crop_n_points_downscale_factor": (1, 1000),
        "min_mask_region_area": (0, 10**9),
        "min_area": (1, 10**9),
        "images_at_once": (1, 1000),
        "workers": (0, 1000),
        "samples": (0, 1000),
    }
    for name, (low, high) in ranges.items():
        value = getattr(constants, name)
        check(low <= value <= high, f"{name} is {value}, but it must lie between {low} and {high}")
    check(
        len(constants.scales) > 0 and min(constants.scales) > 0,
        f"scales is {constants.scales}, but it must hold numbers above 0",
    )
    smallest = constants.points_per_side // constants.crop_n_points_downscale_factor**constants.crop_n_layers
    check(
        smallest >= 1,
        "points_per_side is too small to be divided by crop_n_points_downscale_factor in each of the "
        f"{constants.crop_n_layers} crop layers",
    )


def _regions(id: str, images: Path, folder: Path, constants: Constants) -> None:
    from PRC_SAM.regions import felzenszwalb_masks

    image = load_image(images / f"{id}.png")
    _write(folder, id, felzenszwalb_masks(image, constants.scales, constants.min_area), image, constants.coloured_maps)


def _sam_masks(
    generate: Callable, step: StepFolder, images: Path, ids: list[str], constants: Constants, title: str
) -> None:
    """Masks of all ids, while threads read the next images and write the last masks."""

    def read(id: str) -> tuple | UserError:
        try:
            image = load_image(images / f"{id}.png")
            return image, generate.prepare(image)
        except UserError as error:
            return error

    writes: deque = deque()
    with step.progress(len(ids), title) as bar, ThreadPoolExecutor(max(constants.workers, 1)) as pool:
        stream = _read_ahead(pool, read, ids, 2 * constants.images_at_once)
        while batch := list(islice(stream, constants.images_at_once)):
            good = [(id, *answer) for id, answer in batch if not isinstance(answer, UserError)]
            for _, answer in batch:
                if isinstance(answer, UserError):
                    step.fail(answer)
            for (id, image, _), masks in zip(good, generate([prepared for *_, prepared in good]), strict=True):
                writes.append(pool.submit(_write, step.folder, id, masks, image, constants.coloured_maps))
            while len(writes) > 4 * constants.images_at_once:
                writes.popleft().result()  # a full disk is told here
            bar.update(len(batch))
        for write in writes:
            write.result()


def _read_ahead(pool: ThreadPoolExecutor, read: Callable, ids: Iterable[str], ahead: int) -> Iterator[tuple]:
    """(id, read(id)) in order, with up to `ahead` further ones being read."""
    waiting: deque = deque()
    for id in ids:
        waiting.append((id, pool.submit(read, id)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for id, future in waiting:
        yield id, future.result()


def _write(folder: Path, id: str, masks, image: np.ndarray, coloured: bool) -> None:
    if coloured:
        with write_whole(folder / "coloured" / f"{id}.png") as temporary:
            Image.fromarray(regions(masks.unpack(), image)).save(temporary, format="PNG")
    save_masks(folder / f"{id}.npz", masks)  # last: what `pending` looks for stands for all of it


def _contact_sheet(folder: Path, images: Path, ids: list[str], samples: int) -> None:
    rows = []
    for id in sample_ids(ids, samples):
        try:
            image = load_image(images / f"{id}.png")
            rows.append([image, regions(load_masks(folder / f"{id}.npz").unpack(), image)])
        except UserError:
            continue  # a bad file is among the failures already
    contact_sheet(folder / "contact_sheet.png", rows, ["image", "regions"])


if __name__ == "__main__":
    run(main, Constants, __doc__)
