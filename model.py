"""A GPT: a decoder-only transformer with GPT-2's architecture, complete in this file. Read it from top to bottom.

    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                         # training: targets[:, t] is the token after idx[:, t]
    ids = model.generate(idx, max_new_tokens=100, top_k=50)    # generation, with a key-value cache

Text is cut into tokens (characters, or pieces of words), and each has an id. The model reads ids and returns logits: at
each position, one score for every token that could come next. A position sees itself and the positions before it, never
those after ("causal"). So one pass over T tokens makes T predictions, and training learns from all of them. The first
transformer (Vaswani et al. 2017) also has an encoder, in which each position of a second text sees all others. Here is
only the decoder, as in GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

Shapes in comments:
    B   batch, the number of sequences
    T   time, the number of positions in a sequence
    C   n_embd, the number of features (the numbers that describe one position)
    nh  n_head, the number of heads
    hs  head size, C / nh
    V   vocab_size, the number of distinct tokens
    S   the number of positions that have keys and values: T, or more with a cache
"""
import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The size of a model. Raises ValueError if a value is out of range."""
    block_size: int = 1024     # the longest sequence that the model can read, in tokens
    vocab_size: int = 50257    # the number of distinct tokens, here GPT-2's
    n_layer: int = 6           # the number of blocks, one after the other
    n_head: int = 6            # the number of attention heads in a block
    n_embd: int = 384          # the number of features that describe one position
    dropout: float = 0.0       # the fraction of activations set to zero at random during training, against overfitting
    bias: bool = True          # biases in linear layers and layer norms: GPT-2 has them, small models need none

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


# --- attention: how a position gathers information from the positions before it ---
def causal_mask(positions, S, dtype):
    """positions (T,) of the queries -> (T, S), added to the scores: 0 for a key at the query's position or before it,
    -inf for a later key."""
    later = torch.arange(S, device=positions.device) > positions[:, None]  # (T, S)
    return torch.zeros(later.shape, dtype=dtype, device=positions.device).masked_fill(later, float("-inf"))


def attention(q, k, v, positions, dropout=None):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) with a causal mask.
    q (B, nh, T, hs), k and v (B, nh, S, hs) -> output (B, nh, T, hs), weights (B, nh, T, S).

    A query is a vector that says what a position is looking for, a key says what a position offers, and a value is what
    it passes on. The score is the dot product of a query and a key: how well the two match. The softmax turns the
    scores of one query into weights, and the output is the average of the values with these weights."""
    # If the features of q and k are independent with mean 0 and variance 1, their dot product has variance hs.
    # Dividing by sqrt(hs) makes it 1. Otherwise the softmax of large scores saturates: one weight near 1, no gradient.
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, nh, T, hs) @ (B, nh, hs, S) -> (B, nh, T, S)
    # -inf before the softmax gives later positions a weight of exactly 0, and the other weights still sum to 1.
    # Zeros put in after the softmax would come too late: the future would still count in its denominator, and leak.
    scores = scores + causal_mask(positions, k.size(-2), q.dtype)
    weights = F.softmax(scores, dim=-1)  # (B, nh, T, S), and each row of S weights sums to 1
    y = (weights if dropout is None else dropout(weights)) @ v  # (B, nh, T, S) @ (B, nh, S, hs) -> (B, nh, T, hs)
    return y, weights


class CausalSelfAttention(nn.Module):
    """Multi-head attention: nh heads work in parallel, each with queries, keys and values of hs features, computed from
    all C. One head can look for the previous letter while another looks for the start of the line. A single head has
    one set of weights for each query, so it would mix the two. Queries, keys and values are linear maps of the same
    input: this is what makes it self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # Q, K and V of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)      # mixes the heads' outputs
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C). positions (T,): where x is in the sequence, by default from 0 on, or after what
        the cache holds. With a cache, x also attends to what it holds for the block with the number `layer`."""
        B, T, C = x.shape
        if positions is None:
            positions = torch.arange(T, device=x.device) if cache is None else cache.positions(T)
        q, k, v = self.c_attn(x).split(C, dim=2)                 # (B, T, 3C) -> three times (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head)   # (B, T, nh, hs): hs features for each head
                   .transpose(1, 2) for z in (q, k, v))          # (B, nh, T, hs): now @ works on each head separately
        if cache is not None:
            k, v = cache.append(layer, k, v)                     # (B, nh, S, hs): those of all positions so far
        y = self.attend(q, k, v, positions)                      # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                   # (B, T, nh, hs) -> (B, T, C): heads side by side
        return self.resid_dropout(self.c_proj(y))                # (B, T, C)

    def attend(self, q, k, v, positions):
        """Returns the output of `attention`. Separate, so that fast.py can swap in PyTorch's fused kernel."""
        return attention(q, k, v, positions, self.attn_dropout)[0]


