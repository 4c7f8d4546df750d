"""A full disk and a read-only folder: one sentence, exit code 1, and what was finished is kept."""

import filecmp
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.programs import PROGRAMS, finish
from tests.steps import same_results

QUICK = {"process"}
# bytes that let a step begin and finish some of its files, but not all
ROOM = {"train_classification": 1 << 20, "train_segmentation": 1 << 20, "evaluate_miou": 8 << 10}


@contextmanager
def disk(folder: Path, options: str):
    """A disk of its own at a folder, in memory. Yields a function that changes its options."""
    content = list(folder.iterdir()) if folder.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}_beside")
    shutil.copytree(folder, beside)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here ({mounted.stderr.strip()}); it takes root")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    try:
        for path in content:
            source = beside / path.name
            shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
        remount(options)
        yield remount
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in PROGRAMS]
)
def test_a_read_only_folder_and_a_full_disk(finished, copy, name):
    program, folder = PROGRAMS[name], copy / PROGRAMS[name].output
    expected = program.expected(finished, copy)
    program.remove_output(copy)
    with disk(folder, "ro") as remount:
        stderr = finish(program.command(copy, workers=0), fails=True)
        assert "Read-only file system" in stderr and str(folder) in stderr and stderr.count("error: ") == 1, stderr

        remount("rw")
        used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
        remount(f"size={used + ROOM.get(name, 16 << 10)}")
        if name == "process":
            (folder / "filler").write_bytes(b"")
            with pytest.raises(OSError, match="No space"), open(folder / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(b"0" * 4096)
        stderr = finish(program.command(copy, workers=0), fails=True)
        assert ("o space " in stderr or "the disk is full" in stderr) and stderr.count("error: ") == 1, stderr
        assert "what is finished is kept, and then the same command continues" in stderr
        assert not list(folder.rglob(".*.tmp*"))
        kept = [path.name for path in folder.glob(f"*{program.files}")]
        if program.files in (".npz", ".png"):
            kept = [file for file in kept if file != "contact_sheet.png"]
            assert 0 < len(kept) < 10
            assert filecmp.cmpfiles(folder, expected, kept, shallow=False)[0] == kept

        remount("size=512m")
        finish(program.command(copy, workers=0))
        assert same_results(folder, expected, program.files)
