"""Building a multimodal model from configurations, or from a vision encoder and a language model with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lossmith.data.image_questions import ImageQuestion
from lossmith.errors import InputError
from lossmith.files import read_json
from lossmith.tasks.multimodal.model import MultimodalDiffusionConfig, MultimodalDiffusionModel

if TYPE_CHECKING:
    from lossmith.tasks.multimodal.answering import ImageAnswerer

_WORDS = 8192


def build_tokenizer(source: str | Path | Mapping[str, Any] | None, questions: Sequence[ImageQuestion]) -> Any:
    """A given tokenizer with a mask token, or one whose tokens are the words of the questions and answers."""
    if isinstance(source, str | Path):
        from lossmith.data import load_tokenizer

        tokenizer: Any = load_tokenizer(source)
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        return tokenizer
    return word_tokenizer([text for q in questions for text in (q.prompt, q.completion)])


def word_tokenizer(texts: Sequence[str]) -> Any:
    """Tokens are words and punctuation marks, the most frequent 8,192 of ``texts``; with pad, end, unknown and mask.

    >>> tokenizer = word_tokenizer(["read all", "one two"])
    >>> tokenizer.decode(tokenizer("two one")["input_ids"])
    'two one'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=_WORDS, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )


def build_model(system: ImageAnswerer, questions: Sequence[ImageQuestion]) -> MultimodalDiffusionModel:
    """The model that ``system``'s arguments describe; random weights come from torch's global generator."""
    vision, encoder, mean, std = _vision(system, questions)
    text, trunk, head = _text(system)
    config = MultimodalDiffusionConfig(
        vision=vision,
        text=text,
        mask_token_id=int(system.tokenizer_.mask_token_id),
        shifted=system.kind == "adapted",
        image_mean=mean,
        image_std=std,
    )
    return MultimodalDiffusionModel(config, vision=encoder, trunk=trunk, lm_head=head)


def _vision(
    system: ImageAnswerer, questions: Sequence[ImageQuestion]
) -> tuple[Mapping[str, Any], Any, tuple[float, ...], tuple[float, ...]]:
    half = (0.5,)
    if isinstance(system.vision, Mapping):
        return system.vision, None, half, half
    if system.vision is not None:
        from transformers import AutoModel

        try:
            encoder: Any = AutoModel.from_pretrained(str(system.vision), use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(f"vision {system.vision} cannot be loaded: {str(error).splitlines()[0]}") from None
        # CLIP and SigLIP come with a text encoder, which is not wanted.
        encoder = getattr(encoder, "vision_model", encoder)
        mean, std = _statistics(system.vision)
        return encoder.config.to_dict(), encoder, mean, std
    sizes = {tuple(q.image.shape) for q in questions if isinstance(q.image, Tensor)}
    if len(sizes) > 1:
        raise InputError(f"images must all have one shape, got {sorted(sizes)[:3]}; or give a vision configuration")
    channels, size, wide = sizes.pop() if sizes else (3, system.image_size, system.image_size)
    if size != wide:
        raise InputError(f"images must be square, got {size} x {wide}")
    config = {
        "model_type": "patches",
        "image_size": size,
        "patch_size": system.patch_size,
        "num_channels": channels,
        "hidden_size": system.width,
    }
    return config, None, half, half


def _statistics(vision: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels that the encoder was trained with, where its folder or hub page says so."""
    from transformers.utils import cached_file

    try:
        path = cached_file(str(vision), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        path = None
    values = read_json(path) if path else {}
    return tuple(values.get("image_mean", (0.5,))), tuple(values.get("image_std", (0.5,)))


def _text(system: ImageAnswerer) -> tuple[Mapping[str, Any], Any, Any]:
    size = len(system.tokenizer_)
    if isinstance(system.trunk, Mapping):
        return {**system.trunk, "vocab_size": size}, None, None
    if system.trunk is not None:
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(system.trunk), use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(f"trunk {system.trunk} cannot be loaded: {str(error).splitlines()[0]}") from None
        if size > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(size, mean_resizing=False)
        return model.config.to_dict(), model.base_model, model.get_output_embeddings()
    config = {
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": system.width,
        "intermediate_size": 3 * system.width,
        "num_hidden_layers": system.layers,
        "num_attention_heads": max(1, system.width // 16),
        "max_position_embeddings": 4096,
        "initializer_range": 0.5 / system.width**0.5,
        "tie_word_embeddings": False,
    }
    return config, None, None
