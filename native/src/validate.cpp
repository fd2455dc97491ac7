#include "validate.hpp"

#include <algorithm>

#include "arrays.hpp"
#include "crc32c.hpp"
#include "inflate.hpp"
#include "json.hpp"

namespace rmm {
namespace {

// Passes on what the index breaks, and remembers whether what it points to can be relied on.
class Watching final : public Report {
  public:
    explicit Watching(Report& to) : to_(to) {}
    bool sound() const { return sound_; }

  private:
    void take(Failure&& failure) override {
        switch (failure.rule) {
            // Rules about bytes that nothing else depends on.
            case 4: case 5: case 14: case 20: case 25: case 70: case 72:
                break;
            default:
                sound_ = false;
        }
        to_.broken_as(failure.status, failure.rule, failure.offset, "%s", failure.message.c_str());
    }

    Report& to_;
    bool sound_ = true;
};

class Validator {
  public:
    Validator(const Index& index, Report& report) : index_(index), report_(report) {}

    // RMM-080 … 088, RMM-052 and RMM-061 where they could not be told before.
    void payload() {
        for (uint64_t i = 0; i < index_.count(FRAM); ++i) {
            Frame frame = index_.frame(i);
            std::string name = format("frame %llu", ull(i));
            compare(81, frame.offset, frame.length, frame.crc, name);
            Array arrays[4];
            frame_arrays(frame, index_.target(frame.target), arrays);
            contents(arrays, frame.offset, frame.length, 52, name);
        }
        for (uint64_t i = 0; i < index_.count(TASK); ++i) run(index_.task(i));
        for (uint64_t i = 0; i < index_.count(BLOB); ++i) {
            Range blob = index_.blob(i);
            compare(82, blob.offset, blob.length, blob.crc, format("blob %llu", ull(i)));
        }
        for (uint64_t i = 0; i < index_.count(FREE); ++i) {
            Range range = index_.free_range(i);
            compare(83, range.offset, range.length, range.crc, format("free extent %llu", ull(i)));
        }
    }

    // RMM-072, the bytes.
    void gaps() {
        uint64_t position = HEADER_BYTES;
        for (const Extent& extent : list_extents(index_)) {
            if (extent.offset > position) zeros(72, position, extent.offset - position, "between extents");
            position = std::max(position, extent.offset + extent.length);
        }
    }

    // RMM-092
    void errors() {
        const Table& table = index_.table(ERRO);
        if (!table.present) return;
        if (table.count != index_.count(ENTR) && table.count != 0) {
            report_.broken(92, table.offset, "%llu measured errors for %llu entries", ull(table.count),
                           ull(index_.count(ENTR)));
        }
        std::vector<uint8_t> decoded;
        const uint8_t* data = bytes(ERRO, decoded);
        for (uint64_t i = 0; data && i < table.count; ++i) {
            float error = load<float>(data + i * table.stride);
            if (error < 0) report_.broken(92, table.offset_of(i), "the error of entry %llu is negative", ull(i));
        }
    }

    // RMM-090
    void metadata() {
        const Table& table = index_.table(META);
        if (!table.present) return;
        std::vector<uint8_t> decoded;
        const uint8_t* data = bytes(META, decoded);
        if (!data || table.count == 0) return;  // no records: as if absent
        uint64_t at;
        std::string wrong = check_json(data, table.count, at);
        if (!wrong.empty()) {
            report_.broken(90, table.coding == 0 ? table.offset + at : table.offset, "metadata, byte %llu: %s", ull(at),
                           wrong.c_str());
        }
    }

  private:
    // The records of an optional section; null if they cannot be decoded (RMM-026), which is told.
    const uint8_t* bytes(TableId id, std::vector<uint8_t>& decoded) {
        const Table& table = index_.table(id);
        if (table.coding == 0) return table.data;
        const char* wrong = inflate(index_.data + table.offset, table.length, table.count * table.stride, decoded);
        if (!wrong) return decoded.data();
        report_.broken(26, table.offset, "section %s: %s", TABLE_TYPES[id].type, wrong);
        return nullptr;
    }

