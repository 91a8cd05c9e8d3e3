"""bench_kv.py on a model of a few thousand parameters, and its picture; sample.py with int8 weights."""
import json
import re

import pytest

TINY_MODEL = '"char": GPTConfig(block_size=256, vocab_size=65, n_layer=2, n_head=2, n_embd=32),'


@pytest.fixture
def tiny(project):
    """A project whose bench_kv.py measures a tiny model, and the memory bandwidth of 4 MB."""
    path = project.folder / "bench_kv.py"
    source = path.read_text()
    for pattern, replacement in ((r'"char": GPTConfig\(.*\),', TINY_MODEL), (r"ones\([\d_]+", "ones(1_000_000")):
        source, n = re.subn(pattern, replacement, source)
        assert n == 1, pattern
    path.write_text(source)
    return project


def test_bench_kv(tiny):
    printed = tiny.run("bench_kv.py", "--model=char", "--compile=False", "--new_tokens=8", "--peers", "--json=kv.json")
    assert "the same text" in printed and "DIFFERS" not in printed
    size = f"{2 * 2 * 256 * 32 * 4:,}"  # 2 * n_layer * length * n_embd * bytes
    assert f"{size} bytes measured, {size} by" in printed
    records = json.loads((tiny.folder / "kv.json").read_text())
    keys = {"model", "peer", "dtype", "compile", "use_cache", "batch", "prompt", "new_tokens", "tokens_per_second"}
    assert all(keys <= r.keys() and r["tokens_per_second"] > 0 for r in records)
    assert {r["peer"] for r in records} == {None, "huggingface"} and {r["prompt"] for r in records} == {64, 128}
    tiny.run("plot.py", "--what=kv", "--json=kv.json", "--file=kv.svg")
    one = (tiny.folder / "kv.svg").read_text()
    assert "tokens per second" in one
    tiny.run("plot.py", "--what=kv", "--json=kv.json,kv.json", "--file=kv.svg")  # every bar of both
    bars = 'id="patch_'
    assert (tiny.folder / "kv.svg").read_text().count(bars) - one.count(bars) == sum(
        r["batch"] == 1 and r["prompt"] == 64 for r in records)


def test_bench_kv_of_a_trained_model(tiny, trained):
    out_dir = trained.folder / "out"
    printed = tiny.run("bench_kv.py", f"--out_dir={out_dir}", "--dtype=float32", "--compile=False", "--prompt=8",
                       "--new_tokens=8", "--repeats=1")
    assert "the same text" in printed and f"\n{out_dir}: " in printed
    # With no length named, those are taken that fit the model's context of 32.
    tiny.run("bench_kv.py", f"--out_dir={out_dir}", "--dtype=float32", "--compile=False", "--json=a.json")
    records = json.loads((tiny.folder / "a.json").read_text())
    assert {(r["prompt"], r["new_tokens"]) for r in records} == {(16, 16)}
    tiny.run("plot.py", "--what=kv", "--json=a.json", "--file=a.svg")
    assert "after a prompt of 16" in (tiny.folder / "a.svg").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--model=gpt5"], "'gpt5'"), (["--dtype=int4"], "'int4'"), (["--prompt=0"], "at least 1"),
    (["--batch=0"], "at least 1"), (["--new_tokens=1"], "new_tokens"), (["--repeats=0"], "repeats"),
    (["--model=char", "--out_dir=out"], "give one of them"), (["--json=config"], "config cannot be written")])
def test_errors_before_anything_is_imported(project, arguments, words):
    for name in ("torch", "numpy"):
        (project.folder / f"{name}.py").write_text("raise SystemExit('imported')")
    assert words in project.fails("bench_kv.py", *arguments, fresh=True)


@pytest.mark.parametrize("arguments, words", [
    (["--model=char", "--prompt=250"], "exceed the block_size"), (["--out_dir=none"], "train one first")])
def test_errors(tiny, arguments, words):
    assert words in tiny.fails("bench_kv.py", *arguments)


def test_sample_in_int8(trained):
    text = trained.run("sample.py", "--start=The old", "--dtype=int8", "--temperature=0", "--max_new_tokens=30")
    assert "The old" in text
