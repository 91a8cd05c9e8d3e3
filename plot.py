"""Draws plots, as PNG or SVG by the file's name. Needs matplotlib.

    python plot.py --start="ROMEO:"                          # what each head of the trained model attends to
    python plot.py --start="ROMEO:" --layer=0 --head=2       # one head, large
    python plot.py --what=loss --out_dir=out,out.1           # training and validation loss of runs, from their log.csv
    python plot.py --what=loss --x=seconds
    python plot.py --what=gradients --json=gradients.json    # what verify_gradients.py wrote with --json
    python plot.py --what=kv --json=kv.json                  # what bench_kv.py wrote with --json
    python plot.py --what=train --json=a.json,b.json         # what bench_train.py wrote with --json, here twice
"""
import os

what = "attention"            # attention, loss, gradients, kv or train
file: str | None = None       # the picture, .png or .svg; None: <what>.png
out_dir = "out"               # the run; for loss also several, separated by commas
init_from = "resume"          # attention: resume for the run in out_dir, else GPT-2 weights as in sample.py
start = "ROMEO:\nWhat light"  # attention: the text that the model reads
layer: int | None = None      # attention: one layer only, from 0
head: int | None = None       # attention: one head only, from 0
x = "steps"                   # loss: against steps or seconds
y = "loss"                    # loss: in nats per token (loss) or, to compare tokenizers, in bits per byte (bits)
json: str | None = None       # gradients, kv, train: the files with the figures, separated by commas
# Settings are read before the heavy imports, so that --help and a typo answer at once.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import contextlib
import io
import json as json_format
import math
import re
import sys
import textwrap
import warnings
from pathlib import Path

from files import UserError, check, read_log, read_small, unescape, write_atomically

# --- the settings, and the figures in files ---

NEEDED = {"gradients": {"blocks": str, "n_layer": int, "when": str, "block": float},  # fields of a record, by `what`
          "kv": {"model": str, "peer": str | None, "dtype": str, "compile": bool, "use_cache": bool, "batch": int,
                 "prompt": int, "tokens_per_second": float},
          "train": {"arguments": list, "dtype": str, "device": str, "parts": dict}}
picture = Path(file or f"{what}.png")


def check_settings():
    """UserError for a setting out of range."""
    choices = {"what": ("attention", "loss", *NEEDED), "x": ("steps", "seconds"), "y": ("loss", "bits")}
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise UserError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {config[name]!r}")
    if picture.suffix not in (".png", ".svg"):
        raise UserError(f"the picture's name must end in .png or .svg, got {str(picture)!r}")
    for name in ("layer", "head"):
        if config[name] is not None and config[name] < 0:
            raise UserError(f"{name} must be at least 0, got {config[name]}")
    if what in NEEDED and json is None:
        raise UserError(f"--what={what} needs the file with the figures: --json=FILE")
    if what != "attention":
        check(config, "names separated by commas", lambda x: all(x.split(",")), "json", "out_dir")


def read_losses(folder):
    """A run's log.csv -> {column: its numbers, None where a row has none}. UserError without a whole row."""
    path = Path(folder, "log.csv")
    if not path.is_file():
        raise UserError(f"no {path}: train.py writes it")
    rows, damaged = read_log(path)
    if not rows:
        raise UserError(f"{path} has no whole row; train.py writes one for each step that it logs")
    if damaged:
        print(f"{path}: left out {damaged} damaged line{'s' * (damaged != 1)}", file=sys.stderr)
    loss_unit = bits_per_nat(folder) if y == "bits" else 1.0
    units = {"iter": 1.0, "seconds": 1.0, "loss": loss_unit, "train_loss": loss_unit, "val_loss": loss_unit}
    return {name: [float(row[name]) * unit if row[name] else None for row in rows] for name, unit in units.items()}


def bits_per_nat(folder):
    """What turns a run's loss, in nats per token, into bits per byte of its validation text. UserError if its
    checkpoint does not say how many bytes the text has."""
    from checkpoint import find_checkpoint, load_checkpoint
    path = find_checkpoint(folder)
    text = load_checkpoint(path).get("text", {}) if path else {}
    if not (text.get("val_bytes") and text.get("val_tokens")):
        raise UserError(f"{folder} has no checkpoint that says how many bytes its validation text has; train the model "
                        "again, or leave out --y=bits")
    return text["val_tokens"] / text["val_bytes"] / math.log(2)


def fits(value, kind):
    """Whether a field of a record is of its kind: a number from 0 to 1e15, a list of strings, a dict of numbers, ..."""
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(fits(item, float) for item in value.values())
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and 0 <= value <= 1e15
    return isinstance(value, kind)