    void compare(int rule, uint64_t offset, uint64_t length, uint32_t stored, const std::string& what) {
        uint32_t computed = crc32c(0, index_.data + offset, length);
        if (!crc_fits(stored, computed)) {
            report_.broken(rule, offset, "%s has crc 0x%08x, its bytes give 0x%08x", what.c_str(), stored, computed);
        }
    }

    void zeros(int rule, uint64_t offset, uint64_t n_bytes, const char* where) {
        if (all_zero(index_.data + offset, n_bytes)) return;
        while (index_.data[offset] == 0) ++offset;
        report_.broken(rule, offset, "a byte %s is 0x%02x, expected 0", where, index_.data[offset]);
    }

    void run(const Task& task) {
        uint64_t end = 0;
        for (uint64_t j = 0; j < task.n_entries; ++j) {
            Entry entry = index_.entry(task.first_entry + j);
            uint32_t target_id = index_.listed_target(task.first_target + j);
            Target target = index_.target(target_id);
            if (entry.length >= LARGE) {
                uint64_t start = ceil_to(end, LARGE_ALIGNMENT);
                zeros(85, task.offset + end, start - end, "between entries");
                end = start;
            }
            std::string name = format("task %s, target %s", index_.string(task.name), index_.string(target.name));
            compare(80, task.offset + end, entry.length, entry.crc, name + ": the entry");
            EntryPlan plan;
            if (!plan_entry(index_, index_.form(entry.form), target_id, target, plan)) {
                Array arrays[4];
                entry_arrays(plan, arrays);
                contents(arrays, task.offset + end, entry.length, 61, name);
            }
            end += entry.length;
        }
    }

    // RMM-085 … 088
    void contents(const Array arrays[4], uint64_t offset, uint64_t length, int length_rule, const std::string& name) {
        ArrayWalk walk(index_, offset, length, length_rule, name.c_str());
        try {
            for (int a = 0; a < 4; ++a) {
                const Array& array = arrays[a];
                walk.array(
                    array,
                    [&](const PlacedRun& run) { rows(run, array.row_length, name); },
                    [&](uint64_t at, uint64_t n) { zeros(85, at, n, "of padding between runs"); });
            }
            walk.finish();
        } catch (const Failure& failure) {
            if (failure.rule == 0) throw;
            report_.broken_as(failure.status, failure.rule, failure.offset, "%s", failure.message.c_str());
        }
    }

    void rows(const PlacedRun& run, uint64_t row_length, const std::string& name) {
        const Encoding& encoding = *run.encoding;
        if (!encoding.fixed_size) {
            check_decoding(run, row_length);
            return;
        }
        if (!encoding.check) return;
        for (uint64_t i = 0; i < run.n_rows; ++i) {
            const uint8_t* row = run.data + i * run.row_bytes;
            if (const char* wrong = encoding.check(row, row_length)) {
                report_.broken(86, static_cast<uint64_t>(row - index_.data), "%s: %s", name.c_str(), wrong);
                return;
            }
        }
    }

    void check_decoding(const PlacedRun& run, uint64_t row_length) {
        std::vector<float> row;
        RunDecoding decoding = {run.data, run.n_bytes, run.n_rows, row_length, [&](uint64_t) {
                                    row.resize(row_length);
                                    return row.data();
                                }};
        run.encoding->decode_runs(&decoding, 1);
        const char* wrong = decoding.wrong;
        if (wrong) report_.broken(87, static_cast<uint64_t>(run.data - index_.data), "%s", wrong);
    }

    const Index& index_;
    Report& report_;
};

}  // namespace

void validate(Index& index, Report& report) {
    Watching watching(report);
    bool complete = read_index(index, watching);
    check_slots(index, report);
    if (!complete) return;
    Validator validator(index, report);
    validator.metadata();
    if (!watching.sound()) return;  // what the index points to cannot be told
    validator.errors();
    validator.gaps();
    validator.payload();
}

}  // namespace rmm
