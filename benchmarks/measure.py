"""Shared by the benchmarks: the time and memory of a piece of work, and synthetic images."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch


def measured(work: Callable, repeats: int = 1, device: str | torch.device = "cpu") -> tuple[Any, float, float]:
    """Result of `work`, seconds of the fastest of `repeats` runs, and peak memory in MB.

    On a CPU the seconds are the CPU time of this process, summed over its threads: other programs on the machine do not
    count. On a GPU they are the time on the clock. The memory is what is allocated on a GPU, otherwise the growth of
    the process (on Linux; elsewhere NaN). A process reuses memory that it has freed: measure memory in a new process.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # resets the peak
    before, seconds = memory_mb("VmRSS"), []
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    memory = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else memory_mb("VmHWM") - before
    return result, min(seconds), memory


def memory_mb(line: str) -> float:
    """Memory of this process: "VmRSS" for the present, "VmHWM" for the peak; NaN where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split(line + ":")[1].split()[0]) * 1024 / 1e6


def aerial_patch(
    random: np.random.Generator, size: int, classes: int, coarse: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Image (S,S,3) uint8 and class ids (S,S) uint8: textured blobs, about `coarse` along a side; a class, a colour."""
    fields = [
        cv2.resize(random.standard_normal((coarse, coarse), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        for _ in range(classes)
    ]
    ids = np.argmax(fields, 0).astype(np.uint8)
    colours = np.random.default_rng(0).integers(40, 215, (classes, 3))
    texture = cv2.GaussianBlur(random.standard_normal((size, size, 3), np.float32), (0, 0), 1.5)
    return np.clip(colours[ids] + 40 * texture, 0, 255).astype(np.uint8), ids