def read_records():
    """The records in the files of --json. UserError if one is not what `what` needs."""
    records = []
    for name in json.split(","):
        data = read_small(name, pipes=True)
        try:
            found = json_format.loads(data)
            json_format.dumps(found, ensure_ascii=False).encode()  # halves of a character cannot be drawn
        except (ValueError, RecursionError) as e:
            raise UserError(f"{name} is not JSON: {e}") from None
        if type(found) is not list or not found:
            raise UserError(f"{name} should hold a list of records")
        for record in found:
            for field, kind in NEEDED[what].items():
                value = record.get(field) if type(record) is dict else None
                if not fits(value, kind):
                    raise UserError(f"{name} does not hold figures for --what={what}: {field} is {value!r:.60}")
        records += found
    return records


check_settings()
data = read_records() if what in NEEDED else {f: read_losses(f) for f in out_dir.split(",")} if what == "loss" else None

try:
    import matplotlib
except ImportError:
    raise UserError("the pictures need matplotlib: pip install matplotlib") from None
matplotlib.use("Agg")  # no window: a file
matplotlib.rcParams["text.parse_math"] = False  # $ is a character like others
warnings.filterwarnings("ignore", "Glyph .* missing from")  # a character that no font has is drawn as a box
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager

# --- the pictures ---


def visible(token):
    """A token as a label: white space becomes a sign."""
    return token.replace("\n", "\\n").replace(" ", "\u00b7") or "?"


def draw_head(ax, weights, tokens, labels):
    """One heat map of weights (T, T). Row t shows what position t attends to. What the mask hides stays grey."""
    image = ax.imshow(np.where(np.tri(len(tokens), dtype=bool), weights, np.nan), cmap="viridis", vmin=0, vmax=1)
    ax.set_facecolor("lightgrey")
    ticks = range(len(tokens)) if labels else []
    ax.set_xticks(ticks, tokens if labels else [], rotation=90 if max(map(len, tokens)) > 2 else 0)
    ax.set_yticks(ticks, tokens if labels else [])
    ax.tick_params(length=0)
    return image


def fonts_for(text):
    """Fonts of this machine that together have the characters of a text: matplotlib's own first, then others."""
    families, missing = [], set(map(ord, text + "x"))  # x, because the labels need matplotlib's own in any case
    for font in sorted(font_manager.fontManager.ttflist, key=lambda f: f.name != "DejaVu Sans"):
        if missing and not font.name.startswith("Last Resort"):  # which has a box for every character
            with contextlib.suppress(RuntimeError):  # a font that matplotlib cannot draw
                found = missing & font_manager.get_font(font.fname).get_charmap().keys()
                families += [font.name] if found else []
                missing -= found
    return families


def plot_attention():
    """The attention weights for `start`, of every layer and head or of one."""
    import torch

    from checkpoint import load_to_sample
    from device import check_memory
    model, tok = load_to_sample(init_from, out_dir)
    text = unescape(start)
    if "start" not in overrides and tok.eot is None:  # the default has characters that a model may not know
        text = "".join(c for c in text if c in tok.chars)[:model.config.block_size] or tok.chars[0]
    try:
        ids = tok.encode_prompt(text)
    except UserError as e:
        raise UserError(f"--start: {e}") from None
    if not 0 < len(ids) <= model.config.block_size:
        raise UserError(f"--start has {len(ids)} tokens; the model reads from 1 to {model.config.block_size}")
    c = model.config
    check_memory(torch.device("cpu"), 4 * c.n_layer * c.n_head * len(ids) ** 2, "shorten --start")
    maps = model.attention_maps(torch.tensor([ids]))[:, 0].numpy()  # (n_layer, nh, T, T)
    for name, n in zip(("layer", "head"), maps.shape, strict=False):
        if config[name] is not None and config[name] >= n:
            raise UserError(f"{name} must be from 0 to {n - 1}, got {config[name]}")
    tokens = [visible(tok.decode([i])) for i in ids]
    matplotlib.rcParams["font.family"] = fonts_for("".join(tokens))
    layers = range(maps.shape[0]) if layer is None else [layer]
    heads = range(maps.shape[1]) if head is None else [head]
    cell = 7 if len(layers) * len(heads) == 1 else max(2.2, 0.16 * len(ids))
    fig, axes = plt.subplots(len(layers), len(heads), squeeze=False, layout="constrained",
                             figsize=(cell * len(heads) + 1.2, cell * len(layers) + 0.9))
    for i, row in zip(layers, axes, strict=True):
        for j, ax in zip(heads, row, strict=True):
            image = draw_head(ax, maps[i, j], tokens, labels=len(ids) <= 40)
            ax.set_title(f"layer {i}, head {j}", fontsize="medium")
    fig.supylabel("position of the query")
    fig.supxlabel("position of the key (grey: hidden by the causal mask)")
    fig.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    return fig


