"""Saving and loading: a run's folder with its checkpoints and its log, nanoGPT's checkpoints, and GPT-2 weights in
Hugging Face's format.

    python checkpoint.py --out_dir=out --export=FOLDER    # the run's best model as a Hugging Face folder

A checkpoint is one file, written by torch.save and read with weights_only=True, so that it can hold tensors and plain
values but no code. `out/latest.pt` is for resuming, `out/best.pt` (the lowest validation loss) for sampling.
"""
import os

out_dir = "out"              # the run to export
export: str | None = None    # the folder to write: the model, its tokenizer and a README.md

if __name__ == "__main__":  # settings are read before the heavy imports, so that --help and a typo answer at once
    exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import pickletools
import re
import shlex
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F

from distributed import gathered, is_main_process, print_once, shard_like
from files import LOG_COLUMNS, UserError, at_least, check_fields, is_dataset_name, open_file, put_in_place, read_json
from files import quoted, read_log, read_small, write_atomically
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, CharTokenizer, fetch_vocabulary, load_tokenizer, read_nanogpt_characters

FORMAT_VERSION = 4  # 3 also held the optimizers' settings


# --- checkpoints ---

def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain values to `path`. The file appears whole or not at all: it is written under
    another name, synced to the disk, then renamed. UserError if a tensor is not finite, if the model's config holds
    other things than numbers and strings, or if the file cannot be written. The previous file then stays as it was."""
    check_finite(checkpoint, "checkpoint", ", so nothing was saved; try a lower learning rate")
    if wrong := plain(checkpoint.get("model_config", {})):
        raise UserError(f"GPTConfig should hold {wrong}, or it cannot be saved; nothing was saved")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint | {"format_version": FORMAT_VERSION}, f)
            f.flush()
            os.fsync(f.fileno())
        put_in_place(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save raises either when the disk is full
        if temporary.is_file():
            temporary.unlink()
        reason = "the disk is probably full" if isinstance(e, RuntimeError) else first_line(e)
        raise UserError(f"{path} cannot be written: {reason}") from e


def check_finite(value, name, advice=""):
    """UserError if a tensor in this value is not finite."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{name} is not finite{advice}")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{name}[{key!r}]", advice)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_finite(item, name, advice)


def plain(value):
    """A check as for read_json: the items of a dict must be numbers, strings or None."""
    kinds = int, float, str, bool, type(None)
    return None if all(type(item) in kinds for item in value.values()) else "numbers and strings"


def numbers(may_be_none=False, **types):
    """A check as for read_json: what a dict holds under these names must have the type and lie between 0 and 2^63, or
    1e38 for a float. It may be missing."""
    def check(value):
        found = [(value[name], kind) for name, kind in types.items()
                 if name in value and not (may_be_none and value[name] is None)]
        good = all(type(n) is kind and 0 <= n <= (1e38 if kind is float else 2 ** 63 - 1) for n, kind in found)
        return plain(value) or (None if good else f"a dict with numbers of at least 0 as {', '.join(types)}")
    return check


# What a checkpoint holds: {name: (its types, a check of it)}, as for read_json. Any of it may be missing or None, but
# not what is needed to sample or to resume.
FIELDS = {"model": ((dict, OrderedDict), None), "model_config": (dict, plain), "tokenizer": (dict, plain),
          "config": (dict, plain), "optimizer": (dict, None),
          "text": (dict, numbers(may_be_none=True, val_tokens=int, val_bytes=int, evaluated=int)),
          "scaler": (dict, numbers(scale=float, growth_factor=float, backoff_factor=float, growth_interval=int,
                                   _growth_tracker=int)),
          "iter_num": (int, at_least(0)), "bad_evals": (int, at_least(0)), "tokens": (int, at_least(0)),
          "best_val_loss": (float, at_least(0)), "wandb_id": (str, None), "job": (str, None),
          "seconds": (float, lambda s: None if 0 <= s <= 1e9 else "from 0 to 1e9")}  # 32 years
TO_SAMPLE = "model", "model_config", "tokenizer"
TO_RESUME = *TO_SAMPLE, "config", "optimizer", "iter_num", "bad_evals", "seconds", "scaler"


