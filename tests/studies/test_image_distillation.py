"""The studies of image distillation: smoke, toy size, the user's folder, and the full path on small local models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from lossmith.errors import InputError
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

SLUGS = ("plackett-luce-distillation", "dual-head-distillation")
TOY = {"teacher_examples": 40, "student_examples": 20, "teacher_epochs": 1, "epochs": 1}


def toy(slug: str, **changes: Any) -> dict[str, Any]:
    options = {**get_study(slug).options["smoke"], **TOY, **changes}
    if "mixture" in options:
        options["mixture"] = {**options["mixture"], "examples": 100, "teacher_epochs": 1, "epochs": 1}
    return options


def run(slug: str, arm: str, folder: Path, seed: int = 0, teachers: Path | None = None, **changes: Any) -> Any:
    study, options = get_study(slug), toy(slug, **changes)
    assert study.experiment is not None
    assert study.prepare is not None
    return study.experiment(arm, seed, {**options, **study.prepare(options, teachers or folder)}, folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {slug: tmp_path_factory.mktemp("teachers") for slug in SLUGS}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    generator = numpy.random.default_rng(0)
    for label in range(3):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(60 * label, 60 * label + 60, (8, 8, 3)).astype(numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{label}" / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_smoke_measures_everything(slug: str, tmp_path: Path) -> None:
    study = get_study(slug)
    comparison = run_study(study, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [r.error for r in comparison.runs if r.error]
    for r in comparison.runs:
        assert set(r.metrics) == set(study.metrics)


@pytest.mark.parametrize("slug", SLUGS)
def test_one_experiment_is_deterministic_and_seeds_differ(slug: str, tmp_path: Path) -> None:
    arm = {"plackett-luce-distillation": "pld", "dual-head-distillation": "dual-mlp"}[slug]
    first = run(slug, arm, tmp_path)
    assert run(slug, arm, tmp_path / "again").metrics == first.metrics
    assert run(slug, arm, tmp_path, seed=1).metrics != first.metrics
    assert first.cost.steps > 0


@pytest.mark.parametrize("arm", list(get_study("dual-head-distillation").arms))
def test_every_arm_of_the_dual_head_study_runs(arm: str, tmp_path: Path, teachers: Any) -> None:
    metrics = run("dual-head-distillation", arm, tmp_path, teachers=teachers["dual-head-distillation"]).metrics
    assert all(numpy.isfinite(value) for value in metrics.values())
    assert (metrics["mixture/cosine_head"] == 0) == (arm == "ce")


def test_a_strong_arm_is_trained_on_images_again_only_where_its_weight_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lossmith.studies import dual_head_distillation as module

    trained: list[str] = []
    train = module._on_images
    monkeypatch.setattr(module, "_on_images", lambda arm, *a: trained.append(arm) or train(arm, *a))
    slug = "dual-head-distillation"
    weak, strong = (run(slug, arm, tmp_path / "same") for arm in ("dual", "dual-strong"))
    assert trained == ["dual"]
    assert strong.metrics["images/accuracy"] == weak.metrics["images/accuracy"]
    assert strong.metrics["mixture/cosine_head"] != weak.metrics["mixture/cosine_head"]
    assert (strong.cost.steps, strong.cost.flops) == (weak.cost.steps, weak.cost.flops)
    for arm in ("dual", "dual-strong"):
        run(slug, arm, tmp_path / "other", strong_alpha=0.5)
    assert trained == ["dual", "dual", "dual-strong"]


@pytest.mark.parametrize("arm", list(get_study("plackett-luce-distillation").arms))
def test_every_arm_of_the_ranking_study_runs(arm: str, tmp_path: Path, teachers: Any) -> None:
    metrics = run("plackett-luce-distillation", arm, tmp_path, teachers=teachers["plackett-luce-distillation"]).metrics
    assert all(numpy.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("slug", SLUGS)
def test_full_scale_goes_through_the_same_code_with_local_models(slug: str, pictures: Path, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    for name in ("teacher", "student"):
        ResNetForImageClassification(config).save_pretrained(tmp_path / name)
    full = get_study(slug).options["full"]
    changes = {
        **full,
        **TOY,
        "data": str(pictures),
        "size": 32,
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "batch_size": 8,
        "padding": 2,
    }
    arm = {"plackett-luce-distillation": "pld", "dual-head-distillation": "dual-aligned"}[slug]
    assert 0 <= run(slug, arm, tmp_path, **changes).metrics[f"{_images(slug)}accuracy"] <= 1


def _images(slug: str) -> str:
    return "images/" if slug == "dual-head-distillation" else ""


def test_full_scale_without_data_says_what_is_needed(tmp_path: Path) -> None:
    study = get_study("plackett-luce-distillation")
    with pytest.raises(InputError, match="needs --data: a folder with one sub-folder of images per class"):
        run_study(study, "full", seeds=1, execution=Execution(out=tmp_path, jobs=1))
