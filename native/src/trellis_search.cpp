// The search for the best path through the trellis (the Viterbi algorithm), 256 states at once.
//
// A lane's values are searched one after another. Of each value there are four candidates: an odd m is
// 1, 5, 7 or 3 modulo 8, which is told by the bits z0 (the lowest of the state before it) and z1 (what
// goes into the next state). Class c = 2 · z0 + z1.

#include <algorithm>
#include <memory>

#include "trellis.hpp"

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#define RMM_SSE2 1
#else
#define RMM_SSE2 0
#endif

namespace rmm {
namespace trellis {
namespace {

constexpr unsigned N_STATES = 256, HALF = N_STATES / 2;
constexpr int32_t SMALLEST[4] = {1, -3, -1, 3};  // the m of each class that is nearest to zero
constexpr uint64_t CHUNK = 256;
constexpr uint64_t NORMALISE = 64;  // values after which the least metric is taken off, to stay exact enough

// The least metrics of the paths that end in each state, those of even and of odd states apart, since
// a new state s comes from two old ones of one parity: with t = s, or s ^ FEEDBACK if s ≥ 128 (whose
// old states are odd), from 2t + parity if z1 was 0, and from 2(t ^ INPUT) + parity if it was 1.
struct Metrics {
    alignas(64) float of[2][HALF];