def load_checkpoint(path, needed=()):
    """Path -> the dict, on the CPU, in today's format. needed: the names of the fields that must be there. UserError
    if the file is not such a checkpoint or is damaged, OSError if it cannot be opened."""
    checkpoint = read_archive(path)
    if checkpoint is None:
        folder = Path(path).parent
        raise UserError(f"{path} is damaged or not a checkpoint; " + (
            f"for a model in Hugging Face's format, name the folder: --init_from={quoted(folder)}"
            if (folder / "config.json").is_file() else other_checkpoint(Path(path))))
    if isinstance(checkpoint, dict) and "format_version" not in checkpoint and "model_args" in checkpoint:
        try:
            checkpoint = from_nanogpt(checkpoint, Path(path))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
            raise UserError(f"{path} is damaged: it is no checkpoint of nanoGPT ({first_line(e)})") from None
    version = checkpoint.get("format_version") if isinstance(checkpoint, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UserError(f"{path} has checkpoint format {version}, but this program reads 1 to {FORMAT_VERSION}")
    try:
        upgrade(checkpoint)
    except (AttributeError, TypeError) as e:
        raise UserError(f"{path} is damaged: its settings are not those of format {version} ({first_line(e)})"
                        ) from None
    for name in needed:
        if checkpoint.get(name) is None:
            raise UserError(f"{path} lacks {name!r}; latest.pt is for resuming, and either it or best.pt for sampling")
    there = {name: field for name, field in FIELDS.items() if checkpoint.get(name) is not None}
    check_fields(path, checkpoint, there, other_checkpoint(Path(path)))
    if "model_config" in needed:
        model_config(checkpoint["model_config"], path)
    return checkpoint


def load_to_resume(path):
    """The checkpoint of a run that goes on. "changed_at" is the time when the file was written: another run may write
    it before this one holds the lock."""
    changed = changed_at(path)
    return load_checkpoint(path, TO_RESUME) | {"changed_at": changed}


def changed_at(path):
    """When the file was last written, in ns; None if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def read_archive(path):
    """A file that torch.save wrote -> the same tree of tensors and plain values, on the CPU. None if it is damaged, or
    something that could harm this machine. OSError if it cannot be opened."""
    with open_file(path) as f:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True) if is_plain_archive(f) else None
        except MemoryError:
            raise UserError(f"{path} needs more memory than there is") from None
        except Exception:  # both raise many kinds of exceptions for a file that is cut short, unsafe or something else
            return None
    return found if is_sound(found) else None


def is_plain_archive(f):
    """Whether an open file is an archive as torch.save writes it: not compressed, with the right checksums, which
    torch.load does not compare, and of nothing but tensors and plain values."""
    if f.read(4) != b"PK\3\4":  # torch.load would take it for an older format
        return False
    with zipfile.ZipFile(f) as archive:
        entries = archive.infolist()
        names = {entry.filename.partition("/")[2].lower() for entry in entries}  # torch.load ignores case
        pickled = next(entry for entry in entries if entry.filename.endswith("/data.pkl"))
        return (not any(entry.compress_type for entry in entries)
                and len(names) == len(entries)  # else torch.load might read another data.pkl
                and sum(entry.file_size for entry in entries) < os.fstat(f.fileno()).st_size  # else they overlap
                and all(name[5:].isdigit() for name in names if name.startswith("data/"))
                and pickled.file_size <= 1 << 24 and is_plain_pickle(archive.read(pickled)) and not archive.testzip()
                and is_the_same_to_torch(f, archive, pickled))


def is_the_same_to_torch(f, archive, pickled):
    """Whether torch.load, which has a reader of its own, finds what Python's zipfile found: an archive can be made so
    that two readers see two different ones."""
    f.seek(0)
    reader = torch._C.PyTorchFileReader(f)
    folder = pickled.filename.removesuffix("data.pkl")
    size = getattr(reader, "get_record_size", lambda name: len(reader.get_record(name)))  # PyTorch 2.11 lacks it
    theirs = {folder + name: size(name) for name in reader.get_all_records()}
    return (theirs == {entry.filename: entry.file_size for entry in archive.infolist()}
            and reader.get_record("data.pkl") == archive.read(pickled))


# What a pickle of tensors and plain values is made of, and what it calls besides "torch FloatStorage" and the like.
OPCODES = {"APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID", "BINPUT",
           "BINUNICODE", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "GLOBAL", "LONG1", "LONG_BINGET",
           "LONG_BINPUT", "MARK", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "REDUCE", "SETITEM", "SETITEMS", "STOP",
           "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
CALLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


def is_plain_pickle(data):
    """Whether a pickle holds nothing but tensors and plain values, and not too many. It may repeat tuples, but
    only 20 times: each time that a tuple holds another one twice, its hash takes twice as long."""
    tuples, references, before = set(), 0, None
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count > 2_000_000 or name not in OPCODES or (name == "LONG1" and argument.bit_length() > 64) or (
                name == "GLOBAL" and argument not in CALLED and not re.fullmatch(r"torch \w+Storage", argument)):
            return False
        if name in ("BINPUT", "LONG_BINPUT"):  # gives a number to the value that the opcode before has made
            other = before in ("BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "GLOBAL", "REDUCE")
            (tuples.discard if other else tuples.add)(argument)
            continue
        before = name
        references += name in ("BINGET", "LONG_BINGET") and argument in tuples
    return references <= 20


def is_sound(checkpoint):
    """Whether what torch.load returned is as harmless as what was saved: a tree of ordinary tensors and values. A few
    bytes can also describe a list that holds itself, or a tensor that repeats one number a billion times."""
    left, count = [(checkpoint, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if getattr(value, "__dict__", {}).keys() - {"_metadata"}:  # an attribute could take the place of a method
            return False
        if isinstance(value, (dict, list, tuple)):
            left += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or (
                    value.nbytes > value.untyped_storage().nbytes()):
                return False
        elif isinstance(value, int) and value.bit_length() > 64:
            return False
        if depth > 10 or count + len(left) > 1_000_000:
            return False
    return True


def other_checkpoint(path):
    """What to do about a damaged checkpoint: use the other one of the run, if there is one."""
    if path.name == "latest.pt" and (path.parent / "best.pt").exists():
        best = quoted(path.with_name("best.pt"))
        return f"restore a copy, or start a new run from the weights in best.pt: --init_from={best}"
    if path.name == "best.pt" and (path.parent / "latest.pt").exists():
        return "restore a copy, or move it away to use latest.pt"
    return "restore a copy, or train the model again"


def upgrade(checkpoint):
    """Brings a checkpoint of an earlier version up to date, in place."""
    if checkpoint["format_version"] == 1 and "model_args" in checkpoint:
        # The model's shape was stored in `model_args`, and once more among the settings.
        shape = checkpoint.pop("model_args")
        checkpoint |= {"model_config": shape, "format_version": 2,
                       "config": {k: v for k, v in checkpoint.get("config", {}).items() if k not in shape}}
    config = checkpoint.get("config")
    if checkpoint["format_version"] == 2 and isinstance(config, dict):
        # The end of the schedule was always max_iters, and the rate there was an absolute number.
        lowest, peak = config.pop("min_lr", None), config.get("learning_rate")
        config |= {"final_lr_fraction": 0.1 if lowest is None or not peak else lowest / peak,
                   "lr_decay_iters": config.get("max_iters")}
        checkpoint["format_version"] = 3
    if isinstance(config, dict):
        config.setdefault("lr_decay", "cosine")  # before these were settings, there was no other value
        config.setdefault("muon_momentum", 0.95)


def model_config(fields, path):
    """A checkpoint's `model_config` -> GPTConfig. Fields newer than the checkpoint get their defaults. UserError for a
    field that model.py does not know or a value out of range."""
    unknown = fields.keys() - {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown:
        raise UserError(f"{path} has the model setting {next(iter(unknown))!r:.80}, which model.py does not know")
    try:
        return GPTConfig(**fields)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}") from None


def with_dropout(config, dropout):
    """The GPTConfig with this dropout. One of a changed model.py may have none."""
    return dataclasses.replace(config, dropout=dropout) if hasattr(config, "dropout") else config


def check_size(config, state, path, empty=None):
    """UserError if a model of this config would be much larger than its tensors, before it takes the memory. empty: the
    model without memory, if it can be had. Otherwise, the size of a GPT-2 is a guess."""
    c = config
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in state.values() if isinstance(t, torch.Tensor)}
    total = sum(storage.nbytes() for storage in storages.values())
    if empty is not None:
        least = sum(p.numel() for p in empty.parameters())
    else:
        positions = c.block_size * c.n_embd if "wpe.weight" in state else 0
        least = max(c.vocab_size * c.n_embd, c.n_layer // 3 * c.n_embd ** 2, positions)
    if least > total or c.n_layer > max(100, len(storages)):  # up to 100 layers may share their weights
        raise UserError(f"{path} does not fit model.py: its tensors are too small for its model_config")


def load_weights(model, state, path):
    """Puts a state dict into the model. UserError if it does not fit."""
    check_fit(model, state, path)
    check_finite(state, f"{path}: the tensor ")
    model.load_state_dict(dict(state))  # without attributes, which a state dict may have


def check_types(state, path, own=None):
    """UserError if a tensor's numbers cannot be weights: integers, complex numbers or those of 8 bits. A buffer may be
    of the type that it has in `own`, the model's state dict."""
    own = {name: t.dtype for name, t in (own or {}).items()}
    for name, t in state.items():
        if isinstance(t, torch.Tensor) and t.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64,
                                                           own.get(name)):
            raise UserError(f"{path}: the tensor {name} is of {t.dtype}; weights are of float16, bfloat16, float32 or "
                            "float64")


