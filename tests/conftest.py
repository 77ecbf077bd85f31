"""Shared fixtures: one small corpus, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported anywhere: several threads only contend on models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


# The first call of a torch function takes long on a busy machine: no deadline. The same examples every time.
settings.register_profile("lossmith", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lossmith")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared corpora go to a temporary folder, shared by all tests of a session."""
    os.environ["LOSSMITH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip with the reason."""
    folder = Path(os.environ.get("LOSSMITH_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets are not there ({folder}); set LOSSMITH_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of text, small enough to tokenise at once."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["loss", "weight", "model", "data", "step", "token", "batch", "head", "law", "probe", "mixture", "sample"]
    for domain in ("letters", "numbers"):
        (folder / domain).mkdir()
        for i in range(60):
            text = " ".join(words[(i * k + k * k) % len(words)] for k in range(1, 60 + i))
            if domain == "numbers":
                text = " ".join(str((i * 37 + k * k) % 997) for k in range(80 + i))
            (folder / domain / f"{i:03}.txt").write_text(f"{domain} {i}: {text}\n")
    return folder


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """The folder of an untrained GPT-2 of two layers, with its tokenizer. Not to be written into."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from lossmith.data import prepare

    tokenizer = prepare(text_folder, vocab_size=300).tokenizer
    path = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
