"""Files that are damaged, ill-fitting, odd or hostile, at every step that can meet them: one sentence, and no more."""

import io
import json
import pickle
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_miou
from datasetsprocess import process
from PRC_SAM import get_se_map
from PRC_SAM.checkpoints import load_sam
from tests.steps import STEPS, experiment, record, step
from tests.test_splitting import cut, digests, small_vaihingen
from tests.tiffs import GIANT_PNG
from tools.command import UserError

TRAIN, TEST = "datasets/tiny/train", "datasets/tiny/test"
EXPERIMENT = "experiments/tiny/prc"


def go(name, root, **constants):
    """Any step in this process."""
    if name in STEPS:
        return step(name, root, **constants)
    module = {"process": process, "get_se_map": get_se_map, "evaluate_miou": evaluate_miou}[name]
    usual = {"generator": "felzenszwalb"} if name == "get_se_map" else {}
    return module.main(module.Constants(dataset="tiny", root=root, **({"workers": 0} | usual | constants)))


def png(array):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, "PNG")
    return file.getvalue()


class Code:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def hostile_npz(target, names=("classes", "size", "bits")) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.array([Code(target)], object) for name in names})
    with zipfile.ZipFile(file, "a") as archive:  # a member that would leave the folder if anybody unpacked it
        archive.writestr("../../../escaped.npy", b"")
    return file.getvalue()


SIZE, LARGE_ID, BROKEN = png(np.zeros((64, 60))), png(np.full((64, 64), 9)), "PNG"
FAULTS = [  # step, file, its content, sentence
    *(("get_se_map", f"{TRAIN}/images/train_2.png", content, BROKEN) for content in (b"", GIANT_PNG)),
    *(("process", f"{TRAIN}/images/train_2.png", content, BROKEN) for content in (b"", GIANT_PNG)),
    ("process", f"{TRAIN}/labels/train_2.png", GIANT_PNG, BROKEN),
    ("train_classification", f"{TRAIN}/images/train_2.png", GIANT_PNG, BROKEN),
    ("infer_classification", f"{TRAIN}/images/train_2.png", GIANT_PNG, BROKEN),
    ("infer_classification", f"{EXPERIMENT}/classifier/run.json", b"", r"run\.json .*: run step 1"),
    ("make_pseudo_labels", f"{EXPERIMENT}/cams/run.json", b"{", r"run\.json .*: run step 2"),
    ("make_pseudo_labels", f"{TRAIN}/images/train_2.png", png(np.zeros((64, 60, 3))), r"\(64, 64\)"),
    ("make_pseudo_labels", f"{EXPERIMENT}/cams/train_2.npz", hostile_npz, "cannot be read"),
    ("generate_refined_pseudo", f"{EXPERIMENT}/pseudo_labels/train_2.png", SIZE, "64 x 64"),
    ("generate_refined_pseudo", f"{EXPERIMENT}/pseudo_labels/train_2.png", LARGE_ID, "class id 9"),
    ("generate_refined_pseudo", f"{TRAIN}/sam_masks/train_2.npz", hostile_npz, "mask file"),
    ("train_segmentation", f"{EXPERIMENT}/refined_pseudo_labels/train_2.png", b"", BROKEN),
    ("train_segmentation", f"{EXPERIMENT}/refined_pseudo_labels/train_2.png", SIZE, "60 x 64"),
    ("train_segmentation", f"{EXPERIMENT}/refined_pseudo_labels/train_2.png", LARGE_ID, "class id 9"),
    ("train_segmentation", f"{TRAIN}/images/train_2.png", b"", BROKEN),
    ("inference_segmentation", f"{EXPERIMENT}/segmenter/model.pt", b"", "checkpoint"),
    ("inference_segmentation", f"{TEST}/images/test_2.png", GIANT_PNG, BROKEN),
    ("generate_refined_seg", f"{EXPERIMENT}/segmentation/test_2.png", LARGE_ID, "class id 9"),
    ("generate_refined_seg", f"{EXPERIMENT}/segmentation/test_2.png", SIZE, "64 x 64"),
    ("evaluate_miou", f"{TEST}/labels/test_2.png", LARGE_ID, "class id 9"),
    ("evaluate_miou", f"{TEST}/labels/test_2.png", GIANT_PNG, BROKEN),
    ("evaluate_miou", f"{EXPERIMENT}/segmentation/test_2.png", LARGE_ID, "class id 9"),
    ("evaluate_miou", f"{EXPERIMENT}/cams/train_2.npz", hostile_npz, "cannot be read"),
]


@pytest.fixture(scope="module")
def shared_copy(finished, tmp_path_factory):
    return shutil.copytree(finished, tmp_path_factory.mktemp("spoilt") / "root")


@pytest.fixture
def spoilt(finished, shared_copy):
    """A copy in which each test spoils one file and puts it back.

    A step that fails leaves its run.json as that of an unfinished run, so each run.json is put back here.
    """
    yield shared_copy
    for file in finished.rglob("run.json"):
        shutil.copyfile(file, shared_copy / file.relative_to(finished))


