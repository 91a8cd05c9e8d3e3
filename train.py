"""Trains a GPT on data/<dataset>, on a CPU or a GPU.

    python train.py config/train_shakespeare_char.py                     # a recipe
    python train.py config/quick.py --dropout=0.1 --max_iters=300        # a recipe with other settings
    python train.py --dataset=mine                                       # your own text, once prepare.py has read it
    python train.py --init_from=resume                                   # go on where the run in out/ stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py   # 8 processes, one for each GPU

Writes out/latest.pt (to resume), out/best.pt (the lowest validation loss, to sample) and out/log.csv.
"""
import os

# the run (None: defaults.py chooses a value that fits the text, unless the comment says otherwise)
out_dir = "out"                    # where checkpoints and the log go; an earlier run there is renamed to out.1, ...
init_from = "scratch"              # scratch, resume, or weights: gpt2, ..., gpt2-xl, the folder of a run or of a GPT-2
seed = 1337                        # every random choice of the run follows from it
# data
dataset = "shakespeare_char"       # a folder in data/, made by prepare.py
prepare = ""                       # more arguments for prepare.py, which makes a missing dataset: "--val_fraction=0.01"
batch_size: int | None = None      # sequences in a micro-step: one forward and backward pass
gradient_accumulation_steps = 1    # micro-steps whose gradients add up to one step: a larger batch in the same memory
block_size: int | None = None      # tokens in a sequence
# model
n_layer: int | None = None         # blocks
n_head: int | None = None          # attention heads in a block
n_embd: int | None = None          # width of the residual stream
dropout = 0.0                      # share of activations set to zero in training, against overfitting
bias = False                       # biases in linear layers and norms
# optimizer
optimizer: str | None = None       # adamw, or muon: Muon for the blocks' matrices, AdamW for the rest
max_iters: int | None = None       # optimizer steps
learning_rate: float | None = None  # AdamW's peak; the log's lr is AdamW's rate, with Muon too
muon_learning_rate: float | None = None  # Muon's peak
muon_momentum = 0.9                # Muon's decay of the running mean of the gradient; 0.95 for long runs
warmup_iters: int | None = None    # steps in which the rates rise to their peaks; None: a tenth of lr_decay_iters
lr_decay = "linear"                # the curve on which the rates fall after that: linear, or cosine
lr_decay_iters: int | None = None  # the step at which the rates are at their end; None: max_iters of a new run
final_lr_fraction = 0.0            # the rates at their end, as a fraction of their peaks
weight_decay = 0.1                 # pulls matrices towards zero, by this times the rate; biases and norms have none
beta1 = 0.9                        # AdamW's decay of the running mean of the gradient
beta2 = 0.99                       # AdamW's decay of the mean of the squared gradient; 0.95 for large batches
grad_clip = 1.0                    # largest norm of the gradient; 0.0: no clipping
# evaluation, log and checkpoints
eval_interval: int | None = None   # steps between evaluations; one before the first step and one after the last, too
eval_tokens: int | None = None     # tokens of each split that an evaluation reads, at most
eval_only = False                  # evaluate the model once and stop; no log, no checkpoint
patience: int | None = None        # stop after this many evaluations without a lower validation loss; None: never
log_interval = 10                  # steps between lines of the log
tensorboard = False                # write the log for TensorBoard too (pip install tensorboard), in out_dir
wandb = False                      # send the log to Weights & Biases too (pip install wandb)
wandb_project = "gpt"              # the project at Weights & Biases
wandb_name: str | None = None      # the run's name at Weights & Biases; None: out_dir
checkpoint_interval = 250          # steps between checkpoints; one after the last step, too
# machine
device: str | None = None          # cpu, cuda, cuda:1, mps, xpu; None: the best there is
dtype: str | None = None           # matrix multiplications in float32, bfloat16, float16; None: 16 bits where fast
compile: bool | None = None        # torch.compile the model; None: on CUDA, if triton and a C compiler are there
strategy = "ddp"                   # several processes: ddp copies the model to each, fsdp splits it among them
# This runs configurator.py as if its code stood here: the command line and its config files replace the values above.
# `config` then holds all settings, and `overrides` the named ones. The slow imports wait, so a typo answers at once.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import functools
import math
import time
from dataclasses import asdict
from pathlib import Path

