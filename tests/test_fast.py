"""fast.py's layers compute what model.py's do, and its checks would notice if they did not.

Each `check_...` function compares one replacement with the plain layer. The tests call it on fast.py as it is, and once
more with a mistake planted in the replacement, where it must fail.
"""
import copy
import functools
import math
import pickle
import shutil
import types
import weakref
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fast
import model as model_module
from checkpoint import load_weights
from fast import (
    CompiledAttention,
    FastDropout,
    FastGELU,
    FastLinear,
    FusedAttention,
    Int8KernelLinear,
    Int8Linear,
    PackedLinear,
    PaddedLinear,
    SplitLinear,
    StaticCache,
    flat_step,
    for_inference,
    for_training,
    restore,
)
from files import UserError
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, MLP, attention
from test_generate import random_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # from torch.compile itself
DTYPES = torch.float64, torch.float32, torch.bfloat16
PREPARATIONS = [(dtype, compile) for compile in (False, True) for dtype in ("float32", "bfloat16", "float16", "int8")]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def assert_as_exact(fast, plain, exact, what=""):
    """Both results of one computation are roundings of `exact`, which is in float64. In 16 bits the fast one must be
    about as near to it as the plain one, in longer types within a fixed distance."""
    size = max(1.0, exact.abs().max().item())
    error = (fast.double() - exact).abs().max().item()
    if fast.dtype in (torch.bfloat16, torch.float16):
        allowed = 2 * (plain.double() - exact).abs().max().item() + torch.finfo(fast.dtype).eps * size
    else:
        allowed = {torch.float32: 1e-5, torch.float64: 1e-12}[fast.dtype] * size
    assert error <= allowed, f"{what}: off by {error:.2g}, allowed are {allowed:.2g}"


@pytest.fixture(autouse=True, scope="module")
def libraries(tmp_path_factory):
    """The folder of compiled steps."""
    folder = fast.LIBRARIES = tmp_path_factory.mktemp("compiled")
    return folder


@pytest.fixture(autouse=True)
def split_all(monkeypatch):
    """Splits the weights of the tests' models, which are too small for it."""
    monkeypatch.setattr(SplitLinear, "smallest", 1)


def exported_step(model, cache):
    """Instead of fast.library_step: runs the exported graph of the step."""
    graph = fast.export_step(model, cache).module()
    return lambda model, token, cache: graph(token, cache.length, cache.k, cache.v)


@pytest.fixture
def graph_only(monkeypatch):
    """The step is exported as ever, and its graph runs without generating C++, which would take long."""
    monkeypatch.setattr(fast, "library_step", exported_step)


# --- attention ---

def check_attention(cls, dtype, T, S):
    """`cls.attend` against the written-out attention: output and gradients."""
    torch.manual_seed(T + S)
    layer = cls(GPTConfig(block_size=S, n_head=3, n_embd=24))
    q, k, v, upstream = (torch.randn(2, 3, n, 8).to(dtype) for n in (T, S, S, T))
    positions = torch.arange(S - T, S)

    def run(attend, *tensors):
        *inputs, upstream = tensors
        inputs = [t.clone().requires_grad_() for t in inputs]
        y = attend(*inputs, positions)
        return y.detach(), *torch.autograd.grad(y, inputs, upstream, materialize_grads=True)

    written_out = functools.partial(CausalSelfAttention.attend, layer)
    exact = run(written_out, *(t.double() for t in (q, k, v, upstream)))
    plain = run(written_out, q, k, v, upstream)
    names = "output", "gradient of q", "gradient of k", "gradient of v"
    for f, p, e, name in zip(run(layer.attend, q, k, v, upstream), plain, exact, names, strict=True):
        assert_as_exact(f, p, e, name)
    with torch.no_grad():  # without a gradient another kernel runs
        assert_as_exact(layer.attend(q, k, v, positions), plain[0], exact[0], "output without gradients")


@pytest.mark.parametrize("cls, dtype", [
    *((FusedAttention, dtype) for dtype in DTYPES),
    (CompiledAttention, torch.float32), (CompiledAttention, torch.bfloat16)])  # for generation, never in float64
@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 9), (4, 9), (64, 64)])
def test_attention(cls, dtype, T, S):
    check_attention(cls, dtype, T, S)


def test_fused_attention_drops_weights_in_training_only():
    torch.manual_seed(0)
    layer = FusedAttention(GPTConfig(block_size=8, n_head=2, n_embd=16, dropout=0.5))
    q, k, v = torch.randn(3, 1, 2, 8, 8)
    exact = attention(q, k, v, torch.arange(8))[0]
    drawn = torch.stack([layer.attend(q, k, v, torch.arange(8)) for _ in range(3000)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), exact, atol=0.15, rtol=0)
    layer.eval()
    torch.testing.assert_close(layer.attend(q, k, v, torch.arange(8)), exact)


# --- dropout ---

def check_dropout(p, dtype):
    """Share, scale, independence and gradient."""
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = FastDropout(p)(x)
    zeros, n = (y == 0).sum().item(), y.numel()
    assert abs(zeros - p * n) < 5 * math.sqrt(n * p * (1 - p))  # five standard deviations
    assert torch.equal(y[y != 0], torch.full((n - zeros,), 1 / (1 - p), dtype=dtype))
    for pairs in ((y[:, 1:], y[:, :-1]), (y[1:], y[:-1]), (y[:, 4:], y[:, :-4])):  # independent: p squared of the pairs
        both = ((pairs[0] == 0) & (pairs[1] == 0)).float().mean()
        assert both == pytest.approx(p ** 2, rel=0.05, abs=1e-5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient passes where the number did


@pytest.mark.parametrize("p", [0.001, 0.1, 0.7, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(p, dtype):
    check_dropout(p, dtype)


def test_dropout_of_nearly_all():
    assert (FastDropout(0.9999999)(torch.ones(100_000)) == 0).float().mean() > 0.999


def test_dropout_follows_the_seed_and_stops_in_eval():
    layer, x = FastDropout(0.5), torch.randn(3, 5, 7)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    assert layer.eval()(x) is x and FastDropout(0.0)(x) is x


# --- GELU ---

def check_gelu():
    """Outputs and derivatives against PyTorch's in float64, on numbers that lie apart in memory."""
    x = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])))
    x = torch.stack((x, x), 1)[:, 0].requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, y_exact = FastGELU(approximate="tanh")(x), F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(y.double(), y_exact, atol=1e-6, rtol=1e-6)
    weights = torch.arange(len(x)) % 7 - 3.0
    (y * weights).sum().backward()
    (y_exact * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=5e-6, rtol=5e-6)
    with torch.no_grad():
        assert torch.equal(FastGELU(approximate="tanh")(x), y)


def test_gelu():
    check_gelu()


def test_gelu_in_other_dtypes_is_pytorchs():
    for dtype, gradients in ((torch.float64, False), (torch.float64, True), (torch.bfloat16, False)):
        x = torch.randn(50, dtype=dtype, requires_grad=gradients)
        assert torch.equal(FastGELU(approximate="tanh")(x), F.gelu(x, approximate="tanh"))


def test_gelu_in_bfloat16_is_as_exact_as_pytorchs():
    """On average, outputs and gradients are as near to the exact numbers as PyTorch's. Each is near to its own."""
    x = torch.cat((torch.linspace(-30, 30, 4001), torch.randn(4000))).bfloat16()
    upstream = torch.randn(len(x)).bfloat16()

    def run(gelu, x, upstream):
        x = x.clone().requires_grad_()
        y = gelu(x)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]
    plain = functools.partial(F.gelu, approximate="tanh")
    for ours, theirs, exact in zip(run(FastGELU(approximate="tanh"), x, upstream), run(plain, x, upstream),
                                   run(plain, x.double(), upstream.double()), strict=True):
        assert ours.dtype == torch.bfloat16
        errors = [(y.double() - exact).abs() for y in (ours, theirs)]
        assert errors[0].mean() < 1.001 * errors[1].mean()
        assert (errors[0] / exact.abs().clamp(min=1e-3)).max() < 2 ** -8


