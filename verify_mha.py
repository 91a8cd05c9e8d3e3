"""Compares our attention with torch.nn.MultiheadAttention, which shares no code with it, and checks its properties.

    python verify_mha.py            # a table; exit code 1 if any line fails
    python verify_mha.py --verbose  # every case, not only the worst of each kind

Both of our paths are compared: `attention`, written out, and `fast_attention`, PyTorch's fused kernel. Weights are shared:
MultiheadAttention's in_proj is our c_attn, its out_proj our c_proj.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

from model import CausalSelfAttention, GPTConfig, attention, causal_mask, fast_attention

verbose = False  # print every case instead of the worst of each kind
seed = 1337    # of the random inputs and weights
exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))

SHAPES = [(B, T, n_head, n_embd) for B in (1, 3) for T in (1, 2, 7, 64)  # 64 is the block_size
          for n_head, n_embd in ((1, 32), (4, 32), (8, 8), (5, 40))]      # heads of 32, 8, 1 and 8
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
failures = 0


def report(ok, dtype, what, difference, tolerance, case):
    """Prints one line of the table."""
    global failures
    failures += not ok
    print(f"{'ok  ' if ok else 'FAIL'}  {dtype:<9}{what:<42}{difference:<12.2g}{tolerance:<12.2g}{case}")


# --- 1. the same numbers as nn.MultiheadAttention ---

def run(layer, x, upstream):
    """An attention layer -> {what: tensor}: output, weights where it returns them, and the gradients of the input and
    of the layer's parameters for the upstream gradient."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    if isinstance(layer, nn.MultiheadAttention):
        y, weights = layer(x, x, x, attn_mask=causal_mask(x.size(1), x.size(1), x), average_attn_weights=False)
    elif layer.written_out:
        y, weights = layer(x, return_weights=True)
    else:
        y, weights = layer(x), None
    y.backward(upstream)
    results = {"output": y, "weights": weights, "gradient of x": x.grad}
    for name, p in layer.named_parameters():
        results["gradient of " + SAME.get(name, name)] = p.grad
    return {what: t.detach().double() for what, t in results.items() if t is not None}


SAME = {"in_proj_weight": "c_attn.weight", "in_proj_bias": "c_attn.bias",
        "out_proj.weight": "c_proj.weight", "out_proj.bias": "c_proj.bias"}


def compare(B, T, n_head, n_embd, bias, dtype):
    """Yields (path, what, difference, tolerance) for one case."""
    ours = CausalSelfAttention(GPTConfig(block_size=64, n_head=n_head, n_embd=n_embd, bias=bias))
    theirs = nn.MultiheadAttention(n_embd, n_head, bias=bias, batch_first=True)
    for p in ours.parameters():
        nn.init.normal_(p, std=n_embd ** -0.5)
    theirs.load_state_dict({name: ours.state_dict()[same] for name, same in SAME.items() if same in ours.state_dict()})
    x, upstream = torch.randn(2, B, T, n_embd)
    ours, theirs, x, upstream = (z.to(dtype) for z in (ours, theirs, x, upstream))
    reference = run(theirs, x, upstream)
    if dtype == torch.bfloat16:  # two roundings may differ by both errors, so each is measured against float64
        exact = run(theirs.double(), x.double(), upstream.double())
    for path in ("written out", "fast"):
        ours.written_out = path == "written out"
        for what, t in run(ours, x, upstream).items():
            if dtype == torch.bfloat16:
                unit = torch.finfo(dtype).eps * max(1, exact[what].abs().max().item())
                error = (t - exact[what]).abs().max().item()
                yield path, what, error, 2 * (reference[what] - exact[what]).abs().max().item() + unit
            else:
                tolerance = RELATIVE[dtype] * max(1, reference[what].abs().max().item())
                if what == "output":
                    tolerance = min(tolerance, 1e-4)
                yield path, what, (t - reference[what]).abs().max().item(), tolerance


