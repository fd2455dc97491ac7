// CRC32C (Castagnoli), the checksum of everything in a file.
#pragma once

#include <cstdint>

namespace rmm {

// The checksum of `n_bytes` bytes behind bytes whose checksum is `crc` (0 for none).
uint32_t crc32c(uint32_t crc, const uint8_t* data, uint64_t n_bytes);

// Whether a stored checksum is that of the bytes. Fuzzers build with the usual macro for them, under
// which every checksum is right: otherwise hardly any mutated file would get past the header.
inline bool crc_fits(uint32_t stored, uint32_t computed) {
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    (void)stored, (void)computed;
    return true;
#else
    return stored == computed;
#endif
}

}  // namespace rmm
