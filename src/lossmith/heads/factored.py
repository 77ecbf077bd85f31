r"""An output matrix in factored form, whose exact SGD update costs nothing that grows with its rows.

.. math:: W = V U + 1\,\omega^\top, \qquad \bar w = W^\top 1, \qquad
          Q = W^\top W - \tfrac1D \bar w \bar w^\top

``V`` has one row per class; ``U`` and its inverse, ``Q``, ``ω`` and ``w̄`` are of the size of the hidden layer. A
gradient ``2 g_q o + g_s 1 + y`` (``y`` sparse) changes ``U``, ``ω``, and only those rows of ``V`` that are targets. The
Gram matrix is kept centred, so that the variance of the outputs is no difference of large numbers.

Source: Vincent, de Brébisson and Bouthillier, 2015, arXiv 1412.7091 (mini-batches by the Woodbury identity: long
version, arXiv 1606.08061).

Products of many updates make ``U`` ill-conditioned. The published remedy (multiply ``V`` by ``U`` and begin again from
``U = I``) takes as long as hundreds of steps at once. Here it is spread: rows are rewritten block by block, a few per
step, while two factors are kept, one for the rows already rewritten and one for the others. Both stand for the same
``W`` at every moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Singular values of U outside of [1/2, 2] start a rewriting of V (the bounds of the released code).
LARGEST = 2.0
# Below this norm a geometric series is shorter than a factorisation.
SERIES = 0.05
# Beyond this the rewriting is hurried, and beyond its square finished at once: float32 has 7 digits to lose.
URGENT = {torch.float32: 1e2, torch.float64: 1e4}


class Factor(NamedTuple):
    """``U`` and ``ω`` in float64 whatever the type of ``V``; the inverse of ``U`` in the type of ``V``."""

    u: Tensor
    inverse: Tensor
    omega: Tensor


@dataclass(slots=True)
class Gradient:
    """A gradient ``(2 g_q o + g_s 1 + y) hᵀ`` of the matrix, one row per example, and what was computed on the way.

    Attributes:
        hidden: ``H``, one row per example.
        by_q: ``g_q``.
        by_s: ``g_s``.
        by_targets: the nonzeros of ``y``.
        rows: their classes.
        s: sums of outputs.
        sparse_part: ``(g_s 1 + y) W``.
        weighted: ``diag(2 g_q) H``.
        of_hidden: the gradient of ``H``.
        rotated: ``H Uᵀ`` of each factor in use.
    """

    hidden: Float[Tensor, "rows features"]
    by_q: Float[Tensor, " rows"]
    by_s: Float[Tensor, " rows"]
    by_targets: Float[Tensor, "rows targets"]
    rows: Int[Tensor, "rows targets"]
    s: Float[Tensor, " rows"]
    sparse_part: Float[Tensor, "rows features"]
    weighted: Float[Tensor, "rows features"]
    of_hidden: Float[Tensor, "rows features"]
    rotated: dict[str, Float[Tensor, "rows features"]]

    @staticmethod
    def joined(parts: list[Gradient]) -> Gradient:
        """Several micro-batches as one."""
        if len(parts) == 1:
            return parts[0]
        width = max(p.rows.shape[1] for p in parts)

        def column(name: str) -> Tensor:
            values = [getattr(p, name) for p in parts]
            if name in ("by_targets", "rows"):
                # Targets that are not there have gradient 0.
                values = [torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in values]
            return torch.cat(values)

        names = [name for name in Gradient.__dataclass_fields__ if name != "rotated"]
        rotated = {name: torch.cat([p.rotated[name] for p in parts]) for name in parts[0].rotated}
        return Gradient(**{name: column(name) for name in names}, rotated=rotated)


def identity(features: int, dtype: torch.dtype, device: torch.device) -> Factor:
    """The factor of a matrix that is all in ``V``."""
    eye = torch.eye(features, dtype=torch.float64, device=device)
    return Factor(eye, eye.to(dtype, copy=True), torch.zeros(features, dtype=torch.float64, device=device))


def centred_gram(v: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """``VᵀV - w̄ w̄ᵀ/D`` and the column sums ``w̄`` in float64, a block of rows at a time."""
    features, classes = v.shape[1], v.shape[0]
    sums = torch.zeros(features, dtype=torch.float64, device=v.device)
    for part in v.split(block):
        sums += part.sum(0, dtype=torch.float64)
    q = torch.zeros(features, features, dtype=torch.float64, device=v.device)
    for part in v.split(block):
        wide = part.double() - sums / classes
        q.addmm_(wide.T, wide)
    return q, sums


@dataclass(slots=True)
class Products:
    """``HᵀGᵀG H``'s trace, the squared norm of the gradient of ``W``; and what a step needs of it.

    With fewer rows than features ``GᵀG`` and ``H Hᵀ`` (rows x rows) are small; otherwise matrices of features x
    features are.
    """

    squared_norm: Tensor
    of_hidden: Tensor | None = None
    of_outputs: Tensor | None = None
    change: Tensor | None = None
    both: Tensor | None = None


def products(g: Gradient, classes: int) -> Products:
    """Inner products over all classes, without a term that grows with them."""
    total = g.by_targets.sum(-1)
    h, weighted, of_hidden = g.hidden, g.weighted, g.of_hidden
    rows, features = h.shape
    if rows < features:
        # GᵀG = diag(2g_q) H (gradient of H)ᵀ + Z (diag(2g_q) H)ᵀ + YᵀY + the parts along 1.
        m = torch.addmm(_target_products(g), weighted, of_hidden.T).addmm_(g.sparse_part, weighted.T)
        by_s = g.by_s
        m.addr_(classes * by_s + total, by_s).addr_(by_s, total)
        hidden_products = h @ h.T
        return Products(torch.sum(m * hidden_products), of_hidden=hidden_products, of_outputs=m)
    weights = weighted.T @ h
    change = of_hidden.T @ h
    both = weights @ change
    both.addmm_(h.T @ g.sparse_part, weights)
    gathered = _by_class(g)
    both.addmm_(gathered.T, gathered)
    a, b = h.T @ g.by_s, h.T @ total
    both.addr_(classes * a + b, a).addr_(a, b)
    return Products(both.diagonal().sum(), change=change, both=both)


def change_of_gram(g: Gradient, p: Products, sums: Tensor, classes: int, lr: float) -> tuple[Tensor, Tensor]:
    """``C`` such that the centred Gram matrix loses ``C + Cᵀ`` in a step, and what the column sums lose."""
    total = 2 * g.by_q * g.s + classes * g.by_s + g.by_targets.sum(-1)
    lost = g.hidden.T @ total
    # From W' = W - η G Hᵀ; the change of w̄ w̄ᵀ/D goes along, so that nothing large is subtracted from anything large.
    along = (lr * sums - (0.5 * lr**2) * lost) / classes
    if p.of_outputs is not None:
        rows = lr * g.of_hidden
        rows.addmm_(p.of_outputs, g.hidden, alpha=-0.5 * lr**2).addr_(total, along, alpha=-1)
        return rows.T @ g.hidden, lr * lost
    assert p.change is not None
    assert p.both is not None
    change = lr * p.change - (0.5 * lr**2) * p.both
    return change.addr_(along, lost, alpha=-1), lr * lost


def _target_products(g: Gradient) -> Tensor:
    """``YᵀY``: examples that share a target class."""
    if g.rows.shape[1] == 1:
        return (g.rows == g.rows.T) * (g.by_targets * g.by_targets.T)
    _, position = torch.unique(g.rows, return_inverse=True)
    dense = g.by_targets.new_zeros(len(g.rows), int(position.max()) + 1)
    dense.scatter_add_(1, position, g.by_targets)
    return dense @ dense.T


def _by_class(g: Gradient) -> Tensor:
    """``Y H``: one row for each class that is a target."""
    classes, position = torch.unique(g.rows, return_inverse=True)
    moved = (g.by_targets.unsqueeze(-1) * g.hidden.unsqueeze(1)).reshape(-1, g.hidden.shape[1])
    return moved.new_zeros(len(classes), g.hidden.shape[1]).index_add_(0, position.reshape(-1), moved)


class Move(NamedTuple):
    """A step of a factor, not applied yet: ``H U'⁻¹`` of the new one, ``H Uᵀ`` of the old; the new inverse if known."""

    rows: Tensor
    rotated: Tensor
    inverse: Tensor | None


