"""The page on which a person labels patches, used in Chromium as a person does; what it writes, and what it reads."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasetsprocess import label_page, process
from tests.browser import CHROMIUM, CONTROL, SHIFT, Browser
from tools.command import UserError
from tools.dataset import load_dataset
from tools.image_labels import read_image_labels, write_image_labels
from tools.map_files import save_maps

EVIL = '<script>document.title = "evil"</script>'
CLASSES = ("field", EVIL, 'roof, "old"', "water")
DESCRIPTION = f"""
title = "plots & {EVIL.replace('"', "'")}"
patch_size = 32
classes = [
  {{name = "field", colour = [220, 200, 60]}},
  {{name = '{EVIL}', colour = [0, 120, 0]}},
  {{name = 'roof, "old"', colour = [200, 0, 0]}},
  {{name = "water", colour = [255, 255, 255]}},
]
"""
GRID = [f"north_r{row:03d}_c{column:03d}" for row in range(3) for column in range(4)]
ODD = ["odd #1, 100% 'x'", "south_p0001", "south_r000_c000_v1"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("needs chromium, which was not found on the PATH")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def plots(tmp_path, request):
    """A data set of 15 patches, named after the test, since the browser keeps the work by the name of the data set."""

    class Plots:
        root, name = tmp_path, request.node.name.split("[")[0]
        folder = root / "datasets" / name
        train = folder / "train"
        csv = train / "image_labels.csv"

        def write(self, **constants):
            label_page.main(label_page.Constants(dataset=self.name, root=self.root, **constants))
            return self.train / "label_images.html"

        def open(self, browser, **options):
            return browser.open(self.write(), **options)

        def label(self, labels):
            write_image_labels(self.csv, CLASSES, {id: np.array(list(map(int, bits))) for id, bits in labels.items()})

    (Plots.train / "images").mkdir(parents=True)
    (Plots.folder / "dataset.toml").write_text(DESCRIPTION)
    for number, id in enumerate(GRID + ODD):
        Image.new("RGB", (32, 32), (16 * number, 90, 90)).save(Plots.train / "images" / f"{id}.png")
    return Plots()


def kept(page):
    """id -> label, as the page has them now."""
    return dict(page.js("page.ids.map((id, index) => [id, labels[index]])"))


def bits(labels):
    return {id: "".join(map(str, label.astype(int))) for id, label in labels.items()}


def reload(page):
    """Reload as soon as another tab sees the work: the browser takes a moment to store what a page writes."""
    other = page.browser.open(page.path)
    other.until(f"JSON.stringify(labels) === {json.dumps(page.js('JSON.stringify(labels)'))}")
    other.call("Page.close")
    page.reload()


def show(page, value):
    """Choose a filter."""
    page.js(f"element('filter').value = '{value}'; element('filter').dispatchEvent(new Event('change'));")


# with keys and mouse -------------------------------------------------------------------------------------------------


def test_twelve_patches_by_keyboard_and_mouse(plots, browser):
    """Labelled, reloaded, exported; process.py accepts the file; nothing but the page and its images is loaded."""
    for id in ODD:
        (plots.train / "images" / f"{id}.png").unlink()
    page = plots.open(browser)
    assert page.js("document.activeElement.id") == "grid"
    page.press("1", "3")  # two classes for the first patch
    page.press("ArrowRight", "2", "2", "4")  # one set and removed again
    page.press("ArrowRight", "0")  # the same as the last one
    page.press("ArrowRight", "1", "Backspace", "3")
    page.click("#cell-4")
    page.click("#classes button:nth-child(1)")
    assert page.js("document.activeElement.id") == "grid"  # which keeps the keys
    page.press("ArrowRight", "2")
    page.click("#cell-6")
    page.click("#cell-8", SHIFT)  # a range of three
    page.press("4")
    page.press("Escape")
    page.click("#cell-9")
    page.click("#cell-11", CONTROL)
    page.press("1", "2")
    page.press("1")  # both had it, so both lose it
    page.click("#cell-10")
    page.press("4", "1")
    page.press("z", modifiers=CONTROL)
    labels = ["1010", "0001", "0001", "0010", "1000", "0100", "0001", "0001", "0001", "0100", "0001", "0100"]
    expected = dict(zip(GRID, labels, strict=True))
    assert kept(page) == expected
    assert page.js("document.querySelector('#left').textContent") == "all 12 labelled"
    reload(page)
    assert kept(page) == expected
    page.click("#export")
    exported = page.downloaded("image_labels.csv")
    page.until("document.querySelector('.notice').textContent.includes('image_labels.csv is in your downloads')")
    assert f"process.py --dataset {plots.name}" in page.js("document.querySelector('.notice').textContent")

    plots.label(expected)
    assert exported.read_bytes() == plots.csv.read_bytes()
    shutil.move(exported, plots.csv)
    process.main(process.Constants(dataset=plots.name, root=plots.root, workers=0))
    assert bits(load_dataset(plots.name, plots.root).image_labels("train")) == expected
    assert page.complaints() == []
    allowed = (plots.train.resolve() / "label_images.html").as_uri(), (plots.train.resolve() / "images").as_uri()
    asked = [request for request in page.requests() if not request.startswith("blob:")]
    assert asked and all(request.startswith(allowed) for request in asked)


def test_a_keyboard_alone_reaches_everything(plots, browser):
    page = plots.open(browser)
    reached = []
    for _ in range(30):
        page.press("Tab")
        reached.append(page.js("document.activeElement.id || document.activeElement.textContent"))
        if reached[-1] == "grid":
            break
    wanted = {"undo", "keys", "load", "export", "filter", "size", "several", "back", "forward", "around", "same"}
    assert wanted - {"undo"} <= set(reached)  # there is nothing to undo yet, so that button is off
    assert {f"{k + 1}{name}0" for k, name in enumerate(CLASSES)} <= set(reached)
    buttons = "[...document.querySelectorAll('button:not([hidden])')]"
    assert all(page.js(f"{buttons}.map(button => button.ariaLabel || button.textContent.trim())"))
    page.press("?")
    assert page.js("document.querySelector('#help').open")
    page.press("1", "Escape")  # keys do nothing behind the open window
    assert not page.js("document.querySelector('#help').open") and set(kept(page).values()) == {"0000"}
    page.js("document.querySelector('#grid').focus()")
    page.press("ArrowRight", "ArrowDown", modifiers=SHIFT)
    selected = page.js("shown.filter(index => selected.has(index)).length")
    assert selected > 2 and page.js("document.querySelectorAll('[aria-selected=true]').length") == selected
    page.press("1")
    assert page.js("labels.filter(label => label === '1000').length") == selected
    page.press("Escape", "Home", " ", "End", "2")  # End leaves the selection
    assert page.js("labels.at(-1)") == "0100" and page.js("labels[0]") == "1000"
    page.press("a", modifiers=CONTROL)
    page.press("4")
    assert page.js("labels.every(label => label[3] === '1')")
    page.press("z", modifiers=CONTROL)
    page.press("Escape", "Home", ".")
    assert page.js("labels[shown[at]]") == "0000" and page.js("at") == selected  # the next one without a label
    active = page.js("element(grid.getAttribute('aria-activedescendant')).title")
    assert active.startswith(page.js("page.ids[shown[at]]") + ": not yet labelled")


def test_filters_and_counts(plots, browser):
    plots.label(dict(zip(GRID, ["1000", "1100", "0010"] * 4, strict=True)))
    page = plots.open(browser)

    def choose(value):
        show(page, value)
        return page.js("shown.map(index => page.ids[index])")

    assert choose("all") == GRID + ODD
    assert choose("open") == ODD
    assert choose("done") == GRID
    assert choose("with 0") == [id for number, id in enumerate(GRID) if number % 3 < 2]
    assert choose("without 1") == [id for number, id in enumerate(GRID) if number % 3 != 1]
    assert choose("with 3") == [] and page.js("!document.querySelector('#none').hidden")
    page.press("1", "0", "ArrowRight", "Enter", ".")  # nothing to act on
    assert page.js("document.querySelector('#left').textContent") == "12 of 15 labelled, 3 left"
    assert page.js("[...document.querySelectorAll('.number')].map(n => n.textContent)") == ["8", "4", "4", "0"]
    choose("open")
    page.press("4", "1")  # a patch stays until the list is made again, so that it can get a second class
    assert page.js("document.querySelector('#again').textContent") == "Leave out 1 that no longer match"
    page.click("#again")
    assert page.js("shown.map(index => page.ids[index])") == ODD[1:] and kept(page)[ODD[0]] == "1001"
    assert page.complaints() == []


def test_touch(plots, browser):
    page = plots.open(browser, size=(390, 844))
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    assert page.js("document.documentElement.scrollWidth") == 390
    assert page.js("Math.min(...[...document.querySelectorAll('#classes button')].map(b => b.offsetHeight))") >= 40

    def tap(selector):
        x, y = page.centre(selector)
        page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    tap("#cell-1")
    tap("#classes button:nth-child(1)")
    tap("#several")
    tap("#cell-0")
    tap("#cell-2")
    tap("#classes button:nth-child(4)")
    page.until("labels[2] !== '0000'")
    assert page.js("labels.slice(0, 4)") == ["0001", "1000", "0001", "0000"]


# what is kept --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["full", "blocked"])
def test_a_browser_that_keeps_nothing(plots, browser, fault):
    """The work goes on with a warning, and leaves by the export."""
    before = {
        "full": "Storage.prototype.setItem = () => { throw new DOMException('no', 'QuotaExceededError'); }",
        "blocked": "Object.defineProperty(window, 'localStorage', "
        "{get() { throw new DOMException('no', 'SecurityError'); }})",
    }[fault]
    page = plots.open(browser, before=before)
    assert page.js("document.querySelectorAll('.warning').length") == (fault == "blocked")
    page.press("1")
    words = page.js("document.querySelector('.warning').textContent")
    assert "cannot keep your work" in words and ("QuotaExceeded" if fault == "full" else "SecurityError") in words
    assert kept(page)[GRID[0]] == "1000" and page.js("lost")
    page.click("#export")
    assert page.downloaded("image_labels.csv").read_text().splitlines()[1] == f"{GRID[0]},1,0,0,0"
    page.downloaded("image_labels.csv").unlink()
    assert not page.js("lost")  # the page may be closed


def test_work_that_was_kept_is_joined_with_a_page_that_was_written_again(plots, browser):
    """Other labels in the csv, another order of the classes, a patch that has gone and one that is new."""
    page = plots.open(browser)
    page.press("1", "ArrowRight", "2", "ArrowRight", "4")
    reload(page)
    plots.label({GRID[0]: "0010", GRID[1]: "0100", GRID[3]: "0010"})
    (plots.train / "images" / f"{GRID[2]}.png").rename(plots.train / "images" / "new.png")
    lines = DESCRIPTION.splitlines()
    (plots.folder / "dataset.toml").write_text("\n".join(lines[:4] + lines[5:8] + [lines[4]] + lines[8:]))
    page = plots.open(browser)
    found = kept(page)  # the classes are in the order 1 2 3 0 now
    assert [found[id] for id in (GRID[0], GRID[1], GRID[3], "new")] == ["0001", "1000", "0100", "0000"]
    notice = page.js("document.querySelector('.notice').textContent")
    assert notice.startswith("1 patch has other labels in this browser than in image_labels.csv")
    page.click(".notice button")
    assert kept(page)[GRID[0]] == "0100" and page.js("document.querySelector('.notice')") is None
    page.press("z", modifiers=CONTROL)
    assert kept(page)[GRID[0]] == "0001"
    stored = page.js(f"JSON.parse(localStorage.getItem('label_images/{plots.name}')).labels")
    assert stored == {GRID[0]: "0001", GRID[2]: "0010"}  # the patch that has gone is not forgotten


def test_two_tabs_do_not_overwrite_each_other(plots, browser):
    first, second = plots.open(browser), plots.open(browser)
    first.press("1")
    second.until("labels[0] === '1000'")
    second.press("ArrowRight", "2")
    first.until("labels[1] === '0100'")
    first.press("ArrowRight", "ArrowRight", "4")
    assert [kept(first)[id] for id in GRID[:3]] == ["1000", "0100", "0001"]


# csv files ------------------------------------------------------------------------------------------------------------


def test_a_dropped_csv_is_loaded_and_its_slips_are_listed(plots, browser, tmp_path):
    page = plots.open(browser)
    page.press("4")
    file = tmp_path / "by a colleague.csv"
    header = ",".join(["id", "field", f'"{EVIL.replace(chr(34), chr(34) * 2)}"', '"roof, ""old"""', "water"])
    rows = ["1,0,0,0", "0,1,0,0", "yes,0,0,0", "0,0,0,0"]
    lines = [f"{id},{row}" for id, row in zip(GRID, rows, strict=False)] + [f"{GRID[1]},1,1,1,1", "gone,1,0,0,0"]
    file.write_text("\ufeff" + "\r\n".join([header, *lines, ",,,,", f'"{ODD[0]}",0,0,1,1', ""]), newline="")
    page.drop(file)
    page.until("document.querySelectorAll('.notice').length === 1")
    found = kept(page)
    assert [found[id] for id in (*GRID[:4], ODD[0])] == ["1000", "0100", "0000", "0000", "0011"]
    words = page.js("document.querySelector('.notice.warning').textContent")
    assert re.findall(r"^line (\d+): (.{20})", words.replace("Close", ""), re.M) == [
        ("4", "expected an id and 4"),
        ("6", f"{GRID[1]} is l"),
        ("7", "there is no image go"),
    ]
    page.press("z", modifiers=CONTROL)  # dropped by mistake
    assert kept(page)[GRID[0]] == "0001"
    for text, word in ((b"id;field\n", "semicolons"), (b"id,field\n", "line 1"), (b"", "empty"), (b"id,\xe4", "UTF-8")):
        file.write_bytes(text)
        page.drop(file)
        page.until(f"document.querySelector('.notice.warning')?.textContent.includes('{word}')")
    assert kept(page)[GRID[0]] == "0001" and page.js("document.title").startswith("Labels: plots & <script>")
    assert page.complaints() == []


