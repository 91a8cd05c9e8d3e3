"""Runs of train.py: what they write, that they repeat, that they can be killed and resumed, and how they fail."""
import csv
import json
import math
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, load_model, probe, save_checkpoint
from conftest import TEXT, TINY, with_model
from files import UserError
from model import GPT, GPTConfig

LOSSES = ["iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm"]  # all columns but the clock's


def rows(folder, columns=LOSSES):
    """The columns of a run's log, without the row of step 0, which has two losses only."""
    with open(folder / "log.csv", newline="") as f:
        first, *rest = csv.DictReader(f)
        assert first["iter"] == "0" and float(first["val_loss"]) > 0
        return [[row[c] for c in columns] for row in rest]


def same_state(a, b):
    """Whether two checkpoints hold the same tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def same_run(a, b):
    """Whether two runs ended with the same log, weights and optimizer state."""
    x, y = load_checkpoint(a / "latest.pt"), load_checkpoint(b / "latest.pt")
    kept = ("model", "optimizer", "iter_num", "best_val_loss")
    return rows(a) == rows(b) and all(same_state(x[k], y[k]) for k in kept)


def test_log_and_checkpoint(trained):
    out = trained.folder / "out"
    log = rows(out, ["iter", "tokens", "loss", "train_loss", "val_loss", "lr"])
    assert [int(r[0]) for r in log] == list(range(5, 61, 5))
    assert all(int(r[1]) == int(r[0]) * 8 * 32 for r in log)
    assert all(bool(r[4]) == (int(r[0]) % 20 == 0) == bool(r[3]) for r in log)
    assert float(log[-1][2]) < float(log[0][2]) - 0.5
    for r in log:  # the rate of step i, of which there are i + 1 when it is done
        i, w, n = int(r[0]) - 1, 6, 60
        expected = 1e-3 * (i + 1) / (w + 1) if i < w else 1e-4 + 9e-4 * (1 + math.cos(math.pi * (i - w) / (n - w))) / 2
        assert float(r[5]) == pytest.approx(expected, rel=1e-9)
    seconds = [float(s) for s, in rows(out, ["seconds"])]
    assert seconds == sorted(seconds)
    checkpoint = load_checkpoint(out / "latest.pt")
    assert checkpoint["iter_num"] == 60 and checkpoint["model_config"]["n_embd"] == 32
    steps = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values() if "step" in state}
    assert steps == {60}  # no checkpoint counts as a step of an optimizer
    assert not checkpoint["config"].keys() & checkpoint["model_config"].keys()  # each value stands in one place
    assert checkpoint["tokenizer"]["kind"] == "char"
    assert checkpoint["best_val_loss"] == pytest.approx(min(float(r[4]) for r in log if r[4]))


def test_validation_loss_is_the_whole_splits(trained):
    model, tok, checkpoint = load_model(trained.folder / "out")
    val = torch.from_numpy(np.fromfile(trained.folder / "data/tiny/val.bin", dtype="<u2").astype(np.int64))
    n = (len(val) - 1) // 32
    with torch.no_grad():
        losses = [model(val[None, i * 32:i * 32 + 32], val[None, i * 32 + 1:i * 32 + 33])[1].item() for i in range(n)]
    assert sum(losses) / n == pytest.approx(checkpoint["best_val_loss"], abs=0.01)  # trained in bfloat16 where fast
    printed = trained.run("train.py", *TINY, "--init_from=resume", "--eval_only", "--dtype=float32")
    assert f"validation loss {sum(losses) / n:.4f}" in printed


def test_two_runs_are_the_same_and_the_first_is_kept(trained):
    first = trained.folder / "again"
    for _ in range(2):
        printed = trained.run("train.py", *TINY, "--max_iters=30", "--out_dir=again")
    assert "moved it to again.1" in printed
    assert same_run(first, trained.folder / "again.1")
    trained.run("train.py", *TINY, "--max_iters=30", "--out_dir=again", "--seed=2")
    assert rows(first) != rows(trained.folder / "again.1")


def test_an_epoch_sees_every_window_once(trained):
    """In the batches of train.py, imported up to its loop, as bench_train.py does."""
    script = f"""
