"""Our mask pipeline against segment-anything's own generator, on a tiny model that learns for some seconds.

With random weights all points give one mask. This model learns that the three masks of a point are discs around it
whose outline follows the brightness: masks enough for every filter to work on.
"""

import hashlib
import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from torch.nn import functional as F

from PRC_SAM.checkpoints import _fetch, build_sam, find_checkpoint, load_sam, save_sam
from PRC_SAM.generator import MaskGenerator, Settings
from PRC_SAM.get_se_map import Constants, check_constants
from PRC_SAM.mask_tensors import count_pixels, outer_boxes, pack_bits
from PRC_SAM.sam_forward import PointDecoder, encode_images
from tools.command import UserError
from tools.masks import load_masks, pack_masks

SIZES = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "global_attention": [1],
    "image_size": 128,
    "window_size": 3,
    "prompt_dim": 32,
    "decoder_mlp_dim": 64,
}
OPEN = {"points_per_side": 6, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.6, "stability_score_offset": 0.5}


@lru_cache(1)
def tiny_sam(steps=300, points=16):
    torch.manual_seed(0)
    sam = build_sam(**SIZES).train()
    optimiser = torch.optim.Adam(sam.parameters(), 3e-3)
    images = [torch.from_numpy(picture(128, 128, seed)).permute(2, 0, 1) for seed in range(4)]
    y, x = 4 * torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")) + 2
    radii = torch.tensor([16.0, 26.0, 40.0])
    for step in range(steps):
        image, at = images[step % len(images)], 128 * torch.rand(points, 2)
        distance = torch.hypot(x - at[:, 0, None, None], y - at[:, 1, None, None])
        brightness = F.interpolate(image[None].float(), (32, 32), mode="area")[0] / 255
        truth = (distance[:, None] < radii[:, None, None] * (0.5 + brightness)).float()
        scores = 0.75 + 0.25 * torch.sin(at.sum(1, keepdim=True) / 20 + torch.arange(3))
        sparse, dense = sam.prompt_encoder((at[:, None], torch.ones(points, 1)), None, None)
        embedding = sam.image_encoder(sam.preprocess(image)[None])
        logits, ious = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
        loss = F.binary_cross_entropy_with_logits(logits, truth) + F.mse_loss(ious, scores)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return sam.eval()


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20)) for _ in range(3)], axis=-1)
    return (127 + 90 * waves + rng.normal(0, 15, waves.shape)).clip(0, 255).astype(np.uint8)


def test_encoder_equals_sams():
    sam, images = tiny_sam(), torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = sam.image_encoder(images)
        torch.testing.assert_close(encode_images(sam.image_encoder, images), expected, rtol=1e-4, atol=1e-4)


def test_decoder_equals_sams():
    sam = tiny_sam()
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
    generator = MaskGenerator(tiny_sam(), Settings(points_per_side=2))
    _, (crop,) = generator.prepare(picture(*size))
    low = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3))
    rows, columns = generator._resampling_of(crop.pixels.shape[1:], size)
    expected = tiny_sam().postprocess_masks(low[None], crop.pixels.shape[1:], size)[0]
    torch.testing.assert_close(rows @ low @ columns.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 9, 13), (2, 64, 64), (1, 1, 3), (0, 5, 5), (2, 300, 100)])
def test_bits_boxes_and_counts_of_tensors(shape):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.02
    expected = pack_masks(masks.numpy())
    np.testing.assert_array_equal(pack_bits(masks).numpy(), expected.bits)
    np.testing.assert_array_equal(outer_boxes(masks).numpy(), expected.boxes)
    np.testing.assert_array_equal(count_pixels(masks).numpy(), expected.areas)
    assert (count_pixels(torch.ones(shape, dtype=torch.bool)) == shape[1] * shape[2]).all()


def overlaps(theirs, ours):
    """(M,N) IoU of two sets of masks; two empty masks are equal."""
    theirs, ours = (masks.reshape(len(masks), -1).astype(float) for masks in (theirs, ours))
    shared = theirs @ ours.T
    union = theirs.sum(1)[:, None] + ours.sum(1) - shared
    return np.where(union > 0, shared / np.maximum(union, 1), 1)


