"""Faults around a step: changed labels, long paths, closed pipes, terminals, several processes, other repositories."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.steps import step
from tools import runs
from tools.command import UserError
from tools.workers import in_workers

LABELS = "datasets/tiny/train/image_labels.csv"


@pytest.mark.parametrize("script", ["train_classification", "infer_classification", "generate_refined_pseudo"])
def test_changed_image_labels_are_refused(copy, script):
    """A run that continues must read the labels that the files it finds were made from."""
    header, first, *lines = (copy / LABELS).read_text().splitlines()
    id, _, *labels = first.split(",")
    first = ",".join([id, "1", *(str(1 - int(value)) for value in labels)])
    (copy / LABELS).write_text("\n".join([header, first, *lines, ""]))
    with pytest.raises(UserError, match="image_labels"):
        step(script, copy)


def test_a_temporary_folder_with_a_long_path(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 130)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(UserError, match="TMPDIR"):
        list(in_workers(abs, [1, -2, 3], 2))
    assert list(in_workers(abs, [1, -2, 3], 0)) == [1, 2, 3]


def start(words, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--dataset", "tiny", "--workers", "0"]])
def test_a_closed_pipe_ends_silently(copy, arguments):
    words = ["datasetsprocess/process.py", *arguments]
    with start([*words, *(["--root", copy] if "tiny" in words else [])], PYTHONUNBUFFERED="1") as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) != 0


def test_an_ascii_terminal(copy):
    """A dash or a letter that the terminal cannot show must not end the run."""
    file = copy / "datasets" / "tiny" / "dataset.toml"
    file.write_text(file.read_text(encoding="utf-8").replace('"roof"', '"Dächer – hoch"'), encoding="utf-8")
    for split in ("train", "test"):
        (copy / "datasets" / "tiny" / split / "image_labels.csv").unlink()
    words = ["datasetsprocess/process.py", "--dataset", "tiny", "--root", copy, "--workers", 0]
    with start(words, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and b"Traceback" not in stderr and b"D?cher" in stdout, stderr


def test_only_the_first_process_reports_a_wrong_constant():
    reports = []
    for rank in ("0", "1"):
        with start(["generate_refined_seg.py", "--tau", "7"], RANK=rank) as process:
            _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        reports.append(b"tau is 7.0" in stderr)
    assert reports == [True, False]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_of_another_repository_is_not_recorded(tmp_path, monkeypatch):
    """The project unpacked without its own repository, inside somebody else's."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q", tmp_path], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "thesis"], cwd=tmp_path, check=True)
    (tmp_path / "project" / "tools").mkdir(parents=True)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "project" / "tools" / "runs.py"))
    assert runs.commit() == "unknown"
    shutil.move(tmp_path / ".git", tmp_path / "project")
    assert runs.commit() != "unknown"
