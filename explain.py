"""What a model computes when it chooses a token: where it looks, what it would say after each layer, and what the
samplers leave. playground.py shows it on a page.

    sampling = dict(temperature=0.8, top_k=None, top_p=0.9, repetition_penalty=1.0)
    what = explain(model, tok, tok.encode("ROMEO:"), context=6, token=None, layer=0, head=0, sampling=sampling)

Everything here goes through model.py's own forward pass and samplers. The answers are plain values, ready for JSON.
Results are kept for the next call. After a change of the model's weights, call look.cache_clear() and kept.clear().
"""
import base64
import functools

import torch
import torch.nn.functional as F

import model as model_py

CHUNK = 128  # positions that are read at once


def tokens(tok, ids):
    """[id, ...] -> [{"id", "text", "bytes"}, ...]. If several tokens make up one character, the last one has it as its
    text. Tokens that are not whole characters also have their bytes."""
    decoder, found = tok.stream(), []
    for i in ids:
        text = "<|endoftext|>" if i == tok.eot else decoder.push(i)
        raw = text.encode() if i == tok.eot else tok.token_bytes(i)
        found.append({"id": i, "text": text, "bytes": "" if text.encode() == raw else raw.hex(" ")})
    return found


@torch.no_grad()
def probabilities(model, ids):
    """The probability that the model gave to each token after the ones before it; None for the first."""
    found, cache = [None], model.new_cache(1)
    for part in torch.tensor([ids], device=model.wte.weight.device).split(CHUNK, dim=1):
        p = model(part, cache=cache)[0][0].float().softmax(-1)
        following = ids[cache.length - len(p) + 1:cache.length + 1]  # the last id has none
        found += [row[i].item() for row, i in zip(p, following, strict=False)]
    return found


def read(model, tok, ids):
    """The tokens of a text, each with its probability and with the number of tokens before it that the model saw. Of a
    long text, it reads the end."""
    first = max(0, len(ids) - model.config.block_size)
    known = ([None] * first + probabilities(model, ids[first:])) if ids else []
    return [token | {"probability": p, "context": max(0, n - first)}
            for n, (token, p) in enumerate(zip(tokens(tok, ids), known, strict=True))]


kept = {}  # by model: the ids that its cache holds, and the cache


def filled_cache(model, ids):
    """A cache that holds these ids. It is kept for the next call, which reads only what comes after the same
    beginning."""
    # Taken out until it is right again, in case the model raises an exception.
    before, cache = kept.pop(model, None) or ([], model.new_cache(1))
    # Up to the first id that differs, the keys and values stay valid.
    cache.length = next((n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b),
                        min(len(ids), len(before)))
    while cache.length < len(ids):
        part = ids[cache.length:cache.length + CHUNK]
        model(torch.tensor([part], device=model.wte.weight.device), cache=cache, last_only=True)
    kept[model] = ids, cache
    return cache


def maps_of_last(model, ids, n):
    """The attention weights of the last n positions, (n_layer, nh, n, T)."""
    cache = filled_cache(model, ids[:-n])
    return model.attention_maps(torch.tensor([ids[-n:]], device=model.wte.weight.device), cache)[:, 0]


@functools.lru_cache(4)
@torch.no_grad()
def look(model, ids):
    """What the model computes at the last of these ids: the attention weights (n_layer, nh, T), and the logits of the
    next token (n_layer + 1, V) if it stopped after the embeddings, after the first block, ..., after the last block."""
    streams, outputs = [], []  # what enters each block, and the logits, at the last position
    hooks = [block.register_forward_pre_hook(lambda _, args: streams.append(args[0][0, -1]))
             for block in dict.fromkeys(model.h)]  # a changed model may use a block twice
    hooks.append(model.register_forward_hook(lambda *args: outputs.append(args[-1][0][0, -1:])))
    try:
        maps = maps_of_last(model, ids, 1)[:, :, 0]
    finally:
        for hook in hooks:
            hook.remove()
    streams = streams[-len(model.h):]  # the hooks have also seen the passes that filled the cache
    # In float32, as in `sample`, whatever the model's dtype.
    return maps, torch.cat((model.lm_head(model.ln_f(torch.stack(streams))), outputs[-1])).float()


