"""The dense CRF against brute force: float64, the whole N x N kernels, nothing shared with models/crf.py."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from make_pseudo_labels import Constants, make_label
from models.crf import dense_crf, lattice_filter, permutohedral_lattice
from tests.experiments import make_experiment
from tools.command import UserError
from tools.dataset import load_dataset

PAPER = {
    "iterations": 10,
    "gaussian_sigma": 1.0,
    "gaussian_weight": 3.0,
    "bilateral_sigma_xy": 67.0,
    "bilateral_sigma_rgb": 3.0,
    "bilateral_weight": 4.0,
}


def gaussian(*features):
    """exp(-|f_i - f_j|^2 / 2) of N points, (N,N)."""
    return np.exp(-sum(np.subtract.outer(feature, feature) ** 2 for feature in features) / 2)


def bilateral_kernel(image, sigma_xy, sigma_rgb):
    row, column = (axis.ravel() for axis in np.mgrid[: image.shape[0], : image.shape[1]])
    return gaussian(row / sigma_xy, column / sigma_xy, *(image.reshape(-1, 3).T / sigma_rgb))


def lattice_kernel(image, sigma_xy, sigma_rgb):
    """The whole kernel (N,N) that the lattice applies."""
    pixels = image.shape[0] * image.shape[1]
    return lattice_filter(image, sigma_xy, sigma_rgb)(torch.eye(pixels)).double().numpy()


def brute_force(
    probabilities,
    image,
    *,
    iterations,
    gaussian_sigma,
    gaussian_weight,
    bilateral_sigma_xy,
    bilateral_sigma_rgb,
    bilateral_weight,
    kernel=bilateral_kernel,
):
    """Mean field with the kernels in memory; `kernel` makes the one on position and colour."""
    classes, height, width = probabilities.shape
    row, column = (axis.ravel() / gaussian_sigma for axis in np.mgrid[:height, :width])

    def coupling(weight, matrix):
        scale = 1 / np.sqrt(matrix.sum(1) + 1e-20)
        return weight * scale[:, None] * matrix * scale

    pairs = coupling(gaussian_weight, gaussian(row, column))
    pairs += coupling(bilateral_weight, kernel(image, bilateral_sigma_xy, bilateral_sigma_rgb))
    unary = -np.log(np.clip(probabilities.astype(float), 1e-5, 1)).reshape(classes, -1)

    def normalised(logits):
        shifted = np.exp(logits - logits.max(0))
        return shifted / shifted.sum(0)

    q = normalised(-unary)
    for _ in range(iterations):
        q = normalised(-unary + q @ pairs)
    return q.reshape(probabilities.shape)


def smooth_maps(rng, classes, size, smoothness=6.0):
    maps = np.exp([gaussian_filter(rng.standard_normal((size, size)), smoothness) * smoothness for _ in range(classes)])
    return maps / maps.sum(0)


def synthetic_crops(count, size=40):
    """(image of correlated pixels, class maps)."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        image = gaussian_filter(rng.integers(0, 256, (size, size, 3)).astype(float), (3, 3, 0))
        image = np.clip((image - 128) * 4 + 128, 0, 255).astype(np.uint8)
        yield image, smooth_maps(rng, 4, size)


def real_crops(shared_data, count, size=48):
    """(image crop, smooth random class maps) from the real tiles."""
    files = sorted((shared_data / "isaid_tiles" / "train" / "images").glob("*.jpg"))
    if not files:
        pytest.skip("shared/data/isaid_tiles is missing")
    rng = np.random.default_rng(0)
    for file in rng.choice(files, count, replace=False):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        top, left = rng.integers(0, np.array(image.shape[:2]) - size + 1)
        yield image[top : top + size, left : left + size], smooth_maps(rng, 4, size)


@pytest.mark.parametrize("kind", ["synthetic", "real"])
def test_close_to_brute_force(kind, request):
    crops = synthetic_crops(3) if kind == "synthetic" else real_crops(request.getfixturevalue("shared_data"), 6)
    agreements = []
    for image, p in crops:
        q, expected = dense_crf(p, image, **PAPER), brute_force(p, image, **PAPER)
        agreements.append((q.argmax(0) == expected.argmax(0)).mean())
    assert np.mean(agreements) >= 0.96 and min(agreements) >= 0.9, agreements


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    constants=st.fixed_dictionaries(
        {
            "iterations": st.integers(0, 4),
            "gaussian_sigma": st.floats(0.3, 12),
            "gaussian_weight": st.sampled_from([0.0, 1.0, 3.0]),
            "bilateral_sigma_xy": st.floats(0.5, 90),
            "bilateral_sigma_rgb": st.floats(1, 90),
            "bilateral_weight": st.sampled_from([0.0, 2.0, 4.0]),
        }
    ),
)
def test_mean_field_equals_brute_force_at_any_size_sigma_and_weight(seed, shape, constants):
    """With the kernel of the lattice instead of the exact one, so that only rounding may differ."""
    rng = np.random.default_rng(seed)
    p, image = rng.random(shape) * 1.5, rng.integers(0, 256, (*shape[1:], 3), np.uint8)
    p[0, 0, 0] = 0
    expected = brute_force(p, image, **constants, kernel=lattice_kernel)
    np.testing.assert_allclose(dense_crf(p, image, **constants), expected, atol=1e-4)


@settings(max_examples=20)
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
    kernel = lattice_kernel(image, 5.0, 10.0)
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
        (np.ones((0, 4, 5)), IMAGE, r"\(K, 4, 5\)"),
        (np.ones((2, 4, 5), np.uint8), IMAGE, "floating"),
        (np.full((2, 4, 5), np.nan), IMAGE, "finite"),
        (PROBABILITIES, np.zeros((4, 5, 3), np.float32), "uint8"),
        (PROBABILITIES, np.zeros((4, 5), np.uint8), "uint8"),
    ],
)
def test_bad_arrays_are_named(probabilities, image, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(probabilities, image, **PAPER)


def test_sigmas_too_small_for_the_lattice(tmp_path):
    """Step 3 names the patch whose colours they do not fit."""
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4
    with pytest.raises(ValueError, match="sigmas"):
        dense_crf(PROBABILITIES, image, **PAPER | {"bilateral_sigma_rgb": 1e-4})
    with pytest.raises(UserError, match=r"^a: .*sigmas"):
        make_one_label(tmp_path, bilateral_sigma_rgb=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crf_iterations", -1),
        ("gaussian_sigma", 0.0),
        ("gaussian_weight", float("inf")),
        ("bilateral_sigma_xy", -67.0),
        ("bilateral_sigma_rgb", float("nan")),
        ("bilateral_weight", -1.0),
    ],
)
def test_constants_outside_their_range_are_named(name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        Constants(**{name: value})


def make_one_label(root, **constants):
    make_experiment(root)
    cams = root / "experiments" / "tiny" / "run" / "cams"
    make_label("a", cams=cams, output=root, dataset=load_dataset("tiny", root), args=Constants(**constants))


def test_step_3_hands_each_constant_to_the_crf(tmp_path, monkeypatch):
    received, constants = {}, {name: 2.0 + number for number, name in enumerate(PAPER)}
    monkeypatch.setattr("make_pseudo_labels.dense_crf", lambda maps, image, **given: received.update(given) or maps)
    make_one_label(tmp_path, crf_iterations=2, **{name: constants[name] for name in list(PAPER)[1:]})
    assert received == constants
