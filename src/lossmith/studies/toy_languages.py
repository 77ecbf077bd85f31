"""Two languages whose truth is known: a Markov chain with planted errors, and a table of next-token distributions."""

from __future__ import annotations

import functools
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


def planted(seed: int, position: Any, *, sequences: int) -> dict[str, float]:
    """Whether the places that are mended are those where the student is wrong, and what mending gains.

    Args:
        seed: of the models and samples.
        position: see :func:`lossmith.training.correct_and_regenerate`; ``None``: nothing is mended, and nothing gained.
        sequences: of 30 tokens.
    """
    from lossmith.training import correct_and_regenerate

    if position is None:
        return {"planted/gain": 0.0}
    teacher, student, bad = planted_errors(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(20, (sequences, 1), generator=generator).tolist()
    out = correct_and_regenerate(
        student, teacher, prompts, max_new_tokens=29, position=position, eos_token_id=[], generator=generator
    )
    before, after = (
        torch.tensor([[*p, *r] for p, r in zip(prompts, answers, strict=True)])
        for answers in (out.drafts, out.responses)
    )
    # The token before the place, which is what a wrong row belongs to.
    context = before.gather(1, out.error_positions.clamp_min(0)).squeeze(-1)
    mended = out.error_positions.squeeze(-1) >= 0
    with torch.no_grad():
        gain = float(likelihood(teacher, after).mean() - likelihood(teacher, before).mean())
    found = torch.isin(context, torch.tensor(bad))[mended].double().mean()
    return {"planted/found": float(found), "planted/gain": gain}


def table(seed: int, loss: str | None, band: Any, *, steps: int) -> dict[str, float]:
    """A student of rank 6 learns 300 distributions of rank 24 over 200 tokens, from labels and a token loss.

    Args:
        seed: of teacher, student and samples.
        loss: a distillation loss's name, or
        band: the variant of a clipped KL with a learned band; with neither, labels alone.
        steps: of 64 contexts, with Adam at 0.01.
    """
    from lossmith.heads import AdaptiveClippedKL
    from lossmith.losses import cross_entropy, distillation_kl
    from lossmith.training.distillation import bind_distillation_loss

    teacher, drawn, targets = _table_examples(seed, steps)
    contexts, classes = teacher.shape
    torch.manual_seed(seed)
    student = TableStudent(contexts, classes, rank=6)
    learned = AdaptiveClippedKL(classes, variant=band) if band is not None else None
    against: Any = learned or (bind_distillation_loss(loss) if loss is not None else None)
    weights = [*student.parameters(), *(learned.parameters() if learned is not None else ())]
    optimiser = torch.optim.Adam(weights, lr=1e-2, fused=True)
    for context, target in zip(drawn, targets, strict=True):
        logits = student(context)
        values = cross_entropy(logits, target)
        if against is not None:
            values = values + against(logits, teacher[context])
        optimiser.zero_grad()
        values.mean().backward()
        optimiser.step()
    with torch.no_grad():
        logits = student(torch.arange(contexts))
        best = logits.argmax(-1, keepdim=True)
        found = {
            "table/top1_agreement": float((best == teacher.argmax(-1, keepdim=True)).double().mean()),
            "table/kl": float(distillation_kl(logits, teacher).mean()),
        }
        if learned is not None:
            upper, lower = learned.bounds(logits, teacher)
            found["table/band"] = float((upper - lower).mean())
    return found


@functools.lru_cache(maxsize=1)
def _table_examples(seed: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's logits, and contexts and tokens of each step: the same for all arms of a seed, which come in turn.

    They are drawn on the CPU and are not to be changed.
    """
    teacher = table_teacher(seed)
    probabilities = teacher.softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    contexts, targets = [], []
    for _ in range(steps):
        contexts.append(torch.randint(len(teacher), (64,), generator=generator))
        targets.append(torch.multinomial(probabilities[contexts[-1]], 1, generator=generator).squeeze(-1))
    return teacher, torch.stack(contexts), torch.stack(targets)
