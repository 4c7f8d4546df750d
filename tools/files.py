"""Files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` in one move, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # a full disk does not say which file it refused
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "**/.*.tmp*") -> None:
    """Remove the files that a killed run was writing in a folder."""
    for leftover in folder.glob(pattern):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all; what json does not know is written as its text."""
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
