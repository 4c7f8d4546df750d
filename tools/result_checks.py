"""Warnings, one sentence each, about worthless results of steps that ended without an error."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.labels import IGNORE, load_label
from tools.pictures import sample_ids

MOST_READ = 400  # label maps that are read to estimate shares
NEARLY_ALL = 0.95  # of all pixels
HARDLY_ANY = 0.001  # of the pixels of the patches that have the class
FADED = 0.05  # of the class's share in the labels that the segmenter learnt from
SEEN_OFTEN = 0.05  # of the patches
BETTER_THAN_CHANCE = 0.2  # smallest gain of the average precision over chance, divided by min(chance, 1 - chance)
FALLEN = 0.98  # of the first epoch's loss
ADVICE = 'see "A few hundred patches" in docs/own_data.md'


def check_losses(rows: Sequence[dict[str, Any]], name: str = "loss") -> list[str]:
    """Whether the loss of a training, a row for each epoch, fell."""
    losses = [row[name] for row in rows if isinstance(row.get(name), float)]
    if len(losses) < 2 or losses[-1] < FALLEN * losses[0]:
        return []
    return [
        f"the {name} did not fall: {losses[0]:.3g} in the first epoch, {losses[-1]:.3g} in the last; change lr or "
        f"train for more epochs ({ADVICE})"
    ]


def check_classifier(rows: Sequence[dict[str, Any]], present: dict[str, float]) -> list[str]:
    """Whether the classifier learnt; `present`: class -> share of the train patches that have the class."""
    warnings, last = check_losses(rows, "classification"), rows[-1] if rows else {}
    if last.get("classification", 0) >= math.log(2):
        warnings.append(
            f"the classification loss ended at {last['classification']:.2f}, and guessing gives {math.log(2):.2f}: "
            "the class activation maps will be worthless; lower lr or train for more epochs; with --weights none also "
            f"set --momentum 0.9 ({ADVICE})"
        )
    precisions, blind = last.get("average_precision", {}), []
    for name, share in present.items():
        precision = precisions.get(name)
        useful = share + BETTER_THAN_CHANCE * min(share, 1 - share)
        if isinstance(precision, float) and 0 < share < 0.9 and precision < useful:
            blind.append(f"{name} ({precision:.2f}, chance {share:.2f})")
    if blind:
        warnings.append(
            f"the classifier hardly separates patches with these classes from patches without, by average precision: "
            f"{', '.join(blind)}; their maps will be worthless: train for more epochs, give more patches, or check "
            "their labels"
        )
    return warnings


def check_shares(
    shares: dict[str, float], present: dict[str, float], remedy: str, learnt: dict[str, float] | None = None
) -> list[str]:
    """Whether label maps use the classes; `shares`: class -> share of pixels, `present`: class -> share of patches.

    `learnt`: class -> share of pixels in the labels that the segmenter learnt from.
    """
    warnings, absent, learnt = [], [], learnt or {}
    for name, share in shares.items():
        if share > NEARLY_ALL and len(shares) > 1:
            warnings.append(f"one class, {name}, covers {share:.1%} of all pixels: {remedy}")
        frequency = present.get(name, 0)
        if frequency < SEEN_OFTEN or share >= max(HARDLY_ANY * frequency, FADED * learnt.get(name, 0)):
            continue
        places = f"in {frequency:.0%} of the train patches, on {share:.2%} of the pixels"
        if name in learnt:
            places += f", in the labels of step 5 on {learnt[name]:.2%}"
        absent.append(f"{name} ({places})")
    if absent:
        warnings.append(f"classes that are hardly ever found: {', '.join(absent)}: {remedy}")
    return warnings


def pixel_shares(folder: Path, ids: Sequence[str], classes: Sequence[str]) -> dict[str, float]:
    """class -> share of the labelled pixels in the label maps <folder>/<id>.png, estimated from `MOST_READ` of them."""
    counts = np.zeros(IGNORE + 1, np.int64)
    for id in sample_ids([id for id in ids if (folder / f"{id}.png").exists()], MOST_READ):
        counts += np.bincount(load_label(folder / f"{id}.png", len(classes)).ravel(), minlength=IGNORE + 1)
    labelled = max(int(counts[: len(classes)].sum()), 1)
    return {name: float(counts[k] / labelled) for k, name in enumerate(classes)}


def patch_shares(labels: dict[str, np.ndarray], classes: Sequence[str]) -> dict[str, float]:
    """class -> share of the patches that have the class; `labels`: id -> (K,) bool."""
    shares = np.mean(list(labels.values()), axis=0)
    return dict(zip(classes, shares.tolist(), strict=True))
