import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, CausalSelfAttention, GPTConfig, attention, dropout, fast_attention


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16), **changes}))


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


def test_residual_projections_start_smaller():
    model = small(n_layer=8, n_embd=64)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


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


@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 9), (4, 9)])
def test_the_two_attentions_agree(T, S):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (T, S, S))
    torch.testing.assert_close(attention(q, k, v)[0], fast_attention(q, k, v), atol=1e-14, rtol=0)


def test_attention_maps():
    model, x = small(dropout=0.5).train(), torch.randint(31, (2, 9))
    maps = model.attention_maps(x)
    assert maps.shape == (2, 2, 2, 9, 9) and model.training
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, 9))
    assert maps.triu(1).abs().max() == 0
    assert torch.equal(maps, model.attention_maps(x))
    # The second layer's map, from the parts of the model by hand.
    model.eval()
    hidden = model.h[0](model.wte(x) + model.wpe(torch.arange(9)))
    torch.testing.assert_close(maps[1], model.h[1].attn(model.h[1].ln_1(hidden), return_weights=True)[1])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.7, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_a_share_p_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    zeros, n = (y == 0).sum().item(), y.numel()
    assert abs(zeros - p * n) < 5 * math.sqrt(n * p * (1 - p))  # five standard deviations
    assert torch.equal(y[y != 0], torch.full((n - zeros,), 1 / (1 - p), dtype=dtype))
    neighbours = ((y[:, 1:] == 0) & (y[:, :-1] == 0)).float().mean()  # independent: p squared of the pairs
    assert neighbours == pytest.approx(p ** 2, rel=0.05, abs=1e-5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient passes where the number did


def test_dropout_of_nearly_all():
    assert (dropout(torch.ones(100_000), 0.9999999) == 0).float().mean() > 0.999


def test_dropout_acts_in_both_paths_and_only_in_training():
    torch.manual_seed(0)
    layer = CausalSelfAttention(GPTConfig(block_size=8, n_head=2, n_embd=16, dropout=0.5))
    x = torch.randn(1, 8, 16)
    for how in ({}, {"return_weights": True}):
        layer.train()
        first, second = (layer(x, **how) for _ in range(2))
        assert not torch.equal(*(y[0] if how else y for y in (first, second)))
        layer.eval()
        first, second = (layer(x, **how) for _ in range(2))
        assert torch.equal(*(y[0] if how else y for y in (first, second)))
