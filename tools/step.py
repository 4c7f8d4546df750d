"""What the steps have in common: data set, what is read, device, output folder, contact sheet, closing lines."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from tools.command import UserError, check
from tools.dataset import load_dataset
from tools.folders import StepFolder
from tools.labels import load_image, load_label
from tools.pictures import colourise, contact_sheet, heat, sample_ids
from tools.result_checks import check_shares, patch_shares, pixel_shares
from tools.runs import Run, read_run
from tools.steps import SCENES, STEPS, next_step, step_of

Row = Callable[[str], Sequence[np.ndarray | None]]  # patch id -> the pictures of one row of a contact sheet


def experiment_folder(root: Path, dataset: str, experiment: str) -> Path:
    """<root>/experiments/<dataset>/<experiment>; raises `UserError` for a name that would leave that folder."""
    fits = experiment.replace("-", "").replace(".", "").replace("_", "").isalnum()
    check(
        fits,
        f'experiment is "{experiment}", but a name needs letters or digits; only "_", "-" and "." are allowed besides',
    )
    return Path(root) / "experiments" / dataset / experiment


def require(folder: Path, args: Any, unfinished: bool = False, **others: str) -> Run:
    """The run.json of the step that made a folder, finished except where `unfinished` is allowed.

    Raises `UserError` with the command to run, which repeats the data set, experiment and root of `args`; `others`
    replaces some of them.
    """
    step = step_of(folder)
    maker = step.hint(args, **others) if step else "the step that makes it"
    check(folder.is_dir(), f"{folder} is missing: run {maker}{_near(folder)}")
    try:
        run = read_run(folder, f"run {maker} --overwrite")
    except FileNotFoundError:
        raise UserError(f"{folder} has no run.json: run {maker} --overwrite") from None
    check(run.finished or unfinished, f"{folder} is not finished: run {maker} again, it continues where it stopped")
    return run


def _near(folder: Path) -> str:
    """The user's other experiments, where the one of `folder` does not exist."""
    experiment = folder.parent
    if experiment.is_dir() or not experiment.parent.is_dir() or folder.name not in STEPS or folder.name == "sam_masks":
        return ""
    others = sorted(path.name for path in experiment.parent.iterdir() if path.is_dir())
    return f"; the experiments of this data set are {', '.join(others)}" if others else ""


