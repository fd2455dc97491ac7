// Tables and steps of the trellis encoding (8.3), by integer arithmetic.

#include <atomic>
#include <memory>

#include "half.hpp"
#include "trellis.hpp"

namespace rmm {
namespace trellis {
namespace {

constexpr uint32_t RATIOS[2][32] = {
    // round(2^32 · exp(−1 / (4 t²))), t = 2^(i / 8 − 2)
    {0x04b0556e, 0x08dc431a, 0x0f218de0, 0x17bb0546, 0x22a55547, 0x2fa05396, 0x3e3ce5f8, 0x4df14256,
     0x5e2d58d9, 0x6e6b3af7, 0x7e39bff0, 0x8d418996, 0x9b4597e3, 0xa820ecbf, 0xb3c2a029, 0xbe29706c,
     0xc75f7cf5, 0xcf768ba8, 0xd684ff71, 0xdca38252, 0xe1eb5127, 0xe6750e8b, 0xea5800a6, 0xeda99fd4,
     0xf07d5fde, 0xf2e4a20a, 0xf4eec215, 0xf6a93407, 0xf81fab54, 0xf95c4650, 0xfa67ba65, 0xfb497ef1},
    // round(2^32 · exp(−1 / (√2 t)))
    {0x0f218de0, 0x1322754c, 0x17bb0546, 0x1ce8c54d, 0x22a55547, 0x28e6cfbb, 0x2fa05396, 0x36c2a71d,
     0x3e3ce5f8, 0x45fd2e33, 0x4df14256, 0x56071975, 0x5e2d58d9, 0x6653b528, 0x6e6b3af7, 0x76668014,
     0x7e39bff0, 0x85dae60a, 0x8d418996, 0x9466dd83, 0x9b4597e3, 0xa1d9d354, 0xa820ecbf, 0xae195f50,
     0xb3c2a029, 0xb91cfafe, 0xbe29706c, 0xc2e996ae, 0xc75f7cf5, 0xcb8d91ae, 0xcf768ba8, 0xd31d561d},
};

// 2^(−i / 8) as f32
constexpr uint32_t OCTAVE[8] = {0x3f800000, 0x3f6ac0c7, 0x3f5744fd, 0x3f45672a,
                                0x3f3504f3, 0x3f25fed7, 0x3f1837f0, 0x3f0b95c2};

// −log2(f / 4096) to 16 binary places, by squaring: no library's logarithm, so that files do not
// depend on one.
float cost_of(uint32_t f) {
    unsigned whole = 0;
    while ((f >> (whole + 1)) != 0) ++whole;
    uint64_t mantissa = uint64_t{f} << (31 - whole);  // 1 … 2, in units of 2^-31
    uint32_t fraction = 0;
    for (unsigned bit = 0; bit < 16; ++bit) {
        mantissa = mantissa * mantissa >> 31;
        fraction <<= 1;
        if (mantissa >> 32) {
            mantissa >>= 1;
            fraction |= 1;
        }
    }
    return static_cast<float>((uint32_t{TABLE_BITS} << 16) - (whole << 16) - fraction) * 0x1p-16f;
}

std::unique_ptr<const Table> make_table(uint8_t number) {
    auto made = std::make_unique<Table>();
    Table& t = *made;
    const unsigned family = number >> 7, index = table_index(number);
    t.raw_bits = index < 32 ? 0 : (index - 32) / 8 + 1;
    const uint64_t ratio = RATIOS[family][index - 8 * t.raw_bits];
    // Every factor is at most 2^32 and one of the two below it: products fit.
    uint64_t g[MAX_SYMBOLS] = {uint64_t{1} << 32}, sum = g[0], step = ratio;
    uint32_t n = 1;
    while (n < MAX_SYMBOLS - 1) {
        uint64_t next = g[n - 1] * step >> 32;
        if (next < (1u << 18)) break;
        g[n++] = next;
        sum += next;
        if (family == 0) step = step * ratio >> 32;
    }
    t.escape = n;
    const uint32_t room = (1u << TABLE_BITS) - n - 1;
    uint32_t total = 1;
    for (uint32_t q = 0; q < n; ++q) {
        t.frequency[q] = static_cast<uint16_t>(1 + g[q] * room / sum);
        total += t.frequency[q];
    }
    t.frequency[n] = 1;
    t.frequency[0] = static_cast<uint16_t>(t.frequency[0] + (1u << TABLE_BITS) - total);
    uint32_t start = 0;
    for (uint32_t q = 0; q <= n; ++q) {
        const uint32_t f = t.frequency[q];
        t.start[q] = static_cast<uint16_t>(start);
        for (uint32_t i = 0; i < f; ++i) t.slot[start + i] = q << 24 | f << TABLE_BITS | i;
        t.bits[q] = cost_of(f) + static_cast<float>(t.raw_bits + (q == n ? 16 : 0));
        start += f;
    }
    return made;
}

std::atomic<const Table*> tables[256];

}  // namespace

const Table& table(uint8_t number) {
    std::atomic<const Table*>& place = tables[number];
    const Table* known = place.load(std::memory_order_acquire);
    if (known) return *known;
    // Two threads may both make it; one of the two equal tables is kept, for good.
    std::unique_ptr<const Table> made = make_table(number);
    if (place.compare_exchange_strong(known, made.get(), std::memory_order_acq_rel)) known = made.release();
    return *known;
}

float base_step(uint16_t base) { return float_of(static_cast<uint32_t>(base & 0x7FFFu) << 16); }

float row_step(uint16_t base, uint8_t row_byte) {
    if (base >> 15 == 0) return base_step(base);
    const uint32_t index = table_index(row_byte);
    return base_step(base) * float_of(OCTAVE[index % 8] - (index / 8 << 23));
}

const char* check_steps(uint16_t base, const uint8_t* row_bytes, uint64_t n_rows) {
    uint32_t lowest = 1;
    bool coded = false;
    for (uint64_t k = 0; k < n_rows; ++k) {
        if (row_bytes[k] == 0) continue;
        if (!is_table(row_bytes[k])) return "a row byte of the trellis run is no table number";
        coded = true;
        const uint32_t octaves = (table_index(row_bytes[k]) + 7) / 8;
        if (base >> 15 && lowest < 1 + octaves) lowest = 1 + octaves;
    }
    if (!coded) return "the trellis run has no row with symbols";
    const uint32_t exponent = base >> 7 & 0xFFu;
    if (exponent < lowest || exponent > 230) return "the base step of the trellis run is out of range";
    return nullptr;
}

}  // namespace trellis
}  // namespace rmm
