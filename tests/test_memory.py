"""Batches in parts: equal to the whole, halved when the memory is full, from clean gradients."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import train_classification
import train_segmentation
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from tests.steps import step
from tools import training
from tools.devices import make_accelerator
from tools.labels import IGNORE
from tools.memory import MicroBatches, Parts, memory_is_full

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
]


def classification():
    model = Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=True)
    loss = partial(train_classification.compute_loss, ir_weight=0.1, tiles=4)
    return model, loss, len, (torch.rand(5, 3) < 0.5).double()


def segmentation():
    """Labelled pixels differ between images, and one image has none."""
    labels = torch.randint(0, 3, (5, 32, 32))
    labels[0, 4:], labels[1, :, 9:], labels[3] = IGNORE, IGNORE, IGNORE
    return (
        DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True),
        train_segmentation.compute_loss,
        train_segmentation.labelled_pixels,
        labels,
    )


@pytest.fixture(params=[classification, segmentation], ids=lambda make: make.__name__)
def case(request):
    """Model in float64 with BatchNorm's statistics frozen and without dropout, loss, count, five images, targets."""
    torch.manual_seed(0)
    model, loss, count, targets = request.param()
    model.double().train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return model, loss, count, torch.randn(5, 3, 32, 32, dtype=torch.float64), targets


def run(case, size, loss=None):
    """-> losses, gradients, and the size in the end; gradients of an earlier batch are there at the start."""
    model, whole_loss, count, images, targets = case
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7) if parameter.requires_grad else None
    batches = MicroBatches(make_accelerator("fp32"), loss or whole_loss, size, count)
    losses = batches(model, optimiser, images, targets)
    return losses, [parameter.grad for parameter in model.parameters()], batches.parts.size


def assert_equal(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, expected[0][name], rtol=1e-6, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            # the segmenter's logits and the number of labelled pixels are float32
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_micro_batches_equal_the_whole_batch(case, size):
    model, loss, _, images, targets = case
    losses = loss(model, images, targets)
    losses["loss"].backward()
    expected = {name: value.detach() for name, value in losses.items()}, [p.grad for p in model.parameters()]
    assert sum(gradient is not None and gradient.abs().sum() > 0 for gradient in expected[1]) > 20
    assert_equal(run(case, size), expected)


def test_a_full_memory_halves_the_micro_batch_and_starts_from_clean_gradients(case, capsys):
    """The error comes in the second micro-batch, when the first one has left gradients."""
    sizes = []

    def small_memory(model, images, targets):
        sizes.append(len(images))
        if len(images) > 1 and len(sizes) % 2 == 0:
            raise FULL[1]
        return case[1](model, images, targets)

    expected = run(case, 0)
    found = run(case, 3, small_memory)
    assert sizes == [3, 2, 2, 2, 1, 1, 1, 1, 1] and found[2] == 1
    assert_equal(found, expected)
    assert "too small for 3 training images at once: continuing with 2 (micro_batch = 2" in capsys.readouterr().err


def test_a_batch_that_is_tried_again_counts_once_in_the_average_precision(
    tmp_path, make_tiny_dataset, run_script, monkeypatch
):
    """The memory is full in the second micro-batch of the second batch; the first micro-batch has been counted."""
    sizes, patches = [], []
    reconstruct, average_precision = train_classification.image_reconstruction_loss, training.average_precision

    def small_memory(maps, *rest):
        sizes.append(len(maps))
        if len(sizes) == 4:
            raise FULL[0]
        return reconstruct(maps, *rest)

    def counting(labels, logits):
        patches.append(len(labels))
        return average_precision(labels, logits)

    make_tiny_dataset(tmp_path)
    run_script("datasetsprocess/process.py", "--dataset", "tiny", "--root", tmp_path)
    monkeypatch.setattr(train_classification, "image_reconstruction_loss", small_memory)
    monkeypatch.setattr(training, "average_precision", counting)
    step("train_classification", tmp_path, micro_batch=3)
    assert sizes == [3, 2, 3, 2, 2, 2, 1] and set(patches) == {10}


def test_other_errors_and_single_images_are_not_tried_again(case):
    calls = []

    def broken(error, *_):
        calls.append(None)
        raise error

    with pytest.raises(RuntimeError, match="shapes"):
        run(case, 0, partial(broken, RuntimeError("shapes do not fit")))
    assert len(calls) == 1
    with pytest.raises(torch.OutOfMemoryError):
        run(case, 0, partial(broken, torch.OutOfMemoryError("full")))
    assert len(calls) == 1 + 4  # 5, 3, 2, 1


def test_several_processes_do_not_try_again(case):
    """Their gradient exchanges would no longer match."""
    sizes = []

    def full(model, images, targets):
        sizes.append(len(images))
        raise torch.OutOfMemoryError("full")

    model, _, count, images, targets = case
    batches = MicroBatches(make_accelerator("fp32"), full, 2, count)
    batches.accelerator = type(
        "Two", (), {"num_processes": 2, "__getattr__": lambda self, name: getattr(make_accelerator("fp32"), name)}
    )()
    with pytest.raises(torch.OutOfMemoryError):
        batches(model, torch.optim.SGD(model.parameters(), 0.1), images, targets)
    assert sizes == [2]


def test_inference_in_halves_equals_the_whole():
    images, parts, sizes = torch.randn(7, 3, 4, 4), Parts(), []

    def predict(some):
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("full")
        return [some.mean(1), some.amax((2, 3))]

    for _ in range(2):
        means, peaks = parts.predict(lambda scales: predict(scales[0]), [images])
        assert torch.equal(means, images.mean(1)) and torch.equal(peaks, images.amax((2, 3)))
    assert sizes == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1]  # found once, kept for the second batch


def test_errors_that_say_that_the_memory_is_full():
    assert all(memory_is_full(error) for error in FULL)
    assert not memory_is_full(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_the_memory_of_a_failed_call_is_free_before_the_next():
    import gc
    import weakref

    held = []

    def work(size):
        tensor = torch.zeros(size)
        assert not held or held[-1]() is None
        held.append(weakref.ref(tensor))
        if size > 2:
            raise torch.OutOfMemoryError("full")
        return size

    gc.disable()
    try:
        assert Parts()(work, 16) == 2
    finally:
        gc.enable()
