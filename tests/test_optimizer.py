import copy
import math

import pytest
import torch

from files import UserError
from model import GPT, GPTConfig
from optimizer import Muon, make_optimizers, orthogonalize, schedule


def model_and_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=32))
    return model, torch.randint(29, (4, 16)), torch.randint(29, (4, 16))


@pytest.mark.parametrize("warmup, n, ratio", [(0, 10, 0.1), (3, 10, 0.1), (10, 10, 0.0), (1, 1, 0.5)])
def test_schedule(warmup, n, ratio):
    for i in range(n):
        if i < warmup:
            expected = (i + 1) / (warmup + 1)
        else:
            expected = ratio + (1 - ratio) * (1 + math.cos(math.pi * (i - warmup) / (n - warmup))) / 2
        assert schedule(i, warmup, n, ratio) == pytest.approx(expected, rel=1e-12)
        line = expected if i < warmup else ratio + (1 - ratio) * (n - i) / (n - warmup)
        assert schedule(i, warmup, n, ratio, "linear") == pytest.approx(line, rel=1e-12)
    assert schedule(n + 5, warmup, n, ratio) == schedule(n + 5, warmup, n, ratio, "linear") == pytest.approx(ratio)


def test_muon_is_torchs():
    ours, x, y = model_and_batch()
    theirs = copy.deepcopy(ours)
    steps = []
    for model, Optimizer in ((ours, Muon), (theirs, torch.optim.Muon)):
        hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("h.")]
        steps.append((model, Optimizer(hidden, lr=0.02, weight_decay=0.1, momentum=0.95), hidden))
    for _ in range(4):
        for model, muon, _ in steps:
            model(x, y)[1].backward()
            muon.step()
            model.zero_grad()
    for p, q in zip(steps[0][2], steps[1][2], strict=True):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=0)  # both orthogonalise in bfloat16; a step moves 0.02


def test_muon_takes_stacked_matrices_apart():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(30, 10))
    single = [torch.nn.Parameter(m.clone()) for m in stacked.detach().split(10)]
    ours = Muon([{"params": [stacked], "parts": 3}], lr=0.02)
    theirs = torch.optim.Muon(single, lr=0.02, weight_decay=0.0)
    for _ in range(3):
        stacked.grad = torch.randn(30, 10)
        for p, g in zip(single, stacked.grad.clone().split(10), strict=True):
            p.grad = g
        ours.step()
        theirs.step()
    torch.testing.assert_close(stacked, torch.cat(single), atol=2e-4, rtol=0)


def test_even_rows():
    """Against the formula, one matrix after the other, in float64."""
    torch.manual_seed(0)
    for shape, parts in (((12, 30), 1), ((30, 12), 1), ((30, 10), 3)):
        params = [torch.nn.Parameter(torch.randn(shape).double()) for _ in range(2)]
        plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
        ours = Muon([{"params": params, "parts": parts}], lr=0.02, beta2=0.9, dtype=torch.float64)
        reference = Muon([{"params": plain, "parts": parts}], lr=0.02, dtype=torch.float64)
        means = [torch.zeros(shape[0]).double() for _ in params]
        for step in range(4):
            before, plain_before = ([p.detach().clone() for p in ps] for ps in (params, plain))
            for p, q in zip(params, plain, strict=True):
                p.grad = torch.randn(shape).double() * torch.linspace(0.1, 3, shape[0])[:, None] ** 2
                q.grad = p.grad.clone()
            ours.step()
            reference.step()
            for i, (p, q) in enumerate(zip(params, plain, strict=True)):
                u = q.detach() - plain_before[i]
                means[i] = 0.9 * means[i] + 0.1 * (u ** 2).mean(1)
                expected = u / means[i].sqrt()[:, None]
                expected *= u.norm() / expected.norm()
                moved = p.detach() - before[i]
                torch.testing.assert_close(moved, expected, atol=1e-9, rtol=1e-6)
                rows = moved.norm(dim=1)
                if step == 0:  # the running mean is that of this step alone
                    torch.testing.assert_close(rows, rows.mean().expand_as(rows), atol=1e-9, rtol=1e-6)


def test_even_rows_of_nothing():
    p = torch.nn.Parameter(torch.ones(4, 6))
    muon = Muon([p], lr=0.02, beta2=0.95)
    for row in (None, 2):  # no gradient at all, then one in a single row
        p.grad = torch.zeros(4, 6)
        if row is not None:
            p.grad[row] = 1.0
        muon.step()
        assert torch.isfinite(p).all()
    assert torch.equal(p[:2], torch.ones(2, 6)) and (p[2] < 1).all()


def names_in_groups(model, optimizer):
    """The names of the parameters in each group, in order."""
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def test_groups_and_parameters_keep_their_order():
    """A checkpoint stores the moments in this order, so another order would load them into other parameters."""
    model = model_and_batch()[0]
    (muon, _), (adamw, _) = make_optimizers(model, "muon", 1e-3)
    assert names_in_groups(model, muon) == [
        ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"],
        [f"h.{i}.{name}.weight" for i in (0, 1) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]]
    assert [g["parts"] for g in muon.param_groups] == [3, 1]
    vectors = [name for name, p in model.named_parameters() if p.dim() == 1]
    assert names_in_groups(model, adamw) == [["wte.weight", "wpe.weight"], vectors]
    (adamw, _), = make_optimizers(model, "adamw", 1e-3)
    assert names_in_groups(model, adamw) == [[n for n, p in model.named_parameters() if p.dim() == 2], vectors]


