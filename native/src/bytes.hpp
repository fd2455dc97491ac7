// Loads of little-endian fields from unaligned bytes, and arithmetic that cannot wrap.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The format is little-endian and this library reads it in place: big-endian is not supported"
#endif

// Function multi-versioning: one loop, compiled for three widths, chosen when the library is loaded.
// It rests on IFUNC (glibc), and sanitizers cannot run in its resolvers. RMM_PORTABLE leaves out all
// that is particular to a processor; tests compare such a build with the usual one.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && !defined(RMM_PORTABLE) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) &&                                 \
    ((defined(__GNUC__) && !defined(__clang__)) || (defined(__clang__) && __clang_major__ >= 14))
#define RMM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RMM_CLONES
#endif

#if defined(__GNUC__)
#define RMM_INLINE inline __attribute__((always_inline))
#define RMM_IVDEP _Pragma("GCC ivdep")
#define RMM_PRINTF(f, a) __attribute__((format(printf, f, a)))
#if defined(__clang__)
#undef RMM_IVDEP
#define RMM_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#endif
#else
#define RMM_INLINE __forceinline
#define RMM_IVDEP
#define RMM_PRINTF(f, a)
#endif

#if defined(__clang__)
#define RMM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define RMM_UNROLL _Pragma("GCC unroll 16")
#else
#define RMM_UNROLL
#endif

namespace rmm {

// Numbers at any alignment: small runs are packed right behind each other.
#if defined(__GNUC__)
typedef float f32u __attribute__((aligned(1), may_alias));
typedef uint32_t u32u __attribute__((aligned(1), may_alias));
typedef uint16_t u16u __attribute__((aligned(1), may_alias));
#else
typedef float f32u;
typedef uint32_t u32u;
typedef uint16_t u16u;
#endif

template <class T>
RMM_INLINE T load(const uint8_t* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

RMM_INLINE uint16_t u16(const uint8_t* at) { return load<uint16_t>(at); }
RMM_INLINE uint32_t u32(const uint8_t* at) { return load<uint32_t>(at); }
RMM_INLINE uint64_t u64(const uint8_t* at) { return load<uint64_t>(at); }

// a + b and a * b; false if the result does not fit (section 11).
RMM_INLINE bool add(uint64_t a, uint64_t b, uint64_t& sum) {
    sum = a + b;
    return sum >= a;
}

RMM_INLINE bool multiply(uint64_t a, uint64_t b, uint64_t& product) {
#if defined(__GNUC__)
    return !__builtin_mul_overflow(a, b, &product);
#else
    product = a * b;
    return a == 0 || product / a == b;
#endif
}

// The least multiple of `step` (a power of two) that is not less than `value`; wraps past 2^64 - step.
RMM_INLINE uint64_t ceil_to(uint64_t value, uint64_t step) { return (value + step - 1) & ~(step - 1); }

RMM_INLINE uint64_t ceil_div(uint64_t value, uint64_t by) { return value / by + (value % by != 0); }

// Is [offset, offset + length) within `size` bytes?
RMM_INLINE bool within(uint64_t offset, uint64_t length, uint64_t size) {
    return offset <= size && length <= size - offset;
}

bool all_zero(const uint8_t* data, uint64_t n_bytes);

}  // namespace rmm
