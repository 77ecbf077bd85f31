"""When, where and how many visual tokens are dropped while an answer is denoised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lossmith.errors import InputError, did_you_mean

#: What each selector looks at.
SELECTORS = {
    "random": "nothing",
    "divprune": "features",
    "one_nn": "features",
    "one_nn_pairs": "features",
    "fastv": "attention",
    "sparsevlm": "attention",
    "answer_attention": "attention",
    "answer_logits": "logits",
    "vtw": "nothing",
}


@dataclass(frozen=True, slots=True)
class Cut:
    """After which step (-1: before the first) or inside which step and layer, how many visual tokens are left.

    ``passing``: only for the rest of that step; the next one starts with all of them again.
    """

    step: int
    layer: int | None
    left: int
    passing: bool = False


@dataclass(frozen=True, slots=True)
class PruneSchedule:
    """Which visual tokens stay, and from when on.

    Args:
        selector: how tokens are chosen (see :func:`select_tokens`): ``random``; ``divprune``, ``one_nn`` and
            ``one_nn_pairs`` by similarity; ``fastv``, ``sparsevlm`` and ``answer_attention`` by attention;
            ``answer_logits`` by what the answer loses without them; ``vtw``, which drops all.
        keep: share that stays, in (0, 1]; default 0.5. ``vtw`` keeps none.
        step: 0-based step after which (with ``layer``: inside which) is dropped; ``"input"``: before the first,
            ``"mid"``: after half of the steps, ``"late"``: after three quarters.
        layer: 0-based layer of that step after whose attention is dropped, so that the rest of the step is cheaper too;
            default: after the step.
        progressive: shares of the steps, each in (0, 1): after the share ``p`` the share ``p`` of the tokens is gone.
            Shares that do not fall on a step are left out, as in the released code. Instead of ``keep`` and ``step``.
        every_step: with ``layer``: drop in each step from ``step`` on, for the rest of that step only (layer skipping).
        keep_positions: kept tokens keep their numbers; default: tokens are numbered anew, as in the released code.
        sort: keep the order of the image; ``False``: order of the scores, as the released FastV does.
        groups: number of groups of ``answer_logits``: one forward pass each.

    Raises:
        ValueError: a selector, share, step or layer that cannot be.

    Source: "A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal Large Language
    Models", 2025, arXiv 2511.15098, and its code.

    >>> PruneSchedule.parse("fastv(step=0, layer=2, keep=0.25)")
    PruneSchedule('fastv', keep=0.25, step=0, layer=2)
    >>> falling = PruneSchedule("one_nn", progressive=(0.25, 0.5, 0.75))
    >>> [cut.left for cut in falling.cuts(steps=48, layers=4, visual=729)]
    [547, 365, 182]
    """

    selector: str = "answer_attention"
    keep: float | None = None
    step: int | str | None = None
    layer: int | None = None
    progressive: tuple[float, ...] = ()
    every_step: bool = False
    keep_positions: bool = False
    sort: bool = True
    groups: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "selector", self.selector.replace("-", "_"))
        object.__setattr__(self, "progressive", tuple(self.progressive))
        if self.selector not in SELECTORS:
            raise InputError(f"unknown selector '{self.selector}': {did_you_mean(self.selector, SELECTORS)}")
        if self.progressive:
            self._check_progressive()
        for name, kinds in (("keep", (int, float)), ("step", (int, str)), ("layer", (int,))):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{name} must be a number{' or a word' if name == 'step' else ''}, got {value!r}")
        least = 0 if self.selector == "vtw" else None
        if self.keep is not None and not (0 < self.keep <= 1 or self.keep == least):
            raise ValueError(f"keep must be in (0, 1] (0 for vtw only), got {self.keep}")
        if self.selector == "vtw" and (self.layer is None or self.keep):
            raise ValueError("vtw drops all visual tokens after a layer: give layer=, and no keep")
        if isinstance(self.step, str) and self.step not in ("input", "mid", "late"):
            raise ValueError(f"step must be a number, 'input', 'mid' or 'late', got '{self.step}'")
        if isinstance(self.step, int) and self.step < 0:
            raise ValueError(f"step must be at least 0, got {self.step}")
        if self.layer is not None and (self.step == "input" or self.layer < 0):
            raise ValueError(
                f"layer must be at least 0, and step not 'input', got layer {self.layer}, step {self.step}"
            )
        if self.every_step and self.layer is None:
            raise ValueError("every_step drops tokens inside each step: give layer=")
        if self.layer is not None and SELECTORS[self.selector] == "logits":
            raise ValueError("answer_logits compares whole forward passes: it works after a step, not inside a layer")
        if self.groups < 2:
            raise ValueError(f"groups must be at least 2, got {self.groups}")

    def _check_progressive(self) -> None:
        if self.keep is not None or self.step is not None or self.layer is not None or self.selector == "vtw":
            raise ValueError("progressive says when and how many: give no keep, step or layer, and not vtw")
        if list(self.progressive) != sorted(set(self.progressive)) or not all(0 < p < 1 for p in self.progressive):
            raise ValueError(f"progressive must be rising shares in (0, 1), got {list(self.progressive)}")

    @property
    def uses(self) -> str:
        """What the selector looks at: ``nothing``, ``features``, ``attention`` or ``logits``."""
        return SELECTORS[self.selector]

    def number(self, visual: int) -> int:
        """How many of ``visual`` tokens stay: rounded down for FastV, to the nearest (even) otherwise; at least 1."""
        if self.selector == "vtw":
            return 0
        wanted = (0.5 if self.keep is None else self.keep) * visual
        return max(1, int(wanted + 1e-9) if self.selector == "fastv" else round(wanted))

    def cuts(self, *, steps: int, layers: int, visual: int) -> tuple[Cut, ...]:
        """What happens in a loop of ``steps`` steps over ``layers`` layers with ``visual`` tokens.

        Raises:
            ValueError: the schedule would never drop anything (a step or layer that there is not).
        """
        if self.progressive:
            places = [(p, round(p * steps)) for p in self.progressive]
            falling = [(p, t) for p, t in places if abs(p * steps - t) < 1e-9 and 1 <= t <= steps]
            if not falling:
                raise ValueError(f"schedule never fires: none of {list(self.progressive)} of {steps} steps is a step")
            return tuple(Cut(t - 1, None, visual - round(p * visual)) for p, t in falling)
        named = {"input": -1, "mid": max(0, steps // 2 - 1), "late": max(0, 3 * steps // 4 - 1)}
        step = named[self.step] if isinstance(self.step, str) else self.step or 0
        if step >= steps:
            raise ValueError(f"schedule never fires: step {step} of {steps} steps (the first is 0)")
        if self.layer is not None and self.layer >= layers:
            raise ValueError(f"schedule never fires: layer {self.layer} of {layers} layers (the first is 0)")
        left = self.number(visual)
        if self.every_step:
            return tuple(Cut(s, self.layer, left, passing=True) for s in range(step, steps))
        return (Cut(step, self.layer, left),)

    @classmethod
    def parse(cls, text: str | PruneSchedule | Mapping[str, Any] | None) -> PruneSchedule | None:
        """Read ``name(option=value, ...)``, a mapping, or what is a schedule already; ``none`` is no schedule.

        Raises:
            InputError: a name or an option that there is not, a value out of range.
        """
        if text is None or isinstance(text, PruneSchedule):
            return text
        if isinstance(text, str) and text.strip() in ("none", "full"):
            return None
        if isinstance(text, Mapping):
            options = dict(text)
        else:
            from lossmith.registry import parse_spec

            name, bracket, rest = text.partition("(")
            spec = parse_spec(name.replace("-", "_") + bracket + rest)
            if spec.arguments:
                raise InputError(f"'{text}': write options by name, like {spec.name}(keep=0.5)")
            options = {"selector": spec.name, **spec.options}
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise InputError(f"a pruning schedule has no option '{name}': {did_you_mean(name, names)}")
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            raise InputError(f"pruning schedule '{_written(text)}': {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, for a configuration file; :meth:`parse` reads them back."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return {"selector": self.selector, **{k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}}

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.to_dict().items() if k != "selector")
        return f"{self.selector}({options})" if options else self.selector

    def __repr__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in self.to_dict().items() if k != "selector")
        return f"PruneSchedule({self.selector!r}{options})"


def _written(options: str | Mapping[str, Any]) -> str:
    """As a user writes it: ``name(option=value, ...)``, without what is the default."""
    if isinstance(options, str):
        return options
    defaults = {f.name: f.default for f in dataclasses.fields(PruneSchedule)}
    given = {k: v for k, v in options.items() if k != "selector" and v != defaults[k]}
    shown = ", ".join(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in given.items())
    name = options.get("selector", defaults["selector"])
    return f"{name}({shown})" if shown else str(name)
