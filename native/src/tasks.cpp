// TLST, TASK, ENTR, PRIV, BLOB and DIMS (section 6.1).

#include "arrays.hpp"

namespace rmm {
namespace {

// What entries of one form at one target have in common, kept because tasks repeat each other:
// a thousand tasks of two hundred targets have few forms.
class EntryCache {
  public:
    struct Line {
        uint32_t form = NONE, target = NONE;
        uint64_t length = 0;  // NO_LENGTH: not told by the index
        uint64_t n_values = 0;
        uint64_t n_terms = 0;  // products and sums
    };

    explicit EntryCache(uint64_t n_entries) {
        uint64_t n = 64;
        while (n < n_entries && n < 4096) n *= 2;
        lines_.resize(n);
    }

    Line& line(uint32_t form, uint32_t target) {
        return lines_[(form * 0x9E3779B1u + target) & (lines_.size() - 1)];
    }

  private:
    std::vector<Line> lines_;
};

// A limit in proportion to the file, which no small file can exceed.
uint64_t times_file_length(const Index& index, uint64_t by) {
    uint64_t limit;
    return multiply(index.header.file_length, by, limit) ? limit : UINT64_MAX;
}

class TaskReader {
  public:
    TaskReader(Index& index, Report& report)
        : index_(index), report_(report), cache_(index.count(ENTR)) {}

    void run() {
        const Table& table = index_.table(TASK);
        uint64_t next_entry = 0, next_private = 0, total = 0;
        for (uint64_t i = 0; i < table.count; ++i) {
            Task task(table.record(i));
            uint64_t at = table.offset_of(i);
            if (u32(table.record(i) + 60) != 0) {
                report_.broken(37, at + 60, "task %llu has a reserved field that is not zero", ull(i));
            }
            if (task.name >= index_.strings.size()) {
                report_.broken(55, at + 56, "task %llu names string %u of %zu", ull(i), task.name,
                               index_.strings.size());
            } else if (i > 0 && task.name <= index_.task(i - 1).name) {
                report_.broken(55, at + 56, "task %llu has a name that is not above the one before it", ull(i));
            }
            if (task.first_entry != next_entry || !within(task.first_entry, task.n_entries, index_.count(ENTR))) {
                report_.broken(56, at + 16, "task %llu has %llu entries from %llu, expected from %llu of %llu", ull(i),
                               ull(task.n_entries), ull(task.first_entry), ull(next_entry), ull(index_.count(ENTR)));
                return;
            }
            if (task.first_private != next_private ||
                !within(task.first_private, task.n_privates, index_.count(PRIV))) {
                report_.broken(56, at + 40, "task %llu has %llu private tensors from %llu, expected from %llu of %llu",
                               ull(i), ull(task.n_privates), ull(task.first_private), ull(next_private),
                               ull(index_.count(PRIV)));
                return;
            }
            next_entry += task.n_entries;
            next_private += task.n_privates;
            bool listed = check_list(task, i, at);
            bool placed = check_run(task, i, at);
            if (!add(total, task.length, total) || total > index_.header.file_length) {
                report_.broken(71, at + 8, "runs of tasks up to %llu take more bytes than the file's %llu", ull(i),
                               ull(index_.header.file_length));
                return;
            }
            if (listed && placed) check_entries(task, i, at);
        }
        if (next_entry != index_.count(ENTR) || next_private != index_.count(PRIV)) {
            report_.broken(56, table.offset, "tasks use %llu of %llu entries and %llu of %llu private tensors",
                           ull(next_entry), ull(index_.count(ENTR)), ull(next_private), ull(index_.count(PRIV)));
        }
    }

  private:
    // RMM-057
    bool check_list(const Task& task, uint64_t i, uint64_t at) {
        const Table& list = index_.table(TLST);
        if (!within(task.first_target, task.n_entries, list.count)) {
            report_.broken(57, at + 32, "task %llu lists %llu targets from %llu of %llu", ull(i), ull(task.n_entries),
                           ull(task.first_target), ull(list.count));
            return false;
        }
        // Many tasks share a list.
        if (task.first_target == good_first_ && task.n_entries == good_n_) return true;
        uint64_t n_targets = index_.count(TARG);
        uint32_t before = 0, name_before = 0;
        for (uint64_t j = 0; j < task.n_entries; ++j) {
            uint64_t where = task.first_target + j;
            uint32_t id = index_.listed_target(where);
            if (id >= n_targets) {
                report_.broken(57, list.offset_of(where), "task %llu lists target %u of %llu", ull(i), id,
                               ull(n_targets));
                return false;
            }
            uint32_t name = index_.target(id).name;
            if (j > 0 && (id <= before || name == name_before)) {
                report_.broken(57, list.offset_of(where), "task %llu lists target %u behind %u, %s", ull(i), id, before,
                               id <= before ? "not in ascending order" : "which has the same name");
                return false;
            }
            before = id;
            name_before = name;
        }
        good_first_ = task.first_target;
        good_n_ = task.n_entries;
        return true;
    }

