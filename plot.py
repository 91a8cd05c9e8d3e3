"""Every picture, as PNG or SVG by the file's name. Needs matplotlib.

    python plot.py --start="ROMEO:"                          # what each head of the trained model attends to
    python plot.py --start="ROMEO:" --layer=0 --head=2       # one head, large
    python plot.py --what=loss --out_dir=out,out.1           # training and validation loss of runs, from their log.csv
    python plot.py --what=loss --x=seconds
    python plot.py --what=gradients --json=gradients.json    # what verify_gradients.py wrote with --json
    python plot.py --what=kv --json=kv.json                  # what bench_kv.py wrote with --json
    python plot.py --what=train --json=train.json            # what bench_train.py wrote; several files separated by commas
"""
import csv
import json as json_format
import math
import sys
from pathlib import Path

import torch

from checkpoint import load_model, load_pretrained

what = "attention"           # attention, loss, gradients, kv or train
file: str | None = None      # the picture, .png or .svg; None: <what>.png
out_dir = "out"              # the run; for loss also several, separated by commas
init_from = "resume"         # attention: resume for the run in out_dir, else GPT-2 weights as in sample.py
start = "ROMEO:\nWhat light" # attention: the text that the model reads
layer: int | None = None     # attention: one layer only, from 0
head: int | None = None      # attention: one head only, from 0
x = "steps"                  # loss: against steps or seconds
json: str | None = None      # gradients, kv, train: the file with the figures
exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))

try:
    import matplotlib
except ImportError:
    sys.exit("error: the pictures need matplotlib: pip install matplotlib")
matplotlib.use("Agg")  # no window: a file
import matplotlib.pyplot as plt


def visible(token):
    """A token as a label: white space becomes a sign."""
    return token.replace("\n", "\\n").replace(" ", "\u00b7") or "?"


def draw_head(ax, weights, tokens, labels):
    """One heat map: row t shows where position t looks; what the mask hides stays grey."""
    hidden = torch.ones_like(weights).triu(1).bool()
    image = ax.imshow(weights.masked_fill(hidden, math.nan), cmap="viridis", vmin=0, vmax=1)
    ax.set_facecolor("lightgrey")
    ticks = range(len(tokens)) if labels else []
    ax.set_xticks(ticks, tokens if labels else [], rotation=90 if max(map(len, tokens)) > 2 else 0)
    ax.set_yticks(ticks, tokens if labels else [])
    ax.tick_params(length=0)
    return image


def plot_attention():
    """The attention weights of every layer and head for `start`, or of one."""
    model, tok = load_model(out_dir)[:2] if init_from == "resume" else load_pretrained(init_from)
    if tok is None:
        raise ValueError(f"{init_from} has no tokenizer that is known here (GPT-2's)")
    ids = tok.encode(start)
    if not 0 < len(ids) <= model.config.block_size:
        raise ValueError(f"--start has {len(ids)} tokens; the model reads from 1 to {model.config.block_size}")
    for name, value, n in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if value is not None and not 0 <= value < n:
            raise ValueError(f"{name} must be from 0 to {n - 1}, got {value}")
    maps = model.attention_maps(torch.tensor([ids]))[:, 0]  # (L, nh, T, T)
    tokens = [visible(tok.decode([i])) for i in ids]
    layers = range(len(maps)) if layer is None else [layer]
    heads = range(maps.size(1)) if head is None else [head]
    cell = 7 if len(layers) * len(heads) == 1 else max(2.2, 0.16 * len(ids))
    fig, axes = plt.subplots(len(layers), len(heads), squeeze=False, layout="constrained",
                             figsize=(cell * len(heads) + 1.2, cell * len(layers) + 0.9))
    for i, row in zip(layers, axes):
        for j, ax in zip(heads, row):
            image = draw_head(ax, maps[i, j], tokens, labels=len(ids) <= 40)
            ax.set_title(f"layer {i}, head {j}", fontsize="medium")
    fig.supylabel("the position that looks")
    fig.supxlabel("the position looked at (grey: hidden by the causal mask)")
    fig.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    return fig