    float get(unsigned s) const { return of[s & 1][s >> 1]; }
};

// The old state from which state `s` was reached.
RMM_INLINE unsigned before(unsigned s, unsigned z1) {
    const unsigned parity = s >> 7;
    const unsigned t = s ^ (parity ? FEEDBACK : 0) ^ (z1 ? INPUT : 0);
    return 2 * t + parity;
}

// For each new state the better of two paths: its metric, and in `taken` one bit, 1 if z1 = 1 was better.
#if RMM_SSE2
template <unsigned X>  // element i from element i ^ X
RMM_INLINE __m128 exchange(__m128 v) {
    return _mm_shuffle_ps(v, v, X == 1 ? 0xB1 : X == 2 ? 0x4E : 0x1B);
}

RMM_INLINE unsigned better(__m128 c0, __m128 c1, __m128& least) {
    least = _mm_min_ps(c1, c0);
    return static_cast<unsigned>(_mm_movemask_ps(_mm_cmplt_ps(c1, c0)));
}

RMM_INLINE void advance(const Metrics& old, const float* cost, Metrics& next, uint8_t* taken) {
    // Within each eight states, t ^ INPUT (0x79) exchanges neighbours, t ^ FEEDBACK (as 7 bits 0x26) is
    // i ^ 6, and both together (0x5F) i ^ 7; the rest of the masks is in the addresses.
    const float* even = old.of[0];
    const float* odd = old.of[1];
    const __m128 cost0 = _mm_set1_ps(cost[0]), cost1 = _mm_set1_ps(cost[1]);
    const __m128 cost2 = _mm_set1_ps(cost[2]), cost3 = _mm_set1_ps(cost[3]);
    for (unsigned u = 0; u < HALF; u += 8) {
        __m128 low, high;
        const float* crossed = even + (u ^ 0x78);
        unsigned bits = better(_mm_add_ps(_mm_load_ps(even + u), cost0),
                               _mm_add_ps(exchange<1>(_mm_load_ps(crossed)), cost1), low);
        bits |= better(_mm_add_ps(_mm_load_ps(even + u + 4), cost0),
                       _mm_add_ps(exchange<1>(_mm_load_ps(crossed + 4)), cost1), high) << 4;
        taken[u / 8] = static_cast<uint8_t>(bits);
        _mm_store_ps(next.of[0] + u / 2, _mm_shuffle_ps(low, high, 0x88));
        _mm_store_ps(next.of[1] + u / 2, _mm_shuffle_ps(low, high, 0xDD));

        const float* straight = odd + (u ^ 0x20);
        crossed = odd + (u ^ 0x58);
        bits = better(_mm_add_ps(exchange<2>(_mm_load_ps(straight + 4)), cost2),
                      _mm_add_ps(exchange<3>(_mm_load_ps(crossed + 4)), cost3), low);
        bits |= better(_mm_add_ps(exchange<2>(_mm_load_ps(straight)), cost2),
                       _mm_add_ps(exchange<3>(_mm_load_ps(crossed)), cost3), high) << 4;
        taken[(HALF + u) / 8] = static_cast<uint8_t>(bits);
        _mm_store_ps(next.of[0] + (HALF + u) / 2, _mm_shuffle_ps(low, high, 0x88));
        _mm_store_ps(next.of[1] + (HALF + u) / 2, _mm_shuffle_ps(low, high, 0xDD));
    }
}
#else
void advance(const Metrics& old, const float* cost, Metrics& next, uint8_t* taken) {
    for (unsigned s = 0; s < N_STATES; ++s) {
        const unsigned z0 = s >> 7;
        const float c0 = old.get(before(s, 0)) + cost[2 * z0];
        const float c1 = old.get(before(s, 1)) + cost[2 * z0 + 1];
        next.of[s & 1][s >> 1] = c1 < c0 ? c1 : c0;
        if (s % 8 == 0) taken[s / 8] = 0;
        taken[s / 8] = static_cast<uint8_t>(taken[s / 8] | (c1 < c0) << s % 8);
    }
}
#endif

// The m of a class that is right below x.
RMM_INLINE int32_t below(float x, int32_t smallest) {
    const float t = (x - static_cast<float>(smallest)) * 0.125f;
    const int32_t whole = static_cast<int32_t>(t);
    return smallest + 8 * (whole - (t < static_cast<float>(whole)));
}

RMM_INLINE uint32_t index_of(int32_t m) { return static_cast<uint32_t>((m < 0 ? -m : m) - 1) >> 1; }

struct Candidates {
    alignas(64) float cost[4][CHUNK];
    alignas(64) int32_t m[4][CHUNK];
};

// The best m of each class for each value. Rate grows with |m|, so the best is one of the two around the
// value, or the smallest.
RMM_CLONES
void find_candidates(const float* x, uint64_t n, const float* bits, uint32_t escape, unsigned raw_bits, float lambda,
                     Candidates& out) {
    float rate[MAX_SYMBOLS];
    for (uint32_t q = 0; q <= escape; ++q) rate[q] = lambda * bits[q];
    for (unsigned c = 0; c < 4; ++c) {
        const int32_t smallest = SMALLEST[c];
        const float rate_smallest = rate[std::min(index_of(smallest) >> raw_bits, escape)];
        float* cost = out.cost[c];
        int32_t* chosen = out.m[c];
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
    Search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes)
        : values_(values), rows_(rows), n_(n), lanes_(lanes) {
        n_coded_ = 0;
        for (const SearchRow& row : rows) n_coded_ += row.table != nullptr;
        const uint64_t longest = ceil_div(n, lanes) * n_coded_;
        taken_.resize(longest * (N_STATES / 8));
        m_.resize(longest * 4);
    }

    void lane(uint32_t lane, uint32_t* indices, float* multiples) {
        const uint64_t per_row = lane < n_ ? (n_ - lane - 1) / lanes_ + 1 : 0;
        std::fill(current_->of[0], current_->of[0] + N_STATES, 1e30f);
        current_->of[0][0] = 0;  // the state at the start is 0
        uint64_t done = 0;
        for (uint64_t k = 0; k < rows_.size(); ++k) {
            const SearchRow& row = rows_[k];
            if (!row.table) continue;
            for (uint64_t first = 0; first < per_row; first += CHUNK) {
                const uint64_t n = std::min(CHUNK, per_row - first);
                const float* from = values_ + k * n_ + first * lanes_ + lane;
                for (uint64_t i = 0; i < n; ++i) x_[i] = from[i * lanes_];
                find_candidates(x_, n, row.table->bits, row.table->escape, row.table->raw_bits, row.lambda,
                                candidates_);
                forward(done, n);
                done += n;
            }
        }
        back(lane, per_row, done, indices, multiples);
    }

  private:
    void forward(uint64_t done, uint64_t n) {
        for (uint64_t i = 0; i < n; ++i, ++done) {
            float cost[4];
            for (unsigned c = 0; c < 4; ++c) {
                cost[c] = candidates_.cost[c][i];
                m_[done * 4 + c] = candidates_.m[c][i];
            }
            advance(*current_, cost, *next_, &taken_[done * (N_STATES / 8)]);
            std::swap(current_, next_);
            if (done % NORMALISE == NORMALISE - 1) {
                float* metrics = current_->of[0];
                float least = metrics[0];
                for (unsigned s = 1; s < N_STATES; ++s) least = metrics[s] < least ? metrics[s] : least;
                for (unsigned s = 0; s < N_STATES; ++s) metrics[s] -= least;
            }
        }
    }

    void back(uint32_t lane, uint64_t per_row, uint64_t done, uint32_t* indices, float* multiples) {
        unsigned s = 0;
        for (unsigned i = 1; i < N_STATES; ++i) {
            if (current_->get(i) < current_->get(s)) s = i;
        }
        for (uint64_t k = rows_.size(); k-- > 0;) {
            if (!rows_[k].table) continue;
            for (uint64_t i = per_row; i-- > 0;) {
                --done;
                const unsigned z1 = taken_[done * (N_STATES / 8) + s / 8] >> s % 8 & 1u;
                const int32_t m = m_[done * 4 + 2 * (s >> 7) + z1];
                const uint64_t at = k * n_ + i * lanes_ + lane;
                indices[at] = index_of(m);
                multiples[at] = static_cast<float>(m);
                s = before(s, z1);
            }
        }
    }

    const float* values_;
    const std::vector<SearchRow>& rows_;
    const uint64_t n_;
    const uint32_t lanes_;
    uint64_t n_coded_;
    std::vector<uint8_t> taken_;
    std::vector<int32_t> m_;
    Metrics metrics_[2];
    Metrics* current_ = &metrics_[0];
    Metrics* next_ = &metrics_[1];
    float x_[CHUNK];
    Candidates candidates_;
};

}  // namespace

void search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes, uint32_t* indices,
            float* multiples) {
    auto one = std::make_unique<Search>(values, rows, n, lanes);
    for (uint32_t lane = 0; lane < lanes; ++lane) one->lane(lane, indices, multiples);
}

}  // namespace trellis
}  // namespace rmm
