// Hand-written kernels: AVX2 and AVX-512 by what the processor has, NEON wherever there is one.
#include <algorithm>

#include "blocks.hpp"

// By function attributes, so that one build serves every processor.
#if defined(__x86_64__) && defined(__GNUC__) && \
    (!defined(RMM_PORTABLE) || defined(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION))
#include <cpuid.h>
#include <immintrin.h>
#if !defined(__clang__)  // GCC up to 12 takes its own header's "undefined" for a mistake of the caller's
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define RMM_WIDE_X86 1
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(RMM_PORTABLE)
#include <arm_neon.h>
#define RMM_WIDE_NEON 1
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

namespace rmm {
namespace {

#if RMM_WIDE_X86

// --- blocks of 1 to 7 bits ----------------------------------------------------------------------

// Sixteen codes are 2 N bytes, which are loaded as 16. Each lane of 32 bits takes the two bytes that its
// code is in, to bits 8 … 23, and moves them so that the code starts at bit 1: doubled, as levels are.
template <unsigned N>
struct Lanes {
    alignas(64) uint8_t bytes[64];
    alignas(64) uint32_t shift[16];
    constexpr Lanes() : bytes(), shift() {
        for (unsigned v = 0; v < 16; ++v) {
            bytes[4 * v] = bytes[4 * v + 3] = 0x80;  // zero
            bytes[4 * v + 1] = static_cast<uint8_t>(v * N / 8);
            bytes[4 * v + 2] = static_cast<uint8_t>(v * N / 8 + 1);
            shift[v] = v * N % 8 + 7;
        }
    }
};
template <unsigned N>
constexpr Lanes<N> LANES;

// Calls the loop `blocks<N>(block, n_blocks, out)` for what of a row it may read 16 bytes of at any code;
// the rest, and a block that is not whole, from and to memory of its own.
#define RMM_DECODE_BLOCKS(TARGET, BLOCKS)                                                            \
    template <unsigned N>                                                                            \
    TARGET void decode_blocks(const uint8_t* row, uint64_t first, uint64_t n, f32u* out) {           \
        constexpr uint64_t BYTES = block_bytes(N), READ = 2 + 2 * N + 16;                            \
        const uint8_t* block = row + first / BLOCK * BYTES;                                          \
        const uint64_t n_bytes = ceil_div(n, BLOCK) * BYTES;                                         \
        uint64_t n_quick = n_bytes < READ ? 0 : (n_bytes - READ) / BYTES + 1;                        \
        if (n_quick > n / BLOCK) n_quick = n / BLOCK;                                                \
        BLOCKS<N>(block, n_quick, out);                                                              \
        for (uint64_t at = n_quick; at * BLOCK < n; ++at) {                                          \
            uint8_t bytes[64] = {0};                                                                 \
            float values[BLOCK];                                                                     \
            std::memcpy(bytes, block + at * BYTES, BYTES);                                           \
            BLOCKS<N>(bytes, 1, values);                                                             \
            const uint64_t left = n - at * BLOCK;                                                    \
            std::memcpy(out + at * BLOCK, values, 4 * (left < BLOCK ? left : BLOCK));                \
        }                                                                                            \
    }                                                                                                \
    TARGET void set_blocks(Kernels& kernels) {                                                       \
        kernels.decode_blocks[1] = decode_blocks<1>;                                                 \
        kernels.decode_blocks[2] = decode_blocks<2>;                                                 \
        kernels.decode_blocks[3] = decode_blocks<3>;                                                 \
        kernels.decode_blocks[4] = decode_blocks<4>;                                                 \
        kernels.decode_blocks[5] = decode_blocks<5>;                                                 \
        kernels.decode_blocks[6] = decode_blocks<6>;                                                 \
        kernels.decode_blocks[7] = decode_blocks<7>;                                                 \
        kernels.decode_blocks[8] = decode_blocks<8>;                                                 \
    }

RMM_INLINE const __m128i* m128(const void* at) { return static_cast<const __m128i*>(at); }
RMM_INLINE const __m256i* m256(const void* at) { return static_cast<const __m256i*>(at); }

void settle() { _mm_sfence(); }

bool has_f16c() {
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// --- AVX2 ---------------------------------------------------------------------------------------

namespace avx2 {
#define RMM_TARGET __attribute__((target("avx2,f16c")))

struct V {
    static constexpr uint64_t LANES = 8;
    typedef __m256 F;
    RMM_TARGET RMM_INLINE static F load(const f32u* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
    RMM_TARGET RMM_INLINE static F load_f16(const u16u* at) { return _mm256_cvtph_ps(_mm_loadu_si128(m128(at))); }
    RMM_TARGET RMM_INLINE static F load_bf16(const u16u* at) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(m128(at))), 16));
    }
    RMM_TARGET RMM_INLINE static F all(float value) { return _mm256_set1_ps(value); }
    RMM_TARGET RMM_INLINE static F add(F a, F b) { return _mm256_add_ps(a, b); }
    RMM_TARGET RMM_INLINE static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    RMM_TARGET RMM_INLINE static void store(f32u* at, F values) { _mm256_storeu_ps(reinterpret_cast<float*>(at), values); }
    RMM_TARGET RMM_INLINE static void store_f16(u16u* at, F values) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    }
    RMM_TARGET RMM_INLINE static void store_bf16(u16u* at, F values) {
        const __m256i bits = _mm256_castps_si256(values), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
        const __m256i halves = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(packed));
    }
    RMM_TARGET RMM_INLINE static void prefetch(const char* at) { _mm_prefetch(at, _MM_HINT_T1); }
};

