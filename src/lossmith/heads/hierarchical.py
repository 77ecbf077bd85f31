"""Hierarchical softmax: exact probabilities of very many classes at the cost of a path through a tree."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Tree = Literal["two-level", "balanced", "huffman"]


class HierarchicalSoftmax(nn.Module):
    r"""Output layer with its loss: the probability of a class is that of the choices on the way to it.

    .. math:: -\log p(c \mid h) = -\sum_{n \in \mathrm{path}(c)} \log p(\text{turn at } n \mid h)

    Args:
        in_features: width of the last hidden layer.
        num_classes: number of classes, 2 or more.
        tree: ``"two-level"``: ``ceil(sqrt(D))`` groups of as many classes each, a softmax over groups and one inside
            the group; ``"balanced"``: a binary tree of depth ``log2 D``; ``"huffman"``: a binary tree in which frequent
            classes are near the root.
        counts: how often each class occurs: needed by ``huffman``; with ``two-level`` and ``balanced`` classes are
            numbered by falling count, so that groups are of like frequency.
        sparse: gradients of the large matrix hold only the rows that were used (``torch.optim.SGD`` and ``SparseAdam``
            take such gradients); dense ones cost as much as a full softmax.
        ignore_index: target of rows that do not count.
        init_std: deviation of the initial weights.

    Returns, when called with hidden states and class indices, one loss in nats per row. Probabilities sum to exactly 1.

    Cost per row: ``O(features · sqrt(D))`` for two levels, ``O(features · log D)`` for binary trees, which are less
    accurate as a rule and have many small products.

    Sources: Morin and Bengio, "Hierarchical Probabilistic Neural Network Language Model", 2005; two levels: Goodman,
    "Classes for Fast Maximum Entropy Training", 2001, arXiv cs/0108006.

    >>> head = HierarchicalSoftmax(4, 10)
    >>> losses = head(torch.randn(3, 4), torch.tensor([0, 9, -100]))
    >>> losses.shape, float(losses[2].detach())
    (torch.Size([3]), 0.0)
    >>> torch.allclose(head.log_prob(torch.randn(3, 4)).exp().sum(-1), torch.ones(3))
    True
    """

    place: Tensor
    nodes: Tensor
    turns: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        tree: Tree = "two-level",
        counts: Int[Tensor, " classes"] | None = None,
        sparse: bool = True,
        ignore_index: int = -100,
        init_std: float = 0.01,
    ):
        super().__init__()
        if in_features < 1 or num_classes < 2:
            raise ValueError(f"need 1 feature and 2 classes or more, got {in_features} and {num_classes}")
        if tree not in ("two-level", "balanced", "huffman"):
            raise ValueError(f"tree must be two-level, balanced or huffman, got '{tree}'")
        if counts is not None and (counts.shape != (num_classes,) or bool((counts < 0).any())):
            raise ValueError(f"counts must be {num_classes} numbers >= 0, got shape {tuple(counts.shape)}")
        if tree == "huffman" and counts is None:
            raise ValueError("a huffman tree needs counts, how often each class occurs")
        self.in_features, self.num_classes, self.tree = in_features, num_classes, tree
        self.sparse, self.ignore_index = sparse, ignore_index
        # Number of each class in the tree: by falling count.
        order = torch.arange(num_classes) if counts is None else counts.argsort(descending=True, stable=True)
        self.register_buffer("place", order.argsort())
        if tree == "two-level":
            self.group_size = math.ceil(math.sqrt(num_classes))
            groups = -(-num_classes // self.group_size)
            self.groups = nn.Linear(in_features, groups)
            self.members = nn.Parameter(init_std * torch.randn(groups, self.group_size * in_features))
            self.member_bias = nn.Parameter(torch.zeros(groups, self.group_size))
            nn.init.normal_(self.groups.weight, std=init_std)
            nn.init.zeros_(self.groups.bias)
        else:
            paths = _huffman(counts[order].tolist()) if tree == "huffman" else _balanced(num_classes)  # type: ignore[index]
            nodes, turns = _padded(paths)
            self.register_buffer("nodes", nodes)
            self.register_buffer("turns", turns)
            self.decisions = nn.Parameter(init_std * torch.randn(num_classes - 1, in_features))
            self.decision_bias = nn.Parameter(torch.zeros(num_classes - 1, 1))

    def forward(
        self, hidden: Float[Tensor, "*batch features"], targets: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """One loss per row; exactly 0 where the target is ``ignore_index``."""
        if hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden must have {self.in_features} features, got shape {tuple(hidden.shape)}")
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(f"targets must have the shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
        counted = (targets != self.ignore_index).flatten()
        rows, chosen = hidden.reshape(-1, self.in_features)[counted], targets.flatten()[counted].long()
        if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= self.num_classes):
            bad = chosen[(chosen < 0) | (chosen >= self.num_classes)][0]
            raise ValueError(f"targets must be in [0, {self.num_classes}), got {int(bad)}")
        place = self.place[chosen]
        losses = self._two_levels(rows, place) if self.tree == "two-level" else self._binary(rows, place)
        result = losses.new_zeros(targets.numel()).masked_scatter(counted, losses)
        return result.reshape(targets.shape)

    def _two_levels(self, rows: Tensor, place: Tensor) -> Tensor:
        group, member = place // self.group_size, place % self.group_size
        losses = F.cross_entropy(self.groups(rows), group, reduction="none")
        weights = F.embedding(group, self.members, sparse=self.sparse).view(-1, self.group_size, self.in_features)
        biases = F.embedding(group, self.member_bias, sparse=self.sparse)
        inside = torch.baddbmm(biases.unsqueeze(-1), weights, rows.unsqueeze(-1)).squeeze(-1)
        return losses + F.cross_entropy(self._existing(inside, group), member, reduction="none")

    def _existing(self, inside: Tensor, group: Tensor) -> Tensor:
        """The last group may be only partly filled: the rest is no class."""
        last = self.num_classes - (len(self.members) - 1) * self.group_size
        if last == self.group_size:
            return inside
        beyond = torch.arange(self.group_size, device=inside.device) >= last
        return inside.masked_fill((group == len(self.members) - 1).unsqueeze(-1) & beyond, -math.inf)

    def _binary(self, rows: Tensor, place: Tensor) -> Tensor:
        nodes, turns = self.nodes[place], self.turns[place]
        weights = F.embedding(nodes, self.decisions, sparse=self.sparse)
        biases = F.embedding(nodes, self.decision_bias, sparse=self.sparse).squeeze(-1)
        outputs = torch.einsum("mld,md->ml", weights, rows) + biases
        # Beyond the path's end a turn is 0, and counts nothing.
        return (F.softplus(-turns * outputs) * turns.abs()).sum(-1)

    def log_prob(self, hidden: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """Log-probabilities of all classes (a dense matrix)."""
        flat = hidden.reshape(-1, self.in_features)
        parts = torch.cat([part for _, part in self._blocks(flat)], -1)
        return parts[:, self.place].reshape(*hidden.shape[:-1], self.num_classes)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch features"], k: int) -> torch.return_types.topk:
        """The ``k`` most probable classes of each row, a block of classes at a time."""
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be in [1, {self.num_classes}], got {k}")
        flat = hidden.reshape(-1, self.in_features)
        values, indices = flat.new_empty(len(flat), 0), torch.empty(len(flat), 0, dtype=torch.long, device=flat.device)
        for start, part in self._blocks(flat):
            best = part.topk(min(k, part.shape[-1]), -1)
            values, indices = torch.cat([values, best.values], -1), torch.cat([indices, best.indices + start], -1)
            merged = values.topk(min(k, values.shape[-1]), -1)
            values, indices = merged.values, indices.gather(-1, merged.indices)
        classes = self.place.argsort()[indices]
        shape = (*hidden.shape[:-1], k)
        return torch.return_types.topk((values.reshape(shape), classes.reshape(shape)))

    def _blocks(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Log-probabilities by place in the tree, some hundred or thousand places at a time."""
        if self.tree == "two-level":
            by_group = F.log_softmax(self.groups(rows), -1)
            for number in range(len(self.members)):
                weight = self.members[number].view(self.group_size, self.in_features)
                inside = F.linear(rows, weight, self.member_bias[number])
                group = torch.full((len(rows),), number, device=rows.device)
                inside = F.log_softmax(self._existing(inside, group), -1)
                start = number * self.group_size
                yield start, (by_group[:, number : number + 1] + inside)[:, : self.num_classes - start]
        else:
            outputs = F.linear(rows, self.decisions, self.decision_bias.squeeze(-1))
            for start in range(0, self.num_classes, 4096):
                nodes, turns = self.nodes[start : start + 4096], self.turns[start : start + 4096]
                # A turn at a time: a path is tens of nodes long.
                total = rows.new_zeros(len(rows), len(nodes))
                for level in range(nodes.shape[1]):
                    turn = turns[:, level]
                    total = total - F.softplus(-turn * outputs[:, nodes[:, level]]) * turn.abs()
                yield start, total