from files import UserError, bits_per_byte, check, is_dataset_name, open_dataset, prepare_dataset, quoted


def check_settings(source=None):
    """UserError for a setting out of range. source: the file that it comes from, if it is not the command line."""
    must_be = functools.partial(check, config, source=source)
    must_be("above 0", lambda x: 0 < x < math.inf, "batch_size", "gradient_accumulation_steps", "block_size", "n_layer",
            "n_head", "n_embd", "max_iters", "eval_interval", "eval_tokens", "log_interval", "checkpoint_interval")
    must_be("above 0, up to 1e30", lambda x: 0 < x <= 1e30, "learning_rate", "muon_learning_rate")
    must_be("at least 0 and finite", lambda x: 0 <= x < math.inf,
            "seed", "weight_decay", "grad_clip", "warmup_iters", "lr_decay_iters", "final_lr_fraction", "patience")
    must_be("in [0, 1)", lambda x: 0 <= x < 1, "dropout", "beta1", "beta2", "muon_momentum")
    must_be("'adamw' or 'muon'", lambda x: x in ("adamw", "muon"), "optimizer")
    must_be("'cosine' or 'linear'", lambda x: x in ("cosine", "linear"), "lr_decay")
    must_be("'float32', 'bfloat16' or 'float16'", lambda x: x in ("float32", "bfloat16", "float16"), "dtype")
    must_be("the name of a folder in data/", is_dataset_name, "dataset")
    must_be("'ddp' or 'fsdp'", lambda x: x in ("ddp", "fsdp"), "strategy")
    must_be(f"divisible by n_head ({n_head})", lambda x: not n_head or x % n_head == 0, "n_embd")


check_settings()

import numpy as np
import torch

import distributed
from checkpoint import Log, check_probe, format_seconds, get_state, has_same_text, instead_of_resuming, load_pretrained
from checkpoint import load_to_resume, probe, progress, restarted, set_state
from defaults import choose_settings
from device import can_compile, check_training_memory, choose_device, choose_dtype, peak_flops, peak_memory, to_device
from distributed import all_reduce, print_once
from fast import compiled, for_training
from model import GPT, GPTConfig
from optimizer import make_optimizers, schedule

# --- resume or start: a resumed run keeps its settings (init_from, too), except those that this command names ---

out = Path(out_dir)
checkpoint = pretrained = tokenizer = None
fixed, source = {}, None  # settings that a loaded model decides, and where it came from
if (out / "latest.pt").exists() and (init_from == "resume" or restarted(out / "latest.pt")):
    source = out / "latest.pt"
    checkpoint = load_to_resume(source)
    not_kept = {"out_dir", "prepare", "strategy", *overrides, *["device"] * distributed.is_distributed} - {"init_from"}
    config |= checked({k: v for k, v in checkpoint["config"].items() if k in config and k not in not_kept}, source)
    fixed = checkpoint["model_config"] | {"optimizer": checkpoint["config"].get("optimizer", optimizer)}
    tokenizer = checkpoint["tokenizer"]
elif init_from == "resume" and (any(out.glob("*.pt")) or not ("dataset" in overrides or distributed.is_distributed)):
    raise UserError(f"{out_dir} has no latest.pt to resume from; {instead_of_resuming(out)}")
elif init_from == "resume":  # a command that describes a run starts it, and later continues it
    print_once(f"no latest.pt in {out_dir}: starting from scratch")
elif init_from != "scratch":
    source = init_from
    pretrained, found = load_pretrained(source, overrides.get("block_size"), dropout)
    fixed = asdict(pretrained.config) | {"dropout": dropout}
    tokenizer = found.state() if found else None