RMM_TARGET RMM_INLINE void put(void* at, __m256i values, bool past) {
    if (past) {
        _mm256_stream_si256(static_cast<__m256i*>(at), values);
    } else {
        _mm256_storeu_si256(static_cast<__m256i*>(at), values);
    }
}

RMM_TARGET RMM_INLINE __m256i two_halves(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(m128(low))), _mm_loadu_si128(m128(high)), 1);
}

// Eight rows at four positions.
RMM_TARGET RMM_INLINE void transpose_8x4(u32u* out, uint64_t stride, const u32u* const* rows, uint64_t i, bool past) {
    const __m256i a = two_halves(rows[0] + i, rows[4] + i), b = two_halves(rows[1] + i, rows[5] + i);
    const __m256i c = two_halves(rows[2] + i, rows[6] + i), d = two_halves(rows[3] + i, rows[7] + i);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const __m256i ef = _mm256_unpackhi_epi32(a, b), gh = _mm256_unpackhi_epi32(c, d);
    put(out, _mm256_unpacklo_epi64(ab, cd), past);
    put(out + stride, _mm256_unpackhi_epi64(ab, cd), past);
    put(out + 2 * stride, _mm256_unpacklo_epi64(ef, gh), past);
    put(out + 3 * stride, _mm256_unpackhi_epi64(ef, gh), past);
}

template <uint32_t ROWS, bool PAST>
RMM_TARGET void transpose32_of(u32u* out, uint64_t stride, const u32u* const* rows, uint64_t n) {
    for (uint64_t i = 0; i < n; i += 4) {
        for (uint32_t k = 0; k < ROWS; ++k) {
            if (i % 16 == 0) V::prefetch(reinterpret_cast<const char*>(rows[k] + i + 64));
        }
        for (uint32_t k = 0; k < ROWS; k += 8) transpose_8x4(out + i * stride + k, stride, rows + k, i, PAST);
    }
}

RMM_TARGET void transpose32(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n, bool past) {
    const uint64_t whole = n_rows == 16 || n_rows == 8 ? n / 4 * 4 : 0;
    if (whole > 0) {
        if (n_rows == 16) {
            past ? transpose32_of<16, true>(out, stride, rows, whole) : transpose32_of<16, false>(out, stride, rows, whole);
        } else {
            past ? transpose32_of<8, true>(out, stride, rows, whole) : transpose32_of<8, false>(out, stride, rows, whole);
        }
        if (whole == n) return;
    }
    const u32u* rest[PANEL_ROWS];
    for (uint32_t k = 0; k < n_rows; ++k) rest[k] = rows[k] + whole;
    all_kernels().front().transpose32(out + whole * stride, stride, rest, n_rows, n - whole, false);
}

