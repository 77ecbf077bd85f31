"""Models by preset, path or hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossmith.errors import InputError, did_you_mean

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Preset:
    """Shape of a Llama-style model with tied embeddings."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


PRESETS = {
    "nano": Preset(32, 1, 2, 96),
    "tiny": Preset(64, 2, 4, 192),
    "small": Preset(256, 4, 4, 768),
    "base": Preset(768, 12, 12, 2048),
}

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def build_model(
    name: str,
    *,
    vocab_size: int,
    sequence_length: int,
    dtype: str = "float32",
    random_weights: bool = False,
    overrides: Mapping[str, Any] | None = None,
    attention: str = "sdpa",
    special_tokens: dict[str, int | None] | None = None,
    option: str = "--model",
    length_option: str = "--sequence-length",
) -> nn.Module:
    """A causal language model: a preset (random weights), or a path or hub id (its weights).

    Args:
        name: ``nano``, ``tiny``, ``small``, ``base``, a folder with ``config.json`` and weights, or a hub id.
        vocab_size: number of tokens that the tokenizer can emit; a loaded model must have at least as many.
        sequence_length: longest row; a loaded model must accept it.
        dtype: ``float32``, ``float64``, ``bfloat16`` or ``float16``.
        random_weights: take only the configuration of the path or hub id, and start from random weights.
        overrides: changes to the configuration, for random weights only.
        attention: attention implementation of transformers (``sdpa``, ``eager``, ``flash_attention_2``, ...).
        special_tokens: ids by name (``bos_token_id``, ...) for a preset's configuration.
        option, length_option: what the user gave the name and the longest row by, for the sentences of errors.

    Random weights come from torch's global generator: seed it first.

    Raises:
        InputError: no such preset or folder, a folder without weights, a vocabulary that does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch_dtype = DTYPES[dtype]
    if overrides and not (random_weights or name in PRESETS):
        raise InputError("model_overrides change the shape of a model: add --random-weights")
    if name in PRESETS:
        shape: dict[str, Any] = {
            "vocab_size": vocab_size,
            "max_position_embeddings": max(sequence_length, 2048),
            "tie_word_embeddings": True,
            "attention_dropout": 0.0,
            # The usual 0.02 suits width 768; narrower models leave their first plateau sooner with more.
            "initializer_range": 0.5 / PRESETS[name].hidden_size ** 0.5,
            "attn_implementation": attention,
            **asdict(PRESETS[name]),
            **(special_tokens or {}),
            **(overrides or {}),
        }
        try:
            model: Any = LlamaForCausalLM(LlamaConfig(**shape))
        except Exception as error:
            # A configuration's own checks have many kinds of errors.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise InputError(f"model_overrides {dict(overrides or {})}: {reason}") from None
        model = model.to(torch_dtype)
        return with_exact_norms(model) if dtype == "float64" else model
    _check_folder(name, random_weights, option)
    try:
        if random_weights:
            config: Any = AutoConfig.from_pretrained(name, **(overrides or {}))
            config._attn_implementation = attention
            # Shapes of low-rank layers: weights=lost(...) makes them again.
            if hasattr(config, "lost"):
                del config.lost
            model = AutoModelForCausalLM.from_config(config).to(torch_dtype)
        elif _has_low_rank_layers(name):
            from lossmith.sparsity import load_lost

            model = load_lost(name, dtype=torch_dtype, attn_implementation=attention)
        else:
            # safetensors only: a pickled file could run code.
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch_dtype, attn_implementation=attention, use_safetensors=True
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{option} {name} cannot be loaded: {reason}") from None
    embeddings = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", None)
    check_fit(f"{option} {name}", embeddings, vocab_size, positions, sequence_length, length_option)
    return model


def _has_low_rank_layers(name: str) -> bool:
    """Whether a folder holds what AutoModel would leave random, with a warning only."""
    path = Path(name).expanduser() / "config.json"
    return path.is_file() and "lost" in json.loads(path.read_text(encoding="utf-8"))


def check_model(name: str, *, vocab_size: int | None, sequence_length: int, random_weights: bool = False) -> None:
    """Everything that can be known of a model without loading its weights.

    Args:
        name: as in :func:`build_model`.
        vocab_size: number of tokens of the tokenizer, where it is known already.
        sequence_length: longest row.
        random_weights: whether weights are needed.

    Raises:
        InputError: no such preset or folder, a folder without weights, a vocabulary or a length that does not fit.
    """
    if name in PRESETS:
        return
    _check_folder(name, random_weights)
    config = Path(name).expanduser() / "config.json"
    if config.exists():
        values = json.loads(config.read_text(encoding="utf-8"))
        values = {**values, **(values.get("text_config") or {})}
        positions = values.get("max_position_embeddings") or values.get("n_positions")
        check_fit(f"--model {name}", values.get("vocab_size"), vocab_size, positions, sequence_length)


def check_fit(
    model: str,
    embeddings: int | None,
    vocab_size: int | None,
    positions: int | None,
    sequence_length: int,
    length_option: str = "--sequence-length",
) -> None:
    """Refuse a tokenizer or a row length that a model cannot take; what is ``None`` is not known."""
    if embeddings is not None and vocab_size is not None and embeddings < vocab_size:
        raise InputError(
            f"vocabulary mismatch: the tokenizer has {vocab_size} tokens, but {model} has embeddings for "
            f"{embeddings}; use the model's own tokenizer (leave out --tokenizer) or another model"
        )
    if positions is not None and positions < sequence_length:
        raise InputError(f"{length_option} {sequence_length} is longer than the {positions} positions of {model}")


def _check_folder(name: str, random_weights: bool, option: str = "--model") -> None:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise InputError(f"{option} {name} is a file; give the folder that holds config.json and model.safetensors")
    if not folder.is_dir():
        if "/" not in name or name.startswith((".", "/", "~")):
            raise InputError(f"{option} {name} is neither a preset nor a folder: {did_you_mean(name, PRESETS)}")
        return
    if not (folder / "config.json").exists():
        raise InputError(f"{option} {name} has no config.json; give a folder written by save_pretrained")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{option} {name}: config.json is not JSON") from None
    if random_weights or any((folder / file).exists() for file in _WEIGHT_FILES):
        return
    if any((folder / file).exists() for file in _PICKLED_WEIGHTS):
        raise InputError(
            f"{option} {name} has only pickled weights (pytorch_model.bin), which could run code; "
            "save it again with save_pretrained"
        )
    raise InputError(
        f"{option} {name} has no weights (model.safetensors); add --random-weights to start from its configuration "
        "alone"
    )


def with_exact_norms(model: nn.Module) -> nn.Module:
    """Replace Llama's norms by ``torch.nn.RMSNorm``, in place: the former round to float32 even in a float64 model."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


def extra_multiplications(model: nn.Module) -> int:
    """Multiplications per token besides those of :func:`matmul_parameters`.

    Of layers that multiply by a larger matrix than they have parameters: each says so in ``extra_multiplications``.
    """
    return sum(int(getattr(module, "extra_multiplications", 0)) for module in model.modules())


def matmul_parameters(model: nn.Module) -> int:
    """Parameters that take part in a matrix product for every token: all matrices but input embeddings.

    A tied output layer counts, since its product is computed.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and getattr(head, "weight", None) is not None:
        embeddings.discard(id(head.weight))
    seen = {id(p): p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings}
    return sum(seen.values())
