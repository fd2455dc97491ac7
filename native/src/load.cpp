#include "load.hpp"

#include <algorithm>

#include "crc32c.hpp"
#include "restore.hpp"
#include "threads.hpp"

namespace rmm {
namespace {

// Output that a thread takes at once.
constexpr uint64_t UNIT_BYTES = 256 << 10;

struct PlannedEntry {
    EntryPlan plan;
    Entry entry;
    uint64_t offset;
    Placement placement;
    uint64_t first_unit[3];  // of A, of B, and behind B
    uint64_t step[2];        // positions of a unit
};

EntryPlan plan_of(const Index& index, const Form& form, uint32_t target_id, const Target& target) {
    EntryPlan plan;
    if (const char* wrong = plan_entry(index, form, target_id, target, plan)) {
        fail(RMM_INTERNAL, "an entry that was checked no longer fits: %s", wrong);
    }
    return plan;
}

bool divisible(const Index& index, const EntryPlan& plan, int f) {
    const FactorPlan& factor = plan.factor[f];
    const Array arrays[4] = {factor.mean, factor.basis, factor.coefficients, factor.residual};
    return all_fixed_size(index, arrays);
}

// Appends to a message which entry it is about.
template <class Work>
void with_name(const Index& index, const Task& task, const Target& target, int f, Work&& work) {
    try {
        work();
    } catch (Failure& failure) {
        failure.message = format("task %s, target %s, factor %c: ", index.string(task.name),
                                 index.string(target.name), 'A' + f) + failure.message;
        throw;
    }
}

}  // namespace

uint64_t visit_entries(const Index& index, const Task& task, int dtype, const VisitEntry& visit) {
    uint64_t arena = 0, run = 0;
    for (uint64_t j = 0; j < task.n_entries; ++j) {
        Entry entry = index.entry(task.first_entry + j);
        Form form = index.form(entry.form);
        uint32_t target_id = index.listed_target(task.first_target + j);
        Target target = index.target(target_id);
        Placement placement;
        const uint64_t sides[2] = {target.n_in, target.n_out};
        for (int f = 0; f < 2; ++f) {
            placement.offset[f] = arena;
            // rank ≤ 2^20 and sides ≤ 2^40; the sum is bounded by RMM-062 unless the file is huge.
            placement.n_bytes[f] = sides[f] * form.rank * output_bytes(dtype);
            if (!add(arena, ceil_to(placement.n_bytes[f], LARGE_ALIGNMENT), arena)) {
                fail(RMM_NO_MEMORY, "the task's factors exceed 2^64 bytes");
            }
        }
        if (entry.length >= LARGE) run = ceil_to(run, LARGE_ALIGNMENT);
        if (visit) visit(j, entry, form, target_id, target, placement, task.offset + run);
        run += entry.length;
    }
    return arena;
}

void load_task(const Index& index, const Task& task, int dtype, uint8_t* arena, uint64_t arena_bytes,
               uint32_t n_threads) {
    std::vector<PlannedEntry> entries;
    entries.reserve(task.n_entries);
    uint64_t n_units = 0;
    uint64_t needed = visit_entries(index, task, dtype, [&](uint64_t, const Entry& entry, const Form& form,
                                                            uint32_t target_id, const Target& target,
                                                            const Placement& placement, uint64_t offset) {
        PlannedEntry planned{plan_of(index, form, target_id, target), entry, offset, placement, {}, {}};
        for (int f = 0; f < 2; ++f) {
            const FactorPlan& factor = planned.plan.factor[f];
            uint64_t tiles = UNIT_BYTES / (factor.rank * output_bytes(dtype) * TILE);
            planned.step[f] = std::max<uint64_t>(tiles, 1) * TILE;
            if (!divisible(index, planned.plan, f)) planned.step[f] = factor.n_positions;
            planned.first_unit[f] = n_units;
            n_units += ceil_div(factor.n_positions, planned.step[f]);
        }
        planned.first_unit[2] = n_units;
        entries.push_back(planned);
    });
    if (arena_bytes < needed) {
        fail(RMM_BUFFER_TOO_SMALL, "the arena has %llu bytes, the task needs %llu", ull(arena_bytes), ull(needed));
    }
    n_threads = choose_threads(n_threads, needed, n_units);
    in_parallel(n_threads, n_units, [&](const NextUnit& next) {
        auto restorer = std::make_unique<Restorer>(index);
        const PlannedEntry* open_entry = nullptr;
        int open_factor = 0;
        uint64_t unit;
        while (next(unit)) {
            const PlannedEntry& planned =
                *(std::upper_bound(entries.begin(), entries.end(), unit,
                                   [](uint64_t u, const PlannedEntry& e) { return u < e.first_unit[2]; }));
            int f = unit >= planned.first_unit[1] ? 1 : 0;
            uint64_t j = static_cast<uint64_t>(&planned - entries.data());
            Target target = index.target(index.listed_target(task.first_target + j));
            with_name(index, task, target, f, [&] {
                if (open_entry != &planned || open_factor != f) {
                    open_entry = nullptr;
                    restorer->open(planned.plan, f, planned.entry, planned.offset);
                    open_entry = &planned;
                    open_factor = f;
                }
                uint64_t first = (unit - planned.first_unit[f]) * planned.step[f];
                uint64_t last = std::min(first + planned.step[f], planned.plan.factor[f].n_positions);
                restorer->write(dtype, arena + planned.placement.offset[f], first, last);
            });
        }
    });
}

void load_factor(const Index& index, const Task& task, uint64_t entry_number, int factor, int dtype, uint8_t* out,
                 uint64_t out_bytes) {
    visit_entries(index, task, dtype, [&](uint64_t j, const Entry& entry, const Form& form, uint32_t target_id,
                                          const Target& target, const Placement& placement, uint64_t offset) {
        if (j != entry_number) return;
        if (out_bytes < placement.n_bytes[factor]) {
            fail(RMM_BUFFER_TOO_SMALL, "the memory has %llu bytes, the factor needs %llu", ull(out_bytes),
                 ull(placement.n_bytes[factor]));
        }
        EntryPlan plan = plan_of(index, form, target_id, target);
        ExactArithmetic exact;
        with_name(index, task, target, factor, [&] {
            auto restorer = std::make_unique<Restorer>(index);
            restorer->open(plan, factor, entry, offset);
            restorer->write(dtype, out, 0, plan.factor[factor].n_positions);
        });
    });
}

void check_task(const Index& index, const Task& task) {
    auto compare = [&](int rule, uint64_t offset, uint64_t length, uint32_t stored, const std::string& what) {
        uint32_t computed = crc32c(0, index.data + offset, length);
        if (!crc_fits(stored, computed)) {
            refuse(rule, offset, "%s has crc 0x%08x, its bytes give 0x%08x", what.c_str(), stored, computed);
        }
    };
    uint32_t before = NONE;
    visit_entries(index, task, RMM_F32, [&](uint64_t, const Entry& entry, const Form& form, uint32_t target_id,
                                            const Target& target, const Placement&, uint64_t offset) {
        std::string name = format("task %s, target %s", index.string(task.name), index.string(target.name));
        compare(80, offset, entry.length, entry.crc, name + ": the entry");
        uint32_t frame_id = form.cluster == 0 ? NONE : index.find_frame(target_id, form.cluster);
        if (frame_id == NONE || frame_id == before) return;
        before = frame_id;
        Frame frame = index.frame(frame_id);
        compare(81, frame.offset, frame.length, frame.crc, name + ": its frame");
    });
    for (uint64_t j = 0; j < task.n_privates; ++j) {
        Private tensor = index.private_tensor(task.first_private + j);
        Range blob = index.blob(tensor.blob);
        compare(82, blob.offset, blob.length, blob.crc,
                format("task %s: private tensor %s", index.string(task.name), index.string(tensor.name)));
    }
}

}  // namespace rmm
