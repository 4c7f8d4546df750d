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
from tools.command import UserError, explain
from tools.constants import Place
from tools.folders import StepFolder

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
    assert line.endswith(
        "precision: fp32; " + ("no GPU was found" if built else "this torch is built for the CPU alone")
    )
    assert "GPU" not in devices.start_line(state, "fp32", "cpu")


def test_auto_does_not_pass_over_a_gpu_that_torch_cannot_use(machine):
    machine("13.2", 0, "nvidia-smi lists NVIDIA GeForce RTX 3090 with driver 535.104.05")
    with pytest.raises(UserError, match=r"built for CUDA 13\.2\) cannot use a GPU: .* too old .*12020.* 535\.104"):
        devices.process_state("auto")
    assert devices.process_state("cpu").device == CPU


@pytest.mark.parametrize(
    ("device", "usable", "sentence"),
    [
        ("cuda", 0, r"device is cuda, .* too old .*--device cpu"),
        ("cuda:2", 2, r"device is cuda:2, .*cuda:0 to cuda:1"),
        ("mps", 0, r"device is mps, .*Apple"),
    ],
)
def test_a_device_that_is_missing_is_refused(machine, device, usable, sentence):
    machine("13.2", usable)
    with pytest.raises(UserError, match=f"^{sentence}"):
        devices.process_state(device)


def test_one_gpu_cannot_serve_several_processes(machine, monkeypatch):
    machine("13.2", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device is cuda:1, but several processes need a GPU each"):
        devices.process_state("cuda:1")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with", "another program"),
        ("CUDA error: unspecified launch failure\nCUDA kernel errors might", "unspecified launch failure;"),
    ],
)
def test_a_gpu_that_fails_at_the_first_sum_is_explained(monkeypatch, error, sentence):
    def ones(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GTX 1080")
    with pytest.raises(UserError, match=rf"cuda:0 \(NVIDIA GTX 1080\) .*{sentence}"):
        devices._try_out(GPU)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might", "micro_batch"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "micro_batch"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "micro_batch"),
        ("CUDA error: no kernel image is available for execution on the device", "sm_75"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "driver"),
        ("CUDA error: an illegal memory access was encountered", ""),
    ],
)
def test_errors_of_a_gpu_in_the_middle_of_a_run_are_explained(error, sentence):
    explanation = explain(RuntimeError(error))
    assert sentence in explanation and bool(sentence) == bool(explanation)


@pytest.mark.parametrize(
    ("visible", "listed", "sign"),
    [
        (None, [], ""),
        ("", ["RTX, 535"], ""),
        ("NoDevFiles", ["RTX, 535"], ""),
        ("0", [], 'CUDA_VISIBLE_DEVICES is "0"'),
        (None, ["NVIDIA GeForce RTX 3090, 535.104"], "nvidia-smi lists NVIDIA GeForce RTX 3090 with driver 535.104"),
    ],
)
def test_signs_of_a_gpu(monkeypatch, visible, listed, sign):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: listed)
    monkeypatch.setattr(devices.Path, "glob", lambda *_: [])
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
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


def test_fp32_is_not_rounded_to_tf32():
    try:
        devices.set_precision("bf16", CPU)
        assert torch.backends.cudnn.allow_tf32
        devices.set_precision("fp32", CPU)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_facts_for_run_json(monkeypatch):
    assert devices.device_facts(CPU).keys() == {"device", "name", "threads"}
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA H100, 570.86"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    properties = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    facts = devices.device_facts(GPU)
    assert facts["driver"] == "570.86" and facts["capability"] == "sm_90" and facts["memory_gib"] == 80
    assert {facts["tf32_in_convolutions"], facts["tf32_in_products"]} <= {True, False} and "cudnn" in facts
    line = devices.start_line(SimpleNamespace(device=GPU, num_processes=2), "bf16")
    assert line == "device: NVIDIA H100 (cuda:0, 80 GiB); precision: bf16; 2 processes"


def test_a_run_continues_on_another_device_in_its_precision(tmp_path):
    def run(precision):
        with StepFolder(tmp_path / "segmenter", Place()).open(".pt", settings={"precision": precision}):
            pass

    run("bf16")
    with pytest.raises(UserError, match=r"bf16 there, fp32 now\): --precision bf16 continues it, --overwrite"):
        run("fp32")
    run("bf16")


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
    """model.to("cuda"), which fake tensors do not allow: what torch would move, and nothing else."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.to(GPU), value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(GPU)
    return model


def autocast(precision):
    return torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")


def check(tensors, dtype=torch.float32):
    assert tensors
    for tensor in tensors:
        assert tensor.device == GPU and tensor.dtype == dtype, tensor


def kind(precision):
    return torch.bfloat16 if precision == "bf16" else torch.float32


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
def test_classifier_and_its_losses(fake_gpu, precision):
    model = moved(Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=False))
    images, labels = torch.empty(2, 3, 64, 64, device=GPU), torch.ones(2, 3, device=GPU)
    with autocast(precision):
        logits, maps = model(images)
        classification = F.multilabel_soft_margin_loss(logits.float(), labels)
        reconstruction = image_reconstruction_loss(maps, images, labels, tiles=4)
    check([logits], kind(precision))
    check([maps, classification, reconstruction])


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
def test_segmenter_and_its_loss(fake_gpu, precision):
    model = moved(DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True))
    images, labels = torch.empty(2, 3, 64, 64, device=GPU), torch.empty(2, 64, 64, dtype=torch.long, device=GPU)
    with autocast(precision):
        check([model.backbone(images)[2]], kind(precision))
        logits = model(images)
        check([logits, F.cross_entropy(logits.float(), labels, ignore_index=255, reduction="sum")])


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
