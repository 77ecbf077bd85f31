"""The Hugging Face Trainer with an objective and a weighting."""

from __future__ import annotations

import functools
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import accelerate.optimizer
import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import rotate_checkpoints

from lossmith.data.sampling import PermutationStream, Sampling, domains_of
from lossmith.data.weighting import UniformWeighting, Weighting, WeightStatistics, weight_statistics
from lossmith.files import write_text
from lossmith.training.checkpoint import load_state, random_state, save_state, set_random_state
from lossmith.training.models import extra_multiplications, matmul_parameters
from lossmith.training.objectives import EXAMPLE_WEIGHTS, Batch, ExampleEvaluation, Objective
from lossmith.training.record import RunRecord, checkpoint_step, is_complete, mark_complete
from lossmith.training.sparse_gradients import clip_sparse_gradients, has_sparse_gradients, norm_with_sparse_gradients
from lossmith.training.sparsity import SparsityCallback

# Names by which the Trainer logs, and what the run record calls them.
_RECORD_NAMES = {"loss": "train/loss", "loss_unweighted": "train/loss_unweighted"}


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite: the step, and the examples where they are known."""

    def __init__(self, step: int, what: str, examples: list[int] | None = None):
        where = f" (examples {', '.join(map(str, examples[:8]))} of the training data)" if examples else ""
        super().__init__(f"{what} is not finite at step {step}{where}")
        self.step, self.examples = step, examples or []


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Validation by example, in the order of the data set: what paired comparisons need."""

    loss_sums: Tensor
    targets: Tensor
    correct: Tensor
    domains: Tensor | None


