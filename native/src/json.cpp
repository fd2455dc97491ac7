#include "json.hpp"

#include <cstring>
#include <set>
#include <vector>

#include "text.hpp"

namespace rmm {
namespace {

constexpr unsigned MAX_DEPTH = 16;

// Not recursive: open containers are on a stack of at most 16.
class Json {
  public:
    Json(const uint8_t* text, uint64_t n) : start_(text), at_(text), end_(text + n) {}

    uint64_t position() const { return static_cast<uint64_t>(at_ - start_); }

    const char* run() {
        skip_space();
        if (at_ == end_ || *at_ != '{') return "the text is not an object";
        if (const char* wrong = value()) return wrong;
        while (!open_.empty()) {
            if (const char* wrong = step()) return wrong;
        }
        skip_space();
        return at_ == end_ ? nullptr : "something follows the object";
    }

  private:
    struct Container {
        bool object;
        bool empty = true;
        std::set<std::string> keys;
    };

    void skip_space() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
    }

    bool next_is(char c) {
        if (at_ == end_ || *at_ != static_cast<uint8_t>(c)) return false;
        ++at_;
        return true;
    }

    // One member or element of the innermost container, or its end.
    const char* step() {
        Container& container = open_.back();
        skip_space();
        if (next_is(container.object ? '}' : ']')) {
            open_.pop_back();
            return nullptr;
        }
        if (!container.empty) {
            if (!next_is(',')) return "a comma or the end of an object or array is missing";
            skip_space();
        }
        container.empty = false;
        if (container.object) {
            const uint8_t* key_at = at_;
            std::string key;
            if (at_ == end_ || *at_ != '"') return "a key is missing";
            if (const char* wrong = string(&key)) return wrong;
            if (!container.keys.insert(std::move(key)).second) {
                at_ = key_at;
                return "a key occurs twice";
            }
            skip_space();
            if (!next_is(':')) return "a colon is missing";
            skip_space();
        }
        return value();
    }

    const char* value() {
        if (at_ == end_) return "the text ends within an object";
        uint8_t c = *at_;
        if (c == '{' || c == '[') {
            if (open_.size() == MAX_DEPTH) return "the text is nested more than 16 deep";
            ++at_;
            open_.push_back({c == '{', true, {}});
            return nullptr;
        }
        if (c == '"') return string(nullptr);
        if (c == '-' || (c >= '0' && c <= '9')) return number();
        for (const char* word : {"true", "false", "null"}) {
            size_t n = std::strlen(word);
            if (static_cast<size_t>(end_ - at_) >= n && std::memcmp(at_, word, n) == 0) {
                at_ += n;
                return nullptr;
            }
        }
        return "a value is missing";
    }

    bool digits() {
        const uint8_t* from = at_;
        while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
        return at_ > from;
    }

    const char* number() {
        const uint8_t* from = at_;
        next_is('-');
        const uint8_t* whole = at_;
        if (!digits() || (*whole == '0' && at_ - whole > 1)) return "a number is damaged";
        const uint8_t* whole_end = at_;
        if (next_is('.') && !digits()) return "a number is damaged";
        const uint8_t* mantissa_end = at_;
        int64_t exponent = 0;
        if (at_ < end_ && (*at_ == 'e' || *at_ == 'E')) {
            ++at_;
            bool negative = next_is('-');
            if (!negative) next_is('+');
            const uint8_t* exponent_at = at_;
            if (!digits()) return "a number is damaged";
            for (const uint8_t* p = exponent_at; p < at_; ++p) {
                if (exponent < 100000000000) exponent = exponent * 10 + (*p - '0');
            }
            if (negative) exponent = -exponent;
        }
        if (too_large(whole, whole_end, mantissa_end, exponent)) {
            at_ = from;
            return "a number is infinite in binary64";
        }
        return nullptr;
    }

