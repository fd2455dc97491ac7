// Many threads on one open file, and others that open it again and again, while it grows.
//
//   test_together BEFORE AFTER FOLDER [ROUNDS]
//
// AFTER is BEFORE with tasks added by `rmm add`. Each round copies BEFORE to FOLDER and replays the
// writer's three steps (5.3 of the specification) on the copy, while eight threads load tasks, factors
// and names from one handle, four open the file anew, check or validate it, and compare every value.
// Made to run under ThreadSanitizer. Exit code 0 if nothing was wrong.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "rmm/rmm.h"

namespace {

using Bytes = std::vector<uint8_t>;
using Values = std::map<std::string, Bytes>;  // by task

constexpr int READERS = 8, OPENERS = 4;
constexpr size_t SLOTS[2] = {64, 512}, SLOT_BYTES = 128;

std::atomic<int> faults{0};

void fault(const char* what, const char* detail = "") {
    if (faults.fetch_add(1) < 10) std::fprintf(stderr, "wrong: %s %s\n", what, detail);
}

Bytes read_file(const char* path) {
    FILE* file = std::fopen(path, "rb");
    if (!file) {
        std::fprintf(stderr, "%s: cannot be read\n", path);
        std::exit(2);
    }
    Bytes data;
    uint8_t buffer[65536];
    size_t n;
    while ((n = std::fread(buffer, 1, sizeof buffer, file)) > 0) data.insert(data.end(), buffer, buffer + n);
    std::fclose(file);
    return data;
}

uint64_t u64(const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

Bytes load(const rmm_file* file, uint64_t task, uint32_t n_threads) {
    rmm_error error;
    uint64_t n_bytes = 0;
    if (rmm_get_entries(file, task, RMM_F32, 0, nullptr, 0, &n_bytes, &error) != RMM_OK) fault("entries", error.message);
    Bytes arena(n_bytes);
    if (rmm_load_task(file, task, RMM_F32, arena.data(), n_bytes, n_threads, &error) != RMM_OK) {
        fault("load", error.message);
    }
    return arena;
}

Values values_of(const Bytes& data) {
    rmm_file* file = nullptr;
    rmm_error error;
    Values values;
    if (rmm_open_memory(data.data(), data.size(), &file, &error) != RMM_OK) {
        std::fprintf(stderr, "cannot be opened: %s\n", error.message);
        std::exit(2);
    }
    for (uint64_t i = 0; i < rmm_n_tasks(file); ++i) values[rmm_task_name(file, i)] = load(file, i, 1);
    rmm_close(file);
    return values;
}

// Every task of a file has its value, and there are no others than `all` has.
void compare(const rmm_file* file, const Values& all, uint32_t turn) {
    const uint64_t n = rmm_n_tasks(file);
    for (uint64_t i = 0; i < n; ++i) {
        const uint64_t task = (i + turn) % n;
        const char* name = rmm_task_name(file, task);
        uint64_t found = 0;
        if (rmm_find_task(file, name, &found, nullptr) != RMM_OK || found != task) fault("name", name);
        auto want = all.find(name);
        if (want == all.end() || load(file, task, 1 + (turn + i) % 3) != want->second) fault("values of", name);
    }
}

int count(void* user, const rmm_violation* violation) {
    ++*static_cast<uint64_t*>(user);
    fault("violation", violation->message);
    return 0;
}

void put(int file, const Bytes& data, size_t offset, size_t n) {
    if (pwrite(file, data.data() + offset, n, static_cast<off_t>(offset)) != static_cast<ssize_t>(n)) fault("pwrite");
}

void round(const std::string& path, const Bytes& before, const Bytes& after, const Values& old, const Values& all,
           uint64_t& n_opened) {
    int file = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    put(file, before, 0, before.size());
    rmm_file* handle = nullptr;
    rmm_error error;
    if (rmm_open(path.c_str(), &handle, &error) != RMM_OK) fault("open", error.message);

    std::atomic<bool> done{false};
    std::atomic<uint64_t> opened{0};
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < READERS; ++t) {
        threads.emplace_back([&, t] {
            for (uint32_t turn = t; !done; turn += READERS) {
                compare(handle, old, turn);
                if (rmm_n_tasks(handle) != old.size()) fault("number of tasks");
                if (t == 0) {
                    uint64_t n = 0, told = 0;
                    if (rmm_validate_file(handle, count, &told, &n, nullptr) != RMM_OK || n != 0) fault("validate_file");
                }
                if (t == 1 && rmm_check_task(handle, turn % old.size(), nullptr) != RMM_OK) fault("check_task");
            }
        });
    }
    for (uint32_t t = 0; t < OPENERS; ++t) {
        threads.emplace_back([&, t] {
            rmm_error mine;
            for (uint32_t turn = t; !done; ++turn, ++opened) {
                if (t == 0) {
                    uint64_t n = 0, told = 0;
                    if (rmm_validate(path.c_str(), count, &told, &n, &mine) != RMM_OK || n != 0) {
                        fault("validate", mine.message);
                    }
                    continue;
                }
                rmm_file* own = nullptr;
                if (rmm_open(path.c_str(), &own, &mine) != RMM_OK) {
                    fault("open", mine.message);
                    break;
                }
                compare(own, all, turn);
                rmm_close(own);
            }
        });
    }

    // Between steps everybody comes by, so that each state of the file is seen.
    auto pause = [&] {
        const uint64_t until = opened + OPENERS;
        while (opened < until && faults == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    };
    pause();
    const int active = u64(&after[SLOTS[1]]) > u64(&after[SLOTS[0]]);
    put(file, after, SLOTS[1 - active], SLOT_BYTES);  // announces that there will be bytes
    pause();
    for (size_t at = before.size(); at < after.size(); at += 4096) {
        put(file, after, at, std::min<size_t>(4096, after.size() - at));
    }
    pause();
    put(file, after, SLOTS[active], SLOT_BYTES);  // puts the new index in force
    pause();
    done = true;
    for (std::thread& thread : threads) thread.join();
    n_opened += opened;
    rmm_close(handle);

    if (rmm_open(path.c_str(), &handle, &error) != RMM_OK) fault("open", error.message);
    if (rmm_n_tasks(handle) != all.size()) fault("tasks after growth");
    compare(handle, all, 0);
    rmm_close(handle);
    close(file);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s BEFORE AFTER FOLDER [ROUNDS]\n", argv[0]);
        return 2;
    }
    const Bytes before = read_file(argv[1]), after = read_file(argv[2]);
    const Values old = values_of(before), all = values_of(after);
    const int rounds = argc > 4 ? std::atoi(argv[4]) : 20;
    const std::string path = std::string(argv[3]) + "/together.rmm";
    if (after.size() <= before.size() || std::memcmp(&before[640], &after[640], before.size() - 640) != 0) {
        std::fprintf(stderr, "%s is not %s with something added\n", argv[2], argv[1]);
        return 2;
    }
    uint64_t n_opened = 0;
    for (int i = 0; i < rounds; ++i) round(path, before, after, old, all, n_opened);
    unlink(path.c_str());
    std::printf("%d rounds of %d threads, %llu times opened or validated meanwhile, %d faults\n", rounds,
                READERS + OPENERS + 1, static_cast<unsigned long long>(n_opened), faults.load());
    return faults == 0 ? 0 : 1;
}
