"""What the documents promise can be looked up."""

import re

from tests.conftest import ROOT


def test_the_tests_that_the_documents_name_exist():
    named = [
        match
        for file in sorted((ROOT / "docs").glob("*.md"))
        for match in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", file.read_text(encoding="utf-8"))
    ]
    assert len(named) > 50
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"\ndef {test}(" in source, f"{file}::{test}"
