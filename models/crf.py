"""Fully connected CRF with Gaussian edge potentials (method section 3), solved by mean field.

Sources: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011 (the
model and its iteration); Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010.

Two kernels couple every pixel with every other pixel: one on position (x, y), one on position and colour
(x, y, r, g, b). The first kernel is separable and summed directly. The second kernel is approximated on the
permutohedral lattice, in time linear in the number of pixels.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from scipy import sparse

PROBABILITY_FLOOR = 1e-5  # as in the usual densecrf helper: unary = -log of the probability clipped to [1e-5, 1]
Filter = Callable[[torch.Tensor], torch.Tensor]  # (N, K) -> (N, K): each column summed over all pixels with a kernel


def dense_crf(
    probabilities: np.ndarray,
    image: np.ndarray,
    *,
    iterations: int,
    gaussian_sigma: float,
    gaussian_weight: float,
    bilateral_sigma_xy: float,
    bilateral_sigma_rgb: float,
    bilateral_weight: float,
) -> np.ndarray:
    """Class probabilities (K, H, W) of the image (H, W, 3) uint8 -> mean-field marginals (K, H, W) float32.

    The probabilities need not sum to one: the unary is -log p, with p clipped to [1e-5, 1]. Potts compatibility. With
    0 iterations the result is the softmax of -unary. The sigmas (above 0) are in pixels and in colour values; a weight
    of 0 leaves its kernel out. The values of the paper stand in make_pseudo_labels.py.
    Raises `ValueError` where shapes, types or values do not fit.
    """
    probabilities, image = np.asarray(probabilities), np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"the image must be uint8 of shape (H, W, 3), not {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    if probabilities.ndim != 3 or probabilities.shape[1:] != (height, width) or len(probabilities) == 0:
        raise ValueError(f"the probabilities must be of shape (K, {height}, {width}), not {probabilities.shape}")
    if probabilities.dtype.kind != "f" or not np.isfinite(probabilities).all():
        raise ValueError("the probabilities must be finite floating-point numbers")
    clipped = np.clip(probabilities.astype(np.float32), PROBABILITY_FLOOR, 1).reshape(len(probabilities), -1)
    log_p = torch.from_numpy(np.log(clipped)).T.contiguous()  # (N, K): one pixel, one cache line
    messages = []
    if gaussian_weight > 0:
        messages.append(_message(gaussian_weight, gaussian_filter((height, width), gaussian_sigma), log_p))
    if bilateral_weight > 0:
        bilateral = lattice_filter(image, bilateral_sigma_xy, bilateral_sigma_rgb)
        messages.append(_message(bilateral_weight, bilateral, log_p))
    q = _softmax(log_p)
    # Potts: the penalty for the other classes is, up to a constant of each pixel, a reward for the own class
    for _ in range(iterations):
        q = _softmax(sum((message(q) for message in messages), start=log_p))
    return q.T.contiguous().numpy().reshape(probabilities.shape)


def _message(weight: float, kernel: Filter, log_p: torch.Tensor) -> Filter:
    """The weighted kernel with symmetric normalisation: its matrix is scaled on both sides by 1 / sqrt(row sums)."""
    norm = (kernel(torch.ones_like(log_p[:, :1])) + 1e-20).rsqrt()
    weighted = weight * norm
    return lambda q: kernel(q * norm).mul_(weighted)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the classes of (N, K), on the transpose: torch is ten times slower along a short last axis."""
    return torch.softmax(logits.T, 0).T.contiguous()


def gaussian_filter(shape: tuple[int, int], sigma: float) -> Filter:
    """exp(-(dx^2 + dy^2) / 2 sigma^2), separable and cut at 6 sigma (1.5e-8). Outside the image: 0."""
    taps = np.exp(-np.square(np.arange(int(np.ceil(6 * sigma)) + 1) / sigma) / 2)

    def run(values: torch.Tensor) -> torch.Tensor:
        values = values.reshape(*shape, -1)
        for axis, length in enumerate(shape):
            total = values.clone()
            for shift in range(1, min(length, len(taps))):
                kept = length - shift
                ahead, behind = values.narrow(axis, shift, kept), values.narrow(axis, 0, kept)
                total.narrow(axis, shift, kept).add_(behind, alpha=taps[shift])
                total.narrow(axis, 0, kept).add_(ahead, alpha=taps[shift])
            values = total
        return values.flatten(0, 1)

    return run


