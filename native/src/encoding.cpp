#include "encoding.hpp"

#include "half.hpp"
#include "trellis.hpp"

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

// Decoding is in two passes over a few blocks: codes to bytes, bytes to floats. Each is a loop that
// vectorises, and bytes are read back only when their stores are done.
constexpr uint64_t BATCH = 16;

// Eight codes of N bits, as the lowest bits of a word, to one in each byte: halves move apart thrice.
template <unsigned N>
RMM_INLINE uint64_t spread(uint64_t word) {
    constexpr uint64_t CODE = (uint64_t{1} << N) - 1;
    constexpr uint64_t TWO = CODE | CODE << N, FOUR = TWO | TWO << (2 * N);
    word = (word & FOUR) | (word >> (4 * N) & FOUR) << 32;
    word = (word & (TWO | TWO << 32)) | (word >> (2 * N) & (TWO | TWO << 32)) << 16;
    constexpr uint64_t EACH = CODE | CODE << 16 | CODE << 32 | CODE << 48;
    return (word & EACH) | (word >> N & EACH) << 8;
}

// The 32 codes u of a block, one in each byte of `bytes`.
template <unsigned N>
RMM_INLINE void unpack(const uint8_t* codes, uint8_t* bytes) {
    if (N == 4) {  // value i is in the low half of byte i, value i + 16 in its high half
        for (unsigned i = 0; i < 16; ++i) {
            bytes[i] = codes[i] & 15;
            bytes[i + 16] = codes[i] >> 4;
        }
    } else {  // one integer: eight values are N bytes
        for (unsigned group = 0; group < 4; ++group) {
            // Eight bytes are loaded without leaving the block; the last ones from further ahead.
            constexpr unsigned LAST = N < 2 ? 0 : 4 * N - 8;
            const unsigned from = group * N, at = from < LAST ? from : LAST;
            uint64_t word = N == 1 ? u32(codes) >> (8 * from) & 255 : u64(codes + at) >> (8 * (from - at));
            word = spread<N>(word);
            std::memcpy(bytes + 8 * group, &word, sizeof word);
        }
    }
}

template <unsigned N>
RMM_INLINE int32_t level(uint8_t code) {
    if (N == 8) return static_cast<int8_t>(code);
    if (N == 4) return static_cast<int32_t>(code) - 8;
    return 2 * static_cast<int32_t>(code) - ((1 << N) - 1);
}

template <unsigned N>
RMM_INLINE void decode_blocks(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    constexpr uint64_t BYTES = 2 + 4 * N;
    const uint8_t* block = row + first / BLOCK * BYTES;
    uint8_t unpacked[BATCH * BLOCK];
    // At eight bits the codes are bytes already.
    constexpr uint64_t STEP = N == 8 ? BYTES : BLOCK;
    while (n > 0) {
        const uint64_t n_values = n < BATCH * BLOCK ? n : BATCH * BLOCK;
        const uint64_t n_blocks = ceil_div(n_values, BLOCK);
        const uint8_t* codes = N == 8 ? block + 2 : unpacked;
        if (N != 8) {
            for (uint64_t i = 0; i < n_blocks; ++i) unpack<N>(block + i * BYTES + 2, unpacked + i * BLOCK);
        }
        for (uint64_t i = 0; i < n_values / BLOCK; ++i) {
            const float scale = float_of_f16(u16(block + i * BYTES));
            RMM_IVDEP
            for (unsigned v = 0; v < BLOCK; ++v) {
                out[i * BLOCK + v] = scale * static_cast<float>(level<N>(codes[i * STEP + v]));
            }
        }
        if (n_values % BLOCK != 0) {
            const float scale = float_of_f16(u16(block + (n_blocks - 1) * BYTES));
            const uint8_t* last = codes + (n_blocks - 1) * STEP;
            for (uint64_t v = 0; v < n_values % BLOCK; ++v) {
                out[(n_blocks - 1) * BLOCK + v] = scale * static_cast<float>(level<N>(last[v]));
            }
        }
        block += n_blocks * BYTES;
        out += n_values;
        n -= n_values;
    }
}

#define RMM_DECODE_BLOCKS(NAME, N)                                                          \
    RMM_CLONES void NAME(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {       \
        decode_blocks<N>(row, first, n, out);                                               \
    }

RMM_DECODE_BLOCKS(decode_q1, 1)
RMM_DECODE_BLOCKS(decode_q2, 2)
RMM_DECODE_BLOCKS(decode_q3, 3)
RMM_DECODE_BLOCKS(decode_q4_0, 4)
RMM_DECODE_BLOCKS(decode_q5, 5)
RMM_DECODE_BLOCKS(decode_q6, 6)
RMM_DECODE_BLOCKS(decode_q7, 7)
RMM_DECODE_BLOCKS(decode_q8_0, 8)

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

// --- runs that tell their own length -----------------------------------------------------------------

void decode_trellis(RunDecoding* runs, size_t n_runs) {
    std::vector<trellis::Decoding> decodings(n_runs);
    for (size_t i = 0; i < n_runs; ++i) {
        const RunDecoding& run = runs[i];
        decodings[i].wrong = trellis::parse(run.data, run.n_bytes, run.n_rows, run.n, decodings[i].run);
        decodings[i].target = run.target;
    }
    trellis::decode(decodings.data(), n_runs);
    for (size_t i = 0; i < n_runs; ++i) runs[i].wrong = decodings[i].wrong;
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
    {0x20, "trellis", false, 0, 0, nullptr, nullptr, trellis::run_bytes, decode_trellis},
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
