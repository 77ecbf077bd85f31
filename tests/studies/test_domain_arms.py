"""Arms that draw or weigh by domain, through ``lossmith compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError
from lossmith.studies.arms import parse_arm
from lossmith.studies.compare import Watcher, prepare_runs, run_compare
from lossmith.studies.domain_draws import rise_notes
from lossmith.studies.settings import CompareSettings, Execution, make_settings

COOLDOWN, UPWEIGHT = "cooldown: sampler=temperature(tau=5 -> 1)", "upweight: weighting=scalarization(tau=5)"


def small(data: Path, **changes: Any) -> CompareSettings:
    values = {
        "data": str(data), "model": "nano", "vocab_size": 300, "sequence_length": 32, "batch_size": 4,
        "tokens": 6 * 4 * 32, "eval_tokens": 500, "evaluations": 1, "seeds": 1,
        "arms": ["baseline", COOLDOWN, UPWEIGHT],
    }  # fmt: skip
    return make_settings({**values, **changes})


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """The user's own domains in a column, one of them with 3 of 203 documents."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"house {i} has {i * i} windows and {i % 7} doors", "language": "en"} for i in range(200)]
    rows += [{"text": f"nyumba {i} ina madirisha {i * 3}", "language": "sw"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_arms_by_domain_run_on_the_users_domains_and_report_each(languages: Path, tmp_path: Path) -> None:
    comparison = run_compare(small(languages, domain_field="language"), Execution(out=tmp_path / "out", jobs=1))
    assert not [run.error for run in comparison.runs if run.error]
    losses = {run.arm: run.metrics for run in comparison.runs}
    assert all({"eval/en/loss", "eval/sw/loss"} <= set(metrics) for metrics in losses.values())
    assert len({metrics["eval/loss"] for metrics in losses.values()}) == 3
    (said,) = [note for note in comparison.notes if note.startswith("cooldown passes through")]
    assert "en " in said
    assert "sw " in said
    assert any("each domain's in the same order" in note for note in comparison.notes)
    lines = (tmp_path / "out/runs/cooldown/seed-0/metrics.jsonl").read_text().splitlines()
    evaluated = [m for m in map(json.loads, lines) if "eval/loss" in m]
    assert evaluated[-1]["eval/sw/loss"] == pytest.approx(losses["cooldown"]["eval/sw/loss"], rel=1e-12)
    config = json.loads((tmp_path / "out/runs/cooldown/seed-0/config.json").read_text())
    assert config["sampler"] == "temperature(tau=cooldown(5, 1))"


def test_a_domain_whose_loss_rises_again_is_named() -> None:
    runs = [
        [{"step": s, "eval/sw/loss": v, "eval/en/loss": 4 - s} for s, v in enumerate(c)]
        for c in ([3, 2, 2.5], [3, 1, 1.1])
    ]
    (note,) = rise_notes({"hot": runs, "cold": [[{"step": 1, "eval/sw/loss": 2.0}]]}, ["en", "sw"])
    assert note == "hot: the loss on sw ends 0.3 nats above its lowest (step 1, 1): it is learned by heart."


def test_many_passes_and_a_single_domain_are_said_beforehand(languages: Path, tmp_path: Path) -> None:
    said: list[str] = []
    even = small(languages, domain_field="language", arms=["even: sampler=temperature(tau=inf)"], max_epochs=99)
    prepare_runs(make_settings({**dict(even), "tokens": 90 * 4 * 32}), Execution(), tmp_path, Watcher(said.append))
    assert any("more than 10: sw may be learned by heart" in line for line in said)
    with pytest.warns(UserWarning, match="only one domain"):
        prepare_runs(small(languages), Execution(), tmp_path, Watcher(said.append))
    assert any(line.startswith("upweight goes by domains, but the data have only one") for line in said)


@pytest.mark.parametrize("option", ["sampler=temperature", "weighting=scalarization"])
def test_a_switch_after_the_end_is_refused_before_training(languages: Path, tmp_path: Path, option: str) -> None:
    arms = ["baseline", f"late: {option}(tau=5 -> 1, switch=6)"]
    with pytest.raises(InputError, match="arm 'late': switch is step 6, but there are only 6 steps"):
        prepare_runs(small(languages, domain_field="language", arms=arms), Execution(), tmp_path)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("x: sampler=temprature(tau=5)", "arm 'x': unknown sampler 'temprature': did you mean 'temperature'"),
        ("x: sampler=temperature(tau=0)", "tau must be > 0, got 0"),
        ("x: sampler=temperature(tau=5 -> 0)", "the last temperature must be > 0"),
        ("x: sampler=temperature(tau=5 -> 1, switch=2.5)", "switch must be a share"),
        ("x: weighting=scalarization(tau=nan)", "tau must be > 0, got nan"),
        ("x: sampler=5", "must be a name with options"),
        ("x: samplr=temperature", "did you mean 'sampler'"),
    ],
)
def test_misspelt_arms_are_one_sentence(arm: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arm(arm)
    assert message in str(caught.value)


def test_the_plan_shows_the_sampler_and_the_passes(languages: Path) -> None:
    arguments = ["compare", "--data", str(languages), "--domain-field", "language", "--model", "nano", "--dry-run"]
    arguments += ["--vocab-size", "300", "--sequence-length", "32", "--batch-size", "4", "--tokens", "768"]
    done = CliRunner().invoke(app, [*arguments, "--arm", "baseline", "--arm", COOLDOWN, "--arm", UPWEIGHT])
    assert done.exit_code == 0, done.output
    # The terminal of the tests is narrow.
    said = " ".join(done.output.split())
    assert "sampler temperature(tau=cooldown(5, 1))" in said
    assert "weighting scalarization(tau=5)" in said
