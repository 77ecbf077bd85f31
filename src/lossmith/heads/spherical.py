"""An output layer that is trained exactly at a cost that does not depend on the number of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.heads.factored import (
    CRITICAL,
    FARTHEST,
    LARGEST,
    STRAIN,
    Factor,
    Gradient,
    Small,
    centred_gram,
    descend_plainly,
    deviations,
    identity,
    invert,
    move_gram,
    move_of_factor,
    products,
    rewrite,
)
from lossmith.heads.spherical_family import Outputs, spherical_loss
from lossmith.heads.spherical_step import (
    SphericalLosses,
    Targets,
    Unscaled,
    best_of,
    exactly,
    read_targets,
    root,
)
from lossmith.heads.summed import Summed, moved

# Rows of V that are multiplied at a time where all of them are wanted.
BLOCK = 8192
# A rewriting takes at most this many steps, and at least this many rows of V per step.
REWRITING_STEPS, FEWEST_ROWS = 1000, 512
# Steps between which changes of the small matrices are added up in the type of the products.
SETTLED = 64


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
        stabilize_every: most steps between looks at the conditioning of the factor, and exact inversions of it; they
            come earlier where the steps' sizes allow the condition to have grown by 30.
        ignore_index: target of rows that do not count (loss and gradient exactly 0).
        dtype: float32 or float64, of the matrix and of the products, under autocast, too. Small matrices are kept in
            float64.
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
    moments: Summed
    old: Summed
    new: Summed
    old_inverse: Tensor
    new_inverse: Tensor
    rewritten: Tensor
    steps: Tensor
    pace: Tensor
    strain: Tensor
    looked: Tensor

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
        self.moments = Summed(q, dtype, symmetric=True)
        # Rows of V before `rewritten` have the new factor, the others the old one. Each has the rows U, ω and w̄, of
        # which only the old one's is looked at.
        u, inverse, omega = identity(in_features, dtype, v.device)
        for name in ("old", "new"):
            setattr(self, name, Summed(torch.cat((u, omega[None], sums[None])), dtype))
            self.register_buffer(f"{name}_inverse", inverse.clone())
        self.register_buffer("rewritten", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._pending: list[Gradient] = []
        # What the host needs to know at every step without asking a GPU.
        self._place, self._count, self._pace, self._busy = 0, 0, 0, False
        self.register_buffer("pace", torch.zeros((), dtype=torch.int64))
        # Bound on the growth of the logarithm of the factor's condition since the last look.
        self._strain, self._looked = 0.0, 0
        self.register_buffer("strain", torch.zeros((), dtype=torch.float64))
        self.register_buffer("looked", torch.zeros((), dtype=torch.int64))
        self._changes = 0  # each makes void what a forward pass has left behind
        self._small: Small | None = None
        self.register_state_dict_pre_hook(lambda module, *_: module._write_counters())
        self.register_load_state_dict_post_hook(lambda module, _: module._read_counters())

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, hidden: Float[Tensor, "*batch features"], targets: Targets | None = None) -> Tensor:
        """One loss per row; without targets the scores of all classes (a dense matrix).

        Args:
            hidden: last hidden states, in the head's data type or a narrower one (half precision is widened).
            targets: class indices (or ``ignore_index``), shaped like the batch. For ``squared_error`` also a pair
                ``(indices, values)`` of shape ``(*batch, K)`` each, or dense targets ``(*batch, num_classes)``.
        """
        if targets is None:
            return self.scores(hidden)
        hidden = self._checked(hidden)
        batch = hidden.shape[:-1]
        indices, values, counted = read_targets(targets, batch, self)
        flat = hidden.reshape(-1, self.in_features)
        if self.training and torch.is_grad_enabled() and not flat.requires_grad:
            # Fixed features: the backward pass must still reach the head.
            flat = flat.detach().requires_grad_()
        if counted is not None and not bool(counted.all()):
            chosen = counted.nonzero().squeeze(-1)
            part = SphericalLosses.apply(flat[chosen], indices[chosen], values[chosen], self)
            losses = part.new_zeros(len(flat)).index_copy(0, chosen, part)
        else:
            losses = SphericalLosses.apply(flat, indices, values, self)
        return losses.reshape(batch)

    @exactly
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
            self._changed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what has been accumulated."""
        super().zero_grad(set_to_none)
        self._pending = []

    @exactly
    def grad_norm(self) -> float:
        """Frobenius norm of the accumulated gradient of ``W``, exactly: ``Σ (GᵀG ∘ HᵀH)``."""
        if not self._pending:
            return 0.0
        return root(products(Gradient.joined(self._pending), self._narrow(), self.num_classes).squared_norm)

    @exactly
    def _forward(self, hidden: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Unscaled]:
        """Losses, and each row's gradient as if its loss counted once."""
        small, features = self._narrow(), self.in_features
        with_gram = hidden @ small.gram
        centred = torch.linalg.vecdot(with_gram, hidden)
        rows = self.v.index_select(0, indices.reshape(-1)).view(*indices.shape, features)
        used = self._generations(indices)
        rotated = {name: hidden @ small.rows[name].T for name, _ in used}
        outputs: Tensor | None = None
        for name, mine in used:
            part = torch.linalg.vecdot(rows, rotated[name][:, None, :features]).add_(rotated[name][:, features, None])
            outputs = part if outputs is None or mine is None else torch.where(mine, part, outputs)
        assert outputs is not None
        s = rotated["old"][:, -1]
        with_gram.addr_(s, small.sums, alpha=1 / self.num_classes)
        found = self.loss.derivatives(Outputs(outputs, values, s, centred, self.num_classes))
        parts = [(small.rows[name], mine) for name, mine in used]
        return found.loss, Unscaled(hidden, found, indices, rows, with_gram, parts, rotated)

    @exactly
    def _collect(self, unscaled: Unscaled, scale: Tensor) -> Tensor:
        """Keep the gradient for the step; that of the hidden states."""
        gradient = unscaled.times(scale)
        if self.training:
            self._pending.append(gradient)
        return gradient.of_hidden

    def _descend(self, g: Gradient, lr: float) -> None:
        small = self._narrow()
        p = products(g, small, self.num_classes)
        norm = root(p.squared_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the norm of the collected gradient is {norm}: this step is not made and its gradient is forgotten; "
                "look for hidden states or losses that are not finite, or far too large"
            )
        if self.max_grad_norm is not None:
            lr *= min(1.0, self.max_grad_norm / (norm + 1e-6))
        used = self._generations(g.rows)
        moves = {name: move_of_factor(self._inverse(name), g, p, lr) for name, _ in used}
        if any(move is None for move in moves.values()):
            # W may become singular, U may not. So large a step also takes digits off the statistics.
            self.materialise()
            descend_plainly(self.v, g, lr, block=BLOCK)
            self._recompute()
            return
        sums = self.old.recent[-1]
        lost = sums.clone()
        # ω and w̄ change by the sums of the gradient over the classes, of which those of its part 2 g_q o are like U's.
        aside = torch.stack((g.by_s, torch.add(g.total, g.by_s, alpha=self.num_classes)))
        for name, mine in used:
            move = moves[name]
            assert move is not None
            recent, inverse = getattr(self, name).recent, self._inverse(name)
            if move.inverse is None:
                recent.addmm_(g.rotated[name].T, g.weighted, alpha=-lr)
                # U'⁻¹ = U⁻¹ + η Hᵀ diag(2 g_q) P.
                inverse.addmm_(g.weighted.T, move.rows, alpha=lr)
            else:
                assert p.weights is not None
                recent.addmm_(small.rows[name], p.weights, alpha=-lr)
                inverse.copy_(move.inverse)
            recent[-2:].addmm_(aside, g.hidden, alpha=-lr)
            y = g.by_targets if mine is None else g.by_targets * mine
            shift = y * move.rows if y.shape[1] == 1 else y.unsqueeze(-1) * move.rows.unsqueeze(1)
            self.v.index_add_(0, g.rows.reshape(-1), shift.reshape(-1, self.in_features), alpha=-lr)
        lost -= sums
        along = torch.sub(small.sums, lost, alpha=0.5)
        move_gram(self.moments.recent, g, p, along, lost, self.num_classes, lr)
        self._strain += max(move.strain for move in moves.values() if move is not None)

    # ---- conditioning ---------------------------------------------------------------------------------------------

    @exactly
    def materialise(self) -> None:
        """Put all of ``W`` into ``V``: O(classes · features²). Changes nothing but rounding."""
        for part, block in self._blocks():
            u, _, omega = self._factor(part)
            block.copy_(torch.addmm(omega.to(block.dtype), block, u.to(block.dtype)))
        for name in ("old", "new"):
            self._set_factor(name, self._identity())
        self._place, self._pace, self._busy, self._strain = 0, 0, False, 0.0
        for counter in (self.rewritten, self.pace, self.strain):
            counter.zero_()
        for gradient in self._pending:
            columns = gradient.hidden.new_zeros(len(gradient.hidden), 1), gradient.rotated["old"][:, -1:]
            gradient.rotated = {"old": torch.cat((gradient.hidden, *columns), 1)}
        self._changed()

    @exactly
    def synchronise(self) -> None:
        """Materialise, and compute ``Q`` and the column sums anew from ``W``: removes all accumulated rounding."""
        self.materialise()
        self._recompute()

    def _recompute(self) -> None:
        gram, sums = centred_gram(self.v, block=BLOCK)
        self.moments.set(gram)
        self.old.set(sums, slice(-1, None))

    @exactly
    def consistency(self) -> dict[str, float]:
        """Largest deviations of the maintained statistics from those of ``weight``, relative to their size."""
        return deviations(self.weight, self.gram, self.sums, self._factor("old"), block=BLOCK)

    def _stabilize(self) -> None:
        if self._count % SETTLED == 0:
            for total in (self.moments, *(getattr(self, name) for name in self._in_use())):
                total.settle()
        if self._busy:
            self._rewrite(min(self._pace, self.num_classes - self._place))
            if self._place >= self.num_classes:
                self._set_factor("old", self._factor("new"))
                self._set_factor("new", self._identity())
                self._place, self._pace, self._busy = 0, 0, False
            self.rewritten.fill_(self._place)
            self.pace.fill_(self._pace)
        if self._strain > STRAIN or self._count % self.stabilize_every == 0:
            self._look()

    def _look(self) -> None:
        """Invert exactly, measure singular values, and start a rewriting or set its pace."""
        rate = self._strain / max(1, self._count - self._looked)
        self._strain, self._looked = 0.0, self._count
        self.looked.fill_(self._count)
        found = [invert(self._factor(name)) for name in self._in_use()]
        conditions = [u * inverse for u, inverse in found]
        critical = CRITICAL[self.v.dtype]
        farthest = max(max(pair) for pair in found)
        if not (all(c <= critical for c in conditions) and farthest <= FARTHEST):  # NaN is far from fine
            self.materialise()
        elif farthest > LARGEST:
            # As slowly as is sure to end before the condition is critical, should steps go on as since the last look.
            left = math.log(critical / max(conditions)) / max(rate, 1e-9)
            steps = max(1.0, min(left, REWRITING_STEPS))
            fewest = min(FEWEST_ROWS, self.num_classes)
            self._pace = max(self._pace, fewest, math.ceil((self.num_classes - self._place) / steps))
            self._busy = True
            self.pace.fill_(self._pace)

    def _rewrite(self, count: int) -> None:
        """Give the next ``count`` rows of ``V`` the new factor."""
        rows = self.v[self._place : self._place + count]
        rewrite(rows, self._factor("old"), self._factor("new"), block=BLOCK)
        self._place += count

    def _identity(self) -> Factor:
        return identity(self.in_features, self.v.dtype, self.v.device)

    def _generations(self, rows: Tensor) -> list[tuple[str, Tensor | None]]:
        """The factors in use, each with the mask of the targets that it serves (``None``: all)."""
        if not self._busy:
            return [("old", None)]
        done = rows < self._place
        return [("old", ~done), ("new", done)]

    def _in_use(self) -> tuple[str, ...]:
        return ("old", "new") if self._busy else ("old",)

    @property
    def gram(self) -> Float[Tensor, "features features"]:
        """``WᵀW - w̄ w̄ᵀ/D`` as maintained, in float64."""
        return self.moments.value

    @property
    def sums(self) -> Float[Tensor, " features"]:
        """The column sums ``w̄`` as maintained, in float64."""
        return self.old.value[-1]

    def _inverse(self, name: str) -> Tensor:
        return getattr(self, f"{name}_inverse")  # type: ignore[no-any-return]

    def _factor(self, name: str) -> Factor:
        rows = getattr(self, name).value
        return Factor(rows[: self.in_features], self._inverse(name), rows[self.in_features])

    def _set_factor(self, name: str, factor: Factor) -> None:
        getattr(self, name).set(torch.cat((factor.u, factor.omega[None])), slice(-1))
        self._inverse(name).copy_(factor.inverse)

    def _scale(self, keep: float) -> None:
        for name in self._in_use():
            getattr(self, name).scale(keep)
            self._inverse(name).div_(keep)
        self.moments.scale(keep**2)
        self._strain -= math.log(keep)

    def _narrow(self) -> Small:
        """The small matrices as the products need them, made once per step."""
        if self._small is None:
            rows = {name: getattr(self, name).narrow() for name in self._in_use()}
            self._small = Small(self.moments.narrow(), rows)
        return self._small

    # ---- using ----------------------------------------------------------------------------------------------------

    @property
    @exactly
    def weight(self) -> Float[Tensor, "classes features"]:
        """``W``, materialised: a new dense matrix."""
        dense, start = torch.empty_like(self.v), 0
        for name, block in self._blocks():
            u, _, omega = self._factor(name)
            out = dense[start : start + len(block)]
            torch.addmm(omega.to(block.dtype), block, u.to(block.dtype), out=out)
            start += len(block)
        return dense

    @exactly
    def scores(self, hidden: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """Outputs of all classes: O(classes · features) per row, without gradient."""
        hidden = self._checked(hidden)
        return torch.cat([part for _, part in self._score_blocks(hidden)], dim=-1)

    @exactly
    def topk(self, hidden: Float[Tensor, "*batch features"], k: int) -> torch.return_types.topk:
        """The ``k`` best classes of each row, as ``torch.topk``, without holding the scores of all."""
        hidden = self._checked(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be in [1, {self.num_classes}], got {k}")
        return best_of(self._score_blocks(hidden), k)

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
        # Types other than float32 and float64, and other types of the small matrices, would spoil what is exact.
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        if self.v.dtype not in (torch.float32, torch.float64):
            self.v = moved(kept["v"], self.v, kept["v"].dtype)
        for name, tensor in kept.items():
            if name != "v":
                dtype = self.v.dtype if name.endswith("inverse") else tensor.dtype
                setattr(self, name, moved(tensor, getattr(self, name), dtype))
        for gradient in self._pending:
            gradient.move(self.v)
        self._changed()
        return self

    def _write_counters(self) -> None:
        self.steps.fill_(self._count)
        self.strain.fill_(self._strain)

    def _read_counters(self) -> None:
        self._place, self._count, self._pace = int(self.rewritten), int(self.steps), int(self.pace)
        self._busy, self._strain, self._looked = self._pace > 0, float(self.strain), int(self.looked)
        self._pending = []
        self._changed()

    def _changed(self) -> None:
        self._small = None
        self._changes += 1

    def _checked(self, hidden: Tensor) -> Tensor:
        if hidden.ndim == 0 or hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden must have {self.in_features} features, got shape {tuple(hidden.shape)}")
        if not hidden.is_floating_point() or torch.promote_types(hidden.dtype, self.v.dtype) != self.v.dtype:
            raise TypeError(f"hidden must have the head's dtype, {self.v.dtype}, or a narrower one, got {hidden.dtype}")
        return hidden.to(self.v.dtype)
