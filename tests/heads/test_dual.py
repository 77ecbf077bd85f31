"""Two heads on one backbone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lossmith.heads import DualHead, attach_dual_head, dual_head, export_main_head


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_attaching_changes_neither_the_logits_nor_other_random_numbers() -> None:
    plain, model = network(), network()
    state = torch.random.get_rng_state()
    attach_dual_head(model, "mlp")
    assert torch.equal(state, torch.random.get_rng_state())
    x = torch.randn(5, 4)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain(x))


def test_exporting_gives_the_plain_model_back() -> None:
    model = network()
    names = list(model.state_dict())
    attach_dual_head(model)
    assert len(model.state_dict()) == 6
    assert list(export_main_head(model).state_dict()) == names
    with pytest.raises(ValueError, match="no dual head to export"):
        export_main_head(model)


def test_auxiliary_logits_come_with_training_mode_and_any_batch_shape() -> None:
    head = DualHead(nn.Linear(4, 3), "mlp", width=8)
    head(torch.randn(2, 5, 4))
    assert head.auxiliary_logits.shape == (2, 5, 3)
    head.eval()(torch.randn(2, 4))
    assert head.auxiliary_logits is None


def test_a_hugging_face_classifier_takes_it() -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=5
    )
    model = transformers.BertForSequenceClassification(config)
    head = attach_dual_head(model)
    assert model(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 5)
    assert dual_head(model) is head
    assert head.auxiliary_logits.shape == (2, 5)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="no linear output layer 'classifer'; its last linear layers: 0, 2"):
        attach_dual_head(network(), name="classifer")
    with pytest.raises(ValueError, match=r"call lossmith\.heads.attach_dual_head"):
        dual_head(network())
    with pytest.raises(ValueError, match="auxiliary must be linear, mlp or a module"):
        attach_dual_head(network(), "nonlinear")  # type: ignore[arg-type]
    head = DualHead(nn.Linear(4, 3), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="must give 3 logits per example"):
        head(torch.zeros(2, 4))