    // RMM-058
    bool check_run(const Task& task, uint64_t i, uint64_t at) {
        uint64_t end = 0;
        for (uint64_t j = 0; j < task.n_entries; ++j) {
            uint64_t length = u64(index_.record(ENTR, task.first_entry + j));
            if (length >= LARGE) end = ceil_to(end, LARGE_ALIGNMENT);
            if (length > index_.header.file_length || !add(end, length, end) || end > index_.header.file_length) {
                report_.broken(58, at + 8, "task %llu has a run of %llu bytes, its entries take more than the file", ull(i),
                               ull(task.length));
                return false;
            }
        }
        if (end != task.length) {
            report_.broken(58, at + 8, "task %llu has a run of %llu bytes, its entries take %llu", ull(i),
                           ull(task.length), ull(end));
            return false;
        }
        if (task.length == 0 && task.offset != 0) {
            report_.broken(58, at, "task %llu has an empty run at %llu, expected 0", ull(i), ull(task.offset));
        }
        return true;
    }

    // RMM-060, RMM-061, RMM-062, RMM-063
    void check_entries(const Task& task, uint64_t i, uint64_t at) {
        const Table& table = index_.table(ENTR);
        const uint64_t limit = times_file_length(index_, 1024), term_limit = times_file_length(index_, 16384);
        uint64_t n_values = 0, n_terms = 0;
        for (uint64_t j = 0; j < task.n_entries; ++j) {
            Entry entry(table.record(task.first_entry + j));
            uint32_t target_id = index_.listed_target(task.first_target + j);
            EntryCache::Line& line = cache_.line(entry.form, target_id);
            if (line.form != entry.form || line.target != target_id || target_id == NONE) {
                if (!fill(line, entry, target_id, i, table.offset_of(task.first_entry + j))) continue;
            }
            if (line.length != entry.length && line.length != NO_LENGTH) {
                report_.broken(61, table.offset_of(task.first_entry + j),
                               "task %llu, target %u: the entry has %llu bytes, its arrays take %s", ull(i), target_id,
                               ull(entry.length), format("%llu", ull(line.length)).c_str());
            }
            if (!add(n_values, line.n_values, n_values)) n_values = UINT64_MAX;
            if (!add(n_terms, line.n_terms, n_terms)) n_terms = UINT64_MAX;
        }
        if (n_values > limit) {
            report_.broken(62, at, "task %llu has more than 1024 values for each of the file's %llu bytes", ull(i),
                           ull(index_.header.file_length));
        }
        if (n_terms > term_limit) {
            report_.broken(63, at, "task %llu takes more than 16384 products and sums for each of the file's %llu bytes",
                           ull(i), ull(index_.header.file_length));
        }
    }

    // False if the entry does not fit, which has been reported.
    bool fill(EntryCache::Line& line, const Entry& entry, uint32_t target_id, uint64_t task, uint64_t at) {
        line.form = NONE;
        if (entry.form >= index_.count(FORM)) {
            report_.broken(60, at + 8, "task %llu, target %u: the entry has form %u of %llu", ull(task), target_id,
                           entry.form, ull(index_.count(FORM)));
            return false;
        }
        Form form = index_.form(entry.form);
        Target target = index_.target(target_id);
        EntryPlan plan;
        if (const char* wrong = plan_entry(index_, form, target_id, target, plan)) {
            report_.broken(60, at + 8, "task %llu, target %u: %s", ull(task), target_id, wrong);
            return false;
        }
        Array arrays[4];
        entry_arrays(plan, arrays);
        for (const Array& array : arrays) {
            if (array.layout != NONE && !index_.layout(array.layout)) return false;  // told by RMM-041, RMM-042
        }
        uint64_t length = NO_LENGTH;
        if (all_fixed_size(index_, arrays)) {
            length = arrays_length(index_, arrays, entry.length);
            if (length == NO_LENGTH) {
                report_.broken(61, at, "task %llu, target %u: the entry has %llu bytes, its arrays take more",
                               ull(task), target_id, ull(entry.length));
                return false;
            }
        }
        // rank at most 2^32, sides at most 2^64 where RMM-036 has been reported
        uint64_t n_values;
        if (!add(target.n_in, target.n_out, n_values) || !multiply(n_values, form.rank, n_values)) {
            n_values = UINT64_MAX;
        }
        uint64_t n_terms = 0;
        for (const FactorPlan& factor : plan.factor) {
            uint64_t terms;
            if (!multiply(factor.n_positions, factor.rank, terms) ||
                !multiply(terms, uint64_t{1} + factor.n_components, terms) || !add(n_terms, terms, n_terms)) {
                n_terms = UINT64_MAX;
                break;
            }
        }
        line = {entry.form, target_id, length, n_values, n_terms};
        return true;
    }

