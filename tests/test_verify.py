"""The classic mistakes in attention, planted one at a time, and the checks that find them; then the pictures.

verify_mha.py and verify_gradients.py say that model.py is right. That is worth something only if they can say that it
is wrong. So each test below replaces a function of model.py or fast.py by one with a mistake, and names the check that
must fail. The mistakes are ones that people make. Most of them train without an error, to a somewhat worse loss.
"""
import importlib
import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

import fast
import model

attention, causal_mask = model.attention, model.causal_mask  # the right ones, which the mistakes below start from
SHAPES = [(2, 7, 1, 16), (2, 7, 2, 16)]                      # B, T, n_head, n_embd of the comparisons here


# --- mistakes in the attention of one head ---

def no_scale(q, k, v, positions, dropout=None):
    """Scores that are not divided by sqrt(hs). Their variance is hs instead of 1, so in a large head the softmax puts
    nearly all weight on one position, and hardly any gradient passes."""
    return attention(q * math.sqrt(q.size(-1)), k, v, positions, dropout)


def scaled_by_hs(q, k, v, positions, dropout=None):
    """Scores that are divided by hs instead of sqrt(hs). Now they are too small: every position gets nearly the same
    weight, and attention becomes an average. For a head of size 1 nothing is wrong, so several sizes are checked."""
    return attention(q / math.sqrt(q.size(-1)), k, v, positions, dropout)


def mask_after_the_softmax(q, k, v, positions, dropout=None):
    """Weights of later positions set to zero after the softmax. The later scores stay in its denominator, so the rows
    no longer sum to 1, and how much is missing tells of the future. A later input changes the output: it leaks."""
    weights = F.softmax(q @ k.mT / math.sqrt(q.size(-1)), dim=-1) * causal_mask(positions, k.size(-2), q.dtype).exp()
    return weights @ v, weights


def no_mask(q, k, v, positions, dropout=None):
    """Every position sees every other. Training finds the next token in its input, so the loss falls to nearly zero;
    the text that such a model writes is noise."""
    return attention(q, k, v, torch.full_like(positions, k.size(-2) - 1), dropout)


def mask_shifted_by_one(positions, S, dtype):
    """Each position also sees the next one, which is the very token that it should predict. The loss gives it away, as
    above. If the mask were shifted the other way, the first position would see nothing, and its softmax give NaN."""
    return causal_mask(positions + 1, S, dtype)


def softmax_over_queries(q, k, v, positions, dropout=None):
    """dim=-2 for dim=-1: each key shares itself out among the queries. The shapes are the same, so nothing complains,
    but the weights of a query do not sum to 1."""
    scores = q / math.sqrt(q.size(-1)) @ k.mT + causal_mask(positions, k.size(-2), q.dtype)
    weights = F.softmax(scores, dim=-2)
    return weights @ v, weights


def fused_without_mask(self, q, k, v, positions):
    """F.scaled_dot_product_attention without is_causal=True. The written-out attention is right, so only a comparison
    of the fused path finds this."""
    return F.scaled_dot_product_attention(q, k, v)


# --- mistakes around the heads: how they are split, joined and projected ---

