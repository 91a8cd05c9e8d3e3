"""Faults around a run: another run beside it, output that goes away, damaged files, another dataset. Nothing is lost in
silence, and each message is one line."""
import collections
import csv
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

from checkpoint import (
    TO_RESUME,
    TO_SAMPLE,
    Log,
    check_size,
    is_plain_pickle,
    load_checkpoint,
    load_model,
    load_pretrained,
    load_to_resume,
    lock_run,
    move_aside,
    probe,
    save_checkpoint,
)
from conftest import ROOT, TEXT, TINY, Project, with_model
from device import check_generation_memory, check_training_memory
from files import LOG_COLUMNS, UserError, finish_publishing, open_dataset, read_log
from model import GPT, Block, GPTConfig
from test_nanogpt import nested
from test_prepare import small_pieces
from test_train import rows, same_run, same_state, step_of_log
from tokenizer import CharTokenizer, load_tokenizer, read_nanogpt_characters

LONG = [*TINY, "--max_iters=100000", "--eval_interval=1000"]


def wait_for_step(folder, step):
    deadline = time.time() + 60
    while step_of_log(folder) < step and time.time() < deadline:
        time.sleep(0.01)
    assert step_of_log(folder) >= step


# --- another run ---

def test_a_second_run_in_the_same_folder_is_refused(trained):
    folder = trained.folder / "shared"

    def second(pid):
        wait_for_step(folder, 15)
        for how in ([*TINY, "--max_iters=5"], ["--init_from=resume"]):
            done = trained.finish("train.py", *how, "--out_dir=shared", number=1)
            assert done.returncode == 1
            assert done.stderr == (f"error: another run (process {pid}) is writing to shared; stop it, or choose "
                                   "another --out_dir\n")
        os.kill(pid, signal.SIGKILL)

    assert trained.finish("train.py", *LONG, "--out_dir=shared", meanwhile=second).returncode == -9
    step = load_checkpoint(folder / "latest.pt")["iter_num"]
    printed = trained.run("train.py", "--init_from=resume", "--out_dir=shared", f"--max_iters={step + 5}")
    assert f"resuming shared after step {step}" in printed  # the lock of a killed process does not hold


@pytest.mark.skipif(os.name == "nt", reason="Windows does not rename a folder in which a file is open")
def test_two_runs_that_start_at_once_never_share_a_folder(tmp_path, monkeypatch):
    """The second starts just before or just after the first one renames an earlier run, or between opening the lock's
    file and locking it."""
    out, settings = tmp_path / "out", {"tensorboard": False, "wandb": False}
    locks, acquire = [], filelock.FileLock.acquire
    out.mkdir()
    (out / "best.pt").touch()

    def started_around(folder):
        with pytest.raises(UserError, match="another run .* is writing to"):
            lock_run(out)
        new = move_aside(folder)
        out.mkdir()
        locks.append(lock_run(out))
        return new

    def renamed_between(lock, **how):
        acquire(lock, **how)
        out.rename(tmp_path / "elsewhere")

    monkeypatch.setattr("checkpoint.move_aside", started_around)
    with pytest.raises(UserError, match="another run .* is writing to"):
        Log(out, None, settings)
    assert (tmp_path / "out.1" / "best.pt").exists()
    locks.pop().release()
    monkeypatch.setattr(filelock.FileLock, "acquire", renamed_between)
    with pytest.raises(UserError, match="has just renamed"):
        lock_run(out)


def test_a_second_prepare_of_the_same_dataset_is_refused(project):
    (project.folder / "a.txt").write_text(TEXT)
    source = (project.folder / "prepare.py").read_text()
    assert source.count("    main()\n") == 1
    (project.folder / "slow.py").write_text(source.replace("    main()\n", "    print(1, flush=True)\n    main()\n    "
                                                           "time.sleep(60)\n"))
    how = ["--dataset=mine", "--input=a.txt"]
    first = subprocess.Popen(project.command("slow.py", *how), cwd=project.folder, stdout=subprocess.PIPE, text=True)
    first.stdout.readline()
    assert "another prepare.py is working on" in project.fails("prepare.py", *how)
    first.kill()
    first.communicate()
    project.run("prepare.py", *how)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_train_py_also_ends_the_prepare_py_that_it_runs(project, name):
    (project.folder / "prepare.py").write_text("import os, time\nopen('new', 'w').write(str(os.getpid()))\n"
                                               "os.rename('new', 'pid')\ntime.sleep(20)\n")

    def stop(pid):
        deadline = time.time() + 60
        while not (project.folder / "pid").exists() and time.time() < deadline:
            time.sleep(0.01)
        os.kill(pid, getattr(signal, name))

    done = project.finish("train.py", "--dataset=new", meanwhile=stop)
    assert done.returncode == 128 + getattr(signal, name) and not done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((project.folder / "pid").read_text()), signal.SIGKILL)


def test_a_run_whose_folder_is_moved_stops_and_leaves_the_name_to_others(tmp_path):
    settings, folder = {"tensorboard": False, "wandb": False}, tmp_path / "out"
    log = Log(folder, None, settings)
    log.save(folder / "latest.pt", {"w": torch.ones(1)})
    folder.rename(tmp_path / "kept")
    for _ in range(2):  # without a folder of that name, and with that of another run
        for act in (lambda: log.write(iter=1, tokens=1), lambda: log.save(folder / "latest.pt", {"w": torch.ones(1)})):
            with pytest.raises(UserError, match="out was moved or removed"):
                act()
        assert not (folder / "latest.pt").exists()
        other = None if folder.exists() else Log(folder, None, settings)
    other.lock.release() if other else None
    log.lock.release()
    assert len(read_log(tmp_path / "kept" / "log.csv")[0]) == 0 and (tmp_path / "kept" / "latest.pt").exists()


# --- output that goes away ---

