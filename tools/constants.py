"""The constants at the top of each script: typed, checked when the script starts, and shown by --help."""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from tools.command import UserError
from tools.validation import expectation

ROOT = Path(__file__).resolve().parents[1]
# the cores that this process may use: torch's DataLoader warns of more worker processes
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(4, CORES)

T = TypeVar("T")
_MAY_CHANGE = object()
MayChange = Annotated[T, _MAY_CHANGE]  # may differ between runs of one folder: it affects speed or place, not results

Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Affinity = Annotated[float, Field(ge=0, le=0.999)]  # above 0.999 even the diagonal of PRC's affinity would be cut
Momentum = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Scales = Annotated[tuple[Positive, ...], Field(min_length=1)]
Width = Annotated[int, Field(ge=4, multiple_of=4)]  # of GroupNorm(4)
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def checked_constants(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass whose values, the defaults included, are checked against their types.

    Raises `UserError` that names the constant, its value and what was expected.
    """
    config = ConfigDict(validate_default=True, extra="forbid", revalidate_instances="always")
    checked: Any = checked_dataclass(frozen=True, kw_only=True, config=config)(cls)
    create = checked.__init__

    def __init__(self, **values):
        try:
            create(self, **values)
        except ValidationError as error:
            raise UserError(_sentence(error)) from None

    checked.__init__ = __init__
    return checked


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = next((part for part in reversed(first["loc"]) if isinstance(part, str) and part.isidentifier()), "?")
    return (
        f"{name} is {first['input']!r}, but {expectation(first)}: change the constant at the top of the script, "
        f"or --{name.replace('_', '-')}"
    )


@checked_constants
class Place:
    """What every script has."""

    root: MayChange[Path] = ROOT  # the folder that holds datasets/ and experiments/
    overwrite: MayChange[bool] = False  # replace results that were made with other constants
    workers: MayChange[Count] = WORKERS  # worker processes; 0: work in the main process


@checked_constants
class Machine(Place):
    """What every step has."""

    samples: MayChange[Count] = 8  # patches on the contact sheet
    device: MayChange[Device] = "auto"  # auto | cpu | cuda | cuda:1 | mps


def may_change(args: Any) -> set[str]:
    """Names of the constants marked `MayChange`."""
    hints = get_type_hints(type(args), include_extras=True)
    return {name for name, hint in hints.items() if _MAY_CHANGE in getattr(hint, "__metadata__", ())}
