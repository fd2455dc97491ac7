// The C interface: checks of arguments, and exceptions turned into statuses.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "crc32c.hpp"
#include "load.hpp"
#include "map.hpp"
#include "validate.hpp"

#define RMM_LIBRARY_VERSION "0.1.0"

struct rmm_file {
    std::unique_ptr<rmm::Map> map;
    rmm::Index index;
};

// Part of the interface for RMM_ABI_VERSION 1.
static_assert(sizeof(rmm_error) == 512, "");
static_assert(sizeof(rmm_file_info) == 96, "");
static_assert(sizeof(rmm_task_info) == 48, "");
static_assert(sizeof(rmm_target_info) == 40 && sizeof(rmm_entry_info) == 88, "");
static_assert(sizeof(rmm_private_info) == 104 && sizeof(rmm_violation) == 24, "");

namespace rmm {
namespace {

void fill(rmm_error* error, const Failure& failure) noexcept {
    if (!error) return;
    std::memset(error, 0, sizeof *error);
    error->status = failure.status;
    error->rule = failure.rule;
    error->offset = failure.offset;
    error->os_error = failure.os_error;
    const std::string& message = failure.message;
    size_t n = std::min(message.size(), sizeof error->message - 1);
    // Cut before a character, not within: continuation bytes are 10xxxxxx.
    if (n < message.size()) {
        while (n > 0 && (static_cast<uint8_t>(message[n]) & 0xC0) == 0x80) --n;
    }
    std::memcpy(error->message, message.data(), n);
}

void fill_static(rmm_error* error, rmm_status status, const char* message) noexcept {
    if (!error) return;
    std::memset(error, 0, sizeof *error);
    error->status = status;
    error->offset = RMM_NO_OFFSET;
    size_t n = std::min(std::strlen(message), sizeof error->message - 1);
    std::memcpy(error->message, message, n);
}

template <class Work>
rmm_status guarded(rmm_error* error, Work&& work) noexcept {
    try {
        work();
        fill_static(error, RMM_OK, "");
        return RMM_OK;
    } catch (const Failure& failure) {
        fill(error, failure);
        return failure.status;
    } catch (const std::bad_alloc&) {
        fill_static(error, RMM_NO_MEMORY, "not enough memory");
        return RMM_NO_MEMORY;
    } catch (const std::length_error&) {
        fill_static(error, RMM_NO_MEMORY, "not enough memory");
        return RMM_NO_MEMORY;
    } catch (const std::exception& exception) {
        fill_static(error, RMM_INTERNAL, exception.what());
        return RMM_INTERNAL;
    } catch (...) {
        fill_static(error, RMM_INTERNAL, "an unknown exception");
        return RMM_INTERNAL;
    }
}

void need(const void* pointer, const char* name) {
    if (!pointer) fail(RMM_BAD_ARGUMENT, "%s is null", name);
}

void need_dtype(int32_t dtype) {
    if (dtype != RMM_F32 && dtype != RMM_F16 && dtype != RMM_BF16) {
        fail(RMM_BAD_ARGUMENT, "dtype is %d, expected 1 (f32), 2 (f16) or 3 (bf16)", dtype);
    }
}

Task need_task(const rmm_file* file, uint64_t task) {
    need(file, "file");
    if (task >= file->index.count(TASK)) {
        fail(RMM_NO_TASK, "there is no task %llu, the collection has %llu", ull(task), ull(file->index.count(TASK)));
    }
    return file->index.task(task);
}

// Gives a struct to a caller who knows `struct_size` bytes of it, or of a longer one.
template <class Info>
void give(const Info& info, size_t struct_size, void* to) {
    std::memcpy(to, &info, std::min(struct_size, sizeof info));
    if (struct_size > sizeof info) {
        std::memset(static_cast<uint8_t*>(to) + sizeof info, 0, struct_size - sizeof info);
    }
}

void need_struct(const void* pointer, size_t struct_size) {
    need(pointer, "info");
    if (struct_size < 8) fail(RMM_BAD_ARGUMENT, "struct_size is %zu", struct_size);
}

void need_capacity(const void* infos, uint64_t capacity, uint64_t n) {
    if (infos && capacity < n) {
        fail(RMM_BUFFER_TOO_SMALL, "there is room for %llu, the task has %llu", ull(capacity), ull(n));
    }
}

std::unique_ptr<rmm_file> open_bytes(std::unique_ptr<Map> map, const Index& unread) {
    auto file = std::make_unique<rmm_file>();
    file->map = std::move(map);
    file->index = unread;
    Refusing refusing;
    read_index(file->index, refusing);
    return file;
}

class Callback final : public Report {
  public:
    Callback(rmm_violation_callback callback, void* user) : callback_(callback), user_(user) {}

