"""Losses of encoder-decoder models, per target; and texts sampled from models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from lossmith.data import train_tokenizer
from lossmith.errors import InputError
from lossmith.training import ModelTeacher, SequenceToSequence, generate_texts
from lossmith.training.sequence_to_sequence import check_sequence_to_sequence


def t5(**changes: Any) -> T5:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
        **changes,
    }
    return T5(T5Config(**shape)).double().eval()


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return BartForConditionalGeneration(config).double().eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, 300, (3, 5), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "input_ids": torch.randint(3, 300, (3, 6), generator=generator),
        "attention_mask": mask,
        "labels": labels,
    }


@pytest.mark.parametrize("make", [t5, lambda: t5(tie_word_embeddings=False), bart], ids=["t5", "t5 untied", "bart"])
def test_each_targets_loss_is_its_own_mean_and_the_gradient_is_the_models_own(make: Any) -> None:
    model, rows = make(), batch()
    losses = SequenceToSequence()(model, rows)
    logits = model(**rows).logits
    each = F.cross_entropy(logits.transpose(1, 2), rows["labels"], reduction="none", ignore_index=-100)
    expected = each.sum(-1) / (rows["labels"] != -100).sum(-1).clamp_min(1)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    assert losses[2] == 0
    weights = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((weights * losses).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((weights * expected).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_a_models_own_loss_mixes_targets_of_different_lengths() -> None:
    model, rows = t5(), batch()
    assert abs(model(**rows).loss - SequenceToSequence()(model, rows)[:2].mean()) > 1e-4


def test_a_model_that_changes_its_logits_is_asked_for_them() -> None:
    class Capped(T5):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 5 * torch.tanh(output.logits / 5)
            return output

    model, rows = t5(), batch()
    model.__class__ = Capped
    each = F.cross_entropy(model(**rows).logits.transpose(1, 2), rows["labels"], reduction="none", ignore_index=-100)
    expected = each.sum(-1) / (rows["labels"] != -100).sum(-1).clamp_min(1)
    torch.testing.assert_close(SequenceToSequence()(model, rows), expected, rtol=1e-9, atol=1e-12)


def test_evaluation_counts_targets_and_right_tokens() -> None:
    model, rows = t5(), batch()
    rows["labels"][1, 0] = model(**rows).logits[1, 0].argmax()
    found = SequenceToSequence("focal_loss(gamma=2)").evaluate(model, rows)
    assert found.targets.tolist() == [2, 5, 0]
    assert found.correct[1] >= 1
    torch.testing.assert_close(found.loss_sums / found.targets.clamp_min(1), SequenceToSequence()(model, rows))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_other_models_are_refused(model: Any) -> None:
    model = model or LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(InputError, match="must be a sequence-to-sequence model"):
        check_sequence_to_sequence(model)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["explain: predict: one two three four"] * 3, vocab_size=270)


@pytest.fixture(scope="module")
def causal(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))


def test_greedy_texts_do_not_depend_on_what_else_is_in_the_batch(tokenizer: Any, causal: Any) -> None:
    prompts = ["one", "one two three", "four"]
    for model in (t5().float(), causal):
        together = generate_texts(model, tokenizer, prompts, max_new_tokens=6)
        apart = [generate_texts(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
        assert together == apart


def test_sampling_is_repeatable_and_leaves_the_global_generator_and_the_mode_alone(tokenizer: Any) -> None:
    model = t5().float().train()
    model.generation_config.top_k = 1  # would make every sample the greedy one
    torch.manual_seed(7)
    before = torch.get_rng_state()
    options: dict[str, Any] = {"samples": 3, "temperature": 1.5, "max_new_tokens": 6}
    first = generate_texts(model, tokenizer, ["one", "two"], seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert first == generate_texts(model, tokenizer, ["one", "two"], seed=1, **options)
    assert first != generate_texts(model, tokenizer, ["one", "two"], seed=2, **options)
    assert len({text for texts in first for text in texts}) > 1


def test_samples_follow_the_models_distribution_at_the_temperature(tokenizer: Any) -> None:
    model = t5(vocab_size=len(tokenizer)).float()
    ids = torch.tensor([tokenizer("one")["input_ids"] + [0]])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1]
    expected = (logits / 1.5).softmax(-1)
    count = 4000
    texts = generate_texts(model, tokenizer, ["one"], samples=count, temperature=1.5, max_new_tokens=1, seed=0)[0]
    # Stripping makes some tokens look alike: the test is of those that are one letter.
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    for letter in letters:
        spelt = {tokenizer.convert_tokens_to_ids(letter), tokenizer.convert_tokens_to_ids("Ġ" + letter)} - {None}
        p = float(sum(expected[i] for i in spelt))
        assert abs(texts.count(letter) / count - p) < 5 * (p / count) ** 0.5 + 1e-3


def test_a_local_model_teaches_and_gives_each_question_its_own_draws(tokenizer: Any, causal: Any) -> None:
    teacher = ModelTeacher(
        causal, tokenizer, max_new_tokens=5, examples=[("one", "<Explanation>: two <Answer>: three")]
    )
    assert teacher.prompt("four").endswith("Question: one\n<Explanation>: two <Answer>: three\n\nQuestion: four\n")
    both = teacher(["one", "two"], 2, 0.7)
    assert [len(texts) for texts in both] == [2, 2]
    assert teacher(["two"], 2, 0.7) == both[1:]


def test_a_chat_template_is_used(tokenizer: Any, causal: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    prompt = ModelTeacher(causal, tokenizer, instruction="do", examples=[("a", "b")]).prompt("c")
    assert prompt == "[user] do\n\nQuestion: a\n[assistant] b\n[user] do\n\nQuestion: c\n"


def test_wrong_sampling_is_refused(tokenizer: Any) -> None:
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="temperature must be a finite number > 0"):
            generate_texts(t5(), tokenizer, ["a"], temperature=temperature)
    with pytest.raises(InputError, match="need a temperature"):
        generate_texts(t5(), tokenizer, ["a"], samples=2)
    with pytest.raises(InputError, match="Linear cannot generate text"):
        ModelTeacher(nn.Linear(1, 1), tokenizer)
