// The section table and its sections (section 6).

#include <algorithm>

#include "crc32c.hpp"
#include "index.hpp"

namespace rmm {

const TableType TABLE_TYPES[N_TABLES] = {
    {"STRS", 1},  {"TARG", 32}, {"RUNS", 8},  {"LAYO", 16}, {"FORM", 40},
    {"FRAM", 88}, {"TLST", 4},  {"TASK", 64}, {"ENTR", 16}, {"DIMS", 8},
    {"PRIV", 24}, {"BLOB", 24}, {"erro", 4},  {"free", 24}, {"meta", 1},
};

namespace {

bool is_letter(uint8_t byte) { return (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z'); }

int find_table(const uint8_t* type) {
    for (int id = 0; id < N_TABLES; ++id) {
        if (std::memcmp(type, TABLE_TYPES[id].type, 4) == 0) return id;
    }
    return -1;
}

// RMM-024, RMM-026: record size, length and coding. False if the records cannot be stepped through.
bool check_size(const Index& index, Report& report, const Table& table, const char* type, int id,
                uint64_t at) {
    uint32_t least = id >= 0 ? TABLE_TYPES[id].record_bytes : 0;
    bool bytes = id == STRS || id == META;  // text: records of one byte in every version
    bool exact = id >= 0 && (index.header.minor == 0 || bytes);
    bool ok = true;
    if (table.stride < least || (exact && table.stride != least)) {
        report.broken(24, at + 32, "section %s has records of %u bytes, expected %s%u", type, table.stride,
                      exact ? "" : "at least ", least);
        ok = false;
    }
    uint64_t n_bytes;
    bool fits = multiply(table.count, table.stride, n_bytes);
    if (table.coding == 0) {
        if (!fits || n_bytes != table.length) {
            report.broken(24, at + 8, "section %s has %llu records of %u bytes in %llu bytes", type,
                          ull(table.count), table.stride, ull(table.length));
            ok = false;
        }
    } else if (table.coding != 1 || type[0] < 'a' || id == FREE) {
        report.broken(26, at + 4, "section %s has coding %u, which is not known or not allowed there",
                      type, table.coding);
        ok = false;
    } else {
        uint64_t limit;
        if (!multiply(table.length, 256, limit) || !add(limit, 65536, limit)) limit = UINT64_MAX;
        if (!fits || n_bytes > limit) {
            report.broken(26, at + 24,
                          "section %s asks for %llu records of %u bytes from %llu bytes, more than 256 "
                          "times as many and 65536",
                          type, ull(table.count), table.stride, ull(table.length));
            ok = false;
        }
    }
    return ok;
}

}  // namespace

bool read_sections(Index& index, Report& report) {
    const Header& header = index.header;
    const uint8_t* data = index.data;
    uint64_t step = header.section_record_size;
    uint64_t table_bytes = header.n_sections * step;  // checked by RMM-016
    uint64_t end = header.index_offset + header.index_length;

    uint32_t computed = crc32c(0, data + header.index_offset, table_bytes);
    if (!crc_fits(header.section_table_crc, computed)) {
        report.broken(20, header.index_offset, "the section table's crc is 0x%08x, its bytes give 0x%08x",
                      header.section_table_crc, computed);
    }

    bool ok = true;
    uint64_t position = header.index_offset + table_bytes;
    std::vector<uint32_t> unknown;
    for (uint64_t i = 0; i < header.n_sections; ++i) {
        uint64_t at = header.index_offset + i * step;
        const uint8_t* record = data + at;
        char type[5] = {0};
        std::memcpy(type, record, 4);
        if (!std::all_of(record, record + 4, is_letter)) {
            report.broken(22, at, "section %llu has type %02x %02x %02x %02x, not four ASCII letters", ull(i),
                          record[0], record[1], record[2], record[3]);
            return false;
        }
        Table table;
        table.coding = u32(record + 4);
        table.offset = u64(record + 8);
        table.length = u64(record + 16);
        table.count = u64(record + 24);
        table.stride = u32(record + 32);
        table.present = true;

        int id = find_table(record);
        if (id >= 0 && index.tables[id].present) {
            report.broken(22, at, "section %s occurs twice", type);
            return false;
        }
        if (id < 0) {
            unknown.push_back(u32(record));
            if (type[0] < 'a') {
                report.broken(23, at, "section %s is critical and not known", type);
                ok = false;
            }
        }
        // RMM-021
        if (table.offset % 8 != 0 || table.offset < position || table.offset - position >= 8) {
            report.broken(21, at + 8, "section %s is at %llu, expected %llu", type, ull(table.offset),
                          ull(ceil_to(position, 8)));
            return false;
        }
        if (!within(table.offset, table.length, end)) {
            report.broken(21, at + 16, "section %s of %llu bytes at %llu ends past the index, which ends at %llu",
                          type, ull(table.length), ull(table.offset), ull(end));
            return false;
        }
        if (!all_zero(data + position, table.offset - position)) {
            report.broken(21, position, "bytes before section %s are not zero", type);
        }
        position = table.offset + table.length;

        bool sized = check_size(index, report, table, type, id, at);
        uint32_t stored = u32(record + 36), sum = crc32c(0, data + table.offset, table.length);
        if (!crc_fits(stored, sum)) {
            report.broken(25, table.offset, "section %s has crc 0x%08x, its bytes give 0x%08x", type, stored, sum);
        }
        if (!sized) ok = false;
        if (id >= 0) {
            if (table.coding == 0) table.data = data + table.offset;
            index.tables[id] = table;
        }
    }
    std::sort(unknown.begin(), unknown.end());
    auto twice = std::adjacent_find(unknown.begin(), unknown.end());
    if (twice != unknown.end()) {
        report.broken(22, header.index_offset, "section %.4s occurs twice",
                      reinterpret_cast<const char*>(&*twice));
        ok = false;
    }
    if (position != end) {
        report.broken(21, header.at + 32, "the last section ends at %llu, the index at %llu", ull(position), ull(end));
        ok = false;
    }
    return ok;
}

}  // namespace rmm
