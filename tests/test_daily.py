"""What a run promises over its life: a schedule that stays, a best model that stays the best, figures that compare, and
a checkpoint that knows whether model.py still computes what it did."""
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, load_model
from conftest import TEXT, TINY
from defaults import choose_settings
from test_train import rows


def losses(folder):
    """(step, validation loss) of each evaluation in a run's log."""
    with open(folder / "log.csv", newline="") as f:
        return [(int(row["iter"]), float(row["val_loss"])) for row in csv.DictReader(f) if row["val_loss"]]


# --- the schedule ---

def rates(folder):
    return [float(rate) for rate, in rows(folder, ["lr"])]


def test_training_longer_does_not_move_the_schedule(trained):
    how = [*TINY, "--max_iters=30", "--log_interval=1", "--final_lr_fraction=0.2"]
    trained.run("train.py", *how, "--out_dir=longer")
    planned = rates(trained.folder / "longer")
    trained.run("train.py", "--init_from=resume", "--out_dir=longer", "--max_iters=60")
    found = rates(trained.folder / "longer")
    assert found[:30] == planned and found[30:] == pytest.approx([0.2 * 1e-3] * 30)
    # With lr_decay_iters named, the rate follows the new schedule.
    trained.run("train.py", "--init_from=resume", "--out_dir=longer", "--max_iters=80", "--lr_decay_iters=100")
    assert rates(trained.folder / "longer")[60] > 2 * found[-1]


def test_a_run_ends_where_its_schedule_does_or_before(trained):
    how = [*TINY, "--log_interval=1", "--lr_decay=linear"]
    trained.run("train.py", *how, "--max_iters=20", "--lr_decay_iters=40", "--out_dir=half")
    half = rates(trained.folder / "half")
    trained.run("train.py", "--init_from=resume", "--out_dir=half", "--max_iters=40")
    trained.run("train.py", *how, "--max_iters=40", "--out_dir=full")
    full = rates(trained.folder / "full")
    assert half == full[:20] and rates(trained.folder / "half") == full


def test_an_old_checkpoints_schedule(trained):
    """Format 2 had an absolute min_lr, and the schedule always ended at max_iters."""
    checkpoint = load_checkpoint(trained.folder / "out" / "latest.pt")
    config = {k: v for k, v in checkpoint["config"].items() if k not in ("final_lr_fraction", "lr_decay_iters")}
    for name in ("probe", "text", "wandb_id"):
        del checkpoint[name]
    (trained.folder / "old").mkdir()
    torch.save(checkpoint | {"format_version": 2, "config": config | {"min_lr": 5e-4, "learning_rate": 1e-3}},
               trained.folder / "old" / "latest.pt")
    new = load_checkpoint(trained.folder / "old" / "latest.pt")["config"]
    assert (new["final_lr_fraction"], new["lr_decay_iters"]) == (0.5, 60) and "min_lr" not in new
    trained.run("train.py", "--init_from=resume", "--out_dir=old", "--max_iters=70")
    with open(trained.folder / "old" / "log.csv", newline="") as f:
        assert [float(row["lr"]) for row in csv.DictReader(f)] == pytest.approx([5e-4] * 2)


# --- the best model ---

def test_step_0_is_in_the_log(trained):
    step, loss = losses(trained.folder / "out")[0]
    V = load_model(trained.folder / "out")[0].config.vocab_size
    assert step == 0 and loss == pytest.approx(math.log(V), abs=0.1)


def test_finetuning_does_not_lose_a_better_model(trained):
    """From a run of one's own, by its folder and by its file, at a rate that ruins the model."""
    before = load_checkpoint(trained.folder / "out" / "best.pt")
    for n, source in enumerate(("out", "out/best.pt")):
        printed = trained.run("train.py", f"--init_from={source}", "--dataset=tiny", f"--out_dir=ruined{n}",
                              "--batch_size=8", "--max_iters=20", "--eval_interval=10", "--learning_rate=1",
                              "--dtype=float32")
        first, *later = losses(trained.folder / f"ruined{n}")
        assert first[1] == pytest.approx(before["best_val_loss"], abs=0.01)
        assert all(loss > first[1] for _, loss in later)
        assert f"lowest validation loss {first[1]:.4f}" in printed
        after = load_checkpoint(trained.folder / f"ruined{n}" / "best.pt")
        assert after["best_val_loss"] == pytest.approx(first[1])
        assert all(torch.equal(t, after["model"][name]) for name, t in before["model"].items())
        assert load_checkpoint(trained.folder / f"ruined{n}" / "latest.pt")["config"]["optimizer"] == "adamw"


