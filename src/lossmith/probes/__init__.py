"""What the number hides: measurements of a trained model.

A probe is a function of a model (and of data, where it needs some) that returns a small dataclass with ``.summary()``,
``.plot()`` and ``.to_json()``. ``lossmith probe MODEL --what NAME`` runs those that the
registry names, and those of installed packages (entry points in the group ``lossmith.probes``).
"""

from lossmith.probes.ablation import ablate_directions, leading_directions
from lossmith.probes.flatness import FlatnessPoint, FlatnessReport, flatness
from lossmith.probes.flatness_enlarge import enlarge_width
from lossmith.probes.flatness_operator import Curvature
from lossmith.probes.flatness_trace import Eigenvalues, TraceResult, hessian_trace, score_norms, top_eigenvalues
from lossmith.probes.geometry import Checkpoint, GeometryReport, compare_geometry, geometry
from lossmith.probes.gradient_variance import (
    DomainGradients,
    GradientVarianceReport,
    gradient_variance,
    measure_gradients,
)
from lossmith.probes.hidden_states import extract_last_token_features, hidden_states
from lossmith.probes.memorization import InfinityGram, distributional_memorization, pass_at_k
from lossmith.probes.phases import Phase, label_phases
from lossmith.probes.spectrum import PowerLaw, SpectralMetrics, StreamingCovariance, alpha_req, rankme
from lossmith.probes.superposition_report import SuperpositionReport, superposition
from lossmith.probes.unembedding import Unembedding, find_unembedding
from lossmith.probes.visual_redundancy import RedundancyPoint, RedundancyReport, visual_redundancy

__all__ = [
    "Checkpoint",
    "Curvature",
    "DomainGradients",
    "Eigenvalues",
    "FlatnessPoint",
    "FlatnessReport",
    "GeometryReport",
    "GradientVarianceReport",
    "InfinityGram",
    "Phase",
    "PowerLaw",
    "RedundancyPoint",
    "RedundancyReport",
    "SpectralMetrics",
    "StreamingCovariance",
    "SuperpositionReport",
    "TraceResult",
    "Unembedding",
    "ablate_directions",
    "alpha_req",
    "compare_geometry",
    "distributional_memorization",
    "enlarge_width",
    "extract_last_token_features",
    "find_unembedding",
    "flatness",
    "geometry",
    "gradient_variance",
    "hessian_trace",
    "hidden_states",
    "label_phases",
    "leading_directions",
    "measure_gradients",
    "pass_at_k",
    "rankme",
    "score_norms",
    "superposition",
    "top_eigenvalues",
    "visual_redundancy",
]
