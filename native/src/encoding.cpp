#include "encoding.hpp"

#include "half.hpp"

namespace rmm {
namespace {

void decode_zero(const uint8_t*, uint64_t, uint64_t n, f32u* out) {
    std::memset(out, 0, n * sizeof *out);
}

void decode_f32(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    std::memcpy(out, row + 4 * first, n * sizeof *out);
}

RMM_CLONES
void decode_f16(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    const u16u* values = reinterpret_cast<const u16u*>(row + 2 * first);
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = float_of_f16(values[i]);
}

RMM_CLONES
void decode_bf16(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    const u16u* values = reinterpret_cast<const u16u*>(row + 2 * first);
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = float_of_bf16(values[i]);
}

// --- blocks of 32 values behind an f16 scale ---------------------------------------------------

// The codes of a block of the odd-multiple encodings: value i is bits i·N … i·N + N − 1, so eight
// values are N bytes.
template <unsigned N>
RMM_INLINE void unpack_odd(const uint8_t* codes, float scale, f32u* out) {
    constexpr uint32_t MASK = (1u << N) - 1;
    for (unsigned group = 0; group < 4; ++group) {
        uint64_t word = 0;
        std::memcpy(&word, codes + group * N, N);
        int32_t levels[8];
        for (unsigned i = 0; i < 8; ++i) {
            levels[i] = static_cast<int32_t>((word >> (i * N)) & MASK);
        }
        for (unsigned i = 0; i < 8; ++i) {
            out[group * 8 + i] =
                scale * static_cast<float>(2 * levels[i] - static_cast<int32_t>(MASK));
        }
    }
}

RMM_INLINE void unpack_q4_0(const uint8_t* codes, float scale, f32u* out) {
    for (unsigned i = 0; i < 16; ++i) {
        out[i] = scale * static_cast<float>(static_cast<int32_t>(codes[i] & 15) - 8);
        out[i + 16] = scale * static_cast<float>(static_cast<int32_t>(codes[i] >> 4) - 8);
    }
}

RMM_INLINE void unpack_q8_0(const uint8_t* codes, float scale, f32u* out) {
    for (unsigned i = 0; i < 32; ++i) {
        out[i] = scale * static_cast<float>(static_cast<int8_t>(codes[i]));
    }
}

template <unsigned BYTES, void (*UNPACK)(const uint8_t*, float, f32u*)>
RMM_INLINE void decode_blocks(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    const uint8_t* block = row + first / BLOCK * BYTES;
    for (; n >= BLOCK; n -= BLOCK, out += BLOCK, block += BYTES) {
        UNPACK(block + 2, float_of_f16(u16(block)), out);
    }
    if (n > 0) {
        float whole[BLOCK];
        UNPACK(block + 2, float_of_f16(u16(block)), whole);
        std::memcpy(out, whole, n * sizeof *out);
    }
}

#define RMM_DECODE_BLOCKS(NAME, BYTES, UNPACK)                                              \
    RMM_CLONES void NAME(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {      \
        decode_blocks<BYTES, UNPACK>(row, first, n, out);                                   \
    }

RMM_DECODE_BLOCKS(decode_q1, 6, unpack_odd<1>)
RMM_DECODE_BLOCKS(decode_q2, 10, unpack_odd<2>)
RMM_DECODE_BLOCKS(decode_q3, 14, unpack_odd<3>)
RMM_DECODE_BLOCKS(decode_q4_0, 18, unpack_q4_0)
RMM_DECODE_BLOCKS(decode_q5, 22, unpack_odd<5>)
RMM_DECODE_BLOCKS(decode_q6, 26, unpack_odd<6>)
RMM_DECODE_BLOCKS(decode_q7, 30, unpack_odd<7>)
RMM_DECODE_BLOCKS(decode_q8_0, 34, unpack_q8_0)

// RMM-086: a scale is finite; codes beyond the row's end are zero bits. With SPLIT
// the values 16 … 31 are in the high halves of the bytes, as in q4_0.
template <unsigned BITS, bool SPLIT>
const char* check_blocks(const uint8_t* row, uint64_t n) {
    constexpr uint64_t BYTES = 2 + 4 * BITS;
    uint64_t n_blocks = ceil_div(n, BLOCK);
    for (uint64_t i = 0; i < n_blocks; ++i) {
        if ((u16(row + i * BYTES) & 0x7C00) == 0x7C00) return "a block's scale is not finite";
    }
    if (n % BLOCK == 0) return nullptr;
    const uint8_t* codes = row + (n_blocks - 1) * BYTES + 2;
    for (uint64_t i = n % BLOCK; i < BLOCK; ++i) {
        for (unsigned bit = 0; bit < BITS; ++bit) {
            uint64_t at = SPLIT ? (i % 16) * 8 + (i / 16) * 4 + bit : i * BITS + bit;
            if ((codes[at / 8] >> (at % 8)) & 1) return "a code behind the row's end is not zero";
        }
    }
    return nullptr;
}

// --- the registry ---------------------------------------------------------------------------------

constexpr Encoding KNOWN[] = {
    {0x00, "zero", true, 0, 0, decode_zero, nullptr, nullptr, nullptr},
    {0x01, "f32", true, 0, 4, decode_f32, nullptr, nullptr, nullptr},
    {0x02, "f16", true, 0, 2, decode_f16, nullptr, nullptr, nullptr},
    {0x03, "bf16", true, 0, 2, decode_bf16, nullptr, nullptr, nullptr},
    {0x11, "q1", true, 5, 6, decode_q1, check_blocks<1, false>, nullptr, nullptr},
    {0x12, "q2", true, 5, 10, decode_q2, check_blocks<2, false>, nullptr, nullptr},
    {0x13, "q3", true, 5, 14, decode_q3, check_blocks<3, false>, nullptr, nullptr},
    {0x14, "q4_0", true, 5, 18, decode_q4_0, check_blocks<4, true>, nullptr, nullptr},
    {0x15, "q5", true, 5, 22, decode_q5, check_blocks<5, false>, nullptr, nullptr},
    {0x16, "q6", true, 5, 26, decode_q6, check_blocks<6, false>, nullptr, nullptr},
    {0x17, "q7", true, 5, 30, decode_q7, check_blocks<7, false>, nullptr, nullptr},
    {0x18, "q8_0", true, 5, 34, decode_q8_0, check_blocks<8, false>, nullptr, nullptr},
};

struct ByCode {
    const Encoding* at[256] = {};
    constexpr ByCode() {
        for (const Encoding& encoding : KNOWN) at[encoding.code] = &encoding;
    }
};

constexpr ByCode BY_CODE;

}  // namespace

const Encoding* const* const ENCODINGS = BY_CODE.at;

}  // namespace rmm
