"""Open questions as a test of what a language model knows: loss of the answer, and the answers that it gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lossmith.data.collation import IGNORED
from lossmith.data.completions import CompletionCollator
from lossmith.data.questions import Question
from lossmith.data.tokenization import start_token
from lossmith.errors import InputError, did_you_mean
from lossmith.tasks.text.answer_metrics import (
    JUDGE,
    Pooling,
    answer_perplexity,
    exact_match,
    parse_verdict,
    semantic_scores,
    token_f1,
)
from lossmith.training.objectives import NextToken
from lossmith.training.text_sampling import generate_texts

PROMPT = "Question: {question}\nAnswer:"
METRICS = ("perplexity", "exact", "f1", "semantic", "judge")


def answer_losses(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    prompt: str = PROMPT,
    max_length: int = 1024,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Negative log probability of each answer given its question, in nats, and the number of its tokens.

    .. math:: nll_i = -\sum_{t = k_i + 1}^{T_i} \log p(x_{i,t} \mid x_{i,<t})

    Prompt and answer (after a space) are tokenised by themselves and joined, so that no token straddles the border.
    Only the answer's tokens count: neither the prompt's nor an end token nor padding.

    Args:
        model: causal.
        tokenizer: the model's.
        questions: with answers that are not blank.
        prompt: with ``{question}``.
        max_length: longest prompt and answer together; a longer prompt loses its beginning, a longer answer its end.
        batch_size: questions at a time; it does not change the numbers.

    >>> nats, tokens = answer_losses(model, tokenizer, questions)  # doctest: +SKIP
    """
    if "{question}" not in prompt:
        raise InputError("the prompt has no {question}")
    rows, start = [], start_token(tokenizer)
    for index, question in enumerate(questions):
        asked = _ids(tokenizer, prompt.replace("{question}", question.question))
        answer = _ids(tokenizer, " " + question.answer.strip())[: max_length - 1]
        if not question.answer.strip() or not answer:
            raise InputError(f"question {index + 1} ({question.question[:60]!r}) has no answer")
        asked = [start, *asked][max(0, len(asked) + 1 + len(answer) - max_length) :]
        rows.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer, "index": index})
    # Of like length together: less padding, the same numbers.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))  # type: ignore[arg-type]
    collate, objective = CompletionCollator(int(tokenizer.pad_token_id or 0)), NextToken()
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            batch = {
                name: value.to(device)
                for name, value in collate([rows[i] for i in order[at : at + batch_size]]).items()
            }
            found = objective.evaluate(model, batch)
            places = batch["index"].cpu().numpy()
            nats[places] = found.loss_sums.double().cpu().numpy()
            tokens[places] = found.targets.cpu().numpy()
    finally:
        model.train(training)
    return nats, tokens


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = 100,
    max_length: int = 1024,
    batch_size: int = 16,
    cut: bool = True,
) -> list[str]:
    """Greedy answers.

    Args:
        model: a Hugging Face causal model.
        tokenizer: the model's.
        questions: what is asked.
        prompt: with ``{question}``.
        max_new_tokens: longest answer.
        max_length: longest prompt.
        batch_size: questions at a time.
        cut: end an answer at its first line end or at a further ``Question:``, since a model that was not trained on
            instructions goes on asking.
    """
    prompts = [prompt.replace("{question}", question.question) for question in questions]
    texts = generate_texts(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, max_length=max_length, batch_size=batch_size
    )
    answers = [text.strip() for (text,) in texts]
    return [re.split(r"\n|Question:", answer, maxsplit=1)[0].strip() for answer in answers] if cut else answers


