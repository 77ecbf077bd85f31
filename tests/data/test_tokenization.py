import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossmith.data import hub, load_tokenizer, train_tokenizer
from lossmith.data.tokenization import encode, start_token, tokenizer_key
from lossmith.errors import InputError

WORDS = ["the quick brown fox jumps over the lazy dog " * 20, "pack my box with five dozen liquor jugs " * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=300)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_is_framed_and_decoding_gives_it_back(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert ids.dtype == np.int32
    assert ids[0] == ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]) == text
    assert tokenizer.eos_token_id not in ids[1:-1]


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|endoftext|>", "<|endoftext|>" * 3])
def test_a_text_cannot_forge_the_end_of_a_document(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert (ids == tokenizer.eos_token_id).sum() == 2
    assert tokenizer.decode(ids[1:-1]) == text


def test_special_tokens_are_all_the_end_of_text(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == 300


def test_training_twice_in_different_processes_gives_identical_tokenizers():
    program = (
        "import sys, json; from lossmith.data import train_tokenizer; import hashlib;"
        "t = train_tokenizer(json.load(sys.stdin), vocab_size=600);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    # Many words of equal count, so that ties have to be broken.
    generator = np.random.default_rng(0)
    texts = [" ".join("".join(generator.choice(list("abcde"), 6)) for _ in range(2000)) for _ in range(20)]
    found = {
        subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(texts), capture_output=True, text=True,
            env={"PATH": "/usr/bin", "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}, check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "3"))
    }  # fmt: skip
    assert len(found) == 1


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert len(train_tokenizer(["ab"], vocab_size=1000)) == 257


@pytest.mark.parametrize("size", [256, 0, -1, 300.0, "300", None, True])
def test_a_vocabulary_without_room_for_all_bytes_is_refused(size):
    with pytest.raises(InputError, match="vocab_size must be an integer of at least 257"):
        train_tokenizer(WORDS, vocab_size=size)


def test_a_saved_tokenizer_loads_by_folder_and_encodes_alike(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_key(loaded) == tokenizer_key(tokenizer)
    for ours, theirs in zip(encode(loaded, WORDS), encode(tokenizer, WORDS), strict=True):
        assert (ours == theirs).all()


def test_the_key_ignores_the_last_calls_padding_but_not_the_vocabulary(tokenizer):
    before = tokenizer_key(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_key(tokenizer) == before
    (ids,) = encode(tokenizer, ["the quick brown fox jumps over"])
    assert len(ids) > 4  # neither does encoding keep truncating
    assert tokenizer_key(train_tokenizer(WORDS, vocab_size=299)) != before


def plain_tokenizer(**specials):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "[SEP]": 2, "[CLS]": 3, "</s>": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **specials)


def test_a_missing_end_token_is_replaced_by_the_separator_on_a_copy():
    given_tokenizer = plain_tokenizer(sep_token="[SEP]", cls_token="[CLS]")
    loaded = load_tokenizer(given_tokenizer)
    assert (loaded.eos_token, loaded.pad_token) == ("[SEP]", "[SEP]")
    assert given_tokenizer.eos_token is None
    assert start_token(loaded) == 2
    assert encode(loaded, ["the the"])[0].tolist() == [2, 1, 1, 2]


def test_distinct_start_and_end_tokens_are_both_used():
    loaded = load_tokenizer(plain_tokenizer(bos_token="[CLS]", eos_token="</s>", pad_token="[UNK]"))
    assert encode(loaded, ["the"])[0].tolist() == [3, 1, 4]
    assert loaded.pad_token_id == 0


def test_a_tokenizer_that_cannot_end_a_document_is_refused():
    with pytest.raises(InputError, match="has no end-of-sequence, separator or beginning token"):
        load_tokenizer(plain_tokenizer())


def test_folders_without_a_tokenizer_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file.json").write_text("{}")
    for name in (tmp_path, tmp_path / "none", tmp_path / "file.json", "owner/none", "none", ""):
        with pytest.raises(InputError, match=r"^tokenizer: ") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(InputError, match=r"^tokenizer: "):
        load_tokenizer(tmp_path)


def test_no_texts_give_no_ids(tokenizer):
    assert encode(tokenizer, []) == []


def test_tokenizers_written_in_python_work_too(tmp_path):
    from transformers import PreTrainedTokenizer

    class Characters(PreTrainedTokenizer):
        def __init__(self, **options):
            super().__init__(**options)

        @property
        def vocab_size(self):
            return 128

        def get_vocab(self):
            return {chr(i): i for i in range(128)} | self.added_tokens_encoder

        def _tokenize(self, text, **_):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) % 128

        def _convert_id_to_token(self, index):
            return chr(index)

        def save_vocabulary(self, *args, **kwargs):
            return ()

    characters = Characters(eos_token="</s>")
    loaded = load_tokenizer(characters)
    assert len(tokenizer_key(loaded)) == 32
    (ids,) = encode(loaded, ["ab"])
    assert ids.tolist() == [loaded.eos_token_id, 97, 98, loaded.eos_token_id]
