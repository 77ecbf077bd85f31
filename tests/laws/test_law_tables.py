from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import Chinchilla, Reading, read_table
from lossmith.laws.tables import LOSS, PARAMS, TOKENS

NEEDED = (PARAMS, TOKENS, LOSS)


def frame(rows: int = 12) -> pd.DataFrame:
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, 3), np.geomspace(1e9, 1e11, rows // 3))
    n, d = n.ravel(), d.ravel()
    return pd.DataFrame({"N": n, "D": d, "loss": 1.7 + 400 * n**-0.34 + 1500 * d**-0.33})


def test_columns_are_found_under_the_usual_names() -> None:
    plain = read_table(frame(), NEEDED)
    other = read_table(frame().rename(columns={"N": "num_params", "D": "Tokens Seen", "loss": "eval/loss"}), NEEDED)
    for name in ("params", "tokens", "loss"):
        assert np.array_equal(plain.columns[name], other.columns[name])
    said = read_table(frame().rename(columns={"N": "x"}), NEEDED, reading=Reading(columns={"params": "x"}))
    assert np.array_equal(said.columns["params"], plain.columns["params"])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_numbers(tmp_path, suffix: str) -> None:
    path = tmp_path / f"points.{suffix}"
    writers = {
        "csv": lambda f: f.to_csv(path, index=False),
        "tsv": lambda f: f.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda f: f.to_json(path, orient="records", lines=True, double_precision=15),
        "json": lambda f: f.to_json(path, orient="records", double_precision=15),
        "parquet": lambda f: f.to_parquet(path),
    }
    writers[suffix](frame())
    np.testing.assert_allclose(read_table(path, NEEDED).columns["loss"], frame()["loss"], rtol=1e-12)


def test_tokens_come_from_flops_where_they_are_missing() -> None:
    table = frame()
    flops = table.assign(flops=6 * table["N"] * table["D"]).drop(columns="D")
    read = read_table(flops, NEEDED)
    np.testing.assert_allclose(read.columns["tokens"], table["D"])
    assert any("6 params" in note for note in read.notes)


def test_perplexity_bits_log10_suffixes_and_scales_are_understood() -> None:
    table = frame()
    nats = table["loss"].to_numpy()
    perplexity = read_table(table.assign(ppl=np.exp(nats)).drop(columns="loss"), NEEDED)
    np.testing.assert_allclose(perplexity.columns["loss"], nats)
    bits = read_table(table.assign(loss=nats / np.log(2)), NEEDED, reading=Reading(unit="bits"))
    np.testing.assert_allclose(bits.columns["loss"], nats)
    logs = read_table(table.assign(D=np.log10(table["D"])), NEEDED, reading=Reading(log10=("tokens",)))
    np.testing.assert_allclose(logs.columns["tokens"], table["D"])
    billions = read_table(table.assign(D=table["D"] / 1e9), NEEDED, reading=Reading(scale={"tokens": 1e9}))
    np.testing.assert_allclose(billions.columns["tokens"], table["D"])
    words = read_table({"N": ["125m", "1.3b", "6,700,000,000"], "D": "3e11", "loss": [3.0, 2.5, 2.2]}, NEEDED)
    assert words.columns["params"].tolist() == [125e6, 1.3e9, 6.7e9]


def broken(**changes: object) -> pd.DataFrame:
    return frame().assign(**changes)


BILLIONS = np.geomspace(5, 1400, 12)


@pytest.mark.parametrize(
    ("table", "reading", "message"),
    [
        (frame().drop(columns="loss"), Reading(), r"no column for 'loss' .* its columns are: N, D; say which one"),
        (frame().drop(columns="D"), Reading(), "no column for 'tokens'"),
        (broken(loss=-1.0), Reading(), r"12 values of 'loss' are not positive \(row 1: -1\)"),
        (broken(N=0), Reading(), "12 values of 'N' are not positive"),
        (broken(loss=np.inf), Reading(), "row 1: column 'loss' is infinite"),
        (broken(loss=np.nan), Reading(), "every row .* lacks a value"),
        (broken(loss="much"), Reading(), "row 1: 'much' in column 'loss' is not a number"),
        (broken(loss=40.0), Reading(), "is it a perplexity"),
        (broken(D=np.linspace(9, 11.4, 12)), Reading(), "they look like log10"),
        (broken(D=BILLIONS), Reading(), r"millions or billions \(then say scale tokens=1e9\)"),
        (broken(N=np.repeat([0.125, 6.7, 175], 4)), Reading(), "scale params=1e9"),
        (broken(N=np.repeat([1300.0, 6700, 175_000], 4), D=1e12), Reading(), "'params' in millions or billions"),
        (frame(), Reading(log10=("tokens",)), "said to be log10, but holds 1e"),
        (frame(), Reading(unit="nat"), "unit must be nats, bits, perplexity, got 'nat'"),
        (frame(), Reading(log10=("token",)), "did you mean 'tokens'"),
        (frame(), Reading(where={"family": "a"}), "no column 'family'"),
        (broken(family="b"), Reading(where={"family": "a"}), "no row where family is a; there are b"),
        (frame(), Reading(run="seed"), "no column 'seed' for runs"),
        (frame(), Reading(columns={"loss": "los"}), "did you mean 'loss'"),
        (frame().head(0), Reading(), "has no rows"),
        (broken(train_loss=1.0, test2_loss=2.0).drop(columns="loss"), Reading(), "several losses"),
        ({"N": [1e6, 2e6], "D": [1e9, 1e9, 1e9], "loss": 2.0}, Reading(), "the columns differ in length: N 2, D 3"),
    ],
)  # fmt: skip
def test_wrong_tables_get_a_sentence(table, reading, message) -> None:
    with pytest.raises(InputError, match=message):
        read_table(table, NEEDED, reading=reading)


def test_rows_without_values_and_repeated_rows_are_dropped_with_a_count() -> None:
    table = frame()
    table.loc[3, "loss"] = np.nan
    table = pd.concat([table, table.iloc[:2]])
    read = read_table(table, NEEDED)
    assert len(read) == 11
    assert read.notes == (
        "1 of 14 rows dropped: a value is missing or NaN",
        "rows of one size are taken for checkpoints of one run; if they are not, say run",
        "2 rows dropped: they repeat others",
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (frame().head(5), "has 5 points; law chinchilla has 5 free parameters and needs at least 6"),
        (broken(N=1e8), "1 different value of params; law chinchilla needs at least 3 to find alpha"),
    ],
)
def test_a_table_too_small_for_the_law_is_refused_with_what_it_needs(table, message) -> None:
    with pytest.raises(InputError, match=message):
        Chinchilla().fit(table, bootstrap=0)


