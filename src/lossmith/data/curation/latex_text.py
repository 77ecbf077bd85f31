"""LaTeX as plain text that keeps its mathematics."""

from __future__ import annotations

import re
import unicodedata

from .decoding import Unreadable
from .latex_project import VERBATIM
from .markup import close_lists

MATHEMATICS = {
    "align", "alignat", "displaymath", "dmath", "eqnarray", "equation", "flalign", "gather", "IEEEeqnarray", "math",
    "multline", "subequations",
}  # fmt: skip
# What is a picture, a table or a list of works, not text.
LEFT_OUT = {
    "CCSXML", "acks", "comment", "figure", "filecontents", "longtable", "picture", "pspicture", "sidewaysfigure",
    "sidewaystable", "SCfigure", "table", "tabular", "tabularx", "tabulary", "teaserfigure", "thebibliography",
    "tikzpicture", "wrapfigure", "wraptable",
}  # fmt: skip
_HEADINGS = {
    "part": 1, "chapter": 1, "section": 1, "subsection": 2, "subsubsection": 3, "paragraph": 4, "subparagraph": 5,
}  # fmt: skip
# Commands that go with so many arguments.
_DROPPED = {
    "addbibresource": 1, "address": 1, "addtocounter": 2, "addtolength": 2, "affil": 1, "affiliation": 1, "author": 1,
    "authornote": 1, "autocite": 1, "autoref": 1, "bibliography": 1, "bibliographystyle": 1, "cellcolor": 1,
    "cite": 1, "citealp": 1, "citealt": 1, "citeauthor": 1, "citep": 1, "citet": 1, "citeyear": 1, "Citet": 1,
    "color": 1, "cref": 1, "Cref": 1, "date": 1, "definecolor": 3, "documentclass": 1, "documentstyle": 1, "email": 1,
    "eqref": 1, "footcite": 1, "fontsize": 2, "graphicspath": 1, "hspace": 1, "hypersetup": 1, "hyphenation": 1,
    "IEEEmembership": 1, "includegraphics": 1, "index": 1, "input": 1, "institute": 1, "label": 1, "markboth": 2,
    "nocite": 1, "orcid": 1, "pageref": 1, "pagenumbering": 1, "pagestyle": 1, "parencite": 1, "ref": 1, "rule": 2,
    "setcounter": 2, "setlength": 2, "textcite": 1, "thanks": 1, "theoremstyle": 1, "thispagestyle": 1, "todo": 1,
    "usepackage": 1, "vref": 1, "vskip": 0, "vspace": 1,
}  # fmt: skip
# Commands whose first arguments only say how the last one looks.
_LAST_ARGUMENT = {"colorbox": 2, "href": 2, "makebox": 1, "multicolumn": 3, "multirow": 3, "parbox": 2, "raisebox": 2,
                  "rotatebox": 2, "scalebox": 2, "resizebox": 3, "textcolor": 2}  # fmt: skip
_SYMBOLS = {
    "ldots": "...", "dots": "...", "textendash": "–", "textemdash": "—", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ",
    "OE": "Œ", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł", "aa": "å", "AA": "Å", "i": "ı", "j": "ȷ", "S": "§", "P": "¶",
    "copyright": "©", "pounds": "£", "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^",
    "textregistered": "®", "texttrademark": "™", "textdegree": "°", "textmu": "µ", "textbar": "|", "textless": "<",
    "textgreater": ">", "LaTeX": "LaTeX", "TeX": "TeX", "quad": " ", "qquad": " ", "par": "\n\n", "newline": "\n",
    "item": "\n- ", "newpage": "\n\n", "clearpage": "\n\n", "eg": "e.g.", "ie": "i.e.", "etal": "et al.",
}  # fmt: skip
_ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307",
    '"': "\u0308", "r": "\u030a", "H": "\u030b", "v": "\u030c", "d": "\u0323", "c": "\u0327", "k": "\u0328",
    "b": "\u0331",
}  # fmt: skip
_UNSEEN = re.compile(r"\\(?:label|tag)\s*\{[^{}]*\}|\\(?:nonumber|notag)(?![A-Za-z])|\\vspace\*?\s*\{[^{}]*\}")
_TOKEN = re.compile(
    VERBATIM + r"|\\begin\s*\{([^{}]*)\}|\\end\s*\{([^{}]*)\}|\\([A-Za-z@]+)\*?|\\(.)|(\$\$?)|([{}~&])|(---?|``|'')",
    re.DOTALL,
)


