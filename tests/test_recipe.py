"""The training recipe: the patches and the order of an epoch, ranges of constants, and ignored pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import train_classification
import train_segmentation
from tests.test_training import Fixed
from tools.command import UserError
from tools.devices import make_accelerator
from tools.training import EpochBatches, Training


@given(size=st.integers(1, 60), batch=st.integers(1, 12), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_an_epoch_reads_each_patch_at_most_once(size, batch, seed, epoch):
    if size < batch:
        with pytest.raises(UserError, match=f"{size} training patches.* batch_size .{batch}"):
            EpochBatches(size, batch, seed)
        return
    sampler = EpochBatches(size, batch, seed)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler) == size // batch  # the last incomplete one is dropped
    assert all(len(part) == batch for part in batches)
    drawn = [key for part in batches for key in part]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= {(epoch, index) for index in range(size)}


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochBatches(40, 4, seed)
        sampler.epoch = epoch
        return [index for batch in sampler for _, index in batch]

    first = order(0, 1)
    torch.manual_seed(99)
    assert order(0, 1) == first
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_partition_each_batch(processes):
    batches = list(EpochBatches(30, 8, 3))
    parts = [list(EpochBatches(30, 8, 3, process, processes)) for process in range(processes)]
    for index, batch in enumerate(batches):
        shared = [part[index] for part in parts]
        assert {len(share) for share in shared} == {8 // processes}
        assert sorted(key for share in shared for key in share) == sorted(batch)
    with pytest.raises(UserError, match=r"batch_size is 9.* 2 processes"):
        EpochBatches(30, 9, 0, 0, 2)


@pytest.mark.parametrize("step", [train_classification, train_segmentation])
@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("lr", -0.1), ("momentum", 1.0), ("weight_decay", -1.0), ("seed", 2**40)]
)
def test_constants_that_cannot_work(step, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}, but"):
        step.Constants(**{name: value})


def reference_steps(parameters, samples, batches, steps, recipe):
    """SGD of two linear layers, the second one new, on the mean squared error: the released optimiser in float64.

    It receives the weight decay in place of the momentum; Nesterov; biases without decay.
    """
    lr, momentum, decay = recipe
    first, first_bias, second, second_bias = parameters
    velocities = [np.zeros_like(value) for value in parameters]
    for step, batch in enumerate(batches):
        x, y = samples[0][batch], samples[1][batch]
        hidden = x @ first.T + first_bias
        error = 2 * (hidden @ second.T + second_bias - y) / y.size
        back = error @ second
        gradients = back.T @ x, back.sum(0), error.T @ hidden, error.sum(0)
        rates = [lr * factor * (1 - step / steps) ** 0.9 for factor in (1, 2, 10, 20)]
        for value, gradient, velocity, rate in zip(parameters, gradients, velocities, rates, strict=True):
            decayed = gradient + decay * value if value.ndim == 2 else gradient
            velocity[...] = momentum * velocity + decayed
            value -= rate * (decayed + momentum * velocity)


@pytest.mark.parametrize(
    ("step", "recipe"),
    [(train_classification, (0.1, 1e-4, 1e-4)), (train_segmentation, (0.007, 4e-5, 4e-5))],
    ids=["step 1", "step 5"],
)
def test_five_optimiser_steps_equal_those_of_the_release(step, recipe, tmp_path):
    """With the defaults of each step, on ten images of one pixel and targets of two numbers."""
    torch.manual_seed(0)
    backbone, head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    model = nn.Sequential(backbone, head, nn.Flatten()).double()
    x, y = torch.randn(10, 3, dtype=torch.double), torch.randn(10, 2, dtype=torch.double)
    expected = [value.detach().numpy().copy().reshape(value.shape[:2]) for value in model.parameters()]

    args = step.Constants(epochs=2, batch_size=2, workers=0)
    step_of_args = SimpleNamespace(args=args, accelerator=make_accelerator("fp32"), path=tmp_path)
    with Training(step_of_args, model, Fixed(x[:, :, None, None], y), [backbone]) as training:
        next(training.epochs())
        for images, targets in training.batches():
            training.backward(nn.functional.mse_loss(training.model(images), targets))
    batches = [[index for _, index in batch] for batch in EpochBatches(10, 2, 0)]
    reference_steps(expected, (x.numpy(), y.numpy()), batches, 10, recipe)
    assert len(batches) == 5
    for value, other in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(value.detach().numpy().reshape(value.shape[:2]), other, rtol=1e-9, atol=1e-12)
