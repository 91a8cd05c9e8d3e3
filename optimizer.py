"""What turns gradients into steps: AdamW, Muon, which parameters go to which, and the learning rate's schedule.

    optimizers = make_optimizers(model, "muon", learning_rate=3e-3, muon_learning_rate=0.02)
    share = schedule(step, warmup_iters=100, decay_iters=2000, final=0.1)      # times each optimizer's peak rate

AdamW is PyTorch's. It keeps two running means for each weight: of its gradient (beta1) and of the gradient's square
(beta2). It divides the first by the root of the second, so all weights take steps of similar size, however large their
gradients are. Muon is written out below.
"""
import math

import torch

from distributed import gathered, shard_like  # with FSDP: put a split tensor together, and split it again
from files import UserError
from model import CausalSelfAttention


def schedule(step, warmup_iters, decay_iters, final, curve="cosine"):
    """The learning rate of a step (from 0) as a share of its peak. It rises linearly over warmup_iters steps. Then it
    falls along half a cosine (Loshchilov & Hutter 2017, SGDR, without restarts) or, with curve="linear", along a line
    (Defazio et al. 2023, "Optimal linear decay learning rate schedules and further refinements"). It reaches `final` at
    step decay_iters and stays there. If decay_iters is not above warmup_iters, it drops to it right after the peak."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, decay_iters - warmup_iters))
    left = 1.0 - progress if curve == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return final + (1.0 - final) * left


# --- Muon ---

A, B, C = 3.4445, -4.7750, 2.0315  # coefficients of the iteration below (Jordan et al. 2024)
STEPS = 5


def orthogonalize(m):
    """(N, rows, cols) -> the same matrices with all singular values brought near 1, by the Newton-Schulz iteration
    X <- A X + B (X Xt) X + C (X Xt)^2 X. The coefficients trade exactness for speed: values above 0.002 of the norm end
    between 0.68 and 1.21. Smaller ones stay smaller."""
    rows, cols = m.shape[-2:]
    if rows > cols:  # then the transpose has the smaller X Xt
        return orthogonalize(m.mT).mT
    # The iteration needs singular values of at most 1. None is larger than the Frobenius norm.
    m = m / torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if cols >= 2 * rows and rows >= 64 and m.device.type == "cpu" and m.itemsize > 2:
        # Fewer multiplications, which pays from about 64 rows on.
        return multiplied_factors(m @ m.mT) @ m
    for _ in range(STEPS):
        gram = m @ m.mT  # X Xt
        # A X + (B gram + C gram^2) X; baddbmm(x, y, z, beta, alpha) is beta * x + alpha * (y @ z)
        m = torch.baddbmm(m, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), m, beta=A)
    return m


def multiplied_factors(gram):
    """X Xt (N, rows, rows) -> the product of all factors by which the iteration multiplies X. Each step multiplies X by
    F = A I + B (X Xt) + C (X Xt)^2, and therefore X Xt by F from both sides. So the steps need only X Xt, which is
    smaller than a wide X (Amsel et al. 2025, "The Polar Express", appendix F). A step multiplies the rounding errors of
    X Xt by up to twelve, so this needs float32 (without TF32, so it is left to CPUs) and few steps."""
    product = None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    return product


class Muon(torch.optim.Optimizer):
    """Steps along the running mean of the gradient (its momentum), after `orthogonalize` has made the singular values
    of each matrix about equal. Otherwise a few large ones dominate the step (Jordan et al. 2024, "Muon: an optimizer
    for hidden layers in neural networks"). Matrices of one shape are orthogonalised together, in `dtype`;
    torch.optim.Muon takes one at a time, in bfloat16. A group's `parts` says how many matrices are stacked in each of
    its parameters. With `beta2`, the rows of a step become about equally large as well: see `even_rows`."""

    def __init__(self, params, lr=0.02, momentum=0.95, beta2=0.0, weight_decay=0.0, parts=1, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, parts=parts))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One step from the gradients in .grad, which it overwrites."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                torch._foreach_lerp_(grads, buffers, momentum)  # Nesterov: mean and newest gradient mixed, in place
                updates = torch.stack([gathered(g) for g in grads]).to(self.dtype)
                rows, cols = shape[0] // group["parts"], shape[1]
                updates = orthogonalize(updates.view(-1, rows, cols)).view(-1, *shape).to(params[0].dtype)
                if group["beta2"] > 0.0:
                    updates = self.even_rows(updates, params, group["beta2"])
                updates = [shard_like(u, p) for u, p in zip(updates, params, strict=True)]
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                # An orthogonal matrix keeps the length of the vectors that it multiplies. With more rows than columns,
                # it spreads this length over more outputs, so each changes less. The factor makes up for that.
                torch._foreach_add_(params, updates, alpha=-lr * max(1, rows / cols) ** 0.5)

    def even_rows(self, updates, params, beta2):
        """Updates (N, rows, cols) of N parameters -> the same, with rows of about equal size. A row belongs to one
        output of a layer. After the orthogonalisation, some rows are still much larger than others. So each row is
        divided by the root of a running mean of its squares, and each update is then scaled back to the norm that it
        had (Li et al. 2025, "NorMuon: Making Muon more efficient and scalable")."""
        squares = updates.square().mean(dim=-1, keepdim=True)  # (N, rows, 1)
        squares = [shard_like(s, p) for s, p in zip(squares, params, strict=True)]
        means = [self.state[p].setdefault("row_squares", torch.zeros_like(s))
                 for s, p in zip(squares, params, strict=True)]
        torch._foreach_lerp_(means, squares, 1 - beta2)
        running = torch.stack([gathered(m) for m in means])
        even = updates / running.sqrt().clamp(min=1e-7)
        norm_before, norm_after = (torch.linalg.matrix_norm(u, keepdim=True) for u in (updates, even))
        return even * (norm_before / norm_after.clamp(min=1e-7))


# --- which parameters go where ---

def hidden_matrices(model):
    """The weights of all linear layers but the output layer, {parameter: how many matrices are stacked in it}."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = getattr(model, "lm_head", None)  # a changed model.py may have none, nor c_attn
    found = {m.weight: 1 for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for m in model.modules():
        c_attn = getattr(m, "c_attn", None) if isinstance(m, CausalSelfAttention) else None
        if isinstance(c_attn, torch.nn.Linear) and c_attn.out_features == 3 * c_attn.in_features:
            found[c_attn.weight] = 3  # the queries', the keys' and the values'
    return {p: parts for p, parts in found.items() if p not in embeddings}


def make_optimizers(model, optimizer, learning_rate, muon_learning_rate=0.02, weight_decay=0.0, beta1=0.9, beta2=0.95,
                    muon_momentum=0.95, muon_dtype=torch.bfloat16):
    """A model -> a list of (optimizer, peak learning rate). With "adamw" it has one. Weight decay acts on matrices, not
    on biases and norms. With "muon", Muon takes the linear layers but the last, and AdamW the rest. Norms and biases
    are vectors, which have no singular values to equalise. An embedding is a table of vectors, and it works better with
    AdamW, as does the output layer, which shares it (Jordan et al. 2024, "When should you use Muon?"). muon_dtype: what
    Muon orthogonalises in. UserError for another name, or if there is no matrix for Muon."""
    if optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer must be 'adamw' or 'muon', got {optimizer!r}")
    params = list(model.parameters())  # a tied matrix appears once
    parts = hidden_matrices(model) if optimizer == "muon" else {}
    hidden = [p for p in params if p in parts]
    rest = [p for p in params if p not in parts]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2),
                              fused=params[0].device.type in ("cpu", "cuda"))
    if optimizer == "adamw":
        return [(adamw, learning_rate)]
    if not hidden:
        raise UserError("optimizer 'muon' finds no linear layer in the model; use adamw")
    groups = [{"params": [p for p in hidden if parts[p] == 3], "parts": 3},
              {"params": [p for p in hidden if parts[p] == 1]}]
    muon = Muon([g for g in groups if g["params"]], lr=muon_learning_rate, momentum=muon_momentum,
                beta2=0.95,  # for even_rows; the argument beta2 is AdamW's
                weight_decay=weight_decay, dtype=muon_dtype)
    return [(muon, muon_learning_rate), (adamw, learning_rate)]
