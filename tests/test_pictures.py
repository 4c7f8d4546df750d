"""Pictures: exact colours, regions in the right order, contact sheets of the promised size."""

import numpy as np
import pytest
from PIL import Image

from tools.pictures import colourise, confusion_picture, contact_sheet, heat, overlay, regions, sample_ids

COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0]], np.uint8)
GREY = np.full((16, 16, 3), 100, np.uint8)


@pytest.mark.parametrize(
    ("count", "n", "expected"),
    [(8, 3, [0, 4, 7]), (3, 9, [0, 1, 2]), (1, 4, [0]), (4, 0, []), (0, 3, [])],
)
def test_sample_ids_are_evenly_spaced(count, n, expected):
    assert sample_ids([str(number) for number in range(count)], n) == [str(number) for number in expected]


def test_colourise_and_overlay():
    ids = np.array([[0, 1], [2, 255]], np.uint8)
    assert colourise(ids, COLOURS).tolist() == [[[255, 255, 255], [0, 0, 255]], [[0, 255, 0], [128, 128, 128]]]
    blended = overlay(GREY[:2, :2], ids, COLOURS, alpha=0.25)
    assert blended[0, 1].tolist() == [75, 75, 139]  # 0.75 * 100 + 0.25 * (0, 0, 255)
    assert blended[1, 1].tolist() == [100, 100, 100]  # ignored: the image alone


def test_heat_grows_brighter_and_survives_bad_values():
    ramp = np.linspace(-0.5, 1.5, 16, dtype=np.float32)[None].repeat(16, 0)
    ramp[0, 0] = np.nan
    brightness = heat(GREY, ramp, alpha=1).sum(axis=2, dtype=int)[1]
    assert (np.diff(brightness) >= 0).all() and brightness[-1] > brightness[0] + 300
    assert np.array_equal(heat(GREY, ramp, alpha=0), GREY)


def test_small_regions_lie_on_top_of_large_ones():
    small, large = np.zeros((2, 16, 16), bool)
    large[2:14, 2:14], small[6:10, 6:10] = True, True
    first, second = regions(np.stack([small, large]), GREY), regions(np.stack([large, small]), GREY)
    for picture in (first, second):
        assert not np.array_equal(picture[8, 8], picture[4, 4])  # the small one can be seen in either order
        assert picture[0, 0].tolist() == [100, 100, 100] and picture[2, 5].tolist() == [255, 255, 255]


def test_regions_of_many_masks_and_of_none():
    masks = np.zeros((300, 20, 20), bool)
    masks[np.arange(300), np.arange(300) // 20, np.arange(300) % 20] = True
    picture = regions(masks, np.zeros((20, 20, 3), np.uint8))
    assert (picture[:15] == 255).all(axis=2).sum() >= 299  # one pixel each: all boundary, none wrapped at 256
    assert np.array_equal(regions(masks[:0], GREY), GREY)


@pytest.mark.parametrize(("side", "cell"), [(100, 200), (128, 256), (256, 256), (512, 256), (300, 256)])
def test_contact_sheet_cells(tmp_path, side, cell):
    """Small patches grow by a whole factor, large ones shrink; an empty cell and ragged rows are allowed."""
    picture = np.zeros((side, side, 3), np.uint8)
    contact_sheet(tmp_path / "sheet.png", [[picture, picture], [None, picture], [picture]], ["image", "truth"])
    with Image.open(tmp_path / "sheet.png") as image:
        black = np.array(image).max(axis=2) == 0
    assert black[100 : 100 + 1].sum() == 2 * cell and black.sum() >= 4 * cell * cell
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_contact_sheet_with_legend_and_without_rows(tmp_path):
    legend = [(f"a rather long class name {number}", (number, 0, 0)) for number in range(16)]
    contact_sheet(tmp_path / "plain.png", [[GREY]], ["a title that is far too long for its small cell"])
    contact_sheet(tmp_path / "legend.png", [[GREY]], ["image"], legend)
    contact_sheet(tmp_path / "empty.png", [], [])
    plain, with_legend = Image.open(tmp_path / "plain.png").size, Image.open(tmp_path / "legend.png").size
    assert with_legend[0] == plain[0] and with_legend[1] > plain[1] + 16 * 20


def test_names_stand_above_the_rows(tmp_path):
    """A line of its own for each, so that nothing is covered; a long one is shortened at the sheet's end."""
    black = np.zeros((16, 16, 3), np.uint8)
    contact_sheet(tmp_path / "plain.png", [[black], [black]], ["image"])
    contact_sheet(tmp_path / "named.png", [[black], [black]], ["image"], names=["top_mosaic_area_1", "x" * 300])
    plain, named = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "named"))
    assert named.shape == (plain.shape[0] + 48, *plain.shape[1:])
    assert (named.max(axis=2) == 0).sum() == (plain.max(axis=2) == 0).sum()  # both patches whole
    lines = named[34:58], named[320:344]
    assert all((line != 0xEC).any() and (line > 0).all() for line in lines)  # grey letters on the paper


def test_confusion_picture(tmp_path):
    counts = np.array([[5, 1, 0], [0, 0, 0]])
    confusion_picture(tmp_path / "confusion.png", counts, ["a $b$_{", "<c>"], "title with $ and \\alpha")
    assert min(Image.open(tmp_path / "confusion.png").size) > 100