  private:
    static constexpr uint32_t MOST = 1000;

    bool wants(int rule) override {
        uint32_t& told = told_[std::min(std::max(rule, 0), 127)];
        if (told >= MOST || !callback_) return false;
        ++told;
        return true;
    }

    void take(Failure&& failure) override {
        rmm_violation violation{failure.rule, failure.status, failure.offset, failure.message.c_str()};
        if (callback_(user_, &violation) != 0) fail(RMM_STOPPED, "the callback asked to stop");
    }

    rmm_violation_callback callback_;
    void* user_;
    uint32_t told_[128] = {0};
};

void validate_with(Index unread, rmm_violation_callback callback, void* user, uint64_t* n_violations) {
    Callback report(callback, user);
    try {
        validate(unread, report);
    } catch (...) {
        if (n_violations) *n_violations = report.count();
        throw;
    }
    if (n_violations) *n_violations = report.count();
}

// Whether a rule may be broken only for a moment, while a writer is at work: its change came between
// measuring the file and reading its slots, or a slot was read while it was being written.
bool is_passing(int rule) { return rule == 10 || rule == 12 || rule == 13 || rule == 14; }

// What a writer's change leaves its mark on: size and header.
std::string mark_of(const Index& unread) {
    std::string mark = std::to_string(unread.size) + ' ';
    mark.append(reinterpret_cast<const char*>(unread.head), sizeof unread.head);
    return mark;
}

// Finds whether a header breaks any such rule.
class Passing final : public Report {
  public:
    explicit Passing(Index unread) {
        read_header(unread, *this);
        check_slots(unread, *this);
    }
    bool found() const { return found_; }

  private:
    void take(Failure&& failure) override { found_ = found_ || is_passing(failure.rule); }
    bool found_ = false;
};

}  // namespace
}  // namespace rmm

using namespace rmm;

extern "C" {

const char* rmm_version(void) noexcept { return RMM_LIBRARY_VERSION; }

uint32_t rmm_abi_version(void) noexcept { return RMM_ABI_VERSION; }

const char* rmm_status_name(int32_t status) noexcept {
    switch (status) {
#define RMM_NAME(name) \
    case name:         \
        return #name;
        RMM_NAME(RMM_OK)
        RMM_NAME(RMM_NOT_RMM)
        RMM_NAME(RMM_MALFORMED)
        RMM_NAME(RMM_TRUNCATED)
        RMM_NAME(RMM_CHECKSUM)
        RMM_NAME(RMM_UNSUPPORTED_VERSION)
        RMM_NAME(RMM_UNSUPPORTED_SECTION)
        RMM_NAME(RMM_UNSUPPORTED_KIND)
        RMM_NAME(RMM_UNSUPPORTED_ENCODING)
        RMM_NAME(RMM_NO_TASK)
        RMM_NAME(RMM_NO_ENTRY)
        RMM_NAME(RMM_NO_TARGET)
        RMM_NAME(RMM_BAD_ARGUMENT)
        RMM_NAME(RMM_BUFFER_TOO_SMALL)
        RMM_NAME(RMM_STOPPED)
        RMM_NAME(RMM_IO)
        RMM_NAME(RMM_NO_MEMORY)
        RMM_NAME(RMM_INTERNAL)
#undef RMM_NAME
        default:
            return "unknown status";
    }
}

uint32_t rmm_crc32c(uint32_t crc, const void* data, uint64_t n_bytes) noexcept {
    return data ? crc32c(crc, static_cast<const uint8_t*>(data), n_bytes) : crc;
}

rmm_status rmm_open(const char* path, rmm_file** out, rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(path, "path");
        need(out, "out");
        // After a writer's change the next attempt finds another header, and is worth making.
        std::string before;
        for (;;) {
            auto map = std::make_unique<Map>(path);
            const Index unread(map->data(), map->size());
            try {
                *out = open_bytes(std::move(map), unread).release();
                return;
            } catch (const Failure& failure) {
                std::string now = mark_of(unread);
                if (!is_passing(failure.rule) || now == before) throw;
                before = std::move(now);
            }
        }
    });
}

rmm_status rmm_open_memory(const void* data, uint64_t n_bytes, rmm_file** out, rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(out, "out");
        if (n_bytes > 0) need(data, "data");
        *out = open_bytes(nullptr, Index(static_cast<const uint8_t*>(data), n_bytes)).release();
    });
}

void rmm_close(rmm_file* file) noexcept { delete file; }

