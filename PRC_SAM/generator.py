"""SAM's automatic mask generation for many images: a grid of points, filters, box NMS, masks packed to bits.

The steps, their order and their settings are those of segment-anything's SamAutomaticMaskGenerator (its images one at a
time, float masks of all candidates at full size, run-length codes in Python lists). Here images are encoded in batches;
candidates are dropped by predicted IoU before their masks exist; the two bilinear steps from SAM's 256 x 256 logits to
the size of the image are one; NMS, boxes and bits stay on the device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    build_all_layer_point_grids,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    remove_small_regions,
    uncrop_boxes_xyxy,
    uncrop_masks,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from PRC_SAM.sam_forward import PointDecoder, encode_images, relative_positions
from tools.inference import to_device
from tools.masks import Masks
from tools.memory import Halving

if TYPE_CHECKING:
    from PRC_SAM.get_se_map import Constants

PIXELS_ON_GPU, PIXELS_ON_CPU = 1 << 26, 1 << 20  # of masks in float at full size; a processor's cache wants few
GATHER = 0x8040201008040201 - (1 << 64)  # as a signed number


@dataclass
class Crop:
    """One crop of an image, ready for the encoder: its box x0, y0, x1, y1, its layer, and (3,h,w) uint8 pixels."""

    box: list[int]
    layer: int
    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in the image."""
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0


