"""Our mask pipeline against segment-anything's own generator, on a small trained model (tests/small_sam.py).

Floating-point sums differ in their last digits from one processor to the next, and a mask that lies within such a
difference of a threshold may be kept on one and dropped on the other. So two sets of masks are the same here when
nearly all masks of each have their like in the other. Counts are compared where no threshold decides about them.
"""

import hashlib

import numpy as np
import pytest
import segment_anything
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from segment_anything import SamAutomaticMaskGenerator

from PRC_SAM.checkpoints import fetch, find_checkpoint, load_sam
from PRC_SAM.generator import MaskGenerator, pack_bits
from PRC_SAM.get_se_map import Constants
from PRC_SAM.sam_forward import PointDecoder, encode_images, relative_positions
from tests.conftest import ROOT
from tests.small_sam import build_sam, picture, small_sam
from tests.steps import record
from tools.command import UserError
from tools.masks import load_masks, pack_masks

OPEN = {"points_per_side": 6, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.6, "stability_score_offset": 0.5}
UNFILTERED = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


def small_generator(precision="fp32", **settings):
    return MaskGenerator(small_sam(), precision, Constants(**settings))


def test_encoder_equals_sams():
    sam, images = small_sam(), torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = sam.image_encoder(images)
        ours = encode_images(sam.image_encoder, images, relative_positions(sam.image_encoder))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_decoder_equals_sams():
    sam = small_sam()
    generator = torch.Generator().manual_seed(2)
    embedding, points = torch.randn(32, 8, 8, generator=generator), 128 * torch.rand(5, 2, generator=generator)
    with torch.inference_mode():
        sparse, dense = sam.prompt_encoder((points[:, None], torch.ones(5, 1)), None, None)
        logits, scores = sam.mask_decoder(embedding[None], sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
        decoder = PointDecoder(sam)
        our_scores, tokens, pixels = decoder.transform(embedding, decoder.tokens(points))
        torch.testing.assert_close(our_scores, scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder.masks(tokens, pixels), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(128, 128), (96, 128), (70, 50), (200, 260)])
def test_resampling_equals_the_two_steps(size):
    generator = small_generator(points_per_side=2)
    _, (crop,) = generator.prepare(picture(*size))
    low = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3))
    rows, columns = generator.resampling(crop.pixels.shape[1:], size)
    expected = small_sam().postprocess_masks(low[None], crop.pixels.shape[1:], size)[0]
    torch.testing.assert_close(rows @ low @ columns.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 9, 13), (2, 64, 64), (1, 1, 3), (0, 5, 5), (2, 300, 100)])
def test_bits_of_tensors(shape):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.02
    np.testing.assert_array_equal(pack_bits(masks).numpy(), pack_masks(masks.numpy()).bits)


def overlaps(theirs, ours):
    """(M,N) IoU of two sets of masks; two empty masks are equal."""
    theirs, ours = (masks.reshape(len(masks), np.prod(masks.shape[1:])).astype(float) for masks in (theirs, ours))
    shared = theirs @ ours.T
    union = theirs.sum(1)[:, None] + ours.sum(1) - shared
    return np.where(union > 0, shared / np.maximum(union, 1), 1)


def partners(theirs, ours, least_iou=0.99, score_difference=1e-3):
    """Pairs (i, j) of the same mask in two sets ((M,H,W) bool, (M,) scores), each mask in one pair at most."""
    (masks, scores), (other_masks, other_scores) = theirs, ours
    same = overlaps(masks, other_masks) >= least_iou
    same &= np.abs(np.subtract.outer(np.asarray(scores), np.asarray(other_scores))) <= score_difference
    i, j = linear_sum_assignment(same, maximize=True)
    return i[same[i, j]], j[same[i, j]]


IMAGES = ((96, 96, 0), (64, 90, 1), (75, 61, 2))