# --- the block: attention lets positions exchange information, then an MLP processes it at each position ---
class MLP(nn.Module):
    """The feed-forward network, the same for every position: two linear layers with a nonlinearity between them.
    Without it, they would amount to one linear layer. The hidden width, 4 * C, is that of the original transformer."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # a smooth ReLU, in the form that GPT-2 uses
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = self.gelu(self.c_fc(x))           # (B, T, 4C)
        return self.dropout(self.c_proj(x))   # (B, T, C)


class Block(nn.Module):
    """One of n_layer blocks. x is the residual stream: C features for each position that run through the whole model.
    Two sublayers, attention and MLP, each read a normalised copy of the stream and add their output to it, so each can
    build on what earlier ones wrote. LayerNorm gives each position's features mean 0 and variance 1, then applies a
    learned scale (and shift, if bias). So a sublayer's inputs have the same magnitude however large the stream is.

    Normalising a sublayer's input is called Pre-LN. The stream itself is never normalised between blocks, so gradients
    have a direct path from the loss to every block (verify_gradients.py shows it). In Post-LN, norm(x + f(x)), as in
    the first transformer, each sublayer rescales the stream, and deep models need a long warmup (Xiong et al. 2020)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, positions=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), positions, cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


# --- the key-value cache: generation without recomputing the past for every token ---
class KVCache:
    """The keys and values of all positions so far, for every layer. A new token then costs the work of one position:
    its query is compared with the cached keys. Past queries are not kept, since nothing uses them again.

    The cache holds 2 * n_layer * B * capacity * n_embd numbers. For a sequence of GPT-2 small in float32, these are
    2 * 12 * 1024 * 768 * 4 bytes = 75 MB. It cannot slide, that is, drop its oldest token to make room for a new one.
    All other keys and values depend on their positions, which would change, and in later blocks on that token, too."""

    def __init__(self, config, batch_size, length=None, device=None, dtype=None):
        """length: the capacity in positions, by default block_size. ValueError if it exceeds block_size."""
        self.capacity = config.block_size if length is None else length
        if not 0 < self.capacity <= config.block_size:
            raise ValueError(f"the cache's length must be from 1 to block_size {config.block_size}, got {length}")
        self.length = 0  # the number of positions that are filled
        shape = batch_size, config.n_head, self.capacity, config.n_embd // config.n_head
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

    @property
    def nbytes(self):
        """The memory that the cache takes, in bytes."""
        return sum(t.nbytes for t in self.k + self.v)

    def positions(self, T):
        """The positions (T,) of the next T tokens. ValueError if there is no room for them."""
        if self.length + T > self.capacity:
            raise ValueError(f"a sequence of {self.length + T} tokens exceeds the cache's capacity {self.capacity}")
        return torch.arange(self.length, self.length + T, device=self.k[0].device)

    def append(self, layer, k, v):
        """Stores the keys and values (B, nh, T, hs) of T new positions and returns those of all positions so far,
        (B, nh, S, hs). GPT.forward advances `length` once every layer has stored its own."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def reset(self):
        """Forgets all positions."""
        self.length = 0

    def repeat(self, n):
        """A cache that holds every sequence n times, side by side: (B, ...) -> (B * n, ...)."""
        repeated = copy.copy(self)
        repeated.k, repeated.v = ([t.repeat_interleave(n, dim=0) for t in tensors] for tensors in (self.k, self.v))
        return repeated


# --- the model ---
class GPT(nn.Module):
    """Embeddings, n_layer blocks, a last norm (lm_head, too, wants inputs of one magnitude), and an output layer,
    lm_head, which turns the stream into logits. The names are GPT-2's, so its published weights fit."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embedding: a learned vector for each token
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding: one for each position
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # lm_head scores a token by the dot product of the stream with a vector for that token. wte has such a vector
        # already, so the two share one matrix (Press & Wolf 2017): fewer parameters, trained by both uses.
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)  # as in GPT-2
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # apply() visits a block after its layers, so this overrides the lines above
            # 2 * n_layer projections add to the stream, and their variances add up. So divide by sqrt(2 * n_layer).
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) for the last position with last_only, and the loss: the mean of
        -ln(probability of the target), the cross-entropy, over the targets (B, T) that are not -1. Without targets it
        is None. With a cache, idx continues the cached sequence. Raises ValueError if the sequence is empty or too
        long. An untrained model has small weights, so all logits are near 0, all tokens have a probability of about
        1 / V, and the loss is about ln(V): 4.2 for 65 characters, 10.8 for GPT-2's tokens."""
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"expected ids of shape (B, T) with T at least 1, got {tuple(idx.shape)}")
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens exceeds block_size {self.config.block_size}")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)

        # Attention alone cannot tell in which order the earlier tokens came. Adding a vector for the position makes "a"
        # at position 3 a different input from "a" at position 7. Training finds vectors whose sum shows both.
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C) + (T, C) -> (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, positions, cache, layer)           # (B, T, C)
        if cache is not None:
            cache.length += T
        if last_only:
            x = x[:, -1:]                                   # (B, 1, C): lm_head then computes one position
        logits = self.lm_head(self.ln_f(x))                 # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits are too imprecise for the loss
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=-1)

    @torch.no_grad()
    def attention_maps(self, idx, cache=None):
        """idx (B, T) -> the attention weights of all layers and heads, (n_layer, B, nh, T, T), without dropout. Row t
        says how strongly position t attends to each position. With a cache, idx continues the cached sequence, and
        the weights are (n_layer, B, nh, T, S)."""
        maps = []

        def record(attend, q, k, v, positions):  # with unit vectors as values, the output is the weights themselves
            unit_vectors = torch.eye(k.size(-2), dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
            maps.append(attend(q, k, unit_vectors, positions))
            return attend(q, k, v, positions)

        layers = [module for module in self.modules() if isinstance(module, CausalSelfAttention)]
        was_training = self.training
        self.eval()
        try:
            for layer in layers:
                layer.attend = partial(record, layer.attend)
            self(idx, cache=cache)
        finally:
            for layer in layers:
                layer.__dict__.pop("attend", None)  # back to the method of the class
            self.train(was_training)
        return torch.stack(maps)

    def num_parameters(self, embeddings=True):
        """The number of parameters, with or without wte (hence lm_head) and wpe. The shared matrix counts once."""
        left_out = set() if embeddings else {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(p.numel() for p in self.parameters() if p not in left_out)

    def flops_per_token(self, T):
        """Floating-point operations to train on one token of a sequence of T: 6 for each weight (2 forward, to multiply
        and add; 4 backward, for the gradients of input and weight; embeddings are only looked up, but lm_head counts)
        and 12 * n_layer * n_embd * T for attention (Chowdhery et al. 2022, PaLM, appendix B)."""
        layers = [module for module in self.modules() if not isinstance(module, nn.Embedding)]
        n = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * T

    # --- generation: read the prompt, then draw one token at a time ---

    def new_cache(self, batch_size, length=None):
        """An empty cache for this model, on its device and in its dtype."""
        return KVCache(self.config, batch_size, length, self.wte.weight.device, self.wte.weight.dtype)

    def prefill(self, idx, cache=None):
        """Reads a whole prompt (B, T) at once -> logits (B, V) of the next token. Each weight read from memory is used
        for T positions, so arithmetic takes most of the time: prefill is compute-bound."""
        return self(idx, cache=cache, last_only=True)[0][:, -1]

    def decode_one_token(self, token, cache):
        """Reads one more token (B,) -> logits (B, V) of the next. Each weight read from memory is used for one position
        of each sequence, so reading takes most of the time: decoding is bound by memory bandwidth. With bfloat16
        weights (2 bytes) it is up to twice as fast as with float32 (4 bytes), with 8-bit weights four times."""
        return self(token[:, None], cache=cache, last_only=True)[0][:, -1]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
               eos_id=None, num_samples=1, use_cache=True, generator=None):
        """Continues each prompt of idx (B, T) num_samples times. Yields the ids of each step, (B * num_samples,), the
        samples of a prompt side by side. Stops after max_new_tokens, or when all samples have produced eos_id (the end
        of a text). A sample that ends earlier is padded with eos_id. Temperature 0 takes the most likely token.
        use_cache=False gives the same text, slowly. ValueError at the first step for a wrong argument or id."""
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        if max_new_tokens < 0 or num_samples < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) or num_samples ({num_samples}) is too small")
        idx = torch.as_tensor(idx, device=self.wte.weight.device)  # lists of ids are welcome
        if idx.dim() != 2 or idx.numel() == 0 or idx.is_floating_point():
            raise ValueError(f"expected ids of shape (B, T) with T at least 1, got {idx.dtype} {tuple(idx.shape)}")
        if not 0 <= int(idx.min()) <= int(idx.max()) < self.config.vocab_size:
            raise ValueError(f"the prompt has an id outside the vocabulary of {self.config.vocab_size}")
        idx, block_size, was_training = idx.long(), self.config.block_size, self.training
        self.eval()
        try:
            start = max(0, idx.size(1) - block_size)  # the model sees idx[:, start:]
            length = min(block_size, idx.size(1) - start + max_new_tokens)
            cache = self.new_cache(idx.size(0), length) if use_cache else None
            logits = self.prefill(idx[:, start:], cache)  # each prompt is read once, however many samples follow
            if num_samples > 1:
                idx, logits = (z.repeat_interleave(num_samples, dim=0) for z in (idx, logits))
                cache = cache.repeat(num_samples) if use_cache else None
            done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
            for step in range(max_new_tokens):
                token = sample(logits, idx, temperature, top_k, top_p, repetition_penalty, generator)  # (B,)
                if eos_id is not None:
                    token = token.masked_fill(done, eos_id)
                    done |= token == eos_id
                yield token
                if step == max_new_tokens - 1 or (eos_id is not None and bool(done.all())):
                    return
                idx = torch.cat((idx, token[:, None]), dim=1)
                if idx.size(1) - start <= block_size:
                    logits = self.decode_one_token(token, cache) if use_cache else self.prefill(idx[:, start:])
                else:
                    # The context is full and cannot slide (see KVCache), so forget its older half and read the newer
                    # half again. That costs one prefill every block_size / 2 tokens.
                    start = idx.size(1) - max(1, block_size // 2)
                    if use_cache:
                        cache.reset()
                    logits = self.prefill(idx[:, start:], cache)
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, *args, num_samples=1, **kwargs):
        """idx (B, T) -> (B * num_samples, T + n), n <= max_new_tokens: the prompts and what follows them. The other
        arguments are those of `stream`."""
        tokens = [t[:, None] for t in self.stream(idx, max_new_tokens, *args, num_samples=num_samples, **kwargs)]
        idx = torch.as_tensor(idx, device=self.wte.weight.device).repeat_interleave(num_samples, dim=0)
        return torch.cat([idx, *tokens], dim=1)


