"""Instructions with known answers, made from the embedded corpus; and how well a language model answers."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError
from lossmith.files import read_json, replacing_folder, write_json

if TYPE_CHECKING:
    from lossmith.data import Completion

# What is asked of a list of words.
TASKS = {
    "reverse": lambda words: words[::-1],
    "repeat": lambda words: [*words, words[0]],
    "swap": lambda words: [words[-1], *words[1:-1], words[0]],
}
WORDS = 30

# 16 MiB in float32; a small model's answers to some hundred questions.
_LOGITS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Pairs:
    """Prompts with completions: what the teacher learns from, what the student learns from, and what both are asked."""

    teacher: Sequence[Completion]
    student: Sequence[Completion]
    test: Sequence[Completion]


@functools.cache
def common_words(number: int = WORDS) -> list[str]:
    """The commonest words of the embedded corpus that mean something."""
    from lossmith.data import read_python_corpus
    from lossmith.data.phrases import is_common_word

    counts: Counter[str] = Counter()
    for seen, document in enumerate(read_python_corpus()):
        if seen >= 1500:
            break
        if document.domain == "docs":
            counts.update(w for w in re.findall(r"\b[a-z]{4,9}\b", document.text) if not is_common_word(w))
    # Ties by the alphabet, so that the same corpus gives the same words.
    return sorted(counts, key=lambda word: (-counts[word], word))[:number]


def instructions(number: int, seed: int) -> list[Completion]:
    """``reverse: value class string`` with the answer ``words after reverse: string class value``, and the like."""
    from lossmith.data import Completion

    draw, words = random.Random(seed), common_words()
    made = []
    for _ in range(number):
        task, chosen = draw.choice(sorted(TASKS)), draw.sample(words, draw.randint(3, 4))
        answer = TASKS[task](chosen)
        made.append(Completion(f"{task}: {' '.join(chosen)}\n", f"words after {task}: {' '.join(answer)}"))
    return made


def load_pairs(path: str | Path) -> Pairs:
    """What :func:`save_pairs` wrote."""
    from lossmith.data import Completion

    parts = read_json(Path(path))
    return Pairs(**{name: [Completion(*pair) for pair in pairs] for name, pairs in parts.items()})


def save_pairs(pairs: Pairs, path: Path) -> None:
    """So that the corpus or the user's file is read once for all arms and seeds."""
    parts = {f.name: [dataclasses.astuple(pair) for pair in getattr(pairs, f.name)] for f in dataclasses.fields(pairs)}
    write_json(path, parts)


