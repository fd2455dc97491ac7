// Work in units, taken from a counter by a few threads.
#pragma once

#include <cstdint>
#include <functional>

namespace rmm {

// Threads to use for so much work, about as many bytes of f32; `asked` 0 lets this function choose, one
// for each `work_per_thread`. Never more than units, and one alone for what is not worth starting another.
uint32_t choose_threads(uint32_t asked, uint64_t work, uint64_t n_units, uint64_t work_per_thread = 1 << 20);

// Calls work(next) in n_threads threads, one of them the caller's; next() gives unit numbers until
// there are no more. The exception of the lowest unit that threw is thrown again, so that the
// outcome does not depend on the number of threads.
using NextUnit = std::function<bool(uint64_t& unit)>;
void in_parallel(uint32_t n_threads, uint64_t n_units, const std::function<void(const NextUnit&)>& work);

// The caller's floating-point environment put aside: round to nearest, subnormals kept (8.1),
// whatever the program has set for itself.
class ExactArithmetic {
  public:
    ExactArithmetic();
    ~ExactArithmetic();
    ExactArithmetic(const ExactArithmetic&) = delete;
    ExactArithmetic& operator=(const ExactArithmetic&) = delete;

  private:
    uint64_t saved_ = 0;
};

}  // namespace rmm
