#include "kernels.hpp"

#include <cfloat>

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

template <uint32_t N, bool START>
RMM_INLINE void products(f32u* out, const f32u* start, const f32u* const* c, const f32u* const* b, uint64_t n) {
    const f32u *c0 = c[0], *b0 = b[0];
    const f32u *c1 = N > 1 ? c[1] : c0, *b1 = N > 1 ? b[1] : b0;
    const f32u *c2 = N > 2 ? c[2] : c0, *b2 = N > 2 ? b[2] : b0;
    const f32u *c3 = N > 3 ? c[3] : c0, *b3 = N > 3 ? b[3] : b0;
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) {
        float sum = c0[i] * b0[i];
        if (START) sum = start[i] + sum;
        if (N > 1) sum = sum + c1[i] * b1[i];
        if (N > 2) sum = sum + c2[i] * b2[i];
        if (N > 3) sum = sum + c3[i] * b3[i];
        out[i] = sum;
    }
}

template <uint32_t N, bool START>
RMM_INLINE void multiples(f32u* out, const f32u* start, const float* c, const f32u* const* b, uint64_t n) {
    const float c0 = c[0], c1 = N > 1 ? c[1] : 0, c2 = N > 2 ? c[2] : 0, c3 = N > 3 ? c[3] : 0;
    const f32u* b0 = b[0];
    const f32u* b1 = N > 1 ? b[1] : b0;
    const f32u* b2 = N > 2 ? b[2] : b0;
    const f32u* b3 = N > 3 ? b[3] : b0;
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) {
        float sum = c0 * b0[i];
        if (START) sum = start[i] + sum;
        if (N > 1) sum = sum + c1 * b1[i];
        if (N > 2) sum = sum + c2 * b2[i];
        if (N > 3) sum = sum + c3 * b3[i];
        out[i] = sum;
    }
}

}  // namespace

RMM_CLONES
void add_products(f32u* out, const f32u* start, const f32u* const* c, const f32u* const* b, uint32_t n_terms, uint64_t n) {
    if (start) {
        switch (n_terms) {
            case 1: return products<1, true>(out, start, c, b, n);
            case 2: return products<2, true>(out, start, c, b, n);
            case 3: return products<3, true>(out, start, c, b, n);
            default: return products<4, true>(out, start, c, b, n);
        }
    }
    switch (n_terms) {
        case 1: return products<1, false>(out, start, c, b, n);
        case 2: return products<2, false>(out, start, c, b, n);
        case 3: return products<3, false>(out, start, c, b, n);
        default: return products<4, false>(out, start, c, b, n);
    }
}

RMM_CLONES
void add_multiples(f32u* out, const f32u* start, const float* c, const f32u* const* b, uint32_t n_terms, uint64_t n) {
    if (start) {
        switch (n_terms) {
            case 1: return multiples<1, true>(out, start, c, b, n);
            case 2: return multiples<2, true>(out, start, c, b, n);
            case 3: return multiples<3, true>(out, start, c, b, n);
            default: return multiples<4, true>(out, start, c, b, n);
        }
    }
    switch (n_terms) {
        case 1: return multiples<1, false>(out, start, c, b, n);
        case 2: return multiples<2, false>(out, start, c, b, n);
        case 3: return multiples<3, false>(out, start, c, b, n);
        default: return multiples<4, false>(out, start, c, b, n);
    }
}

RMM_CLONES
void add_rows(f32u* out, const f32u* start, const f32u* term, uint64_t n) {
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = start[i] + term[i];
}

RMM_CLONES
void round_to_f16(u16u* out, const f32u* values, uint64_t n) {
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = f16_of_float(values[i]);
}

RMM_CLONES
void round_to_bf16(u16u* out, const f32u* values, uint64_t n) {
    RMM_IVDEP
    for (uint64_t i = 0; i < n; ++i) out[i] = bf16_of_float(values[i]);
}

void transpose32(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n) {
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

void transpose16(u16u* out, uint64_t stride, const u16u* const* rows, uint32_t n_rows, uint64_t n) {
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

}  // namespace rmm
