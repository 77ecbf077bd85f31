"""Span extraction with losses of the whole batch, and with row-wise ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lossmith.losses import dice_loss, set_dice_loss, set_tversky_loss
from lossmith.training import SpanExtraction, Trainer
from lossmith.training.span_extraction import best_spans


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForQuestionAnswering(config).eval()


def batch(number: int = 8) -> dict[str, torch.Tensor]:
    """The answer is the only token 7, or none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 20, (number, 10), generator=generator)
    place = torch.randint(1, 8, (number,), generator=generator)
    ids[torch.arange(number), place] = 7
    mask = torch.ones(number, 10, dtype=torch.long)
    mask[:, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "start_positions": place, "end_positions": place.clone()}


@pytest.mark.parametrize("loss", [set_dice_loss, set_tversky_loss])
def test_the_mean_is_the_loss_of_all_positions_that_count(loss: Any) -> None:
    m, b = model(), batch()
    values = SpanExtraction(loss)(m, b)
    output = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
    expected = 0.0
    for logits in (output.start_logits, output.end_logits):
        labels = torch.nn.functional.one_hot(b["start_positions"], 10)
        keep = b["attention_mask"].bool()
        expected += loss(logits[keep].unsqueeze(-1), labels[keep]).sum() / 2
    torch.testing.assert_close(values.mean(), expected)


def test_a_row_wise_loss_is_averaged_over_the_positions() -> None:
    m, b = model(), batch()
    values = SpanExtraction(dice_loss)(m, b)
    output = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
    labels = torch.nn.functional.one_hot(b["start_positions"], 10)[:, :8]
    parts = [dice_loss(x[:, :8].unsqueeze(-1), labels).mean(-1) for x in (output.start_logits, output.end_logits)]
    torch.testing.assert_close(values, sum(parts) / 2)
    assert not SpanExtraction(dice_loss).relates_examples


def test_labels_by_position_are_the_same_as_indices() -> None:
    m, b = model(), batch()
    wide = {k: torch.nn.functional.one_hot(v, 10) if k.endswith("positions") else v for k, v in b.items()}
    torch.testing.assert_close(SpanExtraction()(m, wide), SpanExtraction()(m, b))
    none = {**b, "start_positions": torch.full((8,), -100), "end_positions": torch.full((8,), -100)}
    assert torch.isfinite(SpanExtraction()(m, none)).all()


def test_training_finds_the_answers(tmp_path: Path) -> None:
    m, b = model().train(), batch(32)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        m,
        arguments,
        objective=SpanExtraction(),
        train_dataset=range(32),
        eval_dataset=range(32),
        data_collator=lambda rows: {k: v[rows] for k, v in b.items()},
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9


def test_the_best_span_ends_after_it_begins_and_inside_the_mask() -> None:
    start, end = torch.tensor([[0.0, 6, 1, 9]]), torch.tensor([[9.0, 0, 4, 9]])
    assert best_spans(start, end).tolist() == [[3, 3]]
    counted = torch.tensor([[True, True, True, False]])
    assert best_spans(start, end, counted).tolist() == [[1, 2]]
    far = best_spans(torch.tensor([[9.0, 0, 8]]), torch.tensor([[0.0, 0, 9]]), longest=2)
    assert far.tolist() == [[2, 2]]


def test_wrong_positions_are_named() -> None:
    b = batch()
    with pytest.raises(ValueError, match="start_positions must be below the length 10, got 10"):
        SpanExtraction()(model(), {**b, "start_positions": torch.full((8,), 10)})
    with pytest.raises(ValueError, match="one index per example or have shape"):
        SpanExtraction()(model(), {**b, "start_positions": torch.zeros(8, 3)})
