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


class Small(NamedTuple):
    """The small matrices in the type of the products.

    Attributes:
        gram: ``Q``.
        rows: of each factor in use ``U``, and below it ``ω`` and ``w̄``: all that hidden states are multiplied by.
    """

    gram: Float[Tensor, "features features"]
    rows: dict[str, Float[Tensor, "features+2 features"]]

    @property
    def sums(self) -> Float[Tensor, " features"]:
        """``w̄``."""
        return self.rows["old"][-1]


@dataclass(slots=True)
class Gradient:
    """A gradient ``(2 g_q o + g_s 1 + y) hᵀ`` of the matrix, one row per example, and what was computed on the way.

    Attributes:
        hidden: ``H``, one row per example.
        two_q: ``2 g_q``.
        by_s: ``g_s``.
        by_targets: the nonzeros of ``y``.
        total: their sum.
        rows: their classes.
        sparse_part: ``(g_s 1 + y) W``.
        weighted: ``diag(2 g_q) H``.
        of_hidden: the gradient of ``H``.
        rotated: of each factor in use ``H Uᵀ``, ``H ω`` and ``H w̄``, side by side.
    """

    hidden: Float[Tensor, "rows features"]
    two_q: Float[Tensor, " rows"]
    by_s: Float[Tensor, " rows"]
    by_targets: Float[Tensor, "rows targets"]
    total: Float[Tensor, " rows"]
    rows: Int[Tensor, "rows targets"]
    sparse_part: Float[Tensor, "rows features"]
    weighted: Float[Tensor, "rows features"]
    of_hidden: Float[Tensor, "rows features"]
    rotated: dict[str, Float[Tensor, "rows features+2"]]

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


class Products(NamedTuple):
    """Inner products over all classes, without a term that grows with them.

    With fewer rows than features those of rows are small; otherwise those of features are.

    Attributes:
        squared_norm: of the gradient of ``W``.
        of_outputs: ``GᵀG`` (rows x rows), where ``G`` (classes x rows) is the gradient by the outputs; if rows are many
            ``Hᵀ GᵀG H`` (features x features).
        of_hidden: ``H Hᵀ`` (rows x rows), if rows are few.
        weights: ``Hᵀ diag(2 g_q) H`` (features x features), if they are many.
        change: ``Wᵀ G H`` (features x features), if they are many.
    """

    squared_norm: Tensor
    of_outputs: Tensor
    of_hidden: Tensor | None = None
    weights: Tensor | None = None
    change: Tensor | None = None


def products(g: Gradient, small: Small, classes: int) -> Products:
    """What a step needs; see :class:`Products`.

    With ``A = diag(2 g_q) H``, ``B = A WᵀW`` and ``Z = (g_s 1 + y) W`` the part of ``GᵀG`` that takes products over
    features is ``A Bᵀ + A Zᵀ + Z Aᵀ``. Its first term is symmetric, so that it is ``N + Nᵀ`` with
    ``N = ½ A (B + 2 Z)ᵀ``: one product instead of two, and ``B + Z`` is there as the gradient of ``H``.
    """
    h, weighted, total = g.hidden, g.weighted, g.total
    rows, features = h.shape
    if rows < features:
        half = torch.addmm(_target_products(g), weighted, (g.of_hidden + g.sparse_part).T, beta=0.5, alpha=0.5)
        half.addr_(torch.add(total, g.by_s, alpha=0.5 * classes), g.by_s)
        of_outputs = half + half.T
        of_hidden = h @ h.T
        return Products(torch.dot(of_outputs.view(-1), of_hidden.view(-1)), of_outputs, of_hidden=of_hidden)
    weights, sparse = weighted.T @ h, g.sparse_part.T @ h
    # The part of o through Q instead of a product over the rows.
    change = torch.addmm(sparse, small.gram, weights).addr_(small.sums, weights @ small.sums, alpha=1 / classes)
    gathered = _by_class(g)
    half = torch.mm(gathered.T, gathered).addmm_(weights, change + sparse, beta=0.5, alpha=0.5)
    a, b = h.T @ g.by_s, h.T @ total
    half.addr_(torch.add(b, a, alpha=0.5 * classes), a)
    of_outputs = half + half.T
    return Products(of_outputs.diagonal().sum(), of_outputs, weights=weights, change=change)


