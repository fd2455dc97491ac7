// The trellis encoding (8.3): rows as trellis-coded quantisation, entropy coded.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bytes.hpp"

namespace rmm {
namespace trellis {

constexpr unsigned TABLE_BITS = 12;               // frequencies sum to 2^12
constexpr uint32_t STATE_LOW = uint32_t{1} << 16;  // a state of the entropy coder below this takes a word
constexpr uint32_t MAX_INDEX = (uint32_t{1} << 23) - 1;  // j, so that m = 2j + 1 is exact in f32
constexpr unsigned MAX_SYMBOLS = 64;              // Q is at most 52
constexpr unsigned MAX_LANES = 16;

// The state machine that gives the signs: Ungerboeck's code of 256 states.
constexpr uint32_t FEEDBACK = 0xA6, INPUT = 0x79;
RMM_INLINE uint32_t next_state(uint32_t s, uint32_t j) {
    constexpr uint32_t ADD[4] = {0, FEEDBACK, INPUT, FEEDBACK ^ INPUT};
    return (s >> 1) ^ ADD[(s & 1) | ((j + 1) & 2)];
}

// What a table number stands for.
struct Table {
    unsigned raw_bits;                        // b
    uint32_t escape;                          // Q, the symbol behind which a word follows
    uint16_t frequency[MAX_SYMBOLS];          // f
    uint16_t start[MAX_SYMBOLS];              // cum
    uint32_t slot[1u << TABLE_BITS];          // by x mod 4096: symbol << 24 | f << 12 | slot − cum
    float bits[MAX_SYMBOLS];                  // what a value costs, raw bits and escaped word included

    // The largest j that can be coded.
    uint32_t max_index() const {
        uint64_t limit = ((uint64_t{escape} + 65536) << raw_bits) - 1;
        return limit < MAX_INDEX ? static_cast<uint32_t>(limit) : MAX_INDEX;
    }
};

// Row bytes that are table numbers: family 0 is 1 … 112, family 1 is 129 … 240.
constexpr uint32_t N_INDICES = 112;
inline uint32_t table_index(uint8_t number) { return (number & 127u) - 1; }
inline bool is_table(uint8_t number) { return table_index(number) < N_INDICES; }

// The table of a valid number. Made when it is first asked for, by any thread, and kept.
const Table& table(uint8_t number);

// Lanes of a run with that many coded values.
inline uint32_t lanes_of(uint64_t n_values) {
    return n_values < (1u << 14) ? 1 : n_values < (1u << 16) ? 4 : MAX_LANES;
}

// The base step that the low 15 bits of `base` stand for, and a row's step.
float base_step(uint16_t base);
float row_step(uint16_t base, uint8_t row_byte);

// RMM-087 for base and row bytes: null, or what is wrong with them.
const char* check_steps(uint16_t base, const uint8_t* row_bytes, uint64_t n_rows);

// A run whose head has been checked.
struct Run {
    uint16_t base = 0;
    uint64_t n_rows = 0, n = 0;
    uint64_t n_coded = 0;             // rows whose byte is not 0
    const uint8_t* row_bytes = nullptr;
    const uint8_t* states = nullptr;  // lanes words of 32 bits
    const uint8_t* words = nullptr;   // words of 16 bits
    const uint8_t* end = nullptr;
    uint32_t lanes = 1;
};

// Bytes of the run that starts at `data`, its length included; 0 if that is not told in shortest form
// or exceeds `available`.
uint64_t run_bytes(const uint8_t* data, uint64_t available);

// Reads the head of a run of `n_bytes`. Null, or how it breaks RMM-087. A run that passes has at most
// 1,024 coded values for each two bytes of words and lane, so that what they take can be allocated.
const char* parse(const uint8_t* data, uint64_t n_bytes, uint64_t n_rows, uint64_t n, Run& run);

// A run to be decoded: the rows that have symbols, in order, into target(row).
using RowTarget = std::function<float*(uint64_t row)>;
struct Decoding {
    Run run;
    RowTarget target;
    const char* wrong = nullptr;  // how the run breaks RMM-087, which may be found at the very end
};

// Decodes all of them but those that are wrong already; several at once are quicker than one by one.
void decode(Decoding* decodings, size_t n);

// Codes rows (n_rows, n) with the step that `base` and the row's byte give, so that the sum of
// (error / step)² + lambda · bits is least over all sequences of the trellis.
//
// `row_bytes` are read, and written if `families` is not 0: then, in mode 0, the tables that suit the
// chosen indices best are looked for in these families (bit 0: Gaussian, bit 1: exponential), and where
// they differ the search is run again. `decoded` takes what a reader will decode. Null, or what
// is wrong with the arguments. Float32 in a fixed order: the same bytes on every machine.
const char* encode(const float* rows, uint64_t n_rows, uint64_t n, uint8_t* row_bytes, uint16_t base,
                   const float* lambdas, unsigned families, std::vector<uint8_t>& run, float* decoded);

// The search behind encode(): the best j and m of every coded value. Values are in units of the step.
struct SearchRow {
    const Table* table;  // null: a row without symbols
    float lambda;
};
void search(const float* values, const std::vector<SearchRow>& rows, uint64_t n, uint32_t lanes, uint32_t* indices,
            float* multiples);

}  // namespace trellis
}  // namespace rmm
