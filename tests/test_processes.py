"""Several processes (torchrun, gloo on the CPU): results of one, equal losses, and one that dies ends all."""

import os
import signal

import pytest
import torch

from tests.conftest import ROOT
from tests.programs import PROGRAMS, finish, living, started, torchrun, until
from tests.steps import experiment, record, same_results
from tests.test_interruption import stalled
from tools.logs import read_log

PER_IMAGE = [name for name in PROGRAMS if not name.startswith("train_")]
TRAINING = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
import {script} as step
from tools.command import run
# What differs between processes: each draws its own dropout, and without GPUs takes its own BatchNorm statistics.
nn.Dropout.forward = lambda self, x: x
nn.modules.batchnorm._BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)
if __name__ == "__main__":
    run(step.main, step.Constants, "")
"""


@pytest.mark.long
@pytest.mark.parametrize("name", PER_IMAGE)
def test_images_shared_out_give_the_results_of_one_process(finished, copy, name):
    """Ten images of train to three processes, four of test: uneven both."""
    program = PROGRAMS[name]
    expected = program.expected(finished, copy)
    program.remove_output(copy)
    finish(program.command(copy, workers=0), torchrun(3))
    assert same_results(copy / program.output, expected, program.files)
    if name not in ("process", "evaluate_miou"):  # which the first process does alone
        assert record(copy / program.output)["processes"] == 3 and record(copy / program.output)["finished"]


def log(folder):
    return read_log(folder / "log.jsonl")


@pytest.mark.long
@pytest.mark.parametrize("script", ["train_classification", "train_segmentation"])
def test_a_training_of_two_processes_has_the_losses_of_one(copy, tmp_path, script):
    """The same batches, half of each in either process; labelled pixels are not shared out evenly."""
    driver, program, rows = tmp_path / "driver.py", PROGRAMS[script], {}
    driver.write_text(TRAINING.format(root=str(ROOT), script=script))
    for name, launcher in (("one", ()), ("two", torchrun(2))):
        constants = {"experiment": name, "epochs": 3, "batch_size": 4, "workers": 0}
        if script == "train_segmentation":
            constants["labels"] = "truth"
        else:
            constants["gamma"] = 0.0  # no affinity is cut: at a threshold rounding would decide, and losses jump
        words = program.command(copy, **constants)
        finish([str(driver), *words[1:]], launcher)
        folder = experiment(copy, name) / program.output.rsplit("/", 1)[1]
        rows[name] = log(folder)
        assert record(folder)["processes"] == len(rows)
    assert len(rows["one"]) == 3
    for one, two in zip(*rows.values(), strict=True):
        for key in one.keys() - {"images_per_second"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    states = [
        torch.load(experiment(copy, name) / folder.name / "model.pt", weights_only=True)["model"] for name in rows
    ]
    assert all(torch.allclose(states[0][key].float(), states[1][key].float(), atol=1e-3) for key in states[0])


@pytest.mark.long
@pytest.mark.parametrize("name", ["make_pseudo_labels", "train_classification"])
def test_one_process_that_is_killed_ends_all(finished, copy, name):
    program = PROGRAMS[name]
    program.remove_output(copy)
    words = program.command(copy, workers=0, **({"batch_size": 4} if "train" in name else {}))
    with stalled(copy / program.late) as read, started(words, torchrun(2)) as launcher:
        until(read)
        (second,) = [pid for pid in living(launcher) if b"RANK=1" in environment(pid)]
        os.kill(second, signal.SIGKILL)
        _, stderr = launcher.communicate(timeout=60)
        until(lambda: not living(launcher), 15)
    assert launcher.returncode != 0 and "SIGKILL" in stderr
    assert "the same command continues" in stderr, stderr
    if name == "make_pseudo_labels":
        finish(program.command(copy, workers=0), torchrun(2))
        assert same_results(copy / program.output, finished / program.output, program.files)


def environment(pid) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().split(b"\0")


@pytest.mark.long
def test_an_error_in_one_process_ends_all_with_its_sentence(copy):
    """The second process alone meets the bad file, in a training, where the others wait for its gradients."""
    folder = copy / "datasets" / "tiny" / "train"
    (folder / "images" / "train_3.png").write_bytes(b"none")
    stderr = finish(
        PROGRAMS["train_classification"].command(copy, experiment="other", batch_size=4, workers=0, epochs=9),
        torchrun(2),
        fails=True,
    )
    assert "error: " in stderr and "train_3.png cannot be read as a PNG image" in stderr
    ours = stderr.replace("torch.distributed.elastic", "")
    assert 'File "' + str(ROOT / "tools") not in ours, ours


@pytest.mark.long
def test_ctrl_c_and_sigterm_end_all_processes(copy):
    program = PROGRAMS["infer_classification"]
    for number in (signal.SIGINT, signal.SIGTERM):
        program.remove_output(copy)
        with stalled(copy / program.late) as read, started(program.command(copy), torchrun(2)) as launcher:
            until(read)
            (os.killpg if number == signal.SIGINT else os.kill)(launcher.pid, number)
            _, stderr = launcher.communicate(timeout=40)
            until(lambda launcher=launcher: not living(launcher), 15)
        assert launcher.returncode != 0 and stderr.count("stopped; the same command continues") == 1, stderr


def test_only_the_first_process_does_what_is_not_shared_out(copy, monkeypatch):
    """What torchrun tells its second process is enough for it to leave the work to the first."""
    file = copy / "datasets" / "tiny" / "train" / "image_labels.csv"
    file.unlink()
    monkeypatch.setenv("RANK", "1")
    finish(PROGRAMS["process"].command(copy))
    assert not file.exists()
    monkeypatch.setenv("RANK", "0")
    finish(PROGRAMS["process"].command(copy))
    assert file.exists()
