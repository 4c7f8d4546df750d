"""What the benchmarks share: the time and memory of a piece of work, and pictures to work on. Runs nothing."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch


def measured(work: Callable, repeats: int = 1, device: str | torch.device = "cpu") -> tuple[Any, float, float]:
    """Result, seconds of the fastest run, and the peak of memory in MB.

    On a CPU the seconds are those that this process computes, all its threads together: what else runs on the machine
    takes none of them. On a GPU they are the clock's. The memory is what is allocated on a GPU, else what the process
    grew by (Linux; elsewhere not a number); a process reuses what it once freed, so that a figure that counts wants a
    new one.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # forgets the peak so far
    before, seconds = memory_mb("VmRSS"), []
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(repeats):
        start = clock()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    memory = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else memory_mb("VmHWM") - before
    return result, min(seconds), memory


def memory_mb(line: str) -> float:
    """Of this process: line "VmRSS" for what it holds now, "VmHWM" for its peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split(line + ":")[1].split()[0]) * 1024 / 1e6


def aerial_patch(
    random: np.random.Generator, size: int, classes: int, coarse: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Image (S,S,3) uint8 and class ids (S,S) uint8: textured blobs, about `coarse` a side, a colour a class."""
    fields = [
        cv2.resize(random.standard_normal((coarse, coarse), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        for _ in range(classes)
    ]
    ids = np.argmax(fields, 0).astype(np.uint8)
    colours = np.random.default_rng(0).integers(40, 215, (classes, 3))
    texture = cv2.GaussianBlur(random.standard_normal((size, size, 3), np.float32), (0, 0), 1.5)
    return np.clip(colours[ids] + 40 * texture, 0, 255).astype(np.uint8), ids
