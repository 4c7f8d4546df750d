"""report.html: one safe file, as evaluate_miou.py writes it and as every step renews it."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from report import page as report
from report.patch_pictures import Sample, choose, pack
from tests.conftest import ROOT
from tests.experiments import CLASSES, EVIL, STAGES, make_experiment, scored, write_run
from tools.command import run
from tools.constants import Place
from tools.dataset import load_dataset
from tools.image_labels import write_image_labels
from tools.labels import load_label
from tools.map_files import save_maps
from tools.runs import Run

RUN = "experiments/tiny/run"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, run_script):
    root = make_experiment(tmp_path_factory.mktemp("root"))
    run_script("evaluate_miou.py", "--dataset", "tiny", "--experiment", "run", "--root", root, "--workers", 0)
    return root


@pytest.fixture
def root(evaluated, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(evaluated, tmp_path / "root")


def page_of(root):
    return (root / RUN / "scores" / "report.html").read_text()


def renew(root, experiment="run"):
    report.renew(SimpleNamespace(dataset="tiny", experiment=experiment, root=root))


def samples_of(page, split):
    return re.findall(rf'<section class="sample"><h3>\w+, {split} split: .*?</section>', page, re.S)


def panels_of(page, split):
    """The titles of the pictures of each sample of a split."""
    return [re.findall(r"([^>]*)</button>", section) for section in samples_of(page, split)]


def test_report_is_one_safe_file(evaluated):
    page = page_of(evaluated)
    assert len(page.encode()) < 5_000_000
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page))
    assert re.findall(r"<(?:link|iframe|object|base|form)\b", page) == []
    assert EVIL not in page and "alert(" in page and page.count("<script>") == 1
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sources and all(re.match("data:image/(png|jpeg);base64,", source) for source in sources)
    assert all('alt="' in tag for tag in re.findall(r"<img [^>]*>", page))
    warning = f"classifier: {html.escape(EVIL, quote=False).replace(chr(39), '&#39;')}: average precision no better"
    parts = ("made masks", warning, "CAM of road", "best, train split", "worst, test split", "every pixel ")
    assert all(part in page for part in parts)
    assert ">w.pth" not in page and "weights: w.pth" in page  # the page may be sent on: no folder of this machine


def test_labels_that_the_classifier_contradicts(root):
    """Only where there are labels and logits of step 2, and with the command of the page on which to correct them."""
    assert "Labels to check" not in page_of(root)
    labels = {id: np.array([True, True, True, False]) for id in "abcde"}
    write_image_labels(root / "datasets/tiny/train/image_labels.csv", tuple(CLASSES), labels)
    for id, logit in zip("abcde", (4, 4, -3, 4, 4), strict=True):
        logits = np.array([4, logit, 4, -4])
        save_maps(root / RUN / "cams" / f"{id}.npz", "cams", np.array([0, 2]), [np.ones((2, 2, 2))], (32, 32), logits)
    renew(root)
    section = page_of(root).partition("Labels to check")[2].partition("</table>")[0]
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", section)]
    assert cells == ["c", EVIL, "present", f"{100 / (1 + np.exp(3)):.2f}"]
    assert f"label_page.py --dataset tiny --root {root} --review run" in section
    (root / RUN / "cams" / "e.npz").write_bytes(b"PK")
    renew(root)
    assert "Labels to check" not in page_of(root)


def test_names_stand_over_the_confusion_matrix(evaluated):
    heads = re.findall(r'<table class="confusion"><thead>(.*?)</thead>', page_of(evaluated), re.S)
    names = [[html.unescape(name) for name in re.findall(r">([^<]+)</span>", head)] for head in heads]
    assert names == [CLASSES, CLASSES]


def test_curves(evaluated, tmp_path):
    """Losses on axes of their own, the parts of one entry on a common one; what is no number is left out."""
    groups = {group["title"]: group["curves"] for group in report.curves(evaluated / RUN)}
    loss, classification = groups["classifier"]
    assert loss == {"name": "loss", "points": [(1, 2.5), (3, 0.5)], "low": 0.5, "high": 2.5}
    assert classification["points"] == [(3, 0.25)]
    road, evil = groups["classifier: average precision"]
    assert (road["points"], road["low"], road["high"]) == ([(1, 0.5), (2, 1)], 0, 1)
    assert evil == {"name": EVIL, "points": [(1, 0.25)], "low": 0, "high": 1}
    (tmp_path / "t").mkdir()
    lines = ["[]", '"epoch"', '{"epoch": "x", "loss": 1}', "[" * 100_000, '{"epoch": 1, "loss": ' + "9" * 400 + "}"]
    lines += ['{"epoch": 2, "loss": 1e999, "parts": {"a": -3, "b": 5}, "word": "x", "list": [1]}', "\x00"]
    (tmp_path / "t" / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    (group,) = report.curves(tmp_path)
    assert [(curve["low"], curve["high"], curve["points"][0][1]) for curve in group["curves"]] == [
        (-3, 5, -3),
        (-3, 5, 5),
    ]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_report_in_a_browser(evaluated, tmp_path):
    """No console error; the pictures, the slider and the pointer do what the page says, and nothing sticks out."""
    page = page_of(evaluated)
    probe = """<script>const s = document.querySelector(".sample"), input = s.querySelector("input");
      const truth = [...s.querySelectorAll("button")].find(each => each.textContent === "truth");
      const stack = s.querySelector(".stack"), above = stack.querySelectorAll("img")[1];
      const opened = s.querySelector("output").textContent;
      truth.click();
      input.value = 25;
      input.dispatchEvent(new Event("input"));
      above.decode().then(() => {
        const box = above.getBoundingClientRect(), fits = document.documentElement.scrollWidth <= innerWidth;
        const place = { clientX: box.x + box.width / 2 + 1, clientY: box.y + box.height / 2 + 1 };
        stack.dispatchEvent(new PointerEvent("pointermove", place));
        document.title = JSON.stringify([opened, above.style.opacity, above.src === truth.firstChild.src, fits,
                                         s.querySelector(".under").textContent]);
      });</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    result = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--virtual-time-budget=5000", "--window-size=500,900", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in result.stderr
    id = re.search(r'<section class="sample"><h3>best, train split: (.)\s', page)[1]
    name = CLASSES[load_label(evaluated / f"datasets/tiny/train/labels/{id}.png", 4)[16, 16]]
    title = html.unescape(re.search("<title>(.*?)</title>", result.stdout)[1])
    assert json.loads(title) == ["refined pseudo-label", "0.25", True, True, name]  # opened on the result


