// Fuzz target: every function of rmm.h on one file, in any order and with any arguments: null
// pointers, structs of odd sizes, memory that is too small, numbers out of range. The file's bytes
// also choose the calls, so an input is one repeatable program.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "rmm/rmm.h"

namespace {

constexpr uint64_t MOST = 1 << 15;  // values of a task that is loaded
constexpr int CALLS = 24;

// Numbers that a caller may get wrong, from the bytes of the file (splitmix64).
class Choice {
  public:
    Choice(const uint8_t* data, size_t size) : state_(size) {
        for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001B3u;
    }
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t n) { return n == 0 ? 0 : next() % n; }
    bool one_in(uint64_t n) { return below(n) == 0; }

    // Mostly a number below n, sometimes one that is not.
    uint64_t number(uint64_t n) {
        if (!one_in(16)) return below(n);
        const uint64_t odd[] = {n, n + 1, UINT32_MAX, UINT64_MAX, UINT64_MAX / 8, uint64_t{1} << 63};
        return odd[below(sizeof odd / sizeof *odd)];
    }
    int32_t code(int32_t first, int32_t last) {
        if (!one_in(16)) return first + static_cast<int32_t>(below(static_cast<uint64_t>(last - first) + 1));
        return static_cast<int32_t>(next());
    }
    // Of a struct: right, of an older header, of a newer one, or nonsense.
    size_t struct_size(size_t right) {
        switch (below(8)) {
            case 0: return below(right + 1);
            case 1: return right + below(64);
            default: return right;
        }
    }

  private:
    uint64_t state_;
};

// Memory of just that size, or none at all, so that the sanitizer sees a byte too many.
class Block {
  public:
    Block(Choice& choice, uint64_t n_bytes)
        : size(choice.one_in(16) ? n_bytes / 2 : n_bytes),
          memory_(choice.one_in(32) ? nullptr : new uint8_t[size]) {}
    template <class T>
    T* as() { return reinterpret_cast<T*>(memory_.get()); }

    const uint64_t size;

  private:
    std::unique_ptr<uint8_t[]> memory_;
};

// Refused or done, the error says the same as the status.
void settled(rmm_status status, const rmm_error* error) {
    if (status == RMM_INTERNAL) __builtin_trap();
    if (!error) return;
    if (error->status != status) __builtin_trap();
    if ((status == RMM_OK) != (error->message[0] == 0)) __builtin_trap();
    if (std::memchr(error->message, 0, sizeof error->message) == nullptr) __builtin_trap();
    if (std::strcmp(rmm_status_name(status), "unknown status") == 0) __builtin_trap();
}

struct Counter {
    uint64_t n;
    uint64_t stop_at;
};

int count(void* user, const rmm_violation* violation) {
    Counter* counter = static_cast<Counter*>(user);
    if (!violation->message || violation->rule <= 0) __builtin_trap();
    return ++counter->n == counter->stop_at;
}

