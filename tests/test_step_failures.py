"""What steps 1 to 7 say about missing, damaged and ill-fitting input, and how they continue after being killed."""

import shutil

import pytest

from tests.programs import PROGRAMS, finish, living, started, torchrun, until
from tests.steps import STEPS, TRAIN, experiment, options, record, same_results, step
from tools.command import UserError


def refused(sentence):
    return pytest.raises(UserError, match=sentence)


@pytest.mark.parametrize(
    ("script", "name", "maker"),
    [
        ("infer_classification", "classifier", "step 1, python train_classification.py"),
        ("make_pseudo_labels", "cams", "step 2, python infer_classification.py"),
        ("generate_refined_pseudo", "pseudo_labels", "step 3, python make_pseudo_labels.py"),
        ("train_segmentation", "refined_pseudo_labels", "step 4, python generate_refined_pseudo.py"),
        ("inference_segmentation", "segmenter", "step 5, python train_segmentation.py"),
        ("generate_refined_seg", "segmentation", "step 6, python inference_segmentation.py"),
    ],
)
def test_a_missing_step_is_named(finished, script, name, maker):
    with refused(f"{name} is missing: run {maker}"):
        step(script, finished, experiment="nothing")
    assert not experiment(finished, "nothing").exists()


def test_missing_masks_are_named(copy):
    for split, script in (("train", "generate_refined_pseudo"), ("test", "generate_refined_seg")):
        shutil.rmtree(copy / "datasets" / "tiny" / split / "sam_masks")
        with refused("sam_masks is missing: run step 9, python PRC_SAM/get_se_map.py"):
            step(script, copy)


@pytest.mark.parametrize(
    ("script", "change", "sentence"),
    [
        (
            "train_classification",
            {"gamma": 0.6},
            r"classifier was made .*gamma: 0\.7 there, 0\.6 now",
        ),
        ("infer_classification", {"scales": (1.0,)}, r"scales: \[0\.5, 1\.0, 1\.5, 2\.0\] there, \[1\.0\] now"),
        ("make_pseudo_labels", {"bilateral_sigma_rgb": 4.0}, "bilateral_sigma_rgb: 3.0 there, 4.0 now"),
        ("generate_refined_pseudo", {"tau": 0.5}, "tau: 0.9 there, 0.5 now"),
        ("train_segmentation", {"seed": 1}, "seed: 0 there, 1 now"),
        ("inference_segmentation", {"scales": (1.0, 2.0)}, "other settings"),
        ("generate_refined_seg", {"protocol": "released"}, "protocol: clean there, released now"),
        (
            "train_classification",
            {"weights": "none", "train_all": False},
            "weights is none, .*--train-all",
        ),
        ("train_classification", {"gamma": 1.0}, "gamma is 1.0, .*at most 0.999"),
        ("train_classification", {"iterations": -1}, "iterations is -1"),
        ("train_classification", {"tiles": 3}, "tiles is 3, but it must be a square"),
        ("train_classification", {"tiles": 25}, "tiles is 25, .*4 x 4"),
        ("train_classification", {"ir_weight": -0.1}, "ir_weight is -0.1"),
        ("train_classification", {"epochs": 0}, "epochs is 0, .*at least 1"),
        (
            "train_classification",
            {"batch_size": 11},
            r"10 training patches.*batch_size",
        ),
        ("train_classification", {"weights": "nowhere.pth"}, "the weights file nowhere.pth is missing"),
        ("train_classification", {"experiment": "../x"}, 'experiment is "../x"'),
        ("train_segmentation", {"batch_size": 0}, "batch_size is 0"),
        ("train_segmentation", {"width": 6}, "width is 6, .*multiple of 4"),
        ("train_segmentation", {"freeze_norm": True}, "weights is none, .*--no-freeze-norm"),
        ("train_segmentation", {"labels": "thoughts"}, "thoughts is missing"),
        ("train_segmentation", {"labels": "../../x"}, 'labels is "../../x"'),
        ("infer_classification", {"scales": ()}, r"scales is \(\)"),
        ("infer_classification", {"scales": (0.0, 1.0)}, "scales is 0.0, .*above 0"),
        ("infer_classification", {"images_at_once": 0}, "images_at_once is 0"),
        ("infer_classification", {"workers": -1}, "workers is -1"),
        ("inference_segmentation", {"workers": -1}, "workers is -1"),
        ("make_pseudo_labels", {"bilateral_sigma_xy": 0.0}, "bilateral_sigma_xy is 0.0, .*above 0"),
        ("make_pseudo_labels", {"bilateral_weight": -4.0}, "bilateral_weight is -4.0"),
        ("make_pseudo_labels", {"crf_iterations": -1}, "crf_iterations is -1"),
        (
            "generate_refined_pseudo",
            {"tau": 1.5},
            r"tau is 1.5, .*at most 1.*--tau",
        ),
        ("generate_refined_seg", {"tau": -0.1}, "tau is -0.1"),
    ],
)
def test_constants_are_checked_at_the_start(finished, script, change, sentence):
    before = record(experiment(finished) / STEPS[script][0])
    with refused(sentence):
        step(script, finished, **change)
    assert record(experiment(finished) / STEPS[script][0]) == before
    if " there, " in sentence or sentence == "other settings":
        return
    if script.startswith(
        "train"
    ):  # nothing may be started in a new experiment either: its folder would refuse the corrected constant
        fresh = {"experiment": "fresh"} | ({"labels": "truth"} if script == "train_segmentation" else {})
        with refused(sentence):
            step(script, finished, **(fresh | change))
    assert not experiment(finished, "fresh").exists()