@pytest.mark.skipif(os.name == "nt", reason="Windows has no dup2 of a pipe without a reader")
def test_a_closed_output_does_not_end_a_run_that_moves_another(trained):
    """Nor one that exports, or has its dataset prepared."""
    read, write = os.pipe()
    os.close(read)

    def run(*command):
        done = subprocess.run(trained.command(*command), cwd=trained.folder, stdout=write, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr

    for _ in range(2):
        run("train.py", *TINY, "--max_iters=2", "--out_dir=silent")
        run("checkpoint.py", "--export=silent-export")
    (trained.folder / "silent.txt").write_text(TEXT)
    run("train.py", *TINY, "--dataset=silent", "--prepare=--input=silent.txt", "--max_iters=1", "--out_dir=silent-data")
    os.close(write)
    names = "silent", "silent.1", "silent-export", "silent-export.1", "silent-data"
    assert all((trained.folder / name).is_dir() for name in names)



@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_run_outlives_its_output_and_saves_when_its_terminal_goes_away(trained):
    """First as with `train.py 2>&1 | head -1`, then as when the window is closed."""
    how = [*TINY, "--max_iters=120", "--log_interval=1", "--init_from=resume"]
    trained.run("train.py", *how, "--out_dir=heard")
    folder = trained.folder / "unheard"
    process = subprocess.Popen(trained.command("train.py", *how, "--out_dir=unheard"), cwd=trained.folder,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    wait_for_step(folder, 15)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert int(rows(folder)[-1][0]) <= load_checkpoint(folder / "latest.pt")["iter_num"] < 120
    trained.run("train.py", *how, "--out_dir=unheard")
    assert same_run(trained.folder / "heard", folder)


# --- what a checkpoint knows ---

def test_a_run_that_patience_has_stopped_stays_stopped(trained):
    how = [*TINY, "--max_iters=2000", "--out_dir=done", "--patience=2", "--learning_rate=1e-12",
           "--muon_learning_rate=1e-12", "--eval_interval=5"]
    trained.run("train.py", *how)
    before = (trained.folder / "done" / "latest.pt").read_bytes()
    assert "raise --patience to go on" in trained.run("train.py", "--init_from=resume", "--out_dir=done")
    assert (trained.folder / "done" / "latest.pt").read_bytes() == before
    printed = trained.run("train.py", "--init_from=resume", "--out_dir=done", "--patience=3")
    assert "stopping early: 3 evaluations" in printed


def test_a_dataset_that_was_replaced_is_noticed(trained):
    project = trained
    (project.folder / "swapped.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=swapped", "--input=swapped.txt")
    project.run("train.py", *TINY, "--dataset=swapped", "--max_iters=5", "--out_dir=swapped")
    (project.folder / "swapped.txt").write_text("".join(sorted(TEXT)))
    project.run("prepare.py", "--dataset=swapped", "--input=swapped.txt")
    (project.folder / "swapped.py").write_text('dataset = "swapped"')  # a file always names it, so it is no permission
    for arguments in ([], ["swapped.py"]):
        error = project.fails("train.py", *arguments, "--init_from=resume", "--out_dir=swapped", "--max_iters=9")
        assert "the dataset swapped is not the one that" in error and "--dataset=swapped" in error
    project.run("train.py", "--init_from=resume", "--out_dir=swapped", "--max_iters=9", "--dataset=swapped")


# --- damaged files ---

def test_every_flipped_bit_is_found_or_harmless(trained, tmp_path):
    """In 100 places of a checkpoint: refused in one line, or read with exactly the same contents."""
    path, rng = trained.folder / "out" / "latest.pt", np.random.default_rng(0)
    content, good = path.read_bytes(), load_checkpoint(path)
    for place in rng.integers(len(content), size=100):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "latest.pt").write_bytes(damaged)
        try:
            found = load_checkpoint(tmp_path / "latest.pt")
        except ValueError as e:
            assert "is damaged or not a checkpoint" in str(e) and "\n" not in str(e)
        else:
            assert same_state(found, good)


def test_a_damaged_checkpoint_names_the_other_one(trained):
    folder = trained.folder / "one-bad"
    shutil.copytree(trained.folder / "out", folder)
    good = (folder / "latest.pt").read_bytes()
    (folder / "latest.pt").write_bytes(good[:-100])
    error = trained.fails("train.py", "--init_from=resume", "--out_dir=one-bad")
    assert f"--init_from=one-bad{os.sep}best.pt" in error
    trained.run("train.py", f"--init_from=one-bad{os.sep}best.pt", "--dataset=tiny", "--out_dir=anew", "--max_iters=1")
    (folder / "latest.pt").write_bytes(good)
    (folder / "best.pt").write_bytes(b"")
    assert "move it away to use latest.pt" in trained.fails("sample.py", "--out_dir=one-bad")


def test_a_file_that_cannot_be_opened_is_not_called_damaged(trained):
    folder = trained.folder / "unreadable"
    (folder / "latest.pt").mkdir(parents=True)
    error = trained.fails("train.py", "--init_from=resume", "--out_dir=unreadable")
    assert "damaged" not in error and f"unreadable{os.sep}latest.pt: " in error


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.parametrize("make", [os.mkfifo if os.name != "nt" else None, lambda path: path.symlink_to("/dev/zero"),
                                  Path.mkdir], ids=["pipe", "device", "folder"])
@pytest.mark.parametrize("name, read", [
    ("log.csv", read_log), ("latest.pt", load_checkpoint), ("meta.pkl", read_nanogpt_characters),
    ("meta.json", lambda path: open_dataset(path.parent)), ("config.json", lambda path: load_pretrained(path.parent))])
def test_a_pipe_a_device_or_a_folder_in_place_of_a_file_is_named(tmp_path, name, read, make):
    """Opening a pipe would wait for ever, and /dev/zero has no end."""
    make(tmp_path / name)
    with pytest.raises((UserError, IsADirectoryError)) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) or caught.value.filename == tmp_path / name


@pytest.mark.parametrize("damage", [
    lambda text: text[:-30], lambda text: text + "61,", lambda text: text.replace("\n", "\nnot,a,row\n", 3),
    lambda text: "\ufeff" + text.replace("iter", "step"), lambda text: text + "\0" * 500, lambda text: "",
    lambda text: text + text, lambda text: text.replace(".", ".x", 2)])
def test_a_damaged_log_is_repaired(trained, tmp_path, damage):
    project = trained
    folder = project.folder / f"log{len(list(project.folder.glob('log*')))}"
    shutil.copytree(project.folder / "out", folder)
    whole = read_log(folder / "log.csv")[0]
    (folder / "log.csv").write_bytes(damage((folder / "log.csv").read_bytes().decode()).encode())
    plot = ["plot.py", "--what=loss", f"--out_dir={folder.name}", f"--file={folder.name}.svg"]
    if read_log(folder / "log.csv")[0]:
        drawn = project.finish(*plot)  # what is whole
        assert drawn.returncode == 0 and "damaged line" in drawn.stderr
    else:
        assert "log.csv has no whole row" in project.fails(*plot)
    printed = project.run("train.py", "--init_from=resume", f"--out_dir={folder.name}", "--max_iters=65")
    assert "damaged line" in printed
    with open(folder / "log.csv", newline="") as f:
        found = list(csv.DictReader(f))
    assert found[-1]["iter"] == "65" and all(row in whole for row in found[:-1])
    assert read_log(folder / "log.csv") == (found, 0)


