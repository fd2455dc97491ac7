// Decoding of runs of sixteen lanes, all lanes at once.
#pragma once

#include <vector>

#include "trellis_value.hpp"

namespace rmm {
namespace trellis {

// Decodes `rounds` values of each of the sixteen lanes with entropy states x and trellis states s into
// out[round · 16 + lane]. The caller has seen that there are words_of_value() words for each of them.
using WideRounds = void (*)(const RowCode& code, f32u* out, uint64_t rounds, uint32_t* x, uint32_t* s, Words& words,
                            uint32_t& seen);

struct WideKernels {
    const char* name;  // of the instructions that they need
    WideRounds plain;  // of rows without raw bits
    WideRounds raw;
};

// Those that this processor can run, the quickest last; none in a portable build.
const std::vector<WideKernels>& wide_kernels();

// The quickest of them, or null.
const WideKernels* widest_kernels();

// As decode() of trellis.hpp, with these kernels, or lane by lane without: the same bits.
const char* decode(const Run& run, const RowTarget& target, const WideKernels* wide);

}  // namespace trellis
}  // namespace rmm
