"""The judge of rationales: an encoder over question and rationale that says how good the rationale is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.files import read_json, write_json


class RationaleJudge(nn.Module):
    r"""Scores in (0, 1): encoder, maximum over tokens, two linear layers, sigmoid.

    .. math:: s = \sigma\bigl(w_2^\top \mathrm{relu}(W_1 \max_t h_t + b_1) + b_2\bigr)

    Args:
        encoder: any Hugging Face encoder; its ``last_hidden_state`` is used.
        width: its number of features.
        configuration: of the model that the encoder is of, for saving.

    Learns by :func:`lossmith.losses.rationale_quality_loss`. Dropout is switched off: the scores are weights of another
    loss, and their noise would be its noise.

    Source: "QCRD", 2024, arXiv 2405.13014 (T5-base's encoder, maximum, two layers); the width of the hidden layer is
    not given there, here it is the encoder's.
    """

    def __init__(self, encoder: nn.Module, width: int, configuration: dict[str, Any] | None = None):
        super().__init__()
        self.encoder = encoder
        self.hidden, self.score = nn.Linear(width, width), nn.Linear(width, 1)
        self.configuration = configuration or {}
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # type: ignore[assignment]

    @classmethod
    def from_model(cls, model: nn.Module) -> RationaleJudge:
        """A judge with a copy of the model's encoder: nothing is shared with it."""
        source: Any = model
        # get_encoder: not all embeddings are the encoder's own, so the copy is of everything that it refers to.
        encoder = copy.deepcopy(source.get_encoder())
        judge = cls(encoder, _width(source.config), source.config.to_dict())
        parameter = next(source.parameters())
        return judge.to(device=parameter.device, dtype=parameter.dtype)

    def forward(
        self, input_ids: Int[Tensor, "rows length"], attention_mask: Int[Tensor, "rows length"]
    ) -> Float[Tensor, rows]:
        """Scores of rows that hold a question and a rationale each; at least float32."""
        if len(input_ids) == 0:
            return self.score.weight.sum() * torch.zeros(0, device=input_ids.device)
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        states = states.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(states.dtype).min)
        logits = self.score(torch.relu(self.hidden(states.amax(1)))).squeeze(-1)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights as safetensors, the configuration as JSON."""
        from lossmith.training.checkpoint import save_state

        save_state(dict(self.state_dict()), Path(folder) / "judge.safetensors")
        write_json(Path(folder) / "judge.json", json.loads(json.dumps(self.configuration, default=str)))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RationaleJudge:
        """What :meth:`save_pretrained` wrote."""
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        from lossmith.training.checkpoint import load_state

        folder = Path(folder)
        if not (folder / "judge.safetensors").exists() or not (folder / "judge.json").exists():
            raise InputError(f"{folder} holds no judge (judge.json and judge.safetensors)")
        configuration = read_json(folder / "judge.json")
        kind = configuration.pop("model_type")
        config = AutoConfig.for_model(kind, **configuration)
        model: Any = AutoModelForSeq2SeqLM.from_config(config)
        judge = cls(model.get_encoder(), _width(config), {**configuration, "model_type": kind})
        state = load_state(folder / "judge.safetensors")
        judge.to(next(iter(state.values())).dtype).load_state_dict(state)
        return judge


def area_under_curve(good: Tensor, bad: Tensor) -> float:
    """Probability that a good one scores above a bad one (ties count half); NaN without both.

    >>> area_under_curve(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    0.875
    """
    if not len(good) or not len(bad):
        return float("nan")
    difference = good.double().unsqueeze(1) - bad.double().unsqueeze(0)
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def _width(config: Any) -> int:
    for name in ("d_model", "hidden_size"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    raise InputError(f"the width of {type(config).__name__} is not known: it has neither d_model nor hidden_size")
