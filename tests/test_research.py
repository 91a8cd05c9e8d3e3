"""Changes that a researcher would make in model.py, each in the obvious way, and nothing else is touched.

The changed model must then be used everywhere: in training, evaluation and generation, with the cache and without,
compiled, in other dtypes, and in the attention maps. Only an export may refuse, since the format is GPT-2's. What is
not allowed is to compute the old model in silence.

This file is also the script that checks a changed model.py in a process of its own: `check` is what it runs. There, the
plain changed model is the reference, in float64.
"""
import contextlib
import copy
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn as nn

BEFORE_CACHE = r"^( +)(if cache is not None:[^\n]*\n +k, v = cache\.append)"  # in CausalSelfAttention.forward

CHANGES = {  # name: [(a pattern in model.py, what takes its place, how often it occurs), ...]
    "ReLU^2 for GELU": [
        (r"self\.gelu = .*", "self.gelu = ReLUSquared()", 1),
        (r"^class MLP", """
class ReLUSquared(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


class MLP""", 1)],
    "a learned slope for each head, 0 at the start": [
        (r"^( +)(self\.n_head = config\.n_head)$", r"\1\2\n\1self.slope = nn.Parameter(torch.zeros(config.n_head))", 1),
        (r"self\.attn_dropout\)\[0\]", "self.attn_dropout, self.slope)[0]", 1),
        (r"^def attention\(q, k, v, positions, dropout=None", r"\g<0>, slope=torch.zeros(1)", 1),
        (r"scores \+ causal_mask\(.*\)", r"\g<0> + slope[:, None, None] * torch.arange(k.size(-2)).to(q)", 1)],
    "RMSNorm for LayerNorm": [(r"nn\.LayerNorm\([^()]*\)", "nn.RMSNorm(config.n_embd)", 3)],
    "a soft cap on the scores": [
        (r"^( +)(scores = .*math\.sqrt.*)$", r"\1\2\n\1scores = 2 * torch.tanh(scores / 2)", 1)],
    "a soft cap on the logits": [
        (r"^( +)(logits = self\.lm_head\(.*)$", r"\1\2\n\1logits = 3 * torch.tanh(logits / 3)", 1)],
    "a scale on the embeddings": [(r"self\.wte\(idx\)", "self.wte(idx) * 4", 1)],
    "rotary positions": [
        (r"^ +self\.wpe = .*\n", "", 1), (r" \+ self\.wpe\(positions\)", "", 1),
        (BEFORE_CACHE, r"\1q, k = rotate(q, positions), rotate(k, positions)\n\1\2", 1),
        (r"^class CausalSelfAttention", """
def rotate(x, positions):
    half = x.size(-1) // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class CausalSelfAttention""", 1)],
    "QK-norm": [
        (r"^( +)(self\.n_head = config\.n_head)$",
         r"\1\2\n\1self.q_norm, self.k_norm = (nn.RMSNorm(config.n_embd // config.n_head) for _ in range(2))", 1),
        (BEFORE_CACHE, r"\1q, k = self.q_norm(q), self.k_norm(k)\n\1\2", 1)],
    "queries and keys twice as wide, and the old scale": [
        (r"3 \* config\.n_embd, bias", "5 * config.n_embd, bias", 1),
        (r"\.split\(C, dim=2\)", ".split((2 * C, 2 * C, C), dim=2)", 1),
        (r"z\.view\(B, T, self\.n_head, C // self\.n_head\)", "z.view(B, T, self.n_head, -1)", 1),
        (r"math\.sqrt\(q\.size\(-1\)\)", "math.sqrt(8)", 1),  # n_embd / n_head
        (r"self\.k = \[torch\.zeros\(shape", "self.k = [torch.zeros((*shape[:3], 2 * shape[3])", 1)],
    # The last one computes the same in other words, and shows that only a difference keeps a model from being exported.
    "GELU by its formula": [
        (r"self\.gelu = .*", "self.gelu = WrittenGELU()", 1),
        (r"^class MLP", """
class WrittenGELU(nn.Module):
    def forward(self, x):
        return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))


class MLP""", 1)],
}
HARMLESS = "GELU by its formula"
STAYS_PLAIN = ("a soft cap on the scores", "a learned slope for each head, 0 at the start",  # fast.py says so
               "queries and keys twice as wide, and the old scale")
