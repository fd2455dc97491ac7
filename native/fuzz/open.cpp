// Fuzz target: open bytes, the path that every reader takes first, and look at the names. The
// fastest target, so the one that sees most files.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rmm/rmm.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    rmm_file* file = nullptr;
    rmm_error error;
    rmm_status status = rmm_open_memory(data, size, &file, &error);
    if (status != RMM_OK) {
        // One clear error: a status that fits, a rule, a message.
        if (error.status != status || error.message[0] == 0) __builtin_trap();
        if (error.rule == 0 && status != RMM_NO_MEMORY) __builtin_trap();
        if (status == RMM_INTERNAL) __builtin_trap();
        return 0;
    }
    const char* before = nullptr;
    for (uint64_t task = 0; task < rmm_n_tasks(file); ++task) {
        const char* name = rmm_task_name(file, task);
        if (!name || (before && std::strcmp(before, name) >= 0)) __builtin_trap();
        before = name;
    }
    rmm_close(file);
    return 0;
}
