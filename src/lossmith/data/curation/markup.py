"""Markdown, HTML, PDF and plain text as text with headings as ``#`` and formulas kept."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

from lossmith.errors import InputError

from .decoding import Unreadable, decoded

_MATHEMATICS = re.compile(
    r"\$\$.+?\$\$|(?<![\\$])\$(?=[^\s$])[^$\n]*?[^\s$\\]\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL
)
_FENCED = re.compile(r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*[ \t]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_BOILERPLATE_TAGS = [
    "script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "button", "select", "input",
    "iframe", "svg", "canvas", "figure", "table", "object", "video", "audio",
]  # fmt: skip
# Whole words of a class or id.
_BOILERPLATE = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navbox|menu|sidebar|breadcrumbs?|footer|header|cookie|cookies|banner|advert|ads?|share|"
    r"social|comments?|related|pagination|toc|editsection|reflist|references|catlinks|headerlink|hatnote|metadata|"
    r"newsletter|login|skip|sphinxsidebar|infobox|noprint|sr-only)(?:$|[\s_-])",
    re.IGNORECASE,
)
_BLOCKS = {
    "address", "article", "blockquote", "body", "dd", "div", "dl", "dt", "fieldset", "li", "main", "ol", "p", "pre",
    "section", "tr", "ul", "hr",
}  # fmt: skip


def markdown_text(source: str) -> str:
    r"""Markdown without its marks, links, pictures, raw HTML and front matter; formulas and code as they were.

    >>> print(markdown_text("# A *title*\n\nSee [the page](u): $a_*b_*$ and `x_1`."))
    # A title
    <BLANKLINE>
    See the page: $a_*b_*$ and x_1.
    """
    from markdown_it import MarkdownIt

    source = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", source, flags=re.DOTALL)
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\ue010{len(kept) - 1}\ue011"

    parts, at = [], 0
    for code in _FENCED.finditer(source):
        parts += [_MATHEMATICS.sub(keep, source[at : code.start()]), code[0]]
        at = code.end()
    parts.append(_MATHEMATICS.sub(keep, source[at:]))
    out: list[str] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse("".join(parts)):
        if token.type == "heading_open":
            out.append("#" * int(token.tag[1]) + " ")
        elif token.type == "list_item_open":
            out.append("- ")
        elif token.type == "inline":
            out.append(_inline(token.children or []))
            out.append("\n" if token.level > 2 else "\n\n")
        elif token.type in ("fence", "code_block"):
            out.append(token.content.rstrip() + "\n\n")
        elif token.type in ("bullet_list_close", "ordered_list_close", "table_close"):
            out.append("\n")
    return re.sub("\ue010(\\d+)\ue011", lambda m: kept[int(m[1])], tidied("".join(out)))


def _inline(children: list[Any]) -> str:
    out = []
    for child in children:
        if child.type in ("text", "code_inline"):
            out.append(child.content)
        elif child.type in ("softbreak", "hardbreak"):
            out.append("\n")
    return "".join(out)


def html_text(data: bytes) -> str:
    r"""The main part of a page: without navigation, boilerplate, tables and pictures; formulas as LaTeX.

    The main part is ``<main>``, else the only ``<article>``, else the body. Formulas are MathJax scripts, MathML with a
    LaTeX annotation, and the pictures of Wikipedia's.

    Args:
        data: the bytes; their encoding is the one that the page declares, else UTF-8.

    Raises:
        Unreadable: no such encoding, or binary.

    >>> print(html_text(b"<nav>Home</nav><main><h1>Fading</h1><p>It is <b>fast</b>.</p></main>"))
    # Fading
    <BLANKLINE>
    It is fast.
    """
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise InputError("HTML needs beautifulsoup4: pip install 'lossmith[curation]'") from None

    soup: Any = BeautifulSoup(decoded(data, _html_encoding(data)), "html.parser")
    _mark_formulas(soup)
    for tag in soup(_BOILERPLATE_TAGS):
        tag.decompose()
    for tag in soup(True):
        if tag.attrs is None or tag.name in ("html", "body", "main", "article"):
            continue  # gone with what it was in
        names = [*(tag.get("class") or []), str(tag.get("id") or "")]
        if _BOILERPLATE.search(" ".join(names)) or tag.get("role") in ("navigation", "banner", "contentinfo"):
            tag.decompose()
    articles = soup("article")
    main = soup.find("main") or soup.find(attrs={"role": "main"}) or (articles[0] if len(articles) == 1 else None)
    return tidied("".join(_flowing(main or soup.body or soup)))


def _html_encoding(data: bytes) -> str:
    declared = re.search(rb"<meta[^>]+charset\s*=\s*[\"']?([\w-]+)", data[:4096], re.IGNORECASE)
    if declared:
        name = declared[1].decode()
        # Pages that declare Latin-1 mean what browsers make of it.
        return {"iso-8859-1": "cp1252"}.get(name.lower(), name)
    return "utf-8"


def _mark_formulas(soup: Any) -> None:
    """Replace formulas by their LaTeX, before what holds them goes."""
    for tag in soup("script", type=re.compile(r"^math/tex")):
        display = "display" in str(tag.get("type"))
        tag.replace_with(f"\n\n$${tag.string or ''}$$\n\n" if display else f"${(tag.string or '').strip()}$")
    for tag in soup("math"):
        found = tag.find("annotation", attrs={"encoding": "application/x-tex"})
        source = found.get_text() if found else tag.get("alttext")
        tag.replace_with(f"${_unstyled(source)}$" if source else tag.get_text())
    for tag in soup("img", class_=re.compile("mwe-math|tex|latex")):
        parent = tag.parent
        # Wikipedia shows a formula twice: as MathML that is hidden, and as a picture.
        if parent is not None and "$" in parent.get_text():
            tag.decompose()
        elif tag.get("alt"):
            tag.replace_with(f"${_unstyled(tag['alt'])}$")


def _unstyled(source: str) -> str:
    source = source.strip()
    match = re.fullmatch(r"\{\\displaystyle\s*(.*)\}", source, re.DOTALL)
    return match[1].strip() if match else source


def _flowing(tag: Any) -> list[str]:
    from bs4.element import Comment, Declaration, Doctype, NavigableString, ProcessingInstruction

    out: list[str] = []
    for child in tag.children:
        if isinstance(child, (Comment, Declaration, Doctype, ProcessingInstruction)):
            continue
        if isinstance(child, NavigableString):
            # A browser shows one space for any white space.
            out.append(re.sub(r"(?!\n\n)\s+", " ", str(child)) if "\n\n$$" not in str(child) else str(child))
        elif child.name == "pre":
            out.append("\n\n" + child.get_text().strip("\n") + "\n\n")
        elif re.fullmatch("h[1-6]", child.name):
            heading = " ".join(child.get_text().replace("¶", "").split())
            out.append(f"\n\n{'#' * int(child.name[1])} {heading}\n\n" if heading else "")
        elif child.name == "br":
            out.append("\n")
        elif child.name == "li":
            out.append("\n- " + "".join(_flowing(child)).strip() + "\n")
        elif child.name in _BLOCKS:
            out += ["\n\n", *_flowing(child), "\n\n"]
        elif child.name == "sup" and re.fullmatch(r"\s*\[\d+\]\s*", child.get_text()):
            continue  # a reference
        else:
            out += _flowing(child)
    return out


def pdf_text(data: bytes) -> str:
    """The text of a PDF: running headers, footers and page numbers left out, words that were divided put together.

    Raises:
        Unreadable: encrypted, broken, or pictures only.
    """
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError:
        raise InputError("PDF needs pypdf: pip install 'lossmith[curation]'") from None
    import logging

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted:
            raise Unreadable("PDF does not open: it is encrypted")
        pages = [page.extract_text() for page in reader.pages]
    except Unreadable:
        raise
    except Exception as error:  # what a broken PDF raises has many kinds
        kind = str(error) if isinstance(error, PyPdfError) else type(error).__name__
        raise Unreadable(f"PDF does not open: {kind.splitlines()[0] if kind else 'unknown error'}") from None
    if not any(page.strip() for page in pages):
        raise Unreadable("PDF has no text (scanned pages?)")
    return tidied(joined_pages(pages))


def plain_text(source: str) -> str:
    """Plain text; where form feeds divide it into pages, running headers and footers are left out."""
    return tidied(joined_pages(source.split("\f")) if "\f" in source else source)


def joined_pages(pages: list[str]) -> str:
    r"""Pages without the lines that half of them, and at least three, share at their top or bottom.

    Digits count as the same, so that page numbers go.

    >>> print(joined_pages([f"RFC 1\n{word} is divi-\nded, {word}\nPage 1" for word in ["one", "two", "six"]]))
    one is divided, one
    two is divided, two
    six is divided, six
    """

    def key(line: str) -> str:
        return re.sub(r"\d+", "0", " ".join(line.split()))

    cut = [[line for line in page.split("\n") if line.strip()] for page in pages]
    ends: Counter[str] = Counter()
    for lines in cut:
        ends.update({key(line) for line in [*lines[:2], *lines[-2:]]})
    running = {line for line, count in ends.items() if count >= max(3, len(pages) / 2)}
    kept = []
    for page in pages:
        lines = page.split("\n")
        filled = [i for i, line in enumerate(lines) if line.strip()]
        edge = {i for i in [*filled[:2], *filled[-2:]] if key(lines[i]) in running or lines[i].strip().isdigit()}
        kept.append("\n".join(line for i, line in enumerate(lines) if i not in edge).strip("\n"))
    return re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", "\n".join(page for page in kept if page))


def tidied(text: str) -> str:
    """No white space at the end of lines, at most one blank line, none at either end."""
    lines = [line.rstrip() for line in re.sub(r"[\u200b\ufeff\u00ad]", "", text).replace("\u00a0", " ").split("\n")]
    lines = [line.lstrip() if line.strip() and not line.startswith("  ") else line for line in lines]
    return close_lists(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def close_lists(text: str) -> str:
    """No blank line between the entries of a list."""
    return re.sub(r"(?m)(^- [^\n]*(?:\n[^\n]+)*)\n\n(?=- )", r"\1\n", text)


def without_sections(text: str, names: re.Pattern[str]) -> str:
    r"""Text without the sections whose heading matches ``names`` as a whole, subsections included.

    >>> print(without_sections("# A\n\na\n\n# References\n\n[1]\n\n## More\n\n# B", re.compile("references")))
    # A
    <BLANKLINE>
    a
    <BLANKLINE>
    # B
    """
    kept: list[str] = []
    left_out = 0
    for line in text.split("\n"):
        heading = re.match(r"(#{1,6}) +(.*?)\s*$", line) if line.startswith("#") else None
        if heading:
            level = len(heading[1])
            title = re.sub(r"^(?:[\dA-Z]+\.)*\d*\.?\s+", "", heading[2]).strip(" :.").lower()
            if left_out and level <= left_out:
                left_out = 0
            if not left_out and names.fullmatch(title):
                left_out = level
        if not left_out:
            kept.append(line)
    return "\n".join(kept).strip()
