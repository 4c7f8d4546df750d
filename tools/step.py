"""Where steps read and write: experiments, run.json, what is left to do, what failed."""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from tools.command import UserError
from tools.files import remove_leftovers, write_json
from tools.versions import commit, package_versions
from tools.workers import worker_pool

ROOT = Path(__file__).resolve().parents[1]
# Constants that change where or how fast a step runs, and what it makes by no more than rounding: they may differ when
# a run is continued.
NOT_SETTINGS = {
    "root",
    "overwrite",
    "workers",
    "images_at_once",
    "scene",
    "compile",
    "samples",
    "download",
    "points_per_batch",
    "coloured_maps",
    "missing_scenes",
}
PART = ("script", "command", "device", "processes", "packages", "commit")  # what may differ when a run is continued
MADE_BY = {  # step folder -> the step that makes it
    "classifier": "step 1, python train_classification.py",
    "cams": "step 2, python infer_classification.py",
    "pseudo_labels": "step 3, python make_pseudo_labels.py",
    "refined_pseudo_labels": "step 4, python generate_refined_pseudo.py",
    "segmenter": "step 5, python train_segmentation.py",
    "segmentation": "step 6, python inference_segmentation.py",
    "refined_segmentation": "step 7, python generate_refined_seg.py",
    "sam_masks": "step 9, python PRC_SAM/get_se_map.py",
}


