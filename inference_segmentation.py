"""Step 6: label maps by the segmenter, four scales and their mirrors, no CRF (method section 6).

Reads  segmenter/ and datasets/<dataset>/<split>/images
Writes experiments/<dataset>/<experiment>/segmentation/<id>.png: class ids; with keep_probabilities also
       <id>.npz: class probabilities

    python inference_segmentation.py --dataset vaihingen

segment_scene.py segments whole large images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from report.page import renew
from tools.cams import image_batches, in_background, save_cams
from tools.command import run
from tools.constants import Machine, MayChange, PositiveCount, Scales, checked_constants
from tools.devices import make_accelerator, precision_of
from tools.labels import save_label
from tools.segmenter import Segmenter, small_probabilities
from tools.step import Step


@checked_constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "test"  # test | train (to measure only; goes to segmentation_train)
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 5
    images_at_once: MayChange[PositiveCount] = 8  # patches of one batch; lower it when the GPU's memory is short
    keep_probabilities: MayChange[bool] = False  # also write <id>.npz: class probabilities, for rule mean_cam of step 7


def save_patch(folder: Path, id: str, label: np.ndarray, maps: np.ndarray | None, colours: np.ndarray) -> None:
    """Write the label map (H,W) of a patch and, where they are given, its class probabilities (K,h,w)."""
    if maps is not None:
        save_cams(folder / f"{id}.npz", np.arange(len(maps)), [maps], label.shape)
    save_label(folder / f"{id}.png", np.ascontiguousarray(label), colours)


def main(args: Constants) -> None:
    step = Step("segmentation", args)
    dataset = step.dataset
    accelerator = make_accelerator(args.precision, args.device)
    segmenter = Segmenter(step.sources["segmenter"], step.inputs["segmenter"], dataset, accelerator)
    with step.output(".png", state=accelerator, settings={"precision": precision_of(accelerator)}):
        suffixes = (".png", ".npz") if args.keep_probabilities else (".png",)
        missing = {id for suffix in suffixes for id in step.pending(step.ids, suffix)}
        pending = [id for id in step.ids if id in missing]
        with step.progress(len(pending), "segmentation") as bar, in_background() as submit:
            for ids, size, images in image_batches(
                dataset.images(step.split),
                pending,
                args.scales,
                args.images_at_once,
                args.workers,
                step.fail,
            ):
                logits = segmenter(images, size)
                labels = logits.argmax(1).to(torch.uint8).cpu().numpy()
                probabilities: Sequence[np.ndarray | None] = [None] * len(labels)
                if args.keep_probabilities:
                    probabilities = list(small_probabilities(logits, 2 * len(args.scales)).cpu().numpy())
                for id, label, maps in zip(ids, labels, probabilities, strict=False):
                    submit(save_patch, step.path, id, label, maps, dataset.colours)
                bar.update(len(ids))
        source = step.inputs["segmenter"].constants.get("labels", "truth")
        learnt_from = None if source == "truth" else step.experiment / source
        remedy = "compare with the pseudo-labels of step 4, and train step 5 for longer"
        step.warn_of_labels(step.path, remedy, learnt_from)
        step.draw_labels({"segmentation": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
