// Runs a fuzz target on files, so that a corpus can be replayed without libFuzzer. With the option
// -flips every single-bit flip and every truncation of each file is run as well.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

bool read_file(const char* path, std::vector<uint8_t>& data) {
    FILE* file = std::fopen(path, "rb");
    if (!file) return false;
    uint8_t buffer[65536];
    size_t n;
    while ((n = std::fread(buffer, 1, sizeof buffer, file)) > 0) data.insert(data.end(), buffer, buffer + n);
    bool ok = !std::ferror(file);
    std::fclose(file);
    return ok;
}

// In a block of exactly its size, so that a sanitizer sees a read past the end.
void run(const uint8_t* data, size_t size) {
    std::vector<uint8_t> copy(data, data + size);
    copy.shrink_to_fit();
    LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

}  // namespace

int main(int argc, char** argv) {
    bool flips = false;
    int n_runs = 0, n_files = 0;
    for (int i = 1; i < argc; ++i) {
        if (std::strcmp(argv[i], "-flips") == 0) {
            flips = true;
            continue;
        }
        std::vector<uint8_t> data;
        if (!read_file(argv[i], data)) {
            std::fprintf(stderr, "%s: cannot be read\n", argv[i]);
            return 1;
        }
        ++n_files;
        run(data.data(), data.size());
        ++n_runs;
        if (!flips) continue;
        for (size_t at = 0; at < data.size(); ++at) {
            run(data.data(), at);
            ++n_runs;
            for (int bit = 0; bit < 8; ++bit, ++n_runs) {
                data[at] ^= static_cast<uint8_t>(1 << bit);
                run(data.data(), data.size());
                data[at] ^= static_cast<uint8_t>(1 << bit);
            }
        }
    }
    std::printf("%d files, %d runs\n", n_files, n_runs);
    return 0;
}
