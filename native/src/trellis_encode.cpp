// Encoding of trellis runs (8.3): search, choice of tables, entropy coding.

#include <cmath>
#include <memory>

#include "trellis.hpp"

namespace rmm {
namespace trellis {
namespace {

// The largest value, in units of the step, that a table is used for: candidates are up to 8 beyond it.
float reach(const Table& t) { return static_cast<float>(2 * static_cast<int64_t>(t.max_index()) - 16); }

// What coding a row's indices with a table costs.
double cost_of(const uint32_t* indices, uint64_t n, const Table& t) {
    double sum = 0;
    for (uint64_t i = 0; i < n; ++i) {
        const uint32_t q = indices[i] >> t.raw_bits;
        sum += t.bits[q < t.escape ? q : t.escape];
    }
    return sum;
}

// The cheapest table of the families for a row's indices, near the one that was used; `peak` is the
// row's largest value.
uint8_t best_table(const uint32_t* indices, uint64_t n, float peak, uint8_t used, unsigned families) {
    const int32_t index = static_cast<int32_t>(table_index(used));
    uint8_t best = used;
    double least = cost_of(indices, n, table(used));
    for (unsigned family = 0; family < 2; ++family) {
        if (!(families >> family & 1)) continue;
        for (int32_t i = index - 3; i <= index + 3; ++i) {
            if (i < 0 || i >= static_cast<int32_t>(N_INDICES)) continue;
            const uint8_t number = static_cast<uint8_t>(family << 7 | static_cast<unsigned>(i + 1));
            if (peak > reach(table(number))) continue;
            const double cost = cost_of(indices, n, table(number));
            if (cost < least) {
                least = cost;
                best = number;
            }
        }
    }
    return best;
}

// The entropy coder works from the last value to the first, and its words are read backwards.
class Packer {
  public:
    explicit Packer(uint32_t lanes) : x_(lanes, STATE_LOW) {}

    void put(uint32_t lane, const Table& t, uint32_t j) {
        uint32_t x = x_[lane];
        uint32_t q = j >> t.raw_bits;
        if (t.raw_bits > 0) {
            if (x >> (32 - t.raw_bits)) x = give(x);
            x = x << t.raw_bits | (j & ((1u << t.raw_bits) - 1));
        }
        if (q >= t.escape) {
            words_.push_back(static_cast<uint16_t>(q - t.escape));
            q = t.escape;
        }
        const uint32_t f = t.frequency[q];
        if (x >= static_cast<uint64_t>(f) << (32 - TABLE_BITS)) x = give(x);
        x_[lane] = (x / f << TABLE_BITS) + x % f + t.start[q];
    }

    // Appends states and words.
    void finish(std::vector<uint8_t>& out) const {
        for (uint32_t x : x_) {
            for (unsigned shift = 0; shift < 32; shift += 8) out.push_back(static_cast<uint8_t>(x >> shift));
        }
        for (size_t i = words_.size(); i-- > 0;) {
            out.push_back(static_cast<uint8_t>(words_[i]));
            out.push_back(static_cast<uint8_t>(words_[i] >> 8));
        }
    }

    uint64_t n_bytes() const { return 4 * x_.size() + 2 * words_.size(); }

  private:
    uint32_t give(uint32_t x) {
        words_.push_back(static_cast<uint16_t>(x));
        return x >> 16;
    }

    std::vector<uint32_t> x_;
    std::vector<uint16_t> words_;
};

void put_length(uint64_t length, std::vector<uint8_t>& out) {
    for (; length > 127; length >>= 7) out.push_back(static_cast<uint8_t>((length & 127) | 128));
    out.push_back(static_cast<uint8_t>(length));
}

}  // namespace

const char* encode(const float* rows, uint64_t n_rows, uint64_t n, uint8_t* row_bytes, uint16_t base,
                   const float* lambdas, unsigned families, std::vector<uint8_t>& run, float* decoded) {
    if (n_rows == 0 || n == 0) return "a trellis run needs rows and values";
    if (const char* wrong = check_steps(base, row_bytes, n_rows)) return wrong;
    std::vector<SearchRow> plan(n_rows);
    std::vector<float> values(n_rows * n), peaks(n_rows);
    uint64_t n_coded = 0;
    for (uint64_t k = 0; k < n_rows; ++k) {
        plan[k] = {nullptr, 0};
        if (row_bytes[k] == 0) continue;
        ++n_coded;
        if (!(lambdas[k] >= 0) || !std::isfinite(lambdas[k])) return "a lambda is negative or not finite";
        plan[k] = {&table(row_bytes[k]), lambdas[k]};
        const float step = row_step(base, row_bytes[k]);
        const float limit = reach(*plan[k].table);
        for (uint64_t i = k * n; i < (k + 1) * n; ++i) {
            values[i] = rows[i] / step;
            const float size = std::fabs(values[i]);
            if (!(size <= limit)) return "a value is not finite, or out of the reach of step and table";
            peaks[k] = size > peaks[k] ? size : peaks[k];
        }
    }
    const uint32_t lanes = lanes_of(n_coded * n);
    std::vector<uint32_t> indices(n_rows * n);
    search(values.data(), plan, n, lanes, indices.data(), decoded);
    if (families != 0 && base >> 15 == 0) {
        bool changed = false;
        for (uint64_t k = 0; k < n_rows; ++k) {
            if (!plan[k].table) continue;
            const uint8_t best = best_table(indices.data() + k * n, n, peaks[k], row_bytes[k], families);
            if (best == row_bytes[k]) continue;
            row_bytes[k] = best;
            plan[k].table = &table(best);
            changed = true;
        }
        if (changed) search(values.data(), plan, n, lanes, indices.data(), decoded);
    }
    Packer packer(lanes);
    for (uint64_t k = n_rows; k-- > 0;) {
        if (!plan[k].table) continue;
        for (uint64_t i = n; i-- > 0;) {
            packer.put(static_cast<uint32_t>(i % lanes), *plan[k].table, indices[k * n + i]);
        }
    }
    const uint64_t length = 2 + n_rows + packer.n_bytes();
    if (length > UINT32_MAX) return "a trellis run exceeds 4 GiB";
    run.clear();
    put_length(length, run);
    run.push_back(static_cast<uint8_t>(base));
    run.push_back(static_cast<uint8_t>(base >> 8));
    run.insert(run.end(), row_bytes, row_bytes + n_rows);
    packer.finish(run);
    for (uint64_t k = 0; k < n_rows; ++k) {
        float* row = decoded + k * n;
        const float step = plan[k].table ? row_step(base, row_bytes[k]) : 0;
        for (uint64_t i = 0; i < n; ++i) row[i] = plan[k].table ? row[i] * step : 0;
    }
    return nullptr;
}

}  // namespace trellis
}  // namespace rmm
