"""Step folders: whole files, resuming, refusing other settings, locks, and the list of what failed."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tools.command import UserError, run
from tools.constants import Affinity, MayChange, Place, PositiveCount, Scales, checked_constants
from tools.files import write_json, write_whole
from tools.folders import LOCK, StepFolder
from tools.runs import read_run
from tools.step import experiment_folder, require
from tools.steps import STEPS, next_step, step_of


@checked_constants
class Constants(Place):
    dataset: str = "tiny"
    experiment: str = "prc"
    gamma: Affinity = 0.7
    scales: Scales = (0.5, 1.0)
    images_at_once: MayChange[PositiveCount] = 8
    workers: MayChange[int] = 0
    root: MayChange[Path] = Path("somewhere")


def refused(sentence):
    return pytest.raises(UserError, match=sentence)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def record(folder):
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


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "", ".", "a b", "x\n", "a\\b", "~"])
def test_experiment_names_that_leave_the_folder(tmp_path, name):
    with refused("experiment is "):
        experiment_folder(tmp_path, "tiny", name)
    assert experiment_folder(tmp_path, "tiny", "v1.2_no-ir") == tmp_path / "experiments" / "tiny" / "v1.2_no-ir"


def test_the_table_of_steps():
    for step in STEPS.values():
        for split in ("train", "test"):
            assert step_of(step.folder_of(split)) == step
    assert STEPS["cams"].folder_of("train") == "cams" and STEPS["cams"].folder_of("test") == "cams_test"
    assert STEPS["segmentation"].folder_of("test") == "segmentation" and step_of("thesis") is None
    assert next_step(STEPS["refined_segmentation"]) == STEPS["scores"] and next_step(STEPS["scores"]) is None


def test_a_command_repeats_what_the_user_gave():
    command = STEPS["cams"].command(Constants(root=Path("/my data"), experiment="b"))
    assert command == "python infer_classification.py --dataset tiny --experiment b --root '/my data'"
    assert STEPS["sam_masks"].command(Constants()) == "python PRC_SAM/get_se_map.py --dataset tiny --root somewhere"
    assert "--root" not in STEPS["cams"].command(replace(Constants(), root=Path(__file__).resolve().parents[1]))


def test_the_step_that_makes_a_missing_folder_is_named(tmp_path):
    for name, step in (
        ("cams_test", "step 2, python infer_classification.py"),
        ("segmentation_train", "step 6"),
        ("sam_masks", r"step 9, python PRC_SAM.get_se_map\.py --dataset tiny"),
    ):
        with refused(f"{name} is missing: run {step}"):
            require(tmp_path / name, Constants())
    folder = tmp_path / "cams"
    folder.mkdir()
    with refused(r"no run\.json: run step 2, .* --overwrite"):
        require(folder, Constants())
    (folder / "run.json").write_bytes(b"{")
    with refused(r"run\.json is damaged .*: run step 2, .* --overwrite"):
        require(folder, Constants())
    fields = {"constants": {}, "started": "then", "seconds": 1}
    write_json(folder / "run.json", fields | {"finished": False})
    with refused("cams is not finished: run step 2, .* again, it continues"):
        require(folder, Constants())
    write_json(folder / "run.json", fields | {"finished": True, "x": 1})
    assert require(folder, Constants()).started == "then"


@contextmanager
def opened(path, given=None, **rest):
    with StepFolder(path, given or Constants()).open(".txt", **rest) as folder:
        yield folder


def make(path, ids=(), given=None, **rest):
    """A run that makes these ids -> its record."""
    with opened(path, given, **rest) as folder:
        folder.each(partial(write, folder=path), folder.pending(ids, ".txt"), "files")
    return read_run(path)


class Killed(Exception):
    pass


def kill(path, ids=(), given=None, **rest):
    """A run that is killed when it has made these ids."""
    with pytest.raises(Killed), opened(path, given, **rest) as folder:
        folder.each(partial(write, folder=path), folder.pending(ids, ".txt"), "files")
        raise Killed


def test_a_run_and_its_record(tmp_path):
    path, reads, notes = tmp_path / "cams", {"classifier": "then"}, {"stand_in": "made"}
    with opened(path, reads=reads, notes=notes, settings={"rules": {"share": 0.1}}) as folder:
        assert not record(path)["finished"] and (path / LOCK).exists()
        with refused("is not finished"):
            require(path, Constants())
        folder.each(partial(write, folder=path), folder.pending(["a", "b"], ".txt"), "files")
        (path / "contact_sheet.txt").write_text("a picture, not a result")
    run = read_run(path)
    assert run.finished and run.files == 2 and run.seconds >= 0 and not (path / LOCK).exists()
    expected = {"gamma": 0.7, "scales": [0.5, 1.0], "root": "somewhere", "rules": {"share": 0.1}}
    assert run.constants.items() >= expected.items()
    assert run.reads == reads and run.notes == notes
    assert {"torch", "numpy", "python"} <= run.packages.keys() and run.commit and run.command


def test_the_record_names_the_runs_that_made_the_files(tmp_path, monkeypatch):
    """A later program that finds everything finished is not recorded."""

    def visit(program):
        monkeypatch.setattr("sys.argv", [program])
        return make(tmp_path / "cams", ["a", "b"])

    first = visit("first.py")
    assert visit("second.py") == first and first.script == "first.py" and first.continued == []
    (tmp_path / "cams" / "b.txt").unlink()
    third = visit("third.py")
    assert third.script == "first.py" and [part["script"] for part in third.continued] == ["third.py"]
    write_json(tmp_path / "cams" / "run.json", third.model_dump() | {"finished": False})  # as if it had been killed
    assert [part["script"] for part in visit("fourth.py").continued] == ["third.py", "fourth.py"]


def test_a_killed_run_continues(tmp_path):
    path = tmp_path / "cams"
    kill(path, ["b"])
    started = read_run(path).started
    leftovers = [path / ".c.123.tmp.txt", path / "coloured" / ".c.9.tmp.png"]
    for leftover in leftovers:  # it died while writing
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_text("half")
    other = Constants(workers=3, root=Path("elsewhere"), images_at_once=1)  # none of these changes a result
    with opened(path, other) as folder:
        assert not any(leftover.exists() for leftover in leftovers)
        assert folder.pending(["a", "b", "c"], ".txt") == ["a", "c"]
        assert record(path)["started"] == started  # later steps see one and the same run
        for id in ("a", "c"):
            write(id, path)
    assert read_run(path).finished and read_run(path).files == 3
    kill(path)  # opened again and killed at once, the folder counts as not finished
    with refused("is not finished"):
        require(path, Constants())


def test_other_settings_are_refused_with_the_difference(tmp_path):
    path, before, settings = tmp_path / "cams", {"classifier": "monday"}, {"rules": 3, "precision": "bf16"}
    make(path, ["a"], reads=before, settings=settings)
    for gamma, reads, other, sentence in (
        (0.6, before, settings, r"gamma: 0\.7 there, 0\.6 now.*--overwrite.*--experiment"),
        (0.7, {"classifier": "tuesday"}, settings, "another run of classifier"),
        (0.7, {}, settings, "another run of classifier"),
        (0.7, before, {"precision": "bf16"}, "rules: 3 there, None now"),
        (0.7, before, settings | {"more": 1}, "more: None there, 1 now"),
        (0.7, before, settings | {"precision": "fp32"}, "--precision bf16 continues it"),
    ):
        with refused(sentence):
            make(path, given=Constants(gamma=gamma), reads=reads, settings=other)
    assert (path / "a.txt").exists()
    make(path, given=Constants(gamma=0.6, overwrite=True), reads=before)
    assert names(path) == ["run.json"] and record(path)["constants"]["gamma"] == 0.6
    make(path, given=Constants(gamma=0.6), reads=before)  # overwrite itself is no setting


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "cams").mkdir()
    make(tmp_path / "cams")  # empty: fine
    thesis = tmp_path / "thesis" / "chapter.tex"
    write_json(thesis, "years of work")
    for overwrite in (False, True):
        with refused(r"no run\.json, .*move it away"):
            make(thesis.parent, given=Constants(overwrite=overwrite))
    (tmp_path / "cams" / "link").symlink_to(thesis.parent)
    write_json(tmp_path / "cams" / "deep" / "a.json", {})
    make(tmp_path / "cams", given=Constants(overwrite=True))
    assert names(tmp_path / "cams") == ["run.json"] and names(thesis.parent) == ["chapter.tex"]


def test_overwriting_that_is_interrupted(tmp_path, monkeypatch):
    """Half removed, a folder still says that it is not finished and with what it was made."""
    path, unlink, other = tmp_path / "cams", Path.unlink, Constants(gamma=0.6, overwrite=True)
    make(path, ["a", "b"])

    def interrupted(file, **options):
        if file.suffix == ".txt":
            raise KeyboardInterrupt
        unlink(file, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", interrupted)
        make(path, given=other)
    assert not record(path)["finished"]
    with refused(r"gamma: 0\.7 there, 0\.6 now"):
        make(path, given=Constants(gamma=0.6))
    make(path, ["a"], given=other)
    assert record(path)["finished"] and record(path)["files"] == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000], ids=range(5))
def test_a_damaged_record(tmp_path, content):
    make(tmp_path / "cams")
    (tmp_path / "cams" / "run.json").write_bytes(content)
    with refused(r"run\.json is damaged .*: --overwrite starts .*cams again"):
        make(tmp_path / "cams")
    make(tmp_path / "cams", given=Constants(overwrite=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_are_reported_after_the_good_files_are_done(tmp_path, workers):
    path, given, ids = tmp_path / "cams", Constants(workers=workers), list("abcde")
    with (
        refused(r"files that failed: 2; all others are finished.*same command again:") as caught,
        opened(path, given) as folder,
    ):
        folder.each(partial(write, folder=path, bad="bd"), folder.pending(ids, ".txt"), "files")
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {"b is bad", "d is bad"}
    assert record(path)["files"] == 3 and not record(path)["finished"]
    with opened(path, given) as folder:
        assert folder.pending(ids, ".txt") == ["b", "d"]
        folder.each(partial(write, folder=path), ["b", "d"], "files")
    assert read_run(path).files == 5


def test_a_long_list_of_failures_is_cut(tmp_path):
    with refused("files that failed: 50") as caught, opened(tmp_path / "cams") as folder:
        for index in range(50):
            folder.fail(UserError(f"{index} is bad"))
    shown = str(caught.value)
    assert "19 is bad" in shown and "20 is bad" not in shown and "and 30 more" in shown


def test_an_error_of_the_program_is_not_hidden(tmp_path):
    def broken(id):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), opened(tmp_path / "cams") as folder:
        folder.each(broken, ["a"], "files")
    assert not (tmp_path / "cams" / LOCK).exists()


def test_processes_share_the_ids(tmp_path):
    ids, shares = [str(index) for index in range(8)], []
    for index in range(3):
        folder = StepFolder(tmp_path / "cams", Constants())
        folder.state = SimpleNamespace(process_index=index, num_processes=3)
        shares.append(folder.pending(ids, ".txt"))
    assert sorted(id for share in shares for id in share) == ids and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_runs_in_one_folder(tmp_path):
    """A living run's lock is respected; one that names a process that has ended, or nothing, is taken over."""
    import socket

    path, parent = tmp_path / "cams", psutil.Process().parent()
    make(path)
    host = socket.gethostname()
    for text in (f"{host} {parent.pid} {parent.create_time()!r}", "another-host 1 1.0"):
        (path / LOCK).write_text(text)
        with refused(r"is being written by another run \(process \d+ on .*\): wait for it, or delete .*\.lock"):
            make(path)
        assert (path / LOCK).read_text() == text
    for text in (f"{host} {parent.pid} {parent.create_time() - 9!r}", f"{host} 999999999 1.0", "", "x y", "\0"):
        (path / LOCK).write_text(text)
        make(path, ["a"])
        assert not (path / LOCK).exists()


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    with opened(tmp_path / "cams"):
        monkeypatch.setattr("time.time", lambda: 0.0)
        monkeypatch.setattr("time.time_ns", lambda: 0)
    assert read_run(tmp_path / "cams").seconds >= 0


