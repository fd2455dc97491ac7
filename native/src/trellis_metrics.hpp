// One value's step of the search for the best path, for all 256 states at once.
//
// Without an input a state o is followed by N(o) = (o >> 1) ^ (o & 1 ? FEEDBACK : 0), which is linear
// over GF(2) and can be undone. The metric of state s before value i is kept at position N^-i(s). So a
// new state's metric has the place of the one that it comes from with z1 = 0, and the one that it
// comes from with z1 = 1 is at that position ^ d for one d, the same for all states: metrics are
// updated in place, and vectors of them exchange elements at most.
#pragma once

#include <vector>

#include "trellis.hpp"

namespace rmm {
namespace trellis {

constexpr unsigned N_STATES = 256;

// What depends on the number of a value, modulo PERIOD.
struct Step {
    uint8_t partner = 0;    // d
    uint8_t parity = 0;     // z0 of the states that lead to a position: the parity of position & this
    uint8_t column[8] = {};  // of N^-i: where the states 1, 2, 4, … are before the value
};
constexpr unsigned PERIOD = 255;  // N^255 is the identity

struct Steps {
    Step of[PERIOD];
    constexpr Steps() : of() {
        uint8_t column[8] = {1, 2, 4, 8, 16, 32, 64, 128}, forward[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        uint8_t partner = INPUT;
        for (Step& step : of) {
            partner = before(partner);
            step.partner = partner;
            for (unsigned bit = 0; bit < 8; ++bit) {
                forward[bit] = static_cast<uint8_t>(forward[bit] >> 1 ^ (forward[bit] & 1 ? FEEDBACK : 0));
                step.parity = static_cast<uint8_t>(step.parity | (forward[bit] >> 7) << bit);
                step.column[bit] = column[bit];
                column[bit] = before(column[bit]);
            }
        }
    }
    static constexpr uint8_t before(uint8_t state) {
        const unsigned odd = state >> 7;
        return static_cast<uint8_t>((state ^ (odd ? FEEDBACK : 0)) << 1 | odd);
    }
};
inline constexpr Steps STEPS;

inline unsigned parity_of(unsigned x) {
    x ^= x >> 4;
    return 0x6996u >> (x & 15) & 1;
}

// Where a state's metric is before value i.
inline unsigned place_of(unsigned state, uint64_t i) {
    unsigned place = 0;
    for (unsigned bit = 0; bit < 8; ++bit) place ^= state >> bit & 1 ? STEPS.of[i % PERIOD].column[bit] : 0u;
    return place;
}

// Takes `metrics` from before value i to behind value i + n − 1. cost[c][k] is that of class
// c = 2 · z0 + z1 for value i + k. Of each new state the better path is kept, of equal ones that with
// z1 = 0; `taken` gets a bit for each position, 32 bytes a value: z1.
struct SearchKernels {
    const char* name;  // of the instructions that they need
    void (*advance)(float* metrics, const float* const* cost, uint64_t i, uint64_t n, uint8_t* taken);
};

// Those that this processor can run, the quickest last; the first one is portable.
const std::vector<SearchKernels>& search_kernels();

// As search() of trellis.hpp, with these kernels: the same bits.
void search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes, uint32_t* indices,
            float* multiples, const SearchKernels& kernels);

}  // namespace trellis
}  // namespace rmm