def check_fit(model, state, path):
    """UserError if a state dict does not have the model's tensors, in their shapes."""
    own = model.state_dict()
    check_types(state, path, own)
    for name in [*own, *state]:
        if name not in own or not isinstance(state.get(name), torch.Tensor) or own[name].shape != state[name].shape:
            raise UserError(f"{path} does not fit model.py: the tensor {name} is " + (
                "unknown to the model" if name not in own else
                "missing" if not isinstance(state.get(name), torch.Tensor) else
                f"of shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"))


# What the optimizers keep of a parameter. Earlier versions of Muon here kept no row_squares.
AVERAGES = {"Muon": ({"momentum_buffer", "row_squares"}, {"momentum_buffer"}),
            "AdamW": ({"step", "exp_avg", "exp_avg_sq"},)}


def shape_of_average(name, weight):
    """The shape of the average `name` of a parameter."""
    return torch.Size(()) if name == "step" else weight.shape[:-1] + (1,) if name == "row_squares" else weight.shape


def check_averages(model, averages, path):
    """UserError if these are not averages that an optimizer keeps of the model's parameters, each in its shape."""
    own = model.state_dict()
    for name, kept in averages.items() if isinstance(averages, dict) else [("its parameters", None)]:
        check_types(kept if isinstance(kept, dict) else {}, f"{path}: the optimizer's averages of {name}")
        if name not in own or not isinstance(kept, dict) or kept.keys() not in sum(AVERAGES.values(), ()) or any(
                not isinstance(t, torch.Tensor) or t.shape != shape_of_average(k, own[name])
                for k, t in kept.items()):
            raise UserError(f"{path} does not fit: its optimizer's averages of {name} are damaged")


def instead_of_resuming(folder):
    """What to do with a folder that has no latest.pt."""
    if find_checkpoint(folder):
        return f"start from its weights: --init_from={quoted(folder)}"
    return "name the folder of a run with --out_dir, or leave out --init_from to start one"


def find_checkpoint(path):
    """A checkpoint file, or the folder of a run -> the file: best.pt if it exists, otherwise latest.pt, as in a run
    before its first evaluation in training, otherwise nanoGPT's ckpt.pt. None if there is none."""
    path = Path(path)
    return next((p for p in (path, path / "best.pt", path / "latest.pt", path / "ckpt.pt") if p.is_file()), None)


def load_model(out_dir, block_size=None, dropout=None):
    """The folder of a run, or a checkpoint file -> model (in eval mode, on the CPU), tokenizer, checkpoint. block_size
    cuts off later positions. UserError if there is no checkpoint, or if it cannot be read."""
    path = find_checkpoint(out_dir)
    if path is None:
        raise UserError(f"no checkpoint in {out_dir}: " + (
            f"it holds a model in Hugging Face's format, which --init_from={quoted(out_dir)} takes"
            if (Path(out_dir) / "config.json").is_file() else
            "train one first, for example with python train.py config/train_shakespeare_char.py"))
    checkpoint = load_checkpoint(path, TO_SAMPLE)
    config = model_config(checkpoint["model_config"], path)
    empty = None
    if config.n_layer <= max(100, len(checkpoint["model"])):  # otherwise, check_size refuses it
        with contextlib.suppress(Exception), torch.device("meta"):  # no memory, so a changed GPT may raise exceptions
            empty = GPT(config)
    if empty is not None:
        check_fit(empty, checkpoint["model"], path)
    check_size(config, checkpoint["model"], path, empty)
    model = GPT(config if dropout is None else with_dropout(config, dropout))
    load_weights(model, checkpoint["model"], path)
    check_probe(model, checkpoint, path)
    if block_size not in (None, model.config.block_size):
        config, state = cropped(model.config, model.state_dict(), block_size, path)
        model = GPT(config)
        load_weights(model, state, path)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, but its model {config.vocab_size}; "
                        f"{other_checkpoint(path)}")
    return model.eval(), tokenizer, checkpoint