def test_steps_renew_the_page_without_the_truth(root, capfd):
    """The page shows the results that exist, names the steps that are left, and opens no pixel label."""
    shutil.rmtree(root / RUN / "scores")
    for split in ("train", "test"):
        shutil.rmtree(root / "datasets" / "tiny" / split / "labels")
    names = ["cams", *STAGES]
    for name in names:
        (root / RUN / name).rename(root / name)
    renew(root)
    page = page_of(root)
    assert "classification" in page and "resnet18" in page and 'class="sample"' not in page
    assert [f"not made yet: step {step}" in page for step in range(1, 8)] == [False] + [True] * 6
    assert f"Next: <code>python infer_classification.py --dataset tiny --experiment run --root {root}" in page
    shown = ["image", "CAM of road", "CAM of roof", "CAM, argmax", "pseudo-label", "regions", "refined pseudo-label"]
    for name, count in zip(names, (4, 5, 7, 7, 7), strict=True):
        (root / name).rename(root / RUN / name)
        renew(root)
        panels = panels_of(page_of(root), "train")
        assert len(panels) == 3 and panels[0] == shown[:count]
    page = page_of(root)
    assert panels_of(page, "test")[0] == ["image", "segmentation", "regions", "refined segmentation"]
    assert page.count("not made yet") == 1  # step 5, which was not run in this experiment
    assert "No truth" in page and "Not made yet" not in page
    (root / "datasets" / "tiny" / "test" / "labels").mkdir()
    (root / RUN / "cams" / "a.npz").write_bytes(b"PK")
    renew(root)
    page = page_of(root)
    assert "Not made yet. Step 8" in page and "No truth" not in page
    assert len(samples_of(page, "train")) == 2 and capfd.readouterr() == ("", "")  # the step reports the file


