r"""D-Pruner: which weights matter to one domain *and* in general.

"Pruning as a Domain-specific LLM Extractor", NAACL 2024 Findings, arXiv 2405.06275 (released code: ``general.py``,
``lomo.py``, ``save_model.py``, ``save_model_iterative.py``).

General importance :math:`G` is SparseGPT's error on open-domain text. The domain's gradient is refined by a penalty on
moving what is generally important, and weights are ranked by a Taylor expansion with it. Importances are by name of the
parameter and have its shape, float32 (float64 for float64 models).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.sparsity.calibration import Batch, InputProducts
from lossmith.sparsity.calibration_stream import stream_layers
from lossmith.sparsity.magnitude import Masks, block_weights, one_shot_masks
from lossmith.sparsity.masks import check_sparsity
from lossmith.sparsity.optimal_brain_surgeon import surgeon, turned
from lossmith.sparsity.restoring import check_finite

Importance = dict[str, Tensor]


def general_importance(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    sparsity: float = 0.5,
    block_size: int = 128,
    damping: float = 0.01,
    count: Literal["exact", "released"] = "exact",
    order: Literal["layer", "block"] = "layer",
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
) -> Importance:
    r""":math:`G = w^2 / U_{jj}^2` of every weight, from a pass of SparseGPT that is thrown away.

    Layers see the inputs that pruned layers before them produce, and a block of columns is judged after those before it
    were pruned and made up for: ``G`` depends on the order of the columns and on ``sparsity``.

    Args:
        model: has its own weights again afterwards; a copy of the matrices is held meanwhile.
        batches: open-domain text; see :func:`~lossmith.sparsity.calibration_rows` (the paper: 128 rows of 2048 tokens
            of C4).
        sparsity, block_size, damping, count: see :func:`~lossmith.sparsity.surgeon`; the released code has 0.52.
        order, targets, exclude: see :func:`~lossmith.sparsity.stream_layers`.

    Relations:
        Doubling the inputs multiplies ``G`` by 4. :func:`~lossmith.sparsity.sparsegpt` is the same pass, kept.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> {name: g.shape for name, g in general_importance(net, [torch.randn(32, 4)], targets="all").items()}
    {'0.weight': torch.Size([8, 4]), '2.weight': torch.Size([2, 8])}
    """
    check_sparsity(sparsity)
    check_finite(block_weights(model, targets=targets, exclude=exclude).weights)
    flipped = turned(model)
    found: Importance = {}
    own: dict[str, tuple[nn.Parameter, Tensor]] = {}
    options: Any = {"block_size": block_size, "damping": damping, "count": count}
    try:
        for weights, seen in stream_layers(
            model, batches, InputProducts, targets=targets, exclude=exclude, order=order
        ):
            hessian = seen.hessian()
            for name, weight in weights.items():
                own[name] = weight, weight.detach().clone()
                found[name] = judge(weight, hessian, sparsity, name=name, flip=name in flipped, **options)
    finally:
        with torch.no_grad():
            for weight, before in own.values():
                weight.copy_(before)
    return found


def judge(
    weight: Tensor, hessian: Tensor, sparsity: float, *, name: str = "the weight", flip: bool = False, **options: Any
) -> Tensor:
    """The general importance of one matrix, which is pruned in place. ``flip``: it is stored inputs x outputs."""
    result = surgeon(weight.detach().T if flip else weight.detach(), hessian, sparsity, name=name, **options)
    with torch.no_grad():
        weight.copy_(result.weight.T if flip else result.weight)
    return (result.importance.T if flip else result.importance).contiguous()


def regularized_gradient(
    gradient: Float[Tensor, "rows columns"],
    general: Float[Tensor, "rows columns"],
    *,
    texts: int,
    learning_rate: float,
    lam: float = 0.1,
    reg: Literal["code", "fisher"] = "code",
    reg_ratio: float | None = None,
) -> Float[Tensor, "rows columns"]:
    r"""The gradient of the next-token loss plus that of a penalty on moving generally important weights.

    .. math:: L = L_{next} + \lambda \sum_m G^m (W'^m - W^m)^2, \qquad W' - W = -\alpha g

    whose gradient, with the diagonal Fisher approximation of the Hessian, is

    - ``reg="code"``: :math:`g + 2 \lambda \alpha^2 G g^2 / N`, as released (one power of ``g`` short, so that its sign
      is lost);
    - ``reg="fisher"``: :math:`g + 2 \lambda \alpha^2 G g \cdot g^2 / N`, as derived.

    Args:
        gradient: :math:`g`, of the *mean* loss of a batch.
        general: :math:`G`.
        texts: :math:`N`, domain texts in all (1000 in the released code).
        learning_rate: :math:`\alpha` of this step.
        lam: :math:`\lambda`.
        reg: see above.
        reg_ratio: ours, instead of :math:`\lambda \alpha^2`: the penalty's part is scaled so that its mean magnitude is
            so many times the gradient's. As configured in the paper it is smaller than rounding.

    >>> g = torch.tensor([[0.2, -0.1]])
    >>> regularized_gradient(g, torch.tensor([[1.0, 0.0]]), texts=10, learning_rate=1.0, lam=10.0).tolist()
    [[0.2800000011920929, -0.10000000149011612]]
    """
    if reg not in ("code", "fisher"):
        raise ValueError(f"reg must be 'code' or 'fisher', got {reg!r}")
    part = general * gradient.square() / texts
    if reg == "fisher":
        part = part * gradient
    if reg_ratio is None:
        return gradient + 2 * lam * learning_rate**2 * part
    mean = part.abs().mean()
    return gradient + torch.where(mean > 0, part * (reg_ratio * gradient.abs().mean() / mean), 0)


def taylor_term(
    weight: Float[Tensor, "rows columns"],
    gradient: Float[Tensor, "rows columns"],
    *,
    texts: int,
    third_order: bool = False,
) -> Float[Tensor, "rows columns"]:
    r"""What removing each weight would change, :math:`|g w + (g w)^2 / 2N|` with :math:`g` refined as above.

    The released code adds the second term, where the expansion has a minus sign; ``third_order`` adds its
    :math:`w^3` in the place of the remainder, which is far larger than the other terms unless the gradient is scaled.

    >>> taylor_term(torch.tensor([[2.0]]), torch.tensor([[0.5]]), texts=1).item()
    1.5
    """
    first = gradient * weight
    total = first + first.square() / (2 * texts)
    return (total + weight**3 if third_order else total).abs()


def importance_masks(
    model: nn.Module,
    importance: Mapping[str, Tensor],
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    blocks: int = 1,
    count: Literal["exact", "released"] = "exact",
    of: Literal["targets", "all"] = "targets",
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
) -> Masks:
    """Masks that remove the least important weights of each matrix.

    Args:
        model: what the importances are of; it is not changed.
        importance: by name, not negative, of every matrix to prune.
        sparsity: share to remove, in [0, 1).
        pattern: ``"2:4"``: two of every four inputs stay; ``sparsity`` is not used.
        blocks: cut a matrix into so many blocks of inputs, each pruned alone (released script: 32).
        count: ``"exact"``: ``round(sparsity * n)``, of equal ones the earlier; ``"released"``: whatever is at most the
            (interpolated) percentile.
        of: what ``sparsity`` is a share of: the matrices, or (``"all"``) all of the model's parameters (the paper's
            50 % is 52 % of the matrices).
        targets, exclude: which matrices, see :func:`~lossmith.sparsity.block_weights`.

    Raises:
        ValueError: an importance that is missing, of another shape or not finite (named); a share of all parameters
            that the matrices cannot give (with the largest); a sparsity out of range.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> scores = {"0.weight": torch.tensor([[1.0, 2.0], [4.0, 3.0]])}
    >>> importance_masks(net, scores, targets="all")["0.weight"].tolist()
    [[False, False], [True, True]]
    """
    options: Any = {"pattern": pattern, "blocks": blocks, "count": count, "of": of}
    return dict(stream_masks(model, importance, sparsity, targets=targets, exclude=exclude, **options))


def stream_masks(
    model: nn.Module,
    importance: Mapping[str, Tensor],
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    blocks: int = 1,
    count: Literal["exact", "released"] = "exact",
    of: Literal["targets", "all"] = "targets",
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """:func:`importance_masks` one by one; all importances are looked at before the first."""
    check_sparsity(sparsity)
    if count not in ("exact", "released") or of not in ("targets", "all"):
        raise ValueError(f"count must be 'exact' or 'released' and of 'targets' or 'all', got {count!r} and {of!r}")
    wanted = block_weights(model, targets=targets, exclude=exclude).weights
    check_importance(importance, wanted, "importance")
    if of == "all":
        sparsity = _share_of_targets(model, sum(weight.numel() for weight in wanted.values()), sparsity)
    flipped = turned(model)
    names = list(wanted)
    # Those of a block that is in memory now would stay there.
    del wanted
    for name in names:
        stored = importance[name]
        score = stored.T if name in flipped else stored
        if not 1 <= blocks <= score.shape[1]:
            raise ValueError(f"blocks must lie between 1 and the inputs of {name}, {score.shape[1]}, got {blocks}")
        if pattern is not None:
            mask = one_shot_masks({name: score}, method=pattern)[name]
        else:
            width = -(-score.shape[1] // blocks)
            mask = torch.cat([_kept(part, sparsity, count, name) for part in score.split(width, dim=1)], dim=1)
        yield name, (mask.T if name in flipped else mask).contiguous()


def _kept(score: Tensor, sparsity: float, count: str, name: str) -> Tensor:
    if count == "exact":
        return one_shot_masks({name: score.contiguous()}, sparsity, method="uniform")[name]
    threshold = float(np.percentile(score.detach().cpu().numpy(), 100 * sparsity))
    return score > threshold


def check_importance(importance: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter], what: str) -> None:
    """Raise ``ValueError`` unless there is one importance for every matrix, finite and not negative."""
    for name, weight in wanted.items():
        if name not in importance:
            raise ValueError(f"the {what} of {name} is missing")
        score = importance[name]
        if score.shape != weight.shape:
            raise ValueError(f"the {what} of {name} has shape {tuple(score.shape)}, the weight {tuple(weight.shape)}")
        if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
            raise ValueError(f"the {what} of {name} has values that are NaN, infinite or negative")
    if unknown := [name for name in importance if name not in wanted]:
        raise ValueError(f"the {what} names {unknown[0]}, which is not among the {len(wanted)} matrices to prune")


def _share_of_targets(model: nn.Module, prunable: int, sparsity: float) -> float:
    number = sum(parameter.numel() for parameter in model.parameters())
    share = sparsity * number / prunable
    if share >= 1:
        raise ValueError(
            f"{sparsity:.1%} of all parameters cannot be removed: the prunable matrices are {prunable / number:.1%} of "
            "them"
        )
    return share
