"""Pydantic's validation errors in plain words: for the constants, dataset.toml, JSON files and SAM checkpoints."""

import re
from typing import Any

from pydantic import ValidationError

EXPECTED = {  # pydantic's name of an error -> what was expected, filled in with the limit
    "greater_than_equal": "be at least {ge:g}",
    "greater_than": "be above {gt:g}",
    "less_than_equal": "be at most {le:g}",
    "less_than": "be below {lt:g}",
    "finite_number": "be a finite number",
    "int_parsing": "be a whole number",
    "int_type": "be a whole number",
    "int_from_float": "be a whole number",
    "float_parsing": "be a number",
    "float_type": "be a number",
    "bool_parsing": "be True or False",
    "bool_type": "be True or False",
    "string_type": "be text in quotation marks",
    "path_type": "be a path in quotation marks",
    "tuple_type": "be several values in parentheses",
    "list_type": "be a list in [ ]",
    "dict_type": "be a table",
    "model_type": "be a table",
    "literal_error": "be {expected}",
    "multiple_of": "be a multiple of {multiple_of}",
    "string_pattern_mismatch": "be of the form {pattern}",
}


def expectation(error: Any) -> str:
    """What one entry of `ValidationError.errors()` asks for: "it must be at least 1"."""
    if error["type"] == "too_short":
        count = error["ctx"]["min_length"]
        return f"it must hold at least {count} value{'s' if count > 1 else ''}"
    if error["type"] in EXPECTED:
        return f"it must {EXPECTED[error['type']].format(**error.get('ctx', {}))}"
    message = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    return re.sub("^(Input|List|Tuple|Dictionary|Value) should", "it must", message)


def place(parts: Any) -> str:
    """Where an error is: ("classes", 2, "name") becomes "classes[2].name"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def first_error(error: ValidationError) -> str:
    """The first error as "<place>: <what was expected>", of at most 120 characters after the place."""
    first = error.errors()[0]
    where = place(first["loc"])
    return (f"{where}: " if where else "") + expectation(first)[:120]
