import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lossmith.data import python_corpus, read_python_corpus
from lossmith.errors import InputError


@pytest.fixture(scope="module")
def documents():
    return list(read_python_corpus())


def test_both_domains_are_large(documents):
    for domain in ("docs", "code"):
        texts = [d.text for d in documents if d.domain == domain]
        assert len(texts) > 1000
        assert sum(map(len, texts)) > 1_000_000
        assert max(map(len, texts)) <= 6000


def test_no_docstring_is_left_in_the_code(documents):
    code = "\n".join(d.text for d in documents if d.domain == "code")
    lines = set(code.split("\n"))
    docstrings = [d.text for d in documents if d.domain == "docs" and not d.source.startswith("topic ")]
    # Indentation differs, so compare a long line from the middle of each docstring.
    middle = [max((line.strip() for line in text.split("\n")), key=len) for text in docstrings]
    stripped = {line.strip() for line in lines}
    shared = [line for line in middle if len(line) > 40 and line in stripped]
    assert len(shared) <= 0.01 * len(middle), shared[:5]  # a handful repeat what a comment says


def test_tests_bundled_packages_and_tables_are_left_out(documents):
    sources = {d.source.split(":")[0] for d in documents if d.domain == "code"}
    parts = {part for source in sources for part in Path(source).parts}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "encodings", "pydoc_data", "lib2to3"}
    assert {"argparse.py", "json/decoder.py", "typing.py"} <= sources


def test_reading_imports_no_module_of_the_library():
    program = (
        "import sys; from lossmith.data import read_python_corpus; before = set(sys.modules);"
        "print(sum(1 for _ in read_python_corpus())); new = set(sys.modules) - before;"
        "assert not new & {'turtle', 'antigravity', 'this', 'tkinter', 'pydoc_data.topics'}, new"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_two_readings_are_equal(documents):
    assert list(read_python_corpus()) == documents


@pytest.mark.parametrize(
    "source, expected",
    [
        ('"""Doc."""\nx = 1\n', "x = 1\n"),
        ('def f():\n    """Doc."""\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    """Doc."""\n', "def f():\n    ...\n"),
        ('class A:\n    """Doc\n\n    é"""\n\n    x = 1\n', "class A:\n    x = 1\n"),
        ('def f(): "doc"\n', "def f(): ...\n"),
        ('def f():\n    "é"; x = "é"\n    return x\n', 'def f():\n    ...; x = "é"\n    return x\n'),
        (
            'if x:\n    async def g():\n        "Doc"  # why\n',
            "if x:\n    async def g():\n        ...  # why\n",
        ),
        ('def f():\n    x = """not\n    a doc"""\n', 'def f():\n    x = """not\n    a doc"""\n'),
        ("x = 1", "x = 1"),
    ],
)
def test_docstrings_are_removed_and_the_rest_stays_python(source, expected):
    tree = ast.parse(source)
    found = [(s, len(owner.body) == 1) for owner, s, _ in python_corpus._documented(tree)]
    stripped = python_corpus._without(source, found)
    assert stripped == expected
    ast.parse(stripped)


def test_every_module_without_docstrings_is_still_python(documents):
    root = python_corpus._library()
    for name in ("argparse.py", "typing.py", "asyncio/events.py", "email/message.py", "decimal.py", "abc.py"):
        text = python_corpus._source(root / name)
        tree = ast.parse(text)
        found = [(s, len(owner.body) == 1) for owner, s, _ in python_corpus._documented(tree)]
        rest = ast.parse(python_corpus._without(text, found))
        nodes = [n for n in ast.walk(rest) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.Module)]
        # Where a second string followed the docstring, that one is now first.
        assert sum(ast.get_docstring(node) is not None for node in nodes) <= 1, name


def test_an_interpreter_without_sources_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="came without the sources of its library"):
        list(read_python_corpus())


def test_a_library_with_odd_files_is_read_around_them(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "argparse.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (tmp_path / "bad.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "windows.py").write_bytes(b'def f():\r\n    """Doc."""\r\n    return 1\r\n')
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "_sysconfigdata__linux.py").write_text("secret = 1\n")
    found = {d.source: d.text for d in read_python_corpus()}
    assert found == {
        "argparse.py:1": "x = 1\n",
        "latin.py:1": "# -*- coding: latin-1 -*-\nname = 'é'\n",
        "windows.py:1": "def f():\n    return 1\n",
    }
