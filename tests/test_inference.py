"""Inference: images at several scales with their mirror images, batches, halving, and files written beside it."""

import gc
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from infer_classification import class_maps
from models.backbone import Backbone
from models.classifier import Classifier
from tools.augment import normalise
from tools.inference import at_scales, for_inference, image_batches
from tools.memory import Halving, memory_is_full
from tools.workers import in_background

CPU = torch.device("cpu")


def maps_only(network):
    """A classifier whose logits are 0."""
    return lambda x: (torch.zeros(len(x), 1), network(x))


def test_each_scale_is_pillow_s_bicubic():
    """Bit for bit, of an image with odd sides; half of a side is rounded to the even number, as by NumPy."""
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    scales = at_scales(image, (0.5, 1.0, 1.5, 2.0))
    for scale, (height, width) in zip(scales, ((16, 24), (33, 47), (50, 70), (66, 94)), strict=True):
        expected = np.asarray(Image.fromarray(image).resize((width, height), resample=3))  # 3: bicubic
        assert scale.dtype == torch.uint8 and np.array_equal(scale.numpy().transpose(1, 2, 0), expected)
    assert [tuple(scale.shape) for scale in at_scales(image, (0.01, 1 / 3))] == [(3, 1, 1), (3, 11, 16)]


def test_images_and_mirrors_keep_their_places():
    """A predictor that looks at the left column alone: its mirror looks at the right one."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, :, 0], images[1, :, :, -1] = 255, 255

    def left(x):
        maps = torch.zeros(len(x), 1, *x.shape[-2:])
        maps[..., 0] = (x[:, :1, :, 0] > 0).float()
        return maps.bfloat16()

    _, found = class_maps(maps_only(left), [images], CPU)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert (found[0, 0, :, 0] == 1).all() and found[0].sum() == 32
    assert (found[1, 0, :, -1] == 1).all() and found[1].sum() == 32


def test_logits_are_the_mean_over_scales_and_mirrors():
    """A classifier whose logits see the left column and the width: the mirror sees the right one."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 48), dtype=np.uint8)

    def classifier(x):
        logits = torch.stack([x[..., 0].mean((1, 2)), torch.full((len(x),), float(x.shape[-1]))], 1)
        return logits.bfloat16().float(), -x[:, :2]

    logits, maps = class_maps(classifier, [torch.from_numpy(pixels)], CPU)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    columns = (pixels[..., [0, -1]].transpose(0, 2, 3, 1) / 255 - mean) / std
    assert logits.shape == (3, 2) and np.abs(logits[:, 0].numpy() - columns.mean((1, 2, 3))).max() < 0.02
    assert (maps >= 0).all() and maps.shape == (3, 2, 32, 48)
    images = [torch.zeros(3, 3, 32, width, dtype=torch.uint8) for width in (24, 48, 72)]
    logits, *_ = class_maps(classifier, images, CPU)
    assert logits[:, 1].tolist() == [48.0] * 3


