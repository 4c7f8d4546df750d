"""Step folders: whole files, continuing, refusing other settings, and the account of what failed."""

import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.command import UserError, check, run
from tools.files import write_json, write_whole
from tools.step import StepFolder, experiment_folder, require, step_name


@dataclass(frozen=True)
class Constants:
    experiment: str = "prc"
    gamma: float = 0.7
    scales: tuple[float, ...] = (0.5, 1.0)
    workers: int = 0
    root: Path = Path("somewhere")
    overwrite: bool = False


def refused(sentence):
    return pytest.raises(UserError, match=sentence)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def account(folder):
    return json.loads((folder / "run.json").read_text())


def write(id, folder, bad=""):
    if id in bad:
        raise UserError(f"{id} is bad")
    with write_whole(folder / f"{id}.txt") as temporary:
        temporary.write_text(id)


def test_write_whole(tmp_path):
    file = tmp_path / "deep" / "a.b.png"
    with write_whole(file) as temporary:
        assert temporary.parent == file.parent and temporary.suffix == ".png" and temporary != file
        temporary.write_text("new")
        assert not file.exists()
    assert file.read_text() == "new" and names(file.parent) == ["a.b.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_write_whole_leaves_nothing_on_an_exception(tmp_path, error):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(error), write_whole(file) as temporary:
        temporary.write_text("half")
        raise error
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with pytest.raises(FileNotFoundError), write_whole(file):
        pass  # nothing was written: the old file stays
    assert file.read_text() == "old"


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"path": Path("x"), "ä": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": "x", "ä": 1}


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "", ".", "a b", "x\n", "a\\b", "~", "$HOME", "..."])
def test_experiment_names_that_leave_the_folder(tmp_path, name):
    with refused("experiment is "):
        experiment_folder(tmp_path, "tiny", name)


@pytest.mark.parametrize("name", ["prc", "no_ir-2", "v1.2", "gamma0.7_seed-1"])
def test_experiment_names(tmp_path, name):
    assert experiment_folder(tmp_path, "tiny", name) == tmp_path / "experiments" / "tiny" / name
    assert step_name(name, "train", "train") == name and step_name(name, "test", "train") == f"{name}_test"


def test_an_earlier_step_is_named_when_it_lacks(tmp_path):
    for name, step in (
        ("classifier", "step 1, python train_classification.py"),
        ("cams", "step 2"),
        ("pseudo_labels", "step 3"),
        ("refined_pseudo_labels", "step 4"),
        ("segmenter", "step 5"),
        ("segmentation_train", "step 6"),
        ("refined_segmentation", "step 7"),
        ("sam_masks", r"step 9, python PRC_SAM.get_se_map\.py"),
        ("cams_test", "step 2"),
    ):
        with refused(f"{name} is missing: run {step}"):
            require(tmp_path / name)
    folder = tmp_path / "cams"
    folder.mkdir()
    with refused(r"cams has no run\.json: run step 2, python infer_classification\.py --overwrite"):
        require(folder)
    for content in ("{", "", "[]", "null"):
        (folder / "run.json").write_text(content)
        with refused(r"run\.json is damaged: run step 2, .* --overwrite"):
            require(folder)
    account = {"constants": {}, "started": "then", "seconds": 1}
    write_json(folder / "run.json", account | {"finished": False})
    with refused("cams is not finished: run step 2, .* again, it continues"):
        require(folder)
    write_json(folder / "run.json", account | {"finished": True, "x": 1})
    assert require(folder)["x"] == 1


def test_a_run_and_its_account(tmp_path):
    folder = StepFolder(
        tmp_path / "cams",
        Constants(),
        {"classifier": {"started": "then", "notes": {"weights": "none"}}},
        {"stand_in": "made"},
        device="cpu",
        settings={"rules": {"share": 0.1}},
    )
    assert not account(tmp_path / "cams")["finished"]
    with refused("is not finished"):
        require(folder.folder)
    folder.each(partial(write, folder=folder.folder), folder.pending(["a", "b"], ".txt"))
    (folder.folder / "contact_sheet.txt").write_text("a picture, not a result")
    folder.close(".txt", best=3)
    found = require(folder.folder)
    assert found["finished"] and found["files"] == 2 and found["best"] == 3 and found["seconds"] >= 0
    assert found["constants"] == {
        "experiment": "prc",
        "gamma": 0.7,
        "scales": [0.5, 1.0],
        "workers": 0,
        "root": "somewhere",
        "overwrite": False,
        "rules": {"share": 0.1},
    }
    assert found["inputs"] == {"classifier": "then"} and found["notes"] == {"weights": "none", "stand_in": "made"}
    assert {"torch", "numpy", "python"} <= found["packages"].keys() and found["commit"] and found["command"]


