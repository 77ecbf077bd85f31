"""The study of upsampling and upweighting: smoke, the pieces, and the full path on a small local model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.studies import byte_domains as module
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study
from lossmith.studies.upsample_or_upweight import METHODS, PAIR

STUDY = get_study("upsample-or-upweight")
TOY: dict[str, Any] = {
    **STUDY.options["smoke"],
    "steps": 6,
    "evaluations": 3,
    "plenty_steps": 2,
    "variance_steps": 1,
    "examples": 3,
}


def chunks(seed: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 123, (number, 65), generator=generator, dtype=torch.uint8)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    names = {"train/code": 500, "train/docs": 400, "validation/code": 5, "validation/docs": 5}
    save_file({name: chunks(i, number) for i, (name, number) in enumerate(names.items())}, tmp_path / "chunks")
    return {**TOY, "chunks": str(tmp_path / "chunks")}


def measure(arm: str, options: dict[str, Any], folder: Path, seed: int = 0) -> Any:
    assert STUDY.experiment is not None
    return STUDY.experiment(arm, seed, options, folder)


@pytest.mark.slow
def test_smoke_measures_every_arm(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    for run in comparison.runs:
        missing = set(STUDY.metrics) - set(run.metrics)
        assert missing == (set() if run.arm in PAIR else set(STUDY.metrics[-3:]))
        assert len(run.evaluation.values) == 4


def test_an_experiment_is_deterministic_and_arms_cost_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    first, again, other = (measure("cooldown", options, tmp_path, seed) for seed in (0, 0, 1))
    assert first.metrics == again.metrics != other.metrics
    pair = [measure(arm, options, tmp_path) for arm in PAIR]
    assert first.cost.steps == pair[0].cost.steps == pair[1].cost.steps == 6
    # Weights of 8 x 16 inputs, two hidden layers of 16 units and 128 outputs, at 57 bytes of 8 chunks.
    weights = 128 * 16 + 16 * 16 + 16 * 128
    assert first.cost.flops == pair[0].cost.flops == 6 * weights * 6 * 8 * 57
    assert first.evaluation.steps == (2, 4, 6)
    assert first.evaluation.values[-1] == pytest.approx(first.metrics["small/loss"])
    # At one and the same model.
    assert pair[1].metrics["gradient/variance"] > pair[0].metrics["gradient/variance"] > 0
    assert pair[0].metrics["small/passes"] > pair[1].metrics["small/passes"]


def test_the_byte_model_is_scored_at_every_byte_after_the_first_eight() -> None:
    model = module.byte_model(0, 8)
    rows = chunks(3, 4)
    losses = module.chunk_losses(model, {"chunk": rows})
    expected = []
    for row in rows.long():
        logits = torch.cat([model(row[i - 8 : i].unsqueeze(0)) for i in range(8, 65)])
        expected.append(torch.nn.functional.cross_entropy(logits, row[8:]))
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.slow
def test_the_corpus_has_documents_of_its_own_for_validation(tmp_path: Path) -> None:
    module.write_chunks(tmp_path / "chunks", length=65, large=300, small=80, validation=7)
    train, validation = (module.read_chunks(tmp_path / "chunks", split) for split in ("train", "validation"))
    assert {name: tuple(t.shape) for name, t in train.items()} == {"code": (300, 65), "docs": (80, 65)}
    assert {tuple(t.shape) for t in validation.values()} == {(7, 65)}
    assert not {bytes(row.tolist()) for row in train["docs"]} & {bytes(row.tolist()) for row in validation["docs"]}


def test_every_arm_names_a_sampler_and_a_weighting() -> None:
    assert set(METHODS) == set(STUDY.arms)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*only one domain")
def test_the_users_domains_and_a_local_model_take_the_path_of_full(text_folder: Path, tmp_path: Path) -> None:
    from lossmith.data import prepare
    from lossmith.training.models import build_model

    model = tmp_path / "model"
    tokenizer = prepare(text_folder, vocab_size=300).tokenizer
    build_model("nano", vocab_size=300, sequence_length=64).save_pretrained(model)
    tokenizer.save_pretrained(model)
    overrides = {
        "model": str(model), "tokens": 6 * 4 * 32, "sequence_length": 32, "batch_size": 4, "eval_tokens": 500,
        "evaluations": 1, "training": {"warmup_steps": 2},
    }  # fmt: skip
    comparison = run_study(
        STUDY, "full", seeds=2, data=str(text_folder), execution=Execution(out=tmp_path / "out", jobs=2),
        overrides=overrides,
    )  # fmt: skip
    assert not [run.error for run in comparison.runs if run.error]
    assert set(comparison.arms) == {"proportional", "tau-5", "uniform", "upweight-5", "cooldown"}
    assert all("eval/letters/loss" in run.metrics for run in comparison.runs)


def test_full_is_a_real_model_on_real_domains() -> None:
    assert STUDY.comparison is not None
    settings, claims = STUDY.comparison("full", None)
    assert (settings.model, settings.data) == ("EleutherAI/pythia-160m", "DKYoon/SlimPajama-6B")
    assert settings.domain_field == "meta.redpajama_set_name"
    names = [arm.name for arm in settings.arms]
    assert all(claim.arm in names and (claim.against or "proportional") in names for claim in claims)
    samplers = {arm.name: str(arm.options["sampler"]) for arm in settings.arms}
    assert samplers["cooldown"] == "temperature(tau=cooldown(5, 1))"
