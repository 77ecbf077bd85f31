"""Time and memory of the streaming pass of SparseGPT against all layers at once, and of fused descent against SGD.

The plain way keeps a Hessian of every layer while the dense model runs once, then prunes them all; the streaming way
keeps one, and gives each layer the inputs that pruned layers produce. They do not prune alike, which the error shows:
the squared difference of the logits from the dense model's on other tokens. Both run in one process, interleaved;
memory is counted from the tensors that are alive, by torch's own dispatch, without the model.

    python benchmarks/d_pruner.py --hidden 256 --layers 4 8 --repeats 3
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.sparsity import InputProducts, block_weights, dual_importance, next_token_loss, sparsegpt, surgeon


class Peak(TorchDispatchMode):
    """The most bytes that new tensors held at a time; those of ``model``, which are written in place, are not new."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def free() -> None:
            self.known.discard(key)
            self.alive -= size

        weakref.finalize(storage, free)


def build(layers: int, arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=layers, num_attention_heads=8, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def at_once(model: nn.Module, batches: Any) -> None:
    """A Hessian per layer from one pass over the dense model."""
    weights = block_weights(model).weights
    seen = {name: InputProducts() for name in weights}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, into=seen[name]: into.add(args[0])
        )
        for name in weights
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            weight.copy_(surgeon(weight, seen[name].hessian()).weight)


def plain_descent(model: nn.Module, batches: Any) -> None:
    """The same domain importance with torch's SGD: all gradients at once."""
    weights = block_weights(model).weights
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for batch in batches:
        next_token_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, weight in weights.items():
            assert weight.grad is not None
            term = weight.grad * weight.detach()
            scores[name] += (term + term.square() / (2 * len(batches))).abs()
        optimizer.step()
        optimizer.zero_grad()


def compare(
    ways: dict[str, Callable[[nn.Module], Any]], model: nn.Module, repeats: int
) -> tuple[dict[str, float], dict[str, int], dict[str, nn.Module]]:
    """Medians of processor seconds, peaks of memory, and the last models."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks, models = {}, {}
    for number in range(repeats + 1):
        for name, way in ways.items():
            own = copy.deepcopy(model)
            gc.collect()
            if number == 0:
                with Peak(own) as peak:
                    way(own)
                peaks[name] = peak.peak
            else:
                started = time.process_time()
                way(own)
                seconds[name].append(time.process_time() - started)
            models[name] = own
    return {name: statistics.median(values) for name, values in seconds.items()}, peaks, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for layers in arguments.layers:
        model = build(layers, arguments)
        mib = sum(p.numel() for p in model.parameters()) * 4 / 2**20
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(512, (arguments.rows + 4, arguments.length), generator=generator)
        batches = [{"input_ids": part} for part in ids[: arguments.rows].split(4)]
        test = ids[arguments.rows :]
        size = f"{arguments.rows} x {arguments.length} tokens"
        print(f"{layers} blocks of width {arguments.hidden}, model {mib:.0f} MiB, {size}")
        ways: dict[str, Callable[[nn.Module], Any]] = {
            "all layers at once": lambda m, b=batches: at_once(m, b),
            "streaming, by layer": lambda m, b=batches: sparsegpt(m, b),
            "streaming, by block": lambda m, b=batches: sparsegpt(m, b, order="block"),
        }
        seconds, peaks, models = compare(ways, model, arguments.repeats)
        with torch.no_grad():
            dense = model(test).logits
            errors = {name: float((m(test).logits - dense).square().mean()) for name, m in models.items()}
        first = next(iter(ways))
        for name in ways:
            print(
                f"  {name:20}  time {seconds[name] / seconds[first]:5.2f}x  peak {peaks[name] / 2**20:7.1f} MiB "
                f"({peaks[name] / peaks[first]:.2f}x)  error {errors[name] / errors[first]:.3f}x"
            )
        # Few tokens at a time: where weights, not activations, are what memory holds.
        single = [{"input_ids": row[None, :64]} for row in ids[:8]]
        descents: dict[str, Callable[[nn.Module], Any]] = {
            "SGD": lambda m, b=single: plain_descent(m, b),
            "fused": lambda m, b=single: dual_importance(m, b, general=None, epochs=1, keep_finetuned=True),
        }
        seconds, peaks, _ = compare(descents, model, arguments.repeats)
        ratio, memory = seconds["fused"] / seconds["SGD"], peaks["fused"] / peaks["SGD"]
        print(f"  domain importance, fused over SGD: time {ratio:.2f}x, peak {memory:.2f}x")


if __name__ == "__main__":
    main()
