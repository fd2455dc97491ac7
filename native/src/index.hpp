// The index of an open file: where its tables are, and typed records out of them.
//
// Records are read from the opened bytes at each use; what is kept beside them is in proportion to
// the number of strings, layouts and targets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.hpp"
#include "encoding.hpp"
#include "report.hpp"

namespace rmm {

constexpr uint32_t NONE = 0xFFFFFFFF;
constexpr uint64_t HEADER_BYTES = 640;
constexpr uint64_t LARGE = 4096;  // what is this long is aligned, what is shorter is packed (7)
constexpr uint64_t LARGE_ALIGNMENT = 64;

enum TableId : int {
    STRS, TARG, RUNS, LAYO, FORM, FRAM, TLST, TASK, ENTR, DIMS, PRIV, BLOB, ERRO, FREE, META,
    N_TABLES
};

struct TableType {
    char type[5];
    uint32_t record_bytes;
};

extern const TableType TABLE_TYPES[N_TABLES];

struct Table {
    const uint8_t* data = nullptr;  // null: deflated, or absent
    uint64_t offset = 0;            // in the file
    uint64_t length = 0;            // in the file
    uint64_t count = 0;
    uint32_t stride = 0;
    uint32_t coding = 0;
    bool present = false;

    const uint8_t* record(uint64_t i) const { return data + i * stride; }
    uint64_t offset_of(uint64_t i) const { return coding == 0 ? offset + i * stride : offset; }
};

struct Target {
    uint64_t n_in, n_out;
    uint16_t kernel[3];
    uint8_t kind, flags;
    uint32_t name;
    explicit Target(const uint8_t* at)
        : n_in(u64(at)), n_out(u64(at + 8)), kernel{u16(at + 16), u16(at + 18), u16(at + 20)},
          kind(at[22]), flags(at[23]), name(u32(at + 24)) {}
};

struct Form {
    double scale;
    uint32_t rank, cluster;
    uint32_t coefficients[2], residual[2];  // layout ids, of A and B
    uint8_t dtype[2];
    explicit Form(const uint8_t* at)
        : scale(load<double>(at)), rank(u32(at + 8)), cluster(u32(at + 12)),
          coefficients{u32(at + 16), u32(at + 24)}, residual{u32(at + 20), u32(at + 28)},
          dtype{at[32], at[33]} {}
};

struct Part {
    uint64_t group;
    uint32_t n_components, rank, mean, basis, flags, reserved;
    explicit Part(const uint8_t* at)
        : group(u64(at)), n_components(u32(at + 8)), rank(u32(at + 12)), mean(u32(at + 16)),
          basis(u32(at + 20)), flags(u32(at + 24)), reserved(u32(at + 28)) {}
    bool absent() const {
        return group == 0 && n_components == 0 && rank == 0 && mean == NONE && basis == NONE &&
               flags == 0 && reserved == 0;
    }
    bool row_mixing() const { return flags & 1; }
};

struct Frame {
    uint64_t offset, length;
    uint32_t target, crc;
    Part part[2];  // of A and B
    explicit Frame(const uint8_t* at)
        : offset(u64(at)), length(u64(at + 8)), target(u32(at + 16)), crc(u32(at + 20)),
          part{Part(at + 24), Part(at + 56)} {}
};

struct Task {
    uint64_t offset, length, first_entry, n_entries, first_target, first_private, n_privates;
    uint32_t name;
    explicit Task(const uint8_t* at)
        : offset(u64(at)), length(u64(at + 8)), first_entry(u64(at + 16)), n_entries(u64(at + 24)),
          first_target(u64(at + 32)), first_private(u64(at + 40)), n_privates(u64(at + 48)),
          name(u32(at + 56)) {}
};

struct Entry {
    uint64_t length;
    uint32_t form, crc;
    explicit Entry(const uint8_t* at) : length(u64(at)), form(u32(at + 8)), crc(u32(at + 12)) {}
};

struct Private {
    uint32_t name, blob;
    uint8_t dtype, n_dims, role;
    uint64_t first_dim;
    explicit Private(const uint8_t* at)
        : name(u32(at)), blob(u32(at + 4)), dtype(at[8]), n_dims(at[9]), role(at[10]),
          first_dim(u64(at + 16)) {}
};

// A range of payload with its checksum: the records of BLOB and free.
struct Range {
    uint64_t offset, length;
    uint32_t crc;
    explicit Range(const uint8_t* at) : offset(u64(at)), length(u64(at + 8)), crc(u32(at + 16)) {}
};

struct Run {
    uint32_t count;
    uint8_t encoding;
    explicit Run(const uint8_t* at) : count(u32(at)), encoding(at[4]) {}
};

// A layout, ready to be walked.
struct Layout {
    const uint8_t* runs = nullptr;  // records of RUNS
    uint32_t stride = 8;
    uint32_t n_runs = 0;
    uint32_t n_rows = 0;
    bool fixed_size = false;  // all of its encodings are known and fixed-size
    bool usable = false;

