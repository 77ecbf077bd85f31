import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lossmith.data import load_prepared, prepare, prepared, read_corpus
from lossmith.errors import InputError

REAL_DATA = Path(os.environ.get("LOSSMITH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def corpus(tmp_path):
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 4)) for _ in range(200)]
    path = tmp_path / "corpus.jsonl"
    with open(path, "w") as file:
        for i in range(300):
            text = f"number {i}: " + " ".join(generator.choice(words, generator.integers(1, 120)))
            file.write(json.dumps({"text": text, "kind": "odd" if i % 2 else "even"}) + "\n")
        file.write(json.dumps({"text": text, "kind": "odd"}) + "\n")
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def documents_in(split, tokenizer):
    """The texts of a split, put together again from the pieces of its rows."""
    end, texts, pieces = tokenizer.eos_token_id, [], {}
    for row in split:
        for segment in np.split(np.array(row["input_ids"]), np.cumsum(row["segments"])[:-1]):
            if segment[0] == end and segment[-1] == end:
                texts.append(tokenizer.decode(segment[1:-1]))
            else:
                pieces.setdefault(row["domain"], []).append(segment)
    return texts, pieces


def test_every_document_is_in_exactly_one_split(corpus, cache):
    found = prepare(corpus, cache_dir=cache, sequence_length=4096, vocab_size=400, domain_field="kind")
    train, rest = documents_in(found.train, found.tokenizer)
    validation, rest_of_validation = documents_in(found.validation, found.tokenizer)
    assert not rest
    assert not rest_of_validation
    assert sorted(train + validation) == sorted({d.text for d in read_corpus(corpus)})
    assert not set(train) & set(validation)
    assert (found.documents, found.duplicates) == (300, 1)
    assert found.validation_bytes == sum(len(text.encode()) for text in validation)
    assert found.domains == ("even", "odd")


@pytest.mark.parametrize("packing", ["isolated", "concatenated", "none"])
def test_columns_types_and_counts(corpus, cache, packing):
    found = prepare(corpus, cache_dir=cache, sequence_length=32, vocab_size=300, packing=packing, domain_field="kind")
    for split, tokens in ((found.train, found.train_tokens), (found.validation, found.validation_tokens)):
        assert str(split.features) == str({k: split.features[k] for k in ("input_ids", "segments", "domain", "index")})
        types = {name: str(field.type) for name, field in zip(split.data.schema.names, split.data.schema, strict=True)}
        assert types == {
            "input_ids": "list<item: int32>", "segments": "list<item: int32>",
            "domain": "int32", "index": "int64",
        }  # fmt: skip
        lengths = [len(row) for row in split["input_ids"]]
        assert sum(lengths) == tokens
        assert max(lengths) <= 32
        assert lengths == [sum(segments) for segments in split["segments"]]
        assert list(split["index"]) == list(range(len(split)))
        assert set(split["domain"]) == {0, 1}
        assert split.cache_files  # memory-mapped


def test_rows_do_not_mix_domains(corpus, cache):
    found = prepare(corpus, cache_dir=cache, sequence_length=4096, vocab_size=300, domain_field="kind")
    for row in found.train:
        numbers = found.tokenizer.decode(row["input_ids"]).split("number ")[1:]
        assert {int(part.split(":")[0]) % 2 for part in numbers} == {row["domain"]}


