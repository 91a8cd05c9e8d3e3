import pytest

from checkpoint import load_model
from conftest import TEXT


def text(trained, *arguments):
    """What sample.py prints: the text, and nothing else."""
    return trained.run("sample.py", *arguments)


def test_text_follows_the_prompt_and_the_seed(trained):
    how = ["--start=The old", "--max_new_tokens=80"]
    first = text(trained, *how)
    assert first.startswith("The old") and len(first) == len("The old") + 80 + 1
    assert first == text(trained, *how) != text(trained, *how, "--seed=2")
    assert set(first) <= set(TEXT)


def test_greedy_text_is_generates(trained):
    model, tok, _ = load_model(trained.folder / "out")
    import torch
    ids = model.generate(torch.tensor([tok.encode("The fox")]), 60, temperature=0)[0].tolist()
    assert text(trained, "--start=The fox", "--max_new_tokens=60", "--temperature=0") == tok.decode(ids) + "\n"


def test_several_samples_and_a_prompt_from_a_file(trained):
    (trained.folder / "prompt.txt").write_text("The young")
    printed = text(trained, "--start=FILE:prompt.txt", "--num_samples=3", "--max_new_tokens=50")
    samples = printed.split("\n---\n")
    assert len(samples) == 3 and len(set(samples)) == 3 and all(s.startswith("The young") for s in samples)


def test_stop_ends_a_sample(trained):
    free = text(trained, "--start=The", "--max_new_tokens=200")
    stop = free[60:63]
    stopped = text(trained, "--start=The", "--max_new_tokens=200", f"--stop={stop}")
    assert stopped == free[:3 + free[3:].index(stop)] + "\n"


@pytest.mark.parametrize("arguments, words", [
    (["--out_dir=nowhere"], "train one first"), (["--start=ŵ"], "'ŵ' (U+0175) is not among"), (["--start="], "empty"),
    (["--start=FILE:none.txt"], "none.txt"), (["--start=FILE:"], "the name of a file"),
    (["--temperature=-1"], "temperature"), (["--top_k=0"], "top_k"), (["--top_p=1.5"], "top_p"),
    (["--repetition_penalty=1e-320"], "repetition_penalty"), (["--device=meta"], "'meta'"),
    (["--dtype=int3"], "dtype"), (["--num_samples=0"], "num_samples")])
def test_errors(trained, arguments, words):
    assert words in trained.fails("sample.py", *arguments)
