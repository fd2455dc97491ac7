"""The rules that opening a file checks, in the order in which they build on one another.

Each stage takes the :class:`~rmmformat.format.reader.Index` under construction, yields what is
broken, and fills in what later stages use.  A later stage may rely on all earlier ones having
yielded nothing that stops a reader.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rmmformat.format import layout
from rmmformat.format.encodings import ENCODINGS
from rmmformat.format.framing import Broken, header, section_table, slots
from rmmformat.format.reader import Index, Violation
from rmmformat.model import TargetKind

__all__ = ["OPEN_STAGES", "extent_table"]

_FACTORS = (("a", "n_in"), ("b", "n_out"))


def names(index: Index) -> Broken:
    """STRS: names and their order."""
    section = index.sections.get("STRS")
    if section is None:
        return
    raw = bytes(index.data[section.offset : section.offset + section.length])
    if not raw:
        return
    if not raw.endswith(b"\0"):
        yield Violation(30, section.offset, "the last string does not end in a NUL byte")
        return
    position, previous = section.offset, b""
    for string in raw[:-1].split(b"\0"):
        try:
            text = string.decode()
        except UnicodeDecodeError:
            text = ""
        if not text or len(string) > layout.MAX_NAME or any(b < 32 or b == 127 for b in string):
            yield Violation(30, position, f"string {len(index.strings)} is not a valid name")
            return
        if string <= previous:
            yield Violation(31, position, f"string {text!r} is not above its predecessor")
            return
        index.strings.append(text)
        position, previous = position + len(string) + 1, string


def _first(mask: Any) -> int | None:
    hits = np.flatnonzero(mask)
    return int(hits[0]) if len(hits) else None


def reserved(index: Index) -> Broken:
    """Reserved fields of records (RMM-037)."""
    for name in layout.SECTION_ORDER:
        if not any(field.startswith("reserved") for field in layout.RECORDS[name].names or ()):
            continue
        table = index.table(name)
        for field in layout.RECORDS[name].names or ():
            if field.startswith("reserved") and len(table):
                values = table[field].reshape(len(table), -1)
                if (i := _first(values.any(axis=1))) is not None:
                    at = index.table_offset(name, i)
                    yield Violation(37, at, f"{name} record {i}: reserved field is not zero")


def targets(index: Index) -> Broken:
    """TARG."""
    table = index.table("TARG")
    for i, record in enumerate(table):
        at = index.table_offset("TARG", i)
        kernel, kind = [int(k) for k in record["kernel"]], int(record["kind"])
        if kind not in set(TargetKind):
            yield Violation(36, at + 22, f"target {i}: unknown kind {kind}", unsupported=True)
            return
        sizes = [k for k in kernel if k]
        is_conv = kind == TargetKind.CONV
        n_in, n_out = int(record["n_in"]), int(record["n_out"])
        if (
            not 1 <= n_in <= layout.MAX_SIDE
            or not 1 <= n_out <= layout.MAX_SIDE
            or record["flags"] > 1
            or kernel[: len(sizes)] != sizes
            or bool(sizes) != is_conv
            or (is_conv and n_in % int(np.prod(sizes, dtype=object)))
        ):
            yield Violation(36, at, f"target {i}: sides {n_in}, {n_out}, kernel {kernel}")
            return
    unnamed = _first(table["name"] >= len(index.strings))
    if unnamed is not None:
        at = index.table_offset("TARG", unnamed)
        yield Violation(35, at + 24, f"target {unnamed}: its name is no string")
        return
    keys = [
        (int(r["name"]), int(r["n_in"]), int(r["n_out"]), int(r["kind"]), int(r["flags"]),
         tuple(int(k) for k in r["kernel"]))
        for r in table
    ]  # fmt: skip
    for i in range(1, len(keys)):
        if keys[i] <= keys[i - 1]:
            yield Violation(35, index.table_offset("TARG", i), f"target {i} is out of order")
            return


def layouts(index: Index) -> Broken:
    """RUNS and LAYO."""
    runs, table = index.table("RUNS"), index.table("LAYO")
    if (i := _first(runs["count"] == 0)) is not None:
        yield Violation(40, index.table_offset("RUNS", i), f"run {i} counts no rows")
        return
    pairs = list(zip(runs["encoding"].tolist(), runs["count"].tolist(), strict=True))
    position = 0
    for i, record in enumerate(table):
        first, count = int(record["first_run"]), int(record["n_runs"])
        own = pairs[first : first + count] if first == position else []
        if not 1 <= count == len(own) or sum(n for _, n in own) != record["n_rows"]:
            yield Violation(
                41,
                index.table_offset("LAYO", i),
                f"layout {i}: runs {first} to {first + count}, {record['n_rows']} rows",
            )
            return
        fixed = [_is_fixed_size(code) for code, _ in own]
        for j in range(1, count):
            if own[j][0] == own[j - 1][0] and fixed[j]:
                at, code = index.table_offset("RUNS", first + j), own[j][0]
                yield Violation(41, at, f"layout {i}: successive runs of encoding {code:#04x}")
                return
        index.runs.append(own)
        index.fixed_size.append(all(fixed))
        position += count
    if position != len(runs):
        yield Violation(41, index.table_offset("RUNS", position), "layouts do not tile the runs")


def _is_fixed_size(code: int) -> bool:
    encoding = ENCODINGS.get(code)
    return encoding is not None and encoding.row_bytes is not None


def _has_layout(index: Index, ids: Any) -> Any:
    return (ids == layout.NONE) | (ids < len(index.table("LAYO")))


def _rows_of(index: Index, layout_id: int) -> int:
    return int(index.table("LAYO")["n_rows"][layout_id])


def forms(index: Index) -> Broken:
    """FORM."""
    for i, record in enumerate(index.table("FORM")):
        at = index.table_offset("FORM", i)
        ids = [record[f"{array}_{f}"] for f in "ab" for array in ("coefficients", "residual")]
        if (
            not np.isfinite(record["scale"])
            or not 1 <= record["rank"] <= layout.MAX_RANK
            or not all(_has_layout(index, id_) for id_ in ids)
            or any(record[f"dtype_{f}"] not in layout.FACTOR_DTYPES.values() for f in "ab")
        ):
            yield Violation(42, at, f"form {i}: scale {record['scale']}, rank {record['rank']}")
            return
        for f in "ab":
            residual = int(record[f"residual_{f}"])
            if residual != layout.NONE and _rows_of(index, residual) != record["rank"]:
                yield Violation(
                    43, at, f"form {i}: residual has {_rows_of(index, residual)} rows, not rank"
                )
                return


def _arrays_length(index: Index, arrays: list[tuple[int, int]], limit: int) -> int | None:
    """Bytes of arrays, given as layout and row length; None where only the bytes can tell (7.2).

    Walks no further than `limit`, the bytes that there are: of two successive runs one takes bytes
    (RMM-041), so that this takes time in proportion to them.
    """
    if not all(index.fixed_size[i] for i, _ in arrays if i != layout.NONE):
        return None
    end = 0
    for layout_id, row_length in arrays:
        for code, count in index.layout_runs(layout_id):
            row_bytes = ENCODINGS[code].row_bytes
            n_bytes = count * (0 if row_bytes is None else row_bytes(row_length))
            end = layout.ceil_to(end, layout.alignment(n_bytes, 1)) + n_bytes
            if end > limit:
                return end
    return end


def _is_absent(part: Any) -> bool:
    return (
        not any(int(part[f]) for f in ("group", "n_components", "rank", "flags"))
        and part["mean"] == layout.NONE
        and part["basis"] == layout.NONE
    )


def frames(index: Index) -> Broken:
    """FRAM."""
    table, target_table = index.table("FRAM"), index.table("TARG")
    if (i := _first(table["target"] >= len(target_table))) is not None:
        yield Violation(50, index.table_offset("FRAM", i), f"frame {i} names no target")
        return
    order = table["target"].astype(np.int64)
    if (i := _first(np.diff(order) < 0)) is not None:
        yield Violation(50, index.table_offset("FRAM", i + 1), f"frame {i + 1} is out of order")
        return
    index.first_frame = np.searchsorted(order, np.arange(len(target_table) + 1))
    for i, record in enumerate(table):
        at, target = index.table_offset("FRAM", i), target_table[record["target"]]
        n_absent, arrays, length = 0, [], int(record["length"])
        for f, side in _FACTORS:
            part, row_length = record[f], int(target[side])
            if _is_absent(part):
                n_absent += 1
                if part["reserved"]:
                    yield Violation(37, at, f"frame {i}: reserved field is not zero")
                    return
                continue
            broken = list(_part(index, part, row_length, at, i))
            yield from broken
            if broken:
                return
            arrays += [(int(part["mean"]), row_length), (int(part["basis"]), row_length)]
        if n_absent == 2:
            yield Violation(51, at, f"frame {i} has no part")
            return
        want = _arrays_length(index, arrays, length)
        if want not in (None, length) or (length == 0 and record["offset"]):
            yield Violation(52, at + 8, f"frame {i} has {length} bytes, its arrays take {want}")
            return


def _part(index: Index, part: Any, row_length: int, at: int, number: int) -> Broken:
    mixing, p, rank = int(part["flags"]), int(part["n_components"]), int(part["rank"])
    group, mean, basis = int(part["group"]), int(part["mean"]), int(part["basis"])
    if part["reserved"]:
        yield Violation(37, at, f"frame {number}: reserved field is not zero")
        return
    if (
        mixing > 1
        or not 1 <= rank <= layout.MAX_RANK
        or not 1 <= group <= row_length
        or (mixing and group != row_length)
        or p > layout.MAX_RANK
        or (basis == layout.NONE) != (p == 0)
        or not (_has_layout(index, part["mean"]) and _has_layout(index, part["basis"]))
        or (mean == layout.NONE and basis == layout.NONE)
        or (mean != layout.NONE and _rows_of(index, mean) != rank)
        or (basis != layout.NONE and _rows_of(index, basis) != (p if mixing else p * rank))
    ):
        yield Violation(51, at, f"frame {number}: rank {rank}, {p} components, group {group}")


def tasks(index: Index) -> Broken:
    """TASK: names, and the slices of the other tables."""
    table = index.table("TASK")
    if (i := _first(table["name"] >= len(index.strings))) is not None:
        yield Violation(55, index.table_offset("TASK", i), f"task {i}: name is no string")
        return
    if (i := _first(np.diff(table["name"].astype(np.int64)) <= 0)) is not None:
        yield Violation(55, index.table_offset("TASK", i + 1), f"task {i + 1} is out of order")
        return
    lists, target_table = index.table("TLST")["target"], index.table("TARG")
    entry, private = 0, 0
    for i, record in enumerate(table):
        at = index.table_offset("TASK", i)
        n_entries, n_privates = int(record["n_entries"]), int(record["n_privates"])
        if record["first_entry"] != entry or record["first_private"] != private:
            yield Violation(56, at + 16, f"task {i} does not follow its predecessor's entries")
            return
        entry, private = entry + n_entries, private + n_privates
        if entry > len(index.table("ENTR")) or private > len(index.table("PRIV")):
            yield Violation(56, at + 24, f"task {i} has more entries than there are")
            return
        first = int(record["first_target"])
        ids = lists[first : first + n_entries].astype(np.int64)
        if (
            first + n_entries > len(lists)
            or (ids >= len(target_table)).any()
            or (np.diff(ids) <= 0).any()
            or (np.diff(target_table["name"][ids].astype(np.int64)) <= 0).any()
        ):
            yield Violation(57, at + 32, f"task {i}: its list of targets is not one")
            return
    if entry != len(index.table("ENTR")) or private != len(index.table("PRIV")):
        yield Violation(56, index.table_offset("TASK", 0), "tasks do not tile entries and privates")


def entries(index: Index) -> Broken:
    """ENTR: form, target and frame fit one another; lengths; runs."""
    table, task_table, form_table = index.table("ENTR"), index.table("TASK"), index.table("FORM")
    if (i := _first(table["form"] >= len(form_table))) is not None:
        yield Violation(60, index.table_offset("ENTR", i), f"entry {i} names no form")
        return
    fitting: dict[tuple[int, int], Violation | _Fit] = {}
    for number, task in enumerate(task_table):
        first, count = int(task["first_entry"]), int(task["n_entries"])
        at = index.table_offset("TASK", number)
        lengths, end = [int(n) for n in table["length"][first : first + count]], 0
        for length in lengths:
            end = layout.ceil_to(end, layout.alignment(length, 1)) + length
        if end != int(task["length"]) or (end == 0 and task["offset"]):
            yield Violation(
                58, at + 8, f"task {number}: run of {task['length']} bytes, entries take {end}"
            )
            return
        n_values, n_terms = 0, 0
        form_ids, ids = table["form"][first : first + count], index.task_targets(number)
        for j, length in enumerate(lengths):
            key = (int(form_ids[j]), int(ids[j]))
            if key not in fitting:
                fitting[key] = _fit(index, *key, length)
            fit = fitting[key]
            if isinstance(fit, Violation):
                at = index.table_offset("ENTR", first + j)
                yield Violation(fit.rule, at, f"entry {first + j}: {fit.message}")
                return
            if fit.length not in (None, length):
                yield Violation(
                    61,
                    index.table_offset("ENTR", first + j),
                    f"entry {first + j} has {length} bytes, its arrays take {fit.length}",
                )
                return
            n_values += fit.n_values
            n_terms += fit.n_terms
        for rule, what, n, limit in (
            (62, "values", n_values, layout.VALUES_PER_BYTE),
            (63, "products and sums", n_terms, layout.TERMS_PER_BYTE),
        ):
            if n > limit * index.file_length:
                yield Violation(
                    rule, at, f"task {number} has {n} {what} in {index.file_length} bytes"
                )
                return


@dataclasses.dataclass(frozen=True)
class _Fit:
    """What entries of one form at one target have in common; the length where the index tells."""

    length: int | None
    n_values: int
    n_terms: int  # products and sums


def _fit(index: Index, form_id: int, target_id: int, limit: int) -> Violation | _Fit:
    """Fit a form to a target, or say what does not fit (RMM-060); `limit` is an entry's length."""
    form, target = index.table("FORM")[form_id], index.table("TARG")[target_id]
    cluster, rank = int(form["cluster"]), int(form["rank"])
    frame = None
    if cluster:
        first, last = index.first_frame[target_id], index.first_frame[target_id + 1]
        if cluster > last - first:
            return Violation(60, 0, f"target {target_id} has no frame {cluster}")
        frame = index.table("FRAM")[first + cluster - 1]
    arrays: list[tuple[int, int]] = []
    n_values, n_terms = 0, 0
    for f, side in _FACTORS:
        row_length, coefficients = int(target[side]), int(form[f"coefficients_{f}"])
        part = None if frame is None or _is_absent(frame[f]) else frame[f]
        p = 0 if part is None else int(part["n_components"])
        if part is not None and rank > part["rank"]:
            return Violation(60, 0, f"rank {rank} is above its frame's {part['rank']}")
        if (coefficients == layout.NONE) != (p == 0) or (p and _rows_of(index, coefficients) != p):
            return Violation(60, 0, f"coefficients do not fit {p} components")
        coefficient_length = row_length
        if part is not None:
            groups = -(-row_length // int(part["group"]))
            coefficient_length = groups * (rank if part["flags"] & 1 else 1)
        arrays += [
            (coefficients, coefficient_length), (int(form[f"residual_{f}"]), row_length)
        ]  # fmt: skip
        n_values += rank * row_length
        n_terms += (1 + p) * rank * row_length
    return _Fit(_arrays_length(index, arrays, limit), n_values, n_terms)


def privates(index: Index) -> Broken:
    """PRIV, BLOB and DIMS."""
    table, blobs = index.table("PRIV"), index.table("BLOB")
    for i, blob in enumerate(blobs):
        if blob["length"] == 0 and blob["offset"]:
            yield Violation(67, index.table_offset("BLOB", i), f"empty blob {i} has an offset")
            return
    for number, task in enumerate(index.table("TASK")):
        first = int(task["first_private"])
        previous, total = -1, 0
        for i in range(first, first + int(task["n_privates"])):
            violation = _private_fault(index, i, table[i], previous)
            if violation is not None:
                yield violation
                return
            previous, total = int(table["name"][i]), total + int(blobs["length"][table["blob"][i]])
        if total > layout.PRIVATE_BYTES_PER_BYTE * index.file_length:
            at = index.table_offset("TASK", number)
            message = f"task {number} has {total} private bytes in {index.file_length} bytes"
            yield Violation(64, at, message)
            return


def _private_fault(index: Index, i: int, record: Any, previous: int) -> Violation | None:
    """RMM-065 and RMM-066; `previous` is the name of the one before in the task."""
    blobs, dims = index.table("BLOB"), index.table("DIMS")["dim"]
    at, name = index.table_offset("PRIV", i), int(record["name"])
    first, n_dims = int(record["first_dim"]), int(record["n_dims"])
    if (
        not previous < name < len(index.strings)
        or record["blob"] >= len(blobs)
        or int(record["dtype"]) not in layout.DTYPES
        or n_dims > 8
        or first + n_dims > len(dims)
    ):
        return Violation(65, at, f"private tensor {i} refers to what is not there")
    shape = [int(dim) for dim in dims[first : first + n_dims]]
    size = math.prod(shape) * layout.DTYPES[int(record["dtype"])].itemsize
    length = int(blobs["length"][record["blob"]])
    if any(dim > layout.MAX_SIDE for dim in shape) or size != length:
        message = f"private tensor {i}: shape {shape} takes {size} bytes, its blob has {length}"
        return Violation(66, at, message)
    return None


def extent_table(index: Index) -> list[tuple[int, int, str, int]]:
    """Offset and length of every extent, what it is, and where the index says so; by offset."""
    rows: list[tuple[int, int, str, int]] = []
    for kind, name in (("FRAM", "frame"), ("TASK", "task"), ("BLOB", "blob"), ("free", "free")):
        table = index.table(kind)
        rows += [
            (
                int(record["offset"]),
                int(record["length"]),
                f"{name} {i}",
                index.table_offset(kind, i),
            )
            for i, record in enumerate(table)
            if record["length"]
        ]
    active = index.active
    slot = next(slot.offset for slot in index.slots if slot.record is active)
    rows.append((int(active["index_offset"]), int(active["index_length"]), "index", slot + 24))
    return sorted(rows)


def extents(index: Index) -> Broken:
    """Extents: alignment, order, no overlap, no holes (section 7)."""
    for i, length in enumerate(index.table("free")["length"]):
        if length == 0:
            offset = index.table_offset("free", i)
            yield Violation(71, offset, f"free extent {i} is empty")
            return
    position = layout.HEADER_LENGTH
    for offset, length, kind, at in extent_table(index):
        if offset < position or offset + length > index.file_length:
            yield Violation(
                71, at, f"{kind} at {offset} of {length} bytes overlaps another or leaves the file"
            )
            return
        if not kind.startswith("free") and offset % layout.alignment(length):
            yield Violation(70, at, f"{kind} of {length} bytes at {offset} is not aligned")
            return
        if offset - position >= 64:
            yield Violation(72, position, f"bytes {position} to {offset - 1} belong to nothing")
            return
        position = offset + length
    if position != index.file_length:
        yield Violation(
            72, position, f"bytes {position} to {index.file_length - 1} are unaccounted"
        )


OPEN_STAGES: tuple[Callable[[Index], Broken], ...] = (
    header,
    slots,
    section_table,
    extents,  # early: once they do not overlap, all that follows takes time in proportion to them
    names,
    reserved,
    targets,
    layouts,
    forms,
    frames,
    tasks,
    entries,
    privates,
)
