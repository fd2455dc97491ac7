// A check, not a parser: is a text one JSON object as RMM-090 says?
#pragma once

#include <cstdint>
#include <string>

namespace rmm {

// Empty if the text is one JSON object in UTF-8 without byte order mark, duplicate keys or numbers
// beyond binary64, nested at most 16 deep; otherwise what is wrong, and `at` tells the byte.
std::string check_json(const uint8_t* text, uint64_t n_bytes, uint64_t& at);

}  // namespace rmm