@pytest.mark.parametrize(
    ("name", "file", "content", "sentence"), FAULTS, ids=[f"{fault[0]}-{fault[3][:24]}" for fault in FAULTS]
)
def test_a_faulty_file(spoilt, tmp_path, name, file, content, sentence):
    path = spoilt / file
    folder = spoilt / TRAIN / "sam_masks" if name == "get_se_map" else None
    if name in STEPS:
        folder = spoilt / EXPERIMENT / STEPS[name][0]
    constants = {"split": "train"} if name == "get_se_map" else {}
    good = path.read_bytes()
    path.write_bytes(content(tmp_path / "ran") if callable(content) else content)
    finished = folder and folder.rename(folder.with_name("finished"))
    try:
        with pytest.raises(UserError, match=sentence) as caught:
            go(name, spoilt, **constants)
        assert path.name.split(".")[0] in str(caught.value) and "Traceback" not in str(caught.value)
        assert not (tmp_path / "ran").exists() and not list(spoilt.parent.rglob("escaped*"))
        if "files that failed" in str(caught.value):
            assert record(folder)["files"] == (3 if "test" in file else 9)  # all the others
    finally:
        path.write_bytes(good)
        if finished:
            shutil.rmtree(folder, ignore_errors=True)
            finished.rename(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("infer_classification", {"classifier": "../../x"}),
        ("train_segmentation", {"labels": "../x"}),
        ("evaluate_miou", {"supervised": "../x"}),
        ("evaluate_miou", {"stages": ("../x",)}),
        ("evaluate_miou", {"experiment": "a/../../x"}),
        *((name, {"dataset": "../tiny"}) for name in ("process", "get_se_map", *STEPS, "evaluate_miou")),
    ],
)
def test_names_that_would_leave_the_folder(spoilt, name, change):
    with pytest.raises(UserError, match=r"\.\./"):
        if "dataset" in change:
            module = {"process": process, "get_se_map": get_se_map}.get(name) or __import__(name)
            module.main(module.Constants(root=spoilt, **change))
        go(name, spoilt, **change)


@pytest.mark.parametrize("name", ["train_classification", "train_segmentation"])
def test_a_damaged_checkpoint_of_a_training_to_continue(copy, name):
    folder = experiment(copy) / STEPS[name][0]
    model, file = (folder / "model.pt").read_bytes(), folder / "checkpoint.pt"
    other = experiment(copy) / {"classifier": "segmenter", "segmenter": "classifier"}[folder.name] / "checkpoint.pt"
    for content in (b"", file.read_bytes()[:5000], model, other.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint\.pt"):
            go(name, copy)
    assert (folder / "model.pt").read_bytes() == model


def test_odd_but_fitting_data_runs_through_all_steps(finished, tmp_path):
    """One class, one patch to test, names with spaces, signs and letters of any script, hidden files beside them."""
    source, folder = finished / "datasets" / "tiny", tmp_path / "datasets" / "tiny"
    ids = {"train": ["forêt nº 1 (ä)", unicodedata.normalize("NFD", "é,;'\""), "-x%20..y"], "test": ["日本 <b>&amp;"]}
    for split, names in ids.items():
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
            (folder / split / kind / "._hidden.png").write_bytes(b"none")
            (folder / split / kind / ".DS_Store").write_bytes(b"none")
        for number, name in enumerate(names):
            shutil.copy(source / split / "images" / f"{split}_{number}.png", folder / split / "images" / f"{name}.png")
            (folder / split / "labels" / f"{name}.png").write_bytes(png(np.triu(np.full((64, 64), 255))))
    (folder / "dataset.toml").write_text('patch_size = 64\nclasses = [{name = "<i>all</i>", colour = [1, 2, 3]}]\n')
    for name in ("process", "get_se_map"):
        go(name, tmp_path)
    for name in STEPS:
        go(name, tmp_path, **({"batch_size": 1} if name.startswith("train") else {}))
    go("evaluate_miou", tmp_path)
    for name, (folder, _, _, suffix) in STEPS.items():
        if suffix != ".pt":
            split = "test" if "seg" in name else "train"
            results = {path.stem for path in (experiment(tmp_path) / folder).glob(f"*{suffix}")} - {"contact_sheet"}
            assert results == set(ids[split]), name
    page = (experiment(tmp_path) / "scores" / "report.html").read_text()
    assert "<b>&amp;" not in page.replace("&lt;b&gt;", "") and "<i>all</i>" not in page and "&lt;i&gt;all" in page
    assert json.loads((experiment(tmp_path) / "scores" / "scores.json").read_text())["stages"]


def test_a_truth_that_is_all_ignored_is_refused_and_not_counted(copy):
    (copy / TEST / "labels" / "test_0.png").write_bytes(png(np.full((64, 64), 255)))
    with pytest.raises(UserError, match=r"test_0\.png is 255"):
        go("process", copy)
    go("evaluate_miou", copy)
    rows = json.loads((experiment(copy) / "scores" / "scores.json").read_text())["stages"]
    assert rows and all(0 <= row["headline"]["miou"] <= 1 for row in rows if "headline" in row)


def test_a_damaged_log_does_not_end_the_scoring(copy):
    for contents in ((b'{"epoch": 1, "lo', b"\xff\xfe"), (b"[1]\n3\n", b"")):
        for content, name in zip(contents, ("classifier", "segmenter"), strict=True):
            (experiment(copy) / name / "log.jsonl").write_bytes(content)
        go("evaluate_miou", copy, samples=0)


def test_a_scene_whose_record_is_damaged_is_cut_again(tmp_path):
    small_vaihingen(tmp_path)
    folder = tmp_path / "datasets" / "small"
    cut(tmp_path)
    before = digests(folder)
    (folder / "train" / "scenes" / "1.json").write_bytes(b"")
    next((folder / "train" / "images").glob("*.png")).unlink()
    cut(tmp_path)
    assert digests(folder) == before


def test_no_checkpoint_runs_code(tmp_path):
    torch.save({"sizes": Code(tmp_path / "ran"), "model": {}}, tmp_path / "sam.pth")
    for content in (None, pickle.dumps(Code(tmp_path / "ran")), b"", b"PK\3\4", GIANT_PNG):
        if content is not None:
            (tmp_path / "sam.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"sam\.pth cannot be read as a checkpoint"):
            load_sam("vit_b", tmp_path / "sam.pth")
    assert not (tmp_path / "ran").exists()