def test_muon_takes_queries_keys_and_values_apart_only_if_they_are_equally_wide():
    """With fewer keys and values than queries, c_attn's rows do not split into three."""
    model, x, y = model_and_batch()
    for block in model.h:
        block.attn.c_attn = torch.nn.Linear(32, 32 + 2 * 16, bias=False)
    muon = make_optimizers(model, "muon", 1e-3)[0][0]
    assert [g["parts"] for g in muon.param_groups] == [1] and len(muon.param_groups[0]["params"]) == 8
    for p in muon.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    muon.step()


def test_muon_finds_its_matrices_under_any_name():
    model, x, y = model_and_batch()
    expected = names_in_groups(model, make_optimizers(model, "muon", 1e-3)[0][0])
    model.layers = model.h
    del model.h
    muon = make_optimizers(model, "muon", 1e-3)[0][0]
    assert names_in_groups(model, muon) == [["layers" + n[1:] for n in names] for names in expected]
    # A head of its own is not Muon's either, nor is a linear layer that shares an embedding's matrix.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(29, 32))
    model.back_to_ids = torch.nn.Linear(32, 29, bias=False)
    model.back_to_ids.weight = model.wte.weight
    muon, adamw = (o for o, _ in make_optimizers(model, "muon", 1e-3))
    assert names_in_groups(model, muon) == [["layers" + n[1:] for n in names] for names in expected]
    assert {"lm_head.weight", "wte.weight"} <= set(names_in_groups(model, adamw)[0])


def test_muon_without_a_matrix_is_an_error():
    model = model_and_batch()[0]
    model.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="'muon' finds no linear layer"):
        make_optimizers(model, "muon", 1e-3)
    make_optimizers(model, "adamw", 1e-3)


def test_orthogonalize_in_float32():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20), (1, 16, 16)):
        m = torch.randn(shape)
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        o = orthogonalize(m)
        assert o.shape == m.shape
        singular = torch.linalg.svdvals(o)
        assert singular.min() > 0.3 and singular.max() < 1.3
        # The singular vectors stay: in their basis the result is diagonal.
        rotated = u.mT @ o @ vh.mT
        torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 64, 150), (2, 256, 64), (2, 70, 70), (1, 20, 50), (1, 1, 9)])
@pytest.mark.parametrize("singular", ["similar", "from 1 to 1e-7", "a single one", "none"])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(shape, singular):
    """For many columns it computes in another order, in which singular values near 0 could grow."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    n = u.size(-1)
    values = {"similar": torch.rand(n) + 0.1, "from 1 to 1e-7": 10 ** torch.linspace(0, -7, n),
              "a single one": torch.eye(n)[0], "none": torch.zeros(n)}[singular].double()
    m = (u * values) @ vh
    new = values / values.norm().clamp(min=1e-7)
    for _ in range(5):
        new = 3.4445 * new - 4.7750 * new ** 3 + 2.0315 * new ** 5
    for dtype, allowed in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
        torch.testing.assert_close(orthogonalize(m.to(dtype)).double(), (u * new) @ vh, atol=allowed, rtol=0)


def test_matrices_of_all_shapes_together():
    """Each parameter moves as it does alone."""
    torch.manual_seed(0)
    shapes = ((30, 10), 3), ((10, 10), 1), ((10, 40), 1), ((40, 10), 1), ((10, 40), 1), ((7, 9), 1)
    together = [torch.nn.Parameter(torch.randn(shape)) for shape, _ in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    settings = dict(lr=0.02, beta2=0.9, weight_decay=0.1, dtype=torch.float32)
    muon = Muon([{"params": [together[0]], "parts": 3}, {"params": together[1:]}], **settings)
    single = [Muon([{"params": [p], "parts": parts}], **settings) for p, (_, parts) in zip(alone, shapes, strict=True)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = None if step == 1 and i == 2 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        for m in (muon, *single):
            m.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


def test_which_parameters_go_where():
    model, _, _ = model_and_batch()
    names = {p: name for name, p in model.named_parameters()}
    (muon, rate), (adamw, _) = make_optimizers(model, "muon", 1e-3, 0.05, weight_decay=0.1)
    assert rate == 0.05
    matrices = {names[p] for g in muon.param_groups for p in g["params"]}
    assert matrices == {n for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2}
    decayed, others = ({names[p] for p in g["params"]} for g in adamw.param_groups)
    assert decayed == {"wte.weight", "wpe.weight"} and all("ln" in n or "bias" in n for n in others)
    assert len(matrices) + len(decayed) + len(others) == len(names)
    (adamw, _), = make_optimizers(model, "adamw", 1e-3, weight_decay=0.1)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]
    assert all((p.dim() >= 2) == (g["weight_decay"] > 0) for g in adamw.param_groups for p in g["params"])
    with pytest.raises(UserError, match="'adamw' or 'muon', got 'sgd'"):
        make_optimizers(model, "sgd", 1e-3)
