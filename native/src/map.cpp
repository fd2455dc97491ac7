#include "map.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "report.hpp"

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace rmm {
namespace {

[[noreturn]] void refuse_io(const char* path, const char* what, int code) {
#if defined(_WIN32)
    std::string reason = format("Windows error %d", code);
#else
    std::string reason = std::strerror(code);
#endif
    throw Failure{RMM_IO, 0, RMM_NO_OFFSET, format("%s: cannot %s: %s", path, what, reason.c_str()),
                  code};
}

}  // namespace

#if defined(_WIN32)

Map::Map(const char* path) {
    int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, nullptr, 0);
    if (n == 0) refuse_io(path, "read the path", static_cast<int>(GetLastError()));
    std::wstring wide(static_cast<size_t>(n), L'\0');
    MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, &wide[0], n);
    // Sharing everything: a writer may grow the collection, or replace the file, meanwhile (5.3).
    HANDLE file = CreateFileW(wide.c_str(), GENERIC_READ,
                              FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
                              OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
    if (file == INVALID_HANDLE_VALUE) refuse_io(path, "open", static_cast<int>(GetLastError()));
    LARGE_INTEGER size;
    if (!GetFileSizeEx(file, &size)) {
        int code = static_cast<int>(GetLastError());
        CloseHandle(file);
        refuse_io(path, "measure", code);
    }
    if (size.QuadPart > 0) {
        HANDLE mapping = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
        void* view = mapping ? MapViewOfFile(mapping, FILE_MAP_READ, 0, 0,
                                             static_cast<SIZE_T>(size.QuadPart))
                             : nullptr;
        int code = static_cast<int>(GetLastError());
        if (mapping) CloseHandle(mapping);
        if (!view) {
            CloseHandle(file);
            refuse_io(path, "map", code);
        }
        data_ = static_cast<const uint8_t*>(view);
        size_ = static_cast<uint64_t>(size.QuadPart);
    }
    CloseHandle(file);
}

Map::~Map() {
    if (data_) UnmapViewOfFile(data_);
}

void Map::release(uint64_t, uint64_t) const {}

#else

Map::Map(const char* path) {
    // O_NONBLOCK: opening a pipe that nobody writes to must not hang.
    int file = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) refuse_io(path, "open", errno);
    struct stat status;
    if (::fstat(file, &status) != 0) {
        int code = errno;
        ::close(file);
        refuse_io(path, "measure", code);
    }
    if (!S_ISREG(status.st_mode)) {
        ::close(file);
        refuse_io(path, "map what is not a regular file", S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
    }
    uint64_t size = static_cast<uint64_t>(status.st_size);
    if (size > std::numeric_limits<size_t>::max()) {
        ::close(file);
        refuse_io(path, "map", EFBIG);
    }
    if (size > 0) {
        void* view = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_SHARED, file, 0);
        int code = errno;
        ::close(file);
        if (view == MAP_FAILED) refuse_io(path, "map", code);
        data_ = static_cast<const uint8_t*>(view);
        size_ = size;
    } else {
        ::close(file);
    }
}

Map::~Map() {
    if (data_) ::munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
}

void Map::release(uint64_t offset, uint64_t n_bytes) const {
#if defined(MADV_DONTNEED)
    if (offset >= size_) return;
    const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    const uint64_t start = offset / page * page, end = offset + std::min(n_bytes, size_ - offset);
    ::madvise(const_cast<uint8_t*>(data_ + start), static_cast<size_t>(end - start), MADV_DONTNEED);
#else
    (void)offset, (void)n_bytes;
#endif
}

#endif

}  // namespace rmm
