#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace rmm {
namespace {

constexpr uint64_t LEAST_WORK = 1 << 20;  // bytes; below this, starting a thread always costs more than it brings
constexpr uint32_t MOST_BY_CHOICE = 16;         // memory is the limit before that
constexpr uint32_t MOST = 256;

}  // namespace

uint32_t choose_threads(uint32_t asked, uint64_t work, uint64_t n_units, uint64_t work_per_thread) {
    uint64_t n = asked;
    if (asked == 0) n = std::min(std::max(std::thread::hardware_concurrency(), 1u), MOST_BY_CHOICE);
    const uint64_t worth = work / (asked == 0 ? work_per_thread : LEAST_WORK);
    n = std::min<uint64_t>({n, MOST, std::max<uint64_t>(worth, 1), std::max<uint64_t>(n_units, 1)});
    return static_cast<uint32_t>(n);
}

void in_parallel(uint32_t n_threads, uint64_t n_units, const std::function<void(const NextUnit&)>& work) {
    std::atomic<uint64_t> counter{0};
    std::atomic<uint64_t> failed{n_units};  // lowest unit that threw: later ones need not be done
    std::exception_ptr exception;
    std::mutex mutex;

    auto run = [&] {
        uint64_t current = 0;
        NextUnit next = [&](uint64_t& unit) {
            current = counter.fetch_add(1, std::memory_order_relaxed);
            unit = current;
            return current < failed.load(std::memory_order_relaxed);
        };
        try {
            ExactArithmetic exact;
            work(next);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!exception || current < failed.load()) {
                exception = std::current_exception();
                failed = std::min(current, n_units);
            }
        }
    };

    std::vector<std::thread> threads;
    threads.reserve(n_threads);
    try {
        for (uint32_t i = 1; i < n_threads; ++i) threads.emplace_back(run);
    } catch (const std::system_error&) {
        // No more threads to be had: those that there are do the work.
    }
    run();
    for (std::thread& thread : threads) thread.join();
    if (exception) std::rethrow_exception(exception);
}

#if defined(__SSE2__) || defined(_M_X64)

ExactArithmetic::ExactArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
ExactArithmetic::~ExactArithmetic() { _mm_setcsr(static_cast<unsigned>(saved_)); }

#elif defined(__aarch64__) && defined(__GNUC__)

ExactArithmetic::ExactArithmetic() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
ExactArithmetic::~ExactArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

#else

ExactArithmetic::ExactArithmetic() = default;
ExactArithmetic::~ExactArithmetic() = default;

#endif

}  // namespace rmm