    // Does the decimal number round to infinity? That is from 2^1024 − 2^970 on.
    static bool too_large(const uint8_t* whole, const uint8_t* whole_end, const uint8_t* mantissa_end,
                          int64_t exponent) {
        static const char LIMIT[] = "17976931348623158079372897140530341507993413271003782693617377898044";
        std::string digits;
        int64_t leading = (whole_end - whole) - 1 + exponent;  // decimal exponent of the first digit
        bool begun = false;
        for (const uint8_t* p = whole; p < mantissa_end; ++p) {
            if (*p == '.') continue;
            if (!begun && *p == '0') {
                --leading;
                continue;
            }
            begun = true;
            if (digits.size() < sizeof LIMIT - 1) digits += static_cast<char>(*p);
        }
        if (!begun || leading < 308) return false;
        if (leading > 308) return true;
        return digits >= std::string(LIMIT, sizeof LIMIT - 1);
    }

    bool hex4(uint32_t& value) {
        if (end_ - at_ < 4) return false;
        value = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            uint8_t c = *at_;
            uint32_t digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : 16;
            if (digit == 16) return false;
            value = value << 4 | digit;
        }
        return true;
    }

    static void append(std::string& text, uint32_t c) {
        if (c < 0x80) {
            text += static_cast<char>(c);
        } else if (c < 0x800) {
            text += static_cast<char>(0xC0 | c >> 6);
            text += static_cast<char>(0x80 | (c & 63));
        } else if (c < 0x10000) {
            text += static_cast<char>(0xE0 | c >> 12);
            text += static_cast<char>(0x80 | ((c >> 6) & 63));
            text += static_cast<char>(0x80 | (c & 63));
        } else {
            text += static_cast<char>(0xF0 | c >> 18);
            text += static_cast<char>(0x80 | ((c >> 12) & 63));
            text += static_cast<char>(0x80 | ((c >> 6) & 63));
            text += static_cast<char>(0x80 | (c & 63));
        }
    }

    const char* escape(std::string* text) {
        static const char* const DAMAGED = "an escape is damaged";
        if (at_ == end_) return DAMAGED;
        uint8_t c = *at_++;
        static const char NAMES[] = "\"\\/bfnrt", VALUES[] = "\"\\/\b\f\n\r\t";
        if (c != 'u') {
            const char* found = c ? std::strchr(NAMES, c) : nullptr;
            if (!found) return DAMAGED;
            if (text) *text += VALUES[found - NAMES];
            return nullptr;
        }
        uint32_t first, second;
        if (!hex4(first)) return DAMAGED;
        if (first >= 0xD800 && first <= 0xDFFF) {  // half of a character: no text in UTF-8
            if (first >= 0xDC00 || !next_is('\\') || !next_is('u') || !hex4(second) || second < 0xDC00 ||
                second > 0xDFFF) {
                return "an escape is half of a surrogate pair";
            }
            first = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
        }
        if (text) append(*text, first);
        return nullptr;
    }

    const char* string(std::string* text) {
        ++at_;
        while (at_ < end_) {
            uint8_t c = *at_;
            if (c == '"') {
                ++at_;
                return nullptr;
            }
            if (c == '\\') {
                ++at_;
                if (const char* wrong = escape(text)) return wrong;
                continue;
            }
            if (c < 0x20) return "a string has a control character";
            unsigned n = c == 0x7F ? 1 : utf8_bytes(at_, end_);
            if (n == 0) return "the text is not UTF-8";
            if (text) text->append(reinterpret_cast<const char*>(at_), n);
            at_ += n;
        }
        return "a string has no end";
    }

    const uint8_t* start_;
    const uint8_t* at_;
    const uint8_t* end_;
    std::vector<Container> open_;
};

}  // namespace

std::string check_json(const uint8_t* text, uint64_t n_bytes, uint64_t& at) {
    Json json(text, n_bytes);
    const char* wrong = json.run();
    at = json.position();
    return wrong ? wrong : "";
}

}  // namespace rmm