def steps_of_sample(logits, ids, temperature, top_k, top_p, repetition_penalty):
    """Logits (1, V) -> {what was done: the probabilities (V,)}, one after the other as in model.py's `sample`."""
    steps = {"model": logits}
    steps["penalty"] = logits = model_py.penalize_repetition(logits, ids, repetition_penalty)
    if temperature <= 1e-8:  # the likeliest token has all the probability
        steps["temperature"] = logits = model_py.keep_top_k(logits, 1)
    else:
        steps["temperature"] = logits = model_py.scale_temperature(logits, temperature)
    steps["top-k"] = logits = logits if top_k is None else model_py.keep_top_k(logits, top_k)
    steps["top-p"] = logits if top_p is None else model_py.keep_top_p(logits, top_p)
    return {name: z.softmax(-1)[0] for name, z in steps.items()}


def explain(model, tok, ids, context, token, layer, head, sampling):
    """How the token after these ids is chosen. The model sees the last `context` of them, and the penalty all. `token`
    is the one that was chosen, or None. Returns a dict:

    candidates    the likeliest tokens, each with its probability after every sampler
    attention     the weights of one head at the last position
    heads         those of all heads, each shortened to at most 16 numbers
    lens          what the model would say if it stopped after the embeddings, after the first block, ...: the three
                  likeliest tokens, and the probability of `token` ("logit lens", nostalgebraist 2020)"""
    maps, logits = look(model, tuple(ids[-context:]))
    steps = steps_of_sample(logits[-1:], torch.tensor([ids], device=model.wte.weight.device), **sampling)

    def likeliest(p, n):
        return p.topk(min(n, p.numel())).indices.tolist()

    shown = dict.fromkeys(likeliest(steps["model"], 16) + ([] if token is None else [token]))
    heads = F.adaptive_max_pool1d(maps.cpu(), min(16, maps.size(-1))).double().round(decimals=3)  # for small pictures
    return {"candidates": [tokens(tok, [i])[0] | {"probabilities": {k: p[i].item() for k, p in steps.items()}}
                           for i in shown],
            "attention": maps[layer, head].tolist(), "heads": heads.tolist(),
            "lens": [{"likeliest": [tokens(tok, [i])[0] | {"probability": p[i].item()} for i in likeliest(p, 3)],
                      "chosen": None if token is None else p[token].item()} for p in logits.softmax(-1)]}


@torch.no_grad()
def square(model, ids, layer, head):
    """One head's attention weights at the last positions, at most CHUNK of them, as bytes from 0 to 255 in base64."""
    n = min(CHUNK, len(ids))
    weights = maps_of_last(model, ids, n)[layer, head, :, -n:]
    return {"side": n, "bytes": base64.b64encode((weights * 255).round().byte().cpu().numpy()).decode()}


def write(model, tok, ids, max_new_tokens, seed, sampling):
    """Yields the tokens that follow. Each has the probability that the model gave it, before the samplers, and the
    number of tokens before it that the model saw. The model may be used for something else between two tokens."""
    last = {}

    def remember(module, args, kwargs, output):
        last.update(probabilities=output[0][0, -1].float().softmax(-1), context=kwargs["cache"].length)

    steps, decoder = model.stream([ids], max_new_tokens, eos_id=tok.eot, **sampling,
                                  generator=torch.Generator(model.wte.weight.device).manual_seed(seed)), tok.stream()
    for i in ids:  # the last of them may be the beginning of a character
        if i != tok.eot:
            decoder.push(i)
    while True:
        hook = model.register_forward_hook(remember, with_kwargs=True)
        try:
            step = next(steps, None)
        finally:
            hook.remove()
        if step is None:
            return
        token = tokens(tok, step.tolist())[0]
        if token["id"] != tok.eot:
            token["text"] = decoder.push(token["id"])  # it may end a character that earlier tokens began
        yield token | {"probability": last["probabilities"][token["id"]].item(), "context": last["context"]}