    Run run(uint32_t i) const { return Run(runs + static_cast<uint64_t>(i) * stride); }
};

// Bytes of one value of a dtype of the registry; 0 if unknown.
inline uint64_t dtype_bytes(uint8_t dtype) {
    constexpr uint8_t BYTES[17] = {0, 4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1, 8};
    return dtype < sizeof BYTES ? BYTES[dtype] : 0;
}

// The active slot's view of a file.
struct Header {
    uint16_t minor = 0;
    int active = -1;
    bool damaged = false;  // the other slot is neither empty nor valid
    uint64_t sequence = 0, file_length = 0, growth_limit = 0;
    uint64_t index_offset = 0, index_length = 0, n_sections = 0;
    uint32_t section_record_size = 0, section_table_crc = 0;
    uint64_t at = 0;  // offset of the active slot
};

struct Index {
    const uint8_t* data = nullptr;
    uint64_t size = 0;
    // A copy of preamble and slots: a writer may be changing those that are mapped, between the check
    // of a checksum and the use of what it covers.
    uint8_t head[HEADER_BYTES] = {};
    Header header;
    Table tables[N_TABLES];

    std::vector<uint64_t> strings;       // start of each string in STRS
    std::vector<Layout> layouts;         // by layout id
    std::vector<uint32_t> first_frame;   // by target, and one more; empty if there are no frames

    Index() = default;
    Index(const uint8_t* bytes, uint64_t n_bytes) : data(bytes), size(n_bytes) {
        if (size > 0) std::memcpy(head, data, std::min(size, HEADER_BYTES));
    }

    const Table& table(TableId id) const { return tables[id]; }
    uint64_t count(TableId id) const { return tables[id].count; }
    const uint8_t* record(TableId id, uint64_t i) const { return tables[id].record(i); }

    Target target(uint64_t i) const { return Target(record(TARG, i)); }
    Form form(uint64_t i) const { return Form(record(FORM, i)); }
    Frame frame(uint64_t i) const { return Frame(record(FRAM, i)); }
    Task task(uint64_t i) const { return Task(record(TASK, i)); }
    Entry entry(uint64_t i) const { return Entry(record(ENTR, i)); }
    Private private_tensor(uint64_t i) const { return Private(record(PRIV, i)); }
    Range blob(uint64_t i) const { return Range(record(BLOB, i)); }
    Range free_range(uint64_t i) const { return Range(record(FREE, i)); }
    uint32_t listed_target(uint64_t i) const { return u32(record(TLST, i)); }
    uint64_t dimension(uint64_t i) const { return u64(record(DIMS, i)); }

    // Strings lie in the file with their NUL.
    const char* string(uint32_t id) const {
        return reinterpret_cast<const char*>(tables[STRS].data + strings[id]);
    }

    // The frame that cluster k ≥ 1 of a target names; NONE if there is none.
    uint32_t find_frame(uint32_t target, uint32_t cluster) const {
        if (first_frame.empty()) return NONE;
        uint32_t first = first_frame[target];
        return cluster - 1 < first_frame[target + 1] - first ? first + cluster - 1 : NONE;
    }

    const Layout* layout(uint32_t id) const {
        return id < layouts.size() && layouts[id].usable ? &layouts[id] : nullptr;
    }
};

// Each of these checks the rules of one stage; it returns false if the next stage cannot be checked.
bool read_header(Index& index, Report& report);            // RMM-001 … 017
bool read_sections(Index& index, Report& report);          // RMM-020 … 026
void read_names_and_targets(Index& index, Report& report); // RMM-030 … 037
void read_layouts_and_forms(Index& index, Report& report); // RMM-040 … 043
void read_frames(Index& index, Report& report);            // RMM-050 … 052
void read_tasks(Index& index, Report& report);             // RMM-055 … 062
void read_privates(Index& index, Report& report);          // RMM-065 … 067
void read_extents(Index& index, Report& report);           // RMM-070 … 072

// What a validator checks beyond that in the header: RMM-012, RMM-015.
void check_slots(const Index& index, Report& report);

// All stages that a reader checks before it uses a file. True if all could be run.
bool read_index(Index& index, Report& report);

// One extent of the file (section 7).
struct Extent {
    enum class Kind : uint8_t { FRAME, RUN, BLOB, FREE, INDEX };
    uint64_t offset, length;
    uint64_t number;  // of the record
    Kind kind;
};

// All of them, in order of offset.
std::vector<Extent> list_extents(const Index& index);
std::string describe(const Index& index, const Extent& extent);

}  // namespace rmm
