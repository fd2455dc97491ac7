// Preamble and slots (section 5).

#include <algorithm>

#include "crc32c.hpp"
#include "index.hpp"

namespace rmm {
namespace {

constexpr uint8_t SIGNATURE[8] = {0x89, 'R', 'M', 'M', '\r', '\n', 0x1A, '\n'};
constexpr uint64_t SLOT_OFFSETS[2] = {64, 512};
constexpr uint64_t SLOT_BYTES = 128;

enum class SlotState { EMPTY, VALID, DAMAGED_CRC, DAMAGED_SEQUENCE };

SlotState slot_state(const uint8_t* slot, int number) {
    if (all_zero(slot, SLOT_BYTES)) return SlotState::EMPTY;
    if (!crc_fits(u32(slot + 124), crc32c(0, slot, 124))) return SlotState::DAMAGED_CRC;
    uint64_t sequence = u64(slot);
    bool fits = number == 0 ? sequence % 2 == 1 : sequence % 2 == 0 && sequence != 0;
    return fits ? SlotState::VALID : SlotState::DAMAGED_SEQUENCE;  // RMM-011
}

bool is_damaged(SlotState state) {
    return state == SlotState::DAMAGED_CRC || state == SlotState::DAMAGED_SEQUENCE;
}

bool read_preamble(Index& index, Report& report) {
    const uint8_t* data = index.head;
    if (index.size < sizeof SIGNATURE || std::memcmp(data, SIGNATURE, sizeof SIGNATURE) != 0) {
        std::string got;
        for (uint64_t i = 0; i < sizeof SIGNATURE && i < index.size; ++i) {
            got += format("%02x ", data[i]);
        }
        report.broken(1, 0, "the file starts with %s, not with 89 52 4d 4d 0d 0a 1a 0a",
                      got.empty() ? "nothing" : got.substr(0, got.size() - 1).c_str());
        return false;
    }
    if (index.size < HEADER_BYTES) {
        report.broken(13, index.size, "the file has %llu bytes, its header alone takes 640",
                      ull(index.size));
        return false;
    }
    uint16_t major = u16(data + 8);
    uint32_t features = u32(data + 12);
    index.header.minor = u16(data + 10);
    if (major != 1) {
        report.broken(2, 8, "major version is %u, this library reads 1", major);
        return false;
    }
    if (features != 0) {
        report.broken(3, 12, "features is 0x%x, this library knows none", features);
        return false;
    }
    uint32_t stored = u32(data + 60), computed = crc32c(0, data, 60);
    if (!crc_fits(stored, computed)) {
        report.broken(4, 60, "the preamble's crc is 0x%08x, its bytes give 0x%08x", stored, computed);
    }
    if (!all_zero(data + 16, 44)) {
        report.broken(5, 16, "reserved bytes 16 to 59 are not all zero");
    }
    if (!all_zero(data + 192, 320)) {
        report.broken(5, 192, "reserved bytes 192 to 511 are not all zero");
    }
    return true;
}

}  // namespace

bool read_header(Index& index, Report& report) {
    if (!read_preamble(index, report)) return false;
    Header& header = index.header;

    SlotState states[2];
    for (int i = 0; i < 2; ++i) {
        const uint8_t* slot = index.head + SLOT_OFFSETS[i];
        states[i] = slot_state(slot, i);
        if (states[i] == SlotState::VALID && u64(slot) > header.sequence) {
            header.active = i;
            header.sequence = u64(slot);
        }
    }
    if (header.active < 0) {
        // A right crc shows that the sequence is what the writer meant.
        for (int i = 0; i < 2; ++i) {
            if (states[i] == SlotState::DAMAGED_SEQUENCE) {
                report.broken(11, SLOT_OFFSETS[i], "sequence %llu does not belong in slot %d, no slot is valid",
                              ull(u64(index.head + SLOT_OFFSETS[i])), i);
                return false;
            }
        }
        report.broken(10, SLOT_OFFSETS[0], "no slot is valid: slot 0 is %s, slot 1 is %s",
                      is_damaged(states[0]) ? "damaged" : "empty",
                      is_damaged(states[1]) ? "damaged" : "empty");
        return false;
    }
    header.damaged = is_damaged(states[1 - header.active]);
    header.at = SLOT_OFFSETS[header.active];

    const uint8_t* slot = index.head + header.at;
    header.file_length = u64(slot + 8);
    header.growth_limit = u64(slot + 16);
    header.index_offset = u64(slot + 24);
    header.index_length = u64(slot + 32);
    header.n_sections = u64(slot + 40);
    header.section_record_size = u32(slot + 48);
    header.section_table_crc = u32(slot + 52);

    if (header.file_length > index.size) {
        report.broken(13, header.at + 8, "the file has %llu bytes, its header says %llu: it is cut short",
                      ull(index.size), ull(header.file_length));
        return false;
    }
    if (header.growth_limit < header.file_length || header.growth_limit < index.size) {
        report.broken(14, header.at + 16,
                      "growth_limit is %llu, below file_length %llu or the file's %llu bytes",
                      ull(header.growth_limit), ull(header.file_length), ull(index.size));
    }
    bool ok = true;
    if (header.index_offset % 8 != 0 || header.index_offset < HEADER_BYTES) {
        report.broken(16, header.at + 24, "the index is at %llu, not at a multiple of 8 from 640 on",
                      ull(header.index_offset));
        ok = false;
    }
    if (!within(header.index_offset, header.index_length, header.file_length)) {
        report.broken(16, header.at + 32,
                      "the index of %llu bytes at %llu ends past the file's length %llu",
                      ull(header.index_length), ull(header.index_offset), ull(header.file_length));
        ok = false;
    }
    uint32_t size = header.section_record_size;
    if (size < 40 || size % 8 != 0 || (header.minor == 0 && size != 40)) {
        report.broken(17, header.at + 48, "section_record_size is %u, expected 40", size);
        return false;
    }
    uint64_t table;
    if (!multiply(header.n_sections, size, table) || table > header.index_length) {
        report.broken(16, header.at + 40, "%llu section records of %u bytes exceed the index of %llu bytes",
                      ull(header.n_sections), size, ull(header.index_length));
        ok = false;
    }
    return ok;
}

void check_slots(const Index& index, Report& report) {
    if (index.size < HEADER_BYTES) return;
    for (int i = 0; i < 2; ++i) {
        const uint8_t* slot = index.head + SLOT_OFFSETS[i];
        SlotState state = slot_state(slot, i);
        if (state == SlotState::DAMAGED_SEQUENCE && index.header.active >= 0) {
            report.broken(11, SLOT_OFFSETS[i], "sequence %llu does not belong in slot %d",
                          ull(u64(slot)), i);
        }
        if (is_damaged(state)) {
            report.broken(12, SLOT_OFFSETS[i], "slot %d is damaged: %s", i,
                          state == SlotState::DAMAGED_CRC ? "its crc is wrong"
                                                          : "its sequence is that of the other slot");
        }
        if (state == SlotState::VALID && index.header.minor == 0 && !all_zero(slot + 56, 68)) {
            report.broken(15, SLOT_OFFSETS[i] + 56, "unused bytes of slot %d are not all zero", i);
        }
    }
}

bool read_index(Index& index, Report& report) {
    if (!read_header(index, report)) return false;
    if (!read_sections(index, report)) return false;
    read_names_and_targets(index, report);
    read_layouts_and_forms(index, report);
    read_frames(index, report);
    read_tasks(index, report);
    read_privates(index, report);
    read_extents(index, report);
    return true;
}

}  // namespace rmm
