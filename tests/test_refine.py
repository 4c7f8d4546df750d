"""The refinement rules against loops over pixels in float64, and the steps that apply them to folders."""

import json
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
from tests.references import bilinear
from tests.steps import TEST, experiment, same_results, step
from tests.test_ios import SEEDS, SIZES, TAUS, literal, random_case
from tools.command import UserError
from tools.dataset import load_dataset
from tools.image_labels import write_image_labels
from tools.labels import load_label, save_image, save_label
from tools.map_files import load_maps, save_maps
from tools.masks import load_masks, pack_masks, save_masks


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
    refined = Refinement(rule, background=background)(label, pack_masks(masks), classes, maps)
    np.testing.assert_array_equal(refined, reference(rule, label, masks, classes, maps, background))
    np.testing.assert_array_equal(label, before)


@given(SEEDS, SIZES, TAUS)
def test_ios_is_one_of_the_rules(seed, size, tau):
    label, masks, classes = random_case(np.random.default_rng(seed), size)
    refined = Refinement("ios", tau)(label, pack_masks(masks), classes)
    np.testing.assert_array_equal(refined, literal(label, masks, classes, tau))


def test_means_are_exact():
    """Sums over 2^18 pixels of 1 / 3, and one pixel that is larger by the smallest step decides."""
    plain = np.full((512, 512), 1 / 3, np.float32)
    larger = plain.copy()
    larger[300, 17] += 2.0**-23
    label, masks = np.full((512, 512), 3, np.uint8), np.ones((1, 512, 512), bool)
    masks[0, 0, :70] = False
    for first, second, winner in ((plain, larger, 1), (larger, plain, 0), (larger, larger, 0)):
        refined = Refinement("mean_cam")(label, pack_masks(masks), [0, 1], {0: first, 1: second})
        assert (refined[masks[0]] == winner).all() and (refined[~masks[0]] == 3).all()


def test_more_than_half_is_more_than_half():
    label = np.array([[1, 1, 0, 0, 2, 2, 2, 0]], np.uint8)
    masks = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]], bool).reshape(2, 1, 8)
    expected = [[1, 1, 0, 2, 2, 2, 2, 2]]  # class 1 holds half of the first mask
    np.testing.assert_array_equal(Refinement("sepl", background=0)(label, pack_masks(masks), [0, 1, 2]), expected)


def test_of_masks_of_equal_size_the_lower_class_is_on_top():
    label = np.array([[2, 2, 0, 1, 1]], np.uint8)
    masks = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool).reshape(2, 1, 5)
    for order in ([0, 1], [1, 0]):
        for rule in ("sepl", "vote"):
            refined = Refinement(rule, background=0)(label, pack_masks(masks[order]), [1, 2])
            np.testing.assert_array_equal(refined, [[2, 2, 1, 1, 1]])


@pytest.mark.parametrize("rule", ["ios", "sepl", "vote", "mean_cam"])
def test_masks_of_another_size_are_refused(rule):
    masks = pack_masks(np.ones((1, 4, 5), bool))
    with pytest.raises(UserError, match="4 x 5"):
        Refinement(rule)(np.zeros((4, 4), np.uint8), masks, [0], {0: np.ones((4, 4))})


LABELS = {"p": [1, 0, 1], "q": [0, 1, 1], "r": [1, 1, 0]}