def latex_text(source: str) -> str:
    r"""The text of an expanded LaTeX document: title and body, headings as ``#``, formulas as they were written.

    Figures, tables, bibliographies, references and the preamble are left out; lists become lines with a dash, footnotes
    stand in parentheses.

    Args:
        source: without comments, see :func:`lossmith.data.curation.latex_project.without_comments`, with its macros
            expanded, see :func:`lossmith.data.curation.latex_macros.expand_macros`.

    Raises:
        Unreadable: environments or formulas that do not end, or end without beginning.

    >>> print(latex_text(r"\section{Noise} It is \emph{white}: $N_0 = kT$~\cite{a}."))
    # Noise
    <BLANKLINE>
    It is white: $N_0 = kT$.
    """
    title = re.search(r"\\title(?:\[[^\]]*\])?\s*\{", source)
    heading = ""
    if title:
        heading = _clean(_group(source, title.end() - 1)[0]).replace("\n", " ")
    begin = re.search(r"\\begin\s*\{document\}", source)
    if begin:
        end = re.search(r"\\end\s*\{document\}", source[begin.end() :])
        body = source[begin.end() : begin.end() + end.start()] if end else source[begin.end() :]
    else:
        body = source
    text = _clean(_without_titles(body))
    return f"# {heading}\n\n{text}" if heading and begin else text


def _without_titles(body: str) -> str:
    while match := re.search(r"\\title(?:\[[^\]]*\])?\s*\{", body):
        body = body[: match.start()] + body[_group(body, match.end() - 1)[1] :]
    return body


def _clean(source: str) -> str:
    return _tidied("".join(_Walk(source).text()))