def plot_loss():
    """Training and validation loss of one run or several."""
    if x not in ("steps", "seconds"):
        raise ValueError(f"x must be steps or seconds, got {x!r}")
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    column = {"steps": "iter", "seconds": "seconds"}[x]
    for n, folder in enumerate(out_dir.split(",")):
        path = Path(folder, "log.csv")
        if not path.is_file():
            raise ValueError(f"no {path}: train.py writes it")
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        color = f"C{n}"
        ax.plot([float(r[column]) for r in rows], [float(r["loss"]) for r in rows], color=color, alpha=0.25, lw=1,
                label=f"{folder}: each batch")
        for kind, style in (("train", "--"), ("val", "-")):
            points = [(float(r[column]), float(r[f"{kind}_loss"])) for r in rows if r[f"{kind}_loss"]]
            if points:
                name = "training" if kind == "train" else "validation"
                ax.plot(*zip(*points), style, color=color, marker="o" if kind == "val" else "x",
                        label=f"{folder}: {name}, at the end {points[-1][1]:.3f}")
    ax.set_xlabel("steps" if x == "steps" else "seconds of training")
    ax.set_ylabel("loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def read_json():
    """The records in the files --json."""
    if json is None:
        raise ValueError(f"--what={what} needs the file with the figures: --json=FILE")
    records = []
    for name in json.split(","):
        try:
            records += json_format.loads(Path(name).read_text())
        except ValueError as e:
            raise ValueError(f"{name} is not JSON: {e}") from None
    return records


def plot_gradients():
    """The gradient's norm by block, for each way to build the model, at the start and trained."""
    records = read_json()
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for ax, when in zip(axes, ("at start", "trained")):
        for n, name in enumerate(dict.fromkeys(r["blocks"] for r in records)):
            for n_layer, style in zip(sorted({r["n_layer"] for r in records}), (":", "--", "-")):
                norms = [r["block"] for r in records if (r["blocks"], r["n_layer"], r["when"]) == (name, n_layer, when)]
                ax.semilogy([i / (n_layer - 1) for i in range(n_layer)], norms, style, color=f"C{n}", label=f"{name}, {n_layer} layers")
        ax.set_title(when)
        ax.set_xlabel("depth of the block (0: first, 1: last)")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("norm of the gradient of a block's parameters")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def plot_kv():
    """Decoding speed of every variant in the file, for each model, from a prompt of 64 at batch 1."""
    records = [r for r in read_json() if r["batch"] == 1 and r["prompt"] == 64]
    names = list(dict.fromkeys(r["model"] for r in records))
    if not names:
        raise ValueError(f"{json} has no measurement at batch 1 from a prompt of 64")
    fig, axes = plt.subplots(len(names), 1, figsize=(8, 0.5 + 0.45 * len(records)), squeeze=False, layout="constrained")
    for ax, name in zip(axes[:, 0], names):
        own = sorted((r for r in records if r["model"] == name), key=lambda r: r["tokens_per_second"])
        labels = [r["peer"] or ("compiled " if r["compile"] else "eager ") + r["dtype"] + ("" if r["use_cache"] else ", no cache")
                  for r in own]
        colors = ["C1" if r["peer"] else "C0" if r["use_cache"] else "grey" for r in own]
        ax.bar_label(ax.barh(labels, [r["tokens_per_second"] for r in own], color=colors), fmt=" %.0f")
        ax.set_title(name)
        ax.set_xlabel("tokens a second (batch 1, after a prompt of 64)")
        ax.margins(x=0.1)
    return fig


def plot_train():
    """The parts of a training step, a bar for each record."""
    records = read_json()
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.6 * len(records)), layout="constrained")
    labels = [f"{' '.join(r['arguments']) or 'default settings'}\n{r['dtype']} on {r['device']}" for r in records]
    left = [0.0] * len(records)
    for part in records[0]["parts"]:
        widths = [r["parts"][part] * 1e3 for r in records]
        ax.barh(labels, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths)]
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds a step")
    ax.legend()
    return fig


try:
    plots = {"attention": plot_attention, "loss": plot_loss, "gradients": plot_gradients, "kv": plot_kv,
             "train": plot_train}
    if what not in plots:
        raise ValueError(f"what must be one of {', '.join(plots)}, got {what!r}")
    path = Path(file or f"{what}.png")
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"the picture's name must end in .png or .svg, got {str(path)!r}")
    figure = plots[what]()
    figure.savefig(path.with_name(path.stem + ".tmp" + path.suffix), dpi=120)
    path.with_name(path.stem + ".tmp" + path.suffix).replace(path)
    print(f"wrote {path}")
except (ValueError, RuntimeError, OSError) as e:
    sys.exit(f"error: {e}")
