"""Everything that docs/performance.md says about a GPU, measured on this one in at most eight minutes.

First the tests that need a GPU, then: SAM ViT-H's encoder and mask generation against segment-anything's own, training
steps (plain, ours, compiled), inference of steps 2 and 6; time and memory of each. Weights are random and images
synthetic, so that no file is needed. Each part runs in a process of its own; a part that fails, or for which no time is
left, is listed as not measured, and the other parts go on. The most important parts come first.

Writes gpu.json and gpu.md, a table for docs/performance.md: to docs/, or to the folder `output`. Without a GPU (also
with CUDA_VISIBLE_DEVICES="") the same code runs with tiny sizes ("reduced"), to try the program; then the files go to a
temporary folder, and the figures say nothing about speed.

Command: make gpu, or python benchmarks/gpu.py
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import training as training_benchmark
import tyro
from measure import aerial_patch, measured
from sam_masks import small
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from infer_classification import class_maps
from inference_segmentation import summed_logits
from models.backbone import Backbone
from models.classifier import Classifier
from models.deeplab import DeepLabV3Plus
from PRC_SAM import get_se_map
from PRC_SAM.generator import MaskGenerator
from PRC_SAM.sam_forward import encode_images, relative_positions
from tools.augment import normalise
from tools.command import check
from tools.devices import device_facts, device_name, process_state, set_precision
from tools.files import write_json, write_whole
from tools.inference import at_scales, for_inference, stack_scales
from tools.memory import memory_is_full
from tools.runs import package_versions

SCALES = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Constants:
    output: Path | None = None  # folder of gpu.json and gpu.md; None: docs/ with a GPU, else a temporary folder
    minutes: float = 0  # after which no further part is measured; 0: 8 with a GPU, 60 without
    tests: bool = True  # begin with the tests that need a GPU; they may take half of the minutes


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults on a GPU."""

    reduced: bool = False
    sam: str = "vit_h"
    encoder_batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    generator_batches: tuple[int, ...] = (4, 1, 16)
    generator_images: int = 8
    stock_images: int = 2
    image: int = 512  # side in pixels of SAM's images
    points: int = 32  # along a side
    backbone: str = "resnet50"
    patches: tuple[int, ...] = (256, 512, 128)  # sides in pixels
    batches: tuple[int, int] = (8, 16)  # of steps 1 and 5
    classes: int = 6
    repeats: int = 3


REDUCED = Sizes(
    reduced=True,
    sam="small",
    encoder_batches=(1, 2),
    generator_batches=(2,),
    generator_images=2,
    stock_images=1,
    image=96,
    points=4,
    backbone="resnet18",
    patches=(64,),
    batches=(2, 2),
    classes=3,
    repeats=1,
)


@dataclass(frozen=True)
class Row:
    """One comparison: seconds for each `unit`, memory of the device in MB (on a CPU: growth of the process)."""

    what: str
    setting: str
    unit: str
    plain: tuple[float, float] | None = None  # seconds, MB; None: not measured
    ours: tuple[float, float] | None = None
    note: str = ""


def timed(work: Callable[[], Any], device: torch.device, sizes: Sizes, units: int = 1) -> tuple[float, float] | None:
    """Seconds for each of `units` and peak MB, after one call that does not count; None where it does not fit."""
    try:
        work()
        _, seconds, memory = measured(work, sizes.repeats, device)
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        torch.accelerator.empty_cache()
        return None
    return seconds / units, memory


def fits(*measurements: tuple[float, float] | None) -> str:
    return "" if all(measurements) else "the memory is too small"


@torch.inference_mode()
def random_sam(sizes: Sizes, device: torch.device) -> Sam:
    """SAM with random weights; some of its parameters begin as zeros, which would make all scores equal."""
    torch.manual_seed(0)
    build = small if sizes.sam == "small" else sam_model_registry[sizes.sam]
    with device:
        sam = build()
    for parameter in sam.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return sam.requires_grad_(False)