def test_the_account_tells_of_the_runs_that_made_the_files(tmp_path, monkeypatch):
    """A later program that only finds everything there must not sign for it."""

    def visit(program):
        monkeypatch.setattr("sys.argv", [program])
        folder = StepFolder(tmp_path / "cams", Constants())
        folder.each(partial(write, folder=folder.folder), folder.pending(["a", "b"], ".txt"))
        folder.close(".txt")
        return require(folder.folder)

    first = visit("first.py")
    assert visit("second.py") == first and first["script"] == "first.py" and first["continued"] == []
    (tmp_path / "cams" / "b.txt").unlink()
    third = visit("third.py")
    assert third["script"] == "first.py" and [part["script"] for part in third["continued"]] == ["third.py"]
    write_json(tmp_path / "cams" / "run.json", third | {"finished": False})  # as if it had been killed
    assert [part["script"] for part in visit("fourth.py")["continued"]] == ["third.py", "fourth.py"]


def test_a_killed_run_continues(tmp_path):
    first = StepFolder(tmp_path / "cams", Constants())
    write("b", first.folder)
    leftovers = [first.folder / ".c.123.tmp.txt", first.folder / "coloured" / ".c.9.tmp.png"]
    for leftover in leftovers:  # it died while writing
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_text("half")
    again = StepFolder(tmp_path / "cams", Constants(workers=3, root=Path("elsewhere")))  # neither changes a result
    assert not any(leftover.exists() for leftover in leftovers)
    assert again.pending(["a", "b", "c"], ".txt") == ["a", "c"]
    assert account(again.folder)["started"] == first.run["started"]  # later steps see one and the same run
    again.each(partial(write, folder=again.folder), ["a", "c"])
    again.close(".txt")
    assert account(again.folder)["finished"] and account(again.folder)["files"] == 3
    # opened anew and killed at once, what is there still counts as not finished
    StepFolder(tmp_path / "cams", Constants())
    with refused("is not finished"):
        require(again.folder)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    before = {"classifier": {"started": "monday"}}
    first = StepFolder(tmp_path / "cams", Constants(), before)
    write("a", first.folder)
    with refused(
        r"made with other settings \(gamma: 0\.7 there, 0\.6 now; scales: \[0\.5, 1\.0\] there, \[1\.0\] now\): "
        "--overwrite starts it anew, or choose another --experiment"
    ):
        StepFolder(tmp_path / "cams", Constants(gamma=0.6, scales=(1.0,)), before)
    with refused(r"made from another run of classifier: monday there, tuesday now"):
        StepFolder(tmp_path / "cams", Constants(), {"classifier": {"started": "tuesday"}})
    with refused("made from another run of sam_masks: None there, x now"):
        StepFolder(tmp_path / "cams", Constants(), before | {"sam_masks": {"started": "x"}})
    with refused("rules: None there, 3 now"):
        StepFolder(tmp_path / "cams", Constants(), before, settings={"rules": 3})
    assert (first.folder / "a.txt").exists()
    anew = StepFolder(tmp_path / "cams", Constants(gamma=0.6, overwrite=True), before)
    assert names(anew.folder) == ["run.json"] and account(anew.folder)["constants"]["gamma"] == 0.6
    StepFolder(tmp_path / "cams", Constants(gamma=0.6), before)  # overwrite itself is no setting


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "cams").mkdir()
    StepFolder(tmp_path / "cams", Constants())  # empty: fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with refused(r"is not empty but has no run\.json, .*move it away"):
        StepFolder(tmp_path / "thesis", Constants())
    with refused(r"was not made by a step .*--overwrite leaves it alone: move it away"):
        StepFolder(tmp_path / "thesis", Constants(overwrite=True))
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"constants": {}}'])
def test_a_damaged_account(tmp_path, content):
    folder = StepFolder(tmp_path / "cams", Constants()).folder
    (folder / "run.json").write_text(content)
    with refused(r"run\.json is damaged: --overwrite starts .*cams anew"):
        StepFolder(folder, Constants())
    StepFolder(folder, Constants(overwrite=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_are_told_after_the_good_ones_are_done(tmp_path, workers):
    folder = StepFolder(tmp_path / "cams", Constants())
    ids = list("abcde")
    folder.each(partial(write, folder=folder.folder, bad="bd"), folder.pending(ids, ".txt"), workers)
    with refused(r"2 files could not be done; all others are finished.*same command again:") as caught:
        folder.close(".txt")
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {"b is bad", "d is bad"}
    assert account(folder.folder)["files"] == 3 and not account(folder.folder)["finished"]
    again = StepFolder(tmp_path / "cams", Constants())
    assert again.pending(ids, ".txt") == ["b", "d"]
    again.each(partial(write, folder=again.folder), ["b", "d"], workers)
    again.close(".txt")
    assert require(again.folder)["files"] == 5


def test_a_long_list_of_failures_is_cut(tmp_path):
    folder = StepFolder(tmp_path / "cams", Constants())
    for index in range(50):
        folder.fail(UserError(f"{index} is bad"))
    with refused("50 files could not be done") as caught:
        folder.close(".txt")
    assert (
        "19 is bad" in str(caught.value) and "20 is bad" not in str(caught.value) and "and 30 more" in str(caught.value)
    )


def test_an_error_of_the_program_is_not_hidden(tmp_path):
    def broken(id):
        raise ZeroDivisionError

    folder = StepFolder(tmp_path / "cams", Constants())
    with pytest.raises(ZeroDivisionError):
        folder.each(broken, ["a"])


def test_processes_share_the_ids(tmp_path):
    states = [SimpleNamespace(process_index=index, num_processes=3) for index in range(3)]
    folders = [StepFolder(tmp_path / "cams", Constants(), state=state) for state in states]
    ids = [str(index) for index in range(8)]
    shares = [folder.pending(ids, ".txt") for folder in folders]
    assert sorted(id for share in shares for id in share) == ids and max(map(len, shares)) - min(map(len, shares)) <= 1


def fail_with(error, constants):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("gamma is 2"), 1, "error: gamma is 2"),
        (OSError(28, "No space left on device", "/data/a.png"), 1, "error: /data/a.png: No space left on device"),
        (PermissionError(13, "Permission denied", "/data"), 1, "error: /data: Permission denied"),
        (MemoryError(), 1, "error: the memory is full: lower batch_size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, "error: the memory is full"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file"), 1, "no space is left"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed."), 1, "container's /dev/shm, was full"),
        (RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:1"), 1, "another process of this run ended"),
    ],
)
def test_how_a_script_ends(monkeypatch, capsys, error, code, text):
    monkeypatch.setattr("sys.argv", ["step.py", "--gamma", "0.5"])
    monkeypatch.delenv("PRC_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        run(partial(fail_with, error), Constants, "a step")
    assert caught.value.code == code and text in capsys.readouterr().err


def test_a_reader_process_hands_on_the_sentence_alone(monkeypatch, capsys):
    """What torch makes of an error in a worker: the sentence at the end of a traceback."""
    monkeypatch.setattr("sys.argv", ["step.py"])
    wrapped = UserError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  ...\n"
        "tools.command.UserError: a.png is missing: find it\n"
    )
    with pytest.raises(SystemExit):
        run(partial(fail_with, wrapped), Constants, "a step")
    assert capsys.readouterr().err == "error: a.png is missing: find it\n"


def test_the_command_line_fills_the_constants(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("sys.argv", ["step.py", "--gamma", "0.5", "--scales", "1", "2"])
    run(seen.append, Constants, "a step")
    assert seen == [replace(Constants(), gamma=0.5, scales=(1.0, 2.0))]
    for arguments in (["--gama", "1"], ["--gamma", "much"]):
        monkeypatch.setattr("sys.argv", ["step.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            run(seen.append, Constants, "a step")
        assert caught.value.code == 2 and len(seen) == 1
    check(True, "fine")
    with refused("not fine"):
        check(False, "not fine")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "cams").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        StepFolder(tmp_path / "cams", Constants())
