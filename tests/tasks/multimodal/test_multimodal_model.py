"""The multimodal diffusion model: any encoder and trunk, bidirectional, causal, padded, pruned, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.sparsity import PruneSchedule, denoise_generate
from lossmith.tasks.multimodal import MultimodalDiffusionConfig, MultimodalDiffusionModel
from lossmith.training import MaskedDiffusion, NextAnswerToken
from lossmith.training.models import with_exact_norms

PATCHES = {"model_type": "patches", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 8}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
LLAMA = {"model_type": "llama", "num_key_value_heads": 1, **SHAPE}


def build(vision: Any = PATCHES, text: Any = LLAMA, **options: Any) -> MultimodalDiffusionModel:
    torch.manual_seed(0)
    return MultimodalDiffusionModel(MultimodalDiffusionConfig(vision, text, mask_token_id=3, **options)).eval()


def batch(size: int = 8, rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.rand(rows, 3, size, size, generator=generator, dtype=dtype),
        "input_ids": torch.randint(4, 20, (rows, 3), generator=generator),
        "labels": torch.randint(4, 20, (rows, 5), generator=generator),
    }


def vision(kind: str) -> dict[str, Any]:
    small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {"model_type": kind, "image_size": 16, "patch_size": 8, "num_channels": 3, **small}


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit", "dinov2"])
def test_any_vision_encoder_gives_its_patches_alone(kind: str) -> None:
    model = build(vision(kind))
    assert model.embed_images(batch(16)["pixel_values"]).shape == (2, 4, 16)
    inputs = batch(16)["pixel_values"]
    encoder = model.vision.encoder
    hidden = encoder(pixel_values=(inputs - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(model.vision(inputs), hidden[:, hidden.shape[1] - 4 :])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_causal_logits_are_those_of_the_trunk_in_transformers(kind: str) -> None:
    text: dict[str, Any] = {"model_type": kind, **SHAPE, "num_key_value_heads": 1, "head_dim": 8}
    model = build(text=text, shifted=True)
    inputs = batch()
    prompt, _, _ = model.embed_prompt(inputs)
    whole = torch.cat([prompt, model.embed(inputs["labels"])], dim=1)
    expected = model.trunk(inputs_embeds=whole, use_cache=False).last_hidden_state[:, -6:-1]
    found = model.answer_hidden(inputs, inputs["labels"], causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_token_sees_every_other_unless_causal() -> None:
    model = build()
    inputs = batch(rows=1)
    positions = torch.arange(12).unsqueeze(0)
    embeddings = torch.cat([model.embed_prompt(inputs)[0], model.embed(inputs["labels"])], dim=1)

    def influence(causal: bool) -> Tensor:
        def last(x: Tensor) -> Tensor:
            return model._hidden(x, positions, None, None, causal)[0].sum(-1)

        return torch.autograd.functional.jacobian(last, embeddings)[:, 0].abs().sum(-1) > 0

    assert influence(False).all()
    assert torch.equal(influence(True), torch.ones(12, 12).tril().bool())


@pytest.mark.parametrize("name", ["q_and_k", "grouped", "normed"])
def test_attention_logits_are_those_that_attention_uses(name: str) -> None:
    text: dict[str, Any] = {"model_type": "qwen3" if name == "normed" else "llama", **SHAPE}
    text |= {"num_key_value_heads": 1 if name == "grouped" else 2, "head_dim": 8}
    model = build(text=text)
    inputs = batch()
    prompt, _, _ = model.embed_prompt(inputs)
    positions = torch.arange(prompt.shape[1]).expand(2, -1)
    found: list[Tensor] = []
    model.denoise(prompt, positions, None, 2, lambda layer, hidden, attention: found.append(attention(None)))
    model.trunk.config._attn_implementation = "eager"
    rotary = model.trunk.rotary_emb(prompt, position_ids=positions)
    layer = model.trunk.layers[0]
    _, weights = layer.self_attn(layer.input_layernorm(prompt), position_embeddings=rotary, attention_mask=None)
    torch.testing.assert_close(torch.softmax(found[0], -1), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_filling_up_prompts_and_answers_changes_nothing(shifted: bool, causal: bool) -> None:
    model = with_exact_norms(build(shifted=shifted).double())
    inputs = batch(dtype=torch.float64)
    plain = model.answer_hidden(inputs, inputs["labels"], causal=causal)
    filler = torch.full((2, 2), 7)
    padded = {
        **inputs,
        "input_ids": torch.cat([filler, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(2, 2), torch.ones(2, 3)], dim=1),
        "labels": torch.cat([inputs["labels"], torch.full((2, 1), -100)], dim=1),
    }
    ids = torch.cat([inputs["labels"], torch.full((2, 1), 9)], dim=1)
    found = model.answer_hidden(padded, ids, causal=causal)[:, :5]
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "text", ["fastv(step=0, layer=0, keep=0.5)", "answer_attention(step=1, keep=0.5)", "vtw(layer=0)", "one_nn"]
)
def test_a_pruned_answer_is_that_of_the_shorter_sequence(text: str, shifted: bool) -> None:
    """After the cut, each forward pass is one over the tokens that are left, with nothing left behind."""
    model = build(shifted=shifted)
    inputs = batch()
    with torch.no_grad():
        prompt, visual, _ = model.embed_prompt(inputs)
        schedule = PruneSchedule.parse(text)
        found = denoise_generate(
            model, prompt, visual, answer_length=4, steps=4, prune=schedule, seed=0, keep_log_probabilities=True
        )
        kept = found.kept_indices
        images = prompt[:, visual].gather(1, kept.unsqueeze(-1).expand(-1, -1, 16))
        before = found.ids.masked_fill(found.committed_at >= 3, model.mask_token_id)
        whole = torch.cat([images, prompt[:, visual.stop :], model.embed(before)], dim=1)
        positions = torch.arange(whole.shape[1]).expand(2, -1)
        _, logits = model.denoise(whole, positions, None, 4)
    logits[..., model.mask_token_id] = -torch.inf
    last = found.trace[3].log_probabilities
    torch.testing.assert_close(last, torch.log_softmax(logits, -1), rtol=1e-5, atol=1e-5)


def test_layer_skipping_after_the_last_layer_is_no_pruning_bit_for_bit() -> None:
    model = build()
    prompt, visual, _ = model.embed_prompt(batch())
    runs = [
        denoise_generate(model, prompt, visual, answer_length=4, steps=2, prune=PruneSchedule.parse(text), seed=0)
        for text in (None, "vtw(layer=1, every_step=True)", "random(keep=1.0)")
    ]
    assert torch.equal(runs[0].ids, runs[1].ids)
    assert torch.equal(runs[0].ids, runs[2].ids)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_same_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = build(text={**LLAMA, "tie_word_embeddings": tied}, shifted=tied)
    model.visual_pruning = PruneSchedule("one_nn", progressive=(0.25, 0.5))
    model.save_pretrained(tmp_path / "model")
    again = MultimodalDiffusionModel.from_pretrained(tmp_path / "model")
    assert again.configuration == model.configuration
    assert again.visual_pruning == model.visual_pruning
    inputs = batch()
    ids = torch.full((2, 5), 3)
    assert torch.equal(model.answer_hidden(inputs, ids), again.answer_hidden(inputs, ids))
    assert (again.lm_head.weight is again.trunk.embed_tokens.weight) == tied


def test_a_model_in_half_precision_answers_and_stays_so(tmp_path: Path) -> None:
    model = build().to(torch.bfloat16)
    prompt, visual, _ = model.embed_prompt(batch())
    assert prompt.dtype == torch.bfloat16
    schedule = PruneSchedule.parse("answer_attention(step=0, keep=0.5)")
    found = denoise_generate(model, prompt, visual, answer_length=4, steps=2, prune=schedule, seed=0)
    assert (found.ids != 3).all()
    model.save_pretrained(tmp_path)
    assert MultimodalDiffusionModel.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no multimodal model"):
        MultimodalDiffusionModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="needs 'patch_size'"):
        build({"model_type": "patches", "image_size": 8, "hidden_size": 4})
    with pytest.raises(InputError, match="does not divide image_size"):
        build({**PATCHES, "patch_size": 3})
    with pytest.raises(InputError, match="vision configuration"):
        build({**PATCHES, "model_type": "no-such-model"})
    with pytest.raises(InputError, match="must be a Llama-type model"):
        build(text={"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20})
    with pytest.raises(InputError, match="none of the 20 tokens"):
        MultimodalDiffusionModel(MultimodalDiffusionConfig(PATCHES, LLAMA, mask_token_id=20))
    with pytest.raises(ValueError, match=r"pixel_values must have the shape \(images, 3, 8, 8\)"):
        build().embed_images(torch.zeros(2, 1, 8, 8))
    model = build()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="does not fit its config"):
        MultimodalDiffusionModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="another kind of model"):
        MultimodalDiffusionModel.from_pretrained(tmp_path)


# ---- objectives ------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_loss_of_the_tokens_that_it_masked() -> None:
    model = with_exact_norms(build().double())
    inputs = batch(dtype=torch.float64)
    inputs["labels"][1, 3:] = -100
    found = MaskedDiffusion(generator=torch.Generator().manual_seed(4))(model, inputs)
    t, masked = MaskedDiffusion(generator=torch.Generator().manual_seed(4)).draw(inputs["labels"])
    assert not masked[1, 3:].any()
    ids = torch.where(masked | (inputs["labels"] == -100), 3, inputs["labels"])
    logits = model.lm_head(model.answer_hidden(inputs, ids))
    for row in range(2):
        counted = int((inputs["labels"][row] != -100).sum())
        total = 0.0
        for i in range(5):
            if masked[row, i]:
                total -= torch.log_softmax(logits[row, i], -1)[inputs["labels"][row, i]].item()
        assert found[row].item() == pytest.approx(total / counted / t[row].item(), rel=1e-6)
    assert MaskedDiffusion().target_counts(inputs).tolist() == [5, 3]


def test_masks_are_drawn_with_the_probability_that_weighs_them() -> None:
    labels = torch.zeros(4000, 20, dtype=torch.long)
    t, masked = MaskedDiffusion(floor=0.2, generator=torch.Generator().manual_seed(0)).draw(labels)
    assert float(t.min()) >= 0.2
    assert float(t.mean()) == pytest.approx(0.6, abs=0.02)
    # Mean of masked / (n t) is 1 whatever t.
    assert float((masked.double().mean(1) / t).mean()) == pytest.approx(1.0, abs=0.02)


def test_next_token_training_predicts_each_token_from_those_before() -> None:
    model = with_exact_norms(build(shifted=True).double())
    inputs = batch(dtype=torch.float64)
    inputs["labels"][0, 4:] = -100
    found = NextAnswerToken()(model, inputs)
    prompt, _, _ = model.embed_prompt(inputs)
    whole = torch.cat([prompt, model.embed(inputs["labels"].clamp_min(0))], dim=1)
    hidden = model.trunk(inputs_embeds=whole, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)[:, prompt.shape[1] - 1 : -1]
    for row, length in ((0, 4), (1, 5)):
        expected = torch.nn.functional.cross_entropy(logits[row, :length], inputs["labels"][row, :length])
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="shifted=True"):
        NextAnswerToken()(build(), batch())


def test_evaluation_counts_guesses_from_nothing_but_masks() -> None:
    model, inputs = build(), batch()
    inputs["labels"][1, 2:] = -100
    found = MaskedDiffusion().evaluate(model, inputs)
    assert found.targets.tolist() == [5, 2]
    hidden = model.answer_hidden(inputs, torch.full((2, 5), 3))
    right = (model.lm_head(hidden).argmax(-1) == inputs["labels"]).sum(1)
    assert torch.equal(found.correct, right)


def test_a_floor_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floor must be in \(0, 1\]"):
        MaskedDiffusion(floor=0.0)
