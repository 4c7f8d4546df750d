"""Step 6: label maps by the segmenter, four scales and their mirrors, no CRF (method section 6).

Reads  segmenter/ and datasets/<dataset>/<split>/images
Writes experiments/<dataset>/<experiment>/segmentation/<id>.png: class ids

    python inference_segmentation.py --dataset vaihingen

segment_scene.py segments whole large images.
"""

from typing import Literal

import numpy as np
import torch

from report.page import renew
from tools.cams import image_batches, in_background
from tools.command import run
from tools.constants import Machine, PositiveCount, Scales, Speed, constants
from tools.devices import make_accelerator, precision_of
from tools.labels import save_label
from tools.segmenter import Segmenter
from tools.step import Step


@constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "test"  # test | train (to measure only; goes to segmentation_train)
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 5
    images_at_once: Speed[PositiveCount] = 8  # patches of one batch; lower it when the GPU's memory is short


def main(constants: Constants) -> None:
    step = Step("segmentation", constants)
    dataset = step.dataset
    accelerator = make_accelerator(constants.precision, constants.device)
    segmenter = Segmenter(step.sources["segmenter"], step.inputs["segmenter"], dataset, accelerator)
    with step.output(".png", state=accelerator, settings={"precision": precision_of(accelerator)}):
        pending = step.pending(step.ids, ".png")
        with step.progress(len(pending), "segmentation") as bar, in_background() as submit:
            for ids, images in image_batches(
                dataset.images(step.split), pending, constants.images_at_once, constants.workers, step.fail
            ):
                labels = segmenter(images, constants.scales).argmax(1).to(torch.uint8).cpu().numpy()
                for id, label in zip(ids, labels[: len(ids)], strict=True):
                    submit(save_label, step.path / f"{id}.png", np.ascontiguousarray(label), dataset.colours)
                bar.update(len(ids))
        step.warn_of_labels(step.path, "compare with the pseudo-labels of step 4, and train step 5 for longer")
        step.draw_labels({"segmentation": step.path})


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
