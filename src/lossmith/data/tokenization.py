"""Tokenisers: byte-level BPE trained on the spot, or any Hugging Face one; and documents as token ids."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .formats import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # all bytes and the end of text


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: any text can be encoded, and decoding gives it back exactly.

    Args:
        texts: the training texts, consumed as a stream.
        vocab_size: wished number of tokens, at least 257 (the bytes and ``<|endoftext|>``). A small corpus
            may give fewer.

    Returns:
        A tokenizer whose beginning, end and padding token is ``<|endoftext|>`` (id 0). The same texts in the
        same order give the same tokenizer.

    >>> tokenizer = train_tokenizer(["low lower lowest " * 5], vocab_size=262)
    >>> tokenizer.decode(tokenizer("lowest é")["input_ids"])
    'lowest é'
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise unless byte-level BPE can have so many tokens."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size must be an integer of at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT}), "
            f"got {vocab_size!r}"
        )


def load_tokenizer(tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer by folder or hub id, or a copy of the one given, with an end and a padding token.

    Where there is no end-of-sequence token, the separator (BERT's ``[SEP]``) or the beginning token takes
    its place; where there is no padding token, the end token does.

    Raises:
        lossmith.errors.InputError: where it cannot be loaded, or has no token that can end a document.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        loaded: Any = copy.deepcopy(tokenizer)
        name = type(tokenizer).__name__
    else:
        from .hub import hub_is_reachable

        name = os.fspath(tokenizer)
        folder = Path(name).expanduser()
        is_local = folder.exists()
        if is_local and not folder.is_dir():
            raise InputError(f"tokenizer: {name!r} is a file; give the folder that holds it, or a hub id")
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(folder) if is_local else name,
                trust_remote_code=False,
                local_files_only=is_local or not hub_is_reachable(),
            )
        except Exception as error:  # a different kind for every way in which a folder can be wrong
            what = "the folder holds no tokenizer that can be loaded" if is_local else "neither a folder nor found"
            raise InputError(f"tokenizer: cannot load {name!r}: {what} ({reason(error)})") from None
    if loaded.eos_token_id is None:
        substitute = loaded.sep_token or loaded.bos_token or loaded.cls_token
        if substitute is None:
            raise InputError(f"tokenizer: {name!r} has no end-of-sequence, separator or beginning token")
        loaded.eos_token = substitute
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides what the tokenizer does to a text."""
    digest = hashlib.blake2b(type(tokenizer).__name__.encode(), digest_size=16)
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps(specials, sort_keys=True).encode())
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        # What the last call padded or truncated to is not the tokenizer's own.
        digest.update(json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a document begins with: ``bos``, or the end token for a tokenizer without one."""
    start: Any = tokenizer.bos_token_id
    return int(start if start is not None else tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (int32) of each text, framed by the start and the end token.

    A text that spells a special token (a web page about ``<|endoftext|>``) gets ordinary tokens for it: only
    the frame ends a document.
    """
    if not texts:
        return []
    encoded: Any = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    start, end = start_token(tokenizer), int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return [np.array([start, *ids, end], dtype=np.int32) for ids in encoded["input_ids"]]
