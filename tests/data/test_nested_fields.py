"""A dotted name is a field inside a record, as in SlimPajama's ``meta.redpajama_set_name``."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lossmith.data import read_corpus
from lossmith.errors import InputError

ROWS = [{"text": f"document {i}", "meta": {"source": "arxiv" if i % 2 else "c4"}} for i in range(4)]


def test_a_dotted_name_reaches_into_nested_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        documents = list(read_corpus(tmp_path / name, domain_field="meta.source"))
        assert [d.domain for d in documents] == ["c4", "arxiv", "c4", "arxiv"]


def test_a_missing_nested_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match="no field 'sorce'"):
        list(read_corpus(tmp_path / "a.jsonl", domain_field="meta.sorce"))


def test_a_field_whose_own_name_has_a_dot_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "a.b": "dotted", "a": {"b": "nested"}}) + "\n")
    assert [d.domain for d in read_corpus(tmp_path / "a.jsonl", domain_field="a.b")] == ["dotted"]
