"""One way in for every method that prunes a trained model in one step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lossmith.errors import InputError, did_you_mean
from lossmith.sparsity.activation_magnitude import wanda
from lossmith.sparsity.calibration import Batch, calibration_rows, text_batches
from lossmith.sparsity.d_pruner import general_importance, importance_masks
from lossmith.sparsity.d_pruner_domain import DescentOptions, Loss, dual_importance, next_token_loss
from lossmith.sparsity.magnitude import Masks, SparsityReport, apply_masks, one_shot_masks, sparsity_report
from lossmith.sparsity.masks import check_sparsity, parse_structure, warn_of_stacked
from lossmith.sparsity.optimal_brain_surgeon import check_pattern, sparsegpt
from lossmith.sparsity.restoring import unchanged_on_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What each method looks at besides the weights.
CALIBRATED = ("wanda", "sparsegpt", "d-pruner")
PLAIN = ("magnitude", "uniform", "random", "erk", "nm")

_MASK_OPTIONS = ("blocks", "of")
_PASS_OPTIONS = ("block_size", "damping", "order")
OPTIONS = {
    "wanda": ("compare", "order"),
    "sparsegpt": ("block_size", "damping", "count", "order"),
    "d-pruner": (
        *("lam", "learning_rate", "epochs", "reg", "reg_ratio", "reg_in_update", "third_order", "grad_scale", "clip"),
        *("warmup", "texts", "count", "apply_to", *_MASK_OPTIONS, *_PASS_OPTIONS),
    ),
}

# Batches, or texts for the model's tokenizer.
Calibration = Sequence[Batch] | Sequence[str]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What :func:`prune` did.

    Attributes:
        masks: by name, ``True`` where a weight stays.
        report: zeros of each matrix and in all.
        losses: of D-Pruner's fine-tuning on the domain, step by step.
    """

    masks: Masks = field(repr=False)
    report: SparsityReport
    losses: tuple[float, ...] = ()


