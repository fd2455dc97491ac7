// The inner loops of reconstruction, for each width of vectors that the processor has. None of them
// fuses a product with a sum or reorders a sum, so all give the same bits: of everything that only
// moves or converts, NaNs included; of sums, but for the bits of NaNs.
#pragma once

#include <cstdint>
#include <vector>

#include "bytes.hpp"

namespace rmm {

constexpr uint64_t TILE = 512;        // positions that are worked on at once; a multiple of 32
constexpr uint32_t PANEL_ROWS = 16;   // rows that are transposed at once
constexpr uint32_t TERMS = 4;         // products that are added at once

// How the numbers of a row are stored that need no more than widening.
enum Stored : int { STORED_F32, STORED_F16, STORED_BF16, N_STORED };

// What a sum starts with: its first product; a row of f32; a row stored as the basis is.
enum class Start : int { PRODUCT, SUM, STORED };

struct Kernels {
    const char* name;  // of the instructions that they need

    // out[i] = each value as f32, exactly; a NaN becomes quiet where it comes from f16, as processors do.
    void (*widen[N_STORED])(f32u* out, const void* values, uint64_t n);

    // out[i] = each value rounded to nearest even; by Stored, none for f32.
    void (*narrow[N_STORED])(u16u* out, const f32u* values, uint64_t n);

    // out[i] = start[i] + c[0][i] · b[0][i] + … + c[n_terms − 1][i] · b[n_terms − 1][i], in that order,
    // n_terms being 1 to TERMS; by how the rows b are stored, and by whether each c is one number for
    // all i. `start` may be `out`. What is read of b is a stream: that of the next tile is asked for.
    void (*add_products[N_STORED][2])(f32u* out, Start from, const void* start, const f32u* const* c,
                                      const void* const* b, uint32_t n_terms, uint64_t n);

    // out[i] = start[i] + term[i]; `start` may be `out`.
    void (*add_rows)(f32u* out, const f32u* start, const f32u* term, uint64_t n);

    // Values first … first + n − 1 of a row of blocks with codes of 1 to 8 bits; `first` is a multiple
    // of 32 (8.2).
    void (*decode_blocks[9])(const uint8_t* row, uint64_t first, uint64_t n, f32u* out);

    // out[i · stride + k] = rows[k][i] for i < n, k < n_rows. With `past`, which asks that `out` be
    // aligned to 64 and a position take whole lines or divide one, the output goes past the caches.
    void (*transpose32)(u32u* out, uint64_t stride, const u32u* const* rows, uint32_t n_rows, uint64_t n, bool past);
    void (*transpose16)(u16u* out, uint64_t stride, const u16u* const* rows, uint32_t n_rows, uint64_t n, bool past);

    // A copy that goes past the caches.
    void (*copy_past)(void* out, const void* in, uint64_t n_bytes);

    // What went past the caches is seen by other threads when what follows is.
    void (*settle)();
};

// Those that this processor can run, "portable" first and the quickest last.
const std::vector<Kernels>& all_kernels();

// The quickest of them.
const Kernels& kernels();

// The hand-written ones of this processor, quickest last, made out of the portable ones.
void add_wide_kernels(std::vector<Kernels>& found);

// Output of at least so many bytes goes past the caches, which it would not stay in: a store that does
// not reads its line first, half as many bytes again as a copy moves. A constant, since what systems
// tell of caches is of all cores together, or of a machine that a virtual one has a part of.
constexpr uint64_t PAST_CACHES_BYTES = 32 << 20;

}  // namespace rmm
