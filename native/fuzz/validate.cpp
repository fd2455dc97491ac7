// Fuzz target: validate bytes. What is passed by a validator that finds
// nothing is opened by a reader.

#include <cstddef>
#include <cstdint>

#include "rmm/rmm.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    rmm_error error;
    uint64_t n_violations = 0;
    auto count = [](void* user, const rmm_violation* violation) {
        if (violation->message == nullptr || violation->rule <= 0) __builtin_trap();
        ++*static_cast<uint64_t*>(user);
        return 0;
    };
    uint64_t n_calls = 0;
    rmm_status status = rmm_validate_memory(data, size, count, &n_calls, &n_violations, &error);
    if (status != RMM_OK && status != RMM_NO_MEMORY) __builtin_trap();
    if (n_calls > n_violations) __builtin_trap();
    rmm_file* file = nullptr;
    rmm_status opened = rmm_open_memory(data, size, &file, &error);
    if (status == RMM_OK && n_violations == 0 && opened != RMM_OK) __builtin_trap();
    rmm_close(file);
    return 0;
}