WITH_CPP = "rotary positions"  # torch.compile goes all the way to C++, which takes long, for this one alone


def edited(source, change):
    """model.py's text with a change."""
    for pattern, replacement, expected in CHANGES[change]:
        source, n = re.subn(pattern, replacement, source, flags=re.MULTILINE)
        assert n == expected, f"{change}: {pattern} occurs {n} times in model.py"
    return source


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_used_everywhere(project, change):
    path = project.folder / "model.py"
    shutil.copy(path, project.folder / "unedited.py")
    path.write_text(edited(path.read_text(encoding="utf-8"), change), encoding="utf-8")
    shutil.copy(__file__, project.folder / "research.py")
    done = project.finish("research.py", change)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "fast.py: CausalSelfAttention does not compute" in done.stderr
    assert said == (change in STAYS_PLAIN) and "Linear" not in done.stderr
    written = (project.folder / "exported").exists()
    assert written == (change == HARMLESS)
    if written:
        from transformers import GPT2LMHeadModel
        idx, logits = torch.load(project.folder / "logits.pt")
        theirs = GPT2LMHeadModel.from_pretrained(project.folder / "exported").double().eval()
        torch.testing.assert_close(theirs(idx).logits, logits, atol=1e-6, rtol=1e-6)


# --- what follows runs in a folder with the changed model.py ---

def assert_near(result, exact, plain=None, what=""):
    """`result` is `exact` (float64) rounded to float32; or with `plain`, the rounding of another dtype that the plain
    changed model makes, it is about as near."""
    size, error = max(1.0, exact.abs().max().item()), (result.double() - exact).abs().max().item()
    allowed = 2e-5 * size if plain is None else 2 * (plain.double() - exact).abs().max().item() + 0.01 * size
    assert error <= allowed, f"{what}: off by {error:.2g}, allowed are {allowed:.2g}"


def make_model(module):
    """A model with large weights, so that every part of it matters."""
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=16))
    for name, p in model.named_parameters():
        g = torch.Generator().manual_seed(sum(name.encode()))  # the same whatever other parameters there are
        gain = p.dim() == 1 and name.endswith("weight")
        nn.init.normal_(p, mean=1.0 if gain else 0.0, std=0.3, generator=g)
    return model.eval()


@torch.no_grad()
def logits_along(model, idx, sizes):
    """Logits (B, T, V) through a cache: a chunk by a full forward pass, a single token by decode_one_token."""
    cache, pieces = model.new_cache(idx.size(0), idx.size(1)), []
    for piece in idx.split(sizes, dim=1):
        if piece.size(1) == 1:
            pieces.append(model.decode_one_token(piece[:, 0], cache)[:, None])
        else:
            pieces.append(model(piece, cache=cache)[0])
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def assert_maps_explain_outputs(model, idx, tolerance):
    """The attention maps, applied to the values that each layer computes, give what the layer hands to c_proj."""
    values, outputs, hooks = [], [], []
    for block in model.h:
        hooks += [block.attn.c_attn.register_forward_hook(lambda _, x, out: values.append(out[..., -x[0].size(-1):])),
                  block.attn.c_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))]
    model(idx)
    for hook in hooks:
        hook.remove()
    maps = model.attention_maps(idx)
    assert maps.triu(1).abs().max() == 0
    for weights, v, y in zip(maps, values, outputs, strict=True):
        B, T, C = v.shape
        v = v.view(B, T, weights.size(1), -1).transpose(1, 2).double()
        expected = (weights.double() @ v).transpose(1, 2).reshape(B, T, C)
        assert (expected - y.double()).abs().max() <= tolerance * max(1.0, y.abs().max().item())