def test_messages_of_the_programs(finished, run_script):
    """As a user meets them: one sentence on stderr, exit code 1, no traceback; tyro's own for a wrong name or type."""
    result = run_script("make_pseudo_labels.py", "--dataset", "nothing", "--root", finished, fails=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith('error: there is no data set "nothing". Your own: tiny. With the project: ')
    result = run_script("train_classification.py", "--dataset", "tiny", "--root", finished, "--gama", "1", fails=True)
    assert result.returncode == 2 and "--gama" in result.stdout + result.stderr
    shown = " ".join(run_script("generate_refined_seg.py", "--help").stdout.replace("│", " ").split())
    assert "Step 7" in shown and "--tau" in shown and "minimum overlap" in shown


def test_a_damaged_image_among_good_ones(finished, copy, run_script):
    image = copy / "datasets" / "tiny" / "train" / "images" / "train_3.png"
    content = image.read_bytes()
    image.write_bytes(content[:300])
    shutil.rmtree(experiment(copy) / "cams")
    arguments = [
        "infer_classification.py",
        "--dataset",
        "tiny",
        "--root",
        copy,
        *options(STEPS["infer_classification"][1]),
    ]
    result = run_script(*arguments, fails=True)
    assert result.returncode == 1
    assert "error: files that failed: 1; all others are finished." in result.stderr
    assert "train_3.png cannot be read as a PNG image" in result.stderr
    cams = experiment(copy) / "cams"
    assert {path.stem for path in cams.glob("*.npz")} == {*TRAIN} - {"train_3"} and not record(cams)["finished"]
    shutil.rmtree(experiment(copy) / "pseudo_labels")
    with refused("cams is not finished: run step 2"):
        step("make_pseudo_labels", copy)
    with refused(r"train_3\.png cannot be read as a PNG image"):  # a training cannot do without it
        step("train_classification", copy, experiment="other")
    image.write_bytes(content)
    times = {path: path.stat().st_mtime_ns for path in cams.glob("*.npz")}
    step("infer_classification", copy)
    assert record(cams)["finished"] and all(path.stat().st_mtime_ns == old for path, old in times.items())
    assert same_results(cams, experiment(finished) / "cams", ".npz")


@pytest.mark.parametrize(
    ("script", "spoil", "sentence"),
    [
        (
            "make_pseudo_labels",
            "experiments/tiny/prc/cams/train_2.npz",
            r"train_2\.npz cannot be read",
        ),
        ("make_pseudo_labels", "datasets/tiny/train/images/train_2.png", r"train_2\.png cannot be read as a PNG image"),
        ("generate_refined_pseudo", "experiments/tiny/prc/pseudo_labels/train_2.png", r"train_2\.png cannot be read"),
        (
            "generate_refined_pseudo",
            "datasets/tiny/train/sam_masks/train_2.npz",
            r"train_2\.npz is not a readable mask file",
        ),
        ("inference_segmentation", "datasets/tiny/test/images/test_2.png", r"test_2\.png cannot be read as a PNG"),
        ("generate_refined_seg", "datasets/tiny/test/sam_masks/test_2.npz", r"test_2\.npz is not a readable mask file"),
    ],
)
def test_other_damaged_files(finished, copy, script, spoil, sentence):
    name, _, ids, suffix = STEPS[script]
    folder, good = experiment(copy) / name, (copy / spoil).read_bytes()
    shutil.rmtree(folder)
    for damage in (
        b"",
        good[:60],
        *([] if "images" in spoil else [None]),
    ):  # an image that is gone is none of the split's
        (copy / spoil).write_bytes(damage) if damage is not None else (copy / spoil).unlink()
        with refused("files that failed: 1") as caught:
            step(script, copy)
        if damage is not None:
            assert caught.match(sentence)
        assert len(list(folder.glob(f"*_*{suffix}"))) - (folder / "contact_sheet.png").exists() == len(ids) - 1
    (copy / spoil).write_bytes(good)
    step(script, copy)
    assert same_results(folder, experiment(finished) / name, suffix)


@pytest.mark.parametrize("script", ["train_classification", "infer_classification", "generate_refined_pseudo"])
def test_image_labels_that_do_not_fit(copy, script):
    file = copy / "datasets" / "tiny" / "train" / "image_labels.csv"
    lines = file.read_text().splitlines()
    for text, sentence in (
        ("\n".join(lines[:-1]), "has no line for 1 of the images"),
        ("\n".join([*lines, lines[-1]]), "a second time"),
        ("", "must begin with"),
    ):
        file.write_text(text)
        with refused(sentence):
            step(script, copy, experiment="other" if script.startswith("train") else "prc")
    file.unlink()
    with refused(r"image_labels\.csv is missing: run python datasetsprocess/process\.py"):
        step(script, copy, experiment="other" if script.startswith("train") else "prc")


def test_a_checkpoint_that_is_damaged_or_another_s(copy):
    file = experiment(copy) / "classifier" / "model.pt"
    good = file.read_bytes()
    for damage in (b"", good[:2000]):
        file.write_bytes(damage)
        with refused(r"model\.pt cannot be read"):
            step("infer_classification", copy)
    file.write_bytes((experiment(copy) / "segmenter" / "model.pt").read_bytes())
    with refused(r"model\.pt was made for another backbone or number of classes"):
        step("infer_classification", copy)
    file.unlink()
    with refused(r"model\.pt is missing: run the training again"):
        step("infer_classification", copy)


def test_a_new_training_makes_the_later_steps_refuse(copy):
    step("train_classification", copy, overwrite=True)
    with refused("cams was made .*another run of classifier"):
        step("infer_classification", copy)
    step("infer_classification", copy, overwrite=True)
    with refused("made from another run of cams"):
        step("make_pseudo_labels", copy)


@pytest.mark.long
def test_a_training_killed_between_two_epochs_continues(copy):
    """kill -9 after the first of three epochs, then the same command: weights equal to an uninterrupted training's."""
    program = PROGRAMS["train_classification"]
    command = program.command(copy, experiment="killed", epochs=3)
    folder = experiment(copy, "killed") / "classifier"
    with started(command) as process:
        until((folder / "checkpoint.pt").exists)
        process.kill()
        until(lambda: not living(process), 15)
    assert not record(folder)["finished"]
    finish(command)
    finish(program.command(copy, experiment="whole", epochs=3))
    assert same_results(folder, experiment(copy, "whole") / "classifier", ".pt")


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