def test_a_file_of_hugging_face_is_named_by_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"name the folder: --init_from={re.escape(str(tmp_path))}"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = Log(tmp_path / "out", None, {"tensorboard": False, "wandb": False})
    (tmp_path / "out" / "log.csv").unlink()
    (tmp_path / "out" / "log.csv").mkdir()
    with pytest.raises(UserError, match="log.csv cannot be written: "):
        log.write(iter=1, tokens=2, seconds=3.5, loss=4.5)
    log.lock.release()


def test_gradients_that_are_never_finite_in_float16(trained, tmp_path):
    """They would halve the scale without end, and train nothing. The root of 0 has an infinite derivative."""
    line = "        logits = self.lm_head(self.ln_f(x))"
    root = f"        x = x + 0.0 * (x - x).sum(-1, keepdim=True).sqrt()\n{line}"
    project = with_model(tmp_path, trained, (line, root))
    how = ["--dtype=float16", "--max_iters=300", "--eval_interval=300", "--log_interval=40", "--checkpoint_interval=20"]
    assert "are not finite in float16" in project.fails("train.py", *TINY, *how)
    assert load_checkpoint(tmp_path / "out" / "latest.pt")["scaler"]["scale"] > 0


def test_without_best_pt_the_next_evaluation_writes_it(trained, tmp_path):
    """The lowest loss so far belongs to a model that is not there any more."""
    shutil.copytree(trained.folder / "out", trained.folder / "no-best")
    (trained.folder / "no-best" / "best.pt").unlink()
    how = ["--init_from=resume", "--out_dir=no-best", "--max_iters=61", "--muon_learning_rate=0.5"]
    printed = trained.run("train.py", *how)
    assert (trained.folder / "no-best" / "best.pt").exists() and "the lowest so far" in printed


def test_a_step_whose_gradient_overflowed_keeps_its_row(tmp_path):
    log = Log(tmp_path / "out", None, {"tensorboard": False, "wandb": False})
    log.write(iter=1, tokens=2, seconds=3.5, loss=4.5, grad_norm=math.inf, val_loss=1.5)
    log.lock.release()
    rows, damaged = read_log(tmp_path / "out" / "log.csv")
    row = rows[0]
    assert (row["grad_norm"], row["val_loss"], damaged) == ("", "1.5", 0)


@pytest.mark.parametrize("row", ["1.5,1,1,2", "-3,1,1,2", "1,1,1,-1e308", "1,1,1e300,2"])
def test_a_row_that_no_run_writes_is_damaged(tmp_path, row):
    rest = "," * (len(LOG_COLUMNS) - 4) + "\n"
    (tmp_path / "log.csv").write_text(",".join(LOG_COLUMNS) + "\n" + row + rest + "9,1,1,2" + rest)
    rows, damaged = read_log(tmp_path / "log.csv")
    assert [row["iter"] for row in rows] == ["9"] and damaged == 1


# --- nothing is overwritten ---

@pytest.mark.parametrize("name", ["log.csv", "my-best.pt", "ckpt.pt"])
def test_a_folder_with_anything_of_a_run_is_kept(trained, name):
    folder = trained.folder / f"kept-{name}"
    folder.mkdir()
    (folder / name).write_text("precious")
    trained.run("train.py", *TINY, "--max_iters=1", f"--out_dir={folder.name}")
    assert Path(f"{folder}.1", name).read_text() == "precious"


@pytest.mark.skipif(os.name == "nt", reason="Windows' links need rights")
def test_a_link_to_a_folder_stays(trained):
    (trained.folder / "disk").mkdir()
    (trained.folder / "link").symlink_to("disk")
    for _ in range(2):
        trained.run("train.py", *TINY, "--max_iters=1", "--out_dir=link")
    assert (trained.folder / "link").is_symlink() and (trained.folder / "link" / "latest.pt").exists()
    assert (trained.folder / "disk.1" / "latest.pt").exists()


def test_weights_that_are_not_finite_are_not_sampled_from(trained):
    checkpoint = load_checkpoint(trained.folder / "out" / "best.pt")
    checkpoint["model"]["ln_f.weight"] = torch.full_like(checkpoint["model"]["ln_f.weight"], float("nan"))
    (trained.folder / "nan").mkdir()
    torch.save(checkpoint, trained.folder / "nan" / "best.pt")
    assert "is not finite" in trained.fails("sample.py", "--out_dir=nan")


@pytest.mark.parametrize("place, change, words", [
    (("probe",), torch.Tensor.bool, "model.py no longer computes"), (("probe",), lambda t: t[:0], "model.py"),
    (("model", "ln_f.weight"), torch.Tensor.cfloat, "ln_f.weight is of torch.complex64")], ids=range(3))
def test_a_tensor_of_another_type_is_refused(trained, tmp_path, place, change, words):
    checkpoint = load_checkpoint(trained.folder / "out" / "best.pt")
    inner = checkpoint if len(place) == 1 else checkpoint[place[0]]
    inner[place[-1]] = change(inner[place[-1]])
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_logits_that_are_not_finite_are_not_sampled_from(trained, tmp_path):
    """Though the weights are."""
    checkpoint = load_checkpoint(trained.folder / "out" / "best.pt")
    checkpoint["model"]["ln_f.weight"] = torch.full_like(checkpoint["model"]["ln_f.weight"], 3e38)
    del checkpoint["probe"]
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(UserError, match="what the model computes is not finite; restore"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda o: o["state"]["wte.weight"].update(exp_avg=o["state"]["wte.weight"]["exp_avg"].cfloat()),
    lambda o: next(iter(o["state"].values())).update(momentum_buffer=torch.zeros(3, 5)),
    lambda o: o["state"].update({"h.0.ln_1.weight": {"exp_avg": torch.zeros(1, 1)}}),
    lambda o: o["state"].update({"no.such": {}}), lambda o: o.update(state=3), lambda o: o.clear(),
    lambda o: o["state"]["wte.weight"].pop("exp_avg"), lambda o: o["state"]["wte.weight"].update(exp_avg=7),
    lambda o: o["state"]["wte.weight"].update(exp_avg=torch.zeros(())),
    lambda o: o["state"].update({"wte.weight": {"momentum_buffer": o["state"]["wte.weight"]["exp_avg"]}})])