IMAGES = ((96, 96, 0), (64, 90, 1), (75, 61, 2))


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 60),
        ({"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}, 3 * 108),
        ({"min_mask_region_area": 40}, 60),
        ({"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}, 60),
        ({"crop_n_layers": 1, "min_mask_region_area": 20, "crop_nms_thresh": 0.5}, 60),
        ({"pred_iou_thresh": 1000.0}, 0),
    ],
)
def test_equals_the_stock_generator(settings, least):
    images, settings = [picture(*shape) for shape in IMAGES], OPEN | settings
    stock = SamAutomaticMaskGenerator(tiny_sam(), **settings)
    total, close = 0, 0
    for image, masks in zip(images, MaskGenerator(tiny_sam(), Settings(**settings), batch=2)(images), strict=True):
        records = sorted(stock.generate(image), key=lambda record: -record["predicted_iou"])
        assert len(records) == len(masks)
        assert (np.diff(masks.predicted_iou) <= 0).all()
        np.testing.assert_allclose(masks.predicted_iou, [r["predicted_iou"] for r in records], rtol=1e-3, atol=1e-4)
        ours, theirs = masks.unpack(), np.array([record["segmentation"] for record in records])
        np.testing.assert_array_equal(masks.areas, ours.sum((1, 2)))
        np.testing.assert_array_equal(masks.boxes, pack_masks(ours).boxes)
        total += len(records)
        if records:
            iou = overlaps(theirs, ours)
            close += (iou.max(1) >= 0.999).sum()
            same = iou.argmax(1)
            stability = [record["stability_score"] for record in records]
            np.testing.assert_allclose(masks.stability[same], stability, rtol=0.02)
    assert total >= least and close >= 0.99 * total


def test_bfloat16_finds_the_masks_of_the_reference():
    images = [picture(*shape) for shape in IMAGES]
    matched = []
    for exact, fast in zip(
        *(MaskGenerator(tiny_sam(), Settings(**OPEN), precision)(images) for precision in ("fp32", "bf16")), strict=True
    ):
        matched.extend(overlaps(exact.unpack(), fast.unpack()).max(1) >= 0.95)
    assert np.mean(matched) >= 0.95


def test_batches_do_not_change_the_masks():
    images = [picture(96, 96, seed) for seed in range(3)]
    one = MaskGenerator(tiny_sam(), Settings(**OPEN, points_per_batch=5), batch=1)(images)
    for a, b in zip(one, MaskGenerator(tiny_sam(), Settings(**OPEN), batch=3)(images), strict=True):
        np.testing.assert_allclose(a.predicted_iou, b.predicted_iou, rtol=1e-4)
        assert (a.unpack() != b.unpack()).mean() < 1e-4


def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    generator = MaskGenerator(tiny_sam(), Settings(**OPEN, points_per_batch=36))
    (expected,) = generator([picture(96, 96)])
    whole = MaskGenerator._points

    def small_memory(self, embedding, tokens, *rest):
        if len(tokens) > 10:
            raise torch.OutOfMemoryError
        return whole(self, embedding, tokens, *rest)

    monkeypatch.setattr(MaskGenerator, "_points", small_memory)
    (found,) = generator([picture(96, 96)])
    assert generator.points_at_once.size == 9
    assert len(found) == len(expected)


def test_checkpoints(tmp_path):
    save_sam(tmp_path / "tiny.pth", tiny_sam(), SIZES)
    back = load_sam("custom", tmp_path / "tiny.pth")
    for name, tensor in tiny_sam().state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    with pytest.raises(UserError, match=r"tiny.pth does not hold a vit_b model"):
        load_sam("vit_b", tmp_path / "tiny.pth")
    torch.save({"sizes": SIZES | {"depth": 3}, "model": tiny_sam().state_dict()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth does not hold a custom model"):
        load_sam("custom", tmp_path / "other.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"noise.pth is not a checkpoint"):
        load_sam("custom", tmp_path / "noise.pth")
    with pytest.raises(UserError, match=r"0b3195.pth is missing: get it from https.*3adcc4315b64.*--download"):
        find_checkpoint("vit_l", "", tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "sam_vit_b_01ec64.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"sam_vit_b_01ec64.pth is damaged or another file"):
        find_checkpoint("vit_b", "", tmp_path)


def test_download_is_checked_before_it_is_kept(tmp_path):
    (tmp_path / "there.pth").write_bytes(b"weights")
    url, sha256 = (tmp_path / "there.pth").as_uri(), hashlib.sha256(b"weights").hexdigest()
    _fetch(url, tmp_path / "weights" / "here.pth", sha256)
    assert (tmp_path / "weights" / "here.pth").read_bytes() == b"weights"
    with pytest.raises(UserError, match=r"has the SHA-256 .* try again"):
        _fetch(url, tmp_path / "weights" / "other.pth", "0" * 64)
    with pytest.raises(UserError, match=r"could not be fetched .* by other means"):
        _fetch(url + "x", tmp_path / "weights" / "other.pth", sha256)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["here.pth"]


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
    refused = run_script(*arguments, fails=True)
    assert "sam_vit_h_4b8939.pth is missing: get it from" in refused.stderr
    run_script(*arguments, "--generator", "felzenszwalb", "--coloured-maps")
    folder = demo_images / "datasets" / "demo" / "train" / "sam_masks"
    account = json.loads((folder / "run.json").read_text())
    assert account["finished"] and account["files"] == 3 and "stand_in" in account["notes"]
    assert (folder / "contact_sheet.png").exists() and len(list((folder / "coloured").glob("*.png"))) == 3
    assert load_masks(folder / "train0.npz").size == (64, 64)
    assert (folder.parents[1] / "test" / "sam_masks" / "test0.npz").exists()
    refused = run_script(*arguments, "--generator", "felzenszwalb", "--min-area", 9, fails=True)
    assert "min_area: 64 there, 9 now" in refused.stderr


def test_script_continues_from_inside_its_folder(demo_images, run_script):
    from tests.conftest import ROOT

    save_sam(demo_images / "tiny.pth", tiny_sam(), SIZES)
    images = demo_images / "datasets" / "demo" / "train" / "images"
    good = (images / "train1.png").read_bytes()
    (images / "train1.png").write_bytes(b"damaged")
    arguments = (
        "get_se_map.py",
        "--dataset",
        "demo",
        "--root",
        demo_images,
        "--split",
        "train",
        "--model",
        "custom",
        "--checkpoint",
        demo_images / "tiny.pth",
        "--points-per-side",
        4,
        "--images-at-once",
        2,
    )
    refused = run_script(*arguments, fails=True, cwd=ROOT / "PRC_SAM")
    assert "train1.png cannot be read" in refused.stderr and "1 files could not be done" in refused.stderr
    masks = images.parent / "sam_masks"
    first = (masks / "train0.npz").stat().st_mtime_ns
    (images / "train1.png").write_bytes(good)
    run_script(*arguments, cwd=ROOT / "PRC_SAM")
    assert (masks / "train0.npz").stat().st_mtime_ns == first
    account = json.loads((masks / "run.json").read_text())
    assert account["files"] == 3 and account["notes"] == {} and account["constants"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generator", "watershed"),
        ("split", "val"),
        ("model", "vit_x"),
        ("precision", "fp16"),
        ("pred_iou_thresh", 2),
        ("points_per_side", 0),
        ("crop_overlap_ratio", -0.1),
        ("images_at_once", 0),
        ("scales", ()),
        ("scales", (1.0, -5.0)),
        ("box_nms_thresh", float("nan")),
    ],
)
def test_wrong_constants(name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        check_constants(Constants(**{name: value}))


def test_crop_layers_without_points():
    with pytest.raises(UserError, match="points_per_side is too small"):
        check_constants(Constants(points_per_side=4, crop_n_layers=2, crop_n_points_downscale_factor=4))
