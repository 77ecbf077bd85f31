"""Which visual tokens stay: selectors, schedules and the arithmetic of the cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.sparsity import (
    PruneSchedule,
    TransformerShape,
    decode_flops,
    denoising_flops,
    nearest_neighbour,
    prefill_flops,
    select_tokens,
    transfer_counts,
    visual_flops,
)

# The digest's example.
X = torch.tensor(
    [[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.95, 0.2], [0, 0, 1], [0.5, 0.5, 0.5]], dtype=torch.float64
).unsqueeze(0)


def test_transfer_counts_are_those_of_the_released_code() -> None:
    assert transfer_counts(96, 48) == [2] * 48
    assert transfer_counts(10, 4) == [3, 3, 2, 2]
    assert transfer_counts(16, 16) == [1] * 16
    for masked in range(12):
        for steps in range(1, 9):
            assert sum(transfer_counts(masked, steps)) == masked


@pytest.mark.parametrize(
    ("visual", "steps", "wanted"),
    [
        (729, 48, [(12, 182, 547), (24, 182, 365), (36, 183, 182)]),
        (576, 16, [(4, 144, 432), (8, 144, 288), (12, 144, 144)]),
        (100, 2, [(1, 50, 50)]),
        (10, 6, [(3, 5, 5)]),
    ],
)
def test_progressive_counts_are_those_of_the_released_code(
    visual: int, steps: int, wanted: list[tuple[int, int, int]]
) -> None:
    cuts = PruneSchedule("one_nn", progressive=(0.25, 0.5, 0.75)).cuts(steps=steps, layers=2, visual=visual)
    lefts = [visual, *(cut.left for cut in cuts)]
    found = [(cut.step + 1, before - cut.left, cut.left) for cut, before in zip(cuts, lefts, strict=False)]
    assert found == wanted


def test_div_prune_takes_the_least_alike_token_again_and_again() -> None:
    assert select_tokens(X, 3, "divprune", pivot=0, sort=False)[0].tolist() == [0, 2, 4]
    assert select_tokens(X, 4, "divprune", pivot=5, sort=False)[0].tolist() == [5, 0, 2, 4]
    assert select_tokens(X, 4, "divprune", pivot=5)[0].tolist() == [0, 2, 4, 5]


def test_nearest_neighbour_scores_and_what_they_drop() -> None:
    wanted = [0.9938837347, 0.9938837347, 0.978549785, 0.978549785, 0.5773502692, 0.6839061885]
    torch.testing.assert_close(nearest_neighbour(X)[0], torch.tensor(wanted, dtype=torch.float64), atol=1e-10, rtol=0)
    assert select_tokens(X, 4, "one_nn")[0].tolist() == [2, 3, 4, 5]
    assert select_tokens(X, 2, "one_nn")[0].tolist() == [4, 5]


def test_one_of_each_pair_stays_where_only_one_is_to_go() -> None:
    # 1 is dropped for 0; then 3 for 2; nobody loses both of a pair.
    assert select_tokens(X, 5, "one_nn_pairs")[0].tolist() == [0, 2, 3, 4, 5]
    assert select_tokens(X, 4, "one_nn_pairs")[0].tolist() == [0, 2, 4, 5]
    assert select_tokens(X, 1, "one_nn_pairs")[0].tolist() == [0]


@pytest.mark.parametrize("method", ["divprune", "one_nn", "one_nn_pairs"])
def test_lengths_of_tokens_do_not_matter(method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 20, 8, generator=generator, dtype=torch.float64)
    lengths = torch.exp(4 * torch.randn(3, 20, 1, generator=generator, dtype=torch.float64))
    options = {"pivot": 4} if method == "divprune" else {}
    plain = select_tokens(features, 0.4, method, **options)  # type: ignore[arg-type]
    assert torch.equal(plain, select_tokens(features * lengths, 0.4, method, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["random", "divprune", "one_nn", "one_nn_pairs", "scores"])
@pytest.mark.parametrize("keep", [1, 3, 7, 0.5, 1.0])
def test_every_selector_gives_that_many_different_tokens_of_each_example(method: str, keep: float) -> None:
    features = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    chosen = select_tokens(features, keep, method, scores=features.sum(-1), generator=torch.Generator().manual_seed(1))
    number = keep if isinstance(keep, int) else round(7 * keep)
    assert chosen.shape == (4, number)
    for row in chosen.tolist():
        assert row == sorted(set(row))
        assert set(row) <= set(range(7))
    if number == 7:
        assert torch.equal(chosen, torch.arange(7).expand(4, -1))


@pytest.mark.parametrize("method", ["divprune", "one_nn", "one_nn_pairs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_zero_huge_and_strided_features_are_fine(method: str, dtype: torch.dtype) -> None:
    features = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    features[0, 3] = 0
    features[1] *= 1e4
    strided = torch.stack([features, features], dim=-1)[..., 0]
    options = {"pivot": 0} if method == "divprune" else {}
    chosen = select_tokens(features, 4, method, **options)  # type: ignore[arg-type]
    assert torch.equal(chosen, select_tokens(strided, 4, method, **options))  # type: ignore[arg-type]
    assert torch.isfinite(nearest_neighbour(features)).all()


def test_what_is_no_selection_is_refused_in_a_sentence() -> None:
    good = torch.randn(2, 4, 3)
    bad = good.clone()
    bad[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="example 1, token 2"):
        select_tokens(bad, 2, "one_nn")
    with pytest.raises(ValueError, match=r"share in \(0, 1\], got 0.0"):
        select_tokens(good, 0.0)
    with pytest.raises(ValueError, match="1 to 4 tokens, got 5"):
        select_tokens(good, 5)
    with pytest.raises(ValueError, match="at least one token"):
        select_tokens(good[:, :0], 0.5)
    with pytest.raises(ValueError, match="scores must have the shape"):
        select_tokens(good, 2, "scores", scores=torch.zeros(2, 3))
    with pytest.raises(InputError, match="did you mean 'divprune'"):
        select_tokens(good, 2, "div_prune")
    with pytest.raises(ValueError, match="floating point"):
        select_tokens(torch.ones(2, 3, 4, dtype=torch.long), 2)


# ---- the cost -------------------------------------------------------------------------------------------------------

LLADA = TransformerShape(layers=32, width=4096, ffn=12288)
SIZE = {"text": 100, "visual": 729, "answer": 96, "steps": 48}


def test_the_formulas_of_prefill_and_decoding() -> None:
    shape = TransformerShape(layers=2, width=4, ffn=8)
    assert prefill_flops(shape, 10) == 4160
    assert decode_flops(shape, context=10, generated=3) == 1296
    # One by one: each token attends to the context and to those written before it.
    direct = 2 * sum(4 * 16 + 2 * 4 * 8 + 4 * 2 * (10 + i) for i in range(3))
    assert decode_flops(shape, context=10, generated=3) == direct
    assert denoising_flops(shape, [[10, 10], [10, 10]]) == 2 * 4160


@pytest.mark.parametrize(
    ("schedule", "fraction"),
    [
        ("fastv(step=47, layer=2, keep=0.25)", 0.9886),
        ("fastv(step=0, layer=2, keep=0.25)", 0.3994),
        ("random(step=23, keep=0.25)", 0.6991),
        ("one_nn(progressive=[0.25, 0.5, 0.75])", 0.6977),
        ("vtw(step=0, layer=15, every_step=true)", 0.6023),
    ],
)
def test_the_fractions_of_the_full_cost_that_the_digest_lists(schedule: str, fraction: float) -> None:
    found = visual_flops(LLADA, **SIZE, prune=PruneSchedule.parse(schedule)) / visual_flops(LLADA, **SIZE)
    assert round(found, 4) == fraction


def test_a_gate_costs_a_third_matrix() -> None:
    plain, gated = TransformerShape(1, 8, 16), TransformerShape(1, 8, 16, ffn_matrices=3)
    assert gated.layer(5) - plain.layer(5) == 5 * 8 * 16


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "fastv(step=47, layer=2, keep=0.25)",
        "one_nn(progressive=[0.25, 0.5])",
        "vtw(layer=1, every_step=True)",
        "answer_attention",
        "divprune(step=input, keep=0.5, keep_positions=True)",
    ],
)
def test_a_schedule_is_its_text(text: str) -> None:
    schedule = PruneSchedule.parse(text)
    assert schedule is not None
    assert PruneSchedule.parse(str(schedule)) == schedule
    assert PruneSchedule.parse(schedule.to_dict()) == schedule


def test_dashes_are_underscores_in_a_name() -> None:
    assert PruneSchedule.parse("answer-attention(keep=0.25)") == PruneSchedule("answer_attention", keep=0.25)
    assert PruneSchedule.parse("one-nn") == PruneSchedule("one_nn")
    assert PruneSchedule.parse(" none ") is None


def test_numbers_are_rounded_as_each_method_does() -> None:
    assert PruneSchedule("fastv", keep=0.25, layer=0).number(7) == 1
    assert PruneSchedule("divprune", keep=0.25).number(7) == 2
    assert PruneSchedule("divprune", keep=0.25).number(10) == 2  # half to even
    assert PruneSchedule("fastv", keep=0.7).number(10) == 7  # not 6.999...
    assert PruneSchedule("random", keep=0.01).number(4) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fastvv", "did you mean 'fastv'"),
        ("random(keep=0)", r"keep must be in \(0, 1\]"),
        ("random(keep=1.5)", r"keep must be in \(0, 1\]"),
        ("random(keep=nan)", r"keep must be in \(0, 1\]"),
        ("random(step=-1)", "step must be at least 0"),
        ("random(step=soon)", "'input', 'mid' or 'late'"),
        ("vtw(step=3)", "give layer="),
        ("vtw(layer=3, keep=0.5)", "and no keep"),
        ("random(step=input, layer=2)", "not 'input'"),
        ("random(every_step=true)", "give layer="),
        ("answer_logits(layer=1)", "not inside a layer"),
        ("one_nn(progressive=[0.5, 0.25])", "rising shares"),
        ("one_nn(progressive=[0.5], keep=0.5)", "give no keep"),
        ("random(kep=0.5)", "did you mean 'keep'"),
        ("random(0.5)", "write options by name"),
        ("random(step=half(2))", "step must be a number or a word"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        PruneSchedule.parse(text)


@pytest.mark.parametrize(
    "schedule",
    [
        PruneSchedule("random", step=4),
        PruneSchedule("fastv", layer=3),
        PruneSchedule("one_nn", progressive=(0.3,)),
    ],
)
def test_a_schedule_that_never_fires_says_so(schedule: PruneSchedule) -> None:
    with pytest.raises(ValueError, match="never fires"):
        schedule.cuts(steps=4, layers=3, visual=10)


def test_mid_and_late_are_after_a_half_and_three_quarters() -> None:
    places = {name: PruneSchedule("random", step=name) for name in ("input", "mid", "late")}
    found = {name: s.cuts(steps=16, layers=2, visual=8)[0].step for name, s in places.items()}
    assert found == {"input": -1, "mid": 7, "late": 11}


def reference_div_prune(features: Tensor, number: int, pivot: int) -> list[int]:
    """Slow and obvious."""
    unit = features / features.norm(dim=-1, keepdim=True)
    kept = [pivot]
    while len(kept) < number:
        rest = [i for i in range(len(features)) if i not in kept]
        kept.append(min(rest, key=lambda i: max(float(unit[i] @ unit[j]) for j in kept)))
    return kept


def test_div_prune_agrees_with_the_slow_form() -> None:
    features = torch.randn(3, 15, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    chosen = select_tokens(features, 9, "divprune", pivot=2, sort=False)
    for row, own in zip(chosen.tolist(), features, strict=True):
        assert row == reference_div_prune(own, 9, 2)
