"""Open questions: the loss of answers, the metrics, and generated question sets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lossmith.data import Document, train_tokenizer
from lossmith.data.collation import IGNORED
from lossmith.data.completions import CompletionCollator
from lossmith.data.questions import Question, QuestionChecks, cloze_questions, generate_questions, read_questions
from lossmith.errors import InputError
from lossmith.tasks.text.answer_metrics import (
    TfidfEmbedding,
    answer_perplexity,
    exact_match,
    parse_verdict,
    semantic_scores,
    sentence_embedding,
    token_f1,
)
from lossmith.tasks.text.question_answering import answer_losses, evaluate_questions, generate_answers
from lossmith.training import NextToken
from lossmith.training.models import build_model

TEXTS = ["what is the code of a channel", "the polar code of a channel is short", "a base station answers"]
QUESTIONS = [
    Question("What is the code?", "polar", "a", "coding"),
    Question("Who answers in the downlink of a cell?", "a base station", "b", "radio"),
    Question("Is it short?", "the polar code of a channel is short", "c", "coding"),
]


class Table(nn.Module):
    """Logits that depend on the position alone."""

    def __init__(self, logits: list[list[float]]):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[: input_ids.shape[1]].expand(len(input_ids), -1, -1)


class Bigram(nn.Module):
    """Logits of the next token from the last."""

    def __init__(self, classes: int, scale: float):
        super().__init__()
        self.table = nn.Parameter(
            scale * torch.randn(classes, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return build_model("nano", vocab_size=len(tokenizer), sequence_length=64)


def test_only_the_answers_tokens_count() -> None:
    """The digest's example: vocabulary 3, ids (2, 0, 1, 1, 2), two of them the prompt's."""
    model = Table([[0, 1, 2], [1, 0, -1], [0.5, 0.5, 0], [2, 0, 1], [0, 0, 0]])
    rows = [{"input_ids": [2, 0, 1, 1, 2], "labels": [IGNORED, IGNORED, 1, 1, 2], "index": 0}]
    found = NextToken().evaluate(model, CompletionCollator(0)(rows))
    nats = float(found.loss_sums)
    assert nats == pytest.approx(1.407605964444 + 0.958020087947 + 1.407605964444, abs=1e-11)
    assert answer_perplexity([nats], [3]) == pytest.approx(3.517477120866839, abs=1e-12)
    pair = ([nats, 0.1], [3, 1])
    assert answer_perplexity(*pair) == pytest.approx(2.633484842322456, abs=1e-12)
    assert answer_perplexity(*pair, pooling="questions") == pytest.approx(1.9716524589740685, abs=1e-12)
    assert answer_perplexity(*pair, pooling="mean") == pytest.approx(2.311324019471243, abs=1e-12)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer: Any) -> None:
    nats, tokens = answer_losses(Bigram(len(tokenizer), 0.0), tokenizer, QUESTIONS)
    assert answer_perplexity(nats, tokens) == pytest.approx(len(tokenizer), rel=1e-12)
    assert tokens.tolist() == [len(tokenizer(" " + q.answer)["input_ids"]) for q in QUESTIONS]


def test_batches_and_padding_change_nothing(model: Any, tokenizer: Any) -> None:
    one, _ = answer_losses(model, tokenizer, QUESTIONS, batch_size=1)
    all_at_once, _ = answer_losses(model, tokenizer, QUESTIONS, batch_size=3)
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)
    # Slow and plain: the whole row through the model, the answer's positions picked by hand.
    for question, nats in zip(QUESTIONS, one, strict=True):
        prompt = [0, *tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]]
        answer = tokenizer(" " + question.answer)["input_ids"]
        log_p = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        expected = -sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        assert nats == pytest.approx(expected, abs=1e-5)


def test_a_model_of_the_last_token_does_not_see_the_prompt(tokenizer: Any) -> None:
    """But for the prompt's last token, which is the same."""
    bigram = Bigram(len(tokenizer), 1.0)
    first, _ = answer_losses(bigram, tokenizer, QUESTIONS)
    other, _ = answer_losses(bigram, tokenizer, QUESTIONS, prompt="{question} Else. Answer:")
    np.testing.assert_allclose(first, other, rtol=1e-12)


def test_a_long_prompt_loses_its_beginning_and_never_the_answer(model: Any, tokenizer: Any) -> None:
    long = [Question("what " * 200 + "now?", "polar")]
    nats, tokens = answer_losses(model, tokenizer, long, max_length=40)
    assert np.isfinite(nats).all()
    assert tokens[0] == len(tokenizer(" polar")["input_ids"])


