// Every byte of the file is in one place (section 7).

#include <algorithm>

#include "index.hpp"

namespace rmm {

std::vector<Extent> list_extents(const Index& index) {
    std::vector<Extent> extents;
    extents.reserve(index.count(FRAM) + index.count(TASK) + index.count(BLOB) + index.count(FREE) + 1);
    auto add_range = [&](uint64_t offset, uint64_t length, uint64_t number, Extent::Kind kind) {
        if (length > 0) extents.push_back({offset, length, number, kind});
    };
    for (uint64_t i = 0; i < index.count(FRAM); ++i) {
        Frame frame = index.frame(i);
        add_range(frame.offset, frame.length, i, Extent::Kind::FRAME);
    }
    for (uint64_t i = 0; i < index.count(TASK); ++i) {
        Task task = index.task(i);
        add_range(task.offset, task.length, i, Extent::Kind::RUN);
    }
    for (uint64_t i = 0; i < index.count(BLOB); ++i) {
        Range blob = index.blob(i);
        add_range(blob.offset, blob.length, i, Extent::Kind::BLOB);
    }
    for (uint64_t i = 0; i < index.count(FREE); ++i) {
        Range range = index.free_range(i);
        add_range(range.offset, range.length, i, Extent::Kind::FREE);
    }
    // The index is an extent even if it is empty.
    extents.push_back({index.header.index_offset, index.header.index_length, 0, Extent::Kind::INDEX});
    auto before = [](const Extent& a, const Extent& b) {
        return a.offset != b.offset ? a.offset < b.offset : a.length < b.length;
    };
    if (!std::is_sorted(extents.begin(), extents.end(), before)) {
        std::sort(extents.begin(), extents.end(), before);
    }
    return extents;
}

std::string describe(const Index& index, const Extent& extent) {
    switch (extent.kind) {
        case Extent::Kind::FRAME:
            return format("frame %llu", ull(extent.number));
        case Extent::Kind::RUN: {
            uint32_t name = index.task(extent.number).name;
            return format("the run of task %s", name < index.strings.size() ? index.string(name) : "?");
        }
        case Extent::Kind::BLOB:
            return format("blob %llu", ull(extent.number));
        case Extent::Kind::FREE:
            return format("free extent %llu", ull(extent.number));
        default:
            return "the index";
    }
}

void read_extents(Index& index, Report& report) {
    const uint64_t file_length = index.header.file_length;
    const Table& free = index.table(FREE);
    for (uint64_t i = 0; i < free.count; ++i) {
        if (u32(free.record(i) + 20) != 0) {
            report.broken(37, free.offset_of(i) + 20, "free extent %llu has a reserved field that is not zero", ull(i));
        }
        if (index.free_range(i).length == 0) {
            report.broken(71, free.offset_of(i) + 8, "free extent %llu is empty", ull(i));
        }
    }
    uint64_t position = HEADER_BYTES;
    for (const Extent& extent : list_extents(index)) {
        uint64_t alignment = extent.length >= LARGE ? LARGE_ALIGNMENT : 8;
        if (extent.kind != Extent::Kind::FREE && extent.offset % alignment != 0) {
            report.broken(70, extent.offset, "%s of %llu bytes is at %llu, not at a multiple of %llu",
                          describe(index, extent).c_str(), ull(extent.length), ull(extent.offset), ull(alignment));
        }
        if (extent.offset < HEADER_BYTES || !within(extent.offset, extent.length, file_length)) {
            report.broken(71, extent.offset, "%s of %llu bytes at %llu is not between the header and the file's length %llu",
                          describe(index, extent).c_str(), ull(extent.length), ull(extent.offset), ull(file_length));
            continue;
        }
        if (extent.offset < position) {
            report.broken(71, extent.offset, "%s at %llu overlaps what ends at %llu", describe(index, extent).c_str(),
                          ull(extent.offset), ull(position));
        } else if (extent.offset - position >= 64) {
            report.broken(72, position, "%llu bytes before %s are in no extent, expected fewer than 64",
                          ull(extent.offset - position), describe(index, extent).c_str());
        }
        position = std::max(position, extent.offset + extent.length);
    }
    if (position != file_length) {
        report.broken(72, position, "the last extent ends at %llu, the file's length is %llu", ull(position),
                      ull(file_length));
    }
}

}  // namespace rmm
