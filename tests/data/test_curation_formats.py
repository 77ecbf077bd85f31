"""LaTeX, HTML, Markdown and PDF as text: what stays, what goes, and what is set aside."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from lossmith.data.curation.decoding import Unreadable, decoded
from lossmith.data.curation.latex_macros import expand_macros
from lossmith.data.curation.latex_project import check_braces, document_files, read_latex, without_comments
from lossmith.data.curation.latex_text import latex_text
from lossmith.data.curation.markup import html_text, markdown_text, pdf_text, plain_text, without_sections

SOURCES = Path(__file__).parent / "curation_sources"


def cleaned(source: str) -> str:
    return latex_text(expand_macros(without_comments(source)))


def test_a_paper_in_several_files_is_one_document_with_its_mathematics() -> None:
    folder = SOURCES / "papers" / "fading"
    source = read_latex(folder / "main.tex", SOURCES)
    assert [path.name for path in source.files] == ["main.tex", "model.tex", "results.tex", "macros.sty"]
    text = latex_text(expand_macros(source.text))
    assert text.startswith("# Bit Error Rates over Rayleigh Fading Channels\n\n# Abstract\n\nWe revisit")
    assert r"y = h x + n, \qquad h \sim \mathcal{CN}(0, 1), \quad n \sim \mathcal{CN}(0, N_0)," in text
    assert r"P_b &= \mathbb{E}_{h}\left[\tfrac12 \operatorname{erfc}\sqrt{\lvert h\rvert^2 \mathrm{SNR}}\right]" in text
    assert "falls by 10% for each tenth of a decibel only, where" in text
    assert "ber = 0.5 * (1 - sqrt(snr / (1 + snr)))  % in Python" in text
    for gone in ("TODO", "Reviewer", "caption", "commented out", "Fundamentals", "after the end", "label", "Supported"):
        assert gone not in text
    assert "write this sentence" in text
    assert "write this sentence" not in without_sections(text, __import__("re").compile("acknowledgments"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"\newcommand{\a}[2][x]{(#1,#2)}\a{y} \a[z]{w}", "(x,y) (z,w)"),
        (r"\newcommand\a{b}\renewcommand{\a}{c}\a", "c"),
        (r"\def\a#1#2{#2#1}\a{x}y", "yx"),
        (r"\newcommand{\bold}{\vec}\newcommand{\vec}[1]{<#1>}$\bold x$", "$<x>$"),
        (r"\let\epsilon=\varepsilon $\epsilon$", r"$\varepsilon$"),
        (r"\newenvironment{claim}[1]{Claim #1: }{ QED}\begin{claim}{7}it holds\end{claim}", "Claim 7: it holds QED"),
        (r"\newcommand{\us}{Beam\xspace}\us is \us.", "Beam is Beam."),
        (r"\newcommand{\n}{\nu}$\n x$", r"$\nu x$"),
        (r"\NewDocumentCommand{\a}{m m}{#2-#1}\a{1}{2}", "2-1"),
        (r"\begin{verbatim}\a{%}\end{verbatim}", r"\a{%}"),
        (r"M\"uller, \'Etude, na\"{\i}ve, Erd\H{o}s, \c{c}, \ss{}, \aa", "Müller, Étude, naïve, Erdős, ç, ß, å"),
        (r"see~\cite{a,b}, \citep[p.~3]{c}; Fig.~\ref{x} shows (\cite{d}).", "see,; Fig. shows."),
        (r"5\% \& \$3 \# \_ \{x\} \textbackslash", "5% & $3 # _ {x} \\"),
        (r"a\footnote{b $c$} \textbf{d \emph{e}} \textcolor{red}{f} \href{http://x}{g}", "a (b $c$) d e f g"),
        (r"\[ x \] and \( y \)", "\\[ x \\]\n\nand \\( y \\)"),
        (r"a \iffalse b \else c \fi d", r"a \iffalse b \else c \fi d"),
    ],
)
def test_latex_becomes_text(source: str, expected: str) -> None:
    if "iffalse" in source:  # read_latex leaves the branch out; without it the command goes and its text stays
        assert cleaned(source) == "a b c d"
    else:
        assert cleaned(source) == expected


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (r"\begin{itemize} \item a", r"\\begin\{itemize\} is never closed"),
        (r"\end{itemize}", r"\\end\{itemize\} closes nothing"),
        (r"\begin{a}\begin{b}\end{a}\end{b}", r"\\end\{a\} closes \\begin\{b\}"),
        ("one $x\n\ntwo", "does not end in its paragraph"),
        (r"\[ x", "does not end"),
        (r"\newcommand{\a}{\a\a}\a", "never ends"),
        (r"\newcommand{\a}{\a x}\a", "never ends"),
        (r"\newcommand{\a}{", "no } after"),
    ],
)
def test_latex_that_does_not_parse_is_set_aside(source: str, match: str) -> None:
    started = time.perf_counter()
    with pytest.raises(Unreadable, match=match):
        cleaned(source)
    assert time.perf_counter() - started < 3


def test_braces_are_found_by_line() -> None:
    check_braces("a \\{ {b} % {\n\\verb|{| \\begin{verbatim}{\\end{verbatim}", "x.tex")
    with pytest.raises(Unreadable, match=r"x\.tex:3 closes a brace"):
        check_braces("a\n{b}\n}", "x.tex")
    with pytest.raises(Unreadable, match=r"opened in x\.tex:2 is never closed"):
        check_braces("a\n{b\n", "x.tex")


def test_projects_are_found_by_what_includes_what(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "main.tex").write_text("\\input{sub/a} % \\input{c}\n")
    (tmp_path / "sub" / "a.tex").write_text("A \\input{b}\n\\input{../../outside}\\endinput never")
    (tmp_path / "sub" / "b.tex").write_text("B \\input{a}")
    (tmp_path / "c.tex").write_text("C")
    (tmp_path / "x.tex").write_text("\\input{y}")
    (tmp_path / "y.tex").write_text("\\input{x} Y")
    files = sorted(tmp_path.rglob("*.tex"))
    documents = document_files(files, tmp_path)
    assert [path.name for path in documents] == ["c.tex", "main.tex", "x.tex"]
    source = read_latex(tmp_path / "main.tex", tmp_path)
    assert source.text.split() == ["A", "B"]
    assert source.missing == ("../../outside",)


def test_long_latex_takes_time_in_proportion() -> None:
    """A macro in every line: an expansion must not copy the rest of the text."""
    line = "\\newcommand{\\k}[1]{\\mathbf{#1}}\n"
    body = "The vector $\\k{x}_{%d}$ of a \\emph{long} text~\\cite{a}.\n\n"

    def seconds(lines: int) -> float:
        source = line + "".join(body % i for i in range(lines))
        started = time.process_time()
        cleaned(source)
        return time.process_time() - started

    seconds(100)
    assert seconds(8000) < 3 * 4 * max(seconds(2000), 0.02)


def test_a_page_is_its_main_part_with_formulas() -> None:
    text = html_text((SOURCES / "wiki" / "ofdm.html").read_bytes())
    assert text.startswith(
        "# Orthogonal frequency-division multiplexing\n\nOFDM sends data on many closely spaced carriers."
    )
    assert "Each of the $N$ carriers" in text
    assert "## Advantages\n\n- A frequency-selective channel becomes" in text
    for gone in ("Main page", "tracking", "cookies", "hatnote", "Invented", "[edit]", "[1]", "licence", "color"):
        assert gone not in text
    assert html_text(b'<p>a<script type="math/tex">x</script> b</p>') == "a$x$ b"
    assert html_text('<meta charset="latin-1"><p>é</p>'.encode("latin-1")) == "é"
    with pytest.raises(Unreadable, match="unknown encoding 'klingon'"):
        html_text(b'<meta charset="klingon"><p>x</p>')
    assert html_text(b"") == ""


def test_markdown_loses_its_marks_and_keeps_code_and_formulas() -> None:
    text = markdown_text((SOURCES / "wiki" / "polar.md").read_text())
    assert "tends to the channel capacity $I(W)$, which" in text
    assert "    return u if len(u) == 1 else" in text
    assert "internal" not in text
    assert "```" not in text
    assert markdown_text("- a\n- b\n\n1. c\n") == "- a\n- b\n- c"
    assert markdown_text("costs $5 and $6, not `$x$`") == "costs $5 and $6, not $x$"
    assert markdown_text("![](badge.svg)\n\n**b** [l](u)<br>x") == "b lx"


def make_pdf(lines: list[str]) -> bytes:
    """A page of text, written by hand: pypdf only reads."""
    content = "BT /F1 12 Tf 50 700 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = io.BytesIO(b""), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.writelines(f"{place:010} 00000 n \n".encode() for place in places)
    out.write(f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def test_a_pdf_is_its_text_or_the_reason_why_not() -> None:
    pytest.importorskip("pypdf", reason="the extra curation is not installed")
    assert pdf_text(make_pdf(["The antenna gain is divi-", "ded by two."])) == "The antenna gain is divided by two."
    with pytest.raises(Unreadable, match="PDF has no text"):
        pdf_text(make_pdf([]))
    with pytest.raises(Unreadable, match="PDF does not open"):
        pdf_text(b"%PDF-1.4 nothing else")


def test_running_headers_and_footers_go_and_divided_words_are_joined() -> None:
    text = plain_text((SOURCES / "standards" / "access.txt").read_text())
    assert "user equipment makes itself known" in text
    assert "ETSI" not in text
    assert "Release 18" not in text
    assert plain_text("no pages\nat all") == "no pages\nat all"


def test_bytes_that_are_no_text_are_named() -> None:
    assert decoded(b"\xef\xbb\xbfa\r\nb\rc") == "a\nb\nc"
    with pytest.raises(Unreadable, match=r"not UTF-8 at byte 1 \(0xe9\)"):
        decoded(b"a\xe9")
    with pytest.raises(Unreadable, match="zero bytes"):
        decoded(b"a\0b")
    with pytest.raises(Unreadable, match="control characters"):
        decoded(b"\x01\x02\x03 text")


def test_text_that_is_nested_too_deeply_is_set_aside(tmp_path: Path) -> None:
    from lossmith.data.curation import read_sources

    (tmp_path / "deep.html").write_text("<div>" * 3000 + "x" + "</div>" * 3000)
    (tmp_path / "deep.tex").write_text("\\footnote{" * 3000 + "x" + "}" * 3000)
    reasons = [getattr(found, "reason", "") for found in read_sources([tmp_path])]
    assert reasons == ["HTML does not parse: nested too deeply", "LaTeX does not parse: nested too deeply"]
