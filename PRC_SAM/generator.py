"""SAM's automatic mask generation for many images: a grid of points, filters, box NMS, masks packed to bits.

The steps, their order and their settings are those of segment-anything's SamAutomaticMaskGenerator (its images one at a
time, float masks of all candidates at full size, run-length codes in Python lists). Here images are encoded in batches;
candidates are dropped by predicted IoU before their masks exist; the two bilinear steps from SAM's 256 x 256 logits to
the size of the image are one; NMS, boxes and bits stay on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
    remove_small_regions,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from PRC_SAM.mask_tensors import count_pixels, outer_boxes, pack_bits
from PRC_SAM.sam_forward import PointDecoder, encode_images, relative_positions
from tools.inference import to_device
from tools.masks import Masks
from tools.memory import Halving

PIXELS_ON_GPU, PIXELS_ON_CPU = 1 << 26, 1 << 20  # of masks in float at full size; a processor's cache wants few


@dataclass
class Crop:
    """One crop of an image, ready for the encoder: its box x0, y0, x1, y1, its layer, and (3,h,w) uint8 pixels."""

    box: list[int]
    layer: int
    pixels: Tensor


@dataclass
class Candidates:
    """Masks on the device before the last filter: one row each in every tensor."""

    bits: Tensor  # (M,bytes) uint8, of the whole image
    boxes: Tensor  # (M,4) x0, y0, x1, y1 in the whole image
    scores: Tensor  # (M,) predicted IoU
    stability: Tensor  # (M,)

    def take(self, index: Tensor) -> "Candidates":
        return Candidates(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def join(parts: list["Candidates"]) -> "Candidates":
        names = [field.name for field in fields(Candidates)]
        return Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(eq=False)
class MaskGenerator:
    """Call with a list of (H,W,3) uint8 RGB images, or of what `prepare` made of them -> a list of `Masks`.

    precision "fp32" agrees with the stock generator up to rounding (on a GPU after tools.devices.set_precision); "bf16"
    runs the encoder in bfloat16 and, on a GPU, the decoder's products in TF32. `batch` images (or crops) are encoded at
    once, fewer where the memory does not hold them. Only a memory that is too small changes the size of a batch, and
    with it the last digits of the results: neither the number of images nor that of processes does.

    The keywords are SAM's settings under its own names; get_se_map.py describes them and has their defaults.
    """

    sam: Sam
    precision: str
    batch: int
    _: KW_ONLY
    points_per_side: int
    points_per_batch: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    crop_n_layers: int
    crop_nms_thresh: float
    crop_overlap_ratio: float
    crop_n_points_downscale_factor: int
    min_mask_region_area: int

    def __post_init__(self) -> None:
        sam = self.sam.eval()
        self.images_at_once = Halving(self.batch)
        self.points_at_once = Halving(self.points_per_batch, "points", "points_per_batch")
        self.decoder = PointDecoder(sam)
        self.decoder_in_tf32 = self.precision == "bf16" and sam.device.type == "cuda"
        self.resize = ResizeLongestSide(sam.image_encoder.img_size)
        self.grids = build_all_layer_point_grids(
            self.points_per_side, self.crop_n_layers, self.crop_n_points_downscale_factor
        )
        with torch.inference_mode():
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            self.positions = relative_positions(sam.image_encoder, dtype)
        self._prompts: dict[tuple, Tensor] = {}
        self._resampling: dict[tuple, tuple[Tensor, Tensor]] = {}

    def prepare(self, image: np.ndarray) -> tuple[tuple[int, int], list[Crop]]:
        """What the processor does to an image before the device sees it: its size and its crops, resized."""
        size = image.shape[:2]
        boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
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
            parts = [self._crop(next(embeddings), crop, size) for crop in crops]
            masks = Candidates.join(parts)
            if len(crops) > 1:  # of duplicates in several crops, the one from the smallest crop stays
                preference = []
                for crop, part in zip(crops, parts, strict=True):
                    x0, y0, x1, y1 = crop.box
                    preference.append(torch.full_like(part.scores, 1 / ((x1 - x0) * (y1 - y0))))
                masks = masks.take(_nms(masks.boxes, torch.cat(preference), self.crop_nms_thresh))
            if self.min_mask_region_area > 0:
                masks = self._without_small_regions(masks, size)
            results.append(_finish(masks, size))
        return results

    def _encode(self, crops: list[Tensor]) -> Iterator[Tensor]:
        """(3,h,w) uint8 each -> (C,h',w') embeddings, computed in batches of one size."""

        def encode(batches: list[Tensor]) -> list[Tensor]:
            (images,) = batches
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return [encode_images(self.sam.image_encoder, images, self.positions)]

        for start in range(0, len(crops), self.batch):
            crop_batch = [to_device(crop, self.sam.device) for crop in crops[start : start + self.batch]]
            images = torch.stack([self.sam.preprocess(crop) for crop in crop_batch])
            (embeddings,) = self.images_at_once.predict(encode, [images])
            yield from embeddings

    @contextmanager
    def _decoder_precision(self) -> Iterator[None]:
        """TF32 products on a GPU unless the precision is fp32; in bfloat16 the decoder loses one mask in ten."""
        before = torch.get_float32_matmul_precision()
        if self.decoder_in_tf32:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _crop(self, embedding: Tensor, crop: Crop, size: tuple[int, int]) -> Candidates:
        """All masks of one crop, in the frame of the whole image and without duplicates, in falling predicted IoU."""
        tokens = self._tokens(crop)

        def decode(points: int) -> Candidates:
            return Candidates.join([self._points(embedding, part, crop, size) for part in tokens.split(points)])

        masks = self.points_at_once.attempt(decode)
        return masks.take(_nms(masks.boxes, masks.scores, self.box_nms_thresh))

    def _tokens(self, crop: Crop) -> Tensor:
        """Prompt tokens of the crop's point grid; computed once for each shape of crops."""
        height, width = crop.box[3] - crop.box[1], crop.box[2] - crop.box[0]
        key = (crop.layer, height, width)
        if key not in self._prompts:
            points = self.resize.apply_coords(self.grids[crop.layer] * np.array([[width, height]]), (height, width))
            points = torch.as_tensor(points, dtype=torch.float32, device=self.sam.device)
            self._prompts[key] = self.decoder.tokens(points)
        return self._prompts[key]

    def _points(self, embedding: Tensor, tokens: Tensor, crop: Crop, size: tuple[int, int]) -> Candidates:
        """The masks of a batch of points that pass the filters."""
        x0, y0, x1, y1 = crop.box
        with self._decoder_precision():
            scores, mask_tokens, pixels = self.decoder.transform(embedding, tokens)
            keep = scores > (self.pred_iou_thresh or -torch.inf)  # SAM takes 0 as no filter
            points = keep.any(dim=1).nonzero()[:, 0]
            logits = self.decoder.masks(mask_tokens[points], pixels[points])[keep[points]]
        scores = scores[keep]
        _, used_rows, used_columns = crop.pixels.shape
        rows, columns = self._resampling_of((used_rows, used_columns), (y1 - y0, x1 - x0))
        at_once = max(1, (PIXELS_ON_GPU if logits.is_cuda else PIXELS_ON_CPU) // ((y1 - y0) * (x1 - x0)))
        parts = []
        for low, score in zip(logits.split(at_once), scores.split(at_once), strict=True):
            full = rows @ low @ columns.T
            stability = self._stability(full)
            if self.stability_score_thresh > 0:
                stable = stability >= self.stability_score_thresh
                full, score, stability = full[stable], score[stable], stability[stable]
            masks = full > self.sam.mask_threshold
            boxes = outer_boxes(masks)
            if crop.layer > 0:  # drop what the crop's edge cuts through; move the others to their place in the image
                inside = ~is_box_near_crop_edge(boxes, crop.box, [0, 0, size[1], size[0]])
                masks = F.pad(masks[inside], (x0, size[1] - x1, y0, size[0] - y1))
                boxes = boxes[inside] + boxes.new_tensor([x0, y0, x0, y0])
                score, stability = score[inside], stability[inside]
            parts.append(Candidates(pack_bits(masks), boxes, score, stability))
        return Candidates.join(parts)

    def _stability(self, logits: Tensor) -> Tensor:
        """(M,) IoU of the masks at a higher and a lower cutoff, one of which contains the other."""
        threshold, offset = self.sam.mask_threshold, self.stability_score_offset
        return count_pixels(logits > threshold + offset) / count_pixels(logits > threshold - offset)

    def _resampling_of(self, inside: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Matrices (H,low), (W,low) that resample SAM's low-resolution logits to a crop of `size`.

        SAM enlarges to the encoder's input, cuts off the padding (`inside` remains) and resizes to the crop, both times
        bilinearly: linear along each axis, so that the product of the two steps is one matrix for each axis.
        """
        key = (*inside, *size)
        if key not in self._resampling:
            low = self.decoder.prompts.image_embedding_size[0] * 4
            unit = torch.eye(low, dtype=torch.float64)[None]
            large = F.interpolate(unit, size=self.sam.image_encoder.img_size, mode="linear")
            rows, columns = (
                F.interpolate(large[..., :used], size=length, mode="linear")[0].T.to(self.sam.device, torch.float32)
                for used, length in zip(inside, size, strict=True)
            )
            self._resampling[key] = rows, columns
        return self._resampling[key]

    def _without_small_regions(self, candidates: Candidates, size: tuple[int, int]) -> Candidates:
        """Small islands and holes removed; of masks that became duplicates, those that needed no change stay."""
        flat = np.unpackbits(candidates.bits.cpu().numpy(), axis=1, count=size[0] * size[1])
        masks = flat.reshape(-1, *size).astype(bool)
        unchanged = np.ones(len(masks), np.float32)
        for index, mask in enumerate(masks):
            mask, filled = remove_small_regions(mask, self.min_mask_region_area, "holes")
            masks[index], cut = remove_small_regions(mask, self.min_mask_region_area, "islands")
            unchanged[index] = not (filled or cut)
        clean = torch.from_numpy(masks).to(candidates.bits.device)
        candidates = Candidates(pack_bits(clean), outer_boxes(clean), candidates.scores, candidates.stability)
        preference = torch.from_numpy(unchanged).to(candidates.bits.device)
        return candidates.take(_nms(candidates.boxes, preference, max(self.box_nms_thresh, self.crop_nms_thresh)))


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return nms(boxes.float(), scores, threshold)


def _finish(candidates: Candidates, size: tuple[int, int]) -> Masks:
    """Off the device, in falling predicted IoU."""
    bits, boxes, scores, stability = (getattr(candidates, field.name).cpu().numpy() for field in fields(Candidates))
    masks = Masks(size, bits, np.bitwise_count(bits).sum(1, dtype=np.int32), boxes.astype(np.int32), scores, stability)
    return masks.chosen(np.argsort(-scores, kind="stable"))