class Trainer(transformers.Trainer):
    r"""``transformers.Trainer`` that minimises a weighted mean of per-example losses.

    .. math:: L = \sum_i \mathrm{stopgrad}(w_i)\,\ell_i, \qquad \sum_i w_i = 1

    over the whole optimiser step: all micro-batches of gradient accumulation, on all processes. The same numbers
    come out of every layout (micro-batch size, accumulation, processes, chunk size, padded or packed, resumed).

    Args:
        model: any ``nn.Module``; see ``transformers.Trainer`` for it and for everything not listed here.
        args: ``transformers.TrainingArguments``.
        objective: callable ``(model, batch) -> one loss per example``; see :mod:`lossmith.training.objectives`.
            Without one this is the plain ``transformers.Trainer``.
        weighting: callable ``(losses, step) -> weights``; see :mod:`lossmith.data.weighting`. ``None`` counts every
            example the same.
        sampler: what the examples of each step are, for instance ``temperature(tau=5)``; see
            :mod:`lossmith.data.sampling`. ``None`` draws all alike. Needs ``max_steps``.
        domains: names of the evaluation data's domains, by number: each one's loss is evaluated too
            (``eval_<name>_loss``).
        record: the run record that metrics go to; checkpoints go to ``args.output_dir``.

    Where weights depend on losses and a step has several micro-batches, they are scored in a first pass without
    gradient, and the second pass uses known weights: one more forward pass, counted in ``total_flos`` and
    ``scored_tokens``. Random numbers (dropout) are the same in both.

    Evaluation is always the plain cross entropy per target (``eval_loss``, nats), whatever the training loss.

    Checkpoints hold safetensors and JSON, never pickle (FSDP and DeepSpeed write their own formats), and are complete
    only with ``complete.json``, which is written last.
    """

    def __init__(
        self,
        model: Any = None,
        args: transformers.TrainingArguments | None = None,
        *,
        objective: Objective | Callable[[nn.Module, Batch], Tensor] | None = None,
        weighting: Weighting | Callable[[Tensor, int], Tensor] | None = None,
        sampler: Sampling | None = None,
        domains: tuple[str, ...] = (),
        record: RunRecord | None = None,
        **kwargs: Any,
    ):
        if weighting is not None and objective is None:
            raise ValueError("weighting needs an objective that returns one loss per example, for instance NextToken()")
        if weighting is not None and not callable(weighting):
            raise TypeError(f"weighting must be callable as weighting(losses, step), got {type(weighting).__name__}")
        if sampler is not None and (objective is None or args is None or args.max_steps <= 0):
            raise ValueError("sampler needs an objective and args with max_steps: it has no epochs")
        if args is not None:
            # It would replace a NaN in the logs by the average of the losses before it.
            args.logging_nan_inf_filter = False
        super().__init__(model, args, **kwargs)
        self.objective: Any = objective
        self.record = record
        self.sampler, self.domains = sampler, domains
        self.weighting: Any = UniformWeighting() if weighting is None else self._for_domains(weighting)
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step: int | None = None
        if objective is not None:
            self.loss_is_scaled_for_ga = True
        if record is not None:
            self.add_callback(_RecordCallback(record))
        self._clock = _Clock()
        self._seconds_before = 0.0
        self._unweighted: list[Tensor] = []
        self._statistics: WeightStatistics | None = None
        self._not_finite: list[int] = []
        self._scored_tokens = 0
        self._matmul_parameters: int | None = None
        self._extra_multiplications: int | None = None

    # ---- one optimiser step -------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetch the micro-batches of one optimiser step and give each its weights, where they can be known now."""
        if self.objective is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if (sparsity := self._sparsity()) is not None:
            # Before losses are scored for weights: they are those of the model that is trained.
            sparsity.before_step(self.state.global_step)
        if self._tr_loss.dtype != torch.float64 and self._tr_loss.device.type != "mps":
            self._tr_loss = self._tr_loss.double()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        batches = [dict(self._prepare_inputs(batch)) for batch in batches]
        if getattr(self.objective, "relates_examples", False) and (
            len(batches) > 1 or self.accelerator.num_processes > 1
        ):
            raise ValueError(
                "this objective is one loss of the whole batch, which micro-batches and processes would cut; use one "
                "process and gradient_accumulation_steps=1"
            )
        counts = [self._target_counts(batch) for batch in batches]
        self._count_tokens(sum(int(c.sum()) for c in counts))
        step = self.state.global_step
        needs_losses = getattr(self.weighting, "needs_losses", lambda step: True)(step)
        per_micro_batch = getattr(self.weighting, "per_micro_batch", False)
        if not needs_losses:
            weights = self._weigh(
                [torch.zeros_like(c, dtype=torch.float64) for c in counts], counts, self._domains(batches), known=True
            )
        elif len(batches) > 1 and not per_micro_batch:
            weights = self._weigh(self._score(batches), counts, self._domains(batches))
        else:
            return batches, None
        for batch, w in zip(batches, weights, strict=True):
            batch[EXAMPLE_WEIGHTS] = w
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of this micro-batch's losses; averaging gradients over processes gives the global sum."""
        if self.objective is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = self.objective(model, inputs)
        counts = self._target_counts(inputs)
        if losses.shape != counts.shape:
            raise ValueError(
                f"the objective must return one loss per example, {tuple(counts.shape)}, got {tuple(losses.shape)}"
            )
        self._find_not_finite(losses, inputs)
        weights = inputs.get(EXAMPLE_WEIGHTS)
        if weights is None:
            weights = self._weigh([losses.detach()], [counts], self._domains([inputs]))[0]
            weights = weights / self.current_gradient_accumulation_steps
        elif self.args.logging_strategy != "no":
            self._unweighted.append(losses.detach()[counts > 0].double().mean().nan_to_num())
        return (weights.to(losses.dtype) * losses).sum() * self.accelerator.num_processes

    def _score(self, batches: list[dict[str, Any]]) -> list[Tensor]:
        """Losses of all micro-batches without gradient, drawing the same random numbers as the pass that follows."""
        self.model_wrapped.train()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.compute_loss_context_manager():
            losses = [self.objective(self.model_wrapped, batch).detach() for batch in batches]
        for batch in batches:
            tokens = _positions(batch)
            self._scored_tokens += tokens
            self.current_flos += 2 * self._parameters_multiplied() * tokens
        return losses

    def _for_domains(self, weighting: Any) -> Any:
        """A weighting by domain learns how large the domains of the training data are."""
        if not getattr(weighting, "by_domain", False) or self.train_dataset is None:
            return weighting
        sizes = np.bincount(domains_of(self.train_dataset)) if weighting.sizes is None else weighting.sizes
        return weighting.for_domains(sizes, self.args.max_steps if self.args.max_steps > 0 else None)

    def _domains(self, batches: list[dict[str, Any]]) -> list[Tensor] | None:
        """The domains of a weighting that needs them."""
        if not getattr(self.weighting, "by_domain", False):
            return None
        if any("domain" not in batch for batch in batches):
            raise ValueError("a weighting by domain needs batches with 'domain', the number of each example's domain")
        return [batch["domain"] for batch in batches]

    def _weigh(
        self,
        losses: list[Tensor],
        counts: list[Tensor],
        domains: list[Tensor] | None = None,
        *,
        known: bool = False,
    ) -> list[Tensor]:
        """This process's share of the weights of the whole step."""
        numbers = counts if domains is None else domains
        columns = ([x.double() for x in part] for part in (losses, counts, numbers))
        local = torch.stack([torch.cat(column) for column in columns], dim=-1)
        every = local
        if self.accelerator.num_processes > 1:
            # Processes may hold different numbers of examples; the filling is recognised by its negative count.
            every = self.accelerator.gather(self.accelerator.pad_across_processes(local, dim=0, pad_index=-1))
        values, targets, numbers_of = every.unbind(-1)
        valid = targets > 0
        if not valid.any():
            raise ValueError(
                f"no example of the batch at step {self.state.global_step} has a target: all labels are {-100}"
            )
        if not known and not torch.isfinite(values[valid]).all():
            # Not weighed: the step ends in NonFiniteLossError, with the examples named, when gradients are complete.
            return [torch.full_like(x, 1.0 / int(valid.sum()), dtype=torch.float64) for x in losses]
        weights = torch.zeros_like(values)
        more = {} if domains is None else {"domains": numbers_of[valid].long()}
        found = self.weighting(values[valid], self.state.global_step, **more)
        weights[valid] = self._checked(found, values[valid])
        if getattr(self.weighting, "length_weighted", False):
            weights = weights * targets.clamp_min(0)
            weights = weights / weights.sum()
        if not known and self.args.logging_strategy != "no":
            self._statistics = weight_statistics(values[valid], weights[valid])
            self._unweighted.append(values[valid].mean())
        start = self.accelerator.process_index * (len(every) // self.accelerator.num_processes)
        return list(weights[start : start + len(local)].split([len(c) for c in counts]))

    def _checked(self, weights: Any, losses: Tensor) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != losses.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weighting must return one weight per loss, shape {tuple(losses.shape)}, got {got}")
        weights = weights.detach().to(losses)
        total = float(weights.sum())
        needs_sum = getattr(self.weighting, "sums_to_one", True)
        if not bool((weights >= 0).all()) or (needs_sum and not math.isclose(total, 1.0, rel_tol=1e-3)):
            raise ValueError(
                f"weighting must return weights >= 0 that sum to 1, got sum {total:g}, least {float(weights.min()):g}"
            )
        return weights

    def _target_counts(self, batch: Batch) -> Tensor:
        count = getattr(self.objective, "target_counts", None)
        if count is not None:
            return count(batch)
        first = next(v for v in batch.values() if isinstance(v, Tensor) and v.ndim > 0)
        return torch.ones(len(first), dtype=torch.long, device=first.device)

    # ---- stopping at a loss that is not finite ------------------------------------------------------------------

    def _find_not_finite(self, losses: Tensor, batch: Batch) -> None:
        bad = ~torch.isfinite(losses.detach())
        if bad.any():
            index = batch.get("index", torch.arange(len(losses), device=losses.device))
            self._not_finite += index[bad].tolist()
            if self.accelerator.num_processes == 1 and self.accelerator.scaler is None:
                raise NonFiniteLossError(self.state.global_step, "the loss", self._not_finite)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As in ``transformers.Trainer``, also for sparse gradients (embeddings, trees), which torch does not clip."""
        if not has_sparse_gradients(model):
            return super()._clip_grad_norm(model)
        return clip_sparse_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm; a run whose loss or gradient is not finite ends here, before the weights are touched."""
        if grad_norm is None:
            if has_sparse_gradients(model):
                grad_norm = norm_with_sparse_gradients(model)
            elif self.accelerator.distributed_type == DistributedType.NO and self.accelerator.scaler is None:
                # Accelerate clips to an infinite norm: multiplies every gradient by one.
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = super()._get_grad_norm(model, grad_norm)
        watched = self.objective is not None and self.accelerator.scaler is None
        # The norm is that of the averaged gradient, so that all processes agree and stop together.
        if watched and not math.isfinite(float(norm)):
            what = "the loss" if self._not_finite else "the gradient"
            raise NonFiniteLossError(self.state.global_step, what, self._not_finite)
        self._not_finite = []
        return norm

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Plain cross entropy per target and accuracy; kept by example in ``last_evaluation``."""
        evaluate_batch = getattr(self.objective, "evaluate", None)
        if evaluate_batch is None or isinstance(eval_dataset if eval_dataset is not None else self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        started = time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.model_wrapped
        training = model.training
        model.eval()
        rows: list[Tensor] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            seen = 0
            for batch in loader:
                batch = self._prepare_inputs(batch)
                part: ExampleEvaluation = evaluate_batch(model, batch)
                examples = len(part.targets)
                first = seen + self.accelerator.process_index * examples
                index = batch.get("index", torch.arange(first, first + examples))
                seen += examples * self.accelerator.num_processes
                domain = batch.get("domain", torch.full((examples,), -1))
                columns = [index, part.loss_sums, part.targets, part.correct, domain]
                local = torch.stack([c.to(device=part.loss_sums.device, dtype=torch.float64) for c in columns], dim=-1)
                rows.append(self.accelerator.gather(local))
        model.train(training)
        # Processes fill the last batch with repeated examples: each counts once.
        order, kept = _unique(torch.cat(rows)[:, 0])
        table = torch.cat(rows)[kept][order].cpu()
        domains = table[:, 4].long() if bool((table[:, 4] >= 0).all()) else None
        self.last_evaluation = Evaluation(table[:, 1], table[:, 2].long(), table[:, 3].long(), domains)
        self.evaluated_step = self.state.global_step
        metrics = evaluation_metrics(self.last_evaluation, prefix=metric_key_prefix, domains=self.domains)
        self._clock.exclude(time.perf_counter() - started)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- order of examples --------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.objective is None or self.args.max_steps <= 0 or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.sampler is not None:
            return self.sampler.draw(dataset, steps=self.args.max_steps, batch_size=per_step, seed=seed)
        return PermutationStream(len(dataset), total=self.args.max_steps * per_step, seed=seed)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """With an objective the collator, not the model's signature, says which columns are needed."""
        return dataset if self.objective is not None else super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if self.objective is not None:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    # ---- counting and logging -----------------------------------------------------------------------------------

    def _count_tokens(self, targets: int) -> None:
        total = targets
        if self.accelerator.num_processes > 1:
            total = int(self.accelerator.reduce(torch.tensor(targets, device=self.args.device), "sum"))
        self.state.num_input_tokens_seen += total

    def _parameters_multiplied(self) -> int:
        if self._matmul_parameters is None:
            self._matmul_parameters = matmul_parameters(cast(nn.Module, self.model))
        sparsity = self._sparsity()
        return self._matmul_parameters - (sparsity.removed if sparsity is not None else 0)

    def _sparsity(self) -> SparsityCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, SparsityCallback)), None)

    def floating_point_ops(self, inputs: Any) -> int:
        """``6 N`` per position: forward and backward of ``N`` active matrix parameters, without attention scores.

        Layers that multiply by more than their parameters add what they say.
        """
        if self.objective is None:
            return super().floating_point_ops(inputs)
        # What an objective runs besides the model (a teacher).
        extra = getattr(self.objective, "extra_flops", None)
        if self._extra_multiplications is None:
            self._extra_multiplications = extra_multiplications(cast(nn.Module, self.model))
        multiplied = self._parameters_multiplied() + self._extra_multiplications
        return 6 * multiplied * _positions(inputs) + (extra(inputs) if extra else 0)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``transformers.Trainer.train``. A resumed run continues its record."""
        if self.record is not None and isinstance(resume_from_checkpoint, str | Path):
            logged = [m for m in self.record.metrics() if m.get("step", 0) <= checkpoint_step(resume_from_checkpoint)]
            self._seconds_before = max((m.get("seconds") or 0.0 for m in logged), default=0.0)
            self._scored_tokens = max((m.get("scored_tokens") or 0 for m in logged), default=0)
        self._clock = _Clock()
        _look_for_lomo_once()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens, seconds and memory to what the Trainer logs; every callback sees them."""
        if self.objective is not None:
            if "loss" in logs and self._unweighted:
                mean = torch.stack([x.to(torch.float64) for x in self._unweighted]).mean()
                logs["loss_unweighted"] = nested_gather(mean, self.args.parallel_mode).mean().item()
                self._unweighted = []
            if "loss" in logs and self._statistics is not None:
                logs["weights_effective_sample_size"] = self._statistics.effective_sample_size
                logs["weights_largest_relative"] = self._statistics.largest_relative_weight
                self._statistics = None
            logs["tokens"] = self.state.num_input_tokens_seen
            if self._sparsity() is not None:
                logs["parameters"] = self._parameters_multiplied()
            if self._scored_tokens:
                logs["scored_tokens"] = self._scored_tokens * self.accelerator.num_processes
            logs["seconds"] = self._seconds_before + self._clock.seconds()
            logs["memory_bytes"] = _memory_in_use(self.args.device)
        super().log(logs, start_time)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, declare the checkpoint complete, and only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = self._get_output_dir(trial)
        checkpoint = Path(folder) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and (sparsity := self._sparsity()) is not None:
                sparsity.save_into(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(checkpoint)
        except Exception:
            # A full disk, most likely: half a checkpoint is of no use to anyone.
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _has_own_state_format(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled or self.is_fsdp_xla_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._has_own_state_format():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(cast(Any, self.optimizer).state_dict(), Path(output_dir) / "optimizer.safetensors")
            save_state(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.safetensors")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (sparsity := self._sparsity()) is not None:
            sparsity.resume_from(checkpoint)
        if checkpoint is None or not (Path(checkpoint) / "optimizer.safetensors").exists():
            return super()._load_optimizer_and_scheduler(checkpoint)
        cast(Any, self.optimizer).load_state_dict(load_state(Path(checkpoint) / "optimizer.safetensors"))
        cast(Any, self.lr_scheduler).load_state_dict(load_state(Path(checkpoint) / "scheduler.safetensors"))
        return None

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(scaler.state_dict(), Path(output_dir) / "scaler.safetensors")

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None and (Path(checkpoint) / "scaler.safetensors").exists():
            scaler.load_state_dict(load_state(Path(checkpoint) / "scaler.safetensors"))

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(random_state(), Path(output_dir) / f"rng_state_{self.args.process_index}.safetensors")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"rng_state_{self.args.process_index}.safetensors"
        if not path.exists():
            warnings.warn(
                f"{checkpoint} has no random state for process {self.args.process_index}: dropout will differ",
                stacklevel=2,
            )
            return
        set_random_state(load_state(path))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir or ".")
        pickled = folder / "training_args.bin"
        if pickled.exists():
            pickled.unlink()
            write_text(folder / "training_args.json", self.args.to_json_string())


class _RecordCallback(TrainerCallback):
    """Writes whatever is logged to the run record."""

    def __init__(self, record: RunRecord):
        self.record = record

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        names = {k: _RECORD_NAMES.get(k, k) for k in logs}
        names |= {k: "eval/" + k[5:].replace("_loss", "/loss") for k in logs if k.startswith("eval_")}
        names |= {k: "weights/" + k[8:] for k in logs if k.startswith("weights_")}
        self.record.append({"step": state.global_step, **{names[k]: v for k, v in logs.items()}})


class _Clock:
    """Seconds of training, evaluation excluded."""

    def __init__(self) -> None:
        self._start, self._excluded = time.perf_counter(), 0.0

    def exclude(self, seconds: float) -> None:
        self._excluded += seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._excluded


def evaluation_metrics(
    evaluation: Evaluation, *, prefix: str = "eval", domains: tuple[str, ...] = ()
) -> dict[str, float]:
    """Loss in nats per target, accuracy, number of targets; with ``domains`` also the loss of each."""
    total = int(evaluation.targets.sum())
    metrics = {
        f"{prefix}_loss": float(evaluation.loss_sums.sum()) / max(total, 1),
        f"{prefix}_accuracy": int(evaluation.correct.sum()) / max(total, 1),
        f"{prefix}_targets": total,
    }
    if evaluation.domains is not None:
        for number, name in enumerate(domains):
            mine = evaluation.domains == number
            if targets := int(evaluation.targets[mine].sum()):
                metrics[f"{prefix}_{name}_loss"] = float(evaluation.loss_sums[mine].sum()) / targets
    return metrics


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, for ``resume_from_checkpoint``."""
    whole = [c for c in Path(folder).glob("checkpoint-*") if is_complete(c)]
    return max(whole, key=checkpoint_step, default=None)


def _look_for_lomo_once() -> None:
    """Accelerate's optimiser searches the path for an optional package, twice per step: 0.5 ms of a small model's 3."""
    search = getattr(accelerate.optimizer, "is_lomo_available", None)
    if search is not None and not hasattr(search, "cache_info"):
        accelerate.optimizer.is_lomo_available = functools.cache(search)


def _positions(batch: Batch) -> int:
    main = batch.get("input_ids", batch.get("labels"))
    return main.numel() if isinstance(main, Tensor) else 0


def _unique(index: Tensor) -> tuple[Tensor, Tensor]:
    """First occurrence of each value, and the order that sorts them."""
    first: dict[int, int] = {}
    for place, value in enumerate(index.tolist()):
        first.setdefault(int(value), place)
    values = torch.tensor(list(first))
    return torch.argsort(values), torch.tensor(list(first.values()))


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
