"""The published conformance suite, run on what lossmith itself registers."""

from lossmith.testing.test_distillation_losses import *  # noqa: F403
from lossmith.testing.test_laws import *  # noqa: F403
from lossmith.testing.test_losses import *  # noqa: F403
from lossmith.testing.test_sparsities import *  # noqa: F403
from lossmith.testing.test_studies import *  # noqa: F403
from lossmith.testing.test_weightings import *  # noqa: F403
