"""Where the time of a training step goes, and how near it comes to what the machine's matrix products can do.

    python bench_train.py config/quick.py                            # any settings of train.py's model and machine
    python bench_train.py config/quick.py --dtype=float32 --steps=50 --profile
    python bench_train.py config/quick.py --json=train.json          # for plot.py --what=train

The other arguments go to train.py, which is executed here for one step, in a temporary folder; then its own model,
batches and optimizers are timed. The settings below are this script's; those of train.py: python train.py --help
"""
import contextlib
import io
import json as json_format
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

steps = 30                # steps to time, after 3 to warm up; medians are shown
profile = False           # also print the time of each of PyTorch's operators, the largest first
json: str | None = None   # a file for the figures

words, arguments = sys.argv[1:], []  # arguments: those for train.py
sys.argv[1:] = []
while words:
    word = words.pop(0)
    mine = word.partition("=")[0] in ("--steps", "--profile", "--json", "--help", "-h")
    (sys.argv if mine else arguments).append(word)
    if word in ("--steps", "--json") and words:
        sys.argv.append(words.pop(0))
exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))
own = ("init_from=resume", "out_dir", "max_iters", "eval_only", "eval_tokens", "tensorboard", "wandb")
if any(a.startswith(tuple(f"--{name}" for name in own)) for a in arguments):
    sys.exit(f"error: bench_train.py decides itself on {', '.join(own)}; leave them out")
if steps < 1:
    sys.exit(f"error: steps must be at least 1, got {steps}")

# --- train.py, for one step ---

path = Path(__file__).resolve().parent / "train.py"
namespace = {"__name__": "bench_train", "__file__": str(path)}  # as "__main__", train.py would end the process
with tempfile.TemporaryDirectory() as folder:
    sys.argv[1:] = [*arguments, "--max_iters=1", "--eval_tokens=1", f"--out_dir={folder}/out"]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
train = SimpleNamespace(**namespace)
on_cuda = train.device_type == "cuda"


def clock():
    """Seconds, after all work on the device is done."""
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


# --- the parts of a step ---

PARTS = "data", "forward", "backward", "optimizer"


def timed_step(i):
    """train.py's step i -> the seconds of each of PARTS. Clipping belongs to the optimizer's."""
    seconds, mark = dict.fromkeys(PARTS, 0.0), clock()

    def add(part):
        nonlocal mark
        now = clock()
        seconds[part] += now - mark
        mark = now

    x, y = train.get_batch(i)
    add("data")
    for micro, (xm, ym) in enumerate(zip(x.split(train.micro_rows), y.split(train.micro_rows))):
        train.sync_gradients(micro == train.micro_steps - 1)
        with train.autocast:
            loss = train.model(xm, ym)[1] / train.micro_steps
        add("forward")
        train.scaler.scale(loss).backward()
        add("backward")
    for optimizer, _ in train.optimizers:
        train.scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(train.params, train.grad_clip or torch.inf, foreach=True)
    for optimizer, _ in train.optimizers:
        train.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    train.scaler.update()
    add("optimizer")
    return seconds


# --- memory ---

def local_bytes(tensors):
    """Bytes of these tensors in this process; of a sharded one, its shard."""
    return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)