def test_a_runs_weights_with_fewer_positions_and_dropout(trained):
    trained.run("train.py", "--init_from=out", "--dataset=tiny", "--out_dir=short", "--block_size=16", "--max_iters=2",
                "--dropout=0.3")
    model, _, _ = load_model(trained.folder / "short")
    assert (model.config.block_size, model.config.dropout) == (16, 0.3)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    error = trained.fails("train.py", "--init_from=out", "--dataset=tiny", "--block_size=64")
    assert "block_size 64 needs more" in error


def test_a_text_with_the_characters_of_another_dataset(trained):
    """It is what a character model can be finetuned on."""
    (trained.folder / "few.txt").write_text(TEXT[:40] * 50, encoding="utf-8")
    trained.run("prepare.py", "--dataset=few", "--input=few.txt", "--tokenizer=tiny")
    tiny, few = (json.loads((trained.folder / "data" / name / "meta.json").read_text()) for name in ("tiny", "few"))
    assert few["tokenizer"] == tiny["tokenizer"] and few["sha256"] != tiny["sha256"]
    trained.run("train.py", "--init_from=out", "--dataset=few", "--max_iters=1", "--eval_tokens=320",
                "--out_dir=tuned-few")
    (trained.folder / "more.txt").write_text(TEXT[:40] + "é€", encoding="utf-8")
    error = trained.fails("prepare.py", "--dataset=more", "--input=more.txt", "--tokenizer=tiny")
    assert "the text has 2 characters that tiny does not have: 'é€'; replace them" in error
    assert not (trained.folder / "data" / "more").exists()
    assert "or the name of another dataset" in trained.fails("prepare.py", "--dataset=more", "--tokenizer=none")


def test_another_text_with_as_many_characters_is_refused(trained):
    other = TEXT.translate({ord(c): ord(c) + 256 for c in set(TEXT)})
    (trained.folder / "greek.txt").write_text(other, encoding="utf-8")
    trained.run("prepare.py", "--dataset=greek", "--input=greek.txt")
    assert "have different tokenizers" in trained.fails("train.py", "--init_from=out", "--dataset=greek")


def test_the_best_loss_starts_anew_with_another_text(trained):
    shutil.copytree(trained.folder / "out", trained.folder / "elsewhere")
    (trained.folder / "shuffled.txt").write_text("".join(sorted(TEXT)))  # the same characters, and harder to predict
    trained.run("prepare.py", "--dataset=shuffled", "--input=shuffled.txt")
    printed = trained.run("train.py", "--init_from=resume", "--out_dir=elsewhere", "--dataset=shuffled",
                          "--max_iters=80")
    assert "the text of shuffled is not that of the checkpoint" in printed
    best = load_checkpoint(trained.folder / "elsewhere" / "best.pt")
    assert best["text"]["dataset"] == "shuffled" and best["iter_num"] == 80


# --- bits per byte ---

@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_bits_per_byte(project, tokenizer):
    text = TEXT + "é" * 500
    (project.folder / "a.txt").write_text(text, encoding="utf-8")
    project.run("prepare.py", "--dataset=mine", "--input=a.txt", f"--tokenizer={tokenizer}")
    printed = project.run("train.py", *TINY, "--dataset=mine", "--max_iters=2", "--n_embd=16")
    meta = json.loads((project.folder / "data" / "mine" / "meta.json").read_text())
    _, tok, _ = load_model(project.folder / "out")
    ids = np.fromfile(project.folder / "data" / "mine" / "val.bin", dtype="<u2").tolist()
    size = len(b"".join(tok.token_bytes(i) for i in ids))
    assert meta["val_bytes"] == size and abs(size - len(tok.decode(ids).encode())) <= 2  # the cut may halve a character
    found = [loss * len(ids) / math.log(2) / size for _, loss in losses(project.folder / "out")]
    said = [float(part.split("(")[-1]) for part in printed.split(" bits per byte)")[:-1]]
    assert said == pytest.approx([*found, min(found[1:])], abs=1e-4)  # of each evaluation, and of the best model
    project.run("plot.py", "--what=loss", "--y=bits", "--file=bits.svg")
    assert f"at the end {found[-1]:.3f}" in (project.folder / "bits.svg").read_text()
    (project.folder / "out").rename(project.folder / "form\ffeed")  # XML cannot hold this character
    project.run("plot.py", "--what=loss", "--out_dir=form\ffeed", "--file=feed.svg")
    xml.dom.minidom.parse(str(project.folder / "feed.svg"))