def encoder(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """SAM's image encoder: its own forward pass in fp32 on one image, as its generator calls it, and ours."""
    sam = random_sam(sizes, device)
    side = sam.image_encoder.img_size
    images = torch.randn(max(sizes.encoder_batches), 3, side, side, device=device)
    with torch.inference_mode():
        set_precision("fp32", device)
        stock = timed(lambda: sam.image_encoder(images[:1]), device, sizes)
        for precision in ("fp32", "bf16"):
            set_precision(precision, device)
            positions = relative_positions(sam.image_encoder, torch.bfloat16 if precision == "bf16" else torch.float32)
            for batch in (1,) if precision == "fp32" else sizes.encoder_batches:

                def ours(batch: int = batch, precision: str = precision, positions: list = positions) -> Tensor:
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                        return encode_images(sam.image_encoder, images[:batch], positions)

                measurement = timed(ours, device, sizes, batch)
                setting = f"{batch} at once, {precision}"
                yield Row(
                    f"SAM {sizes.sam}, image encoder", setting, "image", stock, measurement, fits(stock, measurement)
                )


def generator(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Step 9's masks. The threshold lets a third of the candidates pass, about as many as with trained weights."""
    sam, rng = random_sam(sizes, device), np.random.default_rng(0)
    images = [aerial_patch(rng, sizes.image, 6)[0] for _ in range(sizes.generator_images)]
    open_filters: dict[str, Any] = {"points_per_side": sizes.points, "stability_score_thresh": 0.0}
    set_precision("fp32", device)
    with torch.inference_mode():
        constants = get_se_map.Constants(images_at_once=1, **open_filters)
        probe = MaskGenerator(sam, "fp32", constants)
        _, (crop,) = probe.prepare(images[0])
        embedding = next(probe._encode([crop.pixels]))
        scores = probe.decoder.transform(embedding, probe.tokens(crop.layer, crop.size)[:128])[0]
        settings = open_filters | {"pred_iou_thresh": max(float(scores.quantile(0.67)), 1e-6)}
    stock = SamAutomaticMaskGenerator(sam, **settings)
    compared = images[: sizes.stock_images]
    stock.generate(compared[0])
    _, seconds, memory = measured(lambda: [stock.generate(image) for image in compared], 1, device)
    plain = seconds / len(compared), memory
    for precision in ("bf16", "fp32"):
        set_precision(precision, device)
        for batch in sizes.generator_batches if precision == "bf16" else sizes.generator_batches[:1]:
            constants = get_se_map.Constants(images_at_once=batch, **settings)
            ours = MaskGenerator(sam, precision, constants)
            measurement = timed(partial(ours, images), device, sizes, len(images))
            setting = f"{sizes.image} px, {batch} at once, {precision}"
            yield Row(f"SAM {sizes.sam}, masks (step 9)", setting, "image", plain, measurement, fits(measurement))


def measured_training(
    name: str, ours: bool, size: int, args: training_benchmark.Constants
) -> tuple[float, float] | None:
    """Seconds and MB of a training step in a new process; None where the memory is full."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            seconds, memory, _ = pool.apply(training_benchmark.measure, (name, ours, size, args))
        except RuntimeError as error:
            if not memory_is_full(error):
                raise
            return None
    return seconds, memory


def training(sizes: Sizes, device: torch.device, name: str, size: int, compile: bool) -> Iterator[Row]:
    """A training step at the paper's batch: plain and ours, or ours and ours compiled."""
    args = training_benchmark.Constants(
        backbone=sizes.backbone, num_classes=sizes.classes, batch_sizes=sizes.batches, steps=3 * sizes.repeats
    )
    first = measured_training(name, compile, size, args)
    second = measured_training(name, True, size, replace(args, compile=compile))
    what = f"training step, {name} (step {5 if name == 'segmentation' else 1})"
    setting = f"{sizes.batches[name == 'segmentation']} x {size} px" + (", compiled against not" if compile else "")
    yield Row(what, setting, "step", first, second, fits(first, second))


def micro_batches(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Step 5 at its largest patches: the whole batch at once, and in halves."""
    batch, size = sizes.batches[1], max(sizes.patches)
    args = training_benchmark.Constants(
        backbone=sizes.backbone, num_classes=sizes.classes, batch_sizes=sizes.batches, steps=sizes.repeats
    )
    at_once = measured_training("segmentation", True, size, args)
    halves = measured_training("segmentation", True, size, replace(args, micro_batch=max(1, batch // 2)))
    setting = f"{batch} x {size} px, {batch // 2} at once against all"
    yield Row("step 5, micro-batches", setting, "step", at_once, halves, fits(at_once, halves))


@torch.no_grad()
def inference(sizes: Sizes, device: torch.device, name: str, size: int) -> Iterator[Row]:
    """Step 2's maps or step 6's logits: one image, scale and mirror at a time in fp32, and ours, 8 images at once."""
    torch.manual_seed(0)
    backbone = Backbone(sizes.backbone, "none")
    model: nn.Module
    if name == "CAMs":
        model = Classifier(backbone, sizes.classes, gamma=0.7, iterations=1, train_all=False)
    else:
        model = DeepLabV3Plus(backbone, sizes.classes, width=256, freeze_norm=True)
    model = model.to(device).eval()
    images = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8)

    def predict(x: Tensor) -> Tensor:
        return model(x)[1].relu() if name == "CAMs" else model(x)

    def plain() -> None:
        for image in images[: 8 if device.type == "cuda" else 1]:
            for scale in SCALES:
                x = normalise(nn.functional.interpolate(image[None].float(), scale_factor=scale).byte().to(device))
                for mirrored in (x, x.flip(-1)):
                    predict(mirrored).cpu()

    scaled = stack_scales([at_scales(image.permute(1, 2, 0).numpy(), SCALES) for image in images])

    def ours(bf16: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if name == "CAMs":
                outputs = class_maps(model, scaled, device)
            else:
                outputs = summed_logits(model, scaled, (size, size), device)
        for output in outputs:
            output.cpu()

    set_precision("fp32", device)
    first = timed(plain, device, sizes, 8 if device.type == "cuda" else 1)
    model = for_inference(model, device)
    for precision in ("bf16", "fp32"):
        set_precision(precision, device)
        measurement = timed(partial(ours, precision == "bf16"), device, sizes, len(images))
        step = "step 2, CAMs" if name == "CAMs" else "step 6, segmentation"
        yield Row(step, f"{size} px, 8 at once, {precision}", "image", first, measurement, fits(first, measurement))


def parts(sizes: Sizes, device: torch.device) -> dict[str, partial]:
    """Name -> what yields rows, the most important first."""
    work_of = {
        "SAM encoder": partial(encoder, sizes, device),
        "SAM masks": partial(generator, sizes, device),
    }
    for size in sizes.patches:
        for name in ("classification", "segmentation"):
            work_of[f"{name} {size} px"] = partial(training, sizes, device, name, size, False)
    work_of["micro-batches"] = partial(micro_batches, sizes, device)
    for size in sizes.patches:
        for name in ("CAMs", "segmentation"):
            work_of[f"inference, {name} {size} px"] = partial(inference, sizes, device, name, size)
    for size in sizes.patches:
        for name in ("classification", "segmentation"):
            work_of[f"compiled {name} {size} px"] = partial(training, sizes, device, name, size, True)
    return work_of


def serve(work: Callable[[], Iterator[Row]], connection: Connection) -> None:
    """In a process of its own: send each row, and at the end a sentence, empty where all went well."""
    try:
        for row in work():
            connection.send(row)
        connection.send("")
    except Exception as error:  # whatever it is, the other parts go on
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])


def rows_of(work: Callable[[], Iterator[Row]], end: float) -> Iterator[Row | str]:
    """The rows of a part, and a sentence where it failed or the clock reached `end`."""
    if time.monotonic() >= end:
        yield "no time was left"
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(work, sender))  # not a daemon: it starts processes itself
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            item = receiver.recv()
            if item == "":
                return
            yield item
            if isinstance(item, str):
                return
        yield "no time was left"
    except EOFError:
        yield f"its process ended with code {process.exitcode}"
    finally:
        process.join(5)
        if process.pid:
            end_processes(process.pid)
        process.join()


def end_processes(pid: int) -> None:
    """Kill a process and all processes that it has started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def run_tests(device: torch.device, seconds: float) -> str:
    """The tests of a GPU that failed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = os.environ | {"PRC_TEST_DEVICE": str(device)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            end_processes(process.pid)
            return f"the tests took longer than {seconds:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    return "; ".join([line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))] + lines[-1:])


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    seconds = [
        f"{1000 * pair[0]:.1f} ms a{'n' if row['unit'] == 'image' else ''} {row['unit']}" if pair else "–"
        for pair in (row["plain"], row["ours"])
    ]
    memory = [f"{max(pair[1], 0) / 1000:.2f} GB" if pair else "–" for pair in (row["plain"], row["ours"])]
    ratio = f"{row['plain'][0] / max(row['ours'][0], 1e-9):.2f}" if row["plain"] and row["ours"] else "–"
    return "| " + " | ".join([row["what"], row["setting"], *seconds, ratio, *memory, row["note"]]) + " |"


def table(result: dict[str, Any]) -> str:
    """Markdown for docs/performance.md."""
    facts = result["device"]
    title = f"{facts['name']}; {', '.join(f'{key} {value}' for key, value in facts.items() if key != 'name')}"
    lines = [
        "Reduced sizes, to try the program: these figures say nothing about speed.\n" if result["reduced"] else "",
        f"`make gpu` on {title}; torch {result['packages']['torch']}; {result['date']}; tests: {result['tests']}.",
        "",
        "| what | setting | plain way | ours | ratio | memory, plain | memory, ours | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in result["rows"]]
    if result["left_out"]:
        lines += ["", "Not measured:", *(f"- {name}: {reason}" for name, reason in result["left_out"].items())]
    return "\n".join(lines).strip() + "\n"


def main(args: Constants) -> None:
    start = time.monotonic()
    device = process_state().device
    sizes = Sizes() if device.type == "cuda" else REDUCED
    check(args.minutes >= 0, f"minutes is {args.minutes}, but it must be at least 0")
    end = start + 60 * (args.minutes or (60 if sizes.reduced else 8))
    output = args.output or (Path(tempfile.mkdtemp(prefix="gpu")) if sizes.reduced else ROOT / "docs")
    print(
        f"{device_name(device)} ({device})" + ("; no GPU: tiny sizes, to try this program" if sizes.reduced else ""),
        flush=True,
    )
    result: dict[str, Any] = {
        "reduced": sizes.reduced,
        "device": device_facts(device),
        "packages": package_versions(),
        "date": time.strftime("%Y-%m-%d"),
        "tests": run_tests(device, (end - time.monotonic()) / 2) if args.tests else "not run",
        "rows": [],
        "left_out": {},
        "seconds": 0.0,
    }
    print(f"tests: {result['tests']}", flush=True)
    for name, work in parts(sizes, device).items():
        begin = time.monotonic()
        for item in rows_of(work, end):
            if isinstance(item, str):
                result["left_out"][name] = item
                print(f"{name}: {item}", flush=True)
            else:
                result["rows"].append(asdict(item))
                print(line(asdict(item)), flush=True)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    result["seconds"] = round(time.monotonic() - start, 1)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "gpu.json", result)
    with write_whole(output / "gpu.md") as temporary:
        temporary.write_text(table(result), encoding="utf-8")
    print(table(result))
    print(f"written to {output / 'gpu.json'} and {output / 'gpu.md'} after {result['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Constants, description=__doc__))