def test_an_optimizers_averages_that_do_not_fit_are_refused(trained, damage):
    folder = trained.folder / f"averages{len(list(trained.folder.glob('averages*')))}"
    shutil.copytree(trained.folder / "out", folder)
    checkpoint = load_checkpoint(folder / "latest.pt")
    damage(checkpoint["optimizer"])
    torch.save(checkpoint, folder / "latest.pt")
    how = ["--init_from=resume", f"--out_dir={folder.name}", "--max_iters=70"]
    error = trained.fails("train.py", *how)
    assert "does not fit" in error or "exp_avg is of torch.complex64" in error


# --- a folder that holds other files, too ---

def test_files_of_others_stay_where_they_are(trained):
    """In a folder that holds no run, and then beside one that goes on."""
    folder = trained.folder / "others"
    folder.mkdir()
    for name in ("notes.tmp", "best.pt.2.tmp"):
        (folder / name).write_text("precious")
    (folder / "log.csv.123.tmp").write_text("half of a log, which a killed run left here")
    trained.run("train.py", *TINY, "--max_iters=2", "--out_dir=others")
    trained.run("train.py", *TINY, "--max_iters=4", "--out_dir=others", "--init_from=resume")
    assert {p.name for p in folder.glob("*.tmp")} == {"notes.tmp", "best.pt.2.tmp"}
    assert (folder / "notes.tmp").read_text() == "precious" and not (trained.folder / "others.1").exists()


@pytest.mark.parametrize("folder, words", [(".", "a folder for this run alone"), ("", "out_dir is empty")])
def test_a_run_does_not_take_the_current_folder(trained, folder, words):
    assert words in trained.fails("train.py", *TINY, "--max_iters=2", f"--out_dir={folder}")
    assert not (trained.folder / "log.csv").exists()


# --- a checkpoint that is not what it was ---

def test_a_checkpoint_that_another_run_writes_meanwhile(trained, tmp_path):
    """A run that resumes has read it before it holds the lock."""
    shutil.copytree(trained.folder / "out", tmp_path / "out")
    path, settings = tmp_path / "out" / "latest.pt", {"tensorboard": False, "wandb": False}
    checkpoint = load_to_resume(path)
    os.utime(path, ns=(0, checkpoint["changed_at"] + 1))
    with pytest.raises(UserError, match="another run has just saved"):
        Log(tmp_path / "out", checkpoint, settings)
    Log(tmp_path / "out", load_to_resume(path), settings).lock.release()


def test_other_tokens_to_evaluate_reset_the_lowest_loss(trained):
    shutil.copytree(trained.folder / "out", trained.folder / "evaluated")
    how = ["train.py", "--init_from=resume", "--out_dir=evaluated"]
    assert "is reset" not in trained.run(*how, "--max_iters=62")
    assert "is reset" not in trained.run(*how, "--max_iters=62", "--eval_tokens=1000000")  # there are fewer anyway
    checkpoint = load_checkpoint(trained.folder / "evaluated" / "latest.pt")
    checkpoint["best_val_loss"] = 0.5  # which the next evaluation does not reach
    torch.save(checkpoint, trained.folder / "evaluated" / "latest.pt")
    assert "eval_tokens is 64, not " in trained.run(*how, "--max_iters=64", "--eval_tokens=64")
    assert load_checkpoint(trained.folder / "evaluated" / "best.pt")["best_val_loss"] > 0.5


