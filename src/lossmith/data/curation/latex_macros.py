"""The user's own LaTeX macros, replaced by what they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .decoding import Unreadable
from .latex_project import VERBATIM

# A macro that calls itself, or doubles itself, never ends.
_MOST_EXPANSIONS = 200_000
_LONGEST = 20_000_000

_TOKEN = re.compile(VERBATIM + r"|\\([A-Za-z@]+)\*?|\\.", re.DOTALL)
_SPACE = re.compile(r"(?:[ \t]|\n(?!\s*\n))*")
_BRACKETS = {"{": re.compile(r"\\.|[{}]", re.DOTALL), "[": re.compile(r"\\.|[{}\[\]]", re.DOTALL)}
_COMMANDS = {"newcommand", "renewcommand", "providecommand", "DeclareRobustCommand"}
_ENVIRONMENTS = {"newenvironment", "renewenvironment"}
_DEFINITIONS = {"def", "gdef", "edef", "xdef"}
_OPERATORS = {"DeclareMathOperator"}


@dataclass(slots=True)
class _Macro:
    body: str
    arguments: int = 0
    default: str | None = None


@dataclass(slots=True)
class _Input:
    """Text with a place in it; what a macro stands for is put before the rest."""

    text: str
    at: int = 0
    later: list[tuple[str, int]] = field(default_factory=list)

    def push(self, text: str) -> None:
        self.later.append((self.text, self.at))
        self.text, self.at = text, 0

    def pop(self) -> bool:
        if not self.later:
            return False
        self.text, self.at = self.later.pop()
        return True

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        if match.end() == len(self.text) and self.later:
            # An argument may come after the end of the macro that asks for it.
            rest, at = self.later.pop()
            self.text, self.at = self.text[self.at :] + rest[at:], 0
            self.space()
            return
        self.at = match.end()

    def group(self, opening: str = "{", closing: str = "}") -> str | None:
        """What stands between brackets here; ``None`` where none opens."""
        self.space()
        if not self.text.startswith(opening, self.at):
            return None
        depth, position = 0, self.at
        for match in _BRACKETS[opening].finditer(self.text, position):
            token = match[0]
            if token == closing and depth == 1:
                self.at = match.end()
                return self.text[position + 1 : match.start()]
            depth += (token in (opening, "{")) - (token in (closing, "}"))
        raise Unreadable(f"LaTeX does not parse: no {closing} after {self.text[position : position + 40]!r}")

    def argument(self) -> str | None:
        """A group, a command or a single character."""
        inside = self.group()
        if inside is not None:
            return inside
        match = re.compile(r"\\[A-Za-z@]+|\\.|[^\s]", re.DOTALL).match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[0]


def expand_macros(text: str) -> str:
    r"""Replace commands that the text defines itself.

    Known are ``\newcommand`` and its relatives, ``\def`` with plain parameters, ``\let``, ``\DeclareMathOperator``,
    ``\newenvironment``, ``\newtheorem`` and ``\NewDocumentCommand`` with plain arguments. The definitions themselves
    are left out.

    Raises:
        Unreadable: macros that never end, or a definition that is cut short.

    >>> expand_macros(r"\newcommand{\SNR}[1][0]{\mathrm{SNR}_{#1}}\def\R{\mathbb R}$\SNR[k] > \SNR \in \R$")
    '$\\mathrm{SNR}_{k} > \\mathrm{SNR}_{0}\\in \\mathbb R$'
    """
    return _Expander(text).run()


class _Expander:
    def __init__(self, text: str):
        self.input = _Input(text)
        self.macros: dict[str, _Macro] = {}
        self.environments: dict[str, tuple[_Macro, str]] = {}
        self.out: list[str] = []

    def run(self) -> str:
        expansions = size = 0
        while True:
            source = self.input
            match = _TOKEN.search(source.text, source.at)
            if match is None:
                self.out.append(source.text[source.at :])
                if not source.pop():
                    return "".join(self.out)
                continue
            self.out.append(source.text[source.at : match.start()])
            source.at = match.end()
            name = match[3]
            if name is None:
                self.out.append(match[0])
                continue
            if self._defines(name):
                continue
            expansion = self._expansion(name, starred=match[0].endswith("*"))
            if expansion is None:
                self.out.append(match[0])
                continue
            expansions, size = expansions + 1, size + len(expansion)
            if expansions > _MOST_EXPANSIONS or size > _LONGEST or len(source.later) > 5_000:
                raise Unreadable(f"LaTeX does not parse: the macro \\{name} never ends")
            source.push(expansion)

    def _defines(self, name: str) -> bool:
        """Read a definition, if ``name`` begins one."""
        source = self.input
        if name in _COMMANDS:
            target = self._name()
            count, default = source.group("[", "]"), source.group("[", "]")
            self._keep(target, source.argument(), count, default)
        elif name in _OPERATORS:
            target, shown = self._name(), source.argument()
            if target and shown is not None:
                self.macros[target] = _Macro(rf"\operatorname{{{shown}}}")
        elif name in _DEFINITIONS:
            self._define()
        elif name == "let":
            target = self._name()
            source.space()
            if source.text.startswith("=", source.at):
                source.at += 1
            meaning = source.argument()
            if target and meaning and meaning != f"\\{target}":
                self.macros[target] = self.macros.get(meaning.removeprefix("\\"), _Macro(meaning))
        elif name in _ENVIRONMENTS:
            target = source.argument() or ""
            count, default = source.group("[", "]"), source.group("[", "]")
            begin, end = source.argument() or "", source.argument() or ""
            self.environments[target] = (_Macro(begin, _count(count), default), end)
        elif name == "newtheorem":
            target = source.argument() or ""
            source.group("[", "]")
            shown = source.argument() or ""
            source.group("[", "]")
            self.environments[target] = (_Macro(rf"\par\textbf{{{shown}.}} "), r"\par ")
        elif name in ("NewDocumentCommand", "RenewDocumentCommand", "DeclareDocumentCommand"):
            target, kinds, body = self._name(), source.argument() or "", source.argument()
            plain = "".join(kinds.split())
            if target and body is not None and set(plain) <= {"m"}:
                self.macros[target] = _Macro(body, len(plain))
        else:
            return False
        return True

    def _name(self) -> str:
        """The command that a definition names, without its backslash."""
        return (self.input.argument() or "").strip().removeprefix("\\")

    def _keep(self, target: str, body: str | None, count: str | None, default: str | None) -> None:
        if target and body is not None:
            self.macros[target] = _Macro(body, _count(count), default)

    def _define(self) -> None:
        source = self.input
        target = self._name()
        match = re.compile(r"([^{}]*)(?=\{)").match(source.text, source.at)
        if match is None:
            return
        source.at = match.end()
        body, parameters = source.argument(), match[1].strip()
        # Parameters that end at words of their own are left alone.
        if body is not None and re.fullmatch(r"(#\d\s*)*", parameters):
            self.macros[target] = _Macro(body, parameters.count("#"))

    def _expansion(self, name: str, *, starred: bool) -> str | None:
        source = self.input
        if name in ("begin", "end"):
            environment = self.environments.get(_peeked(source) or "")
            if environment is None:
                return None
            source.argument()
            return self._filled(environment[0]) if name == "begin" else environment[1]
        macro = self.macros.get(name)
        if macro is None:
            return None
        if starred:
            source.at -= 1
        if macro.arguments == 0 and macro.default is None:
            # As in TeX, space after the name belongs to it.
            source.space()
            return macro.body + (" " if _runs_into(macro.body, source) else "")
        return self._filled(macro)

    def _filled(self, macro: _Macro) -> str:
        values: list[str] = []
        if macro.default is not None and macro.arguments:
            given = self.input.group("[", "]")
            values.append(macro.default if given is None else given)
        while len(values) < macro.arguments:
            values.append(self.input.argument() or "")
        return re.sub(r"#(\d)", lambda m: values[int(m[1]) - 1] if 0 < int(m[1]) <= len(values) else m[0], macro.body)


def _count(text: str | None) -> int:
    return int(text) if text and text.strip().isdigit() else 0


def _peeked(source: _Input) -> str | None:
    match = re.compile(r"\s*\{([^{}]*)\}").match(source.text, source.at)
    return match[1] if match else None


def _runs_into(body: str, source: _Input) -> bool:
    r"""Whether ``\alpha`` would become ``\alphax`` before the next letter."""
    following = source.text[source.at : source.at + 1]
    return following.isalpha() and re.search(r"\\[A-Za-z@]+$", body) is not None
