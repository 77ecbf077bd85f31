"""Training with pruned weights: dense, ours (zeros in place), and `torch.nn.utils.prune` (weights times masks).

All three take the same steps of AdamW on the same Llama-style model in one process, interleaved; ours and the peer
with the same masks, and end with the same weights. Prints medians, ratios, the memory that masks and products hold, and
what one pruning costs.

    python benchmarks/sparse_pretraining.py --hidden 256 --layers 4 --sparsity 0.8
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.sparsity import PruningSchedule, SparsePretraining, magnitude_masks, prunable_weights


def build(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Arm:
    """A model, its optimiser, and what is done before and after a step."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.model = name, build(arguments)
        self.sparsity: SparsePretraining | None = None
        if name == "ours":
            self.sparsity = SparsePretraining(PruningSchedule(10**6, arguments.sparsity, 0, 0))
            self.sparsity.attach(self.model)
            started = time.perf_counter()
            self.sparsity.before_step(0)
            self.pruning = time.perf_counter() - started
        if name == "torch prune":
            found = prunable_weights(self.model)
            masks = magnitude_masks(found.weights, 1 - arguments.sparsity)
            for full, mask in masks.items():
                prune.custom_from_mask(self.model.get_submodule(full.removesuffix(".weight")), "weight", mask)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self, number: int, tokens: torch.Tensor) -> float:
        started = time.perf_counter()
        if self.sparsity is not None:
            self.sparsity.before_step(number)
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.sparsity is not None:
            self.sparsity.after_step()
        return time.perf_counter() - started

    def extra_bytes(self) -> int:
        """Held between steps besides the weights."""
        if self.sparsity is not None:
            return sum(mask.numel() * mask.element_size() for mask in self.sparsity.masks.values())
        buffers = sum(b.numel() * b.element_size() for n, b in self.model.named_buffers() if n.endswith("weight_mask"))
        products = sum(
            module.weight.numel() * module.weight.element_size()
            for module in self.model.modules()
            if hasattr(module, "weight_mask")
        )
        return buffers + products

    def effective(self) -> list[torch.Tensor]:
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        if self.name == "torch prune":
            return [m.weight_orig * m.weight_mask for m in layers]
        return [m.weight for m in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    arms = [Arm(name, arguments) for name in ("dense", "ours", "torch prune")]
    generator = torch.Generator().manual_seed(1)
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number in range(arguments.repeats + 2):
        tokens = torch.randint(arguments.vocabulary, (arguments.tokens // 64, 64), generator=generator)
        for arm in arms[number % 3 :] + arms[: number % 3]:
            seconds = arm.step(number + 1, tokens)
            if number >= 2:
                times[arm.name].append(seconds)
    weights = prunable_weights(arms[0].model).number
    torch.testing.assert_close(arms[1].effective(), arms[2].effective(), rtol=1e-3, atol=1e-5)
    print(f"{weights:,} prunable weights, {arguments.sparsity:g} pruned, {arguments.tokens} tokens per step,", end=" ")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; ours and torch prune end with the same weights"
    )
    base = statistics.median(times["dense"])
    for arm in arms:
        median = statistics.median(times[arm.name])
        ratio = statistics.median(a / b for a, b in zip(times[arm.name], times["dense"], strict=True))
        print(
            f"{arm.name:12} {1e3 * median:8.1f} ms per step  {ratio:5.2f}x dense  "
            f"{arm.extra_bytes() / weights:4.1f} bytes per weight besides"
        )
    pair = statistics.median(a / b for a, b in zip(times["ours"], times["torch prune"], strict=True))
    print(f"ours / torch prune: {pair:.2f} (median of paired steps)")
    print(f"one pruning of all layers: {1e3 * arms[1].pruning:.0f} ms, {arms[1].pruning / base:.2f} dense steps")


if __name__ == "__main__":
    main()
