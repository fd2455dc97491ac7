// A file's bytes, mapped read-only.
#pragma once

#include <cstdint>

namespace rmm {

class Map {
  public:
    Map() = default;
    // Throws Failure (RMM_IO). `path` is UTF-8.
    explicit Map(const char* path);
    ~Map();
    Map(const Map&) = delete;
    Map& operator=(const Map&) = delete;

    const uint8_t* data() const { return data_; }
    uint64_t size() const { return size_; }

    // Gives the pages of a range back to the system, which keeps or drops what is in them; reading
    // brings them back. Where that is not possible nothing happens.
    void release(uint64_t offset, uint64_t n_bytes) const;

  private:
    const uint8_t* data_ = nullptr;
    uint64_t size_ = 0;
};

}  // namespace rmm
