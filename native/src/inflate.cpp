#include "inflate.hpp"

#include <memory>

#include "bytes.hpp"

namespace rmm {
namespace {

constexpr unsigned MAX_BITS = 15;
constexpr unsigned FAST_BITS = 9;

// A canonical Huffman code: short codes by table, longer ones bit by bit.
struct Huffman {
    uint16_t fast[1u << FAST_BITS];  // symbol << 4 | length; 0: longer, or no code
    uint16_t count[MAX_BITS + 1];
    uint16_t symbols[288];

    // False if the lengths are over-subscribed, or incomplete where that is not allowed.
    bool build(const uint8_t* lengths, unsigned n) {
        std::memset(count, 0, sizeof count);
        std::memset(fast, 0, sizeof fast);
        for (unsigned i = 0; i < n; ++i) ++count[lengths[i]];
        unsigned n_codes = n - count[0];
        count[0] = 0;
        int left = 1;
        for (unsigned length = 1; length <= MAX_BITS; ++length) {
            left = left * 2 - count[length];
            if (left < 0) return false;
        }
        // RFC 1951, 3.2.7: one distance code of one bit is allowed, and no distance code at all.
        if (left > 0 && !(n_codes == 0 || (n_codes == 1 && count[1] == 1))) return false;
        uint16_t next[MAX_BITS + 2] = {0}, code[MAX_BITS + 2] = {0};
        for (unsigned length = 1; length <= MAX_BITS; ++length) {
            next[length + 1] = static_cast<uint16_t>(next[length] + count[length]);
            code[length + 1] = static_cast<uint16_t>((code[length] + count[length]) << 1);
        }
        for (unsigned symbol = 0; symbol < n; ++symbol) {
            unsigned length = lengths[symbol];
            if (length == 0) continue;
            symbols[next[length]++] = static_cast<uint16_t>(symbol);
            unsigned value = code[length]++, reversed = 0;
            if (length > FAST_BITS) continue;
            for (unsigned bit = 0; bit < length; ++bit) reversed |= ((value >> bit) & 1) << (length - 1 - bit);
            for (unsigned i = reversed; i < (1u << FAST_BITS); i += 1u << length) {
                fast[i] = static_cast<uint16_t>(symbol << 4 | length);
            }
        }
        return true;
    }
};

constexpr uint16_t LENGTH_BASE[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr uint8_t LENGTH_EXTRA[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                      2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr uint16_t DISTANCE_BASE[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,
                                        33,  49,  65,  97,  129, 193,  257,  385,  513,  769,
                                        1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr uint8_t DISTANCE_EXTRA[30] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                        6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};

class Inflater {
  public:
    Inflater(const uint8_t* in, uint64_t n_in, uint64_t n_out, std::vector<uint8_t>& out)
        : in_(in), end_(in + n_in), n_out_(n_out), out_(out) {}

    const char* run() {
        if (end_ - in_ < 6) return "the stream is shorter than a header and a checksum";
        unsigned method = in_[0], flags = in_[1];
        if ((method & 15) != 8 || method >> 4 > 7 || (method * 256 + flags) % 31 != 0 || (flags & 32)) {
            return "the stream has no zlib header";
        }
        in_ += 2;
        bool last;
        do {
            last = take(1);
            unsigned type = take(2);
            const char* wrong = type == 0   ? stored()
                                : type == 1 ? fixed()
                                : type == 2 ? dynamic()
                                            : "the stream has a block of an unknown type";
            if (wrong) return wrong;
            if (overrun_) return "the stream ends within a block";
        } while (!last);
        flush();
        in_ -= n_bits_ / 8;  // whole bytes that were read ahead
        if (end_ - in_ != 4) return "the stream does not fill its section";
        uint32_t stored = static_cast<uint32_t>(in_[0]) << 24 | in_[1] << 16 | in_[2] << 8 | in_[3];
        if (stored != (b_ << 16 | a_)) return "the stream's Adler-32 is wrong";
        return position_ == n_out_ ? nullptr : "the stream gives fewer bytes than the section says";
    }

  private:
    static constexpr uint64_t WINDOW = 65536;

    void fill() {
        if (end_ - in_ >= 8) {
            bits_ |= u64(in_) << n_bits_;
            unsigned n = (63 - n_bits_) / 8;
            in_ += n;
            n_bits_ += 8 * n;
            return;
        }
        while (n_bits_ <= 56 && in_ < end_) {
            bits_ |= static_cast<uint64_t>(*in_++) << n_bits_;
            n_bits_ += 8;
        }
    }

    unsigned take(unsigned n) {
        if (n_bits_ < n) fill();
        if (n_bits_ < n) {
            overrun_ = true;
            n_bits_ = 0;
            bits_ = 0;
            return 0;
        }
        unsigned value = static_cast<unsigned>(bits_ & ((uint64_t{1} << n) - 1));
        bits_ >>= n;
        n_bits_ -= n;
        return value;
    }

    // The next symbol; ~0 if the bits are no code or the stream ends.
    unsigned decode(const Huffman& code) {
        if (n_bits_ < MAX_BITS) fill();
        unsigned entry = code.fast[bits_ & ((1u << FAST_BITS) - 1)];
        if (entry != 0) {
            unsigned length = entry & 15;
            if (length > n_bits_) return ~0u;
            bits_ >>= length;
            n_bits_ -= length;
            return entry >> 4;
        }
        int value = 0, first = 0, index = 0;
        for (unsigned length = 1; length <= MAX_BITS && length <= n_bits_; ++length) {
            value |= static_cast<int>((bits_ >> (length - 1)) & 1);
            int count = code.count[length];
            if (value - count < first) {
                bits_ >>= length;
                n_bits_ -= length;
                return code.symbols[index + (value - first)];
            }
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        return ~0u;
    }

    void flush() {
        // Adler-32 of what is new in the window; sums stay below 2^32 for 5,552 bytes.
        uint64_t n = position_ - flushed_;
        const uint8_t* from = window_ + flushed_ % WINDOW;
        out_.insert(out_.end(), from, from + n);
        while (n > 0) {
            uint64_t chunk = n < 5552 ? n : 5552;
            for (uint64_t i = 0; i < chunk; ++i) {
                a_ += from[i];
                b_ += a_;
            }
            a_ %= 65521;
            b_ %= 65521;
            from += chunk;
            n -= chunk;
        }
        flushed_ = position_;
    }

    bool put(uint8_t byte) {
        if (position_ == n_out_) return false;
        window_[position_++ % WINDOW] = byte;
        if (position_ % (WINDOW / 2) == 0) flush();
        return true;
    }

    static constexpr const char* TOO_LONG = "the stream gives more bytes than the section says";

    const char* stored() {
        take(n_bits_ % 8);
        unsigned length = take(16), complement = take(16);
        if (overrun_ || (length ^ complement) != 0xFFFF) return "a stored block's length is damaged";
        in_ -= n_bits_ / 8;
        bits_ = 0;
        n_bits_ = 0;
        if (static_cast<uint64_t>(end_ - in_) < length) return "the stream ends within a block";
        for (; length > 0; --length) {
            if (!put(*in_++)) return TOO_LONG;
        }
        return nullptr;
    }

    const char* fixed() {
        uint8_t lengths[288];
        for (unsigned i = 0; i < 288; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
        literals_.build(lengths, 288);
        // All 32 distances have a code, though 30 and 31 are not allowed to occur.
        for (unsigned i = 0; i < 32; ++i) lengths[i] = 5;
        distances_.build(lengths, 32);
        return compressed();
    }

    const char* dynamic() {
        constexpr uint8_t ORDER[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
        constexpr const char* WRONG = "a block's code lengths are damaged";
        unsigned n_literals = take(5) + 257, n_distances = take(5) + 1, n_lengths = take(4) + 4;
        if (overrun_ || n_literals > 286 || n_distances > 30) return WRONG;
        uint8_t lengths[320] = {0};
        for (unsigned i = 0; i < n_lengths; ++i) lengths[ORDER[i]] = static_cast<uint8_t>(take(3));
        if (!literals_.build(lengths, 19)) return WRONG;
        std::memset(lengths, 0, sizeof lengths);
        for (unsigned i = 0; i < n_literals + n_distances;) {
            unsigned symbol = decode(literals_);
            if (symbol < 16) {
                lengths[i++] = static_cast<uint8_t>(symbol);
                continue;
            }
            if (symbol > 18 || (symbol == 16 && i == 0)) return WRONG;
            uint8_t value = symbol == 16 ? lengths[i - 1] : 0;
            unsigned n = symbol == 16 ? 3 + take(2) : symbol == 17 ? 3 + take(3) : 11 + take(7);
            if (overrun_ || i + n > n_literals + n_distances) return WRONG;
            for (; n > 0; --n) lengths[i++] = value;
        }
        if (lengths[256] == 0) return WRONG;  // no way to end the block
        if (!literals_.build(lengths, n_literals) || !distances_.build(lengths + n_literals, n_distances)) {
            return WRONG;
        }
        return compressed();
    }

    const char* compressed() {
        constexpr const char* WRONG = "a block's data is damaged";
        for (;;) {
            unsigned symbol = decode(literals_);
            if (symbol < 256) {
                if (!put(static_cast<uint8_t>(symbol))) return TOO_LONG;
                continue;
            }
            if (symbol == 256) return nullptr;
            if (symbol > 285) return WRONG;
            uint64_t length = LENGTH_BASE[symbol - 257] + take(LENGTH_EXTRA[symbol - 257]);
            unsigned code = decode(distances_);
            if (code > 29) return WRONG;
            uint64_t distance = DISTANCE_BASE[code] + take(DISTANCE_EXTRA[code]);
            if (overrun_ || distance > position_) return WRONG;
            if (length > n_out_ - position_) return TOO_LONG;
            for (; length > 0; --length) put(window_[(position_ - distance) % WINDOW]);
        }
    }

    const uint8_t* in_;
    const uint8_t* end_;
    uint64_t n_out_;
    std::vector<uint8_t>& out_;
    uint64_t bits_ = 0;
    unsigned n_bits_ = 0;
    bool overrun_ = false;
    uint64_t position_ = 0, flushed_ = 0;
    uint32_t a_ = 1, b_ = 0;
    Huffman literals_, distances_;
    uint8_t window_[WINDOW];
};

}  // namespace

const char* inflate(const uint8_t* in, uint64_t n_in, uint64_t n_out, std::vector<uint8_t>& out) {
    return std::make_unique<Inflater>(in, n_in, n_out, out)->run();
}

}  // namespace rmm
