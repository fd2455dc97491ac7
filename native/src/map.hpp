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

  private:
    const uint8_t* data_ = nullptr;
    uint64_t size_ = 0;
};

}  // namespace rmm
