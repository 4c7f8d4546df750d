"""Why IR and PRC help or not: where the maps of experiments err, and what PRC's affinity holds. USES THE TRUTH.

For each experiment, on the train split: mIoU of the maps' argmax; mIoU of this argmax on the truth's background; the
foreground (every class except the background) against the background. Where the experiment has a classifier with PRC:
cosines of the features before and after the projection; the cells that each gamma keeps; and the share of their weight
on cells of the same class, over the cells of objects, beside this share for random cells.

Command: python benchmarks/maps.py --dataset NAME --experiments tables-ir_weight0-seed0 tables-seed0
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.backbone import Backbone
from models.classifier import Classifier
from report.stages import load_prediction
from tables.oracles import on_true_background
from tools.augment import normalise, to_tensor
from tools.command import run
from tools.constants import Affinity, Place, PositiveCount, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.labels import load_image, load_label
from tools.scores import ConfusionMatrix
from tools.step import experiment_folder, require
from tools.training import load_checkpoint

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@checked_constants
class Constants(Place):
    dataset: str = "demo"  # after process.py; maps are measured where its [rules] name a background class
    experiments: tuple[str, ...] = ("prc",)  # folders of experiments/<dataset>/ with cams/, with or without classifier/
    gammas: tuple[Affinity, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    every: PositiveCount = 7  # the affinity of every n-th patch


def separation(dataset: Dataset, cams: Path, background: int) -> str:
    """mIoU of the maps, mIoU on the true background, and the foreground's IoU, recall and precision, in per cent."""
    matrix = ConfusionMatrix(dataset.num_classes)
    for id in dataset.ids("train"):
        truth = load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes)
        matrix.update(truth, load_prediction(cams, id, dataset.num_classes, truth.shape))
    foreground = np.arange(dataset.num_classes) != background
    counts = matrix.counts[:, : dataset.num_classes].astype(float)
    hit = counts[foreground][:, foreground].sum()
    support, predicted = counts[foreground].sum(), counts[:, foreground].sum()
    mious = matrix.scores()["miou"], on_true_background(dataset, cams, background).scores()["miou"]
    values = *mious, hit / (support + predicted - hit), hit / support, hit / predicted
    return " | ".join(f"{100 * value:.2f}" for value in values)


def cosines(vectors: Tensor) -> Tensor:
    """(N,D) -> a sample of the cosines of all pairs; `quantile` accepts at most 2^24 values."""
    rows = F.normalize(vectors, dim=1)
    return (rows @ rows.T).flatten()[::17]


@torch.no_grad()
def affinities(dataset: Dataset, folder: Path, args: Constants) -> None:
    """Print what the PRC of one classifier makes of the patches: cosines, cells kept, weight on the same class."""
    settings = require(folder, args, experiment=folder.parent.name).constants
    if not settings["iterations"]:
        return print("trained without PRC")
    backbone = Backbone(settings["backbone"], "none")
    model = Classifier(backbone, dataset.num_classes, settings["gamma"], settings["iterations"], train_all=False)
    load_checkpoint(folder / "model.pt", model)
    model.eval()
    sampled: dict[str, list[Tensor]] = {"features": [], "projected features": []}
    kept: dict[float, list[Tensor]] = {gamma: [] for gamma in args.gammas}
    weight: dict[float, list[Tensor]] = {gamma: [] for gamma in args.gammas}
    chance = []
    for id in dataset.ids("train")[:: args.every]:
        image = normalise(to_tensor(load_image(dataset.images("train") / f"{id}.png"))[None])
        truth = torch.from_numpy(load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes))
        features = model.backbone(image)[2]
        sampled["features"].append(cosines(features[0].flatten(1).T))
        sampled["projected features"].append(cosines(model.prc.project(features, image)[0]))
        planes = torch.stack([truth == c for c in range(dataset.num_classes)]).float()
        shares = F.adaptive_avg_pool2d(planes, features.shape[-2:]).flatten(1)  # (K,N): share of each class in a cell
        same = shares.T @ shares  # (N,N): probability that random pixels of two cells have the same class
        objects = shares[np.arange(len(shares)) != dataset.background].sum(0) > 0.5  # without a background: all cells
        chance.append(same.mean(0)[objects])
        for gamma in args.gammas:
            model.prc.gamma = gamma
            affinity = model.prc.affinity(features, image)[0]
            kept[gamma].append((affinity > 0).sum(0).float())
            weight[gamma].append((affinity * same).sum(0)[objects])
    for name, values in sampled.items():
        quantiles = torch.cat(values).quantile(torch.tensor(QUANTILES)).tolist()
        print(f"cosines of {name}, quantiles {QUANTILES}: {', '.join(f'{value:.2f}' for value in quantiles)}")
    print(f"weight on the same class at objects, random cells: {torch.cat(chance).mean():.3f}")
    print("| gamma | cells kept | of | weight on the same class at objects |\n|---|---|---|---|")
    for gamma in args.gammas:
        cells = len(kept[gamma][0])
        print(f"| {gamma:g} | {torch.cat(kept[gamma]).mean():.1f} | {cells} | {torch.cat(weight[gamma]).mean():.3f} |")


def main(args: Constants) -> None:
    torch.set_num_threads(1)
    dataset = load_dataset(args.dataset, args.root)
    folders = [experiment_folder(args.root, dataset.name, experiment) for experiment in args.experiments]
    for folder in folders:
        require(folder / "cams", args, experiment=folder.name)
    if dataset.background is not None:
        print("| | mIoU | on the true background | foreground IoU | recall | precision |\n|---|---|---|---|---|---|")
        for folder in folders:
            print(f"| {folder.name} | {separation(dataset, folder / 'cams', dataset.background)} |")
    for folder in folders:
        if (folder / "classifier").exists():
            print(f"\n{folder.name}")
            affinities(dataset, folder / "classifier", args)


if __name__ == "__main__":
    run(main, Constants, __doc__)