rmm_status rmm_get_file_info(const rmm_file* file, size_t struct_size, rmm_file_info* info,
                             rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(file, "file");
        need_struct(info, struct_size);
        const Index& index = file->index;
        const Header& header = index.header;
        rmm_file_info full{index.data, index.size, header.file_length, header.sequence, header.index_offset,
                           header.index_length, index.count(TASK), index.count(TARG), index.count(ENTR),
                           index.count(FRAM), header.minor, header.active, header.damaged, 0};
        give(full, struct_size, info);
    });
}

uint64_t rmm_n_tasks(const rmm_file* file) noexcept { return file ? file->index.count(TASK) : 0; }

uint64_t rmm_n_targets(const rmm_file* file) noexcept { return file ? file->index.count(TARG) : 0; }

const char* rmm_task_name(const rmm_file* file, uint64_t task) noexcept {
    if (!file || task >= file->index.count(TASK)) return nullptr;
    return file->index.string(file->index.task(task).name);
}

rmm_status rmm_find_task(const rmm_file* file, const char* name, uint64_t* task, rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(file, "file");
        need(name, "name");
        need(task, "task");
        const Index& index = file->index;
        uint64_t low = 0, high = index.count(TASK);
        while (low < high) {
            uint64_t middle = low + (high - low) / 2;
            // strcmp orders UTF-8 as bytes, as RMM-031 does.
            int order = std::strcmp(index.string(index.task(middle).name), name);
            if (order == 0) {
                *task = middle;
                return;
            }
            if (order < 0) low = middle + 1;
            else high = middle;
        }
        fail(RMM_NO_TASK, "no task is called '%s' among %llu", name, ull(index.count(TASK)));
    });
}

rmm_status rmm_get_task_info(const rmm_file* file, uint64_t number, size_t struct_size, rmm_task_info* info,
                             rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        need_struct(info, struct_size);
        const Index& index = file->index;
        uint64_t n_values = 0;
        visit_entries(index, task, RMM_F32, [&](uint64_t, const Entry&, const Form& form, uint32_t,
                                                const Target& target, const Placement&, uint64_t) {
            n_values += form.rank * (target.n_in + target.n_out);  // bounded by RMM-062
        });
        rmm_task_info full{index.string(task.name), task.n_entries, task.n_privates, n_values, task.offset, task.length};
        give(full, struct_size, info);
    });
}

rmm_status rmm_get_target_info(const rmm_file* file, uint64_t number, size_t struct_size, rmm_target_info* info,
                               rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(file, "file");
        need_struct(info, struct_size);
        const Index& index = file->index;
        if (number >= index.count(TARG)) {
            fail(RMM_NO_TARGET, "there is no target %llu, the collection has %llu", ull(number), ull(index.count(TARG)));
        }
        Target target = index.target(number);
        rmm_target_info full{index.string(target.name), target.n_in, target.n_out,
                             {target.kernel[0], target.kernel[1], target.kernel[2]}, target.kind, target.flags, 0};
        give(full, struct_size, info);
    });
}

rmm_status rmm_get_entries(const rmm_file* file, uint64_t number, int32_t dtype, size_t struct_size,
                           rmm_entry_info* infos, uint64_t capacity, uint64_t* arena_bytes,
                           rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        need_dtype(dtype);
        if (infos) need_struct(infos, struct_size);
        need_capacity(infos, capacity, task.n_entries);
        const Index& index = file->index;
        uint8_t* to = reinterpret_cast<uint8_t*>(infos);
        uint64_t arena = visit_entries(index, task, dtype, [&](uint64_t j, const Entry&, const Form& form,
                                                               uint32_t target_id, const Target& target,
                                                               const Placement& placement, uint64_t) {
            if (!to) return;
            rmm_entry_info full{};
            full.target = index.string(target.name);
            full.n_in = target.n_in;
            full.n_out = target.n_out;
            full.scale = form.scale;
            full.offset_a = placement.offset[0];
            full.offset_b = placement.offset[1];
            full.n_bytes_a = placement.n_bytes[0];
            full.n_bytes_b = placement.n_bytes[1];
            full.target_id = target_id;
            full.rank = form.rank;
            std::memcpy(full.kernel, target.kernel, sizeof full.kernel);
            full.kind = target.kind;
            full.flags = target.flags;
            full.dtype_a = form.dtype[0];
            full.dtype_b = form.dtype[1];
            give(full, struct_size, to + j * struct_size);
        });
        if (arena_bytes) *arena_bytes = arena;
    });
}