def test_the_page_reads_csv_files_as_the_steps_do(plots, browser, tmp_path):
    """Texts with quotes, line ends, empty columns and slips in random places: the same labels, or refused by both."""
    page, rng, ids = plots.open(browser), np.random.default_rng(0), GRID[:3] + ODD
    texts = []
    for _ in range(300):
        rows = [["id", *rng.permutation(CLASSES)]]
        rows += [[id, *rng.choice(["0", "1", " 1", "0 "], 4)] for id in rng.permutation(ids)[: rng.integers(0, 7)]]
        if rng.random() < 0.3:  # a slip somewhere
            row = rows[rng.integers(len(rows))]
            row[rng.integers(5)] = rng.choice(["", "2", "field", GRID[0], f"{GRID[1]}.png", '"', "0;1"])
        end = rng.choice(["\n", "\r\n"])
        text = ""
        for row in rows:
            bare = [rng.random() < 0.5 and not re.search('[,"]', cell) for cell in row]
            quoted = ['"' + cell.replace('"', '""') + '"' for cell in row]
            text += ",".join(np.where(bare, row, quoted)) + rng.choice(["", ",", ", ,"], p=[0.8, 0.1, 0.1])
            text += end * int(rng.choice([1, 2], p=[0.9, 0.1]))
        texts.append(rng.choice(["", "\ufeff"]) + (text if rng.random() < 0.5 else text.rstrip("\r\n")))
    answers = page.js(f"{json.dumps(texts)}.map(readLabels).map(({{ found, slips }}) => [[...found], slips])")
    refused = 0
    for text, (found, slips) in zip(texts, answers, strict=True):
        (tmp_path / "labels.csv").write_bytes(text.encode())
        try:
            expected = read_image_labels(tmp_path / "labels.csv", CLASSES, GRID + ODD, unfinished=True)
        except UserError as error:
            refused += 1
            assert slips, text
            lines = re.findall(r"line (\d+):", str(error))
            assert re.findall(r"^line (\d+):", "\n".join(slips), re.M) == lines, text
            continue
        assert not slips and dict(found) == bits(expected), text
    assert 20 < refused < 200


