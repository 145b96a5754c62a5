// What the programs that test kernels share: memory that ends where nobody may read on, and what they count and say.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "lazyneuron.h"
#include "row_formats.h"

namespace {

// `size` bytes, the last of them before a page that nobody may touch.
class guarded {
  public:
    explicit guarded(size_t size) {
        const size_t page = sysconf(_SC_PAGESIZE), used = (size + page - 1) / page * page;
        length_ = used + page;
        pages_ = static_cast<uint8_t *>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
        if (pages_ == MAP_FAILED || mprotect(pages_ + used, page, PROT_NONE)) {
            std::perror("mmap");
            std::exit(1);
        }
        data_ = pages_ + used - size;
    }
    guarded(guarded && other) : pages_(other.pages_), data_(other.data_), length_(other.length_) { other.length_ = 0; }
    ~guarded() {
        if (length_) {
            munmap(pages_, length_);
        }
    }

    uint8_t * data() const { return data_; }

  private:
    uint8_t *pages_, *data_;
    size_t length_;
};

struct row {
    guarded memory;
    std::vector<double> numbers;

    const char * data() const { return reinterpret_cast<const char *>(memory.data()); }
};

inline row random_row(const format & f, int64_t n) {
    const int64_t blocks = n / f.elements;
    row made{guarded(blocks * f.bytes), std::vector<double>(n)};
    for (int64_t i = 0; i < blocks; i++) {
        f.make(made.memory.data() + i * f.bytes);
        f.read(made.memory.data() + i * f.bytes, made.numbers.data() + i * f.elements);
    }
    return made;
}

struct freed {
    void operator()(void * p) const { std::free(p); }
};
using aligned_memory = std::unique_ptr<char, freed>;

inline aligned_memory cache_lines(size_t size) {
    void * p = nullptr;
    return aligned_memory(posix_memalign(&p, 64, size) ? nullptr : static_cast<char *>(p));
}

// --- what is found ---

int failures = 0, checks = 0;
char at_work[64];  // the kernel being tested

inline void name_the_culprit(int) {
    const char before[] = "FAILED, read or wrote past the end: ";
    const bool told = write(STDOUT_FILENO, before, sizeof(before) - 1) + write(STDOUT_FILENO, at_work, std::strlen(at_work)) > 0;
    _exit(told ? 1 : 2);
}

inline void check(bool right, const std::string & what, double found, double bound) {
    checks++;
    if (!right && failures++ < 20) {
        std::printf("FAILED %s: %g, expected at most %g\n", what.c_str(), found, bound);
    }
}

const char * const VARIANTS[] = {"portable", "avx2", "avxvnni", "avx512", "neon", "i8mm"};

// Whether this machine runs a variant; where it does not and the program was asked for it by name, that is a failure.
inline bool runs_here(int32_t variant, int argc, char ** argv) {
    const bool runs = lzn_has_variant(variant);
    if (!runs && std::find(argv + 1, argv + argc, std::string(VARIANTS[variant])) != argv + argc) {
        std::printf("FAILED %s cannot run here\n", VARIANTS[variant]);
        failures++;
    }
    return runs;
}

// Results come line by line, and a kernel that leaves its memory is named.
inline void begin() {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    signal(SIGSEGV, name_the_culprit);
    signal(SIGBUS, name_the_culprit);
}

}  // namespace
