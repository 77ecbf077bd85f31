"""What the number hides: measurements of a trained model.

A probe is a function of a model (and of data, where it needs some) that returns a small dataclass with ``.summary()``,
``.plot()`` and ``.to_json()``. ``lossmith probe MODEL --what NAME`` runs the functions in ``__all__`` whose
first parameter is called ``model``, and those of installed packages (entry points in the group ``lossmith.probes``).
"""

from lossmith.probes.superposition_report import SuperpositionReport, superposition
from lossmith.probes.unembedding import Unembedding, find_unembedding

__all__ = ["SuperpositionReport", "Unembedding", "find_unembedding", "superposition"]
