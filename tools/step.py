"""What steps 1 to 7 have in common: data set, inputs, output folder, contact sheet, closing lines."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from tools.command import UserError, check
from tools.constants import Machine
from tools.dataset import load_dataset
from tools.folders import ProcessState, StepFolder
from tools.labels import load_image, load_label
from tools.pictures import colourise, contact_sheet, sample_ids
from tools.result_checks import check_shares, patch_shares, pixel_shares
from tools.runs import Run, read_run
from tools.steps import STEPS, next_step, step_of

Row = Callable[[str], Sequence[np.ndarray | None]]  # patch id -> the pictures of one row of a contact sheet


def experiment_folder(root: Path, dataset: str, experiment: str) -> Path:
    """<root>/experiments/<dataset>/<experiment>; raises `UserError` for a name that would leave that folder."""
    fits = experiment.replace("-", "").replace(".", "").replace("_", "").isalnum()
    check(
        fits,
        f'experiment is "{experiment}", but a name needs letters or digits; only "_", "-" and "." are allowed besides',
    )
    return Path(root) / "experiments" / dataset / experiment


def require(folder: Path, args: Any, **others: str) -> Run:
    """The run.json of the finished step that made a folder.

    Raises `UserError` with the command to run, which repeats the data set, experiment and root of `constants`; `others`
    replaces some of them.
    """
    step = step_of(folder)
    maker = step.hint(args, **others) if step else "the step that makes it"
    check(folder.is_dir(), f"{folder} is missing: run {maker}{_near(folder)}")
    try:
        run = read_run(folder, f"run {maker} --overwrite")
    except FileNotFoundError:
        raise UserError(f"{folder} has no run.json: run {maker} --overwrite") from None
    check(run.finished, f"{folder} is not finished: run {maker} again, it continues where it stopped")
    return run


def _near(folder: Path) -> str:
    """The user's other experiments, where the one of `folder` does not exist."""
    experiment = folder.parent
    if experiment.is_dir() or not experiment.parent.is_dir() or folder.name not in STEPS or folder.name == "sam_masks":
        return ""
    others = sorted(path.name for path in experiment.parent.iterdir() if path.is_dir())
    return f"; the experiments of this data set are {', '.join(others)}" if others else ""


class Step(StepFolder):
    """One run of a step: what it reads is found and checked at once, its folder is opened by `output`.

    `name` is a folder of tools/steps.py. Attributes: `dataset`; `split`; `experiment`, the folder of the experiment;
    `sources`, name -> folder that is read; `inputs`, name -> its `Run`; `path`, the output folder.
    A constant with the name of an input (`cams = "other"`) names the experiment to read it from. `reads` replaces the
    inputs of the table. With `image_labels` the step reads the image-level labels: `labels`.
    """

    args: Machine

    def __init__(self, name: str, args: Any, *, reads: tuple[str, ...] | None = None, image_labels: bool = False):
        self.info = STEPS[name]
        self.dataset = load_dataset(args.dataset, args.root)
        self.split: str = getattr(args, "split", self.info.split or "train")
        self.experiment = experiment_folder(args.root, args.dataset, args.experiment)
        super().__init__(self.experiment / self.info.folder_of(self.split), args)
        self.sources = {name: self._source(name) for name in (self.info.inputs if reads is None else reads)}
        self.inputs = {
            name: require(folder, args, experiment=folder.parent.name) for name, folder in self.sources.items()
        }
        self._settings: dict[str, Any] = {}
        self._announced = False
        self._origins: dict[str, str] = {}
        self._reads = {name: run.started for name, run in self.inputs.items()}
        if image_labels:
            self.labels = self.dataset.image_labels(self.split)
            self._reads["image_labels"] = self.dataset.image_labels_hash(self.split)

    def _source(self, name: str) -> Path:
        if name == "sam_masks":
            return self.dataset.sam_masks(self.split)
        other = getattr(self.args, name, "")
        experiment = self.experiment.parent / other if other else self.experiment
        return experiment / (STEPS[name].folder_of(self.split) if name in STEPS else name)

    def method_value(self, name: str, key: str) -> float:
        """The constant `name`; where it is None, the data set's value of `key` in [method]. run.json says which."""
        value, self._origins[name] = self.dataset.method_value(key, getattr(self.args, name))
        self._settings[name] = value
        return value

    @cached_property
    def ids(self) -> list[str]:
        """The patches of the split."""
        return self.dataset.ids(self.split)

    def announce(self, state: ProcessState, precision: str = "") -> None:
        """Print device and precision, once; `output` does so for a step that has nothing to download before."""
        from tools.devices import start_line  # imports torch, which workers need not load

        if state.is_main_process and not self._announced:
            print(f"step {self.info.number}, {start_line(state, precision, self.args.device)}", flush=True)
        self._announced = True

    @contextmanager
    def output(
        self,
        suffix: str,
        *,
        state: ProcessState | None = None,
        notes: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Iterator[Self]:
        """Open the output folder as `StepFolder.open` does; say first on what device, last what was made.

        The notes of the inputs are carried on. Without `state` the processes and the device are found here.
        """
        from tools.devices import device_facts, process_state

        state = state or process_state(self.args.device)
        begin = time.monotonic()
        carried: dict[str, Any] = {}
        for run in self.inputs.values():
            carried |= run.notes
        settings = self._settings | (settings or {})
        self.announce(state, settings.get("precision", ""))
        with self.open(
            suffix,
            state=state,
            inputs=self._reads,
            notes=carried | (notes or {}),
            settings=settings,
            facts={"origins": self._origins, "hardware": device_facts(state.device)},
        ):
            yield self
        if self.is_main:
            following = next_step(self.info)
            print(f"made: {self.path}, {self.run.files} files, {time.monotonic() - begin:.0f} s")
            print(f"look at: {self.path / 'contact_sheet.png'}")
            if following:
                print(f"next: {following.command(self.args)}")

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

    def draw(self, row: Row, titles: Sequence[str], legend: bool = True) -> None:
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

    def draw_labels(self, columns: dict[str, Path]) -> None:
        """The contact sheet of a step that makes label maps: the image, then <folder>/<id>.png of each column.

        It never shows the truth, so no step opens a pixel label. Unreadable files leave an empty cell.
        """
        self.draw(partial(self._label_row, folders=list(columns.values())), ["image", *columns])

    def _label_row(self, id: str, folders: list[Path]) -> list[np.ndarray | None]:
        cells: list[np.ndarray | None] = [load_image(self.dataset.images(self.split) / f"{id}.png")]
        for folder in folders:
            try:
                label = load_label(folder / f"{id}.png", self.dataset.num_classes)
                cells.append(colourise(label, self.dataset.colours))
            except UserError:
                cells.append(None)
        return cells