def process_state():
    """Accelerate's `PartialState`: which of how many processes this is, and its device.

    Told that there is no GPU, processes on CPUs share the work too; left alone, each would do all of it.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def experiment_folder(root: Path, dataset: str, experiment: str) -> Path:
    """<root>/experiments/<dataset>/<experiment>; raises `UserError` for a name that would leave that folder."""
    if not experiment or not all(
        part.isalnum() for part in experiment.replace("-", "_").replace(".", "_").split("_") if part
    ):
        raise UserError(f'experiment is "{experiment}", but its name may hold only letters, digits, "_", "-" and "."')
    if set(experiment) <= {"."}:
        raise UserError(f'experiment is "{experiment}", which is no name for a folder')
    return Path(root) / "experiments" / dataset / experiment


def step_name(step: str, split: str, usual: str) -> str:
    """The folder of a step: plain for the split it is meant for, with the split appended for the other."""
    return step if split == usual else f"{step}_{split}"


def require(folder: Path) -> dict:
    """The run.json of a finished earlier step; raises `UserError` naming the step that makes the folder."""
    maker = MADE_BY.get(folder.name) or MADE_BY.get(folder.name.rsplit("_", 1)[0], "the step that makes it")
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run {maker}")
    try:
        run = _read_account(folder / "run.json")
    except FileNotFoundError:
        raise UserError(f"{folder} has no run.json: run {maker} --overwrite") from None
    except ValueError:
        raise UserError(f"{folder / 'run.json'} is damaged: run {maker} --overwrite") from None
    if not run.get("finished"):
        raise UserError(f"{folder} is not finished: run {maker} again, it continues where it stopped")
    return run


class StepFolder:
    """The output folder of a step: what is there already, what is left to do, and the account of the run (run.json).

    `constants` is the script's dataclass; `inputs` maps a name to the run.json of each earlier step that is read, so
    that results of two different runs of it never mix; `notes` are facts that later tables must show (a stand-in);
    `settings` are further values, such as a data set's rules, that must agree like the constants.
    Raises `UserError` when the folder was made with other constants or inputs, unless `overwrite`.
    Several processes may open the same folder, the main one writes run.json: `state` is `process_state()`, or an
    `Accelerator`, in the steps that share out their work.
    """

    def __init__(
        self,
        folder: Path,
        constants,
        inputs: dict[str, dict] | None = None,
        notes: dict | None = None,
        device: str = "cpu",
        state=None,
        settings: dict | None = None,
    ):
        self.folder = Path(folder)
        self.process, self.processes = (state.process_index, state.num_processes) if state else (0, 1)
        self.failures: list[str] = []
        self._start, self._idle = time.time(), None
        settings = json.loads(json.dumps(dataclasses.asdict(constants) | (settings or {}), default=str))
        self.run = {
            "script": Path(sys.argv[0]).name,
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "constants": settings,
            "inputs": {name: run["started"] for name, run in (inputs or {}).items()},
            "notes": dict(notes or {}),
            "device": str(device),
            "processes": self.processes,
            "packages": package_versions(),
            "commit": commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._start)) + f".{time.time_ns() % 10**6:06d}Z",
            "seconds": 0.0,
            "files": 0,
            "finished": False,
            "continued": [],  # by which further runs, each with what `PART` names
        }
        for run in (inputs or {}).values():  # what an earlier result rests on, this one rests on too
            self.run["notes"] = run.get("notes", {}) | self.run["notes"]
        if self.process == 0:
            self._open(getattr(constants, "overwrite", False))
        if self.processes > 1:  # nobody writes before the main process has emptied, refused or made the folder
            process_state().wait_for_everyone()

    def _open(self, overwrite: bool) -> None:
        file = self.folder / "run.json"
        if overwrite and self.folder.exists():
            if any(self.folder.iterdir()) and not file.exists():
                raise UserError(
                    f"{self.folder} was not made by a step (it has no run.json), so --overwrite leaves it "
                    "alone: move it away"
                )
            self._empty(file)
        if file.exists():
            try:
                before = _read_account(file)
            except ValueError:
                raise UserError(f"{file} is damaged: --overwrite starts {self.folder} anew") from None
            self._refuse_other_settings(before)
            part = {key: self.run[key] for key in PART}
            self.run = {"continued": []} | before | {"finished": False}
            if before["finished"]:
                self._idle = part  # told of only if it makes something: files that were lost
            else:
                self.run["continued"].append(part)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} is not empty but has no run.json, so nobody knows how it was made: move it away"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        write_json(file, self.run)

    def _empty(self, file: Path) -> None:
        """run.json goes last and not as finished: where this is interrupted, it still tells what the rest is."""
        with suppress(FileNotFoundError, ValueError):
            write_json(file, _read_account(file) | {"finished": False})
        for path in list(self.folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != file:
                path.unlink()
        file.unlink(missing_ok=True)

    def _refuse_other_settings(self, before: dict) -> None:
        def differences(kind: str, skip: set[str]) -> list[str]:
            old, new = before.get(kind, {}), self.run[kind]
            return [
                f"{key}: {old.get(key)} there, {new.get(key)} now"
                for key in sorted((old.keys() | new.keys()) - skip)
                if old.get(key) != new.get(key)
            ]

        other = differences("constants", NOT_SETTINGS) + [
            f"made from another run of {line}" for line in differences("inputs", set())
        ]
        if other:
            elsewhere = ", or choose another --experiment" if "experiment" in self.run["constants"] else ""
            raise UserError(
                f"{self.folder} was made with other settings ({'; '.join(other)}): --overwrite starts it "
                f"anew{elsewhere}"
            )

    def pending(self, ids: Sequence[str], suffix: str) -> list[str]:
        """This process's share of the ids whose file <folder>/<id><suffix> is not there yet."""
        missing = {id for id in ids if not (self.folder / f"{id}{suffix}").exists()}
        if missing and self._idle:
            self.run["continued"].append(self._idle)
            self._idle = None
        return [id for id in ids[self.process :: self.processes] if id in missing]

    def fail(self, error: Exception) -> None:
        """Keep the sentence of one bad file; `close` reports them all after the good ones are done."""
        self.failures.append(str(error))

    def progress(self, total: int, description: str, unit: str = "image") -> tqdm:
        """A bar with the count and the time left: in the main process alone, and only in a terminal."""
        return tqdm(total=total, desc=description, unit=unit, disable=True if self.process else None)

    def each(
        self,
        work: Callable[[str], None],
        ids: Sequence[str],
        workers: int = 0,
        description: str = "",
        unit: str = "image",
    ) -> None:
        """Call `work(id)` for each id, in `workers` processes (0: in this one), with progress.

        Bad files (`UserError`) are kept for the end.

        `work` must be picklable when there are workers: a module-level function or a `functools.partial` of one.
        """
        with self.progress(len(ids), description, unit) as bar:
            if workers < 1 or len(ids) < 2:
                results: Iterable = ((_attempt, (work, id)) for id in ids)
                for call, arguments in results:
                    self._note(call(*arguments))
                    bar.update()
                return
            with worker_pool(min(workers, len(ids))) as pool:
                for future in as_completed([pool.submit(_attempt, work, id) for id in ids]):
                    self._note(future.result())
                    bar.update()

    def _note(self, sentence: str | None) -> None:
        if sentence:
            self.failures.append(sentence)

    def join(self) -> None:
        """Wait until all processes are done; their failures come together in the main one, which reports them."""
        if self.processes > 1:
            from accelerate.utils import gather_object

            failures = gather_object(self.failures)
            self.failures = failures if self.process == 0 else []

    def close(self, suffix: str, **results) -> None:
        """Write run.json with the count of files and the time; raise `UserError` with the list if files failed."""
        if not self._idle:
            self.run["seconds"] = round(self.run["seconds"] + time.time() - self._start, 1)
        made = self.folder.glob(f"*{suffix}")
        self.run["files"] = sum(path.stem != "contact_sheet" and path.name[0] != "." for path in made)
        self.run["finished"] = not self.failures
        self.run |= results
        if self.process == 0:
            write_json(self.folder / "run.json", self.run)
        if self.processes > 1:  # a later step of the same program reads run.json in every process
            process_state().wait_for_everyone()
        if self.failures:
            shown = "\n  ".join(self.failures[:20])
            more = f"\n  and {len(self.failures) - 20} more" if len(self.failures) > 20 else ""
            raise UserError(
                f"{len(self.failures)} files could not be done; all others are finished. Mend or remove these "
                f"and run the same command again:\n  {shown}{more}"
            )


def _read_account(file: Path) -> dict:
    """The content of a run.json; ValueError when it is none."""
    run = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(run, dict) or not {"constants", "started", "seconds", "finished"} <= run.keys():
        raise ValueError("not the account of a step")
    return run


def _attempt(work: Callable[[str], None], id: str) -> str | None:
    try:
        work(id)
    except UserError as error:
        return str(error)
    return None
