// Every kernel of this processor gives the bits that the portable one gives: of numbers of every kind,
// at every length that leaves a rest, at any alignment. Memory has exactly the size that is told, so
// that a sanitizer sees what is beside it. Prints how many calls were compared.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../src/blocks.hpp"

using namespace rmm;

namespace {

std::mt19937 source(1);
long n_compared = 0;

[[noreturn]] void differs(const Kernels& found, const char* what, uint64_t n) {
    std::printf("%s, %s of %llu: differs from portable\n", found.name, what, static_cast<unsigned long long>(n));
    std::exit(1);
}

// Bytes that begin `shift` bytes behind where memory is aligned, with nothing behind them.
struct Memory {
    explicit Memory(uint64_t n_bytes, uint64_t shift = 0)
        : bytes(new uint8_t[n_bytes + shift]()), at(bytes.get() + shift), size(n_bytes) {}
    std::unique_ptr<uint8_t[]> bytes;
    uint8_t* at;
    uint64_t size;

    template <class T>
    T* as() {
        return reinterpret_cast<T*>(at);
    }
    void fill() {
        for (uint64_t i = 0; i < size; ++i) at[i] = static_cast<uint8_t>(source());
    }
};

// Zeros, subnormals, infinities, NaNs quiet and signalling, the ends of the 16-bit formats, halfway
// points, and random bits.
uint32_t odd_bits() {
    static const uint32_t ODD[] = {0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF800000,
                                   0x7F800000, 0x7FC00000, 0x7F800001, 0xFFBFFFFF, 0x7FC12345, 0x477FE000, 0x477FEFFF,
                                   0x477FF000, 0x33000000, 0x33000001, 0x33800000, 0x387FC000, 0x387FE000, 0x38801000,
                                   0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000, 0x7F7F8000, 0x3F800000, 0xBF800000};
    return source() % 3 ? ODD[source() % (sizeof ODD / sizeof *ODD)] : static_cast<uint32_t>(source());
}

void fill_stored(int stored, Memory& row, uint64_t n, bool finite) {
    for (uint64_t i = 0; i < n; ++i) {
        uint32_t bits = odd_bits();
        if (finite) bits = (bits & 0x80FFFFFFu) | (0x35u + source() % 16) << 24;
        if (stored == STORED_F32) {
            std::memcpy(row.at + 4 * i, &bits, 4);
            continue;
        }
        uint16_t half = static_cast<uint16_t>(source() % 2 ? bits >> 16 : bits);
        if (finite) half = stored == STORED_F16 ? (half & 0x83FF) | (8 + source() % 12) << 10 : static_cast<uint16_t>(bits >> 16);
        std::memcpy(row.at + 2 * i, &half, 2);
    }
}

bool same_sums(const Memory& a, const Memory& b) {  // equal, or both NaN
    for (uint64_t i = 0; i < a.size; i += 4) {
        const uint32_t x = u32(a.at + i), y = u32(b.at + i);
        if (x != y && !((x & 0x7FFFFFFF) > 0x7F800000 && (y & 0x7FFFFFFF) > 0x7F800000)) return false;
    }
    return true;
}

bool same(const Memory& a, const Memory& b) { return std::memcmp(a.at, b.at, a.size) == 0; }

void conversions(const Kernels& plain, const Kernels& found, uint64_t n, uint64_t shift) {
    for (int stored : {STORED_F32, STORED_F16, STORED_BF16}) {
        Memory row((stored == STORED_F32 ? 4 : 2) * n, shift), a(4 * n, shift), b(4 * n, shift);
        fill_stored(stored, row, n, false);
        plain.widen[stored](a.as<f32u>(), row.at, n);
        found.widen[stored](b.as<f32u>(), row.at, n);
        if (!same(a, b)) differs(found, "widening", n);
        if (stored == STORED_F32) continue;
        Memory values(4 * n, shift), c(2 * n, shift), d(2 * n, shift);
        fill_stored(STORED_F32, values, n, false);
        plain.narrow[stored](c.as<u16u>(), values.as<f32u>(), n);
        found.narrow[stored](d.as<u16u>(), values.as<f32u>(), n);
        if (!same(c, d)) differs(found, "narrowing", n);
        n_compared += 2;
    }
}

void all_halves(const Kernels& plain, const Kernels& found) {
    for (int stored : {STORED_F16, STORED_BF16}) {
        Memory row(2 << 16), a(4 << 16), b(4 << 16), c(2 << 16), d(2 << 16);
        for (uint32_t i = 0; i < 1 << 16; ++i) row.as<u16u>()[i] = static_cast<uint16_t>(i);
        plain.widen[stored](a.as<f32u>(), row.at, 1 << 16);
        found.widen[stored](b.as<f32u>(), row.at, 1 << 16);
        if (!same(a, b)) differs(found, "widening of all halves", 1 << 16);
        found.narrow[stored](c.as<u16u>(), b.as<f32u>(), 1 << 16);
        plain.narrow[stored](d.as<u16u>(), b.as<f32u>(), 1 << 16);
        if (!same(c, d)) differs(found, "narrowing of all halves", 1 << 16);
        n_compared += 2;
    }
}

void sums(const Kernels& plain, const Kernels& found, uint64_t n, uint64_t shift, bool finite) {
    for (int stored : {STORED_F32, STORED_F16, STORED_BF16}) {
        for (int one = 0; one < 2; ++one) {
            for (uint32_t n_terms = 1; n_terms <= TERMS; ++n_terms) {
                for (Start from : {Start::PRODUCT, Start::SUM, Start::STORED}) {
                    const uint64_t width = stored == STORED_F32 ? 4 : 2;
                    std::vector<Memory> c, b;
                    const f32u* cs[TERMS];
                    const void* bs[TERMS];
                    for (uint32_t t = 0; t < n_terms; ++t) {
                        c.emplace_back(4 * (one ? 1 : n), shift);
                        b.emplace_back(width * n, shift);
                        fill_stored(STORED_F32, c.back(), one ? 1 : n, finite);
                        fill_stored(stored, b.back(), n, finite);
                        cs[t] = c.back().as<f32u>();
                        bs[t] = b.back().at;
                    }
                    const int as = from == Start::STORED ? stored : STORED_F32;
                    Memory start((as == STORED_F32 ? 4 : 2) * n, shift), x(4 * n, shift), y(4 * n, shift);
                    fill_stored(as, start, n, finite);
                    const void* given = from == Start::PRODUCT ? nullptr : start.at;
                    plain.add_products[stored][one](x.as<f32u>(), from, given, cs, bs, n_terms, n);
                    found.add_products[stored][one](y.as<f32u>(), from, given, cs, bs, n_terms, n);
                    if (!(finite ? same(x, y) : same_sums(x, y))) differs(found, "sums of products", n);
                    if (from == Start::SUM) {  // onto itself
                        found.add_products[stored][one](start.as<f32u>(), from, start.at, cs, bs, n_terms, n);
                        if (!same_sums(start, x)) differs(found, "sums in place", n);
                    }
                    ++n_compared;
                }
            }
        }
    }
    Memory first(4 * n, shift), second(4 * n, shift), x(4 * n, shift), y(4 * n, shift);
    fill_stored(STORED_F32, first, n, finite);
    fill_stored(STORED_F32, second, n, finite);
    plain.add_rows(x.as<f32u>(), first.as<f32u>(), second.as<f32u>(), n);
    found.add_rows(y.as<f32u>(), first.as<f32u>(), second.as<f32u>(), n);
    if (!same_sums(x, y)) differs(found, "sums of rows", n);
    ++n_compared;
}

void blocks(const Kernels& plain, const Kernels& found, uint64_t n, uint64_t shift) {
    for (unsigned bits = 1; bits <= 8; ++bits) {
        Memory row(ceil_div(n, BLOCK) * block_bytes(bits), shift);
        row.fill();  // scales of every kind
        for (uint64_t first = 0; first < n; first += 7 * BLOCK) {
            Memory a(4 * (n - first), shift), b(4 * (n - first), shift);
            plain.decode_blocks[bits](row.at, first, n - first, a.as<f32u>());
            found.decode_blocks[bits](row.at, first, n - first, b.as<f32u>());
            if (!same(a, b)) differs(found, "blocks", n);
            ++n_compared;
        }
    }
}

template <class T, class Kernel>
void transposition(const Kernels& found, Kernel plain, Kernel kernel, uint32_t n_rows, uint64_t stride, uint64_t n,
                   uint64_t shift, bool past) {
    std::vector<Memory> rows;
    const T* at[PANEL_ROWS];
    for (uint32_t k = 0; k < n_rows; ++k) {
        rows.emplace_back(sizeof(T) * n, shift);
        rows.back().fill();
        at[k] = rows.back().as<T>();
    }
    const uint64_t n_bytes = sizeof(T) * ((n - 1) * stride + n_rows);
    Memory a(n_bytes, shift), b(n_bytes + 64, shift);
    uint8_t* to = past ? b.at + ((0 - reinterpret_cast<uintptr_t>(b.at)) & 63) : b.at;
    plain(a.as<T>(), stride, at, n_rows, n, false);
    kernel(reinterpret_cast<T*>(to), stride, at, n_rows, n, past);
    found.settle();
    if (std::memcmp(a.at, to, n_bytes) != 0) differs(found, sizeof(T) == 4 ? "transposition of 32 bits" : "transposition of 16 bits", n);
    if (!past) {
        for (uint64_t i = n_bytes; i < b.size; ++i) {
            if (b.at[i] != 0) differs(found, "end of a transposition", n);
        }
    }
    ++n_compared;
}

void copies(const Kernels& found, uint64_t n, uint64_t shift) {
    Memory in(n, shift), out(n, (shift * 7) % 64);
    in.fill();
    found.copy_past(out.at, in.at, n);
    found.settle();
    if (!same(in, out)) differs(found, "copy", n);
    ++n_compared;
}

}  // namespace

