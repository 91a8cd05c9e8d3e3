"""The scripts on a real NVIDIA GPU; without one, these tests are skipped.

    python -m pytest tests/test_gpu.py

The other tests run on the CPU, even if there is a GPU, or on an emulated device."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import TEXT, VISIBLE_GPUS, Project
from test_train import rows

GPU = (VISIBLE_GPUS or "0").split(",")[0]
SHAPE = ["--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=8"]
HOW = [*SHAPE, "--max_iters=40", "--eval_interval=20", "--log_interval=5", "--eval_tokens=4000", "--learning_rate=1e-3"]


def has_gpu():
    """Whether PyTorch finds an NVIDIA GPU."""
    if not torch.version.cuda:
        return False
    code = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": GPU}, text=True,
                          stdout=subprocess.PIPE)
    return done.stdout.strip() == "True"


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A project with the dataset `tiny`, whose scripts see the GPU."""
    if not has_gpu():
        pytest.skip("no NVIDIA GPU, or PyTorch without CUDA")
    project = Project(tmp_path_factory.mktemp("gpu"))
    (project.folder / "tiny.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=tiny", "--input=tiny.txt")
    return project


def on_gpu(machine, script, *arguments):
    """Runs a script that sees the GPU; returns what it printed."""
    return machine.run(script, *arguments, env={"CUDA_VISIBLE_DEVICES": GPU}, fresh=True)


def python(machine, code):
    """Runs a program that sees the GPU; returns what it printed."""
    (machine.folder / "program.py").write_text(code, encoding="utf-8")
    return on_gpu(machine, "program.py")


def losses(machine, out):
    return np.array([[float(v or 0) for v in row] for row in rows(machine.folder / out,
                                                                  ["loss", "train_loss", "val_loss"])])


@pytest.fixture(scope="module")
def on_cpu(machine):
    """The losses of runs in float32 on the CPU, by optimizer."""
    for optimizer in ("adamw", "muon"):
        machine.run("train.py", *HOW, f"--optimizer={optimizer}", "--device=cpu", "--dtype=float32",
                    f"--out_dir=cpu-{optimizer}")
    return {optimizer: losses(machine, f"cpu-{optimizer}") for optimizer in ("adamw", "muon")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype, compile, most", [("float32", False, 2e-3), ("float32", True, 2e-3),
                                                  ("bfloat16", True, 1e-2), ("float16", True, 1e-2)])
def test_losses_are_those_of_the_cpu(machine, on_cpu, optimizer, dtype, compile, most):
    """Within the rounding of the GPU's formats: TF32 for float32, and 16 bits for the others."""
    out = f"{optimizer}-{dtype}-{compile}"
    printed = on_gpu(machine, "train.py", *HOW, f"--optimizer={optimizer}", f"--dtype={dtype}", f"--compile={compile}",
                     f"--out_dir={out}")
    assert f" on cuda:0 in {dtype}{', compiled' if compile else ''}; " in printed
    found, expected = losses(machine, out), on_cpu[optimizer]
    assert found.shape == expected.shape
    print(f"\n{out}: losses differ by at most {np.abs(found - expected).max():.1e}")
    assert np.abs(found - expected).max() < most


@pytest.mark.parametrize("micro_steps, graphs", [(1, 2), (2, 0)])
def test_the_passes_of_a_step_are_cuda_graphs(machine, micro_steps, graphs):
    """One for the forward and one for the backward pass, as the profiler says, and none with gradient accumulation."""
    arguments = [*HOW, f"--gradient_accumulation_steps={micro_steps}", "--out_dir=graphs"]
    printed = python(machine, f"""
import sys
sys.argv = ["train.py", *{arguments!r}]
import torch
import train
def step(i):
    train.forward_backward(*train.get_batch(i))
    train.update_weights()
for i in range(5):
    step(i)
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
    for i in range(10):
        step(i)
    torch.cuda.synchronize()
print("graphs:", sum(event.count for event in profiler.key_averages() if event.key == "cudaGraphLaunch"))
""")
    assert f"graphs: {10 * graphs}\n" in printed


