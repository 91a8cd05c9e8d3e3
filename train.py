"""Trains a GPT on data/<dataset>, on a CPU or a GPU.

    python train.py config/train_shakespeare_char.py             # a recipe
    python train.py config/quick.py --dropout=0.1 --max_iters=300     # a recipe with other settings
    python train.py --dataset=mine --n_layer=4 --n_head=4 --n_embd=128   # your own text, once prepare.py has read it
    python train.py --init_from=resume                           # go on where the run in out/ stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py   # 8 processes, one for each GPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py ...  # 2 machines

Leaves out/latest.pt (to resume), out/best.pt (the lowest validation loss, to sample) and out/log.csv.
"""
import csv
import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from model import GPT, GPTConfig
from optimizer import has_fast_bfloat16, make_optimizers, schedule

# the run
out_dir = "out"                    # where checkpoints and the log go; an older run found there is moved to out.1, out.2, ...
init_from = "scratch"              # scratch, resume, or GPT-2 weights: gpt2, ..., gpt2-xl, a Hugging Face name or folder
seed = 1337                        # the run's every random choice follows from it
# data
dataset = "shakespeare_char"       # a folder in data/, made by prepare.py
batch_size = 12                    # sequences in one forward and backward pass
gradient_accumulation_steps = 1    # passes in one optimizer step, which sees this many times batch_size sequences
block_size = 64                    # tokens in a sequence
# model
n_layer = 6                        # blocks
n_head = 6                         # attention heads in a block
n_embd = 384                       # width of the residual stream
dropout = 0.0                      # share of activations zeroed in training, against overfitting
bias = False                       # biases in linear layers and norms
# optimizer
optimizer = "adamw"                # adamw, or muon: Muon for the blocks' matrices, AdamW for the rest
max_iters = 5000                   # optimizer steps
learning_rate = 1e-3               # AdamW's peak
muon_learning_rate = 0.02          # Muon's peak
min_lr: float | None = None        # the learning rate at the end; None: a tenth of learning_rate. Muon's falls by the same factor
warmup_iters: int | None = None    # steps in which the rate rises to its peak; None: a tenth of max_iters
weight_decay = 0.1                 # on matrices; biases and norms have none
beta1 = 0.9                        # AdamW's decay of the gradient's mean
beta2 = 0.95                       # and of its square's; nearer 1 for small batches
grad_clip = 1.0                    # largest norm of the gradient; 0.0: no clipping
# evaluation, log and checkpoints
eval_interval = 250                # steps between evaluations; there is one after the last step in any case
eval_tokens = 2_000_000            # tokens of each split that an evaluation reads, at most
eval_only = False                  # evaluate the model once and stop; no log, no checkpoint
patience: int | None = None        # stop after this many evaluations (at least 1) without a lower validation loss; None: never
log_interval = 10                  # steps between lines of the log
tensorboard = False                # write the log for TensorBoard too (pip install tensorboard), in out_dir
wandb = False                      # send the log to Weights & Biases too (pip install wandb)
checkpoint_interval = 250          # steps between checkpoints; there is one after the last step in any case
# machine
device: str | None = None          # cpu, cuda, cuda:1, mps; None: the best there is
dtype: str | None = None           # of matrix products: float32, bfloat16, float16; None: bfloat16 where it is fast
compile: bool | None = None        # torch.compile the model; None: on CUDA, if its compiler, triton, is there
strategy = "ddp"                   # of several processes: ddp, each holds the whole model; fsdp, each a part of it
# The rest of this file reads these names, `config` (all of them) and `overrides` (those that this call names).
exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))

# --- stopping: on SIGINT or SIGTERM the step in progress ends, a checkpoint is saved, and the program exits ---

stop_signal = 0


def request_stop(signum, frame):
    """Notes the signal; a second one ends the program at once."""
    if rank == 0:
        os.write(2, b"finishing the step and saving; once more to quit at once, without saving\n")
    global stop_signal
    stop_signal = signum
    signal.signal(signum, signal.SIG_DFL)


signal.signal(signal.SIGINT, request_stop)
signal.signal(signal.SIGTERM, request_stop)

