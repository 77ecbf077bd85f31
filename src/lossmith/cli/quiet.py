"""Standard error is for the user: no bars of work that takes no time."""

from __future__ import annotations


def without_bars() -> None:
    """Read and write files of weights without a bar; downloads from the hub keep theirs."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
