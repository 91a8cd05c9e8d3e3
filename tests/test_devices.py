"""Every script on devices that are not here: emulated_device.py runs it as on three NVIDIA GPUs and on a Mac's.

Planted mistakes show that the emulation notices them. Below: float16's overflows, the padded head, and several
processes that run out of patience."""
import importlib.util
import json
import os
import re
import shutil
import socket

import numpy as np
import pytest
import torch

import fast
from checkpoint import load_checkpoint, load_model, load_pretrained, save_checkpoint, save_pretrained
from conftest import ROOT, TEXT, Project
from device import can_compile, missing_compiler, peak_flops
from fast import PaddedLinear, for_inference
from model import GPT, GPTConfig
from test_train import rows
from tokenizer import BPETokenizer

DEVICES = {"A100": {"EMULATED_GPU": "NVIDIA A100-SXM4-80GB", "EMULATED_CAPABILITY": "8.0"},
           "H100": {"EMULATED_GPU": "NVIDIA H100 80GB HBM3", "EMULATED_CAPABILITY": "9.0"},
           "T4": {"EMULATED_GPU": "Tesla T4", "EMULATED_CAPABILITY": "7.5"}, "Mac": {"EMULATE": "mps"}}
DTYPES = {"A100": "bfloat16", "H100": "bfloat16", "T4": "float16", "Mac": "bfloat16"}  # the fastest that is safe
SMALL = ["--dataset=tiny", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=8",
         "--eval_interval=4", "--log_interval=2", "--checkpoint_interval=4", "--max_iters=8", "--eval_tokens=320",
         "--optimizer=adamw", "--learning_rate=1e-3"]
on_all_devices = pytest.mark.parametrize("device", DEVICES)


