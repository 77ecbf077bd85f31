"""What gives a text its loss: a language model whose logits are never held, or any function of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .tokenization import encode, tokenizer_key

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Scorer:
    """How texts become token ids, and token ids losses.

    Attributes:
        losses: ``losses(input_ids, targets)`` with two integer tensors ``(rows, length)``, targets already shifted and
            -100 where there is none, gives the sum of the targets' negative log probabilities in nats, one per row. A
            row's value must not depend on what stands right of its last target, nor on the other rows.
        encode: token ids of each text; at least two, since the first one is not predicted.
        max_length: longest row of token ids, the first (context) included.
        encoding: names the tokenisation; scorers of one encoding share the work.
        identity: names the weights; a run continues only with the same.

    Relations: :func:`language_model_scorer` makes one from a model and a tokenizer.
    """

    losses: Callable[[Tensor, Tensor], Tensor]
    encode: Callable[[Sequence[str]], Sequence[np.ndarray]]
    max_length: int
    encoding: str
    identity: str

    def __post_init__(self) -> None:
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2:
            raise InputError(f"max_length must be a whole number of at least 2 tokens, got {self.max_length!r}")


def language_model_scorer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chunk_size: int | None = None,
) -> Scorer:
    r"""A scorer from a causal language model: negative log probability of each text, in nats.

    .. math:: \mathrm{NLL}(x) = -\sum_{t=2}^{T} \log p(x_t \mid x_{<t})

    A text is framed by the tokenizer's start and end token; all but the start are predicted once. A text longer than
    ``max_length`` is cut into windows, each of which begins with the last token of the one before as its context.

    Args:
        model: a Hugging Face causal model, or any module that maps ids ``(rows, length)`` to logits
            ``(rows, length, classes)`` and looks only to the left. It is put into evaluation mode while it scores.
        tokenizer: the model's.
        max_length: longest row; by default 1,024, or the model's ``max_position_embeddings`` where that is less.
        chunk_size: rows of logits held at once, see :func:`lossmith.heads.linear_loss`.

    The logits are held a chunk at a time where they are the product of the backbone's output and an ``nn.Linear``,
    which is checked once; a model with soft-capped or scaled logits uses its own, one batch at a time.

    Raises:
        InputError: ``max_length`` is out of range, or the tokenizer has more tokens than the model has embeddings.

    >>> scorer = language_model_scorer(model, tokenizer)  # doctest: +SKIP
    >>> score_corpus("corpus.jsonl", {"prior": scorer}, "scores.parquet")  # doctest: +SKIP
    """
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if max_length is None:
        max_length = min(_LONGEST, positions or _LONGEST)
    elif positions is not None and max_length > positions:
        raise InputError(f"max_length {max_length} is longer than the {positions} positions of the model")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is not None and embeddings.weight.shape[0] < len(tokenizer):
        raise InputError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens, the model embeddings for "
            f"{embeddings.weight.shape[0]}; use the model's own tokenizer"
        )
    return Scorer(
        losses=_LanguageModel(model, chunk_size),
        encode=lambda texts: encode(tokenizer, texts),
        max_length=max_length,
        encoding=tokenizer_key(tokenizer),
        identity=_weights_key(model),
    )


class _LanguageModel:
    def __init__(self, model: nn.Module, chunk_size: int | None):
        self.model, self.chunk_size = model, chunk_size
        self._streams: bool | None = None

    def __call__(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        import torch

        from ..heads import linear_loss

        model: Any = self.model
        device = next((p.device for p in model.parameters()), input_ids.device)
        input_ids, targets = input_ids.to(device), targets.to(device)
        training = model.training
        if training:
            model.eval()
        try:
            # Right-padded, and the model looks left: no mask is needed, and attention takes its fast causal path.
            with torch.no_grad():
                if self._streams is None:
                    self._streams = _logits_are_head_of_backbone(model, input_ids[:1, :8])
                if self._streams:
                    head = model.get_output_embeddings()
                    hidden = model.base_model(input_ids, use_cache=False)[0]
                    options = {"bias": head.bias, "chunk_size": self.chunk_size}
                    rows = linear_loss("cross_entropy", hidden, head.weight, targets, **options)
                else:
                    rows = _plain_losses(_logits(model, input_ids), targets)
        finally:
            if training:
                model.train()
        return rows.double().sum(-1).cpu()


def _logits(model: Any, input_ids: Tensor) -> Tensor:
    output = model(input_ids, use_cache=False) if hasattr(model, "config") else model(input_ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _plain_losses(logits: Tensor, targets: Tensor) -> Tensor:
    from ..losses import cross_entropy

    keep = targets != IGNORE_INDEX
    values = cross_entropy(logits[keep], targets[keep])
    return values.new_zeros(targets.shape).masked_scatter(keep, values)


def _logits_are_head_of_backbone(model: Any, input_ids: Tensor) -> bool:
    """Whether the output layer's product with the backbone's output is what the model returns, bit for bit."""
    import torch
    from torch import nn

    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or getattr(model, "base_model", model) is model:
        return False
    hidden = model.base_model(input_ids, use_cache=False)[0]
    if hidden.shape[-1] != head.in_features:
        return False
    return torch.equal(head(hidden).float(), _logits(model, input_ids).float())


def _weights_key(model: nn.Module) -> str:
    import torch

    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def score_texts(scorer: Scorer, texts: Sequence[str], *, batch_tokens: int = 16_384) -> tuple[np.ndarray, np.ndarray]:
    """Nats (float64) and number of predicted tokens (int64) of each text; NaN where the model gives no finite number.

    Windows of like length share a batch of at most ``batch_tokens`` positions (or one window), longest first.

    >>> import torch
    >>> letters = lambda texts: [np.arange(len(text)) for text in texts]
    >>> even = Scorer(lambda ids, targets: (targets >= 0).sum(-1) * 0.5, letters, 4, "letters", "half a nat each")
    >>> nats, tokens = score_texts(even, ["ab", "abcdefghij"])
    >>> nats.tolist(), tokens.tolist()
    ([0.5, 4.5], [1, 9])
    """
    return score_ids(scorer, scorer.encode(texts), batch_tokens=batch_tokens)


def score_ids(
    scorer: Scorer, sequences: Sequence[np.ndarray], *, batch_tokens: int = 16_384
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`score_texts`, from token ids."""
    import torch

    tokens = np.array([len(ids) - 1 for ids in sequences], dtype=np.int64)
    nats = np.zeros(len(sequences))
    step = scorer.max_length - 1
    windows = [(i, s, min(s + step, n)) for i, n in enumerate(tokens) for s in range(0, int(n), step)]
    windows.sort(key=lambda window: window[1] - window[2])
    at = 0
    while at < len(windows):
        longest = windows[at][2] - windows[at][1]
        rows = windows[at : at + max(1, batch_tokens // longest)]
        at += len(rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        targets = np.full((len(rows), longest), IGNORE_INDEX, dtype=np.int64)
        for row, (i, start, stop) in enumerate(rows):
            ids[row, : stop - start] = sequences[i][start:stop]
            targets[row, : stop - start] = sequences[i][start + 1 : stop + 1]
        sums = scorer.losses(torch.from_numpy(ids), torch.from_numpy(targets))
        if tuple(sums.shape) != (len(rows),):
            raise ValueError(f"losses must give one number per row, ({len(rows)},), got {tuple(sums.shape)}")
        np.add.at(nats, [i for i, _, _ in rows], sums.detach().cpu().double().numpy())
    nats[~np.isfinite(nats)] = np.nan
    nats[tokens < 1] = np.nan
    return nats, tokens