def test_gelu_has_no_second_derivative():
    x = torch.randn(5, requires_grad=True)
    gradient, = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    assert torch.allclose(torch.autograd.grad(FastGELU(approximate="tanh")(x).sum(), x)[0], gradient, atol=1e-5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(FastGELU(approximate="tanh")(x).sum(), x, create_graph=True)


def test_another_gelu_stays(capsys):
    model = random_model(0)
    model.h[0].mlp.gelu = nn.GELU()
    for_training(model)
    assert [type(block.mlp.gelu) for block in model.h] == [nn.GELU] + [FastGELU] * (len(model.h) - 1)
    assert capsys.readouterr().err == ""


# --- linear layers ---

def check_linear(cls, dtype, out, rows, bias):
    """A replacement of nn.Linear, without gradients, on rows that lie apart in memory."""
    torch.manual_seed(out + rows)
    plain = nn.Linear(24, out, bias=bias).to(dtype)
    x = torch.randn(2, rows, 48).to(dtype)[:, :, ::2]
    weight, offset = plain.weight.double(), plain.bias.double() if bias else None
    with torch.no_grad():
        for some in (x, x[0], x[0, 0], x[:1, :1], x[:, :0]):
            y = fast.twin(plain, cls)(some)
            assert y.shape == (*some.shape[:-1], out)
            if some.numel():
                assert_as_exact(y, plain(some), F.linear(some.double(), weight, offset))


@pytest.mark.parametrize("out", [3, 8, 50, 64])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(out, rows, bias):
    for dtype in DTYPES:
        check_linear(FastLinear, dtype, out, rows, bias)
        if not bias:  # it is for the head, which has none
            check_linear(PaddedLinear, dtype, out, rows, bias)
    check_linear(SplitLinear, torch.float32, out, rows, bias)


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_many_rows_of_a_split_weight(instructions, monkeypatch):
    """MKL or oneDNN multiplies them."""
    monkeypatch.setattr(fast, "INSTRUCTIONS", instructions)
    for out in (10, 50):
        check_linear(SplitLinear, torch.float32, out, 130, True)


def check_gradients(cls, dtype):
    """The gradients of a replacement of nn.Linear."""
    torch.manual_seed(0)
    plain, x = nn.Linear(24, 50, bias=cls is FastLinear).to(dtype), torch.randn(2, 7, 24).to(dtype)

    def gradients(layer, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    for f, p, e in zip(gradients(fast.twin(plain, cls), x), gradients(plain, x), exact, strict=True):
        assert_as_exact(f, p, e)


@pytest.mark.parametrize("cls", [FastLinear, PaddedLinear])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers_gradients(cls, dtype):
    check_gradients(cls, dtype)


def test_the_padded_head():
    """It is for CUDA, but can be had anywhere."""
    model, x = random_model(0, tied=True), torch.randint(37, (2, 9))
    exact, state = copy.deepcopy(model).double()(x)[0], model.state_dict()
    fast.replace_head(model)
    assert type(model.lm_head) is PaddedLinear and model.lm_head.weight is model.wte.weight
    assert model(x)[0].shape == (2, 9, 37) and list(model.state_dict()) == list(state)
    assert_as_exact(model(x)[0], None, exact)
    for_inference(model)
    assert type(model.lm_head) is SplitLinear
    assert_as_exact(model(x)[0], None, exact)
    for head in (nn.Linear(15, 128, bias=False), nn.Linear(15, 37)):  # needs no padding, or has a bias
        other = random_model(0)
        other.lm_head = head
        fast.replace_head(other)
        assert type(other.lm_head) is nn.Linear


@pytest.mark.parametrize("tokens, micro_steps, processes, graphs", [(100, 1, 1, True), (100, 2, 1, False),
                                                                    (10 ** 9, 1, 1, False), (100, 1, 2, False)])
def test_which_training_steps_are_cuda_graphs(tokens, micro_steps, processes, graphs, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode))
    monkeypatch.setattr(fast, "is_distributed", processes > 1)
    fast.compiled(random_model(0), tokens, micro_steps)
    assert modes == ["reduce-overhead" if graphs else "default"]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_is_obeyed_without_gradients(autocast):
    plain, x = nn.Linear(24, 50), torch.randn(2, 7, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        y = fast.twin(plain, FastLinear)(x)
        assert y.dtype == autocast and torch.equal(y, plain(x))


def check_few_rows(dtype, bias, int8, rows=1, n=24, out=50):
    """`few_rows` and PackedLinear, which compiled code uses, against a matrix multiplication in float64."""
    torch.manual_seed(0)
    layer, x = nn.Linear(n, out, bias=bias).to(torch.float32 if int8 else dtype), torch.randn(1, rows, n).to(dtype)
    exact_weight = layer.weight.double()
    if int8:
        layer = fast.twin(layer, Int8Linear)
        exact_weight = layer.rounded().double()
    exact = F.linear(x.double(), exact_weight, layer.bias.double() if bias else None)
    with torch.no_grad():
        found = [fast.few_rows(x, layer.weight, getattr(layer, "scale", None), layer.bias)]
        layer.weight = nn.Parameter(layer.weight.T.contiguous().T, requires_grad=False)  # another order in memory
        found.append(fast.twin(layer, PackedLinear)(x))
    for y in found:
        assert y.dtype == dtype and y.shape == exact.shape
        assert_as_exact(y, exact.to(dtype), exact)


def check_words():
    """Weights that are read in words of 32 bits, as on a processor with AVX2."""
    with mock.patch.object(fast, "INSTRUCTIONS", "AVX2"):
        check_few_rows(torch.bfloat16, True, False)
        check_few_rows(torch.float32, True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_few_rows(dtype, bias, int8, rows, instructions, monkeypatch):
    monkeypatch.setattr(fast, "INSTRUCTIONS", instructions)  # with AVX2, narrow weights are read in words
    assert fast.word_size(torch.zeros(50, 24, dtype=torch.int8)) == {"AVX2": 4, "AVX512": 1}[instructions]
    for lanes in (4, 16):
        monkeypatch.setattr(PackedLinear, "lanes", lanes)
        check_few_rows(dtype, bias, int8, rows)
        check_few_rows(dtype, bias, int8, rows, n=25)  # does not fit into words


@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.parametrize("out", [1, 3, 64, 160])
def test_packed_weights(rows, out):
    check_few_rows(torch.float32, True, False, rows, out=out)


@torch.no_grad()
def test_a_packed_copy_shares_all_else(graph_only):
    model = for_inference(random_model(0), compile=True)
    for B in (1, 17):
        assert fast.packed_for(model, model.new_cache(B)) is model
    copies = [fast.packed_for(model, model.new_cache(B)) for B in (2, 16)]
    assert copies[0] is copies[1]
    assert [id(t) for t in copies[0].parameters()] == [id(t) for t in model.parameters()]
    assert type(model.lm_head) is FastLinear and type(copies[0].lm_head) is PackedLinear


def check_int8(dtype=torch.float32):
    """Each row of the weight is rounded to multiples of its largest magnitude / 127, and the layer computes with
    exactly these."""
    torch.manual_seed(0)
    plain = nn.Linear(40, 30)
    layer = fast.twin(plain, Int8Linear)
    assert layer.weight.dtype == torch.int8 and (layer.weight.abs().amax(1) == 127).all()
    rounded = layer.rounded()
    error = (rounded - plain.weight).abs()
    assert (error <= plain.weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all()
    x = torch.randn(3, 40).to(dtype)
    exact = F.linear(x.double(), rounded.double(), plain.bias.double())
    assert_as_exact(layer.to(dtype)(x), F.linear(x, rounded.to(dtype), plain.bias.to(dtype)), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(dtype):
    check_int8(dtype)


def check_int8_kernel():
    """Products that are rounded to bfloat16 and, for many rows or gradients, others that are not."""
    torch.manual_seed(0)
    plain = nn.Linear(512, 1003)
    plain.weight = nn.Parameter(plain.weight.T.contiguous().T)  # columns lie together in memory
    assert Int8KernelLinear.suits(plain)
    layer = fast.twin(plain, Int8KernelLinear)
    for rows, rounds in ((1, True), (3, True), (16, True), (17, False), (3, False)):
        x = torch.randn(512, rows).T.bfloat16().float()[None].requires_grad_(rows == 3 and not rounds)
        y, product = layer(x), F.linear(x.double(), layer.rounded().double())
        allowed = 1e-5 * product.abs().max() + (2 ** -8 * product.abs() if rounds else 0.0)
        assert y.dtype == torch.float32 and ((y - product - plain.bias).abs() <= allowed).all(), rows
        if x.requires_grad:
            y.sum().backward()
            torch.testing.assert_close(x.grad[0, 0], layer.rounded().sum(0), atol=1e-4, rtol=1e-4)
    assert layer(torch.zeros(0, 512)).shape == (0, 1003)


def test_int8_kernel():
    check_int8_kernel()
    sizes = (512, 512), (511, 1000), (520, 1000), (256, 512)  # the kernel would read beyond the end of some rows
    assert [Int8KernelLinear.suits(nn.Linear(*size)) for size in sizes] == [True, False, False, False]


@torch.no_grad()
def int8_layers(compile=False):
    """The classes of the linear layers of a model that has small and large ones, and the largest error of a logit."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=37, n_layer=1, n_head=2, n_embd=256)).eval()
    idx = torch.arange(5)[None]
    exact = reference(model, "int8")[0](idx)[0]
    prepared = for_inference(model, "int8", compile)
    linear = prepared.h[0].attn.c_attn, prepared.h[0].mlp.c_fc
    return *(type(layer) for layer in linear), (prepared(idx)[0] - exact).abs().max().item()


def test_int8_kernel_in_a_model():
    small, large, error = int8_layers()
    assert (small, large) == (Int8Linear, Int8KernelLinear) and 1e-4 < error < 0.02
    # A compiled step is compared with the layers of its own model, which therefore do not round.
    small, large, error = int8_layers(compile=True)
    assert (small, large) == (Int8Linear, Int8Linear) and error < 1e-5


@pytest.mark.parametrize("missing", [True, False])
def test_int8_kernel_that_fails_is_left_out(monkeypatch, capsys, missing):
    kernel = torch._weight_int8pack_mm
    if missing:
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
    else:
        monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, weight, scale: kernel(x, weight.flip(0), scale))
    with pytest.raises((AssertionError, AttributeError)):
        check_int8_kernel()
    small, large, error = int8_layers()
    assert (small, large) == (Int8Linear, Int8Linear) and error < 1e-5
    assert "Linear does not compute what Int8KernelLinear does" in capsys.readouterr().err


def test_int8_of_a_row_of_zeros():
    plain = nn.Linear(8, 4)
    plain.weight.data[2] = 0
    layer = fast.twin(plain, Int8Linear)
    assert torch.isfinite(layer(torch.randn(3, 8))).all() and (layer.weight[2] == 0).all()


# --- training, compiled ---

def test_compiled_training_returns_the_loss_alone():
    model, ids = random_model(0), torch.randint(37, (3, 17), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    logits, loss = model(x, y)
    for_training(model.train())
    compiled = torch.compile(model, backend="eager")
    nothing, same = compiled(x, y)
    assert nothing is None and same.item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(model(x, y)[0], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(x)[0], logits, atol=1e-5, rtol=1e-5)  # without targets
    restore(model)
    assert type(model) is GPT and type(copy.deepcopy(for_training(model))) is type(model)


# --- the static cache ---

def check_static_cache():
    """Logits in chunks of any length through a StaticCache, against those of the whole."""
    model, idx = random_model(0), torch.randint(37, (3, 16), generator=torch.Generator().manual_seed(0))
    exact = model(idx)[0]
    for_inference(model, "float32", compile=True)
    for capacity, sizes in ((16, (5, 1, 1, 6, 3)), (16, (16,)), (8, (3, 4, 1)), (1, (1,))):
        cache, pieces = StaticCache(model.config, 3, capacity), []
        for piece in idx[:, :sum(sizes)].split(sizes, dim=1):
            before = sum(p.size(1) for p in pieces)
            assert cache.positions(piece.size(1)).tolist() == list(range(before, before + piece.size(1)))
            pieces.append(model(piece, cache=cache)[0])
        assert int(cache.length) == sum(sizes)
        torch.testing.assert_close(torch.cat(pieces, 1), exact[:, :sum(sizes)], atol=1e-4, rtol=1e-5)


def test_static_cache():
    check_static_cache()


def test_static_cache_repeats_and_resets():
    model = for_inference(random_model(0), compile=True)
    idx = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 9)
    assert type(cache) is StaticCache and cache.capacity == 9 and model.new_cache(2).capacity == 16
    assert [model.new_cache(1, n).capacity for n in (1, 2, 3, 5, 8)] == [1, 2, 3, 5, 8]
    first = model(idx[:, :5], cache=cache)[0]
    repeated = cache.repeat(3)
    rest = model(idx[:, 5:].repeat_interleave(3, 0), cache=repeated)[0]
    assert int(cache.length) == 5 and int(repeated.length) == 9
    torch.testing.assert_close(rest, model(idx[:, 5:], cache=cache)[0].repeat_interleave(3, 0))
    cache.reset()
    assert torch.equal(model(idx[:, :5], cache=cache)[0], first)


def test_a_full_static_cache_is_an_error():
    model = for_inference(random_model(0), compile=True)
    cache = model.new_cache(1, 4)
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="a sequence of 6 tokens exceeds the cache's capacity 4"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="a sequence of 5 tokens exceeds the cache's capacity 4"):
        model.decode_one_token(torch.zeros(1, dtype=torch.long), cache)


def test_a_compiled_step_takes_one_token_of_each_sequence():
    model = for_inference(random_model(0), compile=True)
    for n in (1, 3):
        with pytest.raises(ValueError, match=rf"token must be \(2,\) for this cache, got \({n},\)"):
            model.decode_one_token(torch.zeros(n, dtype=torch.long), model.new_cache(2, 4))


# --- a whole model, in training ---

def losses_and_gradients(model, x, y, dtype):
    """The loss, and {name: gradient}, with matrix multiplications in dtype."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def check_training(dtype):
    """Loss and gradients of the model that train.py trains, against the plain model's."""
    torch.manual_seed(0)
    model = random_model(3, tied=True, n_embd=24).train()
    x, y = torch.randint(37, (2, 4, 16))
    exact = losses_and_gradients(copy.deepcopy(model).double(), x, y, torch.float64)
    model = model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    plain = losses_and_gradients(model, x, y, dtype)
    quick = losses_and_gradients(for_training(copy.deepcopy(model)), x, y, dtype)
    for name, e in exact.items():
        if dtype == torch.bfloat16:  # the parameters and their gradients are float32
            allowed = 2 * (plain[name] - e).abs().max() + 0.01 * e.abs().max()
            assert (quick[name] - e).abs().max() <= allowed, name
        else:
            assert_as_exact(quick[name], plain[name], e, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training(dtype):
    check_training(dtype)


def classes(model):
    return {type(module) for module in model.modules()}


def test_for_training_replaces_and_leaves_the_rest():
    model = random_model(0, tied=True, dropout=0.1)
    state, names, random = copy.deepcopy(model.state_dict()), list(model.state_dict()), torch.get_rng_state()
    for mode in (True, False):
        assert for_training(model.train(mode)) is model and model.training == mode
        assert {FusedAttention, FastDropout, FastGELU, FastLinear} <= classes(model)
        assert not {CausalSelfAttention, nn.Dropout, nn.GELU, nn.Linear} & classes(model)
    assert torch.equal(torch.get_rng_state(), random)
    restore(model)
    assert not [cls for cls in classes(model) if cls.__module__ == "fast"]
    assert list(model.state_dict()) == names and all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert model.lm_head.weight is model.wte.weight


def test_evaluation_and_maps_of_a_model_in_training():
    model, idx = random_model(0, dropout=0.5), torch.randint(37, (2, 12))
    exact, maps = copy.deepcopy(model).double()(idx)[0], model.attention_maps(idx)
    for_training(model)
    with torch.no_grad():
        assert_as_exact(model(idx)[0], None, exact)
        cache = model.new_cache(2)
        assert_as_exact(torch.cat([model(piece, cache=cache)[0] for piece in idx.split(5, 1)], 1), None, exact)
    torch.testing.assert_close(model.attention_maps(idx), maps, atol=1e-5, rtol=1e-5)


def test_only_layers_of_exactly_the_known_class_are_replaced():
    class MyLinear(nn.Linear):
        pass

    class MyDropout(nn.Dropout):
        pass

    class MyAttention(CausalSelfAttention):
        pass
    model = random_model(0)
    model.h[0].mlp.c_fc.__class__, model.h[0].attn.__class__, model.drop.__class__ = MyLinear, MyAttention, MyDropout
    for prepare in (for_training, for_inference):
        prepare(model)
        assert {MyLinear, MyAttention, MyDropout} <= classes(model)
        assert {type(model.h[1].attn), type(model.h[0].attn)} == {FusedAttention, MyAttention}


# --- a whole model, in generation ---

def reference(model, dtype):
    """The plain model with the weights that for_inference computes with, in float64 and in the dtype of activations."""
    plain = copy.deepcopy(model)
    if dtype == "int8":  # each row rounded to multiples of its largest magnitude / 127
        for layer in (m for m in plain.modules() if isinstance(m, nn.Linear)):
            step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            layer.weight = nn.Parameter((layer.weight / step).round() * step)
    else:
        plain.to(getattr(torch, dtype))
    return copy.deepcopy(plain).double(), plain


@torch.no_grad()
def logits_along(model, idx, prompt):
    """Those after the prompt (B, prompt) and after each further token of idx (B, T), by decoding."""
    cache = model.new_cache(idx.size(0), idx.size(1))
    logits = [model.prefill(idx[:, :prompt], cache)]
    logits += [model.decode_one_token(token, cache) for token in idx[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1)


def check_inference(dtype, compile, **changes):
    """Logits of a prepared model, whole and along a sequence, and the text that it writes past block_size."""
    model = random_model(1, **{**dict(n_layer=1, n_head=2, n_embd=16, block_size=8), **changes})
    idx = torch.randint(37, (2, 8), generator=torch.Generator().manual_seed(0))
    exact_model, plain_model = reference(model, dtype)
    exact, plain = exact_model(idx)[0], plain_model(idx)[0]
    prepared = for_inference(copy.deepcopy(model), dtype, compile)
    assert_as_exact(prepared(idx)[0], plain, exact, "whole")
    # A batch of 1, which has its own code, then more.
    for rows in (slice(0, 1), slice(0, 2)):
        decoded = logits_along(prepared, idx[rows], 3)
        assert_as_exact(decoded, plain[rows, 2:], exact[rows, 2:], "decoded")
    tolerance = 0.1 if plain.dtype != torch.float32 else 1e-4
    assert_follows(exact_model, prepared.generate(idx[:1, :3], 20, temperature=0), 3, tolerance)
    assert_follows(exact_model, prepared.generate(idx[:1, :3], 5, temperature=0, num_samples=2), 3, tolerance)
    long_prompt = torch.cat((idx, idx), 1)[:1, :13]
    assert_follows(exact_model, prepared.generate(long_prompt, 6, temperature=0), 13, tolerance)
    if plain.dtype == torch.float32:  # in 16 bits, rounding may decide between two tokens
        text = plain_model.generate(idx[:, :3], 20, temperature=0)
        assert torch.equal(prepared.generate(idx[:, :3], 20, temperature=0), text)
        assert torch.equal(prepared.generate(idx[:, :3], 20, temperature=0, use_cache=False), text)
        samples = prepared.generate(idx[:, :3], 20, temperature=0, num_samples=2)
        assert torch.equal(samples, text.repeat_interleave(2, 0))


def assert_follows(model, ids, prompt, tolerance):
    """Each token of ids (B, T) after the prompt is the likeliest, or nearly so, by a full forward pass over the window
    that generation sees."""
    block_size = model.config.block_size
    window = ids[:, max(0, prompt - block_size):prompt]
    for t in range(prompt, ids.size(1)):
        logits = model(window)[0][:, -1]
        chosen = logits.gather(1, ids[:, t:t + 1])[:, 0]
        assert (chosen >= logits.max(-1).values - tolerance * logits.abs().max()).all(), t
        full = window.size(1) == block_size
        window = ids[:, t + 1 - block_size // 2:t + 1] if full else ids[:, t - window.size(1):t + 1]


@pytest.mark.parametrize("dtype, compile", PREPARATIONS)
def test_inference(graph_only, dtype, compile):
    check_inference(dtype, compile)


@pytest.mark.parametrize("dtype, compile", [*PREPARATIONS[:4], ("float32", True)])
def test_inference_without_biases_and_tied(graph_only, dtype, compile):
    check_inference(dtype, compile, tied=True, bias=False, n_layer=2)


@needs_compiler
@pytest.mark.parametrize("dtype, rows", [("float32", 2), ("bfloat16", 1), ("int8", 1)])
def test_inference_compiled(dtype, rows):
    model = random_model(1, n_layer=1, n_head=2, n_embd=16, block_size=8)
    idx = torch.randint(37, (rows, 8), generator=torch.Generator().manual_seed(0))
    exact_model, plain_model = reference(model, dtype)
    for_inference(model, dtype, compile=True)
    for n in (8, 5):
        assert_as_exact(logits_along(model, idx[:, :n], 3), plain_model(idx)[0][:, 2:n], exact_model(idx)[0][:, 2:n])
    assert len(fast.steps[model]) == 1
    assert_follows(exact_model, model.generate(idx[:, :3], 20, temperature=0), 3, 0.1 if dtype == "bfloat16" else 1e-4)


@needs_compiler
def test_the_compiled_step_is_kept_but_not_trusted(libraries, monkeypatch, capsys):
    idx = torch.randint(37, (1, 3), generator=torch.Generator().manual_seed(0))

    def write(seed):
        """Whether a model with these weights writes its text without compiling."""
        model = random_model(seed, n_layer=1, n_head=2, n_embd=16, block_size=8)
        expected = model.generate(idx, 5, temperature=0)
        assert torch.equal(for_inference(model, compile=True).generate(idx, 5, temperature=0), expected)
        return "compiling the step" not in capsys.readouterr().err

    before = set(libraries.iterdir())
    write(0)
    kept, = set(libraries.iterdir()) - before or before  # another test may have compiled it
    good = kept.read_bytes()
    monkeypatch.setattr(fast, "make_library", lambda path, model, cache: path.write_bytes(good))  # quicker
    assert write(1) and kept.read_bytes() == good
    kept.write_bytes(good[:-1000])
    assert not write(0) and kept.read_bytes() == good  # damaged, so it was made anew
    # The library of another model: the shapes are the same, the number of heads is not.
    other = for_inference(random_model(0, n_layer=1, n_head=4, n_embd=16, block_size=8), compile=True)
    with pytest.raises(UserError, match="leave --compile out"), torch.no_grad():
        fast.load_library(kept, other, other.new_cache(1))


@torch.no_grad()
def test_a_compiled_step_that_differs_is_refused(monkeypatch):
    """Also if it differs only at positions far from the start."""
    model, token = for_inference(random_model(0), compile=True), torch.tensor([5])
    wrong = [model.config.block_size]  # the first position at which the step is wrong

    def step(model, token, cache):
        plain = KVCache(model.config, 1, cache.capacity)
        plain.k, plain.v, plain.length = cache.k, cache.v, cache.length.item()
        logits = model.plain_step(token, plain)
        cache.length += 1
        return logits + (cache.length > wrong[0]) * torch.arange(logits.size(1))

    fast.compare_step(step, model, model.new_cache(1))
    for wrong[0] in (0, 1, 5):
        with pytest.raises(UserError, match="leave --compile out"):
            fast.compare_step(step, model, model.new_cache(1))
    monkeypatch.setattr(fast, "library_step", mock.Mock(side_effect=RuntimeError))
    monkeypatch.setattr(fast, "step_compiled_here", lambda *args: step)
    with pytest.raises(UserError, match="leave --compile out"):
        model.decode_one_token(token, model.new_cache(1))


@torch.no_grad()
def test_a_step_that_cannot_be_exported_is_one_line(monkeypatch, capfd):
    class Branching(MLP):
        def forward(self, x):
            return super().forward(x * 0.5 if x.abs().sum() > 1e9 else x)

    model = random_model(0)
    for block in model.h:
        block.mlp.__class__ = Branching
    model = for_inference(model, compile=True)
    capfd.readouterr()
    monkeypatch.setattr(fast, "make_library", lambda path, *args: fast.export_step(*args))
    monkeypatch.setattr(fast, "step_compiled_here", lambda *args: fast.Prepared.plain_step)
    monkeypatch.setattr(fast, "compare_step", lambda *args: None)
    model.decode_one_token(torch.tensor([5]), model.new_cache(1))
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("W")]  # PyTorch's own log
    assert [line.split(" (")[0] for line in lines] == [lines[0], "the compiled step cannot be kept on disk"]
    assert lines[0].startswith("compiling the step")


def test_the_key_of_a_compiled_step():
    model = for_inference(random_model(0), compile=True)
    keys = [fast.library_key(m, m.new_cache(B, T)) for m, B, T in (
        (model, 1, 4), (model, 2, 4), (model, 1, 8), (for_inference(random_model(1), compile=True), 1, 4),
        (model, 1, 1),
        (for_inference(random_model(0, n_head=1), compile=True), 1, 4),
        (for_inference(random_model(0), "bfloat16", compile=True), 1, 4))]
    # The weights' values do not count, nor does the capacity, unless it is 1.
    assert keys[0] == keys[2] == keys[3] and len(set(keys)) == 5


def test_one_step_is_for_caches_of_every_capacity(graph_only):
    model = random_model(0)
    idx = torch.randint(37, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(idx)[0]
    for_inference(model, compile=True)
    for capacity in (5, 16, 2, 9, 1):
        cache = model.new_cache(2, capacity)
        with torch.no_grad():
            logits = [model.decode_one_token(token, cache) for token in idx[:, :capacity].unbind(1)]
        assert_as_exact(torch.stack(logits, 1), None, exact[:, :capacity])
    assert len(fast.steps[model]) == 2  # and one for a capacity of 1


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_compiled_step_multiplies_few_rows_by_sums(dtype, batch):
    model = for_inference(random_model(0, n_embd=48), dtype, compile=True)
    names = {str(node.target) for node in fast.export_step(model, model.new_cache(batch)).graph.nodes}
    assert any("sum" in name for name in names) and not any("linear" in name or "mm" in name for name in names)


def test_a_prepared_model_in_float32_writes_what_the_plain_one_does():
    model, idx = random_model(0, n_embd=48), torch.randint(37, (2, 12))
    text = model.generate(idx, 40, temperature=0)
    drawn = model.generate(idx, 40, top_k=10, generator=torch.Generator().manual_seed(0))
    for_inference(model)
    assert torch.equal(model.generate(idx, 40, temperature=0), text)
    assert torch.equal(model.generate(idx, 40, top_k=10, generator=torch.Generator().manual_seed(0)), drawn)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_split_weights(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_inference("float32", False)
        check_inference("float32", False, tied=True, bias=False, n_layer=2)
    finally:
        torch.set_num_threads(before)
    for tied in (True, False):
        test_what_a_prepared_model_still_does("float32", False, tied)
    model = for_inference(random_model(0))
    assert SplitLinear in classes(model) and SplitLinear in classes(copy.deepcopy(model))


@pytest.mark.parametrize("out", [10, 50])
def test_the_parts_of_a_weight_take_no_memory(out):
    layer = fast.twin(nn.Linear(24, out), SplitLinear)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert one.parts.data_ptr() == one.weight.data_ptr() and one.start.data_ptr() == one.bias.data_ptr()


@pytest.mark.parametrize("out", [10, 50])
def test_a_weight_in_another_order_in_memory(out):
    layer, x = nn.Linear(24, out), torch.randn(1, 1, 24)
    with torch.no_grad():
        expected = layer(x)
        layer.weight = nn.Parameter(layer.weight.t().contiguous().t())
        torch.testing.assert_close(fast.twin(layer, SplitLinear)(x), expected)


def test_only_large_weights_are_rearranged(monkeypatch):
    monkeypatch.setattr(SplitLinear, "smallest", 4 * 48 * 48)
    model = for_inference(random_model(0, n_embd=48))
    for block in model.h:
        assert [type(x) for x in (block.mlp.c_fc, block.mlp.c_proj)] == [SplitLinear] * 2
        assert [type(x) for x in (block.attn.c_attn, block.attn.c_proj)] == [nn.Linear] * 2


@pytest.mark.parametrize("dtype, compile", PREPARATIONS)
def test_shared_weights_count_once(dtype, compile):
    model = random_model(0, n_layer=2)
    model.h[1].mlp.c_fc.weight = model.h[0].mlp.c_fc.weight
    numbers = model.num_parameters(), model.num_parameters(embeddings=False)
    prepared = for_inference(model, dtype, compile)
    assert (prepared.num_parameters(), prepared.num_parameters(embeddings=False)) == numbers


def test_preparing_twice():
    model, idx = random_model(0, tied=True), torch.randint(37, (2, 12))
    expected = for_inference(copy.deepcopy(model))(idx)[0]
    for_training(model)
    for_inference(model)  # takes back what for_training did
    assert torch.equal(model(idx)[0], expected)
    assert SplitLinear in classes(model) and FastLinear not in classes(model)
    for prepare in (for_inference, for_training):
        with pytest.raises(RuntimeError, match="prepared for inference already"):
            prepare(model)
    assert torch.equal(model(idx)[0], expected)
    with pytest.raises(ValueError, match="float16 or int8, got 'int4'"):
        for_inference(random_model(0), "int4")


@pytest.mark.parametrize("dtype, compile", PREPARATIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_prepared_model_still_does(dtype, compile, tied):
    model, idx = random_model(2, tied=tied), torch.randint(37, (2, 9))
    exact, plain = reference(model, dtype)
    numbers = model.num_parameters(), model.num_parameters(embeddings=False), model.flops_per_token(7)
    state = model.state_dict()
    prepared = for_inference(copy.deepcopy(model), dtype, compile)
    assert isinstance(prepared, GPT) and not prepared.training

    assert numbers == (
        prepared.num_parameters(), prepared.num_parameters(embeddings=False), prepared.flops_per_token(7))
    with pytest.raises(RuntimeError, match="cannot train"):
        prepared.train()
    assert prepared.train(False) is prepared.eval() is prepared
    assert_as_exact(prepared.attention_maps(idx), plain.attention_maps(idx), exact.attention_maps(idx), "maps")

    twin = copy.deepcopy(prepared)
    before = prepared(idx)[0]
    assert torch.equal(twin(idx)[0], before) and type(twin) is type(prepared)
    with torch.no_grad():
        twin.wpe.weight.add_(1)
        twin.h[0].mlp.c_fc.bias.add_(1)
    assert torch.equal(prepared(idx)[0], before) and not torch.equal(twin(idx)[0], before)

    saved, other = prepared.state_dict(), random_model(5, tied=tied)
    if dtype == "int8":
        with pytest.raises(RuntimeError, match="scale"):
            other.load_state_dict(saved)
        with pytest.raises(UserError, match="is of torch.int8"):
            load_weights(other, saved, "a file")
    else:
        assert list(saved) == list(state) and all(t.layout == torch.strided for t in saved.values())
        load_weights(other.to(getattr(torch, dtype)), saved, "a file")
        assert all(torch.equal(t, state[name].to(t.dtype)) for name, t in other.state_dict().items())
        assert torch.equal(other(idx)[0], plain(idx)[0])


def test_the_flat_step(capsys):
    """It is used, it is that of the model and of nobody else, and it keeps nothing alive."""
    model, token = random_model(0), torch.tensor([5])
    prepared = for_inference(copy.deepcopy(model))
    twin, caches = copy.deepcopy(prepared), [prepared.new_cache(1) for _ in range(3)]
    with torch.no_grad():
        expected = model.decode_one_token(token, caches[0])
        prepared.decode_one_token(token, prepared.new_cache(1))  # compares the two
        prepared.plain_step = None
        torch.testing.assert_close(prepared.decode_one_token(token, caches[1]), expected)
        for p, q in zip(twin.parameters(), random_model(1).parameters(), strict=True):
            p.copy_(q)
        torch.testing.assert_close(twin.decode_one_token(token, caches[2]),
                                   random_model(1).decode_one_token(token, random_model(1).new_cache(1)))
    assert fast.flat_steps[prepared][0] and fast.flat_steps[twin][0] and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"of shape \(B, T\)"):
        twin.decode_one_token(token[:, None], twin.new_cache(1))
    full = twin.new_cache(1, 1)
    twin.decode_one_token(token, full)
    with pytest.raises(ValueError, match="exceeds the cache's capacity 1"):
        twin.decode_one_token(token, full)
    for module in (twin, twin.h[1].mlp.gelu):
        seen = []
        hook = module.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        twin.decode_one_token(token, twin.new_cache(1))
        hook.remove()
        twin.decode_one_token(token, twin.new_cache(1))
        assert len(seen) == 1
    gone = weakref.ref(twin)
    del twin, full, module, hook, seen
    assert gone() is None


def with_blocks(model, blocks):
    """What flat_step uses of the model, with other blocks."""
    parts = "config", "wte", "wpe", "ln_f", "lm_head"
    return types.SimpleNamespace(h=blocks, **{name: getattr(model, name) for name in parts})


def flat_with_queries_and_values_swapped(model):
    def swapped(attn):
        return types.SimpleNamespace(c_proj=attn.c_proj, c_attn=types.SimpleNamespace(
            forward=lambda x: torch.cat(attn.c_attn(x).chunk(3, -1)[::-1], -1)))
    return flat_step(with_blocks(model, [
        types.SimpleNamespace(ln_1=b.ln_1, attn=swapped(b.attn), ln_2=b.ln_2, mlp=b.mlp) for b in model.h]))


def flat_that_stays_at_the_first_position(model):
    step = flat_step(model)

    def wrong(token, cache):
        positions = cache.positions
        cache.positions = lambda T: positions(T) * 0
        logits = step(token, cache)
        del cache.positions
        return logits
    return wrong


def flat_without_the_last_block(model):
    return flat_step(with_blocks(model, model.h[:-1]))


@pytest.mark.parametrize("wrong", [
    flat_with_queries_and_values_swapped, flat_that_stays_at_the_first_position, flat_without_the_last_block])
def test_a_mistake_in_the_flat_step(monkeypatch, capsys, wrong):
    """The comparisons of whole models find it, and so does fast.py, which then uses the model's own step."""
    with monkeypatch.context() as patch:
        patch.setattr(fast, "compared_step", wrong)
        with pytest.raises(AssertionError):
            check_inference("float32", False)
    monkeypatch.setattr(fast, "flat_step", wrong)
    check_inference("float32", False)
    assert f"decode_one_token does not compute what {wrong.__name__}" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_model_whose_last_positions_differ_keeps_its_own_step(monkeypatch, dtype, capsys):
    def forward(self, x, positions=None, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), positions, cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x if positions[-1] < self.attn.block_size - 1 else 1.1 * x
    model = random_model(0, tied=True)
    monkeypatch.setattr(model_module.Block, "forward", forward)
    monkeypatch.setattr(CausalSelfAttention, "block_size", 16, raising=False)
    for_inference(model, dtype)
    with torch.no_grad():
        model.decode_one_token(torch.tensor([0]), model.new_cache(1))
    assert fast.flat_steps[model][0] is None and "decode_one_token does not compute" in capsys.readouterr().err


def noise_in_training(self, q, k, v, positions):
    return attention(q + 0.1 * torch.randn_like(q) if self.training else q, k, v, positions, self.attn_dropout)[0]


def keys_without_gradient(self, q, k, v, positions):
    return attention(q, k.detach(), v, positions, self.attn_dropout)[0]


def new_parameter(self, q, k, v, positions):
    return attention(q, k, v * (1 + self.slope[:, None, None]), positions, self.attn_dropout)[0]


def new_buffer(self, q, k, v, positions):
    return attention(q, k, v * (1 + self.buffer), positions, self.attn_dropout)[0]


def no_dropout(self, q, k, v, positions):
    return attention(q, k, v, positions)[0]


def dropout_of_values(self, q, k, v, positions):
    return attention(q, k, self.resid_dropout(v), positions, self.attn_dropout)[0]


@pytest.mark.parametrize("attend", [noise_in_training, keys_without_gradient, new_parameter, new_buffer, no_dropout,
                                    dropout_of_values])
def test_an_attention_that_differs_only_in_training_stays(monkeypatch, capsys, attend):
    """In its gradients, in training mode, in its dropout, or as soon as a new tensor is no longer 0."""
    monkeypatch.setattr(CausalSelfAttention, "attend", attend)
    model = random_model(0, dropout=0.1)
    for block in model.h:
        block.attn.slope = nn.Parameter(torch.zeros(model.config.n_head))
        block.attn.register_buffer("buffer", torch.zeros(1))
    for_training(model)
    assert {type(block.attn) for block in model.h} == {CausalSelfAttention}
    assert "CausalSelfAttention does not compute" in capsys.readouterr().err


plain_forward = GPT.forward


def with_a_limit_on_values(self, x, positions=None, cache=None, layer=0):
    B, T, C = x.shape
    q, k, v = self.c_attn(x).split(C, dim=2)
    q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v.clamp(-30, 30)))
    k, v = cache.append(layer, k, v) if cache is not None else (k, v)
    positions = torch.arange(T) if positions is None else positions
    return self.resid_dropout(self.c_proj(self.attend(q, k, v, positions).transpose(1, 2).reshape(B, T, C)))


def with_a_cap_on_logits(self, *args, **kwargs):
    logits, loss = plain_forward(self, *args, **kwargs)
    return 300 * torch.tanh(logits / 300), loss


def with_a_window_of_1500(q, k, v, positions, dropout=None):
    mask = model_module.causal_mask(positions, k.size(-2), q.dtype)
    near = torch.arange(k.size(-2)) > positions[:, None] - 1500  # a score further away is 0
    weights = torch.softmax(q @ k.mT / q.size(-1) ** 0.5 * near + mask, dim=-1)
    return weights @ v, weights


@pytest.mark.parametrize("where, what, changed", [
    (CausalSelfAttention, "forward", with_a_limit_on_values), (GPT, "forward", with_a_cap_on_logits),
    (model_module, "attention", with_a_window_of_1500)], ids=["values", "logits", "window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_limit_that_is_out_of_reach_at_first_keeps_the_models_own_step(monkeypatch, capsys, where, what, changed,
                                                                         dtype):
    """A limit that only numbers larger than those of this model, or positions further on, come up to."""
    monkeypatch.setattr(where, what, changed)
    model = for_inference(random_model(0, block_size=2048), dtype)
    state = torch.get_rng_state()
    with torch.no_grad():
        model.decode_one_token(torch.tensor([0]), model.new_cache(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert fast.flat_steps[model][0] is None and "decode_one_token does not compute" in capsys.readouterr().err


def test_a_limit_on_scores_keeps_the_plain_attention(monkeypatch, capsys):
    def limited(q, k, v, positions, dropout=None):
        scores = (q @ k.mT / q.size(-1) ** 0.5).clamp(-50, 50)
        weights = torch.softmax(scores + model_module.causal_mask(positions, k.size(-2), q.dtype), dim=-1)
        return weights @ v, weights
    monkeypatch.setattr(model_module, "attention", limited)
    assert {type(block.attn) for block in for_inference(random_model(0)).h} == {CausalSelfAttention}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_buffers_of_complex_numbers_stay_complex(dtype):
    """Rotary positions as Llama's code has them."""
    class Rotated(CausalSelfAttention):
        def attend(self, q, k, v, positions):
            pairs = torch.view_as_complex(v.float().unflatten(-1, (-1, 2))) * self.turn
            return super().attend(q, k, torch.view_as_real(pairs).flatten(-2).to(v), positions)

    model, idx = random_model(0, n_embd=12), torch.tensor([[1, 2, 3]])
    for block in model.h:
        block.attn.__class__ = Rotated
        block.attn.register_buffer("turn", torch.polar(torch.ones(1), torch.full((1,), 1.5)))
    expected = model(idx)[0]
    torch.testing.assert_close(for_inference(model, dtype)(idx)[0].float(), expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_a_weight_that_is_used_directly_is_not_rounded_to_int8(monkeypatch, capsys):
    def forward(self, x):
        return self.c_proj(self.gelu(nn.functional.linear(x, self.c_fc.weight * self.gain, self.c_fc.bias)))
    monkeypatch.setattr(MLP, "forward", forward)
    monkeypatch.setattr(MLP, "gain", torch.tensor(1.5), raising=False)
    model, idx = random_model(0), torch.tensor([[1, 2, 3]])
    expected = model(idx)[0]
    torch.testing.assert_close(for_inference(model, "int8")(idx)[0], expected)
    assert "Linear does not compute what Int8" in capsys.readouterr().err


def test_a_linear_layer_of_a_single_vector():
    layer, x = nn.Linear(8, 5), torch.randn(8)
    torch.testing.assert_close(fast.few_rows(x, layer.weight, None, layer.bias), layer(x))


class Documents(GPT):
    """A GPT in which no position sees another document. Token 0 ends a document. The block's forward cannot hand the
    ids on, so the model sets them in its attention layers."""

    def forward(self, idx, *args, **kwargs):
        for block in self.h:
            block.attn.ids = idx
        return super().forward(idx, *args, **kwargs)


def attend_within_documents(self, q, k, v, positions):
    scores = q / math.sqrt(q.size(-1)) @ k.mT + model_module.causal_mask(positions, k.size(-2), q.dtype)
    if (ids := getattr(self, "ids", None)) is not None and ids.size(-1) == k.size(-2):
        document = (ids == 0).cumsum(-1)[:, None, :, None]
        scores = scores.masked_fill(document != document.mT, -math.inf)
    return self.attn_dropout(scores.softmax(-1)) @ v


@torch.no_grad()
@pytest.mark.parametrize("prepare", [for_training, for_inference, functools.partial(for_inference, compile=True)])
def test_what_a_model_sets_in_its_attention_layers_is_followed(monkeypatch, capsys, prepare):
    monkeypatch.setattr(CausalSelfAttention, "attend", attend_within_documents)
    model, idx = random_model(0), torch.tensor([[5, 0, 7, 3]])
    unedited = model(idx)[0]
    model.__class__ = Documents
    expected = model(idx)[0]
    assert (expected - unedited).abs().max() > 0.1
    for block in model.h:
        del block.attn.ids  # as in a new model
    prepare(model)
    torch.testing.assert_close(model(idx)[0], expected)
    assert "CausalSelfAttention does not compute" in capsys.readouterr().err


@torch.no_grad()
def test_a_forward_that_counts_and_draws_is_compared_and_leaves_no_trace(capsys):
    class Counting(GPT):
        def forward(self, idx, targets=None, cache=None, last_only=False):
            self.seen += idx.numel()
            self.last = idx[:, -1:].clone()
            logits, loss = super().forward(idx, targets, cache, last_only)
            return logits + torch.rand(1), loss
    model = random_model(0)
    model.__class__ = Counting
    model.register_buffer("seen", torch.zeros((), dtype=torch.long))
    model.register_buffer("last", torch.zeros(1, 1, dtype=torch.long))
    state = torch.get_rng_state()
    for_training(model)
    assert FusedAttention in classes(model) and capsys.readouterr().err == ""
    assert model.seen == 0 and model.last.tolist() == [[0]] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("where", ["weights", "values", "output"])
def test_only_dropout_of_the_weights_is_left_to_the_kernel(monkeypatch, where):
    def attend(self, q, k, v, positions):
        drop = {name: self.attn_dropout if name == where else nn.Identity() for name in ("weights", "values", "output")}
        scores = q / math.sqrt(q.size(-1)) @ k.mT + model_module.causal_mask(positions, k.size(-2), q.dtype)
        return drop["output"](drop["weights"](scores.softmax(-1)) @ drop["values"](v))
    monkeypatch.setattr(CausalSelfAttention, "attend", attend)
    model, state = random_model(0, dropout=0.1), torch.get_rng_state()
    for_training(model)
    assert (FusedAttention in classes(model)) == (where == "weights")
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
@pytest.mark.parametrize("token", [0, 17, 36])
def test_a_step_that_treats_one_token_differently(token, capsys):
    class Special(GPT):
        def forward(self, idx, *args, **kwargs):
            logits, loss = super().forward(idx, *args, **kwargs)
            return logits + (idx[..., -1:] == token)[..., None], loss
    model, idx = random_model(0), torch.tensor([token])
    model.__class__ = Special
    expected = model.decode_one_token(idx, model.new_cache(1))
    for_inference(model)
    torch.testing.assert_close(model.decode_one_token(idx, model.new_cache(1)), expected)
    assert "decode_one_token does not compute" in capsys.readouterr().err


@torch.no_grad()
def test_compiled_decoding_does_not_replace_another_cache(graph_only):
    class Forgetful(KVCache):
        pass

    class MyGPT(GPT):
        def new_cache(self, batch_size, length=None):
            return Forgetful(self.config, batch_size, length)
    model = random_model(0)
    model.__class__ = MyGPT
    for_inference(model, compile=True)
    with pytest.raises(UserError, match="changed to use Forgetful; leave --compile out"):
        model.generate(torch.tensor([[1, 2]]), 3)


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_with_one_more_argument(compile):
    class Biased(GPT):
        def decode_one_token(self, token, cache, bias=0.0):
            return super().decode_one_token(token, cache) + bias
    model, token = random_model(0), torch.tensor([3])
    model.__class__ = Biased
    expected = model.decode_one_token(token, model.new_cache(1), bias=2.0)
    for_inference(model, compile=compile)
    torch.testing.assert_close(model.decode_one_token(token, model.new_cache(1), bias=2.0), expected)


def test_a_dropout_of_1():
    assert torch.equal(FastDropout(1.0).train()(torch.ones(5)), torch.zeros(5))


def test_a_new_parameter_keeps_the_models_own_step(capsys):
    model = random_model(0)
    for block in model.h:
        block.attn.slope = nn.Parameter(torch.zeros(1))
    for_inference(model).generate(torch.tensor([[1, 2]]), 3)
    assert fast.flat_steps[model][0] is None and "decode_one_token does not compute" in capsys.readouterr().err


def test_an_exchanged_layer_is_used():
    model, other = (for_inference(random_model(seed, n_layer=2)) for seed in (0, 1))
    idx = torch.tensor([[1, 2, 3]])
    for _ in range(2):
        texts = [model.generate(idx, 10, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
        assert torch.equal(*texts)
        model.h[1] = other.h[1]


def test_int8_of_a_model_in_bfloat16(capsys):
    model = for_inference(random_model(0).bfloat16(), "int8")
    assert type(model.h[0].mlp.c_fc) in (Int8Linear, Int8KernelLinear) and capsys.readouterr().err == ""


def test_a_head_of_several_layers():
    model = random_model(0)
    model.lm_head = nn.Sequential(nn.Linear(model.config.n_embd, 4), nn.Linear(4, model.config.vocab_size))
    expected = model.generate(torch.tensor([[1, 2]]), 5, temperature=0)
    assert torch.equal(for_inference(model).generate(torch.tensor([[1, 2]]), 5, temperature=0), expected)


def test_a_subclass_of_gpt_is_prepared_too(capsys):
    class MyGPT(GPT):
        def greet(self):
            return "hello"

        def forward(self, *args, **kwargs):
            logits, loss = super().forward(*args, **kwargs)
            return logits * 2, loss
    model, idx = random_model(0), torch.randint(37, (1, 9))
    model.__class__ = MyGPT
    exact = model(idx)[0].double()
    for_inference(model)
    assert_as_exact(model(idx)[0], None, exact)
    assert model.greet() == "hello" and type(model).__name__ == "PreparedMyGPT" and capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype, compile", PREPARATIONS)
def test_a_weight_that_is_used_directly_keeps_its_layout(dtype, compile, capsys):
    class MyGPT(GPT):
        def forward(self, idx, targets=None, cache=None, last_only=False):
            x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
            for block in self.h:
                x = block(x)
            return F.linear(self.ln_f(x), self.lm_head.weight), None
    model, idx = random_model(0, tied=True), torch.randint(37, (1, 9))
    model.__class__ = MyGPT
    exact, plain = (m(idx)[0] for m in reference(model, "float32" if dtype == "int8" else dtype))
    numbers = model.num_parameters()
    for_inference(model, dtype, compile)
    assert_as_exact(model(idx)[0], plain, exact)
    assert model.num_parameters() == numbers
    assert capsys.readouterr().err.count("fast.py: Linear does not compute") == (dtype == "int8")


# --- mistakes in the replacements: the comparisons above find them, and so does fast.py itself ---

attend = {cls: cls.attend for cls in (FusedAttention, CompiledAttention)}
prepare_packed, prepare_split, prepare_int8, forward_dropout = (
    PackedLinear.prepare, SplitLinear.prepare, Int8Linear.prepare, FastDropout.forward)
sigmoid_of, gelu_forward = fast.SigmoidGELU.sigmoid, fast.SigmoidGELU.forward
few_rows, words_times_row = fast.few_rows, fast.words_times_row


def fused_with_another_scale(self, q, k, v, positions):
    return attend[FusedAttention](self, q * 1.01, k, v, positions)


def compiled_mask_off_by_one(self, q, k, v, positions):
    return attend[CompiledAttention](self, q, k, v, positions - 1)


def fused_gradient_lost(self, q, k, v, positions):
    return attend[FusedAttention](self, q, k.detach(), v, positions)


def weight_with_a_block_transposed(self):
    weight = self.weight.detach().clone()
    weight[:3, :3] = self.weight[:3, :3].T
    self.weight = nn.Parameter(weight)
    prepare_split(self)


def split_without_bias(self, x):
    return F.linear(x, self.weight, self.bias if x.shape[:-1] != (1, 1) else None)


def split_with_the_bias_twice(self):
    prepare_split(self)
    self.start = self.start * 2


def fast_linear_without_bias(self, x):
    return F.linear(x, self.weight)


def fast_linear_with_a_block_transposed(self, x):
    weight = self.weight.clone()
    weight[:3, :3] = self.weight[:3, :3].T
    return F.linear(x, weight, self.bias)


def fast_linear_whose_gradient_is_half(self, x):
    return F.linear(x, self.weight, self.bias) / 2 + F.linear(x, self.weight, self.bias).detach() / 2


def padded_on_the_wrong_side(self, x):
    weight = F.pad(self.weight, (0, 0, -self.out_features % 64, 0))
    return F.linear(x, weight)[..., :self.out_features]


def padded_and_not_cut(self, x):
    return F.linear(x, F.pad(self.weight, (0, 0, 0, -self.out_features % 64)))


def int8_with_another_scale(self):
    prepare_int8(self)
    self.scale = self.scale * 127 / 128


def dropout_that_is_not_made_up_for(self, x):
    return forward_dropout(self, x) * (1 - self.p)


def dropout_that_scales_always(self, x):
    return forward_dropout(self, x) * 1.01


def dropout_of_pairs(self, x):
    return forward_dropout(self, torch.ones_like(x[..., ::2])).repeat_interleave(2, -1)[..., :x.size(-1)] * x


def exact_gelu(self, x):
    return F.gelu(x)


def exact_gelu_with_the_other_derivative(ctx, x):
    gelu_forward(ctx, x)
    return F.gelu(x)


def gelu_of_another_scale(x):
    u2, s = sigmoid_of(x)
    return u2, s * 0.99


def gelu_with_another_derivative(ctx, x):
    y = gelu_forward(ctx, x)
    ctx.save_for_backward(torch.ones_like(x))
    return y


def few_rows_without_bias(x, weight, scale=None, bias=None, out=None):
    return few_rows(x, weight, scale, None, out)


def packed_in_another_order(self):
    prepare_packed(self)
    self.packed = self.packed.flip(2)


def words_in_another_order(weight, columns):
    return words_times_row(weight, columns.flip(0))


def positions_off_by_one(self, T):
    return self.length + 1 + torch.arange(T)


def forgetful_append(self, layer, k, v):
    self.k[layer][:, :, :k.size(2)], self.v[layer][:, :, :k.size(2)] = k, v
    return self.k[layer], self.v[layer]


MISTAKES = [
    (FusedAttention, "attend", fused_with_another_scale, lambda: check_attention(FusedAttention, torch.float32, 7, 7)),
    (FusedAttention, "attend", fused_gradient_lost, lambda: check_attention(FusedAttention, torch.float32, 7, 7)),
    (CompiledAttention, "attend", compiled_mask_off_by_one,
     lambda: check_attention(CompiledAttention, torch.float32, 1, 9)),
    (SplitLinear, "prepare", weight_with_a_block_transposed,
     lambda: check_linear(SplitLinear, torch.float32, 8, 3, True)),
    (SplitLinear, "forward", split_without_bias,
     lambda: check_linear(SplitLinear, torch.float32, 8, 3, True)),
    (SplitLinear, "prepare", split_with_the_bias_twice, lambda: check_linear(SplitLinear, torch.float32, 8, 3, True)),
    (SplitLinear, "prepare", split_with_the_bias_twice, lambda: check_linear(SplitLinear, torch.float32, 50, 3, True)),
    (FastLinear, "forward", fast_linear_without_bias, lambda: check_linear(FastLinear, torch.float32, 8, 3, True)),
    (FastLinear, "forward", fast_linear_with_a_block_transposed,
     lambda: check_linear(FastLinear, torch.float64, 8, 3, True)),
    (FastLinear, "forward", fast_linear_whose_gradient_is_half, lambda: check_gradients(FastLinear, torch.float32)),
    (PaddedLinear, "forward", padded_on_the_wrong_side, lambda: check_linear(PaddedLinear, torch.float32, 8, 3, False)),
    (PaddedLinear, "forward", padded_and_not_cut, lambda: check_linear(PaddedLinear, torch.float32, 50, 1, False)),
    (Int8Linear, "prepare", int8_with_another_scale, check_int8),
    (FastDropout, "forward", dropout_that_is_not_made_up_for, lambda: check_dropout(0.1, torch.float32)),
    (FastDropout, "forward", dropout_that_scales_always, lambda: check_dropout(0.1, torch.float32)),
    (FastDropout, "forward", dropout_of_pairs, lambda: check_dropout(0.1, torch.float32)),
    (fast.SigmoidGELU, "sigmoid", staticmethod(gelu_of_another_scale), check_gelu),
    (fast.SigmoidGELU, "forward", staticmethod(gelu_with_another_derivative), check_gelu),
    (fast, "few_rows", few_rows_without_bias, lambda: check_few_rows(torch.float32, True, False)),
    (fast, "few_rows", few_rows_without_bias, lambda: check_inference("int8", True)),
    (fast, "words_times_row", words_in_another_order, check_words),
    (PackedLinear, "prepare", packed_in_another_order, lambda: check_few_rows(torch.float32, True, False)),
    (PackedLinear, "prepare", packed_in_another_order, lambda: check_inference("float32", True)),
    (StaticCache, "positions", positions_off_by_one, check_static_cache),
    (StaticCache, "append", forgetful_append, check_static_cache),
    (StaticCache, "append", forgetful_append, lambda: check_inference("float32", True)),
]


@pytest.mark.parametrize("where, what, wrong, check", MISTAKES)
def test_the_comparisons_find(monkeypatch, graph_only, where, what, wrong, check):
    monkeypatch.setattr(where, what, wrong)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check()


@pytest.mark.parametrize("where, what, wrong, check", [
    (FusedAttention, "attend", fused_gradient_lost, lambda: check_training(torch.float32)),
    (CompiledAttention, "attend", compiled_mask_off_by_one, lambda: check_inference("float32", True)),
    (SplitLinear, "prepare", weight_with_a_block_transposed, lambda: check_inference("float32", False)),
    (SplitLinear, "forward", split_without_bias, lambda: check_inference("float32", False)),
    (Int8Linear, "prepare", int8_with_another_scale, lambda: check_inference("int8", False))])
def test_the_comparisons_of_whole_models_find(monkeypatch, graph_only, where, what, wrong, check):
    monkeypatch.setattr(where, what, wrong)
    monkeypatch.setattr(fast, "computes_the_same", lambda *args: True)  # which would leave the replacement out
    with pytest.raises(AssertionError):
        check()


def test_the_comparison_of_outputs_finds_a_wrong_attention(monkeypatch, capsys):
    """Even if the comparison of the layers did not."""
    monkeypatch.setattr(FusedAttention, "attend", fused_with_another_scale)
    monkeypatch.setattr(fast, "computes_the_same", lambda *args: True)
    assert FusedAttention not in classes(for_training(random_model(0)))
    assert "CausalSelfAttention does not compute" in capsys.readouterr().err


@pytest.mark.parametrize("prepare_as, where, what, wrong, plain", [
    (for_training, FusedAttention, "attend", fused_with_another_scale, CausalSelfAttention),
    (for_inference, FusedAttention, "attend", fused_with_another_scale, CausalSelfAttention),
    (functools.partial(for_inference, compile=True), CompiledAttention, "attend", compiled_mask_off_by_one,
     CausalSelfAttention),
    (for_training, FastGELU, "forward", exact_gelu, nn.GELU),
    (for_training, fast.SigmoidGELU, "forward", staticmethod(gelu_with_another_derivative), nn.GELU),
    (for_training, fast.SigmoidGELU, "forward", staticmethod(exact_gelu_with_the_other_derivative), nn.GELU),
    (for_inference, SplitLinear, "prepare", weight_with_a_block_transposed, nn.Linear),
    (for_inference, SplitLinear, "forward", split_without_bias, nn.Linear)])
def test_a_replacement_with_a_mistake_is_left_out(monkeypatch, capsys, prepare_as, where, what, wrong, plain):
    model, idx = random_model(0), torch.randint(37, (1, 9))
    exact = copy.deepcopy(model).double()(idx)[0]
    monkeypatch.setattr(where, what, wrong)
    prepare_as(model)
    layer = FastGELU if plain is nn.GELU else where
    assert layer not in classes(model) and plain in classes(model)
    assert_as_exact(model(idx)[0], None, exact)
    assert capsys.readouterr().err == (f"fast.py: {plain.__name__} does not compute what {layer.__name__} does, "
                                       "so it stays as it is in model.py, which may be slower\n")


def capped(q, k, v, positions, dropout=None):
    """Attention with a soft cap on its scores, as someone might write it in model.py."""
    scores = q / math.sqrt(q.size(-1)) @ k.mT
    scores = 2 * torch.tanh(scores / 2) + model_module.causal_mask(positions, k.size(-2), q.dtype)
    weights = F.softmax(scores, dim=-1)
    return (weights if dropout is None else dropout(weights)) @ v, weights


@pytest.mark.parametrize("prepare", [for_training, *(functools.partial(for_inference, dtype=d, compile=c)
                                                     for d, c in PREPARATIONS)])
def test_another_attention_in_the_model_stays(monkeypatch, capsys, prepare):
    model, idx = random_model(0), torch.randint(37, (1, 9))
    unedited = model(idx)[0]
    monkeypatch.setattr(model_module, "attention", capped)
    dtype = getattr(prepare, "keywords", {}).get("dtype", "float32")
    exact, plain = (m(idx)[0] for m in reference(model, dtype))
    assert (plain - unedited).abs().max() > 0.1
    prepare(model)
    assert CausalSelfAttention in classes(model)
    assert_as_exact(model(idx)[0], plain, exact)
    assert capsys.readouterr().err.count("fast.py: CausalSelfAttention does not compute") == 1


@pytest.mark.parametrize("prepare", [for_training, for_inference, functools.partial(for_inference, compile=True)])
def test_an_attention_that_differs_from_layer_to_layer_stays(monkeypatch, capsys, prepare):
    """For example full attention in one layer, and in the next a window of the last 3 positions."""
    def attend(self, q, k, v, positions):
        if getattr(self, "window", None) is None:
            return right(self, q, k, v, positions)
        scores = q / math.sqrt(q.size(-1)) @ k.mT + model_module.causal_mask(positions, k.size(-2), q.dtype)
        too_far = positions[:, None] - torch.arange(k.size(-2)) >= self.window
        return scores.masked_fill(too_far, -math.inf).softmax(-1) @ v
    model, idx = random_model(0), torch.randint(37, (1, 9))
    unedited, right = model(idx)[0], CausalSelfAttention.attend
    monkeypatch.setattr(CausalSelfAttention, "attend", attend)
    model.h[1].attn.window = 3
    exact = copy.deepcopy(model).double()(idx)[0]
    assert (exact - unedited).abs().max() > 0.1
    prepare(model)
    assert_as_exact(model(idx)[0], None, exact)
    assert capsys.readouterr().err.count("fast.py: CausalSelfAttention does not compute") == 1


def test_nothing_is_said_about_an_unedited_model(capsys):
    for dtype, compile in PREPARATIONS:
        for_inference(for_training(random_model(0, tied=True)), dtype, compile)
    assert capsys.readouterr() == ("", "")


def test_other_processes_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(model_module, "attention", capped)
    for_training(random_model(0))
    assert capsys.readouterr().err == ""


def test_the_caches_are_of_one_kind():
    """What model.py does with a cache works with both."""
    methods = {name for name in vars(KVCache) if not name.startswith("__")}
    assert methods == {"nbytes", "positions", "append", "reset", "repeat"}
    assert StaticCache(GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=8), 3, 4).nbytes == 2 * 2 * 3 * 4 * 8 * 4


def test_minus_infinity_is_the_same_as_itself_only():
    """The logit of a token that is never chosen."""
    a = torch.tensor([1.0, -math.inf])
    assert fast.same(a, a) and not fast.same(a, torch.tensor([1.0, 2.0])) and not fast.same(torch.tensor([1.0, 2.0]), a)
    assert not fast.same(a, torch.tensor([1.1, -math.inf])) and not fast.same(a / 0 * 0, a)