def load_to_sample(init_from, out_dir):
    """The model to generate with, in eval mode on the CPU, and its tokenizer: those of the run in out_dir if init_from
    is "resume", otherwise what load_pretrained finds. UserError if there is none, or no tokenizer."""
    if init_from == "resume":
        return load_model(out_dir)[:2]
    model, tok = load_pretrained(init_from)
    if tok is None:
        raise UserError(f"{init_from} has neither GPT-2's tokenizer nor that of a character model that checkpoint.py "
                        "exported")
    return model, tok


def cropped(config, tensors, block_size, source):
    """A model's config and tensors -> those of the same model with fewer positions. UserError if it has too few."""
    if block_size > config.block_size:
        raise UserError(f"{source} was trained with {config.block_size} positions; block_size {block_size} needs more")
    tensors = {name: t[:block_size] if name == "wpe.weight" else t for name, t in tensors.items()}
    return dataclasses.replace(config, block_size=block_size), tensors


# --- a checkpoint's probe: whether model.py still computes what it did when the checkpoint was saved ---

@torch.no_grad()
def probe(model):
    """A few logits and the loss of the model for fixed ids, as one tensor on the CPU: the same for the same weights."""
    config, device = model.config, next(model.parameters()).device
    ids = (torch.arange(min(65, config.block_size + 1)) * 7919 % config.vocab_size)[None].to(device)
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # without TF32
    try:
        logits, loss = model.eval()(ids[:, :-1], ids[:, 1:])[:2]  # a changed model.py may return more
    finally:
        model.train(was_training)
        torch.set_float32_matmul_precision(precision)
    logits = logits[0, :, :64].flatten()
    logits = logits.masked_fill(logits == -math.inf, 0.0)  # of tokens that are never chosen
    return torch.cat((logits, loss[None])).float().cpu()


def check_probe(model, checkpoint, path):
    """UserError if the checkpoint holds a probe and the model with its weights now gives another one, or if that is not
    finite."""
    then, now = checkpoint.get("probe"), probe(model)
    check_finite(now, f"{path}: what the model computes", "; restore a copy, or train the model again")
    if not isinstance(then, torch.Tensor) or os.environ.get("GPT_CHANGED_MODEL") == "1":
        return
    same_kind = (now.shape, now.dtype) == (then.shape, then.dtype)
    difference = (now - then).abs().max().item() if same_kind else math.inf
    if not difference <= 3e-5 * max(1.0, now.abs().max().item()):
        raise UserError(f"{path}: model.py no longer computes what it did when this was saved (logits differ by up to "
                        f"{difference:.2g}); restore model.py, or go on with GPT_CHANGED_MODEL=1 in the environment")


def restarted(path):
    """Whether torchrun has restarted the processes of the job that wrote this checkpoint, since one of them died."""
    return (os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            and load_to_resume(path).get("job") == os.environ.get("TORCHELASTIC_RUN_ID"))


def progress(checkpoint, tokens_per_step):
    """Where a run that resumes goes on: (iter_num, best_val_loss, bad_evals, seconds, extra). extra is the number of
    tokens that it has read beyond iter_num steps of tokens_per_step. It is 0 unless batch_size has changed."""
    iter_num = checkpoint["iter_num"]
    tokens = checkpoint.get("tokens")
    extra = 0 if tokens is None else tokens - iter_num * tokens_per_step
    return iter_num, checkpoint.get("best_val_loss"), checkpoint["bad_evals"], checkpoint["seconds"], extra


def has_same_text(checkpoint, text, path):
    """Whether a run resumes on the dataset that its checkpoint was trained on, and evaluates the same part of it.
    UserError if the dataset of that name has another text now, unless --dataset is on the command line."""
    before = checkpoint.get("text") or text
    if all(before.get(k) == text[k] for k in ("sha256", "val_tokens")):
        most = text["val_tokens"] - 1  # the last token is only a target
        evaluated = before.get("evaluated") or text["evaluated"]
        if min(evaluated, most) == min(text["evaluated"], most):
            return True
        print_once(f"eval_tokens is {text['evaluated']}, not {evaluated} as in the checkpoint, so the lowest "
                   "validation loss is reset")
        return False
    if before.get("dataset") in (None, text["dataset"]) and not any(w.startswith("--dataset") for w in sys.argv):
        raise UserError(f"the dataset {text['dataset']} is not the one that {path} was trained on; restore it, or go "
                        f"on with the new one: --dataset={text['dataset']}")
    print_once(f"the text of {text['dataset']} is not that of the checkpoint, so the lowest validation loss is reset")
    return False


# --- nanoGPT's checkpoints ---

def from_nanogpt(checkpoint, path):
    """The contents of nanoGPT's ckpt.pt -> a checkpoint of ours, to sample and to finetune. UserError if it is damaged,
    or if its characters are not known. nanoGPT's GELU is exact, and GPT-2's and ours an approximation, so logits differ
    slightly (docs/training.md)."""
    shape, state = checkpoint["model_args"], checkpoint.get("model")
    if not isinstance(shape, dict) or not isinstance(state, dict) or type(shape.get("vocab_size")) is not int:
        raise UserError(f"{path} is damaged: it should hold nanoGPT's model, and model_args with its vocab_size")
    state = {name.removeprefix("_orig_mod.").removeprefix("transformer."): t for name, t in state.items()
             if not name.endswith(".attn.bias")}  # the causal mask, which older versions keep
    if shape["vocab_size"] == 50304:  # nanoGPT pads GPT-2's vocabulary with tokens that never occur
        shape = shape | {"vocab_size": 50257}
        state = {name: t[:50257] if name in ("wte.weight", "lm_head.weight") else t for name, t in state.items()}
    state.setdefault("lm_head.weight", state.get("wte.weight"))
    if not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} is damaged: its model should hold tensors")
    if not torch.equal(state["lm_head.weight"], state["wte.weight"]):
        raise UserError(f"{path} has a head that is not tied to wte, which this model does not support")
    config = checkpoint.get("config")
    dataset = str(config.get("dataset", "")) if isinstance(config, dict) else ""
    dataset = dataset if is_dataset_name(dataset) else ""
    return {"format_version": FORMAT_VERSION, "model": state, "model_config": shape,
            "tokenizer": nanogpt_tokenizer(dataset, shape["vocab_size"], path)}


