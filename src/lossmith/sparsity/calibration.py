"""What pruning is calibrated on: rows of tokens, and what is kept of the inputs that a layer sees."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a model is called with: one tensor, or arguments by name.
Batch = Tensor | Mapping[str, Tensor]

_USABLE = "give at least one text that is not blank, of words that the tokenizer knows"


def calibration_rows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches of equally long rows of tokens, for methods that look at a layer's inputs.

    Texts are framed by the start and the end token, joined, and cut every ``length`` tokens; ``samples`` rows are drawn
    at random from the first ``4 * samples``. A corpus that is shorter than one row gives one shorter row.

    Args:
        texts: read only as far as needed.
        tokenizer: the model's.
        samples: how many rows, at most.
        length: tokens of a row (SparseGPT and Wanda: what the model can read).
        batch_size: rows that go through the model together.
        seed: of the draw.

    Returns:
        ``{"input_ids": (batch_size, length)}`` each.

    Raises:
        InputError: no text has a token that the tokenizer knows; a tokenizer without an end token.
    """
    if samples < 1 or length < 2 or batch_size < 1:
        raise InputError(
            f"samples and batch_size must be at least 1 and length at least 2, got {samples}, {batch_size} and {length}"
        )
    tokens: list[int] = []
    for text in texts:
        for found in _framed(tokenizer, [text]):
            tokens += found.tolist()
        if len(tokens) >= 4 * samples * length:
            break
    rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)] or [tokens]
    if not tokens:
        raise InputError(f"the calibration texts have no usable tokens: {_USABLE}")
    rows = random.Random(seed).sample(rows, min(samples, len(rows)))
    return [{"input_ids": torch.tensor(rows[i : i + batch_size])} for i in range(0, len(rows), batch_size)]


def text_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, max_length: int = 1024
) -> list[dict[str, Tensor]]:
    """Batches of whole texts, for methods that look at gradients: ``input_ids`` and ``labels`` (-100 in padding).

    Texts that are longer than ``max_length`` tokens are cut there; those without a token that the tokenizer knows are
    left out.

    Raises:
        InputError: no text is left; a tokenizer without an end token.
    """
    from lossmith.data.collation import PaddedCollator

    if batch_size < 1 or max_length < 2:
        raise InputError(f"batch_size must be at least 1 and max_length at least 2, got {batch_size} and {max_length}")
    rows = [{"input_ids": ids[:max_length]} for ids in _framed(tokenizer, texts)]
    if not rows:
        raise InputError(f"the domain texts have no usable tokens: {_USABLE}")
    padding: Any = tokenizer.pad_token_id
    collate = PaddedCollator(int(padding if padding is not None else 0))
    batches = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches]


def _framed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of texts of which there is more than the frame."""
    from lossmith.data.tokenization import encode

    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token, which frames calibration texts: give it one, or batches")
    special = list(tokenizer.all_special_ids)
    encoded = encode(tokenizer, [text for text in texts if text.strip()])
    return [ids for ids in encoded if not np.isin(ids, special).all()]


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch, which is moved to where the model is."""
    # Of a model that is read block by block some parameters are nowhere.
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    known = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    # A cache would hold every layer's keys and values.
    if hasattr(getattr(model, "config", None), "use_cache"):
        return model(**known, use_cache=False)
    return model(**known)


class InputProducts:
    r"""The mean of a layer's inputs' products, for the Hessian of its squared error.

    .. math:: H = \frac{2}{n} \sum_{i=1}^{n} X_i^\top X_i

    over ``n`` sequences (not tokens), as in SparseGPT (2023, arXiv 2301.00774, released code). An input of two
    dimensions is one sequence. Float32; float64 where the inputs are.

    >>> seen = InputProducts()
    >>> seen.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> seen.hessian().tolist()
    [[2.0, 4.0], [4.0, 10.0]]
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.sequences = 0

    def add(self, inputs: Float[Tensor, "*batch inputs"]) -> None:
        """Count another batch of inputs."""
        flat, sequences = _flat(inputs)
        if self.total is None:
            self.total = flat.new_zeros(flat.shape[1], flat.shape[1])
        before, self.sequences = self.sequences, self.sequences + sequences
        # A running mean, so that H is never there twice.
        self.total.addmm_(flat.T, flat, beta=before / self.sequences, alpha=2 / self.sequences)

    def hessian(self) -> Float[Tensor, "inputs inputs"]:
        """``H`` so far: not a copy."""
        if self.total is None:
            raise ValueError("no inputs were seen")
        return self.total


class InputNorms:
    r"""Each input's squared norm over tokens, mean over sequences: ``diag(H) / 2`` of :class:`InputProducts`.

    >>> seen = InputNorms()
    >>> seen.add(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    >>> seen.squared().tolist()
    [1.0, 5.0]
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.sequences = 0

    def add(self, inputs: Float[Tensor, "*batch inputs"]) -> None:
        """Count another batch of inputs."""
        flat, sequences = _flat(inputs)
        squares = flat.square().sum(0)
        self.total = squares if self.total is None else self.total + squares
        self.sequences += sequences

    def squared(self) -> Float[Tensor, " inputs"]:
        """The norms so far."""
        if self.total is None:
            raise ValueError("no inputs were seen")
        return self.total / self.sequences


def _flat(inputs: Tensor) -> tuple[Tensor, int]:
    """Tokens x inputs, and how many sequences they are."""
    sequences = inputs.shape[0] if inputs.ndim > 2 else 1
    flat = inputs.detach().reshape(-1, inputs.shape[-1])
    return flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32), sequences