class MaskGenerator:
    """Call with a list of (H,W,3) uint8 RGB images, or of what `prepare` made of them -> a list of `Masks`.

    precision "fp32" agrees with the stock generator up to rounding (on a GPU after tools.devices.set_precision); "bf16"
    runs the encoder in bfloat16 and, on a GPU, the decoder's products in TF32. `args.images_at_once` images (or crops)
    are encoded at once, fewer where the memory does not hold them. Only a memory that is too small changes the size of
    a batch, and with it the last digits of the results: neither the number of images nor that of processes does.

    args: the constants of get_se_map.py, which describes SAM's settings.
    """

    def __init__(self, sam: Sam, precision: str, args: "Constants"):
        self.sam, self.precision, self.args = sam.eval(), precision, args
        self.images_at_once = Halving(args.images_at_once)
        self.points_at_once = Halving(args.points_per_batch, "points", "points_per_batch")
        self.decoder = PointDecoder(sam)
        self.decoder_in_tf32 = precision == "bf16" and sam.device.type == "cuda"
        self.resize = ResizeLongestSide(sam.image_encoder.img_size)
        self.grids = build_all_layer_point_grids(
            args.points_per_side, args.crop_n_layers, args.crop_n_points_downscale_factor
        )
        with torch.inference_mode():
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self.positions = relative_positions(sam.image_encoder, dtype)
        self.tokens = cache(self._tokens)  # equal for all crops of a layer and size
        self.resampling = cache(self._resampling)

    def prepare(self, image: np.ndarray) -> tuple[tuple[int, int], list[Crop]]:
        """What the processor does to an image before the device sees it: its size and its crops, resized."""
        size = image.shape[:2]
        boxes, layers = generate_crop_boxes(size, self.args.crop_n_layers, self.args.crop_overlap_ratio)
        crops = []
        for box, layer in zip(boxes, layers, strict=True):
            x0, y0, x1, y1 = box
            pixels = self.resize.apply_image(image[y0:y1, x0:x1])
            crops.append(Crop(box, layer, torch.from_numpy(pixels).permute(2, 0, 1)))
        return size, crops

    @torch.inference_mode()
    def __call__(self, images: list) -> list[Masks]:
        prepared = [image if isinstance(image, tuple) else self.prepare(image) for image in images]
        embeddings = self._encode([crop.pixels for _, crops in prepared for crop in crops])
        results = []
        for size, crops in prepared:
            masks = _joined(self._crop(next(embeddings), crop, size) for crop in crops)
            if len(crops) > 1:  # of duplicates in several crops, the one from the smallest crop stays
                masks.filter(nms(masks["boxes"].float(), masks["preference"], self.args.crop_nms_thresh))
            if self.args.min_mask_region_area > 0:
                self._remove_small_regions(masks, size)
            results.append(_finish(masks, size))
        return results

    def _encode(self, crops: list[Tensor]) -> Iterator[Tensor]:
        """(3,h,w) uint8 each -> (C,h',w') embeddings, computed in batches of one size."""

        def encode(batches: list[Tensor]) -> list[Tensor]:
            (images,) = batches
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return [encode_images(self.sam.image_encoder, images, self.positions)]

        batch = self.args.images_at_once
        for start in range(0, len(crops), batch):
            pixels = [to_device(crop, self.sam.device) for crop in crops[start : start + batch]]
            images = torch.stack([self.sam.preprocess(crop) for crop in pixels])
            (embeddings,) = self.images_at_once.predict(encode, [images])
            yield from embeddings

    def _crop(self, embedding: Tensor, crop: Crop, size: tuple[int, int]) -> MaskData:
        """All masks of one crop, in the frame of the image and without duplicates, in falling predicted IoU."""
        tokens = self.tokens(crop.layer, crop.size)

        def decode(points: int) -> MaskData:
            return _joined(self._points(embedding, part, crop, size) for part in tokens.split(points))

        masks = self.points_at_once.attempt(decode)
        masks.filter(nms(masks["boxes"].float(), masks["scores"], self.args.box_nms_thresh))
        masks["preference"] = torch.full_like(masks["scores"], 1 / (crop.size[0] * crop.size[1]))
        return masks

    def _tokens(self, layer: int, size: tuple[int, int]) -> Tensor:
        """Prompt tokens of the point grid of a crop."""
        height, width = size
        points = self.resize.apply_coords(self.grids[layer] * np.array([[width, height]]), size)
        return self.decoder.tokens(torch.as_tensor(points, dtype=torch.float32, device=self.sam.device))

    def _points(self, embedding: Tensor, tokens: Tensor, crop: Crop, size: tuple[int, int]) -> MaskData:
        """The masks of a batch of points that pass the filters."""
        # TF32 for the decoder alone: in bfloat16 it would lose one mask in ten
        torch.set_float32_matmul_precision("high" if self.decoder_in_tf32 else "highest")
        scores, mask_tokens, pixels = self.decoder.transform(embedding, tokens)
        keep = scores > (self.args.pred_iou_thresh or -torch.inf)  # SAM takes 0 as no filter
        points = keep.any(dim=1).nonzero()[:, 0]
        logits = self.decoder.masks(mask_tokens[points], pixels[points])[keep[points]]
        torch.set_float32_matmul_precision("highest")
        rows, columns = self.resampling(crop.pixels.shape[1:], crop.size)
        at_once = max(1, (PIXELS_ON_GPU if logits.is_cuda else PIXELS_ON_CPU) // (crop.size[0] * crop.size[1]))
        parts = []
        for low, score in zip(logits.split(at_once), scores[keep].split(at_once), strict=True):
            full, threshold = rows @ low @ columns.T, self.sam.mask_threshold
            part = MaskData(
                logits=full,
                scores=score,
                stability=calculate_stability_score(full, threshold, self.args.stability_score_offset),
            )
            if self.args.stability_score_thresh > 0:
                part.filter(part["stability"] >= self.args.stability_score_thresh)
            part["masks"] = part["logits"] > threshold
            del part["logits"]
            part["boxes"] = batched_mask_to_box(part["masks"])
            if crop.layer > 0:  # drop what the crop's edge cuts through
                part.filter(~is_box_near_crop_edge(part["boxes"], crop.box, [0, 0, size[1], size[0]]))
            part["bits"] = pack_bits(uncrop_masks(part["masks"], crop.box, *size))
            del part["masks"]
            part["boxes"] = uncrop_boxes_xyxy(part["boxes"], crop.box)
            parts.append(part)
        return _joined(parts)

    def _resampling(self, inside: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Matrices (H,low), (W,low) that resample SAM's low-resolution logits to a crop of `size`.

        SAM enlarges to the encoder's input, cuts off the padding (`inside` remains) and resizes to the crop, both times
        bilinearly: linear along each axis, so that the product of the two steps is one matrix for each axis.
        """
        low = self.decoder.prompts.image_embedding_size[0] * 4
        unit = torch.eye(low, dtype=torch.float64)[None]
        large = F.interpolate(unit, size=self.sam.image_encoder.img_size, mode="linear")
        rows, columns = (
            F.interpolate(large[..., :used], size=length, mode="linear")[0].T.to(self.sam.device, torch.float32)
            for used, length in zip(inside, size, strict=True)
        )
        return rows, columns

    def _remove_small_regions(self, masks: MaskData, size: tuple[int, int]) -> None:
        """Fill small holes and remove small islands; of masks that became duplicates, an unchanged one stays."""
        flat = np.unpackbits(masks["bits"].cpu().numpy(), axis=1, count=size[0] * size[1])
        clean = flat.reshape(-1, *size).astype(bool)
        unchanged = np.ones(len(clean), np.float32)
        for index, mask in enumerate(clean):
            mask, filled = remove_small_regions(mask, self.args.min_mask_region_area, "holes")
            clean[index], cut = remove_small_regions(mask, self.args.min_mask_region_area, "islands")
            unchanged[index] = not (filled or cut)
        tensor = torch.from_numpy(clean).to(self.sam.device)
        masks["bits"], masks["boxes"] = pack_bits(tensor), batched_mask_to_box(tensor)
        preference = torch.from_numpy(unchanged).to(self.sam.device)
        threshold = max(self.args.box_nms_thresh, self.args.crop_nms_thresh)
        masks.filter(nms(masks["boxes"].float(), preference, threshold))


def pack_bits(masks: Tensor) -> Tensor:
    """(M,H,W) bool -> (M,ceil(H*W/8)) uint8, as numpy.packbits: one product moves byte i of eight to bit 63 - i."""
    flat = masks.flatten(1)
    eights = F.pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64)
    return ((eights * GATHER) >> 56).to(torch.uint8)


def _joined(parts: Iterable[MaskData]) -> MaskData:
    joined = MaskData()
    for part in parts:
        joined.cat(part)
    return joined


def _finish(masks: MaskData, size: tuple[int, int]) -> Masks:
    """Off the device, in falling predicted IoU."""
    masks.to_numpy()
    bits, boxes, scores = masks["bits"], masks["boxes"].astype(np.int32), masks["scores"]
    areas = np.bitwise_count(bits).sum(1, dtype=np.int32)
    return Masks(size, bits, areas, boxes, scores, masks["stability"]).chosen(np.argsort(-scores, kind="stable"))
