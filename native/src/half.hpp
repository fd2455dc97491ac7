// Conversions between binary32 and the 16-bit formats, branch-free so that loops over them vectorise.
//
// Widening is exact; of a NaN the payload is kept, and one that comes from f16 becomes quiet, which is
// what processors do. Narrowing rounds to nearest even; overflow gives infinity, subnormal results are
// kept (8.1).
#pragma once

#include <cstdint>
#include <cstring>

#include "bytes.hpp"

namespace rmm {

RMM_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

RMM_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// `yes` or `no` by masks: a conditional would let the compiler skip the float arithmetic behind one of
// them, and for fear of its traps not vectorise the loop.
RMM_INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - static_cast<uint32_t>(condition);
    return (yes & mask) | (no & ~mask);
}

RMM_INLINE float float_of_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

RMM_INLINE float float_of_f16(uint16_t half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
    // The exponent's bias is 15 here and 127 there; infinity and NaN have the highest exponent in both.
    uint32_t normal = magnitude + (magnitude >= 0x0F800000u ? 0x70000000u : 0x38000000u);
    normal |= static_cast<uint32_t>(magnitude > 0x0F800000u) << 22;
    // A subnormal is fraction · 2^-24: put the fraction behind 2^-14 and take 2^-14 away, exactly.
    uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u));
    return float_of(sign | choose(magnitude < 0x00800000u, subnormal, normal));
}

RMM_INLINE uint16_t f16_of_float(float value) {
    uint32_t bits = bits_of(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    // Adding half a unit less one, plus one if the kept part is odd, rounds to nearest even; a carry
    // into the exponent is right, up to infinity.
    uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14, adding 0.5 makes the unit 2^-24 and the addition itself rounds.
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t special = choose(magnitude > 0x7F800000u, 0x7E00u | ((magnitude >> 13) & 0x1FFu), 0x7C00u);
    uint32_t finite = choose(magnitude < 0x38800000u, subnormal, normal);
    return static_cast<uint16_t>(sign | choose(magnitude >= 0x47800000u, special, finite));
}

RMM_INLINE uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
    bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace rmm
