"""Models with an encoder and a decoder: the loss of each target, several targets of one input at the price of one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.heads import linear_loss
from lossmith.registry import Spec
from lossmith.training.objectives import (
    IGNORE_INDEX,
    Batch,
    ExampleEvaluation,
    LossFunction,
    _rows,
    bind_loss,
    forward_replaced,
    output_logits,
    returns_head_output,
    unwrapped,
)


class SequenceToSequence:
    r"""Teacher forcing: each target's loss, averaged over its own unmasked tokens.

    .. math:: \ell_i = \frac{1}{n_i} \sum_{t:\ y_{i,t} \neq -100} \mathrm{loss}(o_{i,t}, y_{i,t})

    A model's own ``model(labels=...).loss`` is the mean over all tokens of the batch, in which a long target counts
    more than a short one, and which cannot be compared between targets.

    Args:
        loss: a registered name or any row-wise function ``(logits, targets) -> one value per row``.
        chunk_size: rows of logits held at once; ``None`` chooses. Full logits are never held where the output layer is
            plain (see :class:`NextToken`).
        **options: of ``loss``.

    The batch holds ``input_ids``, ``attention_mask`` and ``labels`` (-100 where masked; not shifted: the model's own
    shift makes the decoder's input).

    >>> objective = SequenceToSequence("cross_entropy(label_smoothing=0.1)")
    """

    def __init__(
        self, loss: str | Spec | LossFunction = "cross_entropy", *, chunk_size: int | None = None, **options: Any
    ):
        self.loss, self.chunk_size = bind_loss(loss, **options), chunk_size
        self._plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example; 0 for an example without targets."""
        states = self.encode(model, batch["input_ids"], batch["attention_mask"])
        return self.of_targets(model, states, batch["attention_mask"], batch["labels"])

    def encode(
        self, model: nn.Module, input_ids: Int[Tensor, "rows length"], attention_mask: Tensor
    ) -> Float[Tensor, "rows length features"]:
        """The encoder's last hidden states."""
        encoder: Any = _encoder(model)
        return encoder(input_ids=input_ids, attention_mask=attention_mask)[0]

    def of_targets(
        self,
        model: nn.Module,
        states: Float[Tensor, "rows length features"],
        attention_mask: Tensor,
        labels: Int[Tensor, "rows targets"],
    ) -> Float[Tensor, rows]:
        """Mean loss of each row of ``labels`` given the encoder's states of the same row."""
        rows = self._through(model, states, attention_mask, labels, self.loss)
        return rows.sum(-1) / (labels != IGNORE_INDEX).sum(-1).clamp_min(1)

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Number of unmasked targets of each example."""
        return (batch["labels"] != IGNORE_INDEX).sum(-1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """Cross entropy (whatever the training loss is) and correct first choices, per example."""
        labels = batch["labels"]
        states = self.encode(model, batch["input_ids"], batch["attention_mask"])
        logits = self._logits(model, states, batch["attention_mask"], labels)
        keep = labels != IGNORE_INDEX
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
        correct = (logits.argmax(-1) == labels) & keep
        return ExampleEvaluation(losses.sum(-1), keep.sum(-1), correct.sum(-1))

    def _through(
        self, model: nn.Module, states: Tensor, mask: Tensor, labels: Tensor, loss: LossFunction
    ) -> Float[Tensor, "rows targets"]:
        inner: Any = unwrapped(model)
        head = inner.get_output_embeddings()
        if not self._is_plain(model, inner, head, states, mask, labels):
            return _rows(loss, self._logits(model, states, mask, labels), labels)

        def forward(hidden: Tensor) -> Tensor:
            rows = linear_loss(loss, hidden, head.weight, labels, bias=head.bias, chunk_size=self.chunk_size)
            return rows.unsqueeze(-1)

        with forward_replaced(head, forward):
            return self._logits(model, states, mask, labels).squeeze(-1)

    def _logits(self, model: nn.Module, states: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        inner: Any = unwrapped(model)
        output = model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=inner.prepare_decoder_input_ids_from_labels(labels=labels),
            use_cache=False,
        )
        return output_logits(output)

    def _is_plain(
        self, model: nn.Module, inner: nn.Module, head: Any, states: Tensor, mask: Tensor, labels: Tensor
    ) -> bool:
        """Whether the logits are the output layer's product, bit for bit; asked once per model."""
        if type(head) is not nn.Linear or hasattr(model, "_orig_mod"):
            return False
        if inner not in self._plain:
            few = (states[:1], mask[:1], labels[:1, :4])
            self._plain[inner] = returns_head_output(head, lambda: self._logits(model, *few))
        return self._plain[inner]


def check_sequence_to_sequence(model: nn.Module, name: str = "the student") -> None:
    """Refuse what has no encoder, no decoder, or no output layer.

    Raises:
        InputError: with the model's class.
    """
    wanted = ("get_encoder", "get_output_embeddings", "prepare_decoder_input_ids_from_labels", "generate")
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not all(hasattr(model, part) for part in wanted):
        raise InputError(
            f"{name} must be a sequence-to-sequence model with an output layer (T5, BART, ...), got "
            f"{type(model).__name__}"
        )


def _encoder(model: nn.Module) -> nn.Module:
    inner: Any = unwrapped(model)
    return inner.get_encoder()
