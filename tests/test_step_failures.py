"""What steps 1 to 7 say about missing, damaged and ill-fitting input, and how they continue after being killed."""

import shutil

import pytest

from tests.programs import PROGRAMS, finish, torchrun
from tests.steps import STEPS, TRAIN, experiment, options, record, same_results, step
from tools.command import UserError


def refused(sentence):
    return pytest.raises(UserError, match=sentence)


@pytest.mark.parametrize(
    ("script", "name", "number"),
    [
        ("infer_classification", "classifier", 1),
        ("make_pseudo_labels", "cams", 2),
        ("generate_refined_pseudo", "pseudo_labels", 3),
        ("train_segmentation", "refined_pseudo_labels", 4),
        ("inference_segmentation", "segmenter", 5),
        ("generate_refined_seg", "segmentation", 6),
    ],
)
def test_a_missing_step_is_named(finished, script, name, number):
    with refused(f"{name} is missing: run step {number}, python "):
        step(script, finished, experiment="nothing")
    assert not experiment(finished, "nothing").exists()


@pytest.mark.parametrize("script", ["generate_refined_pseudo", "generate_refined_seg"])
def test_missing_masks_are_named(copy, script):
    for split in ("train", "test"):
        shutil.rmtree(copy / "datasets" / "tiny" / split / "sam_masks")
    with refused("sam_masks is missing: run step 9, python PRC_SAM/get_se_map.py"):
        step(script, copy)


@pytest.mark.parametrize(
    ("script", "change", "sentence"),
    [
        ("train_classification", {"gamma": 0.6}, "gamma: 0.7 there, 0.6 now"),
        ("infer_classification", {"scales": (1.0,)}, "scales: .* now"),
        ("make_pseudo_labels", {"bilateral_sigma_rgb": 4.0}, "bilateral_sigma_rgb: 3.0 there, 4.0 now"),
        ("generate_refined_pseudo", {"tau": 0.5}, "tau: 0.9 there, 0.5 now"),
        ("train_segmentation", {"seed": 1}, "seed: 0 there, 1 now"),
        ("inference_segmentation", {"scales": (1.0, 2.0)}, "scales: .* now"),
        ("generate_refined_seg", {"protocol": "released"}, "protocol: clean there, released now"),
        ("train_classification", {"train_all": False}, "weights is none, .*--train-all"),
        ("train_classification", {"gamma": 1.0}, "gamma is 1.0"),
        ("train_classification", {"iterations": -1}, "iterations is -1"),
        ("train_classification", {"tiles": 3}, "tiles is 3, .*square"),
        ("train_classification", {"tiles": 25}, "tiles is 25, .*4 x 4"),
        ("train_classification", {"ir_weight": -0.1}, "ir_weight is -0.1"),
        ("train_classification", {"batch_size": 11}, "10 training patches.*batch_size"),
        ("train_classification", {"weights": "nowhere.pth"}, "nowhere.pth is missing"),
        ("train_segmentation", {"width": 6}, "width is 6, .*multiple of 4"),
        ("train_segmentation", {"freeze_norm": True}, "weights is none, .*--no-freeze-norm"),
        ("train_segmentation", {"labels": "thoughts"}, "thoughts is missing"),
        ("infer_classification", {"scales": ()}, r"scales is \(\)"),
        ("infer_classification", {"scales": (0.0, 1.0)}, "scales is 0.0"),
        ("infer_classification", {"images_at_once": 0}, "images_at_once is 0"),
        ("inference_segmentation", {"workers": -1}, "workers is -1"),
        ("generate_refined_pseudo", {"tau": 1.5}, "tau is 1.5, .*--tau"),
        ("generate_refined_seg", {"tau": -0.1}, "tau is -0.1"),
    ],
)
def test_constants_are_checked_at_the_start(finished, script, change, sentence):
    """Before anything is written: a new folder would refuse the corrected constant."""
    before = record(experiment(finished) / STEPS[script][0])
    with refused(sentence):
        step(script, finished, **change)
    assert record(experiment(finished) / STEPS[script][0]) == before
    if script.startswith("train") and not sentence.endswith("now"):
        labels = {"labels": "truth"} if script == "train_segmentation" else {}
        with refused(sentence):
            step(script, finished, experiment="fresh", **labels | change)
    assert not experiment(finished, "fresh").exists()