def nanogpt_tokenizer(dataset, vocab_size, path):
    """The tokenizer's state for a checkpoint of nanoGPT, which does not hold it: that of its dataset, if this is where
    nanoGPT puts it or was imported here. UserError if it is not found."""
    if vocab_size == 50257:
        return {"kind": "gpt2"}
    data = Path(__file__).resolve().parent / "data"
    for meta in (path.parent / "meta.pkl", path.resolve().parent.parent / "data" / dataset / "meta.pkl"):
        if meta.is_file():
            tokenizer = read_nanogpt_characters(meta)
            if tokenizer.vocab_size == vocab_size:
                return tokenizer.state()
    for meta in (data / dataset / "meta.json", *sorted(data.glob("*/meta.json"))):
        with contextlib.suppress(OSError, UserError):  # a dataset that is damaged is another matter
            found = read_json(meta, {"tokenizer": (dict, None), "source": (str, None)})
            tokenizer = load_tokenizer(found["tokenizer"])
            # An import has the same name as the dataset, or comes from a folder of that name.
            source = found["source"].startswith("nanoGPT's ") and Path(found["source"]).name
            imported = meta.parent.name == dataset or source and dataset in ("", source)
            if imported and tokenizer.vocab_size == vocab_size:
                print(f"{path} has no tokenizer: taking the one of {meta.parent}", file=sys.stderr, flush=True)
                return tokenizer.state()
    raise UserError(f"{path} does not say which {vocab_size} characters its ids stand for; import nanoGPT's dataset: "
                    f"python prepare.py --dataset={dataset or 'NAME'} --input=nanoGPT/data/{dataset or 'NAME'}")


def get_state(model, optimizers):
    """The states of the model and of its optimizers as full tensors on the CPU: {name: tensor, ...} and, with the
    averages of each parameter, {"state": {name: {"exp_avg": tensor, ...}, ...}}. Every process must call this, but only
    the main process gets the tensors; the others get None for each."""
    copies = {}  # of parameters: a tied one has two names, and is copied and stored once

    def full(t):
        whole = gathered(t)
        return whole.detach().cpu() if is_main_process() else None

    for t in (tensors := model.state_dict(keep_vars=True)).values():
        if id(t) not in copies:
            copies[id(t)] = full(t)
    weights = {name: copies[id(t)] for name, t in tensors.items()}
    names = {p: name for name, p in model.named_parameters()}  # asked for later: state_dict() makes FSDP shard them all
    averages = {names[p]: {k: full(t) for k, t in state.items()} for o in optimizers for p, state in o.state.items()}
    return weights, {"state": averages}


@torch.no_grad()
def set_state(model, optimizers, checkpoint, path):
    """Restores what get_state returned: the weights, and the averages that the optimizers keep. UserError if the
    checkpoint does not fit."""
    check_fit(model, checkpoint["model"], path)
    averages = checkpoint["optimizer"].get("state")
    check_averages(model, averages, path)
    model.load_state_dict({name: shard_like(checkpoint["model"][name].to(t.device), t)
                           for name, t in model.state_dict().items()})
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if names[p] not in averages:  # it has had no gradient so far
                    continue
                state = optimizer.state[p] = dict(averages[names[p]])
                if state.keys() not in AVERAGES[type(optimizer).__name__]:
                    raise UserError(f"{path} does not fit: the averages of {names[p]} are those of another optimizer")
                for k, t in state.items():
                    if k == "step":  # a fused optimizer counts on p's device, another one on the CPU
                        state[k] = t.to(p.device if group.get("fused") else "cpu")
                    else:
                        state[k] = shard_like(t.to(p.device, p.dtype), p)


