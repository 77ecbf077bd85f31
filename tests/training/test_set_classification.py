"""A loss of the whole batch in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lossmith.losses import set_dice_loss, set_tversky_loss
from lossmith.training import SetClassification, Trainer


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def columns() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (6, 5), generator=generator)
    labels[0, 3:] = -100
    labels[4] = -100
    return {"x": torch.randn(6, 5, 4, generator=generator, dtype=torch.float64), "labels": labels}


@pytest.mark.parametrize("loss", [set_dice_loss, set_tversky_loss])
def test_the_mean_over_examples_is_the_loss_of_all_tokens_together(loss: Any) -> None:
    model, batch = Tagger(), columns()
    values = SetClassification(loss)(model, batch)
    expected = loss(model(batch["x"]).flatten(0, 1), batch["labels"].flatten()).sum()
    torch.testing.assert_close(values[torch.tensor([0, 1, 2, 3, 5])].mean(), expected)
    assert values[4] == 0


def trainer(folder: Path, **options: Any) -> Trainer:
    data = columns()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=0.1,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(
        Tagger(),
        arguments,
        objective=SetClassification(),
        train_dataset=range(6),
        data_collator=lambda rows: {k: v[rows] for k, v in data.items()},
    )


def test_training_descends_on_the_loss_of_the_set(tmp_path: Path) -> None:
    run, model, data = trainer(tmp_path, per_device_train_batch_size=6), Tagger(), columns()
    run.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        set_dice_loss(model(data["x"]), data["labels"]).sum().backward()
        optimizer.step()
    torch.testing.assert_close(run.model.layer.weight, model.layer.weight, rtol=1e-10, atol=1e-10)


def test_a_cut_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one loss of the whole batch.*gradient_accumulation_steps=1"):
        trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3).train()