@pytest.mark.parametrize(
    ("settings", "count"),  # of masks, where no threshold decides about it
    [
        ({}, None),
        (UNFILTERED, 3 * 108),  # images x 36 points of three masks each
        ({"min_mask_region_area": 40, "crop_nms_thresh": 0.4}, None),  # the larger threshold of the two counts
        ({"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}, None),
        ({"crop_n_layers": 1, "min_mask_region_area": 20, "crop_nms_thresh": 0.5}, None),
        ({"stability_score_offset": 1000.0, "stability_score_thresh": 0.01}, 0),  # no logit is as high
    ],
)
def test_equals_the_stock_generator(settings, count):
    images, settings = [picture(*shape) for shape in IMAGES], OPEN | settings
    stock = SamAutomaticMaskGenerator(small_sam(), **settings)
    ours_in_all = theirs_in_all = paired = 0
    for image, masks in zip(images, small_generator(images_at_once=2, **settings)(images), strict=True):
        records = stock.generate(image)
        theirs = np.array([r["segmentation"] for r in records]).reshape(-1, *image.shape[:2])
        scores, stability = (np.array([r[key] for r in records]) for key in ("predicted_iou", "stability_score"))
        ours = masks.unpack()
        np.testing.assert_array_equal(masks.areas, ours.sum((1, 2)))
        np.testing.assert_array_equal(masks.boxes, pack_masks(ours).boxes)
        assert (np.diff(masks.predicted_iou) <= 0).all()
        i, j = partners((theirs, scores), (ours, masks.predicted_iou))
        np.testing.assert_allclose(masks.predicted_iou[j], scores[i], rtol=1e-3)
        filled = theirs[i].any((1, 2))  # the stability of an empty mask is 0 / 0
        np.testing.assert_allclose(masks.stability[j][filled], stability[i][filled], atol=0.02)
        ours_in_all, theirs_in_all, paired = ours_in_all + len(ours), theirs_in_all + len(theirs), paired + len(i)
    if count is None:
        assert paired >= 0.97 * max(ours_in_all, theirs_in_all) > 100  # > 100: the comparison is about something
    else:
        assert ours_in_all == theirs_in_all == count and paired >= 0.97 * count


def suppressed(boxes, scores, threshold):
    """Non-maximum suppression word by word: the indices kept, boxes x0, y0, x1, y1."""
    kept = []
    for index in np.argsort(-scores, kind="stable"):
        x0, y0, x1, y1 = boxes[index].astype(float)
        for x2, y2, x3, y3 in boxes[kept].astype(float):
            shared = max(0, min(x1, x3) - max(x0, x2)) * max(0, min(y1, y3) - max(y0, y2))
            if shared / ((x1 - x0) * (y1 - y0) + (x3 - x2) * (y3 - y2) - shared) > threshold:
                break
        else:
            kept.append(index)
    return kept


def test_each_filter_alone_by_hand():
    """What one filter keeps of all candidates, exactly: on one processor the candidates are the same numbers."""

    def masks(**settings):
        return small_generator(**OPEN | UNFILTERED | settings)([picture(96, 96)])[0]

    candidates = masks()
    boxes, scores, stability = candidates.boxes, candidates.predicted_iou, candidates.stability
    assert len(candidates) == 108
    kept = {
        ("pred_iou_thresh", 0.75): np.flatnonzero(scores > 0.75),
        ("stability_score_thresh", 0.93): np.flatnonzero(stability >= 0.93),
        ("box_nms_thresh", 0.31): suppressed(boxes, scores, 0.31),
        ("box_nms_thresh", 0.62): suppressed(boxes, scores, 0.62),
    }
    for (name, threshold), index in kept.items():
        filtered = masks(**{name: threshold})
        assert 10 < len(index) < 98, name
        np.testing.assert_array_equal(filtered.predicted_iou, scores[index], name)
        if name != "pred_iou_thresh":  # which drops points before their masks are made, so that the batches differ
            np.testing.assert_array_equal(filtered.bits, candidates.bits[index], name)


def test_bfloat16_finds_the_masks_of_the_reference():
    images = [picture(*shape) for shape in IMAGES]
    matched = []
    for exact, fast in zip(*(small_generator(name, **OPEN)(images) for name in ("fp32", "bf16")), strict=True):
        matched.extend(overlaps(exact.unpack(), fast.unpack()).max(1) >= 0.95)
    assert np.mean(matched) >= 0.9


def assert_same_masks(one, other):
    pairs, _ = partners((one.unpack(), one.predicted_iou), (other.unpack(), other.predicted_iou))
    assert len(pairs) >= 0.97 * max(len(one), len(other)) > 30


def test_batches_do_not_change_the_masks():
    images = [picture(96, 96, seed) for seed in range(3)]
    one = small_generator(points_per_batch=5, images_at_once=1, **OPEN)(images)
    three = small_generator(images_at_once=3, **OPEN)(images)
    for a, b in zip(one, three, strict=True):
        assert_same_masks(a, b)


def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    generator = small_generator(points_per_batch=36, **OPEN)
    (expected,) = generator([picture(96, 96)])
    decode = MaskGenerator._points

    def small_memory(self, embedding, tokens, *arguments):
        if len(tokens) > 10:
            raise torch.OutOfMemoryError
        return decode(self, embedding, tokens, *arguments)

    monkeypatch.setattr(MaskGenerator, "_points", small_memory)
    (halved,) = generator([picture(96, 96)])
    assert generator.points_at_once.size == 9
    assert_same_masks(expected, halved)


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_sam)
    torch.save(small_sam().state_dict(), tmp_path / "tiny.pth")
    loaded = load_sam("vit_b", tmp_path / "tiny.pth").state_dict()
    for name, tensor in small_sam().state_dict().items():
        assert torch.equal(tensor, loaded[name])
    for content in (build_sam(embed_dim=64).state_dict(), {}, [1]):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=r"other.pth .*--model"):
            load_sam("vit_b", tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"0b3195.pth is missing.*https.*3adcc4315b64.*--download"):
        find_checkpoint("vit_l", "", tmp_path)
    file = tmp_path / "weights" / "sam_vit_b_01ec64.pth"
    file.parent.mkdir()
    file.write_bytes(b"noise")
    for checkpoint in ("", str(file)):
        with pytest.raises(UserError, match=r"sam_vit_b_01ec64.pth is damaged"):
            find_checkpoint("vit_b", checkpoint, tmp_path)
    assert find_checkpoint("vit_b", str(tmp_path / "tiny.pth"), tmp_path).name == "tiny.pth"


