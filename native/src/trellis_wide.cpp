#include "trellis_wide.hpp"

// By function attributes, so that one build serves every processor. The fuzzer's build leaves out what
// it cannot run, but these it can.
#if defined(__x86_64__) && defined(__GNUC__) && \
    (!defined(RMM_PORTABLE) || defined(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION))
#include <immintrin.h>
#if !defined(__clang__)  // GCC up to 12 takes its own header's "undefined" for a mistake of the caller's
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define RMM_WIDE 1
#define RMM_AVX2 __attribute__((target("avx2,popcnt")))
#define RMM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")))
#else
#define RMM_WIDE 0
#endif

namespace rmm {
namespace trellis {

#if RMM_WIDE
namespace {

constexpr unsigned LANES = MAX_LANES;
constexpr uint32_t LOW_BITS = (1u << TABLE_BITS) - 1;

// Which lanes take a word, and where from: lanes take theirs in order, and a lane takes that of its
// symbol before that of its raw bits. Both are known before any word is read: a state that was
// refilled is x << 16 | word, and whether it falls below 2^16 again when its raw bits are gone is told
// by x alone, x < 2^b.

// --- AVX-512 (with VBMI2: words are spread over the lanes by one instruction) ---

struct Lanes512 {
    WideLanes& lanes;
    f32u* out;
    const uint8_t* next;
    __m512i x, s, all;
};

RMM_AVX512 RMM_INLINE void take(Lanes512& at) {
    at.out = at.lanes.out;
    at.next = at.lanes.words.next;
    at.x = _mm512_loadu_si512(at.lanes.x);
    at.s = _mm512_loadu_si512(at.lanes.s);
}

RMM_AVX512 RMM_INLINE void put_back(Lanes512& at) {
    at.lanes.out = at.out;
    at.lanes.words.next = at.next;
    _mm512_storeu_si512(at.lanes.x, at.x);
    _mm512_storeu_si512(at.lanes.s, at.s);
}

template <bool RAW>
RMM_AVX512 RMM_INLINE void round_512(Lanes512& at) {
    const RowCode& row = at.lanes.row;
    const __m512i low_bits = _mm512_set1_epi32(LOW_BITS), one = _mm512_set1_epi32(1), two = _mm512_set1_epi32(2);
    __m512i x = at.x, s = at.s;
    const __m512i slot = _mm512_i32gather_epi32(_mm512_and_si512(x, low_bits), row.slot, 4);
    __m512i j = _mm512_srli_epi32(slot, 24);
    if (_mm512_cmpeq_epi32_mask(j, _mm512_set1_epi32(static_cast<int>(row.escape)))) {
        put_back(at);
        scalar_round<RAW>(at.lanes);
        take(at);
        at.out += LANES;
        return;
    }
    const __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(slot, TABLE_BITS), low_bits);
    x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, TABLE_BITS)),
                         _mm512_and_si512(slot, low_bits));
    const __mmask16 low = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(static_cast<int>(STATE_LOW)));
    if (RAW) {
        const __m128i raw_bits = _mm_cvtsi32_si128(static_cast<int>(row.raw_bits));
        const __m512i raw_limit = _mm512_set1_epi32(1 << row.raw_bits);
        // In 16 bits each: what tells of the symbol's word, and what of the raw bits' behind it.
        const __m512i high = _mm512_srli_epi32(x, 16);
        const __m512i top = _mm512_mask_mov_epi32(high, low, x);
        const __mmask32 taken = _mm512_cmplt_epu16_mask(_mm512_or_si512(_mm512_slli_epi32(top, 16), high),
                                                        _mm512_set1_epi32(1 << 16 << row.raw_bits | 1));
        const __mmask16 again = _mm512_cmplt_epu32_mask(top, raw_limit);
        const __m512i pair = _mm512_maskz_expand_epi16(taken, _mm512_loadu_si512(at.next));
        at.next += 2 * _mm_popcnt_u32(taken);
        x = _mm512_mask_or_epi32(x, low, _mm512_slli_epi32(x, 16), _mm512_and_si512(pair, _mm512_set1_epi32(0xFFFF)));
        j = _mm512_or_si512(_mm512_sll_epi32(j, raw_bits), _mm512_and_si512(x, _mm512_sub_epi32(raw_limit, one)));
        x = _mm512_srl_epi32(x, raw_bits);
        x = _mm512_mask_or_epi32(x, again, _mm512_slli_epi32(x, 16), _mm512_srli_epi32(pair, 16));
        at.all = _mm512_or_si512(at.all, j);
    } else {
        const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.next));
        const __m512i word = _mm512_maskz_expand_epi32(low, _mm512_cvtepu16_epi32(sixteen));
        at.next += 2 * _mm_popcnt_u32(low);
        x = _mm512_mask_or_epi32(x, low, _mm512_slli_epi32(x, 16), word);
    }
    const __m512i odd = _mm512_add_epi32(_mm512_add_epi32(j, j), one);
    const __m512i sign = _mm512_slli_epi32(_mm512_xor_si512(s, j), 31);
    const __m512 size = _mm512_mul_ps(_mm512_cvtepi32_ps(odd), _mm512_set1_ps(row.step));
    _mm512_storeu_si512(at.out, _mm512_xor_si512(_mm512_castps_si512(size), sign));
    const __mmask16 is_odd = _mm512_test_epi32_mask(s, one);
    const __mmask16 is_in = _mm512_test_epi32_mask(_mm512_add_epi32(j, one), two);
    s = _mm512_srli_epi32(s, 1);
    s = _mm512_mask_xor_epi32(s, is_odd, s, _mm512_set1_epi32(FEEDBACK));
    at.s = _mm512_mask_xor_epi32(s, is_in, s, _mm512_set1_epi32(INPUT));
    at.x = x;
    at.out += LANES;
}

