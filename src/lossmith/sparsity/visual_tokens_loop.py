"""The sequence of a denoising loop, from which visual tokens are dropped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossmith.sparsity.visual_tokens_cost import denoising_flops, prefill_flops
from lossmith.sparsity.visual_tokens_denoiser import AfterAttention, Denoised, Denoiser, DenoisingStep
from lossmith.sparsity.visual_tokens_schedule import Cut, PruneSchedule
from lossmith.sparsity.visual_tokens_scores import (
    AttentionLogits,
    mean_of_queries,
    raters,
    received_by_all,
    received_by_each,
)
from lossmith.sparsity.visual_tokens_select import select_tokens

#: Probabilities, chosen classes, generator -> how sure each token is; the surest are committed.
Confidence = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass(slots=True)
class _Seen:
    """What one forward pass showed, for the selectors."""

    tokens: list[int] = field(default_factory=list)
    hidden: Tensor | None = None
    all_queries: Tensor | None = None
    answers: Tensor | None = None
    texts: Tensor | None = None


class PrunedSequence:
    """The sequence ``text, image, text, answer`` and the numbers of its parts, which pruning changes together."""

    def __init__(
        self,
        model: Denoiser,
        embeddings: Tensor,
        visual: slice,
        answer_length: int,
        steps: int,
        block_length: int | None,
        prune: PruneSchedule | None,
        real: Tensor | None,
        temperature: float,
        seed: int | None,
    ):
        batch, prompt, _ = embeddings.shape
        start, stop, stride = visual.indices(prompt)
        if stride != 1 or stop <= start:
            raise ValueError(f"visual must be a slice of one token or more of the prompt of {prompt}, got {visual}")
        if answer_length < 1 or steps < 1:
            raise ValueError(f"answer_length and steps must be at least 1, got {answer_length} and {steps}")
        self.block_length = answer_length if block_length is None else block_length
        if self.block_length < 1 or answer_length % self.block_length:
            raise ValueError(f"block_length {self.block_length} does not divide the answer_length {answer_length}")
        self.blocks = answer_length // self.block_length
        if steps % self.blocks:
            raise ValueError(f"{self.blocks} blocks do not divide the {steps} steps")
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if real is not None and not real[:, start:stop].all():
            there = real[:, start:stop].sum(1)
            raise ValueError(
                f"images of different numbers of tokens in one batch: each needs all {stop - start} tokens of visual, "
                f"got {int(there.min())} to {int(there.max())}; answer them one by one"
            )
        device = embeddings.device
        self.model, self.batch, self.start, self.visual = model, batch, start, stop - start
        self.answer_length, self.temperature, self.prune = answer_length, temperature, prune
        layers = model.shape.layers
        self.cuts = prune.cuts(steps=steps, layers=layers, visual=self.visual) if prune is not None else ()
        self.generator = torch.Generator()
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()
        self.ids = torch.full((batch, answer_length), model.mask_token_id, device=device)
        self.committed_at = torch.full_like(self.ids, -1)
        self.embeddings = torch.cat([embeddings, model.embed(self.ids)], dim=1)
        self.real = None
        if real is not None and not real.all():
            self.real = torch.cat([real, torch.ones_like(self.ids, dtype=torch.bool)], dim=1)
        self.positions = self._numbered()
        self.kept = torch.arange(self.visual, device=device).expand(batch, -1)
        self.seen, self.step, self.steps, self.scoring_flops = _Seen(), 0, steps, 0.0
        self.tokens: list[list[int]] = []
        self.guided = False

    # ---- forward passes ---------------------------------------------------------------------------------------------

    def add_unconditional(self) -> None:
        """Rows for guidance: the same with the whole prompt masked; they follow all cuts."""
        masked = self.embeddings.clone()
        prompt = masked.shape[1] - self.answer_length
        filler = torch.full((self.batch, prompt), self.model.mask_token_id, device=masked.device)
        masked[:, :prompt] = self.model.embed(filler)
        self.embeddings = torch.cat([self.embeddings, masked])
        self.positions = torch.cat([self.positions, self.positions])
        self.real = None if self.real is None else torch.cat([self.real, self.real])
        self.guided = True

    def forward(self, guidance: float = 0.0) -> Tensor:
        """Logits of the answer in this step, with a cut inside of it where there is one."""
        cut = next((c for c in self.cuts if c.step == self.step and c.layer is not None), None)
        after = any(c.step == self.step and c.layer is None for c in self.cuts)
        self.seen = _Seen()
        indices: list[Tensor] = []

        def after_attention(layer: int, hidden: Tensor, attention: AttentionLogits | None) -> Tensor | None:
            self.seen.tokens.append(hidden.shape[1])
            if after:
                self._watch(attention)
            if cut is None or layer != cut.layer or cut.left == self.visual:
                return None
            if self.prune is not None and self.prune.uses == "attention":
                self.seen.all_queries = self.seen.answers = self.seen.texts = None
                self._watch(attention)
            self.seen.hidden = hidden
            chosen = self._chosen(cut, self.ids == self.model.mask_token_id)
            indices.append(chosen)
            return self._sequence_indices(chosen)

        hidden, logits = self.model.denoise(
            self.embeddings, self.positions, self.real, self.answer_length, after_attention
        )
        if cut is not None and cut.left != self.visual and not indices:
            raise ValueError(
                f"the schedule drops tokens in layer {cut.layer}, but the model's denoise() never called "
                "after_attention there"
            )
        self.seen.hidden = hidden
        layers = self.model.shape.layers
        self.tokens.append(self.seen.tokens if len(self.seen.tokens) == layers else [self.embeddings.shape[1]] * layers)
        if cut is not None and indices and not cut.passing:
            self._drop(indices[0])
        if torch.isnan(logits).any():
            raise ValueError(f"the model's logits are NaN in step {self.step}")
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (guidance + 1) * (conditional - unconditional)
        # A copy: ids are forbidden in place.
        return logits.clone() if logits.dtype == torch.float64 else logits.float().clone()

    def commit(self, logits: Tensor, number: int, end: int, sure: Confidence) -> DenoisingStep:
        """Replace the masks of the surest ``number`` tokens before ``end``."""
        entered = self.tokens[-1][0] - (self.embeddings.shape[1] - self.visual)
        masked = self.ids == self.model.mask_token_id
        wide = logits.double()
        if self.temperature:
            # Gumbel-max in the form of the released code: exp(o) / (-log u)^temperature.
            u = torch.rand(wide.shape, generator=self.generator, dtype=torch.float64).to(wide.device)
            chosen = (wide - self.temperature * torch.log(-torch.log(u.clamp_min(1e-300)))).argmax(-1)
        else:
            chosen = wide.argmax(-1)
        confidence = sure(torch.softmax(wide, -1), chosen, self.generator)
        confidence = confidence.masked_fill(~masked, -torch.inf)
        confidence[:, end:] = -torch.inf
        places = confidence.argsort(dim=1, descending=True, stable=True)[:, :number]
        surest = torch.zeros_like(masked).scatter(1, places, True)
        self.ids = torch.where(surest, chosen, self.ids)
        self.committed_at = self.committed_at.masked_fill(surest, self.step)
        new = self.model.embed(chosen).to(self.embeddings.dtype)
        answers = self.embeddings[:, -self.answer_length :]
        rows = self.embeddings.shape[0] // self.batch
        answers = torch.where(surest.repeat(rows, 1).unsqueeze(-1), new.repeat(rows, 1, 1), answers)
        self.embeddings = torch.cat([self.embeddings[:, : -self.answer_length], answers], dim=1)
        mean = float(confidence[surest].mean()) if number else float("nan")
        return DenoisingStep(entered, mean, number)

    # ---- cuts -------------------------------------------------------------------------------------------------------

    def cut_input(self) -> None:
        """What is dropped before the first step; attention and logits cost a forward pass of their own."""
        cut = next((c for c in self.cuts if c.step < 0), None)
        if cut is None or cut.left == self.visual:
            return
        assert self.prune is not None
        self.seen = _Seen(hidden=self.embeddings)
        if self.prune.uses in ("attention", "logits"):

            def watch(layer: int, hidden: Tensor, attention: AttentionLogits | None) -> None:
                self._watch(attention)

            _, logits = self._score_pass(self.embeddings, self.positions, self.real, watch)
            if self.prune.uses == "logits":
                self._lose_groups(logits)
        self._drop(self._chosen(cut, torch.ones_like(self.ids, dtype=torch.bool)))

    def cut_after_step(self, logits: Tensor) -> None:
        """What is dropped between this step and the next."""
        cut = next((c for c in self.cuts if c.step == self.step and c.layer is None), None)
        self.step += 1
        masked = self.ids == self.model.mask_token_id
        if cut is None or cut.left == self.visual or not masked.any():
            return
        assert self.prune is not None
        if self.prune.uses == "logits":
            self._lose_groups(None)
        self._drop(self._chosen(cut, masked))

    def _chosen(self, cut: Cut, masked: Tensor) -> Tensor:
        """Indices ``(batch, left)`` among the visual tokens that are there."""
        assert self.prune is not None
        hidden = self.seen.hidden
        assert hidden is not None
        features = hidden[: self.batch, self.start : self.start + self.visual]
        name = self.prune.selector
        if name == "vtw":
            return torch.empty(self.batch, 0, dtype=torch.long, device=features.device)
        scores, method = None, name
        if self.prune.uses in ("attention", "logits"):
            scores, method = self._scores(name, masked), "scores"
        return select_tokens(features, cut.left, method, scores=scores, sort=self.prune.sort, generator=self.generator)

    def _scores(self, name: str, masked: Tensor) -> Tensor:
        image, seen = slice(self.start, self.start + self.visual), self.seen
        if name == "sparsevlm" and not len(self._texts(self.embeddings.shape[1])):
            raise ValueError("sparsevlm asks the prompt's words which tokens matter, but the prompt has none")
        if name == "answer_attention" and seen.answers is not None:
            return mean_of_queries(seen.answers[..., image], masked)
        if name == "sparsevlm" and seen.texts is not None:
            real = torch.ones(seen.texts.shape[:2], dtype=torch.bool, device=masked.device)
            if self.real is not None:
                real = self.real[: self.batch, self._texts(self.real.shape[1])]
            paid = seen.texts[..., image]
            return mean_of_queries(paid, raters(paid, real))
        # FastV's sum over queries, and what the answer loses without a group.
        if seen.all_queries is None:
            raise ValueError(
                f"selector '{name}' needs attention logits, but the model's denoise() never called after_attention"
            )
        return seen.all_queries[:, image]

    def _watch(self, attention: AttentionLogits | None) -> None:
        """Add up a layer's attention, where the selector needs it."""
        if self.prune is None or self.prune.uses != "attention":
            return
        if attention is None:
            raise ValueError(
                f"selector '{self.prune.selector}' needs attention logits, but the model's denoise() gives none: pass "
                "a function as the third argument of after_attention, or use divprune, one_nn or random"
            )
        name, seen = self.prune.selector, self.seen
        if name == "answer_attention":
            # The places that predict the answer's tokens: those before them, where the model is shifted.
            shift = int(getattr(self.model, "shifted", False))
            places = slice(-self.answer_length - shift, -shift or None)
            paid = received_by_each(attention(places)[: self.batch])
            seen.answers = paid if seen.answers is None else seen.answers + paid
        elif name == "sparsevlm":
            logits = attention(None)[: self.batch]
            paid = received_by_each(logits[:, :, self._texts(logits.shape[2])])
            seen.texts = paid if seen.texts is None else seen.texts + paid
        else:
            logits = attention(None)[: self.batch]
            if self.real is not None:
                # Padding asks nothing: its rows pay the same to all.
                logits = logits.masked_fill(~self.real[: self.batch, None, :, None], 0.0)
            received = received_by_all(logits)
            seen.all_queries = received if seen.all_queries is None else seen.all_queries + received

    def _lose_groups(self, whole: Tensor | None) -> None:
        """How much surer the masked answer is with each group of visual tokens than without it."""
        assert self.prune is not None
        masked = self.ids == self.model.mask_token_id
        groups = min(self.prune.groups, self.visual)
        if whole is None:
            _, whole = self._score_pass(self.embeddings, self.positions, self.real, None)
        sure = _sureness(whole[: self.batch], masked)
        rows = torch.arange(self.visual, device=masked.device)
        group = rows * groups // self.visual
        scores = torch.zeros(self.batch, self.visual, dtype=torch.float64, device=masked.device)
        for number in range(groups):
            left = rows[group != number].expand(self.batch, -1)
            index = self._sequence_indices(left)
            wide = index.unsqueeze(-1).expand(-1, -1, self.embeddings.shape[2])
            real = None if self.real is None else self.real.gather(1, index)
            _, logits = self._score_pass(self.embeddings.gather(1, wide), self.positions.gather(1, index), real, None)
            scores[:, group == number] = (sure - _sureness(logits[: self.batch], masked)).unsqueeze(1)
        self.seen.all_queries = torch.zeros(
            self.batch, self.embeddings.shape[1], dtype=torch.float64, device=masked.device
        )
        self.seen.all_queries[:, self.start : self.start + self.visual] = scores

    def _score_pass(
        self, embeddings: Tensor, positions: Tensor, real: Tensor | None, watch: AfterAttention | None
    ) -> tuple[Tensor, Tensor]:
        self.scoring_flops += prefill_flops(self.model.shape, embeddings.shape[1]) * (2 if self.guided else 1)
        return self.model.denoise(embeddings, positions, real, self.answer_length, watch)

    def _drop(self, chosen: Tensor) -> None:
        """Leave ``chosen`` of the visual tokens in everything that lasts."""
        index = self._sequence_indices(chosen)
        self.embeddings = self.embeddings.gather(1, index.unsqueeze(-1).expand(-1, -1, self.embeddings.shape[2]))
        self.real = None if self.real is None else self.real.gather(1, index)
        self.kept = self.kept.gather(1, chosen)
        self.visual = chosen.shape[1]
        assert self.prune is not None
        self.positions = self.positions.gather(1, index) if self.prune.keep_positions else self._numbered()

    def _sequence_indices(self, chosen: Tensor) -> Tensor:
        """Indices of all that goes on: ``chosen`` of the visual tokens, and every other token."""
        total = self.embeddings.shape[1]
        before = torch.arange(self.start, device=chosen.device).expand(self.batch, -1)
        after = torch.arange(self.start + self.visual, total, device=chosen.device).expand(self.batch, -1)
        index = torch.cat([before, chosen + self.start, after], dim=1)
        return index.repeat(self.embeddings.shape[0] // self.batch, 1)

    def _numbered(self) -> Tensor:
        rows, total, _ = self.embeddings.shape
        if self.real is None:
            return torch.arange(total, device=self.embeddings.device).expand(rows, -1)
        return (self.real.long().cumsum(1) - 1).clamp_min(0)

    def _texts(self, total: int) -> Tensor:
        """Indices of the prompt's words."""
        places = torch.arange(total - self.answer_length, device=self.ids.device)
        return places[(places < self.start) | (places >= self.start + self.visual)]

    # ---- the end ----------------------------------------------------------------------------------------------------

    def finished(self, stop_id: int) -> bool:
        """Whether every answer has its stop and no mask before it."""
        stops = (self.ids == stop_id).cumsum(1) > 0
        masks_before = ((self.ids == self.model.mask_token_id) & ~stops).any(1)
        return bool((stops.any(1) & ~masks_before).all())

    def result(self, trace: list[DenoisingStep], started: float) -> Denoised:
        """Everything that was found."""
        flops = denoising_flops(self.model.shape, self.tokens) * (2 if self.guided else 1) + self.scoring_flops
        seconds = time.perf_counter() - started
        return Denoised(self.ids, self.committed_at, self.kept, flops, seconds, tuple(trace), self.steps)


def _sureness(logits: Tensor, masked: Tensor) -> Tensor:
    """Sum of the largest log probabilities of the answer's masked tokens."""
    best = torch.log_softmax(logits.double(), -1).amax(-1)
    return best.masked_fill(~masked, 0.0).sum(1)
