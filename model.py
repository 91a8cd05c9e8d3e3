"""The GPT: a decoder-only transformer with GPT-2's architecture. Read it from top to bottom.

    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                        # training
    ids = model.generate(idx, max_new_tokens=100, top_k=50)   # text, with a key-value cache

Shapes in comments: B batch, T time (positions in the sequence), C n_embd, the width of the residual stream,
nh heads, hs = C / nh the size of each, V vocabulary. The model (Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners") maps ids (B, T) to logits (B, T, V): at each position, scores for the id that
comes next, computed from that position and those before it alone.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The model's shape. ValueError if a size is not positive, n_head does not divide n_embd, or dropout is not
    in [0, 1)."""
    block_size: int = 1024    # the longest sequence the model can attend over, in tokens
    vocab_size: int = 50257
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = True         # in linear layers and layer norms; GPT-2 has them, small models do well without

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


# --- the linear layer ---

def has_onednn(x):
    """Whether x lies where oneDNN, the CPU library of matrix products, can work on it."""
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """y = x W^T + b. After `quantize` the weight is int8, with one scale for each of its rows."""

    scale = None

    def forward(self, x):
        # (..., in) -> (..., out)
        if x.numel() == x.size(-1) and torch.compiler.is_compiling():
            # One row, as in decoding, does two operations for each weight it reads: memory is the limit, and the library's
            # products, made for many rows, stay far below it. The compiler makes of this sum one loop that reads each
            # weight once, in whatever dtype it is stored.
            y = (self.weight.float() * x.float().flatten()).sum(dim=-1)
            y = y if self.scale is None else y * self.scale
            y = y if self.bias is None else y + self.bias
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        if self.scale is not None:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
            return y if self.bias is None else y + self.bias
        plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        if self.weight.is_mkldnn or (plain and has_onednn(x) and x.dtype == self.weight.dtype == torch.float32):
            # F.linear leaves float32 to MKL, which multiplies the few rows of generation at half the speed of oneDNN, the
            # library that PyTorch uses for bfloat16. It has no public name for float32 (bench_kv.py measures it).
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def pack(self):
        """Stores the float32 weight in blocks, the order in which oneDNN reads it when it multiplies few rows. Only for
        inference on a CPU: nothing else can read it then."""
        self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 64), requires_grad=False)

    def quantize(self):
        """Replaces the weight by int8: each row is divided by its largest magnitude / 127 and rounded."""
        weight = self.weight.detach().float()
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight = nn.Parameter((weight / self.scale[:, None]).round().to(torch.int8), requires_grad=False)


# --- dropout ---

def dropout(x, p):
    """Zeroes each number with probability p and divides the others by 1 - p, which keeps the expected sum
    (Srivastava et al. 2014)."""
    if p == 0.0 or x.device.type != "cpu":
        return F.dropout(x, p)
    # On a CPU, F.dropout draws a float for each number, which takes longer than the layers around it. 16 random bits
    # do as well (p is rounded to 1/65536), and come 64 at a time.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    keep = bits[:x.numel()].view(x.shape) >= min(round(p * 2 ** 16), 2 ** 16 - 1) - 2 ** 15
    return x * (keep.to(x.dtype) / (1.0 - p))


class Dropout(nn.Dropout):
    """`dropout` in training, nothing otherwise."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


# --- attention ---

def causal_mask(T, S, like):
    """(T, S), to be added to scores: 0 where a query may look, -inf elsewhere. T queries, the newest of S positions,
    each look at themselves and the positions before. In the dtype and on the device of `like`."""
    return torch.full((T, S), float("-inf"), dtype=like.dtype, device=like.device).triu(diagonal=S - T + 1)


def attention(q, k, v, dropout_p=0.0):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) under a causal mask, written out.
    q (B, nh, T, hs), k and v (B, nh, S, hs) -> the output (B, nh, T, hs) and the weights (B, nh, T, S)."""
    T, S, hs = q.size(-2), k.size(-2), q.size(-1)
    # A dot product of hs unit-variance terms has variance hs. Dividing by sqrt(hs) brings it back to 1, else the
    # softmax saturates in wide heads and passes hardly any gradient.
    scores = q / math.sqrt(hs) @ k.transpose(-2, -1)
    # -inf before the softmax becomes a weight of exactly 0 and leaves the others summing to 1.
    weights = F.softmax(scores + causal_mask(T, S, q), dim=-1)
    return dropout(weights, dropout_p) @ v, weights  # dropout_p is 0.0 outside training


