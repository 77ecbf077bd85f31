"""The study of the average parameter count: smoke, its plan, the user's text, and its full scale on a tiny model."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
from one_experiment import smoke_experiment

from lossmith.errors import InputError
from lossmith.sparsity import PruningSchedule
from lossmith.studies.average_parameter_law import linear_weights, text_codes, trainings, width_of
from lossmith.studies.compare import run_compare
from lossmith.studies.settings import Execution, make_settings
from lossmith.studies.study import get_study, run_study

STUDY = get_study("average-parameter-law")
TOY = {"width": 16, "steps": 16, "batch_size": 16, "characters": 4_000, "held_out": 100}


experiment = partial(smoke_experiment, STUDY, TOY)


def test_sizes_are_those_of_the_published_check() -> None:
    """Width 192: 104448 weights, 20889 in the end, 41484 on average; dense models of widths 93 and 52."""
    assert (linear_weights(192), linear_weights(93)) == (104_448, 41_385)
    assert PruningSchedule(1200, 0.8, 120, 600, 20).average_parameters(104_448) == pytest.approx(41_484, abs=1)
    plan = trainings({"width": 192, "steps": 1200})
    assert [t.width for t in plan["average"]] == [93] * 3
    assert [t.width for t in plan["final"]] == [52] * 3
    assert [t.steps for t in plan["initial"]] == [1200, 600, 300]
    assert width_of(linear_weights(77)) == 77


def test_a_character_is_its_place_in_the_alphabet(tmp_path: Path) -> None:
    """The line feed is 0, the space 1, the tilde the last of 96."""
    (tmp_path / "text.txt").write_bytes(b"\n !~\n")
    assert text_codes(tmp_path / "text.txt").tolist() == [0, 1, 2, 95, 0]


def test_early_and_late_pruning_cost_what_the_sparse_run_costs() -> None:
    plan = trainings({"width": 192, "steps": 1200})
    costs = {}
    for name in ("sparse", "early", "late"):
        first = plan[name][0]
        schedule = PruningSchedule.from_compute(first.steps, first.sparsity, start=first.start, end=first.end)
        costs[name] = schedule.average_density * first.steps
    assert costs["early"] == pytest.approx(costs["sparse"], rel=0.02)
    assert costs["late"] == pytest.approx(costs["sparse"], rel=0.02)
    assert plan["early"][0].steps > 1200 > plan["late"][0].steps


@pytest.mark.slow
def test_one_experiment_is_deterministic_and_shares_its_trainings(text: Path, tmp_path: Path) -> None:
    first = experiment("average", tmp_path / "a", data=str(text))
    assert set(first.metrics) == set(STUDY.metrics)
    assert all(math.isfinite(value) for value in first.metrics.values())
    done = sorted((tmp_path / "a" / "trainings" / "seed-0").glob("*/outcome.json"))
    assert len(done) == 13
    times = [path.stat().st_mtime_ns for path in done]
    sparse = experiment("sparse", tmp_path / "a", data=str(text))
    assert [path.stat().st_mtime_ns for path in done] == times
    assert set(sparse.metrics) == {"loss", "parameters/average", "parameters/final"}
    assert sparse.metrics["parameters/final"] == int(0.2 * linear_weights(16) + 1e-6)
    ratio = sparse.cost.flops / (6 * sparse.metrics["parameters/average"] * sparse.cost.tokens)
    assert ratio == pytest.approx(1, rel=1e-9)
    again = experiment("sparse", tmp_path / "b", data=str(text))
    assert again.metrics == sparse.metrics
    assert experiment("sparse", tmp_path / "b", seed=1, data=str(text)).metrics != sparse.metrics


@pytest.mark.parametrize("arm", ["sparse", "early", "late", "random"])
def test_the_alternatives_end_with_as_many_weights(arm: str, text: Path, tmp_path: Path) -> None:
    found = experiment(arm, tmp_path, data=str(text))
    assert found.metrics["parameters/final"] == int(0.2 * linear_weights(16) + 1e-6)


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InputError, match="has 6 printable ASCII characters; the study needs 800 or more"):
        experiment("sparse", tmp_path / "out", data=str(tmp_path / "short.txt"))


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    for run in comparison.runs:
        law = {"law/error", "law/together"} if run.arm in ("average", "final", "initial") else set()
        assert set(run.metrics) == {"loss", "parameters/average", "parameters/final"} | law
    again = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=1))
    assert [run.metrics for run in again.runs] == [run.metrics for run in comparison.runs]


def test_full_scale_trains_the_released_sizes() -> None:
    assert STUDY.comparison is not None
    settings, claims = STUDY.comparison("full", None)
    sizes = {}
    for arm in settings.arms:
        shape = {"hidden_size": 256, "num_hidden_layers": 4, **arm.options["model_overrides"]}
        h, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
        assert h % shape["num_attention_heads"] == 0
        sizes[arm.name] = layers * (4 * h * h + 3 * h * inner) + settings.vocab_size * h
    assert sizes["sparse"] == sizes["initial"] == 41_549_824
    schedule = PruningSchedule.from_compute(26_800, 0.6, interval=100)
    assert (schedule.start, schedule.end) == (4_100, 16_600)
    assert sizes["average"] == pytest.approx(schedule.average_parameters(sizes["initial"]), rel=0.01)
    assert sizes["final"] == pytest.approx(0.4 * sizes["initial"], rel=0.01)
    assert {claim.against for claim in claims} <= {arm.name for arm in settings.arms} | {None}
    steps = {arm.name: arm.options.get("tokens", settings.tokens) / (16 * 2048) for arm in settings.arms}
    assert steps["sparse"] == steps["average"] == 26_800
    for name, start, end in (("early", 0.0, 0.5), ("late", 0.5, 1.0)):
        own = PruningSchedule.from_compute(int(steps[name]), 0.6, start=start, end=end, interval=100)
        assert own.average_density * steps[name] == pytest.approx(schedule.average_density * 26_800, rel=0.005)


@pytest.mark.slow
def test_full_scale_goes_through_the_same_code_with_a_tiny_model(text_folder: Path, tmp_path: Path) -> None:
    """The full settings with a sixteenth of the widths, one layer, a small budget and the user's text."""
    assert STUDY.comparison is not None
    settings, claims = STUDY.comparison("full", str(text_folder))
    small = {"num_hidden_layers": 1, "num_attention_heads": 1}
    arms = []
    for arm in settings.arms:
        shape = {k: v // 16 if k in ("hidden_size", "intermediate_size") else v for k, v in
                 arm.options["model_overrides"].items()}  # fmt: skip
        options = {**arm.options, "model_overrides": {**shape, **small}}
        if "weights" in options:
            options["weights"] = options["weights"].replace("interval=100", "interval=1")
            options["tokens"] = options["tokens"] * 12 * 4 * 32 // (26_800 * 16 * 2048)
        arms.append({arm.name: options})
    plain = {name: getattr(settings, name) for name in settings.model_fields_set}
    changes = {
        "arms": arms, "model": "nano", "vocab_size": 300,
        "sequence_length": 32, "batch_size": 4, "tokens": 12 * 4 * 32, "eval_tokens": 500, "evaluations": 1, "seeds": 1,
        "training": {**settings.training, "warmup_steps": 2},
    }  # fmt: skip
    comparison = run_compare(make_settings({**plain, **changes}), Execution(out=tmp_path / "out", jobs=1))
    assert not [run.error for run in comparison.runs if run.error]
    flops = {run.arm: run.cost.flops for run in comparison.runs}
    assert flops["early"] == pytest.approx(flops["sparse"], rel=0.1)
    assert flops["sparse"] < flops["initial"]
    assert claims
