"""Trainings: their schedule and log, killed ones that continue, diverging ones, the choice of the epoch."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch import nn
from torch.nn import functional as F

import train_classification
import train_segmentation
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from models.ir_loss import image_reconstruction_loss
from tests.conftest import ROOT
from tests.steps import TRAIN, Recipe, experiment, step
from tools.augment import TrainingPatches
from tools.command import UserError
from tools.devices import make_accelerator
from tools.folders import StepFolder
from tools.image_labels import read_image_labels
from tools.logs import read_log
from tools.training import (
    FEW_PATCHES,
    FROM_SCRATCH,
    SMALL_DATA,
    EpochBatches,
    Training,
    advise,
    check_recipe,
    parameter_groups,
)


class Net(nn.Module):
    """Something of all that a continued training must restore: BatchNorm statistics, dropout, pretrained and new."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        return self.head(self.features(x)).mean((2, 3))


def compute_loss(model, images, targets):
    loss = F.multilabel_soft_margin_loss(model(images), targets)
    return {"loss": loss, "half": loss / 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(11):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


def descend(course, loss):
    """The epochs that are left, as the steps loop over them."""
    for epoch in course.epochs():
        for batch in course.batches():
            course.backward(**loss(course.model, *batch))
        yield epoch


@pytest.fixture
def training(images, tmp_path):
    """training(name, constants, loss, score) trains Net in tmp_path/name, from the same beginning each time."""

    def start(name, constants=None, loss=compute_loss, score=None, ids=11):
        constants = constants or Recipe()
        labels = {f"{index:02}": np.array([index % 2, index % 3 == 0], bool) for index in range(ids)}
        torch.manual_seed(7)
        model = Net()
        patches = TrainingPatches(sorted(labels), images, labels, 2, 16, constants.seed)
        with StepFolder(tmp_path / name, constants).open(".pt") as folder:
            folder.accelerator = make_accelerator("fp32")
            with Training(folder, model, patches, [model.features]) as course:
                for _ in descend(course, loss):
                    if score:
                        course.keep_best(train_miou=score(model))
        return model

    start.folder = tmp_path
    return start


def log(folder):
    return read_log(folder / "log.jsonl")


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_log_holds_schedule_and_losses(training):
    training("run")
    rows = log(training.folder / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [2, 4, 6]  # 11 patches, batch 4
    assert [row["lr"] for row in rows] == pytest.approx([0.05 * (1 - step / 6) ** 0.9 for step in (1, 3, 5)], rel=1e-12)
    for row in rows:
        assert row["half"] == pytest.approx(row["loss"] / 2) and row["images_per_second"] > 0
    assert list((training.folder / "run" / "tensorboard").iterdir())


def breaking(after):
    """A loss that raises as a killed process would end, after so many steps."""
    steps = []

    def loss(*arguments):
        if len(steps) == after:
            raise RuntimeError("killed")
        steps.append(None)
        return compute_loss(*arguments)

    return loss


@pytest.mark.parametrize(
    ("after", "workers"), [(0, 0), (1, 0), (2, 0), (3, 0), (5, 0), (3, 1)]
)  # steps; an epoch has two
def test_a_continued_training_ends_with_equal_weights(training, after, workers):
    training("whole")
    with pytest.raises(RuntimeError, match="killed"):
        training("killed", Recipe(workers=workers), loss=breaking(after))
    killed = training.folder / "killed"
    assert (killed / "checkpoint.pt").exists() == (after >= 2)
    with open(killed / "log.jsonl", "a") as file:  # as if it had been killed between the log and the checkpoint
        file.write(json.dumps({"epoch": after // 2 + 1, "step": 9, "loss": 0.0}) + "\n")
    training("killed", Recipe(workers=workers))
    for name in ("model.pt", "checkpoint.pt"):
        assert equal(*(weights(training.folder / run / name) for run in ("whole", "killed")))
    rows = [log(training.folder / run) for run in ("whole", "killed")]
    assert [row | {"images_per_second": 0} for row in rows[0]] == [row | {"images_per_second": 0} for row in rows[1]]


@pytest.mark.long
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_leaves_the_same_checkpoint(training, monkeypatch):
    """Names and shapes are those of the model; without dropout, drawn in another way, only rounding differs."""
    monkeypatch.setattr(Net, "forward", lambda self, x: self.head[1](self.features(x)).mean((2, 3)))
    training("plain", Recipe(epochs=1))
    model = training("compiled", Recipe(epochs=1, compile=True))
    assert model._compiled_call_impl is not None
    plain, compiled = (weights(training.folder / run / "model.pt") for run in ("plain", "compiled"))
    assert list(plain) == list(compiled) == list(Net().state_dict())
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name
    training("compiled", Recipe(epochs=1))  # where it is compiled is no setting: the folder stays usable


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_recipe(Recipe(), 11)
    with pytest.raises(UserError, match=r"no-such-compiler: .*--no-compile"):
        check_recipe(Recipe(compile=True), 11)


def test_nothing_is_read_from_the_device_within_an_epoch(training, monkeypatch):
    """Each number read stalls a GPU: losses are read once an epoch, however many steps it has."""
    reads = []
    for name in ("item", "__float__", "tolist", "__bool__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, plain=plain, name=name: (reads.append(name), plain(self))[1]
        )

    def count(ids):
        reads.clear()
        training(f"run{ids}", Recipe(epochs=1, batch_size=2), ids=ids)
        return len([name for name in reads if name == "__float__"]), reads.count("item") + reads.count("__bool__")

    few, many = count(4), count(10)
    assert few == many and few[0] == 2  # the loss and its half


def test_nan_ends_the_training_and_the_checkpoint_is_kept(training):
    steps = []

    def loss(*arguments):
        steps.append(None)
        return {"loss": compute_loss(*arguments)["loss"] * (float("nan") if len(steps) > 2 else 1)}

    with pytest.raises(UserError, match=r"nan in epoch 2: lower lr .*after epoch 1 is kept in .*checkpoint\.pt"):
        training("run", loss=loss)
    for name in ("checkpoint.pt", "model.pt"):
        assert all(value.isfinite().all() for value in weights(training.folder / "run" / name).values())
    assert len(log(training.folder / "run")) == 1
    with pytest.raises(UserError, match="nan in epoch 1: lower lr") as caught:
        training("first", loss=loss)
    assert "checkpoint" not in str(caught.value)  # there is none yet


@pytest.mark.parametrize(("scores", "best"), [([0.2, 0.7, 0.3], 2), ([0.5, 0.5, 0.5], 1), ([0.1, 0.2, 0.3], 3)])
def test_the_best_epoch_is_kept(training, scores, best):
    states, values = [], iter(scores)

    def score(model):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(values)

    training("run", score=score)
    assert equal(weights(training.folder / "run" / "model.pt"), states[best - 1])
    assert equal(weights(training.folder / "run" / "checkpoint.pt"), states[-1])
    assert [row["train_miou"] for row in log(training.folder / "run")] == scores


def test_the_best_epoch_survives_a_kill(training):
    with pytest.raises(RuntimeError, match="killed"):
        training("run", loss=breaking(2), score=lambda model: 0.7)
    best = weights(training.folder / "run" / "model.pt")
    training("run", score=lambda model: 0.6)
    assert equal(weights(training.folder / "run" / "model.pt"), best)


def test_other_constants_are_advised_for_few_patches_and_the_papers_rates(capsys):
    def advice(patches, **changes):
        advise(Recipe(**changes), patches)
        return capsys.readouterr().out

    for weights, constants in (("none", FROM_SCRATCH), ("imagenet", SMALL_DATA)):
        lines = advice(FEW_PATCHES - 1, weights=weights, epochs=9).splitlines()
        assert lines[1:] == [f"  step {step}: {words}" for step, words in constants.items()]
    assert advice(FEW_PATCHES) == advice(10, lr=0.01) == advice(10, momentum=0.5) == ""


def test_the_advised_constants_can_be_pasted():
    scripts = {1: train_classification, 5: train_segmentation}
    for number, words in [*SMALL_DATA.items(), *FROM_SCRATCH.items()]:
        assert tyro.cli(scripts[number].Constants, args=words.split()).epochs in (25, 30)
        assert words in (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")


def test_a_damaged_log_does_not_end_a_training(training):
    """After a power cut: what can be read is kept."""
    training("run", Recipe(epochs=2))
    file = training.folder / "run" / "log.jsonl"
    row = log(file.parent)[0]
    for content, rows in (
        (b"", []),
        (b"\xff\xfe\0", []),
        (b"[1]\n3\n" + b"[" * 100_000, []),
        (json.dumps(row).encode() + b'\n{"epoch": 2, "lo', [row]),
    ):
        file.write_bytes(content)
        training("run", Recipe(epochs=2))
        assert log(file.parent) == rows
    file.unlink()
    training("run", Recipe(epochs=2))


def test_a_finished_training_says_so_and_adds_no_tensorboard_file(training, capsys):
    training("run")
    folder = training.folder / "run"
    model, events = (folder / "model.pt").read_bytes(), sorted((folder / "tensorboard").iterdir())
    training("run", loss=breaking(0))
    assert "finished after epoch 3 of 3" in capsys.readouterr().out
    assert sorted((folder / "tensorboard").iterdir()) == events
    assert (folder / "model.pt").read_bytes() == model and len(log(folder)) == 3


def test_momentum_of_another_shape_is_refused(training):
    """torch's fused optimiser would read beyond its end."""
    training("run", Recipe(epochs=1))
    file = training.folder / "run" / "checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    good = checkpoint["optimiser"]["state"][0]["momentum_buffer"]
    for buffer in (torch.zeros(0), good.flatten(), "none"):
        checkpoint["optimiser"]["state"][0]["momentum_buffer"] = buffer
        torch.save(checkpoint, file)
        with pytest.raises(UserError, match=r"checkpoint\.pt .*--overwrite"):
            training("run", Recipe(epochs=1))


def test_every_step_is_taken_in_training_mode(training):
    """The choice of the epoch evaluates the model between two epochs."""
    modes = []

    def loss(model, *batch):
        modes.append(model.training)
        return compute_loss(model, *batch)

    training("run", loss=loss, score=lambda model: float(model.eval().training))
    assert modes == [True] * 6


def test_dropout_differs_between_epochs(training):
    """The random numbers of an epoch are given by seed, epoch and process: a second epoch draws others."""
    draws = []

    def loss(*arguments):
        draws.append(tuple(torch.rand(3).tolist()))
        return compute_loss(*arguments)

    training("run", loss=loss)
    training("again", loss=loss)
    assert len(set(draws[:6])) == 6 and draws[:6] == draws[6:]


class Fixed(torch.utils.data.Dataset):
    """The same images and targets in every epoch, as often as asked."""

    def __init__(self, images, targets, times=1):
        self.images, self.targets, self.times = images, targets, times

    def __len__(self):
        return len(self.images) * self.times

    def __getitem__(self, key):
        index = key[1] % len(self.images)
        return self.images[index], self.targets[index]


def classification(size=32, count=5):
    """A small classifier, its losses, images and image-level labels."""

    def loss(model, images, targets):
        logits, maps = model(images)
        classification = F.multilabel_soft_margin_loss(logits.float(), targets)
        reconstruction = image_reconstruction_loss(maps, images, targets, 4)
        return {"loss": classification + 0.1 * reconstruction, "reconstruction": reconstruction}

    model = Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=True)
    return model, loss, torch.randn(count, 3, size, size), (torch.rand(count, 3) < 0.5).float()


def segmentation(size=32, count=5):
    """A small segmenter and its loss; labelled pixels differ between images, and one image has none."""

    def loss(model, images, targets):
        summed = F.cross_entropy(model(images).float(), targets, ignore_index=255, reduction="sum")
        return {"loss": summed / (targets != 255).sum().clamp_min(1)}

    labels = torch.randint(0, 3, (count, size, size))
    labels[0, 4:], labels[1, :, 9:], labels[3] = 255, 255, 255
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=True)
    return model, loss, torch.randn(count, 3, size, size), labels


def in_evaluation_mode(module, mode=True):
    """In place of Module.train: BatchNorm's statistics stay, and nothing is dropped."""
    for child in module.modules():
        child.training = False
    return module


@pytest.mark.parametrize("make", [classification, segmentation], ids=lambda make: make.__name__)
def test_micro_batches_equal_the_batch(make, tmp_path, monkeypatch):
    """Gradients and logged losses, with BatchNorm's statistics frozen and without dropout, in float64."""
    torch.manual_seed(0)
    model, loss, images, targets = make()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    gradients = {}
    monkeypatch.setattr(type(model), "train", in_evaluation_mode)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *_: None)
    for size in (0, 1, 2, 3, 9):
        args = Recipe(epochs=1, batch_size=5, micro_batch=size)
        with StepFolder(tmp_path / f"{size}", args).open(".pt") as folder:
            folder.accelerator = make_accelerator("fp32")
            with Training(folder, model.double(), Fixed(images.double(), targets), [model.backbone]) as course:
                assert list(descend(course, loss)) == [1]
        gradients[size] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert log(tmp_path / f"{size}")[0]["loss"] == pytest.approx(log(tmp_path / "0")[0]["loss"], rel=1e-6)
    assert sum(bool(gradient.any()) for gradient in gradients[0]) > 20
    for parts in gradients.values():
        for one, other in zip(parts, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.fixture
def tiny(tmp_path, make_tiny_dataset, run_script):
    """The root of the tiny data set with its image-level labels."""
    make_tiny_dataset(tmp_path)
    run_script("datasetsprocess/process.py", "--dataset", "tiny", "--root", tmp_path)
    return tmp_path


@pytest.fixture
def first_batch(tiny):
    """The one batch of the first epoch: targets of `TrainingPatches` -> images and targets of the batch."""

    def batch(targets):
        images = tiny / "datasets" / "tiny" / "train" / "images"
        patches = TrainingPatches(TRAIN, images, targets, 3, 64, 0)
        (keys,) = EpochBatches(10, 10, 0)
        return [torch.stack(parts) for parts in zip(*(patches[key] for key in keys), strict=True)]

    return batch


def assert_steps_along(loss, model, before, file, decay):
    """The weights in `file` are `before` after one step of SGD without momentum, at the rates for new weights.

    Rounding moves single gradients, so the steps of all weights are compared together.
    """
    loss.backward()
    after, squares, error = weights(file), 0.0, 0.0
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in parameter_groups([], list(model.children()), 1e-3, decay):
        for parameter in group["params"]:
            name = names[parameter]
            expected = -group["lr"] * (parameter.grad + group["weight_decay"] * before[name])
            squares += float(expected.square().sum())
            error += float((after[name] - before[name] - expected).square().sum())
    assert squares > 0 and error < 0.01 * squares


def test_the_loss_of_step_1(tiny, first_batch):
    """One step of the script against the sum of both losses, written out here."""
    options = {"epochs": 1, "batch_size": 10, "lr": 1e-3, "momentum": 0.0, "ir_weight": 0.4, "experiment": "one"}
    step("train_classification", tiny, **options)
    file = tiny / "datasets" / "tiny" / "train" / "image_labels.csv"
    images, targets = first_batch(read_image_labels(file, ("ground", "roof", "tree"), TRAIN))
    torch.manual_seed(0)
    model = Classifier(Backbone("resnet18", "none"), 3, gamma=0.7, iterations=1, train_all=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, maps = model(images)
    signs = 2 * targets - 1
    classification = F.softplus(-signs * logits).mean()
    reconstruction = image_reconstruction_loss(maps, images, targets, 4)
    (row,) = log(experiment(tiny, "one") / "classifier")
    assert row["classification"] == pytest.approx(classification.item(), rel=1e-4)
    assert row["reconstruction"] == pytest.approx(reconstruction.item(), rel=1e-4)
    assert row["loss"] == pytest.approx(row["classification"] + 0.4 * row["reconstruction"], rel=1e-6)
    loss = classification + 0.4 * reconstruction
    assert_steps_along(loss, model, before, experiment(tiny, "one") / "classifier" / "model.pt", 1e-4)


def test_the_loss_of_step_5(tiny, first_batch, monkeypatch):
    """One step of the script against the cross-entropy of the labelled pixels in NumPy; without dropout."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    labels = tiny / "datasets" / "tiny" / "train" / "labels"
    options = {"epochs": 1, "batch_size": 10, "lr": 1e-3, "momentum": 0.0, "labels": "truth", "experiment": "one"}
    step("train_segmentation", tiny, **options)
    images, targets = first_batch(labels)
    torch.manual_seed(0)
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, 16, freeze_norm=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log_p = model(images).log_softmax(1)
    labelled = targets != 255
    assert 0 < labelled.float().mean() < 1
    loss = -log_p.permute(0, 2, 3, 1)[labelled].gather(1, targets[labelled][:, None]).mean()
    (row,) = log(experiment(tiny, "one") / "segmenter")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_steps_along(loss, model, before, experiment(tiny, "one") / "segmenter" / "model.pt", 4e-5)


def test_labels_that_are_all_ignored_cost_nothing(tiny):
    for file in (tiny / "datasets" / "tiny" / "train" / "labels").glob("*.png"):
        Image.new("L", (64, 64), 255).save(file)
    step("train_segmentation", tiny, labels="truth", experiment="ignored")
    (row,) = log(experiment(tiny, "ignored") / "segmenter")
    assert row["loss"] == 0
