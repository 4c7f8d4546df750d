"""The image reconstruction loss against its formula, written a second time in float64 NumPy."""

import numpy as np
import pytest
import torch

from models.ir_loss import image_reconstruction_loss
from tests.references import bilinear


def reference(cam, image, label, tiles):
    """All in loops: maps, tiles, colours and squared errors of each image."""
    side, total, count = round(tiles**0.5), 0.0, 0
    for maps, picture, present in zip(cam, image, label, strict=True):
        positive = np.maximum(maps, 0)
        maps = np.maximum(positive - 1e-5, 0) / (positive.max((1, 2), keepdims=True) + 1e-5) * present[:, None, None]
        target = bilinear(picture, maps.shape[1:], align_corners=False)
        for rows in np.array_split(np.arange(maps.shape[1]), side):
            for columns in np.array_split(np.arange(maps.shape[2]), side):
                s, t = maps[:, rows][:, :, columns], target[:, rows][:, :, columns]
                t = t / np.maximum(np.sqrt((t**2).sum(0)), 1e-12)
                painted = np.zeros_like(t)
                for k in range(len(s)):
                    colour = (s[k] * t).sum((1, 2)) / (s[k].sum() + 1e-5)
                    painted += s[k] * colour[:, None, None]
                total += ((painted - t) ** 2).sum()
                count += t.size
    return total / count


def inputs(seed=0, batch=2, classes=3, size=(6, 8), image=(25, 33), dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    cam = torch.randn(batch, classes, *size, generator=random, dtype=dtype) * 3 + 1
    label = torch.rand(batch, classes, generator=random) < 0.6
    label[:, 0] = True
    return cam, torch.randn(batch, 3, *image, generator=random, dtype=dtype) + 0.5, label


def double(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize(
    ("tiles", "size", "scale"),
    [
        (1, (6, 8), 1),
        (4, (6, 8), 1),
        (4, (7, 5), 1e-3),
        (9, (6, 9), 1),
        (9, (7, 8), 1e4),
        (4, (2, 2), 1),
        (1, (1, 1), 1),
    ],
)
def test_equals_the_formula(tiles, size, scale):
    for seed in range(4):
        cam, image, label = inputs(seed, size=size)
        loss = image_reconstruction_loss(cam * scale, image, label, tiles)
        assert loss.shape == () and loss.dtype == torch.float32
        assert float(loss) == pytest.approx(reference(*double(cam * scale, image, label), tiles), rel=3e-6)


@pytest.mark.parametrize("tiles", [0, 2, 8, -4, 9])
def test_tiles_must_be_a_square_that_fits(tiles):
    with pytest.raises(ValueError, match=f"tiles is {tiles}"):
        image_reconstruction_loss(*inputs(size=(2, 3)), tiles)


def test_zeros_give_no_nan():
    for cam, image, label in (
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 9, 9), torch.ones(2, 3)),
        (-torch.ones(2, 3, 4, 4), torch.randn(2, 3, 9, 9), torch.ones(2, 3)),
        (torch.randn(2, 3, 4, 4), torch.full((2, 3, 9, 9), 0.4), torch.zeros(2, 3)),
    ):
        cam.requires_grad_()
        loss = image_reconstruction_loss(cam, image, label, 4)
        loss.backward()
        assert loss.isfinite() and cam.grad.isfinite().all()
        if not label.any():  # nothing is painted: the target's own size, a third for each channel
            assert float(loss.detach()) == pytest.approx(1 / 3, rel=1e-6) and not cam.grad.any()


def test_mixed_precision_does_not_reach_it():
    cam, image, label = inputs()
    plain = image_reconstruction_loss(cam, image, label, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(image_reconstruction_loss(cam, image, label, 4), plain)
        low = image_reconstruction_loss(cam.bfloat16(), image, label, 4)
    assert low.dtype == torch.float32
    assert torch.equal(low, image_reconstruction_loss(cam.bfloat16().float(), image, label, 4))


@pytest.mark.parametrize("tiles", [1, 4])
def test_gradients_by_finite_differences(tiles):
    cam, image, label = inputs(batch=1, classes=2, size=(3, 4), image=(5, 7), dtype=torch.float64)
    label[:] = True
    assert torch.autograd.gradcheck(
        lambda cam: image_reconstruction_loss(cam, image, label, tiles), (cam.requires_grad_(),)
    )


def test_the_image_is_a_target_without_gradient():
    cam, image, label = inputs()
    cam.requires_grad_()
    image.requires_grad_()
    image_reconstruction_loss(cam, image, label, 4).backward()
    assert image.grad is None and cam.grad.abs().sum() > 0
