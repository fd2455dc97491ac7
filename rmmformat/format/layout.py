"""Every offset, record and code of the format: the only Python module that knows one.

Sources: ``spec/rmm-1.md`` sections 5 (header), 6 (index), 7 (extents), appendix A (registries).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "FACTOR_DTYPES",
    "HEADER_LENGTH",
    "LARGE",
    "NONE",
    "PREAMBLE",
    "RECORDS",
    "SECTION",
    "SECTION_ORDER",
    "SIGNATURE",
    "SLOT",
    "SLOT_OFFSETS",
    "alignment",
    "ceil_to",
    "dtype_code",
]

SIGNATURE = b"\x89RMM\r\n\x1a\n"
MAJOR, MINOR = 1, 0
HEADER_LENGTH = 640
SLOT_OFFSETS = (64, 512)
NONE = 0xFFFFFFFF
LARGE = 4096  # what is at least this long is aligned to 64 (section 7)
MAX_SIDE = 1 << 40
MAX_RANK = 1 << 20
MAX_NAME = 1024
VALUES_PER_BYTE = 1024  # RMM-062
TERMS_PER_BYTE = 16384  # RMM-063
PRIVATE_BYTES_PER_BYTE = 1024  # RMM-064
DEFLATE_RATIO, DEFLATE_FLOOR = 256, 65536  # RMM-026

PREAMBLE = np.dtype(
    [
        ("signature", "S8"),
        ("major", "<u2"),
        ("minor", "<u2"),
        ("features", "<u4"),
        ("reserved", "V44"),
        ("crc", "<u4"),
    ]
)

SLOT = np.dtype(
    [
        ("sequence", "<u8"),
        ("file_length", "<u8"),
        ("growth_limit", "<u8"),
        ("index_offset", "<u8"),
        ("index_length", "<u8"),
        ("n_sections", "<u8"),
        ("section_record_size", "<u4"),
        ("section_table_crc", "<u4"),
        ("unused", "V68"),
        ("crc", "<u4"),
    ]
)

SECTION = np.dtype(
    [
        ("type", "S4"),
        ("coding", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("count", "<u8"),
        ("record_size", "<u4"),
        ("crc", "<u4"),
    ]
)

PART = np.dtype(
    [
        ("group", "<u8"),
        ("n_components", "<u4"),
        ("rank", "<u4"),
        ("mean", "<u4"),
        ("basis", "<u4"),
        ("flags", "<u4"),
        ("reserved", "<u4"),
    ]
)

#: Record of each section type, in the order in which a writer lays the sections out.
RECORDS: dict[str, np.dtype[np.void]] = {
    "STRS": np.dtype([("byte", "u1")]),
    "TARG": np.dtype(
        [
            ("n_in", "<u8"),
            ("n_out", "<u8"),
            ("kernel", "<u2", (3,)),
            ("kind", "u1"),
            ("flags", "u1"),
            ("name", "<u4"),
            ("reserved", "<u4"),
        ]
    ),
    "RUNS": np.dtype([("count", "<u4"), ("encoding", "u1"), ("reserved", "u1", (3,))]),
    "LAYO": np.dtype([("first_run", "<u8"), ("n_runs", "<u4"), ("n_rows", "<u4")]),
    "FORM": np.dtype(
        [
            ("scale", "<f8"),
            ("rank", "<u4"),
            ("cluster", "<u4"),
            ("coefficients_a", "<u4"),
            ("residual_a", "<u4"),
            ("coefficients_b", "<u4"),
            ("residual_b", "<u4"),
            ("dtype_a", "u1"),
            ("dtype_b", "u1"),
            ("reserved", "u1", (6,)),
        ]
    ),
    "FRAM": np.dtype(
        [
            ("offset", "<u8"),
            ("length", "<u8"),
            ("target", "<u4"),
            ("crc", "<u4"),
            ("a", PART),
            ("b", PART),
        ]
    ),
    "TLST": np.dtype([("target", "<u4")]),
    "TASK": np.dtype(
        [
            ("offset", "<u8"),
            ("length", "<u8"),
            ("first_entry", "<u8"),
            ("n_entries", "<u8"),
            ("first_target", "<u8"),
            ("first_private", "<u8"),
            ("n_privates", "<u8"),
            ("name", "<u4"),
            ("reserved", "<u4"),
        ]
    ),
    "ENTR": np.dtype([("length", "<u8"), ("form", "<u4"), ("crc", "<u4")]),
    "DIMS": np.dtype([("dim", "<u8")]),
    "PRIV": np.dtype(
        [
            ("name", "<u4"),
            ("blob", "<u4"),
            ("dtype", "u1"),
            ("n_dims", "u1"),
            ("role", "u1"),
            ("reserved_8", "u1"),
            ("reserved", "<u4"),
            ("first_dim", "<u8"),
        ]
    ),
    "BLOB": np.dtype([("offset", "<u8"), ("length", "<u8"), ("crc", "<u4"), ("reserved", "<u4")]),
    "erro": np.dtype([("error", "<f4")]),
    "free": np.dtype([("offset", "<u8"), ("length", "<u8"), ("crc", "<u4"), ("reserved", "<u4")]),
    "meta": np.dtype([("byte", "u1")]),
}
SECTION_ORDER = tuple(RECORDS)

#: dtype code (appendix A) to numpy dtype.
DTYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f2"),
    3: np.dtype(ml_dtypes.bfloat16),
    4: np.dtype("<f8"),
    5: np.dtype("i1"),
    6: np.dtype("u1"),
    7: np.dtype("<i2"),
    8: np.dtype("<u2"),
    9: np.dtype("<i4"),
    10: np.dtype("<u4"),
    11: np.dtype("<i8"),
    12: np.dtype("<u8"),
    13: np.dtype("bool"),
    14: np.dtype(ml_dtypes.float8_e4m3fn),
    15: np.dtype(ml_dtypes.float8_e5m2),
    16: np.dtype("<c8"),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
#: Names of the dtypes that factors may have, and that reconstruction may give.
FACTOR_DTYPES = {"f32": 1, "f16": 2, "bf16": 3}


def dtype_code(dtype: np.dtype[np.generic]) -> int | None:
    """Code of a numpy dtype, or None where the format has none."""
    return DTYPE_CODES.get(np.dtype(dtype).newbyteorder("<") if dtype.kind in "fiuc" else dtype)


def ceil_to(value: int, multiple: int) -> int:
    """Least multiple that is not less than value."""
    return -(-value // multiple) * multiple


def alignment(length: int, small: int = 8) -> int:
    """Alignment of something `length` bytes long (sections 7, 7.1, 7.2)."""
    return 64 if length >= LARGE else small
