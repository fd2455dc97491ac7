// The reconstruction formula (8.1).
#pragma once

#include <memory>
#include <vector>

#include "arrays.hpp"
#include "kernels.hpp"

namespace rmm {

// One row of an array.
struct Row {
    const uint8_t* data = nullptr;
    const Encoding* encoding = nullptr;
};

// An array's rows, found by number.
class Rows {
  public:
    void clear() {
        runs_.clear();
        last_ = 0;
    }
    void push(const PlacedRun& run) { runs_.push_back(run); }
    void sort();  // if runs were not pushed in order
    bool present() const { return !runs_.empty(); }

    Row row(uint64_t i) {
        const PlacedRun* run = &runs_[last_];
        if (i < run->first_row || i - run->first_row >= run->n_rows) run = &find(i);
        return {run->data + (i - run->first_row) * run->row_bytes, run->encoding};
    }

  private:
    const PlacedRun& find(uint64_t i);

    std::vector<PlacedRun> runs_;
    size_t last_ = 0;
};

// Rows up to so long are worked on whole: memory is then read from one end to the other.
constexpr uint64_t LONGEST_TILE = 1024;
static_assert(LONGEST_TILE >= TILE && LONGEST_TILE % BLOCK == 0, "buffers hold either");

// Reconstructs factors, one thread's worth: buffers are kept from one to the next.
class Restorer {
  public:
    explicit Restorer(const Index& index) : index_(index) {}

    // Takes up factor `f` (0: A, 1: B) of an entry at `offset` in the file; decode() is to follow.
    // Throws Failure.
    void open(const EntryPlan& plan, int f, const Entry& entry, uint64_t offset);

    // Decodes what several have taken up and cannot be entered in the middle: together, since that is
    // quicker. A run that is malformed is told by finish().
    static void decode(Restorer* const* restorers, size_t n);

    // Makes ready for write(). Throws Failure.
    void finish();

    // Writes positions first … last − 1 of the factor, which starts at `out`; `first` is a multiple
    // of TILE. A is (rank, n_in), B (n_out, rank), row-major. With `past`, past the caches where that
    // can be: to be settled (Kernels) by the thread that wrote.
    void write(int dtype, uint8_t* out, uint64_t first, uint64_t last, bool past = false);

  private:
    void walk(const EntryPlan& plan, int f, const Entry& entry, uint64_t offset);
    void take(ArrayWalk& walk, const Array& array, Rows* rows);
    void put_off(const PlacedRun& run, uint64_t row_length, Rows& rows);
    bool copy(int dtype, uint8_t* out, uint64_t first, uint64_t last, bool past);
    void tile(int dtype, uint8_t* out, uint64_t first, uint64_t n, bool past);
    void sum_up(uint32_t k0, uint32_t n_rows, uint64_t first, uint64_t n, f32u* const* targets, const f32u** sums);
    void add_component(uint32_t k, uint64_t first, uint64_t n, uint32_t j, uint32_t n_terms, f32u* target,
                       const f32u*& sum);
    void prepare_coefficients(uint32_t k, uint32_t n_rows, uint64_t first, uint64_t n, uint32_t j, uint32_t n_terms);
    const f32u* decode(const Row& row, uint64_t first, uint64_t n, f32u* buffer);

    const Index& index_;
    FactorPlan plan_;
    int factor_ = 0;
    Rows mean_, basis_, coefficients_, residual_;

    // Runs of encodings that are not fixed-size, and their rows.
    struct Pending {
        const Encoding* encoding;
        RunDecoding decoding;
        Rows* rows;
        uint64_t first_row, next;  // of the run; the row that is to come
    };
    static void push_zeros(const Pending& pending, uint64_t until);
    std::vector<std::unique_ptr<Pending>> pending_;
    std::vector<std::unique_ptr<float[]>> decoded_;

    // A line longer than a power of two: rows at the same position then share no place in a cache.
    alignas(64) float panel_[PANEL_ROWS][LONGEST_TILE + 16];
    alignas(64) float terms_[TERMS][LONGEST_TILE + 16];
    alignas(64) float coefficients_at_[TERMS][LONGEST_TILE + BLOCK];
    alignas(64) uint16_t halves_[PANEL_ROWS][LONGEST_TILE + 32];
    const f32u* coefficient_[TERMS];
    bool scalar_ = false;
    const Kernels& kernels_ = kernels();
};

}  // namespace rmm
