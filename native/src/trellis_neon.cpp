// The kernels of trellis_wide.hpp for arm64, whose vectors hold four lanes.

#include "trellis_wide.hpp"

#if defined(__aarch64__) && !defined(RMM_PORTABLE)
#include <arm_neon.h>
#define RMM_NEON 1
#else
#define RMM_NEON 0
#endif

namespace rmm {
namespace trellis {

#if RMM_NEON
namespace {

constexpr unsigned LANES = MAX_LANES, QUARTERS = 4;
constexpr uint32_t LOW_BITS = (1u << TABLE_BITS) - 1;

// From the next words to four lanes. A mask has two bits for each lane, for the word of its symbol and
// the one behind its raw bits; a lane's first word goes into its lower half, the second into its
// upper one, and what is not taken is zero.
struct Spread {
    uint8_t from[256][16];
    constexpr Spread() : from() {
        for (unsigned mask = 0; mask < 256; ++mask) {
            uint8_t word = 0;
            for (unsigned half = 0; half < 8; ++half) {
                const bool taken = mask >> half & 1;
                from[mask][2 * half] = taken ? static_cast<uint8_t>(2 * word) : uint8_t{255};
                from[mask][2 * half + 1] = taken ? static_cast<uint8_t>(2 * word + 1) : uint8_t{255};
                if (taken) ++word;
            }
        }
    }
};
constexpr Spread SPREAD;

constexpr uint8_t SYMBOL_BITS[16] = {1, 4, 16, 64, 1, 4, 16, 64, 1, 4, 16, 64, 1, 4, 16, 64};

// A byte of each lane into the highest of its 32 bits.
constexpr uint8_t TO_TOP[QUARTERS][16] = {
    {255, 255, 255, 0, 255, 255, 255, 1, 255, 255, 255, 2, 255, 255, 255, 3},
    {255, 255, 255, 4, 255, 255, 255, 5, 255, 255, 255, 6, 255, 255, 255, 7},
    {255, 255, 255, 8, 255, 255, 255, 9, 255, 255, 255, 10, 255, 255, 255, 11},
    {255, 255, 255, 12, 255, 255, 255, 13, 255, 255, 255, 14, 255, 255, 255, 15},
};

struct LanesNeon {
    WideLanes& lanes;
    f32u* out;
    const uint8_t* next;
    uint32x4_t x[QUARTERS], all;
    uint8x16_t s;  // states have eight bits
};

// The lowest byte of each lane.
RMM_INLINE uint8x16_t lowest_bytes(const uint32x4_t* lanes) {
    const uint16x8_t first = vuzp1q_u16(vreinterpretq_u16_u32(lanes[0]), vreinterpretq_u16_u32(lanes[1]));
    const uint16x8_t second = vuzp1q_u16(vreinterpretq_u16_u32(lanes[2]), vreinterpretq_u16_u32(lanes[3]));
    return vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
}

RMM_INLINE void take(LanesNeon& at) {
    at.out = at.lanes.out;
    at.next = at.lanes.words.next;
    uint32x4_t s[QUARTERS];
    for (unsigned q = 0; q < QUARTERS; ++q) {
        at.x[q] = vld1q_u32(at.lanes.x + 4 * q);
        s[q] = vld1q_u32(at.lanes.s + 4 * q);
    }
    at.s = lowest_bytes(s);
}

RMM_INLINE void put_back(const LanesNeon& at) {
    at.lanes.out = at.out;
    at.lanes.words.next = at.next;
    uint8_t s[LANES];
    vst1q_u8(s, at.s);
    for (unsigned q = 0; q < QUARTERS; ++q) vst1q_u32(at.lanes.x + 4 * q, at.x[q]);
    for (unsigned lane = 0; lane < LANES; ++lane) at.lanes.s[lane] = s[lane];
}

RMM_INLINE uint32x4_t gather(const uint32_t* table, uint32x4_t index) {
    const uint64_t low = vgetq_lane_u64(vreinterpretq_u64_u32(index), 0);
    const uint64_t high = vgetq_lane_u64(vreinterpretq_u64_u32(index), 1);
    uint32x2_t a = vld1_dup_u32(table + static_cast<uint32_t>(low));
    uint32x2_t b = vld1_dup_u32(table + static_cast<uint32_t>(high));
    a = vld1_lane_u32(table + (low >> 32), a, 1);
    b = vld1_lane_u32(table + (high >> 32), b, 1);
    return vcombine_u32(a, b);
}

template <bool RAW>
RMM_INLINE void round_neon(LanesNeon& at) {
    const RowCode& row = at.lanes.row;
    const uint32x4_t low_bits = vdupq_n_u32(LOW_BITS);
    uint32x4_t index[QUARTERS], escaped = vdupq_n_u32(0);
    for (unsigned q = 0; q < QUARTERS; ++q) {
        index[q] = vandq_u32(at.x[q], low_bits);
        escaped = vmaxq_u32(escaped, index[q]);
    }
    // The escape is a table's last symbol, with a frequency of one: it has the last slot.
    if (vmaxvq_u32(escaped) == LOW_BITS) {
        put_back(at);
        scalar_round<RAW>(at.lanes);
        take(at);
        at.out += LANES;
        return;
    }
    const int32x4_t raw_bits = vdupq_n_s32(static_cast<int32_t>(row.raw_bits));
    uint32x4_t j[QUARTERS], low[QUARTERS], again[QUARTERS];
    for (unsigned q = 0; q < QUARTERS; ++q) {
        const uint32x4_t slot = gather(row.slot, index[q]);
        j[q] = vshrq_n_u32(slot, 24);
        at.x[q] = vmlaq_u32(vandq_u32(slot, low_bits), vandq_u32(vshrq_n_u32(slot, TABLE_BITS), low_bits),
                            vshrq_n_u32(at.x[q], TABLE_BITS));
        low[q] = vcltq_u32(at.x[q], vdupq_n_u32(STATE_LOW));
        if (RAW) {
            const uint32x4_t top = vbslq_u32(low[q], at.x[q], vshrq_n_u32(at.x[q], 16));
            again[q] = vcltq_u32(top, vdupq_n_u32(1u << row.raw_bits));
        }
    }
    const uint8x16_t symbol_bits = vld1q_u8(SYMBOL_BITS);
    uint8x16_t taken = vandq_u8(lowest_bytes(low), symbol_bits);
    if (RAW) taken = vorrq_u8(taken, vandq_u8(lowest_bytes(again), vshlq_n_u8(symbol_bits, 1)));
    taken = vpaddq_u8(taken, taken);
    taken = vpaddq_u8(taken, taken);  // a mask in each byte
    const uint32_t masks = vgetq_lane_u32(vreinterpretq_u32_u8(taken), 0);
    // In byte q: words of the first q + 1 quarters.
    const uint32_t counts = vget_lane_u32(vreinterpret_u32_u8(vcnt_u8(vget_low_u8(taken))), 0) * 0x01010101u;

    const uint8x16_t sign = vshlq_n_u8(at.s, 7);
    for (unsigned q = 0; q < QUARTERS; ++q) {
        const uint8_t* words = at.next + 2 * (q > 0 ? counts >> (8 * q - 8) & 255 : 0);
        const uint32x4_t pair =
            vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(words), vld1q_u8(SPREAD.from[masks >> (8 * q) & 255])));
        uint32x4_t x = vbslq_u32(low[q], vsliq_n_u32(pair, at.x[q], 16), at.x[q]);
        if (RAW) {
            j[q] = vorrq_u32(vshlq_u32(j[q], raw_bits), vandq_u32(x, vdupq_n_u32((1u << row.raw_bits) - 1)));
            x = vshlq_u32(x, vnegq_s32(raw_bits));
            x = vbslq_u32(again[q], vsriq_n_u32(vshlq_n_u32(x, 16), pair, 16), x);
            at.all = vorrq_u32(at.all, j[q]);
        }
        at.x[q] = x;
    }
    at.next += 2 * (counts >> 24);

