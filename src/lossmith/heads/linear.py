"""Any row-wise loss through a linear layer, without the (rows x classes) matrix of logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from lossmith import losses
from lossmith.heads.derivatives import StreamedLosses, WeightedLosses, undivided_losses
from lossmith.heads.softmax import SoftmaxKernel
from lossmith.heads.streaming import RowLoss
from lossmith.registry import LOSSES


def linear_loss(
    loss: Callable[..., Tensor] | str,
    hidden: Float[Tensor, "*batch features"],
    weight: Float[Tensor, "classes features"],
    targets: Tensor,
    *,
    bias: Float[Tensor, " classes"] | None = None,
    chunk_size: int | None = None,
    row_weights: Float[Tensor, "*batch"] | None = None,
    **options: Any,
) -> Float[Tensor, "*batch"]:
    r"""One loss per row of a linear layer's output, computed a chunk of rows at a time.

    .. math:: \ell_i = \mathrm{loss}(W h_i + b,\; t_i)

    Losses and gradients equal those of ``loss(torch.nn.functional.linear(hidden, weight, bias), targets)``,
    for any upstream gradient per row, but the logits of only one chunk exist at any time, forward and
    backward.

    Args:
        loss: a row-wise loss ``(logits, targets, **options) -> one value per row``: a function of
            :mod:`lossmith.losses`, the name of a registered one, or your own, without registration. It is called
            on chunks of rows, more than once per row, so that a row's value must not depend on the other rows nor on
            chance. It may not depend on further tensors that need a gradient: that gradient would be lost
            (options are checked for it, closures cannot be).
        hidden: the inputs of the layer. Tied embeddings and non-contiguous tensors are fine.
        weight: the weight of the layer, of the same dtype (or any, under autocast).
        targets: what the loss wants: class indices ``(*batch)``, or anything else that starts with
            ``*batch``, such as soft targets ``(*batch, classes)``. No gradient is taken for them.
        bias: the bias of the layer.
        chunk_size: rows per chunk. By default small problems are one chunk, and large ones are cut so that
            the logits of a chunk take about 64 MiB (a quarter of that for losses that autograd must
            differentiate), or a third of the size of ``weight`` where that is more.
        row_weights: what the rows' losses will be multiplied by, if that is known beforehand. It does not
            weigh the result: it is a promise that the upstream gradient will be proportional to it, as in
            ``(row_weights * linear_loss(...)).sum()``. Gradients are then taken in the forward pass: three
            matrix products instead of four, and one for rows of weight 0. If the promise is broken the
            gradients are recomputed: slower, never wrong.
        **options: keyword options of ``loss``.

    Returns:
        One unweighted loss per row, in float32 for half-precision inputs. Rows whose target is
        ``ignore_index`` (the option, or the default of a loss with such an argument) are left out before the
        matrix product: loss and gradient are exactly 0, whatever ``hidden`` holds there. An empty batch gives
        an empty result.

    Half precision (the dtype of the inputs, or of autocast): logits and sums over rows are float32; products
    are float32 too, except on a GPU, where the operands are half precision and the result float32.

    Derivatives of any order, ``torch.func`` (``grad``, ``jvp``, ``vmap`` and their nests, so also
    Hessian-vector products) work, in chunks up to the second order, except that ``jvp`` of ``jvp`` holds all
    logits (take ``jvp`` of ``grad`` instead). ``torch.compile`` runs this function eagerly, as a graph break.

    Raises:
        InputError: the name of the loss is not known.
        ValueError: shapes or class indices do not fit, or the loss does not return one value per row.
        TypeError: dtypes do not fit.

    Relations:
        ``torch.nn.functional.linear_cross_entropy`` is this for cross entropy, without second derivatives,
        ``torch.func`` and row weights, and in chunks only with its ``options=``.

    >>> hidden, weight = torch.randn(6, 8), torch.randn(50, 8, requires_grad=True)
    >>> targets = torch.tensor([3, 1, -100, 49, 0, 7])
    >>> row_losses = linear_loss("cross_entropy", hidden, weight, targets, chunk_size=4, label_smoothing=0.1)
    >>> row_losses.shape, row_losses[2].item()
    (torch.Size([6]), 0.0)
    >>> row_losses.mean().backward()
    >>> weight.grad.shape
    torch.Size([50, 8])
    """
    if torch.compiler.is_compiling():
        return _eagerly(loss, hidden, weight, targets, bias, chunk_size, row_weights, options)
    return _linear_loss(loss, hidden, weight, targets, bias, chunk_size, row_weights, options)


def _linear_loss(
    loss: Callable[..., Tensor] | str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    row_weights: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    batch = hidden.shape[:-1]
    _check_shapes(hidden, weight, targets, bias, chunk_size, row_weights)
    spec = _row_loss(loss, options, targets, len(batch), chunk_size, _product_dtype(hidden, weight, bias))
    rows = hidden.reshape(batch.numel(), hidden.shape[-1])
    flat_targets = targets.reshape(rows.shape[0], *targets.shape[len(batch) :])
    with torch.autocast(hidden.device.type, enabled=False):
        if _nested_forward_mode():
            result = undivided_losses(rows, weight, bias, flat_targets, spec)
        elif row_weights is None or not _gradients_wanted(rows, weight, bias) or _transformed():
            result = StreamedLosses.apply(rows, weight, bias, flat_targets, spec)
        else:
            flat_weights = row_weights.detach().reshape(-1)
            result = WeightedLosses.apply(rows, weight, bias, flat_targets, flat_weights, spec)
    return result.reshape(batch)


# torch.compiler.disable, but without importing the compiler (almost as long as importing torch) before it is needed.
_eagerly = torch._disable_dynamo(_linear_loss)


def _gradients_wanted(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _nested_forward_mode() -> bool:
    """Whether ``jvp`` is nested in ``jvp``: torch then silently loses a custom function's outer tangent."""
    if not torch._C._are_functorch_transforms_active():
        return False
    # Imports torch's compiler, which takes seconds: only here, where torch.func has loaded it already.
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    stack = retrieve_all_functorch_interpreters()
    return sum(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack) > 1


