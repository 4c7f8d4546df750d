"""What the documents promise: every command of the README runs, those of docs/ are understood."""

import importlib
import inspect
import re
import shlex
import subprocess

import numpy as np
import pytest
import tyro
from PIL import Image

from tests.conftest import ROOT
from tests.steps import SMALL, options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "datasetsprocess", "PRC_SAM", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "class Constants" in path.read_text()
)
STEPS = SMALL | {"batch_size": 2}
SUBSTITUTES = {  # script of the README -> the constants that make it small enough for a test, and need no network
    "vaihingen_patch_split": {"workers": 0},
    "process": {"workers": 0},
    "get_se_map": {"generator": "felzenszwalb", "workers": 0},
    "train_classification": STEPS | {"train_all": True},
    "infer_classification": {"workers": 0, "precision": "fp32"},
    "make_pseudo_labels": {"workers": 0},
    "generate_refined_pseudo": {"workers": 0},
    "train_segmentation": STEPS | {"freeze_norm": False, "width": 16},
    "inference_segmentation": {"workers": 0, "precision": "fp32"},
    "generate_refined_seg": {"workers": 0},
    "evaluate_miou": {"workers": 0},
}
HEAVY = {"reproduce_tables"}  # their own tests run them; here they are only parsed
SMALL_SCENES = """
base = "vaihingen"
title = "Two scenes"
patch_size = 64
[scenes]
train = ["1"]
test = ["2"]
"""


def commands(text: str) -> list[list[str]]:
    """The words of every command in code blocks and code spans that starts one of the project's scripts, or make.

    Shell variables that the page sets, NAME="words", are filled in.
    """
    text = text.replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="([^"]*)"$', text, re.M):
        text = text.replace(f"${name}", value)
    spans = [line for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M) for line in block.splitlines()]
    spans += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = []
    for span in spans:
        try:
            words = shlex.split(span, comments=True)
        except ValueError:  # no command: a path with an apostrophe, a sentence
            continue
        words = words[next((k for k, word in enumerate(words) if word.endswith(".py")), 0) :] if words else []
        if words and (words[0] in SCRIPTS or words[0] == "make"):
            found.append(words)
    return found


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def parse(script: str, arguments: list[str]):
    """The constants that these arguments give; what tyro would tell the user fails the test."""
    try:
        return tyro.cli(module_of(script).Constants, args=arguments)
    except SystemExit as error:
        raise AssertionError(f"{script} {shlex.join(arguments)} is not understood") from error


@pytest.fixture(autouse=True)
def benchmarks_find_their_neighbours(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when they are run as programs


@pytest.fixture(scope="module")
def raw_scenes(tmp_path_factory):
    """A root whose data set `small` has two scenes in the layout of Vaihingen's archives."""
    root, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    raw = root / "datasets" / "small" / "raw"
    for folder in ("top", "gts_for_participants"):
        (raw / folder).mkdir(parents=True)
    (raw.parent / "dataset.toml").write_text(SMALL_SCENES)
    colours = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 255], [0, 255, 0]], np.uint8)
    for area in ("1", "2"):
        truth = colours[rng.integers(0, 4, (4, 4))].repeat(40, 0).repeat(40, 1)
        image = (truth // 2 + rng.integers(0, 60, truth.shape)).astype(np.uint8)
        Image.fromarray(truth).save(raw / "gts_for_participants" / f"top_mosaic_09cm_area{area}.tif")
        Image.fromarray(image).save(raw / "top" / f"top_mosaic_09cm_area{area}.tif")
    return root


def test_every_command_of_the_readme(raw_scenes):
    """In their order, on two small scenes: from the archives to the report with nothing but the README."""
    ran = set()
    for script, *arguments in commands(PAGES[0].read_text()):
        if script == "make":
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
            continue
        name = script.rpartition("/")[2].removesuffix(".py")
        parse(script, arguments)
        if "fields" in arguments:  # a person's own data: tests/test_own_data.py runs these
            continue
        if name in HEAVY or name in ran or not arguments:
            continue
        ran.add(name)
        small = options(SUBSTITUTES[name] | {"dataset": "small", "root": raw_scenes})
        kept = [word for word in arguments if word not in ("--download", "--dataset", "vaihingen")]
        module_of(script).main(parse(script, [*kept, *map(str, small)]))
    assert ran == SUBSTITUTES.keys()
    page = (raw_scenes / "experiments/small/prc/scores/report.html").read_text()
    assert "Two scenes" in page and "refined segmentation" in page and "stand-in was used" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    for script, *arguments in commands(page.read_text()):
        if script != "make" and arguments and "..." not in arguments:
            parse(script, [{"N": "1"}.get(word, word) for word in arguments])


def test_commands_of_the_makefile_are_understood():
    told = subprocess.run(["make", "-n", "-B", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)
    found = commands(f"```\n{told.stdout}\n```")
    assert len(found) > 12
    for script, *arguments in found:
        parse(script, arguments)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "benchmarks" not in script])
def test_help_tells_of_every_constant(script, capsys):
    """Each has a comment of its own line, which tyro shows; a line broken by the formatter would lose it."""
    module = module_of(script)
    with pytest.raises(SystemExit) as ended:
        tyro.cli(module.Constants, args=["--help"], description=module.__doc__)
    assert ended.value.code == 0 and "--dataset" in capsys.readouterr().out
    fields = re.findall(r"^    (\w+): .*", inspect.getsource(module.Constants), re.M)
    lines = re.findall(r"^    \w+: .*[^ ]  # .+", inspect.getsource(module.Constants), re.M)
    assert len(fields) == len(lines) > 1, sorted(set(fields) - {line.split(":")[0].strip() for line in lines})
    assert module.__doc__ and "Writes" in module.__doc__