for name, value in fixed.items():
    if name in overrides and name != "dropout" and overrides[name] != value:
        raise UserError(f"{source} has {name}={value}, not {overrides[name]}; leave it (or the config file) out")
config |= {k: v for k, v in fixed.items() if k in config and k not in overrides}
globals().update(config)
check_settings(source)
device = choose_device(device)
dtype = choose_dtype(device, dtype)
distributed.start(device, strategy)
distributed.check_same(checkpoint["iter_num"] if checkpoint else 0, f"checkpoints in {out_dir}")

# --- data: one long row of token ids for each split ---

data_dir = Path(__file__).resolve().parent / "data" / dataset
distributed.run_on_main_process(prepare_dataset, data_dir, prepare, distributed.finish)  # if it is not there yet
meta, train_data, val_data = open_dataset(data_dir)
chosen = choose_settings(config, len(train_data), meta["vocab_size"], device, init_from not in ("scratch", "resume"))
globals().update(chosen)
# The schedule is fixed when a run starts: if it later trains for longer, the rates do not jump.
lr_decay_iters = max_iters if lr_decay_iters is None else lr_decay_iters
warmup_iters = lr_decay_iters // 10 if warmup_iters is None else warmup_iters
config |= chosen | {"lr_decay_iters": lr_decay_iters, "warmup_iters": warmup_iters}
if len(train_data) <= block_size:
    raise UserError(f"{dataset} has {len(train_data)} tokens, too few for a block_size of {block_size}; change either")
if tokenizer not in (None, meta["tokenizer"]) or fixed.get("vocab_size", meta["vocab_size"]) != meta["vocab_size"]:
    raise UserError(f"{source} and {dataset} have different tokenizers; see --tokenizer of prepare.py, or start anew")

