"""A full fine-tune as a source task: its difference from the base, cut to low-rank factors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from rmmformat.blas import one_thread, with_one_thread
from rmmformat.converters.base import Options
from rmmformat.converters.checkpoint_layout import as_delta, is_float
from rmmformat.converters.checkpoint_plan import Item, Plan, plan_extraction
from rmmformat.converters.checkpoint_store import Checkpoint, file_lines
from rmmformat.converters.files import describe_file
from rmmformat.converters.spool import Spool
from rmmformat.errors import (
    NonFiniteError,
    NotFoundError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from rmmformat.merge.extract import Criterion, Extract, extract
from rmmformat.model import (
    Action,
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    Role,
    SourceFile,
    TargetInfo,
    TargetShape,
)

__all__ = ["CheckpointTask", "Progress", "criterion_of", "difference", "in_order"]

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]
_BLOCK = 1 << 22  # values that are subtracted together
_FLOAT32 = np.dtype(np.float32)


def criterion_of(options: Options) -> Criterion:
    """Read how many components are wanted.

    Raises
    ------
    OptionError
        Out of range, contradictory, or no such kind of SVD.
    """
    if options.svd not in ("auto", "exact", "random"):
        raise OptionError(f"svd {options.svd!r} is not one of auto, exact, random")
    try:
        return Criterion(options.rank, options.energy, options.extract_error)
    except ShapeError as error:
        raise OptionError(error.message) from error


@dataclasses.dataclass
class _Extraction:
    """What came of looking at the tensors."""

    spool: Spool
    targets: dict[str, TargetInfo] = dataclasses.field(default_factory=dict)
    privates: dict[str, PrivateInfo] = dataclasses.field(default_factory=dict)
    tensors: dict[str, str] = dataclasses.field(default_factory=dict)  # of private tensors
    ledger: list[LedgerLine] = dataclasses.field(default_factory=list)
    unchanged: int = 0
    energy: float = 0.0  # squared norm of all deltas
    residual: float = 0.0  # squared norm of what their factors leave
    worst: tuple[float, str] = (0.0, "")

    @property
    def error(self) -> float:
        """Relative error of all deltas together."""
        return math.sqrt(self.residual / self.energy) if self.energy else 0.0


class CheckpointTask:
    """One fine-tune beside its base.

    Which tensors have changed, and how many components a delta needs, only the values tell.  They
    are gone through once, in :meth:`prepare` or when first something of them is asked for; the
    factors are kept in a temporary file, private tensors are read from the checkpoint.

    Attributes
    ----------
    tuned, base_checkpoint
        The two models.
    """

    def __init__(self, name: str, tuned: Checkpoint, base: Checkpoint, options: Options) -> None:
        self._name = name
        self.tuned = tuned
        self.base_checkpoint = base
        self._options = options
        self._criterion = criterion_of(options)
        self._plan: Plan = plan_extraction(tuned, base)
        self._done: _Extraction | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the task."""
        return self._name

    @property
    def path(self) -> str:
        """The fine-tune's folder or file."""
        return str(self.tuned.path)

    @property
    def base_model(self) -> str:
        """The base's name: of its folder, or of its repository if it lies in the Hub's cache."""
        return self.base_checkpoint.model_id

    @property
    def config_text(self) -> str:
        """The text of the fine-tune's config.json, or the empty string."""
        return self.tuned.config_text

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Target name to what the task adds there; extracts first."""
        return self._extraction().targets

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Name to description of every tensor that is kept whole; extracts first."""
        return self._extraction().privates

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """Every tensor and file of the fine-tune; extracts first."""
        return (*self._plan.ledger, *self._extraction().ledger, *file_lines(self.tuned))

    @functools.cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """Config and weight files with size and digest, hashed on first access."""
        return tuple(describe_file(path) for path in self.tuned.files)

    def extraction(self) -> dict[str, Any]:
        """How factors were made, and the measured relative error of all deltas together.

        Keys: ``svd``, those of ``rank``, ``energy`` and ``max_error`` that were asked for,
        ``error``, and ``max`` of the targets' errors.
        """
        done, criterion = self._extraction(), self._criterion
        asked = {
            "rank": criterion.most,
            "energy": criterion.energy,
            "max_error": criterion.max_error,
        }
        return {
            "svd": self._options.svd,
            **{key: value for key, value in asked.items() if value is not None},
            "error": done.error,
            "max": done.worst[0],
        }

    def prepare(self, progress: Progress | None = None) -> None:
        """Look at every tensor and make all factors, unless that is done.

        Parameters
        ----------
        progress
            Called with what is being done, how many tensors are done, and how many there are.

        Raises
        ------
        NonFiniteError
            A tensor holds NaN or infinity.
        UnsupportedError
            A tied weight has changed, and it is not known what else it stands for.
        SourceError
            A file cannot be read any more.
        RmmError
            There is no room for the factors.
        """
        with self._lock:
            if self._done is None:
                self._done = self._run(progress)

    def factors(self, target: str) -> Factors:
        """Read both factors of one target, float32; extracts first.

        Raises
        ------
        NotFoundError
            There is no such target.
        """
        done = self._extraction()
        if target not in done.targets:
            raise NotFoundError(f"no target is called {target!r}", path=self.path)
        return Factors(done.spool.get((target, "A")), done.spool.get((target, "B")), 1.0)

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor in its stored dtype and shape.

        Raises
        ------
        NotFoundError
            There is no such tensor.
        NonFiniteError
            It holds NaN or infinity.
        """
        done = self._extraction()
        if name not in done.privates:
            raise NotFoundError(f"no private tensor is called {name!r}", path=self.path)
        array = self.tuned.read(done.tensors[name])
        if not self._options.allow_nonfinite:
            self._check_finite(array, done.tensors[name], self.tuned)
        return array

    def _extraction(self) -> _Extraction:
        self.prepare()
        assert self._done is not None  # prepared  # noqa: S101
        return self._done

    def _run(self, progress: Progress | None) -> _Extraction:
        for name, known in self._plan.tied:
            if not _equal(self.tuned.read(name), self.base_checkpoint.read(known)):
                raise UnsupportedError(
                    f"tensor {name!r} has changed, and the config ties it to an output weight that "
                    "is not stored and whose name is not known",
                    path=self.path,
                    hint="Save base and fine-tune with tie_word_embeddings false and both weights.",
                )
        done = _Extraction(Spool())
        items = self._plan.items
        sizes = [math.prod(self.tuned.metas[item.tensor].shape) for item in items]
        with one_thread():
            results = in_order(self._look, items, sizes)
            for count, (item, result) in enumerate(zip(items, results, strict=True), 1):
                self._note(item, result, done)
                if progress is not None:
                    progress(f"extracting {self.name}", count, len(items))
        self._finish(done)
        return done

    def _look(self, item: Item) -> Extract | bool:
        """Extract what has changed; or say whether the tensor is to be kept whole."""
        if item.base is None:
            return True
        tuned, known = self.tuned.read(item.tensor), self.base_checkpoint.read(item.base)
        if _equal(tuned, known):
            return False
        if item.shape is None:
            return True
        delta = difference(tuned, known)
        del tuned, known  # the largest there are
        self._check_finite(delta, item.tensor, self.tuned, item.base)
        svd: Any = self._options.svd  # criterion_of has checked it
        return extract(as_delta(delta, item.shape), self._criterion, svd)

    def _note(self, item: Item, result: Extract | bool, done: _Extraction) -> None:
        if isinstance(result, Extract):
            assert item.target is not None and item.shape is not None  # noqa: S101, PT018  # a weight
            self._keep_factors(item, item.target, item.shape, result, done)
        elif result:
            self._keep_whole(item, done)
        else:
            done.unchanged += 1

    def _keep_factors(
        self, item: Item, target: str, shape: TargetShape, found: Extract, done: _Extraction
    ) -> None:
        done.spool.put((target, "A"), found.A)
        done.spool.put((target, "B"), found.B)
        done.targets[target] = TargetInfo(shape, found.rank, 1.0, _FLOAT32, _FLOAT32)
        done.energy += found.norm**2
        done.residual += found.residual**2
        done.worst = max(done.worst, (found.error, target))
        line = f"rank {found.rank} of the change, leaves {100.0 * found.error:.2f} % of it"
        done.ledger.append(LedgerLine(f"tensor {item.name}", Action.USED, line))

    def _keep_whole(self, item: Item, done: _Extraction) -> None:
        meta = self.tuned.metas[item.tensor]
        why = item.why or "changed"
        if self._options.drop_private:
            detail = f"notice: left out on request ({why.removeprefix('notice: ')})"
            done.ledger.append(LedgerLine(f"tensor {item.name}", Action.IGNORED, detail))
            return
        done.privates[item.name] = PrivateInfo(Role.MODULE, meta.dtype, meta.shape)
        done.tensors[item.name] = item.tensor
        done.ledger.append(LedgerLine(f"tensor {item.name}", Action.STORED, f"{why}, kept whole"))

    def _finish(self, done: _Extraction) -> None:
        for name, info in done.privates.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and owner in done.targets:
                done.privates[name] = dataclasses.replace(info, role=Role.BIAS)
        line = f"{done.unchanged} of {len(self._plan.items)}: equal to the base's, not stored"
        done.ledger.append(LedgerLine("unchanged tensors", Action.IGNORED, line))
        if done.targets:
            text = (
                f"notice: {len(done.targets)} changed weights as factors, which leave "
                f"{100.0 * done.error:.2f} % of the change ({100.0 * done.worst[0]:.2f} % of "
                f"{done.worst[1]})"
            )
        else:
            text = "notice: no weight has changed"
        done.ledger.append(LedgerLine("changed weights", Action.USED, text))

    def _check_finite(
        self, array: Array, tensor: str, checkpoint: Checkpoint, base: str | None = None
    ) -> None:
        if not is_float(array.dtype):
            return
        n_bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if n_bad:
            what = f"tensor {checkpoint.key_of(tensor)!r}"
            if base is not None:
                what += f" minus {base!r} of the base {self.base_checkpoint.path}"
            raise NonFiniteError(
                f"{what}: {n_bad} of {array.size} values are NaN or infinite",
                path=str(checkpoint.path),
                hint="One of the two is broken.",
            )


def difference(tuned: Array, base: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Subtract one weight from another in float32, with no float32 copy of the second."""
    delta = np.ascontiguousarray(tuned, dtype=np.float32)
    if delta is tuned:
        delta = delta.copy()
    flat, other = delta.reshape(-1), base.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        flat[part] -= other[part].astype(np.float32)
    return delta


def in_order(
    work: Callable[[T], R], items: Sequence[T], sizes: Sequence[int], workers: int | None = None
) -> Iterator[R]:
    """Apply a function to items in a few threads; results come in the order of the items.

    Parameters
    ----------
    work
        Leaves the interpreter to others while it computes.
    sizes
        Of the items; those under way together are at most twice as large as the largest, so that
        memory does not grow with the number of threads.
    workers
        Threads; by default as many as there are processors, up to 8.
    """
    limit = 2 * max(sizes, default=0)
    executor = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8))
    running: collections.deque[tuple[Future[R], int]] = collections.deque()
    try:
        for item, size in zip(items, sizes, strict=True):
            while running and sum(other for _, other in running) + size > limit:
                yield running.popleft()[0].result()
            running.append((executor.submit(with_one_thread, work, item), size))
        while running:
            yield running.popleft()[0].result()
    finally:
        executor.shutdown(cancel_futures=True)


def _equal(one: Array, other: Array) -> bool:
    """Say whether two tensors are the same, bit for bit or, in different dtypes, as float32."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        first, second = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other))
        return bool(np.array_equal(first, second))
    return bool(np.array_equal(one.astype(np.float32), other.astype(np.float32)))
