"""Class activation maps: scales and mirror images, small files, and damaged files."""

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from models.backbone import Backbone
from models.classifier import Classifier
from tests.references import bilinear
from tools.augment import normalise
from tools.cams import (
    at_scales,
    for_inference,
    fuse_scales,
    image_batches,
    in_background,
    load_cams,
    load_logits,
    mirrored_cams,
    mirrored_scales,
    save_cams,
    stack_scales,
)
from tools.command import UserError


def smooth_maps(seed, classes, size, scales=(0.5, 1.0, 1.5, 2.0), peak=1.0):
    """Relu'd maps at stride 16 of several scales that show the same smooth scene, as a network's do."""
    rng = np.random.default_rng(seed)
    scene = rng.normal(size=(classes, 8, 8))
    maps = []
    for scale in scales:
        shape = [max(1, -(-round(length * scale) // 16)) for length in size]
        noise = 0.3 * rng.normal(size=(classes, *shape))
        maps.append((np.maximum(bilinear(scene, shape, False) + noise, 0) * peak).astype(np.float32))
    return maps


def full_size(maps, size):
    """The maps at image size in float64 (method section 2): rounded up to 16, summed, cut, over their maximum."""
    padded = [-(-length // 16) * 16 for length in size]
    total = sum(bilinear(scale.astype(np.float64), padded, False) for scale in maps)[:, : size[0], : size[1]]
    return total / (total.max((1, 2), keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("size", "peak"), [((128, 128), 1.0), ((75, 130), 1.0), ((64, 64), 1e4), ((64, 64), 1e-4), ((16, 40), 30.0)]
)
def test_round_trip(tmp_path, size, peak):
    maps = smooth_maps(1, 3, size, peak=peak)
    save_cams(tmp_path / "a.npz", np.array([0, 4, 5]), maps, size)
    classes, found = load_cams(tmp_path / "a.npz", 6, size)
    expected = full_size(maps, size)
    assert classes.tolist() == [0, 4, 5] and found.dtype == np.float32 and found.shape == (3, *size)
    assert np.abs(found - expected).max() < 1e-3
    assert np.mean(found.argmax(0) == expected.argmax(0)) >= 0.999
    assert found.min() >= 0 and found.max() <= 1


def test_a_file_is_small(tmp_path):
    maps = smooth_maps(2, 3, (512, 512))
    save_cams(tmp_path / "a.npz", np.arange(3), maps, (512, 512), np.zeros(3))
    assert (tmp_path / "a.npz").stat().st_size <= 60_000


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(1, 4), height=st.integers(1, 70), width=st.integers(1, 70))
def test_fusion_equals_float64(seed, classes, height, width):
    maps = smooth_maps(seed, classes, (height, width))
    found = fuse_scales([torch.from_numpy(scale) for scale in maps], (height, width)).numpy()
    assert np.abs(found - full_size(maps, (height, width))).max() < 1e-5


def test_an_empty_map_stays_empty(tmp_path):
    maps = [np.zeros((2, 4, 4), np.float32), np.zeros((2, 2, 2), np.float32)]
    maps[0][1, 0, 0] = 2
    save_cams(tmp_path / "a.npz", np.array([1, 2]), maps, (64, 64))
    _, found = load_cams(tmp_path / "a.npz", 3, (64, 64))
    assert not found[0].any() and found[1].max() == pytest.approx(1, abs=1e-3)


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
    found = mirrored_scales(equivariant, images, torch.device("cpu"))
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

    (found,) = mirrored_scales(left, [images], torch.device("cpu"))
    assert found.dtype == torch.float32 and not found.requires_grad
    assert (found[0, 0, :, 0] == 1).all() and found[0].sum() == 32
    assert (found[1, 0, :, -1] == 1).all() and found[1].sum() == 32


def test_logits_are_the_mean_over_scales_and_mirrors(tmp_path):
    """A classifier whose logits see the left column and the width: the mirror sees the right one."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 48), dtype=np.uint8)

    def classifier(x):
        logits = torch.stack([x[..., 0].mean((1, 2)), torch.full((len(x),), float(x.shape[-1]))], 1)
        return logits.bfloat16().float(), -x[:, :2]

    logits, maps = mirrored_cams(classifier, [torch.from_numpy(pixels)], torch.device("cpu"))
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    columns = (pixels[..., [0, -1]].transpose(0, 2, 3, 1) / 255 - mean) / std
    assert logits.shape == (3, 2) and np.abs(logits[:, 0].numpy() - columns.mean((1, 2, 3))).max() < 0.02
    assert (maps[0] >= 0).all() and maps[0].shape == (3, 2, 32, 48)
    images = [torch.zeros(3, 3, 32, width, dtype=torch.uint8) for width in (24, 48, 72)]
    logits, _ = mirrored_cams(classifier, images, torch.device("cpu"))
    assert logits[:, 1].tolist() == [48.0] * 3
    save_cams(tmp_path / "a.npz", np.array([1]), [np.ones((1, 2, 3))], (32, 48), logits[2].numpy())
    assert load_logits(tmp_path / "a.npz").tolist() == logits[2].tolist()
    with pytest.raises(UserError, match=r"b\.npz is missing"):
        load_logits(tmp_path / "b.npz")
    save_cams(tmp_path / "a.npz", np.array([1]), [np.ones((1, 2, 3))], (32, 48), np.array([0, np.nan]))
    with pytest.raises(UserError, match="its logits are not finite"):
        load_logits(tmp_path / "a.npz")


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
        assert whole.shape == (2, 3, height, width) and smaller.shape == (2, 3, 15, width * 3 // 4)
        for id, image, small in zip(ids, whole, smaller, strict=False):
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

    def predict(x):
        return F.conv2d(F.conv2d(x, weight, padding=1).relu(), weight.transpose(0, 1).flip(2), stride=4)

    def results(ids):
        found = {}
        for batch, _, images in image_batches(tmp_path, ids, (0.5, 1.0), 4, 0, pytest.fail):
            maps = mirrored_scales(predict, images, torch.device("cpu"))
            found |= {id: [scale[index] for scale in maps] for index, id in enumerate(batch)}
        return found

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
    expected = mirrored_cams(model.eval(), images, torch.device("cpu"))[1][0]
    found = mirrored_cams(for_inference(model, torch.device("cpu")), images, torch.device("cpu"))[1][0]
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


@pytest.fixture
def good(tmp_path):
    """The file of an image of 32 x 32 with the classes 0 and 3 of 5, and its arrays."""
    save_cams(tmp_path / "good.npz", np.array([0, 3]), smooth_maps(0, 2, (32, 32)), (32, 32))
    with np.load(tmp_path / "good.npz") as arrays:
        return tmp_path / "good.npz", dict(arrays)


def refused(file, words, num_classes=5, size=(32, 32)):
    start = (
        rf"{file.name} cannot be read as class activation maps \(.*{words}.*run python infer_classification\.py again"
    )
    with pytest.raises(UserError, match=start) as caught:
        load_cams(file, num_classes, size)
    assert len(str(caught.value)) < 400


def test_damaged_files_are_one_sentence(good, tmp_path):
    content = good[0].read_bytes()
    for damage in (b"", b"PK", content[: len(content) // 2], content[:-1], b"\0" * 500):
        (tmp_path / "bad.npz").write_bytes(damage)
        refused(tmp_path / "bad.npz", "")
    with pytest.raises(UserError, match=r"none\.npz is missing: run python infer_classification\.py"):
        load_cams(tmp_path / "none.npz", 5, (32, 32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": np.array([0, 1, 3], np.uint8)}, "fit together"),
        ({"classes": np.array([0, 5], np.uint8)}, r"whole numbers from 0 to 4 in ascending order, not \[0, 5\]"),
        ({"classes": np.array([-1, 3])}, r"not \[-1, 3\]"),
        ({"classes": np.array([0.0, 3.0])}, r"not \[0.0, 3.0\]"),
        ({"classes": np.array([300.5, 3])}, r"not \[300.5, 3.0\]"),
        ({"classes": np.array([3, 3], np.uint8)}, r"not \[3, 3\]"),
        ({"classes": np.array([3, 0], np.uint8)}, r"not \[3, 0\]"),
        ({"classes": np.arange(4000) + 5}, r"not \[5, 6, "),
        ({"classes": np.zeros(0, np.uint8)}, r"not \[\]"),
        ({"classes": np.array(3)}, ""),
        ({"classes": np.array(["a", "b"])}, r"not \['a', 'b'\]"),
        ({"size": np.array([0, 32])}, r"an image of \(0, 32\) pixels, not \(32, 32\)"),
        ({"size": np.array([-5, 32])}, "an image of"),
        ({"size": np.array([10**6, 10**6])}, "an image of"),
        ({"size": np.array([32])}, "an image of"),
        ({"size": np.array([32.5, 32])}, "an image of"),
        ({"scale0": np.zeros((3, 2, 2), np.float16)}, "fit together"),
        ({"scale0": np.zeros(2, np.float16)}, "fit together"),
        ({"scale0": np.full((2, 2, 2), np.nan, np.float16)}, "outside 0 to 1"),
        ({"scale0": np.full((2, 2, 2), np.inf, np.float16)}, "outside 0 to 1"),
        ({"scale0": np.full((2, 2, 2), -1, np.float16)}, "outside 0 to 1"),
        ({"peaks": np.ones(3, np.float32)}, "fit together"),
        ({"peaks": np.array([np.inf, 1], np.float32)}, "outside 0 to 1"),
        ({"peaks": np.array([-1, 1], np.float32)}, "outside 0 to 1"),
    ],
)
def test_content_that_cannot_be_maps_of_the_image_is_named(good, change, words):
    np.savez(good[0], **(good[1] | change))
    refused(good[0], words)


def test_missing_arrays_and_other_images(good):
    file, arrays = good
    refused(file, r"an image of \(32, 32\) pixels, not \(32, 48\)", size=(32, 48))
    refused(file, r"whole numbers from 0 to 2 .*not \[0, 3\]", num_classes=3)
    np.savez(file, **{name: array for name, array in arrays.items() if not name.startswith("scale")})
    refused(file, "fit together")
    np.savez(file, scale0=arrays["scale0"])
    refused(file, "classes")


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_pickled_code_does_not_run(good, tmp_path):
    file, arrays = good
    np.savez(file, **(arrays | {"classes": np.array([Hostile(tmp_path / "ran")], object)}))
    refused(file, "")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_unpacks_to_more_than_the_image_needs_is_refused(good):
    """Zeros, packed to almost nothing, are refused by the size that the file declares, before they are unpacked."""
    file, arrays = good
    np.savez_compressed(file, **(arrays | {"scale0": np.zeros((2, 4000, 4000), np.float16)}))
    assert file.stat().st_size < 100_000
    tracemalloc.start()
    refused(file, "unpacks to 64[0-9]* bytes, more than the 86016 that this image can need")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    np.savez_compressed(file, **(arrays | {"size": np.array([10_000, 10_000])}))
    tracemalloc.start()
    refused(file, "an image of")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_probabilities_may_exceed_one_by_rounding_only(tmp_path):
    save_cams(tmp_path / "a.npz", np.arange(2), [np.full((2, 4, 8), 1 + 1e-6)], (37, 61))
    _, found = load_cams(tmp_path / "a.npz", 2, (37, 61), relative=False)
    assert np.abs(found - 1).max() < 1e-5
    save_cams(tmp_path / "a.npz", np.arange(2), [np.full((2, 4, 8), 1.01)], (37, 61))
    with pytest.raises(UserError, match="values outside 0 to 1"):
        load_cams(tmp_path / "a.npz", 2, (37, 61), relative=False)


def test_the_largest_maps_that_a_step_makes_are_read(tmp_path):
    """All classes at the scales 4 and 0.5 of a small image, and one pixel."""
    for size in ((1, 1), (16, 16), (33, 70)):
        save_cams(tmp_path / "a.npz", np.arange(250), smooth_maps(0, 250, size, (4.0, 0.5)), size)
        classes, maps = load_cams(tmp_path / "a.npz", 250, size)
        assert len(classes) == 250 and maps.shape == (250, *size)