int main() {
    const std::vector<Kernels>& all = all_kernels();
    const Kernels& plain = all.front();
    if (std::strcmp(plain.name, "portable") != 0) return 2;
    std::string names;
    for (const Kernels& found : all) {
        names += std::string(names.empty() ? "" : ", ") + found.name;
        all_halves(plain, found);
        for (uint64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 127, 200, 255, 511, 512, 700}) {
            for (uint64_t shift : {0, 1, 4, 30}) {
                conversions(plain, found, n, shift);
                sums(plain, found, n, shift, false);
                sums(plain, found, n, shift, true);
                blocks(plain, found, n, shift);
                copies(found, n, shift);
                copies(found, 13 * n, shift);
                for (uint32_t n_rows = 1; n_rows <= PANEL_ROWS; ++n_rows) {
                    for (uint64_t stride : {uint64_t{n_rows}, uint64_t{n_rows} + 5}) {
                        transposition<u32u>(found, plain.transpose32, found.transpose32, n_rows, stride, n, shift, false);
                        transposition<u16u>(found, plain.transpose16, found.transpose16, n_rows, stride, n, shift, false);
                    }
                    if (64 % n_rows == 0) {  // whole lines, or parts of one
                        transposition<u32u>(found, plain.transpose32, found.transpose32, n_rows, n_rows, n, shift, true);
                        transposition<u16u>(found, plain.transpose16, found.transpose16, n_rows, n_rows, n, shift, true);
                    }
                }
                transposition<u32u>(found, plain.transpose32, found.transpose32, 16, 32, n, shift, true);
                transposition<u16u>(found, plain.transpose16, found.transpose16, 16, 32, n, shift, true);
            }
        }
    }
    std::printf("%s: %ld calls gave the same bits\n", names.c_str(), n_compared);
    return 0;
}
