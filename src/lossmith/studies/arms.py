"""Arms of a comparison: what each does differently from the baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossmith.errors import InputError
from lossmith.registry import LOSSES, SAMPLERS, SPARSITIES, WEIGHTINGS, Spec, parse_assignments, parse_spec
from lossmith.training.language_model import check_training_options

# What an arm may change besides training options.
ARM_OPTIONS = ("loss", "weighting", "sampler", "weights", "model", "model_overrides", "batch_size", "tokens")


@dataclass(frozen=True, slots=True)
class Arm:
    """A named set of differences: what :data:`ARM_OPTIONS` names, and training options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}: {options}" if options else self.name

    @property
    def training(self) -> dict[str, Any]:
        """The arm's own ``TrainingArguments``."""
        return {k: v for k, v in self.options.items() if k not in ARM_OPTIONS}


def parse_arm(text: str) -> Arm:
    """Read ``name`` or ``name: option=value, ...``; options alone name themselves.

    >>> str(parse_arm("reweighted: weighting=linupper(r=0.5)"))
    'reweighted: weighting=linupper(r=0.5)'
    >>> parse_arm("weighting=quadratic").name
    'weighting=quadratic'
    """
    head, colon, rest = text.partition(":")
    if not colon or "=" in head:
        if "=" not in text:
            return check_arm(text.strip(), {})
        return check_arm(text.strip(), parse_assignments(text))
    return check_arm(head.strip(), parse_assignments(rest))


def parse_arms(given: Sequence[Any] | Mapping[str, Any]) -> tuple[Arm, ...]:
    """Arms from strings, from ``{name: {option: value}}`` mappings (YAML), or from both in a list."""
    arms: list[Arm] = []
    if isinstance(given, Mapping):
        given = [{name: options} for name, options in given.items()]
    for item in given:
        if isinstance(item, Arm):
            arms.append(item)
        elif isinstance(item, str):
            arms.append(parse_arm(item))
        elif isinstance(item, Mapping):
            for name, options in item.items():
                if isinstance(options, str):
                    arms.append(check_arm(str(name), parse_assignments(options)))
                elif options is None or isinstance(options, Mapping):
                    arms.append(check_arm(str(name), dict(options or {})))
                else:
                    raise InputError(f"arm '{name}': options must be option: value pairs, got {options!r}")
        else:
            raise InputError(f"an arm must be text like 'name: weighting=linupper(r=0.5)', got {item!r}")
    if not arms:
        raise InputError("a comparison needs at least one arm, got none")
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two arms are called '{name}'; give each its own name")
    slugs = [slug(name) for name in names]
    for first, name in zip(slugs, names, strict=True):
        if slugs.count(first) > 1:
            raise InputError(f"the name of arm '{name}' is too like another's for a folder; rename one")
    return tuple(arms)


def check_arm(name: str, options: Mapping[str, Any]) -> Arm:
    """An arm whose options exist and are in range.

    Raises:
        InputError: names the arm, the option and the nearest allowed one.
    """
    if not name:
        raise InputError("an arm needs a name: 'name: option=value'")
    checked: dict[str, Any] = {}
    for key, value in options.items():
        key = key.removeprefix("training.")
        if key == "loss":
            spec = _spec(value, name, "loss")
            bound = _named(name, lambda spec=spec: LOSSES.bind(spec))
            _named(name, lambda bound=bound: _try_loss(bound))
            value = str(spec)
        elif key == "weighting":
            spec = _spec(value, name, "weighting")
            _named(name, lambda spec=spec: WEIGHTINGS.build(spec))
            value = str(spec)
        elif key == "sampler":
            spec = _spec(value, name, "sampler")
            _named(name, lambda spec=spec: SAMPLERS.build(spec))
            value = str(spec)
        elif key == "weights":
            spec = _spec(value, name, "weights")
            _named(name, lambda spec=spec: SPARSITIES.build(spec))
            value = str(spec)
        elif key == "model_overrides":
            if not isinstance(value, Mapping):
                raise InputError(f"arm '{name}': model_overrides must be like {{'hidden_size': 96}}, got {value!r}")
            value = dict(value)
        elif key in ("batch_size", "tokens"):
            value = parse_count(value, f"arm '{name}': {key}")
        elif key == "model":
            value = str(value)
        else:
            check_training_options({key: value}, where=f"arm '{name}'", also=ARM_OPTIONS)
            value = str(value) if isinstance(value, Spec) else value
        checked[key] = value
    return Arm(name, checked)


def parse_count(value: Any, name: str) -> int:
    """A whole number, also written ``300k``, ``2M``, ``1.5B`` or ``1e6``.

    >>> parse_count("2M", "tokens")
    2000000
    """
    if isinstance(value, bool):
        raise InputError(f"{name} must be a whole number such as 300k or 2M, got {value!r}")
    if isinstance(value, int | float):
        number = float(value)
    else:
        match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+]?[0-9]+)?)\s*([kKmMbBgG]?)\s*", str(value))
        if not match:
            raise InputError(f"{name} must be a whole number such as 300k or 2M, got {value!r}")
        factor = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}[match[2].lower()]
        number = float(match[1].replace("_", "")) * factor
    if number < 1 or number != int(number):
        raise InputError(f"{name} must be a whole number of at least 1, got {value}")
    return int(number)


def slug(name: str) -> str:
    """A folder name for an arm.

    >>> slug("weighting=linupper(r=0.5)")
    'weighting-linupper-r-0.5'
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "arm"


def _spec(value: Any, arm: str, what: str) -> Spec:
    if isinstance(value, Spec):
        return value
    if not isinstance(value, str):
        raise InputError(f"arm '{arm}': {what} must be a name with options, got {value!r}")
    return parse_spec(value)


def _try_loss(loss: Any) -> None:
    """Two classes, one example: enough for a loss to refuse its options."""
    import torch

    loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


def _named(arm: str, check: Any) -> Any:
    try:
        return check()
    except (ValueError, TypeError) as error:
        raise InputError(f"arm '{arm}': {error}") from None
