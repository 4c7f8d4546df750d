"""What the documents promise can be looked up: tests, files, headings."""

import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tests_that_the_documents_name_exist():
    named = [
        match
        for page in PAGES
        for match in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 50
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"\ndef {test}(" in source, f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    for place, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / place if place else page
        assert target.exists(), place
        if heading:
            assert heading in headings(target.read_text(encoding="utf-8")), f"{place}#{heading}"


def headings(text: str) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rows_of_a_table_have_its_columns(page):
    """An empty line inside a table, or a | that is not escaped, breaks it."""
    rows = page.read_text(encoding="utf-8").split("\n")
    for number, row in enumerate(rows):
        if not row.startswith("|"):
            continue
        above = rows[number - 1] if number else ""
        cells = len(re.findall(r"(?<!\\)\|", row))
        if above.startswith("|"):
            assert cells == len(re.findall(r"(?<!\\)\|", above)), row
        else:
            assert re.fullmatch(r"\|(?:-+\|)+", rows[number + 1]), f"a table without a head: {row}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_of_the_project_that_a_page_names_exist(page):
    folders = "models|tools|report|tables|PRC_SAM|datasetsprocess|benchmarks"
    for file in re.findall(rf"\b((?:{folders})/[\w/]+\.(?:py|j2|toml))\b", page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("models/prc.py", "        self.projection.requires_grad_(iterations > 0)\n"),
        ("models/prc.py", "similarity = similarity * (similarity >= self.gamma)\n"),
        ("train_classification.py", "            training.log(average_precision="),
        ("models/backbone.py", "        else:\n            stem ="),
        ("tests/test_models.py", "CHANNELS = {"),
        ("train_segmentation.py", "                training.backward(summed / labelled)\n"),
        ("PRC_SAM/refine.py", "def _small_on_top(label: np.ndarray, masks: Masks, classes: Sequence[int], evidence"),
        ("PRC_SAM/refine.py", "def _overlaps(label: np.ndarray, masks: Masks, classes: Sequence[int])"),
        ("make_pseudo_labels.py", '    save_label(output / f"{id}.png", classes[maps.argmax(0)]'),
        ("report/score_tables.py", '        Column("mean F1", "mean_f1"),\n'),
        ("tools/scores.py", "_ratio(hit, support)"),
    ],
)
def test_the_code_that_the_changes_to_the_method_replace_exists(file, text):
    assert (ROOT / file).read_text(encoding="utf-8").count(text) == 1
