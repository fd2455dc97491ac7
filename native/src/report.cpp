#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace rmm {

bool all_zero(const uint8_t* data, uint64_t n_bytes) {
    uint64_t i = 0;
    for (; i + 8 <= n_bytes; i += 8) {
        if (u64(data + i) != 0) return false;
    }
    for (; i < n_bytes; ++i) {
        if (data[i] != 0) return false;
    }
    return true;
}

rmm_status status_of_rule(int rule) {
    switch (rule) {
        case 1:
            return RMM_NOT_RMM;
        case 2:
        case 3:
            return RMM_UNSUPPORTED_VERSION;
        case 23:
            return RMM_UNSUPPORTED_SECTION;
        case 88:
            return RMM_UNSUPPORTED_ENCODING;
        case 13:
            return RMM_TRUNCATED;
        case 4:
        case 10:
        case 12:
        case 20:
        case 25:
        case 80:
        case 81:
        case 82:
        case 83:
            return RMM_CHECKSUM;
        default:
            return RMM_MALFORMED;
    }
}

std::string vformat(const char* text, va_list arguments) {
    // Longer than rmm_error.message, so that cutting happens in one place, at a whole character.
    char buffer[1536];
    int n = std::vsnprintf(buffer, sizeof buffer, text, arguments);
    if (n < 0) return text;
    return std::string(buffer, std::min<size_t>(static_cast<size_t>(n), sizeof buffer - 1));
}

std::string format(const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    std::string result = vformat(text, arguments);
    va_end(arguments);
    return result;
}

void fail(rmm_status status, const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    Failure failure{status, 0, RMM_NO_OFFSET, vformat(text, arguments)};
    va_end(arguments);
    throw failure;
}

void refuse(int rule, uint64_t offset, const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    Failure failure{status_of_rule(rule), rule, offset, vformat(text, arguments)};
    va_end(arguments);
    throw failure;
}

void Report::broken(int rule, uint64_t offset, const char* text, ...) {
    ++count_;
    if (!wants(rule)) return;
    va_list arguments;
    va_start(arguments, text);
    Failure failure{status_of_rule(rule), rule, offset, vformat(text, arguments)};
    va_end(arguments);
    take(std::move(failure));
}

void Report::broken_as(rmm_status status, int rule, uint64_t offset, const char* text, ...) {
    ++count_;
    if (!wants(rule)) return;
    va_list arguments;
    va_start(arguments, text);
    Failure failure{status, rule, offset, vformat(text, arguments)};
    va_end(arguments);
    take(std::move(failure));
}

}  // namespace rmm
