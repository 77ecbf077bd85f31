"""From a folder of papers, pages and standards to a corpus: every document is in it, or set aside with its reason."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossmith.data.curation import Domain, curate, load_domain, read_sources
from lossmith.data.curation.sources import SetAside, SourceDocument
from lossmith.errors import InputError

pytest.importorskip("datasketch", reason="the extra curation is not installed")
pytest.importorskip("bs4", reason="the extra curation is not installed")

SOURCES = Path(__file__).parent / "curation_sources"
SETTINGS: dict[str, Any] = {
    "name": "telecom",
    "records": {"text": "content", "category": "kind"},
    "keywords": {"minimum": 2, "terms": ["antenna*", "wireless", "5g", "lte", "channel*", "modulat*", "uplink"]},
    "quality": {"minimum_words": 40},
}
TELECOM = Domain(**SETTINGS)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "corpus.jsonl"
    curate([SOURCES], out, TELECOM)
    return out


def test_a_folder_becomes_a_corpus_and_the_rest_has_its_reason(curated: Path) -> None:
    kept = {row["id"]: row for row in rows(curated)}
    assert list(kept) == [
        "papers/fading/main.tex",
        "papers/latin.tex",
        "standards/access.txt",
        "wiki/ofdm.html",
        "wiki/polar.md",
    ]
    assert kept["wiki/polar.md"]["category"] == "wiki"
    gone = {row["id"]: (row["step"], row["reason"]) for row in rows(Path(f"{curated}.rejected.jsonl"))}
    expected = {
        "papers/beams/paper.tex": ("read", r"LaTeX does not parse: \begin{equation} is never closed"),
        "papers/beams/unbalanced.tex": (
            "read",
            "LaTeX does not parse: the brace opened in papers/beams/unbalanced.tex:3 is never closed",
        ),
        "papers/fading/macros.sty": ("read", "no document (.sty)"),
        "papers/fading/refs.bib": ("read", "no document (.bib)"),
        "standards/broken.txt": ("read", "not UTF-8 at byte 25 (0xff)"),
        "standards/empty.txt": ("read", "empty"),
        "standards/scan.bin": ("read", "binary file (zero bytes)"),
        "web/pages.jsonl:1": ("keywords", "fewer than 2 different terms (1: 5g)"),
        "web/pages.jsonl:2": ("quality", "fewer than 40 words (9)"),
        "web/pages.jsonl:3": ("read", "empty"),
        "web/pages.jsonl:4": ("quality", "more than 30% in repeated lines (95%)"),
        "wiki/bread.md": ("keywords", "fewer than 2 different terms (0)"),
        "wiki/polar_copy.md": ("exact duplicates", "the same words as: wiki/polar.md"),
        "wiki/ofdm_mirror.md": ("near duplicates", "nearly the same as: wiki/ofdm.html (Jaccard 0.967)"),
    }
    assert gone.pop("web/pages.jsonl:5-")[1].endswith("4 documents before it were read")
    assert gone == expected


def test_the_report_adds_up_and_the_card_shows_it(curated: Path) -> None:
    report = json.loads(Path(f"{curated}.report.json").read_text())
    given = [step["given"] for step in report["steps"]]
    kept = [step["kept"] for step in report["steps"]]
    assert given[1:] == kept[:-1]
    assert given[0] - kept[-1] == len(rows(Path(f"{curated}.rejected.jsonl")))
    assert kept[-1] == report["documents"] == sum(category["documents"] for category in report["categories"]) == 5
    for step in report["steps"]:
        assert sum(step["reasons"].values()) == step["given"] - step["kept"]
    # The paper is made of three files and a package.
    assert report["files"] == 5 + 3
    card = Path(f"{curated}.md").read_text()
    assert card.startswith('---\npretty_name: "telecom"\n')
    assert "| wiki | 2 |" in card
    assert "| near duplicates | 6 | 5 | nearly the same as: 1 |" in card


def test_the_same_sources_give_the_same_bytes_with_any_number_of_processes(curated: Path, tmp_path: Path) -> None:
    curate(SOURCES, tmp_path / "again.jsonl.gz", TELECOM)
    curate(SOURCES, tmp_path / "twice.jsonl.gz", TELECOM)
    assert gzip.decompress((tmp_path / "again.jsonl.gz").read_bytes()) == curated.read_bytes()
    assert (tmp_path / "again.jsonl.gz").read_bytes() == (tmp_path / "twice.jsonl.gz").read_bytes()


@pytest.mark.slow
def test_processes_side_by_side_change_nothing(curated: Path, tmp_path: Path) -> None:
    curate(SOURCES, tmp_path / "corpus.jsonl", TELECOM, jobs=2)
    for name in ("", ".rejected.jsonl"):
        assert Path(f"{tmp_path / 'corpus.jsonl'}{name}").read_bytes() == Path(f"{curated}{name}").read_bytes()


def test_several_sources_have_names_of_their_own(tmp_path: Path) -> None:
    found = {
        getattr(item, "id", ""): item.category
        for item in read_sources([SOURCES / "wiki", SOURCES / "standards" / "access.txt"])
    }
    assert found[f"{(SOURCES / 'wiki').as_posix()}/polar.md"] == "wiki"
    assert found[(SOURCES / "standards" / "access.txt").as_posix()] == "access"


def test_a_labelled_file_trains_the_classifier_that_filters(tmp_path: Path) -> None:
    radio = [f"the antenna {word} sends a radio signal over the channel" for word in "abcdefgh"]
    food = [f"the {word} bread bakes with flour and salt and yeast" for word in "abcdefgh"]
    labelled = [{"text": text, "label": 1} for text in radio] + [{"text": text, "label": 0} for text in food]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (tmp_path / "mine.yaml").write_text("relevance: {labelled: labelled.jsonl, threshold: 0.5}\n")
    report = curate(SOURCES / "wiki", tmp_path / "corpus.jsonl", tmp_path / "mine.yaml")
    kept = {row["id"]: row["relevance"] for row in rows(tmp_path / "corpus.jsonl")}
    gone = {row["id"]: row["step"] for row in rows(tmp_path / "corpus.jsonl.rejected.jsonl")}
    assert gone["bread.md"] == "relevance"
    assert all(score >= 0.5 for score in kept.values())
    assert "balanced accuracy 1.000" in report.classifier


def test_any_function_can_judge_relevance(tmp_path: Path) -> None:
    curate(SOURCES / "wiki", tmp_path / "corpus.jsonl", relevance=lambda text: float("Flour" in text))
    assert [row["id"] for row in rows(tmp_path / "corpus.jsonl")] == ["bread.md"]
    with pytest.raises(InputError, match="relevance must give a score between 0 and 1, got 7"):
        curate(SOURCES / "wiki", tmp_path / "other.jsonl", relevance=lambda text: 7.0)
    assert not (tmp_path / "other.jsonl").exists()


def test_documents_with_evaluation_questions_are_left_out(tmp_path: Path) -> None:
    questions = [
        {"question": "And it?", "answer": "A crust forms when steam keeps the surface soft for the first minutes of"},
        {"question": "the channel capacity $I(W)$, which makes them?", "answer": "codes", "id": "ofdm.html"},
    ]  # fmt: skip
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def kept(**contamination: Any) -> list[str]:
        domain = Domain(contamination={"questions": [tmp_path / "exam.jsonl"], **contamination})
        report = curate(SOURCES / "wiki", tmp_path / "corpus.jsonl", domain)
        assert report.questions == 2
        return [row["id"] for row in rows(tmp_path / "corpus.jsonl")]

    assert kept() == ["ofdm.html"]
    # The mirror of a document that questions were made from is no copy of anything in the corpus then.
    assert kept(drop_sources=True) == ["ofdm_mirror.md"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("keyword: {}", "unknown key 'keyword': did you mean 'keywords'"),
        ("keywords: {term: [a]}", r"unknown key 'keywords.term': did you mean 'terms'\?"),
        ("quality: {minimum_words: -1}", "quality.minimum_words: input should be greater than or equal to 1, got -1"),
        ("quality: {minimum_words: 9, maximum_words: 5}", "quality: maximum_words 5 is less than minimum_words 9"),
        ("duplicates: {similarity: 80}", "duplicates.similarity: input should be less than or equal to 1, got 80"),
        ("sections: {drop: ['(']}", "is no regular expression"),
        ("keywords: {terms: ['']}", "a term must not be blank"),
        ("records: {format: latx}", "did you mean 'latex'"),
        ("- a", "must be a mapping with keys such as name"),
        ("a: [", "mine.yaml:1: not YAML|mine.yaml:2: not YAML"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_that_names_the_key(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "mine.yaml").write_text(text + "\n")
    with pytest.raises(InputError, match=match):
        load_domain(tmp_path / "mine.yaml")


def test_the_built_in_domain_is_an_example_that_works(tmp_path: Path) -> None:
    report = curate(SOURCES / "wiki", tmp_path / "corpus.jsonl", "telecom")
    assert {row["id"] for row in rows(tmp_path / "corpus.jsonl")} == {"ofdm.html", "polar.md"}
    assert ("5g", 2) in report.terms
    with pytest.raises(InputError, match="no such file; built in: telecom"):
        load_domain("telecomm")


def test_what_cannot_be_curated_is_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(SOURCES / "wiki", tmp_path / "wiki")
    out = tmp_path / "corpus.jsonl"
    with pytest.raises(InputError, match="lies inside the source"):
        curate(tmp_path, out)
    with pytest.raises(InputError, match=r"--out must end with \.jsonl"):
        curate(tmp_path / "wiki", tmp_path / "corpus.txt")
    with pytest.raises(InputError, match="there is no file or folder"):
        curate(tmp_path / "wikki", out)
    with pytest.raises(InputError, match="is given twice"):
        curate([tmp_path / "wiki", tmp_path / "wiki" / ".." / "wiki"], out)
    with pytest.raises(InputError, match="there are no sources"):
        curate([], out)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="there are no documents in"):
        curate(tmp_path / "nothing", out)
    with pytest.raises(InputError, match=r"none of 5 documents is left \(5 by keywords\).*rejected.jsonl says why"):
        curate(tmp_path / "wiki", out, Domain(keywords={"terms": ["zebra"]}))
    assert not out.exists()
    assert len(rows(tmp_path / "corpus.jsonl.rejected.jsonl")) == 5


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(tmp_path: Path) -> None:
    """Texts of 60 words in families that differ in some of them; the obvious way takes every pair."""
    from lossmith.data.curation.duplicates import jaccard, shingles

    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 6)) for _ in range(500)]
    texts = []
    for _ in range(25):
        base = list(generator.choice(words, 60))
        for changes in (0, 1, 2, 6):
            changed = list(base)
            for place in generator.integers(0, 60, changes):
                changed[place] = str(generator.choice(words))
            texts.append(" ".join(changed) + ".")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    curate(tmp_path / "texts.jsonl", tmp_path / "corpus.jsonl", Domain(duplicates={"similarity": 0.7}))
    kept: list[int] = []
    for i, text in enumerate(texts):
        if all(jaccard(shingles(text, 5), shingles(texts[j], 5)) < 0.7 for j in kept):
            kept.append(i)
    assert 25 <= len(kept) < 100
    found = [int(row["id"].rpartition(":")[2]) - 1 for row in rows(tmp_path / "corpus.jsonl")]
    # MinHash may miss a pair near the threshold, and drops nothing that is not one.
    assert set(kept) <= set(found)
    assert len(found) - len(kept) <= 2


def test_tables_compressed_files_and_records_of_other_formats_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "note.txt.gz", "wt") as stream:
        stream.write("a compressed note")
    (tmp_path / "cut.txt.gz").write_bytes((tmp_path / "note.txt.gz").read_bytes()[:-9])
    (tmp_path / "sources.tar.gz").write_bytes(b"x")
    (tmp_path / "t.csv").write_text('text,kind\n"a ""quoted"" text",x\n')
    found = {item.id: item for item in read_sources([tmp_path])}
    assert isinstance(found["note.txt.gz"], SourceDocument)
    assert found["note.txt.gz"].text == "a compressed note"
    assert isinstance(found["cut.txt.gz"], SetAside)
    assert found["cut.txt.gz"].reason == "the compressed file is cut short"
    assert getattr(found["sources.tar.gz"], "reason", "") == "an archive; unpack it first"
    assert getattr(found["t.csv:1"], "text", "") == 'a "quoted" text'
    from lossmith.data.curation.domain import Records

    (tmp_path / "t.csv").write_text('id,body\nx7,"\\emph{a} $b$"\nx8,"{"\n')
    records = Records(text="body", id="id", format="latex")
    latex = {item.id: item for item in read_sources([tmp_path / "t.csv"], records)}
    assert getattr(latex["x7"], "text", "") == "a $b$"
    assert "never closed" in getattr(latex["x8"], "reason", "")


def test_the_configuration_that_the_documentation_shows_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "curation.md").read_text(encoding="utf-8")
    start = page.index("name: bread")
    (tmp_path / "bread.yaml").write_text(page[start : page.index("```", start)])
    domain = load_domain(tmp_path / "bread.yaml")
    assert domain.keywords.terms[1] == "yeast*"
    assert domain.relevance.labelled == tmp_path / "labelled.jsonl"
    assert domain.quality == Domain().quality
