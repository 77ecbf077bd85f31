"""The law of the average parameter count: Chinchilla without sparse runs, invariances, tables, plans, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lossmith.cli.fit import build_law
from lossmith.errors import InputError
from lossmith.laws import AverageParameter, Chinchilla, Fitted, Reading, compare_counts
from lossmith.laws.sparse_compute import average_density, average_density_of_steps

TRUTH = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.33}
GRID = [a.ravel() for a in np.meshgrid(np.geomspace(1e8, 4e9, 5), np.geomspace(2e10, 4e11, 4), indexing="ij")]


def loss(n: Any, d: Any) -> Any:
    return TRUTH["E"] + TRUTH["A"] * np.power(n, -TRUTH["alpha"]) + TRUTH["B"] * np.power(d, -TRUTH["beta"])


def runs(noise: float = 0.0, sparsities: tuple[float, ...] = (0.0, 0.5, 0.0, 0.8, 0.0)) -> dict[str, np.ndarray]:
    n, d = GRID
    sparsity = np.resize(sparsities, len(n))
    average = n * np.array([average_density(s) for s in sparsity])
    random = np.random.default_rng(0).standard_normal(len(n))
    return {"params": n, "sparsity": sparsity, "tokens": d, "loss": loss(average, d) * np.exp(noise * random)}


def test_noise_free_parameters_are_recovered_from_sparse_and_dense_runs() -> None:
    fitted = AverageParameter().fit(runs(), bootstrap=0)
    for name, value in TRUTH.items():
        assert fitted.parameters[name] == pytest.approx(value, rel=1e-8)


def test_without_sparse_runs_it_is_chinchilla_bit_for_bit() -> None:
    table = runs(0.01, (0.0,))
    plain = {name: table[name] for name in ("params", "tokens", "loss")}
    ours, theirs = AverageParameter().fit(table, bootstrap=30), Chinchilla().fit(plain, bootstrap=30)
    assert ours.parameters == theirs.parameters
    assert np.array_equal(ours.samples, theirs.samples)
    assert ours.predict(avg_params=7e9, tokens=1e12) == theirs.predict(params=7e9, tokens=1e12)


def test_only_the_average_and_the_tokens_matter() -> None:
    """Not the size at the start, nor the path."""
    fitted = AverageParameter().fit(runs(0.01), bootstrap=0)
    density = [average_density(0.8), average_density(0.5, start=0.0, end=1.0), 1.0]
    given = [{"sparsity": 0.8}, {"sparsity": 0.5, "start": 0.0, "end": 1.0}, {}]
    values = [float(fitted.predict(params=1e9 / d, tokens=2e11, **g)) for d, g in zip(density, given, strict=True)]
    values.append(float(fitted.predict(avg_params=1e9, tokens=2e11)))
    assert values == pytest.approx([values[0]] * 4, rel=1e-14)


def test_averages_may_be_given_or_follow_from_the_schedule() -> None:
    table = runs(0.01)
    average = table["params"] * np.array([average_density(s) for s in table["sparsity"]])
    reference = AverageParameter().fit(table, bootstrap=0).parameters
    direct = {"avg_params": average, "tokens": table["tokens"], "loss": table["loss"]}
    assert AverageParameter().fit(direct, bootstrap=0).parameters == reference
    shares = [(0.0998, 0.5012) if s == 0.8 else (0.1732, 0.6535) for s in table["sparsity"]]
    steps = {
        **table, "steps": np.full(len(average), 10_000),
        "start": np.array([10_000 * x for x, _ in shares]), "end": np.array([10_000 * y for _, y in shares]),
    }  # fmt: skip
    found = AverageParameter().fit(steps, bootstrap=0).table.columns["avg_params"]
    assert found == pytest.approx(average, rel=2e-4)
    # C = 6 Nbar D gives the tokens.
    flops = {"params": table["params"], "sparsity": table["sparsity"], "loss": table["loss"]}
    flops["flops"] = 6 * average * table["tokens"]
    columns = AverageParameter().fit(flops, bootstrap=0).table.columns
    assert columns["tokens"] == pytest.approx(table["tokens"], rel=1e-12)


def test_the_released_models_schedule_gives_the_cards_average() -> None:
    # The model card says 0.3984; pruning every 100 steps keeps 0.39921, the continuous form a little more.
    assert average_density_of_steps(0.8, 2500 / 25050, 12600 / 25050) == pytest.approx(0.39921, rel=1.5e-3)


def test_empty_cells_of_dense_runs_mean_no_pruning(tmp_path: Path) -> None:
    table = runs(0.01)
    frame = pd.DataFrame(table).assign(start=0.25, end=0.75)
    dense = frame["sparsity"] == 0
    frame.loc[dense, ["sparsity", "start", "end"]] = np.nan
    frame.to_csv(tmp_path / "runs.csv", index=False)
    fitted = AverageParameter().fit(tmp_path / "runs.csv", bootstrap=0)
    assert len(fitted.table) == 20
    assert fitted.parameters == pytest.approx(AverageParameter().fit(table, bootstrap=0).parameters, rel=1e-9)
    assert fitted.table.source == str(tmp_path / "runs.csv")


def test_counts_are_compared_on_the_same_runs() -> None:
    found = {fit.count: fit for fit in compare_counts(runs(0.002))}
    assert found["average"].sparse_error < 0.005
    assert found["average"].predicted_error < 0.01
    assert min(found["final"].predicted_error, found["initial"].predicted_error) > 0.03
    # The size in the end says too much loss, the size at the start too little.
    assert found["final"].predicted_bias > 0 > found["initial"].predicted_bias
    assert found["average"].fitted.objective < min(found["final"].fitted.objective, found["initial"].fitted.objective)


def test_counts_need_sparse_runs_and_both_sizes() -> None:
    table = runs()
    with pytest.raises(InputError, match="has no sparse run"):
        compare_counts(runs(0.0, (0.0,)))
    average = {"avg_params": table["params"], "tokens": table["tokens"], "loss": table["loss"]}
    with pytest.raises(InputError, match="has no final_params: comparing counts takes params and sparsity"):
        compare_counts(average)
    few = {name: values[table["sparsity"] > 0] for name, values in table.items()}
    assert all(np.isnan(fit.predicted_error) for fit in compare_counts(few))


def test_plans_equal_a_dense_model_of_the_average_size() -> None:
    fitted = AverageParameter().fit(runs(0.002), bootstrap=40)
    plan = fitted.plan(flops=1e22, sparsity=0.8)
    dense = AverageParameter.as_chinchilla(fitted).plan(flops=1e22)
    assert plan.dense == dense
    assert 6 * plan.average_params * plan.dense.tokens == pytest.approx(1e22, rel=1e-9)
    assert plan.initial_params == pytest.approx(dense.params / average_density(0.8))
    assert plan.final_params == pytest.approx(0.2 * plan.initial_params)
    assert plan.smaller == pytest.approx(1.99529, abs=1e-5)
    assert plan.dense.params_limits[0] < plan.average_params < plan.dense.params_limits[1]
    served = fitted.plan(flops="1e22", sparsity="0.5", final_params="1e9")
    assert served.final_params == pytest.approx(1e9)
    assert served.initial_params == pytest.approx(2e9)
    assert served.average_params == pytest.approx(2e9 * average_density(0.5))
    assert fitted.plan(loss=2.3, sparsity=0.0).smaller == 1
    text = plan.text()
    for part in (
        "average parameters",
        "start with",
        "serve",
        "9.98% to 50.1% of the steps (25% to 75% of the compute)",
    ):
        assert part in text


@pytest.mark.parametrize(
    "wishes, sentence",
    [
        ({"flops": 1e21, "sparsity": 80}, r"sparsity must be a number in \[0, 1\)"),
        ({"flops": 1e21, "sparsity": "half"}, "sparsity must be a number, got 'half'"),
        ({"flops": 1e21, "params": 1e9, "final_params": 1e8}, "not both"),
        ({"flops": 1e21, "params": -1}, "params must be positive"),
        ({"flops": 1e21, "start": 0.8}, "0 <= start < end <= 1"),
        ({}, "needs flops"),
        ({"loss": 0.1}, "does not reach"),
    ],
)
def test_plans_that_cannot_be_are_refused(wishes: dict[str, Any], sentence: str) -> None:
    fitted = AverageParameter().fit(runs(), bootstrap=0)
    with pytest.raises(InputError, match=sentence):
        fitted.plan(**wishes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sparsity": None}, "has no column for 'avg_params'.*nor params .at the start. and sparsity"),
        ({"sparsity": 80.0}, "row 1 has 80; is it in percent"),
        ({"sparsity": -0.5}, r"sparsity must lie in \[0, 1\)"),
        ({"start": 0.8, "end": 0.3}, "row 2: start and end must be shares"),
        ({"start": 1000.0, "end": 3000.0}, "need the column steps"),
        ({"loss": None}, "has no column for 'loss'"),
        ({"tokens": None}, "has no column for 'tokens'"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(changes: dict[str, Any], sentence: str) -> None:
    table: dict[str, Any] = {**runs(), **{k: np.full(20, v) for k, v in changes.items() if v is not None}}
    for name, value in changes.items():
        if value is None:
            del table[name]
    with pytest.raises(InputError, match=sentence):
        AverageParameter().fit(table, bootstrap=0)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(InputError, match="has 5 points; law average-parameter has 5 free parameters"):
        AverageParameter().fit({name: values[:5] for name, values in runs().items()}, bootstrap=0)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"tokens": 1e11}, "needs avg_params to predict"),
        ({"sparsity": 0.5, "tokens": 1e11}, "needs params .at the start. beside sparsity"),
        ({"avg_params": 1e9, "params": 1e9, "tokens": 1e11}, "not both"),
        ({"params": 1e9, "sparsity": 1.5, "tokens": 1e11}, r"sparsity must be a number in \[0, 1\)"),
        ({"params": 1e9, "sparsity": "much", "tokens": 1e11}, "could not convert"),
    ],
)
def test_predictions_say_what_they_need(given: dict[str, Any], sentence: str) -> None:
    fitted = AverageParameter().fit(runs(), bootstrap=0)
    with pytest.raises(InputError, match=sentence):
        fitted.predict(**given)


def test_a_fit_goes_through_its_file(tmp_path: Path) -> None:
    fitted = build_law("average_parameter").fit(runs(0.01), bootstrap=20)
    fitted.to_json(tmp_path / "fitted.json")
    again = Fitted.from_json(tmp_path / "fitted.json")
    assert again.law == AverageParameter()
    assert again.plan(flops=1e21, sparsity=0.8) == fitted.plan(flops=1e21, sparsity=0.8)
    assert again.interval(params=1e9, sparsity=0.8, tokens=1e11).low == pytest.approx(
        fitted.interval(params=1e9, sparsity=0.8, tokens=1e11).low
    )


def test_run_records_bring_their_counts(tmp_path: Path) -> None:
    table = runs(0.003)
    for i in range(20):
        density = average_density(float(table["sparsity"][i]))
        final = table["params"][i] * (1 - table["sparsity"][i])
        counts = {"initial": table["params"][i], "average": table["params"][i] * density, "final": final}
        result = {
            "arm": "sparse" if table["sparsity"][i] else "dense",
            "metrics": {"eval/loss": table["loss"][i]},
            "cost": {"tokens": table["tokens"][i]},
            "parameters": counts,
        }
        (tmp_path / f"seed-{i}").mkdir()
        (tmp_path / f"seed-{i}" / "result.json").write_text(json.dumps(result))
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "result.json").write_text(json.dumps({"metrics": {}, "parameters": counts, "cost": {}}))
    fitted = AverageParameter().fit(tmp_path, bootstrap=0)
    reference = AverageParameter().fit(table, bootstrap=0)
    assert fitted.parameters == pytest.approx(reference.parameters, rel=1e-6)
    assert {fit.count for fit in compare_counts(tmp_path)} == {"average", "final", "initial"}
    only = AverageParameter().read(tmp_path, Reading(where={"arm": "dense"}))
    assert len(only) == int((table["sparsity"] == 0).sum())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no finished run records with counts"):
        AverageParameter().fit(tmp_path / "empty", bootstrap=0)


def test_on_the_published_points_it_is_chinchillas_fit(real_data: Path) -> None:
    """The 245 points of Hoffmann et al.'s figure 4, all dense."""
    source = real_data / "chinchilla" / "svg_extracted_data.csv"
    ours = AverageParameter().fit(source, bootstrap=0, sparsity=0.0)
    theirs = Chinchilla().fit(source, bootstrap=0)
    assert len(ours.table) == 245
    assert ours.parameters == theirs.parameters
