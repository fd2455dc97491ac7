// Work in units, taken from a counter by a few threads.
#pragma once

#include <cstdint>
#include <functional>

namespace rmm {

// Threads to use for that many bytes of output; `asked` 0 lets this function choose.
uint32_t choose_threads(uint32_t asked, uint64_t n_bytes, uint64_t n_units);

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