@pytest.fixture
def small(tmp_path):
    """Three patches of 16 px in each split, with masks, pseudo-labels, CAMs and a segmentation that are made up."""
    folder = tmp_path / "datasets" / "tiny"
    folder.mkdir(parents=True)
    (folder / "dataset.toml").write_text(
        'patch_size = 16\nclasses = [{name = "a", colour = [1, 0, 0]}, {name = "b", colour = [0, 1, 0]}, '
        '{name = "c", colour = [0, 0, 1]}]\n[rules]\nbackground = "a"\n'
    )
    dataset, rng = load_dataset("tiny", tmp_path), np.random.default_rng(0)
    for split, source, maps in (("train", "pseudo_labels", "cams"), ("test", "segmentation", "segmentation")):
        for id, present in LABELS.items():
            save_image(dataset.images(split) / f"{id}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            classes = np.arange(3) if split == "train" else np.flatnonzero(present)
            label = rng.choice([*classes, classes[0]], (4, 4)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            save_label(experiment(tmp_path) / source / f"{id}.png", label, dataset.colours)
            masks = [np.roll(np.arange(256) < 30 * n, 50 * n).reshape(16, 16) for n in range(1, 6)]
            save_masks(dataset.sam_masks(split) / f"{id}.npz", pack_masks(np.array(masks)))
            ids = np.arange(3) if split == "test" else np.flatnonzero(present)
            values = rng.random((len(ids), 4, 4)) * np.array([1, 0.6, 0.8])[ids, None, None]
            holds = "probabilities" if maps == "segmentation" else "cams"
            save_maps(experiment(tmp_path) / maps / f"{id}.npz", holds, ids, [values], (16, 16))
        write_image_labels(
            dataset.image_labels_file(split), dataset.classes, {id: np.array(row) for id, row in LABELS.items()}
        )
        for made in (experiment(tmp_path) / source, experiment(tmp_path) / maps, dataset.sam_masks(split)):
            record = {"constants": {}, "started": made.name, "seconds": 1, "finished": True}
            (made / "run.json").write_text(json.dumps(record))
    return tmp_path, dataset


STEPS = {  # module -> split, what it reads, what it writes, folder of maps
    generate_refined_pseudo: ("train", "pseudo_labels", "refined_pseudo_labels", "cams"),
    generate_refined_seg: ("test", "segmentation", "refined_segmentation", "segmentation"),
}


@pytest.mark.parametrize("rule", ["ios", "sepl", "vote", "mean_cam"])
@pytest.mark.parametrize("module", STEPS)
def test_steps_apply_the_rule_to_every_patch(small, module, rule):
    root, dataset = small
    split, source, output, maps = STEPS[module]
    module.main(module.Constants(dataset="tiny", root=root, rule=rule, tau=0.4, workers=0))
    changed = 0
    for id, present in LABELS.items():
        label = load_label(experiment(root) / source / f"{id}.png", 3)
        masks = load_masks(dataset.sam_masks(split) / f"{id}.npz").unpack()
        classes = np.flatnonzero(present) if split == "train" else np.unique(label)
        ids, values = load_maps(experiment(root) / maps / f"{id}.npz", 3, (16, 16))
        named = dict(zip(ids, values, strict=True))
        if rule == "ios":
            expected = literal(label, masks, classes, 0.4)
        else:
            expected = reference(rule, label, masks, classes, named, background=0)
        refined = load_label(experiment(root) / output / f"{id}.png", 3)
        np.testing.assert_array_equal(refined, expected)
        changed += (refined != label).sum()
    assert changed > 0
    record = json.loads((experiment(root) / output / "run.json").read_text())
    assert record["constants"]["rule"] == rule and record["files"] == 3
    assert set(record["reads"]) >= {source, "sam_masks"} | ({maps} if rule == "mean_cam" else set())


def test_the_released_protocol_writes_the_classes_of_the_image_level_label(small):
    root, dataset = small
    for id in LABELS:  # the prediction holds all classes
        file = experiment(root) / "segmentation" / f"{id}.png"
        save_label(file, np.arange(256, dtype=np.uint8).reshape(16, 16) % 3, dataset.colours)
    values = {"dataset": "tiny", "root": root, "rule": "vote", "workers": 0}
    generate_refined_seg.main(generate_refined_seg.Constants(**values, protocol="released"))
    for id, present in LABELS.items():
        label = load_label(experiment(root) / "segmentation" / f"{id}.png", 3)
        masks = load_masks(dataset.sam_masks("test") / f"{id}.npz").unpack()
        expected = reference("vote", label, masks, np.flatnonzero(present))
        refined = load_label(experiment(root) / "refined_segmentation" / f"{id}.png", 3)
        np.testing.assert_array_equal(refined, expected)


def test_bad_mask_files_are_listed_at_the_end(small):
    """The other patches are refined all the same, and the next run makes only what is missing."""
    root, dataset = small
    masks = dataset.sam_masks("train")
    good = (masks / "q.npz").read_bytes()
    (masks / "p.npz").unlink()
    (masks / "q.npz").write_bytes(good[:200])
    constants = generate_refined_pseudo.Constants(dataset="tiny", root=root, workers=0)
    command = f"python PRC_SAM/get_se_map.py --dataset tiny --root {root} --split train"
    with pytest.raises(UserError) as caught:
        generate_refined_pseudo.main(constants)
    sentences = str(caught.value)
    assert "p.npz" in sentences and "q.npz" in sentences and command in sentences
    output = experiment(root) / "refined_pseudo_labels"
    assert [path.name for path in sorted(output.glob("?.png"))] == ["r.png"]
    (masks / "p.npz").write_bytes(good)
    save_masks(masks / "q.npz", pack_masks(np.ones((1, 8, 8), bool)))
    with pytest.raises(UserError, match=r"(?s)q\.npz.*8 x 8") as caught:
        generate_refined_pseudo.main(constants)
    assert f"{command} --overwrite" in str(caught.value) and "p.npz" not in str(caught.value)


def test_mean_cam_names_what_is_missing(small):
    root, _ = small
    values = {"dataset": "tiny", "root": root, "rule": "mean_cam", "workers": 0}
    (experiment(root) / "cams" / "q.npz").unlink()
    save_maps(experiment(root) / "cams" / "r.npz", "cams", np.array([0]), [np.ones((1, 2, 2))], (32, 32))
    with pytest.raises(UserError, match=r"(?s)q\.npz.*missing.*r\.npz.*\(32, 32\)"):
        generate_refined_pseudo.main(generate_refined_pseudo.Constants(**values))
    shutil.rmtree(experiment(root) / "cams")
    with pytest.raises(UserError, match="cams is missing"):
        generate_refined_pseudo.main(generate_refined_pseudo.Constants(**values, overwrite=True))
    for content in (None, b"PK"):
        file = experiment(root) / "segmentation" / "p.npz"
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=r"p\.npz .*--keep-probabilities"):
            generate_refined_seg.main(generate_refined_seg.Constants(**values))
    for file in (experiment(root) / "segmentation").glob("*.npz"):
        file.unlink()
    with pytest.raises(UserError, match=r"inference_segmentation\.py .*--keep-probabilities"):
        generate_refined_seg.main(generate_refined_seg.Constants(**values))


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
