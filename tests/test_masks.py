"""Mask files: what is written comes back, small; damaged, foreign and oversized files are refused by name."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import tools.masks as masks_module
from PRC_SAM.regions import felzenszwalb_masks
from tools.command import UserError
from tools.masks import MOST_MASKS, Masks, load_masks, pack_masks, save_masks


@given(hnp.arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9))))
def test_packing_keeps_everything(masks):
    packed = pack_masks(masks)
    np.testing.assert_array_equal(packed.unpack(), masks)
    np.testing.assert_array_equal(packed.areas, masks.sum((1, 2)))
    for mask, box in zip(masks, packed.boxes, strict=True):
        ys, xs = np.nonzero(mask)
        expected = [xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0, 0, 0, 0]
        np.testing.assert_array_equal(box, expected)


@pytest.mark.parametrize("shape", [(7, 20, 33), (0, 16, 16), (3, 1, 1)])
def test_file_keeps_everything(tmp_path, shape):
    rng = np.random.default_rng(1)
    masks, iou, stability = rng.random(shape) < 0.5, rng.random(shape[0]), rng.random(shape[0])
    save_masks(tmp_path / "a.npz", pack_masks(masks, iou, stability))
    back = load_masks(tmp_path / "a.npz")
    order = np.argsort(-iou, kind="stable")
    assert back.size == shape[1:] and len(back) == shape[0]
    np.testing.assert_array_equal(back.unpack(), masks[order])
    np.testing.assert_array_equal(back.predicted_iou, iou[order].astype(np.float32))
    np.testing.assert_array_equal(back.stability, stability[order].astype(np.float32))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as plain:
        assert plain["bits"].shape == (shape[0], -(-shape[1] * shape[2] // 8))


def test_equal_scores_keep_the_given_order():
    masks = np.eye(4, dtype=bool).reshape(4, 2, 2)
    packed = pack_masks(masks, np.array([0.5, 0.9, 0.5, 0.9]))
    np.testing.assert_array_equal(packed.unpack(), masks[[1, 3, 0, 2]])


def test_files_compressed_by_lzma_are_read(tmp_path):
    """As earlier versions wrote them."""
    masks = pack_masks(np.random.default_rng(0).random((5, 20, 33)) < 0.5, np.linspace(1, 0, 5))
    save_masks(tmp_path / "a.npz", masks)
    _rewrite(tmp_path / "a.npz", zipfile.ZIP_LZMA)
    back = load_masks(tmp_path / "a.npz", (20, 33))
    np.testing.assert_array_equal(back.unpack(), masks.unpack())
    np.testing.assert_array_equal(back.predicted_iou, masks.predicted_iou)


def _entry(shape, dtype="|u1", content=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def _rewrite(path, compression=zipfile.ZIP_DEFLATED, **entries):
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content |= {f"{name}.npy": entry for name, entry in entries.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, entry in content.items():
            if entry is not None:
                archive.writestr(name, entry, compression)


def test_unreadable_files(tmp_path):
    path = tmp_path / "mask file.npz"
    with pytest.raises(UserError, match=r"mask file.npz is missing: .* step 9, python PRC_SAM.get_se_map.py"):
        load_masks(path)
    good = pack_masks(np.ones((2, 16, 16), bool))
    object_array = io.BytesIO()
    np.save(object_array, np.array([{}], object), allow_pickle=True)
    for change in (
        {"bits": _entry((2**40, 32))},  # declares far more than there is
        {"bits": _entry((2, 32), "<i1", bytes(64))},
        {"size": _entry((2,), "<i4", np.array([20000, 20000], np.int32).tobytes())},  # of other bits
        {"size": _entry((2,), "<i4", np.array([-16, -16], np.int32).tobytes())},
        {"size": _entry((), "<i4", b"\0" * 4)},
        {"areas": _entry((1,), "<i4", b"\0" * 4)},  # one area for two masks
        {"areas": _entry((2,), "<i4", np.array([256, 255], np.int32).tobytes())},  # other pixels than the bits have
        {"boxes": object_array.getvalue()},
        {"stability": None},
        {"bits": b"no array"},
    ):
        save_masks(path, good)
        _rewrite(path, **change)
        with pytest.raises(UserError, match=r"mask file.npz is not a readable .*: delete it and run step 9,"):
            load_masks(path)
    for content in (b"", b"PK no archive", b"\x93NUMPY", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"mask file.npz is not a readable"):
            load_masks(path)


def test_every_damaged_byte_is_refused_or_harmless(tmp_path):
    file = tmp_path / "a.npz"
    save_masks(file, pack_masks(np.random.default_rng(0).random((40, 64, 64)) < 0.5))
    good = file.read_bytes()
    refused = 0
    for at in range(0, len(good), len(good) // 60):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            assert load_masks(file).unpack().shape == (40, 64, 64)
        except UserError:
            refused += 1
    assert refused > 50  # most bytes are the bits, which a checksum guards


@pytest.mark.parametrize(("side", "count"), [(1, 2_000_000), (8, MOST_MASKS + 1000), (4000, 10)])
def test_files_that_declare_too_much_are_refused_before_they_are_unpacked(tmp_path, monkeypatch, side, count):
    """Two million masks in 150 KB would keep a refinement busy for a minute; large masks would fill the memory."""
    monkeypatch.setattr(masks_module, "MOST_BYTES", 10_000_000)
    length = -(-side * side // 8)
    np.savez_compressed(
        tmp_path / "bomb.npz",
        size=np.array([side, side], np.int32),
        bits=np.zeros((count, length), np.uint8),
        areas=np.zeros(count, np.int32),
        boxes=np.zeros((count, 4), np.int32),
        predicted_iou=np.zeros(count, np.float32),
        stability=np.zeros(count, np.float32),
    )
    assert (tmp_path / "bomb.npz").stat().st_size < 150_000
    unpacked, read = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda file, name: unpacked.append(name) or read(file, name)
    )
    with pytest.raises(UserError, match=r"bomb\.npz is not a readable mask file \(it declares"):
        load_masks(tmp_path / "bomb.npz")
    assert unpacked == []


def test_more_masks_than_a_file_may_hold_are_not_written(tmp_path):
    zeros = np.zeros(MOST_MASKS + 1, np.float32)
    many = Masks(
        (2, 2), zeros.astype(np.uint8)[:, None], zeros.astype(np.int32), np.zeros((len(zeros), 4)), zeros, zeros
    )
    with pytest.raises(UserError, match=r"a\.npz would hold 10001 masks of 2 x 2 pixels, .*raise min_area"):
        save_masks(tmp_path / "a.npz", many)
    save_masks(tmp_path / "a.npz", many.chosen(np.arange(MOST_MASKS)))
    assert len(load_masks(tmp_path / "a.npz", (2, 2))) == MOST_MASKS


def test_masks_of_another_image_are_refused_by_size(tmp_path):
    save_masks(tmp_path / "a.npz", pack_masks(np.ones((2, 16, 12), bool)))
    assert load_masks(tmp_path / "a.npz", (16, 12)).size == (16, 12)
    with pytest.raises(UserError, match=r"a\.npz .* 16 x 12 .* 12 x 16"):
        load_masks(tmp_path / "a.npz", (12, 16))


def test_sixty_masks_of_a_real_tile_are_small(shared_data, tmp_path):
    image = min((shared_data / "isaid_tiles" / "train" / "images").glob("*.jpg"))
    masks = felzenszwalb_masks(np.array(Image.open(image).convert("RGB")), (100, 400, 1600), 64)
    save_masks(tmp_path / "a.npz", masks.chosen(np.arange(60)))
    assert (tmp_path / "a.npz").stat().st_size <= 30_000


def test_stand_in_finds_plain_regions_at_several_scales():
    image = np.full((96, 96, 3), 60, np.uint8)
    image[10:50, 10:50] = (200, 60, 60)
    image[20:40, 20:40] = (210, 80, 60)  # a detail that coarse scales swallow
    masks = felzenszwalb_masks(image, (20, 4000), 64)
    dense = masks.unpack().astype(int)
    assert (np.diff(masks.predicted_iou) <= 0).all() and ((masks.predicted_iou >= 0) & (masks.predicted_iou <= 1)).all()
    for rows, least in ((slice(10, 50), 0.75), (slice(20, 40), 0.6)):  # the blur takes a rim off
        truth = np.zeros((96, 96), int)
        truth[rows, rows] = 1
        assert ((dense & truth).sum((1, 2)) / (dense | truth).sum((1, 2))).max() > least
    shared = np.einsum("mhw,nhw->mn", dense, dense)
    iou = shared / (masks.areas[:, None] + masks.areas - shared)
    assert (iou[~np.eye(len(masks), dtype=bool)] < 0.8).all()  # no duplicates


def test_stand_in_of_a_plain_image_is_empty():
    assert len(felzenszwalb_masks(np.full((32, 32, 3), 9, np.uint8), (100,), 64)) == 0