def move_gram(recent: Tensor, g: Gradient, p: Products, along: Tensor, lost: Tensor, classes: int, lr: float) -> None:
    """Take a step's ``η C`` off half of the centred Gram matrix, which loses ``η (C + Cᵀ)``; in place.

    ``lost`` is what the column sums have lost, ``along`` their mean of before and after: the change of ``w̄ w̄ᵀ/D`` goes
    along, so that nothing large is subtracted from anything large.
    """
    # From W' = W - η G H.
    if p.of_hidden is not None:
        rows = torch.addmm(g.of_hidden, p.of_outputs, g.hidden, alpha=-0.5 * lr)
        recent.addmm_(rows.T, g.hidden, alpha=-lr)
    else:
        assert p.change is not None
        recent.add_(p.change, alpha=-lr).add_(p.of_outputs, alpha=0.5 * lr**2)
    recent.addr_(along, lost, alpha=1 / classes)


def _target_products(g: Gradient) -> Tensor:
    """``YᵀY``: examples that share a target class."""
    if g.rows.shape[1] == 1:
        return torch.outer(g.by_targets[:, 0], g.by_targets[:, 0]).masked_fill_(g.rows != g.rows.T, 0)
    _, position = torch.unique(g.rows, return_inverse=True)
    dense = g.by_targets.new_zeros(len(g.rows), int(position.max()) + 1)
    dense.scatter_add_(1, position, g.by_targets)
    return dense @ dense.T


def _by_class(g: Gradient) -> Tensor:
    """``Y H``: one row for each class that is a target."""
    classes, position = torch.unique(g.rows, return_inverse=True)
    moved = (g.by_targets.unsqueeze(-1) * g.hidden.unsqueeze(1)).reshape(-1, g.hidden.shape[1])
    if len(classes) == len(moved):
        # In whatever order: only the sum over classes is wanted.
        return moved
    return moved.new_zeros(len(classes), g.hidden.shape[1]).index_add_(0, position.reshape(-1), moved)


def descend_plainly(w: Tensor, g: Gradient, lr: float, *, block: int) -> None:
    """The step on the full matrix, in place."""
    by_s = g.hidden.T @ g.by_s
    for part in w.split(block):
        part -= lr * ((part @ g.weighted.T) @ g.hidden + by_s)
    shift = (g.by_targets.unsqueeze(-1) * g.hidden.unsqueeze(1)).reshape(-1, w.shape[1])
    w.index_add_(0, g.rows.reshape(-1), shift, alpha=-lr)


class Move(NamedTuple):
    """A step of a factor, not applied yet: ``H U'⁻¹`` of the new one, and the new inverse if it is known.

    ``strain`` bounds the logarithm of what the step does to the condition of ``U``, and to its size: ``U' = U (I - S)``
    with symmetric ``S``, whose eigenvalues are at most its norm, so that singular values change by factors between
    ``1 - |S|`` and ``1 + |S|``.
    """

    rows: Tensor
    inverse: Tensor | None
    strain: float


def move_of_factor(inverse: Tensor, g: Gradient, p: Products, lr: float) -> Move | None:
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
        # U'⁻¹ = (I - S)⁻¹ U⁻¹.
        inverse = _solve(e, inverse, size)
        return Move(h @ inverse, inverse, strain)
    # P = H U'⁻¹ solves (I - E) P = H U⁻¹ (Woodbury).
    return Move(_solve(e, h @ inverse, size), None, strain)


def _solve(e: Tensor, right: Tensor, size: float) -> Tensor:
    """``(I - E)⁻¹`` times a matrix; ``size`` is a norm of ``E``."""
    if size < SERIES:
        # Σ Eᵏ up to the first k with |E|ᵏ⁺¹ < eps: a few products, where a factorisation takes longer than all else.
        terms = math.ceil(math.log(torch.finfo(e.dtype).eps) / math.log(max(size, 1e-300))) - 1
        found = right
        for _ in range(max(1, terms)):
            found = torch.addmm(right, e, found)
        return found
    return torch.linalg.solve(torch.eye(len(e), dtype=e.dtype, device=e.device) - e, right)


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