def test_download_is_checked_before_it_is_kept(tmp_path):
    (tmp_path / "there.pth").write_bytes(b"weights")
    url, sha256 = (tmp_path / "there.pth").as_uri(), hashlib.sha256(b"weights").hexdigest()
    target = tmp_path / "weights" / "here.pth"
    fetch(url, target, sha256)
    assert target.read_bytes() == b"weights"
    for address, checksum, word in ((url, "0" * 64, "invalid hash"), (url + "x", sha256, "fetched")):
        with pytest.raises(UserError, match=word):
            fetch(address, target.with_name("other.pth"), checksum)
    assert [path.name for path in target.parent.iterdir()] == ["here.pth"]


@pytest.fixture
def demo_images(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        folder = tmp_path / "datasets" / "demo" / split / "images"
        folder.mkdir(parents=True)
        for index in range(count):
            Image.fromarray(picture(64, 64, index)).save(folder / f"{split}{index}.png")
    return tmp_path


def test_script_with_the_stand_in(demo_images, run_script):
    arguments = ("PRC_SAM/get_se_map.py", "--dataset", "demo", "--root", demo_images, "--workers", 0)
    assert "sam_vit_h_4b8939.pth is missing" in run_script(*arguments, fails=True).stderr
    run_script(*arguments, "--generator", "felzenszwalb", "--coloured-maps")
    folder = demo_images / "datasets" / "demo" / "train" / "sam_masks"
    run = record(folder)
    assert run["finished"] and run["files"] == 3 and "stand_in" in run["notes"]
    assert (folder / "contact_sheet.png").exists() and len(list((folder / "coloured").glob("*.png"))) == 3
    assert load_masks(folder / "train0.npz").size == (64, 64)
    assert (folder.parents[1] / "test" / "sam_masks" / "test0.npz").exists()
    refused = run_script(*arguments, "--generator", "felzenszwalb", "--min-area", 9, fails=True)
    assert "min_area: 64 there, 9 now" in refused.stderr


SMALL_REGISTRY = """
import runpy
import sys
sys.path.insert(0, {root!r})
import segment_anything
from tests.small_sam import build_sam
segment_anything.sam_model_registry["vit_b"] = build_sam
runpy.run_path("get_se_map.py", run_name="__main__")
"""


def test_script_continues_from_inside_its_folder(demo_images, run_script):
    (demo_images / "driver.py").write_text(SMALL_REGISTRY.format(root=str(ROOT)))
    torch.save(small_sam().state_dict(), demo_images / "tiny.pth")
    images = demo_images / "datasets" / "demo" / "train" / "images"
    good = (images / "train1.png").read_bytes()
    (images / "train1.png").write_bytes(b"damaged")
    arguments = [demo_images / "driver.py", "--dataset", "demo", "--root", demo_images, "--split", "train"]
    arguments += ["--model", "vit_b", "--checkpoint", demo_images / "tiny.pth"]
    arguments += ["--points-per-side", 4, "--images-at-once", 2]
    refused = run_script(*arguments, fails=True, cwd=ROOT / "PRC_SAM")
    assert "train1.png" in refused.stderr and "files that failed: 1" in refused.stderr
    masks = images.parent / "sam_masks"
    first = (masks / "train0.npz").stat().st_mtime_ns
    (images / "train1.png").write_bytes(good)
    run_script(*arguments, cwd=ROOT / "PRC_SAM")
    run = record(masks)
    assert (masks / "train0.npz").stat().st_mtime_ns == first
    assert run["files"] == 3 and run["notes"] == {} and run["constants"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "custom"), ("points_per_side", 0), ("crop_overlap_ratio", -0.1), ("box_nms_thresh", float("nan"))],
)
def test_wrong_constants(name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        Constants(**{name: value})


def test_crop_layers_without_points():
    settings = {"crop_n_layers": 2, "crop_n_points_downscale_factor": 4}
    with pytest.raises(UserError, match="points_per_side is 4"):
        Constants(**settings, points_per_side=4)
    assert Constants(**settings, points_per_side=16).points_per_side == 16
