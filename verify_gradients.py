"""Follows the gradient through every block, and checks autograd against finite differences.

    python verify_gradients.py                          # tables; exit code 1 if a check fails
    python verify_gradients.py --json=gradients.json    # also the figures, for plot.py --what=gradients

The same parts can be put together in three ways: Pre-LN with residuals, as model.py does it, Post-LN, and without
residuals. This script compares the three at several depths, at the start and after a short training. Only Pre-LN has
to pass. The other two show what goes wrong without it.
"""
import os

json: str | None = None    # a file for the figures: a list of records, one for each block
depths = "6,12,24"         # numbers of blocks, separated by commas
steps = 50                 # training steps between the two looks at the gradient
seed = 1337                # of the weights

if __name__ == "__main__":  # settings are read before the heavy imports, so that --help and a typo answer at once
    exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import json as json_format
import math
import sys
from pathlib import Path

from files import UserError, check_can_write, write_atomically


def read_settings():
    """The depths as numbers. UserError for a setting out of range."""
    if json:
        check_can_write(json)
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    try:
        numbers = list(dict.fromkeys(int(depth) for depth in depths.split(",")))
    except ValueError:
        numbers = [0]
    if min(numbers) < 2 or max(numbers) > 1000:
        raise UserError(f"depths must be numbers from 2 to 1000, separated by commas, got {depths!r}")
    return numbers


read_settings()

import torch

from model import GPT, Block, GPTConfig

TEXT = torch.tensor(list(Path(__file__).resolve().parent.joinpath("model.py").read_bytes()))  # bytes to learn from


# --- three ways to build a model from the same parts ---

class PostLN(Block):
    """The block of 2017: each addition is followed by a norm of the stream itself."""

    def forward(self, x, positions=None, cache=None, layer=0):
        x = self.ln_1(x + self.attn(x, positions, cache, layer))
        return self.ln_2(x + self.mlp(x))


class NoResiduals(Block):
    """Each layer replaces the stream and adds nothing to it."""

    def forward(self, x, positions=None, cache=None, layer=0):
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), positions, cache, layer)))


def build(block, n_layer):
    """A GPT whose blocks are of the class `block`. The seed gives all three classes the same weights."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=n_layer, n_head=4, n_embd=64))
    for layer in model.h:
        layer.__class__ = block
    return model


def batch(step):
    """Inputs and targets (8, 64)."""
    g = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - 65, (8, 1), generator=g)
    tokens = TEXT[starts + torch.arange(65)]
    return tokens[:, :-1], tokens[:, 1:]


# --- 1. the gradient in every block ---

def gradient_norms(model):
    """One backward pass -> the loss, and for each block the norms of four gradients: of the attention's parameters, of
    the MLP's, of both together, and of the residual stream that enters the block."""
    streams = []

    def keep(block, inputs):
        inputs[0].retain_grad()
        streams.append(inputs[0])

    hooks = [block.register_forward_pre_hook(keep) for block in model.h]
    model.zero_grad()
    loss = model(*batch(10 ** 6))[1]
    loss.backward()
    for hook in hooks:
        hook.remove()

    def norm(tensors):
        return math.sqrt(sum(t.double().square().sum().item() for t in tensors if t is not None))

    blocks = []
    for block, stream in zip(model.h, streams, strict=True):
        attention, mlp = ([p.grad for p in part.parameters()] for part in (block.attn, block.mlp))
        blocks.append({"attention": norm(attention), "mlp": norm(mlp), "block": norm(attention + mlp),
                       "stream": norm([stream.grad])})
    return loss.item(), blocks


