"""Where a step computes and in what precision: one GPU, one CPU, or several processes with one GPU each."""

import os
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from tools.command import UserError, check, explain

# torch ends a process that waits longer for another one. Its default of ten minutes is less than a download takes.
PATIENCE = timedelta(days=1)
REMEDY = (
    "update the driver or install the torch wheel that fits it (https://pytorch.org/get-started/locally), "
    "or add --device cpu to compute on the CPU"
)


def make_accelerator(precision: str = "auto", device: str = "auto", bf16_on_cpu: bool = True) -> Accelerator:
    """Accelerate's device, processes and autocast for `precision` and `device` as in `process_state`.

    BatchNorm's statistics are not copied from the first process to the others before each step: the statistics are
    frozen, or synchronised (`SyncBatchNorm`), or, on CPUs, saved by the first process alone.
    """
    state = process_state(device)
    precision = set_precision(precision, state.device, bf16_on_cpu)
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=state.device.type == "cpu",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )


def process_state(device: str = "auto") -> PartialState:
    """Accelerate's `PartialState`: the number of this process among all processes, and its device.

    device: "auto" (a CUDA GPU, else the CPU), "cpu", "cuda", "cuda:<number>" or "mps" (Apple). Under torchrun each
    process takes the GPU of its number on the machine. Raises `UserError` where the device is missing or unusable, and
    for "auto" where torch was built for CUDA and the machine has an NVIDIA GPU that torch cannot use: a training must
    not run on the CPU unnoticed. Where nothing shows an NVIDIA GPU, "auto" is the CPU, and `start_line` says so: the
    torch that pip installs on Linux is built for CUDA on every machine.
    """
    kind, _, number = device.partition(":")
    if kind == "auto":
        cuda = torch.cuda.is_available() or (torch.version.cuda and signs_of_a_gpu())
        kind = "cuda" if cuda else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(_no_gpu(device))
    if number:
        gpus = torch.cuda.device_count()
        check(
            int(number) < gpus,
            f"device is {device}, but the GPUs of this machine are cuda:0 to cuda:{gpus - 1}",
        )
        check(
            int(os.environ.get("WORLD_SIZE", 1)) == 1,
            f"device is {device}, but several processes need a GPU each: use --device cuda, and choose the GPUs with "
            "CUDA_VISIBLE_DEVICES",
        )
    if kind == "mps":
        check(
            torch.backends.mps.is_available(),
            "device is mps, but this torch finds no Apple GPU: use --device auto or --device cpu",
        )
    # Without cpu=True every CPU process would do all the work
    state = PartialState(cpu=kind == "cpu", timeout=PATIENCE)
    if number:
        state.device = torch.device(device)
        torch.cuda.set_device(state.device)
    if state.device.type != "cpu":
        _try_out(state.device)
    return state


def set_precision(precision: str, device: torch.device, bf16_on_cpu: bool = True) -> str:
    """Set torch up for a precision and return it; "auto" is bf16 on a GPU or CPU that computes in it, else fp32.

    CPUs with AMX or avx512_bf16 instructions train at least 1.6 times as fast in bf16. SAM is the exception
    (`bf16_on_cpu=False`): even with AMX its masks take 1.4 times as long in bf16 as in fp32. fp32 means that no GPU
    rounds to TF32, which torch's default allows in convolutions.
    """
    if precision == "auto":
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" and bf16_on_cpu else {}
        bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if bf16 else "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("highest")
    return precision


def device_facts(device: torch.device) -> dict:
    """What run.json says about the device: its name, and on a GPU memory, driver, CUDA, cuDNN and TF32."""
    facts = {"device": str(device), "name": device_name(device)}
    if device.type != "cuda":
        return facts | {"threads": torch.get_num_threads()}
    properties, gpus = torch.cuda.get_device_properties(device), nvidia_gpus()
    return facts | {
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"sm_{properties.major}{properties.minor}",
        "driver": gpus[0].rpartition(", ")[2] if gpus else "unknown",
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": str(torch.backends.cudnn.version()),
        "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_in_products": torch.get_float32_matmul_precision() != "highest",
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU's type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return torch.cpu.get_capabilities().get("cpu_name") or "CPU"


def start_line(state: PartialState | Accelerator, precision: str = "", device: str = "auto") -> str:
    """The first line of every step: device, precision and processes; and why, where "auto" found no GPU.

    precision: empty for a step that does no floating-point work on the device; device: the constant.
    """
    facts = [str(state.device)]
    if state.device.type == "cuda":
        facts.append(f"{torch.cuda.get_device_properties(state.device).total_memory / 2**30:.0f} GiB")
    if state.device.type == "cpu":
        facts.append(f"{torch.get_num_threads()} threads")
    line = f"device: {device_name(state.device)} ({', '.join(facts)})"
    if precision:
        line += f"; precision: {precision}"
    if state.num_processes > 1:
        line += f"; {state.num_processes} processes"
    if state.device.type == "cpu" and device == "auto":
        line += "; no GPU was found" if _built_for() else "; this torch is built for the CPU alone"
    return line


def signs_of_a_gpu() -> str:
    """What shows that this machine has an NVIDIA GPU, whether torch can use it or not; empty where nothing does.

    CUDA_VISIBLE_DEVICES that names no GPU (empty, -1, NoDevFiles) hides all of them, and so no sign counts.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip()):
        return ""
    if gpus := nvidia_gpus():
        return f"nvidia-smi lists {gpus[0].replace(', ', ' with driver ')}"
    if files := sorted(Path("/dev").glob("nvidia[0-9]*")):
        return f"{files[0]} exists"
    return f'CUDA_VISIBLE_DEVICES is "{visible}"' if visible else ""


def nvidia_gpus() -> list[str]:
    """ "name, driver version" of each GPU that the NVIDIA driver knows."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    try:
        answer = subprocess.run(
            [program, "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in answer.stdout.splitlines() if ", " in line]


def _no_gpu(device: str) -> str:
    """Why torch finds no CUDA GPU, as a sentence for `UserError`."""
    try:
        torch.cuda.init()
        reason = "torch counts no GPU"
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = _first_sentence(error)
    if signs := signs_of_a_gpu():
        reason += f" ({signs})"
    built = f"built for {_built_for() or 'the CPU alone'}"
    return f"device is {device}, but torch {torch.__version__} ({built}) cannot use a GPU: {reason}; {REMEDY}"


def _built_for() -> str:
    """The GPUs that this torch was built for; empty for none."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else ""


def _try_out(device: torch.device) -> None:
    """One small sum: a GPU that is busy, or that this torch has no code for, fails here and not after minutes."""
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        reason = explain(error) or f"{_first_sentence(error)}; {REMEDY}"
        raise UserError(f"the GPU {device} ({device_name(device)}) cannot be used: {reason}") from None


def _first_sentence(error: BaseException) -> str:
    """torch's own words without what follows in further lines and sentences."""
    return re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0].rstrip(".")