Paths = list[list[tuple[int, int]]]


def _balanced(classes: int) -> Paths:
    """Paths in a tree that halves its classes at every node; ``(node, +1 or -1)`` from the root on."""
    paths: Paths = [[] for _ in range(classes)]
    stack, node = [(0, classes)], 0
    while stack:
        begin, end = stack.pop()
        if end - begin < 2:
            continue
        middle = (begin + end + 1) // 2
        for c in range(begin, end):
            paths[c].append((node, 1 if c < middle else -1))
        node += 1
        stack += [(middle, end), (begin, middle)]
    return paths


def _huffman(counts: list[float]) -> Paths:
    """Paths in the tree that makes the expected path shortest."""
    classes = len(counts)
    heap = [(count, c) for c, count in enumerate(counts)]
    heapq.heapify(heap)
    parent: dict[int, tuple[int, int]] = {}
    for node in range(classes, 2 * classes - 1):
        (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
        parent[left], parent[right] = (node, 1), (node, -1)
        heapq.heappush(heap, (a + b, node))
    paths: Paths = []
    for c in range(classes):
        path, at = [], c
        while at in parent:
            at, turn = parent[at]
            path.append((at - classes, turn))
        paths.append(path[::-1])
    return paths


def _padded(paths: Paths) -> tuple[Int[Tensor, "classes depth"], Float[Tensor, "classes depth"]]:
    depth = max(len(path) for path in paths)
    nodes, turns = torch.zeros(len(paths), depth, dtype=torch.long), torch.zeros(len(paths), depth)
    for c, path in enumerate(paths):
        for level, (node, turn) in enumerate(path):
            nodes[c, level], turns[c, level] = node, turn
    return nodes, turns