# --- the probe ---

CHANGES = {  # of one character or a few: what model.py computes changes
    "exact GELU": ('approximate="tanh"', 'approximate="none"'),
    "mask": ("> positions[:, None]", ">= positions[:, None] + 2"),
    "scale": ("math.sqrt(q.size(-1))", "math.sqrt(q.size(-2))"),
    "residual": ("x = x + self.mlp", "x = x - self.mlp"),
    "norm": ("self.mlp(self.ln_2(x))", "self.mlp(self.ln_1(x))"),
    "final norm": ("self.lm_head(self.ln_f(x))", "self.lm_head(x)")}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_noticed(trained, tmp_path, change):
    from conftest import Project
    project, (old, new) = Project(tmp_path), CHANGES[change]
    for folder in ("data", "out"):
        shutil.copytree(trained.folder / folder, project.folder / folder)
    source = (project.folder / "model.py").read_text()
    assert source.count(old) == 1
    (project.folder / "model.py").write_text(source.replace(old, new))
    scripts = [("sample.py", "--max_new_tokens=2"), ("train.py", "--init_from=resume", "--max_iters=70"),
               ("checkpoint.py", "--export=exported"), ("plot.py",), ("train.py", "--init_from=out", "--dataset=tiny")]
    for script in scripts if change == "exact GELU" else scripts[:1]:
        assert "model.py no longer computes what it did when this was saved" in project.fails(*script)
    project.run("sample.py", "--max_new_tokens=2", env={"GPT_CHANGED_MODEL": "1"})


def test_an_unchanged_model_is_not(trained, tmp_path):
    from conftest import Project
    project = Project(tmp_path)
    shutil.copytree(trained.folder / "out", project.folder / "out")
    source = (project.folder / "model.py").read_text()
    (project.folder / "model.py").write_text(source.replace("# a smooth ReLU", "# smooth"))
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        assert project.finish("sample.py", "--max_new_tokens=2", f"--dtype={dtype}").stderr == ""


# --- Weights & Biases ---

def test_a_resumed_run_continues_at_weights_and_biases(trained, tmp_path):
    """By a stand-in, which is found first as it lies beside the script."""
    (trained.folder / "wandb.py").write_text("""
import json
def init(**how):
    print("wandb", json.dumps({k: how[k] for k in ("project", "name", "id", "resume")}))
    return Run(how["id"] or "new-id")
class Run:
    def __init__(self, id): self.id = id
    def log(self, row, step): pass
    def finish(self): pass
""")
    try:
        first = trained.run("train.py", *TINY, "--max_iters=2", "--wandb", "--wandb_project=plays", "--out_dir=w")
        again = trained.run("train.py", "--init_from=resume", "--out_dir=w", "--max_iters=4", "--wandb_name=mine")
    finally:
        (trained.folder / "wandb.py").unlink()
    found = [json.loads(line[6:]) for line in (first + again).splitlines() if line.startswith("wandb {")]
    assert found == [dict(project="plays", name="w", id=None, resume="allow"),
                     dict(project="plays", name="mine", id="new-id", resume="allow")]


# --- sample.py ---

def test_newlines_and_tabs_are_written_as_in_a_shell(project):
    (project.folder / "a.txt").write_text("a\tb\\n\n" * 200)
    project.run("prepare.py", "--dataset=mine", "--input=a.txt")
    project.run("train.py", *TINY, "--dataset=mine", "--max_iters=60", "--dropout=0")
    printed = project.run("sample.py", r"--start=\na\tb\\n", "--max_new_tokens=30", "--temperature=0")
    assert printed.startswith("\na\tb\\n\na\tb")
    assert project.run("sample.py", "--start=a", r"--stop=\n", "--temperature=0") == "a\tb\\n\n"


