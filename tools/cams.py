"""Inference at several scales with mirror images; class activation maps stored small and fused at image size."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from models.backbone import fold_batchnorm
from tools.augment import normalise, resize, to_tensor
from tools.command import UserError, check
from tools.files import write_whole
from tools.labels import load_image

Model = TypeVar("Model", bound=nn.Module)
OUTPUT_STRIDE = 16
MOST_BYTES = 1 << 28  # that a file of unknown image size may unpack to


def for_inference(model: Model, device: torch.device) -> Model:
    """`model` ready for `mirrored_scales`: in evaluation mode, BatchNorm folded, on `device`, weights channels_last."""
    fold_batchnorm(model.eval())
    model.requires_grad_(True)  # autocast keeps its casts of such weights only
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def at_scales(image: np.ndarray, scales: Sequence[float]) -> list[Tensor]:
    """Image (H,W,3) uint8 -> for each scale (3,h,w) uint8, resized by Pillow's bicubic filter (method section 2)."""
    sizes = [[max(1, round(length * scale)) for length in image.shape[:2]] for scale in scales]
    return [to_tensor(resize(image, (height, width), Image.Resampling.BICUBIC)) for height, width in sizes]


def stack_scales(images: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Images of equal size, each as `at_scales` gives it -> for each scale (B,3,h,w) uint8."""
    return [torch.stack(scale) for scale in zip(*images, strict=True)]


class _Images(torch.utils.data.Dataset):
    """Items: id, size (H,W), the image at each scale, and the error of a bad file, which must not end the whole run."""

    def __init__(self, folder: Path, ids: Sequence[str], scales: Sequence[float]):
        self.folder, self.ids, self.scales = folder, ids, scales

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, tuple[int, ...], list[Tensor], str]:
        id = self.ids[index]
        try:
            image = load_image(self.folder / f"{id}.png")
        except UserError as error:
            return id, (), [], str(error)
        return id, image.shape[:2], at_scales(image, self.scales), ""


def image_batches(
    folder: Path,
    ids: Sequence[str],
    scales: Sequence[float],
    images_at_once: int,
    workers: int,
    bad: Callable[[str], None],
) -> Iterator[tuple[list[str], tuple[int, ...], list[Tensor]]]:
    """Yield (ids, size (H,W), for each scale images (B,3,h,w) uint8) of neighbours of equal size.

    The worker processes read and resize the images. `bad` is called with the error of a bad file. B is always
    `images_at_once`; images after the last id only fill the batch. Floating-point sums depend on the size of a batch,
    and an image must get the same result in any batch and with any number of processes.
    """
    group: list[tuple[str, tuple[int, ...], list[Tensor]]] = []

    def batch() -> tuple[list[str], tuple[int, ...], list[Tensor]]:
        images = [image for _, _, image in group]
        filled = images + images[:1] * (images_at_once - len(images))
        return [id for id, _, _ in group], group[0][1], stack_scales(filled)

    for id, size, image, error in DataLoader(_Images(folder, ids, scales), batch_size=None, num_workers=workers):
        if error:
            bad(error)
            continue
        if group and (len(group) == images_at_once or group[0][1] != tuple(size)):
            yield batch()
            group = []
        group.append((id, tuple(size), image))
    if group:
        yield batch()


@contextmanager
def in_background(threads: int = 2) -> Iterator[Callable[..., None]]:
    """Yield `submit(work, *arguments)`, which runs the call in a thread while the caller goes on.

    For compression and writing, which release Python's global lock. At most two calls for each thread wait or run, so
    that results cannot fill the memory. The first error of a call is raised by a later submit or at the end of the
    block, which waits for all calls.
    """
    running: deque[Future] = deque()

    def submit(work: Callable, *arguments) -> None:
        if len(running) == 2 * threads:
            running.popleft().result()
        running.append(pool.submit(work, *arguments))

    with ThreadPoolExecutor(threads) as pool:
        yield submit
        for call in running:
            call.result()


@torch.no_grad()  # autocast keeps the weights it has cast for all scales, but not in inference_mode
def mirrored_scales(
    predict: Callable[[Tensor], Tensor], images: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """For each scale, `predict` of the images plus the mirrored-back `predict` of their mirror images.

    images: for each scale (B,3,h,w) uint8 -> for each scale (B,K,h',w') float32. `predict` maps normalised (2B,3,h,w),
    images and mirror images in one batch, to (2B,K,h',w').
    """
    found = []
    for scale in images:
        if device.type == "cuda":
            scale = scale.pin_memory()  # a copy from other memory would wait until the GPU has finished its queue
        x = normalise(scale.to(device, non_blocking=True))
        x = torch.cat([x, x.flip(-1)]).contiguous(memory_format=torch.channels_last)
        plain, mirror = predict(x).float().chunk(2)
        found.append(plain + mirror.flip(-1))
    return found


def mirrored_cams(
    classifier: Callable[[Tensor], tuple[Tensor, Tensor]], images: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Logits (B,K) float32, the mean over scales and mirror images; positive class maps as by `mirrored_scales`.

    `classifier` maps normalised (2B,3,h,w) to logits (2B,K) and class maps (2B,K,h',w').
    """
    logits = []

    def positive_maps(x: Tensor) -> Tensor:
        scores, maps = classifier(x)
        logits.append(scores.float().unflatten(0, (2, -1)))
        return maps.relu()

    maps = mirrored_scales(positive_maps, images, device)
    return torch.cat(logits).mean(0), maps


def save_cams(
    path: Path,
    classes: np.ndarray,
    maps: Sequence[np.ndarray],
    size: Sequence[int],
    logits: np.ndarray | None = None,
) -> None:
    """Store the maps of each scale at feature size, from which `load_cams` makes the maps at image size.

    classes (k,) ids of the classes present, ascending; maps: for each scale (k,h,w), not negative; size: (H,W) of the
    image; logits (K,) of all classes, the mean over scales and mirror images, for the review of the labels. A value is
    stored in float16 as a share of its class's maximum, the maximum in float32: no value overflows.
    """
    peaks = np.max([scale.max((1, 2)) for scale in maps], axis=0).astype(np.float32)
    shares = [(scale / np.maximum(peaks, 1e-30)[:, None, None]).astype(np.float16) for scale in maps]
    with write_whole(path) as temporary:
        np.savez_compressed(
            temporary,
            classes=classes.astype(np.uint8),
            size=np.array(size, np.int32),
            peaks=peaks,
            logits=np.asarray([] if logits is None else logits, np.float32),
            **{f"scale{index}": scale for index, scale in enumerate(shares)},
        )


def fuse_scales(maps: Sequence[Tensor], size: Sequence[int], relative: bool = True) -> Tensor:
    """Class maps (k,h,w) of each scale -> (k,H,W), H,W = size (method section 2).

    Upsampled to the size rounded up to the output stride, summed, cut to the image, and if `relative` divided by each
    map's maximum, so that they lie in 0..1.
    """
    padded = [-(-length // OUTPUT_STRIDE) * OUTPUT_STRIDE for length in size]
    upsampled = [F.interpolate(scale[None], padded, mode="bilinear", align_corners=False)[0] for scale in maps]
    total = reduce(torch.add, upsampled)[:, : size[0], : size[1]]
    return total / (total.amax((1, 2), keepdim=True) + 1e-5) if relative else total


def load_cams(
    path: Path, num_classes: int, size: Sequence[int], relative: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The maps of an image of (H,W) = size -> class ids (k,) ascending, maps (k,H,W) float32 in 0..1.

    `relative` divides each map by its maximum, as CAMs are used; probabilities of step 6 are read without it.
    Raises `UserError` where the file is missing or damaged, holds other classes than 0 to num_classes - 1, belongs to
    an image of another size, or would unpack to more than this image can need.
    """
    most = 4 * num_classes * size[0] * size[1] + (1 << 16)  # bytes: full-size maps of all classes, and headers
    with _opened(path, most, relative) as file:
        classes, stored, peaks = file["classes"], tuple(file["size"].tolist()), file["peaks"]
        shares = [file[name] for name in sorted(file.files) if name.startswith("scale")]
        check(stored == tuple(size), f"it belongs to an image of {stored} pixels, not {tuple(size)}")
        ids = classes.tolist()
        check(
            classes.dtype.kind in "ui" and len(ids) > 0 and ids == sorted(set(ids) & set(range(num_classes))),
            f"its class ids must be whole numbers from 0 to {num_classes - 1} in ascending order, not {str(ids)[:80]}",
        )
        shapes = {peaks.shape, *(share.shape[:-2] for share in shares)}
        check(len(shares) > 0 and shapes == {classes.shape}, "its arrays do not fit together")
        maximum = torch.from_numpy(peaks.astype(np.float32))[:, None, None]
        maps = [torch.from_numpy(share.astype(np.float32)) * maximum for share in shares]
        fused = fuse_scales(maps, size, relative).numpy()
        rounding = 1e-5  # of the interpolation between probabilities of 1
        check(bool(((fused >= 0) & (fused <= 1 + rounding)).all()), "its maps hold values outside 0 to 1")
        return np.array(ids), fused


@contextmanager
def _opened(path: Path, most: int, relative: bool = True) -> Iterator[np.lib.npyio.NpzFile]:
    """Yield the open file. Raises `UserError` where it is missing or unpacks to more than `most` bytes, and for every
    error inside the block; the remedy depends on whether the file holds CAMs (`relative`) or probabilities.
    """
    maker = "infer_classification.py" if relative else "inference_segmentation.py --keep-probabilities"
    try:
        with np.load(path, allow_pickle=False) as file:
            unpacked = sum(entry.file_size for entry in file.zip.infolist())
            check(unpacked <= most, f"it unpacks to {unpacked} bytes, more than the {most} that this image can need")
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run python {maker}, which creates missing files") from None
    except Exception as error:  # zip, npy and shape errors have no common class
        raise UserError(
            f"{path} cannot be read as class activation maps ({error}): delete it, or use --overwrite, and run python "
            f"{maker} again"
        ) from None


def load_logits(path: Path) -> np.ndarray:
    """The logit of each class (K,) float32, a mean over scales and mirror images. Raises `UserError` as `load_cams`."""
    with _opened(path, MOST_BYTES) as file:
        logits = file["logits"].astype(np.float32)
        check(bool(np.isfinite(logits).all()), "its logits are not finite")
        return logits
