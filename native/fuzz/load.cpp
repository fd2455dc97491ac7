// Fuzz target: open bytes, look at everything, load what is small.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rmm/rmm.h"

namespace {

// Values: larger tasks are well formed, and only slow. It is above what a tile and a panel hold, so that
// both end within a factor.
constexpr uint64_t MOST = 1 << 15;

volatile uint64_t sink;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    rmm_file* file = nullptr;
    rmm_error error;
    if (rmm_open_memory(data, size, &file, &error) != RMM_OK) return 0;
    // The tasks that are loaded share one budget; each is loaded as one dtype, which the bytes choose.
    uint64_t budget = MOST;
    uint64_t turn = size;
    for (size_t i = 0; i < size; i += 61) turn += data[i];
    for (uint64_t task = 0; task < rmm_n_tasks(file); ++task, ++turn) {
        rmm_task_info info;
        if (rmm_get_task_info(file, task, sizeof info, &info, &error) != RMM_OK) __builtin_trap();
        std::vector<rmm_private_info> privates(info.n_privates);
        rmm_get_privates(file, task, sizeof(rmm_private_info), privates.data(), privates.size(), &error);
        uint64_t sum = 0;
        for (const rmm_private_info& tensor : privates) {
            if (tensor.n_bytes > budget) continue;
            for (uint64_t i = 0; i < tensor.n_bytes; ++i) sum += tensor.data[i];
        }
        sink = sum;
        std::vector<rmm_entry_info> entries(info.n_entries);
        const int32_t dtype = static_cast<int32_t>(RMM_F32 + turn % 3);
        uint64_t arena_bytes = 0;
        if (rmm_get_entries(file, task, dtype, sizeof(rmm_entry_info), entries.data(), entries.size(), &arena_bytes,
                            &error) == RMM_OK &&
            info.n_values <= budget && arena_bytes <= 8 * MOST) {
            budget -= info.n_values;
            std::vector<uint8_t> arena(arena_bytes);
            rmm_load_task(file, task, dtype, arena.data(), arena.size(), 1, &error);
            if (!entries.empty()) {
                const rmm_entry_info& last = entries.back();
                std::vector<uint8_t> factor(last.n_bytes_b);
                rmm_load_factor(file, task, entries.size() - 1, RMM_FACTOR_B, dtype, factor.data(), factor.size(),
                                &error);
            }
        }
        uint64_t found;
        if (rmm_find_task(file, info.name, &found, &error) != RMM_OK || found != task) __builtin_trap();
    }
    rmm_close(file);
    return 0;
}