RMM_AVX512 RMM_INLINE void finish(Lanes512& at) {
    put_back(at);
    at.lanes.seen |= static_cast<uint32_t>(_mm512_reduce_or_epi32(at.all));
}

template <bool RAW>
RMM_AVX512 void one_512(WideLanes& lanes, uint64_t rounds) {
    Lanes512 at = {lanes, nullptr, nullptr, {}, {}, {}};
    take(at);
    for (; rounds > 0; --rounds) round_512<RAW>(at);
    finish(at);
}

template <bool RAW_A, bool RAW_B>
RMM_AVX512 void two_512(WideLanes& first, WideLanes& second, uint64_t rounds) {
    Lanes512 a = {first, nullptr, nullptr, {}, {}, {}}, b = {second, nullptr, nullptr, {}, {}, {}};
    take(a);
    take(b);
    for (; rounds > 0; --rounds) {
        round_512<RAW_A>(a);
        round_512<RAW_B>(b);
    }
    finish(a);
    finish(b);
}

// --- AVX2: eight lanes at a time, words fetched by their positions ---

// A byte for each bit.
struct Spread {
    uint64_t of[256];
    constexpr Spread() : of() {
        for (unsigned mask = 0; mask < 256; ++mask) {
            for (unsigned bit = 0; bit < 8; ++bit) of[mask] |= static_cast<uint64_t>(mask >> bit & 1) << (8 * bit);
        }
    }
};
constexpr Spread SPREAD;

RMM_AVX2 inline unsigned mask_of(__m256i lanes) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}

struct Lanes256 {
    WideLanes& lanes;
    f32u* out;
    const uint8_t* next;
    __m256i x[2], s[2], all;
};

RMM_AVX2 RMM_INLINE __m256i* half_of(uint32_t* states, unsigned half) {
    return reinterpret_cast<__m256i*>(states) + half;
}

RMM_AVX2 RMM_INLINE void take(Lanes256& at) {
    at.out = at.lanes.out;
    at.next = at.lanes.words.next;
    for (unsigned half = 0; half < 2; ++half) {
        at.x[half] = _mm256_loadu_si256(half_of(at.lanes.x, half));
        at.s[half] = _mm256_loadu_si256(half_of(at.lanes.s, half));
    }
}

RMM_AVX2 RMM_INLINE void put_back(Lanes256& at) {
    at.lanes.out = at.out;
    at.lanes.words.next = at.next;
    for (unsigned half = 0; half < 2; ++half) {
        _mm256_storeu_si256(half_of(at.lanes.x, half), at.x[half]);
        _mm256_storeu_si256(half_of(at.lanes.s, half), at.s[half]);
    }
}

