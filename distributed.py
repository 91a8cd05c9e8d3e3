"""One process or many. torchrun starts many, one for each device, and train.py runs in each of them:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Every process has a rank, from 0 to world_size - 1. Rank 0 is the main process: it prints and writes files. Without
torchrun there is one process, for which most functions here have nothing to do.
"""
import contextlib
import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from files import UserError, say

is_distributed = {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # torchrun sets both
rank, world_size = 0, 1
if is_distributed:
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < world_size:
            raise ValueError
    except ValueError:
        raise UserError("RANK must be a number from 0 to WORLD_SIZE - 1, as torchrun sets them in the environment, got "
                        f"RANK={os.environ['RANK']!r}, WORLD_SIZE={os.environ['WORLD_SIZE']!r}") from None
store = None  # where processes leave each other messages
calls = 0     # of run_on_main_process so far


def is_main_process():
    """Whether this process prints and writes files."""
    return rank == 0


def start(device, strategy="ddp"):
    """Joins the other processes, if torchrun started this one. UserError if it did not, and the strategy needs
    several."""
    global store
    if not is_distributed:
        if strategy == "fsdp":
            raise UserError("strategy 'fsdp' divides the model among processes; start them with torchrun: see --help")
        return
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several processes need CPUs or NVIDIA GPUs; device {device.type} takes one, without torchrun")
    try:
        store = next(dist.rendezvous("env://"))[0]
    except (ValueError, RuntimeError) as e:  # the other variables are not set, or the port is in use
        reason = str(e).splitlines()[0]
        raise UserError(f"several processes need torchrun to start them: see --help ({reason})") from None
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives a restart of the processes. Under a name of their own, the new ones do not find the
        # addresses of the dead. (Several machines may count restarts differently: see docs/scaling.md.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # Tensors on the CPU go through gloo, so that agreeing on a number does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def finish(code=0):
    """Ends the program. With several processes, each skips Python's clean-up, in which a communication thread that
    releases its last tensor would crash the process (github.com/pytorch/pytorch/pull/179291)."""
    if is_distributed:
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def print_once(*words):
    """`say`, from the main process only."""
    if is_main_process():
        say(*words)


# --- agreeing on numbers ---

def all_reduce(value, operation):
    """A number of each process -> their "SUM", "MAX" or "MIN", in each process."""
    if not is_distributed:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor.item()


def check_same(number, what):
    """UserError if the processes do not have the same number."""
    if all_reduce(number, "MAX") != all_reduce(number, "MIN"):
        raise UserError(f"the processes find different {what}; copy the files to every machine, or share the folder")


def divide(micro_steps, batch_size):
    """The micro-steps of an optimizer step and the sequences of each -> those of this process. UserError if neither can
    be divided by the number of processes."""
    if micro_steps % world_size == 0:
        return micro_steps // world_size, batch_size
    if batch_size % world_size == 0:
        return micro_steps, batch_size // world_size
    raise UserError(f"{world_size} processes divide neither gradient_accumulation_steps, which is {micro_steps}, nor "
                    f"batch_size, which is {batch_size}")


def run_on_main_process(function, *args):
    """Calls the function in the main process, while the others wait as long as it takes. (A collective operation would
    give up after some minutes.) A UserError there is one in all processes."""
    global calls
    calls += 1
    error = ""
    if is_main_process():
        try:
            function(*args)
        except UserError as e:
            if not is_distributed:
                raise
            error = str(e)
    if is_distributed:
        key = f"call {calls}"
        if is_main_process():
            store.set(key, error.encode(errors="backslashreplace"))
        store.wait([key], datetime.timedelta(days=30))
        error = store.get(key).decode()
        all_reduce(0, "SUM")  # the main process may hold the store, so it must not end before all have read
    if error:
        raise UserError(error)


# --- stopping: on SIGINT or SIGTERM all processes end after the same step ---

_signal, _signal_time = 0, 0.0


def catch_stop_signals():
    """From here on, Ctrl-C, SIGTERM and the end of the terminal only ask the program to stop: see `stop_signal`."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup ignores it
        number = getattr(signal, name, None)
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, _on_stop)


def _on_stop(number, frame):
    """Notes the signal. The same signal once more ends the program at once. With torchrun, it must be a second later:
    torchrun passes a signal on to processes that may have got it already."""
    global _signal, _signal_time
    if number != _signal:
        if is_main_process():
            with contextlib.suppress(OSError):  # standard error may be closed
                os.write(2, b"finishing the step and saving; once more to quit at once, without saving\n")
        _signal, _signal_time = number, time.monotonic()
        if not is_distributed:
            signal.signal(number, signal.SIG_DFL)
    elif time.monotonic() > _signal_time + 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def stop_signal():
    """The number of the signal that asks to stop, the same in all processes; 0 if there was none."""
    return int(all_reduce(_signal, "MAX"))


# --- one model in several processes ---

def shard(model, device):
    """FSDP: cuts every tensor by rows, one part for each process. A block is put together while it computes. UserError
    if a parameter has no rows."""
    from torch.distributed.fsdp import fully_shard
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise UserError(f"fsdp cannot split the parameter {name}, a single number; make it a vector of one number, "
                            "or leave --strategy=fsdp out")
    mesh = dist.init_device_mesh(device.type, (world_size,))
    # A changed model.py may use a block twice. Or blocks may share a layer; then they are not put together one by one.
    blocks = list(dict.fromkeys(model.h))
    parts = [set(block.parameters()) for block in blocks]
    for part in (*(blocks if sum(map(len, parts)) == len(set().union(*parts)) else ()), model):
        fully_shard(part, mesh=mesh)
    if hasattr(model, "set_reduce_scatter_unused_params"):  # since PyTorch 2.13
        # A process may not need a parameter in some step, such as an expert. Its gradient counts as zero.
        model.set_reduce_scatter_unused_params(True)


def gathered(t):
    """The full tensor. Under FSDP, each process stores only some of its rows, and every process must call this."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def shard_like(t, p):
    """The rows of a full tensor that this process stores of p. Every process has the full tensor, so nothing is
    sent."""
    if not hasattr(p, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def replicate(model, device):
    """DDP: every process holds the whole model. The backward pass averages the gradients over the processes."""
    replica = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if device.type == "cpu":
        # After its first backward pass, DDP rearranges the gradients, and adds up those of the processes in another
        # order. A resumed run would do that at another step. So it happens now, and resuming is exact.
        ids = torch.arange(model.config.block_size)[None] % model.config.vocab_size
        buffers = [(b, b.clone()) for b in model.buffers()]  # a changed model.py may count its steps in one
        replica(ids, ids)[1].backward()
        replica.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
    return replica


def share_buffers(model):
    """Gives every process the buffers that the main process has, since a model may change them while it trains. Those
    that are not saved are left out."""
    if is_distributed:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    dist.broadcast(torch.view_as_real(buffer) if buffer.is_complex() else buffer, 0)


def sync_gradients(model, on):
    """Whether the next backward pass averages the gradients over the processes. A step with several micro-steps needs
    it only in the last one."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif is_distributed:
        model.set_requires_gradient_sync(on)
