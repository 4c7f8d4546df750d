"""Mask generation side by side with segment-anything's own generator: time, memory and agreement.

Both get the same weights, images and settings; the stock generator takes one image at a time, as it must. Without a
checkpoint a small Sam is trained first on synthetic shapes (half a minute on the CPU, the same every time; longer with
--steps 900), so that its masks are neither empty nor noise. model = "vit_h" with checkpoint = "random" times the
official size instead, with the filters opened by pred_iou_thresh = 0 and stability_score_thresh = 0.

  OMP_NUM_THREADS=1 python benchmarks/sam_masks.py
  python benchmarks/sam_masks.py --model vit_h --checkpoint random --precision bf16 --size 512   # on a GPU
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import measured
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam
from torch.nn import functional as F
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PRC_SAM import get_se_map
from PRC_SAM.checkpoints import load_sam
from PRC_SAM.generator import MaskGenerator
from tests.small_sam import build_sam
from tools.checkpoints import read_tensors
from tools.command import run
from tools.devices import set_precision
from tools.labels import load_image

SIDE = 256  # pixels of the small Sam's input


@dataclass(frozen=True)
class Constants:
    model: str = "small"  # small | vit_b | vit_l | vit_h
    checkpoint: str = ""  # a file, "random" for random weights, empty to train a small model
    steps: int = 150  # of that training
    save: str = ""  # where to keep the trained model, for the next --checkpoint
    images: str = ""  # a folder of RGB images; empty: synthetic shapes
    count: int = 8  # images
    size: int = 256  # pixels to which images are cut
    precision: str = "fp32"  # of ours: auto | fp32 | bf16; stock runs in fp32
    images_at_once: int = 4  # of ours
    points_per_side: int = 16
    pred_iou_thresh: float = 0.3  # open filters: what a small model finds is no better
    stability_score_thresh: float = 0.5
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    min_mask_region_area: int = 0
    stock_count: int = 0  # images for the slow stock generator; 0: all


def main(args: Constants) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sam = the_model(args).to(device)
    images = the_images(args)
    compared = images[: args.stock_count or len(images)]
    settings = {
        name: getattr(args, name)
        for name in (
            "points_per_side",
            "pred_iou_thresh",
            "stability_score_thresh",
            "box_nms_thresh",
            "crop_n_layers",
            "min_mask_region_area",
        )
    }
    precision = set_precision(args.precision, device, bf16_on_cpu=False)
    print(f"{device} {torch.get_num_threads()} threads, {precision}, {args.size} px, {settings}")
    stock = SamAutomaticMaskGenerator(sam, **settings)
    constants = get_se_map.Constants(images_at_once=args.images_at_once, **settings)
    ours = MaskGenerator(sam, precision, constants)
    stock.generate(images[0]), ours(images[:1])  # kernels chosen, caches filled
    records, stock_seconds, stock_memory = measured(lambda: [stock.generate(image) for image in compared], 1, device)
    batches = [images[at : at + args.images_at_once] for at in range(0, len(images), args.images_at_once)]
    all_masks, seconds, memory = measured(lambda: [masks for batch in batches for masks in ours(batch)], 1, device)
    stock_seconds, seconds = stock_seconds / len(compared), seconds / len(images)
    print(f"stock {stock_seconds:7.3f} s an image, {stock_memory:.0f} MB more")
    print(f"ours  {seconds:7.3f} s an image, {memory:.0f} MB more, {ours.points_at_once.size} points at once")
    print(f"ratio {stock_seconds / seconds:7.1f}")
    agreement(records, all_masks)


def agreement(records: list, ours: list) -> None:
    """Best IoU of each stock mask with one of ours, and the counts."""
    best, equal = [], 0
    for stock, masks in zip(records, ours[: len(records)], strict=True):
        equal += len(stock) == len(masks)
        if stock:
            a = np.array([record["segmentation"] for record in stock]).reshape(len(stock), -1).astype(np.float32)
            b = masks.unpack().reshape(len(masks), a.shape[1]).astype(np.float32)
            shared = a @ b.T
            iou = shared / np.maximum(a.sum(1)[:, None] + b.sum(1) - shared, 1)
            best.append(iou.max(1, initial=0))
    ious = np.concatenate([*best, np.zeros(0)])
    print(
        f"masks: stock {sum(map(len, records))}, ours {sum(map(len, ours[: len(records)]))}; "
        f"equal counts in {equal} of {len(records)} images"
        + ("" if len(ious) else "; no masks, so this says nothing of their agreement: train longer, --steps 900")
    )
    if len(ious):
        print(
            f"of stock's masks, IoU >= 0.999 with one of ours: {(ious >= 0.999).mean():.2%}, >= 0.95: "
            f"{(ious >= 0.95).mean():.2%}, lowest {ious.min():.4f}"
        )


def small() -> Sam:
    """A Sam small enough to be trained here, with random weights."""
    return build_sam(
        embed_dim=96,
        num_heads=4,
        global_attention=(False, True, True),
        side=SIDE,
        window_size=8,
        prompt_dim=64,
        mlp_dim=256,
    )


def the_model(args: Constants) -> Sam:
    torch.manual_seed(0)
    if args.checkpoint == "random":
        sam = small() if args.model == "small" else sam_model_registry[args.model]()
        for parameter in sam.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)  # some of SAM's parameters begin as zeros
        return sam
    if args.checkpoint and args.model != "small":
        return load_sam(args.model, Path(args.checkpoint))
    if args.checkpoint:
        sam = small()
        sam.load_state_dict(read_tensors(Path(args.checkpoint), "train the small model again"))
        return sam
    sam = train_small_sam(args.steps)
    if args.save:
        torch.save(sam.state_dict(), args.save)
    return sam


def the_images(args: Constants) -> list[np.ndarray]:
    if not args.images:
        return [shapes(np.random.default_rng(10_000 + seed), args.size)[0] for seed in range(args.count)]
    files = sorted(Path(args.images).iterdir())
    chosen = files[:: max(1, len(files) // args.count)][: args.count]
    return [np.ascontiguousarray(load_image(file)[: args.size, : args.size]) for file in chosen]


def shapes(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic scene: (size,size,3) uint8 picture, and (size,size) uint8 numbers of its shapes or 0."""
    y, x = np.mgrid[:size, :size] / size
    numbers = np.zeros((size, size), np.uint8)
    picture = np.broadcast_to(rng.uniform(40, 215, 3), (size, size, 3)).copy()
    for number in range(1, rng.integers(6, 14)):
        angle, (cx, cy), (a, b) = rng.uniform(0, np.pi), rng.uniform(0, 1, 2), rng.uniform(0.06, 0.2, 2)
        u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / a
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / b
        inside = u**2 + v**2 < 1 if rng.random() < 0.5 else np.maximum(abs(u), abs(v)) < 0.9
        numbers[inside] = number
        picture[inside] = rng.uniform(20, 235, 3)
    picture += rng.normal(0, 6, picture.shape) + 20 * np.sin(7 * x + 5 * y + rng.uniform(0, 6))[..., None]
    return picture.clip(0, 255).astype(np.uint8), numbers


