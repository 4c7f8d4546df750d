"""How many planted label errors the review finds, and what they cost in mIoU of the pseudo-labels.

A share of the train labels of the demo (each the presence of one class in one patch) is flipped at random. Steps 1 and
2 are run with them, and the labels are ranked by how much the classifier contradicts them. A person who checks the
first of them against the truth corrects the flipped ones; steps 1 to 3 are run with true, flipped and corrected labels.
About 8 minutes of one CPU core for each entry of `epochs`.

Command: OMP_NUM_THREADS=1 python benchmarks/label_review.py
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
from tools.dataset import Dataset, load_dataset
from tools.image_labels import write_image_labels
from tools.labels import load_label
from tools.review import average_precision, doubt, read_logits
from tools.scores import ConfusionMatrix


@dataclass(frozen=True)
class Constants:
    root: Path | None = None  # a folder to work in, for a second run with other constants; None: a temporary one
    wrong: float = 0.05  # share of the labels that is flipped
    checked: float = 0.05  # share of the labels, most doubtful first, that a person checks and corrects
    epochs: tuple[int, ...] = (3,)  # of step 1; one experiment each
    pseudo_labels: bool = True  # measure the cost as well; False: only how many errors are found
    workers: int = 0
    seed: int = 0  # of the flips and of the trainings


def go(script: str, root: Path, *words: str) -> None:
    """Run one of the project's scripts; its output is shown where it fails."""
    command = [sys.executable, str(PROJECT / script), "--root", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def plant(labels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """(N,K) bool -> the labels with a share of them flipped; every patch keeps a class."""
    flipped, left = labels.copy(), round(share * labels.size)
    for place in random.permutation(labels.size):
        row, k = np.unravel_index(place, labels.shape)
        if left and flipped[row].sum() - flipped[row, k] > 0:
            flipped[row, k] = ~flipped[row, k]
            left -= 1
    return flipped


class Trial:
    """The demo's train split with one set of labels after another."""

    def __init__(self, dataset: Dataset, epochs: int, args: Constants):
        self.dataset, self.epochs, self.args = dataset, epochs, args
        self.root, self.ids = dataset.folder.parents[1], dataset.ids("train")

    def step(self, script: str, name: str, *words: str) -> None:
        workers = ("--workers", str(self.args.workers))
        go(script, self.root, "--dataset", "demo", "--experiment", name, *workers, *words)

    def logits(self, name: str, labels: np.ndarray) -> np.ndarray:
        """(N,K): what the classifier says that was trained on these labels. Steps 1 and 2."""
        by_id = dict(zip(self.ids, labels, strict=True))
        write_image_labels(self.dataset.image_labels_file("train"), self.dataset.classes, by_id)
        recipe = ["--backbone", "resnet18", "--weights", "none", "--train-all", "--lr", "0.003", "--momentum", "0.9"]
        recipe += ["--epochs", str(self.epochs), "--seed", str(self.args.seed)]
        self.step("train_classification.py", name, *recipe)
        self.step("infer_classification.py", name, "--scales", "1.0", "1.5", "2.0")
        logits = read_logits(self.root / "experiments/demo" / name / "cams", self.ids, self.dataset.num_classes)
        return np.stack([logits[id] for id in self.ids])

    def miou(self, name: str) -> float:
        """mIoU of the pseudo-labels of these CAMs, in per cent. Step 3."""
        self.step("make_pseudo_labels.py", name)
        classes = self.dataset.num_classes
        matrix, folder = ConfusionMatrix(classes), self.root / "experiments/demo" / name / "pseudo_labels"
        for id in self.ids:
            truth = load_label(self.dataset.labels("train") / f"{id}.png", classes)
            matrix.update(truth, load_label(folder / f"{id}.png", classes))
        return 100 * matrix.scores(np.flatnonzero(~self.dataset.scored))["miou"]


def correct(truth: np.ndarray, labels: np.ndarray, logits: np.ndarray, share: float) -> np.ndarray:
    """Print how many of the wrong labels are among the first; -> the labels with those corrected."""
    wrong, ranked = truth != labels, doubt(labels, logits)
    first = np.zeros(labels.shape, bool)
    first.flat[np.argsort(-ranked, axis=None, kind="stable")[: round(share * labels.size)]] = True
    for words, kind in (("all", labels | ~labels), ("missing classes", ~labels), ("classes too many", labels)):
        part = first[wrong & kind]
        print(f"  {words}: {part.sum()} of {part.size} found, {part.mean():.0%}; by chance {share:.0%}")
    precision = average_precision(wrong.ravel(), ranked.ravel())
    print(f"  average precision of the whole order {precision:.2f}; by chance {wrong.mean():.2f}", flush=True)
    return np.where(first, truth, labels)


def main(args: Constants) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = args.root or Path(temporary)
        if not (root / "datasets" / "demo" / "train" / "images").exists():
            go("datasetsprocess/make_demo_scenes.py", root)
            go("datasetsprocess/vaihingen_patch_split.py", root, "--dataset", "demo")
        go("datasetsprocess/process.py", root, "--dataset", "demo", "--overwrite")
        dataset = load_dataset("demo", root)
        image_labels = dataset.image_labels("train")
        truth = np.stack([image_labels[id] for id in sorted(image_labels)])
        flipped = plant(truth, args.wrong, np.random.default_rng(args.seed))
        print(f"{(truth != flipped).sum()} of {truth.size} labels of {len(truth)} patches are flipped")
        for epochs in args.epochs:
            trial = Trial(dataset, epochs, args)
            print(f"{epochs} epochs, among the {args.checked:.0%} of the labels that are most doubtful:")
            logits = trial.logits(f"flipped_{epochs}", flipped)
            corrected = correct(truth, flipped, logits, args.checked)
            if args.pseudo_labels:
                scores = {"flipped": trial.miou(f"flipped_{epochs}")}
                for name, labels in (("corrected", corrected), ("true", truth)):
                    trial.logits(f"{name}_{epochs}", labels)
                    scores[name] = trial.miou(f"{name}_{epochs}")
                words = ", ".join(f"{name} labels {score:.2f}" for name, score in scores.items())
                print(f"  mIoU of the pseudo-labels, train split: {words}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
