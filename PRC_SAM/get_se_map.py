"""Step 9: regions of every patch, from SAM's automatic mask generator (method, section 9).

Reads  datasets/<dataset>/<split>/images/<id>.png and a SAM checkpoint
Writes datasets/<dataset>/<split>/sam_masks/<id>.npz (PRC_SAM/masks.py describes them), contact_sheet.png, run.json

  python PRC_SAM/get_se_map.py --dataset vaihingen --download True
  python PRC_SAM/get_se_map.py --dataset demo --generator felzenszwalb     # no checkpoint: a stand-in, and recorded as one
  accelerate launch PRC_SAM/get_se_map.py --dataset potsdam                # images shared out to all GPUs

Steps 4 and 7 need the masks; nothing here looks at a label. The same command continues after an interruption.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PRC_SAM.masks import Masks, load_masks, save_masks
from tools.command import UserError, check, run
from tools.dataset import SPLITS, Dataset, load_dataset
from tools.folders import ROOT, StepFolder
from tools.labels import load_image


@dataclass(frozen=True)
class Constants:
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    split: str = "both"  # both | train | test
    generator: str = "sam"  # sam | felzenszwalb (regions from scikit-image, a stand-in that needs no checkpoint)
    model: str = "vit_h"  # vit_h | vit_l | vit_b | custom (a file with the keys sizes and model, see PRC_SAM/checkpoints.py)
    checkpoint: str = ""  # the model's file; empty: weights/<official name> under root
    download: bool = False  # fetch a missing official checkpoint (vit_h 2.6 GB, vit_l 1.2 GB, vit_b 0.4 GB)
    # SAM's own settings and defaults
    points_per_side: int = 32  # points of the prompt grid along each side
    points_per_batch: int = 0  # points decoded at once; 0: as many as the memory holds
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
    workers: int = 4  # processes of the stand-in; threads that read and write beside SAM
    coloured_maps: bool = False  # also write a picture of the regions of each patch to sam_masks/coloured/<id>.png
    samples: int = 8  # patches in contact_sheet.png
    overwrite: bool = False  # start anew instead of continuing
    root: Path = ROOT  # the folder that holds datasets/ and weights/


def main(constants: Constants) -> None:
    check_constants(constants)
    from accelerate import PartialState

    dataset = load_dataset(constants.dataset, constants.root)
    splits = SPLITS if constants.split == "both" else (constants.split,)
    ids = {split: dataset.ids(split) for split in splits}
    state = PartialState()
    device, generate, notes = "cpu", None, {"stand_in": "felzenszwalb regions in place of SAM masks"}
    if constants.generator == "sam":
        from PRC_SAM.checkpoints import find_checkpoint, load_sam
        from PRC_SAM.generator import MaskGenerator, resolve_precision

        with state.main_process_first():
            checkpoint = find_checkpoint(constants.model, constants.checkpoint, constants.root, constants.download)
        device, notes = state.device, {}
        constants = replace(constants, precision=resolve_precision(constants.precision, device))
        generate = MaskGenerator.from_constants(load_sam(constants.model, checkpoint).to(device), constants)
    for split in splits:
        with state.main_process_first():  # the main process makes or empties the folder
            step = StepFolder(dataset.sam_masks(split), replace(constants, split=split), notes=notes, device=str(device),
                              process=state.process_index, processes=state.num_processes)
        pending = step.pending(ids[split], ".npz")
        if generate is None:
            work = partial(_regions, images=dataset.images(split), folder=step.folder, constants=constants)
            step.each(work, pending, constants.workers, f"{split} regions")
        else:
            _sam(generate, step, dataset.images(split), pending, constants, f"{split} SAM masks")
        _finish(step, state, dataset, split, ids[split], constants)


def check_constants(constants: Constants) -> None:
    """Raise `UserError` for a constant that cannot work, before anything is read."""
    from PRC_SAM.checkpoint_names import MODELS


def _finish(step: StepFolder, state, dataset: Dataset, split: str, ids: list[str], constants: Constants) -> None:
    state.wait_for_everyone()
    if state.num_processes > 1:
        from accelerate.utils import gather_object

        step.failures = gather_object(step.failures)
    if state.is_main_process:
        _contact_sheet(step.folder, dataset.images(split), ids, constants.samples)
    step.close(".npz")
