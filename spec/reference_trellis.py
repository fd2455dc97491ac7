"""The trellis encoding, decoded as section 8.3 of ``rmm-1.md`` says; part of ``reference.py``."""

from __future__ import annotations

import struct
from array import array as integers
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def f32_bits(text: str) -> float:
    return float(struct.unpack(">f", bytes.fromhex(text))[0])


C = "3f800000 3f6ac0c7 3f5744fd 3f45672a 3f3504f3 3f25fed7 3f1837f0 3f0b95c2"
FAMILIES = (
    """04b0556e 08dc431a 0f218de0 17bb0546 22a55547 2fa05396 3e3ce5f8 4df14256
    5e2d58d9 6e6b3af7 7e39bff0 8d418996 9b4597e3 a820ecbf b3c2a029 be29706c
    c75f7cf5 cf768ba8 d684ff71 dca38252 e1eb5127 e6750e8b ea5800a6 eda99fd4
    f07d5fde f2e4a20a f4eec215 f6a93407 f81fab54 f95c4650 fa67ba65 fb497ef1""",
    """0f218de0 1322754c 17bb0546 1ce8c54d 22a55547 28e6cfbb 2fa05396 36c2a71d
    3e3ce5f8 45fd2e33 4df14256 56071975 5e2d58d9 6653b528 6e6b3af7 76668014
    7e39bff0 85dae60a 8d418996 9466dd83 9b4597e3 a1d9d354 a820ecbf ae195f50
    b3c2a029 b91cfafe be29706c c2e996ae c75f7cf5 cb8d91ae cf768ba8 d31d561d""",
)


def trellis_table(number: int) -> tuple[int, list[int], list[int]]:
    """8.3 *Tables*: "A table number gives b raw bits and frequencies f[0 … Q]"."""
    family, i = number >> 7, (number & 127) - 1
    b = 0 if i < 32 else (i - 32) // 8 + 1
    t = r = int(FAMILIES[family].split()[i - 8 * b], 16)
    g = [2**32]
    while (x := (g[-1] * t) >> 32) >= 2**18:
        g.append(x)
        t = t if family else (t * r) >> 32
    room = 4096 - len(g) - 1
    f = [1 + x * room // sum(g) for x in g] + [1]
    f[0] += 4096 - sum(f)
    return b, f, [sum(f[:q]) for q in range(len(f))]


def trellis_run(data: bytes | memoryview, k: int, n: int) -> tuple[int, dict[int, F32]]:
    """8.3: "A run of trellis codes k rows of n values"; `data` begins with it.

    Gives the bytes that the run takes, and its rows by number, without those of zeros.  ValueError
    if it is not well formed (RMM-087).
    """

    def well(formed: bool) -> None:
        if not formed:
            raise ValueError("a run of trellis is not well formed")

    start = next((i + 1 for i, byte in enumerate(data[:5]) if byte < 128), 0)
    length = sum((byte & 127) << 7 * i for i, byte in enumerate(data[:start]))
    well(start == 1 or (start > 1 and data[start - 1] > 0))  # "in shortest form"
    well(length < 2**32 and start + length <= len(data) and length >= 2 + k)
    base, numbers = struct.unpack_from("<H", data, start)[0], bytes(data[start + 2 : start + 2 + k])
    well(all(x == 0 or 1 <= x & 127 <= 112 for x in numbers) and any(numbers))
    n_symbols = n * (k - numbers.count(0))
    lanes = 1 if n_symbols < 2**14 else 4 if n_symbols < 2**16 else 16
    n_words = (length - 2 - k - 4 * lanes) // 2
    well(length == 2 + k + 4 * lanes + 2 * n_words and n_words >= 0)
    well(n_symbols <= 1024 * (lanes + n_words))
    x = list(struct.unpack_from(f"<{lanes}I", data, start + 2 + k))
    well(min(x) >= 2**16)
    words = iter(struct.unpack_from(f"<{n_words}H", data, start + length - 2 * n_words))
    mode, step = base >> 15, f32_bits(f"{base & 0x7FFF:04x}0000")
    shrink = max(-(-((y & 127) - 1) // 8) for y in numbers if y)  # max of ceil(i / 8)
    well(1 + mode * shrink <= base >> 7 & 255 <= 230)

    def word() -> int:
        found = next(words, -1)
        well(found >= 0)  # "no word is read behind the last"
        return found

    s, rows = [0] * lanes, dict[int, F32]()
    for row, number in enumerate(numbers):
        if number == 0:
            continue
        b, f, cum = trellis_table(number)
        m = integers("i")
        for p in range(n):
            lane = p % lanes
            y, slot = x[lane], x[lane] % 4096
            q = bisect_right(cum, slot) - 1
            y = f[q] * (y >> 12) + slot - cum[q]
            y = y if y >= 2**16 else y << 16 | word()
            j = q if q < len(f) - 1 else q + word()
            if b:
                j, y = j << b | y % 2**b, y >> b
                y = y if y >= 2**16 else y << 16 | word()
            well(j < 2**23)
            m.append(-(2 * j + 1) if (s[lane] ^ j) & 1 else 2 * j + 1)
            feedback = (0xA6 if s[lane] & 1 else 0) ^ (0x79 if j + 1 & 2 else 0)
            x[lane], s[lane] = y, s[lane] >> 1 ^ feedback
        i = (number & 127) - 1
        own = step * f32_bits(C.split()[i % 8]) * 2.0 ** -(i // 8) if mode else step
        rows[row] = np.array(m, np.float32) * np.float32(own)
    well(next(words, None) is None and all(y == 2**16 for y in x))
    return start + length, rows
