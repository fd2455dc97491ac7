"""The mathematics of merging: arrays in, arrays out.

Nothing here knows a file, a format or a name, and nothing but numpy is used.  Sums run in
float64.  Results depend on the inputs alone for one machine, one numpy and one BLAS library: there
is no random state that the caller does not pass, and eigenvectors and singular vectors get fixed
signs.

Factors are stored *component-major*: shape (r, L), one row for each rank component, running along
the factor's long side.  For the factor A that is A itself (r, n_in); for B it is ``B.T``
(r, n_out).  A *position* is one column, r values.
"""

from __future__ import annotations

from rmmformat.merge.baselines import (
    dare,
    mean_factors,
    mean_product,
    ties,
    truncate_rank,
)
from rmmformat.merge.error import Summary, delta_norm, relative_error, summarize
from rmmformat.merge.gauge import align, delta_svd, procrustes, svd_gauge
from rmmformat.merge.lore import LoreResult, lore, lore_merge
from rmmformat.merge.rmm import (
    Shared,
    factor_storage_fraction,
    max_components,
    merge,
    pad_rank,
    reconstruct,
    storage_fraction,
)

__all__ = [
    "LoreResult",
    "Shared",
    "Summary",
    "align",
    "dare",
    "delta_norm",
    "delta_svd",
    "factor_storage_fraction",
    "lore",
    "lore_merge",
    "max_components",
    "mean_factors",
    "mean_product",
    "merge",
    "pad_rank",
    "procrustes",
    "reconstruct",
    "relative_error",
    "storage_fraction",
    "summarize",
    "svd_gauge",
    "ties",
    "truncate_rank",
]