def test_scores_stay_while_they_hold_and_are_marked_after(root):
    before = page_of(root)
    assert panels_of(before, "train")[0][-2:] == ["truth", "errors"]
    renew(root)
    assert page_of(root) == before  # not a byte
    file = root / RUN / "segmentation" / "run.json"
    file.write_text(file.read_text().replace('"started":"segmentation"', '"started":"later"'))
    renew(root)
    page = page_of(root)
    assert "segmentation (older)" in page and page.count("Older scores: segmentation changed") == 1
    assert "pseudo-label (older)" not in page and panels_of(page, "train") == panels_of(before, "train")
    assert all("truth" not in titles for titles in panels_of(page, "test"))


def run_of(started, constants=None, **reads):
    return Run(constants=constants or {}, reads=reads, started=started, seconds=0, finished=True)


def test_what_an_older_step_fed_is_older_too():
    """At any distance, across the data set's masks, and through image_labels.csv."""
    runs = {
        "classifier": run_of("1", image_labels="hash"),
        "cams": run_of("2", classifier="1"),
        "sam_masks, train split": run_of("0"),
        "pseudo_labels": run_of("3", cams="2"),
        "refined_pseudo_labels": run_of("4", pseudo_labels="3", sam_masks="0"),
    }
    later = {"cams", "pseudo_labels", "refined_pseudo_labels"}
    for changed, labels, expected in (
        ({}, "hash", set()),
        ({"classifier": run_of("9")}, "hash", later),
        ({"sam_masks, train split": run_of("9")}, "hash", {"refined_pseudo_labels"}),
        ({}, "other", later | {"classifier"}),
        ({"cams": run_of("2", {"classifier": "other"}, classifier="7")}, "hash", set()),
    ):
        assert report.outdated_runs(runs | changed, {labels, "of the other split"}) == expected


def test_a_page_that_cannot_be_renewed_costs_one_line(root, capsys):
    shutil.rmtree(root / RUN / "scores")
    (root / RUN / "scores").write_text("a file where a folder should be")
    for experiment in ("run", "no/such"):
        renew(root, experiment)
        assert re.fullmatch(r".*could not be renewed \(.*\)\n", capsys.readouterr().err)


@pytest.mark.parametrize(("rank", "expected"), [("0", ["step", "report"]), ("1", ["step"])])
def test_the_main_process_alone_renews(monkeypatch, rank, expected):
    calls = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["step.py"])
    run(lambda _: calls.append("step"), Place, "", then=lambda _: calls.append("report"))
    assert calls == expected


BROKEN = [  # file, content that no step writes
    ("scores.json", b"[" * 100_000),
    ("scores.json", b'{"classes": "\xff\xfe"}'),
    ("scores.json", b'{"classes": [], "stages": [{"confusion": [[1e400]]}]}'),
    ("samples.json", b""),
    ("samples.json", b'{"train": [{"id": "a", "panels": [{"title": "x", "source": "javascript:alert(1)"}]}]}'),
    ("run.json", b'{"constants": {}, "finished": true, "seconds": 1}'),
]


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=range(len(BROKEN)))
def test_broken_json_is_one_sentence_in_the_page(root, name, content, capfd):
    """It costs neither the page nor the step, and the page says which file to make again."""
    file = root / RUN / ("pseudo_labels" if name == "run.json" else "scores") / name
    file.write_bytes(content)
    renew(root)
    page = page_of(root)
    assert page.count(f"{file} is damaged") == 1 and "javascript:" not in page and capfd.readouterr() == ("", "")
    assert ("Not made yet. Step 8" in page) == (name == "scores.json")


def test_scores_of_other_classes_are_not_shown(root):
    toml, file = root / "datasets" / "tiny" / "dataset.toml", root / RUN / "scores" / "scores.json"
    toml.write_text(toml.read_text().replace('name = "roof"', 'name = "tower"'))
    renew(root)
    assert "Not made yet. Step 8" in page_of(root) and "CAM of tower" in page_of(root)
    scores = json.loads(file.read_text())
    scores["stages"][0]["confusion"][0].pop()
    file.write_text(json.dumps(scores))
    renew(root)
    assert "do not fit the 4 classes" in page_of(root)