import sys, numpy as np
sys.argv[1:] = {[*TINY, "--max_iters=1", "--out_dir=windows", "--batch_size=2"]}
import train
data, T = train.train_data, train.block_size
n = len(data) // T - 1
steps = [train.get_batch(step) for step in range(n)]  # two epochs: a step has two sequences
seen = [np.concatenate((x[row], y[row, -1:])) for x, y in steps for row in range(2)]
for epoch in range(2):
    starts = train.window_starts(epoch)
    assert (np.diff(np.sort(starts)) == T).all() and starts.min() >= 0 and starts.max() + T + 1 <= len(data)
    assert (np.diff(starts) != T).any()
    for start, window in zip(starts, seen[epoch * n:(epoch + 1) * n], strict=True):
        assert (window == data[start:start + T + 1]).all()
assert list(train.window_starts(0)) != list(train.window_starts(1))
"""
    (trained.folder / "epochs.py").write_text(script)
    trained.run("epochs.py")


def test_accumulation_is_a_larger_batch(trained):
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        trained.run("train.py", *TINY, "--max_iters=20", f"--out_dir={name}", f"--batch_size={batch}", "--dropout=0",
                    f"--gradient_accumulation_steps={accumulation}", "--dtype=float32")
    a, b = (np.array(rows(trained.folder / name, ["loss"]), dtype=float) for name in ("whole", "parts"))
    assert np.abs(a - b).max() < 1e-4


def step_of_log(folder):
    """The last step in the log of a run that is under way; 0 before it has one."""
    try:
        return int((folder / "log.csv").read_text().splitlines()[-1].split(",")[0])
    except (OSError, IndexError, ValueError):  # the file, its first row or a row that is being written is not there
        return 0


@pytest.mark.parametrize("how, code", [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_killed_and_resumed_is_the_run_that_was_never_killed(trained, how, code):
    arguments = [*TINY, "--max_iters=110", "--eval_interval=40", "--warmup_iters=60", "--init_from=resume"]
    reference, out = trained.folder / "unbroken", trained.folder / how
    if not reference.exists():
        trained.run("train.py", *arguments, "--out_dir=unbroken")
    step = 0
    for _ in range(2):  # stopped twice, wherever it happens to be
        def stop(pid, before=step):
            deadline = time.time() + 60
            while step_of_log(out) < before + 15 and time.time() < deadline:
                time.sleep(0.01)
            os.kill(pid, getattr(signal, how))
        done = trained.finish("train.py", *arguments, f"--out_dir={how}", meanwhile=stop)
        assert done.returncode == code, done.stderr
        step = step_of_log(out)
    assert 30 <= step < 110
    trained.run("train.py", *arguments, f"--out_dir={how}")
    assert load_checkpoint(out / "latest.pt")["iter_num"] == 110
    assert same_run(reference, out)


def test_a_run_stopped_before_its_first_evaluation_has_its_last_model_to_sample(trained):
    out = trained.folder / "brief"

    def stop(pid):
        deadline = time.time() + 60
        while step_of_log(out) < 10 and time.time() < deadline:
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
    trained.finish("train.py", *TINY, "--max_iters=9000", "--eval_interval=9000", "--out_dir=brief", meanwhile=stop)
    assert load_model(out)[2]["iter_num"] >= 10  # and not the untrained model
    trained.run("train.py", "--init_from=resume", "--out_dir=brief", "--eval_interval=1", "--max_iters=9000",
                "--patience=1", "--learning_rate=1e-12", "--muon_learning_rate=1e-12")
    assert (out / "best.pt").exists()


def test_resume_takes_the_runs_settings_and_what_is_named(trained):
    shutil.copytree(trained.folder / "out", trained.folder / "more")
    assert "nothing to do" in trained.run("train.py", "--init_from=resume", "--out_dir=more")
    trained.run("train.py", "--init_from=resume", "--out_dir=more", "--max_iters=70", "--learning_rate=0.5")
    checkpoint = load_checkpoint(trained.folder / "more" / "latest.pt")
    assert checkpoint["iter_num"] == 70 and checkpoint["model_config"]["n_embd"] == 32
    assert float(rows(trained.folder / "more", ["lr"])[-1][0]) > 0.04
    error = trained.fails("train.py", "--init_from=resume", "--out_dir=more", "--n_layer=3")
    assert "latest.pt has n_layer=2, not 3" in error
    (trained.folder / "other.txt").write_text("other letters: xyzw! " * 100)
    trained.run("prepare.py", "--dataset=other", "--input=other.txt")
    error = trained.fails("train.py", "--init_from=resume", "--out_dir=more", "--dataset=other")
    assert "have different tokenizers" in error


def test_resume_without_a_checkpoint_starts_from_scratch(trained):
    printed = trained.run("train.py", *TINY, "--max_iters=2", "--init_from=resume", "--out_dir=fresh")
    assert "no latest.pt in fresh: starting from scratch" in printed
    assert len(rows(trained.folder / "fresh")) == 1
    error = trained.fails("train.py", "--init_from=resume", "--out_dir=frehs")  # which describes no run
    assert "frehs has no latest.pt to resume from; name the folder of a run" in error
    assert not (trained.folder / "frehs").exists()


def test_early_stop_keeps_the_best(trained):
    printed = trained.run("train.py", *TINY, "--max_iters=2000", "--out_dir=early", "--patience=2",
                          "--learning_rate=1e-12", "--muon_learning_rate=1e-12", "--eval_interval=5")
    assert "stopping early: 2 evaluations" in printed
    assert load_checkpoint(trained.folder / "early" / "latest.pt")["iter_num"] < 2000
    best = load_checkpoint(trained.folder / "early" / "best.pt")
    lowest = min(float(v) for v, in rows(trained.folder / "early", ["val_loss"]) if v)
    assert best["best_val_loss"] == pytest.approx(lowest, rel=1e-9)


@pytest.mark.parametrize("interval", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run(trained, interval):
    out = trained.folder / f"hot-{interval}"
    shutil.copytree(trained.folder / "out", out)
    before = (out / "latest.pt").read_bytes()
    error = trained.fails("train.py", "--init_from=resume", f"--out_dir={out.name}", "--max_iters=500", "--grad_clip=0",
                          "--learning_rate=1e30", "--muon_learning_rate=1e30", f"--checkpoint_interval={interval}")
    assert "finite" in error or "nan" in error
    assert interval == 1 or before == (out / "latest.pt").read_bytes()
    checkpoint = load_checkpoint(out / "latest.pt")
    assert all(torch.isfinite(w).all() for w in checkpoint["model"].values())


def test_a_rate_that_ends_early_is_said(trained):
    printed = trained.run("train.py", *TINY, "--max_iters=3", "--lr_decay_iters=2", "--final_lr_fraction=0",
                          "--out_dir=ends-early")
    assert "the rate is 0 from step 2 on; to learn more: --lr_decay_iters=3" in printed


def test_a_loss_that_is_nan_is_not_the_lowest(trained):
    done = trained.finish("train.py", *TINY, "--max_iters=1", "--eval_tokens=320", "--learning_rate=1e20",
                          "--out_dir=no-number")
    assert "validation loss nan" in done.stdout and "lowest" not in done.stdout
    assert "the loss at step 1 is not finite" in done.stderr


def test_a_missing_dataset_is_prepared(project):
    printed = project.run("train.py", *TINY, "--dataset=shakespeare_char", "--max_iters=1", "--eval_tokens=320")
    assert "preparing it" in printed and (project.folder / "data/shakespeare_char/meta.json").exists()


@pytest.mark.parametrize("argument, words", [
    ("--dataset=none", "no text for the dataset 'none'"), ("--block_size=100000", "too few for a block_size of 100000"),
    ("--n_head=5", "divisible by n_head"), ("--optimizer=sgd", "'adamw' or 'muon', got 'sgd'"),
    ("--device=gpu", "device 'gpu' cannot be used: not one of cpu, cuda"),
    ("--dtype=int3", "got 'int3'"), ("--batch_size=0", "batch_size"),
    ("--n_layer=0", "n_layer must be above 0"), ("--block_size=-1", "block_size must be above 0"),
    ("--max_iters=-1", "max_iters"), ("--dropout=1.5", "dropout"), ("--learning_rate=nan", "learning_rate"),
    ("--muon_learning_rate=3e38", "muon_learning_rate"),
    ("--beta1=1.0", "beta1"), ("--seed=-1", "seed"), ("--strategy=zero", "'ddp' or 'fsdp', got 'zero'"),
    ("--strategy=fsdp", "start them with torchrun"), ("--dataset=compiled", "the name of a folder in data/")])
def test_errors(trained, argument, words):
    before = (trained.folder / "out" / "latest.pt").read_bytes()
    assert words in trained.fails("train.py", *TINY, argument)
    assert before == (trained.folder / "out" / "latest.pt").read_bytes()


def test_a_checkpoint_of_the_first_version_goes_on(trained):
    """Version 1 had the model's shape twice, and a setting that has gone or come since does not matter."""
    out = trained.folder / "version1"
    out.mkdir()
    for name in ("latest.pt", "best.pt"):
        checkpoint = load_checkpoint(trained.folder / "out" / name)
        shape = checkpoint.pop("model_config")
        checkpoint["config"] |= {k: v for k, v in shape.items() if k != "vocab_size"} | {"gone_since": 3}
        del checkpoint["config"]["grad_clip"]  # as if it had come since
        torch.save(checkpoint | {"model_args": shape, "format_version": 1}, out / name)
    (out / "log.csv").write_bytes((trained.folder / "out" / "log.csv").read_bytes())
    assert load_model(out)[0].config == load_model(trained.folder / "out")[0].config
    for name in ("version1", "version2"):
        if name == "version2":
            shutil.copytree(trained.folder / "out", trained.folder / name)
        trained.run("train.py", "--init_from=resume", f"--out_dir={name}", "--max_iters=70")
    assert same_run(out, trained.folder / "version2")


