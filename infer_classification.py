"""Step 2: class activation maps at four scales and their mirrors, with PRC (method section 2).

Reads  classifier/ and datasets/<dataset>/<split>/images with image_labels.csv
Writes experiments/<dataset>/<experiment>/cams/<id>.npz: the maps of the classes present, at feature size, in float16,
       and the mean logit of every class, for datasetsprocess/label_page.py --review

    python infer_classification.py --dataset vaihingen
"""

from typing import Literal

import numpy as np
from torch import Tensor

from models.backbone import Backbone
from models.classifier import Classifier
from report.page import renew
from tools.cams import for_inference, image_batches, in_background, load_cams, mirrored_cams, save_cams
from tools.command import run
from tools.constants import Count, Machine, MayChange, PositiveCount, Scales, checked_constants
from tools.devices import make_accelerator, precision_of
from tools.labels import load_image
from tools.memory import Parts
from tools.pictures import heat
from tools.step import Step
from tools.training import load_checkpoint


@checked_constants
class Constants(Machine):
    dataset: str = "vaihingen"  # vaihingen | potsdam | isaid | demo | the name of your own dataset.toml
    experiment: str = "prc"  # results go to experiments/<dataset>/<experiment>/
    split: Literal["train", "test"] = "train"  # train, for the pseudo-labels | test, to measure only: cams_test
    scales: Scales = (0.5, 1.0, 1.5, 2.0)  # each with its mirror image
    classifier: str = ""  # the experiment whose classifier is used; empty: this one
    iterations: Count | None = None  # PRC: how often the affinity is applied; None: as in training
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as in step 1; PRC runs in fp32 always
    images_at_once: MayChange[PositiveCount] = 8  # patches of one batch; lower it when the GPU's memory is short


def main(args: Constants) -> None:
    step = Step("cams", args, image_labels=True)
    dataset, trained = step.dataset, step.inputs["classifier"].constants
    iterations = trained["iterations"] if args.iterations is None else args.iterations
    backbone = Backbone(trained["backbone"], "none")
    model = Classifier(backbone, dataset.num_classes, trained["gamma"], iterations, train_all=False)
    load_checkpoint(step.sources["classifier"] / "model.pt", model)
    accelerator = make_accelerator(args.precision, args.device)
    model, parts = for_inference(model, accelerator.device), Parts()

    def predict(images: list[Tensor]) -> list[Tensor]:
        """Mean logits (B,K), and the maps (B,K,h,w) of each scale."""
        with accelerator.autocast():
            logits, maps = mirrored_cams(model, images, accelerator.device)
        return [logits, *maps]

    def row(id: str) -> list[np.ndarray | None]:
        """The patch with the maps of its classes."""
        image = load_image(dataset.images(step.split) / f"{id}.png")
        maps = dict(zip(*load_cams(step.path / f"{id}.npz", dataset.num_classes, image.shape[:2]), strict=True))
        return [image, *(heat(image, maps[k]) if k in maps else None for k in range(dataset.num_classes))]

    with step.output(".npz", state=accelerator, settings={"precision": precision_of(accelerator)}):
        pending = step.pending(step.ids, ".npz")
        with step.progress(len(pending), "CAMs") as bar, in_background() as submit:
            for ids, size, images in image_batches(
                dataset.images(step.split),
                pending,
                args.scales,
                args.images_at_once,
                args.workers,
                step.fail,
            ):
                scores, *arrays = (found.cpu().numpy() for found in parts.predict(predict, images))
                for index, id in enumerate(ids):
                    classes = np.flatnonzero(step.labels[id])
                    present = [scale[index, classes] for scale in arrays]
                    submit(save_cams, step.path / f"{id}.npz", classes, present, size, scores[index])
                bar.update(len(ids))
        step.draw(row, ["image", *dataset.classes], legend=False)


if __name__ == "__main__":
    run(main, Constants, __doc__, then=renew)