# Each process gets some micro-steps of an optimizer step or, if they do not divide evenly, some sequences of each.
sequences, world_size = batch_size * gradient_accumulation_steps, distributed.world_size
micro_steps, micro_batch = distributed.divide(gradient_accumulation_steps, batch_size)
windows = max(1, len(train_data) // block_size - 1)  # training sequences in an epoch; -1 leaves room for the offset


@functools.lru_cache(2)
def window_starts(epoch):
    """Where the training sequences of an epoch start. They lie side by side from a random offset on and come in random
    order, so an epoch sees every token once, except for the ends of the text (up to two sequences). This trains better
    than independent draws, which repeat some sequences before others come once."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(len(train_data) - windows * block_size) + block_size * rng.permutation(windows)


def get_batch(step):
    """The inputs and targets (micro_steps * micro_batch, T) of this process in a step. They depend only on the seed
    and on how many sequences came before, so a resumed run and any number of processes read the same ones."""
    mine = sequences // world_size
    first = extra // block_size + step * sequences + distributed.rank * mine  # extra: see progress()
    starts = np.array([window_starts(i // windows)[i % windows] for i in range(first, first + mine)])
    ids = to_device(train_data[starts[:, None] + np.arange(block_size + 1)], device)
    return ids[:, :-1], ids[:, 1:]  # the target at each position is the next token


# --- model and optimizers ---

torch.manual_seed(seed)
model_settings = {k: v for k, v in (fixed | config).items() if k in asdict(GPTConfig())}  # as GPTConfig names them
model_config = pretrained.config if pretrained else GPTConfig(**model_settings | {"vocab_size": meta["vocab_size"]})
check_training_memory(device, model_config, micro_steps, micro_batch, block_size, dtype, strategy, eval_only)
raw_model = (pretrained or GPT(model_config)).float()
for_training(raw_model.to(device).train())  # faster layers that compute the same
if strategy == "fsdp":
    distributed.shard(raw_model, device)
optimizers = make_optimizers(raw_model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta1, beta2,
                             muon_momentum, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")  # or small float16 gradients would be 0
autocast = torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
compile = can_compile(device, compile)
model = compiled(raw_model, sequences * block_size, micro_steps) if compile else raw_model  # both have the same weights
if distributed.is_distributed and strategy == "ddp":
    model = distributed.replicate(model, device)
iter_num, best_val_loss, bad_evals, seconds, extra, eval_seconds = 0, None, 0, 0.0, 0, 0.0  # resuming sets the first 5
text = {k: meta.get(k) for k in ("sha256", "val_tokens", "val_bytes")} | {"dataset": dataset, "evaluated": eval_tokens}
if checkpoint:
    set_state(raw_model, [o for o, _ in optimizers], checkpoint, source)
    check_probe(raw_model, checkpoint, source)
    del checkpoint["model"], checkpoint["optimizer"]  # they are in place, and take memory
    scaler.load_state_dict(scaler.state_dict() | checkpoint["scaler"])  # {} if the run was not in float16 so far
    iter_num, best_val_loss, bad_evals, seconds, extra = progress(checkpoint, sequences * block_size)
    if not has_same_text(checkpoint, text, source) or not (out / "best.pt").exists():
        best_val_loss, bad_evals = None, 0


def save(path, with_optimizers=True):
    """Writes a checkpoint of the run as it stands. UserError if a weight is not finite; the previous file stays."""
    model_state, optimizer_state = get_state(raw_model, [o for o, _ in optimizers] if with_optimizers else [])
    distributed.run_on_main_process(log.save, path, {
        "model": model_state, "optimizer": optimizer_state if with_optimizers else None,
        "model_config": asdict(raw_model.config), "tokenizer": meta["tokenizer"],
        "config": {k: v for k, v in config.items() if k not in model_settings}, "text": text, "wandb_id": log.wandb_id,
        "iter_num": iter_num, "best_val_loss": best_val_loss, "bad_evals": bad_evals, "seconds": seconds,
        "tokens": extra + iter_num * sequences * block_size, "scaler": scaler.state_dict(), "probe": probe(raw_model)})


# --- evaluation ---

@torch.no_grad()
def evaluate(data, evenly=False):
    """The mean loss over windows that do not overlap, from the start of the split, at most eval_tokens tokens. With
    `evenly`, as many windows as for the validation split, spread over all of `data`. No randomness, no dropout."""
    T = min(block_size, len(val_data) - 1)
    n = max(1, min(eval_tokens, len(val_data) - 1) // T)
    starts = np.linspace(0, len(data) - T - 1, n).astype(np.int64) if evenly else np.arange(n) * T
    mine = starts[distributed.rank::world_size]
    # One pass reads up to 8192 tokens, fewer if they have more than 2^26 logits, but never less than a micro-step.
    at_once = max(micro_batch, min(8192, 2 ** 26 // meta["vocab_size"]) // T)
    raw_model.eval()
    total = 0.0
    for i in range(0, math.ceil(n / world_size), at_once):
        now = mine[i:i + at_once]
        # FSDP needs all processes in every pass: one that has no windows left joins with a window that counts 0.
        ids = to_device(data[(now if len(now) else starts[:1])[:, None] + np.arange(T + 1)], device)
        with autocast:
            total += raw_model(ids[:, :-1], ids[:, 1:])[1].item() * len(now)
    raw_model.train()
    return all_reduce(total, "SUM") / n


def evaluate_and_keep_best():
    """Evaluates the model and prints the losses. Writes best.pt if a trained model has the lowest loss so far."""
    global best_val_loss, bad_evals, eval_seconds
    start = time.perf_counter()
    train_loss, val_loss = evaluate(train_data, evenly=True), evaluate(val_data)
    eval_seconds = time.perf_counter() - start
    improved = math.isfinite(val_loss) and (best_val_loss is None or val_loss < best_val_loss)
    print_once(f"step {iter_num}/{max_iters}  train loss {train_loss:.4f}  validation loss {val_loss:.4f}"
               f"{bits_per_byte(val_loss, meta)}{', the lowest so far' if improved and iter_num else ''}")
    check_finite(train_loss, val_loss)
    # A validation loss that rises while the training loss falls is overfitting: the model learns the text by heart.
    # best.pt keeps the model from before that, and patience ends the run.
    bad_evals = 0 if improved else bad_evals + 1
    if improved and not eval_only and (iter_num or init_from not in ("scratch", "resume")):  # not an untrained model
        best_val_loss = val_loss
        save(out / "best.pt", with_optimizers=False)
    return {"train_loss": train_loss, "val_loss": val_loss}


# --- training ---

def forward_backward(x, y):
    """Puts the gradients of the mean loss on x and y (micro_steps * micro_batch, T) into .grad; returns the loss."""
    loss_sum = torch.zeros((), device=device)
    for i, (xm, ym) in enumerate(zip(x.split(micro_batch), y.split(micro_batch), strict=True)):
        distributed.sync_gradients(model, i == micro_steps - 1)
        with autocast:
            loss = model(xm, ym)[1] / micro_steps
        scaler.scale(loss).backward()  # adds to .grad
        loss_sum += loss.detach()
    return loss_sum


def update_weights():
    """One optimizer step with the gradients in .grad, which are then removed; returns their norm before clipping."""
    for o, _ in optimizers:
        scaler.unscale_(o)
    grad_norm = distributed.gathered(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf))
    # If a float16 gradient overflowed, clipping has spoilt them all. So no optimizer steps, and the scale is halved.
    overflow = scaler.is_enabled() and not math.isfinite(grad_norm.item())
    for o, _ in optimizers:
        if not overflow:
            o.step()
        o.zero_grad(set_to_none=True)
    scaler.update(max(scaler.get_scale() / 2, 2 ** -20) if overflow else None)
    return grad_norm


def out_of_patience():
    """Whether the validation loss has not become lower in the last `patience` evaluations."""
    return patience is not None and bad_evals >= max(1, patience)


def check_finite(*losses):
    """UserError if a loss is not a finite number."""
    if not math.isfinite(sum(losses)):
        kept = "the last checkpoint is good" if any(out.glob("*.pt")) else "there is no checkpoint yet"
        raise UserError(f"the loss at step {iter_num} is not finite; {kept}; try a lower learning rate")


if __name__ == "__main__":
    if chosen and not eval_only:
        print_once(f"chosen to fit {dataset}: {' '.join(f'--{name}={value}' for name, value in chosen.items())}")
    tokens_per_step, V = sequences * block_size, meta["vocab_size"]
    print_once(f"{raw_model.num_parameters():,} parameters ({raw_model.num_parameters(embeddings=False):,} without "
               f"embeddings) on {device} in {dtype}{', compiled' if compile else ''}; {max_iters} steps of "
               f"{tokens_per_step:,} tokens, {max_iters * tokens_per_step / len(train_data):.1f} epochs of {dataset}")
    if checkpoint:
        print_once(f"resuming {out_dir} after step {iter_num}")
    elif not pretrained:  # all tokens are about equally likely to an untrained model
        print_once(f"untrained, the loss should be about ln(vocab_size) = ln({V}) = {math.log(V):.4f}")
    if max_iters > lr_decay_iters and not final_lr_fraction:
        print_once(f"the rate is 0 from step {lr_decay_iters} on; to learn more: --lr_decay_iters={max_iters}")
    if eval_only:
        evaluate_and_keep_best()
        distributed.finish()  # ends the program

    log = Log(out, checkpoint, config)
    if iter_num == 0:
        save(out / "latest.pt")  # so that a run can be resumed from its first moment on
        log.write(iter=0, tokens=0, seconds=0, **evaluate_and_keep_best())
    machine_peak, peak_source = peak_flops(device, dtype)
    if machine_peak:
        print_once(f"peak of matrix multiplications in {dtype}: {machine_peak / 1e12:.2f} TFLOP/s ({peak_source})")
    distributed.catch_stop_signals()
    loss, stop = None, 0
    batch, mark, logged_at, logged_seconds = get_batch(iter_num), time.perf_counter(), iter_num, seconds
    while iter_num < max_iters and not stop and not out_of_patience():
        share = schedule(iter_num, warmup_iters, lr_decay_iters, final_lr_fraction, lr_decay)
        for o, peak in optimizers:
            for group in o.param_groups:
                group["lr"] = peak * share
        # Dropout's masks follow from the seed, the step and the process, so a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, distributed.rank)).generate_state(1)[0]))
        loss = forward_backward(*batch)
        grad_norm = update_weights()
        distributed.share_buffers(raw_model)  # model.py has none, but a changed model may have some
        iter_num += 1
        batch = get_batch(iter_num)  # copied while the device still computes this step
        last = iter_num == max_iters
        evaluating = iter_num % eval_interval == 0 or last
        if iter_num % log_interval == 0 or evaluating:
            mean_loss = all_reduce(loss.item(), "SUM") / world_size  # .item() waits for the device
            now = time.perf_counter()
            seconds, mark = seconds + now - mark, now
            speed = (iter_num - logged_at) * tokens_per_step / (seconds - logged_seconds)
            left = ((max_iters - iter_num) * tokens_per_step / speed
                    + (math.ceil(max_iters / eval_interval) - iter_num // eval_interval) * eval_seconds)
            flops = speed * raw_model.flops_per_token(block_size) / world_size
            of_peak = f" ({flops / machine_peak:.0%} of peak)" if flops < (machine_peak or 0) else ""
            print_once(f"step {iter_num}/{max_iters}  loss {mean_loss:.4f}  lr {learning_rate * share:.2e}  grad norm "
                       f"{grad_norm.item():.3f}  {speed:,.0f} tokens/s{of_peak}  {format_seconds(left)} left")
            check_finite(mean_loss)
            if scaler.is_enabled() and scaler.get_scale() < 1e-3:  # it starts at 65536
                raise UserError(f"the gradients at step {iter_num} are not finite in float16, however they are scaled; "
                                "look for a division by zero or the root of 0, or try --dtype=bfloat16")
            logged_at, logged_seconds = iter_num, seconds
            row = dict(iter=iter_num, tokens=extra + iter_num * tokens_per_step, seconds=seconds, loss=mean_loss,
                       lr=learning_rate * share, grad_norm=grad_norm.item(), tokens_per_second=speed)
            log.write(**row, **(evaluate_and_keep_best() if evaluating else {}))
            mark = time.perf_counter()  # evaluating and saving are not training time

        stop = distributed.stop_signal()
        if iter_num % checkpoint_interval == 0 or last or stop or out_of_patience():
            check_finite(all_reduce(loss.item(), "SUM"))
            seconds += time.perf_counter() - mark
            save(out / "latest.pt")
            mark = time.perf_counter()

    log.close()
    where = "" if out_dir == "out" else f" --out_dir={quoted(out_dir)}"
    if out_of_patience():
        print_once(f"stopping early: {bad_evals} evaluations without a lower validation loss")
    stop = stop if iter_num < max_iters else 0  # a signal during the last step changes nothing
    if stop:
        print_once(f"stopped by signal {stop} after step {iter_num}; "
                   f"go on with: python train.py --init_from=resume{where}")
    elif loss is None:
        needed = "--patience" if out_of_patience() else "--max_iters"
        if not out_of_patience() and iter_num >= lr_decay_iters and not final_lr_fraction:
            needed += " and --lr_decay_iters"  # otherwise the rate would stay 0
        print_once(f"nothing to do: the run has {iter_num} steps already, and max_iters is {max_iters}; "
                   f"raise {needed} to go on")
    else:
        memory = f"at most {peak_memory(device) / 1e9:.2f} GB of memory, " if peak_memory(device) else ""
        print_once(f"done in {format_seconds(seconds)} of training, {memory}lowest validation loss {best_val_loss:.4f}"
                   f"{bits_per_byte(best_val_loss, meta)}; next: python sample.py{where}")
    distributed.finish(128 + stop if stop else 0)