class Machine(Project):
    """A project whose scripts run on any of the devices."""

    def __init__(self, folder):
        super().__init__(folder)
        shutil.copy(ROOT / "tests" / "emulated_device.py", folder)

    def attempt(self, device, script, *arguments, **environment):
        """Runs a script on a device, however it ends."""
        if device == "CPU":
            return self.finish(script, "--device=cpu", *arguments)
        return self.finish("emulated_device.py", script, *arguments, env=DEVICES[device] | environment)

    def on(self, device, script, *arguments, **environment):
        """Runs a script that must succeed; returns its standard output."""
        done = self.attempt(device, script, *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "does not compute" not in done.stderr, done.stderr
        return done.stdout

    def syncs(self, device, *arguments):
        """Trains; returns where it waits for the device, as emulated_device.py writes it."""
        self.on(device, "train.py", *arguments, EMULATED_SYNCS="syncs.json")
        return json.loads((self.folder / "syncs.json").read_text())

    def plant(self, script, code):
        """Adds code to a script: at its end, or in train.py where all is defined and the training begins."""
        path, begins = self.folder / script, '\nif __name__ == "__main__":\n'
        source = path.read_text(encoding="utf-8")
        assert script != "train.py" or source.count(begins) == 1
        before, begin, after = source.partition(begins if script == "train.py" else "\0")
        path.write_text(f"{before}\n{code}\n{begin}{after}", encoding="utf-8")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine with the dataset `tiny` and a model that was trained on its CPU."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    (machine.folder / "tiny.txt").write_text(TEXT)
    machine.run("prepare.py", "--dataset=tiny", "--input=tiny.txt")
    machine.on("CPU", "train.py", *SMALL, "--dtype=float32", "--max_iters=40", "--learning_rate=1e-2")
    return machine


@pytest.fixture
def other(machine, tmp_path):
    """Another such machine, to plant something on."""
    other = Machine(tmp_path)
    for name in ("data", "out"):
        shutil.copytree(machine.folder / name, other.folder / name)
    return other


UPLOADS = {("copy from memory that is not pinned", "device.py:to_device")}  # CUDA alone has pinned memory


def waits(syncs):
    """Those of ordinary steps: such as neither log nor evaluate nor save, with the settings of SMALL."""
    return [(call, where) for step, call, where in syncs if step is not None and step % 2]


def losses(folder):
    return np.array([[float(v or 0) for v in row] for row in rows(folder, ["loss", "train_loss", "val_loss"])])


def test_more_processes_than_gpus(machine):
    error = machine.attempt("A100", "train.py", *SMALL, "--device=cuda:1").stderr
    assert error == "error: device 'cuda:1' cannot be used: the last one of this machine is cuda:0\n"
    error = machine.attempt("A100", "train.py", *SMALL, "--device=cuda:0", LOCAL_WORLD_SIZE="2").stderr
    shared = "all processes would share it; name cuda, and each takes its own"
    assert error == f"error: device 'cuda:0' cannot be used: {shared}\n"
    error = machine.attempt("Mac", "train.py", *SMALL, RANK="0", WORLD_SIZE="2").stderr
    assert error == "error: several processes need CPUs or NVIDIA GPUs; device mps takes one, without torchrun\n"
    error = machine.attempt("A100", "train.py", *SMALL, LOCAL_RANK="1").stderr
    assert error == "error: device 'cuda' cannot be used: this machine has 1; start torchrun with --nproc_per_node=1\n"


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", None), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA L4", 121e12), ("Tesla T4", None), ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None)])
def test_peaks_are_those_of_this_gpu_only(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops(torch.device("cuda"), "bfloat16")[0] == flops


def test_compiling_needs_a_compiler(machine, monkeypatch):
    nowhere = {"PATH": "", "CXX": "", "CC": ""}
    for script, what in (("train.py", [*SMALL, "--out_dir=never"]), ("sample.py", ["--max_new_tokens=2"])):
        done = machine.finish(script, *what, "--device=cpu", "--compile=True", env=nowhere)
        assert done.returncode == 1 and " needs a C++ compiler (as from apt install g++)" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and "error: " in done.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if triton were there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for variable in nowhere:
        monkeypatch.setenv(variable, "")
    assert not can_compile(torch.device("cuda"))
    monkeypatch.setenv("CC", "my-cc")
    assert can_compile(torch.device("cuda"))


# --- training ---

@on_all_devices
def test_training_in_the_default_dtype(machine, device):
    out = f"default-{device}"
    printed = machine.on(device, "train.py", *SMALL, "--gradient_accumulation_steps=2", "--dropout=0.1", "--bias",
                         f"--out_dir={out}")
    assert f" on {'mps' if device == 'Mac' else 'cuda:0'} in {DTYPES[device]}" in printed
    assert ("data sheet" in printed) == (device != "Mac")
    if device == "H100":
        return  # chooses as an A100 does
    weights = torch.load(machine.folder / out / "best.pt", weights_only=True)["model"]
    assert weights["wte.weight"].data_ptr() == weights["lm_head.weight"].data_ptr()  # stored once
    machine.on(device, "train.py", "--init_from=resume", "--max_iters=12", f"--out_dir={out}")
    assert [int(i) for i, in rows(machine.folder / out, ["iter"])] == [2, 4, 6, 8, 10, 12]
    last = f"{float(rows(machine.folder / out, ['val_loss'])[-1][0]):.4f}"
    printed = machine.on(device, "train.py", "--init_from=resume", "--eval_only", f"--out_dir={out}")
    assert f"validation loss {last}" in printed


@pytest.mark.parametrize("optimizer, device", [("adamw", "A100"), ("adamw", "Mac"), ("muon", "H100"), ("muon", "T4"),
                                               ("muon", "Mac")])
def test_losses_in_float32_are_the_cpus(machine, device, optimizer):
    how = [*SMALL, "--dtype=float32", f"--optimizer={optimizer}", "--batch_size=4", "--gradient_accumulation_steps=2"]
    if not (machine.folder / optimizer).exists():
        machine.on("CPU", "train.py", *how, f"--out_dir={optimizer}")
    machine.on(device, "train.py", *how, f"--out_dir={optimizer}-{device}")
    found, expected = losses(machine.folder / f"{optimizer}-{device}"), losses(machine.folder / optimizer)
    assert found.shape == expected.shape and np.abs(found - expected).max() < 2e-4


@pytest.mark.parametrize("device", ["T4", "Mac"])
def test_patience(machine, device):
    printed = machine.on(device, "train.py", *SMALL, "--optimizer=muon", "--learning_rate=1e-12", "--eval_interval=1",
                         "--muon_learning_rate=1e-12", "--patience=2", f"--out_dir=patience-{device}")
    assert "stopping early" in printed


def test_a_run_moves_from_device_to_device(machine):
    """AdamW counts its steps on the CPU or on the device, and float16 has a loss scale that other dtypes lack."""
    machine.on("CPU", "train.py", *SMALL, "--optimizer=muon", "--max_iters=2", "--out_dir=moved")
    for n, device in enumerate(("T4", "Mac", "A100", "CPU", "Mac")):
        where = {"CPU": "cpu", "Mac": "mps"}.get(device, "cuda")
        syncs = machine.syncs(device, "--init_from=resume", f"--device={where}", f"--max_iters={2 * n + 4}",
                              "--out_dir=moved")
        assert device != "Mac" or set(waits(syncs)) == UPLOADS
    log = losses(machine.folder / "moved")
    assert len(log) == 6 and log[-1, 0] < log[0, 0]


@pytest.mark.parametrize("device", ["A100", "Mac"])
def test_fast_layers_and_the_compiler_are_used(other, device):
    other.plant("train.py", "print('layers:', *sorted({type(m).__name__ for m in raw_model.modules()}))")
    other.plant("device.py", """found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name == "triton" or found(name, *rest)""")
    printed = other.on(device, "train.py", *SMALL, "--eval_only")
    layers = printed.split("layers: ")[1].split("\n")[0].split()
    assert {"FusedAttention", "Dropout", "Linear"} < set(layers)
    assert ("PaddedLinear" in layers) == (", compiled;" in printed) == (device == "A100")


def test_an_old_gpu(other):
    """Too old for the compiler, and for bfloat16."""
    other.plant("device.py", """found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name == "triton" or found(name, *rest)""")
    printed = other.on("A100", "train.py", *SMALL, "--eval_only", EMULATED_GPU="NVIDIA GeForce GTX 1080",
                       EMULATED_CAPABILITY="6.1")
    assert " on cuda:0 in float16; " in printed


def test_gpt2s_recipe_and_finetuning(machine):
    """config/train_gpt2.py with a small model and a text of 2,000 byte pairs; its export is then finetuned."""
    (machine.folder / "data" / "openwebtext").mkdir()
    (machine.folder / "data" / "openwebtext" / "input.txt").write_text(TEXT[:9000])
    machine.run("prepare.py", "--dataset=openwebtext")
    how = ["config/train_gpt2.py", "--n_layer=2", "--n_head=2", "--n_embd=8", "--block_size=16", "--batch_size=2",
           "--gradient_accumulation_steps=2", "--max_iters=10", "--warmup_iters=2", "--eval_tokens=64",
           "--log_interval=1", "--dtype=float32"]
    for device in ("CPU", "A100"):
        machine.on(device, "train.py", *how, f"--out_dir=gpt2-{device}")
    found, expected = losses(machine.folder / "gpt2-A100"), losses(machine.folder / "gpt2-CPU")
    assert found.shape == (10, 3) and np.abs(found - expected).max() < 2e-4
    text = ["--start=", "--max_new_tokens=20", "--dtype=float32"]
    machine.on("A100", "checkpoint.py", "--out_dir=gpt2-A100", "--export=exported")
    assert machine.on("Mac", "sample.py", "--init_from=exported", *text) == machine.run(
        "sample.py", "--device=cpu", "--out_dir=gpt2-A100", *text)
    how = ["config/finetune_shakespeare.py", "--init_from=exported", "--dataset=openwebtext", "--max_iters=2",
           "--gradient_accumulation_steps=2", "--eval_tokens=64", "--out_dir=finetuned", "--block_size=8"]
    machine.on("T4", "train.py", *how)
    assert load_model(machine.folder / "finetuned")[0].config.block_size == 8


# --- what the scripts do with a model ---

cpu_texts = {}


@pytest.mark.parametrize("device", ["A100", "Mac"])
def test_sampling(machine, device):
    """In float32 the text is the CPU's: the emulated device draws the CPU's random numbers."""
    for how in (["--temperature=0"], ["--num_samples=3", "--top_k=5", "--repetition_penalty=1.2"]):
        how = ["--dtype=float32", *how]
        if how[1] not in cpu_texts:
            cpu_texts[how[1]] = machine.on("CPU", "sample.py", *how, "--start=The old", "--max_new_tokens=20")
        assert cpu_texts[how[1]] == machine.on(device, "sample.py", *how, "--start=The old", "--max_new_tokens=20")
    for how in (["--dtype=bfloat16", "--num_samples=2", "--top_p=0.9"], ["--dtype=float16", "--stop=e"],
                ["--dtype=int8", "--compile"], ["--compile", "--num_samples=2"]):
        assert machine.on(device, "sample.py", *how, "--start=The old", "--max_new_tokens=20").startswith("The old")


@pytest.mark.parametrize("device", ["T4", "H100"])
def test_sampling_in_the_default_dtype(other, device):
    other.plant("fast.py", """plain = for_inference
def for_inference(model, dtype, compile):
    print("dtype:", dtype)
    return plain(model, dtype, compile)""")
    assert f"dtype: {DTYPES[device]}\n" in other.on(device, "sample.py", "--start=The", "--max_new_tokens=3")


def test_pictures(machine):
    machine.on("Mac", "plot.py", "--start=The old", "--file=attention.png")
    assert (machine.folder / "attention.png").stat().st_size > 1000


def test_bench_train(machine):
    for device, how in (("A100", ["--optimizer=muon"]), ("Mac", ["--dropout=0.1"])):
        machine.on(device, "bench_train.py", *SMALL, *how, "--steps=1", "--json=train.json")
        record, = json.loads((machine.folder / "train.json").read_text())
        assert record["dtype"] == "bfloat16" and record["device"] == ("mps" if device == "Mac" else "cuda:0")


def test_bench_kv(other):
    source = (other.folder / "bench_kv.py").read_text(encoding="utf-8")
    source, n = re.subn(r"ones\([\d_]+", "ones(1_000_000", source)  # to measure the memory bandwidth
    assert n == 1
    (other.folder / "bench_kv.py").write_text(source, encoding="utf-8")
    how = ["--out_dir=out", "--prompt=4", "--new_tokens=4", "--repeats=1"]
    printed = other.on("A100", "bench_kv.py", *how)
    assert "the same text" in printed and "compiled decoding needs the package triton: it is left out" in printed
    assert "triton" in other.attempt("A100", "bench_kv.py", *how, "--compile=True").stderr
    assert "the same text" in other.on("Mac", "bench_kv.py", *how, "--dtype=float32", "--compile=False")


# --- planted mistakes ---

MISTAKES = {
    "batch": ("device.py", "train.py", """plain = to_device
def to_device(ids, device):
    return plain(ids, device).cpu()"""),
    "mask": ("model.py", "train.py --dtype=float32", """plain = causal_mask
def causal_mask(positions, S, dtype):
    return plain(positions, S, dtype).cpu()"""),
    "cache": ("model.py", "sample.py", """plain = KVCache.positions
KVCache.positions = lambda self, T: plain(self, T).cpu()"""),
    "sampler": ("model.py", "sample.py --top_k=3", """plain = keep_top_k
def keep_top_k(logits, k):
    return torch.where(plain(logits, k).cpu() > float("-inf"), logits, float("-inf"))"""),
    "generator": ("model.py", "sample.py", """plain = sample
def sample(logits, ids, temperature, top_k, top_p, repetition_penalty, generator):
    return plain(logits, ids, temperature, top_k, top_p, repetition_penalty, torch.Generator())""")}


@pytest.mark.parametrize("device", ["A100", "Mac"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_lies_on_the_cpu_by_mistake_is_found(other, device, mistake):
    script, command, code = MISTAKES[mistake]
    other.plant(script, code)
    if mistake == "mask":  # only written-out attention uses it in training
        other.plant("fast.py", "del FusedAttention.attend")
    script, *arguments = command.split()
    arguments += SMALL if script == "train.py" else ["--max_new_tokens=5", "--start=The"]
    done = other.attempt(device, script, *arguments)
    assert done.returncode == 1 and ("same device" in done.stderr or "device type for generator" in done.stderr)


@pytest.mark.parametrize("device, how", [
    ("A100", ["--dropout=0.1"]), ("H100", ["--optimizer=muon", "--gradient_accumulation_steps=2"]),
    ("T4", ["--optimizer=muon", "--dtype=float32", "--grad_clip=0"]), ("Mac", ["--optimizer=muon"])])
def test_a_training_step_does_not_wait_for_the_device(machine, device, how):
    syncs = machine.syncs(device, *SMALL, *how, "--out_dir=syncs")
    assert set(waits(syncs)) == (UPLOADS if device == "Mac" else set())
    within = [sync for sync in syncs if sync[2] in ("train.py:forward_backward", "train.py:update_weights")]
    logged = [sync for sync in syncs if sync[0] == 2]
    assert within == [] and 0 < len([s for s in logged if s[1] == "item"]) <= 4


def test_waiting_in_a_training_step_is_found(other):
    calls = ["loss.item()", "bool(loss > 0)", "int(loss)", "float(loss)", "f'{loss:.2f}'", "loss.tolist()",
             "loss.cpu()", "x.to('cpu')", "x.nonzero()", "x[x > 3]", "torch.cuda.synchronize()",
             "torch.zeros(9).to(device)", "torch.tensor([1.0], device=device)"]
    functions = "".join(f"def call{i}(x, loss): {call}\n" for i, call in enumerate(calls))
    other.plant("train.py", f"""{functions}
plain = forward_backward
def forward_backward(x, y):
    loss = plain(x, y)
    for i in range({len(calls)}):
        globals()[f"call{{i}}"](x, loss)
    return loss""")
    found = [where for _, where in waits(other.syncs("A100", *SMALL, "--max_iters=2"))]
    assert found == [f"train.py:call{i}" for i in range(len(calls))]


# --- float16's overflows ---

OVERFLOW = """
import itertools
calls = itertools.count()
raw_model.ln_f.weight.register_hook(lambda g: g.fill_(math.{kind}) if next(calls) == 3 else g)
plain = update_weights
def update_weights():
    before = [p.detach().clone() for p in raw_model.parameters()]
    norm = plain()
    same = all(torch.equal(a, b) for a, b in zip(before, raw_model.parameters()))
    print(f"step {{iter_num}}: scale {{scaler.get_scale()}}, {{'unchanged' if same else 'changed'}}")
    return norm
"""


@pytest.mark.parametrize("device, optimizer, kind", [("CPU", "muon", "nan"), ("CPU", "adamw", "inf"),
                                                     ("T4", "muon", "inf"), ("T4", "adamw", "nan")])
def test_an_overflow_in_float16_stops_every_optimizer(other, device, optimizer, kind):
    """The gradient of the last norm's gain overflows in step 3. AdamW has it, and Muon has others."""
    other.plant("train.py", OVERFLOW.format(kind=kind))
    how = [*SMALL, "--dtype=float16", f"--optimizer={optimizer}"]
    steps = re.findall(r"step (\d+): scale (\S+), (\w+)", other.on(device, "train.py", *how, "--out_dir=over"))
    assert steps == [(str(i), "65536.0" if i < 3 else "32768.0", "unchanged" if i == 3 else "changed")
                     for i in range(8)]
    checkpoint = load_checkpoint(other.folder / "over" / "latest.pt")
    assert checkpoint["scaler"]["scale"] == 32768 and np.isfinite(losses(other.folder / "over")).all()
    tensors = [*checkpoint["model"].values(),
               *(t for state in checkpoint["optimizer"]["state"].values() for t in state.values())]
    assert all(torch.isfinite(t).all() for t in tensors)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_an_optimizer_that_steps_in_spite_of_an_overflow_is_found(other, kind):
    other.plant("train.py", OVERFLOW.format(kind=kind))
    source = (other.folder / "train.py").read_text(encoding="utf-8")
    changed = source.replace("if not overflow:\n", "if not (overflow and type(o) is torch.optim.AdamW):\n")
    assert changed != source
    (other.folder / "train.py").write_text(changed, encoding="utf-8")
    printed = other.attempt("CPU", "train.py", *SMALL, "--dtype=float16", "--optimizer=muon").stdout
    assert "step 3: scale 32768.0, changed" in printed


# --- the padded head ---

def test_the_padded_head_is_the_plain_one(tmp_path):
    """For GPT-2's 50257 tokens: logits, loss, gradients, checkpoint, export and text."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8)
    plain = GPT(config).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(std=0.5)
    padded = GPT(config).eval()
    padded.load_state_dict(plain.state_dict())
    fast.replace_head(padded)
    assert type(padded.lm_head) is PaddedLinear and type(plain.lm_head) is torch.nn.Linear
    x, y = torch.randint(50257, (2, 2, 16))
    (a, loss_a), (b, loss_b) = plain(x, y), padded(x, y)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(loss_a, loss_b)
    loss_a.backward()
    loss_b.backward()
    for (name, p), q in zip(plain.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    tok = BPETokenizer()
    for name, model in (("plain", plain), ("padded", padded)):
        save_checkpoint(tmp_path / name / "best.pt", {"model": model.state_dict(), "model_config": vars(config),
                                                      "tokenizer": tok.state()})
        save_pretrained(model, tok, tmp_path / f"hf-{name}")
    a, b = (load_checkpoint(tmp_path / name / "best.pt")["model"] for name in ("plain", "padded"))
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf-plain" / file).read_bytes() == (tmp_path / "hf-padded" / file).read_bytes()
    ids = x[:1, :4]
    texts = [model.generate(ids, 20, temperature=0).tolist() for model in (
        plain, padded, load_model(tmp_path / "padded")[0], load_pretrained(tmp_path / "hf-padded")[0],
        for_inference(padded))]
    assert all(text == texts[0] for text in texts)


# --- several processes ---

TWO = """
import os, runpy, signal, sys
pids = []
for rank in range(2):
    pids.append(os.fork())
    if pids[-1] == 0:
        signal.alarm(120)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        sys.argv[:2] = sys.argv[1:2]
        runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_run_out_of_patience_together(other):
    """Without torchrun, the first process holds the store by which they talk."""
    other.plant("train.py", """class Slow:
    def __init__(self, store):
        self.wait, self.store = store.wait, store
    def get(self, key):
        time.sleep(0.3)
        return self.store.get(key)
if distributed.rank == 1:
    distributed.store = Slow(distributed.store)
finish = distributed.finish
def finish_and_say(code=0):
    print(f"process {distributed.rank} ends after step {iter_num}", flush=True)
    finish(code)
distributed.finish = finish_and_say""")
    (other.folder / "two.py").write_text(TWO)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    printed = other.run("two.py", "train.py", *SMALL, "--device=cpu", "--learning_rate=1e-12", "--eval_interval=1",
                        "--patience=2", "--max_iters=50", "--out_dir=together",
                        env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    step = load_checkpoint(other.folder / "together" / "latest.pt")["iter_num"]
    assert 2 <= step < 50 and "stopping early" in printed
    assert sorted(re.findall(r"process (\d) ends after step (\d+)", printed)) == [("0", str(step)), ("1", str(step))]


def test_a_static_cache_reuses_memory(other):
    """On CUDA, since a CUDA graph contains addresses. A cache is as good as new, and those in use share nothing."""
    (other.folder / "program.py").write_text("""
import torch
from fast import for_inference
from model import GPT, GPTConfig
model = for_inference(GPT(GPTConfig(block_size=16, vocab_size=9, n_layer=2, n_head=2, n_embd=8)).to("cuda"),
                      compile=True)
idx = torch.randint(9, (1, 5), device="cuda")


def addresses(cache):
    return [t.raw.data_ptr() for t in (*cache.k, *cache.v, cache.length)]


cache = model.new_cache(1)
first = model.prefill(idx, cache)
three = cache.repeat(3)
before, of_three = addresses(cache), addresses(three)
assert not set(before) & set(of_three) and int(three.length) == 5
assert torch.equal(three.k[1][2].raw, cache.k[1][0].raw) and three.k[1].raw[:, :, :5].abs().min() > 0
del cache
cache = model.new_cache(1)
assert addresses(cache) == before and int(cache.length) == 0 and cache.v[1].raw.abs().max() == 0
assert torch.equal(model.prefill(idx, cache).raw, first.raw)
second = model.new_cache(1)
assert not set(addresses(second)) & {*before, *of_three}
del three
assert addresses(cache.repeat(3)) == of_three and addresses(model.new_cache(1, 8)) != before
print("the same memory")
""")
    assert "the same memory" in other.on("A100", "program.py")


@pytest.mark.skipif(os.name == "nt", reason="other systems' compilers")
def test_paths_with_spaces_are_no_place_to_compile(monkeypatch):
    """PyTorch would print thousands of lines of the compiler's."""
    monkeypatch.setenv("CXX", "g++")
    assert missing_compiler(torch.device("cpu")) is None
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/My Files/tmp")
    assert "without spaces instead of /My Files/tmp" in missing_compiler(torch.device("cpu"))
