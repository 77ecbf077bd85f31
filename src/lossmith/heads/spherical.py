"""An output layer that is trained exactly at a cost that does not depend on the number of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.heads.factored import (
    LARGEST,
    URGENT,
    Factor,
    Gradient,
    apply_move,
    centred_gram,
    change_of_gram,
    identity,
    largest_singular_value,
    move_of_factor,
    products,
)
from lossmith.heads.spherical_family import Outputs, spherical_loss
from lossmith.heads.spherical_step import SphericalLosses, Targets, Unscaled, read_targets

# Rows of V that are multiplied at a time where all of them are wanted.
BLOCK = 8192
# A rewriting takes about this many steps unless it is urgent, and at least this many rows of V per step.
REWRITING_STEPS, FEWEST_ROWS = 1000, 512


class SphericalHead(nn.Module):
    r"""Output layer and loss of the spherical family, with its own exact SGD.

    .. math:: o = W h, \qquad \ell = f(o_c,\ \textstyle\sum_k o_k^2,\ \sum_k o_k), \qquad
              W \leftarrow (1 - \eta\lambda) W - \eta \sum_i u_i \frac{\partial \ell_i}{\partial o}\, h_i^\top

    Loss, gradient for the hidden layer and the update of all ``num_classes x in_features`` weights cost
    ``O(rows · features²)``, whatever the number of classes, and equal plain SGD on the full matrix up to rounding.
    ``u`` is whatever gradient arrives at each row's loss, so weights per example work as everywhere else.

    Args:
        in_features: width of the last hidden layer.
        num_classes: number of classes, 2 or more.
        loss: ``"z_loss"`` (options ``a``, ``b``), ``"taylor_softmax"``, ``"spherical_softmax"`` (``eps``) or
            ``"squared_error"`` (targets may be several classes with values).
        weight: initial matrix (num_classes, in_features), copied; default normal with deviation ``init_std``.
        init_std: small outputs learn fast: gradients of the Z-loss fall like one over the outputs' deviation.
        weight_decay: ``λ``, as of ``torch.optim.SGD``.
        max_grad_norm: clip the gradient of ``W`` to this Frobenius norm (computed exactly); default no clipping.
        stabilize_every: steps between looks at the conditioning of the factor, and exact inversions of it.
        ignore_index: target of rows that do not count (loss and gradient exactly 0).
        dtype: float32 or float64, of the matrix and of the products. Small matrices are kept in float64.
        device: of the matrix.
        **options: of ``loss``.

    Use::

        losses = head(hidden, targets)      # one per row, differentiable in hidden
        losses.mean().backward()            # collects the gradient of W, in factored form
        optimizer.step()                    # everything else
        head.step(lr=0.1)                   # W

    Several backward passes before ``step`` are accumulated exactly. With the Hugging Face Trainer:
    :class:`lossmith.training.SphericalObjective` and its callback. There is no parameter to hand to an optimiser:
    momentum or Adam would make the update dense.

    ``head.weight`` materialises ``W``; ``scores`` and ``topk`` rank classes. Z-loss and squared error define no
    probabilities.

    Sources: Vincent, de Brébisson and Bouthillier, 2015, arXiv 1412.7091 (algorithm); de Brébisson and Vincent, 2016,
    arXiv 1604.08859 (Z-loss).

    >>> head = SphericalHead(4, 1000, loss="z_loss", a=0.1, b=10.0)
    >>> hidden = torch.randn(8, 4, requires_grad=True)
    >>> losses = head(hidden, torch.arange(8))
    >>> losses.mean().backward(); head.step(lr=0.1)
    >>> losses.shape, head.weight.shape, head.topk(hidden, 5).indices.shape
    (torch.Size([8]), torch.Size([1000, 4]), torch.Size([8, 5]))
    """

    v: Tensor
    gram: Tensor
    sums: Tensor
    old_u: Tensor
    old_inverse: Tensor
    old_omega: Tensor
    new_u: Tensor
    new_inverse: Tensor
    new_omega: Tensor
    rewritten: Tensor
    steps: Tensor
    pace: Tensor
    directions: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: str = "z_loss",
        weight: Tensor | None = None,
        init_std: float = 1e-3,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        stabilize_every: int = 100,
        ignore_index: int = -100,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options: Any,
    ):
        super().__init__()
        if in_features < 1 or num_classes < 2:
            raise ValueError(f"need 1 feature and 2 classes or more, got {in_features} and {num_classes}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
        if stabilize_every < 1:
            raise ValueError(f"stabilize_every must be at least 1, got {stabilize_every}")
        self.in_features, self.num_classes = in_features, num_classes
        self.loss = spherical_loss(loss, **options)
        self.options = dict(options)
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.stabilize_every, self.ignore_index = stabilize_every, ignore_index
        if weight is None:
            v = torch.empty(num_classes, in_features, dtype=dtype, device=device).normal_(0, init_std)
        elif weight.shape != (num_classes, in_features):
            raise ValueError(f"weight must have shape {(num_classes, in_features)}, got {tuple(weight.shape)}")
        else:
            v = weight.detach().to(dtype=dtype, device=device, copy=True)
        # One row per class: the only thing of that size.
        self.register_buffer("v", v)
        q, sums = centred_gram(v, block=BLOCK)
        self.register_buffer("gram", q)
        self.register_buffer("sums", sums)
        # Rows before `rewritten` have the new factor, the others the old one.
        for name in ("old", "new"):
            for part, value in zip(Factor._fields, identity(in_features, dtype, v.device), strict=True):
                self.register_buffer(f"{name}_{part}", value)
        self.register_buffer("rewritten", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        start = torch.ones(in_features, dtype=torch.float64, device=v.device) / math.sqrt(in_features)
        self.register_buffer("directions", torch.stack([start, start]))
        self._pending: list[Gradient] = []
        # What the host needs to know at every step without asking a GPU.
        self._place, self._count, self._pace, self._busy = 0, 0, 0, False
        self.register_buffer("pace", torch.zeros((), dtype=torch.int64))
        self._working: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(lambda module, _: module._read_counters())

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, hidden: Float[Tensor, "*batch features"], targets: Targets | None = None) -> Tensor:
        """One loss per row; without targets the scores of all classes (a dense matrix).

        Args:
            hidden: last hidden states, in the head's data type.
            targets: class indices (or ``ignore_index``), shaped like the batch. For ``squared_error`` also a pair
                ``(indices, values)`` of shape ``(*batch, K)`` each, or dense targets ``(*batch, num_classes)``.
        """
        if targets is None:
            return self.scores(hidden)
        self._check_hidden(hidden)
        batch = hidden.shape[:-1]
        indices, values, counted = read_targets(targets, batch, self)
        flat = hidden.reshape(-1, self.in_features)
        if self.training and torch.is_grad_enabled() and not flat.requires_grad:
            # Fixed features: the backward pass must still reach the head.
            flat = flat.detach().requires_grad_()
        if not bool(counted.all()):
            chosen = counted.nonzero().squeeze(-1)
            part = SphericalLosses.apply(flat[chosen], indices[chosen], values[chosen], self)
            losses = part.new_zeros(len(flat)).index_copy(0, chosen, part)
        else:
            losses = SphericalLosses.apply(flat, indices, values, self)
        return losses.reshape(batch)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the SGD update of everything that has been accumulated, and forget it.

        Args:
            lr: learning rate ``η >= 0`` of this step; 0 changes nothing.
        """
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be a finite number >= 0, got {lr}")
        keep = 1 - lr * self.weight_decay
        if not keep > 0:
            raise ValueError(f"lr * weight_decay must be < 1, got {lr} * {self.weight_decay}")
        pending, self._pending = self._pending, []
        if pending and lr > 0:
            gradient = Gradient.joined(pending)
            if len(gradient.hidden):
                self._descend(gradient, lr / keep)
        if keep != 1:
            self._scale(keep)
        if (pending and lr > 0) or keep != 1:
            self._count += 1
            self._stabilize()
            self.steps.fill_(self._count)
            self._working = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what has been accumulated."""
        super().zero_grad(set_to_none)
        self._pending = []

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Frobenius norm of the accumulated gradient of ``W``, exactly: ``Σ (GᵀG ∘ HᵀH)``."""
        if not self._pending:
            return 0.0
        return math.sqrt(max(0.0, float(products(Gradient.joined(self._pending), self.num_classes).squared_norm)))

    def _forward(self, hidden: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Unscaled]:
        """Losses, and each row's gradient as if its loss counted once."""
        w, d = self._in_working_type(), self.num_classes
        with_gram = hidden @ w["centred"]
        centred = torch.linalg.vecdot(with_gram, hidden)
        s = hidden @ w["sums"]
        with_gram.addr_(s / d, w["sums"])
        q = centred + s.square() / d
        rows = self.v[indices]
        rotated: dict[str, Tensor] = {}
        outputs = torch.zeros_like(values)
        for name, mine in self._generations(indices):
            rotated[name] = hidden @ w[f"{name}_u"].T
            part = torch.linalg.vecdot(rows, rotated[name].unsqueeze(1))
            part += (hidden @ w[f"{name}_omega"]).unsqueeze(-1)
            outputs = part if mine is None else torch.where(mine, part, outputs)
        found = self.loss.derivatives(Outputs(outputs, values, q, s, centred, d))
        sparse = torch.outer(found.by_s, w["sums"])
        for name, mine in self._generations(indices):
            y = found.by_targets if mine is None else found.by_targets * mine
            weighted = y * rows[:, 0] if y.shape[1] == 1 else torch.einsum("mk,mkd->md", y, rows)
            sparse.addmm_(weighted, w[f"{name}_u"]).addr_(y.sum(-1), w[f"{name}_omega"])
        return found.loss, Unscaled(hidden, found, indices, s, with_gram, sparse, rotated)

    def _descend(self, g: Gradient, lr: float) -> None:
        p = products(g, self.num_classes)
        if self.max_grad_norm is not None:
            lr *= min(1.0, self.max_grad_norm / (math.sqrt(max(0.0, float(p.squared_norm))) + 1e-6))
        change, lost = change_of_gram(g, p, self.sums.to(self.v.dtype), self.num_classes, lr)
        used = self._generations(g.rows)
        moves = {name: move_of_factor(self._factor(name), g, g.rotated[name], p, lr) for name, _ in used}
        if any(move is None for move in moves.values()):
            self._descend_materialised(g, lr)
        else:
            for name, mine in used:
                move = moves[name]
                assert move is not None
                apply_move(self._factor(name), move, g, lr)
                y = g.by_targets if mine is None else g.by_targets * mine
                shift = y * move.rows if y.shape[1] == 1 else y.unsqueeze(-1) * move.rows.unsqueeze(1)
                self.v.index_add_(0, g.rows.reshape(-1), shift.reshape(-1, self.in_features), alpha=-lr)
        self.gram.sub_(change + change.T)
        self.sums.sub_(lost)

    def _descend_materialised(self, g: Gradient, lr: float) -> None:
        """The same step on the full matrix, where the factor would become singular: ``W`` may be, ``U`` may not."""
        self.materialise()
        weighted, by_s = g.weighted, g.hidden.T @ g.by_s
        for part in self.v.split(BLOCK):
            part -= lr * ((part @ weighted.T) @ g.hidden + by_s)
        shift = (g.by_targets.unsqueeze(-1) * g.hidden.unsqueeze(1)).reshape(-1, self.in_features)
        self.v.index_add_(0, g.rows.reshape(-1), shift, alpha=-lr)

    # ---- conditioning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def materialise(self) -> None:
        """Put all of ``W`` into ``V``: O(classes · features²). Changes nothing but rounding."""
        for part, block in self._blocks():
            u, _, omega = self._factor(part)
            block.copy_(torch.addmm(omega.to(block.dtype), block, u.to(block.dtype)))
        for name in ("old", "new"):
            self._set_factor(name, self._identity())
        self._place, self._pace, self._busy = 0, 0, False
        self.rewritten.zero_()
        self.pace.zero_()
        self._working = {}

    @torch.no_grad()
    def synchronise(self) -> None:
        """Materialise, and compute ``Q`` and the column sums anew from ``W``: removes all accumulated rounding."""
        self.materialise()
        q, sums = centred_gram(self.v, block=BLOCK)
        self.gram.copy_(q)
        self.sums.copy_(sums)

    @torch.no_grad()
    def consistency(self) -> dict[str, float]:
        """Largest deviations of the maintained statistics from those of ``weight``, relative to their size."""
        weight = self.weight
        q, sums = centred_gram(weight, block=BLOCK)
        inverse = self.old_u @ self.old_inverse.double()
        eye = torch.eye(self.in_features, dtype=inverse.dtype, device=inverse.device)
        # Column sums may cancel: they are measured against what they are sums of.
        sizes = weight.abs().sum(0).max().clamp_min(1e-300)
        return {
            "gram": float((self.gram - q).abs().max() / q.abs().max().clamp_min(1e-300)),
            "sums": float((self.sums - sums).abs().max() / sizes),
            "inverse": float((inverse - eye).abs().max()),
        }

    def _stabilize(self) -> None:
        if self._busy:
            self._rewrite(min(self._pace, self.num_classes - self._place))
            if self._place >= self.num_classes:
                self._set_factor("old", self._factor("new"))
                self._set_factor("new", self._identity())
                self._place, self._pace, self._busy = 0, 0, False
            self.rewritten.fill_(self._place)
            self.pace.fill_(self._pace)
        if self._count % self.stabilize_every == 0:
            self._look()

    def _look(self) -> None:
        """Invert exactly, measure the old factor's singular values, and start or hurry a rewriting."""
        for name in ("old", "new") if self._busy else ("old",):
            inverse, info = torch.linalg.inv_ex(self._factor(name).u)
            if not int(info):
                self._factor(name).inverse.copy_(inverse)
        values = []
        for i, matrix in enumerate((self.old_u, self.old_inverse)):
            value, self.directions[i] = largest_singular_value(matrix, self.directions[i])
            values.append(value)
        condition, urgent = values[0] * values[1], URGENT[self.v.dtype]
        if not math.isfinite(condition) or condition > urgent**2:
            self.materialise()
        elif max(values) > LARGEST:
            hurry = 10 if condition > urgent else 1
            fewest = min(FEWEST_ROWS, self.num_classes)
            # Looks come every so many steps: a rewriting that took longer than two of them would come too late.
            steps = min(REWRITING_STEPS, 2 * self.stabilize_every) if hurry > 1 else REWRITING_STEPS
            self._pace = max(self._pace, fewest, hurry * -(-self.num_classes // steps))
            self._busy = True
            self.pace.fill_(self._pace)

    def _rewrite(self, count: int) -> None:
        """Give the next ``count`` rows of ``V`` the new factor: ``v ← (v U_old + ω_old - ω_new) U_new⁻¹``."""
        old, new = self._factor("old"), self._factor("new")
        inverse = torch.linalg.inv(new.u)
        to_new = (old.u @ inverse).to(self.v.dtype)
        shift = ((old.omega - new.omega) @ inverse).to(self.v.dtype)
        for part in self.v[self._place : self._place + count].split(BLOCK):
            part.copy_(torch.addmm(shift, part, to_new))
        self._place += count

    def _identity(self) -> Factor:
        return identity(self.in_features, self.v.dtype, self.v.device)

    def _generations(self, rows: Tensor) -> list[tuple[str, Tensor | None]]:
        """The factors in use, each with the mask of the targets that it serves (``None``: all)."""
        if not self._busy:
            return [("old", None)]
        done = rows < self._place
        return [("old", ~done), ("new", done)]

    def _factor(self, name: str) -> Factor:
        return Factor(*(getattr(self, f"{name}_{part}") for part in Factor._fields))

    def _set_factor(self, name: str, factor: Factor) -> None:
        for part, value in zip(Factor._fields, factor, strict=True):
            getattr(self, f"{name}_{part}").copy_(value)

    def _scale(self, keep: float) -> None:
        for name in ("old", "new"):
            u, inverse, omega = self._factor(name)
            self._set_factor(name, Factor(keep * u, inverse / keep, keep * omega))
        self.gram *= keep**2
        self.sums *= keep

    def _in_working_type(self) -> dict[str, Tensor]:
        """The small matrices as the products need them, made once per step."""
        if not self._working:
            dtype = self.v.dtype
            made = {"centred": self.gram.to(dtype), "sums": self.sums.to(dtype)}
            for name in ("old", "new") if self._busy else ("old",):
                factor = self._factor(name)
                made |= {f"{name}_u": factor.u.to(dtype), f"{name}_omega": factor.omega.to(dtype)}
            self._working = made
        return self._working

    # ---- using ----------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Float[Tensor, "classes features"]:
        """``W``, materialised: a new dense matrix."""
        with torch.no_grad():
            dense, start = torch.empty_like(self.v), 0
            for name, block in self._blocks():
                u, _, omega = self._factor(name)
                out = dense[start : start + len(block)]
                torch.addmm(omega.to(block.dtype), block, u.to(block.dtype), out=out)
                start += len(block)
            return dense

    @torch.no_grad()
    def scores(self, hidden: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """Outputs of all classes: O(classes · features) per row, without gradient."""
        self._check_hidden(hidden)
        return torch.cat([part for _, part in self._score_blocks(hidden)], dim=-1)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch features"], k: int) -> torch.return_types.topk:
        """The ``k`` best classes of each row, as ``torch.topk``, without holding the scores of all."""
        self._check_hidden(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be in [1, {self.num_classes}], got {k}")
        values = hidden.new_empty((*hidden.shape[:-1], 0))
        indices = torch.empty_like(values, dtype=torch.int64)
        for start, scores in self._score_blocks(hidden):
            best = scores.topk(min(k, scores.shape[-1]), dim=-1)
            values = torch.cat([values, best.values], -1)
            indices = torch.cat([indices, best.indices + start], -1)
            merged = values.topk(min(k, values.shape[-1]), dim=-1)
            values, indices = merged.values, indices.gather(-1, merged.indices)
        return torch.return_types.topk((values, indices))

    def _score_blocks(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        dtype = self.v.dtype
        factors = {name: self._factor(name) for name in ("new", "old")}
        rotated = {name: hidden @ f.u.to(dtype).T for name, f in factors.items()}
        shift = {name: (hidden @ f.omega.to(dtype)).unsqueeze(-1) for name, f in factors.items()}
        start = 0
        for name, block in self._blocks():
            yield start, rotated[name] @ block.T + shift[name]
            start += len(block)

    def _blocks(self) -> Iterator[tuple[str, Tensor]]:
        """All rows of ``V`` in their order, a block at a time, each with the name of its factor."""
        for name, rows in (("new", self.v[: self._place]), ("old", self.v[self._place :])):
            for block in rows.split(BLOCK) if len(rows) else ():
                yield name, block

    @classmethod
    def from_linear(cls, linear: nn.Linear, **arguments: Any) -> SphericalHead:
        """A head that begins with the weights of ``linear``, which may have no bias."""
        if linear.bias is not None:
            raise ValueError("a layer with a bias cannot be taken over; append a constant feature to hidden instead")
        arguments = {"dtype": linear.weight.dtype, "device": linear.weight.device, **arguments}
        return cls(linear.in_features, linear.out_features, weight=linear.weight, **arguments)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the trained weights."""
        linear = nn.Linear(self.in_features, self.num_classes, bias=False, dtype=self.v.dtype, device=self.v.device)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
        return linear

    def extra_repr(self) -> str:
        """What ``print(head)`` shows."""
        options = "".join(f", {k}={v}" for k, v in self.options.items())
        return f"in_features={self.in_features}, num_classes={self.num_classes}, loss={self.loss.name}{options}"

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> SphericalHead:
        before = self.v.dtype
        super()._apply(fn, recurse)
        if self.v.dtype not in (torch.float32, torch.float64):
            self.v = self.v.to(before)
        for name in ("gram", "sums", "directions", "old_u", "old_omega", "new_u", "new_omega"):
            setattr(self, name, getattr(self, name).double())
        for name in ("old_inverse", "new_inverse"):
            setattr(self, name, getattr(self, name).to(self.v.dtype))
        self._working = {}
        return self

    def _read_counters(self) -> None:
        self._place, self._count, self._pace = int(self.rewritten), int(self.steps), int(self.pace)
        self._busy = self._pace > 0
        self._working, self._pending = {}, []

    def _check_hidden(self, hidden: Tensor) -> None:
        if hidden.ndim == 0 or hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden must have {self.in_features} features, got shape {tuple(hidden.shape)}")
        if hidden.dtype != self.v.dtype:
            raise TypeError(f"hidden must have the head's dtype, {self.v.dtype}, got {hidden.dtype}")