class _Walk:
    """One pass over the tokens, with the environments that are open."""

    def __init__(self, source: str):
        self.source, self.at = source, 0
        self.open: list[str] = []

    def text(self) -> list[str]:
        out: list[str] = []
        while match := _TOKEN.search(self.source, self.at):
            out.append(self.source[self.at : match.start()])
            self.at = match.end()
            out.append(self._token(match))
        out.append(self.source[self.at :])
        if self.open:
            raise Unreadable(f"LaTeX does not parse: \\begin{{{self.open[-1]}}} is never closed")
        return out

    def _token(self, match: re.Match[str]) -> str:
        verbatim, _, begin, end, command, escaped, dollar, bare, mark = match.groups()
        if verbatim is not None or match[0].startswith("\\verb"):
            return _protected(_inside_verbatim(match[0]))
        if begin is not None:
            return self._begin(begin, match)
        if end is not None:
            if not self.open or self.open[-1] != end:
                raise Unreadable(
                    f"LaTeX does not parse: \\end{{{end}}} closes "
                    + (f"\\begin{{{self.open[-1]}}}" if self.open else "nothing")
                )
            self.open.pop()
            return "\n\n"
        if command is not None:
            return self._command(command)
        if escaped is not None:
            return self._escaped(escaped)
        if dollar is not None:
            return self._formula(dollar, dollar)
        if mark is not None:
            return {"--": "–", "---": "—"}.get(mark, '"')
        return {"~": " ", "&": " "}.get(bare or "", "")

    def _begin(self, name: str, match: re.Match[str]) -> str:
        plain = name.rstrip("*")
        if plain in MATHEMATICS or plain in LEFT_OUT:
            inside = self._environment(name)
            if plain in LEFT_OUT:
                return "\n\n"
            return "\n\n" + _protected(_UNSEEN.sub("", match[0] + inside + f"\\end{{{name}}}")) + "\n\n"
        self.open.append(name)
        if name == "abstract":
            return "\n\n# Abstract\n\n"
        self._skip_options()
        return "\n\n"

    def _environment(self, name: str) -> str:
        """What stands in an environment that is taken, or left out, as a whole."""
        depth, start = 1, self.at
        pattern = re.compile(VERBATIM + r"|\\(begin|end)\s*\{" + re.escape(name) + r"\}", re.DOTALL)
        for match in pattern.finditer(self.source, self.at):
            depth += {"begin": 1, "end": -1}.get(match[3] or "", 0)
            if depth == 0:
                self.at = match.end()
                return self.source[start : match.start()]
        raise Unreadable(f"LaTeX does not parse: \\begin{{{name}}} is never closed")

    def _command(self, name: str) -> str:
        if name in _HEADINGS:
            self._skip_options()
            return f"\n\n{'#' * _HEADINGS[name]} " + _clean(self._argument()).replace("\n", " ") + "\n\n"
        if name == "verb":
            return ""
        if name in ("footnote", "footnotetext"):
            self._skip_options()
            return f" ({_clean(self._argument())})"
        if name in ("ensuremath", "operatorname"):
            return _protected(f"${self._argument()}$")
        if name in _DROPPED:
            self._skip_options()
            for _ in range(_DROPPED[name]):
                self._argument()
            return "\x02"
        if name in _LAST_ARGUMENT:
            self._skip_options()
            arguments = [self._argument() for _ in range(_LAST_ARGUMENT[name])]
            return _clean(arguments[-1])
        if name in _SYMBOLS:
            label = self._skip_options() if name == "item" else ""
            self._space_after()
            return _SYMBOLS[name] + (_clean(label) + " " if label else "")
        if name in _ACCENTS and len(name) == 1:
            return _accented(_ACCENTS[name], _clean(self._argument()))
        if name == "xspace":
            return " " if self.source[self.at : self.at + 1].isalnum() else ""
        # Formatting: what stands in its braces stays, and so does the space before a word.
        self._skip_options()
        return ""

    def _escaped(self, character: str) -> str:
        if character in "([":
            return self._formula("\\" + character, {"(": r"\)", "[": r"\]"}[character])
        if character in ")]":
            raise Unreadable(f"LaTeX does not parse: \\{character} closes no formula")
        if character in _ACCENTS:
            return _accented(_ACCENTS[character], _clean(self._argument()))
        if character == "\\":
            self._skip_options()
            return "\n"
        return {",": " ", ";": " ", ":": " ", "!": "", "/": "", "-": "", "@": "", " ": " ", "\n": " "}.get(
            character, character
        )

    def _formula(self, opening: str, closing: str) -> str:
        start = self.at
        pattern = re.compile(re.escape(closing)) if closing[0] == "\\" else re.compile(r"\\.|" + re.escape(closing))
        for match in pattern.finditer(self.source, self.at):
            if match[0] == closing:
                inside = self.source[start : match.start()]
                self.at = match.end()
                if len(closing) == 1 and re.search(r"\n\s*\n", inside):
                    break
                formula = _protected(_UNSEEN.sub("", opening + inside + closing))
                return formula if opening in ("$", r"\(") else f"\n\n{formula}\n\n"
        near = " ".join(self.source[start : start + 40].split())
        raise Unreadable(f"LaTeX does not parse: the formula at {opening}{near!r} does not end in its paragraph")

    def _argument(self) -> str:
        match = re.compile(r"\s*").match(self.source, self.at)
        assert match is not None
        at = match.end()
        if self.source.startswith("{", at):
            inside, self.at = _group(self.source, at)
            return inside
        single = re.compile(r"\\[A-Za-z]+|\\.|[^\s\\{}]").match(self.source, at)
        if single is None:
            return ""
        self.at = single.end()
        return single[0]

    def _skip_options(self) -> str:
        match = re.compile(r"(?:[ \t]*\[([^\[\]]*)\])+").match(self.source, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[1]

    def _space_after(self) -> None:
        match = re.compile(r"[ \t]*\n?[ \t]*").match(self.source, self.at)
        if match is not None:
            self.at = match.end()


def _group(source: str, at: int) -> tuple[str, int]:
    """The inside of the group that opens at ``at``, and the place behind it."""
    depth = 0
    for match in re.compile(VERBATIM + r"|\\.|[{}]", re.DOTALL).finditer(source, at):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return source[at + 1 : match.start()], match.end()
    raise Unreadable(f"LaTeX does not parse: a brace is never closed after {source[at : at + 40]!r}")


def _inside_verbatim(text: str) -> str:
    if text.startswith("\\begin"):
        inside = re.sub(r"^\\begin\{(\w+\*?)\}(?:\[[^\]]*\])?(?:\{\w+\})?|\\end\{\w+\*?\}$", "", text)
        return "\n\n" + inside.strip("\n") + "\n\n"
    return re.sub(r"^\\verb\*?.|.$", "", text, flags=re.DOTALL)


def _accented(mark: str, letter: str) -> str:
    # A dot goes where an accent comes.
    letter = {"ı": "i", "ȷ": "j"}.get(letter, letter)
    return unicodedata.normalize("NFC", letter[:1] + mark) + letter[1:] if letter else ""


# Formulas and verbatim text must come through the tidying unchanged.
_KEPT = {" ": "\ue000", "\n": "\ue001", "\t": "\ue002"}


def _protected(text: str) -> str:
    return "".join(_KEPT.get(character, character) for character in text)


def _tidied(text: str) -> str:
    # A citation that goes takes the space before it along.
    text = re.sub(r"[ \n]*\x02(?=[.,;:)\]])", "", text)
    text = re.sub(r"[ \t]*\x02", "", text)
    text = re.sub(r"[ \t]*(?:\(\s*(?:[,;]\s*)*\)|\[\s*(?:[,;]\s*)*\])", "", text)
    lines = [re.sub(r"[ \t\u00a0]+", " ", line).strip() for line in text.split("\n")]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    text = close_lists(text)
    for character, stand_in in _KEPT.items():
        text = text.replace(stand_in, character)
    return text.strip("\n")
