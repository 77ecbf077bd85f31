"""Training with a judge that learns along, and negatives from the student's own past."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from lossmith.errors import InputError
from lossmith.files import write_text
from lossmith.training.checkpoint import load_state, save_state
from lossmith.training.models import matmul_parameters
from lossmith.training.objectives import EXAMPLE_WEIGHTS
from lossmith.training.rationale_distillation import RationaleDistillation
from lossmith.training.record import checkpoint_step
from lossmith.training.text_sampling import generate_texts
from lossmith.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class RationaleSchedule:
    """What changes in the course of training, in iterations of ``steps`` optimiser steps.

    Attributes:
        steps: optimiser steps of an iteration; ``None``: one pass over the examples.
        negative_lag: ``j >= 1``: in iteration ``i`` negatives come from the student as it was at the beginning of
            iteration ``i - j``, or before training where there is no such; iteration 0 has none.
        negative_temperature: of their sampling; 1.5 makes them worse than what the student would say.
        negatives_per_question: how many; 0 switches them off.
        judge_every: the judge learns in every such iteration only.
        judge_weight: ``α₃``, and
        judge_decay: its factor per iteration.
        decays: what ``α₃`` multiplies after the first iteration: the judge's ``"learning_rate"``, or its ``"loss"``, as
            printed, which under Adam changes nothing (a constant factor cancels) and under SGD is the same.
        judge_learning_rate: of its own AdamW; ``None``: the student's.
        pretraining_steps: at most so many steps of the judge before the student's first, but no more than ten passes
            over the examples; with spoilt copies of good rationales where bad ones are missing. As many examples per
            step as the student's.
        corruption: share of words that are spoilt.
    """

    steps: int | None = None
    negative_lag: int = 5
    negative_temperature: float = 1.5
    negatives_per_question: int = 1
    judge_every: int = 1
    judge_weight: float = 0.5
    judge_decay: float = 0.9
    decays: str = "learning_rate"
    judge_learning_rate: float | None = None
    pretraining_steps: int = 500
    corruption: float = 0.15

    def __post_init__(self) -> None:
        for name, least in (("negative_lag", 1), ("judge_every", 1), ("negatives_per_question", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps of an iteration must be at least 1, got {self.steps}")
        if self.pretraining_steps < 0 or not 0 < self.corruption <= 1:
            raise InputError(
                f"pretraining_steps must be >= 0 and corruption in (0, 1], got {self.pretraining_steps} and "
                f"{self.corruption}"
            )
        if not 0 < self.negative_temperature < math.inf:
            raise InputError(f"negative_temperature must be a finite number > 0, got {self.negative_temperature}")
        if not 0 <= self.judge_weight < math.inf or not 0 < self.judge_decay <= 1:
            raise InputError(
                f"judge_weight must be >= 0 and judge_decay in (0, 1], got {self.judge_weight} and {self.judge_decay}"
            )
        if self.decays not in ("learning_rate", "loss"):
            raise InputError(f"decays must be learning_rate or loss, got '{self.decays}'")

    def weight(self, iteration: int) -> float:
        """``α₃`` in an iteration.

        >>> round(RationaleSchedule().weight(10), 11)
        0.17433922005
        """
        return self.judge_weight * self.judge_decay**iteration


class RationaleTrainer(Trainer):
    r"""A Trainer for :class:`RationaleDistillation` with all that changes along the way.

    .. math:: L = \alpha_1 L_{pred} + \alpha_2 L_{cl} + \alpha_3 L_D

    The judge has an optimiser of its own; ``L_D`` gives the student no gradient, ``L_cl`` gives the judge none.

    Args:
        objective: a :class:`RationaleDistillation`; its table is the ``train_dataset`` and the ``data_collator``.
        schedule: see :class:`RationaleSchedule`.
        *args, **kwargs: of :class:`Trainer`.

    ``output_dir/rationales/`` keeps what the run needs of its past: ``student-<iteration>.safetensors`` (as many as
    ``negative_lag`` and the checkpoints call for) and ``negatives-<iteration>.jsonl``. A checkpoint also holds the
    judge and its optimiser, so that a resumed run goes on as if it had not stopped.

    One process, and no gradient scaler (float16): the judge is not wrapped. While the judge learns, example weights
    must not depend on losses.

    Logged besides the usual: ``answer_loss``, ``contrast_loss``, ``judge_loss``, and the mean cross entropies of the
    chosen rationales, ``positive_loss`` and ``negative_loss``. Pushing bad rationales away makes good ones less likely,
    too: look at both.

    Source: "QCRD", 2024, arXiv 2405.13014, equation 8. What an iteration is, is not given there.
    """

    objective: RationaleDistillation

    def __init__(self, *args: Any, schedule: RationaleSchedule = RationaleSchedule(), **kwargs: Any):
        objective = kwargs.get("objective")
        if not isinstance(objective, RationaleDistillation):
            raise InputError("RationaleTrainer needs objective=RationaleDistillation(...)")
        kwargs.setdefault("train_dataset", objective.table)
        kwargs.setdefault("data_collator", objective.table.collate)
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1 or self.accelerator.scaler is not None:
            raise InputError("RationaleTrainer works on one process and without a gradient scaler (float16)")
        self.schedule = schedule
        self.add_callback(_JudgeSteps(self))
        self.judge_optimizer: torch.optim.Optimizer | None = None
        self._iteration: int | None = None
        self._past: nn.Module | None = None
        self._sums: dict[str, list[Tensor]] = {}
        if objective.judge is not None:
            objective.judge.to(self.args.device)
            rate = schedule.judge_learning_rate
            self._judge_rate = self.args.learning_rate if rate is None else rate
            self.judge_optimizer = torch.optim.AdamW(objective.judge.parameters(), lr=self._judge_rate)

    # ---- iterations ---------------------------------------------------------------------------------------------

    @property
    def iteration_steps(self) -> int:
        """Optimiser steps of an iteration."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        return max(1, math.ceil(len(self.objective.table) / self._examples_per_step))

    @property
    def _examples_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".") / "rationales"

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see :class:`Trainer`."""
        self._iteration = None
        self.objective.table.replace_own({})
        if not resume_from_checkpoint:
            shutil.rmtree(self._folder, ignore_errors=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Begin an iteration where one is due, then fetch the step's batches."""
        step = self.state.global_step
        iteration = step // self.iteration_steps
        if self._iteration is None and step == 0:
            self._pretrain_judge()
        if iteration != self._iteration:
            self._begin(iteration, resumed=self._iteration is None and step % self.iteration_steps != 0)
            self._iteration = iteration
        return super().get_batch_samples(*args, **kwargs)

    def _begin(self, iteration: int, *, resumed: bool) -> None:
        schedule, objective = self.schedule, self.objective
        if self.judge_optimizer is not None:
            # A judge that does not change needs no graph.
            objective.judge_learns = iteration % schedule.judge_every == 0 and schedule.weight(iteration) > 0
            decay = schedule.judge_decay**iteration if schedule.decays == "learning_rate" else 1.0
            for group in self.judge_optimizer.param_groups:
                group["lr"] = self._judge_rate * decay
        if objective.rationale_weight == 0 or objective.beta == 0 or schedule.negatives_per_question == 0:
            return
        if not resumed:
            save_state(_weights(self.model), self._folder / f"student-{iteration}.safetensors")
            self._forget(iteration)
        if iteration == 0:
            return
        path = self._folder / f"negatives-{iteration}.jsonl"
        if resumed and not path.exists():
            raise InputError(
                f"{path} is missing: a resumed run needs the folder 'rationales' beside its checkpoints, as the "
                "interrupted run left it"
            )
        if resumed:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            texts = {int(line["index"]): list(line["texts"]) for line in lines}
        else:
            texts = self._sample(max(0, iteration - schedule.negative_lag), iteration)
            rows = (json.dumps({"index": i, "texts": t}, ensure_ascii=False) + "\n" for i, t in texts.items())
            write_text(path, "".join(rows))
        objective.table.replace_own(texts)

    def _sample(self, past: int, iteration: int) -> dict[int, list[str]]:
        """What the student of iteration ``past`` says, at high temperature."""
        path = self._folder / f"student-{past}.safetensors"
        if not path.exists():
            raise InputError(f"{path} is missing: the student of iteration {past} is needed for its rationales")
        table = self.objective.table
        if self._past is None:
            self._past = copy.deepcopy(self.accelerator.unwrap_model(self.model)).requires_grad_(False)
        self._past.to(self.args.device).load_state_dict(load_state(path))
        said = generate_texts(
            self._past,
            table.tokenizer,
            [table.explain + e.question for e in table.examples],
            samples=self.schedule.negatives_per_question,
            temperature=self.schedule.negative_temperature,
            max_new_tokens=table.max_target_length,
            max_length=table.max_input_length,
            batch_size=256 if self.args.device.type == "cpu" else 64,
            seed=1_000_003 * self.args.seed + iteration,
            count=self._count_generated,
        )
        return dict(enumerate(said))

    def _count_generated(self, read: int, written: int) -> None:
        encoder, decoder = _parameters(self.model)
        self.current_flos += 2 * (encoder * read + decoder * written)
        self._scored_tokens += read + written

    def _forget(self, iteration: int) -> None:
        """Delete students that neither this run nor one resumed from its oldest checkpoint will ask for."""
        folder = Path(self.args.output_dir or ".")
        steps = [checkpoint_step(c) for c in folder.glob("checkpoint-*") if c.is_dir()]
        oldest = min([iteration, *(step // self.iteration_steps for step in steps)])
        for path in self._folder.glob("student-*.safetensors"):
            number = int(path.stem.removeprefix("student-"))
            if number < oldest - self.schedule.negative_lag:
                path.unlink()

    # ---- the judge ----------------------------------------------------------------------------------------------

    def _pretrain_judge(self) -> None:
        """On the teacher's rationales, and spoilt ones where bad ones are missing."""
        objective = self.objective
        steps = min(self.schedule.pretraining_steps, math.ceil(10 * len(objective.table) / self._examples_per_step))
        if self.judge_optimizer is None or objective.judge is None or steps == 0 or objective.rationale_weight == 0:
            return
        seed, size = self.args.seed, self._examples_per_step
        objective.table.corrupt(seed, rate=self.schedule.corruption)
        order = torch.Generator().manual_seed(seed)
        objective.judge.train()
        objective.tokens = {}
        for _ in range(steps):
            indices = torch.randint(len(objective.table), (size,), generator=order).tolist()
            candidates = objective.table.candidates(indices, self.args.device, corruptions=True)
            loss = objective.judge_loss(candidates, objective.judge_scores(candidates), size).mean()
            self.judge_optimizer.zero_grad()
            # At the weight of the steps that follow: Adam's memory is of the size of its gradients.
            (self.schedule.judge_weight * loss).backward()
            self.judge_optimizer.step()
        self.current_flos += 6 * matmul_parameters(objective.judge) * objective.tokens["judge"][0]
        self._scored_tokens += objective.tokens["judge"][0]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in :class:`Trainer`; the judge's gradient is taken, too."""
        total = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        parts = self.objective.last
        if return_outputs or parts is None:
            return total
        self._note("answer_loss", parts.answer)
        self._note("contrast_loss", parts.contrast)
        if self.objective.last_chosen is not None:
            self._note("positive_loss", self.objective.last_chosen[0])
            self._note("negative_loss", self.objective.last_chosen[1])
        if parts.judge is not None and parts.judge.requires_grad and model.training:
            weights = inputs.get(EXAMPLE_WEIGHTS)
            if weights is None:
                raise InputError("the judge needs example weights that do not depend on the losses")
            factor = self.schedule.judge_weight if self.schedule.decays == "learning_rate" else self._alpha
            (factor * (weights.to(parts.judge.dtype) * parts.judge).sum()).backward()
            self._note("judge_loss", parts.judge)
        return total

    @property
    def _alpha(self) -> float:
        return self.schedule.weight(self.state.global_step // self.iteration_steps)

    def _note(self, name: str, values: Tensor) -> None:
        if self.args.logging_strategy != "no":
            self._sums.setdefault(name, []).append(values.detach().double().cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss."""
        if "loss" in logs:
            for name, values in self._sums.items():
                mean = float(torch.cat(values).nanmean())
                if math.isfinite(mean):
                    logs[name] = mean
            self._sums = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """``2 N`` per token forward and ``4 N`` backward, of encoder, decoder and judge each by its own tokens."""
        encoder, decoder = _parameters(self.model)
        judge = matmul_parameters(self.objective.judge) if self.objective.judge is not None else 0
        total = 0
        for name, size in (("encoder", encoder), ("decoder", decoder), ("judge", judge)):
            trained, scored = self.objective.tokens.get(name, (0, 0))
            total += size * (6 * trained + 2 * scored)
        return total

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.judge_optimizer is not None and self.objective.judge is not None:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            state = {"judge": dict(self.objective.judge.state_dict()), "optimizer": self.judge_optimizer.state_dict()}
            save_state(state, folder / "judge_state.safetensors")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.judge_optimizer is None or self.objective.judge is None:
            return
        path = Path(checkpoint) / "judge_state.safetensors"
        if not path.exists():
            raise InputError(f"{checkpoint} holds no judge (judge_state.safetensors); it is not of such a run")
        state = load_state(path)
        self.objective.judge.load_state_dict(state["judge"])
        self.judge_optimizer.load_state_dict(state["optimizer"])


class _JudgeSteps(TrainerCallback):
    """The judge steps when the student does."""

    def __init__(self, trainer: RationaleTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.judge_optimizer is not None and self.trainer.objective.judge_learns:
            self.trainer.judge_optimizer.step()
            self.trainer.judge_optimizer.zero_grad()


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _parameters(model: Any) -> tuple[int, int]:
    """Matrix parameters of the encoder, and of everything else (decoder and output layer)."""
    encoder = matmul_parameters(model.get_encoder())
    return encoder, matmul_parameters(model) - encoder
