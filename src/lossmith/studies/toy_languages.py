"""Two languages whose truth is known: a Markov chain with planted errors, and a table of next-token distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class MarkovModel(nn.Module):
    """A causal language model whose next token depends on the last one alone; generates like a Hugging Face model.

    >>> model = MarkovModel(torch.eye(3))
    >>> model.generate(input_ids=torch.tensor([[2]]), max_new_tokens=3).tolist()
    [[2, 2, 2, 2]]
    """

    def __init__(self, rows: Float[Tensor, "classes classes"]):
        super().__init__()
        self.log_rows = nn.Parameter(rows.log().clamp_min(-1e4))

    def forward(self, input_ids: Int[Tensor, "examples length"]) -> Float[Tensor, "examples length classes"]:
        """Logits of each next token."""
        return self.log_rows[input_ids]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **_: Any) -> Tensor:
        """Samples at temperature 1."""
        for _step in range(max_new_tokens):
            drawn = torch.multinomial(self.log_rows[input_ids[:, -1]].softmax(-1), 1)
            input_ids = torch.cat([input_ids, drawn], dim=1)
        return input_ids


def planted_errors(seed: int, *, classes: int = 20, bad: int = 3) -> tuple[MarkovModel, MarkovModel, list[int]]:
    """A teacher, a student that is wrong after ``bad`` tokens and nearly right elsewhere, and those tokens.

    The teacher's rows are Dirichlet(0.3); the student's are 0.9 times the teacher's plus 0.1 times Dirichlet(1),
    and rows that have nothing to do with the teacher's after the bad tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(concentration: float) -> Tensor:
        draws = torch._standard_gamma(torch.full((classes, classes), concentration).double(), generator=generator)
        return draws / draws.sum(-1, keepdim=True)

    teacher = rows(0.3)
    student = 0.9 * teacher + 0.1 * rows(1.0)
    places = torch.randperm(classes, generator=generator)[:bad]
    student[places] = rows(0.3)[places]
    return MarkovModel(teacher), MarkovModel(student), sorted(places.tolist())


def likelihood(
    teacher: MarkovModel, sequences: Int[Tensor, "examples length"]
) -> Float[Tensor, "examples length_less_one"]:
    """The teacher's log probability of each token after the first."""
    return teacher(sequences[:, :-1]).log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)


class TableStudent(nn.Module):
    """Logits of ``classes`` tokens in each of ``contexts`` contexts, of rank ``rank`` plus a bias."""

    def __init__(self, contexts: int, classes: int, rank: int):
        super().__init__()
        self.contexts = nn.Embedding(contexts, rank)
        self.output = nn.Linear(rank, classes)

    def forward(self, context: Int[Tensor, " examples"]) -> Float[Tensor, "examples classes"]:
        """Logits of the next token."""
        return self.output(self.contexts(context))


def table_teacher(
    seed: int, *, contexts: int = 300, classes: int = 200, rank: int = 24
) -> Float[Tensor, "contexts classes"]:
    """The teacher's logits: of rank 24, and words of very different frequency (Zipf's law)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(classes, generator=generator) + 1
    left, right = (torch.randn(*shape, generator=generator) for shape in ((contexts, rank), (rank, classes)))
    return 0.55 * left @ right - torch.tensor([math.log(int(n)) for n in order])
