import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lossmith.data import Document, read_corpus
from lossmith.data.corpus import content_key
from lossmith.errors import InputError


def texts(source, **options):
    return [document.text for document in read_corpus(source, **options)]


def fails(source, **options) -> str:
    with pytest.raises(InputError) as caught:
        list(read_corpus(source, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_file_is_one_document_with_its_place(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# Title\n\nWords.\n")
    assert list(read_corpus(path)) == [Document("# Title\n\nWords.\n", "", f"{path}:1")]


def test_a_long_text_file_is_cut_and_its_pieces_say_their_line(tmp_path):
    text = "".join(f"paragraph {i} " + "word " * 50 + "\n\n" for i in range(100))
    path = tmp_path / "long"
    path.write_text(text)
    documents = list(read_corpus(path))
    assert "".join(d.text for d in documents) == text
    assert len(documents) == pytest.approx(len(text) / 4000, rel=0.15)
    line = int(documents[3].source.rpartition(":")[2])
    assert text.split("\n")[line - 1] == documents[3].text.split("\n")[0]


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_every_line_end_becomes_a_newline_wherever_the_file_is_read_in_pieces(tmp_path, ending):
    text = ("é" * 70 + "\n") * 2000
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", ending).encode())
    assert "".join(texts(path)) == text


def test_a_byte_order_mark_is_dropped_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\\ufefftwo"}\n')
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbftext\nthree\n")
    (tmp_path / "d.json").write_bytes(b'\xef\xbb\xbf[{"text": "four"}]')
    assert texts(tmp_path) == ["one", "\ufefftwo", "three", "four"]


@pytest.mark.parametrize("offset", [0, 5, 65535, 65536, 65537, 200_000])
def test_a_file_that_is_not_utf8_names_the_byte(tmp_path, offset):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a" * offset + b"\xff" + b"a" * 100)
    assert fails(path) == f"{path}: not UTF-8 text, the byte at offset {offset} is 0xff"


def test_a_character_cut_short_at_the_end_names_its_first_byte(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes(b"abc" + "€".encode()[:2])
    assert "offset 3 is 0xe2" in fails(path)


def test_a_bad_byte_in_a_later_line_of_jsonl_and_csv_names_its_offset_in_the_file(tmp_path):
    line = b'{"text": "one"}\n'
    (tmp_path / "a.jsonl").write_bytes(line + b'{"text": "\xe9"}\n')
    assert f"offset {len(line) + 10} is 0xe9" in fails(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_bytes(b"text\none\n\xe9\n")
    assert "offset 9 is 0xe9" in fails(tmp_path / "a.csv")


def test_utf16_is_recognised_in_the_message(tmp_path):
    (tmp_path / "a.txt").write_text("hello", encoding="utf-16")
    assert "looks like UTF-16" in fails(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"text": "b"', ":3: the line is not JSON"),
        ('["b"]', ":3: the line must be a JSON object, got a list"),
        ("3", ":3: the line must be a JSON object, got a number"),
        ('{"body": "b", "id": 1}', ":3: there is no field 'text' (text_field), only: body, id"),
        ("{}", ":3: there is no field 'text' (text_field), only: no fields at all"),
        ('{"text": 3}', ":3: the field 'text' must be a string, got a number"),
        ('{"text": null}', ":3: the field 'text' must be a string, got null"),
        ("[" * 100_000, ":3: the line is not usable JSON (nested too deeply)"),
        ('{"text": ' + "9" * 5000 + "}", ":3: the line is not usable JSON"),
    ],
)
def test_a_bad_line_of_jsonl_names_file_and_line(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    assert fails(path).startswith(f"{path}{expected}")


def test_a_lone_surrogate_in_json_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a\ufffdb", "\U0001f600"]


def test_json_must_be_a_list_of_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}')
    assert "must hold a JSON list of objects, got an object" in fails(path)
    path.write_text('[{"text": "a"}, 1]')
    assert "item 2: must be a JSON object, got a number" in fails(path)
    path.write_text('[{"text": "a"},\n')
    assert ":2: not JSON" in fails(path)


def test_csv_and_tsv_keep_quoted_line_ends_and_long_fields(tmp_path):
    long = "word " * 60_000  # longer than the csv module's default limit
    rows = [["id", "body"], ["1", 'say "hi",\nthen go'], ["2", long]]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        assert texts(tmp_path / name, text_field="body") == ['say "hi",\nthen go', long]


def test_csv_without_the_column_names_the_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,x\n")
    assert fails(path) == f"{path}:1: there is no field 'text' (text_field), only: id, body"
    path.write_text("id,text\n1,x\n2\n")
    assert fails(path).startswith(f"{path}:3: there is no field 'text'")


def test_parquet_streams_and_skips_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    values = [f"text {i}" if i % 3 else None for i in range(1000)]
    pq.write_table(pa.table({"text": values, "kind": ["a"] * 1000}), path, row_group_size=100)
    documents = list(read_corpus(path, domain_field="kind"))
    assert [d.text for d in documents] == [v for v in values if v]
    assert documents[0] == Document("text 1", "a", f"{path}, row 2")
    assert "there is no field 'body' (text_field), only: text, kind" in fails(path, text_field="body")
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert "row 1: the field 'text' must be a string, got a number" in fails(path)


def test_a_file_that_is_no_parquet_or_a_cut_one_is_one_sentence(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert "not readable as Parquet" in fails(path)
    path.write_bytes(b"")
    assert "not readable as Parquet" in fails(path)


@pytest.mark.parametrize("suffix, module", [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files_are_read_and_cut_ones_refused(tmp_path, suffix, module):
    lines = [f"line {i} {os.urandom(20).hex()}" for i in range(500)]
    path = tmp_path / f"a.jsonl.{suffix}"
    with module.open(path, "wt") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    assert texts(path) == lines
    path.write_bytes(path.read_bytes()[:-200])
    assert fails(path) == f"{path}: the compressed file is cut short"
    path.write_bytes(b"plain")
    message = fails(path)
    assert message.startswith(f"{path}: ")


def test_zstandard_is_read(tmp_path):
    path = tmp_path / "a.txt.zst"
    whole = pa.compress(os.urandom(4000).hex().encode(), codec="zstd", asbytes=True)
    path.write_bytes(whole)
    assert len("".join(texts(path))) == 8000
    path.write_bytes(whole[:-200])
    assert fails(path).startswith(f"{path}: ")


def test_a_folder_is_read_in_sorted_order_with_mixed_types_and_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.txt").write_text("three")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "a.rst").write_text("two")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / ".git" / "x").write_bytes(b"\xff")
    documents = list(read_corpus(tmp_path))
    assert [d.text for d in documents] == ["one", "two", "three"]
    assert {d.domain for d in documents} == {""}  # a single sub-folder is no division


def test_several_sub_folders_are_domains(tmp_path):
    for name in ("news/2024", "poems"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
    assert [(d.text, d.domain) for d in read_corpus(tmp_path)] == [
        ("news/2024", "news"),
        ("poems", "poems"),
    ]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert texts(tmp_path) == ["one"]


def test_domain_field_gives_the_domain_and_its_absence_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "k": 3}\n{"text": "b", "k": null}\n')
    assert [d.domain for d in read_corpus(path, domain_field="k")] == ["3", ""]
    assert "there is no field 'kind' (domain_field), only: text, k" in fails(path, domain_field="kind")
    path.write_text('{"text": "a", "k": [1]}\n')
    assert "the domain 'k' must be a string or number, got a list" in fails(path, domain_field="k")


def test_missing_paths_fail_at_once_in_one_sentence(tmp_path, monkeypatch):
    for source in (str(tmp_path / "none.txt"), tmp_path / "none", "./none", "a/b/c", "none.txt", "", "a\0b"):
        with pytest.raises(InputError, match=r"^data: "):
            read_corpus(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora").mkdir()
    with pytest.raises(InputError, match="no file or folder 'corpora/new'"):
        read_corpus("corpora/new")  # spelled like a hub id, but clearly a path


def test_empty_and_blank_corpora_are_refused(tmp_path):
    assert "the corpus is empty" in fails(tmp_path)
    (tmp_path / "a.txt").write_text(" \n\n\t \u3000")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    (tmp_path / "c.csv").write_text("")
    assert "the corpus is empty" in fails(tmp_path)


def test_a_saved_dataset_is_read_and_of_several_splits_the_training_one(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["one", None, "two"], "kind": ["a", "b", "c"]})
    table.save_to_disk(str(tmp_path / "single"))
    assert texts(tmp_path / "single") == ["one", "two"]
    assert [d.domain for d in read_corpus(tmp_path / "single", domain_field="kind")] == ["a", "c"]
    assert "only: text, kind" in fails(tmp_path / "single", text_field="body")
    other = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": table, "test": other}).save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "both") == ["one", "two"]
    assert texts(tmp_path / "both" / "test") == ["x"]
    datasets.DatasetDict({"dev": table, "test": other}).save_to_disk(str(tmp_path / "no"))
    assert "no split 'train' among the saved splits (dev, test)" in fails(tmp_path / "no")


def test_the_content_key_follows_contents_and_names_but_not_the_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    first = content_key(tmp_path / "one")
    assert content_key(tmp_path / "two") == first
    (tmp_path / "two" / "a.txt").write_text("other")
    assert content_key(tmp_path / "two") != first
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert content_key(tmp_path / "one") != first


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_reading_holds_a_small_part_of_a_large_file(tmp_path, name):
    path = tmp_path / name
    row = "some words that are repeated " * 40 + "\n"
    rows = 10_000  # about 12 MB
    if name == "a.parquet":
        pq.write_table(pa.table({"text": [row] * rows}), path, row_group_size=500, use_dictionary=False)
    elif name == "a.jsonl":
        path.write_text((json.dumps({"text": row}) + "\n") * rows)
    elif name == "a.csv":
        path.write_text("text\n" + row * rows)
    else:
        path.write_text(row * rows)
    tracemalloc.start()
    characters = sum(len(document.text) for document in read_corpus(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters > 11_000_000
    assert peak < 2_000_000


def test_tables_written_by_pandas_are_read(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"text": ["a, b", 'q "x"', "two\nlines"], "n": [1, 2, 3]})
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "b.tsv", sep="\t")
    frame.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "d.parquet")
    assert texts(tmp_path) == list(frame["text"]) * 4


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert fails(path) == f"{path}: cannot be read (Permission denied)"


def test_a_pipe_is_not_a_corpus(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "expected a regular file or a folder" in fails(tmp_path / "pipe")


def test_nothing_is_read_from_standard_input_by_accident(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("text"))
    with pytest.raises(InputError):
        read_corpus("-")
