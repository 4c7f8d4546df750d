"""The dense CRF against brute force: float64, the whole N x N kernels, nothing shared with models/crf.py."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from models.crf import CRF, dense_crf, lattice_filter, permutohedral_lattice
from tools.command import UserError
from tools.constants import checked_constants

MODES = ("lattice", "exact")


LATTICE, EXACT = CRF(), CRF(crf_mode="exact")


def brute_force(
    probabilities,
    image,
    crf_iterations=10,
    gaussian_sigma=1.0,
    gaussian_weight=3.0,
    bilateral_sigma_xy=67.0,
    bilateral_sigma_rgb=3.0,
    bilateral_weight=4.0,
):
    classes, height, width = probabilities.shape
    row, column = (axis.ravel().astype(float) for axis in np.mgrid[:height, :width])
    colours = image.reshape(-1, 3).T.astype(float)

    def kernel(features, weight):
        exponent = np.zeros((height * width, height * width))
        for feature in features:
            exponent -= np.subtract.outer(feature, feature) ** 2 / 2
        dense = np.exp(exponent, out=exponent)
        scale = 1 / np.sqrt(dense.sum(1) + 1e-20)
        dense *= weight * scale[:, None]
        dense *= scale
        return dense

    coupling = kernel([row / gaussian_sigma, column / gaussian_sigma], gaussian_weight)
    coupling += kernel(
        [row / bilateral_sigma_xy, column / bilateral_sigma_xy, *(colours / bilateral_sigma_rgb)], bilateral_weight
    )
    unary = -np.log(np.clip(probabilities.astype(float), 1e-5, 1)).reshape(classes, -1)

    def normalised(logits):
        shifted = np.exp(logits - logits.max(0))
        return shifted / shifted.sum(0)

    q = normalised(-unary)
    for _ in range(crf_iterations):
        q = normalised(-unary + q @ coupling)
    return q.reshape(probabilities.shape)


def smooth_maps(rng, classes, size, smoothness=6.0):
    maps = np.exp([gaussian_filter(rng.standard_normal((size, size)), smoothness) * smoothness for _ in range(classes)])
    return maps / maps.sum(0)


def real_crops(shared_data, count, size=48, seed=0):
    """(image crop, smooth random class maps) from the real tiles."""
    files = sorted((shared_data / "isaid_tiles" / "train" / "images").glob("*.jpg"))
    if not files:
        pytest.skip("shared/data/isaid_tiles is missing")
    rng = np.random.default_rng(seed)
    for file in rng.choice(files, count, replace=False):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        top, left = rng.integers(0, np.array(image.shape[:2]) - size + 1)
        yield image[top : top + size, left : left + size], smooth_maps(rng, 4, size)


def agreement(a, b):
    return (a.argmax(0) == b.argmax(0)).mean()


def assert_same(ours, reference):
    """Ten iterations magnify the rounding of float32 where two classes are nearly equal, and only there."""
    assert agreement(ours, reference) >= 0.999
    difference = np.abs(ours - reference)
    assert difference.mean() < 1e-4 and (difference < 1e-3).mean() >= 0.995, difference.max()


def test_exact_equals_brute_force_on_random_images():
    rng = np.random.default_rng(1)
    for classes in (2, 5):
        image = gaussian_filter(rng.integers(0, 256, (32, 32, 3)).astype(float), (2, 2, 0))
        image = np.clip((image - 128) * 4 + 128, 0, 255).astype(np.uint8)  # correlated, so that pixels do couple
        for p in (smooth_maps(rng, classes, 32), rng.random((classes, 32, 32))):
            ours, reference = dense_crf(p, image, EXACT), brute_force(p, image)
            assert_same(ours, reference)


def test_exact_equals_brute_force_on_real_crops(shared_data):
    for image, p in real_crops(shared_data, 3):
        assert_same(dense_crf(p, image, EXACT), brute_force(p, image))


def test_lattice_is_close_to_brute_force_on_real_crops(shared_data):
    agreements = [
        agreement(dense_crf(p, image, LATTICE), brute_force(p, image)) for image, p in real_crops(shared_data, 6)
    ]
    assert np.mean(agreements) >= 0.96 and min(agreements) >= 0.9


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 4),
    st.floats(0.3, 12),
    st.floats(0.5, 90),
    st.floats(1, 90),
)
def test_exact_equals_brute_force_at_any_size_and_sigma(seed, classes, height, width, iterations, sigma, xy, rgb):
    rng = np.random.default_rng(seed)
    p, image = rng.random((classes, height, width)), rng.integers(0, 256, (height, width, 3), np.uint8)
    constants = dict(crf_iterations=iterations, gaussian_sigma=sigma, bilateral_sigma_xy=xy, bilateral_sigma_rgb=rgb)
    np.testing.assert_allclose(
        dense_crf(p, image, CRF(crf_mode="exact", **constants)), brute_force(p, image, **constants), atol=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.sampled_from(MODES))
def test_marginals_sum_to_one_and_follow_the_order_of_classes(seed, classes, height, width, mode):
    rng = np.random.default_rng(seed)
    p, order = rng.random((classes, height, width)), rng.permutation(classes)
    image = rng.integers(0, 256, 3) + rng.integers(-4, 5, (height, width, 3))
    image = np.clip(image, 0, 255).astype(np.uint8)
    q = dense_crf(p, image, CRF(crf_mode=mode))
    assert q.dtype == np.float32 and q.shape == p.shape and (q >= 0).all()
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(dense_crf(p[order], image, CRF(crf_mode=mode)), q[order], atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("without", [dict(crf_iterations=0), dict(gaussian_weight=0.0, bilateral_weight=0.0)])
def test_without_messages_the_softmax_of_the_unary_is_left(mode, without):
    rng = np.random.default_rng(2)
    p, image = rng.random((3, 6, 7)) * 1.5, rng.integers(0, 256, (6, 7, 3), np.uint8)
    p[0, 0, 0] = 0
    clipped = np.clip(p, 1e-5, 1)
    np.testing.assert_allclose(dense_crf(p, image, CRF(crf_mode=mode, **without)), clipped / clipped.sum(0), rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_labels_snap_to_the_edge_between_two_flat_colours(mode):
    image = np.full((40, 48, 3), (60, 90, 70), np.uint8)
    image[:, 24:] = (180, 170, 160)
    ramp = np.clip(0.5 + (np.arange(48) - 19.5) * 0.02, 0.05, 0.95)  # the maps change side 4 pixels off the edge
    p = np.broadcast_to([(1 - ramp)[None], ramp[None]], (2, 40, 48)).reshape(2, 40, 48)
    assert (p.argmax(0)[:, 20:24] == 1).all()
    np.testing.assert_array_equal(
        dense_crf(p, image, CRF(crf_mode=mode)).argmax(0), np.repeat([np.arange(48) >= 24], 40, 0)
    )


@pytest.mark.parametrize("mode", MODES)
def test_one_class_one_pixel_and_one_colour(mode):
    image = np.full((5, 1, 3), 255, np.uint8)
    np.testing.assert_array_equal(dense_crf(np.zeros((1, 5, 1)), image, CRF(crf_mode=mode)), 1)
    single = dense_crf(np.array([0.2, 0.6], np.float32).reshape(2, 1, 1), image[:1], CRF(crf_mode=mode))
    np.testing.assert_allclose(single, brute_force(np.array([0.2, 0.6]).reshape(2, 1, 1), image[:1]), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_lattice_weights_are_barycentric_and_blurs_symmetric(seed, dimensions):
    features = np.random.default_rng(seed).normal(0, 3, (dimensions, 200)).astype(np.float32)
    weights, blurs = permutohedral_lattice(features)
    assert weights.data.min() > -1e-4
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-4)
    # the vertices are an affine frame of the features: weighting their positions gives every point back. Positions come
    # from least squares, so this holds only if each vertex is the same place for all the points that share it.
    positions = np.linalg.lstsq(weights.toarray(), features.T, rcond=None)[0]
    np.testing.assert_allclose(weights @ positions, features.T, atol=1e-2)
    for blur in blurs:
        assert abs(blur - blur.T).max() == 0 and (blur.diagonal() == 1).all() and blur.max() <= 1
        assert (np.diff(blur.indptr) <= 3).all()


def test_lattice_kernel_is_symmetric():
    """Two pixels get the same weight from each other, although the blurs do not commute."""
    image = np.random.default_rng(5).integers(90, 130, (7, 9, 3), np.uint8)
    kernel = lattice_filter(image, 5.0, 10.0)(torch.eye(63)).numpy()
    assert (np.abs(kernel - np.diag(kernel.diagonal())) > 1e-3).mean() > 0.2  # many pairs are coupled
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-5 * kernel.max())


def test_lattice_kernel_has_the_width_of_the_gaussian():
    axis = np.arange(-5, 5.01, 0.1, dtype=np.float32)
    features = np.stack(np.meshgrid(axis, axis)).reshape(2, -1)
    weights, blurs = permutohedral_lattice(features)
    sources = np.flatnonzero(np.abs(features).max(0) < 1)[::7]
    response = (weights.T[:, sources]).toarray()
    for blur in blurs:
        response = blur @ response
    response = weights @ response
    away = features[:, :, None] - features[:, None, sources]
    variance = (away**2 * response).sum(1) / response.sum(0)  # (2, sources)
    np.testing.assert_allclose(variance.mean(1), 1, atol=0.05)


PROBABILITIES, IMAGE = np.full((2, 4, 5), 0.5), np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("probabilities", "image", "message"),
    [
        (np.ones((2, 5, 4)), IMAGE, r"\(K, 4, 5\)"),
        (np.ones((4, 5)), IMAGE, r"\(K, 4, 5\)"),
        (np.ones((0, 4, 5)), IMAGE, r"\(K, 4, 5\)"),
        (np.ones((2, 4, 5), np.uint8), IMAGE, "floating"),
        (np.full((2, 4, 5), np.nan), IMAGE, "finite"),
        (PROBABILITIES, np.zeros((4, 5, 3), np.float32), "uint8"),
        (PROBABILITIES, np.zeros((4, 5), np.uint8), "uint8"),
        (PROBABILITIES, np.zeros((0, 5, 3), np.uint8), "uint8"),
    ],
)
def test_bad_arrays_are_named(probabilities, image, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(probabilities, image, LATTICE)


def test_sigmas_too_small_for_the_lattice():
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4
    with pytest.raises(ValueError, match="too small for the lattice"):
        dense_crf(PROBABILITIES, image, CRF(bilateral_sigma_rgb=1e-4))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crf_iterations", -1),
        ("crf_mode", "fast"),
        ("gaussian_sigma", 0.0),
        ("bilateral_sigma_xy", -67.0),
        ("bilateral_sigma_rgb", float("nan")),
        ("bilateral_sigma_rgb", float("inf")),
        ("gaussian_weight", float("inf")),
        ("bilateral_weight", -1.0),
    ],
)
def test_constants_outside_their_range_are_named(name, value):
    @checked_constants
    class Block:
        crf: CRF = LATTICE

    assert Block().crf == LATTICE
    with pytest.raises(UserError, match=f"^{name} is .*, but it must be .*--{name.replace('_', '-')}$"):
        Block(crf=CRF(**{name: value}))


def test_the_defaults_are_the_paper_s():
    assert (LATTICE.crf_iterations, LATTICE.crf_mode) == (10, "lattice")
    assert (LATTICE.gaussian_sigma, LATTICE.gaussian_weight) == (1, 3)
    assert (LATTICE.bilateral_sigma_xy, LATTICE.bilateral_sigma_rgb, LATTICE.bilateral_weight) == (67, 3, 4)