def test_micro_steps_add_up(machine, on_cpu):
    """The losses of steps in two parts are those of whole steps on the CPU."""
    on_gpu(machine, "train.py", *HOW, "--batch_size=4", "--gradient_accumulation_steps=2", "--optimizer=muon",
           "--dtype=float32", "--out_dir=two")
    assert np.abs(losses(machine, "two") - on_cpu["muon"]).max() < 2e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun(machine, on_cpu, strategy):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                str(machine.folder / "train.py")]
    done = subprocess.run([*torchrun, *HOW, "--optimizer=muon", "--dtype=float32", f"--strategy={strategy}",
                           f"--out_dir={strategy}"], cwd=machine.folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | {"CUDA_VISIBLE_DEVICES": GPU})
    assert done.returncode == 0, done.stdout
    assert np.abs(losses(machine, strategy) - on_cpu["muon"]).max() < 2e-3


def test_a_resumed_run_goes_on_as_before(machine):
    """Nearly: some of the GPU's kernels add in an order that changes from run to run."""
    how = ["--lr_decay_iters=40", "--warmup_iters=4", "--dropout=0.1", "--checkpoint_interval=20"]
    on_gpu(machine, "train.py", *HOW, *how, "--out_dir=whole")
    on_gpu(machine, "train.py", *HOW, *how, "--max_iters=20", "--out_dir=parts")
    on_gpu(machine, "train.py", "--init_from=resume", "--max_iters=40", "--out_dir=parts")
    difference = np.abs(losses(machine, "whole") - losses(machine, "parts")).max()
    print(f"\nresumed: losses differ by at most {difference:.1e}")
    assert difference < 5e-3


MODEL = """
import torch
from fast import for_inference
from model import GPT, GPTConfig
torch.set_float32_matmul_precision("highest")
torch.manual_seed(0)
plain = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=4, n_embd=128)).eval()
for p in plain.parameters():  # larger weights than at the start of training, so that tokens are clearly the likeliest
    if p.dim() == 2:
        p.data.mul_(4)
idx = torch.randint(65, (2, 7))


def prepared(dtype, compile):
    model = GPT(plain.config)
    model.load_state_dict(plain.state_dict())
    return for_inference(model.cuda(), dtype, compile)
"""


def test_greedy_text_in_float32_is_the_cpus(machine):
    """Uncompiled, compiled and without a cache, also beyond the end of the context."""
    printed = python(machine, MODEL + """
expected = plain.generate(idx, 100, temperature=0)
for compile in (False, True):
    model = prepared("float32", compile)
    for use_cache in (True, False):
        assert torch.equal(model.generate(idx.cuda(), 100, temperature=0, use_cache=use_cache).cpu(), expected)
print("the same text")
""")
    assert "the same text" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_compiled_step_is_a_cuda_graph(machine, dtype):
    """One for each token, as the profiler says. The logits are those of the uncompiled step, within the dtype's
    rounding."""
    printed = python(machine, MODEL + f"""
models = [prepared({dtype!r}, compile) for compile in (False, True)]
with torch.no_grad():
    caches = [model.new_cache(2) for model in models]
    for model, cache in zip(models, caches):
        model.prefill(idx.cuda(), cache)
    for i in range(20):
        token = torch.full((2,), i).cuda()
        a, b = (model.decode_one_token(token, cache).float() for model, cache in zip(models, caches))
        assert (a - b).abs().max() < {1e-4 if dtype == "float32" else 0.05} * a.abs().max(), (a - b).abs().max()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for i in range(10):
            models[1].decode_one_token(token, caches[1])
        torch.cuda.synchronize()
print("graphs:", sum(event.count for event in profiler.key_averages() if event.key == "cudaGraphLaunch"))
""")
    assert "graphs: 10\n" in printed


@pytest.mark.parametrize("arguments", [[], ["--compile"], ["--dtype=float32", "--num_samples=3", "--top_p=0.9"],
                                       ["--dtype=float16", "--compile", "--top_k=5"], ["--dtype=int8"]],
                         ids=["default", "compiled", "several", "float16", "int8"])
def test_sample(machine, on_cpu, arguments):
    printed = on_gpu(machine, "sample.py", "--out_dir=cpu-muon", "--start=The ", "--max_new_tokens=90", *arguments)
    assert printed.startswith("The ") and len(printed) > 94


def test_the_other_scripts(machine, on_cpu):
    printed = on_gpu(machine, "bench_train.py", *SHAPE, "--steps=3")
    assert "parameters on cuda:0 in " in printed
    printed = on_gpu(machine, "bench_kv.py", "--out_dir=cpu-muon", "--prompt=8", "--new_tokens=40", "--repeats=1")
    assert printed.count("the same text") == 1 and "compiled" in printed