def test_one_size_is_enough_where_the_size_part_is_given() -> None:
    one = broken(N=1e8, loss=1.7 + 400 * 1e8**-0.34 + 1500 * frame()["D"].to_numpy() ** -0.33)
    fitted = Chinchilla(fixed={"A": 400.0, "alpha": 0.34}).fit(one, bootstrap=0)
    assert fitted.parameters["beta"] == pytest.approx(0.33, rel=1e-6)


def test_checkpoints_of_a_run_stay_together() -> None:
    many = pd.DataFrame(
        {"N": np.repeat([1e7, 1e8, 1e9], 20), "D": np.tile(np.geomspace(1e9, 1e11, 20), 3), "loss": 2.0}
    )
    assert len(set(read_table(many, NEEDED).runs)) == 3
    assert len(set(read_table(many.assign(model_name="opt"), NEEDED).runs)) == 3
    assert len(set(read_table(many.assign(seed=0), NEEDED, reading=Reading(run="seed")).runs)) == 1


def test_a_chart_exported_from_wandb_is_read_run_by_run(tmp_path) -> None:
    path = tmp_path / "wandb.csv"
    path.write_text(
        '"Step","small - eval/loss","small - eval/loss__MIN","small - eval/loss__MAX","big - eval/loss"\n'
        '100,4.0,4.0,4.0,\n200,3.5,3.5,3.5,3.2\n300,,,,3.0\n'
    )  # fmt: skip
    reading = Reading(columns={"params": 1e8, "tokens": "Step"}, scale={"tokens": 5e5})
    read = read_table(path, NEEDED, reading=reading)
    assert read.runs.tolist() == ["small", "small", "big", "big"]
    assert read.columns["loss"].tolist() == [4.0, 3.5, 3.2, 3.0]
    assert read.columns["tokens"].tolist() == [5e7, 1e8, 1e8, 1.5e8]