def first_line(e):
    """The first line of an exception's message."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# --- the run's folder ---

def move_earlier_run(folder, lock):
    """Renames a folder that holds a run, or anything of one, to folder.1, folder.2, ... A link to a folder stays, and
    the folder itself is renamed. Releases its lock afterwards. Returns whether there was anything to rename. UserError
    if another run lies in the folder."""
    log = folder / "log.csv"
    if not any(folder.glob("*.pt")) and not (log.exists() and any(read_log(log))):
        return False
    inner = next((path.parent for path in folder.rglob("latest.pt") if path.parent != folder), None)
    if inner:
        raise UserError(f"{folder} holds an earlier run, which a new one renames, but {inner} is a run of its own; "
                        "name another --out_dir")
    folder = folder.resolve() if folder.is_symlink() else folder
    try:
        new = move_aside(folder)
    except PermissionError:  # Windows does not rename a folder in which a file is open: our lock, or, if another run
        lock.release()       # starts now, its lock
        new = move_aside(folder)
    lock.release()
    print_once(f"{folder} held an earlier run: moved it to {new}")
    folder.mkdir(exist_ok=True)
    return True


def move_aside(folder):
    """Renames a folder to folder.1 or, if there is one, folder.2, ... Returns its new path."""
    new = next(path for n in itertools.count(1) if not (path := Path(f"{folder}.{n}")).exists())
    return folder.rename(new)


def lock_run(folder):
    """Makes sure that no other process trains in this folder, until this one ends, in whatever way. UserError if one
    does. Returns the lock, which must be kept."""
    path, owner = folder / ".lock", folder / ".process"
    path.touch()
    lock, before = filelock.FileLock(path), path.stat()
    try:
        lock.acquire(timeout=0)
        if not path.exists() or not os.path.samestat(before, path.stat()):
            raise UserError(f"another run has just renamed {folder}; start again, or choose another --out_dir")
    except filelock.Timeout:
        who = read_small(owner).decode(errors="replace")[:20] if owner.exists() else "unknown"
        raise UserError(f"another run (process {who}) is writing to {folder}; stop it, or choose another --out_dir"
                        ) from None
    write_atomically(owner, str(os.getpid()).encode())
    return lock


UNFINISHED = re.compile(r"(latest|best)\.pt\.tmp|(log\.csv|\.process)\.\d+\.tmp")  # what a killed process leaves behind


class Log:
    """A run's log.csv, and the same figures for TensorBoard and Weights & Biases, if `config` asks for them. A new run
    moves an earlier one out of its folder. A run that resumes from `checkpoint` keeps the rows up to its step, and the
    run at Weights & Biases. Only the main process writes."""

    def __init__(self, folder, checkpoint, config):
        self.path, self.board, self.wandb = Path(folder, "log.csv"), None, None
        self.wandb_id = checkpoint.get("wandb_id") if checkpoint else None
        if not is_main_process():
            return
        try:
            if config["tensorboard"]:
                from torch.utils.tensorboard import SummaryWriter
            if config["wandb"]:
                import wandb
        except ImportError as e:
            raise UserError(f"--{e.name} needs: pip install {e.name}") from None
        here, data = Path(folder).resolve(), Path(__file__).resolve().parent / "data"
        # A new run renames the folder later, which must not take the project or its datasets with it.
        if Path.cwd().is_relative_to(here) or data.is_relative_to(here) or here.is_relative_to(data):
            raise UserError(f"out_dir must be a folder for this run alone, not {str(folder)!r}; name another one")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock_run(self.path.parent)
        if checkpoint and checkpoint.get("changed_at") != changed_at(self.path.with_name("latest.pt")):
            raise UserError(f"another run has just saved {self.path.with_name('latest.pt')}; start again")
        while not checkpoint and move_earlier_run(Path(folder), self.lock):  # the lock has moved with the folder
            self.lock = lock_run(self.path.parent)
        for file in self.path.parent.glob("*.tmp"):
            if UNFINISHED.fullmatch(file.name) and not file.is_dir():
                file.unlink()
        self.locked = os.stat(self.lock.lock_file)
        rows, damaged = read_log(self.path) if checkpoint and self.path.exists() else ([], 0)
        if damaged:
            print_once(f"{self.path}: left out {damaged} damaged line{'s' * (damaged != 1)}")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, LOG_COLUMNS)
        writer.writeheader()
        # A run that resumes at step 0 evaluates once more, and writes that row again.
        writer.writerows(row for row in rows if int(row["iter"]) <= checkpoint["iter_num"] > 0)
        write_atomically(self.path, text.getvalue().encode())
        if config["tensorboard"]:  # points of steps after the checkpoint's, of a killed run, are removed
            self.board = SummaryWriter(folder, purge_step=checkpoint["iter_num"] + 1 if checkpoint else None)
        if config["wandb"]:
            self.wandb = wandb.init(project=config["wandb_project"], name=config["wandb_name"] or str(folder),
                                    dir=folder, config=config, id=self.wandb_id, resume="allow")
            self.wandb_id = self.wandb.id

    def check_folder(self):
        """UserError if the folder of the run was moved or removed. Another run may be using its name now."""
        try:
            same = os.path.samestat(self.locked, os.stat(self.lock.lock_file))
        except OSError:
            same = False
        if not same:
            raise UserError(f"{self.path.parent} was moved or removed while the run was using it; the run stops here")

    def save(self, path, checkpoint):
        """Writes a checkpoint of the run: see save_checkpoint."""
        self.check_folder()
        save_checkpoint(path, checkpoint | {"job": os.environ.get("TORCHELASTIC_RUN_ID")})

    def write(self, **row):
        """Appends a row to log.csv; columns that are not given stay empty."""
        if not is_main_process():
            return
        self.check_folder()
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, LOG_COLUMNS).writerow(
                    {k: f"{v:.12g}" for k, v in row.items() if math.isfinite(v)})  # a norm that overflowed stays empty
        except OSError as e:
            raise UserError(f"{self.path} cannot be written: {first_line(e)}") from e
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["iter"])
            self.board.flush()
        if self.wandb:
            self.wandb.log(row, step=row["iter"])

    def close(self):
        """Sends what Weights & Biases has not sent yet."""
        if self.wandb:
            self.wandb.finish()


def format_seconds(s):
    """Seconds -> h:mm:ss, without the hours if there are none."""
    s = round(s)
    return f"{s // 3600}:{s % 3600 // 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"


# --- GPT-2 weights in Hugging Face's format ---

# OpenAI wrote these layers as "Conv1D", which keeps a linear layer's matrix transposed, (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_pretrained(name_or_folder, block_size=None, dropout=0.0):
    """Loads the weights of a run of ours or of nanoGPT's (see find_checkpoint), or of a GPT-2: gpt2, gpt2-medium,
    gpt2-large, gpt2-xl, the name of any GPT-2 on Hugging Face, or a folder with config.json and the weights
    (safetensors, in one file or several, or pytorch_model.bin). Returns the model, in eval mode, and the tokenizer,
    which is None if tokenizer.py cannot read it. block_size cuts off later positions. UserError if the weights
    cannot be read, or are not those of a GPT-2 that model.py can compute."""
    if find_checkpoint(name_or_folder):
        return load_model(name_or_folder, block_size, dropout)[:2]
    folder = Path(name_or_folder)
    is_name = not folder.is_dir()
    if is_name:
        folder = download_repository(str(name_or_folder))
    try:
        given = read_json(folder / "config.json", {}, advice="fetch it again")
        config = with_dropout(read_config(given, name_or_folder), dropout)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{name_or_folder} has no checkpoint (best.pt, latest.pt), and no readable config.json as a "
                        f"Hugging Face folder has ({e.strerror})") from None
    except (TypeError, ValueError) as e:
        raise UserError(f"the config.json of {name_or_folder} does not fit a GPT-2 ({first_line(e)})") from None
    tensors = read_tensors(folder, name_or_folder)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # the causal mask, which older files carry
    check_types(tensors, name_or_folder)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors.get("wte.weight")
    elif "wte.weight" in tensors and not torch.equal(tensors["lm_head.weight"], tensors["wte.weight"]):
        raise UserError(f"{name_or_folder} has a head that is not tied to wte, which this model does not support")
    if block_size is not None:
        config, tensors = cropped(config, tensors, block_size, name_or_folder)
    check_size(config, {"wpe.weight": torch.zeros(0)} | {k: t for k, t in tensors.items() if t is not None},
               name_or_folder)
    model = GPT(config)
    if all(t is not None and t.dtype == torch.float64 for t in tensors.values()):
        model = model.double()
    own = model.state_dict()
    for name in [*own, *(tensors.keys() - own.keys())]:
        if name not in own or tensors.get(name) is None:
            raise UserError(f"{name_or_folder}: the tensor {name} is " + (
                "missing" if name in own else "not part of a GPT-2"))
        t = tensors[name].T if name.endswith(TRANSPOSED) else tensors[name]
        if t.shape != own[name].shape:
            raise UserError(f"{name_or_folder}: {name} has shape {tuple(tensors[name].shape)}, which does not fit "
                            "config.json")
        own[name].copy_(t)
    check_finite(own, str(name_or_folder), "; fetch it again")
    check_finite(probe(model), f"{name_or_folder}: what the model computes", "; fetch it again")
    return model.eval(), pretrained_tokenizer(folder, is_name, config.vocab_size)


def download_repository(name):
    """The name of a repository on Hugging Face -> a folder with its files. UserError if it cannot be downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name} is not a folder, and loading it by name needs: pip install huggingface_hub") from None
    patterns = ["config.json", "vocab.json", "tokenizer.json", "model*.safetensors*", "pytorch_model*.bin*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns[:4]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # the hub raises its own exceptions and the network library's
        raise UserError(f"{name} is neither a folder here nor a repository that can be reached on Hugging Face "
                         f"({type(e).__name__}: {first_line(e)})") from None
    return folder


def read_config(given, name):
    """Hugging Face's config.json -> GPTConfig. UserError for what our GPT does not do."""
    n_embd = given.get("n_embd", 768)
    required = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
                "n_inner": (4 * n_embd, None), "tie_word_embeddings": (True, None), "scale_attn_weights": (True, None),
                "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None),
                "layer_norm_epsilon": (1e-5, None)}
    for key, allowed in required.items():
        if given.get(key) not in allowed:
            raise UserError(f"{name}: config.json has {key} {given.get(key)!r}, only {allowed[0]!r} is supported")
    return GPTConfig(block_size=given.get("n_positions", 1024), vocab_size=given.get("vocab_size", 50257),
                     n_layer=given.get("n_layer", 12), n_head=given.get("n_head", 12), n_embd=n_embd, bias=True)


