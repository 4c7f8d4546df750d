"""Why IR and PRC help, or not: where the maps of experiments err, and what PRC's affinity holds. USES THE TRUTH.

For each experiment, on the train split: mIoU of the maps' argmax, and on the truth's background; foreground (any class
but the background) against background. Where the experiment holds a classifier with PRC: cosines of the features before
and after its projection, the cells that each gamma keeps, and the share of the weight that lies on cells of the same
class, over all cells of objects, against that of cells chosen at random.

Command: python benchmarks/maps.py --dataset NAME --experiments tables-ir_weight0-seed0 tables-seed0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.backbone import Backbone
from models.classifier import Classifier
from report.patch_pictures import load_prediction
from tables.oracles import on_true_background
from tools.augment import normalise, to_tensor
from tools.command import run
from tools.dataset import Dataset, load_dataset
from tools.labels import load_image, load_label
from tools.scores import ConfusionMatrix
from tools.step import ROOT, experiment_folder, require
from tools.training import load_checkpoint

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Constants:
    dataset: str  # after process.py; the maps are measured where its [rules] name a background class
    experiments: tuple[str, ...]  # folders of experiments/<dataset>/ with cams/, with or without classifier/
    gammas: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    every: int = 7  # the affinities of every n-th patch
    root: Path = ROOT  # folder that holds datasets/ and experiments/


def separation(dataset: Dataset, cams: Path, background: int) -> str:
    """mIoU of the maps, mIoU on the true background, and the foreground's IoU, recall and precision, in per cent."""
    matrix = ConfusionMatrix(dataset.num_classes)
    for id in dataset.ids("train"):
        truth = load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes)
        matrix.update(truth, load_prediction(cams, id, dataset.num_classes, truth.shape))
    fore = np.arange(dataset.num_classes) != background
    counts = matrix.counts[:, : dataset.num_classes].astype(float)
    both, truth, found = counts[fore][:, fore].sum(), counts[fore].sum(), counts[:, fore].sum()
    given = on_true_background(dataset, cams, background)
    values = matrix.scores()["miou"], given.scores()["miou"], both / (truth + found - both), both / truth, both / found
    return " | ".join(f"{100 * value:.2f}" for value in values)


@torch.no_grad()
def affinities(dataset: Dataset, folder: Path, background: int, constants: Constants) -> None:
    """Print what the PRC of one classifier makes of the patches: cosines, cells kept, weight on the same class."""
    settings = require(folder)["constants"]
    if not settings["iterations"]:
        return print("trained without PRC")
    model = Classifier(Backbone(settings["backbone"], "none"), dataset.num_classes)
    load_checkpoint(folder / "model.pt", model)
    model.eval()
    cosines: dict[str, list] = {"features": [], "projected features": []}
    kept: dict[float, list] = {gamma: [] for gamma in constants.gammas}
    weight: dict[float, list] = {gamma: [] for gamma in constants.gammas}
    chance = []
    for id in dataset.ids("train")[:: constants.every]:
        image = normalise(to_tensor(load_image(dataset.images("train") / f"{id}.png"))[None])
        truth = torch.from_numpy(load_label(dataset.labels("train") / f"{id}.png", dataset.num_classes))
        features = model.backbone(image)[2]
        small = F.interpolate(image, features.shape[-2:], mode="bilinear", align_corners=True)
        projected = model.prc.projection(torch.cat([small, features], 1))
        for name, vectors in (("features", features), ("projected features", projected)):
            rows = F.normalize(vectors, dim=1).flatten(2)[0]
            cosines[name].append((rows.T @ rows).flatten()[::17])  # a sample: quantiles take at most 2^24 values
        planes = torch.stack([truth == c for c in range(dataset.num_classes)]).float()
        shares = F.adaptive_avg_pool2d(planes, features.shape[-2:]).flatten(1)  # (K,N) of each cell
        same = shares.T @ shares  # that two pixels of these cells agree
        objects = shares[np.arange(len(shares)) != background].sum(0) > 0.5
        chance.append(same.mean(0)[objects])
        for gamma in constants.gammas:
            model.prc.gamma = gamma
            affinity = model.prc.affinity(features, image)[0]
            kept[gamma].append((affinity > 0).sum(0).float())
            weight[gamma].append((affinity * same).sum(0)[objects])
    for name, values in cosines.items():
        found = torch.cat(values).quantile(torch.tensor(QUANTILES)).tolist()
        print(f"cosines of {name}, quantiles {QUANTILES}: {', '.join(f'{value:.2f}' for value in found)}")
    print(f"weight on the same class at objects, cells chosen at random: {torch.cat(chance).mean():.3f}")
    print("| gamma | cells kept | of | weight on the same class at objects |\n|---|---|---|---|")
    for gamma in constants.gammas:
        cells = len(kept[gamma][0])
        print(f"| {gamma:g} | {torch.cat(kept[gamma]).mean():.1f} | {cells} | {torch.cat(weight[gamma]).mean():.3f} |")


def main(constants: Constants) -> None:
    torch.set_num_threads(1)
    dataset = load_dataset(constants.dataset, constants.root)
    background = -1 if dataset.background is None else dataset.background  # without one all cells are objects
    folders = [experiment_folder(constants.root, dataset.name, experiment) for experiment in constants.experiments]
    for folder in folders:
        require(folder / "cams")
    if background >= 0:
        print("| | mIoU | on the true background | foreground IoU | recall | precision |\n|---|---|---|---|---|---|")
        for folder in folders:
            print(f"| {folder.name} | {separation(dataset, folder / 'cams', background)} |")
    for folder in folders:
        if (folder / "classifier").exists():
            print(f"\n{folder.name}")
            affinities(dataset, folder / "classifier", background, constants)


if __name__ == "__main__":
    run(main, Constants, __doc__)