def test_a_text_without_newlines_has_a_default_prompt(project):
    (project.folder / "a.txt").write_text("abcabc " * 200)
    project.run("prepare.py", "--dataset=mine", "--input=a.txt")
    project.run("train.py", *TINY, "--dataset=mine", "--max_iters=2")
    assert len(project.run("sample.py", "--max_new_tokens=9")) == 11


def test_the_end_of_text_token_as_a_prompt(project):
    (project.folder / "a.jsonl").write_text("\n".join(json.dumps(line) for line in TEXT.splitlines()))
    project.run("prepare.py", "--dataset=mine", "--input=a.jsonl", "--tokenizer=gpt2")
    project.run("train.py", *TINY, "--dataset=mine", "--max_iters=2", "--n_embd=16")
    how = ["--max_new_tokens=8", "--temperature=0"]
    assert project.run("sample.py", "--start=<|endoftext|>", *how) == project.run("sample.py", "--start=", *how)
    model, tok, _ = load_model(project.folder / "out")
    ids = tok.encode("The old") + [tok.eot] + tok.encode(" fox")
    expected = tok.decode(model.generate([ids], 8, temperature=0, eos_id=tok.eot)[0].tolist())
    printed = project.run("sample.py", "--start=The old<|endoftext|> fox", *how)
    assert printed == expected.replace("<|endoftext|>", "") + "\n"