def test_the_sum_of_predicted_tokens_is_the_same_for_every_length_and_packing(corpus, cache):
    # So that a loss per byte can be compared: each token is predicted once, however documents are cut.
    def predicted(**options):
        found = prepare(corpus, cache_dir=cache, vocab_size=300, **options)
        return sum(sum(n - 1 for n in row["segments"]) for row in found.validation)

    expected = predicted(sequence_length=10_000, packing="none")
    assert predicted(sequence_length=7) == expected
    assert predicted(sequence_length=64, packing="none") == expected
    assert predicted(sequence_length=33, packing="concatenated") == expected


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    texts = [f"doc {i} " + "zqxj" * 50 * (i == 7) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for seed in range(60):
        found = prepare(path, cache_dir=cache, vocab_size=300, split_seed=seed, validation_fraction=0.3)
        held_out = any("zqxj" in text for text in documents_in(found.validation, found.tokenizer)[0]) or not any(
            "zqxj" in text for text in documents_in(found.train, found.tokenizer)[0]
        )
        if held_out:
            assert "zq" not in found.tokenizer.get_vocab()
            break
    else:
        pytest.fail("no split held document 7 out")


def test_a_second_call_reads_the_cache_and_is_equal(corpus, cache, monkeypatch):
    first = prepare(corpus, cache_dir=cache)
    monkeypatch.setattr(prepared, "spool", lambda *a, **k: pytest.fail("the corpus was prepared again"))
    second = prepare(str(corpus), cache_dir=cache)
    assert second.fingerprint == first.fingerprint
    assert second.train.data.equals(first.train.data)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    third = load_prepared(first.folder)
    assert (third.train_tokens, third.domains, third.source) == (
        first.train_tokens,
        first.domains,
        str(corpus),
    )
    assert third.tokenizer.pad_token_id == first.tokenizer.pad_token_id


def test_preparing_anew_gives_the_same_bytes(corpus, cache, tmp_path):
    first = prepare(corpus, cache_dir=cache)
    second = prepare(corpus, cache_dir=tmp_path / "other")
    assert second.fingerprint == first.fingerprint
    for name in ("train.arrow", "validation.arrow", "tokenizer/tokenizer.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_every_option_and_every_change_of_the_text_has_its_own_fingerprint(corpus, cache):
    changes = [
        {}, {"vocab_size": 301}, {"sequence_length": 65}, {"packing": "none"}, {"split_seed": 1},
        {"validation_fraction": 0.1}, {"domain_field": "kind"}, {"text_field": "kind"},
    ]  # fmt: skip
    options = {"vocab_size": 300, "sequence_length": 64, "cache_dir": cache}
    found = [prepare(corpus, **{**options, **change}).fingerprint for change in changes]
    tokenizer = prepare(corpus, **options).tokenizer
    found.append(prepare(corpus, **{**options, "tokenizer": tokenizer}).fingerprint)
    corpus.write_text(corpus.read_text() + '{"text": "one more", "kind": "odd"}\n')
    found.append(prepare(corpus, **options).fingerprint)
    assert len(set(found)) == len(found)


def test_a_given_tokenizer_is_used_and_found_again_in_the_folder(corpus, cache, tmp_path):
    from lossmith.data import train_tokenizer

    tokenizer = train_tokenizer(["abcdefgh " * 100], vocab_size=270)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    first = prepare(corpus, cache_dir=cache, tokenizer=tokenizer)
    second = prepare(corpus, cache_dir=cache, tokenizer=tmp_path / "tokenizer", vocab_size=-5)
    assert second.fingerprint == first.fingerprint
    assert load_prepared(first.folder).tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "corpus.json").unlink(),
        lambda folder: (folder / "corpus.json").write_text('{"train_tok'),
        lambda folder: (folder / "train.arrow").write_bytes((folder / "train.arrow").read_bytes()[:-100]),
        lambda folder: (folder / "validation.arrow").unlink(),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
    ],
)
def test_a_damaged_folder_is_never_used_but_made_again(corpus, cache, damage):
    first = prepare(corpus, cache_dir=cache, vocab_size=300)
    tokens, vocabulary = first.train_tokens, first.tokenizer.get_vocab()
    damage(first.folder)
    with pytest.raises(InputError, match="not the folder of a finished prepared corpus"):
        load_prepared(first.folder)
    second = prepare(corpus, cache_dir=cache, vocab_size=300)
    assert (second.train_tokens, second.tokenizer.get_vocab()) == (tokens, vocabulary)
    assert [path.name for path in cache.iterdir()] == [first.fingerprint]