def test_another_batch_size_continues_the_count_of_tokens(trained):
    """The run goes on where it stood in the text: 60 steps of 8 sequences of 32 tokens, then steps of 3 and of 12."""
    shutil.copytree(trained.folder / "out", trained.folder / "batch")
    how = ["train.py", "--init_from=resume", "--out_dir=batch", "--log_interval=1"]
    trained.run(*how, "--max_iters=62", "--batch_size=3")
    trained.run(*how, "--max_iters=63", "--batch_size=6", "--gradient_accumulation_steps=2")
    tokens = dict(rows(trained.folder / "batch", ["iter", "tokens"]))
    assert [int(tokens[i]) // 32 for i in ("60", "61", "62", "63")] == [480, 483, 486, 498]
    assert load_checkpoint(trained.folder / "batch" / "latest.pt")["tokens"] == 498 * 32
    code = """import train
i = 486
start = train.window_starts(i // train.windows)[i % train.windows]
assert (train.get_batch(62)[0][0].numpy() == train.train_data[start:start + 32]).all()"""
    subprocess.run([sys.executable, "-c", code, "--init_from=resume", "--out_dir=batch"], cwd=trained.folder,
                   check=True)


def test_a_run_does_not_rename_datasets_or_other_runs(trained):
    for out_dir in ("data", "data/tiny", "."):
        done = trained.finish("train.py", *TINY, "--max_iters=1", f"--out_dir={out_dir}")
        assert done.returncode == 1 and "out_dir must be a folder for this run alone" in done.stderr
    for out_dir in ("outer", "outer/inner run"):
        printed = trained.run("train.py", *TINY, "--max_iters=1", f"--out_dir={out_dir}")
    assert "next: python sample.py --out_dir='outer/inner run'\n" in printed
    done = trained.finish("train.py", *TINY, "--max_iters=1", "--out_dir=outer")
    assert done.returncode == 1 and done.stderr.splitlines() == [
        f"error: outer holds an earlier run, which a new one renames, but {Path('outer/inner run')} is a run of its "
        "own; name another --out_dir"]
    assert not (trained.folder / "outer.1").exists()


def test_steps_that_change_nothing_are_announced(trained):
    shutil.copytree(trained.folder / "out", trained.folder / "zero")
    how = ["train.py", "--init_from=resume", "--out_dir=zero", "--final_lr_fraction=0"]
    assert "; raise --max_iters and --lr_decay_iters to go on\n" in trained.run(*how)
    words = "the rate is 0 from step 60 on; to learn more: --lr_decay_iters=62"
    assert words in trained.run(*how, "--max_iters=62")
    assert "the rate is 0" not in trained.run(*how, "--max_iters=64", "--lr_decay_iters=64")


def test_a_run_of_an_earlier_muon_goes_on(trained):
    """It kept no means of the rows' squares, and its momentum was always 0.95."""
    shutil.copytree(trained.folder / "out", trained.folder / "earlier")
    path = trained.folder / "earlier" / "latest.pt"
    checkpoint = load_checkpoint(path)
    for averages in checkpoint["optimizer"]["state"].values():
        averages.pop("row_squares", None)
    del checkpoint["config"]["muon_momentum"]
    torch.save(checkpoint, path)
    trained.run("train.py", "--init_from=resume", "--out_dir=earlier", "--max_iters=64")
    checkpoint = load_checkpoint(path)
    assert checkpoint["config"]["muon_momentum"] == 0.95
    assert any("row_squares" in averages for averages in checkpoint["optimizer"]["state"].values())


def test_a_card_names_the_weights_that_a_run_started_from(trained):
    trained.run("train.py", *TINY, "--max_iters=2", "--init_from=out", "--out_dir=tuned")
    trained.run("train.py", "--init_from=resume", "--max_iters=4", "--out_dir=tuned")
    trained.run("checkpoint.py", "--out_dir=tuned", "--export=tuned-export")
    assert "--init_from=out " in (trained.folder / "tuned-export" / "README.md").read_text()


# --- files that someone edited ---

@pytest.mark.parametrize("place, value, words", [
    ("iter_num", -5, "at least 0, but is -5"), ("iter_num", True, "int, but is true"), ("tokens", -1, "at least 0"),
    ("bad_evals", 1.5, "int, but is 1.5"), ("best_val_loss", float("nan"), "at least 0, but is NaN"),
    ("seconds", float("nan"), "from 0 to 1e9"), ("seconds", 1e300, "from 0 to 1e9"), ("wandb_id", 5, "str, but is 5"),
    ("scaler", {"scale": "x"}, "numbers of at least 0"), ("text", {"val_bytes": "x"}, "numbers of at least 0"),
    ("scaler", {"growth_interval": 0.5}, "numbers of at least 0"), ("scaler", {"scale": None}, "at least 0"),
    ("scaler", {"scale": 1e300}, "at least 0"), ("scaler", {"_growth_tracker": 2 ** 63}, "at least 0"),
    ("config", {"seed": []}, "numbers and strings"), ("model_config", {"n_layer": 2.0}, "n_layer must be a positive")])
def test_a_checkpoints_fields_are_checked(trained, tmp_path, place, value, words):
    good = load_checkpoint(trained.folder / "out" / "latest.pt", TO_RESUME)
    torch.save(good | {place: value}, tmp_path / "latest.pt")
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(tmp_path / "latest.pt", TO_SAMPLE)
    assert place in str(caught.value) or "n_layer" in value


@pytest.mark.parametrize("n_layer", [12, 100])
def test_layers_may_share_their_weights(n_layer):
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=n_layer, n_head=2, n_embd=32, bias=False))
    model.h = torch.nn.ModuleList([model.h[0]] * n_layer)
    check_size(model.config, model.state_dict(), "path")


def test_a_model_may_be_smaller_than_a_gpt():
    """An embedding may be the product of two small matrices, for example. Its tensors must be there, though."""
    config, small = GPTConfig(vocab_size=2000, n_head=4, n_embd=256), torch.nn.Linear(30, 30)
    check_size(config, small.state_dict(), "path", small)
    for state, empty in ((small.state_dict(), None), ({"weight": torch.zeros(1).expand(30, 30)}, small)):
        with pytest.raises(UserError, match="its tensors are too small"):
            check_size(config, state, "path", empty)


@pytest.mark.parametrize("name, value, words", [
    ("dataset", 5, "dataset expects str, got 5 in"), ("batch_size", -8, "batch_size must be above 0, got -8 in")])
def test_a_checkpoints_settings_are_checked_as_on_the_command_line(trained, name, value, words):
    folder = trained.folder / f"edited-{name}"
    folder.mkdir()
    checkpoint = load_checkpoint(trained.folder / "out" / "latest.pt")
    checkpoint["config"][name] = value
    checkpoint["scaler"] = {"more": 1}
    torch.save(checkpoint, folder / "latest.pt")
    how = ["--init_from=resume", f"--out_dir={folder.name}", "--eval_only", "--eval_tokens=64", "--dtype=float16"]
    assert f"{words} {folder.name}{os.sep}latest.pt; --{name} replaces it" in trained.fails("train.py", *how)
    good = load_checkpoint(trained.folder / "out" / "latest.pt")["config"][name]
    trained.run("train.py", *how, f"--{name}={good}")


# --- files from strangers ---

def laughs():
    """A list of few objects that has 2^60 elements when it is written out."""
    value = []
    for _ in range(60):
        value = [value, value]
    return value


def itself():
    value = []
    value.append(value)
    return value


def attributes(name, value):
    ordered = collections.OrderedDict()
    setattr(ordered, name, value)
    return ordered


def huge_tensor():
    return torch.zeros(1).expand(10 ** 12)  # it holds one number


@pytest.mark.parametrize("place, value", [
    (("config", "n_layer"), laughs), (("tokenizer", "chars"), itself), (("optimizer",), laughs), (("extra",), itself),
    (("model", "wte.weight"), huge_tensor), (("extra",), huge_tensor), (("iter_num",), lambda: 10 ** 10_000),
    (("extra",), lambda: torch.zeros(10 ** 6, 10 ** 6, device="meta")), (("extra",), lambda: {nested(22): 1}),
    (("extra",), lambda: {10 ** 30: 1}), (("optimizer",), lambda: attributes("values", 3)),
    (("model", "wte.weight"), lambda: torch.zeros(1, 1).to_sparse()),
    (("model_config", "n_layer"), lambda: 10 ** 9), (("model_config", "n_embd"), lambda: 2 * 10 ** 6),
    (("model_config", "block_size"), lambda: 10 ** 12)])
def test_a_few_bytes_do_not_take_the_memory(trained, tmp_path, place, value):
    """Each of these would need more memory, or more time, than there is."""
    checkpoint = load_checkpoint(trained.folder / "out" / "latest.pt")
    inner = checkpoint if len(place) == 1 else checkpoint[place[0]]
    inner[place[-1]] = value()
    torch.save(checkpoint, tmp_path / "best.pt")
    assert (tmp_path / "best.pt").stat().st_size < 10 ** 6
    with pytest.raises(UserError):
        load_model(tmp_path)


def test_a_pickle_of_too_many_values_is_refused():
    assert is_plain_pickle(b"]" * 1_000_000 + b".") and not is_plain_pickle(b"]" * 2_000_001 + b".")


