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
# Most that one step may do to the condition of U, and the condition beyond which V is rewritten at once: float32 has 7
# digits.
STEEPEST = {torch.float32: 3e1, torch.float64: 1e2}
CRITICAL = {torch.float32: 3e2, torch.float64: 1e4}
# Even contraction costs no digits, but numbers must stay representable.
FARTHEST = 1e12
# Singular values that a step shrinks by less than this are not computed but bounded.
SURE = 0.2
# U may become worse conditioned by this factor (a rigorous bound, see Move.strain) before it is looked at again.
STRAIN = math.log(30)


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
        two_q: ``2 g_q``.
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
    two_q: Float[Tensor, " rows"]
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

    def move(self, to: Tensor) -> None:
        """To the device and the type of ``to``, in place."""
        for name in Gradient.__dataclass_fields__:
            value = getattr(self, name)
            if name == "rotated":
                self.rotated = {k: v.to(to) for k, v in value.items()}
            else:
                setattr(self, name, value.to(to) if value.is_floating_point() else value.to(to.device))


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


def deviations(w: Tensor, gram: Tensor, sums: Tensor, factor: Factor, *, block: int) -> dict[str, float]:
    """How far maintained statistics are from those of ``w``, and the inverse from an inverse."""
    true_gram, true_sums = centred_gram(w, block=block)
    product = factor.u @ factor.inverse.double()
    product.diagonal().sub_(1)
    # Column sums may cancel: they are measured against what they are sums of.
    sizes = w.abs().sum(0).max().clamp_min(1e-300)
    return {
        "gram": float((gram - true_gram).abs().max() / true_gram.abs().max().clamp_min(1e-300)),
        "sums": float((sums - true_sums).abs().max() / sizes),
        "inverse": float(product.abs().max()),
    }


@dataclass(slots=True)
class Products:
    """``HᵀGᵀG H``'s trace, the squared norm of the gradient of ``W``; and what a step needs of it.

    With fewer rows than features ``GᵀG`` and ``H Hᵀ`` (rows x rows) are small; otherwise matrices of features x
    features are.
    """

    squared_norm: Tensor
    of_hidden: Tensor | None = None
    weights: Tensor | None = None
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
    return Products(both.diagonal().sum(), weights=weights, change=change, both=both)


def change_of_gram(g: Gradient, p: Products, sums: Tensor, classes: int, lr: float) -> tuple[Tensor, Tensor]:
    """``C`` and ``c``: in a step the centred Gram matrix loses ``η (C + Cᵀ)``, and the column sums lose ``η c``."""
    total = torch.add(g.by_targets.sum(-1), g.by_s, alpha=classes).addcmul_(g.two_q, g.s)
    lost = g.hidden.T @ total
    # From W' = W - η G Hᵀ; the change of w̄ w̄ᵀ/D goes along, so that nothing large is subtracted from anything large.
    along = torch.sub(sums, lost, alpha=0.5 * lr)
    if p.of_outputs is not None:
        rows = torch.addmm(g.of_hidden, p.of_outputs, g.hidden, alpha=-0.5 * lr)
        return rows.addr_(total, along, alpha=-1 / classes).T @ g.hidden, lost
    assert p.change is not None
    assert p.both is not None
    return torch.sub(p.change, p.both, alpha=0.5 * lr).addr_(along, lost, alpha=-1 / classes), lost


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


def descend_plainly(w: Tensor, g: Gradient, lr: float, *, block: int) -> None:
    """The step on the full matrix, in place."""
    by_s = g.hidden.T @ g.by_s
    for part in w.split(block):
        part -= lr * ((part @ g.weighted.T) @ g.hidden + by_s)
    shift = (g.by_targets.unsqueeze(-1) * g.hidden.unsqueeze(1)).reshape(-1, w.shape[1])
    w.index_add_(0, g.rows.reshape(-1), shift, alpha=-lr)


class Move(NamedTuple):
    """A step of a factor, not applied yet: ``H U'⁻¹`` of the new one, ``H Uᵀ`` of the old; the new inverse if known.

    ``strain`` bounds the logarithm of what the step does to the condition of ``U``, and to its size: ``U' = U (I - S)``
    with symmetric ``S``, whose eigenvalues are at most its norm, so that singular values change by factors between
    ``1 - |S|`` and ``1 + |S|``.
    """

    rows: Tensor
    rotated: Tensor
    inverse: Tensor | None
    strain: float


