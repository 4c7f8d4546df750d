"""Results on a GPU against those on the CPU, memory that really runs out, and all steps on the GPU.

Run by make test-gpu. PRC_TEST_DEVICE=cpu python -m pytest -m cuda tries the tests themselves without a GPU.
"""

import copy
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inference_segmentation import summed_logits
from models.backbone import Backbone
from models.deeplab import DeepLabV3Plus
from PRC_SAM.generator import MaskGenerator, pack_bits
from PRC_SAM.get_se_map import Constants
from tests.small_sam import build_sam
from tests.steps import STEPS, Recipe, experiment, options, record
from tests.test_training import Fixed, classification, segmentation
from tools.command import explain
from tools.devices import make_accelerator, set_precision
from tools.logs import read_log
from tools.masks import pack_masks
from tools.training import Training

pytestmark = pytest.mark.cuda
DEVICE = torch.device(os.environ.get("PRC_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fp32():
    """Convolutions and products on the GPU in full float32."""
    before = torch.backends.cudnn.allow_tf32
    set_precision("fp32", DEVICE)
    yield
    torch.backends.cudnn.allow_tf32 = before


TRAININGS = pytest.mark.parametrize("training", [classification, segmentation], ids=lambda make: make.__name__)


def gradients(case, device, precision="fp32"):
    model, loss, images, targets = case
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = loss(model, images.to(device), targets.to(device))
    losses["loss"].backward()
    return losses, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@TRAININGS
def test_losses_and_gradients_equal_the_cpus(training):
    torch.manual_seed(0)
    case = training(64, 4)
    expected, ours = gradients(case, CPU), gradients(case, DEVICE)
    for name, value in expected[0].items():
        assert float(ours[0][name].detach()) == pytest.approx(float(value.detach()), rel=1e-4)
    for one, other in zip(ours[1], expected[1], strict=True):
        assert float((one.cpu() - other).norm()) <= 1e-2 * float(other.norm()) + 1e-6
    fast, _ = gradients(case, DEVICE, "bf16")
    assert float(fast["loss"].detach()) == pytest.approx(float(expected[0]["loss"].detach()), rel=0.05)


def train(case, folder, batches, micro_batch, between=lambda number: None):
    """One epoch of so many equal batches by the loop of the steps; between(number) before each part."""
    model, loss, images, targets = case
    args = Recipe(epochs=1, batch_size=len(images), micro_batch=micro_batch)
    patches = Fixed(images, targets, batches)
    step = SimpleNamespace(args=args, accelerator=make_accelerator("fp32", DEVICE.type), path=folder)
    with Training(step, model, patches) as course:
        for _ in course.epochs():
            for number, batch in enumerate(course.batches()):
                between(number)
                course.backward(**loss(course.model, *batch))
            between(-1)
    return read_log(folder / "log.jsonl")[0]["loss"]


@TRAININGS
def test_a_training_step_never_waits_for_the_gpu(training, tmp_path):
    """From the second batch on, up to the end of the epoch."""

    def between(number):
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")

    try:
        assert train(training(64, 4), tmp_path, 3, 2, between) > 0
    finally:
        between(-1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs memory that can be limited")
def test_memory_that_runs_out_ends_a_training_and_smaller_parts_fit(tmp_path):
    torch.manual_seed(0)
    case = segmentation(256, 16)

    def peak(micro_batch):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(case, tmp_path / f"peak{micro_batch}", 1, micro_batch)
        return torch.cuda.max_memory_reserved()

    peak(0)  # kernels chosen
    shutil.rmtree(tmp_path / "peak0")
    limit = (peak(0) + peak(4)) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            train(case, tmp_path / "whole", 1, 0)
        assert "--micro-batch" in explain(caught.value)
        train(case, tmp_path / "parts", 1, 4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_multi_scale_inference_equals_the_cpus():
    torch.manual_seed(0)
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True).eval()
    images = [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8) for size in ((24, 32), (48, 64), (72, 96))]
    (other,) = summed_logits(model, images, (48, 64), CPU)
    (one,) = summed_logits(model.to(DEVICE), images, (48, 64), DEVICE)
    torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_masks_on_the_gpu_are_packed_as_in_numpy():
    masks = torch.rand(5, 37, 41, generator=torch.Generator().manual_seed(0)) < 0.05
    expected = pack_masks(masks.numpy())
    np.testing.assert_array_equal(pack_bits(masks.to(DEVICE)).cpu().numpy(), expected.bits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sams_masks_equal_the_cpus(precision):
    """Random weights of a small Sam, all filters open: every point's masks, nearly all pixels equal."""
    torch.manual_seed(0)
    sam = build_sam()
    for parameter in sam.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (96, 70 + 20 * index, 3), dtype=np.uint8) for index in range(3)]
    settings = Constants(
        points_per_side=4, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1, images_at_once=2
    )
    on_cpu = MaskGenerator(sam, "fp32", settings)(images)
    on_gpu = MaskGenerator(copy.deepcopy(sam).to(DEVICE), precision, settings)(images)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert len(one) == len(other) == 48
        tolerance = 1e-3 if precision == "fp32" else 5e-2
        np.testing.assert_allclose(one.predicted_iou, other.predicted_iou, rtol=tolerance, atol=tolerance)
        areas = np.abs(np.sort(one.areas) - np.sort(other.areas)).mean() / other.areas.mean()
        assert areas <= (1e-2 if precision == "fp32" else 0.2)


def test_all_steps_run_on_the_gpu(tmp_path, make_tiny_dataset, run_script):
    make_tiny_dataset(tmp_path)
    place = ("--dataset", "tiny", "--root", tmp_path)
    run_script("datasetsprocess/process.py", *place)
    run_script("PRC_SAM/get_se_map.py", *place, "--generator", "felzenszwalb", "--workers", 0)
    for script, (folder, constants, _, _) in STEPS.items():
        constants = {name: "auto" if name == "precision" else value for name, value in constants.items()}
        started = run_script(f"{script}.py", *place, *options(constants | {"device": DEVICE.type}))
        run = record(experiment(tmp_path) / folder)
        assert run["finished"] and DEVICE.type in run["device"], started.stdout