def lattice_filter(image: np.ndarray, sigma_xy: float, sigma_rgb: float) -> Filter:
    """The bilateral kernel on the permutohedral lattice: splat, blur along d + 1 directions, slice.

    Only vertices touched by a pixel exist. The blurs therefore do not commute, and one fixed order of them is not a
    symmetric kernel. The sum of an order and its reverse is symmetric, and much closer to the Gaussian at little cost.
    Constant factors are left out, because the normalisation removes them.
    """
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32) / sigma_xy
    weights, blurs = permutohedral_lattice(np.stack([x, y, *(np.moveaxis(image, 2, 0) / np.float32(sigma_rgb))]))
    splat = weights.T

    def run(values: torch.Tensor) -> torch.Tensor:
        forward = backward = splat @ values.numpy()
        for blur in blurs:
            forward = blur @ forward
        for blur in reversed(blurs):
            backward = blur @ backward
        return torch.from_numpy(weights @ (forward + backward))

    return run


def permutohedral_lattice(features: np.ndarray) -> tuple[sparse.csr_array, list[sparse.csr_array]]:
    """Features (d, ...) of N points, in units of the kernel's standard deviation -> weights, d + 1 blurs.

    weights (N, M): barycentric coordinates of each point on the d + 1 vertices of its simplex. Each blur (M, M) is
    [1/2, 1, 1/2] along one lattice direction, without neighbours that no point touches. Raises `ValueError` where the
    features spread over too many vertices.
    """
    d, features = len(features), features.reshape(len(features), -1)
    n = features.shape[1]

    # Elevate to the hyperplane of zero sum in d + 1 dimensions. Splat, blur and slice together have a variance of
    # 2/3 (d + 1)^2 in lattice units, so one standard deviation is scaled to that.
    column = np.arange(1, d + 1)
    basis = np.triu(np.ones((d + 1, d))) - np.diag(column, -1)[:, :d]
    basis *= np.sqrt(2 / 3) * (d + 1) / np.sqrt(column * (column + 1))
    elevated = basis.astype(np.float32) @ features

    # A vertex is packed into one integer: its coordinates are the digits of a mixed-radix number; the last coordinate
    # follows from the zero sum. The margin in each direction: rounding (2 steps of d + 1), simplex (1) and blur (1).
    radix = (np.ceil(np.ptp(elevated[:d], axis=1).astype(np.float64) / (d + 1)) + 8) * (d + 1)
    if not np.prod(radix) < 2**62:
        raise ValueError("the bilateral sigmas are too small for the lattice: enlarge them")
    stride = np.append(np.cumprod(np.append(1, radix[:-1]).astype(np.int64)), 0)

    # The nearest point of remainder 0, and the rank of each coordinate's distance from that point (0: the largest).
    origin = np.rint(elevated / (d + 1)).astype(np.int32)  # in multiples of d + 1
    excess = origin.sum(0, dtype=np.int32)
    distance = elevated - (origin * (d + 1)).astype(np.float32)
    rank = np.repeat(excess[None], d + 1, 0)
    for i, j in combinations(range(d + 1), 2):
        smaller = distance[i] < distance[j]
        rank[i] += smaller
        rank[j] += ~smaller
    wrap = (rank < 0).astype(np.int32) - (rank > d)  # rounding left the hyperplane: step back onto it
    origin += wrap
    rank += wrap * (d + 1)
    distance -= wrap * np.float32(d + 1)

    # Vertex k of the simplex is vertex k - 1 plus 1 in every coordinate, minus d + 1 in the one of rank d - k + 1.
    by_rank, point = np.empty_like(distance), np.arange(n)
    step = np.empty((d + 1, n), np.int64)
    for i in range(d + 1):
        by_rank[rank[i], point] = distance[i] / (d + 1)
        step[rank[i], point] = stride.sum() - (d + 1) * stride[i]
    keys = np.empty((d + 1, n), np.int64)
    keys[0] = (d + 1) * (stride @ (origin - origin.min(1, keepdims=True) + 2))
    keys[1:] = step[:0:-1]
    np.cumsum(keys, 0, out=keys)
    weights = by_rank[::-1] - np.roll(by_rank[::-1], 1, 0)
    weights[0] += 1

    vertices, inverse = np.unique(keys, return_inverse=True)
    columns = inverse.reshape(keys.shape).T.astype(np.int32).ravel()
    rows = np.arange(n + 1, dtype=np.int32) * (d + 1)
    m = len(vertices)

    # Along direction i the next vertex is 1 less in every coordinate except the i-th, which is d more: a fixed step of
    # the key.
    blurs, identity = [], sparse.eye_array(m, dtype=np.float32, format="csr")
    for i in range(d + 1):
        next_keys = vertices + ((d + 1) * stride[i] - stride.sum())
        candidates = np.minimum(np.searchsorted(vertices, next_keys), m - 1).astype(np.int32)
        having_next = np.flatnonzero(vertices[candidates] == next_keys).astype(np.int32)
        half = np.full(len(having_next), 0.5, np.float32)
        neighbour = sparse.coo_array((half, (having_next, candidates[having_next])), (m, m)).tocsr()
        blurs.append(identity + neighbour + neighbour.T.tocsr())
    return sparse.csr_array((weights.T.ravel(), columns, rows), (n, m)), blurs
