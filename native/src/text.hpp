// UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmm {

// Bytes of the character at `at` in a text that ends at `end`; 0 if it is not well formed, or one of
// U+0000–U+001F and U+007F. By table 3-7 of the Unicode standard, without surrogates and overlong forms.
inline unsigned utf8_bytes(const uint8_t* at, const uint8_t* end) {
    const uint8_t lead = at[0];
    if (lead < 0x80) return lead >= 0x20 && lead != 0x7F;
    unsigned n = 0;
    if (lead >= 0xC2 && lead <= 0xDF) n = 2;
    if (lead >= 0xE0 && lead <= 0xEF) n = 3;
    if (lead >= 0xF0 && lead <= 0xF4) n = 4;
    if (n == 0 || end - at < static_cast<ptrdiff_t>(n)) return 0;
    const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (at[1] < low || at[1] > high) return 0;
    for (unsigned i = 2; i < n; ++i) {
        if ((at[i] & 0xC0) != 0x80) return 0;
    }
    return n;
}

}  // namespace rmm
