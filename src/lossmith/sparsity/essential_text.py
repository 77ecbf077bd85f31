"""Quality of a causal language model on text, text by text, for curves with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lossmith.errors import InputError
from lossmith.losses import cross_entropy


class TextEvaluation:
    """Loss in nats per token (or accuracy of the next token) of each text, and how many tokens it had.

    Texts are cut and scored alone; those with fewer than two tokens are left out.
    """

    def __init__(self, rows: Sequence[Sequence[int]], what: Literal["loss", "accuracy"] = "loss"):
        self.rows, self.what = [list(row) for row in rows if len(row) >= 2], what
        if what not in ("loss", "accuracy"):
            raise ValueError(f"what must be 'loss' or 'accuracy', got {what!r}")
        if not self.rows:
            raise InputError("there is no text of two tokens or more to evaluate on")

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in one evaluation."""
        return sum(len(row) - 1 for row in self.rows)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Mean of each text, and its number of predicted tokens."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        values = []
        for row in self.rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            if self.what == "loss":
                found = cross_entropy(logits, ids[0, 1:]).double()
            else:
                found = (logits.argmax(-1) == ids[0, 1:]).double()
            values.append(float(found.mean()))
        model.train(was_training)
        return np.array(values), np.array([len(row) - 1 for row in self.rows], dtype=np.float64)


def text_evaluation(
    data: str,
    tokenizer: Any,
    *,
    texts: int = 200,
    max_length: int = 512,
    what: Literal["loss", "accuracy"] = "loss",
) -> TextEvaluation:
    """The first ``texts`` documents of a file, folder or hub id, cut at ``max_length`` tokens."""
    from lossmith.data import read_corpus

    if texts < 1 or max_length < 2:
        raise InputError(f"texts must be at least 1 and max_length at least 2, got {texts} and {max_length}")
    documents = islice((d.text for d in read_corpus(data) if d.text.strip()), texts)
    rows = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in documents]
    return TextEvaluation(rows, what)


def load_causal_model(name: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder or hub id; safetensors only.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lossmith.data.hub import hub_is_reachable

    options: dict[str, Any] = {"local_files_only": Path(name).exists() or not hub_is_reachable()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype="auto", **options)
    except Exception as error:  # a different kind for every way in which a folder can be wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} cannot be loaded: {reason}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
