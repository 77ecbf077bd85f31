"""The study of the critical mixture ratio: every arm, the user's files, and the full path on a small local model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import CriticalMixture
from lossmith.studies import critical_mixture_ratio as module
from lossmith.studies.mixture_runs import first_part
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study
from lossmith.training import MixtureLog

STUDY = get_study("critical-mixture-ratio")
TOY = {"pretrain_steps": 3, "steps": 16, "batch_size": 4, "eval_rows": 3, "sequence_length": 32, "vocab_size": 300}
PREDICTED = {"general/loss", "domain/loss", "held_out/percent", "held_out/error"}


@pytest.fixture(scope="module")
def options(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = {**STUDY.options["smoke"], **TOY, "data": str(text_folder), "general": "letters", "domain": "numbers"}
    assert STUDY.prepare is not None
    return given | dict(STUDY.prepare(given, tmp_path_factory.mktemp("study")))


def measure(arm: str, options: dict[str, Any], folder: Path) -> Any:
    assert STUDY.experiment is not None
    return STUDY.experiment(arm, 0, options, folder)


@pytest.mark.slow
def test_smoke_measures_every_arm(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    assert all("general/loss" in run.metrics for run in comparison.runs)
    log = pd.read_csv(tmp_path / "logs" / "log.csv")
    assert len(log["ratio"].unique()) >= 7


@pytest.mark.slow
def test_every_arm_runs_on_the_users_domains_and_shares_its_runs(options: dict[str, Any], tmp_path: Path) -> None:
    measured = {arm: measure(arm, options, tmp_path) for arm in STUDY.arms}
    kept = sorted(path.name for path in Path(options["logs"], "seed-0").glob("share-*"))
    shares = {round(run.metrics["share"], 4) for run in measured.values() if "share" in run.metrics}
    assert {float(name.removeprefix("share-")) for name in kept} == shares
    assert set(measured["line"].metrics) == PREDICTED
    assert set(measured["law"].metrics) == set(measured["half"].metrics)
    for name, share in module.SHARES.items():
        assert measured[name].metrics["share"] == share
        assert measured[name].cost.tokens == measured["25%"].cost.tokens
    law, half, base = (measured[arm].cost.steps for arm in ("law", "half", "base"))
    assert (law, half, base) == (3 + 6 * 16, 3 + 6 * 8, 3)
    critical = measured["law"].metrics["critical/ratio"]
    assert measured["above"].metrics["share"] == pytest.approx(min(critical + 0.1, 1), abs=6e-4)
    assert measured["below"].metrics["share"] == pytest.approx(max(critical - 0.1, 0), abs=6e-4)
    # What the study leaves behind is what the command reads.
    fitted = CriticalMixture().fit(Path(options["logs"], "log.csv"), bootstrap=0)
    assert len(fitted.table) == 2 * 16 * len(kept)


def logs() -> list[MixtureLog]:
    """Domain loss 4 - R^0.2 and general loss 3 + 0.2 R at the end, reached along curves that the law knows."""
    found = []
    for ratio in module.SHARES.values():
        t = [(i + 1) / 20 for i in range(20)]
        found.append(
            MixtureLog(
                ratio=ratio,
                tokens=tuple(round(1000 * x) for x in t),
                general_loss=tuple(3 + 0.6 * ratio * x**0.5 - 0.4 * ratio * x**0.9 for x in t),
                domain_loss=tuple(4 - ratio**0.2 * x**0.5 for x in t),
                base_general=3.0,
                base_domain=4.0,
                steps=40,
                flops=1e9,
                seconds=2.0,
            )
        )
    return found


def test_predictions_of_the_held_out_share_are_the_closed_form() -> None:
    every = logs()
    held_out = every[2]
    others = [log for log in every if log is not held_out]
    law = module._by_law(others, held_out)
    assert law["domain/loss"] == pytest.approx(4 - 0.25**0.2, rel=1e-8)
    assert law["general/loss"] == pytest.approx(3.05, rel=1e-8)
    assert law["held_out/error"] == pytest.approx(0, abs=1e-5)
    # Turns: t^0.4 = 0.3 / 0.36 at every share; the tolerance is reached at 0.2 R = 0.05.
    assert law["critical/tolerance"] == pytest.approx(0.25, abs=1e-4)
    line = module._by_line(others[2:4], held_out)
    ends = [4 - (1 / 3) ** 0.2, 4 - 0.5**0.2]
    assert line["domain/loss"] == pytest.approx(ends[0] - 0.5 * (ends[1] - ends[0]))
    half = module._by_first_half(first_part(others, 0.5), held_out)
    assert half["domain/loss"] == pytest.approx(4 - 0.25**0.2, rel=1e-3)


def test_half_of_a_log_is_half_of_its_cost() -> None:
    (half,) = first_part(logs()[:1], 0.5)
    assert (half.tokens[-1], len(half.tokens), half.steps, half.flops, half.seconds) == (500, 10, 20, 5e8, 1.0)


def test_domains_that_the_data_do_not_have_are_refused_before_any_training(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no domain 'docs'"):
        run_study(STUDY, "smoke", data=str(text_folder), execution=Execution(out=tmp_path))


@pytest.mark.slow
def test_full_scale_goes_through_the_same_code_with_a_local_model(
    text_folder: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """A model by path is taken as it is, with its own tokenizer: nothing is pre-trained."""
    from lossmith.data import load_prepared
    from lossmith.training.models import build_model

    tokenizer = load_prepared(options["corpus"]).tokenizer
    build_model("nano", vocab_size=len(tokenizer), sequence_length=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = {**TOY, "model": str(tmp_path / "model"), "data": str(text_folder), "domain_field": None}
    full = {**STUDY.options["full"], **small, "general": "letters", "domain": "numbers", "micro_batch_size": 2}
    full |= {"steps": 8, "evaluations": 8}
    assert STUDY.prepare is not None
    found = measure("50%", full | dict(STUDY.prepare(full, tmp_path)), tmp_path)
    assert found.cost.steps == 8
    assert not (tmp_path / "logs" / "seed-0" / "base").exists()


@pytest.mark.slow
def test_shakespeare_is_learnt_and_wikipedia_kept_or_not(real_data: Path, tmp_path: Path) -> None:
    """Two real texts: all Shakespeare is worse for Wikipedia than replay alone."""
    folder = tmp_path / "texts"
    for name, source in (("wikipedia", real_data / "wikitext-2"), ("shakespeare", real_data / "tinyshakespeare")):
        (folder / name).mkdir(parents=True)
        texts = "".join(path.read_text("utf-8") for path in sorted(source.rglob("*.txt")))
        (folder / name / "text.txt").write_text(texts[:300_000], "utf-8")
    given = {**STUDY.options["smoke"], "data": str(folder), "general": "wikipedia", "domain": "shakespeare"}
    given |= {"pretrain_steps": 80, "steps": 30, "evaluations": 8, "eval_rows": 30}
    assert STUDY.prepare is not None
    given |= dict(STUDY.prepare(given, tmp_path))
    losses = {arm: measure(arm, given, tmp_path).metrics for arm in ("0%", "50%", "100%")}
    assert losses["0%"]["general/loss"] < losses["100%"]["general/loss"]
    assert losses["100%"]["domain/loss"] < losses["50%"]["domain/loss"] < losses["0%"]["domain/loss"]
