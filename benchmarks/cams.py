"""Multi-scale inference our way and the plain way: time, disk, agreement of pseudo-labels.

Step 2, from image files to stored maps. Plain: one image, one scale, one flip at a time, in float32; each map is
upsampled to image size, the sum is saved as float32 .npy. Ours: batches of images with their mirror images, BatchNorm
folded, bf16 where the device computes in it, the maps of each scale saved at feature size in float16; and the same in
float32, which separates the effects of storage and of bf16. Pseudo-labels come from the dense CRF on the saved maps.
With a trained classifier: --classifier experiments/NAME/NAME/classifier and --images FOLDER. Without: random weights,
whose maps are nearly equal, and synthetic images.

Then the parts: what a worker process needs to read and to resize an image, and the networks of steps 2 and 6 with and
without folded BatchNorm.

Command: OMP_NUM_THREADS=1 python benchmarks/cams.py
"""

import shutil
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from crf import ours as dense_crf
from measure import aerial_patch, measured
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from infer_classification import class_maps
from inference_segmentation import summed_logits
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from tools.augment import normalise, to_tensor
from tools.command import stop
from tools.devices import make_accelerator
from tools.inference import at_scales, for_inference, image_batches, stack_scales
from tools.labels import load_image
from tools.map_files import OUTPUT_STRIDE, load_maps, save_maps
from tools.memory import Halving
from tools.runs import read_run
from tools.training import load_checkpoint
from tools.workers import in_background


@dataclass(frozen=True)
class Constants:
    size: int = 256  # side in pixels
    count: int = 0  # images; 0: 4 on a CPU, 256 on a GPU
    present: int = 3  # classes of each image whose maps are saved
    num_classes: int = 6
    backbone: str = "resnet50"
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    images_at_once: int = 8
    workers: int = 0  # worker processes of ours
    classifier: Path | None = None  # folder of a trained classifier; its backbone and classes replace those above
    images: Path | None = None  # a folder of RGB images, cut to `size`; None: blobs with texture
    parts: bool = True  # also measure reading, resizing and folding
    growth: bool = True  # also measure ours with other sizes and numbers of classes


def the_model(args: Constants, device: torch.device, sample: torch.Tensor) -> Classifier:
    torch.manual_seed(0)
    if args.classifier:
        settings = read_run(args.classifier).constants
        backbone = Backbone(settings["backbone"], "none")
        state = torch.load(args.classifier / "model.pt", map_location="cpu", weights_only=True)["model"]
        classes = len(state["classifier.weight"])
        model = Classifier(backbone, classes, settings["gamma"], settings["iterations"], train_all=False)
        load_checkpoint(args.classifier / "model.pt", model)
    else:
        model = Classifier(Backbone(args.backbone, "none"), args.num_classes, gamma=0.7, iterations=1, train_all=False)
        with torch.no_grad():
            for _ in range(3):  # so that BatchNorm's statistics fit the random weights
                model.train()(normalise(sample))
    return model.to(device).eval()


