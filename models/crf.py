"""Fully connected CRF with Gaussian edge potentials (method, section 3), solved by mean field.

Sources: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011 (the
model, the iteration); Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010.

Two kernels couple every pixel with every other: one on position (x, y), one on position and colour (x, y, r, g, b).
The first is separable and summed directly. The second is approximated on the permutohedral lattice, whose cost grows
linearly with the pixels (mode "lattice"), or summed over all pairs of pixels (mode "exact": the reference, for small
patches and GPUs).

`dense_crf` is the whole of it; `DenseCRF` keeps the filters of one image for several sets of class maps.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from scipy import sparse

PROBABILITY_FLOOR = 1e-5  # the unary of the usual densecrf helper: -log of the probability clipped to [1e-5, 1]
Filter = Callable[[torch.Tensor], torch.Tensor]  # (N, K) -> (N, K): each column summed over all pixels with a kernel


def dense_crf(
    probabilities: np.ndarray,
    image: np.ndarray,
    iterations: int = 10,
    gaussian_sigma: float = 1.0,
    gaussian_weight: float = 3.0,
    bilateral_sigma_xy: float = 67.0,
    bilateral_sigma_rgb: float = 3.0,
    bilateral_weight: float = 4.0,
    mode: str = "lattice",
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Class probabilities (K, H, W) of the image (H, W, 3) uint8 -> mean-field marginals (K, H, W) float32.

    The probabilities need not sum to one: the unary is -log p, p clipped to [1e-5, 1]. Potts compatibility. Sigmas are
    standard deviations, in pixels and in colour values 0..255. A weight of 0 leaves its kernel out.
    mode: "lattice" | "exact". device: any torch device; on the CPU the lattice runs through scipy.sparse.
    ValueError where shapes, types or values do not fit."""
    return DenseCRF(
        image, gaussian_sigma, gaussian_weight, bilateral_sigma_xy, bilateral_sigma_rgb, bilateral_weight, mode, device
    )(probabilities, iterations)


