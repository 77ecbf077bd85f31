"""Bytes as text, or the reason why they are none."""

from __future__ import annotations

import re

# Tabs, ends of lines and form feeds are text.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")


class Unreadable(ValueError):
    """A document that is set aside; the message is its reason."""


def decoded(data: bytes, encoding: str = "utf-8") -> str:
    r"""Text with one kind of line end, without byte order mark.

    Raises:
        Unreadable: binary, no such encoding, or not in it (the byte is named).

    >>> decoded(b"a\r\nb")
    'a\nb'
    """
    if b"\0" in data[:65536]:
        raise Unreadable("binary file (zero bytes)")
    try:
        text = data.decode(encoding)
    except LookupError:
        raise Unreadable(f"unknown encoding {encoding!r}") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"not {encoding.upper()} at byte {error.start} (0x{data[error.start]:02x})") from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    controls = len(_CONTROLS.findall(text[:65536]))
    if controls > 0.01 * min(len(text), 65536):
        raise Unreadable("binary file (control characters)")
    return text