def test_messages_of_the_programs(finished, run_script):
    """As a user meets them: one sentence on stderr, exit code 1, no traceback; tyro's own for a wrong name or type."""
    result = run_script("make_pseudo_labels.py", "--dataset", "nothing", "--root", finished, fails=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert all(words in result.stderr for words in ("error: ", '"nothing"', "Your own: tiny"))
    result = run_script("train_classification.py", "--dataset", "tiny", "--root", finished, "--gama", "1", fails=True)
    assert result.returncode == 2 and "--gama" in result.stdout + result.stderr
    shown = run_script("generate_refined_seg.py", "--help").stdout
    assert "Step 7" in shown and "--tau" in shown and "minimum" in shown


def test_a_damaged_image_among_good_ones(finished, copy, run_script):
    image = copy / "datasets" / "tiny" / "train" / "images" / "train_3.png"
    content = image.read_bytes()
    image.write_bytes(content[:300])
    cams = experiment(copy) / "cams"
    shutil.rmtree(cams)
    constants = options(STEPS["infer_classification"][1])
    result = run_script("infer_classification.py", "--dataset", "tiny", "--root", copy, *constants, fails=True)
    assert result.returncode == 1 and "error: files that failed: 1" in result.stderr
    assert "train_3.png cannot be read as a PNG image" in result.stderr
    assert {path.stem for path in cams.glob("*.npz")} == {*TRAIN} - {"train_3"} and not record(cams)["finished"]
    with refused("cams is not finished: run step 2"):
        step("make_pseudo_labels", copy)
    with refused(r"train_3\.png cannot be read"):  # a training cannot do without it
        step("train_classification", copy, experiment="other")
    image.write_bytes(content)
    times = {path: path.stat().st_mtime_ns for path in cams.glob("*.npz")}
    step("infer_classification", copy)
    assert record(cams)["finished"] and all(path.stat().st_mtime_ns == old for path, old in times.items())
    assert same_results(cams, experiment(finished) / "cams", ".npz")


@pytest.mark.parametrize(
    ("script", "spoil"),
    [
        ("make_pseudo_labels", "experiments/tiny/prc/cams/train_2.npz"),
        ("generate_refined_pseudo", "experiments/tiny/prc/pseudo_labels/train_2.png"),
        ("generate_refined_pseudo", "datasets/tiny/train/sam_masks/train_2.npz"),
        ("inference_segmentation", "datasets/tiny/test/images/test_2.png"),
        ("generate_refined_seg", "datasets/tiny/test/sam_masks/test_2.npz"),
    ],
)
def test_other_damaged_files(finished, copy, script, spoil):
    name, _, ids, suffix = STEPS[script]
    file, folder = copy / spoil, experiment(copy) / name
    good = file.read_bytes()
    shutil.rmtree(folder)
    for damage in (b"", good[:60], None):
        if damage is not None:
            file.write_bytes(damage)
        elif "images" in spoil:  # an image that is gone is none of the split's
            continue
        else:
            file.unlink()
        with refused(rf"(?s)files that failed: 1.*{file.name}"):
            step(script, copy)
        assert sum((folder / f"{id}{suffix}").exists() for id in ids) == len(ids) - 1
    file.write_bytes(good)
    step(script, copy)
    assert same_results(folder, experiment(finished) / name, suffix)


@pytest.mark.parametrize("script", ["train_classification", "infer_classification", "generate_refined_pseudo"])
def test_image_labels_that_do_not_fit(copy, script):
    file = copy / "datasets" / "tiny" / "train" / "image_labels.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with refused("has no line for 1 of the images"):
        step(script, copy)
    file.unlink()
    with refused(r"image_labels\.csv is missing: run python datasetsprocess/process\.py"):
        step(script, copy)


def test_a_checkpoint_that_is_damaged_or_another_s(copy):
    file = experiment(copy) / "classifier" / "model.pt"
    other = (experiment(copy) / "segmenter" / "model.pt").read_bytes()
    for content, word in ((file.read_bytes()[:2000], "cannot be read"), (other, "another backbone")):
        file.write_bytes(content)
        with refused(rf"model\.pt .*{word}"):
            step("infer_classification", copy)
    file.unlink()
    with refused(r"model\.pt is missing"):
        step("infer_classification", copy)


def test_a_new_training_makes_the_later_steps_refuse(copy):
    step("train_classification", copy, overwrite=True)
    with refused("cams was made .*another run of classifier"):
        step("infer_classification", copy)
    step("infer_classification", copy, overwrite=True)
    with refused("made from another run of cams"):
        step("make_pseudo_labels", copy)


@pytest.mark.long
def test_a_bad_file_of_the_second_process(finished, copy):
    """Reported and recorded as by one process; the images of both are those of one."""
    shutil.rmtree(experiment(copy) / "cams")
    image = copy / "datasets" / "tiny" / "train" / "images" / "train_3.png"  # an odd place: the second one's share
    content = image.read_bytes()
    image.write_bytes(content[:300])
    command, cams = PROGRAMS["infer_classification"].command(copy), experiment(copy) / "cams"
    assert "train_3.png cannot be read" in finish(command, torchrun(2), fails=True)
    assert not record(cams)["finished"] and record(cams)["files"] == 9 and record(cams)["processes"] == 2
    image.write_bytes(content)
    finish(command, torchrun(2))
    assert record(cams)["finished"] and same_results(cams, experiment(finished) / "cams", ".npz")
