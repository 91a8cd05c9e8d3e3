"""The same model, faster. This file is about machines. If you want to learn about GPTs, you can skip it.

    for_training(model)                                    # train.py calls it
    for_inference(model, dtype="bfloat16", compile=True)   # sample.py calls it

Both change the model in place and return it: a layer's class becomes a subclass that computes the same, but faster.

    layer of model.py      becomes           because                                                        gain
    CausalSelfAttention    FusedAttention    PyTorch's fused kernel never stores the T x S scores           1.8x
                                             (but a CPU in bfloat16 trains faster with the plain code)      1.1x
                           CompiledAttention compiled: loops that read only what is filled of the cache     unmeasured
    nn.Dropout on a CPU    FastDropout       16 random bits decide as well as a float, and cost less        1.6x
    nn.GELU on a CPU       FastGELU          PyTorch computes a sigmoid three times as fast as a tanh       1.6x
    nn.Linear on a CPU     FastLinear        without gradients, oneDNN is faster than MKL in float32        1.2x
                           SplitLinear       MKL multiplies one row faster if each thread has its own part  2.0x
                           PackedLinear      compiled, for several rows: weights in the order of their use  2.1x
    nn.Linear              Int8Linear        a weight takes one byte instead of four                        3.6x
                           Int8KernelLinear  not compiled: a kernel reads each weight once, as int8         2.2x
    lm_head on CUDA        PaddedLinear      a GPU's fast kernels want multiples of 64 outputs              1.5x
    GPT, compiled          LossOnly          a training step need not store logits that nobody reads        1.04x
    small steps on CUDA    CUDA graphs       to start a kernel takes longer than to run it                  2.1x
    decode_one_token       flat_step         in a small model, calls of modules take a third of the time    1.4x
                           compiled          one loop reads each weight once, whatever its dtype            1.4x
    memory on Linux        kept              what is freed and needed again does not go back to the system  2.0x

    python fast.py   # measures the gains on this machine's CPU, but not that of memory

The gains above are from two cores of an AMD EPYC (Zen 3), each the median of one to six runs, with these exceptions.
Those of bfloat16, of memory and of PackedLinear are from a Zen 4. Those of a training step on CUDA are from an NVIDIA
H200: docs/scaling.md and docs/training.md have the commands. PaddedLinear gains almost nothing if the step is compiled.
oneDNN and MKL are the libraries that multiply matrices for PyTorch on a CPU. The gains of SplitLinear and
Int8KernelLinear are those of a single row. For PackedLinear, it is that of a step with eight. The compiled step (in
float32), PackedLinear and Int8Linear (compiled) are compared with what is not compiled, in float32. Int8KernelLinear is
compared with Int8Linear (not compiled). FastGELU's gain is that in float32; in bfloat16, it is 1.4x on a Zen 4. The
gain of kept memory is that of a training step on byte pairs, with and without the call of keep_memory:

    python bench_train.py config/train_shakespeare_char.py --dataset=shakespeare

The gains of attention, dropout and GELU are measured without it. With it, FusedAttention gains less, since the memory
that it saves then costs less time.

model.py has the last word. Only layers of exactly the class in the table are replaced. Before that, each attention, one
GELU and one linear layer are compared with their replacements. (Only the tests compare FastDropout.) The
outputs of the whole model are compared before and after its attention is replaced. If something differs, because
someone has changed model.py, the plain layer stays, and one line on standard error says so. flat_step is compared with
GPT.forward in the same way, when it first runs, and steps aside if a module has a hook. The compiled step runs
GPT.forward itself.
"""
import os

turns = 15    # measurements of each function; medians are shown

if __name__ == "__main__":  # settings are read before the heavy imports, so that --help and a typo answer at once
    exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())
    from files import check
    check(config, "at least 1", lambda x: x >= 1, "turns")

import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import io
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from device import has_fast_bfloat16, missing_compiler
from distributed import is_distributed
from files import UserError, write_atomically
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, causal_mask

# --- attention ---


class FusedAttention(CausalSelfAttention):
    """Attention by `F.scaled_dot_product_attention`, wherever that is faster than writing it out."""

    def attend(self, q, k, v, positions):
        """q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs). The T queries are the newest of S positions."""
        T, S = q.size(-2), k.size(-2)
        if T == 1 and not self.training:  # the newest position may see every key
            return F.scaled_dot_product_attention(q, k, v)
        dropout_p = self.attn_dropout.p if self.training else 0.0
        if q.device.type == "cpu" and (dropout_p > 0.0 or (q.dtype == torch.bfloat16 and q.requires_grad)):
            # The CPU's fused kernel has no dropout, and its backward pass in bfloat16 is slow.
            return super().attend(q, k, v, positions)
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        mask = causal_mask(positions, S, q.dtype)  # is_causal=True would treat the first query as position 0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


class CompiledAttention(CausalSelfAttention):
    """Attention for a model whose decoding is compiled. A StaticCache returns its whole capacity, and not all of it is
    filled yet."""

    def attend(self, q, k, v, positions):
        """q (B, nh, T, hs), k and v (B, nh, S, hs) -> (B, nh, T, hs)."""
        T, S = q.size(-2), k.size(-2)
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if T > 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(positions, S, q.dtype))
        mask = 0.0
        if q.device.type == "cpu":  # read what is filled, and no more
            filled = positions.item() + 1
            torch._check(1 <= filled)  # the compiler must know the limits of a number that it does not know
            torch._check(filled <= S)
            k, v = k.narrow(2, 0, filled), v.narrow(2, 0, filled)
        else:  # in a CUDA graph, no shape may change
            mask = causal_mask(positions, S, torch.float32)
        # For one query the compiler turns sums into loops that read each key and value once.
        scores = (stored(q.float()) * k.float()).sum(-1) / math.sqrt(q.size(-1))          # (B, nh, S)
        weights = F.softmax(scores + mask, dim=-1)                                        # (B, nh, S)
        return (weights[..., None] * v.float()).sum(-2, keepdim=True).to(q.dtype)         # (B, nh, 1, hs)


# --- dropout ---

class FastDropout(nn.Dropout):
    """Dropout that decides with 16 random bits per number, so p is rounded to a multiple of 1/65536. On a CPU,
    F.dropout draws a float per number, which takes longer than the layers around it."""

    def forward(self, x):
        """x -> x with each number zeroed with probability p and the others divided by 1 - p, in training."""
        if not self.training or self.p in (0.0, 1.0):
            return super().forward(x)
        # One random 64-bit integer gives four of 16 bits, which are uniform from -2^15 to 2^15 - 1.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        keep = bits[:x.numel()].view(x.shape) >= min(round(self.p * 2 ** 16), 2 ** 16 - 1) - 2 ** 15
        return x * (keep.to(x.dtype) / (1.0 - self.p))


# --- GELU ---

