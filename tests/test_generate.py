"""The cache, generation and the samplers, against full forward passes and Hugging Face's logits processors."""
import math
import random

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from model import GPT, GPTConfig, KVCache, keep_top_k, keep_top_p, penalize_repetition, sample, scale_temperature


def random_model(seed, dtype=torch.float32, tied=False, **changes):
    """A model with large weights, and a head of its own unless tied: with a tied one, random text repeats a token."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=37, n_layer=2, n_head=3, n_embd=15), **changes}))
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.wte.weight))
    for name, p in model.named_parameters():
        gain = "ln" in name and "weight" in name
        torch.nn.init.normal_(p, mean=1.0 if gain else 0.0, std=0.3 if p.dim() > 1 else 0.1)
    return model.to(dtype).eval()


# --- the cache ---

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("seed", range(4))
def test_any_chunks_give_the_logits_of_the_whole(seed, dtype, tolerance):
    rng = random.Random(seed)
    model = random_model(seed, dtype, tied=seed < 2, bias=seed % 2 == 0, n_layer=1 + seed)
    idx = torch.randint(37, (3, 16))
    full = model(idx)[0]
    cuts = sorted(rng.sample(range(1, 16), 4 + seed))
    cache = KVCache(model.config, 3, dtype=dtype)
    pieces = [model(idx[:, a:b], cache=cache)[0] for a, b in zip([0, *cuts], [*cuts, 16], strict=True)]
    assert cache.length == 16
    assert (torch.cat(pieces, 1) - full).abs().max() <= tolerance * max(1, full.abs().max())


def test_cache_memory_and_limits():
    model = random_model(0)
    cache = KVCache(model.config, 5, length=7, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 2 * 5 * 7 * 15 * 2
    assert KVCache(model.config, 5).capacity == 16
    with pytest.raises(ValueError, match="capacity 7"):
        model(torch.zeros(5, 8, dtype=torch.long), cache=cache)
    for length in (0, -1, 17):
        with pytest.raises(ValueError, match="from 1 to block_size 16"):
            KVCache(model.config, 1, length=length)


def test_the_cache_answers_for_positions():
    model, idx = random_model(0), torch.randint(37, (2, 16))
    cache = model.new_cache(2)
    model(idx[:, :5], cache=cache)
    assert cache.length == 5 and cache.positions(3).tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="17 tokens exceeds the cache's capacity 16"):
        cache.positions(12)
    before = cache.nbytes
    repeated = cache.repeat(3)
    assert repeated.nbytes == 3 * before and repeated.length == 5
    continued = model(idx[:, 5:].repeat_interleave(3, 0), cache=repeated)[0]
    torch.testing.assert_close(continued, model(idx)[0][:, 5:].repeat_interleave(3, 0), atol=1e-5, rtol=1e-5)
    cache.reset()
    assert cache.positions(2).tolist() == [0, 1]
    assert torch.equal(model(idx, cache=cache)[0], model(idx, cache=model.new_cache(2))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_has_the_models_dtype(dtype):
    cache = random_model(0, dtype).new_cache(3, 4)
    assert cache.k[1].dtype == cache.v[0].dtype == dtype and cache.k[0].shape == (3, 3, 4, 5)


# --- generation ---

def reference(model, idx, n):
    """Greedy text, every step from a full forward pass over the window that the README describes."""
    block_size = model.config.block_size
    window = idx[:, -block_size:]
    for _ in range(n):
        token = model(window)[0][:, -1].argmax(-1, keepdim=True)
        idx = torch.cat((idx, token), 1)
        full = window.size(1) == block_size
        window = idx[:, -max(1, block_size // 2):] if full else torch.cat((window, token), 1)
    return idx


@pytest.mark.parametrize("block_size", [1, 2, 7, 16])
@pytest.mark.parametrize("prompt", [1, 5, 16, 23])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_reference_past_block_size_too(block_size, prompt, use_cache):
    model = random_model(block_size, torch.float64, block_size=block_size)
    idx = torch.randint(37, (3, prompt))
    assert torch.equal(model.generate(idx, 40, temperature=0, use_cache=use_cache), reference(model, idx, 40))


def test_text_varies():
    assert len(set(reference(random_model(7), torch.zeros(1, 1, dtype=torch.long), 40)[0].tolist())) > 5


def test_samples_follow_their_prompts():
    model, idx = random_model(1, torch.float64), torch.randint(37, (2, 5))
    out = model.generate(idx, 30, temperature=0, num_samples=3)
    assert torch.equal(out, model.generate(idx, 30, temperature=0).repeat_interleave(3, 0))
    drawn = model.generate(idx, 30, num_samples=3)
    assert drawn.shape == (6, 35) and torch.equal(drawn[:, :5], idx.repeat_interleave(3, 0))
    assert not torch.equal(drawn[0], drawn[1])


def test_same_generator_same_text():
    model, idx = random_model(2), torch.zeros(1, 3, dtype=torch.long)
    how = dict(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.1)
    texts = [model.generate(idx, 25, generator=torch.Generator().manual_seed(s), **how) for s in (5, 5, 6)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    cached_not = model.generate(idx, 25, generator=torch.Generator().manual_seed(5), use_cache=False, **how)
    assert torch.equal(texts[0], cached_not)


def test_sequences_end_at_eos():
    model, idx = random_model(3), torch.randint(37, (6, 4))
    free = model.generate(idx, 40, temperature=0)
    eos = int(free[0, 10])
    out = model.generate(idx, 40, temperature=0, eos_id=eos)
    for row, expected in zip(out[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = expected.index(eos) + 1 if eos in expected else len(expected)
        assert row[:end] == expected[:end] and set(row[end:]) <= {eos}
    first = free[0, :free[0].tolist().index(eos, 4) + 1]
    assert torch.equal(model.generate(idx[:1], 40, temperature=0, eos_id=eos)[0], first)


def test_generate_leaves_the_mode_and_takes_no_tokens():
    model, idx = random_model(4).train(), torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(model.generate(idx, 0), idx)
    model.generate(idx, 3)
    assert model.training


def test_stream_that_is_left_early_restores_the_mode():
    model = random_model(4).train()
    stream = model.stream(torch.zeros(1, 3, dtype=torch.long), 10)
    next(stream)
    stream.close()
    assert model.training


def test_prefill_and_decode_one_token():
    model, idx = random_model(4), torch.randint(37, (2, 9))
    full, cache = model(idx)[0], model.new_cache(2)
    torch.testing.assert_close(model.prefill(idx[:, :8], cache), full[:, 7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode_one_token(idx[:, 8], cache), full[:, 8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how, words", [
    (dict(temperature=-0.1), "temperature"), (dict(temperature=math.nan), "temperature"), (dict(top_k=0), "top_k"),
    (dict(top_p=0.0), "top_p"), (dict(top_p=1.1), "top_p"), (dict(repetition_penalty=0.0), "repetition_penalty"),
    (dict(top_p=math.nan), "top_p"), (dict(temperature=math.inf), "temperature"),
    (dict(num_samples=0), "num_samples"), (dict(max_new_tokens=-1), "max_new_tokens")])
def test_bad_arguments(how, words):
    with pytest.raises(ValueError, match=words):
        random_model(0).generate(torch.zeros(1, 3, dtype=torch.long), **{"max_new_tokens": 3, **how})


@pytest.mark.parametrize("idx", [[[0, 37]], [[-1, 0]], [[]]])
def test_bad_prompts(idx):
    with pytest.raises(ValueError, match="vocabulary of 37|T at least 1"):
        random_model(0).generate(torch.tensor(idx, dtype=torch.long), 3)


# --- the samplers ---

def rows_of_logits(dtype=torch.float64):
    """Thousands of rows: narrow, wide and extreme distributions, ties, and tokens already ruled out."""
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(600, 50, generator=g, dtype=dtype) * scale for scale in (0.01, 1, 5, 50, 1000)])
    rows = torch.cat((rows, rows.round(), torch.zeros(1, 50, dtype=dtype), torch.full((1, 50), -1e30, dtype=dtype)))
    rows[::7, ::3] = float("-inf")
    return rows


@pytest.mark.parametrize("k", [1, 2, 17, 50, 80])
def test_top_k(k):
    logits = rows_of_logits()
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999999, 1.0])
def test_top_p(p):
    logits = rows_of_logits()
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_top_p_without_sorting_the_vocabulary(p, scale):
    logits = torch.randn(40, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    for row in logits.split(1):  # one at a time: each takes the short way or the long one by itself
        assert torch.equal(keep_top_p(row, p), TopPLogitsWarper(p)(None, row))
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_in_float32_differs_only_where_rounding_decides(p):
    logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(3)) * 4
    ours, theirs = keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits)
    probs, order = logits.double().softmax(-1).sort(descending=True)
    mass_above = torch.zeros_like(probs).scatter(1, order, probs.cumsum(-1) - probs)
    assert ((ours == theirs) | ((mass_above - p).abs() < 1e-5)).all()


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(penalty):
    logits = rows_of_logits()
    ids = torch.randint(50, (len(logits), 20), generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, ids, penalty), expected)


def test_temperature():
    logits = rows_of_logits()
    assert torch.equal(scale_temperature(logits, 0.7), TemperatureLogitsWarper(0.7)(None, logits))


def test_the_penalty_covers_what_has_left_the_window():
    model = random_model(5, block_size=4)
    out = model.generate(torch.zeros(1, 1, dtype=torch.long), 30, temperature=0, repetition_penalty=1e6)
    assert len(set(out[0].tolist())) == 31  # with such a penalty no token comes twice


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 1.5
    kept = keep_top_k(logits / 0.8, 8)
    draws = sample(logits.expand(20000, -1), torch.zeros(20000, 1, dtype=torch.long), temperature=0.8, top_k=8)
    observed, expected = torch.bincount(draws, minlength=12).double(), kept.softmax(-1)[0].double() * 20000
    assert (observed[expected == 0] == 0).all()
    chi2 = ((observed - expected) ** 2 / expected)[expected > 0].sum().item()
    assert chi2 < 24.3  # the 99.9th percentile of chi-squared with 7 degrees of freedom


def test_greedy_is_the_likeliest_token():
    logits = rows_of_logits()
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    for temperature in (0.0, 1e-8):
        assert torch.equal(sample(logits, ids, temperature), logits.argmax(-1))
