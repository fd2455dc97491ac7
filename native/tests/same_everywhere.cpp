// What every machine must compute to the last bit: trellis runs and principal directions. Prints a
// checksum for each case; tests/native/cross.py holds those of two machines against each other.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../src/crc32c.hpp"
#include "../src/principal.hpp"
#include "../src/trellis.hpp"

using namespace rmm;

namespace {

// Bell-shaped numbers that no library can round in its own way.
class Numbers {
  public:
    float next() {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) {
            state_ = state_ * 6364136223846793005u + 1442695040888963407u;
            sum += static_cast<int32_t>(state_ >> 54);
        }
        return static_cast<float>(sum - 2046) / 256;
    }

  private:
    uint64_t state_ = 1;
};

template <class T>
unsigned sum_of(const std::vector<T>& values) {
    return crc32c(0, reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(T));
}

bool trellis_runs(Numbers& numbers) {
    const uint64_t sizes[] = {1, 15, 384, 3001, 5000};  // of one, four and sixteen lanes
    for (uint64_t n : sizes) {
        for (int octave = -6; octave <= 2; octave += 4) {
            const uint64_t k = 14;
            const float step = std::ldexp(1.0f, octave);
            std::vector<float> rows(k * n), decoded(k * n), lambdas(k, 1.6f);
            for (uint64_t i = 0; i < k * n; ++i) rows[i] = numbers.next() * static_cast<float>(1 + i / n % 3);
            for (uint64_t i = 50; i < n; i += 97) rows[i] = 300 * step;
            std::vector<uint8_t> tables(k, static_cast<uint8_t>(17 - 8 * octave < 1 ? 1 : 17 - 8 * octave)), run;
            tables[3] = 0;
            uint32_t bits;
            std::memcpy(&bits, &step, sizeof bits);
            if (trellis::encode(rows.data(), k, n, tables.data(), static_cast<uint16_t>(bits >> 16), lambdas.data(), 3,
                                run, decoded.data())) {
                return false;
            }
            std::printf("trellis %llu 2^%d: %zu bytes %08x, values %08x\n", static_cast<unsigned long long>(n), octave,
                        run.size(), sum_of(run), sum_of(decoded));
        }
    }
    return true;
}

bool directions(Numbers& numbers) {
    const uint64_t shapes[][5] = {{8, 16, 300, 1, 3}, {5, 4, 77, 8, 2}, {12, 2, 130, 4, 9}, {3, 1, 41, 32, 2}};
    for (const auto& [n, rank, length, group, p] : shapes) {
        std::vector<double> values(n * rank * length);
        for (double& value : values) value = static_cast<double>(numbers.next()) / 3;
        const uint64_t n_groups = (length + group - 1) / group;
        std::vector<float> mean(rank * length), basis(p * rank * length), coefficients(n * p * n_groups);
        for (bool centred : {false, true}) {
            if (!find_principal({values.data(), n, rank, length}, group, p, centred, 1,
                                {mean.data(), basis.data(), coefficients.data()})) {
                return false;
            }
            std::printf("directions %llu %llu %llu: %08x %08x %08x\n", static_cast<unsigned long long>(n),
                        static_cast<unsigned long long>(length), static_cast<unsigned long long>(group), sum_of(mean),
                        sum_of(basis), sum_of(coefficients));
        }
    }
    return true;
}

}  // namespace

int main() {
    Numbers numbers;
    return trellis_runs(numbers) && directions(numbers) ? 0 : 1;
}