@dataclass(frozen=True, slots=True)
class QuestionScores:
    """What a model made of a set of questions.

    Attributes:
        questions: in their order.
        answers: those that the model gave; empty where none was asked for.
        values: by metric one number per question; of ``perplexity`` the nats per token.
        nats, tokens: of the reference answers.
        unparsed: verdicts of the judge that were neither yes nor no; they count as no.
        tokenizer: names the tokenisation, which perplexities of two models must share.
    """

    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]
    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    unparsed: int = 0
    tokenizer: str = ""

    def score(self, metric: str, *, category: str | None = None, pooling: Pooling = "tokens") -> float:
        """The mean of a metric, or the perplexity of the answers, over all questions or those of a category."""
        if metric not in self.values:
            raise InputError(f"no metric '{metric}' was measured: {did_you_mean(metric, self.values)}")
        chosen = [i for i, q in enumerate(self.questions) if category is None or q.category == category]
        if metric == "perplexity":
            return answer_perplexity([self.nats[i] for i in chosen], [self.tokens[i] for i in chosen], pooling=pooling)
        return float(np.mean([self.values[metric][i] for i in chosen]))

    def interval(
        self, metric: str, baseline: QuestionScores | None = None, *, level: float = 0.95, seed: int = 0
    ) -> Any:
        """Bootstrap over questions: an interval of :meth:`score`, or of its difference from a baseline's.

        Raises:
            InputError: the baseline has other questions or, for perplexities, another tokenizer.
        """
        if baseline is not None and baseline.questions != self.questions:
            raise InputError("the two models were asked different questions")
        if baseline is not None and metric == "perplexity" and baseline.tokenizer != self.tokenizer:
            raise InputError("perplexities of two tokenizers cannot be compared")
        generator = np.random.default_rng(seed)
        draws = generator.integers(0, len(self.questions), (1000, len(self.questions)))
        values = self._resampled(metric, draws)
        if baseline is not None:
            values = values - baseline._resampled(metric, draws)
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _resampled(self, metric: str, draws: np.ndarray) -> np.ndarray:
        if metric == "perplexity":
            nats, tokens = np.asarray(self.nats), np.asarray(self.tokens)
            ratio: np.ndarray = np.exp(nats[draws].sum(1) / tokens[draws].sum(1))
            return ratio
        means: np.ndarray = np.asarray(self.values[metric])[draws].mean(1)
        return means

    def summary(self, baseline: QuestionScores | None = None) -> str:
        """One line per metric with its interval; with a baseline, the difference from it."""
        lines = [f"{len(self.questions)} questions"]
        if baseline is not None:
            lines.append(f"  {'':<11}{'after':>8}  {'95% interval':<20}{'before':>8}  difference, 95% interval")
        for metric in self.values:
            low, high = self.interval(metric)
            interval = f"[{low:.5g}, {high:.5g}]"
            line = f"  {metric:<11}{self.score(metric):>8.5g}  {interval:<20}"
            if baseline is not None:
                low, high = self.interval(metric, baseline)
                line += f"{baseline.score(metric):>8.5g}  [{low:+.4g}, {high:+.4g}]"
            lines.append(line.rstrip())
        if self.unparsed:
            lines.append(f"  {self.unparsed} verdicts of the judge were neither yes nor no, and count as no")
        counts = Counter(question.category for question in self.questions)
        if len(counts) > 1:
            for category, count in sorted(counts.items()):
                shown = ", ".join(f"{metric} {self.score(metric, category=category):.4f}" for metric in self.values)
                lines.append(f"  {category or '(none)'} ({count}): {shown}")
        return "\n".join(lines)


