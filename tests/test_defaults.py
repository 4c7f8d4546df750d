"""The paper's constants and the shipped descriptions, written out a second time: a changed figure must show here."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass

import pytest

from PRC_SAM.checkpoints import OFFICIAL, URL
from tests.conftest import ROOT
from tools.constants import Machine, may_change
from tools.dataset import load_dataset

SCALES = (0.5, 1.0, 1.5, 2.0)
DEFAULTS = {  # script -> the constants that decide about its results
    "train_classification": {
        "protocol": "clean",
        "backbone": "resnet50",
        "weights": "imagenet",
        "train_all": False,
        "gamma": None,  # the data set's
        "iterations": 1,
        "ir_weight": 0.1,
        "tiles": 4,
        "epochs": 20,
        "batch_size": 8,
        "lr": 0.1,
        "momentum": 1e-4,  # the released optimiser receives this, not 0.9
        "weight_decay": 1e-4,
        "seed": 0,
    },
    "infer_classification": {"split": "train", "scales": SCALES, "iterations": None, "classifier": ""},
    "make_pseudo_labels": {
        "split": "train",
        "crf_iterations": 10,
        "gaussian_sigma": 1.0,
        "gaussian_weight": 3.0,
        "bilateral_sigma_xy": 67.0,
        "bilateral_sigma_rgb": 3.0,
        "bilateral_weight": 4.0,
        "background": "cam",
    },
    "generate_refined_pseudo": {"split": "train", "tau": None},
    "train_segmentation": {
        "protocol": "clean",
        "labels": "refined_pseudo_labels",
        "backbone": "resnet50",
        "weights": "imagenet",
        "freeze_norm": True,
        "width": 256,
        "epochs": 50,
        "batch_size": 16,
        "lr": 0.007,
        "momentum": 4e-5,  # the released optimiser receives its weight decay here
        "weight_decay": 4e-5,
        "seed": 0,
    },
    "inference_segmentation": {"split": "test", "scales": SCALES},
    "generate_refined_seg": {"protocol": "clean", "split": "test", "tau": None},
    "PRC_SAM.get_se_map": {  # SAM's own defaults
        "generator": "sam",
        "model": "vit_h",
        "points_per_side": 32,
        "pred_iou_thresh": 0.88,
        "stability_score_thresh": 0.95,
        "stability_score_offset": 1.0,
        "box_nms_thresh": 0.7,
        "crop_n_layers": 0,
        "crop_nms_thresh": 0.7,
        "crop_overlap_ratio": 512 / 1500,
        "crop_n_points_downscale_factor": 1,
        "min_mask_region_area": 0,
    },
    "evaluate_miou": {"protocol": "clean"},
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_constants_of_the_paper(script):
    args = importlib.import_module(script).Constants()
    assert {name: getattr(args, name) for name in DEFAULTS[script]} == DEFAULTS[script]


EVERYWHERE = {field.name for field in fields(Machine)}  # the constants that every step has


def constants_of(script):
    """Names of the other constants of a script."""
    return {field.name for field in fields(importlib.import_module(script).Constants)} - EVERYWHERE


@pytest.mark.parametrize("script", [*DEFAULTS, "datasetsprocess.process", "segment_scene"])
def test_the_constants_of_a_script_stand_at_its_top(script):
    """Each with its default as a plain value, not as a name or a call that hides the value in another file."""
    text = (ROOT / f"{script.replace('.', '/')}.py").read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Constants"]
    defaults = {node.target.id: node.value for node in block.body if isinstance(node, ast.AnnAssign)}
    assert constants_of(script) <= defaults.keys()
    for name, default in defaults.items():
        parts = ast.walk(default) if default and name not in EVERYWHERE else ()
        assert not any(isinstance(part, ast.Name | ast.Call) for part in parts), name


def parameters_with_default(module):
    """(function or class, name) of each parameter and field in a module that has a default."""
    members = [member for member in vars(module).values() if getattr(member, "__module__", "") == module.__name__]
    for member in members:
        if is_dataclass(member):
            yield from ((member.__name__, field.name) for field in fields(member) if field.default is not MISSING)
        for function in (member, *(vars(member).values() if isinstance(member, type) else ())):
            if inspect.isfunction(function):
                parameters = inspect.signature(function).parameters.values()
                yield from ((function.__qualname__, p.name) for p in parameters if p.default is not p.empty)


@pytest.mark.parametrize("folder", ["models", "PRC_SAM"])
def test_a_constant_has_no_second_default(folder):
    """It would silently replace a constant that a script forgets to hand on."""
    tuned = set()
    for script in DEFAULTS:
        tuned |= constants_of(script) - may_change(importlib.import_module(script).Constants())
    for path in sorted((ROOT / folder).glob("[!_]*.py")):
        if path.stem != "get_se_map":
            module = importlib.import_module(f"{folder}.{path.stem}")
            assert not [place for place in parameters_with_default(module) if place[1] in tuned], path.name


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot restrict a process to some cores")
def test_no_more_workers_than_cores():
    """DataLoader warns of more; a job scheduler may give a program fewer cores than the machine has."""
    program = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "import reproduce_tables, train_segmentation\n"
        "from datasetsprocess.cutting import Cutting\n"
        "print(*(script().workers for script in (reproduce_tables.Constants, train_segmentation.Constants, Cutting)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["1"] * 3


@pytest.mark.parametrize(
    ("name", "gamma", "pseudo_labels", "segmentation"),
    [("vaihingen", 0.7, 0.9, 0.85), ("potsdam", 0.7, 0.9, 0.85), ("isaid", 0.6, 0.9, 0.1), ("demo", 0.7, 0.9, 0.85)],
)
def test_gamma_and_tau_of_each_data_set(tmp_path, name, gamma, pseudo_labels, segmentation):
    """The constants of steps 1, 4 and 7 are None (above), and so the data set's."""
    method = load_dataset(name, tmp_path).method
    assert (method.gamma, method.tau_pseudo_labels, method.tau_segmentation) == (gamma, pseudo_labels, segmentation)