rmm_status rmm_find_entry(const rmm_file* file, uint64_t number, const char* target, uint64_t* entry,
                          rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        need(target, "target");
        need(entry, "entry");
        const Index& index = file->index;
        // Targets of a task ascend, and so do their names (RMM-057, RMM-035).
        uint64_t low = 0, high = task.n_entries;
        while (low < high) {
            uint64_t middle = low + (high - low) / 2;
            uint32_t id = index.listed_target(task.first_target + middle);
            int order = std::strcmp(index.string(index.target(id).name), target);
            if (order == 0) {
                *entry = middle;
                return;
            }
            if (order < 0) low = middle + 1;
            else high = middle;
        }
        fail(RMM_NO_ENTRY, "task %s has no target called '%s' among %llu", index.string(task.name), target,
             ull(task.n_entries));
    });
}

rmm_status rmm_get_privates(const rmm_file* file, uint64_t number, size_t struct_size, rmm_private_info* infos,
                            uint64_t capacity, rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        if (infos) need_struct(infos, struct_size);
        need_capacity(infos, capacity, task.n_privates);
        if (!infos) return;
        const Index& index = file->index;
        uint8_t* to = reinterpret_cast<uint8_t*>(infos);
        for (uint64_t j = 0; j < task.n_privates; ++j) {
            Private tensor = index.private_tensor(task.first_private + j);
            Range blob = index.blob(tensor.blob);
            rmm_private_info full{};
            full.name = index.string(tensor.name);
            full.data = index.data + blob.offset;
            full.offset = blob.offset;
            full.n_bytes = blob.length;
            full.n_dims = tensor.n_dims;
            full.dtype = tensor.dtype;
            full.role = tensor.role;
            for (unsigned d = 0; d < tensor.n_dims; ++d) full.shape[d] = index.dimension(tensor.first_dim + d);
            give(full, struct_size, to + j * struct_size);
        }
    });
}

rmm_status rmm_load_task(const rmm_file* file, uint64_t number, int32_t dtype, void* arena, uint64_t arena_bytes,
                         uint32_t n_threads, rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        need_dtype(dtype);
        if (arena_bytes > 0) need(arena, "arena");
        load_task(file->index, task, dtype, static_cast<uint8_t*>(arena), arena_bytes, n_threads);
    });
}

rmm_status rmm_load_factor(const rmm_file* file, uint64_t number, uint64_t entry, int32_t factor, int32_t dtype,
                           void* out, uint64_t out_bytes, rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        need_dtype(dtype);
        need(out, "out");
        if (factor != RMM_FACTOR_A && factor != RMM_FACTOR_B) {
            fail(RMM_BAD_ARGUMENT, "factor is %d, expected 0 (A) or 1 (B)", factor);
        }
        if (entry >= task.n_entries) {
            fail(RMM_NO_ENTRY, "task %s has no entry %llu, it has %llu", file->index.string(task.name), ull(entry),
                 ull(task.n_entries));
        }
        load_factor(file->index, task, entry, factor, dtype, static_cast<uint8_t*>(out), out_bytes);
    });
}

rmm_status rmm_check_task(const rmm_file* file, uint64_t number, rmm_error* error) noexcept {
    return guarded(error, [&] {
        Task task = need_task(file, number);
        check_task(file->index, task);
    });
}

rmm_status rmm_validate(const char* path, rmm_violation_callback callback, void* user, uint64_t* n_violations,
                        rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(path, "path");
        std::string before;
        for (;;) {
            Map map(path);
            const Index unread(map.data(), map.size());
            std::string now = mark_of(unread);
            if (now == before || !Passing(unread).found()) {
                validate_with(unread, callback, user, n_violations);
                return;
            }
            before = std::move(now);
        }
    });
}

rmm_status rmm_validate_file(const rmm_file* file, rmm_violation_callback callback, void* user,
                             uint64_t* n_violations, rmm_error* error) noexcept {
    return guarded(error, [&] {
        need(file, "file");
        // With the header as it was when the file was opened: the one that is mapped may have changed.
        Index unread;
        unread.data = file->index.data;
        unread.size = file->index.size;
        std::memcpy(unread.head, file->index.head, sizeof unread.head);
        validate_with(unread, callback, user, n_violations);
    });
}

rmm_status rmm_validate_memory(const void* data, uint64_t n_bytes, rmm_violation_callback callback, void* user,
                               uint64_t* n_violations, rmm_error* error) noexcept {
    return guarded(error, [&] {
        if (n_bytes > 0) need(data, "data");
        validate_with(Index(static_cast<const uint8_t*>(data), n_bytes), callback, user, n_violations);
    });
}

}  // extern "C"
