"""mace and e3nn, imported in the one order that works, and quietly."""

from __future__ import annotations

import contextlib
import sys
import warnings

# What mace prints while it is imported (that cuequivariance is not installed) is no output of ours.
with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
    # e3nn 0.4.4 loads its own constants without `weights_only` after mace has set
    # TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD for the whole process; every load of ours names it.
    warnings.simplefilter("ignore")
    import mace.modules as mace_modules  # must come before e3nn, see above
    from e3nn import o3
    from mace.tools.scripts_utils import extract_config_mace_model

__all__ = ["extract_config_mace_model", "mace_modules", "o3"]
