"""Rows to trellis runs: which step and which table each row gets (specification, 8.3).

The search and the entropy coder are native; what is chosen here is all that a writer is free in.
Values are m times a step, m odd.  A table is named by an index in eighths of an octave of
``spread / step``, so that a table fits rows of about one spread in units of the step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rmmformat.errors import FormatError, OptionError, ShapeError

__all__ = [
    "CODE",
    "LAMBDA",
    "encode_rows",
    "gaussian_table",
    "run_overhead",
    "table_bits",
    "without_zero_rows",
]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

#: Code of the encoding in the registry.
CODE = 0x20

#: Squared error, in units of the step's square, that one bit is worth to the search.  From 1.2 to
#: 2.0 the error at equal size is within half a per cent of the least.
LAMBDA = 1.6

_N_INDICES = 112
_MAX_LENGTH_BYTES = 5
_MODE_TIED = 1 << 15
_GAUSSIAN, _EXPONENTIAL = 0, 128
# Of a Gaussian it is 3; tables of the exponential family cost less from about here on.
_HEAVY_TAILS = 4.0
# The search bends towards cheap indices, so the table that fits what it chooses is narrower than
# the source: by this factor at that ratio of step to half the spread.
_RATIO = (0.12, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.15)
_NARROWER = (1.0, 0.98, 0.972, 0.945, 0.928, 0.911, 0.9, 0.878, 0.868)


def table_bits(number: int) -> tuple[Float32, int]:
    """What each symbol of a table costs, and how many low bits of an index are stored raw.

    Parameters
    ----------
    number
        A table number: 1 to 112 (Gaussian) or 129 to 240 (exponential).

    Returns
    -------
    Bits of a value by its symbol, the index without its raw bits, raw bits included; the last one
    is the escape's, for every index beyond the table.
    """
    from rmmformat._native import trellis_table  # the format can be read without the native module

    raw_bits, _, bits = trellis_table(number)
    return bits, raw_bits


def gaussian_table(spread: float, step: float) -> int:
    """Number of the table that suits a Gaussian row of that standard deviation."""
    return 1 + round(float(np.clip(_ideal_index(np.array([spread / step]))[0], 0, _N_INDICES - 1)))


def run_overhead(n_rows: int, n_values: int) -> int:
    """Bytes of a run that are not its values' entropy: length, base, row bytes, states.

    Parameters
    ----------
    n_rows
        All rows of the run.
    n_values
        Values of its rows that are not zero rows.
    """
    lanes = 1 if n_values < 1 << 14 else 4 if n_values < 1 << 16 else 16
    # A state keeps the 16 bits that the coder starts from, so half of it is not lost.
    return 2 + 2 + n_rows + 2 * lanes


def without_zero_rows(data: bytes | memoryview, n_rows: int) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Leave the rows of zeros out of a run: they have a byte each, and no symbols.

    Parameters
    ----------
    data
        A whole run.
    n_rows
        Its rows.

    Returns
    -------
    The run of the other rows, and their ordinals.

    Raises
    ------
    FormatError
        The run has no room for its rows, or none with symbols (RMM-087).
    """
    head = 1
    while head <= _MAX_LENGTH_BYTES and head <= len(data) and data[head - 1] & 0x80:
        head += 1
    first = head + 2  # behind the base
    numbers = np.frombuffer(data[first : first + n_rows], np.uint8)
    if len(numbers) < n_rows:
        raise FormatError(f"a trellis run of {len(data)} bytes for {n_rows} rows", rule="RMM-087")
    if not numbers.any():
        raise FormatError("a trellis run has no row with symbols", rule="RMM-087")
    body = bytes(data[head:first]) + numbers[numbers != 0].tobytes() + bytes(data[first + n_rows :])
    length, left = bytearray(), len(body)
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes(length) + bytes([left]) + body, np.flatnonzero(numbers)


