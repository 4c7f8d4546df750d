"""Files that appear whole or not at all, and JSON that is checked when it is read back."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tools.command import UserError
from tools.validation import first_error

Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` in one move, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # a full disk does not name the refused file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "**/.*.tmp*") -> None:
    """Remove the temporary files that a killed run left in a folder."""
    for leftover in folder.glob(pattern):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; values that JSON does not know are written as text."""
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: Path, model: type[Model], remedy: str = "delete it and run the step that writes it again") -> Model:
    """The content of a JSON file, checked against a pydantic model.

    Raises FileNotFoundError, and `UserError` for any other content, however broken.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_error(error)}): {remedy}") from None
