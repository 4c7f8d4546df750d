"""Results on a GPU against those on the CPU, memory that really runs out, and all steps on the GPU.

Run by make test-gpu. PRC_TEST_DEVICE=cpu python -m pytest -m cuda tries the tests themselves without a GPU.
"""

import copy
import os
from functools import partial

import numpy as np
import pytest
import torch

import train_classification
import train_segmentation
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from PRC_SAM.get_se_map import Constants, mask_generator
from PRC_SAM.mask_tensors import count_pixels, outer_boxes, pack_bits
from tests.small_sam import build_sam
from tests.steps import STEPS, record, experiment, options
from tools.map_files import mirrored_scales
from tools.devices import make_accelerator, set_precision
from tools.masks import pack_masks
from tools.memory import MicroBatches

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


def classification(size, count):
    model = Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=True)
    loss = partial(train_classification.compute_loss, ir_weight=0.1, tiles=4)
    return model, loss, torch.randn(count, 3, size, size), (torch.rand(count, 3) < 0.5).float()


def segmentation(size, count):
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True).eval()
    labels = torch.randint(0, 3, (count, size, size))
    labels[0, :9] = 255
    return model, train_segmentation.compute_loss, torch.randn(count, 3, size, size), labels


TRAININGS = pytest.mark.parametrize("training", [classification, segmentation])


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
    expected, found = gradients(case, CPU), gradients(case, DEVICE)
    for name, value in expected[0].items():
        assert float(found[0][name].detach()) == pytest.approx(float(value.detach()), rel=1e-4)
    for one, other in zip(found[1], expected[1], strict=True):
        assert float((one.cpu() - other).norm()) <= 1e-2 * float(other.norm()) + 1e-6
    fast, _ = gradients(case, DEVICE, "bf16")
    assert float(fast["loss"].detach()) == pytest.approx(float(expected[0]["loss"].detach()), rel=0.05)


@TRAININGS
def test_a_training_step_never_waits_for_the_gpu(training):
    model, loss, images, targets = training(64, 4)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    count = train_segmentation.labelled_pixels if training is segmentation else len
    step = MicroBatches(make_accelerator("fp32", DEVICE.type), loss, 2, count)
    for repeat in range(3):
        inputs = images.to(DEVICE), targets.to(DEVICE)
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if repeat else "default")
        try:
            losses = step(model, optimiser, *inputs)
            optimiser.step()
        finally:
            torch.cuda.set_sync_debug_mode("default") if DEVICE.type == "cuda" else None
    assert float(losses["loss"]) > 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs memory that can be limited")
def test_memory_that_runs_out_halves_the_micro_batch():
    torch.manual_seed(0)
    model, loss, images, labels = segmentation(256, 16)
    model = model.to(DEVICE)
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    arguments = model, optimiser, images.to(DEVICE), labels.to(DEVICE)
    accelerator = make_accelerator("fp32", DEVICE.type)

    def peak(size):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses = MicroBatches(accelerator, loss, size, train_segmentation.labelled_pixels)(*arguments)
        return float(losses["loss"]), torch.cuda.max_memory_reserved()

    peak(0)  # kernels chosen
    (expected, whole), (_, half) = peak(0), peak(8)
    step = MicroBatches(accelerator, loss, 0, train_segmentation.labelled_pixels)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((whole + half) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = step(*arguments)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= step.parts.size <= 8 and float(found["loss"]) == pytest.approx(expected, rel=1e-4)


def test_multi_scale_inference_equals_the_cpus():
    torch.manual_seed(0)
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True).eval()
    images = [torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8) for size in ((24, 32), (48, 64), (72, 96))]
    expected = mirrored_scales(model, images, CPU)
    found = mirrored_scales(model.to(DEVICE), images, DEVICE)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_masks_on_the_gpu_are_packed_counted_and_boxed_as_in_numpy():
    masks = torch.rand(5, 37, 41, generator=torch.Generator().manual_seed(0)) < 0.05
    expected = pack_masks(masks.numpy())
    np.testing.assert_array_equal(pack_bits(masks.to(DEVICE)).cpu().numpy(), expected.bits)
    np.testing.assert_array_equal(outer_boxes(masks.to(DEVICE)).cpu().numpy(), expected.boxes)
    np.testing.assert_array_equal(count_pixels(masks.to(DEVICE)).cpu().numpy(), expected.areas)


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
    on_cpu = mask_generator(settings, sam, "fp32")(images)
    on_gpu = mask_generator(settings, copy.deepcopy(sam).to(DEVICE), precision)(images)
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