def encode_rows(
    rows: Float32, steps: npt.ArrayLike, *, tied: bool, lambda_: float = LAMBDA
) -> tuple[bytes, Float32]:
    """Code rows as one trellis run.

    Parameters
    ----------
    rows
        (k, n) float32, finite.  Rows that are all zero cost one byte.
    steps
        (k,) wanted steps.  The mean squared error of a row is about its step's square from one bit
        a value up; those of zero rows are ignored.
    tied
        False: all steps are equal (mode 0), and each row has the table that suits it. True: rows
        of about one spread, whose steps may differ (mode 1): a row's step follows from its table.
    lambda_
        Squared error in units of the wanted step's square that a bit is worth.

    Returns
    -------
    The run, and what a reader decodes from it.

    Raises
    ------
    ShapeError
        The arrays do not fit each other.
    OptionError
        All rows are zero (store them as encoding ``zero``), steps differ or are not positive, or a
        value lies beyond what the step can reach.
    """
    wanted = np.asarray(steps, np.float64)
    if rows.ndim != 2 or rows.dtype != np.float32 or wanted.shape != rows.shape[:1]:
        raise ShapeError(
            f"trellis rows must be (k, n) float32 with k steps, got {rows.shape} {rows.dtype} and "
            f"{wanted.shape}"
        )
    coded = rows.any(axis=1)
    if not coded.any():
        raise OptionError("rows that are all zero have no trellis run; store them as zero")
    if not np.isfinite(rows).all():
        raise OptionError("rows with values that are not finite have no trellis run")
    if not (np.isfinite(wanted[coded]) & (wanted[coded] > 0)).all():
        raise OptionError("the steps of a trellis run must be positive and finite")
    wide = rows[coded].astype(np.float64)
    largest = np.abs(wide).max(axis=1)
    # Squares of values near the ends of the range must not overflow or vanish.
    scaled = wide / largest[:, None]
    spread = largest * np.sqrt((scaled * scaled).mean(axis=1))
    heavy = _kurtosis(scaled) > _HEAVY_TAILS
    choose = _tied if tied else _common
    base, indices, actual = choose(wanted[coded], spread, largest)
    lambdas = np.zeros(len(rows), np.float32)
    lambdas[coded] = lambda_ * np.square(wanted[coded] / actual)

    def code(family: npt.NDArray[np.int64]) -> tuple[bytes, Float32]:
        from rmmformat._native import trellis_encode

        numbers = np.zeros(len(rows), np.uint8)
        numbers[coded] = family + indices + 1
        families = 3 if heavy.any() else 1
        try:
            return trellis_encode(rows, numbers, base, lambdas, 0 if tied else families)
        except ValueError as error:
            raise OptionError(f"rows have no trellis run with these steps: {error}") from None

    run = code(np.full(len(indices), _GAUSSIAN))
    if tied and heavy.any():
        # A table cannot be exchanged without changing the step, but for its twin.
        other = code(np.where(heavy, _EXPONENTIAL, _GAUSSIAN))
        run = min(run, other, key=lambda coded_rows: len(coded_rows[0]))
    return run


def _kurtosis(rows: Float64) -> Float64:
    squares = rows * rows
    kurtosis: Float64 = (squares * squares).mean(axis=1) / np.square(squares.mean(axis=1))
    return kurtosis


def _ideal_index(ratio: Float64) -> Float64:
    """Index of the table for rows of that spread in units of their step, as a real number."""
    safe = np.maximum(ratio, 1e-9)
    index: Float64 = 8 * (np.log2(safe / 4 * np.interp(2 / safe, _RATIO, _NARROWER)) + 2)
    return index


def _bf16(value: float) -> int:
    """Upper half of the nearest such binary32; zero or infinity for what has none."""
    with np.errstate(over="ignore", under="ignore"):
        return (int(np.float32(value).view(np.uint32)) + 0x8000) >> 16


def _value(base: int) -> float:
    return float(np.uint32(base << 16).view(np.float32))


def _common(
    steps: Float64, spread: Float64, largest: Float64
) -> tuple[int, npt.NDArray[np.int64], Float64]:
    """Base, table indices and actual steps in mode 0."""
    if (steps != steps[0]).any():
        raise OptionError("rows of a trellis run have one step, unless tied to tables")
    base = _bf16(float(steps[0]))
    step = _value(base)
    if step == 0:
        raise OptionError(f"step {float(steps[0]):g} is too small for a trellis run")
    # An index reaches 2^16 values beyond a table, times two for each raw bit.
    raw_bits = np.ceil(np.log2(np.maximum((largest / step + 16) / 2**17, 0.5)))
    least = np.where(raw_bits > 0, 32 + 8 * (raw_bits - 1), 0)
    indices = np.clip(np.rint(_ideal_index(spread / step)), least, _N_INDICES - 1)
    return base, np.clip(indices, 0, _N_INDICES - 1).astype(np.int64), np.full(len(steps), step)


def _tied(
    steps: Float64, spread: Float64, _largest: Float64
) -> tuple[int, npt.NDArray[np.int64], Float64]:
    """Base, table indices and actual steps in mode 1, where index i means base · 2^(−i/8)."""
    indices = np.clip(_ideal_index(spread / steps), 0, _N_INDICES - 1)
    exponent = float(np.mean(np.log2(steps) + indices / 8))
    base = _bf16(2.0 ** min(max(exponent, -200.0), 200.0))
    if _value(base) == 0:
        raise OptionError("the steps are too small for a trellis run")
    choices = np.arange(_N_INDICES)
    actual = _value(base) * 2.0 ** (-choices / 8)
    # Each row has two wishes: its step, and a table that suits the step it gets.
    by_step = 8 * np.log2(actual[0] / steps)[:, None]
    by_table = _ideal_index(spread[:, None] / actual)
    miss = np.square(choices - by_step) + np.square(choices - by_table)
    chosen = miss.argmin(axis=1)
    return base | _MODE_TIED, chosen, actual[chosen]
