"""Where the time of a training step goes, and how near it comes to what the machine's matrix multiplications can do.

    python bench_train.py config/quick.py                            # with the settings of a recipe
    python bench_train.py config/quick.py --dtype=float32 --steps=50 --profile
    python bench_train.py config/quick.py --json=train.json          # for plot.py --what=train

The settings below are this script's own. All other arguments go to train.py, which is imported with them: its model,
batches and optimizers are timed, and its run in out/ stays untouched. For its settings: python train.py --help
"""
import os
import sys

steps = 30                # steps to time, after 3 to warm up; shows the median, on a GPU the mean
profile = False           # also print the time of each of PyTorch's operators, the largest first
json: str | None = None   # a file for the figures


def split_arguments():
    """Leaves this script's own arguments in sys.argv, and puts those for train.py into `arguments`."""
    global arguments
    words, own, arguments = sys.argv[1:], [], []
    while words:
        word = words.pop(0)
        mine = word.partition("=")[0] in ("--steps", "--profile", "--json", "--help", "-h")
        (own if mine else arguments).append(word)
        if words and (word in ("--steps", "--json") or (word == "--profile" and words[0] in ("True", "False"))):
            own.append(words.pop(0))
    sys.argv[1:] = own


split_arguments()
# Settings are read before the heavy imports, so that --help and a typo answer at once.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

from files import UserError, check_can_write, write_atomically

if json:
    check_can_write(json)

if steps < 1:
    raise UserError(f"steps must be at least 1, got {steps}")
sys.argv[1:] = arguments
import train  # up to its loop: settings, data, model and optimizers

import json as json_format
import time

import torch

from device import matmul_flops, peak_memory, synchronize
from distributed import finish, is_main_process, print_once, world_size


def clock():
    """Seconds, after all work on the device is done."""
    synchronize(train.device)
    return time.perf_counter()


# --- the parts of a step ---

forward_seconds = 0.0  # of the forward passes so far


def count_forward(module, *_):
    """Hooks before and after the model's forward pass: the first subtracts the time, the second adds it."""
    global forward_seconds
    forward_seconds = clock() - forward_seconds


hooks = train.model.register_forward_pre_hook(count_forward), train.model.register_forward_hook(count_forward)


def timed_step(i):
    """train.py's step i -> the seconds of its parts. Clipping is a part of the optimizer's."""
    global forward_seconds
    forward_seconds = 0.0
    times = [clock()]
    x, y = train.get_batch(train.iter_num + i)  # a resumed run goes on with the batches that follow
    times.append(clock())
    train.forward_backward(x, y)
    times.append(clock())
    train.update_weights()
    times.append(clock())
    data, both, optimizer = (b - a for a, b in zip(times, times[1:], strict=False))
    return {"data": data, "forward": forward_seconds, "backward": both - forward_seconds, "optimizer": optimizer}


def seconds_in_a_row(n):
    """Seconds of a step, among n in a row. As in training, a GPU works on one part while Python starts the next."""
    for hook in hooks:  # they wait for the device
        hook.remove()
    for i in range(3 + n):
        if i == 3:
            start = clock()
        train.forward_backward(*train.get_batch(train.iter_num + i))
        train.update_weights()
    return (clock() - start) / n


# --- memory ---

def local_bytes(tensors):
    """Bytes of these tensors in this process; of a sharded one, its shard."""
    return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)


def measured_memory():
    """Bytes of the parameters, the gradients, the optimizers' state, and what the forward pass keeps for the backward
    pass: each storage once, without the parameters themselves."""
    kept, parameters = {}, list(train.raw_model.parameters())
    own = {p.untyped_storage()._cdata for p in parameters}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    x, y = (ids[:train.micro_batch] for ids in train.get_batch(train.iter_num))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), train.autocast:
        loss = train.model(x, y)[1]
    activations = sum(storage.nbytes() for storage in kept.values())  # what FSDP has freed since is empty now
    loss.backward()
    states = [state for o, _ in train.optimizers for state in o.state.values()]
    gradients = (p.grad for p in parameters if p.grad is not None)
    memory = {"parameters": local_bytes(parameters), "gradients": local_bytes(gradients),
              "optimizer": local_bytes(t for state in states for t in state.values()
                                       if isinstance(t, torch.Tensor) and t.dim()),
              "activations": activations}
    train.raw_model.zero_grad()
    return memory