def fast_attention(q, k, v, dropout_p=0.0, mask=None):
    """The output of `attention`, by PyTorch's fused kernel, which never stores the T x S scores, wherever that is
    faster. mask: which of S cached positions count, where it is not all of them."""
    T, S = q.size(-2), k.size(-2)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if q.device.type == "cpu" and (dropout_p > 0.0 or (q.dtype == torch.bfloat16 and q.requires_grad)):
        # The CPU's fused kernel has no dropout, and a slow way back in bfloat16: written out, attention trains about
        # twice as fast.
        return attention(q, k, v, dropout_p)[0]
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    # With cached keys there are fewer queries than keys. is_causal=True would align the triangle with the oldest
    # key instead of the newest, so the mask is given, except that one query, the newest, may see everything.
    mask = None if T == 1 else causal_mask(T, S, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


class CausalSelfAttention(nn.Module):
    """Multi-head attention: every head compares queries with keys in its own hs dimensions, and averages values."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # Q, K, V of all heads at once
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0, return_weights=False):
        # x (B, T, C) -> (B, T, C), and with return_weights the weights (B, nh, T, S)
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for z in self.c_attn(x).split(C, dim=2))
        mask = None
        if cache is not None:
            k, v, mask = cache.append(layer, k, v)  # (B, nh, S, hs): the cached positions and the T new ones
        dropout_p = self.dropout if self.training else 0.0
        if return_weights:
            y, weights = attention(q, k, v, dropout_p)
        else:
            y = fast_attention(q, k, v, dropout_p, mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        y = self.resid_dropout(self.c_proj(y))
        return (y, weights) if return_weights else y


# --- the block ---

class MLP(nn.Module):
    """The feed-forward network: every position by itself, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # the form that GPT-2's weights were trained with
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One layer. The residual stream x passes through untouched; attention and MLP read a normalised copy of it and
    add what they found. This Pre-LN order keeps an identity path from the loss to every block, which no layer
    rescales, so gradients arrive at any depth (verify_gradients.py shows it). In the Post-LN of 2017, norm(x + f(x)),
    each layer rescales the stream, and deep models train only with a careful warmup (Xiong et al. 2020, "On Layer
    Normalization in the Transformer Architecture").
    For the same reason dropout acts on what is added, embeddings included, never on the stream after an addition."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0):
        # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


# --- the key-value cache ---

class KVCache:
    """Keys and values of the positions seen so far, for all layers, so that a new token costs one position's work
    instead of the whole sequence's. Preallocated for `capacity` positions, of which `length` are filled.
    Takes 2 * n_layer * B * capacity * n_embd numbers."""

    def __init__(self, config, batch_size, length=None, device=None, dtype=None):
        """length: the capacity in positions, block_size by default; dtype: that of the model's activations."""
        self.capacity = config.block_size if length is None else length
        self.length = 0
        shape = batch_size, config.n_head, self.capacity, config.n_embd // config.n_head
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]  # (B, nh, capacity, hs)
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # `length` for compiled code, see decode_step

    @property
    def nbytes(self):
        """Memory taken, in bytes."""
        return sum(t.nbytes for t in self.k + self.v)

    def append(self, layer, k, v):
        """Stores a layer's k and v (B, nh, T, hs) of T new positions. Returns those of all positions so far and None,
        or in compiled code those of the whole capacity and a mask of the filled ones: shapes that never change. The
        model moves `length` on when every layer has done so."""
        keys, values = self.k[layer], self.v[layer]
        if torch.compiler.is_compiling():
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            return keys, values, (torch.arange(self.capacity, device=k.device) <= self.position).view(1, 1, 1, -1)
        end = self.length + k.size(2)
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end], None

    def repeat(self, n):
        """A cache with every sequence n times, next to each other: (B, ...) -> (B * n, ...)."""
        if n == 1:
            return self
        repeated = object.__new__(KVCache)
        repeated.capacity, repeated.length, repeated.position = self.capacity, self.length, self.position
        repeated.k, repeated.v = ([t.repeat_interleave(n, dim=0) for t in side] for side in (self.k, self.v))
        return repeated


# --- the model ---

