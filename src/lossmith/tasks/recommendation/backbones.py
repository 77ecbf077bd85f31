"""Models that score (user, item) pairs from embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError, did_you_mean
from lossmith.tasks.recommendation.interactions import Interactions

Tables = tuple[Tensor, Tensor]
Choose = Callable[[Tensor, Tensor], Tensor]


class Scored(NamedTuple):
    """Scores of the triples that are trained on, the norm that the L2 term takes, and which of each pool it was."""

    positive: Float[Tensor, " batch"]
    negative: Float[Tensor, " batch"]
    squared_norm: Float[Tensor, " batch"]
    column: Int[Tensor, " batch"]


class Backbone(nn.Module):
    """Embeddings of users and items, and a score of each pair.

    ``forward(users, items, negatives, choose)`` takes a pool of items per user. ``choose`` sees the scores of the pool
    and of the negatives, without gradient, and returns the column to train on; without it the first is taken.
    Embeddings are propagated once for both.
    """

    def __init__(self, n_users: int, n_items: int, dim: int):
        super().__init__()
        for name, value in (("n_users", n_users), ("n_items", n_items), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.users, self.items = nn.Embedding(n_users, dim), nn.Embedding(n_items, dim)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def tables(self) -> Tables:
        """What scores are made of: one row per user and one per item."""
        return self.users.weight, self.items.weight

    def score(
        self, tables: Tables, users: Int[Tensor, "*#batch"], items: Int[Tensor, "*#batch"]
    ) -> Float[Tensor, "*batch"]:
        """Scores of pairs."""
        return self.features(tables, users, items).sum(-1)

    def features(self, tables: Tables, users: Tensor, items: Tensor) -> Float[Tensor, "*batch features"]:
        """What adds up to the score."""
        return F.embedding(users, tables[0]) * F.embedding(items, tables[1])

    def scores_of(self, tables: Tables, users: Int[Tensor, " users"]) -> Float[Tensor, "users items"]:
        """Scores of all items."""
        return F.embedding(users, tables[0]) @ tables[1].T

    def squared_norm(self, users: Tensor, items: Tensor, negatives: Tensor) -> Float[Tensor, " batch"]:
        """Of the embeddings that a triple has before propagation."""
        rows = (self.users(users), self.items(items), self.items(negatives))
        return sum((row.square().sum(-1) for row in rows[1:]), rows[0].square().sum(-1))

    def forward(
        self,
        users: Int[Tensor, "batch pool"],
        items: Int[Tensor, "batch pool"],
        negatives: Int[Tensor, "batch pool"],
        choose: Choose | None = None,
    ) -> Scored:
        """Score the triples of one column of each row."""
        tables = self.tables()
        column = torch.zeros(len(users), dtype=torch.long, device=users.device)
        if choose is not None:
            with torch.no_grad():
                # One user and one negative serve the whole row where they are the same for all of it.
                column = choose(self.score(tables, users, items), self.score(tables, users, negatives))
        user, item, negative = (_at(x, column) for x in (users, items, negatives))
        return Scored(
            self.score(tables, user, item),
            self.score(tables, user, negative),
            self.squared_norm(user, item, negative),
            column,
        )


class MatrixFactorization(Backbone):
    """The product of a user's and an item's embedding.

    .. math:: s(u, i) = \\langle p_u, q_i \\rangle
    """


class LightGCN(Backbone):
    r"""Matrix factorisation of embeddings that were smoothed over the graph of interactions.

    .. math:: E_{t+1} = D^{-1/2} A D^{-1/2} E_t, \qquad E = \tfrac{1}{L+1} \sum_{t=0}^{L} E_t

    over the graph of users and items; a node without interactions has degree 1.

    Args:
        interactions: the graph, that of the (noisy) training data.
        dim: of the embeddings.
        layers: ``L``.

    Source: He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation", SIGIR 2020,
    arXiv 2002.02126, equations 3 to 8.
    """

    graph: Tensor

    def __init__(self, interactions: Interactions, dim: int, *, layers: int = 3):
        super().__init__(len(interactions.users), len(interactions.items), dim)
        if layers < 0:
            raise ValueError(f"layers must be >= 0, got {layers}")
        self.layers = layers
        self.register_buffer("graph", normalized_graph(interactions), persistent=False)

    def tables(self) -> Tables:
        """Smoothed embeddings."""
        n = self.users.num_embeddings
        layer = total = torch.cat([self.users.weight, self.items.weight])
        for _ in range(self.layers):
            layer = _SymmetricProduct.apply(self.graph, layer)
            total = total + layer
        total = total / (self.layers + 1)
        return total[:n], total[n:]


class NeuMF(Backbone):
    r"""A product of embeddings beside a small network over two others.

    .. math:: s(u, i) = v \cdot [\,p_u \odot q_i;\ \mathrm{MLP}([p'_u; q'_i])\,]

    with layers of ``2 dim``, ``dim`` and ``dim / 2`` and leaky ReLU; ``v`` starts as ones. The L2 term is the squared
    norm of what adds up to the two scores, as in the released code of "Personalized Denoising Implicit Feedback".

    Source: He et al., "Neural Collaborative Filtering", WWW 2017, arXiv 1708.05031.
    """

    def __init__(self, n_users: int, n_items: int, dim: int):
        super().__init__(n_users, n_items, 2 * dim)
        self.dim, half = dim, max(1, dim // 2)
        self.network = nn.Sequential(nn.Linear(2 * dim, dim), nn.LeakyReLU(), nn.Linear(dim, half), nn.LeakyReLU())
        self.output = nn.Parameter(torch.ones(dim + half))

    def features(self, tables: Tables, users: Tensor, items: Tensor) -> Tensor:
        """Products beside the network's output, each times its ``v``."""
        user, item = torch.broadcast_tensors(F.embedding(users, tables[0]), F.embedding(items, tables[1]))
        (p, p2), (q, q2) = user.split(self.dim, -1), item.split(self.dim, -1)
        return torch.cat([p * q, self.network(torch.cat([p2, q2], -1))], -1) * self.output

    def scores_of(self, tables: Tables, users: Tensor) -> Tensor:
        """Scores of all items, user by user."""
        every = torch.arange(len(tables[1]), device=users.device)
        scores = [self.score(tables, user, every) for user in users]
        return torch.stack(scores) if scores else self.output.new_zeros(0, len(every))

    def squared_norm(self, users: Tensor, items: Tensor, negatives: Tensor) -> Tensor:
        """Of what adds up to the two scores."""
        tables = self.tables()
        both = (self.features(tables, users, items), self.features(tables, users, negatives))
        return both[0].square().sum(-1) + both[1].square().sum(-1)