def move_of_factor(factor: Factor, g: Gradient, rotated: Tensor, p: Products, lr: float) -> Move | None:
    """``None`` where the step would make ``U`` singular (or nearly so)."""
    h, two_q = g.hidden, 2 * g.by_q
    if p.of_hidden is not None:
        # P = H U'⁻¹ solves (I - E) P = H U⁻¹, E = η H Hᵀ diag(2 g_q) (Woodbury).
        e = (lr * p.of_hidden) * two_q
        start = h @ factor.inverse
        size = float(e.abs().sum(-1).amax())
        if size < SERIES:
            # P = Σ Eᵏ H U⁻¹ to the last digit: a few products, where a factorisation takes longer than all else.
            terms = math.ceil(math.log(torch.finfo(e.dtype).eps) / math.log(max(size, 1e-300)))
            rows = start
            for _ in range(max(1, terms)):
                rows = torch.addmm(start, e, rows)
            return Move(rows, rotated, None)
        system = torch.eye(len(e), dtype=e.dtype, device=e.device) - e
        lu, pivots, _ = torch.linalg.lu_factor_ex(system)
        if not bool(lu.diagonal().abs().amin() > 1e-4):
            return None
        return Move(torch.linalg.lu_solve(lu, pivots, start), rotated, None)
    inverse, info = torch.linalg.inv_ex(factor.u - lr * (rotated.T @ g.weighted))
    inverse = inverse.to(h.dtype)
    if int(info) or not bool(torch.isfinite(inverse).all()):
        return None
    return Move(h @ inverse, rotated, inverse)


def apply_move(factor: Factor, move: Move, g: Gradient, lr: float) -> None:
    """Change ``U``, its inverse and ``ω`` in place."""
    factor.u.sub_(move.rotated.T @ g.weighted, alpha=lr)
    if move.inverse is not None:
        factor.inverse.copy_(move.inverse)
    else:
        # U'⁻¹ = U⁻¹ + η Hᵀ diag(2 g_q) P.
        factor.inverse.addmm_(g.weighted.T, move.rows, alpha=lr)
    along = (g.hidden @ factor.omega.to(g.hidden.dtype)) * (2 * g.by_q) + g.by_s
    factor.omega.sub_(g.hidden.T @ along, alpha=lr)


def largest_singular_value(matrix: Tensor, start: Tensor, *, iterations: int = 8) -> tuple[float, Tensor]:
    """Power iteration on ``MᵀM`` from ``start``: a lower bound that is good where it matters, and the vector found."""
    vector = start.to(matrix.dtype)
    value = matrix.new_zeros(())
    for _ in range(iterations):
        vector = matrix.T @ (matrix @ vector)
        value = vector.norm()
        vector = vector / value.clamp_min(torch.finfo(vector.dtype).tiny)
    return float(value.sqrt()), vector.double()
