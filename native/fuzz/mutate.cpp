// Where libFuzzer changes an input: anywhere, or, three times of four, only in the header or in the
// index. Those are a small part of most files, and all that a reader believes is there.

#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

uint64_t u64(const uint8_t* bytes) {
    uint64_t value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    constexpr size_t HEADER = 640, SLOTS[2] = {64, 512}, SLOT = 56;
    if (size < HEADER || seed % 4 == 0) return LLVMFuzzerMutate(data, size, max_size);
    const size_t slot = SLOTS[u64(data + 512) > u64(data + 64)];
    size_t at = u64(data + slot + 24), n = u64(data + slot + 32);
    if (seed % 16 == 1 || at > size || n > size - at || n == 0) {
        at = slot;
        n = SLOT;
    } else if (seed % 16 < 8) {
        // One section, by its record in the section table.
        const size_t n_sections = u64(data + slot + 40);
        if (n_sections > 0 && n_sections <= n / 40) {
            const uint8_t* record = data + at + 40 * ((seed >> 8) % n_sections);
            const size_t start = u64(record + 8), length = u64(record + 16);
            if (start <= size && length <= size - start && length > 0) {
                at = start;
                n = length;
            }
        }
    }
    // In place: lengths and offsets elsewhere keep their meaning.
    uint8_t part[4096];
    if (n > sizeof part) {
        at += (seed >> 4) % (n - sizeof part + 1);
        n = sizeof part;
    }
    std::memcpy(part, data + at, n);
    LLVMFuzzerMutate(part, n, n);
    std::memcpy(data + at, part, n);
    return size;
}
