"""A small model that answers questions, taught to explain by a large one's sampled rationales."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lossmith.data.arithmetic import evaluate_arithmetic
from lossmith.data.rationales import RationaleSamples, build_contrastive_rationales, normalized_answer
from lossmith.errors import InputError, did_you_mean
from lossmith.files import read_json, write_json

# Options of training.RationaleDistillation, and which of the samples count.
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {"answer_weight": 1.0, "rationale_weight": 0.0, "judge": False, "vote": "majority"},
    "step-by-step": {"beta": 0.0, "judge": False, "vote": "first"},
    "positives": {"beta": 0.0, "judge": False, "vote": "majority"},
    "contrast": {"judge": False, "vote": "majority"},
    "qcrd": {"judge": True, "vote": "majority"},
}


@dataclass(frozen=True, slots=True)
class RationaleScores:
    """Share of right answers, and of right rationales (``None`` where there is nothing to tell them by)."""

    accuracy: float
    rationale_accuracy: float | None
    questions: int

    def summary(self) -> str:
        """One line."""
        more = f", rationales {self.rationale_accuracy:.3f}" if self.rationale_accuracy is not None else ""
        return f"accuracy {self.accuracy:.3f} of {self.questions} questions{more}"


class RationaleStudent:
    """A student with ``fit``, ``predict``, ``explain``, ``evaluate``, ``save_pretrained`` and ``from_pretrained``.

    Args:
        model: folder or hub id of any sequence-to-sequence model (T5, BART, ...); default a small T5 from random
            weights, with byte-level BPE trained on the questions and rationales: nothing is downloaded.
        method: ``finetune`` (labels only), ``step-by-step`` (labels and the first sampled rationale), ``positives``
            (labels and the rationales that win the vote), ``contrast`` (and away from those that lose it and from the
            student's own earlier ones), ``qcrd`` (and a judge weighs them): each one thing more.
        labels: ``gold``, or the ``teacher``'s majority answer, which needs no labels.
        epochs: passes over the questions.
        batch_size: questions per step.
        learning_rate: of AdamW, with a linear schedule.
        max_input_length, max_target_length: in tokens.
        seed: of weights, order, dropout and sampling.
        width, layers: of the small T5.
        schedule: options of :class:`lossmith.training.RationaleSchedule`.
        options: of :class:`lossmith.training.RationaleDistillation`, over those of the method.
        folder: where the Trainer writes its checkpoints; default: nowhere that lasts.
        **training: further ``transformers.TrainingArguments``.

    >>> from lossmith.data.arithmetic import ArithmeticTeacher, arithmetic_problems
    >>> from lossmith.data import sample_rationales
    >>> problems = arithmetic_problems(20)
    >>> rows = sample_rationales(ArithmeticTeacher(problems), problems, samples=3)
    >>> student = RationaleStudent(epochs=1, width=16, schedule={"pretraining_steps": 5}).fit(rows)
    >>> len(student.predict([problems[0].question]))
    1
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        method: str = "qcrd",
        labels: Literal["gold", "teacher"] = "gold",
        epochs: float = 20,
        batch_size: int = 32,
        learning_rate: float = 2e-3,
        max_input_length: int = 256,
        max_target_length: int = 64,
        seed: int = 0,
        width: int = 64,
        layers: int = 1,
        schedule: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        folder: str | Path | None = None,
        **training: Any,
    ):
        self.model, self.method, self.labels = model, method, labels
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.max_input_length, self.max_target_length, self.seed = max_input_length, max_target_length, seed
        self.width, self.layers, self.schedule, self.options = width, layers, schedule, options
        self.folder, self.training = folder, training

    # ---- verbs ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Sequence[RationaleSamples], *, resume_from_checkpoint: Any = None) -> RationaleStudent:
        """Vote, and train.

        Args:
            rows: see :func:`lossmith.data.read_rationales`.
            resume_from_checkpoint: a checkpoint in ``folder``, or ``True`` for the last one.
        """
        from lossmith.training import RationaleDistillation, RationaleJudge, RationaleTable

        options = self._options()
        self.rationales_ = build_contrastive_rationales(rows, labels=self.labels, vote=options.pop("vote"))
        torch.manual_seed(self.seed)
        self._build()
        table = RationaleTable(
            self.rationales_.examples,
            self.tokenizer_,
            max_input_length=self.max_input_length,
            max_target_length=self.max_target_length,
        )
        self.judge_ = RationaleJudge.from_model(self.model_) if options.pop("judge") else None
        objective = RationaleDistillation(table, self.judge_, seed=self.seed, **options)
        with tempfile.TemporaryDirectory() as temporary:
            trainer = self._trainer(objective, str(self.folder or temporary))
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        self.steps_, self.flops_ = int(trainer.state.global_step), float(trainer.state.total_flos)
        self.tokens_, self.history_ = int(trainer.state.num_input_tokens_seen), list(trainer.state.log_history)
        self.objective_ = objective
        return self

    def predict(self, questions: Sequence[str]) -> list[str]:
        """The answer to each question."""
        return self._write("predict: ", questions)

    def explain(self, questions: Sequence[str]) -> list[str]:
        """A rationale for each question."""
        return self._write("explain: ", questions)

    def evaluate(
        self,
        rows: Sequence[RationaleSamples],
        *,
        answers: Literal["text", "arithmetic"] = "text",
        holds: Callable[[RationaleSamples, str], bool] | None = None,
    ) -> RationaleScores:
        """Share of right answers and rationales.

        Args:
            rows: questions with labels.
            answers: ``text``: equal but for case, spaces and the form of numbers; ``arithmetic``: labels and answers
                are expressions (as in SVAMP), compared by their value.
            holds: says whether a rationale is right; default: it is the row's ``reference``, where all rows have one.
        """
        if not rows or any(row.label is None for row in rows):
            raise InputError(f"evaluation needs questions with labels, got {len(rows)} questions")
        if answers not in ("text", "arithmetic"):
            raise InputError(f"answers must be text or arithmetic, got '{answers}'")
        same = _same_text if answers == "text" else _same_value
        questions = [row.question for row in rows]
        right = [same(row.label or "", said) for row, said in zip(rows, self.predict(questions), strict=True)]
        share = None
        if holds is not None or all(row.reference is not None for row in rows):
            check = holds or (lambda row, said: _same_text(row.reference or "", said))
            found = [check(row, said) for row, said in zip(rows, self.explain(questions), strict=True)]
            share = sum(found) / len(found)
        return RationaleScores(sum(right) / len(right), share, len(rows))

    @torch.no_grad()
    def judge_rationales(self, questions: Sequence[str], rationales: Sequence[str]) -> list[float]:
        """The judge's score of each rationale, in (0, 1)."""
        from lossmith.data.rationales import RationaleExample
        from lossmith.training import RationaleTable

        self._check_fitted()
        if self.judge_ is None:
            raise InputError(f"a student trained by '{self.method}' has no judge; use method='qcrd'")
        examples = [RationaleExample(q, "", (r,)) for q, r in zip(questions, rationales, strict=True)]
        scores: list[float] = []
        for start in range(0, len(examples), 64):
            part = RationaleTable(
                examples[start : start + 64],
                self.tokenizer_,
                max_input_length=self.max_input_length,
                max_target_length=self.max_target_length,
            )
            rows = part.candidates(range(len(part)), next(self.judge_.parameters()).device)
            scores += self.judge_(rows.judge_ids, rows.judge_mask).tolist()
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that plain ``AutoModelForSeq2SeqLM`` and ``AutoTokenizer`` load, too; the judge is beside it."""
        self._check_fitted()
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(folder)
        if self.judge_ is not None:
            self.judge_.save_pretrained(folder)
        lengths = {"max_input_length": self.max_input_length, "max_target_length": self.max_target_length}
        write_json(Path(folder) / "rationale_student.json", {"method": self.method, **lengths})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> RationaleStudent:
        """A trained student, from a folder."""
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        from lossmith.training import RationaleJudge

        kept = Path(folder) / "rationale_student.json"
        if not kept.exists():
            raise InputError(f"{folder} holds no student (rationale_student.json)")
        student = cls(folder, **{**read_json(kept), **arguments})
        student.model_ = AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True)
        student.tokenizer_ = AutoTokenizer.from_pretrained(folder)
        has_judge = (Path(folder) / "judge.json").exists()
        student.judge_ = RationaleJudge.from_pretrained(folder) if has_judge else None
        return student

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        if self.method not in METHODS:
            raise InputError(f"unknown method '{self.method}': {did_you_mean(self.method, METHODS)}")
        if not self.epochs > 0 or self.batch_size < 1 or not self.learning_rate > 0:
            raise InputError(
                f"epochs and learning_rate must be > 0 and batch_size >= 1, got {self.epochs}, {self.learning_rate} "
                f"and {self.batch_size}"
            )
        return {**METHODS[self.method], **(self.options or {})}

    def _build(self) -> None:
        from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

        from lossmith.data import load_tokenizer, train_tokenizer

        if self.model is not None:
            self.tokenizer_: Any = load_tokenizer(self.model)
            try:
                self.model_: Any = AutoModelForSeq2SeqLM.from_pretrained(self.model, use_safetensors=True)
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"{self.model} holds no sequence-to-sequence model: {reason}") from None
            return
        examples = self.rationales_.examples
        texts = [
            f"predict: {e.question} explain: {e.question} {e.label} {' '.join((*e.positives, *e.negatives))}"
            for e in examples
        ]
        self.tokenizer_ = train_tokenizer(texts, vocab_size=2048)
        shape: dict[str, Any] = {
            "vocab_size": len(self.tokenizer_),
            "d_model": self.width,
            "d_kv": 16,
            "d_ff": 4 * self.width,
            "num_layers": self.layers,
            "num_decoder_layers": self.layers,
            "num_heads": max(1, self.width // 16),
            "dropout_rate": 0.0,
            "pad_token_id": self.tokenizer_.pad_token_id,
            "eos_token_id": self.tokenizer_.eos_token_id,
            "decoder_start_token_id": self.tokenizer_.pad_token_id,
        }
        self.model_ = T5ForConditionalGeneration(T5Config(**shape))

    def _trainer(self, objective: Any, folder: str) -> Any:
        import transformers

        from lossmith.training import RationaleSchedule, RationaleTrainer

        transformers.utils.logging.set_verbosity_error()
        try:
            schedule = RationaleSchedule(**(self.schedule or {}))
        except TypeError:
            allowed = list(RationaleSchedule.__dataclass_fields__)
            unknown = next(name for name in self.schedule or {} if name not in allowed)
            raise InputError(f"unknown option '{unknown}' of the schedule: {did_you_mean(unknown, allowed)}") from None
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": folder,
                "max_steps": max(1, round(self.epochs * len(objective.table) / self.batch_size)),
                "per_device_train_batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "seed": self.seed,
                "data_seed": self.seed,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "logging_steps": 10,
                "use_cpu": not torch.cuda.is_available(),
                **self.training,
            }
        )
        trainer = RationaleTrainer(self.model_, arguments, objective=objective, schedule=schedule)
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def _write(self, task: str, questions: Sequence[str]) -> list[str]:
        from lossmith.training.text_sampling import generate_texts

        self._check_fitted()
        texts = generate_texts(
            self.model_,
            self.tokenizer_,
            [task + question for question in questions],
            max_new_tokens=self.max_target_length,
            max_length=self.max_input_length,
        )
        return [text for (text,) in texts]

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise InputError("this student has not been trained; call fit, or RationaleStudent.from_pretrained(folder)")


def _same_text(truth: str, said: str) -> bool:
    return normalized_answer(truth) == normalized_answer(said)


def _same_value(truth: str, said: str) -> bool:
    try:
        return evaluate_arithmetic(truth) == evaluate_arithmetic(said)
    except ValueError:
        return False
