"""Every script on Windows: there as it is, on Linux with emulated_windows.py."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint import load_checkpoint
from conftest import ROOT, TEXT, Project

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="Windows is emulated on Linux only")
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=8", "--eval_interval=2",
         "--log_interval=2", "--checkpoint_interval=2", "--max_iters=4", "--eval_tokens=320"]
WORLD = "Мельник спит у реки. 春天来了,没有人介意。 Der Müller schläft “am Fluß” – es regnet. ☕\n" * 40


class Windows(Project):
    """A project whose scripts run on Windows."""

    def finish(self, script, *arguments, **how):
        """Runs a script to its end; returns its exit code and output."""
        if sys.platform == "win32":
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONUTF8"}
            return subprocess.run(self.command(script, *arguments), capture_output=True, encoding="utf-8",
                                  cwd=self.folder, env=environment)
        return super().finish("emulated_windows.py", script, *arguments, **how)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """With a text in many alphabets, and a model that was trained on it."""
    windows = Windows(tmp_path_factory.mktemp("windows"))
    shutil.copy(ROOT / "tests" / "emulated_windows.py", windows.folder)
    (windows.folder / "world.txt").write_text(WORLD, encoding="utf-8", newline="\r\n")
    windows.run("prepare.py", "--dataset=world", "--input=world.txt")
    windows.run("train.py", "--dataset=world", *SMALL, "--optimizer=muon")
    return windows


def test_text_in_many_alphabets(windows):
    meta = json.loads((windows.folder / "data/world/meta.json").read_text(encoding="utf-8"))
    assert set(meta["tokenizer"]["chars"]) == set(WORLD)
    start = "春天 ☕ “Müller”"
    assert windows.run("sample.py", f"--start={start}", "--max_new_tokens=30").startswith(start)
    error = windows.fails("sample.py", "--start=Ω")
    assert "'Ω' (U+03A9) is not among" in error and "☕" in error
    windows.run("plot.py", f"--start={start}", "--file=attention.svg")


def test_files_that_begin_with_a_mark(windows):
    """Editors on Windows begin a file in UTF-8 with three bytes that are no text."""
    for name, text in (("marked.txt", TEXT), ("marked.py", "max_iters = 2\n"), ("prompt.txt", "The old")):
        (windows.folder / name).write_text(text, encoding="utf-8-sig")
    windows.run("prepare.py", "--dataset=marked", "--input=marked.txt")
    meta = json.loads((windows.folder / "data/marked/meta.json").read_text(encoding="utf-8"))
    assert set(meta["tokenizer"]["chars"]) == set(TEXT) | ({"\r"} if os.linesep == "\r\n" else set())
    printed = windows.run("train.py", "--dataset=marked", *SMALL, "marked.py", "--out_dir=marked")
    assert "step 2/2" in printed
    printed = windows.run("sample.py", "--out_dir=marked", "--start=FILE:prompt.txt", "--max_new_tokens=5")
    assert printed.startswith("The old")


def test_a_dataset_is_prepared_again(windows):
    (windows.folder / "again").mkdir()
    for n in range(2):
        (windows.folder / "again" / f"{n}.txt").write_text(TEXT, encoding="utf-8")
        printed = windows.run("prepare.py", "--dataset=again", "--input=again", f"--val_fraction={0.1 + n / 10}")
        assert "tokens to train on" in printed
        assert not (windows.folder / "data" / "again" / ".partial").exists()
    error = windows.fails("prepare.py", "--dataset=again", "--input=again", "--val_fraction=0.000001")
    assert "too few" in error and not (windows.folder / "data" / "again" / ".partial").exists()


def test_a_path_with_backslashes_reaches_prepare(windows):
    (windows.folder / "texts").mkdir()
    Path(f"{windows.folder}{os.sep}texts\\book.txt").write_text(TEXT, encoding="utf-8")
    printed = windows.run("train.py", "--dataset=book", "--prepare=--input=texts\\book.txt --val_fraction=0.2", *SMALL,
                          "--out_dir=book")
    assert "preparing it" in printed and (windows.folder / "data" / "book" / "val.bin").stat().st_size > 5000


def test_a_run_is_resumed_exported_and_moved_away(windows):
    how = ["train.py", "--dataset=world", *SMALL, "--out_dir=run"]
    windows.run(*how)
    windows.run("train.py", "--init_from=resume", "--out_dir=run", "--max_iters=6")
    assert load_checkpoint(windows.folder / "run" / "latest.pt")["iter_num"] == 6
    log = (windows.folder / "run" / "log.csv").read_bytes()
    assert log.count(b"\r\n") == 5 == log.count(b"\n")  # csv's line ends, whatever the system
    windows.run("checkpoint.py", "--out_dir=run", "--export=exported")
    windows.run("checkpoint.py", "--out_dir=run", "--export=exported")
    assert "moved it to run.1" in windows.run(*how)
    (windows.folder / "loss.png").write_bytes(b"an earlier picture")
    windows.run("plot.py", "--what=loss", "--out_dir=run,run.1", "--file=loss.png")


def test_byte_pairs(windows):
    windows.run("prepare.py", "--dataset=pairs", "--input=world.txt", "--tokenizer=gpt2")
    windows.run("train.py", "--dataset=pairs", *SMALL, "--n_embd=4", "--max_iters=1", "--out_dir=pairs")
    printed = windows.run("sample.py", "--out_dir=pairs", "--start=春天 ☕", "--max_new_tokens=20")  # and broken UTF-8
    assert printed.startswith("春天 ☕")


def test_benchmarks(windows):
    windows.run("bench_train.py", "--dataset=world", *SMALL, "--steps=1", "--json=train.json")
    windows.run("bench_kv.py", "--out_dir=out", "--prompt=4", "--new_tokens=4", "--repeats=1", "--compile=False",
                "--dtype=float32", "--peers", "--json=kv.json")


def test_attention_by_hand(windows):
    windows.run("verify_mha.py")


@pytest.mark.parametrize("script, argument, words", [
    ("train.py", "--out_dir=a?", "a?"), ("train.py", "--dataset=none", "no text for the dataset 'none'"),
    ("train.py", "none.py", "none.py not found"), ("prepare.py", "--dataset=a:b", "got 'a:b'"),
    ("prepare.py", "--dataset=a --input=none.txt", "no such file"), ("sample.py", "--out_dir=none", "train one first"),
    ("sample.py", "--start=FILE:none.txt", "none.txt"), ("plot.py", "--what=loss --file=a*.png", "a*.png"),
    ("checkpoint.py", "--export=a|b", "a|b"), ("train.py", "--läyers=3", "unknown setting 'läyers'"),
    ("bench_kv.py", "--out_dir=none", "train one first"), ("bench_train.py", "--steps=0", "at least 1")])
def test_errors(windows, script, argument, words):
    settings = ["--dataset=world", *SMALL] if script == "train.py" and "--dataset" not in argument else []
    assert words in windows.fails(script, *settings, *argument.split())


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare.py", "plot.py", "bench_kv.py", "bench_train.py",
                                    "checkpoint.py", "fast.py", "verify_mha.py", "verify_gradients.py"])
def test_help(windows, script):
    assert "\n  --" in windows.run(script, "--help")


@pytest.mark.skipif(sys.platform != "linux", reason="concerns the emulation")
@pytest.mark.parametrize("lines, error", [
    ("import resource", "No module named 'resource'"), ("import os; os.sched_getaffinity", "sched_getaffinity"),
    ("open('x.txt', 'w').write('春')", "UnicodeEncodeError"), ("print('春')", "UnicodeEncodeError"),
    ("f = open('x.txt', 'w'); import os; os.replace('x.txt', 'y.txt')", "PermissionError"),
    ("f = open('x.txt', 'w'); import pathlib; pathlib.Path('x.txt').unlink()", "PermissionError"),
    ("import numpy, os\na = numpy.memmap('x.bin', mode='w+', shape=9)\nos.remove('x.bin')", "PermissionError"),
    ("import os; os.mkdir('x'); os.mkdir('y'); os.rename('x', 'y')", "FileExistsError"),
    ("import os; os.mkdir('x'); f = open('x/z', 'w'); import shutil; shutil.rmtree('x')", "PermissionError"),
    ("import os; os.open('.', 0)", "PermissionError"), ("open('a:b', 'w')", "OSError"), ("open('a. ', 'w')", "OSError"),
    ("import signal; signal.SIGHUP", "SIGHUP")])
def test_the_emulation_notices(tmp_path, lines, error):
    windows = Windows(tmp_path)
    shutil.copy(ROOT / "tests" / "emulated_windows.py", tmp_path)
    (tmp_path / "mistake.py").write_text(lines, encoding="utf-8")
    done = windows.finish("mistake.py", cwd=tmp_path)
    assert done.returncode == 1 and error in done.stderr.splitlines()[-1]