def plot_loss():
    """Training and validation loss of one run or several."""
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for n, (folder, columns) in enumerate(data.items()):
        along = columns["iter" if x == "steps" else "seconds"]
        # An untrained model's loss would squeeze the curves. It is drawn if the losses of batches reach it.
        top = 1.1 * max((loss for loss in columns["loss"] if loss is not None), default=math.inf)
        for column, name, style in (("loss", "each batch", dict(alpha=0.25, lw=1)),
                                    ("train_loss", "training", dict(ls="--", marker="x")),
                                    ("val_loss", "validation", dict(ls="-", marker="o"))):
            points = [(at, loss) for at, loss in zip(along, columns[column], strict=True)
                      if loss is not None and (at > 0 or loss <= top)]
            if points:
                end = "" if column == "loss" else f", at the end {points[-1][1]:.3f}"
                shown = folder.encode(errors="replace").decode()  # a folder's name may not be UTF-8
                shown = "./" * shown.startswith("_") + shown  # matplotlib hides labels that begin with _
                ax.plot(*zip(*points, strict=True), color=f"C{n}", label=f"{shown}: {name}{end}", **style)
    ax.set_xlabel("steps" if x == "steps" else "seconds of training")
    ax.set_ylabel("loss (nats per token)" if y == "loss" else "loss (bits per byte of text)")
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def plot_gradients():
    """The norm of the gradient in each block, for each way to build the model, at the start and trained."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for ax, when in zip(axes, ("at start", "trained"), strict=True):
        for n, name in enumerate(dict.fromkeys(r["blocks"] for r in data)):
            for i, n_layer in enumerate(sorted({r["n_layer"] for r in data})):
                norms = [r["block"] for r in data if (r["blocks"], r["n_layer"], r["when"]) == (name, n_layer, when)]
                if len(norms) > n_layer:
                    raise UserError(f"{json}: {name} with {n_layer} layers is there more than once; draw one file")
                if len(norms) < n_layer or min(norms) <= 0:
                    raise UserError(f"{json}: {name} with {n_layer} layers should have {n_layer} norms above 0 {when}")
                ax.semilogy(np.linspace(0, 1, len(norms)), norms, (":", "--", "-")[i % 3], color=f"C{n}",
                            label=f"{name}, {n_layer} layers")
        ax.set_title(when)
        ax.set_xlabel("depth of the block (0: first, 1: last)")
        ax.grid(alpha=0.3)
    axes[0].yaxis.set_major_formatter("{x:.0e}")  # matplotlib's own labels are formulas, which are not parsed here
    axes[0].set_ylabel("norm of the gradient of a block's parameters")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def plot_kv():
    """Decoding speed of every variant in the file, for each model, at batch 1 after its shortest prompt."""
    records = [r for r in data if r["batch"] == 1]
    names = list(dict.fromkeys(r["model"] for r in records))
    if not names:
        raise UserError(f"{json} has no measurement at batch 1")
    shortest = {name: min(r["prompt"] for r in records if r["model"] == name) for name in names}
    records = [r for r in records if r["prompt"] == shortest[r["model"]]]
    fig, axes = plt.subplots(len(names), 1, figsize=(8, 0.5 + 0.45 * len(records)), squeeze=False, layout="constrained")
    for ax, name in zip(axes[:, 0], names, strict=True):
        own = sorted((r for r in records if r["model"] == name), key=lambda r: r["tokens_per_second"])
        labels = [f"{r['peer'] or ('compiled' if r['compile'] else 'eager')} {r['dtype']}"
                  + ("" if r["use_cache"] else ", no cache") for r in own]
        colors = ["C1" if r["peer"] else "C0" if r["use_cache"] else "grey" for r in own]
        ax.bar_label(ax.barh(range(len(own)), [r["tokens_per_second"] for r in own], color=colors), fmt=" %.0f")
        ax.set_yticks(range(len(own)), labels)  # several files may have the same label
        ax.set_title(name)
        ax.set_xlabel(f"tokens per second (batch 1, after a prompt of {shortest[name]})")
        ax.margins(x=0.1)
    return fig


def plot_train():
    """The parts of a training step, one bar for each record."""
    labels = [textwrap.fill(" ".join(r["arguments"]) or "default settings", 50) + f"\n{r['dtype']} on {r['device']}"
              for r in data]
    height = 1.2 + sum(0.2 + 0.2 * len(label.splitlines()) for label in labels)
    fig, ax = plt.subplots(figsize=(9, height), layout="constrained")
    places, left = np.arange(len(data)), np.zeros(len(data))
    for part in dict.fromkeys(part for r in data for part in r["parts"]):
        widths = np.array([r["parts"].get(part, 0.0) for r in data]) * 1e3
        ax.barh(places, widths, left=left, label=part)
        left += widths
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds per step")
    ax.legend()
    return fig


figure, drawn = globals()[f"plot_{what}"](), io.BytesIO()
width, height = (120 * inches for inches in figure.get_size_inches())
if picture.suffix == ".png" and (max(width, height) >= 2 ** 16 or width * height > 2 ** 28):
    raise UserError(f"the picture would have {width:.0f} x {height:.0f} pixels, which is too large; name an .svg, or "
                    "ask for less")
figure.savefig(drawn, dpi=120, format=picture.suffix[1:])
drawing = drawn.getvalue()
if picture.suffix == ".svg":  # XML has no other control characters
    drawing = re.sub(rb"[\0-\x08\x0b\x0c\x0e-\x1f]", b"?", drawing)
write_atomically(picture, drawing)
print(f"wrote {picture}")
