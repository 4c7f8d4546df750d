"""Windows and macOS lack parts of Linux: a test takes them away from the project's code, and runs steps without them.

Libraries keep them, because those have their own ways on other systems, chosen by the system's name.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.steps import STEPS, experiment, options, record, same_results

# Python imports this module first, in every process that PYTHONPATH reaches, spawned workers included.
ELSEWHERE = """
import builtins
import multiprocessing
import os
import sys
from types import ModuleType

ROOT = {root!r}
LACKING = dict(
    signal="SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGUSR1 SIGUSR2 alarm pause pthread_kill pthread_sigmask setitimer "
    "sigwait",
    os="fork getloadavg getpgid geteuid getuid killpg mkfifo nice register_at_fork sched_getaffinity setsid",
)
MISSING = ("fcntl", "grp", "pwd", "resource", "termios")


plain_import = builtins.__import__


def import_as_elsewhere(name, *arguments, **named):
    file = sys._getframe(1).f_code.co_filename
    if not file.startswith(ROOT) or "site-packages" in file:
        return plain_import(name, *arguments, **named)
    if name in MISSING:
        raise ImportError(name)
    module = plain_import(name, *arguments, **named)
    if name not in LACKING:
        return module
    less = ModuleType(name)
    vars(less).update((key, value) for key, value in vars(module).items() if key not in LACKING[name].split())
    return less


builtins.__import__ = import_as_elsewhere
multiprocessing.set_start_method("spawn", force=True)
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """elsewhere(root): programs started after it behave so, as far as their code lies below `root`."""

    def begin(root):
        (tmp_path / "python").mkdir()
        (tmp_path / "python" / "sitecustomize.py").write_text(ELSEWHERE.replace("{root!r}", repr(f"{root}{os.sep}")))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))

    return begin


def test_the_parts_are_gone(elsewhere, tmp_path):
    """In a program of the project, and not in torch, which asks for some of them."""
    program = tmp_path / "project" / "program.py"
    program.parent.mkdir()
    program.write_text(
        "import os, signal, torch\n"
        "assert not hasattr(os, 'fork') and not hasattr(signal, 'SIGKILL') and torch.os.fork\n"
        "import resource\n"
    )
    elsewhere(program.parent)
    answer = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert answer.stderr.strip().endswith("ImportError: resource"), answer.stderr


@pytest.mark.parametrize("script", ["infer_classification", "make_pseudo_labels"])
def test_a_step_with_two_workers(finished, copy, elsewhere, run_script, script):
    """Step 2 reads by DataLoader's processes, step 3 works in a pool of our own."""
    name, constants, _, suffix = STEPS[script]
    shutil.rmtree(experiment(copy) / name)
    elsewhere(ROOT)
    run_script(f"{script}.py", "--dataset", "tiny", "--root", copy, *options(constants | {"workers": 2}))
    assert record(experiment(copy) / name)["finished"]
    assert same_results(experiment(copy) / name, experiment(finished) / name, suffix)