def test_a_failure_on_the_way_leaves_nothing_behind(corpus, cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_write_split", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(corpus, cache_dir=cache)
    assert list(cache.iterdir()) == []
    corpus.write_text(corpus.read_text() + "{broken\n")
    with pytest.raises(InputError, match=":302: the line is not JSON"):
        prepare(corpus, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day_only(corpus, cache):
    for name, age in (("partial-old", 2 * 86400), ("partial-new", 60)):
        (cache / name).mkdir(parents=True)
        (cache / name / "documents.arrow").write_text("x")
        for path in (cache / name / "documents.arrow", cache / name):
            os.utime(path, (time.time() - age,) * 2)
    found = prepare(corpus, cache_dir=cache)
    assert sorted(path.name for path in cache.iterdir()) == sorted([found.fingerprint, "partial-new"])


@pytest.mark.slow
def test_several_processes_at_once_end_with_one_folder(corpus, cache):
    program = (
        "import sys; from lossmith.data import prepare;"
        "p = prepare(sys.argv[1], cache_dir=sys.argv[2], vocab_size=300);"
        "print(p.fingerprint, p.train_tokens)"
    )
    command = [sys.executable, "-c", program, str(corpus), str(cache)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(2)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[0].stdout == done[1].stdout
    assert [path.name for path in cache.iterdir()] == [done[0].stdout.split()[0]]


def test_losing_the_race_to_publish_uses_the_winners_folder(corpus, cache, monkeypatch):
    original = prepared.publish

    def late(work, target, is_whole):
        with monkeypatch.context() as patch:
            patch.setattr(prepared, "publish", original)
            prepare(corpus, cache_dir=cache)
        original(work, target, is_whole)

    monkeypatch.setattr(prepared, "publish", late)
    found = prepare(corpus, cache_dir=cache)
    assert [path.name for path in cache.iterdir()] == [found.fingerprint]


def test_the_environment_names_the_cache(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSMITH_CACHE", str(tmp_path / "from-environment"))
    assert prepare(corpus).folder.parent == tmp_path / "from-environment"


def test_a_cache_that_is_a_file_is_one_sentence(corpus):
    with pytest.raises(InputError, match=r"^cache_dir: .* cannot be used as a folder"):
        prepare(corpus, cache_dir=corpus)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"packing": "isolatd"}, "did you mean 'isolated'"),
        ({"sequence_length": 1}, "sequence_length must be"),
        ({"vocab_size": 100}, "vocab_size must be"),
        ({"validation_fraction": 0.0}, "validation_fraction must be a number between 0 and 1"),
        ({"validation_fraction": 1}, "validation_fraction must be"),
        ({"validation_fraction": float("nan")}, "validation_fraction must be"),
        ({"validation_fraction": "0.1"}, "validation_fraction must be"),
        ({"split_seed": 0.5}, "split_seed must be an integer"),
        ({"text_field": "body"}, r":1: there is no field 'body' \(text_field\), only: text, kind"),
        ({"domain_field": "x"}, r"there is no field 'x' \(domain_field\), only: text, kind"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(corpus, cache, options, message):
    with pytest.raises(InputError, match=message):
        prepare(corpus, cache_dir=cache, **options)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_missing_empty_and_too_small_corpora_are_one_sentence(tmp_path, cache):
    with pytest.raises(InputError, match="no file or folder"):
        prepare(tmp_path / "none", cache_dir=cache)
    path = tmp_path / "a.txt"
    path.write_text("")
    with pytest.raises(InputError, match="the corpus is empty"):
        prepare(path, cache_dir=cache)
    path.write_text("a single document")
    with pytest.raises(InputError, match="at least 2 different documents, got 1"):
        prepare(path, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_two_one_letter_documents_can_be_prepared(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    found = prepare(tmp_path / "a.jsonl", cache_dir=cache, sequence_length=2)
    assert (len(found.train), len(found.validation)) == (2, 2)  # start-letter, letter-end
    assert (found.domains, found.validation_bytes) == (("all",), 1)


def test_a_corpus_of_the_hub_is_recognised_by_its_content(cache, monkeypatch):
    import datasets

    from lossmith.data import hub

    rows = [{"text": f"text {i} " * 5} for i in range(50)]
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter(rows))
    first = prepare("owner/name", cache_dir=cache, vocab_size=300)
    monkeypatch.setattr(prepared, "train_tokenizer", lambda *a, **k: pytest.fail("prepared again"))
    assert prepare("owner/name", cache_dir=cache, vocab_size=300).fingerprint == first.fingerprint


def test_a_long_training_split_is_sampled_evenly_for_the_tokenizer(corpus, cache, monkeypatch, tmp_path):
    from lossmith.data.splitting import spool

    spooled = spool(read_corpus(corpus), tmp_path / "s", validation_fraction=0.05, split_seed=0)
    everything = list(prepared._training_texts(spooled))
    total = sum(map(len, everything))
    assert total > 60_000
    monkeypatch.setattr(prepared, "_TOKENIZER_TEXT", 20_000)
    sample = list(prepared._training_texts(spooled))
    assert 18_000 < sum(map(len, sample)) <= 21_000
    numbers = [int(text.split()[1].strip(":")) for text in sample]
    assert min(numbers) < 30
    assert max(numbers) > 270


def test_progress_is_logged(corpus, cache, caplog):
    with caplog.at_level(logging.INFO, logger="lossmith.data"):
        prepare(corpus, cache_dir=cache)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["preparing", "prepared"]


PEAK = """
import json, sys
from lossmith.data import prepare
from lossmith.data.tokenization import train_tokenizer

def peak():  # getrusage would begin with the parent's peak
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

path, cache = sys.argv[1:]
prepare(path + ".small", cache_dir=cache, vocab_size=300)  # imports and pools
before = peak()
found = prepare(path, cache_dir=cache, tokenizer=train_tokenizer(["a b c " * 99], vocab_size=300))
print(json.dumps([found.train_tokens, peak() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_stays_bounded_for_a_larger_corpus(tmp_path, cache):
    generator = np.random.default_rng(0)
    growth = []
    for megabytes in (4, 24):
        path = tmp_path / f"{megabytes}.txt"
        letters = generator.choice(np.frombuffer(b"abcdefghij     \n", dtype=np.uint8), megabytes * 1_000_000)
        path.write_bytes(letters.tobytes())
        (tmp_path / f"{megabytes}.txt.small").write_bytes(letters.tobytes()[:500_000])
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), str(cache)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        tokens, kilobytes = json.loads(done.stdout)
        assert tokens > 0.9 * megabytes * 1_000_000
        growth.append(kilobytes)
    # Holding the corpus would take 20 MB more of text, 80 MB more of rows and several times that in lists.
    assert growth[1] < growth[0] + 60_000
    assert growth[1] < 250_000


@pytest.mark.parametrize(
    "name, documents",
    [("tinyshakespeare", 265), pytest.param("wikitext-2", 501, marks=pytest.mark.slow), ("essays", 252)],
)
def test_real_texts_are_split_into_documents(cache, name, documents):
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"no {name} in {REAL_DATA} (set LOSSMITH_TEST_DATA)")
    found = prepare(REAL_DATA / name, cache_dir=cache, vocab_size=512)
    assert found.documents == pytest.approx(documents, rel=0.05)
    assert found.validation_tokens / found.train_tokens == pytest.approx(0.05, rel=0.5)


@pytest.mark.slow
def test_the_embedded_corpus_is_the_default(cache):
    found = prepare(cache_dir=cache)
    assert found.domains == ("code", "docs")
    assert found.train_tokens > 1_500_000
    assert set(found.validation["domain"]) == {0, 1}
