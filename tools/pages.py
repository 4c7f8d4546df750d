"""HTML pages from jinja2 templates: every value is escaped, and a missing one is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def page_template(file: Path, **filters: Callable[..., Any]) -> Template:
    """The template in a file; `filters` are functions that it may call by name."""
    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= filters
    return environment.get_template(file.name)
