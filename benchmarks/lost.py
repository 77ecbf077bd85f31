"""Training memory and step time: LOST against full rank, and against the arithmetic of its own matrices.

One Llama-style block stack per width, dense, LOST and SLTrain, takes steps of AdamW on the same tokens in one process,
interleaved. Prints the memory that parameters, gradients and Adam's moments hold, what a forward pass keeps for
backward, medians of paired ratios, and per layer the time of a forward and backward pass over that of the bare products
of the same shapes.

    python benchmarks/lost.py --hidden 512 1024 2048 --rank 0.25 --density 0.01
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.registry import SPARSITIES
from lossmith.sparsity import LOSTLinear


def build(hidden: int, arguments: argparse.Namespace, weights: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=(8 * hidden // 3 + 15) // 16 * 16,
        num_hidden_layers=arguments.layers, num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    SPARSITIES.build(weights).attach(model, None)
    return model


class Arm:
    """A model, its optimiser and what they hold."""

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.held = 0

    def step(self, tokens: torch.Tensor) -> float:
        started = time.perf_counter()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - started
        self.held = self.bytes_held()
        self.optimizer.zero_grad(set_to_none=False)
        return seconds

    def bytes_held(self) -> int:
        """Parameters, gradients and optimiser state, and the channels' numbers."""
        parameters = list(self.model.parameters())
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *self.model.buffers()]
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def bytes_kept(self, tokens: torch.Tensor) -> int:
        """What one forward pass keeps for backward, besides parameters and buffers."""
        own = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        del loss
        return sum(kept.values())


def floor(hidden: int, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """One layer: LOST over the products alone that it cannot do without, and over a dense layer; its FLOPs ratio."""
    dense = nn.Linear(hidden, hidden, bias=False)
    layer = LOSTLinear.from_linear(dense, arguments.rank, arguments.density)
    x = torch.randn(arguments.tokens, hidden, requires_grad=True)
    g = torch.randn(arguments.tokens, hidden)
    inner, taken = torch.randn(arguments.tokens, layer.rank), torch.randn(arguments.tokens, layer.columns)
    A, B, values = layer.A.detach(), layer.B.detach(), layer.values
    assert values is not None
    W = values.detach()

    def products() -> None:
        plain = x.detach()
        # Forward, gradients of the matrices, gradients of what they read.
        plain @ A, inner @ B.T, taken @ W.T
        plain.T @ inner, g.T @ inner, g.T @ taken
        inner @ A.T, g @ B, g @ W

    def through(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(module(x), [x, *module.parameters()], g)

        return run

    runs = {"products": products, "lost": through(layer), "dense": through(dense)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.repeats + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    ratio = [
        statistics.median(a / b for a, b in zip(times["lost"], times[n], strict=True)) for n in runs if n != "lost"
    ]
    return ratio[0], ratio[1], sum(p.numel() for p in layer.parameters()) / dense.weight.numel()


def inference(hidden: int, arguments: argparse.Namespace) -> float:
    """Forward pass of a model of rank 1/8 over that of the dense one."""
    models = [
        build(hidden, arguments, spec).eval() for spec in ("dense", f"lost(rank=0.125, density={arguments.density})")
    ]
    tokens = torch.randint(512, (arguments.tokens // 128, 128), generator=torch.Generator().manual_seed(2))
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for number in range(arguments.repeats + 2):
            for model, own in zip(models, times, strict=True):
                started = time.perf_counter()
                model(input_ids=tokens)
                if number >= 2:
                    own.append(time.perf_counter() - started)
    return statistics.median(b / a for a, b in zip(*times, strict=True))


def compare(hidden: int, arguments: argparse.Namespace) -> None:
    """One width: all arms interleaved."""
    options = f"rank={arguments.rank}, density={arguments.density}"
    specs = {"dense": "dense", "lost": f"lost({options})", "sltrain": f"sltrain(rank={arguments.rank}, density=0.03)"}
    arms = [Arm(name, build(hidden, arguments, spec)) for name, spec in specs.items()]
    generator = torch.Generator().manual_seed(1)
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number in range(arguments.repeats + 1):
        tokens = torch.randint(512, (arguments.tokens // 128, 128), generator=generator)
        for arm in arms[number % 3 :] + arms[: number % 3]:
            seconds = arm.step(tokens)
            if number >= 1:
                times[arm.name].append(seconds)
    kept = {arm.name: arm.bytes_kept(tokens) for arm in arms}
    print(f"hidden {hidden}, {arguments.layers} layers, {arguments.tokens} tokens per step, {options}")
    for arm in arms:
        ratio = statistics.median(a / b for a, b in zip(times[arm.name], times["dense"], strict=True))
        number = sum(p.numel() for p in arm.model.parameters())
        print(
            f"  {arm.name:8} {number:12,} parameters  {arm.held / 2**20:8.1f} MiB held "
            f"({arm.held / arms[0].held:.3f})  {kept[arm.name] / 2**20:7.1f} MiB kept "
            f"({kept[arm.name] / kept['dense']:.3f})  step {ratio:.2f}x dense"
        )
    of_products, of_dense, arithmetic = floor(hidden, arguments)
    print(
        f"  one layer {hidden} x {hidden}, forward and backward: {of_dense:.2f}x a dense layer "
        f"(multiplications {arithmetic:.2f}x), {of_products:.2f}x the bare products"
    )
    del arms
    print(f"  inference at rank 1/8: {inference(hidden, arguments):.2f}x dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; ratios are medians of interleaved pairs")
    for hidden in arguments.hidden:
        compare(hidden, arguments)
        gc.collect()


if __name__ == "__main__":
    main()
