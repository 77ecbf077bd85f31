"""Scores of the three backbones against their formulas, written densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lossmith.errors import InputError
from lossmith.tasks.recommendation import Interactions, LightGCN, MatrixFactorization, NeuMF
from lossmith.tasks.recommendation.backbones import make_backbone

PAIRS = [("a", "x"), ("a", "y"), ("b", "y"), ("c", "y"), ("c", "z")]


def table() -> Interactions:
    # "w" and "d" have no interactions.
    return Interactions.from_pairs(*zip(*PAIRS, strict=True), known_users="abcd", known_items="wxyz")


def dense_light_gcn(model: LightGCN, interactions: Interactions) -> tuple[torch.Tensor, torch.Tensor]:
    n, m = len(interactions.users), len(interactions.items)
    adjacency = torch.zeros(n + m, n + m, dtype=torch.float64)
    for u, i in zip(interactions.rows, interactions.indices, strict=True):
        adjacency[u, n + i] = adjacency[n + i, u] = 1
    root = adjacency.sum(1).clamp_min(1).rsqrt()
    smooth = root[:, None] * adjacency * root
    layer = torch.cat([model.users.weight, model.items.weight])
    layers = [layer]
    for _ in range(model.layers):
        layers.append(smooth @ layers[-1])
    mean = torch.stack(layers).mean(0)
    return mean[:n], mean[n:]


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_light_gcn_is_the_mean_of_smoothed_layers(layers: int) -> None:
    torch.manual_seed(0)
    interactions = table()
    model = LightGCN(interactions, 5, layers=layers).double()
    users, items = dense_light_gcn(model, interactions)
    expected = users @ items.T
    # The graph is held in float32 numbers; its precision is what remains.
    model.graph = model.graph.double()
    found = model.scores_of(model.tables(), torch.arange(4))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    g1 = torch.autograd.grad(found.square().sum(), model.items.weight)[0]
    g2 = torch.autograd.grad(expected.square().sum(), model.items.weight)[0]
    torch.testing.assert_close(g1, g2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["mf", "lightgcn", "neumf"])
def test_scores_of_pairs_pools_and_whole_rows_agree(name: str) -> None:
    torch.manual_seed(0)
    model = make_backbone(name, table(), 6)
    users, items = torch.tensor([0, 2, 3]), torch.tensor([[0, 1], [2, 3], [1, 1]])
    tables = model.tables()
    pools = model.score(tables, users[:, None], items)
    rows = model.scores_of(tables, users)
    torch.testing.assert_close(pools, rows.gather(1, items), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.score(tables, users, items[:, 1]), pools[:, 1], atol=1e-6, rtol=1e-5)
    assert model.scores_of(tables, users[:0]).shape == (0, 4)


def test_matrix_factorisation_starts_small_and_is_a_product() -> None:
    torch.manual_seed(0)
    model = MatrixFactorization(300, 200, 16)
    assert float(model.users.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    found = model.score(model.tables(), torch.tensor([3]), torch.tensor([7]))
    assert float(found.detach()) == pytest.approx(
        float((model.users.weight[3] @ model.items.weight[7]).detach()), abs=1e-6
    )
    norm = model.triple_scores(model.tables(), *(torch.tensor([i]) for i in (3, 7, 8)))[2]
    rows = torch.stack([model.users.weight[3], model.items.weight[7], model.items.weight[8]])
    assert float(norm) == pytest.approx(float(rows.square().sum()), rel=1e-6)


def test_neural_factorisation_is_its_formula() -> None:
    torch.manual_seed(0)
    model = NeuMF(4, 5, 6)
    (p, p2), (q, q2) = model.users.weight[1].split(6), model.items.weight[2].split(6)
    hidden = torch.nn.functional.leaky_relu(model.network[0](torch.cat([p2, q2])))
    last = torch.nn.functional.leaky_relu(model.network[2](hidden))
    expected = torch.cat([p * q, last]).sum()  # v starts as ones
    found = model.score(model.tables(), torch.tensor([1]), torch.tensor([2]))
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("name", ["mf", "lightgcn", "neumf"])
def test_the_choice_sees_the_pool_and_carries_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = make_backbone(name, table(), 6)
    users, items, negatives = torch.tensor([[0], [2]]), torch.tensor([[1, 2], [2, 3]]), torch.tensor([[3], [0]])
    seen = []

    def choose(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        seen.append((positive, negative))
        return torch.tensor([1, 0])

    chosen = model(users, items, negatives, choose)
    plain = model(users, torch.tensor([[2], [2]]), negatives)
    assert not seen[0][0].requires_grad
    assert seen[0][0].shape == (2, 2)
    torch.testing.assert_close(seen[0][0].gather(1, chosen.column[:, None])[:, 0], chosen.positive.detach())
    for x, y in zip(chosen[:3], plain[:3], strict=True):
        assert torch.equal(x, y)
    # The same gradient as that of the baseline, given the same triple.
    parameters = list(model.parameters())
    first = torch.autograd.grad((chosen.positive - chosen.negative).sum(), parameters, allow_unused=True)
    second = torch.autograd.grad((plain.positive - plain.negative).sum(), parameters, allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_sizes_and_names() -> None:
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        MatrixFactorization(2, 2, 0)
    with pytest.raises(ValueError, match="layers must be >= 0"):
        LightGCN(table(), 2, layers=-1)
    with pytest.raises(InputError, match="did you mean 'lightgcn'"):
        make_backbone("lightgnc", table(), 2)


def test_the_graph_is_sparse() -> None:
    many = Interactions.from_pairs(range(3000), range(3000), known_items=[str(i) for i in range(50_000)])
    graph = LightGCN(many, 2).graph
    assert graph.shape == (53_000, 53_000)
    assert graph.values().numel() == 6000
    assert np.allclose(graph.values(), 1)
