"""Shows attention on three letters, compares ours with torch.nn.MultiheadAttention, and checks its properties.

    python verify_mha.py              # exit code 1 if a check fails
    python verify_mha.py --verbose    # every case, not only the worst of each kind

Two implementations are checked. model.py writes attention out, step by step. fast.py's FusedAttention calls PyTorch's
fused kernel. nn.MultiheadAttention shares no code with the first. It gets the same weights: its in_proj is our c_attn,
its out_proj our c_proj.
"""
import os

verbose = False    # print every case instead of the worst of each kind
seed = 1337        # of the random inputs and weights

if __name__ == "__main__":  # settings are read before the heavy imports, so that --help and a typo answer at once
    exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import math
import sys
from collections import namedtuple

import torch
import torch.nn as nn

from model import CausalSelfAttention, GPTConfig, KVCache, attention, causal_mask

PATHS = {"written out": CausalSelfAttention}
try:
    from fast import FusedAttention
    PATHS["fused"] = FusedAttention
except ModuleNotFoundError as error:  # model.py needs no fast.py, so neither does this check
    if error.name != "fast":
        raise

SHAPES = [(B, T, n_head, n_embd) for B in (1, 3) for T in (1, 2, 7, 64)  # 64 is the block_size
          for n_head, n_embd in ((1, 32), (4, 32), (8, 8), (5, 40))]      # heads of size 32, 8, 1 and 8
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
Check = namedtuple("Check", "ok dtype what error allowed case")  # one line of a table


# --- 1. one head, with numbers to check by hand ---

def example():
    """Prints each step of attention for the letters R, O and M."""
    letters, hs = "ROM", 2
    q = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    positions = torch.arange(3)
    scores, mask = q @ k.T / math.sqrt(hs), causal_mask(positions, 3, torch.float32)
    y, weights = (z[0, 0] for z in attention(*(z.view(1, 1, 3, hs) for z in (q, k, v)), positions))

    def table(heading, *columns):
        print(f"\n            {heading}")
        for i, letter in enumerate(letters):
            print(f"     {letter}  " + "     ".join("".join(f"{x + 0.0:7.2f}" for x in c[i].tolist()) for c in columns))

    print("\n1. One head of attention, by hand.\n\n"
          "   The model has read three letters: R, O and M. The head has size 2, so each letter has a query, a key\n"
          "   and a value of two numbers.")
    table("query q            key k            value v", q, k, v)
    print("\n   A key says what a letter offers: here, the first number stands for consonant, the second for vowel.\n"
          "   A query says what a letter looks for: here, R and M look for a vowel, and O looks for a consonant.\n"
          "   A value is what a letter passes on. In a model, c_attn computes all three, and training sets its\n"
          "   weights.\n\n"
          "   Step 1, scores: the dot product of a query and a key, divided by sqrt(2) = 1.41. Each row is a query,\n"
          "   each column a key. M looks for a vowel, and O is one: (0 * 0 + 2 * 1) / 1.41 = 1.41.")
    table("  R      O      M", scores)
    print("\n   Step 2, mask: a letter must not see the letters after it, so -inf is added to their scores. O looks\n"
          "   for a consonant, and M is one, but M comes after O.")
    table("  R      O      M", mask)
    print("\n   Step 3, weights: the softmax turns each row of scores + mask into weights that sum to 1. It raises e\n"
          "   to each number and divides by the sum of the row. The row of M gives e^0 = 1, e^1.41 = 4.11 and\n"
          "   e^0 = 1, which sum to 6.11. So O gets 4.11 / 6.11 = 0.67. Hidden letters get exactly 0: e^-inf = 0.")
    table("  R      O      M", weights)
    print("\n   Step 4, output: the average of the values by these weights. For M it is\n"
          "   0.16 * (1, 0) + 0.67 * (0, 1) + 0.16 * (-1, 0) = (0, 0.67): M has found the vowel.")
    table("output", y)


# --- 2. the same numbers as nn.MultiheadAttention ---

SAME = {"in_proj_weight": "c_attn.weight", "in_proj_bias": "c_attn.bias",
        "out_proj.weight": "c_proj.weight", "out_proj.bias": "c_proj.bias"}


