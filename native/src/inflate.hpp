// zlib streams (RFC 1950, RFC 1951): the coding of optional sections (RMM-026).
#pragma once

#include <cstdint>
#include <vector>

namespace rmm {

// Decodes a stream that must take exactly n_in bytes and give exactly n_out, behind what is in `out`.
// Null, or what is wrong. Memory grows with what has been decoded.
const char* inflate(const uint8_t* in, uint64_t n_in, uint64_t n_out, std::vector<uint8_t>& out);

}  // namespace rmm