class SigmoidGELU(torch.autograd.Function):
    """GELU in GPT-2's approximation, 0.5 x (1 + tanh(u)), where 2 u = a x + b x^3. It equals x * sigmoid(2 u). The
    derivative needs the same sigmoid, so it is computed along with the output, and kept in place of x. Both are
    computed in float32, and the derivative is kept in it: rounded to bfloat16, it would give a less exact gradient than
    PyTorch's. There is no second derivative."""
    a = 2 * math.sqrt(2 / math.pi)
    b = 0.044715 * a

    @staticmethod
    def sigmoid(x):
        """x -> 2 u and its sigmoid."""
        u2 = torch.addcmul(torch.tensor(SigmoidGELU.a), x, x, value=SigmoidGELU.b).mul_(x)
        return u2, torch.sigmoid(u2)

    @staticmethod
    def forward(ctx, x):
        """x -> GELU(x)."""
        wide = x.float()  # x itself, if it is in float32
        u2, s = SigmoidGELU.sigmoid(wide)
        # The derivative is s + x s (1 - s) (a + 3 b x^2), in which x (a + 3 b x^2) = 3 (2 u - 2/3 a x).
        u2.add_(wide, alpha=-2 / 3 * SigmoidGELU.a)
        y = wide * s if wide is x else wide.mul_(s).to(x.dtype)
        torch.ops.aten.sigmoid_backward(u2, s, grad_input=u2)  # u2 * s * (1 - s), in place
        ctx.save_for_backward(s.add_(u2, alpha=3))
        return y

    @staticmethod
    def backward(ctx, grad):
        """The gradient of the output -> that of x. RuntimeError if a second derivative is wanted (create_graph)."""
        if torch.is_grad_enabled():
            raise RuntimeError("FastGELU has no second derivative; fast.restore(model) undoes for_training")
        return (grad * ctx.saved_tensors[0]).to(grad.dtype)


class FastGELU(nn.GELU):
    """GELU by a sigmoid, in float32 or, with gradients, in bfloat16. On a CPU, PyTorch computes a sigmoid three times
    as fast as a tanh."""

    @staticmethod
    def suits(layer):
        """Whether the layer is GPT-2's GELU."""
        return layer.approximate == "tanh"

    def forward(self, x):
        """x -> GELU(x)."""
        if x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling():
            if x.requires_grad and torch.is_grad_enabled():
                return SigmoidGELU.apply(x)
            if x.dtype == torch.float32:
                return x * SigmoidGELU.sigmoid(x)[1]
        return super().forward(x)


# --- the loss ---

class LossOnly:
    """What a model that is prepared for training does differently; mixed into its class. A compiled function stores all
    that it returns. Logits that nobody reads would be stored in float32, and so would their gradient, which is zero."""

    def forward(self, idx, targets=None, *args, **kwargs):
        """As GPT.forward, but (None, loss) in compiled code, if there are targets."""
        found = super().forward(idx, targets, *args, **kwargs)
        return (None, *found[1:]) if torch.compiler.is_compiling() and targets is not None else found


# --- linear layers ---

INSTRUCTIONS = torch.backends.cpu.get_cpu_capability()  # the processor's vector instructions, such as AVX2 or AVX512


def stored(x):
    """x, computed once and stored. Otherwise, the compiler computes it anew wherever it is used, such as a layer norm
    for each output of the linear layer after it."""
    if x.device.type != "cpu":
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    return x.as_strided(x.shape, x.stride())  # strides need a tensor in memory


