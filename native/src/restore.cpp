#include "restore.hpp"

#include <algorithm>

#include "kernels.hpp"

namespace rmm {

const PlacedRun& Rows::find(uint64_t i) {
    auto behind = std::upper_bound(runs_.begin(), runs_.end(), i,
                                   [](uint64_t row, const PlacedRun& run) { return row < run.first_row; });
    last_ = static_cast<size_t>(behind - runs_.begin()) - 1;
    return runs_[last_];
}

void Rows::sort() {
    std::sort(runs_.begin(), runs_.end(),
              [](const PlacedRun& a, const PlacedRun& b) { return a.first_row < b.first_row; });
}

void Restorer::take(ArrayWalk& walk, const Array& array, Rows* rows) {
    walk.array(
        array,
        [&](PlacedRun run) {
            if (!rows) return;
            if (!run.encoding->fixed_size) return put_off(run, array.row_length, *rows);
            rows->push(run);
        },
        [](uint64_t, uint64_t) {});
}

// Rows of such a run cannot be entered in the middle: all are decoded, to f32. What that takes is
// in proportion to the run, which has a byte for each row and words for those that are not zero.
void Restorer::put_off(const PlacedRun& run, uint64_t row_length, Rows& rows) {
    RunDecoding decoding = {run.data, run.n_bytes, run.n_rows, row_length, nullptr};
    pending_.push_back(std::unique_ptr<Pending>(new Pending{run.encoding, decoding, &rows, run.first_row, 0}));
    Pending& pending = *pending_.back();
    pending.decoding.target = [this, &pending](uint64_t row) {
        push_zeros(pending, row);
        pending.next = row + 1;
        decoded_.emplace_back(new float[pending.decoding.n]);
        PlacedRun values;
        values.encoding = find_encoding(ENCODING_F32);
        values.data = reinterpret_cast<const uint8_t*>(decoded_.back().get());
        values.row_bytes = 4 * pending.decoding.n;
        values.first_row = pending.first_row + row;
        values.n_rows = 1;
        pending.rows->push(values);
        return decoded_.back().get();
    };
}

void Restorer::push_zeros(const Pending& pending, uint64_t until) {
    PlacedRun zeros;
    zeros.encoding = find_encoding(ENCODING_ZERO);
    zeros.data = pending.decoding.data;
    zeros.first_row = pending.first_row + pending.next;
    zeros.n_rows = until - pending.next;
    if (zeros.n_rows > 0) pending.rows->push(zeros);
}

void Restorer::decode(Restorer* const* restorers, size_t n) {
    std::vector<Pending*> left;
    for (size_t i = 0; i < n; ++i) {
        for (auto& pending : restorers[i]->pending_) left.push_back(pending.get());
    }
    while (!left.empty()) {  // once for each encoding
        const Encoding* encoding = left.front()->encoding;
        auto others = std::stable_partition(left.begin(), left.end(),
                                            [&](const Pending* pending) { return pending->encoding == encoding; });
        std::vector<RunDecoding> runs;
        for (auto at = left.begin(); at != others; ++at) runs.push_back((*at)->decoding);
        encoding->decode_runs(runs.data(), runs.size());
        for (size_t i = 0; i < runs.size(); ++i) left[i]->decoding.wrong = runs[i].wrong;
        left.erase(left.begin(), others);
    }
}

void Restorer::finish() {
    for (const auto& pending : pending_) {
        const RunDecoding& run = pending->decoding;
        if (run.wrong) refuse(87, static_cast<uint64_t>(run.data - index_.data), "%s", run.wrong);
        push_zeros(*pending, run.n_rows);
    }
    if (pending_.empty()) return;
    for (Rows* rows : {&mean_, &basis_, &coefficients_, &residual_}) rows->sort();
    pending_.clear();
}

void Restorer::open(const EntryPlan& plan, int f, const Entry& entry, uint64_t offset) {
    plan_ = plan.factor[f];
    factor_ = f;
    pending_.clear();
    decoded_.clear();
    try {
        walk(plan, f, entry, offset);
    } catch (Failure&) {
        // A malformed run is the reason why what follows it does not fit: tell that.
        Restorer* self = this;
        decode(&self, 1);
        finish();
        throw;
    }
}

void Restorer::walk(const EntryPlan& plan, int f, const Entry& entry, uint64_t offset) {
    Array arrays[4];
    entry_arrays(plan, arrays);
    ArrayWalk entry_walk(index_, offset, entry.length, 61, "the entry");
    coefficients_.clear();
    residual_.clear();
    mean_.clear();
    basis_.clear();
    for (int i = 0; i < 4; ++i) {
        Rows* rows = i / 2 != f ? nullptr : i % 2 == 0 ? &coefficients_ : &residual_;
        take(entry_walk, arrays[i], rows);
    }
    entry_walk.finish();

    if (plan.frame == NONE) return;
    Frame frame = index_.frame(plan.frame);
    frame_arrays(frame, index_.target(frame.target), arrays);
    ArrayWalk frame_walk(index_, frame.offset, frame.length, 52, "the frame");
    for (int i = 0; i < 4; ++i) {
        Rows* rows = i / 2 != f ? nullptr : i % 2 == 0 ? &mean_ : &basis_;
        take(frame_walk, arrays[i], rows);
    }
    frame_walk.finish();
}

// Values first … first + n − 1 of a row as f32: in place if they are stored so, else in `buffer`.
const f32u* Restorer::decode(const Row& row, uint64_t first, uint64_t n, f32u* buffer) {
    if (row.encoding->code == ENCODING_F32) return reinterpret_cast<const f32u*>(row.data + 4 * first);
    row.encoding->decode(row.data, first, n, buffer);
    return buffer;
}

// The coefficients of components j … j + n_terms − 1 for the positions of a tile: one number each
// (scalar_; with row mixing one for each row of the panel), or one for each position.
void Restorer::prepare_coefficients(uint32_t k, uint32_t n_rows, uint64_t first, uint64_t n, uint32_t j,
                                    uint32_t n_terms) {
    for (uint32_t t = 0; t < n_terms; ++t) {
        Row row = coefficients_.row(j + t);
        float* buffer = coefficients_at_[t];
        if (plan_.row_mixing) {  // one group: index k of the row
            uint64_t start = k / BLOCK * BLOCK;
            coefficient_[t] = decode(row, start, k + n_rows - start, buffer) + (k - start);
            continue;
        }
        uint64_t group = plan_.group, low = first / group, high = (first + n - 1) / group;
        uint64_t start = low / BLOCK * BLOCK;
        const f32u* values = decode(row, start, high + 1 - start, buffer) + (low - start);
        if (group == 1 || low == high) {
            coefficient_[t] = values;
            continue;
        }
        float spread[LONGEST_TILE];  // the values may be in `buffer` themselves
        for (uint64_t i = 0, at = 0, left = group - first % group; i < n; ++i) {
            spread[i] = values[at];
            if (--left == 0) {
                left = group;
                ++at;
            }
        }
        std::memcpy(buffer, spread, n * sizeof *buffer);
        coefficient_[t] = buffer;
    }
    scalar_ = plan_.row_mixing || first / plan_.group == (first + n - 1) / plan_.group;
}

namespace {

// How a row is stored, if no more than widening is needed; N_STORED if not.
Stored stored_as(const Row& row) {
    switch (row.encoding->code) {
        case ENCODING_F32: return STORED_F32;
        case ENCODING_F16: return STORED_F16;
        case ENCODING_BF16: return STORED_BF16;
        default: return N_STORED;
    }
}

}  // namespace

// Components j … j + n_terms − 1 of row k, each position of which has coefficients of its own or one for
// the tile. Rows that are all stored in one way are widened on the way.
void Restorer::add_component(uint32_t k, uint64_t first, uint64_t n, uint32_t j, uint32_t n_terms, f32u* target,
                             const f32u*& sum) {
    Row rows[TERMS];
    Stored stored = N_STORED;
    for (uint32_t t = 0; t < n_terms; ++t) {
        rows[t] = basis_.row(static_cast<uint64_t>(j + t) * plan_.frame_rank + k);
        const Stored own = stored_as(rows[t]);
        stored = t == 0 || stored == own ? own : N_STORED;
    }
    const void* basis[TERMS];
    const uint64_t n_bytes = stored == STORED_F32 ? 4 : 2;
    for (uint32_t t = 0; t < n_terms; ++t) {
        basis[t] = stored == N_STORED ? static_cast<const void*>(decode(rows[t], first, n, terms_[t]))
                                      : rows[t].data + n_bytes * first;
    }
    Start from = sum ? Start::SUM : Start::PRODUCT;
    const void* start = sum;
    if (j == 0 && mean_.present()) {
        const Row mean = mean_.row(k);
        if (stored != N_STORED && stored_as(mean) == stored) {
            from = Start::STORED;
            start = mean.data + n_bytes * first;
        } else {
            from = Start::SUM;
            start = decode(mean, first, n, target);
        }
    }
    kernels_.add_products[stored == N_STORED ? STORED_F32 : stored][scalar_](target, from, start, coefficient_, basis,
                                                                            n_terms, n);
    sum = target;
}

// The sums of rows k0 … k0 + n_rows − 1: where they are, which need not be in the targets.
void Restorer::sum_up(uint32_t k0, uint32_t n_rows, uint64_t first, uint64_t n, f32u* const* targets,
                      const f32u** sums) {
    const uint32_t p = plan_.n_components;
    const bool mixing = plan_.row_mixing;
    for (uint32_t i = 0; i < n_rows; ++i) {
        sums[i] = mean_.present() && (p == 0 || mixing) ? decode(mean_.row(k0 + i), first, n, targets[i]) : nullptr;
    }
    for (uint32_t j = 0; j < p; j += TERMS) {
        const uint32_t n_terms = std::min(TERMS, p - j);
        prepare_coefficients(k0, n_rows, first, n, j, n_terms);
        if (!mixing) {
            for (uint32_t i = 0; i < n_rows; ++i) add_component(k0 + i, first, n, j, n_terms, targets[i], sums[i]);
            continue;
        }
        const void* basis[TERMS];  // the same rows for all
        for (uint32_t t = 0; t < n_terms; ++t) basis[t] = decode(basis_.row(j + t), first, n, terms_[t]);
        for (uint32_t i = 0; i < n_rows; ++i) {
            const f32u* c[TERMS];
            for (uint32_t t = 0; t < n_terms; ++t) c[t] = coefficient_[t] + i;
            kernels_.add_products[STORED_F32][1](targets[i], sums[i] ? Start::SUM : Start::PRODUCT, sums[i], c, basis,
                                                 n_terms, n);
            sums[i] = targets[i];
        }
    }
    for (uint32_t i = 0; i < n_rows; ++i) {
        if (residual_.present()) {
            if (!sums[i]) {
                sums[i] = decode(residual_.row(k0 + i), first, n, targets[i]);
                continue;
            }
            kernels_.add_rows(targets[i], sums[i], decode(residual_.row(k0 + i), first, n, terms_[0]), n);
            sums[i] = targets[i];
        } else if (!sums[i]) {
            std::memset(targets[i], 0, n * sizeof(float));  // no term: +0
            sums[i] = targets[i];
        }
    }
}

// Positions of A whose bytes are stored as they are to be: false if there are none such.
bool Restorer::copy(int dtype, uint8_t* out, uint64_t first, uint64_t last, bool past) {
    const uint8_t own_encoding = static_cast<uint8_t>(dtype);  // codes of dtypes and encodings agree
    const uint64_t size = dtype == RMM_F32 ? 4 : 2, L = plan_.n_positions;
    if (factor_ != 0 || mean_.present() || plan_.n_components != 0 || !residual_.present()) return false;
    for (uint32_t k = 0; k < plan_.rank; ++k) {
        if (residual_.row(k).encoding->code != own_encoding) return false;
    }
    for (uint32_t k = 0; k < plan_.rank;) {
        const uint8_t* from = residual_.row(k).data + size * first;
        const uint32_t start = k++;
        if (first == 0 && last == L) {  // rows behind each other here are so there
            while (k < plan_.rank && residual_.row(k).data == from + (k - start) * size * L) ++k;
        }
        const uint64_t n_bytes = size * (last - first + (k - start - 1) * L);
        uint8_t* to = out + size * (start * L + first);
        if (past) {
            kernels_.copy_past(to, from, n_bytes);
        } else {
            std::memcpy(to, from, n_bytes);
        }
    }
    return true;
}

void Restorer::tile(int dtype, uint8_t* out, uint64_t first, uint64_t n, bool past) {
    const uint32_t rank = plan_.rank;
    const uint64_t L = plan_.n_positions;
    const bool lone_residual = !mean_.present() && plan_.n_components == 0 && residual_.present();
    const uint8_t own_encoding = static_cast<uint8_t>(dtype);
    const uint64_t size = dtype == RMM_F32 ? 4 : 2;
    const Stored narrow = dtype == RMM_F16 ? STORED_F16 : STORED_BF16;

    for (uint32_t k0 = 0; k0 < rank; k0 += PANEL_ROWS) {
        const uint32_t n_rows = std::min(PANEL_ROWS, rank - k0);
        // Where the sum of a row is built: in the output if that has its form, else in the panel.
        const bool in_place = factor_ == 0 && dtype == RMM_F32 && !past;
        const f32u* sums[PANEL_ROWS];
        f32u* targets[PANEL_ROWS];
        const u16u* raw[PANEL_ROWS] = {nullptr};  // rows whose bits are copied
        for (uint32_t i = 0; i < n_rows; ++i) {
            targets[i] = in_place ? reinterpret_cast<f32u*>(out + 4 * ((k0 + i) * L + first)) : panel_[i];
        }
        if (lone_residual && size == 2) {
            for (uint32_t i = 0; i < n_rows; ++i) {
                const Row row = residual_.row(k0 + i);
                if (row.encoding->code == own_encoding) {
                    raw[i] = reinterpret_cast<const u16u*>(row.data + 2 * first);
                } else {
                    sums[i] = decode(row, first, n, targets[i]);
                }
            }
        } else {
            sum_up(k0, n_rows, first, n, targets, sums);
        }

        if (dtype == RMM_F32) {
            if (factor_ == 1) {
                kernels_.transpose32(reinterpret_cast<u32u*>(out + 4 * (first * rank + k0)), rank,
                                     reinterpret_cast<const u32u* const*>(sums), n_rows, n, past);
                continue;
            }
            for (uint32_t i = 0; i < n_rows; ++i) {
                uint8_t* to = out + 4 * ((k0 + i) * L + first);
                if (past) {
                    kernels_.copy_past(to, sums[i], n * sizeof(float));
                } else if (sums[i] != targets[i]) {
                    std::memcpy(to, sums[i], n * sizeof(float));
                }
            }
            continue;
        }
        const u16u* halves[PANEL_ROWS];
        for (uint32_t i = 0; i < n_rows; ++i) {
            uint8_t* place = out + 2 * ((k0 + i) * L + first);
            u16u* to = factor_ == 0 && !past ? reinterpret_cast<u16u*>(place) : halves_[i];
            if (raw[i]) {
                halves[i] = raw[i];
            } else {
                kernels_.narrow[narrow](to, sums[i], n);
                halves[i] = to;
            }
            if (factor_ == 1) continue;
            if (past) {
                kernels_.copy_past(place, halves[i], n * sizeof *to);
            } else if (raw[i]) {
                std::memcpy(place, raw[i], n * sizeof *to);
            }
        }
        if (factor_ == 1) {
            kernels_.transpose16(reinterpret_cast<u16u*>(out + 2 * (first * rank + k0)), rank, halves, n_rows, n, past);
        }
    }
}

void Restorer::write(int dtype, uint8_t* out, uint64_t first, uint64_t last, bool past) {
    if (copy(dtype, out, first, last, past)) return;
    // What goes past the caches goes there by whole lines.
    const uint64_t position = plan_.rank * (dtype == RMM_F32 ? 4 : 2);
    if (factor_ == 1 && (reinterpret_cast<uintptr_t>(out) % 64 != 0 || (position % 64 != 0 && 64 % position != 0))) {
        past = false;
    }
    const uint64_t step = plan_.n_positions <= LONGEST_TILE ? LONGEST_TILE : TILE;
    for (; first < last; first += step) tile(dtype, out, first, std::min(step, last - first), past);
}

}  // namespace rmm