def read_pairs(options: Mapping[str, Any]) -> Pairs:
    """The embedded tasks, or the user's file cut into two parts, the same for all seeds."""
    few, most, asked = (int(options[f"{name}_examples"]) for name in ("student", "teacher", "test"))
    if options["data"] == "instructions":
        train = instructions(most, seed=0)
        questions = {pair.prompt for pair in train[:few]}
        test = [pair for pair in instructions(2 * asked, seed=1) if pair.prompt not in questions][:asked]
        return Pairs(train, train[:few], test)
    if options["data"] is None:
        raise InputError("this scale needs --data: a file of prompts and completions (JSONL, CSV, Parquet)")
    from lossmith.data import read_completions

    pairs = read_completions(
        options["data"], prompt_field=options["prompt_field"], completion_field=options["completion_field"]
    )
    if len(pairs) < 10:
        raise InputError(f"{options['data']}: at least 10 prompts with completions are needed, got {len(pairs)}")
    random.Random(0).shuffle(pairs)
    asked = min(asked, len(pairs) // 5)
    train = pairs[asked:]
    return Pairs(train[:most], train[:few], pairs[:asked])


@dataclass(frozen=True, slots=True)
class Answers:
    """How a student answers, from 0 to 1 but for the last two, which are nats per token.

    Attributes:
        rouge_l: ROUGE-L (F) of an answer sampled at temperature 1, with stems.
        exact: share of likeliest answers that are the right one.
        top1_agreement: share of tokens at which student and teacher find the same token likeliest.
        loss: cross entropy of the right answers.
        teacher_kl: divergence of the student from the teacher, over the right answers.
    """

    rouge_l: float
    exact: float
    top1_agreement: float
    loss: float
    teacher_kl: float


def judge(
    student: Any, teacher: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, seed: int, max_new_tokens: int
) -> Answers:
    """Ask the student, and compare it with the right answers and with the teacher."""
    import torch

    from lossmith.losses import cross_entropy, distillation_kl
    from lossmith.training.response_sampling import evaluating, response_logits, sample_responses

    prompts = [[t for t, y in zip(r["input_ids"], r["labels"], strict=True) if y == -100] for r in rows]
    answers = [[y for y in r["labels"] if y != -100] for r in rows]
    scorer, rouge, exact = rouge_scorer(), 0.0, 0
    sums = dict.fromkeys(("same", "loss", "kl"), 0.0)
    generator = torch.Generator().manual_seed(seed)
    device = next(student.parameters()).device
    several = _rows_at_once(prompts, max_new_tokens, len(tokenizer))
    with evaluating(student, teacher), torch.no_grad():
        for first in range(0, len(rows), several):
            part, right = prompts[first : first + several], answers[first : first + several]
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id}
            sampled = sample_responses(student, part, generator=generator, **options)
            best = sample_responses(student, part, temperature=0, **options)
            texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in (right, sampled)]
            rouge += sum(scorer.score(*pair)["rougeL"].fmeasure for pair in zip(*texts, strict=True))
            exact += sum(a == b for a, b in zip(best, right, strict=True))
            s, t = (response_logits(m, part, right).to(device).float() for m in (student, teacher.to(device)))
            targets = torch.full(s.shape[:2], -100)
            for i, answer in enumerate(right):
                targets[i, : len(answer)] = torch.tensor(answer)
            targets = targets.to(device)
            sums["loss"] += float(cross_entropy(s, targets).sum())
            sums["kl"] += float(distillation_kl(s, t, targets).sum())
            sums["same"] += float(((s.argmax(-1) == t.argmax(-1)) & (targets != -100)).sum())
    tokens = sum(map(len, answers))
    return Answers(
        rouge_l=rouge / len(rows),
        exact=exact / len(rows),
        top1_agreement=sums["same"] / tokens,
        loss=sums["loss"] / tokens,
        teacher_kl=sums["kl"] / tokens,
    )


def written_by(teacher: Any, rows: Sequence[Any], tokenizer: Any, seed: int, longest: int) -> list[dict[str, Any]]:
    """The same prompts, with what the teacher answers."""
    import torch

    from lossmith.training.response_sampling import sample_responses

    prompts = [[t for t, y in zip(r["input_ids"], r["labels"], strict=True) if y == -100] for r in rows]
    generator = torch.Generator().manual_seed(seed)
    made: list[dict[str, Any]] = []
    several = _rows_at_once(prompts, longest, len(tokenizer))
    for first in range(0, len(rows), several):
        part = prompts[first : first + several]
        answers = sample_responses(
            teacher, part, max_new_tokens=longest, eos_token_id=tokenizer.eos_token_id, generator=generator
        )
        for prompt, answer in zip(part, answers, strict=True):
            labels = [-100] * len(prompt) + answer
            made.append({"input_ids": prompt + answer, "labels": labels, "index": len(made)})
    return made


def _rows_at_once(prompts: Sequence[Sequence[int]], longest: int, classes: int) -> int:
    """At least 64, and more of small models, to which a token of many rows costs hardly more than one of few."""
    length = max(map(len, prompts), default=0) + longest
    return max(64, _LOGITS_AT_ONCE // max(1, length * classes))


def rouge_scorer() -> Any:
    """ROUGE-L with stems, of the package rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE-L needs the package rouge-score: pip install 'lossmith[generation]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def save_teacher(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both; a folder that is there is complete."""
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
