"""Models of two blocks, built from configuration."""

from __future__ import annotations

from typing import Any

import torch

SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def small_llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **SHAPE, **options))


def small_gpt2_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))
