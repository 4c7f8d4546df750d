"""Reading files of tensors: checkpoints of the trainings, weights of backbones and of SAM."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.command import UserError, check


def read_tensors(path: Path, remedy: str) -> Any:
    """The content of a file of torch.save: tensors on the CPU, numbers and texts in dictionaries and lists.

    Each tensor owns its memory. A file that holds anything else is not unpickled, so that no file can run code.
    Raises `UserError` that names the file and ends with `remedy`: missing, damaged, or other content than tensors.
    """
    check(path.exists(), f"{path} is missing: {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return _owned(content, path.stat().st_size)
    except pickle.UnpicklingError:  # whose own words advise to unpickle the file all the same
        reason = "it is damaged, or holds more than tensors, numbers and texts"
    except Exception as error:  # torch has no common class for damaged and hostile files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    raise UserError(f"{path} cannot be read as a checkpoint of tensors ({reason}): {remedy}")


def _owned(content: Any, size: int) -> Any:
    """The same content, where no tensor is a view: fused optimisers crash on zeros(1).expand(shape).

    size: bytes of the file, more than which no tensor may declare.
    """
    if isinstance(content, Tensor):
        if content.nbytes > size:
            raise ValueError(f"a tensor declares {content.nbytes} bytes, more than the file has")
        return content.detach().clone()
    if isinstance(content, dict):
        for name, value in content.items():
            content[name] = _owned(value, size)
    if isinstance(content, list):
        content[:] = [_owned(value, size) for value in content]
    if isinstance(content, tuple):
        return tuple(_owned(value, size) for value in content)
    return content
