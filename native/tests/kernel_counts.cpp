// Runs each kernel between two calls of kernel_mark(), for a tool that counts instructions between them:
//
//   kernel_counts write RUN    writes what trellis kernels are to decode
//   valgrind --tool=callgrind --dump-before=kernel_mark kernel_counts count RUN
//
// Prints "KERNELS, NAME, VALUES" for every count, in order, separated by tabs.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "../src/blocks.hpp"
#include "../src/crc32c.hpp"
#include "../src/trellis_wide.hpp"

using namespace rmm;

extern "C" __attribute__((noinline)) void kernel_mark() { __asm__ volatile("" ::: "memory"); }

namespace {

constexpr uint64_t N = TILE;  // as restoring does it
constexpr uint64_t TRELLIS_ROWS = 16, TRELLIS_VALUES = 4096;

using Work = std::function<void()>;

// Numbers that are the same everywhere.
uint32_t next_random() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

float bell() {
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += static_cast<float>(next_random() & 0xFFFF) / 65536.0f - 0.5f;
    return sum;
}

std::vector<uint8_t> make_run() {
    std::vector<float> coded(TRELLIS_ROWS * TRELLIS_VALUES), decoded(coded.size());
    for (float& value : coded) value = bell();
    std::vector<uint8_t> tables(TRELLIS_ROWS, 20), run;
    std::vector<float> lambdas(TRELLIS_ROWS, 1.6f);
    if (trellis::encode(coded.data(), TRELLIS_ROWS, TRELLIS_VALUES, tables.data(), 0x3E80, lambdas.data(), 1, run, decoded.data())) {
        std::exit(2);
    }
    return run;
}

struct Data {
    std::vector<float> values = std::vector<float>(PANEL_ROWS * N), out = std::vector<float>(PANEL_ROWS * N + 16);
    std::vector<uint16_t> halves = std::vector<uint16_t>(PANEL_ROWS * N, 0x3C01), half_out = std::vector<uint16_t>(PANEL_ROWS * N + 32);
    std::vector<uint8_t> bytes = std::vector<uint8_t>(N / BLOCK * block_bytes(8), 0x11);
    const f32u* c[TERMS];
    const void* b[TERMS];
    const void* half_b[TERMS];
    const u32u* rows[PANEL_ROWS];
    const u16u* half_rows[PANEL_ROWS];
    std::vector<uint8_t> run;

    Data() {
        for (float& value : values) value = bell();
        for (uint32_t t = 0; t < TERMS; ++t) {
            c[t] = values.data() + t * N;
            b[t] = values.data() + (4 + t) * N;
            half_b[t] = halves.data() + t * N;
        }
        for (uint32_t k = 0; k < PANEL_ROWS; ++k) {
            rows[k] = reinterpret_cast<const u32u*>(values.data() + k * N);
            half_rows[k] = halves.data() + k * N;
        }
    }
};

void decode_run(const Data& data, std::vector<float>& out, const trellis::WideKernels* wide) {
    trellis::Decoding decoding;
    decoding.wrong = trellis::parse(data.run.data(), data.run.size(), TRELLIS_ROWS, TRELLIS_VALUES, decoding.run);
    decoding.target = [&](uint64_t) { return out.data(); };
    trellis::decode(&decoding, 1, wide);
    if (decoding.wrong) std::exit(2);
}

void count(const std::string& kernels, const std::string& name, uint64_t n_values, const Work& work) {
    work();  // what is made once is made
    kernel_mark();
    work();
    kernel_mark();
    std::printf("%s\t%s\t%llu\n", kernels.c_str(), name.c_str(), static_cast<unsigned long long>(n_values));
}

void count_all(const Kernels& k, Data& d) {
    f32u* out = d.out.data();
    u16u* half_out = d.half_out.data();
    auto one = [&](const std::string& name, const Work& work) { count(k.name, name, N, work); };
    one("widen f16", [&] { k.widen[STORED_F16](out, d.halves.data(), N); });
    one("widen bf16", [&] { k.widen[STORED_BF16](out, d.halves.data(), N); });
    one("narrow f16", [&] { k.narrow[STORED_F16](half_out, d.values.data(), N); });
    one("narrow bf16", [&] { k.narrow[STORED_BF16](half_out, d.values.data(), N); });
    const char* names[N_STORED] = {"f32", "f16", "bf16"};
    for (int stored : {STORED_F32, STORED_F16, STORED_BF16}) {
        const void* const* b = stored == STORED_F32 ? d.b : d.half_b;
        for (int scalar = 0; scalar < 2; ++scalar) {
            one(std::string(scalar ? "mean and 3 multiples " : "mean and 3 products ") + names[stored],
                [&] { k.add_products[stored][scalar](out, Start::STORED, b[3], d.c, b, 3, N); });
        }
    }
    one("add rows", [&] { k.add_rows(out, d.values.data(), d.values.data() + N, N); });
    for (unsigned bits = 1; bits <= 8; ++bits) {
        one("blocks q" + std::to_string(bits), [&] { k.decode_blocks[bits](d.bytes.data(), 0, N, out); });
    }
    count(k.name, "transpose 32", PANEL_ROWS * N, [&] {
        k.transpose32(reinterpret_cast<u32u*>(d.out.data()), PANEL_ROWS, d.rows, PANEL_ROWS, N, false);
    });
    count(k.name, "transpose 16", PANEL_ROWS * N, [&] {
        k.transpose16(half_out, PANEL_ROWS, d.half_rows, PANEL_ROWS, N, false);
    });
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    if (std::strcmp(argv[1], "write") == 0) {
        const std::vector<uint8_t> run = make_run();
        std::ofstream(argv[2], std::ios::binary).write(reinterpret_cast<const char*>(run.data()), static_cast<long>(run.size()));
        return 0;
    }
    Data data;
    std::ifstream file(argv[2], std::ios::binary);
    data.run.assign(std::istreambuf_iterator<char>(file), {});
    std::vector<float> row(TRELLIS_VALUES);
    constexpr uint64_t N_CODED = TRELLIS_ROWS * TRELLIS_VALUES;
    for (const Kernels& found : all_kernels()) count_all(found, data);
    count("portable", "trellis", N_CODED, [&] { decode_run(data, row, nullptr); });
    for (const trellis::WideKernels& wide : trellis::wide_kernels()) {
        count(wide.name, "trellis", N_CODED, [&] { decode_run(data, row, &wide); });
    }
    std::vector<uint8_t> bytes(1 << 16, 7);
    uint32_t crc = 0;
    count("processor", "crc32c", bytes.size(), [&] { crc = crc32c(crc, bytes.data(), bytes.size()); });
    return crc == 0;
}
