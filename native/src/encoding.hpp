// The encodings of rows (8.2), one descriptor each.
#pragma once

#include <cstdint>
#include <functional>

#include "bytes.hpp"

namespace rmm {

// Values of a block: rows can be entered at multiples of this in every fixed-size encoding.
constexpr uint64_t BLOCK = 32;

// Limits of targets and forms (RMM-036, RMM-042).
constexpr uint64_t MAX_SIDE = uint64_t{1} << 40;
constexpr uint64_t MAX_RANK = uint64_t{1} << 20;

enum : uint8_t { ENCODING_ZERO = 0x00, ENCODING_F32 = 0x01, ENCODING_F16 = 0x02, ENCODING_BF16 = 0x03 };

// A run whose rows are to be decoded together: in ascending order, those that are not all +0, to where
// `target` says.
using RowTarget = std::function<float*(uint64_t row)>;
struct RunDecoding {
    const uint8_t* data;
    uint64_t n_bytes, n_rows, n;  // rows of n values
    RowTarget target;
    const char* wrong = nullptr;  // how the run breaks RMM-087
};

struct Encoding {
    uint8_t code;
    const char* name;

    // A fixed-size encoding takes block_bytes for each 2^block_shift values or part of them.
    bool fixed_size;
    uint8_t block_shift;
    uint32_t block_bytes;

    // Decodes values first … first + n − 1 of a row; `first` is a multiple of BLOCK.
    void (*decode)(const uint8_t* row, uint64_t first, uint64_t n, f32u* out);

    // Finds a breach of RMM-086 in a row of n values: null, or what is wrong. Null: none is possible.
    const char* (*check)(const uint8_t* row, uint64_t n);

    // For an encoding that is not fixed-size: the bytes of a run that starts at `data`, told by its
    // first bytes, or 0 if `available` bytes cannot hold it; and the decoding of runs, several of which
    // at once may be quicker than one by one. `target` is not called for a run that is too short for
    // its values.
    uint64_t (*run_bytes)(const uint8_t* data, uint64_t available);
    void (*decode_runs)(RunDecoding* runs, size_t n_runs);

    // Rows have at most 2^60 values, so this does not wrap.
    uint64_t row_bytes(uint64_t n) const {
        return block_bytes * ((n + (uint64_t{1} << block_shift) - 1) >> block_shift);
    }
};

// The encoding of that code; null if it is not known (RMM-088).
extern const Encoding* const* const ENCODINGS;
inline const Encoding* find_encoding(uint8_t code) { return ENCODINGS[code]; }

}  // namespace rmm