@pytest.mark.parametrize("change, words", [
    (lambda c: c["model_config"].update(rotary=True), "the model setting 'rotary', which model.py does not know"),
    (lambda c: c["model_config"].update(n_layer=0), "n_layer must be a positive integer"),
    (lambda c: c["model"].pop("ln_f.weight"), "the tensor ln_f.weight is missing"),
    (lambda c: c["model"].update(new=torch.ones(1)), "the tensor new is unknown to the model"),
    (lambda c: c["model"].update({"ln_f.weight": torch.ones(3)}), "of shape (3,), not (32,)")])
def test_a_checkpoint_that_does_not_fit_the_model_is_named(trained, tmp_path, change, words):
    checkpoint = load_checkpoint(trained.folder / "out" / "best.pt")
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "best.pt")
    assert words in trained.fails("sample.py", f"--out_dir={tmp_path}")


def test_an_untrained_model_has_the_loss_that_it_should(trained):
    printed = trained.run("train.py", *TINY, "--max_iters=1", "--out_dir=untrained")
    expected = float(printed.split(") = ln(29) = ")[1].split()[0])
    assert float(printed.split("step 0/1  train loss ")[1].split()[0]) == pytest.approx(expected, abs=0.05)


def test_a_damaged_checkpoint_is_named(trained):
    out = trained.folder / "damaged"
    out.mkdir()
    (out / "latest.pt").write_bytes((trained.folder / "out" / "latest.pt").read_bytes()[:5000])
    for script, how in (("train.py", "--init_from=resume"), ("sample.py", "--seed=1")):
        assert "latest.pt is damaged" in trained.fails(script, how, "--out_dir=damaged")