BACKBONES = ("mf", "lightgcn", "neumf")


def make_backbone(name: str, interactions: Interactions, dim: int, layers: int = 3) -> Backbone:
    """``mf``, ``lightgcn`` or ``neumf`` for the users and items of a table."""
    sizes = len(interactions.users), len(interactions.items)
    if name == "mf":
        return MatrixFactorization(*sizes, dim)
    if name == "lightgcn":
        return LightGCN(interactions, dim, layers=layers)
    if name == "neumf":
        return NeuMF(*sizes, dim)
    raise InputError(f"unknown backbone '{name}': {did_you_mean(name, BACKBONES)}")


def normalized_graph(interactions: Interactions) -> Float[Tensor, "nodes nodes"]:
    """``D^{-1/2} A D^{-1/2}`` of users and items as a sparse matrix: memory grows with interactions, not nodes."""
    n_users, n = len(interactions.users), len(interactions.users) + len(interactions.items)
    rows, columns = interactions.rows, interactions.indices + n_users
    ends, starts = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    degree = np.maximum(np.bincount(ends, minlength=n), 1)
    values = 1 / np.sqrt(degree[ends] * degree[starts].astype(float))
    indices = torch.from_numpy(np.stack([ends, starts]))
    graph = torch.sparse_coo_tensor(indices, torch.from_numpy(values).float(), (n, n), check_invariants=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is new
        return graph.coalesce().to_sparse_csr()


class _SymmetricProduct(torch.autograd.Function):
    """A symmetric matrix times a dense one. torch would transpose the matrix in the backward pass; no need."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, dense: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix.to(dense.dtype) @ dense if matrix.dtype != dense.dtype else matrix @ dense

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, _SymmetricProduct.apply(ctx.matrix, gradient.contiguous())


def _at(values: Tensor, column: Tensor) -> Tensor:
    """Each row's value in its column; a single column serves all."""
    return values[:, 0] if values.shape[1] == 1 else values.gather(1, column.unsqueeze(1)).squeeze(1)
