// RUNS, LAYO, FORM and FRAM (section 6.1).

#include <algorithm>
#include <cmath>

#include "arrays.hpp"

namespace rmm {
namespace {

void read_runs(Index& index, Report& report) {
    const Table& table = index.table(RUNS);
    for (uint64_t i = 0; i < table.count; ++i) {
        const uint8_t* record = table.record(i);
        if (u32(record) == 0) report.broken(40, table.offset_of(i), "run %llu has no rows", ull(i));
        if (record[5] | record[6] | record[7]) {
            report.broken(37, table.offset_of(i) + 5, "run %llu has reserved bytes that are not zero", ull(i));
        }
    }
}

void read_layouts(Index& index, Report& report) {
    const Table& table = index.table(LAYO);
    const Table& runs = index.table(RUNS);
    index.layouts.resize(table.count);
    uint64_t next = 0;
    for (uint64_t i = 0; i < table.count; ++i) {
        const uint8_t* record = table.record(i);
        uint64_t at = table.offset_of(i), first = u64(record);
        Layout& layout = index.layouts[i];
        layout.n_runs = u32(record + 8);
        layout.n_rows = u32(record + 12);
        layout.stride = runs.stride;
        if (layout.n_runs == 0 || first != next || !within(first, layout.n_runs, runs.count)) {
            report.broken(41, at, "layout %llu has %u runs from %llu, expected at least one from %llu of %llu",
                          ull(i), layout.n_runs, ull(first), ull(next), ull(runs.count));
            return;  // those behind it cannot be told either
        }
        next = first + layout.n_runs;
        layout.runs = runs.record(first);
        layout.fixed_size = true;
        uint64_t n_rows = 0;
        bool repeats = false;
        for (uint32_t j = 0; j < layout.n_runs; ++j) {
            Run run = layout.run(j);
            n_rows += run.count;  // below 2^64
            const Encoding* encoding = find_encoding(run.encoding);
            const bool fixed_size = encoding && encoding->fixed_size;
            layout.fixed_size = layout.fixed_size && fixed_size;
            repeats = repeats || (fixed_size && j > 0 && layout.run(j - 1).encoding == run.encoding);
        }
        if (repeats) report.broken(41, at, "layout %llu has successive runs of one encoding", ull(i));
        if (n_rows != layout.n_rows) {
            report.broken(41, at + 12, "layout %llu says %u rows, its runs have %llu", ull(i), layout.n_rows,
                          ull(n_rows));
            continue;
        }
        layout.usable = true;
    }
    if (next != runs.count) {
        report.broken(41, runs.offset, "layouts use %llu of %llu runs", ull(next), ull(runs.count));
    }
}

bool known_layout(const Index& index, uint32_t id) { return id == NONE || id < index.layouts.size(); }

}  // namespace

void read_layouts_and_forms(Index& index, Report& report) {
    read_runs(index, report);
    read_layouts(index, report);

    const Table& table = index.table(FORM);
    for (uint64_t i = 0; i < table.count; ++i) {
        const uint8_t* record = table.record(i);
        uint64_t at = table.offset_of(i);
        Form form(record);
        if (!std::isfinite(form.scale)) report.broken(42, at, "form %llu has a scale that is not finite", ull(i));
        if (form.rank < 1 || form.rank > MAX_RANK) {
            report.broken(42, at + 8, "form %llu has rank %u, expected 1 to 2^20", ull(i), form.rank);
        }
        for (int f = 0; f < 2; ++f) {
            char name = static_cast<char>('A' + f);
            if (!known_layout(index, form.coefficients[f]) || !known_layout(index, form.residual[f])) {
                report.broken(42, at + 16 + 8 * f, "form %llu has layouts %u and %u for %c, there are %zu", ull(i),
                              form.coefficients[f], form.residual[f], name, index.layouts.size());
            }
            if (form.dtype[f] < 1 || form.dtype[f] > 3) {
                report.broken(42, at + 32 + f, "form %llu has dtype %u for %c, expected 1, 2 or 3", ull(i),
                              form.dtype[f], name);
            }
            const Layout* residual = index.layout(form.residual[f]);
            if (residual && residual->n_rows != form.rank) {
                report.broken(43, at + 20 + 8 * f, "form %llu of rank %u has a residual of %c with %u rows", ull(i),
                              form.rank, name, residual->n_rows);
            }
        }
        if (!all_zero(record + 34, 6)) {
            report.broken(37, at + 34, "form %llu has reserved bytes that are not zero", ull(i));
        }
    }
}

namespace {

// RMM-051: null, or what is wrong.
const char* check_part(const Index& index, const Part& part, uint64_t n_positions) {
    if (part.rank < 1 || part.rank > MAX_RANK) return "R is not 1 to 2^20";
    if (part.flags > 1) return "unknown flags";
    if (part.group < 1 || part.group > n_positions) return "group is not 1 to the number of positions";
    if (part.row_mixing() && part.group != n_positions) return "row mixing goes with one group";
    if (part.n_components > MAX_RANK) return "more than 2^20 components";
    if ((part.basis == NONE) != (part.n_components == 0)) return "components without a basis, or a basis without";
    if (part.mean == NONE && part.basis == NONE) return "neither mean nor basis";
    if (part.mean != NONE) {
        const Layout* mean = index.layout(part.mean);
        if (!mean) return "the mean's layout is not known";
        if (mean->n_rows != part.rank) return "the mean has not R rows";
    }
    if (part.basis != NONE) {
        const Layout* basis = index.layout(part.basis);
        uint64_t n_rows = static_cast<uint64_t>(part.n_components) * (part.row_mixing() ? 1 : part.rank);
        if (!basis) return "the basis' layout is not known";
        if (basis->n_rows != n_rows) return "the basis has not p times R rows, or p with row mixing";
    }
    return nullptr;
}

}  // namespace

void read_frames(Index& index, Report& report) {
    const Table& table = index.table(FRAM);
    const uint64_t n_targets = index.count(TARG);
    if (table.count == 0) return;
    if (table.count >= NONE) {
        report.broken(50, table.offset, "%llu frames, more than ids can tell", ull(table.count));
        return;
    }
    bool ordered = true;
    uint32_t before = 0;
    uint64_t total = 0;
    for (uint64_t i = 0; i < table.count; ++i) {
        uint64_t at = table.offset_of(i);
        Frame frame(table.record(i));
        if (frame.target >= n_targets || frame.target < before) {
            report.broken(50, at + 16, "frame %llu has target %u, expected %u to %llu", ull(i), frame.target, before,
                          ull(n_targets) - 1);
            ordered = false;
            continue;
        }
        before = frame.target;
        Target target = index.target(frame.target);
        bool fits = true;
        for (int f = 0; f < 2; ++f) {
            const Part& part = frame.part[f];
            if (part.reserved != 0) {
                report.broken(37, at + 52 + 32 * f, "frame %llu has a reserved field of 0x%x, expected 0", ull(i),
                              part.reserved);
                fits = false;
                continue;
            }
            if (part.absent()) continue;
            if (const char* wrong = check_part(index, part, f == 0 ? target.n_in : target.n_out)) {
                report.broken(51, at + 24 + 32 * f, "frame %llu, factor %c: %s", ull(i), 'A' + f, wrong);
                fits = false;
            }
        }
        if (frame.part[0].absent() && frame.part[1].absent()) {
            report.broken(51, at + 24, "frame %llu has no part", ull(i));
            fits = false;
        }
        if (frame.length == 0 && frame.offset != 0) {
            report.broken(52, at, "frame %llu is empty and at %llu, expected 0", ull(i), ull(frame.offset));
        }
        Array arrays[4];
        frame_arrays(frame, target, arrays);
        if (fits && all_fixed_size(index, arrays)) {
            uint64_t length = arrays_length(index, arrays, std::min(frame.length, index.header.file_length));
            if (length != frame.length) {
                report.broken(52, at + 8, "frame %llu has %llu bytes, its arrays take %s", ull(i), ull(frame.length),
                              length == NO_LENGTH ? "more" : format("%llu", ull(length)).c_str());
            }
        }
        // What frames take is disjoint; this is the bound that arrays_length needs.
        if (!add(total, frame.length, total) || total > index.header.file_length) {
            report.broken(71, at + 8, "frames up to %llu take more bytes than the file's %llu", ull(i),
                          ull(index.header.file_length));
            ordered = false;
            break;
        }
    }
    if (!ordered) return;
    index.first_frame.resize(n_targets + 1);
    uint64_t frame = 0;
    for (uint64_t target = 0; target <= n_targets; ++target) {
        while (frame < table.count && index.frame(frame).target < target) ++frame;
        index.first_frame[target] = static_cast<uint32_t>(frame);
    }
}

}  // namespace rmm
