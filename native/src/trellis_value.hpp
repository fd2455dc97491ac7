// One value of a trellis run, from a lane's two states (8.3, Decoding).
#pragma once

#include "trellis.hpp"

namespace rmm {
namespace trellis {

// The entropy coder's input.
struct Words {
    const uint8_t* next;
    const uint8_t* end;

    uint64_t left() const { return static_cast<uint64_t>(end - next) / 2; }
};

// How a word is taken into a state that is low. CHECKED: if there is one. Otherwise the caller has seen
// that there is, and the question must not become a branch, which would be a coin toss: compilers
// make one of a conditional expression here, even if told that it cannot be foreseen.
enum class Refill { CHECKED, SHIFT, MOVE };

template <Refill HOW>
RMM_INLINE bool refill(uint32_t& x, Words& words) {
    if (HOW == Refill::CHECKED) {
        if (x >= STATE_LOW) return true;
        if (words.next == words.end) return false;
        x = x << 16 | u16(words.next);
        words.next += 2;
        return true;
    }
#if defined(__GNUC__) && defined(__x86_64__)
    if (HOW == Refill::MOVE) {
        const uint32_t refilled = x << 16 | u16(words.next);
        const uint8_t* next = words.next + 2;
        __asm__("cmpl %4, %0\n\tcmovb %2, %0\n\tcmovb %3, %1"
                : "+&r"(x), "+&r"(words.next)
                : "r"(refilled), "r"(next), "i"(STATE_LOW)
                : "cc");
        return true;
    }
#endif
    const uint32_t low = x < STATE_LOW;
    x = x << (low << 4) | (u16(words.next) & (0u - low));
    words.next += 2 * low;
    return true;
}

// Words that a value can take: for its symbol, an escape, its raw bits.
constexpr uint64_t words_of_value(bool raw) { return raw ? 3 : 2; }

// What is the same for all values of a row.
struct RowCode {
    const uint32_t* slot;
    uint32_t escape;
    unsigned raw_bits;
    float step;
};

// One value of a lane with entropy state x and trellis state s. False if a word is missing.
template <bool RAW, Refill HOW>
RMM_INLINE bool decode_value(const RowCode& row, uint32_t& x, uint32_t& s, Words& words, uint32_t& seen, f32u& out) {
    const uint32_t slot = row.slot[x & 4095];
    uint32_t j = slot >> 24;
    x = (slot >> 12 & 4095) * (x >> 12) + (slot & 4095);
    if (!refill<HOW>(x, words)) return false;
    if (j == row.escape) {
        if (HOW == Refill::CHECKED && words.next == words.end) return false;
        j += u16(words.next);
        words.next += 2;
    }
    if (RAW) {
        j = j << row.raw_bits | (x & ((1u << row.raw_bits) - 1));
        x >>= row.raw_bits;
        if (!refill<HOW>(x, words)) return false;
        seen |= j;
    }
    const int32_t negative = -static_cast<int32_t>((s ^ j) & 1);
    const int32_t m = (static_cast<int32_t>(2 * j + 1) ^ negative) - negative;
    out = static_cast<float>(m) * row.step;
    s = next_state(s, j);
    return true;
}

// A run's lanes in the middle of a row.
template <unsigned LANES>
struct Lanes {
    RowCode row;
    f32u* out;  // of the next value
    Words words;
    uint32_t x[LANES], s[LANES];  // entropy and trellis states
    uint32_t seen;                // all indices with raw bits, OR-ed

    bool raw() const { return row.raw_bits != 0; }
};

}  // namespace trellis
}  // namespace rmm
