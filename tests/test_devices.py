"""The choice of device and precision; and every computation on tensors of a GPU that is not there.

The second half runs under torch's FakeTensorMode: tensors have a shape, a type and a device, here "cuda:0", but no
values. An operation on tensors of different devices fails as on a GPU. Backward passes, the fused optimiser and sparse
matrices cannot be run so.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer_classification import class_maps
from inference_segmentation import summed_logits
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from models.ir_loss import image_reconstruction_loss
from models.prc import PixelRelationshipConstraint
from PRC_SAM.generator import MaskGenerator, pack_bits
from PRC_SAM.get_se_map import Constants
from tests.small_sam import build_sam
from tools import augment, devices
from tools.command import UserError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.skipif("PRC_TEST_DEVICE" in os.environ, reason="these tests were asked to use a GPU")
def test_tests_and_the_programs_that_they_start_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


@pytest.fixture
def machine(monkeypatch):
    """machine(built, usable, signs): a torch built for that CUDA version (None: for the CPU), GPUs that it can use."""

    def set_up(built, usable, signs=""):
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(devices, "signs_of_a_gpu", lambda: signs)

        def init():
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update.")

        monkeypatch.setattr(torch.cuda, "init", init)

    return set_up


@pytest.mark.parametrize(("built", "signs"), [("13.2", ""), (None, "nvidia-smi lists a GPU"), (None, "")])
def test_auto_is_the_cpu_where_no_gpu_shows_or_torch_was_built_for_the_cpu(machine, built, signs):
    machine(built, 0, signs)
    state = devices.process_state("auto")
    assert state.device == CPU
    line = devices.start_line(state, "fp32")
    assert "fp32" in line and line.endswith("no GPU was found" if built else "built for the CPU alone")
    assert "GPU" not in devices.start_line(state, "fp32", "cpu")


def test_auto_does_not_pass_over_a_gpu_that_torch_cannot_use(machine):
    machine("13.2", 0, "nvidia-smi lists NVIDIA GeForce RTX 3090 with driver 535.104.05")
    with pytest.raises(UserError, match=r"CUDA 13\.2\) .* too old .*12020.* 535\.104"):
        devices.process_state("auto")
    assert devices.process_state("cpu").device == CPU


@pytest.mark.parametrize(
    ("device", "usable", "word"), [("cuda", 0, "--device cpu"), ("cuda:2", 2, "cuda:0 to cuda:1"), ("mps", 0, "Apple")]
)
def test_a_device_that_is_missing_is_refused(machine, device, usable, word):
    machine("13.2", usable)
    with pytest.raises(UserError, match=f"^device is {device}, .*{word}"):
        devices.process_state(device)


def test_one_gpu_cannot_serve_several_processes(machine, monkeypatch):
    machine("13.2", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"device is cuda:1, .*processes"):
        devices.process_state("cuda:1")


def test_a_gpu_that_fails_at_the_first_sum_is_explained(machine, monkeypatch):
    def ones(*_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GTX 1080")
    with pytest.raises(UserError, match=r"cuda:0 \(NVIDIA GTX 1080\) .*unspecified launch failure;"):
        devices._try_out(GPU)


@pytest.mark.parametrize(
    ("visible", "listed", "sign"),
    [
        (None, [], ""),
        ("NoDevFiles", ["RTX, 535"], ""),
        ("0", [], 'CUDA_VISIBLE_DEVICES is "0"'),
        (None, ["RTX 3090, 535.104"], "nvidia-smi lists RTX 3090 with driver 535.104"),
    ],
)
def test_signs_of_a_gpu(monkeypatch, visible, listed, sign):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: listed)
    monkeypatch.setattr(devices.Path, "glob", lambda *_: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.signs_of_a_gpu() == sign


@pytest.mark.parametrize(
    ("capabilities", "training", "sam"),
    [({}, "fp32", "fp32"), ({"avx512_bf16": True}, "bf16", "fp32"), ({"amx_bf16": True}, "bf16", "fp32")],
)
def test_auto_is_bf16_where_the_cpu_computes_in_it(monkeypatch, capabilities, training, sam):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # restored at the end
    assert devices.set_precision("auto", CPU) == training
    assert devices.set_precision("auto", CPU, bf16_on_cpu=False) == sam
    assert devices.set_precision("bf16", CPU) == "bf16" and devices.set_precision("fp32", CPU) == "fp32"
    assert devices.set_precision("auto", torch.device("mps")) == "fp32"


def test_fp32_is_not_rounded_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # restored at the end
    devices.set_precision("fp32", CPU)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    devices.set_precision("bf16", CPU)
    assert torch.backends.cudnn.allow_tf32


def test_facts_for_run_json(monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA H100, 570.86"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    properties = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    expected = {"driver": "570.86", "capability": "sm_90", "memory_gib": 80}
    assert devices.device_facts(GPU).items() >= expected.items()
    line = devices.start_line(SimpleNamespace(device=GPU, num_processes=2), "bf16")
    assert all(words in line for words in ("NVIDIA H100 (cuda:0, 80 GiB)", "bf16", "2 processes"))


# On a GPU that is not there

PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@pytest.fixture
def fake_gpu(monkeypatch):
    """Every tensor made in the test is fake; autocast works as where there is a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    augment._statistics.cache_clear()
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        yield
    augment._statistics.cache_clear()


