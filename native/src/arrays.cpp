#include "arrays.hpp"

namespace rmm {
namespace {

uint64_t n_groups(const Part& part, uint64_t n_positions) { return ceil_div(n_positions, part.group); }

const char* plan_factor(const Index& index, const Form& form, int f, const Part* part, uint64_t n_positions,
                        FactorPlan& plan) {
    plan = FactorPlan();
    plan.n_positions = n_positions;
    plan.rank = form.rank;
    plan.residual = {form.residual[f], n_positions};
    if (!part || part->absent()) {
        return form.coefficients[f] == NONE ? nullptr : "the form has coefficients where no frame shares anything";
    }
    if (part->group == 0) return "the frame is broken";  // RMM-051, told before
    if (form.rank > part->rank) return "the form's rank exceeds the frame's";
    if ((form.coefficients[f] == NONE) != (part->n_components == 0)) {
        return "the form has coefficients and the frame no components, or the other way round";
    }
    if (part->n_components != 0) {
        const Layout* layout = index.layout(form.coefficients[f]);
        if (!layout || layout->n_rows != part->n_components) {
            return "the form's coefficients have not one row for each component of the frame";
        }
    }
    plan.frame_rank = part->rank;
    plan.n_components = part->n_components;
    plan.group = part->group;
    plan.row_mixing = part->row_mixing();
    plan.mean = {part->mean, n_positions};
    plan.basis = {part->basis, n_positions};
    // At most 2^20 rows of 2^40 groups.
    plan.coefficients = {form.coefficients[f], n_groups(*part, n_positions) * (part->row_mixing() ? form.rank : 1)};
    return nullptr;
}

}  // namespace

void frame_arrays(const Frame& frame, const Target& target, Array arrays[4]) {
    const uint64_t sides[2] = {target.n_in, target.n_out};
    for (int f = 0; f < 2; ++f) {
        arrays[2 * f] = {frame.part[f].mean, sides[f]};
        arrays[2 * f + 1] = {frame.part[f].basis, sides[f]};
    }
}

const char* plan_entry(const Index& index, const Form& form, uint32_t target_id, const Target& target,
                       EntryPlan& plan) {
    plan.frame = NONE;
    const uint64_t sides[2] = {target.n_in, target.n_out};
    if (form.cluster == 0) {
        for (int f = 0; f < 2; ++f) {
            if (const char* wrong = plan_factor(index, form, f, nullptr, sides[f], plan.factor[f])) return wrong;
        }
        return nullptr;
    }
    plan.frame = index.find_frame(target_id, form.cluster);
    if (plan.frame == NONE) return "the form's cluster names a frame that the target does not have";
    Frame frame = index.frame(plan.frame);
    for (int f = 0; f < 2; ++f) {
        if (const char* wrong = plan_factor(index, form, f, &frame.part[f], sides[f], plan.factor[f])) return wrong;
    }
    return nullptr;
}

bool all_fixed_size(const Index& index, const Array arrays[4]) {
    for (int i = 0; i < 4; ++i) {
        if (arrays[i].layout != NONE && !index.layouts[arrays[i].layout].fixed_size) return false;
    }
    return true;
}

uint64_t arrays_length(const Index& index, const Array arrays[4], uint64_t limit) {
    uint64_t end = 0;
    for (int a = 0; a < 4; ++a) {
        if (arrays[a].layout == NONE) continue;
        const Layout& layout = index.layouts[arrays[a].layout];
        const uint64_t n = arrays[a].row_length;
        for (uint32_t i = 0; i < layout.n_runs; ++i) {
            Run run = layout.run(i);
            uint64_t n_bytes;
            if (!multiply(run.count, find_encoding(run.encoding)->row_bytes(n), n_bytes)) return NO_LENGTH;
            // Stopping at the limit keeps `end` from wrapping, and bounds the time: every byte of the
            // file is in one entry or frame, and of two successive runs one takes bytes (RMM-041).
            if (n_bytes > limit) return NO_LENGTH;
            end = run_start(end, n_bytes) + n_bytes;
            if (end > limit) return NO_LENGTH;
        }
    }
    return end;
}

PlacedRun ArrayWalk::place(const Run& run, uint64_t row_length) {
    PlacedRun placed;
    placed.n_rows = run.count;
    placed.encoding = find_encoding(run.encoding);
    if (!placed.encoding) {
        refuse(88, offset_ + end_, "%s has rows of encoding 0x%02x, which is not known", what_, run.encoding);
    }
    uint64_t start = end_;
    if (placed.encoding->fixed_size) {
        placed.row_bytes = placed.encoding->row_bytes(row_length);
        if (!multiply(run.count, placed.row_bytes, placed.n_bytes) || placed.n_bytes > length_) {
            refuse(rule_, offset_, "%s has %llu bytes, its arrays take more", what_, ull(length_));
        }
        start = run_start(end_, placed.n_bytes);
    } else {
        placed.n_bytes = placed.encoding->run_bytes(index_.data + offset_ + end_, length_ - end_);
        if (placed.n_bytes == 0) {
            refuse(87, offset_ + end_, "%s has a run of encoding %s that does not fit into it", what_,
                   placed.encoding->name);
        }
    }
    if (!within(start, placed.n_bytes, length_)) {
        refuse(rule_, offset_, "%s has %llu bytes, its arrays take more", what_, ull(length_));
    }
    gap_ = start - end_;
    placed.data = index_.data + offset_ + start;
    end_ = start + placed.n_bytes;
    return placed;
}

void ArrayWalk::finish() const {
    if (end_ != length_) {
        refuse(rule_, offset_, "%s has %llu bytes, its arrays take %llu", what_, ull(length_), ull(end_));
    }
}

}  // namespace rmm
