"""Enlarging a model keeps its function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lossmith.probes import enlarge_width, hessian_trace

F64 = torch.float64
IDS = torch.randint(13, (3, 7), generator=torch.Generator().manual_seed(0))


def build(kind: str, tied: bool) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 13, "tie_word_embeddings": tied}
    usual = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    made: Any = {
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=32, **sizes)),
        "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**usual, **sizes)),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **usual, **sizes)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(num_key_value_heads=2, **usual, **sizes)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**usual, **sizes)),
    }[kind]()
    with torch.no_grad():
        # Scales, shifts and biases that are not 1 and 0, and weights that matter.
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return made.to(F64).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen2", "bert"])
def test_the_function_stays_to_float64(kind: str, tied: bool) -> None:
    small = build(kind, tied)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    # Llama's normalisation is in float32 whatever the model's numbers are.
    tolerance = 1e-6 if kind in ("llama", "qwen2") else 1e-12
    for factor, layers in ((3, None), (2, None if kind == "bert" else 5)):
        wide = enlarge_width(small, factor, layers=layers)
        reference, found = small(IDS).logits, wide(IDS).logits
        assert bool((found - reference).abs().max() <= tolerance * reference.abs().max())
        assert wide.get_input_embeddings().weight.shape == (13, 8 * factor)
        assert wide.dtype == F64
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_are_repeated(tied: bool) -> None:
    small = build("neox", tied)
    wide = enlarge_width(small, 2)
    a, b = (m(IDS, output_hidden_states=True).hidden_states for m in (small, wide))
    for narrow, broad in zip(a[:-1], b[:-1], strict=True):
        torch.testing.assert_close(broad, narrow.repeat(1, 1, 2), rtol=1e-12, atol=1e-12)


def test_the_loss_stays_and_the_trace_does_not() -> None:
    """Item 4 of the digest: the trace is that of a parametrisation, so every model of a comparison is enlarged."""
    small = build("neox", False)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}]
    narrow, wide = (hessian_trace(model, batches, estimator="exact") for model in (small, enlarge_width(small, 2)))
    assert wide.loss == pytest.approx(narrow.loss, rel=1e-10)
    assert abs(wide.trace / narrow.trace - 1) > 0.05


def test_a_factor_of_one_is_a_copy() -> None:
    small = build("gpt2", True)
    copied = enlarge_width(small, 1)
    assert copied is not small
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in copied.state_dict().items())


def test_an_enlarged_model_is_saved_and_loaded(tmp_path: Any) -> None:
    small = build("llama", True).float()
    wide = enlarge_width(small, 2, layers=3)
    wide.save_pretrained(tmp_path)
    loaded = type(wide).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, small(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, factor, layers, message",
    [
        ("gpt2", 0, None, "factor must be a whole number from 1, got 0"),
        ("gpt2", 1.5, None, "factor must be a whole number from 1, got 1.5"),
        ("gpt2", 2, 1, "layers must be at least the 2 of the model, got 1"),
        ("bert", 2, 3, "BertForMaskedLM cannot be enlarged by repetition: .*post-normalised"),
    ],
)
def test_wrong_input_is_one_sentence(kind: str, factor: Any, layers: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enlarge_width(build(kind, False), factor, layers=layers)
    with pytest.raises(ValueError, match="Linear has no configuration with a width"):
        enlarge_width(torch.nn.Linear(2, 2), 2)
