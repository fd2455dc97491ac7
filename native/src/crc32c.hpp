// CRC32C (Castagnoli), the checksum of everything in a file.
#pragma once

#include <cstdint>

namespace rmm {

// The checksum of `n_bytes` bytes behind bytes whose checksum is `crc` (0 for none).
uint32_t crc32c(uint32_t crc, const uint8_t* data, uint64_t n_bytes);

}  // namespace rmm