# how it shows ---------------------------------------------------------------------------------------------------------


def test_names_are_text_and_nothing_else_may_run(plots, browser):
    page = plots.open(browser)
    assert page.js("document.title").startswith("Labels: plots & <script>")
    assert page.js("[...document.querySelectorAll('.name')].map(each => each.textContent)") == list(CLASSES)
    evil = '\'<img src="images/none.png" onerror="window.evil = 1">\''
    page.js(f"document.body.insertAdjacentHTML('beforeend', {evil})")
    page.js("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.evil = 1' }))")
    page.js("document.body.append(Object.assign(new Image(), { src: 'https://localhost:9/a.png' }))")
    refused = " ".join(page.complaints())
    assert page.js("window.evil") is None and refused.count("Content Security Policy") >= 3, refused
    text = plots.write().read_text()
    assert EVIL not in text and not re.search(r"https?://", text) and text.count("<script") == 2


def test_neighbours_lie_around_the_patch(plots, browser):
    page = plots.open(browser)

    def shown():
        page.until("[...document.querySelectorAll('#view img')].every(image => image.complete && image.naturalWidth)")
        places = page.js("[...document.querySelectorAll('#view img')].map(i => [i.src, i.style.left, i.style.top])")
        return {Path(source).stem: (left, top) for source, left, top in places}

    assert shown() == {
        "north_r000_c000": ("25%", "25%"),
        "north_r000_c001": ("75%", "25%"),
        "north_r001_c000": ("25%", "75%"),
        "north_r001_c001": ("75%", "75%"),
    }
    page.press(*["ArrowRight"] * 5)
    assert len(shown()) == 9 and shown()["north_r000_c000"] == ("-25%", "-25%")
    page.click("#around")
    assert shown() == {"north_r001_c001": ("0%", "0%")}
    page.click("#around")
    page.press("End")  # a version of a patch has no neighbours
    assert shown() == {ODD[-1]: ("0%", "0%")} and page.js("document.querySelector('#around').disabled")
    (plots.folder / "dataset.toml").write_text("stride = 16\n" + DESCRIPTION)
    page = plots.open(browser)
    page.press(*["ArrowRight"] * 5)
    assert shown()["north_r000_c002"] == ("50%", "0%")  # neighbours that overlap lie where they belong