# --- sampling: a chain of functions on logits (B, V), each defined as in Hugging Face's transformers ---
def check_sampling(temperature, top_k, top_p, repetition_penalty):
    """ValueError if an argument is out of range."""
    for name, value, good, expected in (
            ("temperature", temperature, 0.0 <= temperature < math.inf, "a finite number of at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "in (0, 1]"),
            ("repetition_penalty", repetition_penalty, 0.0 < repetition_penalty < math.inf, "a finite number above 0")):
        if not good:
            raise ValueError(f"{name} must be {expected}, got {value}")


def penalize_repetition(logits, ids, penalty):
    """Makes the tokens that occur in ids (B, T) less likely: divides a positive logit by the penalty and multiplies a
    negative one, once however often the token occurs (Keskar et al. 2019, CTRL, section 4.1)."""
    seen = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def scale_temperature(logits, temperature):
    """A temperature below 1 makes the likely tokens even more likely. One above 1 makes them less likely."""
    return logits / temperature


def keep_top_k(logits, k):
    """Sets all but the k largest logits to -inf; ties with the k-th stay. No k suits every distribution: it keeps too
    many tokens where one is nearly certain (peaked), and too few where hundreds are equally good (flat)."""
    return logits.masked_fill(logits < logits.topk(min(k, logits.size(-1))).values[:, -1:], float("-inf"))


def keep_top_p(logits, p):
    """Keeps the smallest set of tokens whose probabilities add up to at least p and sets all other logits to -inf: few
    tokens stay where the distribution is peaked, many where it is flat (Holtzman et al. 2020, nucleus sampling)."""
    probs = F.softmax(logits, dim=-1)
    # Sort the tokens, and drop the least likely ones as long as their total is at most 1 - p. Sorting 50257 tokens
    # takes long, so sort only some: tokens below (1 - p) / V have less than 1 - p in total, so all of them go.
    columns = (probs >= (1.0 - p) / logits.size(-1)).any(dim=0).nonzero().squeeze(1)
    order = logits[:, columns].argsort(dim=-1)  # the least likely first
    ascending = probs[:, columns].gather(1, order)
    below = probs.index_fill(1, columns, 0.0).sum(dim=-1, keepdim=True)  # the total probability of the unsorted tokens
    drop = below + ascending.cumsum(dim=-1) <= 1.0 - p
    drop[:, -1] = False  # at least one stays
    kept = logits[:, columns].masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return torch.full_like(logits, float("-inf")).index_copy(1, columns, kept)


def sample(logits, ids, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, generator=None):
    """logits (B, V) and the ids (B, T) so far -> the next ids (B,). Applies the functions above, in this order."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if repetition_penalty != 1.0:
        logits = penalize_repetition(logits, ids, repetition_penalty)
    if temperature <= 1e-8:  # 0, or so close to it that dividing would overflow
        return logits.argmax(dim=-1)
    logits = scale_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator).squeeze(1)
