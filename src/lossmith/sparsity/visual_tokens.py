"""Giving a multimodal model a schedule by which it drops visual tokens whenever it answers."""

from __future__ import annotations

from typing import Any

from lossmith.errors import InputError
from lossmith.sparsity.visual_tokens_schedule import PruneSchedule


def prune_visual_tokens(
    model: Any, schedule: PruneSchedule | str | None = None, **options: Any
) -> PruneSchedule | None:
    """Let ``model`` drop visual tokens by ``schedule`` in all its answers from now on; saved with the model.

    Weights are left as they are. What is dropped decides what is gained and lost: measure it with
    :func:`lossmith.probes.visual_redundancy`.

    Args:
        model: with an attribute ``visual_pruning``, a ``shape`` and, where the image has a fixed number of tokens,
            ``vision.tokens``, such as :class:`lossmith.tasks.multimodal.MultimodalDiffusionModel`, or a system around
            one (``model_``).
        schedule: a :class:`PruneSchedule`, its text (``"fastv(step=0, layer=2, keep=0.5)"``), or ``"none"`` for none.
        **options: of :class:`PruneSchedule`, instead of ``schedule``; default: after the first step the half stays to
            which the answer attends most.

    Returns:
        The schedule.

    Raises:
        InputError: an unknown selector or option, a layer that the model does not have, a model without visual tokens.

    >>> from types import SimpleNamespace
    >>> from lossmith.sparsity import TransformerShape
    >>> model = SimpleNamespace(visual_pruning=None, shape=TransformerShape(layers=2, width=8, ffn=16))
    >>> prune_visual_tokens(model, "fastv(step=0, layer=1, keep=0.25)")
    PruneSchedule('fastv', keep=0.25, step=0, layer=1)
    """
    model = getattr(model, "model_", model)
    if not hasattr(model, "visual_pruning") or not hasattr(model, "shape"):
        raise InputError(f"{type(model).__name__} has no visual tokens to drop (no 'visual_pruning' and 'shape')")
    if schedule is not None and options:
        raise InputError("give a schedule or its options, not both")
    chosen = PruneSchedule.parse(schedule if schedule is not None else {"selector": "answer_attention", **options})
    if chosen is not None and chosen.layer is not None and chosen.layer >= model.shape.layers:
        raise InputError(f"layer {chosen.layer} of a model with {model.shape.layers} layers (the first is 0)")
    model.visual_pruning = chosen
    return chosen
