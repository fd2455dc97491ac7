// How broken rules are told: a reader stops at the first, a validator goes on.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <string>

#include "bytes.hpp"
#include "rmm/rmm.h"

namespace rmm {

using ull = unsigned long long;  // for %llu

// Internal to the library: the C interface turns it into a status.
struct Failure {
    rmm_status status;
    int rule;  // 0: none
    uint64_t offset;
    std::string message;
    int os_error = 0;
};

// The status with which a reader answers a broken rule.
rmm_status status_of_rule(int rule);

RMM_PRINTF(1, 2) std::string format(const char* text, ...);
std::string vformat(const char* text, va_list arguments);

[[noreturn]] RMM_PRINTF(2, 3) void fail(rmm_status status, const char* text, ...);
[[noreturn]] RMM_PRINTF(3, 4) void refuse(int rule, uint64_t offset, const char* text, ...);

class Report {
  public:
    virtual ~Report() = default;

    // A rule is broken at `offset`. Callers must be able to go on.
    RMM_PRINTF(4, 5) void broken(int rule, uint64_t offset, const char* text, ...);

    // As broken(), where the status is not the rule's usual one.
    RMM_PRINTF(5, 6)
    void broken_as(rmm_status status, int rule, uint64_t offset, const char* text, ...);

    uint64_t count() const { return count_; }

  protected:
    virtual void take(Failure&& failure) = 0;
    virtual bool wants(int) { return true; }
    uint64_t count_ = 0;
};

// A reader's: the first broken rule refuses the file.
class Refusing final : public Report {
    void take(Failure&& failure) override { throw std::move(failure); }
};

}  // namespace rmm