def test_checkpoints_hold_no_code_and_nothing_that_is_not_finite(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"format_version": 1, "model": os.system}, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"model": {"w": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"\['w'\] is not finite"):
        save_checkpoint(path, {"model": {"w": torch.tensor([1.0, math.inf])}})
    assert load_checkpoint(path)["model"]["w"].sum() == 3
    torch.save({"other": 1}, path)
    with pytest.raises(ValueError, match="checkpoint format None"):
        load_checkpoint(path)


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "sample.py"])
def test_help_lists_every_setting(project, script):
    printed = project.run(script, "--help")
    settings = [line for line in printed.splitlines() if line.startswith("  --")]
    assert len(settings) > 3 and all(len(line.split(None, 2)) == 3 and len(line) > 45 for line in settings)


@pytest.mark.parametrize("config", ["quick", "train_shakespeare_char"])
def test_shipped_configs_run(project, config):
    project.run("train.py", f"config/{config}.py", "--max_iters=2", "--eval_tokens=1000")


def test_what_cannot_be_resumed_is_named(trained):
    out = trained.folder / "no-resume"
    shutil.copytree(trained.folder / "out", out)
    how = ["--init_from=resume", "--out_dir=no-resume", "--max_iters=70"]
    assert "latest.pt has optimizer=muon, not adamw" in trained.fails("train.py", *how, "--optimizer=adamw")
    shutil.copy(out / "best.pt", out / "latest.pt")
    assert "latest.pt lacks 'optimizer'" in trained.fails("train.py", *how)
    (out / "latest.pt").unlink()
    assert "has no latest.pt to resume from" in trained.fails("train.py", *how)