class DenseCRF:
    """The two kernels of one image, built once; call it with class probabilities. Arguments: see dense_crf."""

    def __init__(
        self,
        image: np.ndarray,
        gaussian_sigma: float,
        gaussian_weight: float,
        bilateral_sigma_xy: float,
        bilateral_sigma_rgb: float,
        bilateral_weight: float,
        mode: str,
        device: str | torch.device,
    ):
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"the image must be uint8 of shape (H, W, 3), not {image.dtype} {image.shape}")
        if not all(np.isfinite(s) and s > 0 for s in (gaussian_sigma, bilateral_sigma_xy, bilateral_sigma_rgb)):
            raise ValueError("gaussian_sigma, bilateral_sigma_xy and bilateral_sigma_rgb must be above 0")
        if not all(np.isfinite(w) and w >= 0 for w in (gaussian_weight, bilateral_weight)):
            raise ValueError("gaussian_weight and bilateral_weight must be 0 or more")
        if mode not in ("lattice", "exact"):
            raise ValueError(f'mode must be "lattice" or "exact", not {mode!r}')
        self.shape, self.device = image.shape[:2], torch.device(device)
        self.messages: list[Filter] = []
        if gaussian_weight > 0:
            self._add(gaussian_weight, gaussian_filter(self.shape, gaussian_sigma))
        if bilateral_weight > 0:
            bilateral = lattice_filter if mode == "lattice" else exact_filter
            self._add(bilateral_weight, bilateral(image, bilateral_sigma_xy, bilateral_sigma_rgb, self.device))

    def _add(self, weight: float, kernel: Filter) -> None:
        """Symmetric normalisation: the kernel matrix is scaled on both sides by 1 / sqrt(its row sums)."""
        ones = torch.ones(self.shape[0] * self.shape[1], 1, device=self.device)
        norm = (kernel(ones) + 1e-20).rsqrt()
        weighted = weight * norm
        self.messages.append(lambda q: kernel(q * norm).mul_(weighted))

    def __call__(self, probabilities: np.ndarray, iterations: int = 10) -> np.ndarray:
        """Probabilities (K, H, W), floating -> marginals (K, H, W) float32. No iteration: softmax of -unary."""
        probabilities = np.asarray(probabilities)
        if probabilities.ndim != 3 or probabilities.shape[1:] != self.shape or len(probabilities) == 0:
            raise ValueError(
                f"the probabilities must be of shape (K, {self.shape[0]}, {self.shape[1]}) as the image, "
                f"not {probabilities.shape}"
            )
        if probabilities.dtype.kind != "f" or not np.isfinite(probabilities).all():
            raise ValueError("the probabilities must be finite floating-point numbers")
        if iterations < 0:
            raise ValueError("iterations must be 0 or more")
        log_p = np.log(np.clip(probabilities.astype(np.float32), PROBABILITY_FLOOR, 1)).reshape(len(probabilities), -1)
        log_p = torch.from_numpy(log_p).to(self.device).T.contiguous()  # pixels x classes: one pixel, one cache line
        q = _softmax(log_p)
        for _ in range(iterations):
            q = _softmax(sum((message(q) for message in self.messages), start=log_p))
        return q.T.contiguous().cpu().numpy().reshape(probabilities.shape)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the classes of (N, K); through the transpose because torch is ten times slower along a short last axis."""
    return torch.softmax(logits.T, 0).T.contiguous()


def gaussian_filter(shape: tuple[int, int], sigma: float) -> Filter:
    """exp(-(dx^2 + dy^2) / 2 sigma^2), separable; beyond 6 sigma (1.5e-8) it is nothing in float32. Zeros outside."""
    taps = np.exp(-np.square(np.arange(int(np.ceil(6 * sigma)) + 1) / sigma) / 2)

    def run(values: torch.Tensor) -> torch.Tensor:
        values = values.reshape(*shape, -1)
        for axis, length in enumerate(shape):
            total = values.clone()
            for shift in range(1, min(length, len(taps))):
                ahead, behind = (slice(shift, None), slice(None, -shift))
                index = [(slice(None),) * axis + (part,) for part in (ahead, behind)]
                total[index[0]].add_(values[index[1]], alpha=taps[shift])
                total[index[1]].add_(values[index[0]], alpha=taps[shift])
            values = total
        return values.flatten(0, 1)

    return run


def exact_filter(image: np.ndarray, sigma_xy: float, sigma_rgb: float, device: torch.device) -> Filter:
    """The bilateral kernel summed over all pairs of pixels, tile by tile in float32, each tile used for both its sides.

    Time grows with the square of the pixels, memory does not."""
    height, width = image.shape[:2]
    position = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2) - np.array([height, width]) / 2
    colour = image.reshape(-1, 3) - 128.0  # whole and half numbers: their squared distances are exact in float32

    def factors(x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """left, right with left[i] . right[j] = -|x_i - x_j|^2 / 2"""
        half, one = np.square(x).sum(1, keepdims=True) / -2, np.ones((len(x), 1))
        pair = np.hstack([x, half, one]), np.hstack([x, one, half])
        return tuple(torch.tensor(side, dtype=torch.float32, device=device) for side in pair)

    (xy, xy_other), (rgb, rgb_other) = factors(position), factors(colour)
    tile = 512 if device.type == "cpu" else 8192  # 1 MB stays in a core's cache; a GPU wants 256 MB

    def run(values: torch.Tensor) -> torch.Tensor:
        values = values.T.contiguous()
        total, memory = torch.zeros_like(values), torch.empty(tile, tile, device=device)
        parts = [slice(start, min(start + tile, len(xy))) for start in range(0, len(xy), tile)]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would ruin the exponents
        try:
            for i, row in enumerate(parts):
                for column in parts[i:]:
                    kernel = memory[: row.stop - row.start, : column.stop - column.start]
                    torch.mm(xy[row], xy_other[column].T, out=kernel)
                    kernel.addmm_(rgb[row], rgb_other[column].T, beta=1 / sigma_xy**2, alpha=1 / sigma_rgb**2)
                    kernel.clamp_(min=-80).exp_()  # e^-80 is nothing; what underflows is 30 times slower on some CPUs
                    total[:, column] += values[:, row] @ kernel
                    if row != column:
                        total[:, row] += values[:, column] @ kernel.T
        finally:
            torch.set_float32_matmul_precision(before)
        return total.T.contiguous()

    return run


def lattice_filter(image: np.ndarray, sigma_xy: float, sigma_rgb: float, device: torch.device) -> Filter:
    """The bilateral kernel on the permutohedral lattice: splat, blur along each of its d + 1 directions, slice.

    Only vertices touched by a pixel exist, so that the blurs do not commute, and one fixed order of them is no
    symmetric kernel. The mean of an order and its reverse is, and lies markedly closer to the Gaussian for little time.
    Constant factors are left out: the normalisation removes them."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32) / sigma_xy
    weights, blurs = permutohedral_lattice(np.stack([x, y, *(np.moveaxis(image, 2, 0) / np.float32(sigma_rgb))]))
    splat, slice_ = _product(weights.T, device), _product(weights, device)
    blurs = [_product(blur, device) for blur in blurs]

    def run(values: torch.Tensor) -> torch.Tensor:
        forward = backward = splat(values)
        for blur in blurs:
            forward = blur(forward)
        for blur in reversed(blurs):
            backward = blur(backward)
        return slice_(forward + backward)

    return run