// Sixteen rows at eight positions: rows k and k + 8 are halves of one vector.
template <bool PAST>
RMM_TARGET void transpose16_of(u16u* out, uint64_t stride, const u16u* const* rows, uint64_t n) {
    for (uint64_t i = 0; i < n; i += 8) {
        __m256i r[8], s[8];
        for (uint32_t k = 0; k < 8; ++k) r[k] = two_halves(rows[k] + i, rows[k + 8] + i);
        for (uint32_t k = 0; k < 16; ++k) {
            if (i % 32 == 0) V::prefetch(reinterpret_cast<const char*>(rows[k] + i + 128));
        }
        for (uint32_t k = 0; k < 8; k += 2) {
            s[k] = _mm256_unpacklo_epi16(r[k], r[k + 1]);
            s[k + 1] = _mm256_unpackhi_epi16(r[k], r[k + 1]);
        }
        for (uint32_t k = 0; k < 8; k += 4) {
            r[k] = _mm256_unpacklo_epi32(s[k], s[k + 2]);
            r[k + 1] = _mm256_unpackhi_epi32(s[k], s[k + 2]);
            r[k + 2] = _mm256_unpacklo_epi32(s[k + 1], s[k + 3]);
            r[k + 3] = _mm256_unpackhi_epi32(s[k + 1], s[k + 3]);
        }
        for (uint32_t k = 0; k < 4; ++k) {
            put(out + (i + 2 * k) * stride, _mm256_unpacklo_epi64(r[k], r[k + 4]), PAST);
            put(out + (i + 2 * k + 1) * stride, _mm256_unpackhi_epi64(r[k], r[k + 4]), PAST);
        }
    }
}

RMM_TARGET void transpose16(u16u* out, uint64_t stride, const u16u* const* rows, uint32_t n_rows, uint64_t n, bool past) {
    const uint64_t whole = n_rows == 16 ? n / 8 * 8 : 0;
    if (whole > 0) {
        past ? transpose16_of<true>(out, stride, rows, whole) : transpose16_of<false>(out, stride, rows, whole);
        if (whole == n) return;
    }
    const u16u* rest[PANEL_ROWS];
    for (uint32_t k = 0; k < n_rows; ++k) rest[k] = rows[k] + whole;
    all_kernels().front().transpose16(out + whole * stride, stride, rest, n_rows, n - whole, false);
}

RMM_TARGET void copy_past(void* out, const void* in, uint64_t n_bytes) {
    char* to = static_cast<char*>(out);
    const char* from = static_cast<const char*>(in);
    const uint64_t head = std::min<uint64_t>((0 - reinterpret_cast<uintptr_t>(to)) & 63, n_bytes);
    std::memcpy(to, from, head);
    uint64_t i = head;
    for (; i + 64 <= n_bytes; i += 64) {
        const __m256i a = _mm256_loadu_si256(m256(from + i)), b = _mm256_loadu_si256(m256(from + i + 32));
        V::prefetch(from + i + 1024);
        put(to + i, a, true);
        put(to + i + 32, b, true);
    }
    std::memcpy(to + i, from + i, n_bytes - i);
}

// Levels of sixteen codes, eight in each vector.
template <unsigned N>
RMM_TARGET RMM_INLINE void levels(const uint8_t* block, unsigned half, __m256i* found) {
    if (N == 8 || N == 4) {
        __m128i bytes;
        if (N == 8) {
            bytes = _mm_loadu_si128(m128(block + 2 + 16 * half));
        } else {
            bytes = _mm_loadu_si128(m128(block + 2));
            if (half == 1) bytes = _mm_srli_epi16(bytes, 4);
            bytes = _mm_sub_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi8(8));
        }
        found[0] = _mm256_cvtepi8_epi32(bytes);
        found[1] = _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8));
        return;
    }
    constexpr int MASK = (1 << N) - 1;
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(m128(block + 2 + 2 * N * half)));
    for (unsigned i = 0; i < 2; ++i) {
        __m256i code = _mm256_shuffle_epi8(bytes, _mm256_load_si256(m256(LANES<N>.bytes) + i));
        code = _mm256_srlv_epi32(code, _mm256_load_si256(m256(LANES<N>.shift) + i));
        code = _mm256_and_si256(code, _mm256_set1_epi32(2 * MASK));
        found[i] = _mm256_sub_epi32(code, _mm256_set1_epi32(MASK));
    }
}