def test_a_new_key_of_the_config_is_a_setting(project):
    """A researcher adds a field to GPTConfig and a setting of the same name: training, resuming and sampling use it."""
    (project.folder / "tiny.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=tiny", "--input=tiny.txt")
    source = (project.folder / "model.py").read_text()
    assert source.count("    dropout: float = 0.0 ") == 1
    source = source.replace("    dropout: float", "    width: int = 4\n    dropout: float")
    source = source.replace("4 * config.n_embd", "config.width * config.n_embd")
    (project.folder / "model.py").write_text(source)
    source = (project.folder / "train.py").read_text()
    source = source.replace("bias = False ", "width = 4  # of the MLP\nbias = False ")
    (project.folder / "train.py").write_text(source)
    project.run("train.py", *TINY, "--width=3", "--max_iters=2")
    project.run("train.py", "--init_from=resume", "--max_iters=4")

    checkpoint = load_checkpoint(project.folder / "out" / "latest.pt")
    assert checkpoint["model_config"]["width"] == 3 and checkpoint["model"]["h.0.mlp.c_fc.weight"].shape == (96, 32)
    project.run("sample.py", "--max_new_tokens=5")
    assert "latest.pt has width=3, not 2" in project.fails("train.py", "--init_from=resume", "--width=2")


def test_a_model_without_dropout(project):
    """A researcher removes it, with the field of GPTConfig."""
    (project.folder / "tiny.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=tiny", "--input=tiny.txt")
    path = project.folder / "model.py"
    source = re.sub(r"\n    dropout: float = .*|\n        if not 0\.0 <= self\.dropout.*\n.*", "", path.read_text())
    source = source.replace("nn.Dropout(config.dropout)", "nn.Identity()").replace(", self.attn_dropout)", ")")
    assert "config.dropout" not in source and "self.dropout <" not in source
    path.write_text(source)
    project.run("train.py", *TINY, "--max_iters=4")
    project.run("train.py", *TINY, "--init_from=out", "--out_dir=tuned", "--max_iters=4")
    project.run("sample.py", "--max_new_tokens=5")
    project.run("bench_train.py", *TINY, "--steps=1")
    assert "model.py does not compute what GPT-2 does" not in project.finish("checkpoint.py", "--export=folder").stderr
    assert json.loads((project.folder / "folder" / "config.json").read_text())["attn_pdrop"] == 0.0


def test_a_checkpoint_with_the_tokenizer_of_another_model(trained, tmp_path):
    checkpoint = load_checkpoint(trained.folder / "out" / "best.pt")
    save_checkpoint(tmp_path / "best.pt", checkpoint | {"tokenizer": {"kind": "gpt2"}})
    with pytest.raises(UserError, match="its tokenizer has 50257 tokens, but its model "):
        load_model(tmp_path)


def test_a_probe_of_tokens_that_are_never_chosen():
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4)).eval()
    before = probe(model)
    model.lm_head.register_forward_hook(lambda _, x, logits: logits.index_fill(-1, torch.tensor([1]), -math.inf))
    after = probe(model)
    assert torch.equal(after[1:-1:9], torch.zeros(8)) and torch.equal(after[:-1:9], before[:-1:9])


@pytest.mark.parametrize("changes", [
    [("self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)",
      "self.q, self.k, self.v = (nn.Linear(config.n_embd, config.n_embd) for _ in range(3))"),
     ("self.c_attn(x).split(C, dim=2)", "self.q(x), self.k(x), self.v(x)")],
    [("        self.lm_head.weight = self.wte.weight", "        del self.lm_head"),
     ("self.lm_head(self.ln_f(x))", "F.linear(self.ln_f(x), self.wte.weight)")],
    [("ignore_index=-1)", "ignore_index=-1), x")]], ids=["three layers for q, k, v", "no lm_head", "more outputs"])
def test_a_change_trains_resumes_and_writes(tmp_path, trained, changes):
    project = with_model(tmp_path, trained, *changes)
    project.run("train.py", *TINY, "--max_iters=2")
    project.run("train.py", "--init_from=resume", "--max_iters=4")
    for dtype in ("float32", "int8"):
        assert project.run("sample.py", f"--dtype={dtype}", "--start=The", "--max_new_tokens=5").startswith("The")