void one_call(Choice& choice, const rmm_file* file, const uint8_t* data, size_t size) {
    rmm_error buffer;
    rmm_error* error = choice.one_in(8) ? nullptr : &buffer;
    const rmm_file* handle = choice.one_in(64) ? nullptr : file;
    const uint64_t n_tasks = rmm_n_tasks(file);
    const uint64_t task = choice.number(n_tasks);
    const int32_t dtype = choice.code(RMM_F32, RMM_BF16);
    rmm_task_info info;
    std::memset(&info, 0, sizeof info);
    if (rmm_get_task_info(file, task, sizeof info, &info, &buffer) != RMM_OK && task < n_tasks) __builtin_trap();
    switch (choice.below(16)) {
        case 0: {
            const size_t struct_size = choice.struct_size(sizeof(rmm_file_info));
            Block to(choice, struct_size);
            settled(rmm_get_file_info(handle, to.size, to.as<rmm_file_info>(), error), error);
            break;
        }
        case 1: {
            const size_t struct_size = choice.struct_size(sizeof(rmm_task_info));
            Block to(choice, struct_size);
            settled(rmm_get_task_info(handle, task, to.size, to.as<rmm_task_info>(), error), error);
            break;
        }
        case 2: {
            const size_t struct_size = choice.struct_size(sizeof(rmm_target_info));
            Block to(choice, struct_size);
            const uint64_t target = choice.number(rmm_n_targets(handle));
            settled(rmm_get_target_info(handle, target, to.size, to.as<rmm_target_info>(), error), error);
            break;
        }
        case 3: {
            const char* name = rmm_task_name(handle, task);
            uint64_t found = 0;
            uint64_t* to = choice.one_in(16) ? nullptr : &found;
            rmm_status status = rmm_find_task(handle, name, to, error);
            settled(status, error);
            if (handle && name && to && (status != RMM_OK || found != task)) __builtin_trap();
            settled(rmm_find_task(handle, choice.one_in(2) ? "" : "\xff\xfe\x7f", to, error), error);
            break;
        }
        case 4:
        case 5: {
            const size_t struct_size = choice.struct_size(sizeof(rmm_entry_info));
            const uint64_t capacity = choice.one_in(8) ? choice.below(info.n_entries + 2) : info.n_entries;
            Block to(choice, struct_size * capacity);
            uint64_t arena = 0;
            settled(rmm_get_entries(handle, task, dtype, struct_size, to.as<rmm_entry_info>(),
                                    to.size == struct_size * capacity ? capacity : capacity / 2,
                                    choice.one_in(8) ? nullptr : &arena, error),
                    error);
            break;
        }
        case 6: {
            const uint64_t target = choice.number(rmm_n_targets(file));
            rmm_target_info what;
            std::memset(&what, 0, sizeof what);
            rmm_get_target_info(file, target, sizeof what, &what, &buffer);
            uint64_t entry = 0;
            settled(rmm_find_entry(handle, task, what.name, choice.one_in(16) ? nullptr : &entry, error), error);
            break;
        }
        case 7:
        case 8: {
            const size_t struct_size = choice.struct_size(sizeof(rmm_private_info));
            const uint64_t capacity = choice.one_in(8) ? choice.below(info.n_privates + 2) : info.n_privates;
            Block to(choice, struct_size * capacity);
            settled(rmm_get_privates(handle, task, struct_size, to.as<rmm_private_info>(),
                                     to.size == struct_size * capacity ? capacity : capacity / 2, error),
                    error);
            break;
        }
        case 9:
        case 10: {
            if (info.n_values > MOST) break;
            uint64_t arena = 0;
            if (rmm_get_entries(file, task, RMM_F32, 0, nullptr, 0, &arena, &buffer) != RMM_OK) break;
            if (arena > 8 * MOST) break;
            Block to(choice, arena);
            const uint32_t threads = static_cast<uint32_t>(choice.number(4));
            settled(rmm_load_task(handle, task, dtype, to.as<void>(), to.size, threads, error), error);
            break;
        }
        case 11:
        case 12: {
            if (info.n_values > MOST) break;
            const uint64_t entry = choice.number(info.n_entries);
            Block to(choice, 4 * choice.below(info.n_values + 1));
            settled(rmm_load_factor(handle, task, entry, choice.code(RMM_FACTOR_A, RMM_FACTOR_B), dtype,
                                    to.as<void>(), to.size, error),
                    error);
            break;
        }
        case 13: {
            settled(rmm_check_task(handle, task, error), error);
            break;
        }
        case 14: {
            Counter counter = {0, choice.one_in(4) ? 1 + choice.below(3) : 0};
            uint64_t n = 0;
            const bool quiet = choice.one_in(4);
            if (choice.one_in(2)) {
                settled(rmm_validate_file(handle, quiet ? nullptr : count, &counter, &n, error), error);
                break;
            }
            settled(rmm_validate_memory(choice.one_in(32) ? nullptr : data, size, quiet ? nullptr : count, &counter,
                                        choice.one_in(4) ? nullptr : &n, error),
                    error);
            break;
        }
        default: {
            rmm_file* second = nullptr;
            const size_t shorter = choice.one_in(2) ? choice.below(size + 1) : size;
            const uint8_t* from = choice.one_in(32) ? nullptr : data;
            settled(rmm_open_memory(from, shorter, choice.one_in(32) ? nullptr : &second, error), error);
            rmm_close(second);
            rmm_crc32c(static_cast<uint32_t>(choice.next()), from, choice.below(size + 1));
        }
    }
}

#if defined(__linux__)
// The two functions that take a path. Files in memory, and seldom: system calls cost the most here.
void by_path(Choice& choice, const uint8_t* data, size_t size) {
    int fd = memfd_create("rmm", MFD_CLOEXEC);
    if (fd < 0) return;
    if (write(fd, data, size) != static_cast<ssize_t>(size)) __builtin_trap();
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    rmm_error error;
    rmm_file* file = nullptr;
    rmm_status opened = rmm_open(choice.one_in(16) ? nullptr : path.c_str(), &file, &error);
    settled(opened, &error);
    Counter counter = {0, 0};
    uint64_t n = 0;
    rmm_status status = rmm_validate(path.c_str(), count, &counter, &n, &error);
    settled(status, &error);
    if (file && rmm_n_tasks(file) > 0) rmm_check_task(file, 0, &error);
    rmm_close(file);
    close(fd);
}
#endif

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Choice choice(data, size);
    rmm_file* file = nullptr;
    rmm_error error;
    settled(rmm_open_memory(data, size, &file, &error), &error);
    // A file that is refused leaves calls on a null handle, of which a few are enough.
    for (int i = 0; i < (file ? CALLS : 2); ++i) one_call(choice, file, data, size);
    rmm_close(file);
#if defined(__linux__)
    if (choice.one_in(256)) by_path(choice, data, size);
#endif
    return 0;
}