template <unsigned N>
RMM_TARGET RMM_INLINE void blocks(const uint8_t* block, uint64_t n_blocks, f32u* out) {
    for (uint64_t i = 0; i < n_blocks; ++i, block += block_bytes(N), out += BLOCK) {
        const __m256 scale = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(u16(block))));
        for (unsigned half = 0; half < 2; ++half) {
            __m256i found[2];
            levels<N>(block, half, found);
            V::store(out + 16 * half, V::mul(scale, _mm256_cvtepi32_ps(found[0])));
            V::store(out + 16 * half + 8, V::mul(scale, _mm256_cvtepi32_ps(found[1])));
        }
    }
}

RMM_DECODE_BLOCKS(RMM_TARGET, blocks)

#include "kernels_wide.inc"

#undef RMM_TARGET
}  // namespace avx2

// --- AVX-512 ------------------------------------------------------------------------------------

namespace avx512 {
#define RMM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,f16c")))

struct V {
    static constexpr uint64_t LANES = 16;
    typedef __m512 F;
    RMM_TARGET RMM_INLINE static F load(const f32u* at) { return _mm512_loadu_ps(at); }
    RMM_TARGET RMM_INLINE static F load_f16(const u16u* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(m256(at))); }
    RMM_TARGET RMM_INLINE static F load_bf16(const u16u* at) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(m256(at))), 16));
    }
    RMM_TARGET RMM_INLINE static F all(float value) { return _mm512_set1_ps(value); }
    RMM_TARGET RMM_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
    RMM_TARGET RMM_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    RMM_TARGET RMM_INLINE static void store(f32u* at, F values) { _mm512_storeu_ps(at, values); }
    RMM_TARGET RMM_INLINE static void store_f16(u16u* at, F values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    }
    RMM_TARGET RMM_INLINE static void store_bf16(u16u* at, F values) {
        const __m512i bits = _mm512_castps_si512(values), high = _mm512_srli_epi32(bits, 16);
        const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        const __m512i halves = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(halves));
    }
    RMM_TARGET RMM_INLINE static void prefetch(const char* at) { _mm_prefetch(at, _MM_HINT_T1); }
};

// Sixteen rows at sixteen positions: pairs, fours, and then quarters of vectors, twice.
template <bool PAST>
RMM_TARGET void transpose32_of(u32u* out, uint64_t stride, const u32u* const* rows, uint64_t n) {
    for (uint64_t i = 0; i < n; i += 16) {
        __m512i r[16], s[16];
        for (uint32_t k = 0; k < 16; ++k) {
            r[k] = _mm512_loadu_si512(rows[k] + i);
            V::prefetch(reinterpret_cast<const char*>(rows[k] + i + 64));
        }
        for (uint32_t k = 0; k < 16; k += 2) {
            s[k] = _mm512_unpacklo_epi32(r[k], r[k + 1]);
            s[k + 1] = _mm512_unpackhi_epi32(r[k], r[k + 1]);
        }
        for (uint32_t k = 0; k < 16; k += 4) {  // r[k + j]: rows k … k + 3 at positions j, j + 4, j + 8, j + 12
            r[k] = _mm512_unpacklo_epi64(s[k], s[k + 2]);
            r[k + 1] = _mm512_unpackhi_epi64(s[k], s[k + 2]);
            r[k + 2] = _mm512_unpacklo_epi64(s[k + 1], s[k + 3]);
            r[k + 3] = _mm512_unpackhi_epi64(s[k + 1], s[k + 3]);
        }
        for (uint32_t j = 0; j < 4; ++j) {
            const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xEE);
            const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
            const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xEE);
            s[j] = _mm512_shuffle_i32x4(a, c, 0x88);
            s[j + 4] = _mm512_shuffle_i32x4(a, c, 0xDD);
            s[j + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
            s[j + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
        }
        for (uint32_t j = 0; j < 16; ++j) {
            u32u* at = out + (i + j) * stride;
            if (PAST) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(at), s[j]);
            } else {
                _mm512_storeu_si512(at, s[j]);
            }
        }
    }
}

RMM_TARGET void transpose32(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n, bool past) {
    const uint64_t whole = n_rows == 16 ? n / 16 * 16 : 0;
    if (whole > 0) {
        past ? transpose32_of<true>(out, stride, rows, whole) : transpose32_of<false>(out, stride, rows, whole);
        if (whole == n) return;
    }
    const u32u* rest[PANEL_ROWS];
    for (uint32_t k = 0; k < n_rows; ++k) rest[k] = rows[k] + whole;
    avx2::transpose32(out + whole * stride, stride, rest, n_rows, n - whole, past);
}

using avx2::transpose16;

