"""The conformance suite: ``pytest --pyargs lossmith.testing`` judges every registered loss, weighting,
sparsity, law and study.

Register your own (an entry point in the group ``lossmith.losses``, ``lossmith.weightings``, ``lossmith.sparsities``,
``lossmith.laws`` or ``lossmith.studies``, or ``lossmith.registry.LOSSES.register(...)`` in a ``conftest.py``) and it is
judged with the others.
"""
