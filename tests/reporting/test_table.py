from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from reporting_example import comparison
from rich.console import Console

from lossmith.reporting import Claim, Comparison, Cost, Run, paired_interval, print_table, summarise


def changed(original: Comparison, index: int, **changes: object) -> Comparison:
    runs = list(original.runs)
    runs[index] = dataclasses.replace(runs[index], **changes)
    return dataclasses.replace(original, runs=tuple(runs))


def printed(what: Comparison, width: int = 100, encoding: str = "utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(what, Console(file=buffer, width=width))
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_means_differences_and_standings_are_those_of_numpy():
    given = comparison()
    table = summarise(given)
    losses = {arm: [r.metrics["eval/loss"] for r in given.runs if r.arm == arm] for arm in given.arms}
    for arm in table.arms:
        assert arm.primary.mean == pytest.approx(np.mean(losses[arm.name]), rel=1e-12)
        assert arm.primary.sd == pytest.approx(np.std(losses[arm.name], ddof=1), rel=1e-9)
    expected = paired_interval(np.subtract(losses["focal"], losses["baseline"]), comparisons=3)
    assert table.arms[3].primary.difference == expected
    assert [arm.primary.standing for arm in table.arms] == [None, "better", "not told apart", "worse"]
    assert [arm.metrics[1].standing for arm in table.arms] == [None, "better", "not told apart", "worse"]
    assert [claim.verdict for claim in table.claims] == ["supported", "not supported", "not supported"]


def test_the_baseline_comes_first_and_arms_stay_in_the_order_given():
    given = dataclasses.replace(comparison(), baseline="z-loss")
    assert [arm.name for arm in summarise(given).arms] == ["z-loss", "baseline", "reweighted", "focal"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_with_a_non_finite_metric_counts_as_failed(value):
    table = summarise(changed(comparison(), 4, metrics={"eval/loss": value, "eval/accuracy": 0.9}))
    arm = table.arms[1]
    assert (arm.n_finished, arm.primary.n, arm.metrics[1].n) == (2, 2, 2)
    assert arm.failures[0].error == f"eval/loss is {value}"
    assert math.isfinite(arm.primary.mean)
    assert any("1 of 3 runs of reweighted failed" in note for note in table.footnotes)


def test_a_secondary_metric_that_is_not_finite_is_left_out_with_a_footnote():
    given = comparison()
    broken = changed(given, 4, metrics={**given.runs[4].metrics, "eval/accuracy": math.inf})
    arm = summarise(broken).arms[1]
    assert (arm.primary.n, arm.metrics[1].n, arm.metrics[1].left_out) == (3, 2, (1,))
    assert any("eval/accuracy of reweighted" in note for note in summarise(broken).footnotes)


def test_a_metric_without_a_direction_is_never_called_better_or_worse():
    table = summarise(dataclasses.replace(comparison(), better={}))
    assert [arm.metrics[1].standing for arm in table.arms] == [None] * 4
    assert table.arms[3].metrics[1].difference is not None


def two(base: Cost, arm: Cost) -> Comparison:
    runs = [Run("base", s, {"loss": 2.0 + s}, base) for s in range(3)]
    runs += [Run("arm", s, {"loss": 1.0 + s + s / 100}, arm) for s in range(3)]
    return Comparison("t", "q", {"base": "", "arm": ""}, "base", "loss", ("loss",), tuple(runs))


@pytest.mark.parametrize(
    ("base", "arm", "flags"),
    [
        (Cost(tokens=1000), Cost(tokens=1010), []),
        (Cost(tokens=1000), Cost(tokens=1011), ["tokens"]),
        (Cost(tokens=1000), Cost(tokens=980), ["tokens"]),
        (Cost(flops=1e15), Cost(flops=1.02e15), ["flops"]),
        (Cost(tokens=1000), Cost(tokens=1000, scored_tokens=11), ["scored_tokens"]),
        (Cost(tokens=1000), Cost(tokens=1000, scored_tokens=10), []),
        (Cost(scored_tokens=0), Cost(scored_tokens=5), ["scored_tokens"]),
        (Cost(seconds=10.0), Cost(seconds=10.9), []),
        (Cost(seconds=10.0), Cost(seconds=11.2), ["seconds"]),
        (Cost(peak_memory_bytes=100), Cost(peak_memory_bytes=80), []),
        (Cost(peak_memory_bytes=100), Cost(peak_memory_bytes=70), ["peak_memory_bytes"]),
        (Cost(flops=0.0), Cost(flops=1e12), ["flops"]),
    ],
)
def test_counted_costs_are_flagged_beyond_one_percent_and_measured_ones_later(base, arm, flags):
    table = summarise(two(base, arm))
    assert [flag.quantity for flag in table.arms[1].flags] == flags
    assert any("did not cost the same" in note for note in table.footnotes) == bool(flags)
    assert ("its cost differs" in table.findings[0]) == bool(flags)
    assert ("unequal" in printed(two(base, arm))) == bool(flags)


def test_failed_runs_and_their_partial_cost_stay_out_of_the_means():
    given = two(Cost(tokens=100), Cost(tokens=100))
    table = summarise(changed(given, 5, error="stopped", cost=Cost(tokens=1)))
    assert table.arms[1].cost.tokens == 100
    assert not table.arms[1].flags


def test_no_finished_run_is_said_and_nothing_is_averaged():
    given = comparison()
    runs = tuple(dataclasses.replace(run, error="out of memory") for run in given.runs)
    table = summarise(dataclasses.replace(given, runs=runs))
    assert table.findings == ("No run finished, so there is nothing to compare.",)
    assert [arm.primary.standing for arm in table.arms] == [None, "failed", "failed", "failed"]
    assert {claim.verdict for claim in table.claims} == {"inconclusive"}
    assert "out of memory" in printed(dataclasses.replace(given, runs=runs))
    assert "No run finished" in printed(dataclasses.replace(given, runs=()))


def test_a_failed_baseline_leaves_nothing_to_judge():
    given = comparison()
    runs = tuple(dataclasses.replace(r, error="x") if r.arm == "baseline" else r for r in given.runs)
    table = summarise(dataclasses.replace(given, runs=runs))
    assert all("cannot be judged" in finding for finding in table.findings)
    assert {arm.primary.standing for arm in table.arms[1:]} == {"no interval"}


def test_one_seed_gives_no_interval_and_the_advice_to_run_more():
    table = summarise(comparison(seeds=1))
    assert {arm.primary.standing for arm in table.arms[1:]} == {"no interval"}
    assert any("run more seeds" in note for note in table.footnotes)
    assert "one seed" in table.findings[0]


def test_identical_arms_are_said_to_be_identical():
    given = comparison(arms=("base", "same"))
    twins = tuple(dataclasses.replace(run, arm="same") for run in given.runs[:3])
    table = summarise(dataclasses.replace(given, runs=(*given.runs[:3], *twins)))
    assert table.findings == ("same gave exactly the same eval/loss as base under 3 seeds.",)
    assert table.arms[1].primary.standing == "not told apart"


def test_one_arm_is_reported_without_a_comparison():
    table = summarise(comparison(arms=("only",)))
    assert table.findings[0].startswith("The only arm, only, reached eval/loss")
    assert "only" in printed(comparison(arms=("only",)))


def test_footnotes_state_method_level_pairs_correction_and_what_could_be_detected():
    table = summarise(comparison())
    text = " ".join(table.footnotes)
    for words in ("Student t", "95%", "3 pairs", "Bonferroni-corrected for 3 arms", "80% chance", "† focal"):
        assert words in text
    sizes = [arm.primary.detectable for arm in table.arms[1:]]
    assert f"{min(sizes):.2g} to {max(sizes):.2g}" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("arms", [("baseline", "b", "c", "d"), tuple(f"a long arm's name {i} " * 3 for i in range(12))])
def test_no_line_is_wider_than_the_terminal_or_a_hundred_columns(width, arms):
    lines = printed(comparison(arms=arms), width).splitlines()
    assert max(len(line) for line in lines) <= min(width, 100)


def test_at_a_hundred_columns_no_cell_of_the_example_is_cut():
    text = printed(comparison())
    for cell in ("reweighted", "2.1422 ± 0.0091", "[-0.074, -0.025]", "0.013", "not told apart", "unequal †"):
        assert cell in text
    assert "…" not in text


def test_square_brackets_in_names_are_printed_as_they_are():
    text = printed(comparison(arms=("base", "[red]x[/red]", "[/]", "[link=http://x]")))
    assert "[red]x[/red]" in text
    assert "[link=http://x]" in text


def test_an_ascii_terminal_gets_ascii():
    text = printed(comparison(), encoding="ascii")
    assert "+/-" in text
    assert "worse *" in text


def test_json_is_plain_and_has_no_value_that_json_lacks():
    plain = summarise(comparison(seeds=1)).to_json()
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again == plain
    assert again["arms"][1]["metrics"][0]["difference"]["low"] is None


def test_markdown_keeps_hostile_names_inside_their_cells():
    text = summarise(comparison(arms=("a|b", "<script>x</script>", "[x](http://y)", "c\nd"))).to_markdown()
    assert "| a\\|b |" in text
    assert "\\<script\\>" in text
    assert "\\[x\\](http://y)" in text
    rows = [line for line in text.splitlines() if line.startswith("| c d")]
    assert len(rows) == 3  # loss, accuracy, cost


def test_a_comparison_that_contradicts_itself_is_refused():
    given = comparison()
    with pytest.raises(ValueError, match="baseline 'x' is not one of the arms"):
        summarise(dataclasses.replace(given, baseline="x"))
    with pytest.raises(ValueError, match="two runs with seed 0"):
        summarise(dataclasses.replace(given, runs=(*given.runs, given.runs[0])))
    with pytest.raises(ValueError, match="arm 'x'"):
        summarise(dataclasses.replace(given, runs=(Run("x", 0),)))
    with pytest.raises(ValueError, match="claim 'c' names the arm 'y'"):
        summarise(dataclasses.replace(given, claims=(Claim("c", "y", "eval/loss"),)))


def test_importing_the_package_loads_no_plotting_library_and_no_torch():
    code = (
        "import sys, lossmith.reporting; "
        "print([m for m in ('torch', 'matplotlib', 'plotly', 'pandas', 'scipy.stats') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_time_difference_within_its_noise_is_not_flagged():
    def runs(name: str, seconds: list[float]) -> list[Run]:
        return [Run(name, s, {"loss": 1.0 + s / 7}, Cost(seconds=x)) for s, x in enumerate(seconds)]

    for arm, flagged in (([8.0, 14.0, 14.0], False), ([11.9, 12.0, 12.1], True)):
        pair = (*runs("base", [9.9, 10.0, 10.1]), *runs("arm", arm))
        table = summarise(Comparison("t", "q", {"base": "", "arm": ""}, "base", "loss", ("loss",), pair))
        assert bool(table.arms[1].flags) == flagged