def plain(model: Classifier, file: Path, output: Path, classes: np.ndarray, scales: tuple[float, ...]) -> None:
    """One image, as a simple script does it."""
    device = next(model.parameters()).device
    image = Image.open(file)
    size = image.height, image.width
    padded = [-(-length // OUTPUT_STRIDE) * OUTPUT_STRIDE for length in size]
    total = np.zeros((), np.float32)
    for scale in scales:
        scaled = image.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BICUBIC)
        for flip in (False, True):
            x = normalise(to_tensor(np.array(scaled))[None])
            x = (x.flip(-1) if flip else x).contiguous().to(device)
            with torch.no_grad():
                maps = model(x)[1].relu()
                maps = F.interpolate(maps, padded, mode="bilinear", align_corners=False)
            total = total + (maps.flip(-1) if flip else maps)[0].cpu().numpy()
    total = total[classes][:, : size[0], : size[1]]
    np.save(output, total / (total.max((1, 2), keepdims=True) + 1e-5))


def ours(
    model: Classifier, bf16: bool, images: Path, output: Path, present: dict[str, np.ndarray], args: Constants
) -> None:
    """As infer_classification.py."""
    device = next(model.parameters()).device
    at_once = min(args.images_at_once, len(present))
    halving = Halving(at_once)
    batches = image_batches(images, sorted(present), args.scales, at_once, args.workers, stop)
    with in_background() as submit, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for ids, size, batch in batches:
            outputs = halving.predict(partial(class_maps, model, device=device), batch)
            logits, *maps = (values.cpu().numpy() for values in outputs)
            for index, id in enumerate(ids):
                kept = [scale[index, present[id]] for scale in maps]
                submit(save_maps, output / f"{id}.npz", "cams", present[id], kept, size, logits[index])


def write_images(folder: Path, size: int, count: int, args: Constants) -> None:
    random = np.random.default_rng(0)
    files = sorted(path for path in args.images.iterdir() if path.is_file()) if args.images else []
    folder.mkdir(parents=True)
    for index in range(count):
        image = aerial_patch(random, size, args.num_classes)[0]
        if files:
            image = np.array(Image.open(files[index * len(files) // count]).convert("RGB"))[:size, :size]
        Image.fromarray(image).save(folder / f"{index:04}.png")


def labels(folder: Path, images: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """id -> argmax of the saved maps, argmax of the CRF's marginals."""
    found = {}
    for file in sorted(folder.iterdir()):
        image = load_image(images / f"{file.stem}.png")
        maps = np.load(file) if file.suffix == ".npy" else load_maps(file, 255, image.shape[:2])[1]
        found[file.stem] = maps.argmax(0), dense_crf(maps, image).argmax(0)
    return found


@torch.no_grad()
def likely(model: Classifier, file: Path, count: int) -> np.ndarray:
    """The `count` most likely classes, ascending."""
    x = normalise(to_tensor(load_image(file))[None]).to(next(model.parameters()).device)
    scores = model(x)[0][0]
    return scores.topk(min(count, len(scores))).indices.sort().values.cpu().numpy()


def compare(
    unfolded: Classifier, args: Constants, root: Path, count: int, device: torch.device, has_bf16: bool
) -> None:
    images, model = root / "images", for_inference(deepcopy(unfolded), device)
    present = {file.stem: likely(model, file, args.present) for file in sorted(images.iterdir())}

    def plainly() -> None:
        for id, kept in present.items():
            plain(unfolded, images / f"{id}.png", root / "plain" / f"{id}.npy", kept, args.scales)

    ways = {"plain": plainly}
    for bf16 in (False, True)[: 1 + has_bf16]:
        name = "ours, bf16" if bf16 else "ours, fp32"
        ways[name] = partial(ours, model, bf16, images, root / name, present, args)
    results = {}
    for name, way in ways.items():
        (root / name).mkdir()
        way()  # chooses kernels and allocates memory: not a part of the cost
        _, seconds, memory = measured(way, 1, device)
        disk = sum(file.stat().st_size for file in (root / name).iterdir()) / count
        results[name] = seconds / count, disk, labels(root / name, images)
        first_seconds, first_disk, first = results["plain"]
        same = [
            np.mean([np.mean(first[id][kind] == pair[kind]) for id, pair in results[name][2].items()])
            for kind in (0, 1)
        ]
        print(
            f"{name:10} {seconds / count:7.3f} s an image ({count / seconds:.1f} images/s), ratio "
            f"{first_seconds * count / seconds:5.2f}; {memory:5.0f} MB more; {disk / 1e3:7.1f} kB an image, "
            f"{first_disk / disk:5.1f} times less; equal to plain: argmax {same[0]:.3%}, pseudo-labels {same[1]:.3%}",
            flush=True,
        )


def network_seconds(model: nn.Module, images: list[Tensor], device: torch.device, bf16: bool) -> float:
    """Seconds an image of the network alone, at all scales with mirror images."""

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if isinstance(model, Classifier):
                class_maps(model, images, device)
            else:
                summed_logits(model, images, images[0].shape[-2:], device)

    work()  # chooses kernels: not a part of the cost
    return measured(work, 3, device)[1] / len(images[0])


def parts(classifier: Classifier, args: Constants, root: Path, device: torch.device, has_bf16: bool) -> None:
    """Reading and resizing in one worker process; the networks with and without folded BatchNorm."""
    files = sorted((root / "images").iterdir())
    images, reading, _ = measured(lambda: [load_image(file) for file in files], 3)
    scaled, resizing, _ = measured(lambda: [at_scales(image, args.scales) for image in images], 3)
    print(
        f"a worker process: reading {1e3 * reading / len(files):.1f} ms an image, resizing to "
        f"{len(args.scales)} scales {1e3 * resizing / len(files):.1f} ms"
    )
    batch = stack_scales(scaled[: args.images_at_once])
    backbone = Backbone(args.backbone, "none")
    segmenter = DeepLabV3Plus(backbone, classifier.classifier.out_channels, width=256, freeze_norm=True)
    for name, model in (("step 2", classifier), ("step 6", segmenter)):
        unfolded = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        folded = for_inference(deepcopy(unfolded), device)
        for bf16 in (False, True)[: 1 + has_bf16]:
            before, after = (network_seconds(each, batch, device, bf16) for each in (unfolded, folded))
            print(
                f"{name}, {'bf16' if bf16 else 'fp32'}: {before:.3f} s an image, BatchNorm folded {after:.3f} s, ratio "
                f"{before / after:.2f}; reading and resizing: {(reading + resizing) / len(files) / after:.1%} of it",
                flush=True,
            )


def growth(model: Classifier, args: Constants, root: Path, bf16: bool) -> None:
    """Ours with other numbers of images, classes and pixels."""
    for size, count, present in ((64, 4, 3), (64, 8, 3), (64, 4, 6), (128, 4, 3), (192, 4, 3)):
        folder, images = root / f"{size}_{count}_{present}", root / f"images_{size}_{count}_{present}"
        device = next(model.parameters()).device
        write_images(images, size, count, args)
        kept = {file.stem: np.arange(min(present, model.classifier.out_channels)) for file in images.iterdir()}
        _, seconds, _ = measured(partial(ours, model, bf16, images, folder, kept, args), 1, device)
        disk = sum(file.stat().st_size for file in folder.iterdir()) / count
        print(
            f"growth: {count:3} images of {size} x {size}, {present} classes: {seconds / count:.3f} s and "
            f"{disk / 1e3:.1f} kB each"
        )
        shutil.rmtree(images)


def main(args: Constants) -> None:
    accelerator = make_accelerator()
    device, bf16 = accelerator.device, accelerator.mixed_precision == "bf16"
    count = args.count or (256 if device.type == "cuda" else 4)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", args.size, count, args)
        sample = torch.stack([to_tensor(load_image(file)) for file in sorted((root / "images").iterdir())[:4]])
        model = the_model(args, device, sample)
        print(
            f"{device}, {torch.get_num_threads()} threads; {count} images of {args.size} x {args.size}, "
            f"{args.present} of {model.classifier.out_channels} classes, scales {args.scales} with mirrors"
        )
        compare(model, args, root, count, device, bf16)
        if args.parts:
            parts(model, args, root, device, bf16)
        if args.growth:
            growth(for_inference(model, device), args, root, bf16)


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
