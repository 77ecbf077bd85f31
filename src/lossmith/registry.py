"""Finding losses, weightings and laws by name, and writing a name with options: ``linupper(r=0.5)``."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from lossmith.errors import InputError, did_you_mean


@dataclass(frozen=True, slots=True)
class Spec:
    """A name with options. ``str(spec)`` is the canonical text, which :func:`parse_spec` reads back."""

    name: str
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [_show(value) for value in self.arguments]
        parts += [f"{key}={_show(value)}" for key, value in self.options.items()]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


def parse_spec(text: str) -> Spec:
    """Read ``name`` or ``name(option=value, ...)``; values are literals, plain words or names with options.

    A schedule ``5 -> 1`` is the name ``cooldown(5, 1)``.

    >>> str(parse_spec("linupper( r = warmup(0.4, steps=100) )"))
    'linupper(r=warmup(0.4, steps=100))'
    """
    spec = _value(_expression(text), text)
    if isinstance(spec, str) and spec.isidentifier():
        return Spec(spec)
    if not isinstance(spec, Spec):
        raise InputError(f"'{text}' is not a name with options; write it like linupper(r=0.5)")
    return spec


def parse_assignments(text: str) -> dict[str, Any]:
    """Read ``key=value, key=value`` where values may be names with options; keys may be dotted.

    >>> {k: str(v) for k, v in parse_assignments("weighting=linupper(r=0.5), training.learning_rate=1e-3").items()}
    {'weighting': 'linupper(r=0.5)', 'training.learning_rate': '0.001'}
    """
    result: dict[str, Any] = {}
    for part in _split(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key.replace(".", "_").isidentifier() or not value.strip():
            raise InputError(
                f"'{part.strip()}' is not an assignment; write option=value, for instance weighting=linupper(r=0.5)"
            )
        if key in result:
            raise InputError(f"'{key}' is given twice in '{text.strip()}'")
        result[key] = parse_value(value)
    return result


def parse_value(text: str) -> Any:
    """A literal where ``text`` is one, a :class:`Spec` where it has options, else the text itself (paths, words)."""
    text = text.strip()
    try:
        expression = _expression(text)
    except InputError:
        if "(" in text:
            raise
        return text
    try:
        return _value(expression, text)
    except InputError:
        if isinstance(expression, ast.Call):
            raise
        return text


class Registry:
    """Things of one kind by name: those of lossmith, those of installed packages (entry points), those registered here.

    Args:
        kind: what messages call one of them ("loss").
        module: the module whose ``__all__`` lists the built-in ones; imported when first needed.
        group: the entry-point group by which other packages add theirs.
        accept: which public objects of ``module`` count.
        call: what a built-in object is called here; by default as in its module.
    """

    def __init__(
        self,
        kind: str,
        module: str,
        group: str,
        accept: Callable[[str, Any], bool] = lambda name, obj: True,
        call: Callable[[str, Any], str] = lambda name, obj: name,
    ):
        self.kind, self._module, self._group, self._accept, self._call = kind, module, group, accept, call
        self._own: dict[str, Any] = {}

    def register(self, name: str, thing: Any) -> Any:
        """Add ``thing`` under ``name`` for this process; refuses a name that is taken by something else."""
        if name in self.names() and self.get(name) is not thing:
            raise ValueError(f"a {self.kind} named '{name}' is registered already")
        self._own[name] = thing
        return thing

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._built_in(), *self._installed(), *self._own})

    def get(self, name: str) -> Any:
        """The thing called ``name``; an unknown name is an error that names the nearest one."""
        if name in self._own:
            return self._own[name]
        if name in (built_in := self._built_in()):
            return built_in[name]
        if name in (installed := self._installed()):
            return installed[name].load()
        raise InputError(f"unknown {self.kind} '{name}': {did_you_mean(name, self.names())}")

    def bind(self, spec: str | Spec) -> functools.partial[Any]:
        """The callable of ``spec`` with its options bound; options are checked against its signature."""
        spec = parse_spec(spec) if isinstance(spec, str) else spec
        target = self.get(spec.name)
        parameters = inspect.signature(target).parameters
        keywords = [n for n, p in parameters.items() if p.default is not inspect.Parameter.empty]
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for option in spec.options:
            if option not in keywords and not takes_any:
                raise InputError(
                    f"{self.kind} '{spec.name}' has no option '{option}': {did_you_mean(option, keywords)}"
                )
        options = dict(zip(keywords, spec.arguments, strict=False))
        if len(spec.arguments) > len(keywords) or options.keys() & spec.options.keys():
            raise InputError(
                f"too many values in '{spec}'; {self.kind} '{spec.name}' takes {', '.join(keywords) or 'no options'}"
            )
        options |= spec.options
        return functools.partial(target, **{name: self._resolve(value) for name, value in options.items()})

    def build(self, spec: str | Spec) -> Any:
        """Call the factory of ``spec`` with its options; a value out of range is an :class:`InputError`."""
        bound = self.bind(spec)
        try:
            return bound()
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.kind} '{spec}': {error}") from None

    def _resolve(self, value: Any) -> Any:
        """An option that is itself a name with options (a schedule) is looked up in the same module."""
        if not isinstance(value, Spec):
            return value
        factory = getattr(importlib.import_module(self._module), value.name, None)
        if not callable(factory):
            raise InputError(f"unknown schedule '{value.name}' in an option of a {self.kind}")
        try:
            return factory(*value.arguments, **value.options)
        except (ValueError, TypeError) as error:
            raise InputError(f"'{value}': {error}") from None

    def _built_in(self) -> dict[str, Any]:
        module = importlib.import_module(self._module)
        found = {name: thing for name in module.__all__ if self._accept(name, thing := getattr(module, name))}
        return {self._call(name, thing): thing for name, thing in found.items()}

    def _installed(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=self._group)}


def _is_weighting_factory(name: str, thing: Any) -> bool:
    return name in {"uniform", "linupper", "quadratic", "extremes", "linear", "scalarization"}


def _begins_with(*names: str) -> Callable[[str, Any], bool]:
    """Accept functions of each example alone whose first arguments are called so: what tells kinds of losses apart."""

    def accept(_: str, thing: Any) -> bool:
        alone = not getattr(thing, "relates_examples", False)
        return alone and tuple(inspect.signature(thing).parameters)[: len(names)] == names

    return accept


LOSSES = Registry("loss", "lossmith.losses", "lossmith.losses", _begins_with("logits", "targets"))
DISTILLATION_LOSSES = Registry(
    "distillation loss",
    "lossmith.losses",
    "lossmith.distillation_losses",
    _begins_with("student_logits", "teacher_logits", "targets"),
)


def _is_law(name: str, thing: Any) -> bool:
    return inspect.isclass(thing) and not inspect.isabstract(thing) and hasattr(thing, "formula")


LAWS = Registry("law", "lossmith.laws", "lossmith.laws", _is_law, lambda name, law: law.name)
WEIGHTINGS = Registry("weighting", "lossmith.data.weighting", "lossmith.weightings", _is_weighting_factory)
# What `sampler=` names: factories of objects with draw(dataset, steps=, batch_size=, seed=).
SAMPLERS = Registry(
    "sampler",
    "lossmith.data.sampling",
    "lossmith.samplers",
    lambda name, thing: name in {"shuffled", "temperature", "unimax"},
)
PROBES = Registry(
    "probe",
    "lossmith.probes",
    "lossmith.probes",
    lambda name, thing: name in {"flatness", "geometry", "gradient_variance", "superposition"},
)
# What `weights=` names: factories of objects with attach(model, steps).
SPARSITIES = Registry(
    "sparsity",
    "lossmith.sparsity",
    "lossmith.sparsities",
    lambda name, thing: name in {"cola", "dense", "lost", "low_rank", "sltrain", "sparse_pretraining"},
)


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(_arrows(text.strip()), mode="eval").body
    except (SyntaxError, ValueError):
        raise InputError(f"'{text.strip()}' cannot be read; write it like linupper(r=0.5)") from None


def _arrows(text: str) -> str:
    """``5 -> 1`` as an expression that Python can read; arrows in quotes stay."""
    return re.sub(r"""("[^"]*"|'[^']*')|->""", lambda found: found[1] or ">>", text)


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        options = {str(k.arg): _value(k.value, text) for k in node.keywords}
        return Spec(node.func.id, tuple(_value(a, text) for a in node.args), options)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        levels = [_value(node.left, text), _value(node.right, text)]
        if not all(isinstance(level, int | float) and not isinstance(level, bool) for level in levels):
            raise InputError(f"'{text.strip()}' cannot be read; an arrow leads from one number to another: 5 -> 1")
        return Spec("cooldown", tuple(levels))
    if isinstance(node, ast.Name):
        words = {
            "true": True,
            "false": False,
            "none": None,
            "null": None,
            "inf": float("inf"),
            "nan": float("nan"),
        }
        return words.get(node.id.lower(), node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, text)
        if isinstance(inner, int | float):
            return -inner
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise InputError(
            f"'{text.strip()}' cannot be read; values are numbers, words, lists or names with options"
        ) from None


def _split(text: str) -> list[str]:
    """Cut at commas (or semicolons) outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in ",;" and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def _show(value: Any) -> str:
    return str(value) if isinstance(value, Spec | float | int | bool) or value is None else repr(value)