def test_the_report_needs_no_torch(evaluated):
    """Steps 4 and 7 and the data preparation start fast. Only CAMs, in whose module torch is used, load it."""
    code = "import sys, report.page, evaluate_miou; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@given(
    scores=st.dictionaries(st.integers(0, 99).map(str), st.floats(0, 1) | st.just(float("nan")), max_size=20),
    n=st.integers(0, 5),
    data=st.data(),
)
def test_choice_of_best_median_and_worst(scores, n, data):
    """Each image once, none without a score; the worst ones score no higher than any other that is not a best one."""
    present = {id: data.draw(st.integers(0, 3)) for id in scores}
    chosen = choose(scores, n, present)
    ids = [id for _, id in chosen]
    defined = [id for id in scores if scores[id] == scores[id]]
    assert len(set(ids)) == len(ids) and set(ids) <= set(defined)
    assert len(ids) == min(3 * n, len(defined)) or (len(defined) < 3 * n and ids)
    kinds = {kind: [id for name, id in chosen if name == kind] for kind in ("best", "median", "worst")}
    assert all(len(group) <= n for group in kinds.values())
    left = [id for id in defined if id not in kinds["best"]]
    assert all(present[id] >= 2 for id in kinds["best"]) or all(present[id] < 2 for id in left)
    assert all(scores[low] <= scores[id] for low in kinds["worst"] for id in left if id not in kinds["worst"])


def test_choice_of_nine_and_of_equals():
    chosen = choose({str(number): number / 10 for number in range(9)}, 2)
    expected = [("best", "8"), ("best", "7"), ("median", "5"), ("median", "4"), ("worst", "1"), ("worst", "0")]
    assert chosen == expected
    assert choose(dict.fromkeys("abc", 1.0), 1, {"b": 3, "c": 2})[0] == ("best", "b")  # the one that shows most


def summary_of(root, experiment, stages=()):
    args = SimpleNamespace(dataset="tiny", experiment=experiment, root=root)
    return replace(report.read_summary(args, load_dataset("tiny", root)), stages=list(stages))


def test_a_page_never_grows_beyond_its_limit(evaluated):
    """Samples that do not fit are left out, and the page says so."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    panels = pack({f"p{k}": noise for k in range(12)})
    sample = Sample(id="a", split="test", kind="best", score=0.5, panels=panels, result="p0")
    report.write_report(summary_of(evaluated, "empty"), [sample] * 12)
    page = (evaluated / "experiments/tiny/empty/scores/report.html").read_text()
    assert 4_000_000 < len(page) < 5_000_000 and "more were chosen" in page and page.count('class="sample"') >= 3


def add_classes(root, name):
    """Classes until there are 250."""
    toml = root / "datasets" / "tiny" / "dataset.toml"
    more = ", ".join(f"{{name = '{name}{k}', colour = [9, 9, {k}]}}" for k in range(4, 250))
    toml.write_text(toml.read_text().replace("]\nleft_out", f", {more}]\nleft_out"))


def test_a_hostile_data_set(tmp_path, capfd):
    """Names that are HTML, 250 classes, ids that are HTML: the page stays small and nothing is executed."""
    root, evil = make_experiment(tmp_path), '"><img src=x onerror=alert(1)>'
    add_classes(root, evil)
    for folder in ("experiments/tiny/run", "datasets/tiny"):
        for file in [*(root / folder).rglob("a.png"), *(root / folder).rglob("a.npz")]:
            file.rename(file.with_stem("a<b>&'"))
    write_run(root / RUN / "classifier", "train", [evil], **{evil: evil})
    renew(root)
    page = page_of(root)
    assert evil not in page and "<img src=x" not in page and "<b>&'" not in page and len(page) < 5_000_000
    assert len(samples_of(page, "train")) == 3 and capfd.readouterr() == ("", "")


def test_many_classes_make_no_confusion_matrix(tmp_path):
    """250 classes, each pixel count above 0: two tables of 250 x 251 cells would make the page too large."""
    root = make_experiment(tmp_path)
    add_classes(root, "c")
    counts = np.random.default_rng(0).integers(1, 10**6, (250, 251)).tolist()
    stages = [scored("run", stage, split, counts) for stage, split in STAGES.items()]
    report.write_report(summary_of(root, "run", stages), [])
    page = page_of(root)
    assert len(page) < 5_000_000 and "Share of pixels" in page and '<table class="confusion">' not in page
