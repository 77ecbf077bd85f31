"""Objectives: run the model on a batch, return one loss per example."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.heads import linear_loss
from lossmith.registry import LOSSES, Spec

IGNORE_INDEX = -100
EXAMPLE_WEIGHTS = "example_weights"

# What our collators add for the objective, and no model understands.
_OURS = {"labels", "example_ids", "index", "domain", EXAMPLE_WEIGHTS}

Batch = Mapping[str, Any]
LossFunction = Callable[..., Tensor]


class Objective(Protocol):
    """What :class:`lossmith.training.Trainer` minimises: one differentiable loss per example of the batch.

    A plain function ``objective(model, batch)`` is enough. Two optional methods make it more capable:
    ``target_counts(batch)`` (targets per example; examples without any get weight 0) and
    ``evaluate(model, batch) -> ExampleEvaluation``. When the weights are known before the forward pass they are in
    ``batch["example_weights"]``, a hint that a streaming head can use.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> Float[Tensor, examples]:
        """One loss per example."""
        ...


@dataclass(frozen=True, slots=True)
class ExampleEvaluation:
    """Plain cross entropy of a batch, by example: sums over targets, numbers of targets, correct first choices."""

    loss_sums: Float[Tensor, examples]
    targets: Int[Tensor, examples]
    correct: Int[Tensor, examples]


