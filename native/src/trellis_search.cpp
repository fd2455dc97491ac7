// The search for the best path through the trellis (the Viterbi algorithm), 256 states at once.
//
// A lane's values are searched one after another. Of each value there are four candidates: an odd m is
// 1, 5, 7 or 3 modulo 8, which is told by the bits z0 (the lowest of the state before it) and z1 (what
// goes into the next state). Class c = 2 · z0 + z1.

#include <algorithm>
#include <memory>

#include "trellis_metrics.hpp"

namespace rmm {
namespace trellis {
namespace {

constexpr int32_t SMALLEST[4] = {1, -3, -1, 3};  // the m of each class that is nearest to zero
constexpr uint64_t CHUNK = 256;
constexpr uint64_t NORMALISE = 64;  // values after which the least metric is taken off, to stay exact enough

// The m of a class that is right below x.
RMM_INLINE int32_t below(float x, int32_t smallest) {
    const float t = (x - static_cast<float>(smallest)) * 0.125f;
    const int32_t whole = static_cast<int32_t>(t);
    return smallest + 8 * (whole - (t < static_cast<float>(whole)));
}

RMM_INLINE uint32_t index_of(int32_t m) { return static_cast<uint32_t>((m < 0 ? -m : m) - 1) >> 1; }

// The best m of each class for each value, and what it costs. Rate grows with |m|, so the best is one of the two around the
// value, or the smallest.
RMM_CLONES
void find_candidates(const float* x, uint64_t n, const float* bits, uint32_t escape, unsigned raw_bits, float lambda,
                     float (&costs)[4][CHUNK], int32_t* const* chosen_of) {
    float rate[MAX_SYMBOLS];
    for (uint32_t q = 0; q <= escape; ++q) rate[q] = lambda * bits[q];
    for (unsigned c = 0; c < 4; ++c) {
        const int32_t smallest = SMALLEST[c];
        const float rate_smallest = rate[std::min(index_of(smallest) >> raw_bits, escape)];
        float* cost = costs[c];
        int32_t* chosen = chosen_of[c];
        for (uint64_t i = 0; i < n; ++i) {
            const int32_t lower = below(x[i], smallest), upper = lower + 8;
            const float e0 = x[i] - static_cast<float>(smallest);
            const float e1 = x[i] - static_cast<float>(lower);
            const float e2 = x[i] - static_cast<float>(upper);
            const float c0 = e0 * e0 + rate_smallest;
            const float c1 = e1 * e1 + rate[std::min(index_of(lower) >> raw_bits, escape)];
            const float c2 = e2 * e2 + rate[std::min(index_of(upper) >> raw_bits, escape)];
            const bool first = c1 < c0;
            const float best = first ? c1 : c0;
            const int32_t m = first ? lower : smallest;
            const bool second = c2 < best;
            cost[i] = second ? c2 : best;
            chosen[i] = second ? upper : m;
        }
    }
}

// One lane's search over all rows.
class Search {
  public:
    Search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes,
           const SearchKernels& kernels)
        : values_(values), rows_(rows), n_(n), lanes_(lanes), kernels_(kernels) {
        n_coded_ = 0;
        for (const SearchRow& row : rows) n_coded_ += row.table != nullptr;
        const uint64_t longest = ceil_div(n, lanes) * n_coded_;
        taken_.resize(longest * (N_STATES / 8));
        for (auto& m : m_) m.resize(longest);
    }

    void lane(uint32_t lane, uint32_t* indices, float* multiples) {
        const uint64_t per_row = lane < n_ ? (n_ - lane - 1) / lanes_ + 1 : 0;
        std::fill(metrics_, metrics_ + N_STATES, 1e30f);
        metrics_[0] = 0;  // the state at the start is 0
        uint64_t done = 0;
        for (uint64_t k = 0; k < rows_.size(); ++k) {
            const SearchRow& row = rows_[k];
            if (!row.table) continue;
            for (uint64_t first = 0; first < per_row; first += CHUNK) {
                const uint64_t n = std::min(CHUNK, per_row - first);
                const float* from = values_ + k * n_ + first * lanes_ + lane;
                for (uint64_t i = 0; i < n; ++i) x_[i] = from[i * lanes_];
                int32_t* const m[4] = {&m_[0][done], &m_[1][done], &m_[2][done], &m_[3][done]};
                find_candidates(x_, n, row.table->bits, row.table->escape, row.table->raw_bits, row.lambda, costs_, m);
                forward(done, n);
                done += n;
            }
        }
        back(lane, per_row, done, indices, multiples);
    }

  private:
    void forward(uint64_t done, uint64_t n) {
        constexpr unsigned SOME = 16;
        for (uint64_t i = 0; i < n;) {
            const uint64_t some = std::min(NORMALISE - done % NORMALISE, n - i);
            const float* cost[4];
            for (unsigned c = 0; c < 4; ++c) cost[c] = costs_[c] + i;
            kernels_.advance(metrics_, cost, done, some, &taken_[done * (N_STATES / 8)]);
            i += some;
            done += some;
            if (done % NORMALISE != 0) continue;
            float least[SOME];  // of those that are alike modulo SOME, so that it is done in vectors
            std::copy(metrics_, metrics_ + SOME, least);
            for (unsigned s = SOME; s < N_STATES; s += SOME) {
                for (unsigned l = 0; l < SOME; ++l) least[l] = metrics_[s + l] < least[l] ? metrics_[s + l] : least[l];
            }
            const float off = *std::min_element(least, least + SOME);
            for (float& metric : metrics_) metric -= off;
        }
    }

    void back(uint32_t lane, uint64_t per_row, uint64_t done, uint32_t* indices, float* multiples) {
        unsigned at = place_of(0, done);  // of the best state, and of equal ones the first
        for (unsigned s = 1; s < N_STATES; ++s) {
            const unsigned place = place_of(s, done);
            if (metrics_[place] < metrics_[at]) at = place;
        }
        uint64_t phase = done % PERIOD;
        for (uint64_t k = rows_.size(); k-- > 0;) {
            if (!rows_[k].table) continue;
            for (uint64_t i = per_row; i-- > 0;) {
                --done;
                phase = phase == 0 ? PERIOD - 1 : phase - 1;
                const Step& step = STEPS.of[phase];
                const unsigned z0 = parity_of(at & step.parity);
                const unsigned z1 = taken_[done * (N_STATES / 8) + at / 8] >> at % 8 & 1u;
                const int32_t m = m_[2 * z0 + z1][done];
                const uint64_t to = k * n_ + i * lanes_ + lane;
                indices[to] = index_of(m);
                multiples[to] = static_cast<float>(m);
                at ^= z1 ? step.partner : 0u;
            }
        }
    }

    const float* values_;
    const std::vector<SearchRow>& rows_;
    const uint64_t n_;
    const uint32_t lanes_;
    uint64_t n_coded_;
    std::vector<uint8_t> taken_;
    std::vector<int32_t> m_[4];  // of each class
    const SearchKernels& kernels_;
    alignas(64) float metrics_[N_STATES];
    float x_[CHUNK];
    alignas(64) float costs_[4][CHUNK];
};

}  // namespace

void search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes, uint32_t* indices,
            float* multiples, const SearchKernels& kernels) {
    auto one = std::make_unique<Search>(values, rows, n, lanes, kernels);
    for (uint32_t lane = 0; lane < lanes; ++lane) one->lane(lane, indices, multiples);
}

void search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes, uint32_t* indices,
            float* multiples) {
    search(values, rows, n, lanes, indices, multiples, search_kernels().back());
}

}  // namespace trellis
}  // namespace rmm
