"""The width law: one exponent for all families, an offset for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import Fitted
from lossmith.laws.width import LOG_SQUARES, Width

FAMILIES = {
    "OPT": [768, 1024, 2048, 2560, 4096, 5120, 7168, 9216],
    "GPT-2": [768, 1024, 1280, 1600],
    "Qwen2.5": [896, 1536, 2048, 3584, 5120, 8192],
    "Pythia": [128, 256, 512, 768, 1024, 2048, 2560, 4096, 5120],
}
CORPORA = ("wikitext", "c4", "pile", "books")


def families(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """27 models on 4 corpora, as in the paper: A 476, alpha 0.91, offsets from 1.49 to 2.35."""
    rng = np.random.default_rng(seed)
    offset = {(f, c): rng.uniform(1.49, 2.35) for f in FAMILIES for c in CORPORA}
    rows = [
        (f, c, m, offset[f, c] + 476 / m**0.91, offset[f, c]) for f in FAMILIES for c in CORPORA for m in FAMILIES[f]
    ]
    frame = pd.DataFrame(rows, columns=["family", "corpus", "width", "loss", "offset"])
    frame["loss"] += noise * rng.standard_normal(len(frame))
    return frame


def test_families_without_noise_are_recovered_exactly() -> None:
    frame = families()
    fitted = Width().fit(frame, bootstrap=0)
    assert fitted.parameters["A"] == pytest.approx(476, rel=1e-9)
    assert fitted.parameters["alpha"] == pytest.approx(0.91, rel=1e-10)
    for _, row in frame.iterrows():
        assert fitted.parameters[f"E[{row['family']} {row['corpus']}]"] == pytest.approx(row["offset"], rel=1e-9)
    assert len(fitted.law.names) == 18


def test_intervals_hold_the_truth_and_the_fit_has_the_papers_scatter() -> None:
    """Noise of the paper's size (mean squared error 0.0052): 0.91 +- 0.04 there, from 27 models on 4 corpora."""
    inside = 0
    for seed in range(10):
        frame = families(noise=0.072, seed=seed)
        fitted = Width().fit(frame, bootstrap=100, calibrated=False)
        low, high = fitted.parameter_intervals()["alpha"]
        inside += low <= 0.91 <= high
        assert 0.01 < (high - low) / 2 < 0.2
    assert inside >= 7
    assert len(np.unique(fitted.table.runs)) == 27
    error = Width.slope_error(fitted)
    assert 0.01 < error < 0.2


def test_prediction_needs_a_group_and_survives_json(tmp_path: Path) -> None:
    fitted = Width().fit(families(0.01), bootstrap=20)
    again = Fitted.from_json(fitted.to_json())
    value = fitted.predict(width=[512, 12288], group="Pythia pile")
    np.testing.assert_allclose(again.predict(width=[512, 12288], group="Pythia pile"), value)
    interval = again.interval(0.9, width=12288, group="Pythia pile")
    assert interval.low < value[1] < interval.high
    assert again.law.labels(width=2, group="Pythia pile") == ["width=2, group=Pythia pile"]
    with pytest.raises(InputError, match="needs group: allowed: GPT-2 books"):
        fitted.predict(width=512)
    with pytest.raises(InputError, match="unknown group 'Pythia piles': did you mean 'Pythia pile'"):
        fitted.predict(width=512, group="Pythia piles")
    fitted.plot(tmp_path / "fit.svg")
    assert "<svg" in (tmp_path / "fit.svg").read_text()


def test_without_offset_it_is_the_regression_of_logarithms() -> None:
    rng = np.random.default_rng(0)
    width = np.tile([6.0, 10, 16, 26, 40], 3)
    loss = 5 * width**-1.1 * np.exp(0.1 * rng.standard_normal(15))
    fitted = Width(offset=False, objective=LOG_SQUARES).fit({"width": width, "loss": loss}, bootstrap=0)
    slope, intercept = np.polyfit(np.log(width), np.log(loss), 1)
    assert fitted.parameters["alpha"] == pytest.approx(-slope, rel=1e-9)
    assert fitted.parameters["A"] == pytest.approx(np.exp(intercept), rel=1e-9)
    assert fitted.law.names == ("A", "alpha")


def test_one_offset_for_a_table_without_groups_and_headers_of_the_users_own(tmp_path: Path) -> None:
    width = np.array([64.0, 128, 256, 512, 1024])
    pd.DataFrame({"d_model": width, "eval_loss": 2 + 30 / width**0.8}).to_csv(tmp_path / "runs.csv", index=False)
    fitted = Width().fit(tmp_path / "runs.csv", bootstrap=0)
    assert fitted.parameters["E"] == pytest.approx(2.0, abs=1e-6)
    frame = families().rename(columns={"family": "series", "corpus": "text", "width": "d"})
    renamed = Width(by="series+text").fit(frame, bootstrap=0, width="d")
    assert renamed.parameters["alpha"] == pytest.approx(0.91, rel=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[t.width.isin([768, 1024])], "has 2 different values of width; .* needs at least 3"),
        (
            lambda t: pd.concat([t, t[:1].assign(family="new")]),
            "group 'new wikitext' has 1 width; its offset and the slope",
        ),
        (lambda t: t.drop(columns="width"), "no column for 'width'"),
        (lambda t: t.assign(loss=-t.loss), "are not positive"),
        (lambda t: t[:0], "has no rows|holds no rows|empty"),
    ],
)
def test_tables_that_cannot_determine_the_law_are_refused(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Width().fit(change(families()), bootstrap=0)


def test_rows_without_a_group_are_dropped_and_counted() -> None:
    frame = families()
    frame.loc[:2, "corpus"] = None
    fitted = Width().fit(frame, bootstrap=0)
    assert fitted.parameters["alpha"] == pytest.approx(0.91, rel=1e-9)
    assert "3 rows dropped: no family or corpus" in fitted.notes


def test_unknown_headers_of_groups_are_named() -> None:
    with pytest.raises(InputError, match="no column 'serie': did you mean 'series'"):
        Width(by="serie").fit(families().rename(columns={"family": "series"}), bootstrap=0)
