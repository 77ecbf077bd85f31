"""Geometry of language models: features, checkpoints, phases, ablation, memorisation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.data import train_tokenizer
from lossmith.errors import InputError
from lossmith.probes import (
    InfinityGram,
    StreamingCovariance,
    ablate_directions,
    compare_geometry,
    distributional_memorization,
    extract_last_token_features,
    geometry,
    hidden_states,
    label_phases,
    leading_directions,
    pass_at_k,
)

TEXTS = [f"number {i} is followed by {i + 1}, and {i * i} is its square, as everyone can see" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build(tokenizer, 0)


def build(tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, step in enumerate((0, 10, 100, 1000)):
        build(tokenizer, seed).save_pretrained(folder / f"checkpoint-{step}")
    tokenizer.save_pretrained(folder / "model")
    return folder


def test_features_are_those_that_enter_the_output_layer(model: Any, tokenizer: Any) -> None:
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    found = extract_last_token_features(model, tokenizer, [TEXTS[0]], min_length=2)
    torch.testing.assert_close(found[0], seen[0][0, -1])


@pytest.mark.parametrize("pooling", ["last", "mean", "all"])
def test_padding_changes_nothing(model: Any, tokenizer: Any, pooling: Any) -> None:
    texts = ["short one here", TEXTS[3], "a bit longer than that, but not much"]
    alone = torch.cat(list(hidden_states(model, tokenizer, texts, pooling=pooling, min_length=2, batch_size=1)))
    together = torch.cat(list(hidden_states(model, tokenizer, texts, pooling=pooling, min_length=2, batch_size=3)))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_short_texts_are_left_out_and_samples_counted(model: Any, tokenizer: Any) -> None:
    parts = list(hidden_states(model, tokenizer, ["a", *TEXTS], min_length=5, samples=7, batch_size=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    with pytest.raises(InputError, match="has 500 tokens"):
        extract_last_token_features(model, tokenizer, TEXTS, min_length=500)
    with pytest.raises(InputError, match="layer must lie"):
        next(hidden_states(model, tokenizer, TEXTS, layer=9, min_length=2))


def test_one_model_in_memory(model: Any, tokenizer: Any) -> None:
    report = geometry(model, TEXTS, tokenizer=tokenizer, pooling="all", min_length=2)
    rows = torch.cat(list(hidden_states(model, tokenizer, TEXTS, pooling="all", min_length=2)))
    assert report.metrics.samples == len(rows)
    singular = torch.linalg.svdvals((rows - rows.mean(0)).double()) ** 2 / len(rows)
    torch.testing.assert_close(report.metrics.eigenvalues, singular, rtol=1e-6, atol=1e-12)
    assert "RankMe" in report.summary()
    same = compare_geometry(report, report)
    assert same == {"rankme_ratio": 1.0, "alpha_difference": 0.0}


def test_a_folder_of_checkpoints(run_folder: Path, tmp_path: Path) -> None:
    report = geometry(str(run_folder), TEXTS, min_length=2)
    assert [point.step for point in report.checkpoints] == [0, 10, 100, 1000]
    report.plot(tmp_path / "g.png")
    assert (tmp_path / "g.png").stat().st_size > 5000
    found = json.loads(report.to_json(tmp_path / "g.json"))
    assert len(found["checkpoints"]) == 4


def test_the_command(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS * 40))
    words = ["probe", str(run_folder), "--what", "geometry(samples=30, min_length=5)", "--data", tmp_path / "texts.txt"]
    result = CliRunner().invoke(app, [*map(str, words), "--plot", str(tmp_path / "g.svg")])
    assert result.exit_code == 0, result.output
    assert "checkpoint" in result.stdout or "1000" in result.stdout
    assert (tmp_path / "g.svg").is_file()


def test_wrong_folders(run_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    build(tokenizer, 0).save_pretrained(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="holds 1 checkpoint "):
        geometry(str(tmp_path), TEXTS, trajectory=True)
    with pytest.raises(InputError, match="cannot load"):
        geometry(str(tmp_path / "nothing"), TEXTS)
    with pytest.raises(InputError, match="needs its tokenizer"):
        geometry(build(tokenizer, 0), TEXTS)
    with pytest.raises(InputError, match="long enough"):
        geometry(str(run_folder), ["x"])
    broken = build(tokenizer, 0)
    with torch.no_grad():
        broken.model.norm.weight[3] = math.inf
    with pytest.raises(InputError, match="feature 3 is not finite"):
        geometry(broken, TEXTS, tokenizer=tokenizer, min_length=2)


def test_phases() -> None:
    names = [phase.name for phase in label_phases([0, 1, 10, 100, 1000], [9, 5, 2, 10, 20])]
    assert names == ["warmup", "entropy-seeking"]
    flat = label_phases([1, 10, 100, 1000], [5, 5.1, 5, 5.05])
    assert flat == ()
    assert label_phases([1, 10, 100, 1000], [9, 5, 4, 4]) == (("warmup", 1, 100),)
    ranks = [9, 3, 3, 20, 20, 20, 10, 10, 10, 14, 14]
    again = label_phases([10**i for i in range(11)], ranks)
    assert [p.name for p in again][-2:] == ["compression-seeking", "entropy-seeking (again)"]
    with pytest.raises(ValueError, match="at least 4"):
        label_phases([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="rise"):
        label_phases([1, 3, 2, 4], [1, 2, 3, 4])


def test_ablation(model: Any, tokenizer: Any) -> None:
    stream = StreamingCovariance(24)
    for rows in hidden_states(model, tokenizer, TEXTS, pooling="all", min_length=2):
        stream.update(rows)
    v = leading_directions(stream, 3)
    torch.testing.assert_close(v.T @ v, torch.eye(3, dtype=torch.float64))
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        before = model(input_ids=ids).logits
        with ablate_directions(model, v, mean=stream.mean):
            removed = model(input_ids=ids).logits
        with ablate_directions(model, v, mode="retain", mean=stream.mean):
            retained = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
        centred = hidden - stream.mean.float()
        along = centred @ v.float() @ v.float().T
        expected = model.lm_head(stream.mean.float() + centred - along)
        centre = model.lm_head(stream.mean.float())
    torch.testing.assert_close(removed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(removed + retained, before + centre, rtol=1e-4, atol=1e-4)
    assert torch.equal(before, after)
    with pytest.raises(InputError, match="must have 24 rows"), ablate_directions(model, v[:5]):
        pass


def plain_probability(corpus: list[int], context: list[int], token: int) -> float:
    for length in range(len(context), -1, -1):
        suffix = context[len(context) - length :]
        places = [i for i in range(len(corpus) - length) if corpus[i : i + length] == suffix]
        if places:
            return sum(corpus[i + length] == token for i in places) / len(places)
    raise AssertionError


def test_infinity_gram_equals_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    corpus = torch.randint(0, 4, (200,), generator=generator).tolist()
    model = InfinityGram(corpus)
    for start in range(0, 190, 7):
        context = [*corpus[start : start + 6], *torch.randint(0, 5, (2,), generator=generator).tolist()]
        for token in range(5):
            assert model.probability(context, token) == plain_probability(corpus, context, token)
    answer = [1, 2, 9]
    total = sum(
        math.log(p)
        for i, t in enumerate(answer)
        if (p := plain_probability(corpus, [0, 1, *answer[:i]], t) if t < 9 else 0.0) > 0
    )
    assert model.log_probability([0, 1], answer) == pytest.approx(total)
    assert math.isnan(model.log_probability([0, 1], [9]))
    with pytest.raises(InputError, match="sequence of token ids"):
        InfinityGram([])


def test_memorisation_is_a_rank_correlation() -> None:
    assert distributional_memorization([-1.0, -2, -3, math.nan], [-5.0, -9, -10, 0]) == pytest.approx(1)
    assert distributional_memorization([-1.0, -2, -3], [3.0, 4, 5]) == pytest.approx(-1)
    with pytest.raises(ValueError, match="at least 3"):
        distributional_memorization([1.0, 2], [1.0, 2])


def test_pass_at_k() -> None:
    assert pass_at_k([512], [37], 1) == pytest.approx(37 / 512)
    assert pass_at_k([10], [8], 3) == 1
    assert pass_at_k([10, 10], [0, 5], 2) == pytest.approx((0 + 1 - math.comb(5, 2) / math.comb(10, 2)) / 2)
    with pytest.raises(ValueError, match="k must lie"):
        pass_at_k([10], [3], 11)
    with pytest.raises(ValueError, match="correct"):
        pass_at_k([10], [11], 1)


def test_a_run_of_compare_that_keeps_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 20))
    words = [
        "compare", "--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--model", "nano", "--vocab-size", 300,
        "--sequence-length", 32, "--batch-size", 4, "--tokens", 768, "--seeds", 1, "--arm", "a", "--jobs", 1,
        "--set", "checkpoints=3", "--set", "keep_checkpoints=true",
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    run = tmp_path / "out" / "runs" / "a" / "seed-0"
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not any(path.name.startswith("optimizer") for path in run.rglob("*"))
    report = geometry(str(run), TEXTS, min_length=5)
    assert [point.step for point in report.checkpoints] == [2, 4, 6]
