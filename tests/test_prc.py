"""The pixel relationship constraint against its formula, written a second time in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    [
        (0.7, 1, (4, 5)),
        (0.6, 2, (4, 5)),
        (0.9, 1, (3, 3)),
        (0, 1, (1, 4)),
        (0.999, 1, (4, 5)),
        (0.7, 0, (4, 5)),
        (0.5, 3, (1, 1)),
    ],
)
def test_equals_the_formula(gamma, iterations, size):
    prc = module(gamma, iterations)
    arrays = inputs(size=size)
    weight = prc.projection.weight[:, :, 0, 0]
    expected = reference(*double(weight, *arrays), gamma, iterations)
    found = prc(*arrays)
    assert found.dtype == torch.float32 and found.shape == arrays[0].shape
    assert largest_error(found.detach().numpy(), expected) < 1e-6


def test_the_input_is_hard_enough():
    """Of the affinities that the comparison rests on, a good part is cut and a good part kept."""
    kept = (module().affinity(*inputs()[1:]) > 0).float().mean()
    assert 0.2 < kept < 0.8


def test_projection_equals_the_formula():
    _, features, image = inputs()
    prc = module()
    weight, evidence, pictures = double(prc.projection.weight[:, :, 0, 0], features, image)
    inputs_of_it = np.concatenate([bilinear(pictures, (4, 5), align_corners=True), evidence], 1)
    g = np.einsum("oc,bchw->bohw", weight, inputs_of_it).reshape(2, 6, 20)
    expected = (g / np.linalg.norm(g, axis=1, keepdims=True)).transpose(0, 2, 1)
    assert largest_error(prc.project(features, image).detach().numpy(), expected) < 1e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), gamma=st.floats(0, 0.999), height=st.integers(1, 5), width=st.integers(1, 5))
def test_columns_sum_to_one(seed, gamma, height, width):
    cam, features, image = inputs(seed, size=(height, width))
    prc = module(gamma)
    affinity = prc.affinity(features, image)
    assert affinity.shape == (2, height * width, height * width)
    assert (affinity >= 0).all()
    assert torch.allclose(affinity.sum(1), torch.ones(()), atol=1e-6)
    found, cam = prc(cam, features, image).flatten(2), cam.flatten(2)  # so every pixel is a mean of pixels
    assert (found <= cam.amax(2, keepdim=True) + 1e-5).all() and (found >= cam.amin(2, keepdim=True) - 1e-5).all()


def test_limits_of_gamma():
    cam, features, image = inputs()
    found = module(0.999)(cam, features, image)  # nothing but the diagonal
    assert torch.allclose(found, cam, rtol=1e-6, atol=0)
    everything = module(0).affinity(features, image)
    assert (everything > 0).all()
    for wrong in (0.9991, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"gamma is .* from 0 to 0.999"):
            PixelRelationshipConstraint(6, wrong, 1)
    with pytest.raises(ValueError, match="iterations is -1"):
        PixelRelationshipConstraint(6, 0.7, -1)


def test_no_iteration_is_no_constraint():
    cam, features, image = inputs()
    prc = module(iterations=0)
    assert torch.equal(prc(cam, features, image), cam)
    assert not any(
        parameter.requires_grad for parameter in prc.parameters()
    )  # a process group would wait for its gradient


def test_equal_pixels_share_their_evidence():
    cam, features, image = inputs()
    features, image = features[:, :, :1, :1].expand_as(features), torch.full_like(image, 0.3)
    found = module()(cam, features, image)
    assert torch.allclose(found, cam.mean((2, 3), keepdim=True).expand_as(cam), atol=1e-6)


def test_zeros_give_no_nan():
    cam, features, image = inputs()
    features = torch.zeros_like(features).requires_grad_()
    found = module()(cam, features, torch.zeros_like(image))
    found.sum().backward()
    assert found.isfinite().all() and features.grad.isfinite().all()
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


def test_gradients_flow_through_the_affinity():
    cam, features, image = inputs()
    features.requires_grad_()
    prc = module()
    prc(cam, features, image).square().sum().backward()  # the map itself asks for no gradient
    assert features.grad.abs().sum() > 0 and prc.projection.weight.grad.abs().sum() > 0


def test_rescaled_features_change_nothing():
    """Only directions count: with a black image, features of double length give the same maps."""
    cam, features, image = inputs()
    image = torch.zeros_like(image)
    prc = module()
    assert torch.allclose(prc(cam, 2 * features, image), prc(cam, features, image), atol=1e-6)