def test_ten_thousand_patches(plots, browser):
    """Only what is visible exists; wherever one scrolls to, the view is full."""
    image = plots.train / "images" / f"{GRID[0]}.png"
    for number in range(10_000):
        os.link(image, plots.train / "images" / f"p_{number:05d}.png")
    page = plots.open(browser)
    assert page.js("shown.length") == 10_015
    covered = """(() => {
      const box = grid.getBoundingClientRect(), inside = [];
      for (let y = box.top + 60; y < box.bottom - 2; y += 60)
        inside.push(Boolean(document.elementFromPoint(box.left + 40, y)?.closest(".cell")));
      return inside.every(Boolean) && inside.length > 5 && document.querySelectorAll("img").length;
    })()"""
    assert 20 < page.js(covered) < 250
    for share in (0.5, 0.9, 0.2, 1, 0.7, 0):
        page.js(f"grid.scrollTop = {share} * grid.scrollHeight")
        page.js("new Promise(requestAnimationFrame)")
        assert 20 < page.js(covered) < 250
        page.until("[...document.querySelectorAll('.cell img')].every(image => image.complete && image.naturalWidth)")
    page.press("End", "1")
    assert page.js("labels.at(-1)") == "1000" and page.js("grid.scrollTop") > 10_000
    page.press("Home", "a")
    page.press("a", modifiers=CONTROL)
    page.press("2")
    assert page.js("labels.filter(label => label[1] === '1').length") == 10_015
    reload(page)
    assert page.js("labels.filter(label => label[1] === '1').length") == 10_015
    assert page.complaints() == []