def _product(matrix, device: torch.device) -> Filter:
    """Sparse matrix times (N, K): scipy on the CPU, torch elsewhere."""
    if device.type == "cpu":
        return lambda values: torch.from_numpy(matrix @ values.numpy())
    return _torch_product(matrix, device)


def _torch_product(matrix, device: torch.device) -> Filter:
    matrix = matrix.tocoo()
    moved = torch.sparse_coo_tensor(
        np.stack(matrix.coords), matrix.data, matrix.shape, device=device, check_invariants=False
    ).coalesce()
    return lambda values: moved @ values


def permutohedral_lattice(features: np.ndarray) -> tuple[sparse.csr_array, list[sparse.csr_array]]:
    """Features (d, ...) in units of the kernel's standard deviation, N points ->

    weights (N, M): barycentric coordinates of each point on the d + 1 vertices of its simplex; and d + 1 blurs (M, M),
    [1/2, 1, 1/2] along one lattice direction each, neighbours that no point touches left out."""
    d, features = len(features), features.reshape(len(features), -1)
    n = features.shape[1]

    # Elevate to the hyperplane of zero sum in d + 1 dimensions. Splat, blur and slice together have a variance of
    # 2/3 (d + 1)^2 in lattice units, so that this is what one standard deviation is scaled to.
    column = np.arange(1, d + 1)
    basis = np.triu(np.ones((d + 1, d))) - np.diag(column, -1)[:, :d]
    basis *= np.sqrt(2 / 3) * (d + 1) / np.sqrt(column * (column + 1))
    elevated = basis.astype(np.float32) @ features

    # A vertex is packed into one integer: its coordinates are the digits of a mixed-radix number; the last one follows
    # from the zero sum. The margin takes up rounding (2 steps of d + 1), the simplex (1) and the blur (1) each way.
    radix = (np.ceil(np.ptp(elevated[:d], axis=1).astype(np.float64) / (d + 1)) + 8) * (d + 1)
    if not np.prod(radix) < 2**62:
        raise ValueError('the bilateral sigmas are too small for the lattice; use larger ones, or mode="exact"')
    stride = np.append(np.cumprod(np.append(1, radix[:-1]).astype(np.int64)), 0)

    # The nearest point of remainder 0, and the rank of each coordinate's distance from it (0 is the largest).
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

    # Vertex k of the simplex adds 1 to every coordinate of vertex k - 1, and takes d + 1 off the one of rank d - k + 1.
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

    vertices, index = np.unique(keys, return_inverse=True)
    index = index.reshape(keys.shape).T.astype(np.int32).ravel()
    m = len(vertices)
    weights = sparse.csr_array((weights.T.ravel(), index, np.arange(n + 1, dtype=np.int32) * (d + 1)), (n, m))

    # Along direction i the next vertex is 1 less in every coordinate but d more in the i-th: a fixed step of the key.
    blurs, identity = [], sparse.eye_array(m, dtype=np.float32, format="csr")
    for i in range(d + 1):
        wanted = vertices + ((d + 1) * stride[i] - stride.sum())
        found = np.minimum(np.searchsorted(vertices, wanted), m - 1).astype(np.int32)
        here = np.flatnonzero(vertices[found] == wanted).astype(np.int32)
        half = np.full(len(here), 0.5, np.float32)
        neighbour = sparse.coo_array((half, (here, found[here])), (m, m)).tocsr()
        blurs.append(identity + neighbour + neighbour.T.tocsr())
    return weights, blurs