def test_a_changed_model_may_have_other_buffers(trained, tmp_path, monkeypatch):
    """Of truth values and whole numbers. Its __init__ may compute with numbers, which PyTorch's meta device lacks."""
    init = Block.__init__

    def changed(self, config):
        init(self, config)
        self.rate = torch.linspace(0, 0.1, config.n_layer)[-1].item()
        self.register_buffer("mask", torch.ones(config.block_size, config.block_size).tril().bool())
        self.register_buffer("passes", torch.zeros(1, dtype=torch.long))

    monkeypatch.setattr(Block, "__init__", changed)
    checkpoint = load_checkpoint(trained.folder / "out" / "best.pt")
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    save_checkpoint(tmp_path / "best.pt", checkpoint | {"model": model.state_dict(), "probe": probe(model)})
    loaded = load_model(tmp_path)[0]
    assert torch.equal(loaded.h[0].mask, model.h[0].mask) and loaded.h[0].rate == model.h[0].rate
    wrong = model.state_dict() | {"h.0.passes": torch.zeros(1, dtype=torch.int32)}
    torch.save(checkpoint | {"model": wrong}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="h.0.passes is of torch.int32"):
        load_model(tmp_path)


def test_a_config_that_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="GPTConfig should hold numbers and strings, or it cannot be saved"):
        save_checkpoint(tmp_path / "latest.pt", {"model_config": {"windows": (16, 64)}})
    assert not list(tmp_path.iterdir())


def test_what_a_state_dict_may_have(trained, tmp_path):
    checkpoint, betas = load_checkpoint(trained.folder / "out" / "best.pt"), (0.9, 0.99)
    checkpoint["model"] = collections.OrderedDict(checkpoint["model"])
    checkpoint["model"]._metadata = 3
    checkpoint["optimizer"] = {"param_groups": [{"betas": betas} for _ in range(15)]}
    torch.save(checkpoint, tmp_path / "best.pt")
    assert load_model(tmp_path)[2]["optimizer"]["param_groups"][14] == {"betas": betas}


def test_a_checkpoint_names_no_program(trained):
    """The dataset and prepare's arguments lead to a program that is run, so a checkpoint may not choose them freely."""
    folder = trained.folder / "stranger"
    folder.mkdir()
    for name in ("evil.py", "prepare.py"):
        (folder / name).write_text("open('ran', 'w')")
    good = load_checkpoint(trained.folder / "out" / "latest.pt")
    for change in ({"dataset": "new", "prepare": str(folder / "evil.py")}, {"dataset": str(folder / "a" / "b")},
                   {"dataset": "../stranger/x"}, {"dataset": ""}, {"dataset": "."}):
        torch.save(good | {"config": good["config"] | change}, folder / "latest.pt")
        done = trained.finish("train.py", "--init_from=resume", "--out_dir=stranger")
        assert done.returncode and "Traceback" not in done.stderr
    assert not list(trained.folder.rglob("ran"))


def test_another_split_is_another_dataset(project):
    how = ["--dataset=mine", "--input=mine.txt"]
    (project.folder / "mine.txt").write_text(TEXT)
    project.run("prepare.py", *how)
    project.run("train.py", *TINY, "--dataset=mine", "--max_iters=2")
    project.run("prepare.py", *how, "--val_fraction=0.5")
    assert "is not the one that" in project.fails("train.py", "--init_from=resume", "--max_iters=4")


def test_a_pickle_that_asks_for_memory_is_refused(trained, tmp_path):
    """torch.load calls bytearray(n) if a pickle says so. It also reads an older format, whose sizes it believes, even
    if an archive follows in the same file."""
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cbuiltins\nbytearray\nJ\x00\x10\x00\x00\x85R.")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    assert torch.load(path, weights_only=True) == bytearray(4096)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_model(path)
    torch.save(load_checkpoint(trained.folder / "out" / "best.pt"), path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
    assert "model" in torch.load(path, weights_only=True)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_model(path)


def add_overlapping(archive):
    """Adds a record, and a second one that is a part of the first."""
    with zipfile.ZipFile(io.BytesIO(), "w") as other:
        other.writestr("best/data/99", bytes(10 ** 6))
        inner, = other.infolist()
        other.fp.seek(0)
        archive.writestr("best/data/98", other.fp.read())
    inner.header_offset = archive.infolist()[-1].header_offset + len(archive.infolist()[-1].FileHeader())
    archive.filelist.append(inner)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", [
    lambda archive: archive.writestr("best/DATA.PKL", b"\x80\x02N."), add_overlapping,
    lambda archive: archive.writestr("best/data.pkl", b"\x80\x02N."),
    lambda archive: archive.writestr("other/data.pkl", b"\x80\x02N."),
    lambda archive: archive.writestr("best/data/a", b"")], ids=range(5))
def test_an_archive_that_can_be_read_in_two_ways_is_refused(trained, tmp_path, change):
    """What was checked may not be what is loaded, or may be loaded many times."""
    torch.save(load_checkpoint(trained.folder / "out" / "best.pt"), tmp_path / "best.pt")
    with zipfile.ZipFile(tmp_path / "best.pt", "a") as archive:
        change(archive)
    with zipfile.ZipFile(tmp_path / "best.pt") as archive:
        assert not archive.testzip()
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_model(tmp_path)