def moved(model):
    """model.to("cuda"), which fake tensors do not allow."""
    for module in model.modules():
        for name, value in module._parameters.items():
            module._parameters[name] = value if value is None else nn.Parameter(value.to(GPU), value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = value if value is None else value.to(GPU)
    return model


def autocast(precision):
    return torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")


def check(tensors, dtype=torch.float32):
    assert tensors
    for tensor in tensors:
        assert tensor.device == GPU and tensor.dtype == dtype, tensor


class Types(TorchDispatchMode):
    """`seen` holds the types of all results that are computed inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.seen |= {found.dtype for found in tree_leaves(result) if isinstance(found, torch.Tensor)}
        return result


@PRECISIONS
def test_models_and_their_losses(fake_gpu, precision):
    classifier = moved(Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=False))
    segmenter = moved(DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True))
    images, image_labels = torch.empty(2, 3, 64, 64, device=GPU), torch.ones(2, 3, device=GPU)
    labels = torch.empty(2, 64, 64, dtype=torch.long, device=GPU)
    computed = torch.bfloat16 if precision == "bf16" else torch.float32
    with autocast(precision):
        logits, maps = classifier(images)
        check([logits, segmenter.backbone(images)[2]], computed)
        classification = F.multilabel_soft_margin_loss(logits.float(), image_labels)
        reconstruction = image_reconstruction_loss(maps, images, image_labels, tiles=4)
        logits = segmenter(images)
        segmentation = F.cross_entropy(logits.float(), labels, ignore_index=255, reduction="sum")
    check([maps, classification, reconstruction, logits, segmentation])


def test_prc_and_ir_compute_in_fp32_under_autocast(fake_gpu):
    """The threshold on the affinity must not depend on rounding to bf16."""
    prc, images = moved(PixelRelationshipConstraint(8, 0.7, 1)), torch.empty(2, 3, 64, 64, device=GPU)
    features, labels = torch.empty(2, 8, 4, 4, device=GPU), torch.ones(2, 3, device=GPU)
    with autocast("bf16"), Types() as types:
        maps = prc(features[:, :3], features, images)
        loss = image_reconstruction_loss(maps, images, labels, tiles=4)
        assert torch.bfloat16 not in types.seen
        features @ features
        assert torch.bfloat16 in types.seen  # as any other product here
    check([maps, loss])


@PRECISIONS
def test_multi_scale_inference(fake_gpu, precision):
    classifier = moved(Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=False))
    segmenter = moved(DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True))
    images = [torch.empty(2, 3, *size, dtype=torch.uint8) for size in ((24, 32), (48, 64), (72, 96))]
    with autocast(precision):
        maps = class_maps(classifier, images, GPU)
        logits = summed_logits(segmenter, images, (48, 64), GPU)
    check([*maps, *logits])
    assert [tuple(scale.shape) for scale in maps] == [(2, 3), (2, 3, 2, 2), (2, 3, 3, 4), (2, 3, 5, 6)]
    assert logits[0].shape == (2, 3, 48, 64)


@PRECISIONS
def test_sam(fake_gpu, precision):
    sam = moved(build_sam())
    generator = MaskGenerator(sam, precision, Constants(points_per_side=4, images_at_once=2))
    size, (crop,) = generator.prepare(np.zeros((96, 70, 3), np.uint8))
    seen = []
    sam.image_encoder.neck[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        embeddings = list(generator._encode([crop.pixels] * 3))
        tokens = generator.tokens(crop.layer, size)
        scores, mask_tokens, pixels = generator.decoder.transform(embeddings[0], tokens)
        logits = generator.decoder.masks(mask_tokens, pixels)
        rows, columns = generator.resampling(crop.pixels.shape[1:], size)
        full = (rows @ logits @ columns.T).flatten(0, 1)
    check([*seen, *embeddings, tokens, scores, mask_tokens, pixels, logits, full])
    assert len(embeddings) == 3 and embeddings[0].shape == (32, 8, 8) and full.shape == (48, 96, 70)
    check([pack_bits(full > sam.mask_threshold)], torch.uint8)
