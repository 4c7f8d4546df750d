"""Inference: images at several scales with their mirror images, batches, halving, and files written beside it."""

import threading
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
from tools.inference import at_scales, for_inference, image_batches, stack_scales
from tools.memory import Halving, memory_is_full
from tools.workers import in_background

CPU = torch.device("cpu")


def maps_only(network):
    """A classifier whose logits are 0."""
    return lambda x: (torch.zeros(len(x), 1), network(x))


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
]


def equivariant(x):
    """Two maps at stride 16 for which mirroring before or after makes no difference."""
    pooled = F.adaptive_avg_pool2d(x, [-(-length // 16) for length in x.shape[-2:]])
    return torch.stack([pooled.sum(1), pooled[:, 0].relu()], 1)


def photographs(seed, count, height, width):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_each_scale_is_pillow_s_bicubic():
    """Bit for bit, of an image with odd sides; half of a side is rounded to the even number, as by NumPy."""
    image = photographs(0, 1, 33, 47)[0]
    found = at_scales(image, (0.5, 1.0, 1.5, 2.0))
    for scale, (height, width) in zip(found, ((16, 24), (33, 47), (50, 70), (66, 94)), strict=True):
        expected = np.asarray(Image.fromarray(image).resize((width, height), resample=3))  # 3: bicubic
        assert scale.dtype == torch.uint8 and np.array_equal(scale.numpy().transpose(1, 2, 0), expected)
    assert [tuple(scale.shape) for scale in at_scales(image, (0.01, 1 / 3))] == [(3, 1, 1), (3, 11, 16)]


def test_mirrors_are_mirrored_back():
    photos = photographs(0, 3, 64, 48)
    images = stack_scales([at_scales(photo, (0.5, 1.0, 1.5, 2.0)) for photo in photos])
    _, *found = class_maps(maps_only(equivariant), images, CPU)
    assert [tuple(maps.shape) for maps in found] == [(3, 2, 2, 2), (3, 2, 4, 3), (3, 2, 6, 5), (3, 2, 8, 6)]
    plain = normalise(torch.from_numpy(photos).permute(0, 3, 1, 2))
    assert torch.allclose(found[1], 2 * equivariant(plain), atol=1e-5)
    for maps in found:  # the scene is the same at every scale; the first map is linear in it
        assert maps[:, 0].mean((1, 2)).numpy() == pytest.approx(found[1][:, 0].mean((1, 2)).numpy(), abs=0.1)


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


def test_no_images_make_no_batches(tmp_path):
    assert list(image_batches(tmp_path, [], [1.0], 4, 0, pytest.fail)) == []


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


def test_work_in_the_background_goes_on_beside_the_caller():
    """The first two calls wait for one that comes after them, which could not be if submit waited for its call."""
    last, done = threading.Event(), []

    def wait(number):
        assert last.wait(20)
        done.append(number)

    with in_background(threads=3) as submit:
        submit(wait, 1)
        submit(wait, 2)
        submit(last.set)
    assert sorted(done) == [1, 2]


def test_no_more_results_wait_than_twice_the_threads():
    running, most, lock = 0, [0], threading.Lock()

    class Result:
        """Counts itself from the call of submit until its work is done."""

        def __init__(self):
            nonlocal running
            with lock:
                running += 1
                most.append(running)

    def work(result):
        nonlocal running
        threading.Event().wait(0.002)
        with lock:
            running -= 1

    with in_background(threads=2) as submit:
        for _ in range(40):
            submit(work, Result())
    assert running == 0 and max(most) <= 5  # four under way, and the one that is handed over


def test_a_full_disk_in_the_background_reaches_the_caller():
    def full():
        raise OSError(28, "No space left on device", "a.npz")

    with pytest.raises(OSError, match="No space left"), in_background() as submit:
        submit(full)
    calls = 0
    with pytest.raises(OSError, match="No space left"), in_background() as submit:
        while calls < 100:  # and soon, not after hours of computing for nothing
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
    calls = []

    def broken(error, scales):
        calls.append(len(scales[0]))
        raise error

    with pytest.raises(RuntimeError, match="shapes"):
        Halving(5).predict(partial(broken, RuntimeError("shapes do not fit")), [torch.zeros(5, 1)])
    with pytest.raises(torch.OutOfMemoryError):
        Halving(5).predict(partial(broken, torch.OutOfMemoryError("full")), [torch.zeros(5, 1)])
    assert calls == [5, 5, 3, 2, 1]


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
        assert Halving(16).attempt(work) == 2
    finally:
        gc.enable()
