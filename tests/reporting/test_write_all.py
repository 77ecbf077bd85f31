from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from reporting_example import comparison

from lossmith.errors import InputError
from lossmith.reporting import (
    Claim,
    Comparison,
    Run,
    comparison_from_json,
    comparison_to_json,
    read_comparison,
    summarise,
    write_all,
)

FILES = [
    "comparison.json",
    "table.json",
    "table.md",
    "loss-by-tokens.png",
    "loss-by-seconds.png",
    "differences.png",
    "report.html",
]


def test_every_file_is_written_and_the_report_can_be_made_again_from_them(tmp_path):
    first = write_all(comparison(), tmp_path / "new" / "a")
    assert list(first) == FILES
    assert sorted(path.name for path in (tmp_path / "new" / "a").iterdir()) == sorted(FILES)
    again = write_all(read_comparison(tmp_path / "new" / "a"), tmp_path / "b")
    for name in FILES:
        assert first[name].read_bytes() == again[name].read_bytes(), name


def test_the_report_of_no_finished_run_says_so(tmp_path):
    given = comparison()
    runs = tuple(dataclasses.replace(run, error="killed", metrics={}) for run in given.runs)
    for index, failed in enumerate((runs, ())):
        written = write_all(dataclasses.replace(given, runs=failed), tmp_path / str(index))
        assert "No run finished" in written["report.html"].read_text(encoding="utf-8")
        assert "No run finished" in written["table.md"].read_text(encoding="utf-8")
        assert "differences.png" not in written


def test_a_comparison_survives_json_with_values_that_json_lacks():
    given = comparison()
    odd = dataclasses.replace(
        given,
        runs=(
            Run("baseline", -3, {"eval/loss": math.inf, "eval/accuracy": -math.inf}, error="é\n\u2028"),
            *given.runs,
        ),
        claims=(Claim("c", "focal", "eval/loss", "equal", "z-loss", 0.1, 2.0),),
        lower_is_better=False,
        level=0.9,
    )
    text = json.dumps(comparison_to_json(odd), allow_nan=False)
    assert comparison_from_json(text) == odd
    assert comparison_from_json(json.loads(text)) == odd
    nan = dataclasses.replace(odd, runs=(Run("focal", 0, {"eval/loss": math.nan}),))
    assert math.isnan(comparison_from_json(comparison_to_json(nan)).runs[0].metrics["eval/loss"])


def test_what_is_not_json_in_the_configuration_becomes_text():
    given = dataclasses.replace(
        comparison(),
        configuration={
            "path": Path("a/b"),
            "rate": np.float32(0.5),
            "n": np.int64(3),
            1: (1, 2),
            "nan": math.nan,
        },
    )
    plain = comparison_to_json(given)["configuration"]
    assert plain == {"path": str(Path("a/b")), "rate": 0.5, "n": 3, "1": [1, 2], "nan": "nan"}


def test_unknown_fields_are_ignored_and_missing_ones_get_their_default():
    plain = comparison_to_json(comparison())
    del plain["better"], plain["paper"]
    read = comparison_from_json({**plain, "new": 1})
    assert (read.better, read.paper) == ({}, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("format"), "not a saved comparison"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.pop("title"), "lacks the field 'title'"),
        (lambda d: d.update(level="high"), "level must be float, found 'high'"),
        (lambda d: d.update(arms=[]), "arms must be a JSON object"),
        (lambda d: d["runs"].append(3), r"runs\[12\] must be a JSON object, found 3"),
        (lambda d: d["runs"][0].update(seed=True), "seed must be int"),
        (lambda d: d["claims"][0].update(direction="up"), "allowed are 'lower', 'higher', 'equal'"),
        (lambda d: d["runs"][1]["train"].update(values="x"), "values must be a JSON list"),
    ],
)
def test_a_file_that_is_not_a_comparison_is_refused_with_the_field(tmp_path, change, words):
    plain = json.loads(json.dumps(comparison_to_json(comparison())))
    change(plain)
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_comparison(path)
    assert str(path) in str(caught.value)


def test_a_missing_torn_or_binary_file_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        read_comparison(tmp_path)
    path = tmp_path / "comparison.json"
    path.write_text('{"format": "lossmith-comp', encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        read_comparison(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_comparison(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        read_comparison(path)


def test_arm_names_metric_names_and_seeds_may_be_odd(tmp_path):
    arms = {"": "", " ": "", "a/b\\c": "", "🙂" * 50: "x\ny"}
    runs = tuple(Run(arm, seed, {"": 1.0 + seed}) for arm in arms for seed in (-1, 2**62))
    given = Comparison("", "", arms, "", "", ("", "other"), runs)
    assert write_all(given, tmp_path)
    assert summarise(given).arms[1].primary.standing == "not told apart"