@pytest.fixture
def images(tmp_path):
    """a to g: two sizes in a row, a damaged one between equal ones, and one that is not RGB."""
    rng = np.random.default_rng(0)
    for id, size in zip("abcdefg", (20, 20, 20, 24, 24, 20, 20), strict=True):
        Image.fromarray(rng.integers(0, 256, (20, size, 3), dtype=np.uint8)).save(tmp_path / f"{id}.png")
    (tmp_path / "b.png").write_bytes(b"")
    Image.new("L", (20, 20)).save(tmp_path / "f.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_group_equal_sizes_and_report_bad_files(images, workers):
    bad = []
    batches = list(image_batches(images, list("abcdefgx"), (1.0, 0.75), 2, workers, bad.append))
    assert [(ids, size) for ids, size, _ in batches] == [
        (["a", "c"], (20, 20)),
        (["d", "e"], (20, 24)),
        (["g"], (20, 20)),
    ]
    for ids, (height, width), (whole, smaller) in batches:
        assert whole.shape == (len(ids), 3, height, width) and smaller.shape == (len(ids), 3, 15, width * 3 // 4)
        for id, image, small in zip(ids, whole, smaller, strict=True):
            expected = np.array(Image.open(images / f"{id}.png"))
            assert np.array_equal(image.numpy().transpose(1, 2, 0), expected)
            assert all(torch.equal(*pair) for pair in zip(at_scales(expected, [1, 0.75]), (image, small), strict=True))
    assert len(bad) == 3
    for sentence, name, what in zip(bad, "bfx", ("cannot be read", "mode L and 8 bits", "is missing"), strict=True):
        assert f"{name}.png" in sentence and what in sentence


def test_results_do_not_depend_on_what_else_is_left_to_do(tmp_path):
    """Bit for bit, whatever the neighbours in the batch are and however many."""
    rng, torch_state = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    weight = torch.randn(32, 3, 3, 3, generator=torch_state)

    def network(x):
        return F.conv2d(F.conv2d(x, weight, padding=1).relu(), weight.transpose(0, 1).flip(2), stride=4)

    def results(ids):
        maps_of = {}
        for batch, _, images in image_batches(tmp_path, ids, (0.5, 1.0), 4, 0, pytest.fail):
            _, *maps = Halving(4).predict(partial(class_maps, maps_only(network), device=CPU), images)
            assert all(len(scale) == len(batch) for scale in maps)
            maps_of |= {id: [scale[index] for scale in maps] for index, id in enumerate(batch)}
        return maps_of

    whole = results(list("01234"))
    for ids in ("3", "421", "43210"):
        for id, maps in results(list(ids)).items():
            assert all(torch.equal(one, other) for one, other in zip(maps, whole[id], strict=True))


def test_a_model_for_inference_gives_equal_results():
    """Folded, channels_last, and every weight one whose bf16 copy autocast keeps."""
    torch.manual_seed(0)
    backbone = Backbone("mobilenet_v2", "none")
    model = Classifier(backbone, 3, gamma=0.0, iterations=1, train_all=False)  # no threshold for rounding to cross
    images = [torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)]
    model.train()(normalise(images[0]))  # statistics that differ from 0 and 1
    _, expected = class_maps(model.eval(), images, CPU)
    _, found = class_maps(for_inference(model, CPU), images, CPU)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not found.requires_grad
    assert model.backbone.high[0].conv[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 1e-3 * expected.max()


def test_no_more_results_wait_than_twice_the_threads():
    """A result counts from the call of submit, which does not wait for the work, until its work is done."""
    running, lock = [0], threading.Lock()

    def work():
        threading.Event().wait(0.002)
        with lock:
            running.append(running[-1] - 1)

    with in_background(threads=2) as submit:
        for _ in range(40):
            with lock:
                running.append(running[-1] + 1)
            submit(work)
    assert running[-1] == 0 and 1 < max(running) <= 5  # four under way, and the one that is handed over


def test_a_full_disk_in_the_background_reaches_the_caller():
    """Soon, not after hours of computing for nothing."""

    def full():
        raise OSError(28, "No space left on device", "a.npz")

    for most in (1, 100):
        calls = 0
        with pytest.raises(OSError, match="No space left"), in_background() as submit:
            while calls < most:
                submit(full)
                calls += 1
        assert calls <= 5


@pytest.mark.parametrize("fill", [True, False])
def test_inference_in_halves_equals_the_batch(capsys, fill):
    images, halving, sizes = torch.randn(7, 3, 4, 4), Halving(7), []

    def predict(scales):
        (batch,) = scales
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("full")
        return [batch.mean(1), batch.amax((2, 3))]

    for _ in range(2):
        means, peaks = halving.predict(predict, [images], fill)
        assert torch.equal(means, images.mean(1)) and torch.equal(peaks, images.amax((2, 3)))
    last = 2 if fill else 1
    assert sizes == [7, 4, 2, 2, 2, last, 2, 2, 2, last]  # the size is found once, and kept for the second batch
    assert "too small for 7 images at once: continuing with 4 (images_at_once = 4" in capsys.readouterr().err


def test_other_errors_and_single_images_are_not_tried_again():
    for error, expected in (
        (RuntimeError("CUDA error: an illegal memory access was encountered"), [5]),
        (torch.OutOfMemoryError("full"), [5, 3, 2, 1]),
    ):
        sizes = []

        def broken(scales, sizes=sizes, error=error):
            sizes.append(len(scales[0]))
            raise error

        with pytest.raises(type(error)):
            Halving(5).predict(broken, [torch.zeros(5, 1)])
        assert sizes == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_errors_that_say_that_the_memory_is_full(error):
    assert memory_is_full(error)


def test_the_memory_of_a_failed_call_is_free_before_the_next():
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
        assert Halving(16).attempt(work) == 2
    finally:
        gc.enable()