ISPRS = [
    ("ImSurf", (255, 255, 255)),
    ("Building", (0, 0, 255)),
    ("LowVeg", (0, 255, 255)),
    ("Tree", (0, 255, 0)),
    ("Car", (255, 255, 0)),
    ("Clutter", (255, 0, 0)),
]
ISAID = [
    ("background", (0, 0, 0)),
    ("Ground_Track_Field", (0, 63, 255)),
    ("Soccer_ball_field", (0, 127, 191)),
    ("Small_Vehicle", (0, 0, 127)),
    ("ship", (0, 0, 63)),
    ("Bridge", (0, 127, 63)),
    ("basketball_court", (0, 63, 191)),
    ("baseball_diamond", (0, 63, 0)),
    ("Roundabout", (0, 191, 127)),
    ("plane", (0, 127, 255)),
    ("tennis_court", (0, 63, 127)),
    ("Large_Vehicle", (0, 127, 127)),
    ("storage_tank", (0, 63, 63)),
    ("Harbor", (0, 100, 155)),
    ("Swimming_pool", (0, 0, 255)),
    ("Helicopter", (0, 0, 191)),
]
CROPS = {"rare_class": "Car", "rare_share": 0.1, "crop_side": [0.375, 0.5]}
DESCRIPTIONS = {  # name -> patch size and stride, classes, train scenes, test scenes, rules, the paper's figures
    "vaihingen": (
        128,
        ISPRS,
        "1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37",
        "2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38",
        CROPS,
        {"miou": 63.85, "share_of_supervised": 89.25, "supervised": 71.54},
    ),
    "potsdam": (
        256,
        ISPRS,
        "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_10 6_11 6_12 6_7 6_8 6_9 7_11 7_12 7_7 7_8 7_9",
        "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13",
        {"min_share": 0.1, "min_share_of": {"Car": 0.025}},
        {"miou": 71.2, "share_of_supervised": 89.02, "supervised": 79.98},
    ),
    "isaid": (
        512,
        ISAID,
        "",
        "",
        {
            "background": "background",
            "patches_per_scene": [6, 7, 8],
            "tries": 100,
            "max_background": {"train": 0.98, "test": 0.9},
        },
        {"miou": 40.96, "share_of_supervised": 65.66, "supervised": 62.38},
    ),
    "demo": (128, ISPRS, "1 2 3 4 5 6 7 8 9", "10 11 12", CROPS, {}),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_come_with_the_project(tmp_path, name):
    size, classes, train, test, rules, paper = DESCRIPTIONS[name]
    dataset = load_dataset(name, tmp_path)
    assert dataset.patch_size == dataset.stride == size
    assert list(zip(dataset.classes, map(tuple, dataset.colours.tolist()), strict=True)) == classes
    assert dataset.ignore_colours.tolist() == ([] if name == "isaid" else [[0, 0, 0]])
    assert dataset.left_out_of_mean == (() if name == "isaid" else ("Clutter",))
    scenes = {split: sorted(dataset.scenes.get(split, [])) for split in ("train", "test")}
    assert scenes == {"train": sorted(train.split()), "test": sorted(test.split())}
    assert dataset.rules == rules and dataset.paper == paper


def test_checkpoints_of_sam():
    assert URL == "https://dl.fbaipublicfiles.com/segment_anything/"
    assert OFFICIAL == {
        "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
        "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
        "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    }
