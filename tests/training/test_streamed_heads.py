"""Which models' output layers may be streamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.training import NextToken


class ZeroBias(LlamaForCausalLM):
    """A bias behind the output layer that training will move, still 0."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.late_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> object:  # type: ignore[override]
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[arg-type]
        output.logits = output.logits + self.late_bias
        return output


@pytest.mark.parametrize("kind", [LlamaForCausalLM, ZeroBias])
def test_losses_and_gradients_are_those_of_the_models_own_logits(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    model = kind(config)
    ids = torch.randint(13, (3, 6))
    batch: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    losses = NextToken()(model, batch)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