def test_answers_are_compared_by_words_and_by_direction() -> None:
    assert exact_match("The  Polar codes!", "polar codes") == 1.0
    assert exact_match("polar", "polar codes") == 0.0
    assert token_f1("polar codes are short", "short polar codes") == pytest.approx(2 * 3 / 7)
    assert token_f1("", "") == 1.0
    assert token_f1("", "polar") == 0.0
    scores = semantic_scores([[1, 0, 0], [3, 4, 0]], [[1, 1, 0], [4, 3, 0]])
    assert scores.mean() == pytest.approx(0.8335533905932737, abs=1e-15)
    np.testing.assert_allclose(semantic_scores([[7, 0, 0], [30, 40, 0]], [[1, 1, 0], [4, 3, 0]]), scores)
    assert semantic_scores([[0.0, 0.0]], [[1.0, 0.0]]).tolist() == [0.0]
    assert [parse_verdict(r) for r in ("YES!", " no, since", "1. Yes", "maybe", "", True)] == [
        *(True, False, True, None, None, True),
    ]


def test_every_metric_is_measured_and_compared_with_the_model_before(model: Any, tokenizer: Any) -> None:
    asked: list[str] = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        return "Perhaps" if "downlink" in prompt else "Yes"

    options: dict[str, Any] = {"embed": TfidfEmbedding(TEXTS), "judge": judge, "max_new_tokens": 4}
    metrics = ("perplexity", "exact", "f1", "semantic", "judge")
    scores = evaluate_questions(model, tokenizer, QUESTIONS, metrics=metrics, **options)
    assert scores.unparsed == 1
    assert scores.score("judge") == pytest.approx(2 / 3)
    assert scores.score("judge", category="radio") == 0.0
    assert "Reference answer: polar\n" in asked[0]
    assert scores.score("perplexity") == pytest.approx(answer_perplexity(scores.nats, scores.tokens))
    assert scores.interval("perplexity", scores) == (0.0, 0.0)
    low, high = scores.interval("judge")
    assert low < scores.score("judge") <= high
    shown = scores.summary(scores).splitlines()
    assert "before  difference, 95% interval" in shown[1]
    assert all(line.endswith("[+0, +0]") for line in shown[2 : 2 + len(scores.values)])
    assert max(map(len, shown[: 2 + len(scores.values)])) <= 80
    assert "1 verdicts of the judge were neither" in scores.summary()
    fewer = evaluate_questions(model, tokenizer, QUESTIONS, metrics=("perplexity",), number=2, seed=3)
    assert len(fewer.questions) == 2
    with pytest.raises(InputError, match="asked different questions"):
        scores.interval("perplexity", fewer)
    bytes_only = train_tokenizer(TEXTS, vocab_size=257)
    other = evaluate_questions(model, bytes_only, QUESTIONS, metrics=("perplexity",))
    with pytest.raises(InputError, match="two tokenizers"):
        scores.interval("perplexity", other)


def test_generated_answers_end_where_a_model_goes_on_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    from lossmith.tasks.text import question_answering

    replies = [["polar\nQuestion: and?"], [" a base station Question: more"], ["yes"]]
    monkeypatch.setattr(question_answering, "generate_texts", lambda *a, **k: replies)
    model: Any = None
    assert generate_answers(model, None, QUESTIONS) == ["polar", "a base station", "yes"]
    assert generate_answers(model, None, QUESTIONS, cut=False)[0] == "polar\nQuestion: and?"