def fail_with(error, constants):
    raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("gamma is 2"), "error: gamma is 2"),
        (OSError(28, "No space left on device", "/data/a.png"), "error: /data/a.png: No space left on device: fix"),
        (MemoryError(), "micro_batch"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "micro_batch"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file"), "disk"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed."), "/dev/shm"),
        (RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:1"), "another process"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "micro_batch"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "sm_75"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile"), "another program"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), "driver"),
    ],
)
def test_how_a_script_ends(monkeypatch, capsys, error, text):
    monkeypatch.setattr("sys.argv", ["step.py", "--gamma", "0.5"])
    monkeypatch.delenv("PRC_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        run(partial(fail_with, error), Constants, "a step")
    assert caught.value.code == 1 and text in capsys.readouterr().err


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
    seen, then = [], []
    monkeypatch.setattr("sys.argv", ["step.py", "--gamma", "0.5", "--scales", "1", "2"])
    run(seen.append, Constants, "a step", then=then.append)
    assert seen == then == [replace(Constants(), gamma=0.5, scales=(1.0, 2.0))]
    for arguments, code in ((["--gamma", "1.5"], 1), (["--gama", "1"], 2), (["--gamma", "much"], 2)):
        monkeypatch.setattr("sys.argv", ["step.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            run(seen.append, Constants, "a step")
        assert caught.value.code == code and len(seen) == 1
    assert "gamma" in capsys.readouterr().err


def test_an_edited_default_is_checked():
    @checked_constants
    class Edited(Place):
        gamma: Affinity = "much"

    with refused("gamma is 'much', .* number: change the constant at the top of the script, or --gamma"):
        Edited()


def test_a_mistyped_experiment_lists_the_others(tmp_path):
    for name in ("prc", "supervised"):
        (tmp_path / "experiments" / "tiny" / name).mkdir(parents=True)
    with refused("experiments of this data set are prc, supervised"):
        require(tmp_path / "experiments" / "tiny" / "pcr" / "cams", Constants())
