// What an entry or a frame stores, and where (sections 7.2 and 8.1).
#pragma once

#include "index.hpp"

namespace rmm {

// An array: the rows of a layout, each of row_length values.
struct Array {
    uint32_t layout = NONE;
    uint64_t row_length = 0;
};

// One factor of an entry: the terms of its sum. A term whose layout is NONE is absent.
struct FactorPlan {
    uint64_t n_positions = 0;   // L
    uint32_t rank = 0;          // r
    uint32_t frame_rank = 0;    // R; 0 if the task shares nothing here
    uint32_t n_components = 0;  // p
    uint64_t group = 1;
    bool row_mixing = false;
    Array mean, basis, coefficients, residual;
};

struct EntryPlan {
    uint32_t frame = NONE;
    FactorPlan factor[2];  // A and B
};

// The four arrays of a frame, in the order of its bytes: mean and basis of A, of B.
void frame_arrays(const Frame& frame, const Target& target, Array arrays[4]);

// RMM-060: the plan of an entry, or a sentence that says why form, target and frame do not fit.
const char* plan_entry(const Index& index, const Form& form, uint32_t target_id, const Target& target,
                       EntryPlan& plan);

// The four arrays of an entry in the order of its bytes.
inline void entry_arrays(const EntryPlan& plan, Array arrays[4]) {
    for (int f = 0; f < 2; ++f) {
        arrays[2 * f] = plan.factor[f].coefficients;
        arrays[2 * f + 1] = plan.factor[f].residual;
    }
}

// Are all encodings of the arrays known and fixed-size?
bool all_fixed_size(const Index& index, const Array arrays[4]);

// The bytes that four arrays of fixed-size encodings take; NO_LENGTH if more than `limit`.
constexpr uint64_t NO_LENGTH = UINT64_MAX;
uint64_t arrays_length(const Index& index, const Array arrays[4], uint64_t limit);

// Where a run's bytes start that take n_bytes, behind `end` bytes of its entry or frame (7.2).
RMM_INLINE uint64_t run_start(uint64_t end, uint64_t n_bytes) {
    return n_bytes >= LARGE ? ceil_to(end, LARGE_ALIGNMENT) : end;
}

// A run with its bytes.
struct PlacedRun {
    const uint8_t* data = nullptr;
    const Encoding* encoding = nullptr;
    uint64_t n_bytes = 0;
    uint64_t row_bytes = 0;  // 0 if the encoding is not fixed-size
    uint64_t first_row = 0;
    uint64_t n_rows = 0;
};

// Finds the runs of arrays within the bytes of one entry or frame, one array after the other.
// Throws Failure: RMM-088, RMM-087, or `length_rule` (RMM-052, RMM-061).
class ArrayWalk {
  public:
    ArrayWalk(const Index& index, uint64_t offset, uint64_t length, int length_rule, const char* what)
        : index_(index), offset_(offset), length_(length), rule_(length_rule), what_(what) {}

    // Calls visit(run) for each run of the array that takes bytes or decodes to zeros; gap(offset,
    // n_bytes) for padding before it.
    template <class Visit, class Gap>
    void array(const Array& array, Visit&& visit, Gap&& gap) {
        if (array.layout == NONE) return;
        const Layout& layout = index_.layouts[array.layout];
        uint64_t row = 0;
        for (uint32_t i = 0; i < layout.n_runs; ++i) {
            PlacedRun run = place(layout.run(i), array.row_length);
            run.first_row = row;
            row += run.n_rows;
            if (gap_ > 0) gap(offset_ + end_ - run.n_bytes - gap_, gap_);
            visit(run);
        }
    }

    // The arrays must take all of the bytes.
    void finish() const;

  private:
    PlacedRun place(const Run& run, uint64_t row_length);

    const Index& index_;
    uint64_t offset_, length_;
    int rule_;
    const char* what_;
    uint64_t end_ = 0, gap_ = 0;
};

}  // namespace rmm
