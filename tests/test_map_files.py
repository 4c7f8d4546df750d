"""Files of class maps: small, enlarged and summed as the method says, and damaged ones refused."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.references import bilinear
from tests.test_checkpoints import Hostile
from tools.command import UserError
from tools.map_files import fuse_scales, load_logits, load_maps, relative, save_maps


def save(path, classes, maps, size, logits=None, holds="cams"):
    save_maps(path, holds, np.asarray(classes), maps, size, logits)


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
    save(tmp_path / "a.npz", [0, 4, 5], maps, size)
    classes, found = load_maps(tmp_path / "a.npz", 6, size)
    expected = full_size(maps, size)
    assert classes.tolist() == [0, 4, 5] and found.dtype == np.float32 and found.shape == (3, *size)
    assert np.abs(found - expected).max() < 1e-3
    assert np.mean(found.argmax(0) == expected.argmax(0)) >= 0.999
    assert found.min() >= 0 and found.max() <= 1


def test_a_file_is_small(tmp_path):
    maps = smooth_maps(2, 3, (512, 512))
    save(tmp_path / "a.npz", [0, 1, 2], maps, (512, 512), np.zeros(3))
    assert (tmp_path / "a.npz").stat().st_size <= 60_000


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(1, 4), height=st.integers(1, 70), width=st.integers(1, 70))
def test_fusion_equals_float64(seed, classes, height, width):
    maps = smooth_maps(seed, classes, (height, width))
    found = relative(fuse_scales(maps, (height, width)))
    assert np.abs(found - full_size(maps, (height, width))).max() < 1e-5


def test_an_empty_map_stays_empty(tmp_path):
    maps = [np.zeros((2, 4, 4), np.float32), np.zeros((2, 2, 2), np.float32)]
    maps[0][1, 0, 0] = 2
    save(tmp_path / "a.npz", [1, 2], maps, (64, 64))
    _, found = load_maps(tmp_path / "a.npz", 3, (64, 64))
    assert not found[0].any() and found[1].max() == pytest.approx(1, abs=1e-3)


def test_logits_are_kept(tmp_path):
    maps = [np.ones((1, 2, 3))]
    save(tmp_path / "a.npz", [1], maps, (32, 48), np.array([0.5, -2]))
    assert load_logits(tmp_path / "a.npz").tolist() == [0.5, -2]
    save(tmp_path / "a.npz", [1], maps, (32, 48), np.array([0, np.nan]))
    with pytest.raises(UserError, match="not finite"):
        load_logits(tmp_path / "a.npz")


def test_a_file_says_what_it_holds(tmp_path):
    """CAMs are divided by their maximum, probabilities are not."""
    for holds, peaks in (("cams", [1, 1]), ("probabilities", [0.4, 0.1])):
        save(tmp_path / "a.npz", [0, 1], [np.array([[[0.2, 0.4]], [[0.1, 0.1]]])], (16, 32), holds=holds)
        _, maps = load_maps(tmp_path / "a.npz", 2, (16, 32))
        np.testing.assert_allclose(maps.max((1, 2)), peaks, atol=1e-3)


@pytest.fixture
def good(tmp_path):
    """The file of an image of 32 x 32 with the classes 0 and 3 of 5, and its arrays."""
    save(tmp_path / "good.npz", [0, 3], smooth_maps(0, 2, (32, 32)), (32, 32))
    with np.load(tmp_path / "good.npz") as arrays:
        return tmp_path / "good.npz", dict(arrays)


def refused(file, words, num_classes=5, size=(32, 32)):
    sentence = rf"{file.name} cannot be read.*{words}.*infer_classification\.py again"
    with pytest.raises(UserError, match=sentence) as caught:
        load_maps(file, num_classes, size)
    assert len(str(caught.value)) < 400


def test_damaged_files_are_one_sentence(good, tmp_path):
    content = good[0].read_bytes()
    for damage in (b"", b"PK", content[: len(content) // 2], content[:-1], b"\0" * 500):
        (tmp_path / "bad.npz").write_bytes(damage)
        refused(tmp_path / "bad.npz", "")
    for read in (load_logits, lambda file: load_maps(file, 5, (32, 32))):
        with pytest.raises(UserError, match=r"none\.npz is missing"):
            read(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("holds", np.array("thoughts"), "it holds thoughts"),
        ("classes", np.array([0, 1, 3], np.uint8), "fit together"),
        ("classes", np.array([0, 5], np.uint8), r"0 to 4 .*not \[0, 5\]"),
        ("classes", np.array([-1, 3]), r"not \[-1, 3\]"),
        ("classes", np.array([0.0, 3.0]), r"not \[0.0, 3.0\]"),
        ("classes", np.array([3, 3], np.uint8), r"not \[3, 3\]"),
        ("classes", np.array([3, 0], np.uint8), r"not \[3, 0\]"),
        ("classes", np.arange(4000) + 5, r"not \[5, 6, "),
        ("classes", np.zeros(0, np.uint8), r"not \[\]"),
        ("classes", np.array(3), ""),
        ("classes", np.array(["a", "b"]), r"not \['a', 'b'\]"),
        ("size", np.array([0, 32]), r"\(0, 32\) pixels, not \(32, 32\)"),
        ("size", np.array([10**6, 10**6]), "an image of"),
        ("size", np.array([32]), "an image of"),
        ("size", np.array([32.5, 32]), "an image of"),
        ("scale0", np.zeros((3, 2, 2), np.float16), "fit together"),
        ("scale0", np.zeros(2, np.float16), "fit together"),
        ("scale0", np.full((2, 2, 2), np.nan, np.float16), "negative or infinite"),
        ("scale0", np.full((2, 2, 2), -1, np.float16), "negative or infinite"),
        ("peaks", np.ones(3, np.float32), "fit together"),
        ("peaks", np.array([np.inf, 1], np.float32), "negative or infinite"),
        ("peaks", np.array([-1, 1], np.float32), "negative or infinite"),
    ],
)
def test_content_that_cannot_be_maps_of_the_image_is_named(good, name, value, words):
    np.savez(good[0], **(good[1] | {name: value}))
    refused(good[0], words)


def test_missing_arrays_and_other_images(good):
    file, arrays = good
    refused(file, r"\(32, 32\) pixels, not \(32, 48\)", size=(32, 48))
    refused(file, r"0 to 2 .*not \[0, 3\]", num_classes=3)
    np.savez(file, **{name: array for name, array in arrays.items() if not name.startswith("scale")})
    refused(file, "fit together")
    np.savez(file, scale0=arrays["scale0"])
    refused(file, "version 0.1.0")


def test_pickled_code_does_not_run(good, tmp_path):
    file, arrays = good
    np.savez(file, **(arrays | {"classes": np.array([Hostile(tmp_path / "ran")], object)}))
    refused(file, "")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_unpacks_to_more_than_the_image_needs_is_refused(good):
    """Zeros, packed to almost nothing, are refused by the size that the file declares, before they are unpacked."""
    file, arrays = good
    large = {"scale0": np.zeros((2, 4000, 4000), np.float16)}
    other = {"size": np.array([10_000, 10_000])}
    for change, words in ((large, "unpacks to 64.* more than the 86016"), (other, "an image of")):
        np.savez_compressed(file, **(arrays | change))
        assert file.stat().st_size < 100_000
        tracemalloc.start()
        refused(file, words)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


def test_probabilities_may_exceed_one_by_rounding_only(tmp_path):
    for value in (1 + 1e-6, 1.01):
        save(tmp_path / f"{value}.npz", [0, 1], [np.full((2, 4, 8), value)], (37, 61), holds="probabilities")
    assert np.abs(load_maps(tmp_path / "1.000001.npz", 2, (37, 61))[1] - 1).max() < 1e-5
    with pytest.raises(UserError, match="outside 0 to 1"):
        load_maps(tmp_path / "1.01.npz", 2, (37, 61))


def test_the_largest_maps_that_a_step_makes_are_read(tmp_path):
    """All classes at the scales 4 and 0.5 of a small image, and one pixel."""
    for size in ((1, 1), (16, 16), (33, 70)):
        save(tmp_path / "a.npz", np.arange(250), smooth_maps(0, 250, size, (4.0, 0.5)), size)
        classes, maps = load_maps(tmp_path / "a.npz", 250, size)
        assert len(classes) == 250 and maps.shape == (250, *size)