def test_sentence_embeddings_are_means_over_what_is_no_padding(tokenizer: Any) -> None:
    class Encoder(nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor]:
            return (input_ids.unsqueeze(-1).double(),)

    embed = sentence_embedding(Encoder(), tokenizer)
    for text, row in zip(TEXTS, embed(TEXTS), strict=True):
        assert row[0] == pytest.approx(np.mean(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": ("bleu",)}, "unknown metric 'bleu'"),
        ({"metrics": ("semantic",)}, "needs embed"),
        ({"metrics": ("judge",)}, "needs judge"),
        ({"questions": []}, "there are no questions"),
        ({"prompt": "Answer:"}, r"the prompt has no \{question\}"),
        ({"questions": [Question("what?", " ")]}, "question 1 .* has no answer"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(model: Any, tokenizer: Any, changes: dict[str, Any], match: str) -> None:
    options = {"questions": QUESTIONS, "metrics": ("perplexity",), **changes}
    with pytest.raises(InputError, match=match):
        evaluate_questions(model, tokenizer, **options)


DOCUMENT = Document("Polar codes protect the control channel of 5G. LDPC codes protect its data.", "wiki", "5g.md")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Question: Which codes protect the data?\nAnswer: LDPC codes", None),
        ("**Question 1:** Which codes protect the data?\n**Answer 1:** LDPC codes", None),
        ('```json\n[{"question": "Which codes protect the data?", "answer": "LDPC codes"}]\n```', None),
        ("I cannot do that.", "not of the asked form"),
        ("Question: Which codes does the paper propose?\nAnswer: Polar codes", "needs its source ('the paper')"),
        ("Question: What does Figure 3 show of codes?\nAnswer: Polar codes", "needs its source ('Figure 3')"),
        ("Question: Which codes protect the data?\nAnswer: Turbo trellis codes", "not answerable from its document"),
        ("Question: Do LDPC codes protect the data?\nAnswer: LDPC codes", "the question holds its answer"),
        ("Question: Why?\nAnswer: LDPC codes", "no question (fewer than three words)"),
        ("Question: Which codes protect the data?\nAnswer: ?", "no answer"),
        ("Question: Which codes protect the data?\nAnswer: " + "codes " * 101, "answer of more than 100 words"),
    ],
)
def test_each_question_is_checked(reply: str, reason: str | None) -> None:
    good = "Question: Which codes protect the control channel?\nAnswer: Polar codes"
    replies = iter([good, reply])
    found = generate_questions([DOCUMENT, DOCUMENT], lambda prompt: next(replies))
    assert found.questions[0] == Question("Which codes protect the control channel?", "Polar codes", "5g.md", "wiki")
    if reason is None:
        assert found.questions[1].answer == "LDPC codes"
        assert not found.rejected
    else:
        assert len(found.questions) == 1
        assert found.rejected[0][1].startswith(reason)


def test_duplicates_limits_and_the_prompt(tmp_path: Path) -> None:
    prompts: list[str] = []

    def generate(prompt: str) -> str:
        prompts.append(prompt)
        return "Question: Which codes protect the {number}?\nAnswer: Polar codes"

    found = generate_questions([DOCUMENT] * 3, generate, per_document=2, checks=QuestionChecks())
    assert [reason for _, reason in found.rejected] == ["duplicate", "duplicate"]
    assert "Write 2 questions" in prompts[0]
    assert DOCUMENT.text in prompts[0]
    assert "2  duplicate" in found.summary()
    found.write(tmp_path / "exam.jsonl")
    assert read_questions(tmp_path / "exam.jsonl").questions == found.questions
    rejected = [json.loads(line) for line in (tmp_path / "exam.jsonl.rejected.jsonl").read_text().splitlines()]
    assert rejected[0]["reason"] == "duplicate"
    assert len(generate_questions([DOCUMENT] * 9, generate, limit=1).questions) == 1
    with pytest.raises(InputError, match=r"no question passed the checks \(1 times: not of the asked form\)"):
        generate_questions([DOCUMENT], lambda prompt: "")


def test_question_files_of_others_are_read(tmp_path: Path) -> None:
    rows = [
        {"Statement": "What is it?", "Answer": "A code.", "id": "standard_12"},
        {"Statement": "What else?", "Answer": " "},
    ]
    (tmp_path / "tele.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(tmp_path / "tele.jsonl")
    assert found.questions == (Question("What is it?", "A code.", "standard_12", "standard"),)
    assert found.rejected[0][1] == "no answer"
    (tmp_path / "t.csv").write_text("question,answer,subject\nWhat?,That.,7\n")
    assert read_questions(tmp_path / "t.csv", category_field="subject").questions[0].category == "7"
    import pandas as pd

    pd.DataFrame({"question": ["What?"], "answer": ["That."]}).to_parquet(tmp_path / "t.parquet")
    assert read_questions(tmp_path / "t.parquet").questions == (Question("What?", "That."),)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="there is no field 'question'"):
        read_questions(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": ""}\n')
    with pytest.raises(InputError, match="holds no question with an answer"):
        read_questions(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="is no file of questions"):
        read_questions(tmp_path / "nothing.jsonl")


def test_sentences_become_questions_without_a_model() -> None:
    text = "The control channel of 5G is protected by polar codes of short length. Short one. `x`."
    (question,) = cloze_questions([Document(text, "wiki", "5g.md")])
    assert question.question + " " + question.answer == text[: text.index(" Short")]
    assert question.category == "wiki"


def test_the_perplexity_of_equal_nats_is_their_exponential() -> None:
    for pooling in ("tokens", "questions", "mean"):
        assert answer_perplexity([2.0, 4.0], [1, 2], pooling=pooling) == pytest.approx(math.exp(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one token"):
        answer_perplexity([1.0], [0])
    with pytest.raises(ValueError, match="pooling must be"):
        answer_perplexity([1.0], [1], pooling="all")  # type: ignore[arg-type]
