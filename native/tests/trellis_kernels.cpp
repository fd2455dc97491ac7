// Every way of decoding trellis runs gives the same values, and the same verdict on damaged ones, one
// run at a time or two; under a sanitizer none reads outside a run. Every way of searching for the best
// path finds the same one. Prints how many were decoded.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "../src/trellis_metrics.hpp"
#include "../src/trellis_wide.hpp"

using namespace rmm::trellis;

namespace {

struct Outcome {
    std::vector<float> values;
    std::string wrong;

    bool operator==(const Outcome& other) const {
        return wrong == other.wrong &&
               (!wrong.empty() || std::memcmp(values.data(), other.values.data(), 4 * values.size()) == 0);
    }
};

Outcome outcome(const std::vector<uint8_t>& run, uint64_t k, uint64_t n, const WideKernels* kernels, size_t together) {
    // Of exactly its size, so that a sanitizer sees what is behind it.
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[run.size()]);
    std::memcpy(bytes.get(), run.data(), run.size());
    std::vector<std::vector<float>> values(together, std::vector<float>(k * n));
    std::vector<Decoding> decodings(together);
    for (size_t i = 0; i < together; ++i) {
        decodings[i].wrong = parse(bytes.get(), run.size(), k, n, decodings[i].run);
        decodings[i].target = [&values, i, n](uint64_t row) { return values[i].data() + row * n; };
    }
    decode(decodings.data(), together, kernels);
    const char* wrong = decodings.back().wrong;
    return {values.back(), wrong ? wrong : ""};
}

// A run, sound or not, and what becomes of it alone.
struct Kept {
    std::vector<uint8_t> bytes;
    uint64_t k, n;
    Outcome expected;
};

// Different runs, some damaged, together: each as it is alone.
bool same_together(const std::vector<Kept>& kept, size_t first, size_t together, const WideKernels* kernels) {
    std::vector<std::unique_ptr<uint8_t[]>> bytes;
    std::vector<std::vector<float>> values(together);
    std::vector<Decoding> decodings(together);
    for (size_t i = 0; i < together; ++i) {
        const Kept& run = kept[(first + i) % kept.size()];
        bytes.emplace_back(new uint8_t[run.bytes.size()]);
        std::memcpy(bytes[i].get(), run.bytes.data(), run.bytes.size());
        values[i].resize(run.k * run.n);
        decodings[i].wrong = parse(bytes[i].get(), run.bytes.size(), run.k, run.n, decodings[i].run);
        decodings[i].target = [&values, &run, i](uint64_t row) { return values[i].data() + row * run.n; };
    }
    decode(decodings.data(), together, kernels);
    for (size_t i = 0; i < together; ++i) {
        const Outcome found = {values[i], decodings[i].wrong ? decodings[i].wrong : ""};
        if (found == kept[(first + i) % kept.size()].expected) continue;
        std::printf("%zu different runs from %zu on, %s: run %zu differs\n", together, first,
                    kernels ? kernels->name : "portable", i);
        return false;
    }
    return true;
}

bool same_paths(std::mt19937& random, uint64_t n, uint32_t lanes) {
    std::normal_distribution<float> normal;
    std::vector<float> values(3 * n);
    for (float& value : values) value = 4 * normal(random);
    for (uint64_t i = 0; i < n; i += 3) values[i] = static_cast<float>(i % 8);  // paths that are equally good
    const std::vector<SearchRow> rows = {{&table(24), 1.6f}, {nullptr, 0}, {&table(40), 0}};
    std::vector<uint32_t> expected(3 * n), indices(3 * n);
    std::vector<float> expected_multiples(3 * n), multiples(3 * n);
    for (const SearchKernels& kernels : search_kernels()) {
        search(values.data(), rows, n, lanes, indices.data(), multiples.data(), kernels);
        if (&kernels == &search_kernels().front()) {
            expected = indices;
            expected_multiples = multiples;
        }
        if (indices != expected || multiples != expected_multiples) {
            std::printf("search of %llu values, %s: differs\n", static_cast<unsigned long long>(n), kernels.name);
            return false;
        }
    }
    return true;
}

