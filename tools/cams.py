"""Class activation maps: made at several scales, stored small, fused at image size."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import InterpolationMode, resize

from tools.augment import normalise, to_tensor
from tools.command import UserError, check
from tools.files import write_whole
from tools.labels import load_image

OUTPUT_STRIDE = 16
MOST_PIXELS = 100_000_000  # of one image, and
MOST_BYTES = 1 << 28  # of its maps at feature size: a file that declares more is refused before it is unpacked


def check_inference(constants) -> None:
    """Raise `UserError` for constants with which steps 2 and 6 cannot work; before anything is made."""
    check(
        len(constants.scales) > 0 and min(constants.scales) > 0,
        f"scales is {constants.scales}, but needs positive numbers",
    )
    check(constants.images_at_once > 0, f"images_at_once is {constants.images_at_once}, but it must be at least 1")
    check(constants.workers >= 0, f"workers is {constants.workers}, but it must be 0 or more")


class _Images(torch.utils.data.Dataset):
    """(id, image or None, sentence of what is wrong with it): a bad file must not end the whole run."""

    def __init__(self, folder: Path, ids: Sequence[str]):
        self.folder, self.ids = folder, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        id = self.ids[index]
        try:
            return id, to_tensor(load_image(self.folder / f"{id}.png")), ""
        except UserError as error:
            return id, None, str(error)


def image_batches(
    folder: Path, ids: Sequence[str], images_at_once: int, workers: int, bad: Callable[[str], None]
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield (ids, images (B,3,H,W) uint8) of neighbours of equal size; sentences on unreadable files go to `bad`.

    B is `images_at_once` always, and images after the last id are to be ignored: sums in floating point depend on the
    size of a batch, and an image must get the same result whatever else is left to do, in any number of processes.
    """
    group: list[tuple[str, Tensor]] = []

    def batch() -> tuple[list[str], Tensor]:
        images = [image for _, image in group]
        return [id for id, _ in group], torch.stack(images + images[:1] * (images_at_once - len(images)))

    for id, image, sentence in DataLoader(_Images(folder, ids), batch_size=None, num_workers=workers):
        if image is None:
            bad(sentence)
            continue
        if group and (len(group) == images_at_once or group[0][1].shape != image.shape):
            yield batch()
            group = []
        group.append((id, image))
    if group:
        yield batch()


@contextmanager
def in_background(threads: int = 2) -> Iterator[Callable[..., None]]:
    """Yield `submit(work, *arguments)`, whose calls run in threads while the caller computes on.

    For compressing and writing, which leave Python's lock alone. At most twice as many calls as threads are under way,
    so that results cannot fill the memory. Their first error is raised by a later submit or at the end of the block,
    when all calls are done.
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


@torch.inference_mode()
def mirrored_scales(
    predict: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], device: torch.device
) -> list[Tensor]:
    """For each scale `predict` of the images plus the un-mirrored `predict` of their mirrors: (B,K,h,w) float32 each.

    images (B,3,H,W) uint8; `predict` maps normalised (2B,3,H',W') to (2B,K,h',w'), image and mirror in one batch.
    """
    if device.type == "cuda":
        images = images.pin_memory()  # from other memory the copy would wait for all that the GPU has to do before
    images = images.to(device, non_blocking=True)
    found = []
    for scale in scales:
        size = [max(1, round(length * scale)) for length in images.shape[-2:]]
        scaled = images if scale == 1 else resize(images, size, InterpolationMode.BICUBIC, antialias=True)
        x = normalise(scaled)
        x = torch.cat([x, x.flip(-1)]).contiguous(memory_format=torch.channels_last)
        plain, mirror = predict(x).float().chunk(2)
        found.append(plain + mirror.flip(-1))
    return found


def save_cams(path: Path, classes: np.ndarray, maps: Sequence[np.ndarray], size: tuple[int, int]) -> None:
    """Store the maps of each scale at feature size: all that the full-size maps are made of, in a fraction of the disk.

    classes (k,) ids of the classes present, ascending; maps: for each scale (k,h,w), not negative; size: (H,W) of the
    image. Values go to float16 as shares of the class's maximum, which is kept in float32, so nothing overflows.
    """
    peaks = np.max([scale.max((1, 2)) for scale in maps], axis=0).astype(np.float32)
    shares = [(scale / np.maximum(peaks, 1e-30)[:, None, None]).astype(np.float16) for scale in maps]
    with write_whole(path) as temporary:
        np.savez_compressed(
            temporary,
            classes=classes.astype(np.uint8),
            size=np.array(size, np.int32),
            peaks=peaks,
            **{f"scale{index}": scale for index, scale in enumerate(shares)},
        )


def fuse_scales(maps: Sequence[Tensor], size: tuple[int, int], relative: bool = True) -> Tensor:
    """Class maps (k,h,w) of each scale -> (k,H,W).

    Upsampled to the size rounded up to the output stride, summed, cut to the image, and if `relative` divided by each
    map's maximum, so that they lie in 0..1.
    """
    padded = [-(-length // OUTPUT_STRIDE) * OUTPUT_STRIDE for length in size]
    total = sum(F.interpolate(scale[None], padded, mode="bilinear", align_corners=False)[0] for scale in maps)
    total = total[:, : size[0], : size[1]]
    return total / (total.amax((1, 2), keepdim=True) + 1e-5) if relative else total


def load_cams(path: Path, relative: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """-> class ids (k,) ascending, maps (k,H,W) float32 in 0..1 at image size (method section 2).

    `relative` divides each map by its maximum, as CAMs are used; probabilities of step 6 are read without it.
    Raises `UserError` when the file is missing, damaged, or declares more than `MOST_PIXELS` or `MOST_BYTES`.
    """
    maker = "infer_classification.py" if relative else "inference_segmentation.py --keep-probabilities --overwrite"
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(entry.file_size for entry in file.zip.infolist()) > MOST_BYTES:
                raise ValueError("it unpacks to more than maps can need")
            classes, size, peaks = file["classes"].astype(int), tuple(map(int, file["size"])), file["peaks"]
            shares = [file[name] for name in sorted(file.files) if name.startswith("scale")]
        if len(size) != 2 or min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
            raise ValueError(f"it declares an image of {' x '.join(map(str, size))} pixels")
        if not shares or {peaks.shape, *(scale.shape[:-2] for scale in shares)} != {(len(classes),)}:
            raise ValueError("its arrays do not fit together")
        maps = [torch.from_numpy(scale.astype(np.float32) * peaks[:, None, None]) for scale in shares]
        return classes, fuse_scales(maps, size, relative).numpy()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run python {maker}, which creates missing files") from None
    except Exception as error:  # zip, npy and shape errors have no common class
        raise UserError(
            f"{path} cannot be read as class activation maps ({error}): delete it and run python {maker} again"
        ) from None
