import ast
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, attention


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16), **changes}))


# --- the file by itself ---

def test_model_is_plain_pytorch():
    source = Path(model_module.__file__).read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}
    # What makes it fast, and the conditions that come with that, stand in fast.py.
    machines = r"torch\.ops|mkldnn|oneDNN|is_compiling|int8|cuda|_dynamo|_inductor|scaled_dot_product"
    assert re.findall(machines, source, re.IGNORECASE) == []


ALONE = """
import sys, torch
from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
x = (torch.arange(17) + torch.arange(23)[:, None]) % 23  # each token is followed by the next number
adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(30):
    loss = model(x[:, :-1], x[:, 1:])[1]
    loss.backward()
    adamw.step()
    adamw.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 3, losses
texts = [model.generate(x[:, :3], 40, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
assert torch.equal(*texts)
assert (texts[0][:, 1:14] == (texts[0][:, :13] + 1) % 23).float().mean() > 0.9
assert not {"fast", "files", "optimizer", "checkpoint"} & sys.modules.keys()
print("fine")
"""


def test_model_alone_in_a_folder_trains_and_writes(project):
    for path in project.folder.glob("*.py"):
        if path.name != "model.py":
            path.unlink()
    (project.folder / "alone.py").write_text(ALONE)
    assert project.run("alone.py") == "fine\n"


# --- the config, the shapes, and the start ---

@pytest.mark.parametrize("change, words", [
    (dict(n_head=5), "n_embd .16. must be divisible by n_head .5."), (dict(n_layer=0), "n_layer must be a positive"),
    (dict(vocab_size=-1), "vocab_size"), (dict(block_size=2.5), "block_size"), (dict(dropout=1.0), "dropout"),
    (dict(dropout=-0.1), "dropout"), (dict(dropout=float("nan")), "dropout")])
def test_config_checks_itself(change, words):
    with pytest.raises(ValueError, match=words):
        small(**change)


def test_default_depth():
    assert GPTConfig().n_layer == 6


@pytest.mark.parametrize("shape", [(2, 0), (0,), (5,), (1, 25)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="T at least 1|block_size 24"):
        small()(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("vocab_size, n_embd", [(65, 128), (50257, 48), (1000, 384), (8000, 768)])
def test_loss_at_initialisation(vocab_size, n_embd):
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=n_embd))
    x, y = torch.randint(vocab_size, (2, 16, 64))
    # Tied N(0, 0.02) logits have variance n_embd * 0.02^2, which lifts log-sum-exp by half of it.
    assert abs(model(x, y)[1].item() - math.log(vocab_size) - n_embd * 0.02 ** 2 / 2) < 0.05


def test_weights_at_initialisation():
    model = small(n_layer=8, n_embd=64)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:  # projections that add to the stream start smaller
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_overfits_one_batch():
    model = small(n_embd=32)
    x, y = torch.randint(31, (2, 4, 24))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(x, y)[1]
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    assert loss.item() < 0.1


def test_no_logit_depends_on_a_later_token():
    model = small().double()
    x = torch.randint(31, (1, 24))
    base = model(x)[0]
    for t in (0, 7, 23):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 31
        differs = (model(changed)[0] != base).any(dim=-1)[0]
        assert not differs[:t].any() and differs[t]


def test_padding_is_ignored():
    model = small()
    x, y = torch.randint(31, (2, 3, 10))
    y[:, 6:] = -1
    logits, loss = model(x, y)
    expected = F.cross_entropy(logits[:, :6].reshape(-1, 31), y[:, :6].reshape(-1))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("dtype, expected", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_loss_is_taken_in_float32_at_least(dtype, expected):
    x, y = torch.randint(31, (2, 3, 10))
    assert small().to(dtype)(x, y)[1].dtype == expected


def test_head_is_tied_and_parameters_are_counted():
    model = small(bias=False)
    C, L = 16, 2
    assert model.lm_head.weight is model.wte.weight
    blocks = L * (12 * C * C + 2 * C) + C
    assert model.num_parameters(embeddings=False) == blocks
    assert model.num_parameters() == blocks + 31 * C + 24 * C
    assert model.flops_per_token(10) == 6 * (blocks + 31 * C) + 12 * L * C * 10


def test_gpt2_has_its_published_size():
    with torch.device("meta"):
        assert GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768)).num_parameters() == 124_439_808


def test_last_only():
    model, x = small(), torch.randint(31, (2, 9))
    torch.testing.assert_close(model(x, last_only=True)[0], model(x)[0][:, -1:])


# --- attention ---

@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 9), (4, 9)])
def test_attention_is_pytorchs(T, S):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (T, S, S))
    y, weights = attention(q, k, v, torch.arange(S - T, S))
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=seen), atol=1e-14, rtol=0)
    assert weights.shape == (2, 3, T, S) and (weights[:, :, ~seen] == 0).all() and (weights[:, :, seen] > 0).all()
    torch.testing.assert_close(weights @ v, y, atol=1e-14, rtol=0)


def test_positions_default_to_those_from_0_on():
    layer, x = small().h[0].attn, torch.randn(2, 9, 16)
    assert torch.equal(layer(x), layer(x, torch.arange(9)))


@pytest.mark.parametrize("named", [True, False])
def test_attention_continues_a_cache(named):
    config = GPTConfig(block_size=12, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    layer, x = CausalSelfAttention(config).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    whole, cache, pieces = layer(x), KVCache(config, 2, dtype=torch.float64), []
    for piece in x.split((3, 1, 6, 2), dim=1):
        pieces.append(layer(piece, cache.positions(piece.size(1)) if named else None, cache))
        cache.length += piece.size(1)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-14, rtol=0)


def test_attention_maps():
    model, x = small(dropout=0.5).train(), torch.randint(31, (2, 9))
    maps = model.attention_maps(x)
    assert maps.shape == (2, 2, 2, 9, 9) and model.training
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, 9))
    assert maps.triu(1).abs().max() == 0
    assert torch.equal(maps, model.attention_maps(x))
    # The second layer's map, from the parts of the model by hand.
    model.eval()
    block = model.h[1]
    stream = model.h[0](model.wte(x) + model.wpe(torch.arange(9)))
    q, k, _ = block.attn.c_attn(block.ln_1(stream)).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    torch.testing.assert_close(maps[1], scores.softmax(-1))


def test_attention_maps_leave_the_layers_as_they_were():
    model, x = small(), torch.randint(31, (2, 9))
    before = model(x)[0]
    with pytest.raises(ValueError, match="block_size 24"):
        model.attention_maps(torch.zeros(1, 25, dtype=torch.long))
    model.attention_maps(x)
    assert torch.equal(model(x)[0], before) and not any("attend" in vars(block.attn) for block in model.h)


# --- dropout ---

def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer = CausalSelfAttention(GPTConfig(block_size=8, n_head=2, n_embd=16, dropout=0.5))
    x = torch.randn(1, 8, 16)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_dropout_acts_on_the_attention_weights():
    torch.manual_seed(0)
    layer = CausalSelfAttention(GPTConfig(block_size=8, n_head=2, n_embd=16, dropout=0.5))
    q, k, v = torch.randn(3, 1, 2, 8, 8)
    y, weights = attention(q, k, v, torch.arange(8))
    mixed = torch.stack([layer.attend(q, k, v, torch.arange(8)) for _ in range(3000)])
    assert not torch.equal(mixed[0], mixed[1])
    torch.testing.assert_close(mixed.mean(0), y, atol=0.15, rtol=0)  # dropped weights are made up for by the others
