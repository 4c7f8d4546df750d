"""The refinement rules against loops over pixels in float64, and the steps that apply them to folders."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate_refined_pseudo
import generate_refined_seg
from inference_segmentation import small_probabilities
from PRC_SAM.refine import Refinement
from tests.experiments import make_refinable
from tests.references import bilinear
from tests.steps import TEST, experiment, record, same_results, step
from tests.test_ios import SEEDS, SIZES, literal, random_case
from tools.command import UserError
from tools.dataset import load_dataset
from tools.labels import load_label
from tools.map_files import load_maps, save_maps
from tools.masks import load_masks, pack_masks


def chosen_class(rule, label, mask, classes, maps):
    """The class that a mask takes, or None: counts and float64 means, class by class."""
    best, most = None, 0.0
    for c in sorted(classes):
        inside = float((label[mask] == c).sum())
        if rule == "sepl":
            evidence = inside if inside / max(mask.sum(), 1) > 0.5 else 0.0
        elif rule == "vote":
            evidence = inside
        else:
            evidence = float(maps[c][mask].astype(np.float64).mean()) if c in maps and mask.any() else 0.0
        if evidence > most:  # on a tie the lower class stays
            best, most = c, evidence
    return best


def reference(rule, label, masks, classes, maps=None, background=None):
    """Masks painted one after the other, from large to small; of equally large ones those of the lower class last."""
    if rule == "sepl":
        classes = [c for c in classes if c != background]
    writes = [(mask, chosen_class(rule, label, mask, classes, maps)) for mask in masks]
    writes = [(mask, c) for mask, c in writes if c is not None]
    result = label.copy()
    for mask, c in sorted(writes, key=lambda write: (-int(write[0].sum()), -int(write[1]))):
        result[mask] = c
    return result


@pytest.mark.parametrize("rule", ["sepl", "vote", "mean_cam"])
@given(SEEDS, SIZES, st.sampled_from([1, 8, 1 << 20]), st.sampled_from([None, 0, 2]))
def test_rules_equal_the_loop(rule, seed, size, steps, background):
    """Maps in whole steps, so that means tie."""
    rng = np.random.default_rng(seed)
    label, masks, classes = random_case(rng, size)
    before = label.copy()
    with_map = rng.permutation(5)[: rng.integers(0, 6)]
    maps = {c: (rng.integers(0, steps + 1, size) / steps).astype(np.float32) for c in with_map.tolist()}
    refined = Refinement(rule, 0.9, background)(label, pack_masks(masks), classes, maps)
    np.testing.assert_array_equal(refined, reference(rule, label, masks, classes, maps, background))
    np.testing.assert_array_equal(label, before)


def test_means_are_exact():
    """Sums over 2^18 pixels of 1 / 3, and one pixel that is larger by the smallest step decides."""
    plain = np.full((512, 512), 1 / 3, np.float32)
    larger = plain.copy()
    larger[300, 17] += 2.0**-23
    label, masks = np.full((512, 512), 3, np.uint8), np.ones((1, 512, 512), bool)
    masks[0, 0, :70] = False
    for first, second, winner in ((plain, larger, 1), (larger, plain, 0), (larger, larger, 0)):
        refined = Refinement("mean_cam", 0.9, None)(label, pack_masks(masks), [0, 1], {0: first, 1: second})
        assert (refined[masks[0]] == winner).all() and (refined[~masks[0]] == 3).all()


@pytest.mark.parametrize("rule", ["ios", "vote"])
def test_masks_of_another_size_are_refused(rule):
    masks = pack_masks(np.ones((1, 4, 5), bool))
    with pytest.raises(UserError, match="4 x 5"):
        Refinement(rule, 0.9, None)(np.zeros((4, 4), np.uint8), masks, [0])


STEPS = {  # module -> split, what it reads, what it writes, folder of maps
    generate_refined_pseudo: ("train", "pseudo_labels", "refined_pseudo_labels", "cams"),
    generate_refined_seg: ("test", "segmentation", "refined_segmentation", "segmentation"),
}


@pytest.fixture
def made(tmp_path):
    """Constants of a step, the data set and the folder of the experiment."""
    values = {"dataset": "tiny", "experiment": "run", "root": tmp_path, "workers": 0, "overwrite": True}
    return values, *make_refinable(tmp_path, background="road")


@pytest.mark.parametrize("rule", ["ios", "sepl", "vote", "mean_cam"])
@pytest.mark.parametrize("module", STEPS)
def test_steps_apply_the_rule_to_every_patch(made, module, rule):
    values, dataset, folder = made
    split, source, output, maps = STEPS[module]
    module.main(module.Constants(**values, rule=rule, tau=0.4))
    changed = 0
    for id in "abcde":
        label = load_label(folder / source / f"{id}.png", 4)
        masks = load_masks(dataset.sam_masks(split) / f"{id}.npz").unpack()
        classes = [0, 1, 3] if split == "train" else np.unique(label)
        named = dict(zip(*load_maps(folder / maps / f"{id}.npz", 4, (32, 32)), strict=True))
        if rule == "ios":
            expected = literal(label, masks, classes, 0.4)
        else:
            expected = reference(rule, label, masks, classes, named, background=0)
        refined = load_label(folder / output / f"{id}.png", 4)
        np.testing.assert_array_equal(refined, expected)
        changed += (refined != label).sum()
    assert changed > 0
    run = record(folder / output)
    assert run["constants"]["rule"] == rule and run["files"] == 5
    assert set(run["reads"]) >= {source, "sam_masks"} | ({maps} if rule == "mean_cam" else set())


def test_mean_cam_names_what_is_missing(made):
    values, _, folder = made
    (folder / "cams" / "b.npz").unlink()
    save_maps(folder / "cams" / "c.npz", "cams", np.array([0]), [np.ones((1, 2, 2))], (16, 16))
    with pytest.raises(UserError, match=r"(?s)b\.npz.*missing.*c\.npz.*\(16, 16\)"):
        generate_refined_pseudo.main(generate_refined_pseudo.Constants(**values, rule="mean_cam"))
    shutil.rmtree(folder / "cams")
    with pytest.raises(UserError, match="cams is missing"):
        generate_refined_pseudo.main(generate_refined_pseudo.Constants(**values, rule="mean_cam"))
    (folder / "segmentation" / "a.npz").write_bytes(b"PK")
    for ids in ("a", "abcde"):  # one damaged file, then none at all
        with pytest.raises(UserError, match="--keep-probabilities"):
            generate_refined_seg.main(generate_refined_seg.Constants(**values, rule="mean_cam"))
        for id in ids:
            (folder / "segmentation" / f"{id}.npz").unlink(missing_ok=True)


def test_step_6_keeps_probabilities_for_step_7(finished, copy):
    """A folder that was made without them is completed, and its label maps stay the same."""
    step("inference_segmentation", copy, keep_probabilities=True)
    assert same_results(experiment(finished) / "segmentation", experiment(copy) / "segmentation", ".png")
    step("generate_refined_seg", copy, rule="mean_cam", overwrite=True)
    dataset = load_dataset("tiny", copy)
    for id in TEST:
        label = load_label(experiment(copy) / "segmentation" / f"{id}.png", 3)
        ids, values = load_maps(experiment(copy) / "segmentation" / f"{id}.npz", 3, (64, 64))
        assert ids.tolist() == [0, 1, 2] and values.shape == (3, 64, 64)
        np.testing.assert_allclose(values.sum(0), 1, atol=5e-3)  # stored in float16
        masks = load_masks(dataset.sam_masks("test") / f"{id}.npz").unpack()
        expected = reference("mean_cam", label, masks, np.unique(label), dict(enumerate(values)))
        refined = load_label(experiment(copy) / "refined_segmentation" / f"{id}.png", 3)
        np.testing.assert_array_equal(refined, expected)


@pytest.mark.parametrize("size", [(32, 48), (20, 33)])
def test_small_probabilities_are_means_of_the_softmax(size, tmp_path):
    logits = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    probabilities = small_probabilities(logits, 4).numpy()[0]
    exact = np.exp(logits[0].double().numpy() / 4)
    exact /= exact.sum(0)
    padded = np.pad(exact, [(0, 0), *((0, -length % 16) for length in size)], mode="edge")
    expected = padded.reshape(3, padded.shape[1] // 4, 4, padded.shape[2] // 4, 4).mean((2, 4))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    save_maps(tmp_path / "a.npz", "probabilities", np.arange(3), [probabilities], size)
    _, back = load_maps(tmp_path / "a.npz", 3, size)  # the cells lie where the pixels are
    upsampled = bilinear(probabilities, padded.shape[1:], False)
    np.testing.assert_allclose(back[:, 1:3, 1:3].mean((1, 2)), upsampled[:, 1:3, 1:3].mean((1, 2)), rtol=5e-3)
