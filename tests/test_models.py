"""Backbones, classifier and segmenter: shapes, strides, weights from files, and what learns."""

import pickle
import re

import pytest
import torch
from torch import nn
from torchvision import models

from models.backbone import NAMES, Backbone, fold_batchnorm
from models.classifier import Classifier
from models.deeplab import AtrousSpatialPyramidPooling, ChannelAttention, DeepLabV3Plus, SpatialAttention
from tools.command import UserError
from tools.training import load_backbone, parameter_groups

CHANNELS = {
    "resnet18": (64, 128, 512),
    "resnet34": (64, 128, 512),
    "resnet50": (256, 512, 2048),
    "resnet101": (256, 512, 2048),
    "mobilenet_v2": (24, 32, 1280),
}


def norms(module):
    return [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", NAMES)
def test_backbones_have_output_stride_16_without_dilation(name):
    backbone = Backbone(name, "none").eval()
    with torch.inference_mode():
        for height, width in ((64, 96), (50, 33)):
            shapes = [tuple(features.shape) for features in backbone(torch.zeros(1, 3, height, width))]
            assert shapes == [
                (1, channels, -(-height // stride), -(-width // stride))
                for channels, stride in zip(CHANNELS[name], (4, 8, 16), strict=True)
            ]
    assert (backbone.low_channels, backbone.high_channels) == CHANNELS[name][::2]
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert {module.dilation for module in convolutions} == {(1, 1)}
    last = list(backbone.high.children())[-1] if name.startswith("res") else backbone.high[-3:]
    assert {module.stride for module in last.modules() if isinstance(module, nn.Conv2d)} == {(1, 1)}


def test_weights_are_those_of_torchvision():
    """The cut network computes what torchvision's does, up to the stage whose stride differs."""
    torch.manual_seed(0)
    network = models.resnet18().eval()
    backbone = Backbone("resnet18", network.state_dict()).eval()
    x = torch.randn(1, 3, 40, 40)
    low, mid, high = backbone(x)
    expected = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x)))))
    assert torch.equal(low, expected) and torch.equal(mid, network.layer2(expected))
    for module in (network.layer4[0].conv1, network.layer4[0].downsample[0]):
        module.stride = (1, 1)
    assert torch.equal(high, network.layer4(network.layer3(network.layer2(expected))))


@pytest.fixture(scope="module")
def weights():
    """Of ResNet-18, in half precision."""
    torch.manual_seed(3)
    return models.resnet18().half().state_dict()


def test_half_precision_weights_without_head_load(weights):
    headless = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    for state in (weights, headless):
        backbone = Backbone("resnet18", state)
        assert torch.equal(backbone.low[0].weight, weights["conv1.weight"].float())
        assert torch.equal(backbone.high[1][1].conv2.weight, weights["layer4.1.conv2.weight"].float())


def test_the_real_weights_load(shared_data):
    file = shared_data / "weights" / "mobilenet_v2_imagenet.pth"
    state = torch.load(file, weights_only=True)
    backbone = load_backbone("mobilenet_v2", str(file)).eval()
    assert torch.equal(backbone.low[0][0].weight, state["features.0.0.weight"].float())
    assert torch.equal(backbone.high[-1][0].weight, state["features.18.0.weight"].float())
    assert all(features.isfinite().all() for features in backbone(torch.randn(1, 3, 64, 64)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])  # every kind of block