# --- distributed: under torchrun, `world` processes train together and this is number `rank`; else there is one ---

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
distributed = "RANK" in os.environ
if distributed:
    local_rank = int(os.environ["LOCAL_RANK"])
    device = device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    store = next(torch.distributed.rendezvous("env://"))[0]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives a restart; under a name of their own, the new processes do not find the addresses of
        # the dead. (Several machines may count restarts differently: for them, the README names torch's own switch.)
        store = torch.distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def say(*words):
    """print, from the first process only."""
    if rank == 0:
        print(*words, flush=True)


def over_processes(value, how="SUM"):
    """A number's sum, or with "MAX" its maximum, over all processes."""
    if not distributed:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how))
    return tensor.item()


def end(code=0):
    """sys.exit. One of several processes leaves out Python's own clean-up: a communication thread that lets go of
    its last tensor meanwhile would abort the program (github.com/pytorch/pytorch/pull/179291 tells how)."""
    if distributed:
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def leave(message):
    """Ends the program with an error. Of several processes the first says it, and torchrun then ends the others;
    if they still wait after 5 seconds, the error is theirs alone, and they say it."""
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr)
    end(1)


# --- resume: the checkpoint's settings hold, except for those that this call names ---

out = Path(out_dir)
checkpoint = None
if init_from == "resume" and (out / "latest.pt").exists():
    try:
        checkpoint = load_checkpoint(out / "latest.pt")
    except ValueError as e:
        leave(e)
    here = {"init_from", "out_dir", "strategy"} | ({"device"} if distributed else set())  # not of the checkpoint
    config |= {k: v for k, v in checkpoint["config"].items() if k in config and k not in overrides and k not in here}
    globals().update({k: v for k, v in config.items() if k not in here})
elif init_from == "resume":
    say(f"no latest.pt in {out_dir}: starting from scratch")

# --- pretrained: the weights bring the model's shape; a smaller block_size cuts off later positions ---