template <bool RAW>
RMM_AVX2 RMM_INLINE void decode_eight(Lanes256& at, unsigned half, __m256i slot) {
    const RowCode& row = at.lanes.row;
    const __m256i low_bits = _mm256_set1_epi32(LOW_BITS), zero = _mm256_setzero_si256();
    const __m256i one = _mm256_set1_epi32(1), word_mask = _mm256_set1_epi32(0xFFFF);
    __m256i x = at.x[half], s = at.s[half], j = _mm256_srli_epi32(slot, 24);
    x = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_and_si256(_mm256_srli_epi32(slot, TABLE_BITS), low_bits),
                                            _mm256_srli_epi32(x, TABLE_BITS)),
                         _mm256_and_si256(slot, low_bits));
    const __m256i top = _mm256_srli_epi32(x, 16), low = _mm256_cmpeq_epi32(top, zero);
    uint64_t taken = SPREAD.of[mask_of(low)];
    __m256i again = zero;
    if (RAW) {
        const __m256i raw_limit = _mm256_set1_epi32(1 << row.raw_bits);
        again = _mm256_cmpgt_epi32(raw_limit, _mm256_blendv_epi8(top, x, low));
        taken += SPREAD.of[mask_of(again)];
    }
    const uint64_t sums = taken * 0x0101010101010101u;  // byte i: words of lanes 0 … i
    const __m256i position = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(sums << 8)));
    const __m256i pair = _mm256_i32gather_epi32(reinterpret_cast<const int*>(at.next), position, 2);
    at.next += 2 * (sums >> 56);
    x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_and_si256(pair, word_mask)), low);
    if (RAW) {
        const __m128i raw_bits = _mm_cvtsi32_si128(static_cast<int>(row.raw_bits));
        const __m256i raw_mask = _mm256_set1_epi32((1 << row.raw_bits) - 1);
        j = _mm256_or_si256(_mm256_sll_epi32(j, raw_bits), _mm256_and_si256(x, raw_mask));
        x = _mm256_srl_epi32(x, raw_bits);
        const __m256i second = _mm256_blendv_epi8(_mm256_and_si256(pair, word_mask), _mm256_srli_epi32(pair, 16), low);
        x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), second), again);
        at.all = _mm256_or_si256(at.all, j);
    }
    const __m256i odd = _mm256_add_epi32(_mm256_add_epi32(j, j), one);
    const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(s, j), 31);
    const __m256 size = _mm256_mul_ps(_mm256_cvtepi32_ps(odd), _mm256_set1_ps(row.step));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at.out) + half, _mm256_xor_si256(_mm256_castps_si256(size), sign));
    const __m256i is_odd = _mm256_sub_epi32(zero, _mm256_and_si256(s, one));
    const __m256i is_in = _mm256_srai_epi32(_mm256_slli_epi32(_mm256_add_epi32(j, one), 30), 31);
    at.s[half] = _mm256_xor_si256(_mm256_srli_epi32(s, 1),
                                  _mm256_xor_si256(_mm256_and_si256(is_odd, _mm256_set1_epi32(FEEDBACK)),
                                                   _mm256_and_si256(is_in, _mm256_set1_epi32(INPUT))));
    at.x[half] = x;
}

template <bool RAW>
RMM_AVX2 RMM_INLINE void round_256(Lanes256& at) {
    const __m256i low_bits = _mm256_set1_epi32(LOW_BITS);
    const __m256i escape = _mm256_set1_epi32(static_cast<int>(at.lanes.row.escape));
    const int* table = reinterpret_cast<const int*>(at.lanes.row.slot);
    __m256i slot[2], escaped = _mm256_setzero_si256();
    for (unsigned half = 0; half < 2; ++half) {
        slot[half] = _mm256_i32gather_epi32(table, _mm256_and_si256(at.x[half], low_bits), 4);
        escaped = _mm256_or_si256(escaped, _mm256_cmpeq_epi32(_mm256_srli_epi32(slot[half], 24), escape));
    }
    if (mask_of(escaped)) {
        put_back(at);
        scalar_round<RAW>(at.lanes);
        take(at);
    } else {
        decode_eight<RAW>(at, 0, slot[0]);
        decode_eight<RAW>(at, 1, slot[1]);
    }
    at.out += LANES;
}