def read_tensors(folder, name):
    """All tensors of a folder, whether in one file or in several."""
    files = (sorted(filter(Path.is_file, folder.glob("model*.safetensors")))
             or sorted(filter(Path.is_file, folder.glob("pytorch_model*.bin"))))
    if not files:
        raise UserError(f"{name} holds neither model.safetensors nor pytorch_model.bin")
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".bin":
                found = read_archive(file)
                if not isinstance(found, dict) or not all(
                        isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in found.items()):
                    raise UserError(f"{file} is damaged, or is older than PyTorch 1.6; if you trust it, load it with "
                                    "torch.load and save it as model.safetensors with safetensors.torch.save_file")
                tensors |= found
            else:
                from safetensors.torch import load_file
                tensors |= load_file(file)
        except ImportError:
            raise UserError(f"reading {file} needs: pip install safetensors") from None
        except UserError:
            raise
        except Exception as e:  # both libraries raise many kinds of exceptions for a file that is damaged
            raise UserError(f"{file} cannot be read ({first_line(e)}); fetch it again") from None
    return tensors


def pretrained_tokenizer(folder, is_name, vocab_size):
    """The tokenizer of a pretrained model, if it is GPT-2's or the characters of an export of ours, else None."""
    words = None  # a published model may come without its vocabulary, which then is GPT-2's
    if (folder / "vocab.json").is_file():
        words = read_json(folder / "vocab.json", {}, advice="fetch it again")
    elif (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json", {"model": (dict, None)}, advice="fetch it again")["model"]
        words = model.get("vocab") or {}
        if model.get("type") == "WordLevel" and isinstance(words, dict) and (
                list(words.values()) == list(range(vocab_size)) and all(len(word) == 1 for word in words)):
            return CharTokenizer("".join(words))
    elif not is_name:
        return None
    if vocab_size != 50257 or words not in (None, json.loads(fetch_vocabulary()["encoder.json"].read_bytes())):
        return None
    return BPETokenizer()


EXPORTED = {"config.json", "model.safetensors", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json",
            "README.md"}


def save_pretrained(model, tokenizer, folder, card=""):
    """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load; card is the text of its
    README.md. A model without biases gets biases of zero, which compute the same. The folder appears whole or not at
    all; an earlier export there is renamed. UserError if the model is not a GPT-2 (someone has changed model.py), if
    the folder holds something else, or if safetensors is not installed."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("writing the weights needs: pip install safetensors") from None
    c, eot = model.config, getattr(tokenizer, "eot", None)
    tensors = to_gpt2(model)
    tied = "lm_head.weight" not in tensors
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
              "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
              "n_head": c.n_head, "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": tied,
              **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), getattr(c, "dropout", 0.0)),
              "bos_token_id": eot, "eos_token_id": eot, "dtype": str(model.wte.weight.dtype).removeprefix("torch.")}
    files = {"config.json": json.dumps(config, indent=1).encode(), "model.safetensors": save(tensors, {"format": "pt"})}
    settings = {"model_max_length": c.block_size, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, BPETokenizer):
        paths = fetch_vocabulary()
        settings |= {"tokenizer_class": "GPT2Tokenizer"}
        settings |= {k: "<|endoftext|>" for k in ("bos_token", "eos_token", "unk_token")}
        files |= {"vocab.json": paths["encoder.json"].read_bytes(), "merges.txt": paths["vocab.bpe"].read_bytes()}
    elif tokenizer:  # each character is a word of the vocabulary; transformers refuses others
        words = {c: i for i, c in enumerate(tokenizer.chars)}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        files["tokenizer.json"] = json.dumps({
            "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                              "invert": False},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}, "decoder": {"type": "Fuse"}}).encode()
    files |= {"tokenizer_config.json": json.dumps(settings).encode(),
              "README.md": card.encode(errors="backslashreplace")}  # a file's name may hold bytes that are not UTF-8
    folder = Path(folder).resolve()
    if not folder.name:
        raise UserError(f"{folder} cannot be the folder of an export; name a new one")
    partial = folder.with_name(f".{folder.name}.partial")
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= EXPORTED):
        raise UserError(f"{folder} exists and is not an earlier export; name a new folder")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        for name, data in files.items():
            write_atomically(partial / name, data)
        if not all((partial / name).is_file() for name in files):
            raise UserError(f"another export to {folder} is under way, so this one was stopped")
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists() and any(folder.iterdir()):
        print_once(f"{folder} held an earlier export: moved it to {move_aside(folder)}")
    elif folder.exists():
        folder.rmdir()
    partial.rename(folder)


def model_card(checkpoint, folder):
    """The README.md of an export: what the model is, on what it was trained and how, and how to load it."""
    shape, text, loss = checkpoint["model_config"], checkpoint.get("text") or {}, checkpoint.get("best_val_loss")
    settings = (checkpoint.get("config") or {}) | shape
    machine = ("out_dir", "device", "wandb", "wandb_project", "wandb_name", "tensorboard", "vocab_size")
    words = [f"--{k}={v}" for k, v in settings.items() if k not in machine and v not in (None, "", "scratch", "resume")]
    how = ["Trained with", "", f"    python train.py {shlex.join(words)}", ""] if checkpoint.get("config") else []
    name, kind = Path(folder).resolve().name, checkpoint["tokenizer"].get("kind")
    known = checkpoint["tokenizer"].get("chars", "The")  # the example must not have other characters
    prompt = "".join(c for c in "The" if c in known) or known[0]
    new_tokens = max(1, min(50, shape["block_size"] - len(prompt)))  # transformers cannot go on past the context
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", "",
             "A GPT with GPT-2's architecture.", "",
             f"- Sizes: n_layer {shape['n_layer']}, n_head {shape['n_head']}, n_embd {shape['n_embd']}; a context of "
             f"{shape['block_size']} tokens; a vocabulary of {shape['vocab_size']} "
             f"{'byte pairs' if kind == 'gpt2' else 'characters'}",
             f"- Dataset: {text.get('dataset', 'unknown')} (sha256 of the text: {text.get('sha256', 'unknown')})",
             f"- Training: {checkpoint.get('iter_num', 'unknown')} steps, {checkpoint.get('tokens', 'unknown')} tokens",
             f"- Validation loss: {'unknown' if loss is None else f'{loss:.4f} nats per token'}", "",
             *how, f"To write text with it, in the folder that holds {name}:", "",
             "    from transformers import pipeline",
             f'    generate = pipeline("text-generation", model={name!r})',
             f'    print(generate({prompt!r}, max_new_tokens={new_tokens})[0]["generated_text"])', "",
             f"Together, the prompt and the new tokens may be at most {shape['block_size']} tokens long.", ""]
    return "\n".join(lines)


def to_gpt2(model):
    """The tensors of a GPT under Hugging Face's names and in its layout. UserError if GPT-2, computed from them, gives
    other logits than the model."""
    if getattr(model, "prepared_as", None):
        raise UserError("the model was prepared for inference by fast.py; export it as load_model gives it")
    tensors = {}
    for name, t in model.state_dict().items():
        t = t.detach().cpu()
        tensors[name if name == "lm_head.weight" else f"transformer.{name}"] = (
            t.T if name.endswith(TRANSPOSED) else t).contiguous()
    for name, t in list(tensors.items()):
        if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
            tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(t.size(-1), dtype=t.dtype))
    idx = torch.randint(model.config.vocab_size, (1, min(1024, model.config.block_size)),
                        generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            ours = copy.deepcopy(model).cpu().double().eval()(idx)[0]
            theirs = gpt2_logits({name: t.double() for name, t in tensors.items()}, model.config, idx)
        for table, size in (("wte", model.config.vocab_size), ("wpe", model.config.block_size)):
            if len(rows := tensors[f"transformer.{table}.weight"]) != size:
                raise ValueError(f"{table} has {len(rows)} rows instead of {size}")
        if not (ours - theirs).abs().max() <= 1e-9 * max(1.0, ours.abs().max().item()):
            raise ValueError(f"its logits differ from GPT-2's by {(ours - theirs).abs().max():.2g}")
    except (KeyError, RuntimeError, ValueError) as e:
        reason = f"it has no {e.args[0].removeprefix('transformer.')}" if isinstance(e, KeyError) else first_line(e)
        raise UserError("the model cannot be exported, because model.py does not compute what GPT-2 does "
                        f"({reason}); nothing was written") from None
    if torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"]):
        del tensors["lm_head.weight"]
    return tensors


def gpt2_logits(tensors, config, idx):
    """The logits of GPT-2, from tensors in Hugging Face's format. It is independent of model.py, to check an export."""
    left = dict(tensors)  # what is left over in the end is not part of GPT-2

    def linear(x, name):
        return x @ left.pop(f"{name}.weight") + left.pop(f"{name}.bias")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], left.pop(f"{name}.weight"), left.pop(f"{name}.bias"), 1e-5)

    B, T = idx.shape
    x = left.pop("transformer.wte.weight")[idx] + left.pop("transformer.wpe.weight")[:T]
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        heads = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").view(B, T, 3, config.n_head, -1)
        y = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{block}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"{block}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ left.pop("lm_head.weight").T
    if left:
        raise KeyError(f"GPT-2 has no tensor {min(left)}")
    return logits


if __name__ == "__main__":
    if export is None:
        raise UserError("nothing to do; name the folder to write with --export=FOLDER")
    model, tokenizer, checkpoint = load_model(out_dir)
    save_pretrained(model, tokenizer, export, model_card(checkpoint, export))
    print(f"wrote {export}: its README.md says how to load it")