def test_prompts_from_the_keyboard(trained):
    done = subprocess.run(trained.command("sample.py", "--interactive", "--max_new_tokens=5"), cwd=trained.folder,
                          input="The\n\n€\nand\n", capture_output=True, text=True, encoding="utf-8")
    first, second, end = done.stdout.split("\n", 2)
    assert done.returncode == 0 and first.startswith("The") and second.startswith("and") and end.strip() == ""
    assert done.stderr.startswith("error: character '€'") and done.stderr.count("\n") == 1
    done = subprocess.run(trained.command("sample.py", "--interactive", "--max_new_tokens=0", "--start=The"),
                          cwd=trained.folder, input="and\n", capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.split() == ["The", "and"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT")
def test_ctrl_c_stops_the_first_text_and_the_conversation_goes_on(trained):
    arguments = ("--interactive", "--max_new_tokens=1000000", "--start=The\\n")
    with subprocess.Popen(trained.command("sample.py", *arguments), cwd=trained.folder, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout.readline() == "The\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("€\n", timeout=120)
    assert process.returncode == 0 and err.startswith("error: character '€'") and len(out) < 100_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_prompts_whose_texts_cannot_be_written(trained):
    """One error, not one for each of endless prompts."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(trained.command("sample.py", "--interactive", "--max_new_tokens=5"), cwd=trained.folder,
                              input="The\nand\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


# --- the model as a library ---

def test_ids_may_be_lists_and_integers_of_any_width(trained):
    model, tok, _ = load_model(trained.folder / "out")
    ids = tok.encode("The old")
    expected = model.generate(torch.tensor([ids]), 5, temperature=0)
    for other in ([ids], np.array([ids]), torch.tensor([ids], dtype=torch.int32)):
        assert torch.equal(model.generate(other, np.int64(5), temperature=0, repetition_penalty=1.0), expected)
    assert torch.isfinite(model(torch.tensor([ids], dtype=torch.int32), torch.tensor([ids], dtype=torch.int32))[1])
    for bad in (ids, [[1.5]], [[]]):
        with pytest.raises(ValueError, match=r"expected ids of shape \(B, T\)"):
            model.generate(bad, 5)
    model.train()
    with pytest.raises(ValueError, match="exceeds block_size"):
        model.attention_maps(torch.zeros(1, 33, dtype=torch.long))
    assert model.training


def test_sizes_that_nobody_names_fit_the_text(project):
    """A long text gets more steps than a short one and, but for byte pairs on a CPU, a larger model. What is named
    stays, and a resumed run keeps its choice."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters", "optimizer", "learning_rate",
             "muon_learning_rate", "eval_interval", "eval_tokens")
    for vocab_size in (65, 50257):
        for device in (cpu, gpu):
            small, large = (choose_settings(dict.fromkeys(names), tokens, vocab_size, device, False)
                            for tokens in (10 ** 4, 10 ** 8))
            assert small.keys() == large.keys() == set(names) and small["max_iters"] < large["max_iters"]
            assert small["n_embd"] < large["n_embd"] or (vocab_size, device) == (50257, cpu)
            assert all(chosen["n_embd"] % chosen["n_head"] == 0 for chosen in (small, large))
            assert small["muon_learning_rate"] > large["muon_learning_rate"]
    assert "muon_learning_rate" not in choose_settings(dict.fromkeys(names), 10 ** 4, 65, cpu, finetune=True)
    odd = choose_settings(dict.fromkeys(names) | {"n_embd": 50}, 20, 65, cpu, False)
    assert (odd["n_head"], odd["block_size"], "n_embd" in odd) == (1, 5, False)
    # A number of heads that does not divide the table's width makes the model a little narrower.
    for heads, width in ((3, 126), (4, 128), (200, 200)):
        narrow = choose_settings(dict.fromkeys(names) | {"n_head": heads}, 10 ** 6, 65, cpu, False)
        assert narrow["n_embd"] == width and "n_head" not in narrow
    assert choose_settings(dict.fromkeys(names) | {"n_embd": 2 ** 62}, 10 ** 6, 65, cpu, False)["n_head"] == 4096
    # At most 8 epochs, 6 on a GPU, 3 of byte pairs and in finetuning, whatever the number of tokens in a step.
    for vocab_size, finetune, device, epochs in ((65, False, cpu, 8), (65, False, gpu, 6), (65, True, cpu, 3),
                                                 (65, True, gpu, 3), (50257, False, cpu, 3), (50257, False, gpu, 3)):
        given = {"batch_size": 3, "block_size": 20, "gradient_accumulation_steps": 2}
        steps = choose_settings(dict.fromkeys(names) | given, 6000, vocab_size, device, finetune)["max_iters"]
        assert steps == epochs * 6000 / (3 * 20 * 2)
    # Evaluation takes a small share of the time, but all of the split if there is nothing else to do.
    for vocab_size, tokens in ((65, 10 ** 8), (50257, 10 ** 6), (50257, 10 ** 8)):
        c = choose_settings(dict.fromkeys(names), tokens, vocab_size, cpu, False)
        trained = c["max_iters"] * c["batch_size"] * c["block_size"]
        assert 2 * 9 * c["eval_tokens"] / 3 < trained / 5
    only = {"eval_tokens": None, "eval_only": True}
    assert choose_settings(only, 10 ** 6, 50257, cpu, True) == {"eval_tokens": 2_000_000}

    (project.folder / "short.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=short", "--input=short.txt")
    printed = project.run("train.py", "--dataset=short", "--max_iters=2", "--n_layer=1")
    assert printed.startswith("chosen to fit short: --batch_size=8 --block_size=64 --n_head=4 --n_embd=128 ")
    assert "n_layer" not in printed and "max_iters" not in printed.splitlines()[0]
    printed = project.run("train.py", "--init_from=resume", "--max_iters=3")
    assert "chosen" not in printed and "step 3/3" in printed
    printed = project.run("train.py", "--init_from=out", "--dataset=short", "--out_dir=tuned", "--max_iters=1")
    assert printed.startswith("chosen to fit short: --batch_size=8 --optimizer=adamw --learning_rate=0.0001 ")


def test_an_interactive_prompt_that_is_not_utf8_is_refused(trained):
    done = subprocess.run(trained.command("sample.py", "--interactive", "--max_new_tokens=5"), cwd=trained.folder,
                          input=b"The \xff old\nFILE:a\0b\nThe old\n", capture_output=True)
    assert done.returncode == 0 and b"The old" in done.stdout
    assert done.stderr == (b"error: the prompt is not UTF-8; convert it first, for example with iconv\n"
                           b"error: 'a\\x00b' cannot be the name of a file\n")
