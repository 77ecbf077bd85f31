"""Faults of public loss weightings: each check passes with our form and fails with the faulty one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lossmith.data.weighting import Weighting, linupper, loss_weights
from lossmith.losses import cross_entropy
from lossmith.registry import WEIGHTINGS
from lossmith.training import DynamicReweightedLoss

LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


def h_of(losses: Tensor) -> Tensor:
    """Min-max normalised to [-1, 1], as the papers print it."""
    low, high = losses.min(), losses.max()
    return 2 * losses / (high - low) - (high + low) / (high - low)


def test_weights_per_micro_batch_change_with_the_cut_of_the_batch(tmp_path: Path) -> None:
    """The released code's variant is in the library, so that the fault can be shown and compared."""
    import transformers

    from lossmith.training import Trainer

    transformers.utils.logging.set_verbosity_error()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)

    def step_loss(weighting: Weighting, micro_batch: int) -> float:
        model = nn.Linear(1, 1, dtype=torch.float64)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=micro_batch, report_to="none", disable_tqdm=True,
            gradient_accumulation_steps=8 // micro_batch, use_cpu=True, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, weighting=weighting, train_dataset=range(8),
            objective=lambda model, batch: (model(batch["x"][:, None])[:, 0] - batch["x"]).square(),
            data_collator=lambda rows: {"x": x[rows]},
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    def check(weighting: Weighting) -> None:
        assert step_loss(weighting, 2) == pytest.approx(step_loss(weighting, 8), rel=1e-12)

    check(linupper(r=0.4))
    with pytest.raises(AssertionError):
        check(linupper(r=0.4, variant="released"))


def test_a_uniform_option_that_is_a_softmax_of_the_losses_is_not_uniform() -> None:
    def check(weigh: Callable[[Tensor], Tensor]) -> None:
        assert torch.equal(weigh(LOSSES), torch.full((4,), 0.25, dtype=torch.float64))

    check(lambda losses: WEIGHTINGS.build("uniform")(losses, 0))
    check(lambda losses: loss_weights(losses, "linupper", r=None))
    with pytest.raises(AssertionError):
        check(lambda losses: torch.softmax(h_of(losses), 0))


def test_normalising_in_half_precision_moves_the_examples() -> None:
    """The exact h of these are -1, -1/3, 1/3, 1, within the rounding of the losses themselves."""
    losses = torch.tensor([3.1, 3.2, 3.3, 3.4], dtype=torch.bfloat16)
    exact = torch.softmax(torch.clamp_max(h_of(losses.double()) + 1, 1) / 0.4, 0)

    def check(weigh: Callable[[Tensor], Tensor]) -> None:
        torch.testing.assert_close(weigh(losses).double(), exact, rtol=1e-5, atol=0)

    check(lambda losses: loss_weights(losses, "linupper", r=0.4))
    with pytest.raises(AssertionError):
        check(lambda losses: torch.softmax(torch.clamp_max(h_of(losses) + 1, 1).float() / 0.4, 0))


def test_a_gradient_through_the_weights_is_another_gradient() -> None:
    def check(weigh: Callable[[Tensor], Tensor]) -> None:
        x = torch.tensor([0.5, -1.0, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
        losses = x.square()
        (gradient,) = torch.autograd.grad((weigh(losses) * losses).sum(), x)
        constant = loss_weights(x.detach().square(), "linupper", r=0.4)
        torch.testing.assert_close(gradient, constant * 2 * x.detach(), rtol=1e-12, atol=0)

    check(lambda losses: loss_weights(losses, "linupper", r=0.4))
    with pytest.raises(AssertionError):
        check(lambda losses: torch.softmax(torch.clamp_max(h_of(losses) + 1, 1) / 0.4, 0))


def test_a_sequence_without_targets_must_not_poison_the_others() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    labels = torch.randint(7, (3, 5))
    labels[1] = -100

    def check(criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(criterion(x, labels), x)
        kept = DynamicReweightedLoss("linupper", r=0.4)(logits[[0, 2]], labels[[0, 2]])
        torch.testing.assert_close(criterion(logits, labels), kept)
        assert torch.equal(gradient[1], torch.zeros(5, 7, dtype=torch.float64))
        assert gradient[[0, 2]].abs().sum() > 0

    def faulty(logits: Tensor, labels: Tensor) -> Tensor:
        rows = cross_entropy(logits[:, :-1], labels[:, 1:])
        losses = rows.sum(-1) / (labels[:, 1:] != -100).sum(-1)  # 0 / 0
        weights = torch.softmax(torch.clamp_max(h_of(losses.detach()) + 1, 1) / 0.4, 0)
        return (weights * losses).sum()

    check(DynamicReweightedLoss("linupper", r=0.4))
    with pytest.raises(AssertionError):
        check(faulty)


def test_a_temperature_that_is_cut_to_an_integer_cannot_be_a_fraction() -> None:
    def check(read: Callable[[str], Any]) -> None:
        assert read("0.4") == 0.4

    check(lambda text: WEIGHTINGS.build(f"linupper(r={text})").temperature(0))
    with pytest.raises(AssertionError):
        check(lambda text: int(float(text)))


def _two_processes(rank: int, port: int, folder: str) -> None:
    """On each process: the gradient after averaging over processes, of three forms."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    logits, labels = _batch()
    for name in ("ours", "weights per process", "without the number of processes"):
        x = logits[rank * 3 : rank * 3 + 3].clone().requires_grad_()
        criterion = DynamicReweightedLoss("linupper", r=0.4, gather=name != "weights per process")
        loss = criterion(x, labels[rank * 3 : rank * 3 + 3])
        (gradient,) = torch.autograd.grad(loss / 2 if name.startswith("without") else loss, x)
        averaged = {"gradient": (gradient / 2).contiguous()}  # over two processes
        save_file(averaged, Path(folder) / f"{name} {rank}.safetensors")
    dist.destroy_process_group()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 6, 6, dtype=torch.float64)[:, None, None]
    logits = scale * torch.randn(6, 5, 7, generator=generator, dtype=torch.float64)
    return logits, torch.randint(7, (6, 5), generator=generator)


@pytest.mark.slow
def test_weights_per_process_and_a_forgotten_number_of_processes_give_other_gradients(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_two_processes, (port, str(tmp_path)), nprocs=2)
    logits, labels = _batch()
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(DynamicReweightedLoss("linupper", r=0.4)(logits, labels), logits)

    def check(name: str) -> None:
        parts = [load_file(tmp_path / f"{name} {rank}.safetensors")["gradient"] for rank in range(2)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-14)

    check("ours")
    for name in ("weights per process", "without the number of processes"):
        with pytest.raises(AssertionError):
            check(name)
