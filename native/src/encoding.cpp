#include "encoding.hpp"

#include "blocks.hpp"
#include "trellis.hpp"

namespace rmm {
namespace {

void decode_zero(const uint8_t*, uint64_t, uint64_t n, f32u* out) {
    std::memset(out, 0, n * sizeof *out);
}

template <int S>
void decode_stored(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    constexpr uint64_t BYTES = S == STORED_F32 ? 4 : 2;
    kernels().widen[S](out, row + BYTES * first, n);
}

// --- blocks of 32 values behind an f16 scale ---------------------------------------------------

template <unsigned N>
void decode_blocks(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    kernels().decode_blocks[N](row, first, n, out);
}

// RMM-086: a scale is finite; codes beyond the row's end are zero bits. With SPLIT
// the values 16 … 31 are in the high halves of the bytes, as in q4_0.
template <unsigned BITS, bool SPLIT>
const char* check_blocks(const uint8_t* row, uint64_t n) {
    constexpr uint64_t BYTES = block_bytes(BITS);
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
    {0x01, "f32", true, 0, 4, decode_stored<STORED_F32>, nullptr, nullptr, nullptr},
    {0x02, "f16", true, 0, 2, decode_stored<STORED_F16>, nullptr, nullptr, nullptr},
    {0x03, "bf16", true, 0, 2, decode_stored<STORED_BF16>, nullptr, nullptr, nullptr},
    {0x11, "q1", true, 5, 6, decode_blocks<1>, check_blocks<1, false>, nullptr, nullptr},
    {0x12, "q2", true, 5, 10, decode_blocks<2>, check_blocks<2, false>, nullptr, nullptr},
    {0x13, "q3", true, 5, 14, decode_blocks<3>, check_blocks<3, false>, nullptr, nullptr},
    {0x14, "q4_0", true, 5, 18, decode_blocks<4>, check_blocks<4, true>, nullptr, nullptr},
    {0x15, "q5", true, 5, 22, decode_blocks<5>, check_blocks<5, false>, nullptr, nullptr},
    {0x16, "q6", true, 5, 26, decode_blocks<6>, check_blocks<6, false>, nullptr, nullptr},
    {0x17, "q7", true, 5, 30, decode_blocks<7>, check_blocks<7, false>, nullptr, nullptr},
    {0x18, "q8_0", true, 5, 34, decode_blocks<8>, check_blocks<8, false>, nullptr, nullptr},
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