    Index& index_;
    Report& report_;
    EntryCache cache_;
    uint64_t good_first_ = 0, good_n_ = 0;
};

}  // namespace

void read_tasks(Index& index, Report& report) { TaskReader(index, report).run(); }

void read_privates(Index& index, Report& report) {
    const Table& blobs = index.table(BLOB);
    for (uint64_t i = 0; i < index.count(TASK); ++i) {
        Task task = index.task(i);
        if (!within(task.first_private, task.n_privates, index.count(PRIV))) return;  // RMM-056
        uint32_t before = 0;
        uint64_t total = 0;
        for (uint64_t j = 0; j < task.n_privates; ++j) {
            const Table& table = index.table(PRIV);
            const uint8_t* record = table.record(task.first_private + j);
            uint64_t at = table.offset_of(task.first_private + j);
            Private tensor(record);
            if (record[11] != 0 || u32(record + 12) != 0) {
                report.broken(37, at + 11, "private tensor %llu has reserved fields that are not zero",
                              ull(task.first_private + j));
            }
            if (tensor.name >= index.strings.size() || (j > 0 && tensor.name <= before)) {
                report.broken(65, at, "task %llu: private tensor %llu names string %u, not one above %u of %zu", ull(i),
                              ull(j), tensor.name, before, index.strings.size());
            }
            before = tensor.name;
            uint64_t size = dtype_bytes(tensor.dtype);
            if (tensor.blob >= blobs.count || size == 0 || tensor.n_dims > 8 ||
                !within(tensor.first_dim, tensor.n_dims, index.count(DIMS))) {
                report.broken(65, at, "task %llu: private tensor %llu has blob %u of %llu, dtype %u, and %u dimensions "
                              "from %llu of %llu", ull(i), ull(j), tensor.blob, ull(blobs.count), tensor.dtype,
                              tensor.n_dims, ull(tensor.first_dim), ull(index.count(DIMS)));
                continue;
            }
            uint64_t product = size;
            bool fits = true, sides = true, empty = false;
            for (unsigned d = 0; d < tensor.n_dims; ++d) {
                uint64_t side = index.dimension(tensor.first_dim + d);
                sides = sides && side <= MAX_SIDE;
                fits = fits && multiply(product, side, product);
                empty = empty || side == 0;
            }
            if (empty) product = 0;
            fits = sides && (fits || empty);
            uint64_t length = index.blob(tensor.blob).length;
            if (!add(total, length, total)) total = UINT64_MAX;
            if (!fits || product != length) {
                report.broken(66, at + 9, "task %llu: private tensor %llu has a shape of %s bytes, its blob %llu", ull(i),
                              ull(j), fits ? format("%llu", ull(product)).c_str() : "too many", ull(length));
            }
        }        if (total > times_file_length(index, 1024)) {
            report.broken(64, index.table(TASK).offset_of(i),
                          "task %llu has private tensors of more than 1024 bytes for each of the file's %llu bytes", ull(i),
                          ull(index.header.file_length));
        }
    }
    for (uint64_t i = 0; i < blobs.count; ++i) {
        Range blob = index.blob(i);
        if (u32(blobs.record(i) + 20) != 0) {
            report.broken(37, blobs.offset_of(i) + 20, "blob %llu has a reserved field that is not zero", ull(i));
        }
        if (blob.length == 0 && blob.offset != 0) {
            report.broken(67, blobs.offset_of(i), "blob %llu is empty and at %llu, expected 0", ull(i),
                          ull(blob.offset));
        }
    }
}

}  // namespace rmm