def _row_loss(
    loss: Callable[..., Tensor] | str,
    options: dict[str, Any],
    targets: Tensor,
    batch_ndim: int,
    chunk_size: int | None,
    product_dtype: torch.dtype,
) -> RowLoss:
    if isinstance(loss, str):
        loss = LOSSES.get(loss)
    if isinstance(loss, functools.partial) and not loss.args:  # partials of partials are flat already
        options = {**loss.keywords, **options}
        loss = loss.func
    if not callable(loss):
        raise TypeError(f"loss must be a function or the name of one, got {type(loss).__name__}")
    for name, option in options.items():
        if isinstance(option, Tensor) and option.requires_grad:
            raise ValueError(f"option {name} of the loss requires a gradient, which would be lost; detach it")
    classes_as_targets = targets.ndim == batch_ndim and not (targets.is_floating_point() or targets.is_complex())
    ignore_index = options["ignore_index"] if "ignore_index" in options else _default(loss, "ignore_index")
    fused = None
    if loss is losses.cross_entropy and classes_as_targets:
        # The loss itself judges its options and the dtypes, on no rows at all.
        loss(torch.empty(0, 1), targets.new_empty(0), **options)
        names = ("ignore_index", "label_smoothing", "log_partition_penalty")
        fused = SoftmaxKernel(*(options.get(name, _default(loss, name)) for name in names))
    skipped = int(ignore_index) if classes_as_targets and ignore_index is not None else None
    return RowLoss(loss, options, skipped, chunk_size, product_dtype, fused)


# Asked for several times in every step.
_CROSS_ENTROPY = inspect.signature(losses.cross_entropy).parameters


def _default(loss: Callable[..., Tensor], name: str) -> Any:
    try:
        parameters = _CROSS_ENTROPY if loss is losses.cross_entropy else inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    parameter = parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype in which ``torch.nn.functional.linear`` would multiply."""
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and all(t.dtype != torch.float64 for t in given.values()):
        return torch.get_autocast_dtype(device)
    for name, tensor in given.items():
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    return hidden.dtype


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    row_weights: Tensor | None,
) -> None:
    if hidden.ndim == 0:
        raise ValueError("hidden must have shape (*batch, features), got a scalar")
    batch = hidden.shape[:-1]
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape (classes, features) with features={hidden.shape[-1]} as in hidden, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one class, got 0")
    if targets.shape[: len(batch)] != batch:
        raise ValueError(
            f"targets must begin with the batch shape of hidden, {tuple(batch)}, got {tuple(targets.shape)}"
        )
    if targets.requires_grad:
        raise ValueError("targets require a gradient, which would be lost; detach them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if row_weights is not None and row_weights.shape != batch:
        raise ValueError(
            f"row_weights must have the batch shape of hidden, {tuple(batch)}, got {tuple(row_weights.shape)}"
        )
    if chunk_size is not None and (isinstance(chunk_size, bool) or chunk_size != int(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number >= 1 or None, got {chunk_size}")