def move_of_factor(factor: Factor, g: Gradient, rotated: Tensor, p: Products, lr: float) -> Move | None:
    """``None`` where the step would make ``U`` singular (or nearly so)."""
    h = g.hidden
    # The matrix that a step is about: E = η H Hᵀ diag(2 g_q), or S = η Hᵀ diag(2 g_q) H, with the same eigenvalues.
    if p.of_hidden is not None:
        e = p.of_hidden * (lr * g.two_q)
    else:
        assert p.weights is not None
        e = lr * p.weights
    size = float(e.abs().sum(-1).amax())
    if not math.isfinite(size):
        return None
    # The largest eigenvalue is at most the sum of absolute values of a row of E, and at most the root of tr E² = |S|².
    bound = size if size < SERIES else min(size, math.sqrt(max(0.0, float((e * e.T).sum()))) * (1 + 1e-3))
    least, most = 1 - bound, 1 + bound
    if not least > SURE:
        # The bounds say too little.
        factors = (1 - torch.linalg.eigvalsh(lr * (g.weighted.T.double() @ h.double()))).abs()
        least, most = min(1.0, float(factors.amin())), max(1.0, float(factors.amax()))
        if not most < STEEPEST[h.dtype] * least:
            return None
    strain = math.log(most / least)
    if p.of_hidden is None:
        inverse, info = torch.linalg.inv_ex(factor.u - lr * (rotated.T @ g.weighted))
        if int(info) or not bool(torch.isfinite(inverse).all()):
            return None
        inverse = inverse.to(h.dtype)
        return Move(h @ inverse, rotated, inverse, strain)
    # P = H U'⁻¹ solves (I - E) P = H U⁻¹ (Woodbury).
    start = h @ factor.inverse
    if size < SERIES:
        # P = Σ Eᵏ H U⁻¹ up to the first k with |E|ᵏ⁺¹ < eps: a few products, where a factorisation takes longer than
        # all else.
        terms = math.ceil(math.log(torch.finfo(e.dtype).eps) / math.log(max(size, 1e-300))) - 1
        rows = start
        for _ in range(max(1, terms)):
            rows = torch.addmm(start, e, rows)
    else:
        system = torch.eye(len(e), dtype=e.dtype, device=e.device) - e
        rows = torch.linalg.solve(system, start)
    return Move(rows, rotated, None, strain)


def apply_move(factor: Factor, move: Move, g: Gradient, lr: float) -> None:
    """Change ``U``, its inverse and ``ω`` in place."""
    factor.u.sub_(move.rotated.T @ g.weighted, alpha=lr)
    if move.inverse is not None:
        factor.inverse.copy_(move.inverse)
    else:
        # U'⁻¹ = U⁻¹ + η Hᵀ diag(2 g_q) P.
        factor.inverse.addmm_(g.weighted.T, move.rows, alpha=lr)
    along = torch.addcmul(g.by_s, g.hidden @ factor.omega.to(g.hidden.dtype), g.two_q)
    factor.omega.sub_(g.hidden.T @ along, alpha=lr)


def invert(factor: Factor) -> tuple[float, float]:
    """Invert ``U`` exactly; the largest singular values of ``U`` and of its inverse (infinite if it has none)."""
    inverse, info = torch.linalg.inv_ex(factor.u)
    if int(info):
        return math.inf, math.inf
    factor.inverse.copy_(inverse)
    return largest_singular_value(factor.u), largest_singular_value(inverse)


def largest_singular_value(matrix: Tensor, *, iterations: int = 12) -> float:
    """Power iteration on ``MᵀM``: a lower bound, hardly ever below 70 percent of the value.

    It begins with the longest row, which leans towards what is large, and a vector that nothing is orthogonal to by
    its nature.
    """
    features = matrix.shape[1]
    row = matrix[matrix.square().sum(1).argmax()]
    rest = torch.arange(features, dtype=matrix.dtype, device=matrix.device).cos()
    vector = row / row.norm() + torch.where(row @ rest < 0, -rest, rest) / rest.norm()
    value = matrix.new_zeros(())
    for _ in range(iterations):
        vector = matrix.T @ (matrix @ (vector / vector.norm()))
        value = vector.norm()
    return float(value.sqrt())


def rewrite(rows: Tensor, old: Factor, new: Factor, *, block: int) -> None:
    """Rows of ``V`` from one factor to another, in place: ``v ← (v U_old + ω_old - ω_new) U_new⁻¹``."""
    inverse = torch.linalg.inv(new.u)
    to_new = (old.u @ inverse).to(rows.dtype)
    shift = ((old.omega - new.omega) @ inverse).to(rows.dtype)
    for part in rows.split(block):
        part.copy_(torch.addmm(shift, part, to_new))