def train(model):
    """A short training with AdamW."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        adamw.zero_grad()  # gradient_norms leaves some, too
        model(*batch(step))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()


def look(name, n_layer, when, model, records):
    """Prints a line on the model's blocks. Returns the largest norm of a block over the smallest, and whether every
    norm is finite and above zero."""
    loss, blocks = gradient_norms(model)
    for i, norms in enumerate(blocks):
        records.append({"blocks": name, "n_layer": n_layer, "when": when, "layer": i, "loss": loss} | norms)
    norms = [b["block"] for b in blocks]
    ratio = max(norms) / min(norms) if min(norms) > 0 else math.inf
    shown = [blocks[0], blocks[n_layer // 2], blocks[-1]]
    columns = "".join(f"{b['attention']:8.1e}{b['mlp']:8.1e}{b['stream']:8.1e} |" for b in shown)
    print(f"{name:<13}{n_layer:>4} {when:<9}{loss:5.3f} |{columns}{ratio:8.2g}", flush=True)
    return ratio, all(math.isfinite(n) and n > 0 for b in blocks for n in b.values())


def check_flow():
    """Prints the table of gradient norms. Returns its records, and whether Pre-LN passes. If model.py was changed and
    its block lacks a part of GPT-2's, the other two ways make no sense. Then there is no table: ([], None)."""
    print("1. Norms of the gradient in the first, the middle and the last block: of the attention's parameters, of\n"
          "   the MLP's, and of the residual stream that enters the block. The last column divides the largest norm\n"
          "   of a block's parameters by the smallest. For Pre-LN at the start it must be under 10.\n")
    if missing := {"ln_1", "attn", "ln_2", "mlp"} - dict(build(Block, 1).h[0].named_children()).keys():
        print(f"   left out, because model.py's blocks have no {' and no '.join(sorted(missing))}")
        return [], None
    print(" " * 33 + "|" + "".join(f"{where:^26}|" for where in ("first block", "middle block", "last block")))
    print(f"{'blocks':<12}depth {'when':<10}loss |" + f"{'attn':>8}{'mlp':>8}{'stream':>8} |" * 3 + " max/min")
    records, good = [], True
    for name, block in (("Pre-LN", Block), ("Post-LN", PostLN), ("no residuals", NoResiduals)):
        for n_layer in read_settings():
            model = build(block, n_layer)
            ratio, alive = look(name, n_layer, "at start", model, records)
            good &= block is not Block or (ratio < 10 and alive)
            train(model)
            look(name, n_layer, "trained", model, records)
    unigram_loss = torch.special.entr(TEXT.bincount() / len(TEXT)).sum()
    print("\n   With the default settings, the table shows:\n"
          "   Pre-LN: at the start, the gradient of the stream is about equally strong in all blocks, at any depth.\n"
          "   After training the first block has the largest gradient, but all blocks learn.\n"
          "   Post-LN: each norm divides the gradient that passes back through it by the spread of the stream. At\n"
          "   the start, this changes only the first block. Embeddings are small, with a spread of 0.03, so the first\n"
          "   norm makes the gradients before it about 35 times as large. After training, the spread is above 1 at\n"
          "   nearly every norm, so the gradient shrinks from block to block on its way to the first.\n"
          "   No residuals: at the start the norms keep the gradients up. But no path leads around a layer, and in\n"
          "   training the gradients vanish on their way to the first block.\n"
          f"   {steps} steps teach little more than how often each byte occurs, which gives a loss of "
          f"{unigram_loss:.2f}. Compare the\n   gradients, not the losses.")
    return records, good


# --- 2. autograd against finite differences ---

def slope_errors(model):
    """Yields (name, autograd, difference, relative error) for each parameter tensor of a float64 model. Along its own
    gradient g, the slope of the loss must be |g|. A central difference measures the slope."""
    x, y = (z[:4, :model.config.block_size] for z in batch(0))
    model.zero_grad()
    model(x, y)[1].backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        slope = p.grad.norm().item() if p.grad is not None else 0.0
        step = 1e-5 * p.grad / slope if slope else torch.zeros_like(p)
        with torch.no_grad():
            p += step
            above = model(x, y)[1].item()
            p -= 2 * step
            below = model(x, y)[1].item()
            p += step
        difference = (above - below) / 2e-5
        yield name, slope, difference, abs(difference - slope) / slope if slope else math.inf


def check_differences():
    """Prints a line for each parameter tensor. Returns whether all errors are under 1e-6, in model.py and with the
    layers that fast.py puts in for training."""
    print("\n2. The slope of the loss along each parameter tensor's own gradient, by autograd and by central\n"
          "   differences (float64, step 1e-5). The relative error must be under 1e-6.\n")
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)).double()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1  # away from zero biases and unit gains
    good = True
    print(f"{'parameter':<26}{'autograd':>12}{'difference':>12}{'relative error':>16}")
    for name, slope, difference, error in slope_errors(model):
        good &= error < 1e-6
        print(f"{name:<26}{slope:12.6f}{difference:12.6f}{error:16.1e}{'' if error < 1e-6 else '  FAIL'}")
    try:
        from fast import for_training
    except ModuleNotFoundError as e:  # model.py needs no fast.py, so neither does this check
        if e.name != "fast":
            raise
        return good
    worst = max(error for *_, error in slope_errors(for_training(model)))
    print(f"{'all, with fast.py':<50}{worst:16.1e}{'' if worst < 1e-6 else '  FAIL'}")
    return good and worst < 1e-6


def main():
    """Prints both parts and writes the figures. Returns the exit code."""
    records, flow_is_good = check_flow()
    differences_agree = check_differences()
    words = {True: "ok", False: "FAIL", None: "not measured"}
    print(f"\ngradient flow: {words[flow_is_good]}; finite differences: {words[differences_agree]}")
    if json and records:
        write_atomically(json, json_format.dumps(records, indent=1).encode())
    return 1 if flow_is_good is False or not differences_agree else 0


if __name__ == "__main__":
    sys.exit(main())
