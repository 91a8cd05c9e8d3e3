"""The verifying and drawing scripts: that they pass, and that a planted bug makes verify_mha.py fail."""
import json
import os
import subprocess

import pytest

from conftest import Project

SMALLER = "SHAPES = [(2, 7, 1, 16), (2, 7, 2, 16)]\n"  # with more shapes, each of these tests would take long


@pytest.fixture
def verify(tmp_path):
    project = Project(tmp_path)
    path = project.folder / "verify_mha.py"
    source = path.read_text()
    begin, end = source.index("SHAPES = "), source.index("RELATIVE = ")
    path.write_text(source[:begin] + SMALLER + source[end:])
    return project


BUGS = {  # name: (what stands in model.py, what is planted, words of a check that must fail)
    "no scale": ("/ math.sqrt(hs)", "/ 1.0", "variance of scores"),
    "scaled by hs": ("/ math.sqrt(hs)", "/ hs", "variance of scores"),
    "mask after the softmax": (
        "F.softmax(scores + causal_mask(T, S, q), dim=-1)",
        "F.softmax(scores, dim=-1) * causal_mask(T, S, q).exp()", "each row of weights sums to 1"),
    "no mask": ("scores + causal_mask(T, S, q)", "scores", "later inputs"),
    "mask shifted by one": ("triu(diagonal=S - T + 1)", "triu(diagonal=S - T + 2)", "later inputs"),
    "softmax over queries": ("causal_mask(T, S, q), dim=-1)", "causal_mask(T, S, q), dim=-2)", "weights, written out"),
    "fast path without a mask": ("dropout_p, is_causal=True", "dropout_p, is_causal=False", "output, fast"),
    "heads and time not transposed": (".view(B, T, self.n_head, C // self.n_head).transpose(1, 2)",
                                      ".reshape(B, self.n_head, T, C // self.n_head)", "output, written out"),
    "heads put together without transposing": ("y.transpose(1, 2).reshape(B, T, C)", "y.reshape(B, T, C)", "output, fast"),
    "q and k swapped": ("q, k, v = (z.view", "k, q, v = (z.view", "output, fast"),
    "output projection left out": ("self.resid_dropout(self.c_proj(y))", "self.resid_dropout(y)", "output, fast"),
    "view of what is not contiguous": ("y.transpose(1, 2).reshape(B, T, C)", "y.transpose(1, 2).view(B, T, C)", None),
}


def test_verify_mha_passes(verify):
    printed = verify.run("verify_mha.py")
    assert printed.endswith("all checks passed\n") and "FAIL" not in printed


@pytest.mark.parametrize("name", BUGS)
def test_verify_mha_finds(verify, name):
    right, wrong, words = BUGS[name]
    model = verify.folder / "model.py"
    source = model.read_text()
    assert source.count(right) == 1
    model.write_text(source.replace(right, wrong))
    done = subprocess.run(verify.command("verify_mha.py"), cwd=verify.folder, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "view size is not compatible" in done.stderr if words is None else any(words in line for line in failed), failed


def test_verify_gradients_and_its_picture(project):
    path = project.folder / "verify_gradients.py"
    path.write_text(path.read_text().replace("DEPTHS = 6, 12, 24", "DEPTHS = 2, 3"))
    printed = project.run("verify_gradients.py", "--json=g.json", "--steps=2")
    assert "gradient flow: ok; finite differences: ok" in printed
    records = json.loads((project.folder / "g.json").read_text())
    assert len(records) == 3 * 2 * (2 + 3)
    project.run("plot.py", "--what=gradients", "--json=g.json", "--file=g.svg")
    assert "Pre-LN, 3 layers" in (project.folder / "g.svg").read_text()


def test_a_wrong_gradient_is_found(project):
    model = project.folder / "model.py"
    model.write_text(model.read_text().replace("x = x + self.mlp(self.ln_2(x))", "x = x + self.mlp(self.ln_2(x.detach()))"))
    path = project.folder / "verify_gradients.py"
    path.write_text(path.read_text().replace("DEPTHS = 6, 12, 24", "DEPTHS = 2,"))
    with pytest.raises(AssertionError, match="finite differences: FAIL"):
        project.run("verify_gradients.py", "--steps=1")


def test_pictures_of_a_run(trained):
    trained.run("plot.py", "--start=The old fox", "--file=all.png")
    trained.run("plot.py", "--start=The old fox", "--layer=1", "--head=0", "--file=one.svg")
    svg = (trained.folder / "one.svg").read_text()
    assert "layer 1, head 0" in svg and "layer 0" not in svg
    assert (trained.folder / "all.png").read_bytes().startswith(b"\x89PNG")
    trained.run("plot.py", "--what=loss", "--out_dir=out,out", "--x=seconds", "--file=loss.svg")
    assert "seconds of training" in (trained.folder / "loss.svg").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--what=pie"], "'pie'"), (["--layer=9"], "layer must be from 0 to 1"), (["--start="], "0 tokens"),
    (["--file=x.gif"], ".png or .svg"), (["--what=loss", "--out_dir=none"], "log.csv"), (["--out_dir=none"], "train one"),
    (["--what=gradients"], "--json=FILE"), (["--what=loss", "--x=tokens"], "steps or seconds")])
def test_plot_errors(trained, arguments, words):
    assert words in trained.fails("plot.py", "--start=The old", *arguments)