def run(layer, x, upstream):
    """An attention layer -> {what: tensor}: its output, its weights (the fused kernel has none), and the gradients of
    the input and of the layer's parameters for the upstream gradient; then the output where no gradient is needed."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    weights = None
    if isinstance(layer, nn.MultiheadAttention):
        mask = causal_mask(torch.arange(x.size(1)), x.size(1), x.dtype)
        y, weights = layer(x, x, x, attn_mask=mask, average_attn_weights=False)
        inference = y
    else:
        with torch.no_grad():
            inference = layer(x)
        if type(layer) is CausalSelfAttention:
            def attend(q, k, v, positions):  # also keeps the weights
                nonlocal weights
                weights = attention(q, k, v, positions)[1]
                return type(layer).attend(layer, q, k, v, positions)
            layer.attend = attend
        y = layer(x)
    y.backward(upstream)
    results = {"output": y, "weights": weights, "gradient of x": x.grad}
    for name, p in layer.named_parameters():
        results["gradient of " + SAME.get(name, name)] = p.grad
    results["output without gradients"] = inference
    return {what: t.detach().double() for what, t in results.items() if t is not None}


def compare(B, T, n_head, n_embd, bias, dtype):
    """Yields (path, what, error, allowed) for one case."""
    theirs = nn.MultiheadAttention(n_embd, n_head, bias=bias, batch_first=True)
    for p in theirs.parameters():
        nn.init.normal_(p, std=n_embd ** -0.5)
    weights = {SAME[name]: p for name, p in theirs.state_dict().items()}
    x, upstream = torch.randn(2, B, T, n_embd)
    theirs, x, upstream = (z.to(dtype) for z in (theirs, x, upstream))
    reference = run(theirs, x, upstream)
    if dtype == torch.bfloat16:  # two roundings may differ by both errors, so each is measured against float64
        exact = run(theirs.double(), x.double(), upstream.double())
    for path, cls in PATHS.items():
        ours = cls(GPTConfig(block_size=64, n_head=n_head, n_embd=n_embd, bias=bias))
        ours.load_state_dict(weights)
        for what, t in run(ours.to(dtype), x, upstream).items():
            if dtype == torch.bfloat16:
                unit = torch.finfo(dtype).eps * max(1, exact[what].abs().max().item())
                error = (t - exact[what]).abs().max().item()
                yield path, what, error, 2 * (reference[what] - exact[what]).abs().max().item() + unit
            else:
                allowed = RELATIVE[dtype] * max(1, reference[what].abs().max().item())
                if what.startswith("output"):
                    allowed = min(allowed, 1e-4)
                yield path, what, (t - reference[what]).abs().max().item(), allowed


def check_against_torch(shapes=SHAPES):
    """Yields a Check for each dtype, path and quantity: the case nearest to what is allowed, or farthest beyond."""
    worst = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in shapes:
            for bias in (True, False):
                case = "B={} T={} heads={} n_embd={}".format(*shape) + (" biases" if bias else "")
                for path, what, error, allowed in compare(*shape, bias, dtype):
                    ok = error <= allowed  # also False for NaN
                    check = Check(ok, str(dtype).removeprefix("torch."), f"{what}, {path}", error, allowed, case)
                    if verbose:
                        yield check
                    else:
                        rank = not ok, math.inf if math.isnan(error) else error / allowed
                        worst[check[1:3]] = max(worst.get(check[1:3], (rank, check)), (rank, check))
    yield from (check for _, check in worst.values())


# --- 3. properties that hold for any weights ---

def check_properties():
    """Yields a Check for each property. Its `case` says which mistakes it catches."""
    dtype, (B, T, nh, hs) = torch.float64, (2, 16, 4, 8)
    config = GPTConfig(block_size=T, n_layer=1, n_head=nh, n_embd=nh * hs)
    layers = {path: cls(config).to(dtype) for path, cls in PATHS.items()}
    for layer in layers.values():
        layer.load_state_dict(layers["written out"].state_dict())
    x = torch.randn(B, T, nh * hs, dtype=dtype)

    def check(what, error, allowed, catches):
        return Check(error <= allowed, "float64", what, error, allowed, catches)

    for path, layer in layers.items():
        base, leaks = layer(x), []
        for t in range(1, T):
            later = x.clone()
            later[:, t:] += torch.randn_like(later[:, t:])
            leaks.append((layer(later) - base)[:, :t].abs().max())
        yield check(f"later inputs change nothing, {path}", torch.stack(leaks).max().item(), 0.0,
                    "no mask, or a shifted one")
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x)[0].sum(-1), x[:1])[:, 0].abs().sum(-1)
        seen = torch.ones(T, T).tril().bool()
        leak = math.inf if (jacobian[seen] == 0).any() else jacobian[~seen].max().item()
        yield check(f"no gradient from later inputs, {path}", leak, 0.0, "a mask after the softmax, or no mask")
        cache, pieces = KVCache(config, B, dtype=dtype), []
        for piece in x.split((5, 10, 1), dim=1):
            pieces.append(layer(piece, cache.positions(piece.size(1)), cache))
            cache.length += piece.size(1)
        yield check(f"in three pieces, with a cache, {path}", (torch.cat(pieces, 1) - base).abs().max().item(), 1e-12,
                    "a mask that ignores the cached keys")

    q, k, v = (torch.randn(B, nh, T, hs, dtype=dtype) for _ in range(3))
    weights = attention(q, k, v, torch.arange(T))[1]
    yield check("each row of weights sums to 1", (weights.sum(-1) - 1).abs().max().item(), 1e-12,
                "a mask after the softmax, a wrong dim")

    newest = torch.tensor([31])
    for width in (1, 4, 64, 256):
        n = max(400, 4000 // width)  # small heads need more samples
        q, k = torch.randn(n, 1, 1, width, dtype=dtype), torch.randn(n, 1, 32, width, dtype=dtype)
        y, weights = attention(q, k, k, newest)
        # The logarithm of a weight is its score minus a constant of its row, so the variance of scores can be read off.
        yield check(f"variance of scores, head size {width}", abs(weights.log().var(-1).mean().item() - 1), 0.15,
                    "no scale, or n_embd or hs for sqrt(hs)")
        if "fused" in PATHS:
            fused = FusedAttention(GPTConfig(n_head=1, n_embd=width)).attend(q, k, k, newest)
            yield check(f"fused against written out, head size {width}", (fused - y).abs().max().item(), 1e-12,
                        "two different scales")

    layouts = {"time first": x.transpose(0, 1).contiguous().transpose(0, 1),
               "in a wider tensor": torch.cat((x, x), -1)[..., :nh * hs],
               "with gaps in time": torch.stack((x, x), 2).flatten(1, 2)[:, ::2]}
    for path, layer in layers.items():
        base = layer(x)
        for name, other in layouts.items():
            error = math.inf if other.is_contiguous() else (layer(other) - base).abs().max().item()
            yield check(f"input stored {name}, {path}", error, 1e-14, "view where a copy is needed")


def print_table(heading, checks):
    """Prints a line for each check. Returns how many fail. An exception is a failure, too: a changed attention may have
    other parameters."""
    print(f"\n      {'dtype':<10}{'what':<48}{'error':<9}{'allowed':<9}{heading}")
    failures = 0
    try:
        for ok, dtype, what, error, allowed, case in checks:
            print(f"{'ok  ' if ok else 'FAIL'}  {dtype:<10}{what:<48}{error:<9.2g}{allowed:<9.2g}{case}")
            failures += not ok
    except Exception as e:
        print(f"FAIL  the rest cannot be compared: {' '.join(str(e).split()):.200}")
        failures += 1
    return failures


def main():
    """Prints all parts. Returns the exit code."""
    torch.manual_seed(seed)
    example()
    print("\n2. Against nn.MultiheadAttention with the same weights: outputs, attention weights and gradients in "
          f"{2 * len(SHAPES)} cases.\n   This catches Q, K and V in another order, heads split or joined wrongly, "
          "a wrong scale or mask, a bias left out.")
    if not verbose:
        print("   Each line shows the case nearest to what is allowed.")
    if "fused" not in PATHS:
        print("   fast.py is not here, so only the attention of model.py is checked.")
    failures = print_table("case", check_against_torch())
    print("\n3. Properties that hold for any weights.")
    failures += print_table("catches", check_properties())
    print(f"\n{failures} checks failed" if failures else "\nall checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
