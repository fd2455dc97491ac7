// What the kernels of all widths share: rows read as f32, blocks of 32 values (8.2), and the choice of
// a loop by the number of its terms.
#pragma once

#include "encoding.hpp"
#include "half.hpp"
#include "kernels.hpp"

namespace rmm {

// Bytes of a block of 32 codes of N bits behind an f16 scale.
constexpr uint64_t block_bytes(unsigned n_bits) { return 2 + 4 * n_bits; }

template <int S>
struct Values;

template <>
struct Values<STORED_F32> {
    const f32u* values;
    RMM_INLINE explicit Values(const void* row) : values(static_cast<const f32u*>(row)) {}
    RMM_INLINE float operator[](uint64_t i) const { return values[i]; }
};

template <>
struct Values<STORED_F16> {
    const u16u* values;
    RMM_INLINE explicit Values(const void* row) : values(static_cast<const u16u*>(row)) {}
    RMM_INLINE float operator[](uint64_t i) const { return float_of_f16(values[i]); }
};

template <>
struct Values<STORED_BF16> {
    const u16u* values;
    RMM_INLINE explicit Values(const void* row) : values(static_cast<const u16u*>(row)) {}
    RMM_INLINE float operator[](uint64_t i) const { return float_of_bf16(values[i]); }
};

// Defines choose_products<S, ONE>, which calls LOOP<S, ONE, N, FROM> with what it is told.
#define RMM_CHOOSE_PRODUCTS(TARGET, LOOP)                                                                          \
    template <int S, bool ONE, Start FROM>                                                                         \
    TARGET void choose_terms(f32u* out, const void* start, const f32u* const* c, const void* const* b,             \
                             uint32_t n_terms, uint64_t n) {                                                       \
        switch (n_terms) {                                                                                         \
            case 1: return LOOP<S, ONE, 1, FROM>(out, start, c, b, n);                                             \
            case 2: return LOOP<S, ONE, 2, FROM>(out, start, c, b, n);                                             \
            case 3: return LOOP<S, ONE, 3, FROM>(out, start, c, b, n);                                             \
            default: return LOOP<S, ONE, 4, FROM>(out, start, c, b, n);                                            \
        }                                                                                                          \
    }                                                                                                              \
    template <int S, bool ONE>                                                                                     \
    TARGET void choose_products(f32u* out, Start from, const void* start, const f32u* const* c,                    \
                                const void* const* b, uint32_t n_terms, uint64_t n) {                              \
        switch (from) {                                                                                            \
            case Start::PRODUCT: return choose_terms<S, ONE, Start::PRODUCT>(out, start, c, b, n_terms, n);        \
            case Start::SUM: return choose_terms<S, ONE, Start::SUM>(out, start, c, b, n_terms, n);                \
            default: return choose_terms<S, ONE, Start::STORED>(out, start, c, b, n_terms, n);                     \
        }                                                                                                          \
    }

}  // namespace rmm
