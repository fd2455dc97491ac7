"""What a comparison compares: one entry a row of its table.

A :class:`Stored` contender is a method that the container holds; a :class:`Computed` one is a
formula on one target's factors, with the bytes that its result would take counted here.  Adding a
method is one function and one line in :func:`contenders`.

Counting: values are float32, four bytes.  A merge on factors keeps one pair of factors for all
tasks; a merge on products keeps the dense delta, since TIES, DARE and LoRE destroy its low rank.  A
mean or weighted sum is kept as all factors side by side where that is less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rmmformat.coding import Exact, Method, Plain, Published, Size
from rmmformat.errors import OptionError
from rmmformat.merge.baselines import dare, mean_factors, mean_product, ties, truncate_rank
from rmmformat.merge.emr import emr
from rmmformat.merge.error import delta_norm
from rmmformat.merge.flex import Groups, flex_groups, merge_group, similarity
from rmmformat.merge.lore import lore
from rmmformat.merge.nan import nan_product
from rmmformat.merge.rmm import max_components, merge, pad_rank, reconstruct
from rmmformat.model import Factors

__all__ = [
    "FAMILIES",
    "Computed",
    "Contender",
    "Delta",
    "Dense",
    "Rebuilt",
    "Stored",
    "Survey",
    "contenders",
    "survey_target",
]

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Word for ``--methods`` to what it stands for, in the order of the table.
FAMILIES = {
    "none": "no delta at all: the base model",
    "exact": "every factor bit for bit",
    "planned": "the planner, at several sizes",
    "rmm": "RMM as published, p = 1 ... min(n - 1, r), f32",
    "aligned": "RMM at p = 3 after a change of gauge, f32",
    "factor": "RMM with one coefficient a factor and direction, f32",
    "subspace": "shared row space: SVD of the stacked factors, f32",
    "truncation": "each task at a lower rank, f32",
    "blocks": "each task in plain blocks of 8, 4, 3 and 2 bits",
    "emr": "EMR-Merging: one elected vector, a mask and a rescaler a task",
    "flexmerge": "FlexMerge: groups of tasks, block by block, to a size",
    "task-arithmetic": "one delta for all: the mean",
    "nan": "one delta for all: weighted by inverse norms",
    "ties": "one delta for all: TIES",
    "dare": "one delta for all: DARE",
    "lore": "one delta for all: LoRE-Merging with TIES",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A delta (n_out, n_in) that has no low rank."""

    values: F64


Delta = Factors | Dense


@dataclasses.dataclass(frozen=True, eq=False)
class Rebuilt:
    """One target as a method gives it back: a delta for each task, and the bytes it takes.

    Tasks that share a delta share the object.
    """

    deltas: Sequence[Delta]
    n_bytes: int


class Survey(Protocol):
    """What a method may know of all targets before it treats any; found out when asked for."""

    @property
    def n_targets(self) -> int:
        """Number of targets."""

    @property
    def similarities(self) -> Sequence[F64]:
        """For each target the cosine similarity of its tasks' deltas, (n, n)."""

    @property
    def costs(self) -> Sequence[Sequence[float]]:
        """For each target the bytes of each of its tasks' factors in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """A formula on one target's factors.

    Parameters
    ----------
    rebuild
        From the factors and this target's plan to what comes back; a pure function.
    plan
        From the survey to one plan for each target; None where targets are independent.
    dense
        It forms the dense deltas of all tasks at once.
    """

    family: str
    label: str
    parameters: dict[str, Any]
    rebuild: Callable[[Sequence[Factors], Any], Rebuilt]
    plan: Callable[[Survey], Sequence[Any]] | None = None
    dense: bool = False
    keeps_tasks: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A method that the container holds: it is measured on a file."""

    family: str
    label: str
    method: Method
    keeps_tasks: bool = True

    @property
    def parameters(self) -> dict[str, Any]:
        """As in the metadata of the file."""
        return {key: value for key, value in self.method.describe().items() if key != "name"}


Contender = Stored | Computed