def few_rows(x, weight, scale=None, bias=None, out=None):
    """The linear layer for a few rows x (..., in), as sums. Decoding multiplies one row per sequence: two operations
    for each weight that it reads. Kernels made for many rows stay far below the memory's bandwidth there. The compiler
    turns these sums into one loop over the weight, in whatever dtype it is stored. The weight is (out, in). It may
    also be that of a PackedLinear. Then the first `out` outputs are returned, since the others are filled up."""
    packed = weight.dim() == 4
    n = weight.size(3) if packed else word_size(weight)
    words = weight.flatten(2) if packed else weight
    rows = stored(x.float().reshape(-1, 1, x.size(-1)))
    if n > 1:
        words, rows = words.view(torch.float32), stored(rows.unflatten(-1, (-1, n)).squeeze(1).mT)
    rows = rows[..., None] if packed else rows  # (rows, n, in / n) or (rows, n, in / n, 1)
    # An addition takes a CPU several cycles, but it can start another one in each cycle. So several sums are under way
    # at once: those of the rows, times those of up to four parts of the weight.
    together = min(4, max(1, (16 if packed else 4) // len(rows))) if x.device.type == "cpu" else 1
    parts = words.split(max(1, len(words) // together))
    y = torch.stack([torch.cat([words_times_row(part, row) for part in parts]).flatten() for row in rows])[:, :out]
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def word_size(weight):
    """How many numbers of a weight (out, in) few_rows reads at once: as many as 32 bits hold, or one. With AVX2, the
    compiler's code takes a detour through memory to load int8, and needs more instructions than necessary to load
    bfloat16. But it loads float32 well."""
    narrow = weight.device.type == "cpu" and INSTRUCTIONS == "AVX2" and weight.dtype in (torch.int8, torch.bfloat16)
    return 4 // weight.itemsize if narrow and weight.size(1) * weight.itemsize % 4 == 0 else 1


def words_times_row(words, columns):
    """A weight in words of n numbers, (out, in / n), times a row whose columns are sorted by their place in a word,
    (n, in / n) -> (out,). If n is 1, a word is simply a number. Otherwise it is a float32 that holds four int8 or two
    bfloat16. A packed weight is (out / lanes, in / n, lanes), the columns are then (n, in / n, 1), and the result is
    (out / lanes, lanes)."""
    if len(columns) == 1:
        numbers = [words.float()]
    elif len(columns) == 2:  # a bfloat16 is the upper half of a float32
        words = words.view(torch.int32)
        numbers = [(words << 16).view(torch.float32), (words & -2 ** 16).view(torch.float32)]
    else:
        words = words.view(torch.int32)
        numbers = [((words << (24 - 8 * i)) >> 24).float() for i in range(4)]
    products = [number * column for number, column in zip(numbers, columns, strict=True)]
    return functools.reduce(torch.add, products).sum(dim=1)


class FastLinear(nn.Linear):
    """A linear layer that uses oneDNN in float32 if no gradient is needed. In compiled code, it multiplies a single row
    by few_rows."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if torch.compiler.is_compiling():
            single = x.numel() == self.in_features
            return few_rows(x, self.weight, None, self.bias) if single else super().forward(x)
        if (x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
                and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")):
            # oneDNN's multiplication in float32 has no public name. F.linear uses it for bfloat16, and MKL for float32.
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class PackedLinear(nn.Linear):
    """A linear layer for compiled decoding of 2 to 16 rows. It has a copy of the weight in blocks of `lanes` outputs,
    (out / lanes, in, lanes), so the processor loads the weights of one input into a vector, and multiplies all of them
    by the same number of a row. With a weight (out, in), it would multiply by other numbers each time, and those of
    all rows do not fit into its first cache."""

    lanes = {"AVX512": 16, "AVX2": 8}.get(INSTRUCTIONS, 4)  # float32 numbers in a vector

    def prepare(self):
        """Copies the weight, filled up by zeros to a multiple of `lanes` outputs. Words of n numbers stay together:
        (out / lanes, in / n, lanes, n)."""
        n = word_size(self.weight)
        weight = F.pad(self.weight.detach(), (0, 0, 0, -self.out_features % self.lanes))
        weight = weight.reshape(-1, self.lanes, self.in_features // n, n).transpose(1, 2)
        self.register_buffer("packed", weight.contiguous())

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        return few_rows(x, self.packed, getattr(self, "scale", None), self.bias, self.out_features)


class SplitLinear(FastLinear):
    """A large linear layer that multiplies a single row by torch.bmm, in which each thread takes a part of the float32
    weight. PyTorch has nothing faster for one row. Memory is read faster if the rows of a part are long. So a weight
    with at least as many inputs as outputs is split by outputs. Any other is stored as its transpose (in, out) and
    split by inputs, and the outputs of the parts are added. The price is that oneDNN takes somewhat longer for several
    rows."""

    smallest = 2 ** 18  # weights in the smallest layer that is worth it

    @classmethod
    def suits(cls, layer):
        """Whether the layer is large enough."""
        return layer.weight.numel() >= cls.smallest

    def prepare(self):
        """Splits the weight. Its shape stays (out, in)."""
        weight, out = self.weight.detach(), self.out_features
        bias = torch.zeros(out) if self.bias is None else self.bias.detach()
        self.by_outputs = self.in_features >= out
        size = out if self.by_outputs else self.in_features
        n = max(n for n in range(1, torch.get_num_threads() + 1) if size % n == 0)
        if self.by_outputs:
            self.parts = weight.contiguous().view(n, -1, self.in_features).mT  # (n, in, out / n)
            self.start = bias.reshape(n, 1, -1)                                # (n, 1, out / n)
        else:
            weight = weight.t().contiguous()
            self.parts = weight.view(n, -1, out)                               # (n, in / n, out)
            self.start = F.pad(bias[None, None], (0, 0, 0, 0, 0, n - 1))       # (n, 1, out): the bias, then zeros
            self.weight = nn.Parameter(weight.t(), requires_grad=False)        # in the memory of the parts
            if self.bias is not None:
                self.bias = nn.Parameter(self.start[0, 0], requires_grad=False)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if x.shape[:-1] != (1, 1):
            many = INSTRUCTIONS == "AVX2" and x.numel() >= 128 * x.size(-1)  # rows for which MKL is faster than oneDNN
            return F.linear(x, self.weight, self.bias) if many else super().forward(x)
        # The row of one token. The weights push all else out of the processor's caches, so even a small operation takes
        # long here, and there are as few as possible.
        n = len(self.parts)
        if self.by_outputs:
            return torch.baddbmm(self.start, x.expand(n, -1, -1), self.parts).view(1, 1, -1)
        return torch.baddbmm(self.start, x.reshape(n, 1, -1), self.parts).sum(dim=0, keepdim=True)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("parts", "start")}

    def __setstate__(self, state):  # so the parts of a copy are in the memory of its weight, too
        super().__setstate__(state)
        self.prepare()


class PaddedLinear(nn.Linear):
    """A linear layer that computes with its weight padded by zeros to a multiple of 64 rows, and drops what is extra. A
    GPU's fast kernels want such multiples, and GPT-2's vocabulary, 50257, is odd. The parameter stays as it is."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        weight = F.pad(self.weight, (0, 0, 0, -self.out_features % 64))
        return F.linear(x, weight)[..., :self.out_features]


class Int8Linear(nn.Linear):
    """A linear layer with an int8 weight and one scale for each output: each row of the weight is divided by its
    largest magnitude / 127 and rounded, so an entry is off by at most 1/254 of the row's largest."""

    def prepare(self):
        """Replaces the weight."""
        weight = self.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1).clamp(min=1e-12) / 127)
        weight = (weight / self.scale[:, None]).round().to(torch.int8).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def rounded(self):
        """The weight (out, in) in float32, as the layer computes with it."""
        return self.weight * self.scale[:, None]

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if torch.compiler.is_compiling() and x.numel() <= 8 * x.size(-1):
            return few_rows(x, self.weight, self.scale, self.bias)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8KernelLinear(Int8Linear):
    """A large Int8Linear in a model that is not compiled. On a CPU, it multiplies few rows by PyTorch's kernel for int8
    weights. The kernel reads each weight once, but it is fast only if its input and output are bfloat16."""

    smallest = 2 ** 18  # weights in the smallest layer that is worth it

    @classmethod
    def suits(cls, layer):
        """Whether the kernel is worth it for the layer, and can read its weight. The kernel reads rows in whole vectors
        and does not check that a row ends with one. 64 is a multiple of every vector's length."""
        weight = layer.weight
        return weight.device.type == "cpu" and weight.numel() >= cls.smallest and weight.size(1) % 64 == 0

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if not 0 < x.numel() <= 16 * self.in_features or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        ones = torch.ones_like(self.scale, dtype=torch.bfloat16)  # the scale itself need not be rounded
        y = torch._weight_int8pack_mm(rows, self.weight, ones).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


# --- decoding without calls of modules ---

def flat_step(model):
    """GPT.decode_one_token as a single function, (token, cache) -> logits. For one token, a small model spends a third
    of its time in PyTorch's code around the forward of a module, and in reshaping. So this calls the forwards directly
    and reshapes as little as possible."""
    n_head, hs = model.config.n_head, model.config.n_embd // model.config.n_head
    wte, wpe, ln_f, lm_head = (layer.forward for layer in (model.wte, model.wpe, model.ln_f, model.lm_head))
    blocks = [[layer.forward for layer in (block.ln_1, block.attn.c_attn, block.attn.c_proj,
                                           block.ln_2, block.mlp.c_fc, block.mlp.gelu, block.mlp.c_proj)]
              for block in model.h]

    def step(token, cache):
        """token (B,) -> logits (B, V)."""
        x = wte(token[:, None]) + wpe(cache.positions(1))                           # (B, 1, C)
        for layer, (ln_1, c_attn, attn_proj, ln_2, c_fc, gelu, mlp_proj) in enumerate(blocks):
            q, k, v = c_attn(ln_1(x)).view(len(token), 3, n_head, 1, hs).unbind(1)  # (B, nh, 1, hs)
            k, v = cache.append(layer, k, v)                                        # (B, nh, S, hs)
            x = x + attn_proj(F.scaled_dot_product_attention(q, k, v).reshape(x.shape))
            x = x + mlp_proj(gelu(c_fc(ln_2(x))))
        cache.length += 1
        return lm_head(ln_f(x))[:, -1]                                              # (B, 1, V) -> (B, V)
    return step


@torch.no_grad()
def compared_step(model):
    """The function that flat_step makes of the model or, if model.py was changed and computes something else, None. A
    step that knows only some of the parameters and buffers is not used: others may change nothing as long as they are
    0. Nor is one for another attention than FusedAttention."""
    try:
        used = [model.wte, model.wpe, model.ln_f, model.lm_head]
        for block in model.h:
            used += [block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj]
        known = {id(t) for layer in used for t in (*layer.parameters(), *layer.buffers())}
        if (all(type(block.attn) is FusedAttention for block in model.h)
                and known >= {id(t) for t in (*model.parameters(), *model.buffers())}
                and same_steps(model, model.plain_step) and same_steps(*loud(model))):
            return flat_step(model)
    except Exception:
        pass
    return stay_plain(GPT.decode_one_token, flat_step)


def same_steps(model, plain_step):
    """Whether flat_step computes what plain_step does, for the first position and for the last, where the cache holds
    random keys and values, and for up to 64 tokens, among them the first and the last of the vocabulary."""
    V, g = model.config.vocab_size, torch.Generator().manual_seed(0)
    token = torch.linspace(0, V - 1, V if V <= 64 else 2).long().to(model.wte.weight.device)
    cache = model.new_cache(len(token))
    k, v = (6 * torch.randn(cache.k[0].shape, generator=g).to(cache.k[0]) for _ in range(2))
    cache.k, cache.v = [k] * len(cache.k), [v] * len(cache.v)
    step = flat_step(model)
    for length in (0, cache.capacity - 1):
        cache.length = length
        expected = plain_step(token, cache)
        cache.length = length
        if not same(step(token, cache), expected, None if k.dtype == torch.float32 else 2 ** -6):
            return False
    return True


def loud(model):
    """A small model of the same class and its decode_one_token. Its weights are random and large, so that its numbers
    reach any limit that someone has set in model.py."""
    plain_class = next(c for c in type(model).__mro__ if not issubclass(c, Prepared))
    c = model.config
    heads, hs = min(c.n_head, 2), min(c.n_embd // c.n_head, 16)
    with torch.random.fork_rng(devices=[]):
        small = plain_class(dataclasses.replace(c, n_layer=min(c.n_layer, 2), n_head=heads, n_embd=heads * hs,
                                                vocab_size=min(c.vocab_size, 64), block_size=min(c.block_size, 16)))
    g = torch.Generator().manual_seed(0)
    for p in small.parameters():
        p.copy_(10 * torch.randn(p.shape, generator=g))
    for block in small.h:
        become(block.attn, FusedAttention)
    small.to(model.wte.weight.device).eval()
    return small, small.decode_one_token


# --- compiled decoding ---

class StaticCache(KVCache):
    """A cache for compiled code. Its length is a tensor, and `append` returns the whole capacity, so nothing that the
    compiler sees of it changes from token to token. The attention finds out from the positions what is filled."""

    def __init__(self, *args, spare=None):
        """spare: the tensors of earlier caches that nobody uses any more, {shape: [those of a cache, ...]}."""
        super().__init__(*args)
        self.length = torch.zeros(1, dtype=torch.long, device=self.k[0].device)
        self.spare = {} if spare is None else spare
        self.settle()

    def settle(self):
        """On CUDA, moves to the memory of an earlier cache of this shape, if there is one that nobody uses any more. A
        CUDA graph contains addresses, so other memory would need another graph."""
        if not self.length.is_cuda:
            return
        n, here = len(self.k), [*self.k, *self.v, self.length]
        unused = self.spare.setdefault(self.k[0].shape, [])
        tensors = unused.pop() if unused else here
        for tensor, new in zip(tensors, here, strict=True):
            tensor.copy_(new)
        self.k, self.v, self.length = tensors[:n], tensors[n:-1], tensors[-1]
        for tensor in tensors:  # tells the compiler that the address stays; otherwise it does not use CUDA graphs
            torch._dynamo.mark_static_address(tensor, guard=False)
        weakref.finalize(self, unused.append, tensors)

    def positions(self, T):
        """The positions (T,) of the next T tokens. ValueError on a CPU if there is no room for them. On a GPU, this
        check would wait for all the work before it, so there is none."""
        if not torch.compiler.is_compiling() and self.length.device.type == "cpu":
            self.check_room(T)
        return self.length + torch.arange(T, device=self.length.device)

    def check_room(self, T):
        """ValueError if there is no room for T more tokens."""
        end = self.length.item() + T
        if end > self.capacity:
            raise ValueError(f"a sequence of {end} tokens exceeds the cache's capacity {self.capacity}")

    def append(self, layer, k, v):
        """Stores the keys and values (B, nh, T, hs) of T new positions; returns (B, nh, capacity, hs)."""
        positions = self.positions(k.size(2))
        self.k[layer].index_copy_(2, positions, k)
        self.v[layer].index_copy_(2, positions, v)
        return self.k[layer], self.v[layer]

    def reset(self):
        """Forgets all positions."""
        self.length.zero_()

    def repeat(self, n):
        """A cache that holds every sequence n times, side by side."""
        repeated = super().repeat(n)
        repeated.length = self.length.clone()
        repeated.settle()
        return repeated


# By default, the compiler stores an expression of many operations, even if that is part of a sum over a weight. With
# these options, it stores only what `stored` names and what its own kernels need, and multiplies and adds in one
# instruction.
compiler_options = {"realize_opcount_threshold": 1000, "cpp.enable_floating_point_contract_flag": "fast"}


@functools.cache
def step_compiled_here(device):
    """The step for one token, compiled in this process for each shape of the cache. On CUDA it becomes a CUDA graph."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.capture_scalar_outputs = True  # CompiledAttention has one
    if device == "cuda":
        return torch.compile(Prepared.plain_step, dynamic=False,
                             options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})
    return torch.compile(Prepared.plain_step, options=compiler_options)


class Step(nn.Module):
    """The step for one token as a function of tensors, from which the compiler can make a library, which is a file."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, token, length, k, v):
        """token (B,), and the tensors of a StaticCache, which change -> logits (B, V)."""
        cache = copy.copy(self.cache)
        cache.length, cache.k, cache.v = length, k, v
        return self.model.plain_step(token, cache)


def packed_for(model, cache):
    """The model or, for 2 to 16 sequences, a copy with packed linear layers. All else is shared with the model."""
    if not 1 < cache.k[0].size(0) <= 16:
        return model
    if model not in packed_models:
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        packed_models[model] = copy.deepcopy(model, shared)
        for layer in packed_models[model].modules():
            if type(layer) in (FastLinear, Int8Linear):
                become(layer, PackedLinear)
    return packed_models[model]


def export_step(model, cache):
    """The step for caches of this batch size and, beyond 1, of any capacity, as a graph of operators."""
    example = torch.zeros(cache.k[0].size(0), dtype=torch.long), cache.length, cache.k, cache.v
    shapes = None
    if cache.capacity > 1:
        capacity = [{2: torch.export.Dim("capacity", min=2, max=model.config.block_size)}] * len(cache.k)
        shapes = {"token": None, "length": None, "k": capacity, "v": capacity}
    with contextlib.redirect_stderr(io.StringIO()):  # if it fails, it prints the whole graph
        return torch.export.export(Step(packed_for(model, cache), cache), example, dynamic_shapes=shapes, strict=False)


def make_library(path, model, cache):
    """Compiles the step for caches of this batch size into a library at `path`. The weights are not in it."""
    torch._inductor.aoti_compile_and_package(export_step(model, cache), package_path=str(path), inductor_configs={
        "aot_inductor.package_constants_in_so": False, **compiler_options})


def load_library(path, model, cache):
    """The step in the library at `path`: (model, token, cache) -> logits. It reads the weights where the model has
    them. UserError if it computes something else than model.py does."""
    # The documented way to load it, torch._inductor.aoti_load_package, imports the whole compiler, which takes seconds.
    library = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    used = packed_for(model, cache)
    tensors = dict(used.named_parameters(remove_duplicate=False)) | dict(used.named_buffers(remove_duplicate=False))
    library.load_constants({name: tensors[name.removeprefix("model.")].detach()
                            for name in library.get_constant_fqns()}, False, True, True)

    def step(model, token, cache):
        # A library does not check the shapes and strides of its inputs.
        return library.run([token.to(torch.long).contiguous(), cache.length, *cache.k, *cache.v])[0]

    compare_step(step, model, cache)
    return step


def compare_step(step, model, cache):
    """Compares a compiled step with model.py's: for the first two positions and for the last, where the cache holds
    random keys and values. UserError if they differ."""
    B, capacity = cache.k[0].size(0), cache.capacity
    caches = model.new_cache(B, capacity), super(Prepared, model).new_cache(B, capacity)
    g, vocab_size = torch.Generator().manual_seed(0), model.config.vocab_size
    for i in (0, 1, 2)[:capacity]:
        if i == 2:
            for a, b in zip((*caches[0].k, *caches[0].v), (*caches[1].k, *caches[1].v), strict=True):
                a.copy_(b.copy_(torch.randn(b.shape, generator=g)))
            caches[0].length.fill_(capacity - 1)
            caches[1].length = capacity - 1
        token = torch.full((B,), (0, vocab_size - 1, vocab_size // 2)[i])
        found, expected = step(model, token, caches[0]), model.plain_step(token, caches[1])
        if not same(found, expected, 1e-4 if cache.k[0].dtype == torch.float32 else 0.05):
            raise UserError("model.py was changed, and compiled decoding gives other logits than it does; leave "
                            "--compile out")


LIBRARIES = Path(__file__).resolve().parent / "data" / "compiled"
steps = weakref.WeakKeyDictionary()  # {model: {(batch size, whether the capacity is above 1): its compiled step}}
packed_models = weakref.WeakKeyDictionary()  # {model: its copy for several sequences}
flat_steps = weakref.WeakKeyDictionary()  # {model: its compared_step, the dicts of its modules' hooks, its layers}


def shape_of(cache):
    """The batch size and whether the capacity is above 1. The step is compiled for each of these."""
    return cache.k[0].size(0), cache.capacity > 1


def library_key(model, cache):
    """A name that changes with all that the compiled step depends on, except for the values of the weights: the source
    code of the model's layers, the shapes, PyTorch and the processor, whose instructions another may not have."""
    classes = {c for module in model.modules() for c in type(module).__mro__ if not c.__module__.startswith("torch.")}
    files = {inspect.getsourcefile(c) for c in classes if c is not object}
    code = [Path(file).read_text(encoding="utf-8") for file in sorted(files)]
    processor = [platform.platform(), platform.processor(), INSTRUCTIONS]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:  # Linux
        processor += sorted({line for line in f if line.startswith(("model name", "flags", "Features", "CPU part"))})
    shapes = [(name, t.shape, t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())]
    parts = (code, processor, torch.__version__, torch.get_num_threads(), str(model), model.config, model.prepared_as,
             shapes, *shape_of(cache), cache.k[0].dtype)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def library_step(model, cache):
    """The compiled step for caches of this batch size on a CPU. Its library is kept in data/compiled, so that only the
    first process compiles it. One that is damaged, or computes something else than model.py, is not used but made
    anew."""
    key = library_key(model, cache)
    for path in LIBRARIES.glob(f"{key}-*.pt2"):
        with contextlib.suppress(Exception):
            if hashlib.sha256(path.read_bytes()).hexdigest()[:32] == path.stem[-32:]:
                return load_library(path, model, cache)
        with contextlib.suppress(OSError):  # another process may have removed it
            path.unlink()
    if missing := missing_compiler(cache.length.device):
        raise UserError(f"compiled decoding needs {missing}; or leave --compile out")
    with tempfile.TemporaryDirectory() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print("compiling the step for one token, once for this shape and this number of samples; this takes a while",
              file=sys.stderr)
        made = Path(other, "step.pt2")
        make_library(made, model, cache)
        step = load_library(made, model, cache)
        with contextlib.suppress(OSError):  # a disk that is full or read-only costs the next process its time
            data = made.read_bytes()
            write_atomically(LIBRARIES / f"{key}-{hashlib.sha256(data).hexdigest()[:32]}.pt2", data)
    return step


def compiled_step(model, cache):
    """The compiled step for caches like this one: (model, token, cache) -> logits."""
    device = cache.length.device.type
    if device != "cpu":
        return step_compiled_here(device)
    known, shape = steps.setdefault(model, {}), shape_of(cache)
    if shape not in known:
        try:
            known[shape] = library_step(model, cache)
        except UserError:
            raise
        except Exception as e:  # such as a changed model.py, which the compiler cannot export as a whole
            print(f"the compiled step cannot be kept on disk ({type(e).__name__}), so each process compiles it",
                  file=sys.stderr)
            step = step_compiled_here(device)
            compare_step(step, model, cache)
            known[shape] = step
    return known[shape]


class Prepared:
    """What a model that is prepared for inference does differently; mixed into its class."""
    prepared_as = None   # dtype, whether decoding is compiled
    counts = None        # num_parameters(embeddings) of the plain model, whose layers may share weights

    def train(self, mode=True):
        """Only evaluation mode: the weights cannot be trained any more."""
        if mode:
            raise RuntimeError("this model was prepared for inference and cannot train; load it again")
        return super().train(False)

    def num_parameters(self, embeddings=True):
        """The same number as before for_inference."""
        return self.counts[embeddings]

    def new_cache(self, batch_size, length=None):
        """The plain cache or, for compiled decoding, a StaticCache. On a GPU, its length is rounded up to a power of
        two, because the step is compiled for each length there."""
        if not self.prepared_as[1]:
            if self in flat_steps and flat_steps[self][2] != [*self.modules()][1:]:
                del flat_steps[self]  # someone has exchanged a layer
            return super().new_cache(batch_size, length)
        if (cls := type(super().new_cache(1, 1))) is not KVCache:
            raise UserError("compiled decoding has a cache of its own, and model.py was changed to use "
                            f"{cls.__name__}; leave --compile out")
        if length is not None and 0 < length <= self.config.block_size and self.wte.weight.is_cuda:
            length = min(self.config.block_size, 2 ** (length - 1).bit_length())
        return StaticCache(self.config, batch_size, length, self.wte.weight.device, self.wte.weight.dtype,
                           spare=vars(self).setdefault("spare_caches", {}))

    def plain_step(self, token, cache):
        """The model's own decode_one_token."""
        return super().decode_one_token(token, cache)

    def decode_one_token(self, token, cache, *args, **kwargs):
        """The flat step or, with a StaticCache, the compiled one. They know no further arguments."""
        if args or kwargs:
            return super().decode_one_token(token, cache, *args, **kwargs)
        if not isinstance(cache, StaticCache):
            if self not in flat_steps:
                hooks = [d for m in self.modules() for d in (m._forward_pre_hooks, m._forward_hooks)]
                layers = [*self.modules()][1:]  # without the model itself, which could never be freed otherwise
                flat_steps[self] = (None if self.prepared_as[1] else compared_step(self)), hooks, layers
            step, hooks, _ = flat_steps[self]
            if step is None or any(hooks) or token.dim() != 1:  # the plain step says what is wrong with the shape
                return self.plain_step(token, cache)
            return step(token, cache)
        if not token.is_cuda:
            cache.check_room(1)  # compiled code does not check it, nor the shape
        if token.shape != cache.k[0].shape[:1]:
            raise ValueError(f"token must be ({cache.k[0].size(0)},) for this cache, got {tuple(token.shape)}")
        logits = compiled_step(self, cache)(self, token, cache)
        return logits.clone() if token.is_cuda else logits  # the next run of a CUDA graph writes over its outputs


# --- memory ---

def keep_memory():
    """Tells the allocator of Linux (glibc) to keep large pieces of memory that are freed. By default it gives them back
    to the system, which must clear them, page by page, when the next step needs them again. Training on byte pairs
    spends half its time in that, since the logits have 50257 numbers per token. The price is a higher peak of
    memory."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator, or Windows
        return
    for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(parameter, value)


# --- replacing layers, after a comparison ---

def twin(layer, fast):
    """A copy of the layer as the class `fast`. It shares the parameters, but not the dicts that hold them."""
    other = copy.copy(layer)
    other.__dict__ = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
    return become(other, fast)


def become(layer, fast):
    """Gives the layer the class `fast`, in place, and its weight the layout that the class needs."""
    layer.__class__ = fast
    if issubclass(fast, (SplitLinear, PackedLinear, Int8Linear)):
        layer.prepare()
    return layer


@functools.cache
def mixed(mixin, cls):
    """The subclass of `cls` with the methods of `mixin`."""
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})


def mix_in(mixin, model):
    """Gives the model, in place, the methods of `mixin`."""
    model.__class__ = mixed(mixin, type(model))


def same(a, b, tolerance=None):
    """Whether two tensors agree, by default within the rounding of float32, which is coarser on some devices than on a
    CPU."""
    tolerance = tolerance or (1e-4 if a.device.type == "cpu" else 1e-3)
    a, b = a.float(), b.float()
    difference = (a - b).abs().masked_fill(a == b, 0.0)  # -inf, of a token that is never chosen, equals itself
    return bool(difference.max() <= tolerance * max(1.0, b.masked_fill(b == -math.inf, 0.0).abs().max().item()))


@contextlib.contextmanager
def in_full_precision():
    """Without TF32, whose rounding would hide small differences."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.enable_grad()
def same_gelu(plain, fast):
    """Whether two layers without weights have the same outputs and derivatives."""
    x = torch.linspace(-8, 8, 1001, dtype=torch.float32, requires_grad=True)
    y, y_fast = plain(x), fast(x)
    gradient, gradient_fast = (torch.autograd.grad(z.sum(), x)[0] for z in (y, y_fast))
    return same(y_fast, y, 1e-5) and same(gradient_fast, gradient, 1e-5)


def given_heads(layer, device):
    """The number of heads and their size in the queries, the keys and the values that the layer gives to `attend`."""
    found = []

    def attend(q, k, v, positions):
        found.extend((x.size(1), x.size(3)) for x in (q, k, v))
        return type(layer).attend(layer, q, k, v, positions)

    layer.attend = attend
    layer(torch.zeros(1, 1, layer.c_proj.out_features, device=device, dtype=layer.c_proj.weight.dtype))
    del layer.attend
    return found


@torch.enable_grad()
def same_attention(layer, fast, block_size, g, device):
    """Whether an attention of the class `fast` has the same outputs and gradients as this layer. They are compared in
    copies whose parameters and buffers are moved at random, since a new one in model.py may change nothing as long as
    it is 0."""
    original, layer = layer, copy.deepcopy(layer)
    for name, t in (*layer.named_parameters(), *layer.named_buffers()):
        if not name.startswith(("c_attn.", "c_proj.")) and t.is_floating_point():  # `attend` does not use these two
            t.data += torch.randn(t.shape, generator=g).to(t)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    heads = given_heads(layer, device)
    new = twin(layer, fast)
    # A whole sequence, and a chunk and a single token after a long prefix. The factors 6 and 60 make large scores.
    # Together they reveal a limit on the scores or on the distance, if someone has added one to model.py.
    for T, S, size in ((min(16, block_size), min(16, block_size), 6), (min(5, block_size), block_size, 6),
                       (1, block_size, 6), (1, block_size, 60)):
        q, k, v = (torch.randn(1, n_head, n, hs, generator=g).to(device)
                   for n, (n_head, hs) in zip((T, S, S), heads, strict=True))
        q, positions = size * q, torch.arange(S - T, S, device=device)
        for training in (False, True) if fast is FusedAttention and T == S else (False,):
            found = []
            for attention in (new, layer):
                attention.train(training)
                inputs = [x.detach().requires_grad_(training) for x in (q, k, v)]
                y = attention.attend(*inputs, positions)
                found.append([y, *torch.autograd.grad(y.square().sum(), inputs)] if training else [y])
            if not all(same(a, b) for a, b in zip(*found, strict=True)):
                return False
            if training and not same_dropout(original, [q, k, v, positions]):
                return False
    return True


def same_dropout(layer, inputs):
    """Whether attn_dropout, and no other dropout, acts on the weights of this attention. Compares on the CPU. A dropout
    of 1 makes the output zero, and the others, at 1, change nothing. If all features of a value are equal, dropout of
    the weights leaves those of an output equal. Dropout of the values or of the output does not."""
    layer, (q, k, v, positions) = copy.deepcopy(layer).cpu().train(), [x.cpu() for x in inputs]
    used = [module for module in layer.modules() if isinstance(module, nn.Dropout) and module.p > 0.0]
    others = [module for module in used if module is not layer.attn_dropout]

    def output(dropped, p=1.0, v=v):
        for module in used:
            module.p = p * (module in dropped)
        return layer.attend(q, k, v, positions)

    if not same(output(others), output([])):
        return False
    if len(others) == len(used):
        return True
    with torch.random.fork_rng(devices=[]):
        some = output([layer.attn_dropout], 0.5, v[..., :1].expand(v.shape))
    return not output([layer.attn_dropout]).any() and same(some, some[..., :1].expand(some.shape))


def computes_the_same(layer, fast, block_size):
    """Whether a layer of the class `fast` computes the same as this one. False if one of them raises an exception."""
    g, device = torch.Generator().manual_seed(0), next(layer.parameters(), torch.empty(0)).device
    with contextlib.suppress(Exception), in_full_precision():
        new = twin(layer, fast)
        if isinstance(layer, nn.GELU):
            return same_gelu(layer, new)
        if isinstance(layer, nn.Linear):
            if issubclass(fast, Int8Linear):  # the reference has the rounded weight
                layer = twin(layer, nn.Linear)
                layer.weight = nn.Parameter(new.rounded())
            x = torch.randn(3, layer.in_features, generator=g).to(layer.weight)
            tolerance = None
            if fast is Int8KernelLinear:
                x, tolerance = x.bfloat16().float(), 2 ** -8  # only the outputs need to be rounded now
            return all(same(new(rows), layer(rows), tolerance) for rows in (x, x[:1], x[None, :1]))
        return same_attention(layer, fast, block_size, g, device)
    return False


def replace(model, plain, fast):
    """Replaces the layers of exactly the class `plain` that suit the class `fast`, if they compute the same as their
    replacements. It compares every attention, because a changed model.py may have different ones, and then the outputs
    of the model. Of PyTorch's own layers, one is enough. Dropout is random, so only the tests compare it."""
    layers = [module for module in model.modules()
              if type(module) is plain and (not hasattr(fast, "suits") or fast.suits(module))]
    attention = plain is CausalSelfAttention
    compared = [] if fast is FastDropout else layers if attention else layers[:1]
    if not all(computes_the_same(layer, fast, model.config.block_size) for layer in compared):
        return stay_plain(plain, fast)
    expected = outputs(model) if attention and layers else None
    for layer in layers:
        become(layer, fast)
    tolerance = None if model.wte.weight.dtype == torch.float32 else 0.05
    if expected is not None and not same_outputs(outputs(model), expected, tolerance):
        for layer in layers:
            become(layer, plain)
        stay_plain(plain, fast)


def outputs(model):
    """The tensors that the model's forward returns for a few tokens, among them the first and the last of the
    vocabulary. Or None, if it raises an exception. Alone, an attention layer does not show what the model may set in it
    there, such as a mask that depends on the tokens. The model's buffers stay as they are."""
    config, device = model.config, model.wte.weight.device
    ids = torch.arange(min(64, config.block_size), device=device) % config.vocab_size
    ids[len(ids) // 3], ids[len(ids) // 2] = 0, config.vocab_size - 1
    buffers = [(module, name, t, t.clone()) for module in model.modules() for name, t in module._buffers.items()
               if t is not None]
    with torch.random.fork_rng(devices=[]), in_full_precision():
        torch.default_generator.manual_seed(0)  # someone may add noise
        try:
            return [x for x in model(ids[None], ids[None]) if isinstance(x, torch.Tensor)]
        except Exception:
            return None
        finally:
            for module, name, t, before in buffers:
                module._buffers[name] = t.copy_(before)


def same_outputs(found, expected, tolerance):
    """Whether two results of `outputs` agree."""
    return (found is not None and [x.shape for x in found] == [x.shape for x in expected]
            and all(same(a, b, tolerance) for a, b in zip(found, expected, strict=True)))


def replace_head(model):
    """Replaces lm_head by a PaddedLinear, if the vocabulary is no multiple of 64 already."""
    head = getattr(model, "lm_head", None)
    if type(head) is nn.Linear and head.bias is None and head.out_features % 64:
        if computes_the_same(head, PaddedLinear, model.config.block_size):
            become(head, PaddedLinear)
        else:
            stay_plain(nn.Linear, PaddedLinear)


def stay_plain(plain, fast):
    """Prints that a layer is not replaced."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fast.py: {plain.__name__} does not compute what {fast.__name__} does, so it stays as it is in "
              "model.py, which may be slower", file=sys.stderr)


def restore(model):
    """Undoes for_training. RuntimeError after for_inference, which cannot be undone."""
    if isinstance(model, Prepared):
        raise RuntimeError("this model was prepared for inference already; load it again")
    for module in model.modules():
        if type(module) in (FusedAttention, FastDropout, FastGELU, FastLinear, PaddedLinear):
            module.__class__ = type(module).__base__
    if isinstance(model, LossOnly):
        model.__class__ = type(model).__bases__[1]


def for_training(model):
    """Replaces layers by faster ones, in place; also returns the model."""
    restore(model)
    device = model.wte.weight.device.type
    if device == "cpu":
        keep_memory()
    was_training = model.training
    model.eval()  # the comparisons are without dropout
    with torch.no_grad():
        replace(model, CausalSelfAttention, FusedAttention)
        if device == "cpu":
            replace(model, nn.Dropout, FastDropout)
            replace(model, nn.GELU, FastGELU)
            if torch.backends.mkldnn.is_available():
                replace(model, nn.Linear, FastLinear)
        elif device == "cuda":
            replace_head(model)
    mix_in(LossOnly, model)
    return model.train(was_training)


def compiled(model, tokens, micro_steps):
    """The model, compiled for training steps of this many tokens; both have the same weights. On CUDA, the forward pass
    of a small step becomes one CUDA graph, and its backward pass another, because it takes longer to start the kernels
    one by one than to run them. A graph writes its gradients to the same memory each time, so they cannot be added up,
    and there are no graphs for several micro-steps, nor for several processes. Nor are there any for large steps, since
    the memory of a graph is not free for anything else, such as an evaluation."""
    small = tokens * model.flops_per_token(model.config.block_size) < 5e12  # a large GPU takes 10 ms for them
    graphs = small and micro_steps == 1 and not is_distributed
    return torch.compile(model, mode="reduce-overhead" if graphs else "default")


@torch.no_grad()
def for_inference(model, dtype="float32", compile=False):
    """Prepares a model for generation on its device, in place, and returns it. dtype is that of the weights: "float32",
    "bfloat16", "float16", or "int8" (in linear layers only). With compile, the step for one token is compiled when it
    first runs. Afterwards, the model cannot be trained, and its weights must stay as they are, since there may be other
    copies of them. ValueError for another dtype, RuntimeError if the model was prepared already."""
    if dtype not in ("float32", "bfloat16", "float16", "int8"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype!r}")
    restore(model.eval())
    device = model.wte.weight.device
    if device.type == "cpu":
        keep_memory()
    replace(model, CausalSelfAttention, CompiledAttention if compile else FusedAttention)
    target = getattr(torch, "float32" if dtype == "int8" else dtype)
    model._apply(lambda t: t.to(target) if t.is_floating_point() else t)  # model.to would make complex numbers real
    ids = torch.arange(min(8, model.config.block_size), device=device)[None] % model.config.vocab_size
    expected = model(ids)[0] if dtype == "int8" else None
    before = {module: module.weight for module in model.modules() if type(module) is nn.Linear}
    head = getattr(model, "lm_head", None)  # a changed model.py may have none
    counts = {embeddings: model.num_parameters(embeddings) for embeddings in (True, False)}
    if dtype == "int8":
        if not compile:
            replace(model, nn.Linear, Int8KernelLinear)
        replace(model, nn.Linear, Int8Linear)  # those that are left
    elif compile:
        replace(model, nn.Linear, FastLinear)
    elif (dtype == "float32" and device.type == "cpu"
          and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        replace(model, nn.Linear, SplitLinear)
    try:
        logits = model(ids)[0]
        undo = expected is not None and not same(logits, expected, 0.3)  # int8 changes far less than that
    except Exception:
        undo = True
    if undo:  # a changed model.py uses a weight directly, which has another layout now
        for layer, weight in before.items():
            if layer is head:
                stay_plain(nn.Linear, type(layer))
            layer.__class__, layer.weight = nn.Linear, weight
            layer._buffers.pop("scale", None)
            for name in ("parts", "start", "by_outputs"):
                vars(layer).pop(name, None)
    mix_in(Prepared, model)
    model.prepared_as = dtype, compile
    model.counts = counts
    return model


# --- the gains, measured ---

def seconds_of(functions):
    """The median seconds of each function. They take turns, so that a busy moment of the machine hits all alike."""
    times = [[] for _ in functions]
    for turn in range(turns + 2):
        for function, of_it in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn > 1:  # the first two warm up
                of_it.append(time.perf_counter() - start)
    return [statistics.median(of_it) for of_it in times]


def trainer(layer, x, dtype):
    """A function that runs the layer forward and backward."""
    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        y.backward(torch.ones_like(y))
    return run


def measure():
    """Prints how many times as fast each replacement is as what it replaces, on this machine's CPU."""
    torch.manual_seed(0)
    config = GPTConfig(n_head=12, n_embd=768, n_layer=12, dropout=0.1)

    def compare(what, plain, fast):
        a, b = seconds_of((plain, fast))
        print(f"{what:<68}{a * 1e3:9.2f} ms {b * 1e3:9.2f} ms {a / b:6.1f}x", flush=True)

    print(f"{torch.get_num_threads()} threads{'':<59}{'plain':>12}{'fast':>12}")
    x = torch.randn(4, 512, 768, requires_grad=True)
    layer = CausalSelfAttention(config).eval()
    with torch.no_grad():
        fused = twin(layer, FusedAttention)
        compare("FusedAttention: a whole sequence, no gradient", lambda: layer(x), lambda: fused(x))
    compare("FusedAttention: training in float32", trainer(layer, x, None), trainer(fused, x, None))
    if has_fast_bfloat16(x.device):  # train.py does not train in bfloat16 otherwise
        kernel = twin(layer, CompiledAttention)  # always takes the kernel
        compare("FusedAttention: training in bfloat16, against the kernel", trainer(kernel, x, torch.bfloat16),
                trainer(fused, x, torch.bfloat16))
    dropout, wide = nn.Dropout(0.1), torch.randn(4, 512, 3072)
    compare("FastDropout", lambda: dropout(wide), lambda: twin(dropout, FastDropout)(wide))
    gelu, x = nn.GELU(approximate="tanh"), torch.randn(14, 128, 512, requires_grad=True)
    compare("FastGELU: training in float32", trainer(gelu, x, None), trainer(twin(gelu, FastGELU), x, None))
    narrow = x.detach().bfloat16().requires_grad_()
    compare("FastGELU: training in bfloat16", trainer(gelu, narrow, None), trainer(twin(gelu, FastGELU), narrow, None))
    linear = nn.Linear(768, 3072)
    split, row, rows = twin(linear, SplitLinear), torch.randn(1, 1, 768), torch.randn(64, 768)
    with torch.no_grad():
        fast = twin(linear, FastLinear)
        compare("FastLinear: 64 rows in float32", lambda: linear(rows), lambda: fast(rows))
        compare("SplitLinear: 1 row in float32", lambda: linear(row), lambda: split(row))
        compare("SplitLinear: 64 rows in float32", lambda: linear(rows), lambda: split(rows))
        int8, kernel = twin(linear, Int8Linear), twin(linear, Int8KernelLinear)
        compare("Int8KernelLinear: 1 row, against Int8Linear", lambda: int8(row), lambda: kernel(row))
        small = nn.Linear(128, 512)  # a layer of config/train_shakespeare_char.py
        split_small, row = twin(small, SplitLinear), torch.randn(1, 1, 128)
        compare("SplitLinear: 1 row and a weight too small for it", lambda: small(row), lambda: split_small(row))

    def decode(gpt, step=None, rows=1):
        token, cache = torch.zeros(rows, dtype=torch.long), gpt.new_cache(rows, 128)
        return lambda: (cache.reset(), (step or gpt.decode_one_token)(token, cache))

    with torch.no_grad():
        small = for_inference(GPT(GPTConfig(vocab_size=65, block_size=128, n_layer=4, n_head=4, n_embd=128)))
        compare("flat_step: a token of a model of 4 layers and 128 features", decode(small, small.plain_step),
                decode(small))
        model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768)).eval()
        eager = for_inference(copy.deepcopy(model))
        for dtype in ("float32", "bfloat16", "int8"):
            other = for_inference(copy.deepcopy(model), dtype, compile=True)
            compare(f"a token of GPT-2 124M, compiled in {dtype}, against eager float32", decode(eager), decode(other))
            if dtype == "float32":
                compare("PackedLinear: 8 tokens, compiled in float32, against eager float32", decode(eager, rows=8),
                        decode(other, rows=8))


if __name__ == "__main__":
    measure()
