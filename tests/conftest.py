"""Shared by the tests: a small text of our own, a copy of the scripts to run them in, and a way to run them."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / "data" / "tiktoken"))  # copies of the scripts share it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest.ini runs two tests at a time
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests expect a CPU; only those of test_gpu.py use a GPU
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so do those of nohup

TEXT = "\n".join(
    f"The {a} {b} {c} by the {d}, and {e}."
    for a in ("old", "young", "quiet", "seventh") for b in ("miller", "ferryman", "fox", "clock")
    for c in ("sleeps", "sings", "waits") for d in ("river", "window", "gate") for e in ("nobody minds", "it rains"))

warm_processes = {}  # of tests/warm.py, by number, each started by the first script that runs in it


def run_warm(command, folder, environment, meanwhile, number):
    """Runs [python, script, ...] in a copy of a warm process; returns what subprocess.run would. While it runs, calls
    meanwhile with its process id."""
    if number not in warm_processes:
        warm_processes[number] = subprocess.Popen([sys.executable, str(ROOT / "tests" / "warm.py")], text=True,
                                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    warm_process = warm_processes[number]
    with tempfile.TemporaryDirectory() as outputs:
        stdout, stderr = Path(outputs, "stdout"), Path(outputs, "stderr")
        request = {"arguments": command[1:], "folder": str(folder), "environment": environment,
                   "stdout": str(stdout), "stderr": str(stderr)}
        print(json.dumps(request), file=warm_process.stdin, flush=True)
        meanwhile(int(warm_process.stdout.readline()))
        code = int(warm_process.stdout.readline())
        return subprocess.CompletedProcess(command, code, stdout.read_text(), stderr.read_text())


class Project:
    """A copy of the scripts, with data/ and out/ of its own."""

    def __init__(self, folder):
        self.folder = folder
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*.html")):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "config", folder / "config")

    def command(self, script, *arguments):
        """The command that runs a script in a process of its own, for subprocess."""
        return [sys.executable, str(self.folder / script), *map(str, arguments)]

    def finish(self, script, *arguments, cwd=None, env=None, fresh=False, meanwhile=lambda pid: None, number=0):
        """Runs a script to its end, however it ends; returns its exit code and output as subprocess.run does. Calls
        meanwhile with its process id. Scripts that run at the same time need different numbers.

        A copy of the warm process runs it. A process of its own does with fresh=True, where there is no fork, and where
        variables are set that libraries read while they are imported."""
        command, folder, environment = self.command(script, *arguments), cwd or self.folder, os.environ | (env or {})
        early = any(name.startswith(("PYTHON", "OMP_", "MKL_", "LD_", "MALLOC_", "TORCH")) for name in env or {})
        if fresh or early or not hasattr(os, "fork"):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
                                       env=environment)
            meanwhile(process.pid)
            stdout, stderr = process.communicate()
            return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
        return run_warm(command, folder, environment, meanwhile, number)

    def run(self, script, *arguments, **how):
        """Runs a script as `finish` does; checks that it succeeds, and returns its standard output."""
        done = self.finish(script, *arguments, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fails(self, script, *arguments, **how):
        """Runs a script that must fail with one line on stderr; returns that line."""
        done = self.finish(script, *arguments, **how)
        assert done.returncode > 0, done.stdout + done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.splitlines(keepends=True) == [done.stderr], done.stderr
        assert done.stderr.endswith("\n")
        return done.stderr


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A project with a dataset `tiny` and a small model trained on it. Tests must not change it."""
    project = Project(tmp_path_factory.mktemp("trained"))
    (project.folder / "tiny.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=tiny", "--input=tiny.txt")
    project.run("train.py", *TINY, "--max_iters=60")
    return project


def with_model(folder, trained, *changes):
    """A project in this folder with the dataset `tiny`, and with changes in model.py: (old text, new text)."""
    project = Project(folder)
    shutil.copytree(trained.folder / "data", project.folder / "data")
    source = (project.folder / "model.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (project.folder / "model.py").write_text(source, encoding="utf-8")
    return project


TINY = ["--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8",
        "--optimizer=muon", "--learning_rate=1e-3", "--muon_learning_rate=0.02", "--lr_decay=cosine",
        "--final_lr_fraction=0.1", "--dropout=0.1",
        "--eval_interval=20", "--log_interval=5", "--checkpoint_interval=10"]
