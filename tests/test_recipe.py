"""The training recipe: the patches and the order of an epoch, ranges of constants, and ignored pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import train_classification
import train_segmentation
from tests.steps import Recipe
from tools.command import UserError
from tools.training import EpochBatches, check_recipe


@given(size=st.integers(1, 60), batch=st.integers(1, 12), seed=st.integers(0, 9), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_reads_each_patch_at_most_once(size, batch, seed, epoch):
    if size < batch:
        with pytest.raises(
            UserError, match=f"there are {size} training patches, fewer than one batch: lower batch_size .{batch}"
        ):
            EpochBatches(size, batch, seed)
        return
    sampler = EpochBatches(size, batch, seed)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler) == size // batch
    assert all(len(part) == batch for part in batches)  # the last incomplete one is dropped
    drawn = [index for part in batches for _, index in part]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(size))
    assert {number for part in batches for number, _ in part} == {epoch}


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
    whole = list(EpochBatches(30, 8, 3))
    parts = [list(EpochBatches(30, 8, 3, process, processes)) for process in range(processes)]
    for index, batch in enumerate(whole):
        shared = [part[index] for part in parts]
        assert {len(share) for share in shared} == {8 // processes}
        assert sorted(key for share in shared for key in share) == sorted(batch)
    with pytest.raises(UserError, match="batch_size is 9, which cannot be shared out evenly to 2 processes"):
        EpochBatches(30, 9, 0, 0, 2)


@pytest.mark.parametrize("step", [train_classification, train_segmentation])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", -1),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1.0),
        ("workers", -1),
        ("seed", -1),
        ("seed", 2**40),
    ],
)
def test_constants_that_cannot_work(step, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}, but"):
        step.Constants(**{name: value})


def test_fewer_patches_than_a_batch_are_refused():
    check_recipe(Recipe(batch_size=11), 11)
    with pytest.raises(UserError, match=r"there are 11 training patches, fewer than one batch: lower batch_size .12"):
        check_recipe(Recipe(batch_size=12), 11)


def test_a_batch_that_is_all_ignore_costs_nothing():
    model = nn.Conv2d(3, 4, 1)
    x, labels = torch.randn(2, 3, 8, 8), torch.full((2, 8, 8), 255)
    loss = train_segmentation.compute_loss(model, x, labels)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0 and not model.weight.grad.any()
    labels[0, 0, :2] = torch.tensor([1, 3])
    logits = model(x).detach().double()[0, :, 0]
    expected = -np.mean([logits[:, i].log_softmax(0)[k] for i, k in enumerate((1, 3))])
    assert float(train_segmentation.compute_loss(model, x, labels)["loss"].detach()) == pytest.approx(
        expected, rel=1e-6
    )
