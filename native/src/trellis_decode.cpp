// Decoding of trellis runs (8.3).

#include "trellis_wide.hpp"

#include <algorithm>
#include <optional>

namespace rmm {
namespace trellis {
namespace {

// Asks for a table's cache lines: a short row would wait for nearly every one it uses.
RMM_INLINE void fetch(const void* data, size_t n_bytes) {
#if defined(__GNUC__)
    const char* at = static_cast<const char*>(data);
    for (size_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(at + i);
#else
    (void)data, (void)n_bytes;
#endif
}

// The lanes of one run from its first row to its last.
template <unsigned LANES>
class Stream : public Lanes<LANES> {
  public:
    explicit Stream(Decoding& decoding) : decoding_(decoding) {
        const Run& run = decoding.run;
        this->words = {run.words, run.end};
        this->seen = 0;
        for (unsigned lane = 0; lane < LANES; ++lane) {
            this->x[lane] = u32(run.states + 4 * lane);
            this->s[lane] = 0;
            if (this->x[lane] < STATE_LOW) fail("a state of the trellis run is too small");
        }
    }

    // Goes on to the next row if this one is done. False if there is none, or if something is wrong.
    bool ready() {
        const Run& run = decoding_.run;
        if (left_ > 0) return true;
        while (row_ < run.n_rows && run.row_bytes[row_] == 0) ++row_;
        if (row_ >= run.n_rows) {
            finish();
            return false;
        }
        const Table& t = table(run.row_bytes[row_]);
        this->row = {t.slot, t.escape, t.raw_bits, row_step(run.base, run.row_bytes[row_])};
        fetch(t.slot, sizeof t.slot);
        this->out = decoding_.target(row_++);
        left_ = run.n;
        return true;
    }

    // Values of each lane for which there are words whatever they are.
    uint64_t rounds() const {
        return std::min(this->words.left() / (LANES * words_of_value(this->raw())), left_ / LANES);
    }

    void took(uint64_t rounds) { left_ -= rounds * LANES; }

    // The next value of each lane, as far as there are any.
    void step() {
        for (unsigned lane = 0; lane < LANES && left_ > 0; ++lane, --left_, ++this->out) {
            uint32_t &x = this->x[lane], &s = this->s[lane];
            const bool good =
                this->raw()
                    ? decode_value<true, Refill::CHECKED>(this->row, x, s, this->words, this->seen, *this->out)
                    : decode_value<false, Refill::CHECKED>(this->row, x, s, this->words, this->seen, *this->out);
            if (!good) return fail("the trellis run has too few words");
        }
    }

  private:
    void fail(const char* wrong) {
        decoding_.wrong = wrong;
        row_ = decoding_.run.n_rows;
        left_ = 0;
    }

    void finish() {
        if (decoding_.wrong) return;
        if (this->seen > MAX_INDEX) return fail("a level of the trellis run is too large");
        if (this->words.next != this->words.end) return fail("the trellis run has words left over");
        for (uint32_t x : this->x) {
            if (x != STATE_LOW) return fail("the trellis run does not end in its initial state");
        }
    }

    Decoding& decoding_;
    uint64_t row_ = 0, left_ = 0;
};

// What was measured to be quicker: with four lanes nearly everything is in registers, and of those the
// moves take one more.
template <unsigned LANES>
constexpr Refill QUICK = LANES == 4 ? Refill::SHIFT : Refill::MOVE;

// The states are copied to where the compiler can keep them in registers.
template <unsigned LANES, bool RAW>
void decode_rounds(Lanes<LANES>& lanes, uint64_t rounds) {
    Lanes<LANES> at = lanes;
    for (; rounds > 0; --rounds, at.out += LANES) {
        RMM_UNROLL
        for (unsigned lane = 0; lane < LANES; ++lane) {
            decode_value<RAW, QUICK<LANES>>(at.row, at.x[lane], at.s[lane], at.words, at.seen, at.out[lane]);
        }
    }
    lanes = at;
}

// Two runs at once. A row without raw bits is one with zero of them, at some cost.
template <unsigned LANES, bool RAW>
void decode_rounds(Lanes<LANES>& first, Lanes<LANES>& second, uint64_t rounds) {
    Lanes<LANES> a = first, b = second;
    for (; rounds > 0; --rounds, a.out += LANES, b.out += LANES) {
        RMM_UNROLL
        for (unsigned lane = 0; lane < LANES; ++lane) {
            decode_value<RAW, Refill::MOVE>(a.row, a.x[lane], a.s[lane], a.words, a.seen, a.out[lane]);
            decode_value<RAW, Refill::MOVE>(b.row, b.x[lane], b.s[lane], b.words, b.seen, b.out[lane]);
        }
    }
    first = a;
    second = b;
}

template <unsigned LANES>
void decode_one(Lanes<LANES>& lanes, uint64_t rounds, const WideKernels* wide) {
    if constexpr (LANES == MAX_LANES) {
        if (wide) return wide->one[lanes.raw()](lanes, rounds);
    }
    lanes.raw() ? decode_rounds<LANES, true>(lanes, rounds) : decode_rounds<LANES, false>(lanes, rounds);
}

template <unsigned LANES>
void decode_two(Lanes<LANES>& a, Lanes<LANES>& b, uint64_t rounds, const WideKernels* wide) {
    if constexpr (LANES == MAX_LANES) {
        if (wide) return wide->two[a.raw()][b.raw()](a, b, rounds);
    }
    if constexpr (LANES == 1) {
        if (a.raw() || b.raw()) return decode_rounds<LANES, true>(a, b, rounds);
        return decode_rounds<LANES, false>(a, b, rounds);
    }
    decode_one(a, rounds, wide);
    decode_one(b, rounds, wide);
}

// Whether there is something left to do in a stream, with the next run of so many lanes if need be.
template <unsigned LANES>
bool under_way(std::optional<Stream<LANES>>& stream, Decoding* decodings, size_t n, size_t& next) {
    while (!stream || !stream->ready()) {
        stream.reset();
        while (next < n && (decodings[next].wrong || decodings[next].run.lanes != LANES)) ++next;
        if (next == n) return false;
        stream.emplace(decodings[next++]);
    }
    return true;
}

// Runs that are decoded together by one kernel; of fewer, two at a time are quicker.
constexpr unsigned FEWEST_RUNS = 5;

// Runs of one lane while there are many, from `next` on. What is under way at the end is left in
// `streams`.
void decode_together(Decoding* decodings, size_t n, size_t& next, std::optional<Stream<1>> (&streams)[MOST_RUNS],
                     const WideKernels& wide) {
    for (;;) {
        Stream<1>* running[MOST_RUNS];
        Lanes<1>* lanes[MOST_RUNS];
        unsigned count = 0;
        uint64_t rounds = UINT64_MAX;
        for (auto& stream : streams) {
            if (!under_way(stream, decodings, n, next)) continue;
            lanes[count] = running[count] = &*stream;
            ++count;
            rounds = std::min(rounds, stream->rounds());
        }
        if (count < FEWEST_RUNS) return;
        if (rounds > 0) wide.runs(lanes, count, rounds);
        for (unsigned i = 0; i < count; ++i) {
            if (rounds > 0) {
                running[i]->took(rounds);
            } else if (running[i]->rounds() == 0) {
                running[i]->step();
            }
        }
    }
}

// All runs of so many lanes, two under way at any time: a value waits for the one before it in its
// lane, so one run alone leaves the processor idle half of the time.
template <unsigned LANES>
void decode_all(Decoding* decodings, size_t n, const WideKernels* wide) {
    std::optional<Stream<LANES>> streams[2], left[LANES == 1 ? MOST_RUNS : 1];
    size_t next = 0, n_left = 0;
    if constexpr (LANES == 1) {
        if (wide && wide->runs) decode_together(decodings, n, next, left, *wide);
        n_left = MOST_RUNS;
    }
    for (;;) {
        for (auto& stream : streams) {
            while (n_left > 0 && (!stream || !stream->ready())) {
                stream.reset();
                if (auto& held = left[--n_left]) {
                    stream.emplace(std::move(*held));
                    held.reset();
                }
            }
            under_way(stream, decodings, n, next);
        }
        auto &a = streams[0], &b = streams[1];
        if (!a && !b) return;
        if (a && b) {
            if (const uint64_t rounds = std::min(a->rounds(), b->rounds())) {
                decode_two<LANES>(*a, *b, rounds, wide);
                a->took(rounds);
                b->took(rounds);
                continue;
            }
        }
        for (auto& stream : streams) {
            if (!stream || (a && b && stream->rounds() > 0)) continue;
            if (const uint64_t rounds = stream->rounds()) {
                decode_one<LANES>(*stream, rounds, wide);
                stream->took(rounds);
            } else {
                stream->step();
            }
        }
    }
}

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

void decode(Decoding* decodings, size_t n, const WideKernels* wide) {
    decode_all<1>(decodings, n, wide);
    decode_all<4>(decodings, n, wide);
    decode_all<MAX_LANES>(decodings, n, wide);
}

void decode(Decoding* decodings, size_t n) { decode(decodings, n, widest_kernels()); }

}  // namespace trellis
}  // namespace rmm