# review ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reviewed(plots):
    """All labelled as field; the classifier sees water in one patch and no field in another, less surely."""
    plots.label(dict.fromkeys(GRID + ODD, "1000"))
    cams = plots.root / "experiments" / plots.name / "prc" / "cams"
    for id in GRID + ODD[:2]:
        logits = np.array([3.0, -3.0, -3.0, -3.0])
        logits[3] = {GRID[5]: 8.001, GRID[2]: 0.1}.get(id, -3.0)
        logits[0] = -2.0 if id == ODD[0] else 3.0
        save_maps(cams / f"{id}.npz", "cams", np.array([0]), [np.ones((1, 2, 2))], (32, 32), logits)
    record = {"constants": {}, "started": "1", "seconds": 1, "finished": True}
    (cams / "run.json").write_text(json.dumps(record))
    return plots


def test_review(reviewed, browser):
    written = reviewed.write(review="prc")
    assert "[3.0, -3.0, -3.0, 8.0]" in written.read_text()
    page = browser.open(written)
    assert page.js("shown.slice(0, 4).map(index => page.ids[index])") == [GRID[5], ODD[0], GRID[2], GRID[0]]
    assert page.js("page.ids[shown.at(-1)]") == ODD[-1]  # the one of which the classifier has seen nothing
    assert page.js("document.querySelectorAll('.cell .doubtful').length") == 3
    doubt = "document.querySelector('#doubt').hidden ? '' : document.querySelector('#doubt span').textContent"
    assert page.js(doubt) == "The classifier sees water (> 99.9 %). The label does not have it."
    page.press("Enter")
    assert kept(page)[GRID[5]] == "1001" and page.js(doubt) == ""
    page.press("ArrowRight", "Enter")
    assert kept(page)[ODD[0]] == "0000"  # no class is left, so the patch is not labelled now
    page.press("4", "ArrowRight")
    assert page.js(doubt) == "The classifier sees water (52 %). The label does not have it."
    page.press("ArrowRight")
    assert page.js(doubt) == "" and page.js("document.querySelectorAll('.cell .doubtful').length") == 2
    says = page.js("[...document.querySelectorAll('#classes .says')].map(each => each.textContent)")
    assert says == ["classifier 95 %", *["classifier 5 %"] * 3]
    show(page, "doubt")
    assert page.js("shown.map(index => page.ids[index])") == [ODD[0], GRID[2]]
    assert page.complaints() == []


def test_a_review_needs_step_2(plots):
    with pytest.raises(UserError, match=r"cams is missing: run step 2"):
        plots.write(review="prc")


# without a browser ----------------------------------------------------------------------------------------------------


def test_existing_labels_are_loaded_and_faulty_ones_refused(plots, capsys):
    plots.label({GRID[0]: "1000", GRID[1]: "0000"})
    page = plots.write()
    assert "15 patches, 1 of them labelled" in capsys.readouterr().out
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])
    assert data["ids"] == sorted(GRID + ODD) and data["labels"] == ["1000"] + [""] * 14 and data["logits"] is None
    before = page.read_bytes()
    assert plots.write().read_bytes() == before
    plots.csv.write_text(plots.csv.read_text().replace(GRID[0], "gone"))
    with pytest.raises(UserError, match=r"line 2: there is no image"):
        plots.write()
    assert page.read_bytes() == before


def test_process_names_the_page(plots):
    with pytest.raises(UserError, match=rf"label_page\.py --dataset {plots.name}"):
        process.main(process.Constants(dataset=plots.name, root=plots.root, workers=0))