RMM_AVX2 RMM_INLINE void finish(Lanes256& at) {
    put_back(at);
    uint32_t indices[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices), at.all);
    for (uint32_t index : indices) at.lanes.seen |= index;
}

template <bool RAW>
RMM_AVX2 void one_256(WideLanes& lanes, uint64_t rounds) {
    Lanes256 at = {lanes, nullptr, nullptr, {}, {}, {}};
    take(at);
    for (; rounds > 0; --rounds) round_256<RAW>(at);
    finish(at);
}

template <bool RAW_A, bool RAW_B>
RMM_AVX2 void two_256(WideLanes& first, WideLanes& second, uint64_t rounds) {
    Lanes256 a = {first, nullptr, nullptr, {}, {}, {}}, b = {second, nullptr, nullptr, {}, {}, {}};
    take(a);
    take(b);
    for (; rounds > 0; --rounds) {
        round_256<RAW_A>(a);
        round_256<RAW_B>(b);
    }
    finish(a);
    finish(b);
}

// --- AVX2: eight runs of one lane, a lane of the vectors for each ---

// The table's last slot is the escape's, whose frequency is one.
constexpr uint32_t ESCAPE_SLOT = LOW_BITS;

struct Runs256 {
    Lanes<1>* run[MOST_RUNS];
    __m256i x, s, all;
    __m256i next[2], table[2];  // addresses
    __m256i raw_bits, raw_mask;
    __m256 step;
};

RMM_AVX2 RMM_INLINE __m256i addresses(const void* a, const void* b, const void* c, const void* d) {
    auto number = [](const void* at) { return static_cast<long long>(reinterpret_cast<uintptr_t>(at)); };
    return _mm256_setr_epi64x(number(a), number(b), number(c), number(d));
}

RMM_AVX2 RMM_INLINE __m256i gather(const __m256i (&at)[2]) {
    const int* const nowhere = nullptr;  // addresses are whole
    return _mm256_setr_m128i(_mm256_i64gather_epi32(nowhere, at[0], 1), _mm256_i64gather_epi32(nowhere, at[1], 1));
}

RMM_AVX2 RMM_INLINE void advance(__m256i (&at)[2], const __m256i (&from)[2], __m256i n_bytes) {
    at[0] = _mm256_add_epi64(from[0], _mm256_cvtepu32_epi64(_mm256_castsi256_si128(n_bytes)));
    at[1] = _mm256_add_epi64(from[1], _mm256_cvtepu32_epi64(_mm256_extracti128_si256(n_bytes, 1)));
}

RMM_AVX2 RMM_INLINE void take(Runs256& at) {
    alignas(32) uint32_t x[MOST_RUNS], s[MOST_RUNS];
    for (unsigned l = 0; l < MOST_RUNS; ++l) {
        x[l] = at.run[l]->x[0];
        s[l] = at.run[l]->s[0];
    }
    at.x = _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
    at.s = _mm256_load_si256(reinterpret_cast<const __m256i*>(s));
    for (unsigned half = 0; half < 2; ++half) {
        Lanes<1>* const* run = at.run + 4 * half;
        at.next[half] = addresses(run[0]->words.next, run[1]->words.next, run[2]->words.next, run[3]->words.next);
    }
}

RMM_AVX2 RMM_INLINE void put_back(const Runs256& at) {
    alignas(32) uint32_t x[MOST_RUNS], s[MOST_RUNS];
    alignas(32) uint64_t next[MOST_RUNS];
    _mm256_store_si256(reinterpret_cast<__m256i*>(x), at.x);
    _mm256_store_si256(reinterpret_cast<__m256i*>(s), at.s);
    for (unsigned half = 0; half < 2; ++half) _mm256_store_si256(reinterpret_cast<__m256i*>(next) + half, at.next[half]);
    for (unsigned l = 0; l < MOST_RUNS; ++l) {
        at.run[l]->x[0] = x[l];
        at.run[l]->s[0] = s[l];
        at.run[l]->words.next = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(next[l]));
    }
}

