"""The study of D-Pruner: every arm at smoke scale, the user's own domains, and the path of the full scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.errors import InputError
from lossmith.studies.study import get_study

STUDY = get_study("d-pruner")
TINY = {**STUDY.options["smoke"], "training": 24, "domain": 6, "general": 8, "samples": 4}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> tuple[dict[str, Any], Path]:
    """Two domains of the user's own."""
    folder = tmp_path_factory.mktemp("study")
    options = {**TINY, "data": str(text_folder), "target_domain": "numbers", "characters": 120, "vocab_size": 300}
    assert STUDY.prepare is not None
    return {**options, **STUDY.prepare(options, folder)}, folder


@pytest.mark.slow
@pytest.mark.parametrize("arm", STUDY.arms)
def test_every_arm_measures_what_its_claims_need(arm: str, own: tuple[dict[str, Any], Path]) -> None:
    options, folder = own
    assert STUDY.experiment is not None
    found = STUDY.experiment(arm, 0, options, folder / "runs" / arm / "seed-0")
    assert set(STUDY.metrics) <= set(found.metrics)
    trained = arm in ("domain-only", "d-pruner", "d-pruner-ratio")
    assert (found.cost.steps > 0) == trained
    looks = arm not in ("dense", "magnitude", "domain-only")
    assert (found.cost.scored_tokens > 0) == looks


def test_parts_share_no_passage(own: tuple[dict[str, Any], Path]) -> None:
    parts = Path(own[0]["parts"])
    texts = [json.loads(line)["text"] for path in sorted(parts.glob("*.jsonl")) for line in path.open()]
    assert len(texts) == len(set(texts)) == 24 + 6 + 8 + 8 + 8
    domain = [json.loads(line)["text"] for line in (parts / "domain.jsonl").open()]
    # The fixture's numbers hold few letters beyond their heading.
    assert all(sum(c.isdigit() for c in text) > 30 for text in domain)


def test_arms_of_a_seed_prune_the_same_model(own: tuple[dict[str, Any], Path]) -> None:
    options, folder = own
    assert STUDY.experiment is not None
    first, second = (STUDY.experiment("magnitude", 0, options, folder / "runs" / "m" / "seed-0") for _ in range(2))
    assert first.metrics == second.metrics
    assert (folder / "models" / "seed-0" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_named_model_takes_the_path_of_the_full_scale(tmp_path: Path, text_folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from lossmith.data import train_tokenizer

    texts = {d: [p.read_text() for p in sorted((text_folder / d).glob("*.txt"))] for d in ("letters", "numbers")}
    tokenizer = train_tokenizer(texts["letters"] + texts["numbers"], vocab_size=300)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "domain.jsonl").write_text("\n".join(json.dumps({"content": t}) for t in texts["numbers"]))
    own = {
        "model": str(tmp_path / "model"),
        "domain_data": str(tmp_path / "domain.jsonl"),
        "general_data": str(text_folder / "letters"),
        "sequence_length": 64,
        "calibration_length": 64,
        "domain": 8,
        "general": 16,
        "domain_validation": 4,
        "general_validation": 4,
        "samples": 4,
        "epochs": 1,
    }
    options = {**STUDY.options["full"], **own}
    assert STUDY.prepare is not None
    assert STUDY.experiment is not None
    options |= STUDY.prepare(options, tmp_path / "out")
    for arm in ("dense", "sparsegpt", "d-pruner-ratio"):
        found = STUDY.experiment(arm, 0, options, tmp_path / "out" / "runs" / arm / "seed-0")
        assert set(STUDY.metrics) <= set(found.metrics)
    assert not (tmp_path / "out" / "models").exists()


def test_a_corpus_that_is_too_small_says_what_it_lacks(tmp_path: Path, text_folder: Path) -> None:
    options = {**TINY, "data": str(text_folder), "target_domain": "numbers", "general": 100_000}
    assert STUDY.prepare is not None
    with pytest.raises(InputError, match="passages left for the part 'general'"):
        STUDY.prepare(options, tmp_path)