def prune(
    model: nn.Module,
    sparsity: float = 0.5,
    *,
    method: str = "magnitude",
    calibration: Calibration | None = None,
    general: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pattern: str | None = None,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    hold: bool = False,
    samples: int = 128,
    length: int = 2048,
    max_length: int = 1024,
    batch_size: int = 8,
    loss: Loss = next_token_loss,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Pruned:
    """Prune a trained model in place, in one step; after any error it is as it was, bit for bit.

    ============================== =================================== ===============================================
    method                         looks at                            removes
    ============================== =================================== ===============================================
    ``magnitude``, ``uniform``     nothing                             the smallest of all, or of each matrix
    ``random``, ``erk``            nothing                             by chance
    ``wanda``                      inputs on ``calibration``           of each row the least magnitude times input
    ``sparsegpt``                  inputs on ``calibration``           what costs least; moves the others to make up
    ``d-pruner``                   gradients on ``calibration`` (the   what matters neither to the domain nor in
                                   domain), inputs on ``general``      general, of each matrix
    ============================== =================================== ===============================================

    Args:
        model: any module with linear layers (``Conv1D`` too).
        sparsity: share of the prunable weights to remove, in [0, 1).
        method: see above; ``nm`` is magnitude with a pattern.
        calibration, general: texts (with ``tokenizer``), or batches that the model takes.
        tokenizer: the model's.
        pattern: ``"2:4"``: two of every four inputs stay, whatever the sparsity; any method but ``random`` and ``erk``.
        targets, exclude: which matrices, see :func:`~lossmith.sparsity.block_weights`.
        hold: keep the masks in training, see :func:`~lossmith.sparsity.apply_masks`.
        samples, length: of rows made from texts, see :func:`~lossmith.sparsity.calibration_rows`; not longer than the
            model can read.
        max_length, batch_size: of D-Pruner's domain texts, see :func:`~lossmith.sparsity.text_batches`.
        loss: D-Pruner's, see :func:`~lossmith.sparsity.dual_importance`.
        seed: of rows and of the random methods.
        progress: of D-Pruner's fine-tuning.
        **options: of :func:`~lossmith.sparsity.wanda`, :func:`~lossmith.sparsity.sparsegpt`, or of
            :func:`~lossmith.sparsity.dual_importance` (and ``blocks``, ``count``, ``of`` of
            :func:`~lossmith.sparsity.importance_masks`; ``block_size``, ``damping``, ``order`` of
            :func:`~lossmith.sparsity.general_importance`; ``apply_to="finetuned"``: prune the weights that the
            fine-tuning ends with).

    Raises:
        InputError: an unknown method, texts that are missing or have no tokens, nothing to prune.
        ValueError: numbers out of range, inputs that the pattern does not divide, weights that are not finite.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, 0.5, method="sparsegpt", calibration=[torch.randn(32, 4)], targets="all").report.sparsity
    0.5
    """
    if method not in (*PLAIN, *CALIBRATED):
        raise InputError(f"unknown method '{method}': {did_you_mean(method, (*PLAIN, *CALIBRATED))}")
    if method in CALIBRATED and calibration is None:
        raise InputError(f"method '{method}' needs calibration: texts with a tokenizer, or batches")
    if (general is None) == (method == "d-pruner"):
        needs = "needs general: open-domain texts" if general is None else "takes no general texts"
        raise InputError(f"method '{method}' {needs}")
    if unknown := [name for name in options if name not in OPTIONS.get(method, ())]:
        hint = did_you_mean(unknown[0], OPTIONS[method]) if method in OPTIONS else "it has none"
        raise InputError(f"method '{method}' has no option '{unknown[0]}': {hint}")
    check_sparsity(sparsity)
    if parse_structure(pattern) is None:
        pattern = None
    warn_of_stacked(model)
    which: dict[str, Any] = {"targets": targets, "exclude": exclude}
    rows: dict[str, Any] = {"samples": samples, "length": _readable(model, length), "seed": seed}
    losses: tuple[float, ...] = ()
    if method in PLAIN:
        masks = one_shot_masks(model, sparsity, method=_plain(method, pattern), seed=seed, **which)
    elif method == "wanda":
        masks = wanda(model, _rows(calibration, tokenizer, rows), sparsity, pattern=pattern, **which, **options)
    elif method == "sparsegpt":
        masks = sparsegpt(model, _rows(calibration, tokenizer, rows), sparsity, pattern=pattern, **which, **options)
    else:
        found = _d_pruner(
            model,
            sparsity,
            _domain(model, calibration, tokenizer, batch_size, max_length),
            _rows(general, tokenizer, rows),
            pattern,
            which,
            options,
            loss=loss,
            progress=progress,
        )
        masks, losses = found
    apply_masks(model, masks, hold=hold)
    flat = {name: (int((~mask).sum()), mask.numel()) for name, mask in masks.items()}
    if hold:
        report = SparsityReport(
            tuple((name, *numbers) for name, numbers in flat.items()), sum(p.numel() for p in model.parameters())
        )
    else:
        report = sparsity_report(model, targets=targets)
        report = SparsityReport(tuple(row for row in report.layers if row[0] in masks), report.parameters)
    return Pruned(masks, report, losses)


def _d_pruner(
    model: nn.Module,
    sparsity: float,
    domain: Sequence[Batch],
    general: Sequence[Batch],
    pattern: str | None,
    which: Mapping[str, Any],
    options: dict[str, Any],
    **training: Any,
) -> tuple[Masks, tuple[float, ...]]:
    apply_to, of_masks, of_pass, options = split_options(options)
    DescentOptions(**options)
    check_pattern(model, pattern, **which)
    importance = general_importance(model, general, sparsity=sparsity, **of_pass, **which)
    # What the masks are asked for is checked before hours are spent on the scores.
    importance_masks(model, importance, sparsity, pattern=pattern, **of_masks, **which)
    finetuned = apply_to == "finetuned"
    with unchanged_on_failure() as keep:
        for parameter in model.parameters() if finetuned else ():
            keep(parameter)
        found = dual_importance(
            model, domain, general=importance, keep_finetuned=finetuned, **which, **training, **options
        )
        scores = {
            name: reached(name, score, importance[name], model.get_parameter(name))
            for name, score in found.scores.items()
        }
        return importance_masks(model, scores, sparsity, pattern=pattern, **of_masks, **which), found.losses


def split_options(options: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """D-Pruner's: which weights are pruned, those of masks, of the general pass, and of the fine-tuning."""
    rest = dict(options)
    apply_to = rest.pop("apply_to", "original")
    if apply_to not in ("original", "finetuned"):
        raise ValueError(f"apply_to must be 'original' or 'finetuned', got {apply_to!r}")
    both = {"count": rest.pop("count", "exact")}
    of_masks = {name: rest.pop(name) for name in _MASK_OPTIONS if name in rest} | both
    of_pass = {name: rest.pop(name) for name in _PASS_OPTIONS if name in rest} | both
    return apply_to, of_masks, of_pass, rest


def reached(name: str, score: Tensor, general: Tensor, weight: Tensor) -> Tensor:
    """A matrix's scores; where the domain has none (an expert that it never asks), its general importance."""
    if bool(score.any()) or not bool(weight.any()):
        return score
    warnings.warn(f"{name} has no gradient on the domain: it is pruned by its general importance", stacklevel=4)
    return general


def _plain(method: str, pattern: str | None) -> str:
    if pattern is None:
        if method == "nm":
            raise InputError("method 'nm' needs pattern, such as 2:4")
        return method
    if method in ("random", "erk"):
        raise InputError(f"method '{method}' takes no pattern")
    return pattern


def _rows(
    calibration: Calibration | None, tokenizer: PreTrainedTokenizerBase | None, rows: Mapping[str, Any]
) -> Sequence[Batch]:
    found: Any = calibration
    return calibration_rows(found, _given(tokenizer), **rows) if _are_texts(found) else found


def _domain(
    model: nn.Module,
    calibration: Calibration | None,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    max_length: int,
) -> Sequence[Batch]:
    found: Any = calibration
    if not _are_texts(found):
        return found  # type: ignore[no-any-return]
    longest = _readable(model, max_length)
    return text_batches(found, _given(tokenizer), batch_size=batch_size, max_length=longest)


def _are_texts(calibration: Any) -> bool:
    if not len(calibration):
        raise InputError("the calibration data is empty: give at least one text or batch")
    return isinstance(calibration[0], str)


def _given(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError("calibration texts need a tokenizer: give tokenizer=, or batches of tokens")
    return tokenizer


def _readable(model: nn.Module, length: int) -> int:
    longest: Any = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(length, int(longest)) if longest else length
