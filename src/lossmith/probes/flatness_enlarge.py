"""A language model in the parameters of a wider and deeper one, so that the flatness of both can be compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

# What a configuration calls a size that grows with the width; numbers of heads do, the size of a head does not.
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "n_embd",
    "n_inner",
    "n_head",
    "d_model",
)
_DEPTHS = ("num_hidden_layers", "n_layer")
# Layers whose output is several blocks one behind the other, each of which is repeated by itself.
_BLOCKS = {"c_attn": 3}


@torch.no_grad()
def enlarge_width(model: Any, factor: int, *, layers: int | None = None) -> Any:
    r"""The same function in a model ``factor`` times as wide, with as many more heads of the same size.

    Traces of the Hessian compare in one parameter space alone: before two sizes of an architecture are compared, the
    smaller is enlarged to the larger. Every activation is repeated ``factor`` times; a linear layer sums over copies
    and divides,

    .. math:: W' = \tfrac1k \mathbf{1}_{k \times k} \otimes W, \qquad b' = \mathbf{1}_k \otimes b, \qquad
              W' (\mathbf{1}_k \otimes x) + b' = \mathbf{1}_k \otimes (W x + b),

    and normalisation sees the mean and variance that it saw. Embeddings are repeated undivided. (The paper divides them
    by ``k``, which is exact only up to the epsilon of a normalisation that must follow them.) An output layer that
    shares its matrix with them has the normalisation in front of it divided by ``k`` instead. Further layers are zeros
    in all their parameters, which in a pre-normalised model adds nothing.

    Args:
        model: a Hugging Face language model, such as Llama, GPT-2, GPT-NeoX or BERT. It is not changed.
        factor: ``k``, at least 1.
        layers: of the result, at least as many as the model has; default: as many.

    Returns:
        A new model with the same class, type of numbers, device and mode.

    Raises:
        ValueError: a factor or number of layers out of range, a configuration without a width, or an architecture whose
            enlarged form is not the same function (post-normalised models cannot get further layers). Outputs are
            compared on random tokens before the model is returned.

    Source: "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022,
    arXiv 2210.14199, appendix B.3; released as ``enlarge.py``.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> small = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=1, n_positions=16)).eval()
    >>> wide = enlarge_width(small, 3, layers=2)
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> wide.config.n_embd, bool(torch.allclose(small(ids).logits, wide(ids).logits, atol=1e-5))
    (24, True)
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor must be a whole number from 1, got {factor!r}")
    config: Any = getattr(model, "config", None)
    widths = [name for name in _WIDTHS if isinstance(getattr(config, name, None), int)]
    depths = [name for name in _DEPTHS if isinstance(getattr(config, name, None), int)]
    if not widths or not depths:
        raise ValueError(f"{type(model).__name__} has no configuration with a width and a number of layers")
    least = int(getattr(config, depths[0]))
    if layers is not None and layers < least:
        raise ValueError(f"layers must be at least the {least} of the model, got {layers}")
    larger = copy.deepcopy(config)
    for name in widths:
        setattr(larger, name, factor * getattr(config, name))
    for name in depths[:1]:
        setattr(larger, name, least if layers is None else layers)
    if isinstance(getattr(larger, "layer_types", None), list):
        kinds = larger.layer_types
        larger.layer_types = kinds + kinds[-1:] * (getattr(larger, depths[0]) - len(kinds))
    first = next(model.parameters())
    made = type(model)(larger).to(device=first.device, dtype=first.dtype).train(model.training)
    given, modules = dict(model.named_parameters()), dict(made.named_modules())
    for name, target in made.named_parameters():
        if name not in given:
            target.zero_()
            continue
        owner, _, kind = name.rpartition(".")
        target.copy_(_repeated(given[name], target.shape, modules[owner], owner, kind, factor, name))
    if factor > 1 and made.get_output_embeddings().weight is made.get_input_embeddings().weight:
        _divide_norm_before_output(made, factor)
    _check_same(model, made)
    return made


def _repeated(value: Tensor, shape: Any, module: nn.Module, owner: str, kind: str, factor: int, name: str) -> Tensor:
    """A parameter, repeated along the dimensions that grew, and divided where it sums over copies."""
    grown = [factor if new == old * factor else 1 for old, new in zip(value.shape, shape, strict=True)]
    parts = value.chunk(_BLOCKS.get(owner.rpartition(".")[2], 1), dim=-1)
    result = torch.cat([part.repeat(*grown) for part in parts], dim=-1)
    if result.shape != shape:
        raise ValueError(f"{name}: {tuple(value.shape)} cannot become {tuple(shape)} by repetition")
    if kind == "weight" and value.ndim == 2 and not isinstance(module, nn.Embedding):
        # transformers' Conv1D, of GPT-2, holds (inputs, outputs).
        inputs = 1 if isinstance(module, nn.Linear) else 0
        result = result / grown[inputs]
    return result


def _divide_norm_before_output(model: Any, factor: int) -> None:
    """Scales and shifts of the last normalisation that belongs to no layer."""
    norms = [
        module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and not any(part.isdigit() for part in name.split("."))
    ]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has tied embeddings and no normalisation in front of its output layer"
        )
    for parameter in norms[-1].parameters():
        parameter /= factor


def _check_same(small: Any, large: Any) -> None:
    modes = small.training, large.training
    first, words = next(small.parameters()), small.get_input_embeddings().weight.shape[0]
    ids = torch.randint(words, (2, 4), generator=torch.Generator().manual_seed(0)).to(first.device)
    try:
        before, after = (model.eval()(input_ids=ids).logits.double() for model in (small, large))
    finally:
        small.train(modes[0])
        large.train(modes[1])
    # Models normalise in float32 whatever their own numbers are.
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 0.1
    error = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise ValueError(
            f"{type(small).__name__} cannot be enlarged by repetition: the outputs would differ by {error:.2g} of the "
            "largest (post-normalised models cannot get further layers; other architectures may scale otherwise)"
        )
