"""Predicted time and disk space of each step for the whole of Vaihingen, Potsdam and iSAID on one GPU of 24 GB.

The models are not run. CPU parts follow from measured times (docs/performance.md). GPU parts are ESTIMATES: the
floating-point operations of this project's models, counted by PyTorch, divided by the rate that the GPU sustains. The
numbers of patches follow from the rules of cutting and from the assumptions below.

Command: python benchmarks/predict.py
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import tyro
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from tools.dataset import load_dataset

SCALES, IMAGES_AT_ONCE = (0.5, 1.0, 1.5, 2.0), 8
FAKE = FakeTensorMode()  # tensors with shapes but without values


@dataclass(frozen=True)
class Constants:
    # estimates: an RTX 3090 trains ResNet-50 (24.6 GFLOP an image of 224 px) at 1027 images/s in fp16, 561 in fp32
    bf16_tflops: float = 25.0  # sustained; from published tf_cnn_benchmarks at batch 64
    fp32_tflops: float = 14.0  # the same in fp32, for PRC
    shortest_step: float = 0.03  # seconds, lower limit of a training step: starting a thousand kernels takes this long
    shortest_forward: float = 0.01  # seconds, the same for one batch without gradients
    sam_seconds: float = 1.7  # an image: 6 s of the stock generator on a GPU / 3.6, our ratio for ViT-B on a CPU
    # assumptions on the data
    vaihingen_tile: tuple[int, int] = (2494, 2064)  # mean size in pixels of the 33 tiles
    vaihingen_cars: float = 0.02  # share of train tiles replaced by four versions of a crop with cars
    potsdam_kept: float = 0.2  # share of train tiles whose classes are all frequent enough; each saved four times
    isaid_scenes: tuple[int, int] = (1411, 458)  # train, val
    isaid_patches: float = 7.0  # of a scene: the mean of 6, 7 or 8; an upper limit
    # measured on one core (Xeon)
    cores: int = 4  # that work at the same time: the default of --workers
    split_us: float = 0.23  # core-microseconds a pixel: reading, decoding, cutting, writing a scene
    crf_us: float = 2.4  # the same for the CRF's lattice
    ios_us: float = 0.16  # the same for IOS with reading and writing
    score_us: float = 0.03  # the same for reading two label maps and counting
    load_us: tuple[float, float] = (0.06, 0.07)  # the same for a training patch: classification, segmentation
    # measured bytes a pixel on real tiles of 256 px
    image_bytes: float = 1.54
    label_bytes: float = 0.04
    mask_bytes: float = 0.21  # with stand-in regions, about as many as SAM's masks
    cam_bytes: float = 0.20


def patches(name: str, args: Constants) -> tuple[int, int]:
    """Train and test patches, by the rules of docs/data.md."""
    dataset = load_dataset(name)
    if name == "isaid":
        train, test = (round(scenes * args.isaid_patches) for scenes in args.isaid_scenes)
        return train, test
    width, height = args.vaihingen_tile if name == "vaihingen" else (6000, 6000)
    tiles = (width // dataset.patch_size) * (height // dataset.patch_size)
    train, test = (len(dataset.scenes[split]) * tiles for split in ("train", "test"))
    share = 1 + 3 * args.vaihingen_cars if name == "vaihingen" else 4 * args.potsdam_kept
    return round(train * share), test


@cache
def model_of(training: str, classes: int, prc: bool = True) -> nn.Module:
    with FAKE:
        backbone = Backbone("resnet50", "none")
        if training == "classification":
            return Classifier(backbone, classes, gamma=0.7, iterations=int(prc), train_all=False)
        return DeepLabV3Plus(backbone, classes, width=256, freeze_norm=True)


@cache
def teraflops(training: str, classes: int, size: int, backward: bool, prc: bool = True) -> float:
    """TFLOP of one image through the model; with `backward`, of a training step."""
    model = model_of(training, classes, prc).train(backward)
    with FAKE, FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        result = model(torch.zeros(2, 3, size, size))
        if backward:
            outputs = [result] if training == "segmentation" else list(result)
            sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops() / 2 / 1e12


def gpu_seconds(training: str, classes: int, sizes: list[int], backward: bool, args: Constants) -> float:
    """Seconds of one image at all `sizes`: bf16, except PRC in fp32."""
    bf16 = sum(teraflops(training, classes, size, backward, False) for size in sizes)
    fp32 = sum(teraflops(training, classes, size, backward) for size in sizes) - bf16
    return bf16 / args.bf16_tflops + fp32 / args.fp32_tflops


def weights_gb(training: str, classes: int) -> float:
    """model.pt, and checkpoint.pt with the momentum of the trained parameters."""
    model = model_of(training, classes)
    learnt = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (2 * sum(value.numel() for value in model.state_dict().values()) + learnt) * 4 / 1e9


def steps(name: str, args: Constants) -> list[tuple[str, float, float, str]]:
    """(step, seconds, GB, basis) of each step; the basis may end in ";" and loading's share of the time."""
    dataset, (train, test) = load_dataset(name), patches(name, args)
    size, classes, both = dataset.patch_size, dataset.num_classes, train + test
    pixels = size**2

    def on_cpu(microseconds: float, images: int) -> float:
        return images * pixels * microseconds / 1e6 / args.cores

    def training(kind: str, epochs: int, batch: int, load: float) -> tuple[float, str]:
        image = gpu_seconds(kind, classes, [size], True, args)
        computing = train * epochs * max(image, args.shortest_step / batch)
        loading = on_cpu(load, train * epochs)
        return max(computing, loading), f"estimate;{loading / computing:.0%}"

    def inference(kind: str, images: int) -> float:
        image = gpu_seconds(kind, classes, scaled, False, args)
        return images * max(image, len(SCALES) * args.shortest_forward / IMAGES_AT_ONCE)

    scaled = [round(size * scale) for scale in SCALES for _ in range(2)]
    label, gb = args.label_bytes * pixels / 1e9, pixels / 1e9
    first, first_basis = training("classification", 20, 8, args.load_us[0])
    second, second_basis = training("segmentation", 50, 16, args.load_us[1])
    return [
        (
            "cutting",
            on_cpu(args.split_us, both),
            both * gb * (args.image_bytes + args.label_bytes),
            "measured",
        ),
        ("9 SAM masks", both * args.sam_seconds, both * gb * args.mask_bytes, "estimate"),
        ("1 classifier", first, weights_gb("classification", classes), first_basis),
        ("2 CAMs", inference("classification", train), train * gb * args.cam_bytes, "estimate"),
        ("3 CRF", on_cpu(args.crf_us, train), train * label, "measured"),
        ("4 IOS", on_cpu(args.ios_us, train), train * label, "measured"),
        ("5 segmenter", second, weights_gb("segmentation", classes), second_basis),
        ("6 segmentation", inference("segmentation", test), test * label, "estimate"),
        ("7 IOS", on_cpu(args.ios_us, test), test * label, "measured"),
        ("8 scores", on_cpu(args.score_us, 3 * train + 2 * test), 0.0, "measured"),
    ]


def main(args: Constants) -> None:
    names = ("vaihingen", "potsdam", "isaid")
    titles = [f"{load_dataset(name).title}: {sum(patches(name, args))} patches" for name in names]
    print(f"| step | {' | '.join(titles)} | basis |\n|---|{'---|' * len(names)}---|")
    columns = [steps(name, args) for name in names]
    for column in columns:
        column.append(("all", sum(row[1] for row in column), sum(row[2] for row in column), ""))
    for rows in zip(*columns, strict=True):
        cells = [f"{duration(seconds)}, {gigabytes:.2f} GB" for _, seconds, gigabytes, _ in rows]
        basis, *shares = rows[0][3].split(";")
        if shares:
            basis += f"; loading: {', '.join(row[3].split(';')[1] for row in rows)} of the time"
        print(f"| {rows[0][0]} | {' | '.join(cells)} | {basis} |")


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
