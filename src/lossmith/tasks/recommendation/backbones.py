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

    def pool_scores(
        self,
        tables: Tables,
        users: Int[Tensor, "batch columns"],
        items: Int[Tensor, "batch pool"],
        negatives: Int[Tensor, "batch columns"],
    ) -> tuple[Float[Tensor, "batch pool"], Float[Tensor, "batch columns"]]:
        """Scores of a pool and of its negatives."""
        if users.shape[1] > 1:
            return self.score(tables, users, items), self.score(tables, users, negatives)
        # Column by column: an array of users times pool times dim would be written to memory and read again.
        user = F.embedding(users[:, 0], tables[0])
        columns = [torch.linalg.vecdot(user, F.embedding(item, tables[1])) for item in items.unbind(1)]
        negative = torch.linalg.vecdot(user, F.embedding(negatives[:, 0], tables[1]))
        return torch.stack(columns, 1), negative.unsqueeze(1)

    def triple_scores(
        self,
        tables: Tables,
        users: Int[Tensor, " batch"],
        items: Int[Tensor, " batch"],
        negatives: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Scores of both items, and the squared norm of the embeddings that the triple has before propagation."""
        user, both = F.embedding(users, tables[0]), F.embedding(torch.stack([items, negatives]), tables[1])
        scores = (user * both).sum(-1)
        if tables[0] is not self.users.weight:
            user, both = self.users(users), self.items(torch.stack([items, negatives]))
        return scores[0], scores[1], user.square().sum(-1) + both.square().sum(-1).sum(0)

    def forward(
        self,
        users: Int[Tensor, "batch columns"],
        items: Int[Tensor, "batch pool"],
        negatives: Int[Tensor, "batch columns"],
        choose: Choose | None = None,
    ) -> Scored:
        """Score the triples of one column of each row; one user or negative may serve the whole row."""
        tables = self.tables()
        column = torch.zeros(len(users), dtype=torch.long, device=users.device)
        if choose is not None:
            with torch.no_grad():
                column = choose(*self.pool_scores(tables, users, items, negatives))
        chosen = (_at(numbers, column) for numbers in (users, items, negatives))
        return Scored(*self.triple_scores(tables, *chosen), column)


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

    def pool_scores(self, tables: Tables, users: Tensor, items: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of a pool and of its negatives."""
        return self.score(tables, users, items), self.score(tables, users, negatives)

    def triple_scores(
        self, tables: Tables, users: Tensor, items: Tensor, negatives: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of both items, and the squared norm of what adds up to them."""
        both = self.features(tables, users, torch.stack([items, negatives]))
        scores = both.sum(-1)
        return scores[0], scores[1], both.square().sum(-1).sum(0)


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
