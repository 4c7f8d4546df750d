"""What the tests of steps 1 to 7 share: the small constants of each, and running one in this process."""

import filecmp
import importlib
import json
from pathlib import Path

import torch

from tools.constants import Count, MayChange, Place, PositiveCount, Seed, checked_constants

TRAIN, TEST = [f"train_{index}" for index in range(10)], [f"test_{index}" for index in range(4)]
SMALL = {
    "backbone": "resnet18",
    "weights": "none",
    "epochs": 1,
    "batch_size": 5,
    "lr": 0.01,
    "workers": 0,
    "samples": 2,
    "precision": "fp32",  # so that weights can be compared bit by bit
}
STEPS = {  # script -> folder, constants, ids, suffix
    "train_classification": ("classifier", SMALL | {"train_all": True}, None, ".pt"),
    "infer_classification": ("cams", {"workers": 1, "samples": 2, "precision": "fp32"}, TRAIN, ".npz"),
    "make_pseudo_labels": ("pseudo_labels", {"workers": 1, "samples": 2}, TRAIN, ".png"),
    "generate_refined_pseudo": ("refined_pseudo_labels", {"workers": 0, "samples": 2}, TRAIN, ".png"),
    "train_segmentation": ("segmenter", SMALL | {"freeze_norm": False, "width": 16}, None, ".pt"),
    "inference_segmentation": ("segmentation", {"workers": 0, "samples": 2, "precision": "fp32"}, TEST, ".png"),
    "generate_refined_seg": ("refined_segmentation", {"workers": 0, "samples": 2}, TEST, ".png"),
}


@checked_constants
class Recipe(Place):
    """What a training asks of its constants."""

    weights: str = "none"
    epochs: PositiveCount = 3
    batch_size: PositiveCount = 4
    micro_batch: Count = 0
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-3
    seed: Seed = 0
    compile: MayChange[bool] = False
    workers: MayChange[Count] = 0


def options(constants):
    """{"train_all": True, "epochs": 1} -> --train-all --epochs 1"""
    words = []
    for name, value in constants.items():
        option = name.replace("_", "-")
        words += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", value]
    return words


def experiment(root, name="prc"):
    return root / "experiments" / "tiny" / name


def record(folder):
    return json.loads((folder / "run.json").read_text())


def step(script, root, **constants):
    """The step in this process, which has torch loaded already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the programs run here, so that equal sums are added in equal order
    try:
        module = importlib.import_module(script)
        values = STEPS[script][1] | {"workers": 0} | constants
        given = module.Constants(dataset="tiny", root=root, **values)
        module.main(given)
        module.renew(given)
    finally:
        torch.set_num_threads(threads)


def same_results(one: Path, other: Path, suffix: str):
    names = sorted(path.name for path in one.glob(f"*{suffix}") if path.name != "checkpoint.pt")
    assert names == sorted(path.name for path in other.glob(f"*{suffix}") if path.name != "checkpoint.pt") and names
    if suffix == ".pt":
        states = [torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (one, other)]
        return all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names