    const uint8x16_t bytes = lowest_bytes(j);
    const uint8x16_t signs = veorq_u8(sign, vshlq_n_u8(bytes, 7));
    for (unsigned q = 0; q < QUARTERS; ++q) {
        const uint32x4_t odd = vsliq_n_u32(vdupq_n_u32(1), j[q], 1);
        const float32x4_t size = vmulq_n_f32(vcvtq_f32_s32(vreinterpretq_s32_u32(odd)), row.step);
        const uint8x16_t value = veorq_u8(vreinterpretq_u8_f32(size), vqtbl1q_u8(signs, vld1q_u8(TO_TOP[q])));
        vst1q_u8(reinterpret_cast<uint8_t*>(at.out + 4 * q), value);
    }
    const uint8x16_t one = vdupq_n_u8(1), two = vdupq_n_u8(2);
    const uint8x16_t is_odd = vandq_u8(vtstq_u8(at.s, one), vdupq_n_u8(FEEDBACK));
    const uint8x16_t is_in = vandq_u8(vtstq_u8(vaddq_u8(bytes, one), two), vdupq_n_u8(INPUT));
    at.s = veorq_u8(vshrq_n_u8(at.s, 1), veorq_u8(is_odd, is_in));
    at.out += LANES;
}

RMM_INLINE void finish(LanesNeon& at) {
    put_back(at);
    uint32_t indices[4];
    vst1q_u32(indices, at.all);
    for (uint32_t index : indices) at.lanes.seen |= index;
}

RMM_INLINE LanesNeon taken_up(WideLanes& lanes) {
    LanesNeon at = {lanes, nullptr, nullptr, {}, vdupq_n_u32(0), vdupq_n_u8(0)};
    take(at);
    return at;
}

template <bool RAW>
void one_neon(WideLanes& lanes, uint64_t rounds) {
    LanesNeon at = taken_up(lanes);
    for (; rounds > 0; --rounds) round_neon<RAW>(at);
    finish(at);
}

template <bool RAW_A, bool RAW_B>
void two_neon(WideLanes& first, WideLanes& second, uint64_t rounds) {
    LanesNeon a = taken_up(first), b = taken_up(second);
    for (; rounds > 0; --rounds) {
        round_neon<RAW_A>(a);
        round_neon<RAW_B>(b);
    }
    finish(a);
    finish(b);
}

}  // namespace
#endif

std::vector<WideKernels> neon_kernels() {
#if RMM_NEON
    return {{"neon",
             {one_neon<false>, one_neon<true>},
             {{two_neon<false, false>, two_neon<false, true>}, {two_neon<true, false>, two_neon<true, true>}},
             nullptr}};
#else
    return {};
#endif
}

}  // namespace trellis
}  // namespace rmm