def check_against_torch():
    """All cases; prints the one nearest to its tolerance, or beyond it, for each dtype, path and quantity."""
    worst = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for bias in (True, False):
                case = "B={} T={} heads={} n_embd={}".format(*shape) + (" biases" if bias else "")
                for path, what, difference, tolerance in compare(*shape, bias, dtype):
                    key = str(dtype).removeprefix("torch."), f"{what}, {path}"
                    line = not difference <= tolerance, difference / tolerance, difference, tolerance, case  # NaN fails
                    if verbose:
                        report(not line[0], *key, *line[2:])
                    elif key not in worst or line[:2] > worst[key][:2]:
                        worst[key] = line
    for key, (failed, _, *rest) in worst.items():
        report(not failed, *key, *rest)


# --- 2. properties that hold for any weights ---

def check_properties():
    """Each with the bug that it would catch."""
    dtype, (B, T, nh, hs) = torch.float64, (2, 16, 4, 8)
    layer = CausalSelfAttention(GPTConfig(block_size=T, n_head=nh, n_embd=nh * hs)).to(dtype)
    x = torch.randn(B, T, nh * hs, dtype=dtype)

    for path, call in (("written out", lambda x: layer(x, return_weights=True)[0]), ("fast", layer)):
        base, leak = call(x), 0.0
        for t in range(1, T):
            later = x.clone()
            later[:, t:] += torch.randn_like(later[:, t:])
            leak = max(leak, (call(later) - base)[:, :t].abs().max().item())
        report(leak == 0, "float64", f"later inputs change nothing, {path}", leak, 0.0,
               "catches: no mask, or one shifted by a position")
        jacobian = torch.autograd.functional.jacobian(lambda x: call(x)[0].sum(-1), x[:1])[:, 0].abs().sum(-1)  # (T, T)
        leak = jacobian.triu(1).max().item()
        dead = (jacobian.tril() == 0).sum().item() - T * (T - 1) // 2
        report(leak == 0 and dead == 0, "float64", f"gradient's upper triangle, {path}", leak, 0.0,
               "catches: a mask applied after the softmax, heads and time transposed")

    q, k, v = (torch.randn(B, nh, T, hs, dtype=dtype) for _ in range(3))
    weights = attention(q, k, v)[1]
    error = (weights.sum(-1) - 1).abs().max().item()
    report(error < 1e-12, "float64", "each row of weights sums to 1", error, 1e-12,
           "catches: a mask after the softmax, softmax over queries")

    for width in (1, 4, 64, 256):
        q, k = torch.randn(4000, 1, 1, width, dtype=dtype), torch.randn(4000, 1, 32, width, dtype=dtype)
        # The logarithm of the weights is the scores less a constant in each row, so their variance can be read off.
        variance = attention(q, k, k)[1].log().var(-1).mean().item()
        report(abs(variance - 1) < 0.15, "float64", f"variance of scores, head size {width}", abs(variance - 1), 0.15,
               "catches: no scale, scaling by n_embd or by hs instead of sqrt(hs)")
        fast, written = fast_attention(q, k, k), attention(q, k, k)[0]
        error = (fast - written).abs().max().item()
        report(error < 1e-12, "float64", f"fast path, head size {width}", error, 1e-12, "catches: two different scales")

    base = layer(x)
    layouts = {"time first": x.transpose(0, 1).contiguous().transpose(0, 1), "a slice of wider rows": torch.cat((x, x), -1)[..., :nh * hs],
               "every other position": torch.stack((x, x), 2).flatten(1, 2)[:, ::2]}
    for name, other in layouts.items():
        for path, call in (("written out", lambda x: layer(x, return_weights=True)[0]), ("fast", layer)):
            error = math.inf if other.is_contiguous() else (call(other) - base).abs().max().item()
            report(error < 1e-14, "float64", f"input laid out as {name}", error, 1e-14,
                   f"catches: view where a copy is needed ({path})")


torch.manual_seed(seed)
print("1. Against nn.MultiheadAttention with the same weights: outputs, attention weights and gradients. A line shows the\n"
      f"   case nearest its tolerance out of {2 * len(SHAPES)}. Catches: Q, K and V in another order, heads split wrongly,\n"
      "   a wrong scale or mask, heads put together in another order, a bias left out.\n")
print(f"      {'dtype':<9}{'what':<42}{'difference':<12}{'tolerance':<12}case")
check_against_torch()
print("\n2. Properties.\n")
check_properties()
print(f"\n{failures} checks failed" if failures else "\nall checks passed")
sys.exit(1 if failures else 0)