RMM_TARGET void copy_past(void* out, const void* in, uint64_t n_bytes) {
    char* to = static_cast<char*>(out);
    const char* from = static_cast<const char*>(in);
    const uint64_t head = std::min<uint64_t>((0 - reinterpret_cast<uintptr_t>(to)) & 63, n_bytes);
    std::memcpy(to, from, head);
    uint64_t i = head;
    for (; i + 64 <= n_bytes; i += 64) {
        V::prefetch(from + i + 1024);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
    std::memcpy(to + i, from + i, n_bytes - i);
}

template <unsigned N>
RMM_TARGET RMM_INLINE __m512i levels(const uint8_t* block, unsigned half) {
    if (N == 8) return _mm512_cvtepi8_epi32(_mm_loadu_si128(m128(block + 2 + 16 * half)));
    if (N == 4) {
        __m128i bytes = _mm_loadu_si128(m128(block + 2));
        if (half == 1) bytes = _mm_srli_epi16(bytes, 4);
        return _mm512_cvtepi8_epi32(_mm_sub_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi8(8)));
    }
    constexpr int MASK = (1 << N) - 1;
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(m128(block + 2 + 2 * N * half)));
    __m512i code = _mm512_shuffle_epi8(bytes, _mm512_load_si512(LANES<N>.bytes));
    code = _mm512_srlv_epi32(code, _mm512_load_si512(LANES<N>.shift));
    code = _mm512_and_si512(code, _mm512_set1_epi32(2 * MASK));
    return _mm512_sub_epi32(code, _mm512_set1_epi32(MASK));
}

template <unsigned N>
RMM_TARGET RMM_INLINE void blocks(const uint8_t* block, uint64_t n_blocks, f32u* out) {
    for (uint64_t i = 0; i < n_blocks; ++i, block += block_bytes(N), out += BLOCK) {
        const __m512 scale = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(u16(block))));
        V::store(out, V::mul(scale, _mm512_cvtepi32_ps(levels<N>(block, 0))));
        V::store(out + 16, V::mul(scale, _mm512_cvtepi32_ps(levels<N>(block, 1))));
    }
}

RMM_DECODE_BLOCKS(RMM_TARGET, blocks)

#include "kernels_wide.inc"

#undef RMM_TARGET
}  // namespace avx512

#elif RMM_WIDE_NEON

namespace neon {
#define RMM_TARGET

struct V {
    static constexpr uint64_t LANES = 4;
    typedef float32x4_t F;
    RMM_INLINE static uint16x4_t halves(const u16u* at) { return vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(at))); }
    RMM_INLINE static F load(const f32u* at) { return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(at))); }
    RMM_INLINE static F load_f16(const u16u* at) { return vcvt_f32_f16(vreinterpret_f16_u16(halves(at))); }
    RMM_INLINE static F load_bf16(const u16u* at) { return vreinterpretq_f32_u32(vshll_n_u16(halves(at), 16)); }
    RMM_INLINE static F all(float value) { return vdupq_n_f32(value); }
    RMM_INLINE static F add(F a, F b) { return vaddq_f32(a, b); }
    RMM_INLINE static F mul(F a, F b) { return vmulq_f32(a, b); }
    RMM_INLINE static void store(f32u* at, F values) { vst1q_u8(reinterpret_cast<uint8_t*>(at), vreinterpretq_u8_f32(values)); }
    RMM_INLINE static void store(u16u* at, uint16x4_t values) { vst1_u8(reinterpret_cast<uint8_t*>(at), vreinterpret_u8_u16(values)); }
    RMM_INLINE static void store_f16(u16u* at, F values) { store(at, vreinterpret_u16_f16(vcvt_f16_f32(values))); }
    RMM_INLINE static void store_bf16(u16u* at, F values) {
        const uint32x4_t bits = vreinterpretq_u32_f32(values), high = vshrq_n_u32(bits, 16);
        const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
        const uint32x4_t number = vceqq_f32(values, values);
        store(at, vmovn_u32(vbslq_u32(number, rounded, vorrq_u32(high, vdupq_n_u32(0x40)))));
    }
    RMM_INLINE static void prefetch(const char* at) { __builtin_prefetch(at, 0, 2); }
};