def gradients(model, x, y, bfloat16=False):
    """{name: gradient}, and the loss."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def exported_step(model, cache):
    """Instead of fast.library_step: runs the exported graph of the step without generating C++, which would take
    long."""
    import fast
    graph = fast.export_step(model, cache).module()
    return lambda model, token, cache: graph(token, cache.length, cache.k, cache.v)


def rounded_to_int8(model):
    """A copy whose linear layers have the weights that int8 can hold: multiples of a row's largest magnitude / 127."""
    model = copy.deepcopy(model)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        layer.weight = nn.Parameter((layer.weight / step).round() * step)
    return model


def check(change):
    """All ways to compute with the changed model."""
    import unedited

    import model as model_module
    import fast
    from checkpoint import save_pretrained
    from fast import for_inference, for_training
    from files import UserError

    model, old = make_model(model_module), make_model(unedited)
    x, y = torch.randint(23, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    sizes = (4, 1, 1, 3, 1, 1, 1)
    exact_model = copy.deepcopy(model).double()
    exact = exact_model(x)[0]
    change_shows = (old(x)[0] - exact).abs().max() > 0.1
    assert change_shows == (change != HARMLESS), "the change is too small to be seen, so this proves nothing"

    assert_near(model(x)[0], exact, what="plain")
    assert_near(logits_along(model, x, sizes), exact, what="plain, cached")
    assert_maps_explain_outputs(exact_model, x, 1e-12)

    # Training, and the evaluation in between.
    exact_gradients = gradients(exact_model, x, y)
    trained = for_training(copy.deepcopy(model).train())
    for bfloat16 in (False, True):
        plain = gradients(model, x, y, bfloat16)
        for name, gradient in gradients(trained, x, y, bfloat16).items():
            assert_near(gradient, exact_gradients[name], plain[name] if bfloat16 else None, f"training, {name}")
    trained.eval()
    with torch.no_grad():
        assert_near(trained(x)[0], exact, what="evaluation")
        assert_near(trained(x, y)[1], exact_gradients["loss"], what="validation loss")
    assert_near(logits_along(trained, x, sizes), exact, what="evaluation, cached")
    assert_maps_explain_outputs(trained, x, 1e-5)

    # Generation.
    for dtype, n in (("float32", 1), ("bfloat16", 3), ("int8", 1)):  # n: one sequence has its own compiled code
        reference, plain = exact_model, None
        if dtype == "int8":
            reference = rounded_to_int8(exact_model)
        elif dtype == "bfloat16":
            reference = copy.deepcopy(model).bfloat16()
            plain = reference(x)[0]
            reference = reference.double()
        for compile in (False, True):
            prepared = for_inference(copy.deepcopy(model), dtype, compile)
            what = f"{dtype}{', compiled' if compile else ''}"
            assert_near(prepared(x)[0], reference(x)[0], plain, what)
            to_cpp = change == WITH_CPP and dtype == "float32" and shutil.which("g++")
            with contextlib.nullcontext() if to_cpp else patch.object(fast, "library_step", exported_step):
                decoded = logits_along(prepared, x[:n], sizes)
            assert_near(decoded, reference(x)[0][:n], None if plain is None else plain[:n], f"{what}, cached")
            assert_maps_explain_outputs(prepared, x, 0.05 if dtype == "bfloat16" else 1e-5)

    # An export, or an error and no file.
    try:
        save_pretrained(trained, None, "exported")
        torch.save((x, exact), "logits.pt")
    except UserError as e:
        assert "model.py does not compute what GPT-2 does" in str(e) and not Path("exported").exists(), e


if __name__ == "__main__":
    check(sys.argv[1])