class NextToken:
    """Next-token prediction: each sequence's loss, averaged over its unmasked tokens.

    .. math:: \\ell_i = \\frac{1}{n_i} \\sum_{t:\\ y_{i,t} \\neq -100} \\mathrm{loss}(o_{i,t}, y_{i,t})

    Args:
        loss: a registered name (``"cross_entropy"``, ``"focal_loss(gamma=1)"``) or any row-wise function
            ``(logits, targets, **options) -> one value per row``.
        chunk_size: rows of logits held at once by :func:`lossmith.heads.linear_loss`; ``None`` chooses.
        **options: options of ``loss``.

    The batch holds ``input_ids`` and ``labels`` (not shifted, -100 where masked, the Hugging Face convention). With
    ``example_ids`` (same shape) several examples may share a row, as in
    :class:`lossmith.data.PackedCollator`; without, every row is one example.

    The full logits are never held when the model's output layer is an ``nn.Linear`` whose product is returned
    unchanged (checked once on a few tokens); otherwise (soft-capped or scaled logits, adapters on the output layer,
    compiled models) the model's own logits are used.

    >>> objective = NextToken("focal_loss(gamma=1.0)")
    """

    def __init__(
        self,
        loss: str | Spec | LossFunction = "cross_entropy",
        *,
        chunk_size: int | None = None,
        **options: Any,
    ):
        self.loss = bind_loss(loss, **options)
        self.chunk_size = chunk_size
        self._heads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """Mean loss per sequence; 0 for a sequence without targets."""
        return self.mean_by_example(model, batch, self.loss, shifted(batch["labels"]))

    def mean_by_example(
        self, model: nn.Module, batch: Batch, loss: LossFunction, targets: Int[Tensor, "rows length"]
    ) -> Float[Tensor, examples]:
        """Each example's mean of ``loss`` over its positions with a target, through the model's output layer.

        ``targets`` may be anything that ``loss`` understands, -100 exactly where the (shifted) label is.
        """
        counts = self.target_counts(batch)
        weights = batch.get(EXAMPLE_WEIGHTS)
        row_weights = None
        if weights is not None:
            row_weights = _spread(weights / counts.clamp_min(1), batch)

        def through_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = linear_loss(
                loss,
                hidden,
                weight,
                targets,
                bias=bias,
                chunk_size=self.chunk_size,
                row_weights=row_weights,
            )
            return rows.unsqueeze(-1)

        def through_logits(logits: Tensor) -> Tensor:
            return _rows(loss, logits, targets).unsqueeze(-1)

        rows = self._forward(model, batch, through_head, through_logits).squeeze(-1)
        return _sum_by_example(rows, batch) / counts.clamp_min(1)

    @torch.no_grad()
    def output_layer(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None] | Tensor:
        """What enters the model's output layer, with the layer's weight and bias; else the logits themselves."""
        seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

        def through_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen.append((hidden, weight, bias))
            return hidden[..., :1]

        logits = self._forward(model, batch, through_head, lambda logits: logits)
        return seen[-1] if seen else logits

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Number of unmasked targets of each example."""
        return _sum_by_example((shifted(batch["labels"]) != IGNORE_INDEX).long(), batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """Cross entropy (whatever the training loss is) and correct first choices, per example."""
        targets = shifted(batch["labels"])

        def through_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            keep = targets != IGNORE_INDEX
            result = hidden.new_zeros((*targets.shape, 2), dtype=_accumulation_dtype(hidden))
            rows, classes = hidden[keep], targets[keep]
            size = self.chunk_size or max(1, 2**22 // weight.shape[0])
            parts = [
                _cross_entropy_and_correct(F.linear(h, weight, bias), c)
                for h, c in zip(rows.split(size), classes.split(size), strict=True)
            ]
            if parts:
                result[keep] = torch.cat(parts).to(result.dtype)
            return result

        def through_logits(logits: Tensor) -> Tensor:
            keep = targets != IGNORE_INDEX
            result = logits.new_zeros((*targets.shape, 2), dtype=_accumulation_dtype(logits))
            result[keep] = _cross_entropy_and_correct(logits[keep], targets[keep]).to(result.dtype)
            return result

        values = self._forward(model, batch, through_head, through_logits)
        return ExampleEvaluation(
            loss_sums=_sum_by_example(values[..., 0], batch),
            targets=self.target_counts(batch),
            correct=_sum_by_example(values[..., 1].long(), batch),
        )

    def _forward(
        self,
        model: nn.Module,
        batch: Batch,
        through_head: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        through_logits: Callable[[Tensor], Tensor],
    ) -> Tensor:
        inner = unwrapped(model)
        inputs = accepted_inputs(inner, batch)
        head: Any = getattr(inner, "get_output_embeddings", lambda: None)()
        if not self._has_plain_head(model, inner, head, inputs):
            return through_logits(output_logits(model(**inputs)))

        def forward(hidden: Tensor) -> Tensor:
            return through_head(hidden, head.weight, head.bias)

        # Inside the layer's own call, so that wrappers which gather or cast its weights (FSDP, autocast) still do.
        with forward_replaced(head, forward):
            return output_logits(model(**inputs))

    def _has_plain_head(self, model: nn.Module, inner: nn.Module, head: Any, inputs: dict[str, Any]) -> bool:
        if type(head) is not nn.Linear or hasattr(model, "_orig_mod"):
            return False
        if inner not in self._heads:
            few = {k: v[:1, :4] if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in inputs.items()}
            self._heads[inner] = returns_head_output(head, lambda: output_logits(model(**few)))
        return self._heads[inner]


class Classification:
    """Classification of whole examples (``logits (n, classes)``) or of their tokens (``logits (n, length, classes)``).

    Args:
        loss: a registered name or any row-wise function.
        **options: options of ``loss``.

    The batch holds the model's inputs and ``labels`` (-100 where masked). A token classifier's loss is averaged over
    the unmasked tokens of each example.
    """

    def __init__(self, loss: str | Spec | LossFunction = "cross_entropy", **options: Any):
        self.loss = bind_loss(loss, **options)

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example; 0 for an example without targets."""
        rows = self.rows(model, batch)
        return rows.flatten(1).sum(-1) / self.target_counts(batch).clamp_min(1) if rows.ndim > 1 else rows

    def rows(self, model: nn.Module, batch: Batch) -> Float[Tensor, "examples ..."]:
        """The loss of each label, 0 where it is masked."""
        return _rows(self.loss, output_logits(model(**accepted_inputs(unwrapped(model), batch))), batch["labels"])

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Number of unmasked labels of each example."""
        labels = batch["labels"]
        return (labels != IGNORE_INDEX).reshape(labels.shape[0], -1).sum(-1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """Cross entropy (whatever the training loss is) and correct first choices, per example."""
        logits = output_logits(model(**accepted_inputs(unwrapped(model), batch)))
        labels = batch["labels"]
        keep = labels != IGNORE_INDEX
        values = logits.new_zeros((*labels.shape, 2), dtype=_accumulation_dtype(logits))
        values[keep] = _cross_entropy_and_correct(logits[keep], labels[keep]).to(values.dtype)
        values = values.reshape(labels.shape[0], -1, 2).sum(1)
        return ExampleEvaluation(values[:, 0], self.target_counts(batch), values[:, 1].long())


def bind_loss(loss: str | Spec | LossFunction, **options: Any) -> LossFunction:
    """A row-wise function with its options bound, tried once on two classes so that a bad option fails early."""
    if not isinstance(loss, str | Spec):
        return functools.partial(loss, **options) if options else loss
    bound = LOSSES.bind(loss)
    bound = functools.partial(bound.func, *bound.args, **{**bound.keywords, **options})
    bound(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    return bound


_inside: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, DeepSpeed or ``torch.compile``."""
    inner = _inside[model]() if model in _inside else None
    if inner is None:
        from accelerate.utils import extract_model_from_parallel

        # Remembered: looking costs a millisecond, as much as a step of a small model's output layer.
        inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
        _inside[model] = weakref.ref(inner)
    return inner


