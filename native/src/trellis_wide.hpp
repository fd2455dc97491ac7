// Decoding of runs of sixteen lanes, all lanes at once, and of runs of one lane, several at once.
#pragma once

#include <vector>

#include "trellis_value.hpp"

namespace rmm {
namespace trellis {

// Decodes the next `rounds` values of each lane, of one run or of two at once. The caller has seen that
// there are words_of_value() words for each of them.
using WideLanes = Lanes<MAX_LANES>;
struct WideKernels {
    const char* name;  // of the instructions that they need
    void (*one[2])(WideLanes& lanes, uint64_t rounds);                  // by whether the row has raw bits
    void (*two[2][2])(WideLanes& a, WideLanes& b, uint64_t rounds);
    // Runs of one lane, `n` ≤ MOST_RUNS of them, each at its own place in a row of its own; or null.
    void (*runs)(Lanes<1>* const* lanes, unsigned n, uint64_t rounds);
};
constexpr unsigned MOST_RUNS = 8;

// A round with an escape, of which there is one in hundreds.
template <bool RAW>
void scalar_round(WideLanes& lanes) {
    for (unsigned lane = 0; lane < MAX_LANES; ++lane) {
        decode_value<RAW, Refill::SHIFT>(lanes.row, lanes.x[lane], lanes.s[lane], lanes.words, lanes.seen,
                                         lanes.out[lane]);
    }
}

// Those of arm64, where every processor has them; none elsewhere.
std::vector<WideKernels> neon_kernels();

// Those that this processor can run, the quickest last; none in a portable build.
const std::vector<WideKernels>& wide_kernels();

// The quickest of them, or null.
const WideKernels* widest_kernels();

// As decode() of trellis.hpp, with these kernels, or lane by lane without: the same bits.
void decode(Decoding* decodings, size_t n, const WideKernels* wide);

}  // namespace trellis
}  // namespace rmm
