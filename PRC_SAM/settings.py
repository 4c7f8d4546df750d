"""The settings of SAM's automatic mask generator, apart from the generator: reading them needs no torch."""

from typing import Annotated

from pydantic import Field

from tools.command import check
from tools.constants import Count, MayChange, NonNegative, PositiveCount, Share, checked_constants


@checked_constants
class Settings:
    """SAM's own names and defaults."""

    points_per_side: Annotated[int, Field(ge=1, le=1000)] = 32  # points of the prompt grid along each side
    points_per_batch: MayChange[PositiveCount] = 64  # points decoded at once; halved when the memory is full
    pred_iou_thresh: Share = 0.88  # masks with a lower predicted IoU are dropped
    stability_score_thresh: Share = 0.95  # masks that change more when the mask threshold is shifted are dropped
    stability_score_offset: NonNegative = 1.0  # how far the mask threshold is shifted up and down for that
    box_nms_thresh: Share = 0.7  # of masks whose boxes have a higher IoU, only the one of highest predicted IoU is kept
    crop_n_layers: Annotated[int, Field(ge=0, le=4)] = 0  # layer n runs again on 4^n crops of the image
    crop_nms_thresh: Share = 0.7  # box_nms_thresh between crops; masks of smaller crops are kept
    crop_overlap_ratio: Annotated[float, Field(ge=0, le=0.9)] = 512 / 1500  # of crops, as a share of the shorter side
    crop_n_points_downscale_factor: PositiveCount = 1  # points_per_side is divided by its n-th power in layer n
    min_mask_region_area: Count = 0  # smaller islands and holes are removed from the masks, in pixels

    def __post_init__(self) -> None:
        check(
            self.points_per_side >= self.crop_n_points_downscale_factor**self.crop_n_layers,
            f"points_per_side is {self.points_per_side}, too small to be divided by crop_n_points_downscale_factor, "
            f"{self.crop_n_points_downscale_factor}, in each of {self.crop_n_layers} crop layers: raise "
            "points_per_side, or lower one of the others",
        )
