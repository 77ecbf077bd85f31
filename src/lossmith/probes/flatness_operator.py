"""The Hessian of a model's mean loss over data, as a product with many vectors at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError

# Numbers that a block of vectors may hold at a time: on a processor what its caches hold, elsewhere what memory does.
_BLOCK_CPU, _BLOCK = 1 << 20, 1 << 26


class Predictions(NamedTuple):
    """What a batch is asked: rows of the flattened logits, their targets, and the example that each belongs to."""

    rows: Tensor
    targets: Tensor
    examples: Tensor
    size: int


class Curvature:
    r"""The Hessian of the mean cross entropy over all predicted positions, without its ``parameters²`` numbers.

    .. math:: L(\theta) = \frac1N \sum_{n} -\ln f_\theta(y_n \mid x_n), \qquad H = \nabla^2_\theta L

    ``N`` counts valid positions over all batches, so that batches with few of them weigh little; shared parameters
    count once. The model is put in evaluation mode while it is looked at.

    Args:
        model: any module that maps inputs to logits ``(..., classes)``, or a Hugging Face model.
        batches: pairs ``(inputs, targets)`` or dictionaries with ``labels``; they are kept, to be read several times.
        shift: whether position ``t`` predicts the label at ``t + 1``; by default where the model's class is a causal
            language model of Hugging Face.
        exclude: patterns (``lm_head.*``) of parameters that do not count.
        ignore_index: of targets that do not count.

    Raises:
        ValueError: no parameter that is trained, half precision, no batch, a batch without a valid target, targets out
            of range, logits and targets that do not fit.

    >>> model = nn.Linear(2, 3).double()
    >>> curvature = Curvature(model, [(torch.ones(4, 2).double(), torch.tensor([0, 1, 2, 0]))])
    >>> curvature.matmul(torch.zeros(5, 9).double()).shape
    torch.Size([5, 9])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        shift: bool | None = None,
        exclude: Sequence[str] = (),
        ignore_index: int = -100,
    ):
        self.model, self.ignore_index = model, ignore_index
        kind = type(model).__name__
        self.shift = kind.endswith(("ForCausalLM", "LMHeadModel")) if shift is None else shift
        self.parameters = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(fnmatch(name, pattern) for pattern in exclude)
        }
        self._others = {n: p.detach() for n, p in model.named_parameters() if n not in self.parameters}
        if not self.parameters:
            raise ValueError("the model has no trained parameter that is not excluded")
        for name, value in self.parameters.items():
            if value.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"parameter {name} is {value.dtype}; second derivatives need model.float()")
        if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            warnings.warn("the model is in training mode with dropout; its curvature is that without", stacklevel=2)
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.size = sum(value.numel() for value in self.parameters.values())
        self.block = max(1, (_BLOCK_CPU if self.device.type == "cpu" else _BLOCK) // self.size)
        self.batches = [_moved(batch, self.device) for batch in batches]
        if not self.batches:
            raise ValueError("there is no batch to look at")
        self.predictions: list[Predictions] = []
        total = 0.0
        for number in range(len(self.batches)):
            total += self._read(number)
        self.counts = [len(found.rows) for found in self.predictions]
        self.count = sum(self.counts)
        self.loss = total / self.count

    def matmul(self, vectors: Float[Tensor, "vectors parameters"]) -> Float[Tensor, "vectors parameters"]:
        """``H v`` for every row ``v``; the model's gradient is taken once for all of them."""
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ValueError(f"vectors must have shape (vectors, {self.size}), got {tuple(vectors.shape)}")
        result = torch.zeros_like(vectors)
        for number in range(len(self.batches)):
            result += self.batch_product(number)(vectors)
        return result / self.count

    def batch_product(self, number: int) -> Callable[[Tensor], Tensor]:
        """``v -> H v`` of the *sum* of the losses of one batch: one graph, then a block of vectors at a time."""

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return self.losses(parameters, number).sum()

        with self.quiet():
            pull = torch.func.vjp(torch.func.grad(loss), self.parameters)[1]

        def multiply(vectors: Tensor) -> Tensor:
            parts = []
            with self.quiet():
                for part in vectors.to(self.dtype).split(self.block):
                    # H is symmetric: the backward pass of the gradient is the product.
                    tree = self.unflatten(part)
                    if len(part) == 1:
                        single = pull({name: value[0] for name, value in tree.items()})[0]
                        parts.append(self.flatten({name: value[None] for name, value in single.items()}))
                    else:
                        parts.append(self.flatten(torch.func.vmap(lambda v: pull(v)[0])(tree)))
            return torch.cat(parts)

        return multiply

    def losses(self, parameters: Mapping[str, Tensor], number: int, targets: Tensor | None = None) -> Tensor:
        """The loss at every valid position of a batch, under the labels or under other ``targets``."""
        logits, found = self.logits(parameters, number), self.predictions[number]
        chosen = found.targets if targets is None else targets
        return -logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)

    def logits(self, parameters: Mapping[str, Tensor], number: int) -> Tensor:
        """At the valid positions of a batch, ``(positions, classes)``."""
        found = self.predictions[number]
        return self._forward(parameters, self.batches[number]).flatten(0, -2).index_select(0, found.rows)

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Rows of a dictionary of blocks ``(vectors, *shape)``."""
        return torch.cat([tree[name].reshape(len(tree[name]), -1) for name in self.parameters], 1)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """The other way round."""
        parts = vectors.split([value.numel() for value in self.parameters.values()], 1)
        return {
            name: part.reshape(len(vectors), *value.shape)
            for (name, value), part in zip(self.parameters.items(), parts, strict=True)
        }

    def by_module(self, diagonal: Tensor) -> dict[str, float]:
        """Sums of a vector over the parameters of each module."""
        sums: dict[str, float] = {}
        sizes = [value.numel() for value in self.parameters.values()]
        for name, part in zip(self.parameters, diagonal.split(sizes), strict=True):
            module = name.rpartition(".")[0] or name
            sums[module] = sums.get(module, 0.0) + float(part.sum())
        return sums

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode, and attention that can be differentiated twice."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        except RuntimeError as error:
            if "not implemented" in str(error) or "does not support" in str(error):
                raise InputError(
                    f"{type(self.model).__name__} has an operation without second derivative "
                    f'({str(error).splitlines()[0]}); load it with attn_implementation="eager"'
                ) from None
            raise
        finally:
            for module, mode in modes:
                module.training = mode

    def _forward(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        parameters = {**self._others, **parameters}
        if isinstance(batch, Mapping):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            output = torch.func.functional_call(self.model, parameters, (), inputs)
        else:
            output = torch.func.functional_call(self.model, parameters, (batch[0],))
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[..., :-1, :] if self.shift else logits

    @torch.no_grad()
    def _read(self, number: int) -> float:
        """Find the valid positions of a batch, and its summed loss."""
        batch = self.batches[number]
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise ValueError(f"batch {number} needs whole-numbered labels: pairs (inputs, targets) or a key 'labels'")
        labels = labels[..., 1:] if self.shift else labels
        with self.quiet():
            logits = self._forward(self.parameters, batch)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"batch {number}: logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; they need one "
                "more dimension, the classes"
            )
        flat = labels.reshape(-1)
        rows = (flat != self.ignore_index).nonzero().squeeze(-1)
        if not len(rows):
            raise ValueError(f"batch {number}: no label counts, all are {self.ignore_index}")
        targets = flat[rows]
        classes = logits.shape[-1]
        if int(targets.min()) < 0 or int(targets.max()) >= classes:
            raise ValueError(
                f"batch {number}: labels must lie from 0 to {classes - 1} or be {self.ignore_index}, "
                f"got {int(targets.min())} to {int(targets.max())}"
            )
        per_example = max(1, labels[0].numel()) if labels.ndim else 1
        self.predictions.append(Predictions(rows, targets, rows // per_example, len(labels)))
        with self.quiet():
            total = float(self.losses(self.parameters, number).double().sum())
        if total != total or abs(total) == float("inf"):
            raise ValueError(f"batch {number}: the loss is {total}")
        return total


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise ValueError("batches must be pairs (inputs, targets) or dictionaries with labels")
    return tuple(value.to(device) for value in batch)
