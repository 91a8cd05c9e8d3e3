"""Fast decoding: other dtypes, other layouts, and compiled code compute what the plain model does."""
import copy
import json
import shutil

import pytest
import torch

from model import Linear
from test_generate import random_model


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05), ("int8", 1e-5)])
def test_for_inference_computes_with_the_weights_as_stored(dtype, tolerance):
    model, idx = random_model(0, n_embd=48), torch.randint(37, (2, 12))
    fast = copy.deepcopy(model).for_inference(dtype)
    if dtype == "int8":  # the reference: the plain model with the rounded weights
        for ours, theirs in zip(model.modules(), fast.modules()):
            if isinstance(ours, Linear):
                ours.weight = torch.nn.Parameter(theirs.weight * theirs.scale[:, None])
    exact = model(idx)[0]
    assert (fast(idx)[0] - exact).abs().max() < tolerance * exact.abs().max()
    if dtype != "bfloat16":
        assert torch.equal(fast.generate(idx, 20, temperature=0), model.generate(idx, 20, temperature=0))


@pytest.mark.parametrize("out", [3, 8, 50, 64])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_without_gradients_and_packed(out, rows, bias):
    layer, x = Linear(24, out, bias=bias), torch.randn(2, rows, 48)[:, :, ::2]
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    layer.pack()
    torch.testing.assert_close(layer(x), expected)


def test_int8_rows_are_rounded_to_a_127th_of_their_largest_weight():
    layer = Linear(40, 30)
    weight = layer.weight.detach().clone()
    layer.quantize()
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().max() == 127
    error = (layer.weight * layer.scale[:, None] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all()
    x = torch.randn(3, 40)
    expected = x @ (layer.weight * layer.scale[:, None]).T + layer.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_compiled_decoding_writes_the_same_text(dtype):
    model, idx = random_model(1, n_embd=48, bias=dtype == "int8"), torch.randint(37, (1, 5))
    eager = copy.deepcopy(model).for_inference(dtype)
    compiled = copy.deepcopy(model).for_inference(dtype, compile=True)
    # Past block_size 16 too, where the window starts again.
    assert torch.equal(compiled.generate(idx, 40, temperature=0), eager.generate(idx, 40, temperature=0))
    samples = compiled.generate(idx, 6, temperature=0, num_samples=3)
    assert torch.equal(samples, eager.generate(idx, 6, temperature=0, num_samples=3))


def test_bench_kv(project):
    source = (project.folder / "bench_kv.py").read_text()
    small = "GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)"
    assert small in source and "x = torch.ones(100_000_000" in source
    (project.folder / "bench_kv.py").write_text(source.replace(
        small, "GPTConfig(block_size=256, vocab_size=65, n_layer=2, n_head=2, n_embd=32)").replace("100_000_000", "1_000_000"))
    printed = project.run("bench_kv.py", "--model=char", "--compile=False", "--new_tokens=8", "--peers", "--json=kv.json")
    assert "the same text" in printed and "DIFFERS" not in printed
    assert f"{2 * 2 * 256 * 32 * 4:,} bytes measured, {2 * 2 * 256 * 32 * 4:,} by" in printed
    records = json.loads((project.folder / "kv.json").read_text())
    keys = {"model", "peer", "dtype", "compile", "use_cache", "batch", "prompt", "new_tokens", "tokens_per_second"}
    assert all(keys <= r.keys() and r["tokens_per_second"] > 0 for r in records)
    assert {r["peer"] for r in records} == {None, "huggingface"} and {r["prompt"] for r in records} == {64, 128}
    project.run("plot.py", "--what=kv", "--json=kv.json", "--file=kv.svg")
    assert "tokens a second" in (project.folder / "kv.svg").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--model=gpt5"], "'gpt5'"), (["--dtype=int4"], "'int4'"), (["--model=char", "--prompt=250"], "exceed the block_size"),
    (["--out_dir=none"], "train one first"), (["--new_tokens=1"], "new_tokens")])
def test_bench_kv_errors(project, arguments, words):
    assert words in project.fails("bench_kv.py", *arguments)


def test_sample_in_int8(trained):
    text = trained.run("sample.py", "--start=The old", "--dtype=int8", "--temperature=0", "--max_new_tokens=30")
    assert "The old" in text
