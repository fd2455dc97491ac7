#include "crc32c.hpp"

#include <array>

#include "bytes.hpp"

#if defined(RMM_PORTABLE)
// the tables alone
#elif defined(__x86_64__) || defined(_M_X64)
#define RMM_CRC_X86 1
#include <nmmintrin.h>
#if defined(_MSC_VER)
#include <intrin.h>
#define RMM_TARGET_CRC
#else
#define RMM_TARGET_CRC __attribute__((target("sse4.2")))
#endif
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#define RMM_CRC_ARM 1
#include <arm_acle.h>
#if defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif
#if defined(__ARM_FEATURE_CRC32)
#define RMM_TARGET_CRC
#elif defined(__clang__)
#define RMM_TARGET_CRC __attribute__((target("crc")))
#else
#define RMM_TARGET_CRC __attribute__((target("+crc")))
#endif
#endif

namespace rmm {
namespace {

constexpr uint32_t POLYNOMIAL = 0x82F63B78;  // reflected

using Row = std::array<uint32_t, 256>;

// Table k: what a byte contributes when k further bytes follow it ("slicing by 8").
constexpr std::array<Row, 8> make_tables() {
    std::array<Row, 8> tables{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? POLYNOMIAL : 0);
        tables[0][i] = crc;
    }
    for (int k = 1; k < 8; ++k) {
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t before = tables[k - 1][i];
            tables[k][i] = (before >> 8) ^ tables[0][before & 255];
        }
    }
    return tables;
}

constexpr std::array<Row, 8> TABLES = make_tables();

uint32_t update_table(uint32_t crc, const uint8_t* data, uint64_t n) {
    for (; n >= 8; n -= 8, data += 8) {
        uint64_t word = u64(data) ^ crc;
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= TABLES[7 - k][(word >> (8 * k)) & 255];
    }
    for (; n > 0; --n, ++data) crc = (crc >> 8) ^ TABLES[0][(crc ^ *data) & 255];
    return crc;
}

#if RMM_CRC_X86 || RMM_CRC_ARM

// The instruction has a latency of three and a throughput of one, so three streams run side by
// side; the streams are then joined by moving a checksum over `STREAM` zero bytes, which is linear:
// one table look-up for each of its four bytes.
constexpr uint64_t LONG_STREAM = 4096;
constexpr uint64_t SHORT_STREAM = 256;

using Shift = std::array<Row, 4>;
using Matrix = std::array<uint32_t, 32>;

constexpr uint32_t times(const Matrix& matrix, uint32_t vector) {
    uint32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
        if ((vector >> i) & 1) sum ^= matrix[i];
    }
    return sum;
}

// The linear map "append n_bytes zero bytes" (a power of two), by squaring "append one zero bit".
constexpr Shift make_shift(uint64_t n_bytes) {
    Matrix matrix{};
    matrix[0] = POLYNOMIAL;
    for (int i = 1; i < 32; ++i) matrix[i] = 1u << (i - 1);
    for (uint64_t bits = 1; bits < 8 * n_bytes; bits *= 2) {
        Matrix square{};
        for (int i = 0; i < 32; ++i) square[i] = times(matrix, matrix[i]);
        matrix = square;
    }
    Shift shift{};
    for (int byte = 0; byte < 4; ++byte) {
        for (uint32_t i = 0; i < 256; ++i) shift[byte][i] = times(matrix, i << (8 * byte));
    }
    return shift;
}

constexpr Shift LONG_SHIFT = make_shift(LONG_STREAM);
constexpr Shift SHORT_SHIFT = make_shift(SHORT_STREAM);

RMM_INLINE uint32_t move_over(const Shift& shift, uint32_t crc) {
    return shift[0][crc & 255] ^ shift[1][(crc >> 8) & 255] ^ shift[2][(crc >> 16) & 255] ^
           shift[3][crc >> 24];
}

#if RMM_CRC_X86
#define RMM_CRC8(crc, word) static_cast<uint32_t>(_mm_crc32_u64(crc, word))
#define RMM_CRC1(crc, byte) _mm_crc32_u8(crc, byte)
#else
#define RMM_CRC8(crc, word) __crc32cd(crc, word)
#define RMM_CRC1(crc, byte) __crc32cb(crc, byte)
#endif

template <uint64_t STREAM>
RMM_TARGET_CRC uint32_t update_streams(uint32_t crc, const uint8_t*& data, uint64_t& n,
                                       const Shift& shift) {
    while (n >= 3 * STREAM) {
        uint32_t second = 0, third = 0;
        for (uint64_t i = 0; i < STREAM; i += 8) {
            crc = RMM_CRC8(crc, u64(data + i));
            second = RMM_CRC8(second, u64(data + STREAM + i));
            third = RMM_CRC8(third, u64(data + 2 * STREAM + i));
        }
        crc = move_over(shift, crc) ^ second;
        crc = move_over(shift, crc) ^ third;
        data += 3 * STREAM;
        n -= 3 * STREAM;
    }
    return crc;
}

RMM_TARGET_CRC uint32_t update_hardware(uint32_t crc, const uint8_t* data, uint64_t n) {
    crc = update_streams<LONG_STREAM>(crc, data, n, LONG_SHIFT);
    crc = update_streams<SHORT_STREAM>(crc, data, n, SHORT_SHIFT);
    for (; n >= 8; n -= 8, data += 8) crc = RMM_CRC8(crc, u64(data));
    for (; n > 0; --n, ++data) crc = RMM_CRC1(crc, *data);
    return crc;
}

bool has_hardware() {
#if RMM_CRC_X86 && defined(_MSC_VER)
    int registers[4];
    __cpuid(registers, 1);
    return (registers[2] >> 20) & 1;
#elif RMM_CRC_X86
    return __builtin_cpu_supports("sse4.2");
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#else
    return true;  // every 64-bit Apple processor
#endif
}

#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const uint8_t* data, uint64_t n_bytes) {
#if RMM_CRC_X86 || RMM_CRC_ARM
    static const bool hardware = has_hardware();
    if (hardware) return ~update_hardware(~crc, data, n_bytes);
#endif
    return ~update_table(~crc, data, n_bytes);
}

}  // namespace rmm