// The run cut by some words, its length told anew.
std::vector<uint8_t> cut(std::vector<uint8_t> run, size_t head, size_t n_words) {
    run.resize(run.size() - 2 * n_words);
    size_t length = run.size() - head;
    for (size_t i = 0; i < head; ++i, length >>= 7) run[i] = static_cast<uint8_t>((length & 127) | (i + 1 < head ? 128 : 0));
    return run;
}

}  // namespace

int main(int argc, char** argv) {
    const int trials = argc > 1 ? std::atoi(argv[1]) : 20;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    long n_decoded = 0, n_refused = 0;
    std::vector<Kept> kept;
    for (uint64_t n : {1, 7, 254, 255, 256, 700, 2050}) {
        for (uint32_t lanes : {1u, 4u, MAX_LANES}) {
            if (!same_paths(random, n, lanes)) return 5;
        }
    }
    for (int trial = 0; trial < trials; ++trial) {
        const uint64_t sizes[3] = {300, 1500, 4096};  // one, four and sixteen lanes
        const uint64_t k = 16 + trial % 3, n = sizes[trial % 3] + static_cast<uint64_t>(trial) * 13;
        const float step = std::ldexp(1.0f, 2 - trial % 10);
        std::vector<float> rows(k * n), decoded(k * n);
        for (float& value : rows) value = normal(random);
        for (uint64_t i = 0; i < n; i += 97) rows[i] = 500 * step;  // escapes
        std::vector<uint8_t> tables(k, static_cast<uint8_t>(20 + trial % 4 * 9)), run;
        std::vector<float> lambdas(k, 1.6f);
        uint32_t bits;
        std::memcpy(&bits, &step, 4);
        if (encode(rows.data(), k, n, tables.data(), static_cast<uint16_t>(bits >> 16), lambdas.data(), 3, run, decoded.data())) {
            return 2;
        }
        size_t head = 1;
        while (run[head - 1] & 128) ++head;
        for (unsigned damage = 0; damage < 8; ++damage) {
            std::vector<uint8_t> bytes = run;
            if (damage == 1) bytes = cut(run, head, 1);
            if (damage == 2) bytes = cut(run, head, random() % (run.size() / 4));
            for (unsigned i = 3; i <= damage; ++i) {
                bytes[head + 2 + k + random() % (bytes.size() - head - 2 - k)] = static_cast<uint8_t>(random());
            }
            const Outcome expected = outcome(bytes, k, n, nullptr, 1);
            if (damage == 0 && !(expected == Outcome{decoded, ""})) return 3;
            n_refused += !expected.wrong.empty();
            if (damage < 5) kept.push_back({bytes, k, n, expected});
            std::vector<const WideKernels*> ways = {nullptr};
            for (const WideKernels& wide : wide_kernels()) ways.push_back(&wide);
            for (const WideKernels* way : ways) {
                for (size_t together = 1; together <= 11; together += together < 3 ? 1 : 4, ++n_decoded) {
                    if (outcome(bytes, k, n, way, together) == expected) continue;
                    std::printf("trial %d, damage %u, %s, %zu at once: differs\n", trial, damage,
                                way ? way->name : "portable", together);
                    return 1;
                }
            }
        }
    }
    for (size_t first = 0; first < kept.size(); first += 3) {
        for (size_t together : {6, 9, 24, 40}) {
            if (!same_together(kept, first, together, nullptr)) return 6;
            for (const WideKernels& wide : wide_kernels()) {
                if (!same_together(kept, first, together, &wide)) return 6;
            }
            n_decoded += static_cast<long>(together * (1 + wide_kernels().size()));
        }
    }
    std::string names = "portable";
    for (const WideKernels& wide : wide_kernels()) names += std::string(", ") + wide.name;
    names += "; search";
    for (const SearchKernels& kernels : search_kernels()) names += std::string(", ") + kernels.name;
    std::printf("%s: %ld decoded, %ld of the runs refused\n", names.c_str(), n_decoded, n_refused);
    return n_refused > 0 ? 0 : 4;
}
