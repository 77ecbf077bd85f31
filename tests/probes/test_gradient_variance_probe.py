"""The probe ``gradient_variance``: exact on all examples, unbiased on some, on models from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.data import train_tokenizer
from lossmith.errors import InputError
from lossmith.probes import gradient_variance, measure_gradients
from lossmith.theory import gradient_moments, gradient_variances

TEXTS = {
    "large": [f"number {i} is followed by {i + 1}, and {i * i} is its square" for i in range(60)],
    "small": [f"the moon of planet {i} has no name" for i in range(7)],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS["large"] + TEXTS["small"], vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).double()


def square(model: nn.Module, row: Tensor) -> Tensor:
    return (model(row[:-1]) - row[-1]).square().sum()


def test_all_examples_give_the_exact_variances() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 1).double()
    rows = torch.randn(50, 4, dtype=torch.float64)
    examples = {"large": list(rows[:45]), "small": list(rows[45:])}
    report = measure_gradients(linear, square, examples, tau=3)
    residual = 2 * (linear(rows[:, :3])[:, 0] - rows[:, 3]).detach()
    gradients = torch.cat([residual[:, None] * rows[:, :3], residual[:, None]], dim=1)
    expected = gradient_variances(*gradient_moments(gradients, torch.tensor([0] * 45 + [1] * 5)), tau=3)
    for name in ("upsampling", "upweighting", "mean_squared"):
        assert getattr(report.at(3), name) == pytest.approx(getattr(expected, name), rel=1e-12)
    assert report.difference_stderr == 0
    assert all(p.grad is None for p in linear.parameters())


def test_samples_estimate_them_without_bias() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 1).double()
    rows = torch.randn(400, 4, dtype=torch.float64)
    rows[300:] += 1
    sizes = {"large": 300, "small": 100}
    exact = measure_gradients(linear, square, {"large": list(rows[:300]), "small": list(rows[300:])})
    found = []
    for _ in range(300):
        drawn = [torch.randperm(300)[:4], 300 + torch.randperm(100)[:4]]
        examples = {name: list(rows[index]) for name, index in zip(sizes, drawn, strict=True)}
        report = measure_gradients(linear, square, examples, sizes)
        found.append([report.at(5).upsampling, report.at(5).upweighting, report.at(5).mean_squared])
    values = torch.tensor(found)
    expected = torch.tensor([exact.at(5).upsampling, exact.at(5).upweighting, exact.at(5).mean_squared])
    assert ((values.mean(0) - expected).abs() < 4 * values.std(0) / 300**0.5).all()


def test_a_language_model_is_measured_at_its_own_losses(model: Any, tokenizer: Any) -> None:
    report = gradient_variance(model, TEXTS, tokenizer=tokenizer, samples=1000, max_length=12)
    gradients = []
    for text in TEXTS["large"] + TEXTS["small"]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:12]])
        loss = model(input_ids=ids, labels=ids).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]))
    expected = gradient_variances(*gradient_moments(torch.stack(gradients), torch.tensor([0] * 60 + [1] * 7)))
    # transformers computes the loss itself in float32.
    assert report.at(5).upsampling == pytest.approx(expected.upsampling, rel=1e-5)
    assert report.at(5).upweighting == pytest.approx(expected.upweighting, rel=1e-5)
    assert [d.size for d in report.domains] == [60, 7]


def test_the_command_line(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with (tmp_path / "texts.jsonl").open("w") as file:
        for language, texts in TEXTS.items():
            file.writelines(json.dumps({"text": text, "language": language}) + "\n" for text in texts)
    arguments = ["probe", str(tmp_path / "model"), "--data", str(tmp_path / "texts.jsonl"), "--what"]
    options = "(domain_field=language, samples=5, tau=3)"
    more = ["--plot", str(tmp_path / "plot.svg"), "--out", str(tmp_path / "report.json")]
    done = CliRunner().invoke(app, [*arguments, "gradient-variance" + options, *more])
    assert done.exit_code == 0, done.output
    assert "at tau = 3" in done.output
    assert "small" in done.output
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["difference"] == pytest.approx(written["upweighting"] - written["upsampling"])
    for what, message in [
        ("gradient_variance", "at least two, found 1"),
        ("gradient_variance(samples=1, domain_field=language)", "at least 2"),
        ("gradient_variance(tau=0, domain_field=language)", "must be > 0"),
    ]:
        failed = CliRunner().invoke(app, [*arguments, what])
        assert isinstance(failed.exception, InputError)
        assert message in str(failed.exception)


def test_gradients_that_are_not_finite_and_missing_examples_are_refused() -> None:
    linear = nn.Linear(3, 1).double()
    rows = list(torch.randn(6, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="'b' is not finite"):
        measure_gradients(linear, square, {"a": rows, "b": [rows[0] * float("nan")]})
    with pytest.raises(ValueError, match="'b' has 9 examples, but 1 are given"):
        measure_gradients(linear, square, {"a": rows, "b": rows[:1]}, {"a": 6, "b": 9})
    with pytest.raises(InputError, match="no text of at least two tokens"):
        gradient_variance(nn.Linear(1, 1), {"a": ["x"], "b": ["y"]}, tokenizer=lambda text, **_: {"input_ids": [1]})
