"""Sampling, correction and re-generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lossmith.errors import InputError
from lossmith.studies.toy_languages import MarkovModel, likelihood, planted_errors
from lossmith.training import correct_and_regenerate, find_error_positions
from lossmith.training.response_sampling import response_batch, response_logits, sample_responses

P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25] * 4], dtype=torch.float64).log()[None]
Q = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()[None]
PROMPTS = [[1, 5, 7], [1], [1, 9, 4, 3, 8]]


def llama(seed: int = 0, vocabulary: int = 30) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=2,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("teacher_tokens", "expected"), [([0, 2, 1], 1), ([0, 1, 1], 2), ([0, 1, 0], -1), ([3, 1, 0], 0)]
)
def test_the_digests_positions(teacher_tokens: list[int], expected: int) -> None:
    found = find_error_positions(Q, P, torch.tensor([[0, 1, 0]]), torch.tensor([teacher_tokens]))
    assert found.tolist() == [expected]


def test_masked_places_are_never_chosen_and_each_example_stands_alone() -> None:
    both, tokens, drawn = (
        Q.repeat(3, 1, 1),
        torch.tensor([[0, 1, 0]]).repeat(3, 1),
        torch.tensor([[0, 2, 1]]).repeat(3, 1),
    )
    mask = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    assert find_error_positions(both, P.repeat(3, 1, 1), tokens, drawn, mask).tolist() == [1, 2, -1]
    nothing = torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), torch.zeros(2, 0).long(), torch.zeros(2, 0).long()
    assert find_error_positions(*nothing).tolist() == [-1, -1]


def test_a_random_place_is_one_where_they_differ() -> None:
    torch.manual_seed(0)
    tokens, drawn = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 2, 1]])
    found = {find_error_positions(Q, P, tokens, drawn, position="random").item() for _ in range(40)}
    assert found == {1, 2}


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"teacher_tokens must have the shape \(1, 3\), got \(1, 2\)"):
        find_error_positions(Q, P, torch.zeros(1, 3).long(), torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match="position must be largest or random"):
        find_error_positions(Q, P, torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), position="first")  # type: ignore[arg-type]


def test_greedy_responses_are_those_of_each_prompt_alone_despite_padding() -> None:
    model = llama()
    together = sample_responses(model, PROMPTS, max_new_tokens=8, temperature=0)
    for prompt, response in zip(PROMPTS, together, strict=True):
        row, expected = list(prompt), []
        while len(expected) < 8 and (not expected or expected[-1] != 2):
            expected.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            row.append(expected[-1])
        assert response == expected


def test_samples_follow_the_models_own_distribution_and_not_its_generation_settings() -> None:
    model = llama()
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    generator = torch.Generator().manual_seed(0)
    drawn = sample_responses(model, [[1, 5]] * 4000, max_new_tokens=1, generator=generator)
    share = torch.bincount(torch.tensor(drawn).flatten(), minlength=30) / 4000
    expected = model(input_ids=torch.tensor([[1, 5]])).logits[0, -1].softmax(-1)
    assert (share - expected).abs().max() < 0.03  # four standard errors of a share of one half
    assert model.generation_config.top_k == 1


def test_responses_end_at_their_end_token_and_at_their_own_length() -> None:
    model = llama()
    ends = sorted({row[0] for row in sample_responses(model, PROMPTS, max_new_tokens=1, temperature=0)})
    rows = sample_responses(model, PROMPTS, max_new_tokens=6, temperature=0, eos_token_id=ends)
    assert all(len(row) == 1 and row[0] in ends for row in rows)
    lengths = [3, 0, 5]
    rows = sample_responses(model, PROMPTS, max_new_tokens=lengths, temperature=0, eos_token_id=[])
    assert [len(row) for row in rows] == lengths
    assert sample_responses(model, [], max_new_tokens=3) == []


def test_sampling_leaves_the_model_and_the_global_generator_as_they_were() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    state = torch.random.get_rng_state()
    first = sample_responses(model, PROMPTS, max_new_tokens=5, generator=torch.Generator().manual_seed(3))
    again = sample_responses(model, PROMPTS, max_new_tokens=5, generator=torch.Generator().manual_seed(3))
    assert first == again
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert not model.model.layers[0].training


def test_logits_of_a_response_are_those_from_which_its_tokens_are_drawn() -> None:
    model = llama()
    responses = [[4, 6], [3, 3, 9, 2], []]
    found = response_logits(model, PROMPTS, responses)
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        for k in range(len(response)):
            expected = model(input_ids=torch.tensor([[*prompt, *response[:k]]])).logits[0, -1]
            torch.testing.assert_close(found[i, k], expected, rtol=1e-4, atol=1e-5)
        assert not found[i, len(response) :].any()


@pytest.mark.parametrize("teacher_token", ["sample", "argmax"])
def test_what_is_before_the_error_stays_and_the_token_there_changes(teacher_token: Any) -> None:
    student, teacher = llama(), llama(seed=1)
    generator = torch.Generator().manual_seed(0)
    out = correct_and_regenerate(
        student, teacher, PROMPTS * 10, max_new_tokens=9, teacher_token=teacher_token, generator=generator
    )
    assert (out.error_positions >= 0).sum() > 20
    for draft, final, (j,) in zip(out.drafts, out.responses, out.error_positions.tolist(), strict=True):
        if j < 0:
            assert final == draft
            continue
        assert final[:j] == draft[:j]
        assert final[j] != draft[j]
        assert len(final) <= 9
        assert 2 not in final[:-1]  # the end token only ends
        if final[j] == 2:
            assert len(final) == j + 1
        elif final[-1] != 2:
            assert len(final) == 9
    if teacher_token == "argmax":
        chosen = response_logits(teacher, PROMPTS * 10, out.drafts).argmax(-1)
        for i, (j,) in enumerate(out.error_positions.tolist()):
            assert j < 0 or out.responses[i][j] == chosen[i, j]


def test_after_the_error_the_student_and_not_the_teacher_writes() -> None:
    """The teacher only ever writes token 3 and the student never does."""
    teacher_rows = torch.zeros(6, 6)
    teacher_rows[:, 3] = 1
    student_rows = torch.tensor([0.2, 0.2, 0.2, 0, 0.2, 0.2]).repeat(6, 1)
    out = correct_and_regenerate(
        MarkovModel(student_rows), MarkovModel(teacher_rows), [[0]] * 50, max_new_tokens=6, generator=torch.Generator()
    )
    for response, (j,) in zip(out.responses, out.error_positions.tolist(), strict=True):
        assert response.count(3) == 1
        assert response[j] == 3


def test_a_student_that_is_its_teacher_is_not_corrected_with_certain_tokens() -> None:
    model = MarkovModel(torch.eye(5).roll(1, 1))
    out = correct_and_regenerate(model, model, [[0], [3]], max_new_tokens=4)
    assert out.error_positions.tolist() == [[-1], [-1]]
    assert out.responses == out.drafts == [[1, 2, 3, 4], [4, 0, 1, 2]]


def test_rounds_go_on_from_the_round_before() -> None:
    student, teacher = llama(), llama(seed=1)
    out = correct_and_regenerate(student, teacher, PROMPTS, max_new_tokens=6, rounds=3, generator=torch.Generator())
    assert out.error_positions.shape == (3, 3)
    none = correct_and_regenerate(student, teacher, PROMPTS, max_new_tokens=6, rounds=0, generator=torch.Generator())
    assert none.error_positions.shape == (3, 0)
    assert none.responses == none.drafts
    assert none.teacher_positions == 0


def test_padding_on_either_side_of_the_prompts_changes_nothing() -> None:
    student, teacher = llama(), llama(seed=1)

    def run(ids: Any, mask: Any = None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return correct_and_regenerate(student, teacher, ids, mask, max_new_tokens=5, generator=generator).responses

    expected = run(PROMPTS)
    for left in (True, False):
        ids, mask = torch.zeros(3, 7).long(), torch.zeros(3, 7).long()
        for i, prompt in enumerate(PROMPTS):
            place = slice(7 - len(prompt), 7) if left else slice(0, len(prompt))
            ids[i, place], mask[i, place] = torch.tensor(prompt), 1
        assert run(ids, mask) == expected


def test_few_examples_at_a_time_find_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = llama(), llama(seed=1)
    drafts = sample_responses(student, PROMPTS, max_new_tokens=6)
    options: dict[str, Any] = {"responses": drafts, "max_new_tokens": 6, "teacher_token": "argmax"}
    whole = correct_and_regenerate(student, teacher, PROMPTS, **options)
    monkeypatch.setattr("lossmith.training.sequence_revision._LOGITS_AT_ONCE", 1)
    assert torch.equal(
        correct_and_regenerate(student, teacher, PROMPTS, **options).error_positions, whole.error_positions
    )


def test_the_tensors_hold_prompts_and_responses() -> None:
    out = correct_and_regenerate(llama(), llama(seed=1), PROMPTS, max_new_tokens=5)
    batch = response_batch(PROMPTS, out.responses)
    assert torch.equal(out.sequences, batch["input_ids"])
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        assert out.sequences[i][out.attention_mask[i] == 1].tolist() == [*prompt, *response]
        assert out.labels[i][out.labels[i] != -100].tolist() == response
        assert out.labels[i, : len(prompt)].eq(-100).all()


def gains(seed: int, position: Any) -> tuple[float, float]:
    """Share of planted errors found, and the gain in the teacher's mean log likelihood per token."""
    teacher, student, bad = planted_errors(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(20, (500, 1), generator=generator).tolist()
    out = correct_and_regenerate(
        student, teacher, prompts, max_new_tokens=29, position=position, eos_token_id=[], generator=generator
    )
    before = torch.tensor([[*p, *r] for p, r in zip(prompts, out.drafts, strict=True)])
    after = torch.tensor([[*p, *r] for p, r in zip(prompts, out.responses, strict=True)])
    context = torch.tensor([row[j] for row, (j,) in zip(before.tolist(), out.error_positions.tolist(), strict=True)])
    hit = torch.isin(context, torch.tensor(bad)).double().mean().item()
    gain = likelihood(teacher, after).mean() - likelihood(teacher, before).mean()
    return hit, gain.item()


@pytest.mark.parametrize("seed", range(4))
def test_planted_errors_are_found_and_mending_them_helps_more_than_mending_anything(seed: int) -> None:
    hit, gain = gains(seed, "largest")
    random_hit, random_gain = gains(seed, "random")
    assert hit > 0.9
    assert hit > random_hit + 0.3
    assert gain > 0
    assert gain > random_gain


def test_half_precision_models_are_scored_in_float32() -> None:
    student, teacher = llama().bfloat16(), llama(seed=1).bfloat16()
    out = correct_and_regenerate(student, teacher, PROMPTS, max_new_tokens=4)
    assert len(out.responses) == 3


class Plain(torch.nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, 5)


def test_wrong_input_is_one_sentence() -> None:
    student, teacher = llama(), llama(seed=1)
    for arguments, options, message in (
        ((student, teacher, PROMPTS), {"rounds": -1}, "rounds must be >= 0 and max_new_tokens >= 1, got -1"),
        ((student, teacher, PROMPTS), {"max_new_tokens": 0}, "max_new_tokens >= 1, got 1 and 0"),
        ((student, teacher, PROMPTS), {"temperature": -1.0}, "temperature must be a finite number >= 0, got -1"),
        ((student, teacher, PROMPTS), {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ((student, teacher, PROMPTS), {"teacher_token": "best"}, "teacher_token must be sample or argmax, got 'best'"),
        ((student, teacher, PROMPTS), {"position": "first"}, "position must be largest or random, got 'first'"),
        ((student, teacher, [[1], []]), {}, "prompt 1 has no token"),
        ((student, teacher, PROMPTS), {"responses": [[1]]}, r"responses must be one per prompt \(3\), got 1"),
        ((student, llama(1, vocabulary=31), PROMPTS), {}, "vocabulary has 30 tokens and the teacher's 31"),
        ((Plain(), teacher, PROMPTS), {}, "Plain cannot generate text"),
        ((student, teacher, torch.ones(3).long()), {}, r"input_ids must have the shape \(examples, length\)"),
        (
            (student, teacher, torch.ones(1, 3).long(), torch.ones(1, 2)),
            {},
            r"attention_mask must have the shape \(1, 3\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            correct_and_regenerate(*arguments, **options)  # type: ignore[arg-type]