def train_small_sam(steps: int, images: int = 4, points: int = 8) -> Sam:
    """A small Sam that finds shapes from one point: the best of its three masks learns, the scores learn the IoU."""
    sam, rng = small().train(), np.random.default_rng(0)
    scenes = [shapes(rng, SIDE) for _ in range(256)]
    optimiser = torch.optim.AdamW(sam.parameters(), 5e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, steps)
    bar = trange(steps, desc="training a small Sam", disable=None)
    for _ in bar:
        batch = [scenes[index] for index in rng.integers(0, len(scenes), images)]
        pixels = torch.stack([sam.preprocess(torch.from_numpy(picture).permute(2, 0, 1)) for picture, _ in batch])
        losses = []
        for embedding, (_, numbers) in zip(sam.image_encoder(pixels), batch, strict=True):
            where = np.argwhere(numbers)[rng.integers(0, np.count_nonzero(numbers), points)]
            truth = torch.from_numpy(np.stack([numbers == numbers[y, x] for y, x in where])).float()
            truth = F.interpolate(truth[:, None], scale_factor=0.25, mode="area").expand(-1, 3, -1, -1)
            sparse, dense = sam.prompt_encoder(
                (torch.from_numpy(where[:, None, ::-1].astype(np.float32)), torch.ones(points, 1)), None, None
            )
            logits, scores = sam.mask_decoder(embedding[None], sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
            shared, total = (logits.sigmoid() * truth).sum((2, 3)), (logits.sigmoid() + truth).sum((2, 3))
            loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
            loss = 5 * loss + 1 - 2 * shared / (total + 1)
            hard, sure = logits.detach() > 0, truth > 0.5
            iou = (hard & sure).sum((2, 3)) / (hard | sure).sum((2, 3)).clamp(min=1)
            losses.append(loss.amin(1).mean() + F.mse_loss(scores, iou))
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", iou=f"{iou.amax(1).mean():.2f}")
    return sam.eval()


if __name__ == "__main__":
    run(main, Constants, __doc__)
