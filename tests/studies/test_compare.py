"""The main job from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lossmith.errors import InputError
from lossmith.reporting import summarise
from lossmith.studies.arms import parse_arm, parse_arms
from lossmith.studies.compare import run_compare
from lossmith.studies.grid import Job, plan, run_jobs
from lossmith.studies.settings import CompareSettings, Execution, make_settings, parse_count, parse_seeds


def small(text_folder: Path, **changes: Any) -> CompareSettings:
    values = {
        "data": str(text_folder), "model": "nano", "vocab_size": 300, "sequence_length": 32, "batch_size": 4,
        "tokens": 6 * 4 * 32, "eval_tokens": 500, "evaluations": 2, "seeds": 2,
    }  # fmt: skip
    return make_settings({**values, **changes})


@pytest.mark.slow
def test_an_arm_compared_with_itself_is_not_told_apart_and_pairs_share_everything(
    text_folder: Path, tmp_path: Path
) -> None:
    """A/A: the same seed gives every arm the same weights and the same order, so differences are exactly zero."""
    settings = small(text_folder, arms=["baseline", "again: weighting=uniform", "hot: learning_rate=0.05"], seeds=2)
    comparison = run_compare(settings, Execution(out=tmp_path, jobs=1))
    rows = {arm.name: arm for arm in summarise(comparison).arms}
    metrics = {(run.arm, run.seed): run.metrics for run in comparison.runs}
    assert metrics["again", 0] == metrics["baseline", 0]
    assert metrics["again", 1] == metrics["baseline", 1]
    assert metrics["hot", 0] != metrics["baseline", 0]
    assert rows["again"].metrics[0].standing == "not told apart"
    tokens = {run.cost.tokens for run in comparison.runs if run.seed == 0}
    assert len(tokens) == 1


@pytest.mark.slow
def test_one_arm_that_diverges_does_not_stop_the_others(text_folder: Path, tmp_path: Path) -> None:
    settings = small(text_folder, arms=["baseline", "wild: learning_rate=1e30"])
    comparison = run_compare(settings, Execution(out=tmp_path, jobs=2))
    errors = {(run.arm, run.seed): run.error for run in comparison.runs}
    assert errors["baseline", 0] is None
    assert errors["baseline", 1] is None
    for seed in (0, 1):
        message = errors["wild", seed]
        assert message is not None
        assert f"arm 'wild', seed {seed}: " in message
        assert "is not finite at step" in message


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_numbers(text_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    settings = small(text_folder, arms=["baseline", "linupper: weighting=linupper(r=0.4)"], seeds=1)
    local = run_compare(settings, Execution(out=tmp_path / "local", jobs=1, threads=1))
    distant = run_compare(settings, Execution(out=tmp_path / "ray", threads=1, backend="ray"))
    assert [run.metrics for run in distant.runs] == [run.metrics for run in local.runs]


def test_a_loaded_model_keeps_its_tokenizer_and_is_saved_again(text_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lossmith.data import prepare

    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    prepare(text_folder, vocab_size=300).tokenizer.save_pretrained(tmp_path / "model")
    settings = small(text_folder, model=str(tmp_path / "model"), arms=["baseline"], seeds=1, tokens=2 * 4 * 32)
    run_compare(settings, Execution(out=tmp_path / "out", jobs=1))
    saved = tmp_path / "out/runs/baseline/seed-0/model"
    assert AutoModelForCausalLM.from_pretrained(saved).config.vocab_size == 320
    assert len(AutoTokenizer.from_pretrained(saved)) == len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert not [p for p in saved.iterdir() if p.suffix in {".bin", ".pt", ".pkl"}]
    assert json.loads((tmp_path / "out/runs/baseline/seed-0/environment.json").read_text())["seed"] == 0


def test_arms_are_read_from_text_lists_and_mappings() -> None:
    arms = parse_arms(
        ["baseline", {"w": {"weighting": "linupper(r=0.5)", "learning_rate": 1e-3}}, {"x": "loss=z_loss"}]
    )
    assert [str(a) for a in arms] == ["baseline", "w: weighting=linupper(r=0.5), learning_rate=0.001", "x: loss=z_loss"]
    assert parse_arm("z: loss=z_loss(a=0.1,b=10)").options == {"loss": "z_loss(a=0.1, b=10)"}
    assert parse_arm("x: training.learning_rate=1e-3, batch_size=32").options == {
        "learning_rate": 1e-3,
        "batch_size": 32,
    }
    with pytest.raises(InputError, match="at least one arm"):
        parse_arms([])


def test_counts_and_seeds_are_read_as_people_write_them() -> None:
    written = ("300k", "2M", "1.5B", "1e6", 7, "1_000")
    counts = [300_000, 2_000_000, 1_500_000_000, 1_000_000, 7, 1000]
    assert [parse_count(x, "tokens") for x in written] == counts
    assert (parse_seeds(2), parse_seeds("3"), parse_seeds("5,9"), parse_seeds([4])) == ((0, 1), (0, 1, 2), (5, 9), (4,))
    for bad in ("1.5", "-3", "k", 0, 2.5, True):
        with pytest.raises(InputError):
            parse_count(bad, "tokens")


def test_the_same_settings_have_the_same_folder() -> None:
    one, two = make_settings({"tokens": "2M"}), make_settings({"tokens": 2_000_000})
    assert one.default_folder() == two.default_folder() != make_settings({"tokens": "3M"}).default_folder()


def test_small_models_run_side_by_side_with_one_thread() -> None:
    assert plan(12, jobs=3) == (3, 1)
    assert plan(2, jobs=8, threads=1) == (2, 1)
    assert plan(5, small=False)[0] == 1


def test_a_job_that_raises_or_dies_does_not_stop_the_others() -> None:
    jobs = [Job("good", pow, (2, 3)), Job("bad", int, ("x",)), Job("fine", pow, (2, 4))]
    outcomes = {o.job.name: o for o in run_jobs(jobs, workers=1, threads=1)}
    assert outcomes["good"].value == 8
    assert outcomes["fine"].value == 16
    assert isinstance(outcomes["bad"].error, ValueError)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_tried_twice_and_then_named() -> None:
    import os

    jobs = [Job("good", pow, (2, 3)), Job("deadly", os._exit, (9,)), Job("fine", pow, (2, 4))]
    outcomes = {o.job.name: o for o in run_jobs(jobs, workers=1, threads=1)}
    assert outcomes["good"].value == 8
    assert outcomes["fine"].value == 16
    assert "its process died twice" in str(outcomes["deadly"].error)
