"""Two output layers on one backbone: one for inference, one that only teaches the backbone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError

Auxiliary = Literal["linear", "mlp"]


class DualHead(nn.Module):
    r"""A main and an auxiliary classifier that read the same features.

    .. math:: s^1 = W_1 h + b_1, \qquad s^2 = g(h)

    Called with features, it returns the main logits ``s¹`` alone, so that it can stand where the model's output layer
    stood; in training mode it also leaves ``s²`` in ``auxiliary_logits``. ``export`` gives the main layer back.

    Args:
        main: the output layer used at inference.
        auxiliary: ``"linear"``, ``"mlp"`` (Linear to ``width``, Dropout, BatchNorm, ReLU, Linear), or a module from
            features to as many logits. [choice] linear where student and teacher are of one family, mlp otherwise.
        width: of the mlp's hidden layer.
        dropout: of the mlp.
        seed: of the auxiliary layer's weights, drawn apart so that the rest of the model does not depend on them.

    Source: Yang et al., "Dual-Head Knowledge Distillation", 2024, arXiv 2411.08937.

    >>> head = DualHead(nn.Linear(3, 5))
    >>> head(torch.zeros(2, 3)).shape, head.auxiliary_logits.shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    >>> head.eval()(torch.zeros(2, 3)).shape, head.auxiliary_logits is None
    (torch.Size([2, 5]), True)
    """

    def __init__(
        self,
        main: nn.Linear,
        auxiliary: Auxiliary | nn.Module = "linear",
        *,
        width: int = 200,
        dropout: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        self.main = main
        self.auxiliary = _auxiliary(main, auxiliary, width, dropout, seed)
        self.auxiliary_logits: Tensor | None = None

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """The main logits."""
        self.auxiliary_logits = None
        if self.training:
            # Batch normalisation knows only (examples, features).
            flat = self.auxiliary(features.flatten(0, -2))
            if flat.shape != (features[..., 0].numel(), self.main.out_features):
                raise ValueError(
                    f"the auxiliary head must give {self.main.out_features} logits per example, got {tuple(flat.shape)}"
                )
            self.auxiliary_logits = flat.unflatten(0, features.shape[:-1])
        return self.main(features)


def attach_dual_head(
    model: nn.Module, auxiliary: Auxiliary | nn.Module = "linear", *, name: str | None = None, **options: object
) -> DualHead:
    """Replace the model's output layer, in place, by a :class:`DualHead` around it.

    Args:
        model: any module whose last ``nn.Linear`` is its classifier.
        auxiliary: see :class:`DualHead`.
        name: dotted name of the output layer, where it is not the last ``nn.Linear``.
        **options: of :class:`DualHead`.

    Returns:
        The head, which is now part of the model.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> attach_dual_head(model) is model[2]
    True
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = name if name is not None else next(reversed(layers), None)
    if chosen is None or chosen not in layers:
        known = ", ".join(list(layers)[-5:]) or "none"
        raise InputError(f"the model has no linear output layer '{chosen}'; its last linear layers: {known}")
    head = DualHead(layers[chosen], auxiliary, **options)  # type: ignore[arg-type]
    parent, _, attribute = chosen.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    return head


def export_main_head(model: nn.Module) -> nn.Module:
    """Take the auxiliary head out again, in place: the model is as it was, with its trained main layer."""
    found = [n for n, m in model.named_modules() if isinstance(m, DualHead)]
    if not found:
        raise InputError("the model has no dual head to export")
    for name in found:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_submodule(name).main)
    return model


def dual_head(model: nn.Module) -> DualHead:
    """The model's dual head."""
    for module in model.modules():
        if isinstance(module, DualHead):
            return module
    raise InputError("the model has no dual head; call lossmith.heads.attach_dual_head(model) first")


def _auxiliary(main: nn.Linear, auxiliary: Auxiliary | nn.Module, width: int, dropout: float, seed: int) -> nn.Module:
    if isinstance(auxiliary, nn.Module):
        return auxiliary
    inside, classes = main.in_features, main.out_features
    place: dict[str, Any] = {"device": main.weight.device, "dtype": main.weight.dtype}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if auxiliary == "linear":
            return nn.Linear(inside, classes, **place)
        if auxiliary == "mlp":
            return nn.Sequential(
                nn.Linear(inside, width, **place),
                nn.Dropout(dropout),
                nn.BatchNorm1d(width, **place),
                nn.ReLU(),
                nn.Linear(width, classes, **place),
            )
    raise ValueError(f"auxiliary must be linear, mlp or a module, got '{auxiliary}'")
