// Decoding of trellis runs (8.3).

#include "trellis_wide.hpp"

#if defined(__clang__)
#define RMM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define RMM_UNROLL _Pragma("GCC unroll 16")
#else
#define RMM_UNROLL
#endif

namespace rmm {
namespace trellis {
namespace {

template <unsigned LANES>
class Decoder {
  public:
    Decoder(const Run& run, const WideKernels* wide) : run_(run), wide_(wide), words_{run.words, run.end} {
        for (unsigned lane = 0; lane < LANES; ++lane) {
            x_[lane] = u32(run.states + 4 * lane);
            s_[lane] = 0;
        }
    }

    const char* decode(const RowTarget& target) {
        for (uint32_t x : x_) {
            if (x < STATE_LOW) return "a state of the trellis run is too small";
        }
        for (uint64_t k = 0; k < run_.n_rows; ++k) {
            if (run_.row_bytes[k] == 0) continue;
            const Table& t = table(run_.row_bytes[k]);
            const RowCode code = {t.slot, t.escape, t.raw_bits, row_step(run_.base, run_.row_bytes[k])};
            f32u* out = target(k);
            if (!(t.raw_bits == 0 ? row<false>(code, out) : row<true>(code, out))) {
                return "the trellis run has too few words";
            }
        }
        if (seen_ > MAX_INDEX) return "a level of the trellis run is too large";
        if (words_.next != words_.end) return "the trellis run has words left over";
        for (uint32_t x : x_) {
            if (x != STATE_LOW) return "the trellis run does not end in its initial state";
        }
        return nullptr;
    }

  private:
    // What was measured to be quicker: with four lanes nearly everything is in registers, and of those
    // the moves take one more.
    static constexpr Refill QUICK = LANES == 4 ? Refill::SHIFT : Refill::MOVE;

    template <bool RAW>
    bool row(const RowCode& code, f32u* out) {
        constexpr uint64_t MOST = LANES * words_of_value(RAW);
        const uint64_t n = run_.n;
        uint64_t at = 0;
        while (at < n) {
            uint64_t rounds = words_.left() / MOST;
            if (rounds > (n - at) / LANES) rounds = (n - at) / LANES;
            if (rounds > 0) {
                if (LANES == MAX_LANES && wide_) {
                    (RAW ? wide_->raw : wide_->plain)(code, out + at, rounds, x_, s_, words_, seen_);
                } else {
                    unchecked<RAW>(code, out + at, rounds);
                }
                at += rounds * LANES;
                continue;
            }
            for (unsigned lane = 0; lane < LANES && at < n; ++lane, ++at) {
                if (!decode_value<RAW, Refill::CHECKED>(code, x_[lane], s_[lane], words_, seen_, out[at])) return false;
            }
        }
        return true;
    }

    // The states are copied to where the compiler can keep them in registers.
    template <bool RAW>
    void unchecked(const RowCode& shared, f32u* out, uint64_t rounds) {
        const RowCode code = shared;
        uint32_t x[LANES], s[LANES], seen = seen_;
        Words words = words_;
        std::memcpy(x, x_, sizeof x);
        std::memcpy(s, s_, sizeof s);
        for (; rounds > 0; --rounds, out += LANES) {
            RMM_UNROLL
            for (unsigned lane = 0; lane < LANES; ++lane) {
                decode_value<RAW, QUICK>(code, x[lane], s[lane], words, seen, out[lane]);
            }
        }
        std::memcpy(x_, x, sizeof x);
        std::memcpy(s_, s, sizeof s);
        words_ = words;
        seen_ = seen;
    }

    const Run& run_;
    const WideKernels* wide_;
    Words words_;
    uint32_t x_[LANES], s_[LANES];
    uint32_t seen_ = 0;  // all indices with raw bits, OR-ed
};

}  // namespace

uint64_t run_bytes(const uint8_t* data, uint64_t available) {
    uint64_t length = 0;
    for (unsigned i = 0; i < 5 && i < available; ++i) {
        length |= static_cast<uint64_t>(data[i] & 127) << (7 * i);
        if (data[i] & 128) continue;
        if ((i > 0 && data[i] == 0) || length > UINT32_MAX || length > available - (i + 1)) return 0;
        return i + 1 + length;
    }
    return 0;
}

const char* parse(const uint8_t* data, uint64_t n_bytes, uint64_t n_rows, uint64_t n, Run& run) {
    if (n_bytes == 0 || run_bytes(data, n_bytes) != n_bytes) return "the length of the trellis run is malformed";
    const uint8_t* at = data;
    while (*at++ & 128) {
    }
    const uint64_t length = n_bytes - static_cast<uint64_t>(at - data);
    constexpr const char* SHORT = "the trellis run is too short";
    if (length < 2 || length - 2 < n_rows) return SHORT;
    run.base = u16(at);
    run.n_rows = n_rows;
    run.n = n;
    run.row_bytes = at + 2;
    if (const char* wrong = check_steps(run.base, run.row_bytes, n_rows)) return wrong;
    run.n_coded = 0;
    for (uint64_t k = 0; k < n_rows; ++k) run.n_coded += run.row_bytes[k] != 0;
    uint64_t n_values;
    if (!multiply(run.n_coded, n, n_values)) n_values = UINT64_MAX;
    run.lanes = lanes_of(n_values);
    const uint64_t rest = length - 2 - n_rows;
    if (rest < 4 * run.lanes) return SHORT;
    if (rest % 2 != 0) return "the trellis run ends within a word";
    run.states = run.row_bytes + n_rows;
    run.words = run.states + 4 * run.lanes;
    run.end = data + n_bytes;
    // A symbol takes at least 0.025 bit, a state holds 16 that can be used and a word 16.1: a run with
    // more values than this lacks words, and this way nobody allocates memory to find that out.
    const uint64_t n_words = (rest - 4 * run.lanes) / 2;
    if (n_values > 1024 * (run.lanes + n_words)) return "the trellis run has too few words";
    return nullptr;
}

const char* decode(const Run& run, const RowTarget& target, const WideKernels* wide) {
    switch (run.lanes) {
        case 1: return Decoder<1>(run, wide).decode(target);
        case 4: return Decoder<4>(run, wide).decode(target);
        default: return Decoder<MAX_LANES>(run, wide).decode(target);
    }
}

const char* decode(const Run& run, const RowTarget& target) { return decode(run, target, widest_kernels()); }

}  // namespace trellis
}  // namespace rmm
