"""The denoising loop while visual tokens are dropped: with a model that is only a function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.sparsity import (
    Denoised,
    PruneSchedule,
    TransformerShape,
    denoise_generate,
    prune_visual_tokens,
    visual_flops,
)

WIDTH, CLASSES, LAYERS, MASK = 12, 11, 3, 10
TEXT, VISUAL, ANSWER = 3, 8, 6


class Toy:
    """Attention without projections, in float64; a table of embeddings, positions added by hand."""

    shape = TransformerShape(layers=LAYERS, width=WIDTH, ffn=16)
    mask_token_id = MASK

    def __init__(self, *, attention: bool = True, calls: bool = True):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
        self.weights = torch.randn(LAYERS, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2
        self.attention, self.calls = attention, calls
        self.lengths: list[list[int]] = []
        self.positions: list[Tensor] = []

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def denoise(
        self, embeddings: Tensor, positions: Tensor, real: Tensor | None, answer_length: int, after_attention: Any
    ) -> tuple[Tensor, Tensor]:
        self.lengths.append([])
        self.positions.append(positions)
        wave = torch.arange(WIDTH) + 1.0
        hidden = embeddings + 0.3 * torch.sin(positions.unsqueeze(-1) / wave)
        for number in range(LAYERS):
            self.lengths[-1].append(hidden.shape[1])
            logits = (hidden @ self.weights[number] @ hidden.transpose(1, 2)).unsqueeze(1)
            logits = torch.cat([logits, 0.5 * logits], dim=1)
            if real is not None:
                logits = logits.masked_fill(~real[:, None, None, :], -torch.inf)
            hidden = hidden + (torch.softmax(logits, -1) @ hidden.unsqueeze(1)).mean(1)
            if after_attention is not None and self.calls:
                give = (lambda q, x=logits: x if q is None else x[:, :, q]) if self.attention else None
                index = after_attention(number, hidden, give)
                if index is not None:
                    hidden = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
                    real = None if real is None else real.gather(1, index)
            hidden = torch.tanh(hidden)
        return hidden, hidden[:, -answer_length:] @ self.table.T


def run(model: Toy | None = None, batch: int = 3, **options: Any) -> Denoised:
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randn(batch, TEXT + VISUAL, WIDTH, generator=generator, dtype=torch.float64)
    given: dict[str, Any] = {"answer_length": ANSWER, "steps": ANSWER, "seed": 0, **options}
    if isinstance(given.get("prune"), str):
        given["prune"] = PruneSchedule.parse(given["prune"])
    return denoise_generate(model or Toy(), prompt, slice(1, 1 + VISUAL), **given)


EVERYWHERE = [
    "random(step=input, keep={})",
    "divprune(step=1, keep={})",
    "one_nn(step=input, keep={})",
    "one_nn_pairs(step=0, keep={})",
    "fastv(step=0, layer=1, keep={})",
    "fastv(step=2, keep={})",
    "sparsevlm(step=0, layer=0, keep={})",
    "sparsevlm(step=input, keep={})",
    "answer_attention(step=0, keep={})",
    "answer_attention(step=input, keep={})",
    "answer_attention(step=1, layer=2, keep={})",
    "answer_logits(step=0, keep={}, groups=4)",
    "answer_logits(step=input, keep={}, groups=3)",
    "random(step=1, layer=1, keep={}, every_step=true)",
]


@pytest.mark.parametrize("text", EVERYWHERE)
def test_keeping_everything_is_not_pruning_bit_for_bit(text: str) -> None:
    plain, kept = run(keep_log_probabilities=True), run(prune=text.format(1.0), keep_log_probabilities=True)
    assert torch.equal(plain.ids, kept.ids)
    assert kept.flops == plain.flops
    for one, other in zip(plain.trace, kept.trace, strict=True):
        assert one.log_probabilities is not None
        assert other.log_probabilities is not None
        assert torch.equal(one.log_probabilities, other.log_probabilities)


@pytest.mark.parametrize("text", EVERYWHERE)
def test_the_sequence_shrinks_by_what_is_dropped_and_the_answer_is_whole(text: str) -> None:
    model = Toy()
    found = run(model, prune=text.format(0.5))
    schedule = PruneSchedule.parse(text.format(0.5))
    assert schedule is not None
    cut = schedule.cuts(steps=ANSWER, layers=LAYERS, visual=VISUAL)[0]
    passes = model.lengths[-ANSWER:] if cut.step >= 0 and schedule.uses != "logits" else model.lengths
    total = TEXT + VISUAL + ANSWER
    if cut.layer is not None:
        assert passes[cut.step][cut.layer] == total
        assert passes[cut.step][cut.layer + 1 :] == [total - VISUAL // 2] * (LAYERS - cut.layer - 1)
    left = total if cut.passing else total - VISUAL // 2
    assert passes[-1][0] == left
    assert (found.ids != MASK).all()
    assert (found.committed_at >= 0).all()
    assert found.kept_indices.shape == (3, VISUAL if cut.passing else VISUAL // 2)
    for row in found.kept_indices.tolist():
        assert row == sorted(set(row))


@pytest.mark.parametrize("text", [t for t in EVERYWHERE if "logits" not in t and "attention(step=input" not in t])
def test_counted_flops_are_those_of_the_schedule(text: str) -> None:
    schedule = PruneSchedule.parse(text.format(0.5))
    assert schedule is not None
    size = {"text": TEXT, "visual": VISUAL, "answer": ANSWER, "steps": ANSWER}
    expected = visual_flops(Toy.shape, **size, prune=schedule)
    if schedule.uses == "attention" and schedule.step == "input":
        expected += visual_flops(Toy.shape, **{**size, "steps": 1})
    assert run(prune=schedule).flops == expected


def test_passes_that_only_score_are_paid_for() -> None:
    size = {"text": TEXT, "visual": VISUAL, "answer": ANSWER}
    whole = visual_flops(Toy.shape, **size, steps=1)
    six = visual_flops(Toy.shape, text=TEXT, visual=6, answer=ANSWER, steps=1)
    found = run(prune="answer_logits(step=input, keep=0.5, groups=4)")
    expected = whole + 4 * six + visual_flops(Toy.shape, **{**size, "visual": 4}, steps=ANSWER)
    assert found.flops == pytest.approx(expected, rel=1e-12)


def test_layer_skipping_after_the_last_layer_is_no_pruning() -> None:
    plain = run(keep_log_probabilities=True)
    skipped = run(prune=f"vtw(layer={LAYERS - 1}, every_step=true)", keep_log_probabilities=True)
    for one, other in zip(plain.trace, skipped.trace, strict=True):
        torch.testing.assert_close(one.log_probabilities, other.log_probabilities, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain.ids, skipped.ids)


def test_pruning_after_the_last_step_changes_nothing() -> None:
    plain, pruned = run(), run(prune=f"one_nn(step={ANSWER - 1}, keep=0.25)")
    assert torch.equal(plain.ids, pruned.ids)
    assert torch.equal(plain.kept_indices, pruned.kept_indices)
    assert plain.flops == pruned.flops


def test_what_was_committed_before_the_cut_stays() -> None:
    plain, pruned = run(), run(prune="random(step=2, keep=0.25)")
    early = plain.committed_at <= 2
    assert torch.equal(plain.committed_at[early], pruned.committed_at[early])
    assert torch.equal(plain.ids[early], pruned.ids[early])
    assert early.sum() == 3 * 3


def test_positions_are_numbered_anew_or_kept() -> None:
    anew, kept = Toy(), Toy()
    run(anew, prune="random(step=0, keep=0.25)")
    found = run(kept, prune="random(step=0, keep=0.25, keep_positions=true)")
    left = TEXT + VISUAL // 4 + ANSWER
    assert torch.equal(anew.positions[-1], torch.arange(left).expand(3, -1))
    assert torch.equal(kept.positions[-1][:, 1:3], found.kept_indices + 1)
    assert torch.equal(kept.positions[-1][:, -ANSWER:], anew.positions[0][:, -ANSWER:])


def test_selectors_choose_what_their_definition_says() -> None:
    """FastV and answer attention, against the loops that define them."""
    model = Toy()
    logits: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randn(1, TEXT + VISUAL, WIDTH, generator=generator, dtype=torch.float64)
    whole = torch.cat([prompt, model.embed(torch.full((1, ANSWER), MASK))], dim=1)
    positions = torch.arange(whole.shape[1]).unsqueeze(0)

    def watch(layer: int, _: Tensor, attention: Any) -> None:
        logits[layer] = attention(None)

    model.denoise(whole, positions, None, ANSWER, watch)
    fastv = torch.zeros(VISUAL, dtype=torch.float64)
    averaged = logits[1][0].mean(0)
    for query in range(whole.shape[1]):
        fastv += torch.softmax(averaged[query], -1)[1 : 1 + VISUAL]
    found = run(batch=1, prune="fastv(step=0, layer=1, keep=0.25)")
    assert found.kept_indices[0].tolist() == sorted(fastv.argsort(descending=True)[:2].tolist())
    unsorted = run(batch=1, prune="fastv(step=0, layer=1, keep=0.25, sort=false)")
    assert unsorted.kept_indices[0].tolist() == fastv.argsort(descending=True)[:2].tolist()

    still_masked = run(batch=1).committed_at[0] != 0
    paid = sum(torch.softmax(logits[layer][0], -1).mean(0) for layer in range(LAYERS))
    answers = paid[-ANSWER:, 1 : 1 + VISUAL][still_masked].mean(0)  # type: ignore[index]
    found = run(batch=1, prune="answer_attention(step=0, keep=0.25)")
    assert found.kept_indices[0].tolist() == sorted(answers.argsort(descending=True)[:2].tolist())


def test_in_a_shifted_model_those_places_are_asked_that_predict_the_answer() -> None:
    """Each token is predicted from the place before it: there its attention is."""
    model = Toy()
    shifted = Toy()
    shifted.shifted = True  # type: ignore[attr-defined]
    asked: list[slice] = []
    for one in (model, shifted):
        plain = one.denoise

        def denoise(*arguments: Any, plain: Any = plain) -> Any:
            def watch(layer: int, hidden: Tensor, attention: Any) -> Any:
                def give(queries: slice) -> Tensor:
                    asked.append(queries)
                    logits: Tensor = attention(queries)
                    return logits

                return arguments[-1](layer, hidden, give)

            return plain(*arguments[:-1], watch)

        one.denoise = denoise  # type: ignore[method-assign]
        run(one, prune="answer_attention(step=0, layer=0, keep=0.5)")
    assert asked == [slice(-ANSWER, None), slice(-ANSWER - 1, -1)]


def test_blocks_are_written_from_left_to_right() -> None:
    found = run(block_length=2, steps=6)
    assert torch.equal(found.committed_at // 2, torch.tensor([0, 0, 1, 1, 2, 2]).expand(3, -1))
    together = run(block_length=3, steps=2)
    assert torch.equal(together.committed_at, torch.tensor([0, 0, 0, 1, 1, 1]).expand(3, -1))
    assert [step.committed for step in together.trace] == [3, 3]


def test_the_surest_tokens_come_first() -> None:
    found = run(keep_log_probabilities=True, batch=1)
    masked = torch.ones(ANSWER, dtype=torch.bool)
    for number, step in enumerate(found.trace):
        assert step.log_probabilities is not None
        best = step.log_probabilities[0].amax(-1).masked_fill(~masked, -torch.inf)
        place = int(best.argmax())
        assert found.committed_at[0, place] == number
        assert found.ids[0, place] == step.log_probabilities[0, place].argmax()
        masked[place] = False


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy", "random"])
def test_every_way_of_committing_writes_the_whole_answer(remasking: Any) -> None:
    for temperature in (0.0, 0.7):
        first, second = (run(remasking=remasking, temperature=temperature, steps=3) for _ in range(2))
        assert torch.equal(first.ids, second.ids)
        assert (first.ids != MASK).all()


def test_forbidden_ids_are_never_written() -> None:
    assert not torch.isin(run(forbidden=(0, 1, 2), temperature=5.0).ids, torch.tensor([0, 1, 2, MASK])).any()


def test_a_stop_ends_the_loop_where_no_mask_is_before_it() -> None:
    only = tuple(i for i in range(MASK) if i != 4)
    found = run(forbidden=only, stop_id=4, block_length=1, steps=6)
    assert len(found.trace) == 1
    assert (found.ids[:, 0] == 4).all()
    assert (found.committed_at[:, 1:] == -1).all()


def test_guidance_of_zero_is_none_and_costs_half() -> None:
    plain, guided = run(prune="random(step=1, keep=0.5)"), run(prune="random(step=1, keep=0.5)", guidance=1e-12)
    assert torch.equal(plain.ids, guided.ids)
    assert guided.flops == 2 * plain.flops
    inside = run(prune="fastv(step=1, layer=1, keep=0.5)", guidance=1.5)
    assert inside.kept_indices.shape == (3, 4)


def test_padding_in_front_of_a_prompt_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(1, VISUAL, WIDTH, generator=generator, dtype=torch.float64)
    words = torch.randn(1, 2, WIDTH, generator=generator, dtype=torch.float64)
    filler = torch.full((1, 2, WIDTH), 9.0, dtype=torch.float64)
    for text in (None, "fastv(step=0, keep=0.5)", "answer_attention(step=0, layer=1, keep=0.5)", "sparsevlm(keep=0.5)"):
        options: dict[str, Any] = {
            "answer_length": ANSWER, "steps": 3, "prune": PruneSchedule.parse(text), "seed": 0
        }  # fmt: skip
        plain = denoise_generate(Toy(), torch.cat([image, words], 1), slice(0, VISUAL), **options)
        real = torch.tensor([[True] * VISUAL + [False, False, True, True]])
        padded = denoise_generate(Toy(), torch.cat([image, filler, words], 1), slice(0, VISUAL), real=real, **options)
        assert torch.equal(plain.ids, padded.ids), text
        assert torch.equal(plain.kept_indices, padded.kept_indices), text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 4, "block_length": 2}, "3 blocks do not divide the 4 steps"),
        ({"block_length": 4}, "does not divide the answer_length 6"),
        ({"steps": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"guidance": -1.0}, "guidance"),
        ({"remasking": "lowconfidence"}, "did you mean 'low_confidence'"),
        ({"prune": "random(step=6)"}, "never fires: step 6"),
        ({"prune": "fastv(layer=3)"}, "never fires: layer 3"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(**options)


def test_an_empty_image_and_ragged_images_are_refused() -> None:
    prompt = torch.zeros(2, 5, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="one token or more"):
        denoise_generate(Toy(), prompt, slice(2, 2), answer_length=2, steps=2)
    real = torch.tensor([[True] * 5, [True, False, True, True, True]])
    with pytest.raises(ValueError, match=r"different numbers of tokens .* needs all 3 tokens of visual, got 2 to 3"):
        denoise_generate(Toy(), prompt, slice(0, 3), answer_length=2, steps=2, real=real)


def test_a_model_that_gives_nan_is_not_believed() -> None:
    model = Toy()
    model.table[0] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN in step 0"):
        run(model)


def test_a_model_without_attention_is_told_what_is_missing() -> None:
    with pytest.raises(ValueError, match="needs attention logits"):
        run(Toy(attention=False), prune="fastv(step=0)")
    with pytest.raises(ValueError, match="never called after_attention"):
        run(Toy(calls=False), prune="vtw(layer=0)")
    with pytest.raises(ValueError, match="attention"):
        run(Toy(calls=False), prune="answer_attention(step=0)")
    assert (run(Toy(attention=False), prune="one_nn(step=0)").ids != MASK).all()


def test_a_model_carries_its_schedule() -> None:
    model = SimpleNamespace(visual_pruning=None, shape=Toy.shape)
    assert prune_visual_tokens(model, keep=0.25) == PruneSchedule("answer_attention", keep=0.25)
    assert prune_visual_tokens(SimpleNamespace(model_=model), "none") is None
    assert model.visual_pruning is None
    with pytest.raises(InputError, match="layer 5 of a model with 3"):
        prune_visual_tokens(model, "vtw(layer=5)")
    with pytest.raises(InputError, match="no visual tokens"):
        prune_visual_tokens(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="not both"):
        prune_visual_tokens(model, "random", keep=0.5)
