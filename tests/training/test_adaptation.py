"""Adapting a model to a domain: full, by LoRA, with general text replayed; what is measured before and after."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lossmith.data import PreparedCorpus, prepare
from lossmith.errors import InputError
from lossmith.training.adaptation import adapt_language_model, combine_sources, domain_losses
from lossmith.training.low_rank_adaptation import LowRankAdaptation
from lossmith.training.models import build_model

pytest.importorskip("peft", reason="the extra lora is not installed")


@pytest.fixture(scope="module")
def corpus(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    path = tmp_path_factory.mktemp("adaptation") / "both.jsonl"
    combine_sources(str(text_folder / "numbers"), str(text_folder / "letters"), path)
    return prepare(path, domain_field="domain", vocab_size=300, sequence_length=32, packing="concatenated")


def model_for(corpus: PreparedCorpus) -> Any:
    torch.manual_seed(0)
    return build_model("nano", vocab_size=len(corpus.tokenizer), sequence_length=32)


def test_two_sources_become_one_corpus_with_their_names(text_folder: Path, tmp_path: Path) -> None:
    path = combine_sources(str(text_folder), str(text_folder / "letters"), tmp_path / "a.jsonl")
    names = [json.loads(line)["domain"] for line in path.read_text().splitlines()]
    assert (names.count("domain"), names.count("general")) == (120, 60)
    (tmp_path / "parts.jsonl").write_text('{"text": "a", "kind": "general"}\n')
    with pytest.raises(InputError, match="must not be called 'general'"):
        combine_sources(str(tmp_path / "parts.jsonl"), str(text_folder), tmp_path / "b.jsonl", category_field="kind")
    assert not (tmp_path / "b.jsonl").exists()


def test_an_adapter_changes_nothing_before_the_first_step_and_merges_exactly(corpus: PreparedCorpus) -> None:
    model = model_for(corpus).double().eval()
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model(ids).logits
    plain = copy.deepcopy(model)
    adaptation = LowRankAdaptation(model, rank=3, seed=5)
    assert torch.equal(adaptation.model(ids).logits, before)
    assert type(adaptation.model) is type(plain)
    assert adaptation.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adaptation.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    adapted = adaptation.model(ids).logits
    assert (adapted - before).abs().max() > 0.01
    # By hand: W' = W + (alpha / r) B A, with alpha = 2 r.
    weights = dict(adaptation.model.named_parameters())
    prefix = "model.layers.0.mlp.up_proj."
    expected = (
        weights[prefix + "base_layer.weight"]
        + 2 * weights[prefix + "lora_B.default.weight"] @ weights[prefix + "lora_A.default.weight"]
    ).detach()
    merged: Any = adaptation.merge()
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=0, atol=1e-10)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_the_adapter_depends_on_its_seed_alone(corpus: PreparedCorpus) -> None:
    def matrices(seed: int) -> list[torch.Tensor]:
        model = LowRankAdaptation(model_for(corpus), rank=2, seed=seed).model
        return [p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name]

    model_for(corpus)
    state = torch.random.get_rng_state()
    first = matrices(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, matrices(1), strict=True))
    assert not torch.equal(first[0], matrices(2)[0])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_learning_rate_changes_nothing(corpus: PreparedCorpus, tmp_path: Path, method: Any) -> None:
    model = model_for(corpus)
    weights = copy.deepcopy(model.state_dict())
    adapted, found = adapt_language_model(
        model, corpus, folder=tmp_path, method=method, steps=2, learning_rate=0.0, weight_decay=0.0
    )
    assert found.before == found.after
    assert found.forgetting == 0
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_adaptation_learns_the_domain_and_replay_keeps_the_general(corpus: PreparedCorpus, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "steps": 25, "batch_size": 8, "learning_rate": 1e-2}
    base, _ = adapt_language_model(model_for(corpus), corpus, domains=["general"], general=None, **options)
    found = {}
    for name, changes in {
        "full": {},
        "replay": {"replay_fraction": 0.5},
        "lora": {"method": "lora", "rank": 2, "adapter": tmp_path / "adapter"},
    }.items():
        _, found[name] = adapt_language_model(copy.deepcopy(base), corpus, **{**options, **changes})
    full, replay, lora = found["full"], found["replay"], found["lora"]
    assert full.after["domain"] < full.before["domain"] - 0.5
    assert full.forgetting is not None
    assert replay.forgetting is not None
    assert full.forgetting > replay.forgetting + 0.2
    assert lora.before == full.before
    assert lora.trainable < full.trainable / 5
    assert lora.gradient_norm < full.gradient_norm
    # A third of the work is spared, but for the adapters' own gradients.
    assert 2 / 3 < lora.flops / full.flops < 0.85
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "general" in full.summary()
    assert full.steps == 25


def test_losses_are_those_of_the_plain_sum_over_rows(corpus: PreparedCorpus, tmp_path: Path) -> None:
    model = model_for(corpus).double().eval()
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in corpus.domains}
    for row in corpus.validation:
        ids = torch.tensor([row["input_ids"]])
        if ids.shape[1] > 1:
            sums[corpus.domains[row["domain"]]][0] += float(
                F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            )
            sums[corpus.domains[row["domain"]]][1] += ids.shape[1] - 1
    found = domain_losses(model, corpus, folder=tmp_path)
    assert found == pytest.approx({name: a / b for name, (a, b) in sums.items()}, rel=1e-6)


def test_a_merged_model_is_an_ordinary_one(corpus: PreparedCorpus, tmp_path: Path) -> None:
    adapted, found = adapt_language_model(
        model_for(corpus), corpus, folder=tmp_path / "run", method="lora", steps=3, learning_rate=1e-2
    )
    adapted.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert domain_losses(again, corpus, folder=tmp_path / "run") == pytest.approx(found.after, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "lorra"}, "unknown method 'lorra': did you mean 'lora'"),
        ({"replay_fraction": 1.0}, "replay_fraction must be at least 0 and less than 1"),
        ({"replay_fraction": 0.1, "general": None}, "replay_fraction needs general text"),
        ({"general": "generic"}, "has no domain 'generic'"),
        ({"domains": ["poems"]}, "has no domain 'poems'"),
        ({"domains": ["general"]}, "has no text but the general one"),
        ({"epochs": 0.0}, "epochs must be above 0"),
        ({"method": "lora", "rank": 0}, "rank of LoRA must be at least 1"),
        ({"method": "lora", "target_modules": ["nothing"]}, "LoRA: "),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence(
    corpus: PreparedCorpus, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        adapt_language_model(model_for(corpus), corpus, folder=tmp_path, **changes)


def test_text_of_which_nothing_is_held_out_is_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One short text.")
    for domain, general in ((text_folder / "numbers", tmp_path / "short.txt"), (tmp_path / "short.txt", text_folder)):
        path = combine_sources(str(domain), str(general), tmp_path / "both.jsonl")
        both = prepare(path, domain_field="domain", vocab_size=300, sequence_length=32, packing="concatenated")
        with pytest.raises(InputError, match=r"too little text of '(general|domain)' to judge on"):
            adapt_language_model(model_for(both), both, folder=tmp_path)