class GPT(nn.Module):
    """Embeddings, n_layer blocks, a final norm, and a head that shares the token embedding's matrix."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied (Press & Wolf 2017): a token's input and output vector are one
        self.apply(self._init_weights)
        self.compiled_step = None  # set by for_inference

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # `apply` comes to a block after its parts, so this overrides the above
            # 2 * n_layer projections add to the stream: scaled so, their sum's variance does not grow with depth.
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) with last_only, and the loss: the mean cross-entropy in nats
        over targets (B, T) that are not -1, None without targets. With a cache, idx continues the sequence that it
        holds. ValueError if the sequence is empty or longer than block_size or the cache."""
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"expected ids of shape (B, T) with T at least 1, got {tuple(idx.shape)}")
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"a sequence of {end} tokens exceeds block_size {self.config.block_size}")
        if cache is not None and end > cache.capacity:
            raise ValueError(f"a sequence of {end} tokens exceeds the cache's capacity {cache.capacity}")

        x = self.drop(self.wte(idx) + self.wpe.weight[start:end])  # (B, T, C): what the token is, and where it is
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length = end
        if last_only:
            x = x[:, -1:]  # only the newest position's logits are wanted, so the head's V rows act on it alone
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # log-sum-exp loses too much in bf16
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        """Forgets the positions from block_size on. ValueError if there are not as many."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"block_size {block_size} is not between 1 and the model's {self.config.block_size}")
        self.config.block_size = block_size
        self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size].detach().clone(), freeze=False)

    def set_dropout(self, dropout):
        """Changes the dropout of every layer."""
        self.config.dropout = dropout
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, CausalSelfAttention):
                module.dropout = dropout

    @torch.no_grad()
    def attention_maps(self, idx):
        """idx (B, T) -> the weights of every layer and head, (L, B, nh, T, T), without dropout. Row t says how much
        position t takes from each position."""
        was_training = self.training
        self.eval()
        x, maps = self.wte(idx) + self.wpe.weight[:idx.size(1)], []
        for block in self.h:  # each block's attention is computed twice, once with its weights kept: simple, and seldom used
            maps.append(block.attn(block.ln_1(x), return_weights=True)[1])
            x = block(x)
        self.train(was_training)
        return torch.stack(maps)

    def num_parameters(self, embeddings=True):
        """The number of parameters; tied matrices count once. Without embeddings: less wte and wpe."""
        n = sum(p.numel() for p in self.parameters())
        return n if embeddings else n - self.wte.weight.numel() - self.wpe.weight.numel()

    def flops_per_token(self, T):
        """Floating-point operations to train on one token of a sequence of T: 6 for each parameter that multiplies
        (2 forward, 4 backward; wpe only adds), and 12 * n_layer * n_embd * T for the scores and the weighted sums
        (Chowdhery et al. 2022, PaLM, appendix B)."""
        return 6 * (self.num_parameters() - self.wpe.weight.numel()) + 12 * self.config.n_layer * self.config.n_embd * T

    # --- generation ---

    def prefill(self, idx, cache=None):
        """Reads a whole prompt (B, T) at once, which is bound by arithmetic -> logits for the next token (B, V)."""
        return self(idx, cache=cache, last_only=True)[0][:, -1]

    def decode_one_token(self, token, cache):
        """Reads one more token (B,) -> logits for the next (B, V). Bound by memory: each weight is read once."""
        if self.compiled_step is None:
            return self(token[:, None], cache=cache, last_only=True)[0][:, -1]
        cache.position.fill_(cache.length)
        cache.length += 1
        return self.compiled_step(token, cache)

    def decode_step(self, token, cache):
        """decode_one_token for the compiler: `forward` with the position in a tensor, so that one compiled program (on
        CUDA one graph) serves every position."""
        x = self.wte(token[:, None]) + self.wpe(cache.position)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        return self.lm_head(self.ln_f(x))[:, -1]

    def for_inference(self, dtype="float32", compile=False):
        """Prepares the model, on whatever device it is, for generation: weights in dtype, "float32", "bfloat16", or "int8"
        for the linear layers' (the rest stays as it is; a row's error is at most 1/254 of its largest weight); with
        compile, the step for one token is compiled when it is first taken. Returns the model."""
        on_cuda = self.wte.weight.device.type == "cuda"
        if dtype != "int8":
            self.to(getattr(torch, dtype))
        for module in self.modules():
            if isinstance(module, Linear) and dtype == "int8":
                module.quantize()
            elif isinstance(module, Linear) and dtype == "float32" and not compile and has_onednn(module.weight):
                module.pack()
        how = dict(dynamic=False, isolate_recompiles=True, recompile_limit=64)  # a program for each cache size and batch
        if compile and on_cuda:
            self.compiled_step = torch.compile(self.decode_step, mode="reduce-overhead", **how)
        elif compile:
            # Left alone, the compiler writes each layer norm into the loop of the product after it, and so computes it anew
            # for every row. Counted as this many operations, it is stored once instead, and the product's own are not.
            options = {"realize_opcount_threshold": 12 if dtype == "bfloat16" else 8}
            self.compiled_step = torch.compile(self.decode_step, options=options, **how)
        return self

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
                 eos_id=None, num_samples=1, use_cache=True, generator=None):
        """idx (B, T) -> (B * num_samples, T + n), n <= max_new_tokens: the prompts and what follows them. The
        arguments are those of `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, repetition_penalty,
                             eos_id, num_samples, use_cache, generator)
        return torch.cat([idx.repeat_interleave(num_samples, dim=0)] + [t[:, None] for t in tokens], dim=1)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
               eos_id=None, num_samples=1, use_cache=True, generator=None):
        """Yields the new ids of each step, (B * num_samples,): the first num_samples of them continue the first row of
        idx (B, T), the next the second, and so on. Stops after max_new_tokens, or when every row has produced eos_id;
        rows that have are padded with it. temperature 0 takes the likeliest token. use_cache=False re-encodes everything at every step: slow,
        the reference. ValueError for an argument out of range or an id outside the vocabulary."""
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"expected a prompt of shape (B, T) with T at least 1, got {tuple(idx.shape)}")
        if not 0 <= int(idx.min()) <= int(idx.max()) < self.config.vocab_size:
            raise ValueError(f"the prompt's ids reach from {int(idx.min())} to {int(idx.max())}, "
                             f"outside the vocabulary of {self.config.vocab_size}")
        return self._stream(idx, max_new_tokens, (temperature, top_k, top_p, repetition_penalty, generator),
                            eos_id, num_samples, use_cache)

    @torch.no_grad()
    def _stream(self, idx, max_new_tokens, sampling, eos_id, num_samples, use_cache):
        block_size = self.config.block_size
        was_training = self.training
        self.eval()
        try:
            window = idx[:, -block_size:]  # what the model sees of the sequence
            cache = None
            if use_cache:
                capacity = window.size(1) + max_new_tokens
                if self.compiled_step is not None:
                    capacity = 2 ** math.ceil(math.log2(capacity))  # few sizes, since each is compiled for
                capacity = min(block_size, capacity)
                cache = KVCache(self.config, idx.size(0), capacity, idx.device, self.compute_dtype())
            logits = self.prefill(window, cache).repeat_interleave(num_samples, dim=0)
            idx = idx.repeat_interleave(num_samples, dim=0)
            window = window.repeat_interleave(num_samples, dim=0)
            if use_cache:
                cache = cache.repeat(num_samples)  # the prompt was read once, whatever the number of samples
            done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
            for step in range(max_new_tokens):
                token = sample(logits, idx, *sampling)  # (B,)
                if eos_id is not None:
                    token = token.masked_fill(done, eos_id)
                    done |= token == eos_id
                yield token
                if step == max_new_tokens - 1 or (eos_id is not None and bool(done.all())):
                    break
                idx = torch.cat((idx, token[:, None]), dim=1)
                if window.size(1) < block_size:
                    window = torch.cat((window, token[:, None]), dim=1)
                    logits = self.decode_one_token(token, cache) if use_cache else self.prefill(window)
                else:
                    # The window is full. Positions are absolute, so cached keys cannot slide: start again from the
                    # newest half. That costs one prefill every block_size / 2 tokens, not one every token.
                    window = idx[:, -max(1, block_size // 2):]
                    if use_cache:
                        cache.length = 0
                    logits = self.prefill(window, cache)
        finally:
            self.train(was_training)

    def compute_dtype(self):
        """The dtype of the activations: autocast's where it is on, else the weights'."""
        weight = self.wte.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype


# --- sampling: a chain of functions on logits (B, V), each defined as Hugging Face's logits processor for the purpose ---

def check_sampling(temperature, top_k, top_p, repetition_penalty):
    """ValueError if an argument is out of its range."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not 0.0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be a number above 0, got {repetition_penalty}")


def penalize_repetition(logits, ids, penalty):
    """Makes the tokens that occur in ids (B, T) less likely, each once: a positive logit is divided by the penalty,
    a negative one multiplied (Keskar et al. 2019, CTRL, section 4.1)."""
    seen = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def scale_temperature(logits, temperature):
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def keep_top_k(logits, k):
    """All but the k largest logits become -inf; ties with the k-th stay."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits, p):
    """All but the smallest set of tokens whose probability reaches p become -inf (Holtzman et al. 2020, nucleus
    sampling); at least one token stays."""
    probs = F.softmax(logits, dim=-1)
    # Sorting a large vocabulary costs more than the rest of sampling together. But tokens below (1 - p) / V hold, all of
    # them together, less than 1 - p, so they go in any case, and mostly few are left to be sorted.
    columns = (probs >= (1.0 - p) / logits.size(-1)).any(dim=0).nonzero().squeeze(1)
    order = logits[:, columns].argsort(dim=-1)
    ascending = probs[:, columns].gather(1, order)
    below = probs.index_fill(1, columns, 0.0).sum(dim=-1, keepdim=True)
    drop = below + ascending.cumsum(dim=-1) <= 1.0 - p  # from the least likely up, while all so far hold no more than 1 - p
    drop[:, -1] = False
    kept = logits[:, columns].masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return torch.full_like(logits, float("-inf")).index_copy(1, columns, kept)


def sample(logits, ids, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, generator=None):
    """logits (B, V) and the ids (B, T) that led there -> the next ids (B,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if repetition_penalty != 1.0:
        logits = penalize_repetition(logits, ids, repetition_penalty)
    if temperature <= 1e-8:
        return logits.argmax(dim=-1)
    logits = scale_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator).squeeze(1)
