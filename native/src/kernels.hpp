// The inner loops of reconstruction. None of them fuses a product with a sum or reorders a sum, so
// all of them give the same bits whatever they are compiled for.
#pragma once

#include <cstdint>

#include "bytes.hpp"

namespace rmm {

// out[i] = start[i] + c[0][i] · b[0][i] + … + c[n_terms − 1][i] · b[n_terms − 1][i], in that order;
// without `start` the sum begins with the first product. `start` may be `out`. n_terms is 1 to 4.
void add_products(f32u* out, const f32u* start, const f32u* const* c, const f32u* const* b, uint32_t n_terms, uint64_t n);

// As add_products, with one coefficient for all i.
void add_multiples(f32u* out, const f32u* start, const float* c, const f32u* const* b, uint32_t n_terms, uint64_t n);

// out[i] = start[i] + term[i]; `start` may be `out`.
void add_rows(f32u* out, const f32u* start, const f32u* term, uint64_t n);

// out[i] = each value rounded to nearest even.
void round_to_f16(u16u* out, const f32u* values, uint64_t n);
void round_to_bf16(u16u* out, const f32u* values, uint64_t n);

// out[i · stride + k] = rows[k][i] for i < n, k < n_rows.
void transpose32(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n);
void transpose16(u16u* out, uint64_t stride, const u16u* const* rows, uint32_t n_rows, uint64_t n);

}  // namespace rmm
