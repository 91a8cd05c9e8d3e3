"""Saving and loading a run.

A checkpoint is one file, written by torch.save and read with weights_only=True, so that it can hold tensors and plain
values but no code. `out/latest.pt` is for resuming, `out/best.pt` (the lowest validation loss) for sampling.
"""
import os
from pathlib import Path

import torch

from model import GPT, GPTConfig
from tokenizer import load_tokenizer

FORMAT_VERSION = 1


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain values to `path`. The file appears whole or not at all: it is written under
    another name, synced to the disk, then renamed. ValueError if a tensor is not finite, and nothing is written."""
    _check_finite(checkpoint)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint | {"format_version": FORMAT_VERSION}, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _check_finite(value, name="checkpoint"):
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite, so nothing was saved")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_finite(item, name)


def load_checkpoint(path):
    """Path -> the dict, on the CPU. ValueError if the file is not such a checkpoint, FileNotFoundError without one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as e:  # torch.load raises many kinds for a file that is cut short, or not its own, or unsafe
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); delete it or restore a copy") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT_VERSION:
        version = checkpoint.get("format_version") if isinstance(checkpoint, dict) else None
        raise ValueError(f"{path} has checkpoint format {version}, this program reads {FORMAT_VERSION}; train anew")
    return checkpoint


def load_model(out_dir):
    """A run's folder -> model (in eval mode, on the CPU), tokenizer, checkpoint: of best.pt, else latest.pt.
    FileNotFoundError if there is neither, ValueError if it cannot be read."""
    path = next((p for p in (Path(out_dir, "best.pt"), Path(out_dir, "latest.pt")) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no checkpoint in {out_dir}: train one first, "
                                "for example with python train.py config/train_shakespeare_char.py")
    checkpoint = load_checkpoint(path)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), load_tokenizer(checkpoint["tokenizer"]), checkpoint
