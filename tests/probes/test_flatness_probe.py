"""The probe ``flatness`` on language models: in memory, from folders, along checkpoints, from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.data import train_tokenizer
from lossmith.errors import InputError
from lossmith.probes import Curvature, flatness, hessian_trace

TEXTS = [f"number {i} is followed by {i + 1}, and {i * i} is its square" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=280)


def causal(tokenizer: Any, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("run")
    for step in (5, 10, 20):
        causal(tokenizer, step).save_pretrained(path / f"checkpoint-{step}")
    tokenizer.save_pretrained(path)
    return path


def test_a_causal_model_is_measured_at_its_own_next_tokens(tokenizer: Any) -> None:
    model = causal(tokenizer)
    report = flatness(model, TEXTS, tokenizer=tokenizer, samples=6, batch_size=4, estimator="ggn", n_probes=3, top=1)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:6]]
    losses = []
    for row in ids:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none").tolist()
    assert report.trace.positions == len(losses)
    assert report.trace.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert report.checkpoints[0].fisher == pytest.approx(report.trace.trace, rel=0.3)
    assert report.checkpoints[0].eigenvalues[0] < report.trace.trace


def test_products_with_the_hessian_of_a_transformer_are_those_of_double_backward(tokenizer: Any) -> None:
    model = causal(tokenizer).double()
    ids = torch.tensor([tokenizer(TEXTS[30])["input_ids"][:12], tokenizer(TEXTS[31])["input_ids"][:12]])
    curvature = Curvature(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    vectors = torch.randn(3, curvature.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    first = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    for vector, product in zip(vectors, curvature.matmul(vectors), strict=True):
        second = torch.autograd.grad(first @ vector, parameters, retain_graph=True)
        # The model itself normalises in float32.
        torch.testing.assert_close(product, torch.cat([g.flatten() for g in second]), rtol=1e-3, atol=1e-5)


def test_a_masked_model_predicts_one_token_of_each_text(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    report = flatness(str(tmp_path / "bert"), TEXTS, samples=10, n_probes=2)
    assert report.trace.positions == 10
    assert report == flatness(str(tmp_path / "bert"), TEXTS, samples=10, n_probes=2)


def test_checkpoints_from_the_command_line(run_folder: Path, tmp_path: Path) -> None:
    data, out, plot = tmp_path / "texts.jsonl", tmp_path / "report.json", tmp_path / "plot.svg"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    what = "flatness(samples=8, n_probes=2)"
    arguments = ["probe", str(run_folder), "--what", what, "--data", str(data), "--out", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "traces compare at equal loss only" in result.output
    written = json.loads(out.read_text())
    assert [point["step"] for point in written["checkpoints"]] == [5, 10, 20]
    point = written["checkpoints"][0]
    assert sum(point["trace"]["by_module"].values()) == pytest.approx(point["trace"]["trace"], rel=1e-4)
    assert "<svg" in plot.read_text()


def test_a_small_model_is_measured_in_the_parameters_of_a_larger_one(tokenizer: Any) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "samples": 6, "n_probes": 2}
    small = flatness(causal(tokenizer), TEXTS, **options)
    wide = flatness(causal(tokenizer), TEXTS, enlarge=2, layers=2, **options)
    assert wide.trace.loss == pytest.approx(small.trace.loss, rel=1e-5)
    assert wide.trace.parameters > 3 * small.trace.parameters
    assert wide.trace.trace != pytest.approx(small.trace.trace, rel=0.05)
    with pytest.raises(InputError, match="factor must be a whole number from 1, got 0"):
        flatness(causal(tokenizer), TEXTS, enlarge=0, **options)


def test_correlation_is_refused_between_different_losses(run_folder: Path) -> None:
    report = flatness(str(run_folder), TEXTS, samples=8, n_probes=1)
    with pytest.raises(ValueError, match="not the same pre-training loss"):
        report.rank_correlation([0.1, 0.2, 0.3], max_gap=1e-9)
    order = sorted(range(3), key=lambda i: report.checkpoints[i].trace.trace)
    scores = [0.0, 0.0, 0.0]
    for rank, place in enumerate(order):
        scores[place] = -float(rank)
    assert report.rank_correlation(scores, max_gap=10) == pytest.approx(-1)
    with pytest.raises(ValueError, match="one for each of the 3 checkpoints"):
        report.rank_correlation([1.0, 2.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"estimator": "hutch"}, "estimator must be"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"min_length": 1}, "min_length must lie from 2"),
        ({"min_length": 100}, "no text is long enough|no text has 100 tokens"),
        ({"n_probes": 0}, "n_probes must be at least 1"),
        ({"estimator": "exact", "samples": 1, "exclude": "*"}, "no trained parameter"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=message):
        flatness(causal(tokenizer), TEXTS, tokenizer=tokenizer, **options)


def test_weights_that_are_not_finite_are_named(tokenizer: Any) -> None:
    model = causal(tokenizer)
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(InputError, match="batch 0: the loss is nan"):
        flatness(model, TEXTS, tokenizer=tokenizer, samples=2)


def test_an_operation_without_second_derivative_is_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x: Any) -> Any:
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            raise RuntimeError("derivative for aten::fused is not implemented")

    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = Once.apply(super().forward(x))
            return doubled

    with pytest.raises(InputError, match='attn_implementation="eager"'):
        hessian_trace(Model(2, 2), [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))])


def test_a_model_trained_on_real_text(real_data: Path, tmp_path: Path, tokenizer: Any) -> None:
    texts = sorted(real_data.rglob("*.txt"))
    if not texts:
        pytest.skip("no text file among the real data")
    lines = [line for line in texts[0].read_text(encoding="utf-8", errors="replace").splitlines() if len(line) > 40]
    report = flatness(causal(tokenizer), lines[:50], tokenizer=tokenizer, samples=16, n_probes=2, max_length=48)
    assert math.isfinite(report.trace.trace)
    assert report.trace.stderr > 0
