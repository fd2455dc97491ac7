#include "kernels.hpp"

#include <cfloat>

#include "blocks.hpp"
#include "half.hpp"

#if (defined(__SSE2__) || defined(_M_X64)) && !defined(RMM_PORTABLE)
#include <emmintrin.h>
#define RMM_SSE2 1
#endif

// A compiler that fuses, reorders or computes more precisely than asked would change values (8.1).
#if defined(__FAST_MATH__)
#error "Reconstruction is exact arithmetic: build without -ffast-math"
#endif
static_assert(FLT_EVAL_METHOD == 0, "Reconstruction needs f32 arithmetic that is f32");
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif  // GCC has the option -ffp-contract=off only: the build sets it

namespace rmm {
namespace {

template <int S>
void widen(f32u* out, const void* values, uint64_t n) {
    const Values<S> row(values);
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = row[i];
}

template <>
void widen<STORED_F32>(f32u* out, const void* values, uint64_t n) {
    std::memcpy(out, values, n * sizeof *out);
}

void round_to_f16(u16u* out, const f32u* values, uint64_t n) {
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = f16_of_float(values[i]);
}

void round_to_bf16(u16u* out, const f32u* values, uint64_t n) {
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = bf16_of_float(values[i]);
}

template <int S, bool ONE, uint32_t N, Start FROM>
void products(f32u* out, const void* start, const f32u* const* c, const void* const* b, uint64_t n) {
    const f32u *c0 = c[0], *c1 = c[N > 1 ? 1 : 0], *c2 = c[N > 2 ? 2 : 0], *c3 = c[N > 3 ? 3 : 0];
    const Values<S> b0(b[0]), b1(b[N > 1 ? 1 : 0]), b2(b[N > 2 ? 2 : 0]), b3(b[N > 3 ? 3 : 0]);
    const Values<STORED_F32> sums(start);
    const Values<S> stored(start);
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) {
        const uint64_t at = ONE ? 0 : i;
        float sum = c0[at] * b0[i];
        if (FROM == Start::SUM) sum = sums[i] + sum;
        if (FROM == Start::STORED) sum = stored[i] + sum;
        if (N > 1) sum = sum + c1[at] * b1[i];
        if (N > 2) sum = sum + c2[at] * b2[i];
        if (N > 3) sum = sum + c3[at] * b3[i];
        out[i] = sum;
    }
}

RMM_CHOOSE_PRODUCTS(, products)

void add_rows(f32u* out, const f32u* start, const f32u* term, uint64_t n) {
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = start[i] + term[i];
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
void decode_blocks(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {
    constexpr uint64_t BYTES = block_bytes(N);
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

// --- transposition ------------------------------------------------------------------------------

void transpose32(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n, bool) {
    uint64_t i = 0;
#if RMM_SSE2
    for (; i + 4 <= n; i += 4) {
        uint32_t k = 0;
        for (; k + 4 <= n_rows; k += 4) {
            __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k] + i));
            __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k + 1] + i));
            __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k + 2] + i));
            __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k + 3] + i));
            __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
            __m128i ef = _mm_unpackhi_epi32(a, b), gh = _mm_unpackhi_epi32(c, d);
            u32u* at = out + i * stride + k;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_unpacklo_epi64(ab, cd));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at + stride), _mm_unpackhi_epi64(ab, cd));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 2 * stride), _mm_unpacklo_epi64(ef, gh));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 3 * stride), _mm_unpackhi_epi64(ef, gh));
        }
        for (; k < n_rows; ++k) {
            for (uint64_t at = i; at < i + 4; ++at) out[at * stride + k] = rows[k][at];
        }
    }
#endif
    for (; i < n; ++i) {
        for (uint32_t k = 0; k < n_rows; ++k) out[i * stride + k] = rows[k][i];
    }
}

void transpose16(u16u* out, uint64_t stride, const u16u* const* rows, uint32_t n_rows, uint64_t n, bool) {
    uint64_t i = 0;
#if RMM_SSE2
    for (; i + 8 <= n; i += 8) {
        uint32_t k = 0;
        for (; k + 4 <= n_rows; k += 4) {
            __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k] + i));
            __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k + 1] + i));
            __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k + 2] + i));
            __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[k + 3] + i));
            __m128i ab[2] = {_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)};
            __m128i cd[2] = {_mm_unpacklo_epi16(c, d), _mm_unpackhi_epi16(c, d)};
            u16u* at = out + i * stride + k;
            for (int half = 0; half < 2; ++half) {
                __m128i low = _mm_unpacklo_epi32(ab[half], cd[half]);
                __m128i high = _mm_unpackhi_epi32(ab[half], cd[half]);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(at), low);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(at + stride), _mm_unpackhi_epi64(low, low));
                _mm_storel_epi64(reinterpret_cast<__m128i*>(at + 2 * stride), high);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(at + 3 * stride), _mm_unpackhi_epi64(high, high));
                at += 4 * stride;
            }
        }
        for (; k < n_rows; ++k) {
            for (uint64_t at = i; at < i + 8; ++at) out[at * stride + k] = rows[k][at];
        }
    }
#endif
    for (; i < n; ++i) {
        for (uint32_t k = 0; k < n_rows; ++k) out[i * stride + k] = rows[k][i];
    }
}

void copy_past(void* out, const void* in, uint64_t n_bytes) { std::memcpy(out, in, n_bytes); }

void settle() {}

std::vector<Kernels> make_all() {
    std::vector<Kernels> found = {{
        "portable",
        {widen<STORED_F32>, widen<STORED_F16>, widen<STORED_BF16>},
        {nullptr, round_to_f16, round_to_bf16},
        {{choose_products<STORED_F32, false>, choose_products<STORED_F32, true>},
         {choose_products<STORED_F16, false>, choose_products<STORED_F16, true>},
         {choose_products<STORED_BF16, false>, choose_products<STORED_BF16, true>}},
        add_rows,
        {nullptr, decode_blocks<1>, decode_blocks<2>, decode_blocks<3>, decode_blocks<4>, decode_blocks<5>,
         decode_blocks<6>, decode_blocks<7>, decode_blocks<8>},
        transpose32,
        transpose16,
        copy_past,
        settle,
    }};
    add_wide_kernels(found);
    return found;
}

}  // namespace

const std::vector<Kernels>& all_kernels() {
    static const std::vector<Kernels> found = make_all();
    return found;
}

const Kernels& kernels() {
    static const Kernels& quickest = all_kernels().back();
    return quickest;
}

}  // namespace rmm
