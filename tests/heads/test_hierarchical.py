"""Hierarchical softmax: probabilities that sum to one, and losses that are their logarithms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lossmith.heads import HierarchicalSoftmax

COUNTS = torch.tensor([3, 50, 1, 7, 7, 0, 20, 2, 9, 4, 1])
every_tree = pytest.mark.parametrize("tree", ["two-level", "balanced", "huffman"])


def head(tree: Any, **options: Any) -> HierarchicalSoftmax:
    torch.manual_seed(0)
    return HierarchicalSoftmax(5, 11, tree=tree, counts=COUNTS, init_std=1.0, **options).double()


def hidden(rows: int = 7) -> torch.Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@every_tree
def test_probabilities_sum_to_one_and_losses_are_their_logarithms(tree: str) -> None:
    h, model = hidden(11), head(tree)
    log_probs = model.log_prob(h)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(11, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    targets = torch.arange(11)
    torch.testing.assert_close(model(h, targets), -log_probs.gather(-1, targets[:, None])[:, 0])


@every_tree
def test_the_best_classes_are_those_of_the_dense_probabilities(tree: str) -> None:
    model, h = head(tree), hidden().reshape(7, 1, 5)
    best = model.topk(h, 4)
    expected = model.log_prob(h).topk(4)
    assert torch.equal(best.indices, expected.indices)
    torch.testing.assert_close(best.values, expected.values)


@every_tree
def test_sparse_gradients_equal_dense_ones(tree: str) -> None:
    targets = torch.tensor([1, 1, 5, 10, 0, 3, 8])
    models = [head(tree, sparse=sparse) for sparse in (True, False)]
    for model in models:
        model(hidden(), targets).sum().backward()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad.to_dense(), b.grad)


def test_huffman_puts_frequent_classes_near_the_root() -> None:
    lengths = head("huffman").turns.abs().sum(-1)[head("huffman").place]
    assert lengths[1] == lengths.min() == 1
    assert lengths[5] == lengths.max()
    expected = (lengths * COUNTS).sum() / COUNTS.sum()
    balanced = head("balanced").turns.abs().sum(-1)
    assert expected < (balanced * COUNTS).sum() / COUNTS.sum()


def test_a_balanced_tree_has_logarithmic_depth() -> None:
    model = HierarchicalSoftmax(2, 1000, tree="balanced")
    assert model.turns.abs().sum(-1).min() >= 9
    assert model.turns.shape[1] == 10


@every_tree
def test_ignored_rows_are_zeros_and_an_empty_batch_works(tree: str) -> None:
    model, h = head(tree), hidden(3)
    h[1] = float("nan")
    losses = model(h, torch.tensor([2, -100, 4]))
    assert losses[1] == 0
    losses.sum().backward()
    assert all(torch.isfinite(p.grad.to_dense()).all() for p in model.parameters())
    assert model(h[:0], torch.tensor([], dtype=torch.long)).shape == (0,)


@every_tree
def test_gradients_are_those_of_the_value(tree: str) -> None:
    model, targets = head(tree, sparse=False), torch.tensor([1, 10, 5])
    assert torch.autograd.gradcheck(lambda h: model(h, targets), hidden(3).requires_grad_())


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="a huffman tree needs counts"):
        HierarchicalSoftmax(5, 11, tree="huffman")
    with pytest.raises(ValueError, match="tree must be two-level"):
        HierarchicalSoftmax(5, 11, tree="binary")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counts must be 11 numbers"):
        HierarchicalSoftmax(5, 11, counts=COUNTS[:3])
    with pytest.raises(ValueError, match=r"targets must be in \[0, 11\), got 11"):
        head("two-level")(hidden(1), torch.tensor([11]))
    with pytest.raises(ValueError, match="must have 5 features"):
        head("two-level")(hidden(1)[:, :4], torch.tensor([1]))
