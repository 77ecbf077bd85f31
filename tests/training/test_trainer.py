"""The Trainer against explicit computations in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from lossmith.data import PackedCollator, PaddedCollator, prepare
from lossmith.data.weighting import linupper, loss_weights, uniform
from lossmith.training import Classification, NextToken, NonFiniteLossError, RunRecord, Trainer
from lossmith.training.models import with_exact_norms

transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def corpus(text_folder: Path) -> Any:
    return prepare(text_folder, vocab_size=300, sequence_length=24)


def tiny(vocab: int, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, **options,
    )  # fmt: skip
    return with_exact_norms(LlamaForCausalLM(config).to(dtype)) if dtype == torch.float64 else LlamaForCausalLM(config)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "seed": 3, "data_seed": 3, "max_grad_norm": 1.0,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def train(
    corpus: Any,
    folder: Path,
    *,
    collator: Any = None,
    objective: Any = None,
    weighting: Any = None,
    model: Any = None,
    resume: Any = None,
    **options: Any,
) -> tuple[Trainer, list[tuple[float, float]]]:
    model = model if model is not None else tiny(len(corpus.tokenizer))
    trainer = Trainer(
        model,
        arguments(folder, **options),
        objective=objective or NextToken(),
        weighting=weighting,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=collator or PaddedCollator(corpus.tokenizer.pad_token_id),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [(m["loss"], m["grad_norm"]) for m in trainer.state.log_history if "grad_norm" in m]


def check_close(a: list[tuple[float, float]], b: list[tuple[float, float]], tolerance: float) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("weighting", [pytest.param("uniform", marks=pytest.mark.slow), "linupper"])
def test_every_layout_gives_one_trajectory(corpus: Any, tmp_path: Path, weighting: str) -> None:
    """Micro-batch size, accumulation, chunk size, padded or packed: float64 to 1e-9 per step."""

    def run(micro: int, packed: bool = False, chunk: int | None = None) -> list[tuple[float, float]]:
        return train(
            corpus,
            tmp_path,
            objective=NextToken(chunk_size=chunk),
            weighting=uniform() if weighting == "uniform" else linupper(r=0.3),
            collator=PackedCollator() if packed else None,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
        )[1]

    whole = run(8)
    for micro, packed, chunk in [
        (4, False, None),
        (1, False, 7),
        (8, True, None),
        (2, True, 5),
        (8, False, 16),
    ]:
        check_close(run(micro, packed, chunk), whole, 1e-9)


def test_float32_layouts_agree_to_1e_5(corpus: Any, tmp_path: Path) -> None:
    runs = []
    for micro in (8, 2):
        model = tiny(len(corpus.tokenizer), dtype=torch.float32)
        _, run = train(
            corpus, tmp_path, model=model, weighting=linupper(r=0.3),
            per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
        )  # fmt: skip
        runs.append(run)
    check_close(runs[0], runs[1], 1e-5)


def test_the_step_is_that_of_explicit_per_example_gradients(corpus: Any, tmp_path: Path) -> None:
    """sum_i w_i grad l_i with each gradient computed alone, one SGD step."""
    model = tiny(len(corpus.tokenizer))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer, log = train(
        corpus, tmp_path, model=model, weighting=linupper(r=0.4), max_steps=1, optim="sgd", learning_rate=0.1,
        max_grad_norm=1e9, gradient_accumulation_steps=2, per_device_train_batch_size=4, weight_decay=0.0,
    )  # fmt: skip
    order = list(trainer._get_train_sampler())[:8]
    reference = tiny(len(corpus.tokenizer))
    losses, gradients = [], []
    for index in order:
        batch = PaddedCollator(corpus.tokenizer.pad_token_id)([corpus.train[index]])
        logits = reference(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        rows = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none")
        loss = rows.sum() / (batch["labels"][0, 1:] != -100).sum()
        gradients.append(torch.autograd.grad(loss, list(reference.parameters())))
        losses.append(loss.detach())
    weights = loss_weights(torch.stack(losses), "linupper", r=0.4)
    assert log[0][0] == pytest.approx(float((weights * torch.stack(losses)).sum()), rel=1e-12)
    for j, (name, _) in enumerate(reference.named_parameters()):
        expected = start[name] - 0.1 * sum(w * g[j] for w, g in zip(weights, gradients, strict=True))
        torch.testing.assert_close(dict(model.named_parameters())[name], expected, rtol=1e-10, atol=1e-12)


def test_infinite_temperature_and_burn_in_are_the_baseline_bit_for_bit(corpus: Any, tmp_path: Path) -> None:
    baseline = train(corpus, tmp_path, weighting=None)[1]
    assert train(corpus, tmp_path, weighting=linupper(r=math.inf))[1] == baseline
    assert train(corpus, tmp_path, weighting=linupper(r=0.1, burn_in_steps=100))[1] == baseline


def test_uniform_weights_are_the_plain_trainer(corpus: Any, tmp_path: Path) -> None:
    """With sequences of equal length the mean of sequence means is the token mean of transformers.Trainer."""
    collator = PaddedCollator(corpus.tokenizer.pad_token_id)
    rows = [row for row in corpus.train if row["segments"] == [24]][:8]
    rows = rows * 4 if rows else [{**corpus.train[0], "segments": [len(corpus.train[0]["input_ids"])]}] * 32
    length = len(rows[0]["input_ids"])
    rows = [row for row in rows if len(row["input_ids"]) == length]

    def plain(batch: list[Any]) -> dict[str, Any]:
        return {k: v for k, v in collator(batch).items() if k in ("input_ids", "labels", "position_ids")}

    logs = []
    for objective in (NextToken(), None):
        model = tiny(len(corpus.tokenizer))
        trainer = Trainer(
            model, arguments(tmp_path, remove_unused_columns=False), objective=objective, train_dataset=rows,
            data_collator=collator if objective else plain,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        torch.manual_seed(0)
        if objective is None:
            from lossmith.data.sampling import PermutationStream

            trainer._get_train_sampler = lambda dataset=None: PermutationStream(len(rows), total=32, seed=3)
        trainer.train()
        logs.append([(m["loss"], m["grad_norm"]) for m in trainer.state.log_history if "grad_norm" in m])
    check_close(logs[0], logs[1], 1e-6)


def test_the_scoring_pass_draws_the_same_dropout_as_the_training_pass(corpus: Any, tmp_path: Path) -> None:
    """With dropout, the weights of a two-pass step are those of the losses that are then trained on."""
    seen: list[tuple[bool, torch.Tensor]] = []

    class Spy(NextToken):
        def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
            losses = super().__call__(model, batch)
            seen.append((torch.is_grad_enabled(), losses.detach()))
            return losses

    model = tiny(len(corpus.tokenizer), attention_dropout=0.5)
    train(
        corpus, tmp_path, model=model, objective=Spy(), weighting=linupper(r=0.4), max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    scored = [x for training, x in seen if not training]
    trained = [x for training, x in seen if training]
    assert len(scored) == len(trained) == 2
    for a, b in zip(scored, trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.equal(scored[0], scored[1])


def test_scored_tokens_and_their_cost_are_counted(corpus: Any, tmp_path: Path) -> None:
    """The extra forward pass of accumulation with loss weights costs a third of forward and backward."""
    flops, scored = [], []
    for weighting in (None, linupper(r=0.4)):
        trainer, _ = train(
            corpus,
            tmp_path,
            weighting=weighting,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        flops.append(trainer.state.total_flos)
        scored.append(max(m.get("scored_tokens", 0) for m in trainer.state.log_history))
    assert flops[1] / flops[0] == pytest.approx(4 / 3, rel=1e-9)
    assert scored[0] == 0
    assert scored[1] > 0


def test_the_released_variant_normalises_inside_each_micro_batch(corpus: Any, tmp_path: Path) -> None:
    _, released = train(
        corpus, tmp_path, weighting=linupper(r=0.2, variant="released"), per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    _, step = train(
        corpus,
        tmp_path,
        weighting=linupper(r=0.2),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert released[0] != pytest.approx(step[0], rel=1e-6)
    _, whole = train(corpus, tmp_path, weighting=linupper(r=0.2, variant="released"))
    check_close(whole, step, 1e-9)


def test_length_weighted_uniform_is_the_token_mean(corpus: Any, tmp_path: Path) -> None:
    rows = [corpus.train[i] for i in range(16)]
    rows = [{**row, "input_ids": row["input_ids"][: 6 + i], "segments": [6 + i]} for i, row in enumerate(rows)]
    model = tiny(len(corpus.tokenizer))
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2),
        objective=NextToken(), weighting=uniform(length_weighted=True), train_dataset=rows,
        data_collator=PaddedCollator(corpus.tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    batch = PaddedCollator(corpus.tokenizer.pad_token_id)(rows)
    with torch.no_grad():
        logits = tiny(len(corpus.tokenizer))(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-10)


def test_a_resumed_run_is_bit_identical_and_leaves_no_pickle(corpus: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "weighting": linupper(r=0.4)}
    trainer, _ = train(corpus, tmp_path / "a", **options)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    names = {p.name for p in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "scheduler.safetensors", "complete.json"} <= names
    assert not {p.suffix for p in checkpoint.iterdir()} & {".bin", ".pt", ".pth", ".pkl"}
    resumed, _ = train(
        corpus, tmp_path / "b", model=tiny(len(corpus.tokenizer), seed=9), resume=str(checkpoint), **options
    )
    assert trainer.state.log_history[-2]["step"] == resumed.state.log_history[-2]["step"] == 6
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_stops_with_step_and_examples(corpus: Any, tmp_path: Path) -> None:
    def poisoned(model: nn.Module, batch: Any) -> torch.Tensor:
        losses = NextToken()(model, batch)
        return torch.where(batch["index"] == 5, torch.nan, losses)

    for weighting in (None, linupper(r=0.4)):
        with pytest.raises(NonFiniteLossError, match=r"at step \d+ \(examples 5 of the training data\)"):
            train(corpus, tmp_path, objective=poisoned, weighting=weighting, max_steps=100)


def test_a_users_function_is_an_objective_and_a_weighting(corpus: Any, tmp_path: Path) -> None:
    """No protocol beyond being callable."""
    _, log = train(
        corpus,
        tmp_path,
        objective=lambda model, batch: NextToken()(model, batch) ** 2,
        weighting=lambda losses, step: torch.softmax(losses, 0),
        max_steps=2,
    )
    assert all(math.isfinite(loss) for loss, _ in log)


def test_a_weighting_that_breaks_its_contract_is_refused(corpus: Any, tmp_path: Path) -> None:
    for weighting in (lambda losses, step: losses, lambda losses, step: losses[:1], lambda losses, step: 3):
        with pytest.raises(ValueError, match="weighting must return"):
            train(corpus, tmp_path, weighting=weighting)


def test_evaluation_is_plain_cross_entropy_whatever_is_trained(corpus: Any, tmp_path: Path) -> None:
    trainer, _ = train(corpus, tmp_path, objective=NextToken("focal_loss(gamma=2.0)"), max_steps=1)
    metrics = trainer.evaluate()
    total, targets = 0.0, 0
    for row in corpus.validation:
        batch = PaddedCollator(corpus.tokenizer.pad_token_id)([row])
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        rows = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none")
        total, targets = total + float(rows.sum()), targets + int((batch["labels"][0, 1:] != -100).sum())
    assert metrics["eval_loss"] == pytest.approx(total / targets, rel=1e-10)
    assert metrics["eval_targets"] == targets
    assert trainer.last_evaluation is not None
    assert len(trainer.last_evaluation.targets) == len(corpus.validation)


def test_models_whose_logits_are_changed_after_the_head_use_their_own_logits() -> None:
    """A soft cap after the output layer must not be lost in the streaming head."""

    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny(50)

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return 2 * torch.tanh(self.inner(input_ids=input_ids).logits * 20)

    model = Capped()
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    expected = nn.functional.cross_entropy(
        model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(NextToken()(model, batch), expected.view(2, 5).mean(-1), rtol=1e-12, atol=1e-12)


def test_a_sequence_without_targets_has_loss_and_weight_zero(corpus: Any, tmp_path: Path) -> None:
    """Fully masked sequences neither poison the range of the losses nor count in the mean."""
    collator = PaddedCollator(corpus.tokenizer.pad_token_id)

    def masked(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        batch["labels"][batch["index"] % 2 == 1] = -100
        return batch

    _, log = train(corpus, tmp_path, collator=masked, weighting=linupper(r=0.4), max_steps=3)
    assert all(math.isfinite(loss) and loss > 1 for loss, _ in log)
    with pytest.raises(ValueError, match="no example of the batch at step 0 has a target"):
        train(
            corpus,
            tmp_path,
            collator=lambda rows: {
                **collator(rows),
                "labels": torch.full_like(collator(rows)["labels"], -100),
            },
        )


def test_metrics_reach_the_record_and_every_callback(corpus: Any, tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(dict(logs))

    record = RunRecord(tmp_path / "record", {"seed": 3})
    trainer = Trainer(
        tiny(len(corpus.tokenizer)), arguments(tmp_path / "record", eval_strategy="steps", eval_steps=2),
        objective=NextToken(), weighting=linupper(r=0.4), record=record, train_dataset=corpus.train,
        eval_dataset=corpus.validation, data_collator=PaddedCollator(corpus.tokenizer.pad_token_id),
        callbacks=[Listener()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    lines = record.metrics()
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert {
            "learning_rate",
            "grad_norm",
            "tokens",
            "seconds",
            "memory_bytes",
            "train/loss_unweighted",
        } <= line.keys()
        assert line["weights/effective_sample_size"] <= 8
    assert [line["step"] for line in lines if "eval/loss" in line] == [2, 4]
    assert any("tokens" in logs and "loss" in logs for logs in heard)
    tokens = [line["tokens"] for line in steps]
    assert tokens == sorted(tokens)
    assert tokens[0] > 0


def test_classification_is_averaged_over_labels_of_each_example() -> None:
    class Tagger(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, -100], [2, -100, -100, -100], [-100] * 4])
    losses = Classification()(Tagger(), {"x": logits, "labels": labels})
    rows = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4)
    expected = torch.stack([rows[0, :2].mean(), rows[1, 0], torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(losses, expected)
    whole = Classification("focal_loss(gamma=0.0)")(Tagger(), {"x": logits[:, 0], "labels": torch.tensor([1, 2, -100])})
    torch.testing.assert_close(
        whole[:2], nn.functional.cross_entropy(logits[:2, 0], torch.tensor([1, 2]), reduction="none")
    )
    assert whole[2] == 0


def test_weighting_without_objective_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weighting needs an objective"):
        Trainer(nn.Linear(1, 1), arguments(tmp_path), weighting=linupper())


def test_examples_without_numbers_are_all_evaluated_though_the_last_batch_is_smaller(tmp_path: Path) -> None:
    model = nn.Linear(3, 4).double()
    x, labels = torch.randn(11, 3, dtype=torch.float64), torch.randint(4, (11,))
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4),
        objective=Classification(),
        train_dataset=range(11),
        eval_dataset=range(11),
        data_collator=lambda rows: {"input": x[rows], "labels": labels[rows]},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_targets"] == 11
    assert metrics["eval_loss"] == pytest.approx(nn.functional.cross_entropy(model(x), labels).item(), abs=1e-12)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_sparse_gradients_are_measured_and_clipped_like_dense_ones(max_grad_norm: float, tmp_path: Path) -> None:
    ids, labels = torch.randint(10, (12,)), torch.randint(4, (12,))
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 5, sparse=sparse), nn.Linear(5, 4)).double()
        trainer = Trainer(
            model,
            arguments(tmp_path, optim="sgd", max_grad_norm=max_grad_norm, per_device_train_batch_size=12),
            objective=Classification(),
            train_dataset=range(12),
            data_collator=lambda rows: {"input": ids[rows], "labels": labels[rows]},
        )
        trainer.train()
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        ends.append((norms, model[0].weight.detach().clone()))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-6)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-7, atol=1e-7)


def test_without_clipping_the_norm_is_that_of_an_infinite_limit_bit_for_bit(tmp_path: Path) -> None:
    x, labels = torch.randn(12, 3), torch.randint(4, (12,))
    ends = []
    for limit in (0.0, math.inf):
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        trainer = Trainer(
            model,
            arguments(tmp_path, optim="sgd", max_grad_norm=limit, per_device_train_batch_size=12),
            objective=Classification(),
            train_dataset=range(12),
            data_collator=lambda rows: {"input": x[rows], "labels": labels[rows]},
        )
        trainer.train()
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        assert len(norms) == 4
        ends.append((norms, model.weight.detach().clone()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_training_step_does_not_search_the_path_for_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    def steps(number: int) -> int:
        before = len(searched)
        Trainer(
            nn.Linear(3, 4),
            arguments(tmp_path, max_steps=number, per_device_train_batch_size=2),
            objective=Classification(),
            train_dataset=range(12),
            data_collator=lambda rows: {"input": torch.ones(len(rows), 3), "labels": torch.zeros(len(rows)).long()},
        ).train()
        return len(searched) - before

    searched: list[str] = []
    search = importlib.util.find_spec
    steps(1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: searched.append(str(a)) or search(*a))
    assert steps(9) == steps(1)