@functools.lru_cache(maxsize=64)
def _accepted_names(model_class: type) -> frozenset[str] | None:
    parameters = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    return frozenset(parameters) - {"self"}


def accepted_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What of the batch the model's ``forward`` takes by name; labels and bookkeeping stay out."""
    names = _accepted_names(cast(Any, type(model)))
    takes = {k: v for k, v in batch.items() if k not in _OURS and (names is None or k in names)}
    if "use_cache" in (names or ()):
        takes["use_cache"] = False
    return takes


def output_logits(output: Any) -> Tensor:
    """The logits in whatever a model returns: a tensor, an object with ``logits``, a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def shifted(labels: Tensor) -> Tensor:
    """Targets of each position: the next label; the last position has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _rows(loss: LossFunction, logits: Tensor, targets: Tensor) -> Tensor:
    """``loss`` on unmasked rows only, zeros elsewhere: a user's loss need not know ``ignore_index``."""
    keep = targets != IGNORE_INDEX
    values = loss(logits[keep], targets[keep])
    return torch.zeros(targets.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)


def _number_of_examples(batch: Batch) -> int:
    return len(batch["index"]) if "index" in batch else batch["labels"].shape[0]


def _sum_by_example(values: Float[Tensor, "rows length"], batch: Batch) -> Float[Tensor, examples]:
    examples = _number_of_examples(batch)
    if values.shape[0] == examples:
        return values.sum(-1)
    sums = torch.zeros(examples, dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch["example_ids"].flatten(), values.flatten())


def _spread(values: Float[Tensor, examples], batch: Batch) -> Float[Tensor, "rows length"]:
    labels = batch["labels"]
    if labels.shape[0] == len(values):
        return values.unsqueeze(-1).expand(labels.shape)
    return values[batch["example_ids"]]


def _accumulation_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _cross_entropy_and_correct(logits: Float[Tensor, "rows classes"], targets: Int[Tensor, rows]) -> Tensor:
    logits = logits.to(_accumulation_dtype(logits))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == targets).to(losses.dtype)], dim=-1)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``module`` compute ``forward`` instead, inside its own call."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


@torch.no_grad()
def returns_head_output(head: nn.Linear, logits: Callable[[], Tensor]) -> bool:
    """Whether a model's logits are its output layer's product, bit for bit: no soft cap, no scaling, no bias behind it.

    Args:
        head: the output layer.
        logits: runs the model that ``head`` belongs to on a few tokens.
    """
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(F.linear(hidden, head.weight, head.bias))
        return seen[-1]

    devices = [head.weight.device] if head.weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        with forward_replaced(head, forward):
            whole = logits()
        if not (len(seen) == 1 and whole.shape == seen[0].shape and torch.equal(whole.float(), seen[0].float())):
            return False
        # What changes no number yet, such as a bias that is still zero (BART), would widen a single column.
        column = torch.randn(*whole.shape[:-1], 1, device=whole.device, dtype=whole.dtype)
        try:
            with forward_replaced(head, lambda hidden: column):
                kept = logits()
        except RuntimeError:
            # A model that reshapes its logits to the vocabulary keeps them.
            return False
    return kept.shape == column.shape and torch.equal(kept, column)