class Step(StepFolder):
    """One run of a step. Creating it loads the data set, finds what is read and prints the device;
    `output` opens the folder that is written.

    name: a folder of the table in tools/steps.py. reads: the folders that are read, in place of
    the table's; a constant of such a name (`cams = "other"`) names the experiment to read it from.
    With `image_labels` the image-level labels of the split are read. split: for a step without an
    experiment. precision and bf16_on_cpu: see `tools.devices.set_precision`; an empty precision
    is for a step without floating-point work on the device.

    Attributes: `args`, `dataset`, `split`; `experiment`, the folder of the experiment; `reads`,
    name -> folder that is read; `run_of`, name -> its `Run`; `image_labels`, id -> (K,) bool, if asked for;
    `notes`, facts that later tables must show; `hardware`, further facts on the device;
    `accelerator`, `device`, `precision`; `path`, the output folder.
    """

    args: Any

    def __init__(
        self,
        name: str,
        args: Any,
        *,
        reads: Sequence[str] | None = None,
        image_labels: bool = False,
        split: str = "",
        precision: str | None = None,
        bf16_on_cpu: bool = True,
    ):
        self.info = SCENES if name == SCENES.folder else STEPS[name]
        self.dataset = load_dataset(args.dataset, args.root)
        self.split: str = split or getattr(args, "split", self.info.split or "train")
        if name == "sam_masks":
            path = self.dataset.sam_masks(self.split)
        else:
            self.experiment = experiment_folder(args.root, args.dataset, args.experiment)
            path = self.experiment / self.info.folder_of(self.split)
        super().__init__(path, args)
        self.reads: dict[str, Path] = {}
        self.run_of: dict[str, Run] = {}
        self.notes: dict[str, Any] = {}
        self.hardware: dict[str, Any] = {}
        for source in self.info.reads if reads is None else reads:
            self.reads[source] = self._folder_of(source)
            folder = self.reads[source]
            self.run_of[source] = require(folder, args, experiment=folder.parent.name, split=self._other_split(folder))
            self.notes |= self.run_of[source].notes
        self._read_from = {source: run.started for source, run in self.run_of.items()}
        if image_labels:
            self.image_labels = self.dataset.image_labels(self.split)
            self._read_from["image_labels"] = self.dataset.image_labels_hash(self.split)
        self._settings: dict[str, Any] = {"split": split} if split else {}
        self._origins: dict[str, str] = {}
        self._find_device(getattr(args, "precision", "") if precision is None else precision, bf16_on_cpu, split)

    def _folder_of(self, name: str) -> Path:
        if name == "sam_masks":
            return self.dataset.sam_masks(self.split)
        other = getattr(self.args, name, "")
        experiment = experiment_folder(self.args.root, self.dataset.name, other) if other else self.experiment
        return experiment / (STEPS[name].folder_of(self.split) if name in STEPS else name)

    def _other_split(self, folder: Path) -> str:
        """The split of a folder whose step makes the other one by default; else nothing."""
        return "" if folder.name in STEPS else self.split

    def _find_device(self, precision: str, bf16_on_cpu: bool, split: str) -> None:
        """Device, precision and processes, printed before anything is downloaded or computed."""
        from tools.devices import make_accelerator, process_state, start_line  # here: torch takes seconds

        self.precision = ""
        # without a precision `accelerator` is only the state of the processes, without autocast
        self.accelerator: Any = (
            make_accelerator(precision, self.args.device, bf16_on_cpu) if precision else process_state(self.args.device)
        )
        self.state = self.accelerator
        if precision:  # a folder is continued in the same precision only, on whatever device
            bf16 = self.accelerator.mixed_precision == "bf16"
            self.precision = self._settings["precision"] = "bf16" if bf16 else "fp32"
        self.device = self.accelerator.device
        if self.is_main:
            title = "scenes" if self.info is SCENES else f"step {self.info.number}"
            part = f", {split} split" if split else ""
            print(f"{title}{part}, {start_line(self.accelerator, self.precision, self.args.device)}", flush=True)

    def method_value(self, name: str, key: str = "") -> float:
        """The constant `name`; where it is None, the data set's value in [method], there called `key`.

        run.json records the value and where it comes from.
        """
        value, self._origins[name] = self.dataset.method_value(key or name, getattr(self.args, name))
        self._settings[name] = value
        return value

    @cached_property
    def ids(self) -> list[str]:
        """The patches of the split."""
        return self.dataset.ids(self.split)

    @contextmanager
    def output(self, suffix: str, last: bool = True) -> Iterator[Self]:
        """Open the output folder as `StepFolder.open` does; say at the end what was made and, if this is the script's
        last folder, what comes next.
        """
        from tools.devices import device_facts

        begin = time.monotonic()
        with self.open(
            suffix,
            reads=self._read_from,
            notes=self.notes,
            settings=self._settings,
            facts={"origins": self._origins, "hardware": device_facts(self.device) | self.hardware},
        ):
            yield self
        if self.is_main:
            print(f"made: {self.path}, {self.run.files} files, {time.monotonic() - begin:.0f} s")
            print(f"look at: {self.path / 'contact_sheet.png'}")
            if last and (following := next_step(self.info)):
                split = self._other_split(self.path) if following.split else ""
                print(f"next: {following.command(self.args, split=split)}")

    def image(self, id: str) -> np.ndarray:
        """The patch (H,W,3) uint8."""
        return load_image(self.dataset.images(self.split) / f"{id}.png")

    def warn_of_labels(self, folder: Path, remedy: str, learnt_from: Path | None = None) -> None:
        """Warn when the label maps <folder>/<id>.png hardly use a class, or use almost only one.

        `learnt_from`: the label maps of the train split from which the segmenter learnt.
        """
        self.join()
        if self.is_main:
            classes, present, learnt = self.dataset.classes, {}, {}
            with suppress(UserError):  # a machine that only segments may have no image-level labels
                present = patch_shares(self.dataset.image_labels("train"), classes)
            with suppress(UserError):  # a damaged file is reported elsewhere
                if learnt_from and learnt_from.is_dir():
                    learnt = pixel_shares(learnt_from, self.dataset.ids("train"), classes)
                self.warn(check_shares(pixel_shares(folder, self.ids, classes), present, remedy, learnt))

    def draw(self, row: Row, titles: Sequence[str], legend: bool = False) -> None:
        """Wait for all processes, then write the contact sheet: `row(id)` of some patches. Bad files are left out."""
        self.join()
        if not self.is_main:
            return
        rows: dict[str, Sequence[np.ndarray | None]] = {}
        for id in sample_ids(self.ids, self.args.samples):
            with suppress(UserError):  # already among the failures
                rows[id] = row(id)
        sheet, colours = self.path / "contact_sheet.png", self.dataset.legend if legend else ()
        contact_sheet(sheet, list(rows.values()), titles, colours, names=list(rows))

    def draw_labels(self, columns: dict[str, Path | Callable[[np.ndarray], np.ndarray]]) -> None:
        """The contact sheet of a step that makes label maps: the image, then the label map of each column.

        A column is a folder of <id>.png, or a function of the image. It shows the truth only where
        a step learns from it. Unreadable files leave an empty cell.
        """

        def row(id: str) -> list[np.ndarray | None]:
            image = self.image(id)
            cells: list[np.ndarray | None] = [image]
            for column in columns.values():
                try:
                    if isinstance(column, Path):
                        label = load_label(column / f"{id}.png", self.dataset.num_classes)
                    else:
                        label = column(image)
                    cells.append(colourise(label, self.dataset.colours))
                except UserError:
                    cells.append(None)
            return cells

        self.draw(row, ["image", *columns], legend=True)

    def draw_maps(self, maps_of: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
        """The contact sheet of class maps: the image, then a column for each class.

        maps_of(id, image) -> class ids (k,), maps (k,H,W) in 0..1.
        """

        def row(id: str) -> list[np.ndarray | None]:
            image = self.image(id)
            maps = dict(zip(*maps_of(id, image), strict=True))
            cells: list[np.ndarray | None] = [image]
            for k in range(self.dataset.num_classes):
                cells.append(heat(image, maps[k]) if k in maps else None)
            return cells

        self.draw(row, ["image", *self.dataset.classes])