def measured_memory():
    """Bytes of the parameters, the gradients, the optimizers' state, and what the forward pass keeps for the backward
    pass: each storage once, without the parameters themselves."""
    kept = {}
    parameters = {p.untyped_storage()._cdata for p in train.params}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    x, y = (ids[:train.micro_rows] for ids in train.get_batch(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), train.autocast:
        loss = train.model(x, y)[1]
    activations = sum(storage.nbytes() for storage in kept.values())  # what fsdp has freed since is empty now
    loss.backward()
    memory = {"parameters": local_bytes(train.params), "gradients": local_bytes(p.grad for p in train.params),
              "optimizer": local_bytes(t for optimizer, _ in train.optimizers for state in optimizer.state.values()
                                       for t in state.values() if isinstance(t, torch.Tensor) and t.dim()),
              "activations": activations}
    for optimizer, _ in train.optimizers:
        optimizer.zero_grad()
    return memory


def memory_by_formula():
    """The same by counting; README.md explains the terms. A compiled model keeps less, and computes some anew."""
    c, T = train.raw_model.config, train.block_size
    P = train.raw_model.num_parameters()
    matrices = 12 * c.n_layer * c.n_embd ** 2  # numbers in the blocks' matrices
    size = 4 if train.dtype == "float32" else 2  # bytes of a number in the products' dtype
    layer = 8 * c.n_embd + 14 * size * c.n_embd  # bytes a token
    if train.device_type == "cpu" and (train.dtype == "bfloat16" or c.dropout):  # attention's weights, written out
        layer += size * c.n_head * T * (3 if c.dropout else 1)
    if c.dropout:
        layer += 2 * size * c.n_embd
    ends = (4 + size + (4 if c.dropout else 0)) * c.n_embd + 4 * c.vocab_size
    copies = 0 if size == 4 else size * (matrices + c.vocab_size * c.n_embd)  # of the matrices, in the products' dtype
    shards = train.world if train.strategy == "fsdp" else 1
    if train.strategy == "fsdp":  # a block is freed after use; embeddings and last norm stay for the backward pass
        copies += 4 * (P - train.raw_model.num_parameters(embeddings=False) + c.n_embd * (1 + c.bias))
    return {"parameters": 4 * P // shards, "gradients": 4 * P // shards,
            "optimizer": (8 * P - (4 * matrices if train.optimizer == "muon" else 0)) // shards,
            "activations": train.micro_rows * T * (c.n_layer * layer + ends) + copies}


# --- the machine ---

def evaluation_speed():
    """Tokens a second of an evaluation."""
    namespace["eval_tokens"] = n = min(len(train.val_data) - 1, 4 * train.rows * train.block_size)
    start = clock()
    train.evaluate(train.val_data)
    return n / (clock() - start)


def matrix_peak(dtype):
    """FLOP/s of this machine's products of large square matrices, the best of ten."""
    n, times = (8192 if on_cuda else 2048), []
    a, b = (torch.randn(n, n, device=train.device).to(dtype) for _ in range(2))
    for _ in range(10):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * n ** 3 / min(times)


for i in range(3):
    timed_step(i)
memory, formula = measured_memory(), memory_by_formula()
measured = [timed_step(i) for i in range(3, 3 + steps)]
parts = {part: statistics.median(m[part] for m in measured) for part in PARTS}
step_seconds = statistics.median(sum(m.values()) for m in measured)
peak_memory = train.peak_memory()  # before matrix_peak, whose matrices are no part of training
evaluation = evaluation_speed()
peaks = {dtype: matrix_peak(getattr(torch, dtype)) for dtype in dict.fromkeys(("float32", train.dtype))}
tokens = train.rows * train.block_size // train.world
flops = tokens * train.raw_model.flops_per_token(train.block_size) / step_seconds

train.say(f"{' '.join(arguments) or 'the default settings of train.py'}: {train.raw_model.num_parameters():,} parameters on "
          f"{train.device} in {train.dtype}{', compiled' if train.compile else ''}, {tokens:,} tokens a step")
train.say(f"a step: {step_seconds * 1e3:.1f} ms (median of {steps}), {tokens / step_seconds:,.0f} tokens/s")
for part, seconds in parts.items():
    train.say(f"  {part:<10} {seconds * 1e3:8.2f} ms  {seconds / step_seconds:4.0%}")
train.say(f"evaluation: {evaluation:,.0f} tokens/s")
train.say(f"arithmetic: {flops / 1e9:,.0f} GFLOP/s; this machine's matrix products: "
          + ", ".join(f"{peak / 1e9:,.0f} in {dtype} (the step reaches {flops / peak:.0%})" for dtype, peak in peaks.items()))
train.say("memory, measured and by formula: " + ", ".join(
    f"{part} {memory[part] / 1e6:,.1f} MB ({formula[part] / 1e6:,.1f})" for part in formula)
    + f", together {sum(memory.values()) / 1e6:,.1f} MB ({sum(formula.values()) / 1e6:,.1f})")
train.say(f"peak of the {'device' if on_cuda else 'process, with all of its libraries'}: {peak_memory / 1e6:,.0f} MB")
if profile:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(10):
            timed_step(i)
    train.say(f"\n10 steps by operator:\n{profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=25)}")
if json and train.rank == 0:
    record = {"step_seconds": step_seconds, "parts": parts, "tokens": tokens, "evaluation_tokens_per_second": evaluation,
              "flops_per_second": flops, "matrix_flops_per_second": peaks, "memory_bytes": memory,
              "memory_bytes_by_formula": formula, "peak_memory_bytes": peak_memory,
              "arguments": arguments, "device": train.device, "dtype": train.dtype, "compile": train.compile}
    temporary = Path(json + ".tmp")
    temporary.write_text(json_format.dumps([record], indent=1))
    temporary.replace(json)
train.end()