def memory_by_formula():
    """The same by counting; docs/scaling.md explains the terms. A compiled model keeps less, and computes some anew."""
    c, T = train.raw_model.config, train.block_size
    dropout = getattr(c, "dropout", 0)  # a changed model.py may have none
    P = train.raw_model.num_parameters()
    matrices = 12 * c.n_layer * c.n_embd ** 2  # numbers in the blocks' matrices
    size = 4 if train.dtype == "float32" else 2  # bytes of a number in the dtype of matrix multiplications
    layer = 8 * c.n_embd + 14 * size * c.n_embd  # bytes a token
    if train.device.type == "cpu" and (train.dtype == "bfloat16" or dropout):  # attention's weights, written out
        layer += size * c.n_head * T * (3 if dropout else 1)
    if train.device.type == "cpu" and train.dtype == "bfloat16":  # FastGELU keeps its derivative in float32
        layer += 4 * c.n_embd * (4 - size)
    if dropout:
        layer += 2 * size * c.n_embd
    ends = (4 + size + (4 if dropout else 0)) * c.n_embd + 4 * c.vocab_size
    copies = 0 if size == 4 else size * (matrices + c.vocab_size * c.n_embd)  # of the matrices, in 16 bits
    shards = world_size if train.strategy == "fsdp" else 1
    if train.strategy == "fsdp":  # a block is freed after use; embeddings and last norm stay for the backward pass
        copies += 4 * (P - train.raw_model.num_parameters(embeddings=False) + c.n_embd * (1 + c.bias))
    rows = 9 * c.n_layer * c.n_embd  # of the blocks' matrices
    return {"parameters": 4 * P // shards, "gradients": 4 * P // shards,
            "optimizer": (8 * P - (4 * (matrices - rows) if train.optimizer == "muon" else 0)) // shards,
            "activations": train.micro_batch * T * (c.n_layer * layer + ends) + copies}


# --- the machine ---

def evaluation_speed():
    """Tokens per second of an evaluation, in this process."""
    T = min(train.block_size, len(train.val_data) - 1)
    windows = min((len(train.val_data) - 1) // T, 4 * train.sequences)
    train.eval_tokens = windows * T
    start = clock()
    train.evaluate(train.val_data)
    return windows * T / world_size / (clock() - start)


evaluation = evaluation_speed()  # first, as in training: the system then leaves the process more of its memory
for i in range(3):
    timed_step(i)
memory, formula = measured_memory(), memory_by_formula()
measured = [timed_step(i) for i in range(3, 3 + steps)]
parts = sorted(measured, key=lambda m: sum(m.values()))[len(measured) // 2]  # of the median step
step_seconds, how = sum(parts.values()), f"median of {steps}"
if train.device.type != "cpu":
    step_seconds, how = seconds_in_a_row(steps), f"mean of {steps} in a row, without the waits after each part"
peak_bytes = peak_memory(train.device)  # before matmul_flops, whose matrices are no part of training
peaks = {dtype: matmul_flops(train.device, dtype) for dtype in dict.fromkeys(("float32", train.dtype))}
tokens = train.sequences * train.block_size // world_size
flops = tokens * train.raw_model.flops_per_token(train.block_size) / step_seconds

print_once(f"{' '.join(arguments) or 'the default settings of train.py'}: {train.raw_model.num_parameters():,} "
           f"parameters on {train.device} in {train.dtype}{', compiled' if train.compile else ''}, "
           f"{tokens:,} tokens a step{' in each process' if world_size > 1 else ''}")
print_once(f"a step: {step_seconds * 1e3:.1f} ms ({how}), {tokens / step_seconds:,.0f} tokens/s")
for part, seconds in parts.items():
    print_once(f"  {part:<10} {seconds * 1e3:8.2f} ms  {seconds / sum(parts.values()):4.0%}")
print_once(f"evaluation: {evaluation:,.0f} tokens/s")
print_once(f"arithmetic: {flops / 1e9:,.0f} GFLOP/s; this machine's matrix multiplications: " + ", ".join(
    f"{peak / 1e9:,.0f} in {dtype} (the step reaches {flops / peak:.0%})" for dtype, peak in peaks.items()))
print_once("memory, measured and by formula: " + ", ".join(
    f"{part} {memory[part] / 1e6:,.1f} MB ({formula[part] / 1e6:,.1f})" for part in formula)
    + f", together {sum(memory.values()) / 1e6:,.1f} MB ({sum(formula.values()) / 1e6:,.1f})")
if peak_bytes:
    whose = "device" if train.device.type in ("cuda", "xpu") else "process, with all of its libraries"
    print_once(f"peak of the {whose}: {peak_bytes / 1e6:,.0f} MB")
if profile:
    activities, kind = [torch.profiler.ProfilerActivity.CPU], "cpu"
    if train.device.type == "cuda":
        activities, kind = [*activities, torch.profiler.ProfilerActivity.CUDA], "device"
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(10):
            timed_step(i)
    table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=25)
    print_once(f"\n10 steps by operator:\n{table}")
if json and is_main_process():
    record = {"step_seconds": step_seconds, "parts": parts, "tokens": tokens, "flops_per_second": flops,
              "evaluation_tokens_per_second": evaluation, "matrix_flops_per_second": peaks, "memory_bytes": memory,
              "memory_bytes_by_formula": formula, "peak_memory_bytes": peak_bytes or None, "arguments": arguments,
              "device": str(train.device), "dtype": train.dtype, "compile": train.compile}
    write_atomically(json, json_format.dumps([record], indent=1).encode())
finish()