def test_states_of_the_trainer_are_read_from_the_last_checkpoint(tmp_path) -> None:
    history = [
        {"step": 1, "loss": 5.0, "num_input_tokens_seen": 100_000},
        {"step": 2, "loss": 4.0, "num_input_tokens_seen": 200_000},
        {"step": 2, "eval_loss": 4.2},
    ]
    for run in ("a", "b"):
        for number in (1, 2):
            folder = tmp_path / run / f"checkpoint-{number}"
            folder.mkdir(parents=True)
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": history[: number + 1]}))
    read = read_table(tmp_path, NEEDED, reading=Reading(columns={"params": 1e6, "loss": "eval_loss"}))
    assert read.runs.tolist() == ["a", "b"]
    assert read.columns["tokens"].tolist() == [200_000, 200_000]
    assert read.columns["loss"].tolist() == [4.2, 4.2]


# TensorBoard's writer must not share a process with a later torch import on some installations.
_WRITE_EVENTS = """
import sys
from torch.utils.tensorboard import SummaryWriter
for run, shift in (("a", 0.0), ("b", 1.0)):
    with SummaryWriter(f"{sys.argv[1]}/{run}") as writer:
        for step in (1, 2, 3):
            writer.add_scalar("eval/loss", 4.0 - 0.5 * step + shift, step)
            writer.add_scalar("tokens", 1e6 * step, step)
"""


def test_tensorboard_events_are_read(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    subprocess.run([sys.executable, "-c", _WRITE_EVENTS, str(tmp_path)], check=True, capture_output=True)
    read = read_table(tmp_path, NEEDED, reading=Reading(columns={"params": 1e6}))
    assert read.runs.tolist() == ["a"] * 3 + ["b"] * 3
    np.testing.assert_allclose(read.columns["loss"], [3.5, 3.0, 2.5, 4.5, 4.0, 3.5])
    np.testing.assert_allclose(read.columns["tokens"], [1e6, 2e6, 3e6] * 2)


def test_a_folder_of_tables_has_one_run_for_each_file(tmp_path) -> None:
    frame().to_csv(tmp_path / "one.csv", index=False)
    frame().assign(loss=lambda f: f["loss"] + 1).to_csv(tmp_path / "two.csv", index=False)
    read = read_table(tmp_path, NEEDED)
    assert len(read) == 24
    # One file of several sizes: a run is a size of it.
    assert sorted({label.split()[0] for label in read.runs}) == ["one", "two"]
    assert len(set(read.runs)) == 6


def test_run_records_give_sizes_tokens_and_losses_of_finished_runs(tmp_path) -> None:
    for name, size, finished in (("a", 1000, True), ("b", 2000, True), ("c", 3000, False)):
        folder = tmp_path / "runs" / name / "seed-0"
        folder.mkdir(parents=True)
        lines = [{"step": 1, "train/loss": 5.0, "tokens": 50_000}, {"step": 2, "eval/loss": 4.0, "tokens": 100_000}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ev')
        (folder / "config.json").write_text(json.dumps({"arm": name, "seed": 0}))
        if finished:
            cost = {"tokens": 100_000, "flops": 6 * size * 100_000}
            parameters = {"final": size, "average": size} if name == "b" else None
            (folder / "result.json").write_text(json.dumps({"cost": cost, "parameters": parameters}))
    read = read_table(tmp_path, NEEDED)
    assert read.columns["params"].tolist() == [1000, 2000]
    assert read.columns["loss"].tolist() == [4.0, 4.0]
    assert any("1 of 3 run records left out" in note for note in read.notes)


def test_places_with_nothing_to_read_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="holds no run records"):
        read_table(tmp_path, NEEDED)
    with pytest.raises(InputError, match="there is no file or folder"):
        read_table(tmp_path / "none.csv", NEEDED)
    (tmp_path / "points.xls").write_text("")
    with pytest.raises(InputError, match=r"the name must end in \.csv"):
        read_table(tmp_path / "points.xls", NEEDED)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match=r"cannot read .*empty\.csv: No columns"):
        read_table(tmp_path / "empty.csv", NEEDED)
