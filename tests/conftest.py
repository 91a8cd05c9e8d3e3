"""Shared by the tests: a small text of our own, a copy of the scripts to run them in, and a way to run them."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / "data" / "tiktoken"))  # copies of the scripts share it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest.ini runs two tests at a time
torch.set_num_threads(1)

TEXT = "\n".join(
    f"The {a} {b} {c} by the {d}, and {e}."
    for a in ("old", "young", "quiet", "seventh") for b in ("miller", "ferryman", "fox", "clock")
    for c in ("sleeps", "sings", "waits") for d in ("river", "window", "gate") for e in ("nobody minds", "it rains"))


class Project:
    """A copy of the scripts, with data/ and out/ of its own."""

    def __init__(self, folder):
        self.folder = folder
        for path in list(ROOT.glob("*.py")):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "config", folder / "config")

    def command(self, script, *arguments):
        return [sys.executable, str(self.folder / script), *map(str, arguments)]

    def run(self, script, *arguments, cwd=None, env=None):
        """Runs a script to its end; checks that it succeeds, and returns its standard output."""
        done = subprocess.run(self.command(script, *arguments), capture_output=True, text=True,
                              cwd=cwd or self.folder, env=os.environ | (env or {}))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fails(self, script, *arguments, env=None):
        """Runs a script that must fail with one line on stderr; returns that line."""
        done = subprocess.run(self.command(script, *arguments), capture_output=True, text=True, cwd=self.folder,
                              env=os.environ | (env or {}))
        assert done.returncode != 0, done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
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


TINY = ["--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8",
        "--optimizer=muon", "--dropout=0.1", "--eval_interval=20", "--log_interval=5", "--checkpoint_interval=10"]