raw_model = None
if init_from not in ("scratch", "resume"):
    try:
        raw_model, pretrained_tokenizer = load_pretrained(init_from)
        if "block_size" in overrides:
            raw_model.crop_block_size(block_size)
    except (ValueError, RuntimeError) as e:
        leave(e)
    shape = {k: getattr(raw_model.config, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
    for k, v in shape.items():
        if k in overrides and overrides[k] != v:
            leave(f"{init_from} has {k}={v}, not {overrides[k]}; leave it out, or train from scratch")
    config |= shape
    globals().update(shape)

# --- check the settings, choose the machine ---

for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_tokens", "log_interval",
             "checkpoint_interval", "learning_rate", "muon_learning_rate"):
    if not 0 < config[name] < math.inf:
        leave(f"{name} must be above 0, got {config[name]}")
for name in ("seed", "weight_decay", "grad_clip", "min_lr", "warmup_iters", "patience"):
    if config[name] is not None and not 0 <= config[name] < math.inf:
        leave(f"{name} must be at least 0, got {config[name]}")
if min_lr is not None and min_lr > learning_rate:
    leave(f"min_lr ({min_lr}) must not be above learning_rate ({learning_rate})")
if out.exists() and not out.is_dir():
    leave(f"out_dir {out_dir} is a file; name a folder")
if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
    leave(f"beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")
if device is None:
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
try:
    torch.zeros(1, device=device)
except (RuntimeError, AssertionError) as e:  # torch raises either, depending on the device
    leave(f"device {device!r} cannot be used: {str(e).splitlines()[0]}")
device_type = torch.device(device).type
if device_type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
if dtype is None:
    dtype = "bfloat16" if has_fast_bfloat16(device_type) else "float16" if device_type == "cuda" else "float32"
if dtype not in ("float32", "bfloat16", "float16"):
    leave(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
if strategy not in ("ddp", "fsdp"):
    leave(f"strategy must be 'ddp' or 'fsdp', got {strategy!r}")
if strategy == "fsdp" and not distributed:
    leave("strategy 'fsdp' divides the model among processes; start them with torchrun, as the top of train.py says")
completed = checkpoint["iter_num"] if checkpoint else -1
if over_processes(completed, "MAX") != over_processes(completed, "MIN"):
    leave(f"the processes find different checkpoints in {out_dir}; copy latest.pt to every machine, or share the folder")

try:
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter
    if wandb:
        import wandb as weights_and_biases
except ImportError as e:
    leave(f"--{e.name} needs: pip install {e.name}")

# --- data ---

data_dir = Path(__file__).resolve().parent / "data" / dataset
failed = 0
if not (data_dir / "meta.json").exists() and rank == 0:
    say(f"no dataset in {data_dir}: preparing it")
    prepare = [sys.executable, Path(__file__).resolve().parent / "prepare.py", f"--dataset={dataset}"]
    failed = abs(subprocess.run(prepare).returncode)
failed = int(over_processes(failed, "MAX"))  # distributed: the others wait here for the first
if failed:
    end(128 + stop_signal if stop_signal else failed)
try:
    meta = json.loads((data_dir / "meta.json").read_text())
except FileNotFoundError:
    leave(f"no dataset in {data_dir} on this machine; run prepare.py on every machine, or share the folder")
except ValueError:
    leave(f"{data_dir / 'meta.json'} is damaged; run prepare.py again")
train_data, val_data = (np.memmap(data_dir / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<"), mode="r")
                        for split in ("train", "val"))
if (len(train_data), len(val_data)) != (meta["train_tokens"], meta["val_tokens"]):
    leave(f"{data_dir} is incomplete: its files do not have the sizes in its meta.json; run prepare.py again")
if len(train_data) <= block_size:
    leave(f"the training split of {dataset} has {len(train_data)} tokens, too few for a block_size of {block_size}; "
          "lower --block_size or add text")

# Processes share the passes of a step if they can, else the sequences of each pass.
rows = batch_size * gradient_accumulation_steps  # sequences in one optimizer step, over all processes
if gradient_accumulation_steps % world == 0:
    micro_steps, micro_rows = gradient_accumulation_steps // world, batch_size
elif batch_size % world == 0:
    micro_steps, micro_rows = gradient_accumulation_steps, batch_size // world
else:
    leave(f"{world} processes divide neither gradient_accumulation_steps ({gradient_accumulation_steps}) "
          f"nor batch_size ({batch_size})")


def to_device(ids):
    """numpy ids (B, T + 1) -> inputs and targets (B, T): at each position the target is the next id."""
    ids = torch.from_numpy(ids.astype(np.int64))
    if device_type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    else:
        ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


windows = max(1, len(train_data) // block_size - 1)  # in one pass over the training data


@functools.lru_cache(2)
def shuffled(epoch):
    """Where the windows of one pass start: they tile the data from a random offset, and come in random order. So all
    text is seen equally often (less than two windows at the ends are left out, other ones in each pass), which trains
    better than windows drawn independently, some twice before others once."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(len(train_data) - windows * block_size) + block_size * rng.permutation(windows)


def get_batch(step):
    """The rows that this process trains on in a step. Where they start depends on the seed and the step alone, so
    a resumed run, or one on another number of processes, sees the same."""
    first = step * rows + rank * (rows // world)
    starts = np.array([shuffled(i // windows)[i % windows] for i in range(first, first + rows // world)])
    return to_device(train_data[starts[:, None] + np.arange(block_size + 1)])


# --- model and optimizers ---

model_args = dict(block_size=block_size, vocab_size=meta["vocab_size"], n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                  dropout=dropout, bias=bias)
if checkpoint:
    if checkpoint["tokenizer"] != meta["tokenizer"]:
        leave(f"cannot resume on {dataset}: its tokenizer is not the checkpoint's; start from scratch")
    changed = [k for k, v in checkpoint["model_args"].items() if k != "dropout" and model_args[k] != v]
    if changed:
        k = changed[0]
        leave(f"cannot resume with {k}={model_args[k]}: the checkpoint has {checkpoint['model_args'][k]}; "
              "leave it as it was, or start from scratch")
torch.manual_seed(seed)
try:
    if raw_model is None:
        raw_model = GPT(GPTConfig(**model_args))
    elif raw_model.config.vocab_size != meta["vocab_size"] or (
            pretrained_tokenizer and pretrained_tokenizer.state() != meta["tokenizer"]):
        leave(f"{init_from} has another vocabulary than the dataset {dataset}; prepare one with --tokenizer=gpt2")
    raw_model.set_dropout(dropout)
    raw_model.to(device).train()
    if strategy == "fsdp":  # distributed: tensors are cut by rows; a block puts its own together while it computes
        mesh = torch.distributed.init_device_mesh(device_type, (world,))
        for part in (*raw_model.h, raw_model):
            fully_shard(part, mesh=mesh)
    optimizers = make_optimizers(raw_model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta1, beta2,
                                 torch.bfloat16 if dtype == "bfloat16" else torch.float32)
except ValueError as e:
    leave(e)
params = list(raw_model.parameters())
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")  # keeps small fp16 gradients from vanishing
autocast = torch.autocast(device_type, dtype=getattr(torch, dtype), enabled=dtype != "float32")

if compile is None:
    compile = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    if device_type == "cuda" and not compile:
        say("triton is not installed: running without torch.compile, which is slower")
model = torch.compile(raw_model) if compile else raw_model
if distributed and strategy == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device_type == "cuda" else None)


def sync_gradients(on):
    """Whether the next backward pass averages the gradients over the processes."""
    if strategy == "fsdp":
        raw_model.set_requires_gradient_sync(on)
    elif distributed:
        model.require_backward_grad_sync = on


# --- evaluation and checkpoints ---


@torch.no_grad()
def evaluate(data, even=False):
    """The mean loss over non-overlapping windows from the start of a split, at most eval_tokens; with `even`, over as
    many windows as the validation split gives, evenly spaced. No randomness: the same model gives the same figure."""
    T = min(block_size, len(val_data) - 1)
    n = max(1, min(eval_tokens, len(val_data) - 1) // T)
    starts = np.linspace(0, len(data) - T - 1, n).astype(np.int64) if even else np.arange(n) * T
    share = starts[rank::world]
    raw_model.eval()
    # Rows at once: so many that their logits, the largest tensor, stay under 2^26 numbers, but no fewer than in training.
    at_once = max(micro_rows, min(8192, 2 ** 26 // meta["vocab_size"]) // T)
    loss_sum = 0.0
    for i in range(0, math.ceil(n / world), at_once):
        now = share[i:i + at_once]
        # distributed: fsdp needs all in every pass, so a process whose share is used up joins with a row that counts 0
        x, y = to_device(data[(now if len(now) else starts[:1])[:, None] + np.arange(T + 1)])
        with autocast:
            loss_sum += raw_model(x, y)[1].item() * len(now)
    raw_model.train()
    return over_processes(loss_sum) / n


def save(path, with_optimizer=True):
    """Writes a checkpoint of the run as it stands; ends the program if it is not finite, leaving the last one."""
    model_state, optimizer_state = get_state_dict(
        raw_model, [o for o, _ in optimizers] if with_optimizer else [],
        options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    problem = ""
    if rank == 0:
        try:
            save_checkpoint(path, {
                "model": model_state, "optimizer": optimizer_state if with_optimizer else None,
                "model_args": model_args, "config": config, "tokenizer": meta["tokenizer"], "iter_num": iter_num,
                "best_val_loss": best_val_loss, "bad_evals": bad_evals, "tokens": iter_num * rows * block_size,
                "seconds": seconds, "scaler": scaler.state_dict()})
        except ValueError as e:
            problem = f"{e}; try a lower learning rate"
        except (OSError, RuntimeError) as e:  # torch.save raises either when the disk is full
            problem = f"{path} cannot be written: {str(e).splitlines()[0]}"
    if over_processes(bool(problem), "MAX"):
        leave(problem or f"the first process could not write {path}")


if checkpoint:
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o, _ in optimizers]
    set_state_dict(raw_model, [o for o, _ in optimizers], model_state_dict=checkpoint["model"],
                   optim_state_dict=checkpoint["optimizer"], options=StateDictOptions(full_state_dict=True))
    for (o, _), groups in zip(optimizers, settings):  # the checkpoint gives the moments, the settings the rest
        for group, kept in zip(o.param_groups, groups):
            group.update(kept)
    scaler.load_state_dict(checkpoint["scaler"])
    iter_num, best_val_loss, bad_evals, seconds = (checkpoint[k] for k in
                                                   ("iter_num", "best_val_loss", "bad_evals", "seconds"))
    say(f"resuming {out_dir} after step {iter_num}")
else:
    iter_num, best_val_loss, bad_evals, seconds = 0, None, 0, 0.0

say(f"{raw_model.num_parameters():,} parameters ({raw_model.num_parameters(embeddings=False):,} without embeddings) "
    f"on {device} in {dtype}{', compiled' if compile else ''}; {rows * block_size:,} tokens a step, "
    f"{max_iters} steps, {max_iters * rows * block_size / len(train_data):.1f} passes over {dataset}")
if eval_only:
    say(f"train loss {evaluate(train_data, even=True):.4f}, validation loss {evaluate(val_data):.4f}")
    end()

# --- the log: one row for every log_interval steps and every evaluation, also when a run is resumed ---

COLUMNS = "iter,tokens,seconds,loss,train_loss,val_loss,lr,grad_norm,tokens_per_second".split(",")
if rank == 0:
    if not checkpoint and any((out / name).exists() for name in ("latest.pt", "best.pt")):
        n = 1
        while Path(f"{out}.{n}").exists():
            n += 1
        out.rename(f"{out}.{n}")
        say(f"{out_dir} holds an earlier run: moved it to {out}.{n}")
    out.mkdir(parents=True, exist_ok=True)
    kept = []
    if checkpoint and (out / "log.csv").exists():
        with open(out / "log.csv", newline="") as f:
            kept = [row for row in csv.DictReader(f) if int(row["iter"]) <= iter_num]
    with open(out / "log.csv.tmp", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    Path(out / "log.csv.tmp").replace(out / "log.csv")


if rank == 0 and tensorboard:
    board = SummaryWriter(out)
if rank == 0 and wandb:
    weights_and_biases.init(project="gpt", dir=out, config=config)


def log(**row):
    """Appends a row to log.csv; what is not given stays empty."""
    if rank > 0:
        return
    with open(out / "log.csv", "a", newline="") as f:
        csv.DictWriter(f, COLUMNS).writerow({k: f"{v:.12g}" for k, v in row.items()})
    if tensorboard:
        for name, value in row.items():
            board.add_scalar(name, value, row["iter"])
        board.flush()
    if wandb:
        weights_and_biases.log(row, step=row["iter"])


# FLOP/s of matrix products in 16 bits, without sparsity, as NVIDIA's data sheets give them.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L4": 121e12,
         "V100": 125e12, "T4": 65e12}


def peak_flops():
    """FLOP/s of one device's matrix products and where the figure comes from; None for a device that is not known."""
    if device_type == "cuda":
        name = torch.cuda.get_device_name()
        return next((peak for key, peak in PEAKS.items() if key in name), None), f"{name}'s data sheet"
    if device_type != "cpu":
        return None, ""
    a, times = torch.ones(1024, 1024, dtype=getattr(torch, dtype)), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(times), "measured now"


def peak_memory():
    """The most bytes that the device, or on a CPU this process, has held at once; 0 where that is not known."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def what_is_left():
    """For an error: what there is to go on from."""
    return "the last good checkpoint stays as it is" if (out / "latest.pt").exists() else "there is no checkpoint yet"


def clock(s):
    """Seconds -> h:mm:ss, without the hours if there are none."""
    s = round(s)
    return f"{s // 3600}:{s % 3600 // 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"


# --- training ---

machine_peak, source = peak_flops()
flops_per_token = raw_model.flops_per_token(block_size)
if machine_peak:
    say(f"peak of matrix products in {dtype}: {machine_peak / 1e12:.2f} TFLOP/s ({source})")
warmup = max_iters // 10 if warmup_iters is None else warmup_iters
min_ratio = 0.1 if min_lr is None else min_lr / learning_rate
start_iter, start_seconds, loss_now, stop = iter_num, seconds, None, 0
mark, logged_at, logged_seconds = time.perf_counter(), iter_num, seconds
while iter_num < max_iters and not stop:
    # The schedule scales every group's peak rate alike.
    scale = schedule(iter_num, warmup, max_iters, min_ratio)
    for o, peak in optimizers:
        for group in o.param_groups:
            group["lr"] = peak * scale

    # Dropout's masks depend on the seed, the step and the process, not on how the run came here: it resumes exactly.
    torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, rank)).generate_state(1)[0]))
    x, y = get_batch(iter_num)
    loss_sum = torch.zeros((), device=device)
    for micro, (xm, ym) in enumerate(zip(x.split(micro_rows), y.split(micro_rows))):
        sync_gradients(micro == micro_steps - 1)  # distributed: once a step, in its last pass
        with autocast:
            loss = model(xm, ym)[1] / micro_steps
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for o, _ in optimizers:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf, foreach=True)
    if strategy == "fsdp":
        grad_norm = grad_norm.full_tensor()  # distributed: from the norms of the parts
    for o, _ in optimizers:
        scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    iter_num += 1

    last = iter_num == max_iters
    evaluating = iter_num % eval_interval == 0 or last
    if iter_num % log_interval == 0 or evaluating:
        loss_now = over_processes(loss_sum.item()) / world  # waits for the device
        now = time.perf_counter()
        seconds, mark = seconds + now - mark, now
        speed = (iter_num - logged_at) * rows * block_size / (seconds - logged_seconds)
        left = (max_iters - iter_num) * (seconds - start_seconds) / (iter_num - start_iter)
        of_peak = f" ({speed * flops_per_token / machine_peak / world:.0%} of peak)" if machine_peak else ""
        say(f"step {iter_num}/{max_iters}  loss {loss_now:.4f}  lr {learning_rate * scale:.2e}  "
            f"grad norm {grad_norm.item():.3f}  {speed:,.0f} tokens/s{of_peak}  {clock(left)} left")
        logged_at, logged_seconds = iter_num, seconds
        if not math.isfinite(loss_now):
            leave(f"the loss is {loss_now} at step {iter_num}; {what_is_left()}; try a lower learning rate")
        row = dict(iter=iter_num, tokens=iter_num * rows * block_size, seconds=seconds, loss=loss_now,
                   lr=learning_rate * scale, grad_norm=grad_norm.item(), tokens_per_second=speed)
        if evaluating:
            row["train_loss"], row["val_loss"] = evaluate(train_data, even=True), evaluate(val_data)
            improved = best_val_loss is None or row["val_loss"] < best_val_loss
            bad_evals = 0 if improved else bad_evals + 1
            say(f"step {iter_num}/{max_iters}  train loss {row['train_loss']:.4f}  "
                f"validation loss {row['val_loss']:.4f}{', the lowest so far' if improved else ''}")
            if not math.isfinite(row["train_loss"] + row["val_loss"]):
                leave(f"the evaluation at step {iter_num} is not finite; {what_is_left()}; try a lower learning rate")
            if improved:
                best_val_loss = row["val_loss"]
                save(out / "best.pt", with_optimizer=False)
        log(**row)
        mark = time.perf_counter()  # evaluating and saving are not training time
    stopping = evaluating and patience is not None and bad_evals >= max(1, patience)
    stop = int(over_processes(stop_signal, "MAX"))  # distributed: all of them stop after the same step
    if iter_num % checkpoint_interval == 0 or last or stopping or stop:
        if not math.isfinite(over_processes(loss_sum.item())):
            leave(f"the loss at step {iter_num} is not finite; {what_is_left()}; try a lower learning rate")
        seconds += time.perf_counter() - mark
        save(out / "latest.pt")
        mark = time.perf_counter()
    if stopping:
        say(f"stopping early: {bad_evals} evaluations without a lower validation loss")
        break

if rank == 0 and wandb:
    weights_and_biases.finish()  # what it has not sent yet; os._exit in end() would cut it off
where = "" if out_dir == "out" else f" --out_dir={out_dir}"
if stop:
    say(f"stopped by signal {stop} after step {iter_num}; go on with: python train.py --init_from=resume{where}")
    end(128 + stop)
if loss_now is None:
    say(f"nothing to do: the run has {iter_num} steps already, and max_iters is {max_iters}; raise --max_iters to go on")
else:
    say(f"done in {clock(seconds)} of training, at most {peak_memory() / 1e9:.2f} GB of memory, lowest validation loss "
        f"{best_val_loss:.4f}; next: python sample.py{where}")
if __name__ == "__main__":  # bench_train.py executes this file too, and goes on with what it defines
    end()