def test_folded_batchnorm_changes_nothing_but_rounding(name):
    torch.manual_seed(0)
    backbone = Backbone(name, "none")
    with torch.no_grad():
        for norm in norms(backbone):  # statistics, scales and shifts that a mistake cannot leave without effect
            norm.running_mean.normal_(0, 0.3), norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5), norm.bias.normal_(0, 0.3)
    x = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        expected = backbone.eval().double()(x.double())
        fold_batchnorm(backbone.float())
        folded = backbone(x)
    assert not norms(backbone)
    for one, other in zip(folded, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


class Hostile:
    """Its pickle would write a file on loading."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize(("name", "other"), [("resnet18", "resnet34"), ("mobilenet_v2", "resnet18")])
def test_weights_of_another_network_are_refused(name, other):
    with pytest.raises(ValueError, match=f"fit {name}"):
        Backbone(name, models.get_model(other, weights=None).state_dict())


def test_incomplete_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"fit resnet18 .*40 values"):
        Backbone("resnet18", {key: value for key, value in weights.items() if "running" not in key})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("conv9.weight", torch.zeros(1), "fit resnet18"),
        ("conv1.weight", torch.zeros(64, 4, 7, 7), "fit resnet18"),
        ("conv1.weight", 3, "fit resnet18"),
        ("conv1.weight", torch.zeros(64, 3, 7, 7).to_sparse(), "fit resnet18"),
        ("conv1.weight", torch.full((64, 3, 7, 7), torch.nan), r"conv1\.weight .*finite"),
        ("conv1.weight", torch.full((64, 3, 7, 7), torch.inf), r"conv1\.weight .*finite"),
    ],
    ids=["unknown", "shape", "number", "sparse", "nan", "infinite"],
)
def test_weights_that_do_not_fit_are_refused(weights, key, value, words):
    with pytest.raises(ValueError, match=words):
        Backbone("resnet18", weights | {key: value})


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="backbone is vgg16"):
        Backbone("vgg16", "none")


def test_bad_weights_files_are_refused_in_one_sentence(weights, tmp_path):
    contents = {"list": [1, 2], "tensor": torch.zeros(3), "hostile": {"state_dict": Hostile(tmp_path / "ran")}}
    for name, content in (contents | {"good": weights}).items():
        torch.save(content, tmp_path / name)
    (tmp_path / "truncated").write_bytes((tmp_path / "good").read_bytes()[:5000])
    (tmp_path / "pickle").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    (tmp_path / "text").write_bytes(b"\x80\x02 begins as a pickle")
    for name in [*contents, "truncated", "pickle", "text", "missing", "."]:
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as caught:
            load_backbone("resnet18", str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    load_backbone("resnet18", str(tmp_path / "good"))


@pytest.mark.parametrize("train_all", [False, True])
def test_what_the_classifier_trains(train_all):
    torch.manual_seed(0)
    model = Classifier(Backbone("resnet18", "none"), 4, gamma=0.7, iterations=1, train_all=train_all).train()
    before = [norm.running_mean.clone() for norm in norms(model.backbone)]
    logits, maps = model(torch.randn(2, 3, 64, 48))
    assert logits.shape == (2, 4) and maps.shape == (2, 4, 4, 3)
    (logits.square().sum() + maps.square().sum()).backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    early = {name for name, _ in model.named_parameters() if name.startswith(("backbone.low", "backbone.mid"))}
    assert learning == {name for name, _ in model.named_parameters()} - (set() if train_all else early)
    assert all(not torch.equal(norm.running_mean, old) for norm, old in zip(norms(model.backbone), before, strict=True))


def test_logits_are_the_mean_of_the_raw_maps():
    """PRC keeps the sum over pixels of no map, so a logit of its output would differ; without PRC both agree."""
    torch.manual_seed(0)
    backbone = Backbone("resnet18", "none").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        model = Classifier(backbone, 3, gamma=0.7, iterations=1, train_all=False).eval()
        raw = model.classifier(backbone(x)[2])
        logits, maps = model(x)
        assert torch.equal(logits, raw.mean((2, 3)))
        assert torch.equal(maps, model.prc(raw, backbone(x)[2], x)) and not torch.equal(maps, raw)
        logits, maps = Classifier(backbone, 3, gamma=0.7, iterations=0, train_all=False).eval()(x)
        assert torch.equal(logits, maps.mean((2, 3)))
    assert model.classifier.bias is None and model.prc.projection.weight.shape == (512, 515, 1, 1)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return DeepLabV3Plus(Backbone("resnet18", "none"), 5, width=16, freeze_norm=True)


def test_the_segmenter_answers_in_float32_under_autocast(segmenter):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert segmenter.eval()(torch.randn(1, 3, 33, 17)).dtype == torch.float32


def test_parts_of_the_segmenter(segmenter):
    assert [branch[0].dilation[0] for branch in segmenter.aspp.branches] == [1, 6, 12, 18]
    new = [module for part in (segmenter.aspp, segmenter.low, segmenter.decoder) for module in part.modules()]
    assert [module.p for module in new if isinstance(module, nn.Dropout)] == [0.5, 0.5, 0.1]
    assert {module.num_groups for module in new if isinstance(module, nn.GroupNorm)} == {4}
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in new)


def assert_kaiming_normal(weight):
    weight = weight.detach().double()
    deviation = (2 / weight[0].numel()) ** 0.5
    six_errors = 6 / (2 * weight.numel()) ** 0.5  # of a standard deviation estimated from so many weights
    assert float(weight.std()) == pytest.approx(deviation, rel=six_errors)
    assert float(weight.abs().max()) > 2 * deviation  # a uniform distribution ends at 1.73 standard deviations


def test_new_convolutions_start_kaiming_normal_and_attentions_as_torch_does():
    torch.manual_seed(0)
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 5, width=64, freeze_norm=True)
    attentions = [module for module in model.low[1:].modules() if isinstance(module, nn.Conv2d)]
    new = [module for part in (model.aspp, model.low, model.decoder) for module in part.modules()]
    new = [module for module in new if isinstance(module, nn.Conv2d) and module not in attentions]
    assert len(attentions) == 3 and len(new) == 10  # 6 in ASPP, 1 low-level, 3 in the decoder
    for module in new:
        assert_kaiming_normal(module.weight)
    for module in (*attentions, model.decoder[-1]):
        values = module.weight if module in attentions else module.bias
        bound = module.weight[0].numel() ** -0.5
        assert 0.1 * bound < float(values.detach().abs().max()) <= bound  # uniform: torch's default
    classifier = Classifier(Backbone("resnet18", "none"), 20, gamma=0.7, iterations=1, train_all=False)
    assert_kaiming_normal(classifier.classifier.weight)


def test_attention_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4)
    channel, spatial = ChannelAttention(6), SpatialAttention()
    down, up = (layer.weight[:, :, 0, 0] for layer in (channel.shared[0], channel.shared[2]))
    weights = [
        torch.sigmoid(sum(up @ (down @ pooled).relu() for pooled in (image.mean((1, 2)), image.amax((1, 2)))))
        for image in x
    ]
    assert torch.allclose(channel(x), x * torch.stack(weights)[:, :, None, None], atol=1e-6)
    pooled = torch.stack([x.mean(1), x.amax(1)], 1)
    assert torch.allclose(spatial(x), x * torch.sigmoid(spatial.convolution(pooled)), atol=1e-6)
    assert spatial(x).shape == x.shape


def test_image_pooling_reaches_every_pixel():
    aspp = AtrousSpatialPyramidPooling(8, 8).eval()
    with torch.no_grad():
        x = torch.randn(1, 8, 3, 50)
        other = x.clone()
        other[..., -1] += 5  # 49 pixels away from the first column, beyond the largest rate
        assert not torch.equal(aspp(x)[..., 0], aspp(other)[..., 0])


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_statistics_stay_while_scale_and_bias_learn(freeze):
    torch.manual_seed(0)
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, width=8, freeze_norm=freeze).train()
    old = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms(model)]
    assert old and all(norm.training != freeze for norm in norms(model))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for norm, (mean, var) in zip(norms(model), old, strict=True):
        assert (torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)) == freeze
        assert norm.weight.grad.any() and norm.bias.grad.any()
    assert model.aspp.fuse[1].training  # dropout is on
    model.eval()
    assert not any(module.training for module in model.modules())


def test_statistics_stay_frozen_on_several_gpus():
    """There BatchNorm becomes SyncBatchNorm."""
    model = DeepLabV3Plus(Backbone("resnet18", "none"), 3, width=8, freeze_norm=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    assert norms(model) and not any(norm.training for norm in norms(model))


@pytest.mark.parametrize("kind", ["classifier", "all", "deeplab"])
def test_parameter_groups(kind):
    """Every trainable parameter in exactly one group, with the rate and decay of the recipe."""
    backbone = Backbone("resnet18", "none")
    if kind == "deeplab":
        model = DeepLabV3Plus(backbone, 3, width=8, freeze_norm=True)
    else:
        model = Classifier(backbone, 3, gamma=0.7, iterations=1, train_all=kind == "all")
    new = [module for module in model.children() if module is not backbone]
    groups = parameter_groups([backbone], new, 0.1, 1e-4)
    grouped = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(grouped)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert grouped.keys() == {id(parameter) for parameter in trainable.values()}
    for name, parameter in trainable.items():
        bias, pretrained = name.endswith("bias"), name.startswith("backbone.")
        group = grouped[id(parameter)]
        assert group["lr"] == pytest.approx(0.1 * (1 if pretrained else 10) * (2 if bias else 1)), name
        assert group["weight_decay"] == (0 if bias else 1e-4), name