// Eight rows at eight positions.
RMM_INLINE void transpose_8x8(u16u* out, uint64_t stride, const u16u* const* rows, uint64_t i) {
    uint16x8_t r[8];
    uint32x4_t s[8];
    for (uint32_t k = 0; k < 8; ++k) r[k] = vreinterpretq_u16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(rows[k] + i)));
    for (uint32_t k = 0; k < 8; k += 2) {
        s[k] = vreinterpretq_u32_u16(vzip1q_u16(r[k], r[k + 1]));
        s[k + 1] = vreinterpretq_u32_u16(vzip2q_u16(r[k], r[k + 1]));
    }
    for (uint32_t half = 0; half < 2; ++half) {  // positions 0 … 3, 4 … 7
        const uint64x2_t a = vreinterpretq_u64_u32(vzip1q_u32(s[half], s[2 + half]));
        const uint64x2_t b = vreinterpretq_u64_u32(vzip2q_u32(s[half], s[2 + half]));
        const uint64x2_t c = vreinterpretq_u64_u32(vzip1q_u32(s[4 + half], s[6 + half]));
        const uint64x2_t d = vreinterpretq_u64_u32(vzip2q_u32(s[4 + half], s[6 + half]));
        const uint64x2_t found[4] = {vzip1q_u64(a, c), vzip2q_u64(a, c), vzip1q_u64(b, d), vzip2q_u64(b, d)};
        for (uint32_t j = 0; j < 4; ++j) {
            vst1q_u8(reinterpret_cast<uint8_t*>(out + (4 * half + j) * stride), vreinterpretq_u8_u64(found[j]));
        }
    }
}

RMM_INLINE void transpose_4x4(u32u* out, uint64_t stride, const u32u* const* rows, uint64_t i) {
    uint32x4_t r[4];
    for (uint32_t k = 0; k < 4; ++k) r[k] = vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(rows[k] + i)));
    const uint64x2_t a = vreinterpretq_u64_u32(vzip1q_u32(r[0], r[1])), b = vreinterpretq_u64_u32(vzip2q_u32(r[0], r[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vzip1q_u32(r[2], r[3])), d = vreinterpretq_u64_u32(vzip2q_u32(r[2], r[3]));
    const uint64x2_t found[4] = {vzip1q_u64(a, c), vzip2q_u64(a, c), vzip1q_u64(b, d), vzip2q_u64(b, d)};
    for (uint32_t j = 0; j < 4; ++j) {
        vst1q_u8(reinterpret_cast<uint8_t*>(out + j * stride), vreinterpretq_u8_u64(found[j]));
    }
}

void transpose32(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n, bool) {
    uint64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint32_t k = 0;
        for (; k + 4 <= n_rows; k += 4) transpose_4x4(out + i * stride + k, stride, rows + k, i);
        for (; k < n_rows; ++k) {
            for (uint64_t at = i; at < i + 4; ++at) out[at * stride + k] = rows[k][at];
        }
    }
    for (; i < n; ++i) {
        for (uint32_t k = 0; k < n_rows; ++k) out[i * stride + k] = rows[k][i];
    }
}

void transpose16(u16u* out, uint64_t stride, const u16u* const* rows, uint32_t n_rows, uint64_t n, bool) {
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint32_t k = 0;
        for (; k + 8 <= n_rows; k += 8) transpose_8x8(out + i * stride + k, stride, rows + k, i);
        for (; k < n_rows; ++k) {
            for (uint64_t at = i; at < i + 8; ++at) out[at * stride + k] = rows[k][at];
        }
    }
    for (; i < n; ++i) {
        for (uint32_t k = 0; k < n_rows; ++k) out[i * stride + k] = rows[k][i];
    }
}

#include "kernels_wide.inc"

#undef RMM_TARGET
}  // namespace neon

#endif

}  // namespace

void add_wide_kernels(std::vector<Kernels>& found) {
#if RMM_WIDE_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !has_f16c()) return;
    Kernels narrow = avx2::make("avx2", found.front());
    avx2::set_blocks(narrow);
    narrow.copy_past = avx2::copy_past;
    narrow.settle = settle;
    found.push_back(narrow);
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return;
    Kernels wide = avx512::make("avx512", narrow);
    avx512::set_blocks(wide);
    wide.copy_past = avx512::copy_past;
    found.push_back(wide);
#elif RMM_WIDE_NEON
    found.push_back(neon::make("neon", found.front()));
#else
    (void)found;
#endif
}

}  // namespace rmm
