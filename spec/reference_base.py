"""What every part of the reference reader needs: refusing, checksums, registries, tables."""

from __future__ import annotations

import json
import re
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
NONE = 0xFFFFFFFF
SCHEMA, REGISTRY = (
    json.loads(Path(__file__).with_name(name).read_text("utf-8"))
    for name in ("metadata.schema.json", "registry.json")
)
DTYPES = {dtype["code"]: dtype["n_bytes"] for dtype in REGISTRY["dtypes"]}
TRELLIS, FIXED_SIZE = 0x20, {x["code"] for x in REGISTRY["encodings"]} - {0x20}
RULES = {int(rule["id"][4:]): rule for rule in REGISTRY["rules"]}


class Refused(Exception):  # noqa: N818
    """The file breaks ``rule`` at ``offset``; ``status`` is malformed or unsupported."""

    def __init__(self, rule: int, offset: int, status: str = "") -> None:
        self.rule, self.message = RULES[rule]["id"], RULES[rule]["text"]
        self.offset, self.status = offset, status or RULES[rule]["status"].split(";")[0]
        super().__init__(f"{self.rule} at {offset}: {self.message}")


def need(holds: Any, rule: int, at: int, status: str = "") -> None:
    if not holds:
        raise Refused(rule, at, status)


def ceil_to(x: int, a: int) -> int:
    """2: "the least multiple of a that is not less than x"."""
    return -(-x // a) * a


CRC_TABLE = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    CRC_TABLE.append(n)


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial 1EDC6F41, reflected; register and result inverted."""
    register = NONE
    for byte in data:
        register = CRC_TABLE[(register ^ byte) & 255] ^ register >> 8
    return register ^ NONE


# --- Tables (6.1): each record's fields, as struct and in words ----------------------------------

PART = "group n_components rank mean basis flags reserved"
TABLES = f"""
TARG QQ3HBBII n_in n_out k0 k1 k2 kind flags name reserved
RUNS IB3s     count encoding reserved
LAYO QII      first_run n_runs n_rows
FORM d6IBB6s  scale rank cluster coeff_a residual_a coeff_b residual_b dtype_a dtype_b reserved
FRAM QQIIQ6IQ6I offset length target crc {PART} {re.sub(r"( |$)", r"_b ", PART)}
TLST I        target
TASK 7QII     offset length first_entry n_entries first_target first_private n_privates name \
              reserved
ENTR QII      length form crc
DIMS Q        size
PRIV IIBBBBIQ name blob dtype n_dims role reserved reserved_2 first_dim
BLOB QQII     offset length crc reserved
erro f        error
free QQII     offset length crc reserved
"""
STRUCTS, TUPLES = dict[str, str](), dict[str, Any]()
for line in TABLES.strip().splitlines():
    name, code, *fields = line.split()
    STRUCTS[name], TUPLES[name] = "<" + code, namedtuple(name, fields)  # type: ignore[misc]
SIZES = {"STRS": 1, "meta": 1} | {name: struct.calcsize(code) for name, code in STRUCTS.items()}
Part = namedtuple("Part", PART)
ABSENT = Part(0, 0, 0, NONE, NONE, 0, 0)
SLOT = "sequence file_length growth_limit index_offset index_length n_sections record_size"
Slot = namedtuple("Slot", SLOT + " table_crc unused crc")
Section = namedtuple("Section", "type coding offset length count record_size crc")
# The bytes of a frame or entry: offset of the record that says so, place, checksum, layouts and row
# lengths of the four arrays, and the rules that its length and checksum may break.
Bytes = namedtuple("Bytes", "at offset length crc arrays length_rule crc_rule")
# What a task stores at one target (term *entry*); frame is an id or None.
Member = namedtuple("Member", "target form frame bytes")
# A run: number of its array (0 … 3) and of its first row in that, rows, values of a row, place in
# the file; its rows, if it is not fixed-size.
Run = namedtuple("Run", "array first count n code offset length rows")