// Does a round at once, or tells that a lane has an escape.
template <bool RAW>
RMM_AVX2 RMM_INLINE bool round_of_runs(Runs256& at, __m256& values) {
    const __m256i low_bits = _mm256_set1_epi32(LOW_BITS), zero = _mm256_setzero_si256();
    const __m256i one = _mm256_set1_epi32(1), word_mask = _mm256_set1_epi32(0xFFFF), two = _mm256_set1_epi32(2);
    __m256i x = at.x, s = at.s;
    const __m256i index = _mm256_and_si256(x, low_bits);
    if (mask_of(_mm256_cmpeq_epi32(index, _mm256_set1_epi32(ESCAPE_SLOT)))) return false;
    __m256i from[2];
    advance(from, at.table, _mm256_slli_epi32(index, 2));
    const __m256i pair = gather(at.next), slot = gather(from);
    __m256i j = _mm256_srli_epi32(slot, 24);
    x = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_and_si256(_mm256_srli_epi32(slot, TABLE_BITS), low_bits),
                                            _mm256_srli_epi32(x, TABLE_BITS)),
                         _mm256_and_si256(slot, low_bits));
    const __m256i top = _mm256_srli_epi32(x, 16), low = _mm256_cmpeq_epi32(top, zero);
    __m256i n_bytes = _mm256_and_si256(low, two);
    const __m256i first = _mm256_and_si256(pair, word_mask);
    const __m256i known = x;
    x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), first), low);
    if (RAW) {
        const __m256i again = _mm256_cmpgt_epi32(_mm256_add_epi32(at.raw_mask, one), _mm256_blendv_epi8(top, known, low));
        n_bytes = _mm256_add_epi32(n_bytes, _mm256_and_si256(again, two));
        j = _mm256_or_si256(_mm256_sllv_epi32(j, at.raw_bits), _mm256_and_si256(x, at.raw_mask));
        x = _mm256_srlv_epi32(x, at.raw_bits);
        const __m256i second = _mm256_blendv_epi8(first, _mm256_srli_epi32(pair, 16), low);
        x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), second), again);
        at.all = _mm256_or_si256(at.all, j);
    }
    advance(at.next, at.next, n_bytes);
    const __m256i odd = _mm256_add_epi32(_mm256_add_epi32(j, j), one);
    const __m256 size = _mm256_mul_ps(_mm256_cvtepi32_ps(odd), at.step);
    values = _mm256_xor_ps(size, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_xor_si256(s, j), 31)));
    const __m256i is_odd = _mm256_sub_epi32(zero, _mm256_and_si256(s, one));
    const __m256i is_in = _mm256_srai_epi32(_mm256_slli_epi32(_mm256_add_epi32(j, one), 30), 31);
    at.s = _mm256_xor_si256(_mm256_srli_epi32(s, 1), _mm256_xor_si256(_mm256_and_si256(is_odd, _mm256_set1_epi32(FEEDBACK)),
                                                                      _mm256_and_si256(is_in, _mm256_set1_epi32(INPUT))));
    at.x = x;
    return true;
}