def evaluate_questions(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    metrics: Sequence[str] = ("perplexity", "exact", "f1"),
    embed: Callable[[Sequence[str]], Any] | None = None,
    judge: Callable[[str], Any] | None = None,
    judge_prompt: str = JUDGE,
    number: int | None = None,
    seed: int = 0,
    prompt: str = PROMPT,
    max_new_tokens: int = 100,
    max_length: int = 1024,
    batch_size: int = 16,
) -> QuestionScores:
    """Judge a model by open questions.

    ============== =================================================================================================
    ``perplexity`` of the reference answer (Ans-PPL). It falls for any model that learns the style of the answers:
                   look at another metric beside it
    ``exact``      share of answers that equal the reference, normalised
    ``f1``         words that answer and reference share
    ``semantic``   cosine of the embeddings of answer and reference (SemScore); needs ``embed``
    ``judge``      share of answers of which ``judge`` says that they agree with the reference (LLM-Eval)
    ============== =================================================================================================

    Args:
        model: a Hugging Face causal model.
        tokenizer: the model's.
        questions: see :func:`lossmith.data.questions.read_questions`.
        metrics: of the above.
        embed: from texts to one row of numbers each, such as :func:`sentence_embedding` or :class:`TfidfEmbedding`.
        judge: from a prompt to a reply whose first word is yes or no (or a truth value).
        judge_prompt: with ``{question}``, ``{reference}`` and ``{given}``.
        number: ask so many questions only, drawn with ``seed``: the same for every model.
        seed: see above.
        prompt, max_new_tokens, max_length, batch_size: see :func:`generate_answers`.

    Raises:
        InputError: an unknown metric, one without what it needs, or no question.

    Source: "Tele-LLMs: A Series of Specialized Large Language Models for Telecommunications", 2024, arXiv 2409.05314.

    >>> scores = evaluate_questions(adapted, tokenizer, questions)  # doctest: +SKIP
    >>> print(scores.summary(baseline=evaluate_questions(base, tokenizer, questions)))  # doctest: +SKIP
    """
    from lossmith.data.tokenization import tokenizer_key

    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"unknown metric '{metric}': {did_you_mean(metric, METRICS)}")
    if "semantic" in metrics and embed is None:
        raise InputError("the metric 'semantic' needs embed, a function from texts to embeddings")
    if "judge" in metrics and judge is None:
        raise InputError("the metric 'judge' needs judge, a function from a prompt to yes or no")
    if not questions:
        raise InputError("there are no questions")
    if number is not None and number < len(questions):
        chosen = sorted(np.random.default_rng(seed).choice(len(questions), max(1, number), replace=False).tolist())
        questions = [questions[i] for i in chosen]
    values: dict[str, tuple[float, ...]] = {}
    nats = tokens = np.zeros(0)
    if "perplexity" in metrics:
        nats, tokens = answer_losses(
            model, tokenizer, questions, prompt=prompt, max_length=max_length, batch_size=batch_size
        )
        values["perplexity"] = tuple((nats / tokens).tolist())
    answers: list[str] = []
    if set(metrics) - {"perplexity"}:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_length": max_length, "batch_size": batch_size}
        answers = generate_answers(model, tokenizer, questions, prompt=prompt, **options)
    pairs = [(given, question.answer) for given, question in zip(answers, questions, strict=False)]
    if "exact" in metrics:
        values["exact"] = tuple(exact_match(*pair) for pair in pairs)
    if "f1" in metrics:
        values["f1"] = tuple(token_f1(*pair) for pair in pairs)
    if "semantic" in metrics and embed is not None:
        values["semantic"] = tuple(semantic_scores(embed(answers), embed([q.answer for q in questions])).tolist())
    unparsed = 0
    if "judge" in metrics and judge is not None:
        verdicts = [_judged(judge, judge_prompt, *row) for row in zip(questions, answers, strict=True)]
        unparsed = sum(verdict is None for verdict in verdicts)
        values["judge"] = tuple(float(bool(verdict)) for verdict in verdicts)
    return QuestionScores(
        tuple(questions),
        tuple(answers),
        {metric: values[metric] for metric in metrics},
        tuple(nats.tolist()),
        tuple(int(n) for n in tokens.tolist()),
        unparsed,
        tokenizer_key(tokenizer),
    )


def _judged(judge: Callable[[str], Any], template: str, question: Question, answer: str) -> bool | None:
    filled = {"question": question.question, "reference": question.answer, "given": answer}
    return parse_verdict(judge(re.sub(r"\{(question|reference|given)\}", lambda m: filled[m[1]], template)))
