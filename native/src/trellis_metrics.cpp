#include "trellis_metrics.hpp"

#if !defined(RMM_PORTABLE) && (defined(__SSE2__) || defined(_M_X64))
#include <immintrin.h>
#define RMM_SSE2 1
#elif !defined(RMM_PORTABLE) && defined(__aarch64__)
#include <arm_neon.h>
#define RMM_NEON 1
#endif
#if defined(RMM_SSE2) && defined(__x86_64__) && defined(__GNUC__)  // by function attributes
#define RMM_EIGHT 1
#define RMM_AVX2 __attribute__((target("avx2")))
#if !defined(__clang__)  // GCC up to 12 takes its own header's "undefined" for a mistake of the caller's
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace rmm {
namespace trellis {
namespace {

void advance_portable(float* metrics, const float* const* cost, uint64_t i, uint64_t n, uint8_t* taken) {
    for (uint64_t k = 0; k < n; ++k, taken += N_STATES / 8) {
        const Step& step = STEPS.of[(i + k) % PERIOD];
        for (unsigned at = 0; at < N_STATES / 8; ++at) taken[at] = 0;
        for (unsigned at = 0; at < N_STATES; ++at) {
            const unsigned other = at ^ step.partner;
            if (other < at) continue;
            const unsigned z0 = parity_of(at & step.parity);  // of both: d has the parity 0
            const float a = metrics[at], b = metrics[other];
            const float cost0 = cost[2 * z0][k], cost1 = cost[2 * z0 + 1][k];
            auto better = [&](unsigned to, float c0, float c1) {
                metrics[to] = c1 < c0 ? c1 : c0;
                taken[to / 8] = static_cast<uint8_t>(taken[to / 8] | (c1 < c0) << to % 8);
            };
            better(at, a + cost0, b + cost1);
            better(other, b + cost0, a + cost1);
        }
    }
}

#if defined(RMM_SSE2) || defined(RMM_NEON)
// The vectors of a step, in pairs that feed one another, or each itself if `alone`. All firsts of one
// half of the pairs have the same positions with z0 = 1, and so have all seconds: odd[half][second].
template <unsigned WIDTH>
struct Order {
    static constexpr unsigned N_PAIRS = N_STATES / WIDTH / 2;
    uint8_t pair[N_PAIRS][2];
    uint16_t odd[2][2];
    bool alone;
};

template <unsigned WIDTH>
struct Orders {
    Order<WIDTH> of[PERIOD];
    Orders() : of() {
        for (unsigned i = 0; i < PERIOD; ++i) fill(of[i], STEPS.of[i]);
    }

    static void fill(Order<WIDTH>& order, const Step& step) {
        const unsigned partner = step.partner / WIDTH, parity = step.parity / WIDTH;
        auto is_odd = [&](unsigned vector) { return parity_of(vector & parity); };
        order.alone = partner == 0;
        unsigned n = 0;  // vectors told
        auto tell = [&](unsigned vector) {
            order.pair[n / 2][n % 2] = static_cast<uint8_t>(vector);
            ++n;
        };
        for (unsigned odd = 0; odd < 2; ++odd) {
            for (unsigned v = 0; v < N_STATES / WIDTH; ++v) {
                const unsigned w = v ^ partner;
                if (is_odd(v) != odd) continue;
                // Of two of one parity the lower one is first, of two of different ones the even one.
                if (!order.alone && (is_odd(w) == odd ? w < v : odd == 1)) continue;
                tell(v);
                if (!order.alone) tell(w);
            }
        }
        for (unsigned half = 0; half < 2; ++half) {
            for (unsigned second = 0; second < 2; ++second) {
                const unsigned vector = order.pair[half * Order<WIDTH>::N_PAIRS / 2][second];
                for (unsigned at = 0; at < WIDTH; ++at) {
                    const unsigned z0 = parity_of((vector * WIDTH + at) & step.parity);
                    order.odd[half][second] = static_cast<uint16_t>(order.odd[half][second] | z0 << at);
                }
            }
        }
    }
};

template <unsigned WIDTH>
const Order<WIDTH>* orders() {
    static const Orders<WIDTH> made;
    return made.of;
}
#endif

// --- vectors of four: SSE2 and NEON -----------------------------------------------------------------

#if defined(RMM_SSE2)
typedef __m128 Four;
RMM_INLINE Four load4(const float* at) { return _mm_load_ps(at); }
RMM_INLINE Four add4(Four a, Four b) { return _mm_add_ps(a, b); }
template <unsigned X>  // element i from element i ^ X
RMM_INLINE Four exchange(Four v) {
    return X == 0 ? v : _mm_shuffle_ps(v, v, X == 1 ? 0xB1 : X == 2 ? 0x4E : 0x1B);
}
// Of eight: the better ones into `to`, and a bit for each.
RMM_INLINE uint8_t better(const Four* c0, const Four* c1, float* to) {
    unsigned bits = 0;
    for (unsigned half = 0; half < 2; ++half) {
        _mm_store_ps(to + 4 * half, _mm_min_ps(c1[half], c0[half]));
        bits |= static_cast<unsigned>(_mm_movemask_ps(_mm_cmplt_ps(c1[half], c0[half]))) << 4 * half;
    }
    return static_cast<uint8_t>(bits);
}
#elif defined(RMM_NEON)
typedef float32x4_t Four;
RMM_INLINE Four load4(const float* at) { return vld1q_f32(at); }
RMM_INLINE Four add4(Four a, Four b) { return vaddq_f32(a, b); }
template <unsigned X>
RMM_INLINE Four exchange(Four v) {
    if (X & 1) v = vrev64q_f32(v);
    if (X & 2) v = vextq_f32(v, v, 2);
    return v;
}
RMM_INLINE uint8_t better(const Four* c0, const Four* c1, float* to) {
    const uint32x4_t low = vcltq_f32(c1[0], c0[0]), high = vcltq_f32(c1[1], c0[1]);
    vst1q_f32(to, vbslq_f32(low, c1[0], c0[0]));
    vst1q_f32(to + 4, vbslq_f32(high, c1[1], c0[1]));
    static const uint16_t BITS[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t both = vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
    return static_cast<uint8_t>(vaddvq_u16(vandq_u16(both, vld1q_u16(BITS))));
}
#endif

#if defined(RMM_SSE2) || defined(RMM_NEON)
struct CostsOfFours {
    Four z0[2], z1[2];  // by halves of eight
};

RMM_INLINE CostsOfFours costs_of_fours(const float* const* cost, uint64_t k, unsigned odd) {
    alignas(16) float z0[8], z1[8];
    for (unsigned at = 0; at < 8; ++at) {  // without branches, which could not be foreseen
        z0[at] = cost[2 * (odd >> at & 1)][k];
        z1[at] = cost[2 * (odd >> at & 1) + 1][k];
    }
    return {{load4(z0), load4(z0 + 4)}, {load4(z1), load4(z1 + 4)}};
}

RMM_INLINE void better_of_fours(const Four* own, const Four* other, const CostsOfFours& cost, unsigned vector,
                                float* metrics, uint8_t* taken) {
    const Four c0[2] = {add4(own[0], cost.z0[0]), add4(own[1], cost.z0[1])};
    const Four c1[2] = {add4(other[0], cost.z1[0]), add4(other[1], cost.z1[1])};
    taken[vector] = better(c0, c1, metrics + 8 * vector);
}

// Vectors of eight as two of four. X: which elements change places within four; SWAP: whether the two
// halves do.
template <unsigned X, unsigned SWAP>
void step_of_fours(float* metrics, const Order<8>& order, const CostsOfFours (&costs)[2][2], uint8_t* taken) {
    for (unsigned item = 0; item < Order<8>::N_PAIRS; ++item) {
        const unsigned v = order.pair[item][0], w = order.pair[item][1];
        const CostsOfFours* cost = costs[item / (Order<8>::N_PAIRS / 2)];
        const Four a[2] = {load4(metrics + 8 * v), load4(metrics + 8 * v + 4)};
        const Four b[2] = {load4(metrics + 8 * w), load4(metrics + 8 * w + 4)};
        const Four from_a[2] = {exchange<X>(a[SWAP]), exchange<X>(a[1 - SWAP])};
        const Four from_b[2] = {exchange<X>(b[SWAP]), exchange<X>(b[1 - SWAP])};
        if (order.alone) {
            better_of_fours(a, from_a, cost[0], v, metrics, taken);
            better_of_fours(b, from_b, cost[1], w, metrics, taken);
        } else {
            better_of_fours(a, from_b, cost[0], v, metrics, taken);
            better_of_fours(b, from_a, cost[1], w, metrics, taken);
        }
    }
}

void advance_fours(float* metrics, const float* const* cost, uint64_t i, uint64_t n, uint8_t* taken) {
    const Order<8>* const all_orders = orders<8>();
    for (uint64_t k = 0; k < n; ++k, taken += N_STATES / 8) {
        const uint64_t phase = (i + k) % PERIOD;
        const Order<8>& order = all_orders[phase];
        const CostsOfFours costs[2][2] = {
            {costs_of_fours(cost, k, order.odd[0][0]), costs_of_fours(cost, k, order.odd[0][1])},
            {costs_of_fours(cost, k, order.odd[1][0]), costs_of_fours(cost, k, order.odd[1][1])}};
        constexpr decltype(&step_of_fours<0, 0>) STEPS_OF_FOURS[8] = {
            step_of_fours<0, 0>, step_of_fours<1, 0>, step_of_fours<2, 0>, step_of_fours<3, 0>,
            step_of_fours<0, 1>, step_of_fours<1, 1>, step_of_fours<2, 1>, step_of_fours<3, 1>};
        STEPS_OF_FOURS[STEPS.of[phase].partner % 8](metrics, order, costs, taken);
    }
}
#endif

// --- AVX2 (AVX-512 is no quicker here, as measured on Zen 4) ------------------------------------------

#if defined(RMM_EIGHT)
struct Costs256 {
    __m256 z0, z1;
};

RMM_AVX2 RMM_INLINE void better_256(__m256 own, __m256 other, const Costs256& cost, unsigned vector, float* metrics,
                                    uint8_t* taken) {
    const __m256 c0 = _mm256_add_ps(own, cost.z0), c1 = _mm256_add_ps(other, cost.z1);
    _mm256_store_ps(metrics + 8 * vector, _mm256_min_ps(c1, c0));
    taken[vector] = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(c1, c0, _CMP_LT_OQ)));
}

template <bool ALONE>
RMM_AVX2 RMM_INLINE void step_256(float* metrics, const Order<8>& order, __m256i exchange, const Costs256 (&costs)[2][2],
                                  uint8_t* taken) {
    RMM_UNROLL
    for (unsigned item = 0; item < Order<8>::N_PAIRS; ++item) {
        const Costs256* cost = costs[item / (Order<8>::N_PAIRS / 2)];
        const unsigned v = order.pair[item][0], w = order.pair[item][1];
        const __m256 a = _mm256_load_ps(metrics + 8 * v), b = _mm256_load_ps(metrics + 8 * w);
        const __m256 from_a = _mm256_permutevar8x32_ps(a, exchange), from_b = _mm256_permutevar8x32_ps(b, exchange);
        better_256(a, ALONE ? from_a : from_b, cost[0], v, metrics, taken);
        better_256(b, ALONE ? from_b : from_a, cost[1], w, metrics, taken);
    }
}

RMM_AVX2 void advance_256(float* metrics, const float* const* cost, uint64_t i, uint64_t n, uint8_t* taken) {
    const Order<8>* const all_orders = orders<8>();
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    uint64_t phase = i % PERIOD;
    for (uint64_t k = 0; k < n; ++k, taken += N_STATES / 8) {
        const Order<8>& order = all_orders[phase];
        const __m256i exchange = _mm256_xor_si256(places, _mm256_set1_epi32(STEPS.of[phase].partner % 8));
        const __m256 c0 = _mm256_broadcast_ss(cost[0] + k), c1 = _mm256_broadcast_ss(cost[1] + k);
        const __m256 c2 = _mm256_broadcast_ss(cost[2] + k), c3 = _mm256_broadcast_ss(cost[3] + k);
        Costs256 costs[2][2];
        RMM_UNROLL
        for (unsigned which = 0; which < 4; ++which) {
            const __m256i mask = _mm256_and_si256(_mm256_set1_epi32(order.odd[which / 2][which % 2]), bits);
            const __m256 odd = _mm256_castsi256_ps(_mm256_cmpeq_epi32(mask, bits));
            costs[which / 2][which % 2] = {_mm256_blendv_ps(c0, c2, odd), _mm256_blendv_ps(c1, c3, odd)};
        }
        if (order.alone) {
            step_256<true>(metrics, order, exchange, costs, taken);
        } else {
            step_256<false>(metrics, order, exchange, costs, taken);
        }
        if (++phase == PERIOD) phase = 0;
    }
}
#endif

std::vector<SearchKernels> supported() {
    std::vector<SearchKernels> found = {{"portable", advance_portable}};
#if defined(RMM_NEON)
    found.push_back({"neon", advance_fours});
#elif defined(RMM_SSE2)
    found.push_back({"sse2", advance_fours});
#endif
#if defined(RMM_EIGHT)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", advance_256});
#endif
    return found;
}

}  // namespace

const std::vector<SearchKernels>& search_kernels() {
    static const std::vector<SearchKernels> found = supported();
    return found;
}

}  // namespace trellis
}  // namespace rmm