def test_an_archive_in_which_torch_finds_another_is_refused(trained, tmp_path):
    """Two lists of records side by side: zipfile looks for the list right before the end, PyTorch where the end says
    that the list begins."""
    torch.save(load_checkpoint(trained.folder / "out" / "best.pt"), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    bodies, lists = [], []
    for pickled in (pickle.dumps({"model": 1}, 2), records["good/data.pkl"]):  # for PyTorch, for zipfile
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            before = sum(map(len, (*bodies, *lists)))
            for name, data in (records | {"good/data.pkl": pickled}).items():
                archive.writestr(name, data)
            start = archive.fp.tell()
            for entry in archive.filelist:
                entry.header_offset += before if not lists else before - 2 * len(lists[0])
        bodies.append(buffer.getvalue()[:start])
        lists.append(buffer.getvalue()[start:-22])
    first, second = lists
    assert len(first) == len(second)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(records), len(records), len(first), sum(map(len, bodies)), 0)
    path = tmp_path / "best.pt"
    path.write_bytes(b"".join((*bodies, first, second, end)))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("good/data.pkl") == records["good/data.pkl"] and not archive.testzip()
    assert torch.load(path, weights_only=True) == {"model": 1}
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_model(tmp_path)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """torch.save does not compress. A kilobyte of zeros, compressed, may stand for a gigabyte."""
    with zipfile.ZipFile(tmp_path / "best.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 ** 7))
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_model(tmp_path)


@pytest.mark.parametrize("field, value", [("n_layer", 10 ** 9), ("n_embd", 2 * 10 ** 6), ("n_positions", 10 ** 12),
                                          ("vocab_size", 10 ** 12), ("n_head", [])])
def test_a_config_json_does_not_take_the_memory(trained, field, value):
    folder = trained.folder / f"huge-{field}"
    trained.run("checkpoint.py", f"--export={folder.name}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError):
        load_pretrained(folder)


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.gz", b'{"text": "' + b"a" * (1 << 26), "has more than 32 MB"),
    ("a.json.gz", b'["' + b"a" * (1 << 26), "has more than 32 MB"), ("a.json", b"[" * 10 ** 6, "nested too deeply"),
    ("a.jsonl.gz", b"[" + b"{}," * 2_000_000 + b"0]", "more than 2,000,000 brackets"),
    ("a.json.gz", b"[[" + b"{}," * 4_000_000 + b"0]]", "2,000,000 brackets"),
    ("a.json.gz", b'{"text": "one"}\n' * 2 + b'{"text": "' + b"a" * (1 << 26), "a.json.gz:3: this line has more than"),
    ], ids=range(6))