def contenders(
    n_tasks: int,
    rank: int,
    *,
    families: Sequence[str] | None = None,
    sizes: Sequence[float] = (0.25, 0.14, 0.11, 0.08, 0.06, 0.03, 0.015, 0.01),
    components: Sequence[int] | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> list[Contender]:
    """List the methods to compare.

    Parameters
    ----------
    n_tasks, rank
        Tasks of the collection and their largest rank.
    families
        Words of :data:`FAMILIES`; all by default.
    sizes
        Sizes for the planner, as parts of the originals' bytes.
    components
        Values of p for RMM as published and by factor; by default all that can help.
    density
        For TIES and DARE.
    seed
        For DARE.

    Raises
    ------
    OptionError
        A word is not in :data:`FAMILIES`, or a size is not above 0.
    """
    unknown = [word for word in families or () if word not in FAMILIES]
    if unknown:
        raise OptionError(
            f"no method is called {unknown[0]!r}", hint=f"Known: {', '.join(FAMILIES)}."
        )
    if any(size <= 0.0 for size in sizes):
        raise OptionError(f"sizes must be above 0, got {min(sizes)}")
    wanted = set(FAMILIES if families is None else families)
    rows: list[Contender] = [
        Computed("none", "no delta", {}, _nothing, keeps_tasks=False),
        Stored("exact", "exact", Exact()),
        *(Stored("planned", f"planned, {100 * s:g} %", Size(s)) for s in sizes),
    ]
    top = min(n_tasks - 1, rank)
    rows += [
        Stored("rmm", f"RMM p={p}", Published(p, encoding="f32"))
        for p in components or range(1, top + 1)
        if p <= top
    ]
    if top:
        p = min(3, top)
        rows += [
            Stored("aligned", f"RMM p={p}, {gauge}", Published(p, "position", gauge, "f32"))
            for gauge in ("svd", "procrustes")
        ]  # fmt: skip
    rows += [
        Stored("factor", f"RMM by factor p={p}", Published(p, "factor", encoding="f32"))
        for p in components or range(1, n_tasks)
        if p < n_tasks
    ]
    rows += [_subspace(k) for k in _distinct(rank, 2 * rank, 3 * rank)]
    rows += [_truncation(k) for k in _distinct(3 * rank // 4, rank // 2, rank // 4, rank // 8)]
    rows += [Stored("blocks", f"{b}-bit blocks", Plain(f"q{b}")) for b in (8, 4, 3, 2)]
    settings: dict[str, Any] = {"density": density}
    rows += [
        Computed("emr", "EMR, on factors", {"on": "factors"}, _emr_factors),
        Computed("emr", "EMR, on products", {"on": "products"}, _emr_products, dense=True),
        *(_flexmerge(size) for size in (0.75, 0.5, 0.25)),
        _one_for_all("task-arithmetic", "Task Arithmetic, on factors",
                     _on_factors(lambda x, _: mean_factors(x)), on="factors"),
        _one_for_all("task-arithmetic", "Task Arithmetic, on products", _mean_products,
                     on="products"),
        _one_for_all("nan", "NAN, on products", _nan_products, on="products"),
        _one_for_all("ties", "TIES, on factors",
                     _on_factors(lambda x, _: ties(x, density)), on="factors", **settings),
        _one_for_all("ties", "TIES, on products",
                     _on_products(lambda x, _: ties(x, density)), True, on="products", **settings),
        _one_for_all("dare", "DARE, on factors",
                     _on_factors(lambda x, rng: dare(x, rng, density), seed),
                     on="factors", seed=seed, **settings),
        _one_for_all("dare", "DARE, on products",
                     _on_products(lambda x, rng: dare(x, rng, density), seed),
                     True, on="products", seed=seed, **settings),
        _one_for_all("lore", "LoRE, on products", lambda factors, _: _lore(factors, density),
                     True, on="products", mu=0.01, steps=20, **settings),
    ]  # fmt: skip
    return [row for row in rows if row.family in wanted]


def _distinct(*values: int) -> list[int]:
    return [value for value in dict.fromkeys(values) if value > 0]


def _sides(factors: Sequence[Factors]) -> tuple[int, int]:
    return factors[0].A.shape[1], factors[0].B.shape[0]


def _bytes_of(delta: Delta) -> int:
    if isinstance(delta, Dense):
        return 4 * delta.values.size
    return 4 * (delta.A.size + delta.B.size)


def _narrow(A: Array, B: Array, scale: float = 1.0) -> Factors:
    """As they would be stored: float32."""
    return Factors(A.astype(np.float32), B.astype(np.float32), scale)


def _nothing(factors: Sequence[Factors], _plan: Any) -> Rebuilt:
    n_in, n_out = _sides(factors)
    empty = Factors(np.zeros((0, n_in), np.float32), np.zeros((n_out, 0), np.float32), 1.0)
    return Rebuilt([empty] * len(factors), 0)


def _wide(factors: Sequence[Factors]) -> list[Factors]:
    """In float64, so that dtypes that differ can be stacked."""
    return [Factors(f.A.astype(np.float64), f.B.astype(np.float64), f.scale) for f in factors]


def _stacks(factors: Sequence[Factors]) -> tuple[F64, F64]:
    """The tasks' A (n, r, n_in) and scaled B, transposed (n, r, n_out); missing rows are zero."""
    down = pad_rank([f.A.astype(np.float64) for f in factors])
    up = pad_rank([f.scale * f.B.T.astype(np.float64) for f in factors])
    return down.astype(np.float64), up.astype(np.float64)


def _products(factors: Sequence[Factors]) -> F64:
    """The tasks' deltas (n, n_out, n_in)."""
    return np.stack([f.scale * (f.B.astype(np.float64) @ f.A.astype(np.float64)) for f in factors])


def _pairs(factors: Sequence[Factors]) -> tuple[list[tuple[Array, Array]], list[float]]:
    return [(f.A, f.B) for f in factors], [f.scale for f in factors]


def _one_for_all(
    family: str,
    label: str,
    combine: Callable[[Sequence[Factors], int], Delta],
    dense: bool = False,
    **parameters: Any,
) -> Computed:
    def rebuild(factors: Sequence[Factors], number: Any) -> Rebuilt:
        merged = combine(factors, number)
        return Rebuilt([merged] * len(factors), _bytes_of(merged))

    return Computed(
        family, label, parameters, rebuild, lambda survey: range(survey.n_targets), dense, False
    )


def _on_factors(
    combine: Callable[[Array, np.random.Generator], F64], seed: int = 0
) -> Callable[[Sequence[Factors], int], Delta]:
    def merged(factors: Sequence[Factors], number: int) -> Delta:
        rng = np.random.default_rng([seed, number])
        down, up = _stacks(factors)
        return _narrow(combine(down, rng), combine(up, rng).T)

    return merged


def _on_products(
    combine: Callable[[Array, np.random.Generator], F64], seed: int = 0
) -> Callable[[Sequence[Factors], int], Delta]:
    return lambda factors, number: Dense(
        combine(_products(factors), np.random.default_rng([seed, number]))
    )


def _mean_products(factors: Sequence[Factors], _number: int) -> Delta:
    return _smaller(*mean_product(*_pairs(factors)))


def _nan_products(factors: Sequence[Factors], _number: int) -> Delta:
    norms = [delta_norm(f.A, f.B, f.scale) for f in factors]
    return _smaller(*nan_product(*_pairs(factors), norms))


def _lore(factors: Sequence[Factors], density: float) -> Delta:
    """LoRE-Merging with the deltas as the fine-tuned matrices.

    Both of its steps commute with a change of orthonormal basis, so they run where all the deltas
    live, sum of the ranks by sum of the ranks; TIES then needs the entries themselves.
    """
    up, mixed_up = np.linalg.qr(
        np.concatenate([f.scale * f.B.astype(np.float64) for f in factors], axis=1)
    )
    down, mixed_down = np.linalg.qr(
        np.concatenate([f.A.T.astype(np.float64) for f in factors], axis=1)
    )
    ends = np.cumsum([f.rank for f in factors])
    spans = [slice(end - f.rank, end) for f, end in zip(factors, ends, strict=True)]
    cores = np.stack([mixed_up[:, span] @ mixed_down[:, span].T for span in spans])
    found = lore(cores)
    deltas = np.stack([up @ found.delta(i) @ down.T for i in range(len(factors))])
    return Dense(up @ found.theta0 @ down.T + ties(deltas, density))


def _smaller(A: F64, B: F64) -> Delta:
    """The sum as factors, or dense where that takes fewer bytes."""
    if A.size + B.size <= B.shape[0] * A.shape[1]:
        return _narrow(A, B)
    return Dense(B @ A)


def _truncation(rank: int) -> Computed:
    def rebuild(factors: Sequence[Factors], _plan: Any) -> Rebuilt:
        deltas = [
            _narrow(*truncate_rank(f.A, f.B, min(rank, f.rank)), f.scale) for f in factors
        ]  # fmt: skip
        return Rebuilt(deltas, sum(map(_bytes_of, deltas)))

    return Computed("truncation", f"rank {rank}", {"rank": rank}, rebuild)


def _subspace(components: int) -> Computed:
    def side(stack: Array) -> tuple[list[F32], int]:
        n, r, length = stack.shape
        p = min(components, max_components(n, length, center=False, rows=r))
        shared, coefficients = merge(stack, p, "row", center=False)
        return (
            [reconstruct(shared, task) for task in coefficients],
            4 * (shared.basis.size + coefficients.size),
        )

    def rebuild(factors: Sequence[Factors], _plan: Any) -> Rebuilt:
        down, down_bytes = side(pad_rank([f.A for f in _wide(factors)]))
        up, up_bytes = side(pad_rank([f.B.T for f in _wide(factors)]))
        deltas = [
            Factors(a[: f.rank], b[: f.rank].T, f.scale)
            for f, a, b in zip(factors, down, up, strict=True)
        ]
        return Rebuilt(deltas, down_bytes + up_bytes)

    return Computed("subspace", f"shared subspace k={components}", {"k": components}, rebuild)


def _emr_factors(factors: Sequence[Factors], _plan: Any) -> Rebuilt:
    down, up = (emr(stack) for stack in _stacks(factors))
    deltas = [
        Factors(down.task(t)[: f.rank], up.task(t)[: f.rank].T, 1.0) for t, f in enumerate(factors)
    ]
    return Rebuilt(deltas, down.n_bytes + up.n_bytes)


def _emr_products(factors: Sequence[Factors], _plan: Any) -> Rebuilt:
    elected = emr(_products(factors))
    deltas = [Dense(elected.task(t).astype(np.float64)) for t in range(len(factors))]
    return Rebuilt(deltas, elected.n_bytes)


def _flexmerge(size: float) -> Computed:
    def plan(survey: Survey) -> Sequence[Groups]:
        total = sum(map(sum, survey.costs))
        return flex_groups(survey.similarities, survey.costs, size * total)

    def rebuild(factors: Sequence[Factors], groups: Groups) -> Rebuilt:
        deltas: list[Delta] = list(factors)
        n_bytes = 0
        for group in groups:
            members = [factors[t] for t in group]
            merged = (
                members[0] if len(group) == 1 else _narrow(*merge_group(*_pairs(members)))
            )  # fmt: skip
            n_bytes += _bytes_of(merged)
            for t in group:
                deltas[t] = merged
        return Rebuilt(deltas, n_bytes)

    return Computed("flexmerge", f"FlexMerge, {100 * size:g} %", {"size": size}, rebuild, plan)


def survey_target(factors: Sequence[Factors]) -> tuple[F64, list[float]]:
    """One target's part of the :class:`Survey`."""
    return similarity(*_pairs(factors)), [float(4 * (f.A.size + f.B.size)) for f in factors]
