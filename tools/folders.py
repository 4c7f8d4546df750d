"""The folder that a step writes: opened, refused or resumed, what is left to do, what failed, and its run.json."""

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil

from tools.command import UserError, and_more, check
from tools.constants import Place, may_change
from tools.files import remove_leftovers, write_json, write_whole
from tools.progress import Progress
from tools.runs import Run, commit, differences, package_versions, read_run
from tools.workers import in_workers

LOCK = ".lock"


class OneProcess:
    """In place of Accelerate's state, for a script that runs in one process and needs no torch."""

    device, process_index, num_processes, is_main_process = "cpu", 0, 1, True

    def wait_for_everyone(self) -> None:
        pass


class StepFolder:
    """The output folder of a step.

    `args` are the script's constants. `open` gives the folder to a run: where it was made with other constants or read
    something else it is refused, unless `overwrite`; where it is unfinished the run continues it. Several processes may
    open the same folder: they share the work, and the main one writes run.json.
    """

    run: Run

    def __init__(self, path: Path, args: Place):
        self.path, self.args = Path(path), args
        self.state: Any = OneProcess()  # or Accelerate's `PartialState` or `Accelerator`
        self.failures: list[str] = []
        self._joined = False
        self._resumed: dict | None = None  # record of a run that found the folder finished

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process

    @contextmanager
    def open(
        self,
        suffix: str,
        *,
        reads: dict[str, str] | None = None,
        notes: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Iterator[Self]:
        """Own the folder for the block, then write run.json with the count of files that end in `suffix`.

        `reads`: name -> start of the run, or hash of the file, that is read, so that results made from different ones
        never mix. `notes` are facts that later tables must show. `settings` are further values that must agree like the
        constants; `facts`, further fields of `Run`, need not. Raises `UserError` when the folder is refused, and at the
        end with the list of files that failed.
        """
        self._start = time.monotonic()
        self.run = self._new_run(settings or {}, {"reads": reads or {}, "notes": notes or {}} | (facts or {}))
        if self.is_main:
            self._open(self.args.overwrite)
        self.state.wait_for_everyone()  # the main process has emptied, refused or made the folder before others write
        try:
            yield self
            self.join()
            self._close(suffix)
        finally:
            if self.is_main:
                (self.path / LOCK).unlink(missing_ok=True)

    def _new_run(self, settings: dict[str, Any], facts: dict[str, Any]) -> Run:
        now = time.time_ns()
        constants = json.loads(json.dumps(vars(self.args) | settings, default=str))
        return Run(
            script=Path(sys.argv[0]).name,
            command=" ".join([Path(sys.executable).name, *sys.argv]),
            constants=constants,
            device=str(self.state.device),
            processes=self.state.num_processes,
            packages=package_versions(),
            commit=commit(),
            started=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9 // 1000:06d}Z",
            seconds=0.0,
            finished=False,
            **facts,
        )

    def _open(self, overwrite: bool) -> None:
        file = self.path / "run.json"
        content = [path.name for path in self.path.glob("*") if path.name != LOCK] if self.path.is_dir() else []
        known = file.exists()
        check(
            known or not content,
            f"{self.path} is not empty but has no run.json, so it is not known how it was made: move it away",
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            if overwrite and known:
                self._empty()
            elif known:
                self._resume(read_run(self.path, f"--overwrite starts {self.path} again"))
            remove_leftovers(self.path)
            self._write_run()
        except BaseException:
            (self.path / LOCK).unlink(missing_ok=True)
            raise

    def _resume(self, before: Run) -> None:
        self._refuse_other_settings(before)
        part = self.run.part()
        self.run = before.model_copy(update={"finished": False})
        if before.finished:
            self._resumed = part  # recorded only if missing files are recreated
        else:
            self.run.continued.append(part)

    def _refuse_other_settings(self, before: Run) -> None:
        differing = differences(before.constants, self.run.constants, may_change(self.args))
        sentences = list(differing.values())
        for name, started in before.reads.items():
            if self.run.reads.get(name) != started:
                sentences.append(f"made from another run of {name}")
        remedies = ["--overwrite replaces it"]
        precision = before.constants.get("precision")
        if precision and list(differing) == ["precision"]:  # "auto" depends on the device; each can compute in both
            remedies.insert(0, f"--precision {precision} continues it")
        if "experiment" in self.run.constants:
            remedies.append("or choose another --experiment")
        check(
            not sentences, f"{self.path} was made with other settings ({'; '.join(sentences)}): {', '.join(remedies)}"
        )

    def _lock(self) -> None:
        """Refuse a folder that another living run writes. A lock whose process has ended is taken over."""
        lock, me = self.path / LOCK, psutil.Process()
        try:
            host, pid, born = lock.read_text(encoding="utf-8").split()
            elsewhere = host != socket.gethostname()
            if elsewhere or (int(pid) != me.pid and psutil.Process(int(pid)).create_time() == float(born)):
                raise UserError(
                    f"{self.path} is being written by another run (process {pid} on {host}): wait for it, or delete "
                    f"{lock} if that run has ended"
                )
        except (OSError, ValueError, psutil.Error):  # no lock, a broken one, or its process has ended
            pass
        with write_whole(lock) as temporary:
            temporary.write_text(f"{socket.gethostname()} {me.pid} {me.create_time()!r}", encoding="utf-8")

    def _empty(self) -> None:
        """Mark the folder unfinished first and delete run.json last: an interrupted --overwrite can be recognised."""
        file = self.path / "run.json"
        with suppress(UserError):
            write_json(file, read_run(self.path).model_copy(update={"finished": False}).model_dump())
        for path in list(self.path.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (file, self.path / LOCK):
                path.unlink()
        file.unlink()

    def pending(self, ids: Sequence[str], suffix: str) -> list[str]:
        """This process's share of the ids whose file <path>/<id><suffix> is missing."""
        missing = {id for id in ids if not (self.path / f"{id}{suffix}").exists()}
        if missing:
            self.mark_changed()
        return [id for id in ids[self.state.process_index :: self.state.num_processes] if id in missing]

    def mark_changed(self) -> None:
        """Record in run.json that this run adds to a folder that was finished."""
        if self._resumed:
            self.run.continued.append(self._resumed)
            self._resumed = None

    def warn(self, sentences: Sequence[str]) -> None:
        """Print sentences on a result that is probably worthless, and keep them in run.json."""
        self.run.warnings = list(sentences)
        for sentence in sentences:
            if self.is_main:
                print(f"warning: {sentence}", file=sys.stderr)

    def fail(self, error: Exception | str) -> None:
        """Keep the sentence of a bad file; the end of the step reports them all after the good files are done."""
        self.failures.append(str(error))

    def progress(self, total: int, what: str, unit: str = "image") -> Progress:
        """Progress of the main process."""
        return Progress(total, what, unit, shown=self.is_main)

    def each(self, work: Callable[[Any], None], items: Sequence[Any], what: str, unit: str = "image") -> None:
        """Call work(item) for each item in `args.workers` processes; a `UserError` is kept for the end.

        Where there are workers, `work` must be a function of a module, or a `functools.partial` of one.
        """
        with self.progress(len(items), what, unit) as bar:
            for sentence in in_workers(partial(_attempt, work), items, self.args.workers):
                if sentence:
                    self.fail(sentence)
                bar.update()

    def join(self) -> None:
        """Wait for all processes; their failures come together in the main one, which reports them."""
        if self.state.num_processes > 1 and not self._joined:
            from accelerate.utils import gather_object

            failures = gather_object(self.failures)
            self.failures = failures if self.is_main else []
        self._joined = True

    def _close(self, suffix: str) -> None:
        if not self._resumed:
            self.run.seconds = round(self.run.seconds + time.monotonic() - self._start, 1)
        self.run.files = count_files(self.path, suffix)
        self.run.finished = not self.failures
        if self.is_main:
            self._write_run()
        self.state.wait_for_everyone()  # a later step of the same program reads run.json in every process
        check(
            not self.failures,
            f"files that failed: {len(self.failures)}; all others are finished. Fix or remove these files, then run "
            f"the same command again:\n  {and_more(self.failures)}",
        )

    def _write_run(self) -> None:
        write_json(self.path / "run.json", self.run.model_dump())


def count_files(folder: Path, suffix: str) -> int:
    """Results of a step in a folder: all files that end in `suffix` but pictures for people and hidden files."""
    return sum(path.stem != "contact_sheet" and path.name[0] != "." for path in folder.glob(f"*{suffix}"))


def _attempt(work: Callable[[Any], None], item: Any) -> str | None:
    try:
        work(item)
    except UserError as error:
        return str(error)
    return None
