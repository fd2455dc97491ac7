#include "load.hpp"

#include <algorithm>

#include "crc32c.hpp"
#include "restore.hpp"
#include "threads.hpp"

namespace rmm {
namespace {

// Output that a thread takes at once, and how many factors of those that cannot be divided: they are
// decoded together, which is quicker, as long as other threads have work too.
constexpr uint64_t UNIT_BYTES = 256 << 10;
constexpr size_t FEWEST_TOGETHER = 2, MOST_TOGETHER = 8;

// A thread more is started for each so much work. Starting and joining one takes 0.05 to 0.1 ms, and on a
// busy machine it waits for a processor besides; so much is copied or widened in half a millisecond.
constexpr uint64_t WORK_PER_THREAD = 8 << 20;
constexpr uint64_t MOST_WORK = uint64_t{1} << 48;
// How many times as long as copying takes what has to be decoded value by value (trellis): 3 GB/s of
// f32 with sixteen lanes, less with fewer, where a copy makes 15 and more.
constexpr uint64_t DECODED = 6;

struct PlannedEntry {
    EntryPlan plan;
    Entry entry;
    uint64_t offset;
    Placement placement;
};

// Positions first … last − 1 of a factor.
struct Piece {
    uint64_t entry;
    int factor;
    uint64_t first, last;

    bool same_factor(const Piece& other) const { return entry == other.entry && factor == other.factor; }
};

// The work of a task: units of pieces, those of unit u being pieces starts[u] … starts[u + 1] − 1.
struct Units {
    std::vector<Piece> pieces;
    std::vector<size_t> starts = {0};
    uint64_t work = 0;  // in bytes of f32 that are copied in the same time, about

    size_t count() const { return starts.size() - 1; }
    size_t open_pieces() const { return pieces.size() - starts.back(); }
    void close() {
        if (open_pieces() > 0) starts.push_back(pieces.size());
    }
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

// Joins what cannot be entered in the middle, and cuts what can be into pieces. The former come first:
// they take longest, and if a run is malformed this is what is to be told, rather than that what
// follows it has the wrong length.
Units share_out(const Index& index, const std::vector<PlannedEntry>& entries, int dtype) {
    std::vector<Piece> whole, cut;
    Units units;
    for (uint64_t j = 0; j < entries.size(); ++j) {
        for (int f = 0; f < 2; ++f) {
            const uint64_t n = entries[j].plan.factor[f].n_positions;
            const FactorPlan& factor = entries[j].plan.factor[f];
            const bool entered = divisible(index, entries[j].plan, f);
            (entered ? cut : whole).push_back({j, f, 0, n});
            const uint64_t arrays = 1 + factor.n_components;
            // An estimate that need not be right, and must not wrap.
            units.work += std::min<uint64_t>(entries[j].placement.n_bytes[f], MOST_WORK) * (4 / output_bytes(dtype)) *
                          std::min<uint64_t>(arrays, 16) * (entered ? 1 : DECODED);
            units.work = std::min(units.work, MOST_WORK);
        }
    }
    uint64_t n_bytes = 0;
    for (const Piece& piece : whole) {
        units.pieces.push_back(piece);
        n_bytes += entries[piece.entry].placement.n_bytes[piece.factor];
        const size_t together = units.open_pieces();
        if (together >= MOST_TOGETHER || (together >= FEWEST_TOGETHER && n_bytes >= UNIT_BYTES)) {
            units.close();
            n_bytes = 0;
        }
    }
    units.close();
    for (const Piece& piece : cut) {
        const uint64_t rank = entries[piece.entry].plan.factor[piece.factor].rank;
        const uint64_t tiles = UNIT_BYTES / (rank * output_bytes(dtype) * TILE);
        const uint64_t step = std::max<uint64_t>(tiles, 1) * TILE;
        for (uint64_t first = 0; first < piece.last; first += step) {
            units.pieces.push_back({piece.entry, piece.factor, first, std::min(first + step, piece.last)});
            units.close();
        }
    }
    return units;
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
    uint64_t needed = visit_entries(index, task, dtype, [&](uint64_t, const Entry& entry, const Form& form,
                                                            uint32_t target_id, const Target& target,
                                                            const Placement& placement, uint64_t offset) {
        entries.push_back({plan_of(index, form, target_id, target), entry, offset, placement});
    });
    if (arena_bytes < needed) {
        fail(RMM_BUFFER_TOO_SMALL, "the arena has %llu bytes, the task needs %llu", ull(arena_bytes), ull(needed));
    }
    const Units units = share_out(index, entries, dtype);
    n_threads = choose_threads(n_threads, units.work, units.count(), WORK_PER_THREAD);
    const bool past = needed >= PAST_CACHES_BYTES;
    in_parallel(n_threads, units.count(), [&](const NextUnit& next) {
        std::vector<std::unique_ptr<Restorer>> restorers;
        std::vector<Restorer*> used;
        const Piece* open = nullptr;  // what the first restorer has taken up
        auto with_piece = [&](const Piece& piece, auto&& work) {
            Target target = index.target(index.listed_target(task.first_target + piece.entry));
            with_name(index, task, target, piece.factor, work);
        };
        uint64_t unit;
        while (next(unit)) {
            const Piece* pieces = units.pieces.data() + units.starts[unit];
            const size_t n = units.starts[unit + 1] - units.starts[unit];
            while (restorers.size() < n) restorers.push_back(std::make_unique<Restorer>(index));
            if (n > 1 || !open || !open->same_factor(pieces[0])) {
                open = nullptr;
                used.clear();
                for (size_t i = 0; i < n; ++i) {
                    const PlannedEntry& planned = entries[pieces[i].entry];
                    used.push_back(restorers[i].get());
                    with_piece(pieces[i], [&] { used[i]->open(planned.plan, pieces[i].factor, planned.entry, planned.offset); });
                }
                Restorer::decode(used.data(), n);
                for (size_t i = 0; i < n; ++i) with_piece(pieces[i], [&] { used[i]->finish(); });
                open = pieces;
            }
            for (size_t i = 0; i < n; ++i) {
                const Piece& piece = pieces[i];
                used[i]->write(dtype, arena + entries[piece.entry].placement.offset[piece.factor], piece.first, piece.last,
                               past);
            }
        }
        if (past) kernels().settle();
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
            Restorer* only = restorer.get();
            Restorer::decode(&only, 1);
            restorer->finish();
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