// Eight values of each lane, which lie one lane behind the other, to their rows.
RMM_AVX2 RMM_INLINE void store_eight(const float* values, Lanes<1>* const* lanes, unsigned n) {
    __m256 v[8], pairs[8], fours[8];
    for (unsigned i = 0; i < 8; ++i) v[i] = _mm256_load_ps(values + 8 * i);
    for (unsigned i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (unsigned i = 0; i < 8; i += 4) {
        for (unsigned odd = 0; odd < 2; ++odd) {
            fours[i + 2 * odd] = _mm256_shuffle_ps(pairs[i + odd], pairs[i + 2 + odd], 0x44);
            fours[i + 2 * odd + 1] = _mm256_shuffle_ps(pairs[i + odd], pairs[i + 2 + odd], 0xEE);
        }
    }
    alignas(32) float of[8][8];
    for (unsigned lane = 0; lane < 4; ++lane) {
        _mm256_store_ps(of[lane], _mm256_permute2f128_ps(fours[lane], fours[lane + 4], 0x20));
        _mm256_store_ps(of[lane + 4], _mm256_permute2f128_ps(fours[lane], fours[lane + 4], 0x31));
    }
    for (unsigned lane = 0; lane < n; ++lane) {
        _mm256_storeu_ps(reinterpret_cast<float*>(lanes[lane]->out), _mm256_load_ps(of[lane]));
        lanes[lane]->out += 8;
    }
}

template <bool RAW>
RMM_AVX2 void runs_256_of(Lanes<1>* const* lanes, unsigned n, uint64_t rounds) {
    // Lanes that are left over do what the first one does.
    Lanes<1> copies[MOST_RUNS];
    Runs256 at;
    alignas(32) uint32_t raw_bits[MOST_RUNS], raw_mask[MOST_RUNS];
    alignas(32) float step[MOST_RUNS];
    const uint32_t* slot[MOST_RUNS];
    for (unsigned l = 0; l < MOST_RUNS; ++l) {
        if (l >= n) copies[l] = *lanes[0];
        at.run[l] = l < n ? lanes[l] : &copies[l];
        const RowCode& row = at.run[l]->row;
        raw_bits[l] = row.raw_bits;
        raw_mask[l] = (1u << row.raw_bits) - 1;
        step[l] = row.step;
        slot[l] = row.slot;
    }
    at.table[0] = addresses(slot[0], slot[1], slot[2], slot[3]);
    at.table[1] = addresses(slot[4], slot[5], slot[6], slot[7]);
    at.raw_bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(raw_bits));
    at.raw_mask = _mm256_load_si256(reinterpret_cast<const __m256i*>(raw_mask));
    at.step = _mm256_load_ps(step);
    at.all = _mm256_setzero_si256();
    take(at);
    alignas(32) float values[8 * MOST_RUNS];
    unsigned held = 0;
    for (; rounds > 0; --rounds) {
        __m256 now;
        if (round_of_runs<RAW>(at, now)) {
            _mm256_store_ps(values + 8 * held, now);
        } else {
            put_back(at);
            for (unsigned l = 0; l < MOST_RUNS; ++l) {
                f32u value;
                Lanes<1>& lane = *at.run[l];
                decode_value<RAW, Refill::SHIFT>(lane.row, lane.x[0], lane.s[0], lane.words, lane.seen, value);
                values[8 * held + l] = value;
            }
            take(at);
        }
        if (++held == 8) {
            store_eight(values, lanes, n);
            held = 0;
        }
    }
    for (unsigned i = 0; i < held; ++i) {
        for (unsigned l = 0; l < n; ++l) *lanes[l]->out++ = values[8 * i + l];
    }
    put_back(at);
    if (!RAW) return;
    alignas(32) uint32_t seen[MOST_RUNS];
    _mm256_store_si256(reinterpret_cast<__m256i*>(seen), at.all);
    for (unsigned l = 0; l < n; ++l) lanes[l]->seen |= seen[l];
}

void runs_256(Lanes<1>* const* lanes, unsigned n, uint64_t rounds) {
    bool raw = false;
    for (unsigned l = 0; l < n; ++l) raw = raw || lanes[l]->raw();
    raw ? runs_256_of<true>(lanes, n, rounds) : runs_256_of<false>(lanes, n, rounds);
}

std::vector<WideKernels> supported() {
    std::vector<WideKernels> found;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) {
        found.push_back({"avx2",
                         {one_256<false>, one_256<true>},
                         {{two_256<false, false>, two_256<false, true>}, {two_256<true, false>, two_256<true, true>}},
                         runs_256});
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt")) {
        found.push_back({"avx512vbmi2",
                         {one_512<false>, one_512<true>},
                         {{two_512<false, false>, two_512<false, true>}, {two_512<true, false>, two_512<true, true>}},
                         runs_256});
    }
    return found;
}

}  // namespace
#endif

const std::vector<WideKernels>& wide_kernels() {
#if RMM_WIDE
    static const std::vector<WideKernels> found = supported();
#else
    static const std::vector<WideKernels> found = neon_kernels();
#endif
    return found;
}

const WideKernels* widest_kernels() { return wide_kernels().empty() ? nullptr : &wide_kernels().back(); }

}  // namespace trellis
}  // namespace rmm
