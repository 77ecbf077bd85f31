"""Corpora from the Hugging Face hub, streamed, with a quick and short answer when there is no network."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..errors import InputError
from .formats import Document, Fields, reason

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]*))?(?::(?P<split>[\w.\-\[\]%:+]+))?")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is spelled like ``owner/name``, perhaps with ``:config`` or ``:config:split``.

    >>> is_hub_id("Salesforce/wikitext:wikitext-2-raw-v1:validation"), is_hub_id("./texts/a.txt")
    (True, False)
    """
    return _HUB_ID.fullmatch(source) is not None and not source.startswith(".")


@cache
def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub's host answers; asked once per process.

    The hub's own client retries for half a minute and logs every try, which is too much for a mistyped path.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if "https" in getproxies() or "all" in getproxies():
        return True  # the proxy resolves names; only the real request can tell
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=timeout).close()
    except OSError:
        return False
    return True


def read_hub(source: str, fields: Fields) -> Iterator[Document]:
    """Stream the hub's data set ``owner/name[:config[:split]]`` (split ``train`` unless given)."""
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    if not hub_is_reachable():
        raise InputError(f"data: there is no file or folder {source!r}, and the Hugging Face hub cannot be reached")
    import datasets

    split = match["split"] or "train"
    try:
        stream: Any = datasets.load_dataset(match["name"], match["config"] or None, split=split, streaming=True)
    except Exception as error:  # the client's many kinds of "no such dataset, config or split"
        raise InputError(
            f"data: there is no file or folder {source!r}, and the Hugging Face hub does not give it as a "
            f"data set "
            f"({type(error).__name__}: {reason(error)})"
        ) from None
    records = iter(stream)
    row = 0
    while True:
        row += 1
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(
                f"{source}, row {row}: cannot be read from the hub ({type(error).__name__}: {reason(error)})"
            ) from None
        yield fields.document(record, f"{source}, row {row}", "", null_is_blank=True)
