// STRS and TARG (section 6.1).

#include "index.hpp"
#include "text.hpp"

namespace rmm {
namespace {

constexpr uint64_t MAX_STRING = 1024;

void read_strings(Index& index, Report& report) {
    const Table& table = index.table(STRS);
    const uint8_t* at = table.data;
    const uint8_t* end = at + table.count;
    const uint8_t* before = nullptr;
    uint64_t before_length = 0;
    while (at < end) {
        const uint8_t* stop = static_cast<const uint8_t*>(std::memchr(at, 0, static_cast<size_t>(end - at)));
        uint64_t offset = table.offset + static_cast<uint64_t>(at - table.data);
        if (!stop) {
            report.broken(30, offset, "string %zu has no end", index.strings.size());
            return;
        }
        uint64_t length = static_cast<uint64_t>(stop - at);
        if (length < 1 || length > MAX_STRING) {
            report.broken(30, offset, "string %zu has %llu bytes, expected 1 to 1024", index.strings.size(),
                          ull(length));
        }
        for (const uint8_t* byte = at; byte < stop;) {
            unsigned n = utf8_bytes(byte, stop);
            if (n == 0) {
                report.broken(30, offset + static_cast<uint64_t>(byte - at),
                              "string %zu has byte 0x%02x, which starts no UTF-8 character that is allowed",
                              index.strings.size(), *byte);
                break;
            }
            byte += n;
        }
        if (before) {
            uint64_t common = before_length < length ? before_length : length;
            int order = std::memcmp(before, at, common);
            if (order > 0 || (order == 0 && before_length >= length)) {
                report.broken(31, offset, "string %zu is not above the one before it", index.strings.size());
            }
        }
        before = at;
        before_length = length;
        index.strings.push_back(static_cast<uint64_t>(at - table.data));
        at = stop + 1;
    }
}

bool ascending(const Target& a, const Target& b) {
    if (a.name != b.name) return a.name < b.name;
    if (a.n_in != b.n_in) return a.n_in < b.n_in;
    if (a.n_out != b.n_out) return a.n_out < b.n_out;
    if (a.kind != b.kind) return a.kind < b.kind;
    if (a.flags != b.flags) return a.flags < b.flags;
    for (int i = 0; i < 3; ++i) {
        if (a.kernel[i] != b.kernel[i]) return a.kernel[i] < b.kernel[i];
    }
    return false;
}

void check_kernel(Report& report, const Target& target, uint64_t i, uint64_t at) {
    const uint16_t* kernel = target.kernel;
    if (target.kind != 2) {
        if (kernel[0] | kernel[1] | kernel[2]) {
            report.broken(36, at + 16, "target %llu of kind %u has a kernel of %u, %u, %u, expected none",
                          ull(i), target.kind, kernel[0], kernel[1], kernel[2]);
        }
        return;
    }
    uint64_t product = 1;  // below 2^48
    bool ended = false, well = kernel[0] != 0;
    for (int axis = 0; axis < 3; ++axis) {
        if (kernel[axis] == 0) {
            ended = true;
        } else {
            well = well && !ended;
            product *= kernel[axis];
        }
    }
    if (!well || target.n_in % product != 0) {
        report.broken(36, at + 16, "target %llu has a kernel of %u, %u, %u for n_in %llu", ull(i), kernel[0],
                      kernel[1], kernel[2], ull(target.n_in));
    }
}

}  // namespace

void read_names_and_targets(Index& index, Report& report) {
    read_strings(index, report);

    const Table& table = index.table(TARG);
    for (uint64_t i = 0; i < table.count; ++i) {
        const uint8_t* record = table.record(i);
        uint64_t at = table.offset_of(i);
        Target target(record);
        if (target.name >= index.strings.size()) {
            report.broken(35, at + 24, "target %llu names string %u of %zu", ull(i), target.name,
                          index.strings.size());
        }
        if (i > 0 && !ascending(Target(table.record(i - 1)), target)) {
            report.broken(35, at, "target %llu is not above the one before it", ull(i));
        }
        if (target.n_in < 1 || target.n_in > MAX_SIDE || target.n_out < 1 || target.n_out > MAX_SIDE) {
            report.broken(36, at, "target %llu has sides %llu and %llu, expected 1 to 2^40", ull(i),
                          ull(target.n_in), ull(target.n_out));
        }
        if (target.flags > 1) {
            report.broken(36, at + 23, "target %llu has flags 0x%02x, expected 0 or 1", ull(i), target.flags);
        }
        if (target.kind > 2) {
            report.broken_as(RMM_UNSUPPORTED_KIND, 36, at + 22,
                             "target %llu has kind %u, this library knows 0, 1 and 2", ull(i), target.kind);
        } else {
            check_kernel(report, target, i, at);
        }
        if (u32(record + 28) != 0) {
            report.broken(37, at + 28, "target %llu has a reserved field of 0x%x, expected 0", ull(i),
                          u32(record + 28));
        }
    }
}

}  // namespace rmm
