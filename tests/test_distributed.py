"""Several processes against one: the same losses, the same checkpoints, and an end that is clean whatever ends them."""
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import distributed
from checkpoint import load_checkpoint
from conftest import with_model
from test_train import rows, same_run, step_of_log

SETTINGS = ["--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
            "--gradient_accumulation_steps=4", "--muon_learning_rate=0.02", "--dtype=float32", "--log_interval=1",
            "--warmup_iters=0", "--final_lr_fraction=1.0"]  # a constant rate: a run may stop at any max_iters and go on
COLUMNS = ["iter", "tokens", "loss", "train_loss", "val_loss"]


def torchrun(trained, *arguments):
    """Starts train.py in two processes; options of torchrun's stand before it."""
    options = [a for a in arguments if a.startswith("--max-restarts")]
    command = trained.command("train.py", *SETTINGS, *(a for a in arguments if a not in options))
    command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    return subprocess.Popen(command, cwd=trained.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    printed = process.communicate(timeout=300)[0]
    assert (process.returncode == 0) == (code == 0), printed
    assert "terminate called" not in printed, printed
    return printed


def two_processes(trained, *arguments, code=0, meanwhile=lambda pid: None, n=2):
    """Runs train.py in two (or n) processes, with the variables that torchrun sets, but without its start-up. Calls
    meanwhile with the id of the second. Returns what the first prints."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def run(rank):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return trained.finish("train.py", *SETTINGS, *arguments, env={k: str(v) for k, v in env.items()}, number=rank,
                              meanwhile=meanwhile if rank == 1 else lambda pid: None)

    with ThreadPoolExecutor(n) as pool:
        all_n = list(pool.map(run, range(n)))
    assert [done.returncode for done in all_n] == [code] * n, all_n
    return all_n[0].stdout


def wait_for_step(out, step, process):
    while not (out / "latest.pt").exists() or load_checkpoint(out / "latest.pt")["iter_num"] < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def difference(a, b):
    """The largest difference between two runs' logs; the rows must be those of the same steps."""
    a, b = (np.array([[float(v or 0) for v in row] for row in rows(out, COLUMNS)]) for out in (a, b))
    assert a.shape == b.shape and (a[:, 0] == b[:, 0]).all()
    return np.abs(a - b).max()


def test_resuming_is_exact_in_three_processes(trained):
    """A sum of three numbers depends on their order."""
    how = ["--batch_size=3", "--lr_decay_iters=8"]
    two_processes(trained, *how, "--max_iters=8", "--out_dir=three", n=3)
    two_processes(trained, *how, "--max_iters=3", "--out_dir=three-halves", n=3)
    two_processes(trained, *how, "--init_from=resume", "--max_iters=8", "--out_dir=three-halves", n=3)
    assert same_run(trained.folder / "three", trained.folder / "three-halves")


WARM_UP = """
import torch
import torch.distributed as dist

import distributed
from model import GPT, MLP, GPTConfig


class Counting(MLP):  # counts its passes, and has a layer for tokens of an odd id, as a mixture of experts has
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("passes", torch.zeros(1, dtype=torch.long))
        self.odd = torch.nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        self.passes += 1
        return super().forward(x) + (self.odd(x) if x.size(1) > 1 else 0)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
model.h[0].mlp = Counting(model.config)
replica = distributed.replicate(model, torch.device("cpu"))
assert model.h[0].mlp.passes == 0 and all(p.grad is None for p in model.parameters())
ids = torch.arange(8)[None]
replica(ids, ids)[1].backward()
assert model.h[0].mlp.passes == 1 and model.h[0].mlp.odd.weight.grad is not None
dist.destroy_process_group()
"""


def test_preparing_ddp_leaves_no_trace(project):
    (project.folder / "warm_up.py").write_text(WARM_UP)
    project.run("warm_up.py")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_one_variable_alone_does_not_make_several_processes(trained, name):
    settings = [*SETTINGS, "--max_iters=2", "--eval_tokens=100"]
    if not (trained.folder / "alone").exists():
        trained.run("train.py", *settings, "--out_dir=alone")
    trained.run("train.py", *settings, f"--out_dir={name}", env={name: "2"})
    assert difference(trained.folder / "alone", trained.folder / name) == 0


def test_without_an_address_of_the_others_it_names_torchrun(trained):
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    assert "torchrun" in trained.fails("train.py", *SETTINGS, "--out_dir=nobody", env=env)


@pytest.mark.parametrize("env, words", [
    ({"RANK": "first", "WORLD_SIZE": "1"}, "RANK must be a number from 0 to WORLD_SIZE - 1"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "RANK must be"), ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK must be")])
def test_odd_variables_of_torchrun(trained, env, words):
    assert words in trained.finish("sample.py", "--max_new_tokens=1", env=env).stderr


def test_a_port_that_is_in_use(trained):
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        assert "torchrun" in trained.fails("train.py", *SETTINGS, "--out_dir=nobody", env=env)


def test_a_checkpoint_goes_on_in_any_number_of_processes(trained):
    settings = ["--optimizer=muon", "--eval_interval=10"]
    trained.run("train.py", *SETTINGS, *settings, "--out_dir=muon", "--max_iters=30")
    reference, out = trained.folder / "muon", trained.folder / "moved"
    resume = ["--init_from=resume", "--out_dir=moved", *settings]
    two_processes(trained, *resume, "--max_iters=10", "--strategy=fsdp")
    trained.run("train.py", *SETTINGS, *resume, "--max_iters=16")
    two_processes(trained, *resume, "--max_iters=24")
    two_processes(trained, *resume, "--max_iters=30", "--strategy=fsdp")
    assert rows(out, ["iter"]) == rows(reference, ["iter"])
    a, b = (np.array(rows(folder, ["loss"]), dtype=float) for folder in (reference, out))
    assert np.abs(a - b).max() < 1e-4
    a, b = (load_checkpoint(folder / "latest.pt") for folder in (reference, out))
    assert a["best_val_loss"] == pytest.approx(b["best_val_loss"], abs=1e-4)
    for name in a["model"]:
        torch.testing.assert_close(a["model"][name], b["model"][name], atol=1e-4, rtol=0)


def test_stopped_and_killed_processes_end_as_if_never_interrupted(trained):
    settings = ["--max_iters=120", "--eval_interval=60", "--checkpoint_interval=7", "--init_from=resume"]
    trained.run("train.py", *SETTINGS, *settings, "--out_dir=whole")
    out = trained.folder / "broken"

    def stop_at_step_7(pid):
        while step_of_log(out) < 7:
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)  # only one of the two; both end after the same step
    printed = two_processes(trained, *settings, "--out_dir=broken", code=143, meanwhile=stop_at_step_7)
    assert "stopped by signal 15 after step" in printed
    stopped = load_checkpoint(out / "latest.pt")["iter_num"]
    assert 7 <= stopped < 90
    process = torchrun(trained, "--max-restarts=1", *settings, "--out_dir=broken")
    wait_for_step(out, stopped + 14, process)
    workers = subprocess.check_output(["ps", "--no-headers", "-o", "pid", "--ppid", str(process.pid)], text=True)
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    printed = finish(process)  # torchrun starts both anew, and they go on from latest.pt
    assert printed.count("resuming broken after step") == 2
    assert difference(trained.folder / "whole", out) < 1e-4


def test_a_finetuning_run_that_torchrun_restarts_goes_on(trained):
    """It does not start again from the weights that it was changing."""
    trained.run("train.py", *SETTINGS, "--max_iters=4", "--out_dir=tuned")
    out = trained.folder / "tuned"
    before = (out / "latest.pt").stat().st_mtime_ns
    process = torchrun(trained, "--max-restarts=1", "--max_iters=60", "--eval_interval=30", "--checkpoint_interval=3",
                       "--init_from=tuned", "--out_dir=tuned")
    while (out / "latest.pt").exists() and (out / "latest.pt").stat().st_mtime_ns == before:
        time.sleep(0.02)
    wait_for_step(out, 9, process)
    workers = subprocess.check_output(["ps", "--no-headers", "-o", "pid", "--ppid", str(process.pid)], text=True)
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    printed = finish(process)
    assert "resuming tuned after step" in printed
    assert (trained.folder / "tuned.1").exists() and not (trained.folder / "tuned.2").exists()


def test_a_signal_that_torchrun_passes_on_once_more(monkeypatch):
    """A second one ends the program, unless it comes at once and there are several processes."""
    killed, handlers = [], []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(handler))
    monkeypatch.setattr(distributed, "_signal", 0)
    monkeypatch.setattr(distributed, "is_distributed", True)
    for now, expected in ((100.0, []), (100.5, []), (101.5, [signal.SIGTERM])):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        distributed._on_stop(signal.SIGTERM, None)
        assert killed == expected and handlers == [signal.SIG_DFL] * len(expected)
    assert distributed._signal == signal.SIGTERM
    monkeypatch.setattr(distributed, "_signal", 0)
    monkeypatch.setattr(distributed, "is_distributed", False)
    distributed._on_stop(signal.SIGINT, None)
    assert handlers == [signal.SIG_DFL] * 2


MLP_LINE = "        self.mlp = MLP(config)\n"
BLOCKS_LINE = "        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))\n"
ADD_MLP = "        x = x + self.mlp(self.ln_2(x))\n"
EXPERTS = """        here, both = self.ln_2(x), (self.mlp, self.other)
        use = (here[:, 0, 0] > 0).long()
        parts = [both[i](here[use == i]) if (use == i).any() else here[:0] for i in (0, 1)]
        x = x + torch.cat(parts)[torch.cat([(use == i).nonzero()[:, 0] for i in (0, 1)]).argsort()]
"""
RUNNING_MEAN = """        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        x = self.gelu(self.c_fc(x - self.mean))           # (B, T, 4C)
"""


def test_fsdp_of_a_layer_that_blocks_share(trained, tmp_path):
    share = f"{BLOCKS_LINE}        for b in self.h: b.mlp = self.h[0].mlp\n"
    project = with_model(tmp_path, trained, (BLOCKS_LINE, share))
    project.run("train.py", *SETTINGS, "--max_iters=5", "--out_dir=one")
    two_processes(project, "--max_iters=5", "--strategy=fsdp", "--out_dir=two")
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4


def test_fsdp_of_experts_that_not_every_process_needs(trained, tmp_path):
    """The gradients are those of one process. (The weights hardly change, so that the gradients can be compared.)"""
    two = f"{MLP_LINE}        self.other = MLP(config)\n"
    project = with_model(tmp_path, trained, (MLP_LINE, two), (ADD_MLP, EXPERTS))
    how = ["--batch_size=2", "--gradient_accumulation_steps=1", "--optimizer=adamw", "--max_iters=8",
           "--learning_rate=1e-9"]
    project.run("train.py", *SETTINGS, *how, "--out_dir=one")
    two_processes(project, *how, "--strategy=fsdp", "--out_dir=two")
    one, two = (np.array(rows(tmp_path / name, ["grad_norm"]), dtype=float) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_fsdp_names_a_parameter_that_it_cannot_split(trained, tmp_path):
    number = f"{MLP_LINE}        self.alpha = nn.Parameter(torch.tensor(1.0))\n"
    project = with_model(tmp_path, trained, (MLP_LINE, number))
    printed = finish(torchrun(project, "--max_iters=1", "--strategy=fsdp"), code=1)
    assert "error: fsdp cannot split the parameter h.0.alpha" in printed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_buffers_that_a_model_trains_are_those_of_the_first_process(trained, tmp_path, strategy):
    """So resuming is exact, and the validation loss is that of the model which is saved."""
    project = with_model(tmp_path, trained, ("        self.gelu = nn.GELU", '        self.register_buffer("mean", '
                                             "torch.zeros(config.n_embd))\n        self.gelu = nn.GELU"),
                         ("        x = self.gelu(self.c_fc(x))           # (B, T, 4C)\n", RUNNING_MEAN))
    how = [f"--strategy={strategy}", "--lr_decay_iters=8"]
    two_processes(project, *how, "--max_iters=8", "--out_dir=whole")
    two_processes(project, *how, "--max_iters=3", "--out_dir=halves")
    two_processes(project, *how, "--init_from=resume", "--max_iters=8", "--out_dir=halves")
    assert same_run(tmp_path / "whole", tmp_path / "halves")
    best = load_checkpoint(tmp_path / "whole" / "latest.pt")["best_val_loss"]
    printed = project.run("train.py", "--init_from=whole", "--dataset=tiny", "--eval_only", "--dtype=float32")
    assert f"validation loss {best:.4f}" in printed


def test_an_error_of_the_first_process_ends_all(trained):
    (trained.folder / "stuck" / "best.pt.tmp").mkdir(parents=True)  # where the file would be written
    printed = finish(torchrun(trained, "--max_iters=1", "--strategy=fsdp", "--out_dir=stuck"), code=1)
    assert printed.count("error: ") == 1 and "best.pt cannot be written" in printed
