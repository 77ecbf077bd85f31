"""Lossmith: compare losses, data, sparsity and schedules for training under an equal budget."""

__version__ = "0.1.0"
