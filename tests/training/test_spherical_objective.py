"""A spherical head in the Trainer equals nn.Linear with the same loss and SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lossmith.heads import SphericalHead
from lossmith.losses import z_loss
from lossmith.training import Classification, NextToken, SphericalHeadCallback, SphericalObjective, Trainer
from lossmith.training.spherical import topk_errors

OPTIONS = {"a": 0.5, "b": 3.0}


class Network(nn.Module):
    """A body and an output layer, plain or spherical."""

    def __init__(self, spherical: bool):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        plain = nn.Linear(8, 20, bias=False)
        self.double()
        plain = plain.double()
        self.classifier = SphericalHead.from_linear(plain, **OPTIONS) if spherical else plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


def columns() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(20, (12,), generator=generator)
    labels[4] = -100
    return {"x": x, "labels": labels}


def trainer(model: nn.Module, folder: Path, spherical: bool, **options: Any) -> Trainer:
    data = columns()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 12,
            "learning_rate": 0.3,
            "optim": "sgd",
            "lr_scheduler_type": "linear",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
            **options,
        },
    )
    return Trainer(
        model,
        arguments,
        objective=SphericalObjective() if spherical else Classification("z_loss", **OPTIONS),
        train_dataset=range(12),
        eval_dataset=range(12),
        data_collator=lambda rows: {k: v[rows] for k, v in data.items()},
        callbacks=[SphericalHeadCallback()] if spherical else [],
    )


@pytest.mark.parametrize("layout", [(12, 1), (4, 3), (3, 4)], ids=str)
def test_training_equals_the_dense_layer_whatever_the_micro_batches(layout: tuple[int, int], tmp_path: Path) -> None:
    """With a falling learning rate."""
    size = {"per_device_train_batch_size": layout[0], "gradient_accumulation_steps": layout[1]}
    plain, spherical = Network(False), Network(True)
    runs = [trainer(plain, tmp_path, False, **size), trainer(spherical, tmp_path, True, **size)]
    for run in runs:
        run.train()
    losses = [[line["loss"] for line in run.state.log_history if "grad_norm" in line] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)
    torch.testing.assert_close(spherical.classifier.weight, plain.classifier.weight.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spherical.body[0].weight, plain.body[0].weight, rtol=1e-9, atol=1e-9)
    metrics = runs[1].evaluate()
    data = columns()
    expected = z_loss(plain(data["x"]), data["labels"], **OPTIONS).sum() / 11
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-8)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Network(True)
    trainer(whole, tmp_path / "whole", True, save_strategy="steps", save_steps=3).train()
    again = Network(True)
    trainer(again, tmp_path / "again", True).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_language_model_trains_through_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(40, (3, 6))
    batch = {"input_ids": ids, "labels": ids}
    dense = NextToken("z_loss", **OPTIONS)(model, batch)
    model.lm_head = SphericalHead.from_linear(model.lm_head, **OPTIONS)
    losses = SphericalObjective()(model, batch)
    torch.testing.assert_close(losses, dense, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    model.lm_head.step(0.5)
    assert SphericalObjective()(model, batch).mean() < losses.mean()


def test_top_k_errors_agree_for_scores_and_heads() -> None:
    head = SphericalHead(4, 30, init_std=1.0)
    hidden, targets = torch.randn(50, 4), torch.randint(30, (50,))
    by_head = topk_errors(head, hidden, targets, (1, 5, 10))
    assert by_head == topk_errors(head.scores(hidden), None, targets, (1, 5, 10))
    assert by_head[1] >= by_head[5] >= by_head[10]


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no SphericalHead in the place of its output layer"):
        trainer(Network(False), tmp_path, True).train()
    with pytest.raises(ValueError, match="lr_scale must be a finite number > 0"):
        SphericalHeadCallback(0)

    class Many:
        world_size, fp16 = 2, False

    with pytest.raises(ValueError, match="trains on one process"):
        SphericalHeadCallback().on_train_begin(Many(), None, None, model=Network(True))


def test_bfloat16_training_leaves_the_head_exact(tmp_path: Path) -> None:
    """The body computes in bfloat16 under autocast, the head in float32."""
    model = Network(True).float()
    data = columns()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=12,
        learning_rate=0.3,
        optim="sgd",
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    run = Trainer(
        model,
        arguments,
        objective=SphericalObjective(),
        train_dataset=range(12),
        data_collator=lambda rows: {"x": data["x"][rows].float(), "labels": data["labels"][rows]},
        callbacks=[SphericalHeadCallback()],
    )
    run.train()
    assert model.classifier.state_dict()["steps"] == 20
    assert model.classifier.v.dtype == torch.float32
    assert max(model.classifier.consistency().values()) < 1e-6
