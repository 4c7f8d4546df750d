"""The pixel relationship constraint against its formula, written a second time in float64 NumPy."""

import numpy as np
import pytest
import torch

from models.prc import PixelRelationshipConstraint
from tests.references import bilinear, largest_error


def reference_affinity(weight, features, image, gamma):
    """weight (D,3+D), features (D,h,w), image (3,H,W) -> (N,N), entry by entry."""
    small = bilinear(image, features.shape[1:], align_corners=True)
    g = np.einsum("oc,chw->ohw", weight, np.concatenate([small, features])).reshape(len(weight), -1)
    n = g.shape[1]
    affinity = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            cosine = g[:, i] @ g[:, j] / (np.linalg.norm(g[:, i]) * np.linalg.norm(g[:, j]))
            value = min(max(cosine, 0.01), 0.999)
            affinity[i, j] = value if value >= gamma else 0
    return affinity / affinity.sum(0)


def reference(weight, cam, features, image, gamma, iterations):
    result = np.empty(cam.shape)
    for b in range(len(cam)):
        affinity = reference_affinity(weight, features[b], image[b], gamma)
        maps = cam[b].reshape(len(cam[b]), -1)
        for _ in range(iterations):
            maps = np.array(
                [[sum(row[i] * affinity[i, j] for i in range(len(row))) for j in range(len(row))] for row in maps]
            )
        result[b] = maps.reshape(cam[b].shape)
    return result


def inputs(seed=0, batch=2, classes=3, depth=6, size=(4, 5), image=(21, 30), dtype=torch.float32):
    """Features with a common part, so that many cosines lie above and many below a usual gamma."""
    random = torch.Generator().manual_seed(seed)
    cam = torch.randn(batch, classes, *size, generator=random, dtype=dtype)
    features = torch.randn(batch, depth, *size, generator=random, dtype=dtype) + 1.5
    return cam, features, torch.randn(batch, 3, *image, generator=random, dtype=dtype)


def module(gamma=0.7, iterations=1, depth=6, dtype=torch.float32):
    torch.manual_seed(1)
    return PixelRelationshipConstraint(depth, gamma, iterations).to(dtype)


def double(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize(
    ("gamma", "iterations", "size"),
    [(0.7, 1, (4, 5)), (0.6, 2, (4, 5)), (0.9, 1, (3, 3)), (0, 1, (1, 4)), (0.999, 1, (4, 5)), (0.5, 3, (1, 1))],
)
def test_equals_the_formula(gamma, iterations, size):
    prc = module(gamma, iterations)
    arrays = inputs(size=size)
    weight = prc.projection.weight[:, :, 0, 0]
    expected = reference(*double(weight, *arrays), gamma, iterations)
    maps = prc(*arrays)
    assert maps.dtype == torch.float32 and maps.shape == arrays[0].shape
    assert largest_error(maps.detach().numpy(), expected) < 1e-6


def test_the_input_is_hard_enough():
    """Of the affinities that the comparison rests on, a good part is cut and a good part kept."""
    kept = (module().affinity(*inputs()[1:]) > 0).float().mean()
    assert 0.2 < kept < 0.8


@pytest.mark.parametrize(("gamma", "iterations"), [(0.9991, 1), (-0.1, 1), (float("nan"), 1), (0.7, -1)])
def test_constants_out_of_range(gamma, iterations):
    """Above 0.999, columns would be empty."""
    with pytest.raises(ValueError, match="iterations" if iterations < 0 else "gamma"):
        PixelRelationshipConstraint(6, gamma, iterations)


def test_no_iteration_is_no_constraint():
    cam, features, image = inputs()
    prc = module(iterations=0)
    assert torch.equal(prc(cam, features, image), cam)
    assert not prc.projection.weight.requires_grad  # a process group would wait for its gradient


def test_zeros_give_no_nan():
    cam, features, image = inputs()
    features = torch.zeros_like(features).requires_grad_()
    maps = module()(cam, features, torch.zeros_like(image))
    maps.sum().backward()
    assert maps.isfinite().all() and features.grad.isfinite().all()
    lone = inputs()[1]  # one dead pixel must not disturb the others
    lone[:, :, 1, 2], image[:] = 0, 0
    assert module()(cam, lone, image).isfinite().all()


def test_mixed_precision_does_not_reach_it():
    cam, features, image = inputs()
    prc = module(iterations=2)
    plain = prc(cam, features, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prc(cam, features, image), plain)
        low = prc(cam.bfloat16(), features.bfloat16(), image)
    assert low.dtype == torch.float32  # what arrives rounded is computed exactly from there
    assert torch.equal(low, prc(cam.bfloat16().float(), features.bfloat16().float(), image))


@pytest.mark.parametrize("iterations", [1, 2])
def test_gradients_by_finite_differences(iterations):
    cam, features, image = (
        tensor.requires_grad_()
        for tensor in inputs(batch=1, classes=2, depth=3, size=(2, 3), image=(5, 7), dtype=torch.float64)
    )
    prc = module(0.7, iterations, 3, torch.float64)
    weight = prc.projection.weight

    def constrained(cam, features, image, weight):
        parameters = {"projection.weight": weight}
        return torch.func.functional_call(prc, parameters, (cam, features, image))

    assert torch.autograd.gradcheck(constrained, (cam, features, image, weight))