def split(z, n_head):
    """(B, T, C) -> (B, nh, T, hs)."""
    B, T, C = z.shape
    return z.view(B, T, n_head, C // n_head).transpose(1, 2)


def split_without_transposing(z, n_head):
    """The right shape with the wrong contents: the first "head" holds all features of the first positions. Only where
    there is one head is it right, so several numbers of heads are checked."""
    B, T, C = z.shape
    return z.reshape(B, n_head, T, C // n_head)


def join(y):
    """(B, nh, T, hs) -> (B, T, C)."""
    return y.transpose(1, 2).flatten(2)


def join_without_transposing(y):
    """The same mistake on the way out: a position gets features of several positions of one head, later ones too."""
    B, nh, T, hs = y.shape
    return y.reshape(B, T, nh * hs)


def join_by_view(y):
    """`view` promises not to copy, and after `transpose` it would have to. PyTorch raises an error, and says to use
    `reshape`; with one head, or one position, it works by luck."""
    B, nh, T, hs = y.shape
    return y.transpose(1, 2).view(B, T, nh * hs)


def forward(swap=False, split=split, join=join, project=True):
    """CausalSelfAttention.forward, put together anew from these parts.

    swap: takes what c_attn gives as K, Q, V. A model that is trained this way is as good, since Q and K are learned.
    But GPT-2's weights then give nonsense.
    project=False: leaves c_proj out, so that the result of one head never reaches the features of another."""
    def forward(self, x, positions=None, cache=None, layer=0):
        positions = torch.arange(x.size(1)) if positions is None else positions
        q, k, v = (split(z, self.n_head) for z in self.c_attn(x).chunk(3, dim=2))
        q, k = (k, q) if swap else (q, k)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = join(self.attend(q, k, v, positions))
        return self.c_proj(y) if project else y
    return forward


ATTENTION, FUSED = model.CausalSelfAttention, fast.FusedAttention
MISTAKES = {  # name: (what is replaced, by what, words of a check that must fail)
    "no scale": ((model, "attention"), no_scale, "variance of scores"),
    "scaled by hs": ((model, "attention"), scaled_by_hs, "variance of scores"),
    "mask after the softmax": ((model, "attention"), mask_after_the_softmax, "each row of weights sums to 1"),
    "mask after the softmax leaks": ((model, "attention"), mask_after_the_softmax, "later inputs"),
    "no mask": ((model, "attention"), no_mask, "later inputs"),
    "mask shifted by one": ((model, "causal_mask"), mask_shifted_by_one, "later inputs"),
    "fused mask shifted by one": ((fast, "causal_mask"), mask_shifted_by_one, "in three pieces, with a cache, fused"),
    "softmax over queries": ((model, "attention"), softmax_over_queries, "weights, written out"),
    "fused without a mask": ((FUSED, "attend"), fused_without_mask, "output, fused"),
    "q and k swapped": ((ATTENTION, "forward"), forward(swap=True), "output, fused"),
    "heads split without transposing": (
        (ATTENTION, "forward"), forward(split=split_without_transposing), "output, written out"),
    "heads joined without transposing": (
        (ATTENTION, "forward"), forward(join=join_without_transposing), "output, fused"),
    "output projection left out": ((ATTENTION, "forward"), forward(project=False), "output, fused"),
}


def failing_checks():
    """Yields the checks of verify_mha.py that fail, with model.py and fast.py as they are now."""
    verify_mha = importlib.reload(importlib.import_module("verify_mha"))  # its imports find the replaced functions
    torch.manual_seed(0)
    for checks in (verify_mha.check_against_torch(SHAPES), verify_mha.check_properties()):
        yield from (check.what for check in checks if not check.ok)


@pytest.mark.parametrize("name", MISTAKES)
def test_verify_mha_finds(monkeypatch, name):
    (where, what), wrong, words = MISTAKES[name]
    monkeypatch.setattr(where, what, wrong)
    assert any(words in what for what in failing_checks())


def test_verify_mha_finds_nothing_in_the_parts_that_the_mistakes_are_made_from(monkeypatch):
    assert list(failing_checks()) == []
    monkeypatch.setattr(ATTENTION, "forward", forward())
    assert list(failing_checks()) == []


def test_a_view_of_what_is_not_contiguous_is_an_error(monkeypatch):
    monkeypatch.setattr(ATTENTION, "forward", forward(join=join_by_view))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        list(failing_checks())


def test_a_nan_fails(monkeypatch):
    def nan(q, k, v, positions, dropout=None):
        y, weights = attention(q, k, v, positions, dropout)
        return y * math.nan, weights * math.nan
    monkeypatch.setattr(model, "attention", nan)
    assert {"output, written out", "later inputs change nothing, written out", "each row of weights sums to 1",
            "variance of scores, head size 4"} <= set(failing_checks())


# --- verify_mha.py as a script ---

def numbers(printed, first, last):
    """The numbers in the rows R, O and M of a table that stands between two headings."""
    part = printed[printed.index(first):printed.index(last)]
    return [[float(number) for number in row.split()] for row in re.findall(r"^ {5}[ROM] (.+)$", part, re.MULTILINE)]


def test_the_example_is_right(project):
    printed = project.run("verify_mha.py")
    assert printed.endswith("all checks passed\n") and "FAIL" not in printed and "fused" in printed
    assert max(map(len, printed.splitlines())) <= 120
    vectors = numbers(printed, "1. One head", "A key says")
    q, k, v = ([row[i:i + 2] for row in vectors] for i in (0, 2, 4))
    # By hand: no tensor, only a pocket calculator's operations.
    for t, letter in enumerate("ROM"):
        scores = [(q[t][0] * key[0] + q[t][1] * key[1]) / math.sqrt(2) for key in k]
        powers = [math.exp(score) if s <= t else 0.0 for s, score in enumerate(scores)]
        weights = [power / sum(powers) for power in powers]
        output = [sum(w * value[i] for w, value in zip(weights, v, strict=True)) for i in range(2)]
        for first, last, expected in (("Step 1", "Step 2", scores), ("Step 3", "Step 4", weights),
                                      ("Step 4", "2. Against", output)):
            assert numbers(printed, first, last)[t] == pytest.approx(expected, abs=0.005), letter
        assert numbers(printed, "Step 2", "Step 3")[t] == [0.0] * (t + 1) + [-math.inf] * (2 - t)


def test_verify_mha_needs_only_the_model(project):
    for path in project.folder.glob("*.py"):
        if path.name not in ("verify_mha.py", "model.py", "configurator.py", "files.py"):
            path.unlink()
    printed = project.run("verify_mha.py")
    assert "\n   fast.py is not here, so only the attention of model.py is checked.\n" in printed
    assert printed.endswith("all checks passed\n") and "fused" not in printed


def test_verify_mha_exits_with_1_if_a_check_fails(project):
    with open(project.folder / "model.py", "a") as f:
        f.write("\n\ndef causal_mask(positions, S, dtype):\n    return torch.zeros(len(positions), S, dtype=dtype)\n")
    done = project.finish("verify_mha.py", "--verbose")
    assert done.returncode == 1 and "\nFAIL  float64   later inputs" in done.stdout and "checks failed" in done.stdout


# --- verify_gradients.py ---

def test_verify_gradients_and_its_picture(project):
    printed = project.run("verify_gradients.py", "--json=g.json", "--steps=2", "--depths=2,3")
    assert "gradient flow: ok; finite differences: ok" in printed
    assert max(map(len, printed.splitlines())) <= 120
    records = json.loads((project.folder / "g.json").read_text())
    assert len(records) == 3 * 2 * (2 + 3)
    project.run("plot.py", "--what=gradients", "--json=g.json", "--file=g.svg")
    svg = (project.folder / "g.svg").read_text()
    assert "Pre-LN, 3 layers" in svg and "mathdefault" not in svg  # a formula's source in the axis labels
    assert "more than once" in project.fails("plot.py", "--what=gradients", "--json=g.json,g.json")


def test_training_starts_without_a_gradient(verify_gradients):
    """The first look at the gradient must not change it."""
    models = [verify_gradients.build(model.Block, 2) for _ in range(2)]
    verify_gradients.gradient_norms(models[0])
    for one in models:
        verify_gradients.train(one)
    for a, b in zip(*(one.parameters() for one in models), strict=True):
        assert torch.equal(a, b)


def test_verify_gradients_needs_no_fast_layers(project):
    (project.folder / "fast.py").unlink()
    printed = project.run("verify_gradients.py", "--steps=1", "--depths=2")
    assert "fast.py" not in printed and printed.endswith("gradient flow: ok; finite differences: ok\n")


def test_verify_mha_of_an_attention_with_other_parameters(project):
    """The second part fails in one line, and the third still runs."""
    path = project.folder / "model.py"
    code, old = path.read_text(encoding="utf-8"), "        self.resid_dropout = nn.Dropout(config.dropout)\n\n"
    assert code.count(old) == 1
    code = code.replace(old, old[:-1] + "        self.slope = nn.Parameter(torch.ones(1))\n\n")
    path.write_text(code, encoding="utf-8")
    done = project.finish("verify_mha.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert 'FAIL  the rest cannot be compared' in done.stdout and '"slope"' in done.stdout
    assert "ok    float64   input stored with gaps in time, written out" in done.stdout
    assert done.stdout.endswith("\n1 checks failed\n")


def test_verify_gradients_of_blocks_without_a_second_norm(project):
    path = project.folder / "model.py"
    code = path.read_text(encoding="utf-8")
    for old, new in (("        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)\n", ""),
                     ("x = x + self.mlp(self.ln_2(x))", "x = x + self.mlp(self.ln_1(x))")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    path.write_text(code, encoding="utf-8")
    printed = project.run("verify_gradients.py", "--json=g.json", "--steps=1", "--depths=2")
    assert "model.py's blocks have no ln_2" in printed and "gradient flow: not measured" in printed
    assert not (project.folder / "g.json").exists()


@pytest.fixture
def verify_gradients(monkeypatch):
    module = importlib.import_module("verify_gradients")
    monkeypatch.setattr(module, "depths", "2")
    monkeypatch.setattr(module, "steps", 1)
    return module


def gradient_of_keys_lost(q, k, v, positions, dropout=None):
    """The output is right, and the backward pass leaves the keys out: the mistake of a kernel that someone wrote by
    hand, which no comparison of outputs can find."""
    return attention(q, k.detach(), v, positions, dropout)


def gradient_of_the_mlp_lost(self, x, positions=None, cache=None, layer=0):
    """A block whose MLP sends no gradient to the stream. It trains, and the blocks before it learn too little."""
    x = x + self.attn(self.ln_1(x), positions, cache, layer)
    return x + self.mlp(self.ln_2(x.detach()))


right_attend = FUSED.attend


class WrongBackward(torch.autograd.Function):
    """q * 1, whose gradient is too large by a thousandth: the mistake of a kernel whose backward pass has another scale
    than its forward pass."""

    @staticmethod
    def forward(ctx, q):
        return q * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001


def backward_with_another_scale(self, q, k, v, positions):
    return right_attend(self, WrongBackward.apply(q), k, v, positions)


@pytest.mark.parametrize("where, what, wrong", [
    (model, "attention", gradient_of_keys_lost), (model.Block, "forward", gradient_of_the_mlp_lost),
    (FUSED, "attend", backward_with_another_scale)], ids=["keys", "MLP", "fused kernel"])
def test_a_wrong_gradient_is_found(monkeypatch, verify_gradients, capsys, where, what, wrong):
    monkeypatch.setattr(where, what, wrong)
    monkeypatch.setattr(fast, "computes_the_same", lambda *args: True)  # which would leave the fused kernel out
    assert verify_gradients.main() == 1
    assert "finite differences: FAIL" in capsys.readouterr().out


def test_a_scaled_attention_kernel_is_found_in_the_flow(monkeypatch, verify_gradients, capsys):
    """A kernel whose gradient is right for what it computes, but whose output is a hundred times too large, passes the
    finite differences. The first block's gradient then dwarfs the others'."""
    def too_large(self, x, positions=None, cache=None, layer=0):
        x = x + (100 if layer == 0 else 1) * self.attn(self.ln_1(x), positions, cache, layer)
        return x + self.mlp(self.ln_2(x))
    monkeypatch.setattr(model.Block, "forward", too_large)
    assert verify_gradients.main() == 1
    assert "gradient flow: FAIL; finite differences:" in capsys.readouterr().out


@pytest.mark.parametrize("argument, words", [("--depths=6,x", "'6,x'"), ("--depths=1", "from 2 to 1000"),
                                             ("--steps=0", "at least 1"), ("--json=.", ". cannot be written"),
                                             ("--json=model.py/g.json", "cannot be written"),
                                             ("--json=/dev/null", "cannot be written")])
def test_errors_of_verify_gradients(project, argument, words):
    assert words in project.fails("verify_gradients.py", argument)


def test_fast_py_measures_at_least_once(project):
    assert "turns must be at least 1, got 0" in project.fails("fast.py", "--turns=0")


# --- pictures ---

def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(trained, tmp_path):
    folder = tmp_path / "_run"
    folder.mkdir()
    shutil.copy(trained.folder / "out" / "log.csv", folder)
    done = trained.finish("plot.py", "--what=loss", "--out_dir=_run", "--file=a.svg", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "./_run: training" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("norms", [[1.0], [1.0, 0.0]])
def test_a_picture_of_gradients_needs_all_blocks(project, norms):
    records = [{"blocks": "Pre-LN", "n_layer": 2, "when": when, "block": norm}
               for when in ("at start", "trained") for norm in norms]
    (project.folder / "g.json").write_text(json.dumps(records))
    assert "Pre-LN with 2 layers should have 2 norms above 0 at start" in project.fails(
        "plot.py", "--what=gradients", "--json=g.json")


def test_pictures_of_a_run(trained, tmp_path):
    trained.run("plot.py", f"--file={tmp_path}/default.svg")  # draws the characters of the default text that it knows
    trained.run("plot.py", "--start=The old fox", f"--file={tmp_path}/all.png")
    trained.run("plot.py", "--start=The old fox", "--layer=1", "--head=0", f"--file={tmp_path}/one.svg")
    svg = (tmp_path / "one.svg").read_text()
    assert "layer 1, head 0" in svg and "layer 0" not in svg
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    trained.run("plot.py", "--what=loss", "--out_dir=out,out", "--x=seconds", f"--file={tmp_path}/loss.svg")
    svg = (tmp_path / "loss.svg").read_text()
    assert "seconds of training" in svg and "out: training" in svg and "out: validation" in svg


@pytest.mark.parametrize("arguments, words", [
    (["--what=pie"], "'pie'"), (["--layer=9"], "layer must be from 0 to 1"), (["--start="], "0 tokens"),
    (["--layer=-1"], "layer must be at least 0"), (["--head=2"], "head must be from 0 to 1"),
    (["--file=x.gif"], ".png or .svg"), (["--what=loss", "--out_dir=none"], "log.csv"),
    (["--out_dir=none"], "train one"),
    (["--what=gradients"], "--json=FILE"), (["--what=loss", "--x=tokens"], "steps or seconds"),
    (["--what=kv", "--json=kv.json,"], "json must be names separated by commas, got 'kv.json,'"),
    (["--what=loss", "--out_dir=out,"], "out_dir must be names separated by commas, got 'out,'")])
def test_plot_errors(trained, arguments, words):
    assert words in trained.fails("plot.py", "--start=The old", *arguments)


@pytest.mark.parametrize("text, words", [
    ("[", "not JSON"), ("{}", "list of records"), ("[]", "list of records"), ("[3]", "blocks is None"),
    ('[{"blocks": "Pre-LN", "n_layer": 2, "when": "trained", "block": "x"}]', "block is 'x'"),
    ('[{"blocks": "Pre-LN", "n_layer": 2, "when": "trained", "block": 1e308}]', "block is 1e+308"),
    ('[{"blocks": "\\ud800", "n_layer": 2, "when": "trained", "block": 1}]', "not JSON"), ("[" * 10 ** 5, "not JSON")])
def test_plot_names_a_damaged_file(project, text, words):
    (project.folder / "figures.json").write_text(text)
    error = project.fails("plot.py", "--what=gradients", "--json=figures.json")
    assert words in error and "figures.json" in error


def test_plot_draws_any_words_and_refuses_a_picture_that_is_too_large(project):
    record = {"arguments": ["$\\frac$", "\0"], "dtype": "$x", "device": "y$", "parts": {"a$b$": 1.0}}
    for name, records in (("a", [record]), ("b", [record | {"parts": {"a": {}}}]), ("c", [record] * 1000)):
        (project.folder / f"{name}.json").write_text(json.dumps(records))
    project.run("plot.py", "--what=train", "--json=a.json", "--file=a.svg")
    assert "parts is {'a': {}}" in project.fails("plot.py", "--what=train", "--json=b.json")
    assert "pixels, which is too large" in project.fails("plot.py", "--what=train", "--json=c.json")


@pytest.mark.parametrize("text", ["", "iter,tokens\n1,2\n", "iter,seconds,loss,train_loss,val_loss\n1,1,x,,\n",
                                  "iter,seconds,loss,train_loss,val_loss\n1,1,,,\n"])
def test_plot_names_a_damaged_log(project, text):
    (project.folder / "out").mkdir()
    (project.folder / "out" / "log.csv").write_text(text)
    assert "log.csv" in project.fails("plot.py", "--what=loss")


@pytest.mark.parametrize("arguments", [["--what=pie"], ["--file=x.gif"], ["--what=kv"], ["--x=tokens"]])
def test_plot_answers_before_it_imports(project, arguments):
    for name in ("torch", "matplotlib", "numpy"):
        (project.folder / f"{name}.py").write_text("raise SystemExit('imported')")
    project.fails("plot.py", *arguments, fresh=True)


def test_matplotlib_missing(project):
    (project.folder / "matplotlib.py").write_text("raise ImportError")
    (project.folder / "g.json").write_text('[{"blocks": "Pre-LN", "n_layer": 2, "when": "trained", "block": 1}]')
    error = project.fails("plot.py", "--what=gradients", "--json=g.json", fresh=True)
    assert "pip install matplotlib" in error
