// Rows of weights that are read from files when they are asked for: a window of memory as large as the files, of which
// some pages are there. Page k of a file lies at page k of its part of the window, so a row has one address, whether it
// is there or not, and what computes with rows knows nothing of this.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "lazyneuron.h"

namespace lzn {

constexpr int64_t PAGE = 4096;           // what is read and dropped; a disk's block is no larger
constexpr int64_t RUN = 64;              // pages read at once, at most: several reads share what is wanted in a row
constexpr uint8_t ABSENT = 0, COLD = 1;  // states of a page; above: how often it may still be passed over
constexpr uint8_t HOT = 5;

// One file, opened for reading past the system's own cache where the file system allows it.
class paged_file {
  public:
    paged_file(const char * path, int64_t first_page);
    ~paged_file();
    paged_file(paged_file && other) noexcept;
    paged_file(const paged_file &) = delete;

    bool is_open() const { return fd_ >= 0; }
    int64_t first_page() const { return first_; }
    int64_t end_page() const { return first_ + pages_; }
    // Pages first .. first + n - 1 of the window, to where they lie; 0, or what went wrong: an errno, -1 where the file
    // has become shorter.
    int read(int64_t first, int64_t n, char * to) const;
    bool has_changed() const;

  private:
    int fd_ = -1;
    int64_t first_, pages_ = 0, size_ = 0, changed_ = 0;
};

class pager {
  public:
    pager(const char * const * paths, int n_files, int n_readers);
    ~pager();
    pager(const pager &) = delete;

    bool works() const { return base_ && !files_.empty(); }
    char * base() const { return base_; }
    int64_t first_page(int file) const { return files_[file].first_page(); }
    void set_limit(int64_t pages) { limit_ = pages; }
    const lzn_pager_stats & stats() const { return stats_; }
    void start_counting();
    // 0, or why nothing that was computed since may be used: an errno, -1: a file is shorter, -2: a file has changed, -3:
    // more is wanted at once than may be there.
    int take_error();

    // What is wanted from here on must be there together, until `begin` is called again.
    void begin();
    // `size` bytes at `address`; what lies elsewhere is there already.
    void want(const char * address, size_t size);
    // Reads what is missing, having dropped others. `state`: of pages that were not there.
    void fetch(uint8_t state);

  private:
    struct run {
        int64_t first, n;
    };

    bool make_room(int64_t n);
    void drop(std::vector<int64_t> & pages);
    void plan_runs();
    void read_runs();
    void work();    // one reader's thread
    void take_runs();  // reads runs until none is left
    void read_run(const run & r);
    int file_of(int64_t page) const;
    void fail(int code);

    std::vector<paged_file> files_;
    char * base_ = nullptr;
    int64_t n_pages_ = 0, limit_ = 0, hand_ = 0;
    uint32_t turn_ = 0;
    std::vector<uint8_t> states_;
    std::vector<uint32_t> wanted_;  // the turn in which a page was wanted last
    std::vector<int64_t> missing_;
    std::vector<run> runs_;
    lzn_pager_stats stats_{};
    int error_ = 0;

    std::mutex mutex_;  // of all below
    std::condition_variable more_, done_;
    std::vector<std::thread> readers_;
    size_t next_run_ = 0, unread_ = 0;
    bool ends_ = false;
};

}  // namespace lzn