def test_a_record_does_not_take_the_memory(project, name, content, words):
    (project.folder / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    assert words in project.fails("prepare.py", "--dataset=mine", f"--input={name}")


@pytest.mark.parametrize("setting", ["n_embd=2000000", "batch_size=2000000000", "n_layer=1000000000",
                                     "gradient_accumulation_steps=2000000000"])
def test_a_size_that_cannot_fit_is_said_before_it_is_allocated(trained, setting):
    assert "GB of memory, and cpu has" in trained.fails("train.py", *TINY, f"--{setting}", "--out_dir=huge")
    assert not (trained.folder / "huge").exists()


@pytest.mark.parametrize("script, arguments, words", [
    ("sample.py", ["--num_samples=2000000000"], "GB; lower --num_samples"),
    ("bench_kv.py", ["--out_dir=out", "--prompt=4", "--new_tokens=4", "--batch=2000000000"], "GB; lower --batch")])
def test_samples_that_cannot_fit(trained, script, arguments, words):
    assert words in trained.fails(script, *arguments)


def test_the_memory_of_generation_and_of_attention_is_counted(monkeypatch):
    """Exactly what the cache takes, and the weights of attention where fast.py writes them out."""
    model, cpu = GPT(GPTConfig(block_size=64, vocab_size=100, n_layer=3, n_head=2, n_embd=8)), torch.device("cpu")
    needed = sum(p.nbytes for p in model.parameters()) + model.new_cache(7, 20).nbytes + 7 * 100 * 12
    monkeypatch.setattr("device.memory_size", lambda device: needed)
    check_generation_memory(cpu, model, 7, 20, 0.8, "")
    monkeypatch.setattr("device.memory_size", lambda device: needed - 1)
    with pytest.raises(UserError, match="of memory"):
        check_generation_memory(cpu, model, 7, 20, 0.8, "")
    monkeypatch.setattr("device.memory_size", lambda device: 4 * 3 * 2 * 64 * 64 * 2)
    how = 1, 4, 64
    check_training_memory(cpu, GPTConfig(64, 2, 3, 2, 2), *how, "float32", "ddp")
    for dropout, dtype in ((0.1, "float32"), (0.0, "bfloat16")):
        with pytest.raises(UserError, match="of memory"):
            check_training_memory(cpu, GPTConfig(64, 2, 3, 2, 2, dropout), *how, dtype, "ddp")
        check_training_memory(cpu, GPTConfig(64, 2, 3, 2, 2, dropout), *how, dtype, "ddp", eval_only=True)


# --- a fault at every change of a file ---

def inject(project, how, n, *command):
    """Runs a script whose n-th change of a file fails or kills it (tests/inject.py). Returns whether it came to that.
    If it did not, the script succeeded."""
    done = project.finish(ROOT / "tests" / "inject.py", how, n, *command)
    injected = "injected: " in done.stdout
    ended = injected and done.returncode == 9 if how == "kill" else (
        done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)
    assert ended or (done.returncode == 0 and (how == "fail" or not injected)), done
    return injected


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_fault_at_every_change_of_a_file_in_training(trained, how):
    """Each run goes on where the one before ended, and gets one change further before its fault."""
    settings = [*TINY, "--max_iters=12", "--eval_interval=3", "--log_interval=1", "--checkpoint_interval=1",
                "--init_from=resume"]
    trained.run("train.py", *settings, f"--out_dir=no-{how}")
    folder, n = trained.folder / f"{how}-all", 1
    while inject(trained, how, n, "train.py", *settings, f"--out_dir={folder.name}"):
        for path in folder.glob("*.pt"):
            load_checkpoint(path)
        assert how == "kill" or not list(folder.rglob("*.tmp"))
        n += 1
    assert n > 25 and same_run(trained.folder / f"no-{how}", folder) and not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_fault_at_every_change_of_a_file_in_preparing(project, how):
    """After each there is a whole dataset, the old one or the new one, and the same command makes the new one."""
    command, folder = ["prepare.py", "--dataset=mine", "--input=mine.txt"], project.folder / "data" / "mine"
    old, new, injected, n = TEXT, TEXT[::-1], True, 0
    dataset(project, old)
    (project.folder / "mine.txt").write_text(new)
    shutil.copytree(folder, project.folder / "old")
    while injected:
        n += 1
        injected = inject(project, how, n, *command)
        assert text_of(folder) in (old, new)
        if text_of(folder) == old or (folder / ".partial").exists():
            project.run(*command)
        assert text_of(folder) == new and sorted(p.name for p in folder.iterdir()) == [
            "meta.json", "train.bin", "val.bin"]
        shutil.rmtree(folder)
        shutil.copytree(project.folder / "old", folder)
    assert n > 25


def text_of(folder):
    """The text of a dataset, for train.py and every other script that opens it."""
    finish_publishing(folder)
    meta, *splits = open_dataset(folder)
    return load_tokenizer(meta["tokenizer"]).decode(np.concatenate(splits).tolist())


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_fault_at_every_change_of_a_file_in_exporting(trained, how):
    """After each, the new export is whole or not there, and so is the old one, under its name or another."""
    folder, injected, n = trained.folder / f"export-{how}", True, 0
    command = ["checkpoint.py", f"--export={folder.name}"]
    weights = load_checkpoint(trained.folder / "out" / "best.pt")["model"]
    trained.run(*command)
    while injected:
        n += 1
        injected = inject(trained, how, n, *command)
        exports = [p for p in trained.folder.glob(f"{folder.name}*") if not p.name.endswith(".partial")]
        for path in exports:
            assert torch.equal(load_pretrained(path)[0].wte.weight, weights["wte.weight"])
        assert len(exports) >= 1
        for path in exports[1:]:
            shutil.rmtree(path)
        if not folder.exists():
            exports[0].rename(folder)
    assert n > 8


@pytest.mark.parametrize("event, words", [("raise KeyboardInterrupt", ""),
                                          ("shutil.rmtree(partial)", "another export")])
def test_an_export_that_is_stopped_leaves_nothing(trained, tmp_path, event, words):
    """By Ctrl-C, or by another export to the same folder, which removes the files of this one."""
    line = "            write_atomically(partial / name, data)\n"
    source = (trained.folder / "checkpoint.py").read_text(encoding="utf-8")
    assert source.count(line) == 1
    project = Project(tmp_path)
    (project.folder / "checkpoint.py").write_text(
        source.replace(line, f"{line}            if name == 'model.safetensors':\n                {event}\n"),
        encoding="utf-8")
    done = project.finish("checkpoint.py", f"--out_dir={trained.folder / 'out'}", "--export=exported")
    assert done.returncode == (1 if words else 130) and words in done.stderr
    assert not [path.name for path in project.folder.iterdir() if "exported" in path.name]


# --- datasets ---

def dataset(project, text=TEXT, name="mine"):
    (project.folder / f"{name}.txt").write_text(text)
    return project.finish("prepare.py", f"--dataset={name}", f"--input={name}.txt")


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_prepare_is_killed_while_it_publishes(project, after):
    """After so many renames. Whatever comes next finds a whole dataset, the new one."""
    dataset(project)
    source = (project.folder / "files.py").read_text()
    line = "            (partial / name).replace(folder / name)\n"
    assert source.count(line) == 1
    killed = f"            os._exit(9) if name == {['train.bin', 'val.bin', 'meta.json', None][after]!r} else None\n"
    (project.folder / "files.py").write_text(source.replace(line, killed + line).replace(
        "    shutil.rmtree(partial, ignore_errors=True)\n", "    os._exit(9)\n"))
    assert dataset(project, TEXT[::-1]).returncode == 9
    (project.folder / "files.py").write_text(source)
    project.run("train.py", *TINY, "--dataset=mine", "--max_iters=1")
    folder = project.folder / "data" / "mine"
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", dtype="<u2") for split in ("train", "val")])
    assert CharTokenizer.from_text(TEXT).decode(ids.tolist()) == TEXT[::-1]
    assert sorted(p.name for p in folder.glob("[!.]*")) == ["meta.json", "train.bin", "val.bin"]


def test_a_text_that_changes_while_it_is_read(project):
    source = (project.folder / "prepare.py").read_text()
    line = "    if files_now() != job[\"files\"]:\n"
    assert source.count(line) == 1
    (project.folder / "prepare.py").write_text(source.replace(
        line, "    with open(input, 'a') as f:\n        f.write('more')\n" + line))
    assert "was changed while it was read" in dataset(project).stderr
    assert not (project.folder / "data" / "mine").exists()


@pytest.mark.parametrize("small", [True, False])
def test_a_text_that_changed_before_the_work_continues(project, small):
    """Though its size and its time are the same. If no pieces are small, all of the text was encoded already."""
    small_pieces(project) if small else None
    source = (project.folder / "prepare.py").read_text()
    line = "            show_progress(\"tokens\", done, total, started, new_tokens)\n"
    assert source.count(line) == 1
    (project.folder / "prepare.py").write_text(source.replace(line, line + "            os._exit(9)\n"))
    assert dataset(project, TEXT * 3).returncode == 9
    (project.folder / "prepare.py").write_text(source)
    path = project.folder / "mine.txt"
    times = path.stat()
    path.write_text(TEXT[::-1] * 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    how = ["--dataset=mine", "--input=mine.txt"]
    assert "is not the text that the earlier run read" in project.finish("prepare.py", *how).stderr
    project.run("prepare.py", *how)


@pytest.mark.parametrize("change, words", [
    (dict(vocab_size=30), "does not fit the tokenizer"), (dict(tokenizer={}), "does not fit the tokenizer"),
    (dict(tokenizer={"kind": "char", "chars": "\ud800"}, vocab_size=1), "does not fit the tokenizer"),
    (dict(tokenizer={"kind": "gpt2"}), "does not fit the tokenizer"), (dict(dtype="int16"), "dtype should be"),
    (dict(vocab_size=5, tokenizer={"kind": "char", "chars": "abcde"}), "has the id 28, but the vocabulary has only 5"),
    (dict(train_tokens=10), "does not have the 20 bytes"), (dict(val_tokens="9"), "val_tokens should be int")])
def test_a_dataset_that_does_not_fit_is_refused(project, change, words):
    dataset(project)
    path = project.folder / "data" / "mine" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in project.fails("train.py", *TINY, "--dataset=mine")


def test_a_run_that_is_killed_before_its_first_step_is_resumed(trained):
    """Once best.pt is written, and before the log has its first row."""
    (trained.folder / "early-copy").mkdir()
    project = Project(trained.folder / "early-copy")
    shutil.copytree(trained.folder / "data", project.folder / "data")
    source = (project.folder / "checkpoint.py").read_text()
    line = "    def write(self, **row):\n"
    assert source.count(line) == 1
    (project.folder / "checkpoint.py").write_text(source.replace(line, line + "        os._exit(9)\n"))
    how = [*TINY, "--max_iters=20", "--init_from=resume"]
    assert project.finish("train.py", *how).returncode == 9
    (project.folder / "checkpoint.py").write_text(source)
    assert "resuming out after step 0" in project.run("train.py", *how)
    trained.run("train.py", *how, "--out_dir=never-killed")
    assert same_run(trained.folder / "never-killed", project.folder / "out")
