// Reads pages by several threads at once, and drops those that were wanted seldom.
#include "pager.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>

#if defined(__linux__)
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace lzn {

#if defined(__linux__)

namespace {

int64_t nanoseconds(const timespec & t) { return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec; }

// Whether reads past the system's cache work here: tmpfs and some others refuse them when opened, or when read.
bool reads_directly(int fd) {
    alignas(PAGE) char page[PAGE];
    return ::pread(fd, page, PAGE, 0) > 0;
}

}  // namespace

paged_file::paged_file(const char * path, int64_t first_page) : first_(first_page) {
    fd_ = ::open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd_ >= 0 && !reads_directly(fd_)) {
        ::close(fd_);
        fd_ = -1;
    }
    if (fd_ < 0) {
        fd_ = ::open(path, O_RDONLY | O_CLOEXEC);
        if (fd_ >= 0) {
            ::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);  // what lies around a row is not wanted
        }
    }
    struct stat now;
    if (fd_ >= 0 && ::fstat(fd_, &now) == 0) {
        size_ = now.st_size;
        changed_ = nanoseconds(now.st_mtim);
        pages_ = (size_ + PAGE - 1) / PAGE;
    }
}

paged_file::~paged_file() {
    if (fd_ >= 0) {
        ::close(fd_);
    }
}

int paged_file::read(int64_t first, int64_t n, char * to) const {
    const int64_t from = (first - first_) * PAGE, wanted = std::min(n * PAGE, size_ - from);
    for (int64_t at = 0; at < wanted;) {
        // Whole pages, behind the file's end too: that is how they are read past the cache.
        const int64_t got = ::pread(fd_, to + at, n * PAGE - at, from + at);
        if (got < 0 && errno != EINTR) {
            return errno;
        }
        if (got == 0 || (got > 0 && at + got < wanted && got % PAGE)) {
            return -1;
        }
        at += std::max<int64_t>(got, 0);
    }
    return 0;
}

bool paged_file::has_changed() const {
    struct stat now;
    return ::fstat(fd_, &now) != 0 || now.st_size != size_ || nanoseconds(now.st_mtim) != changed_;
}

pager::pager(const char * const * paths, int n_files, int n_readers) {
    for (int i = 0; i < n_files; i++) {
        files_.emplace_back(paths[i], n_pages_);
        if (!files_.back().is_open()) {
            error_ = errno;
            files_.clear();
            return;
        }
        n_pages_ = files_.back().end_page();
    }
    const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void * window = ::mmap(nullptr, n_pages_ * PAGE, PROT_READ | PROT_WRITE, how, -1, 0);
    if (window == MAP_FAILED) {
        error_ = errno;
        return;
    }
    base_ = static_cast<char *>(window);
    ::madvise(base_, n_pages_ * PAGE, MADV_NOHUGEPAGE);  // a large page would hold what is not wanted
    ::madvise(base_, n_pages_ * PAGE, MADV_DONTFORK);
    states_.assign(n_pages_, ABSENT);
    wanted_.assign(n_pages_, 0);
    // Signals are for the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        for (int i = 0; i < n_readers; i++) {
            readers_.emplace_back([this] { work(); });
        }
    } catch (const std::system_error &) {  // no more threads: whoever asks reads, too
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

pager::~pager() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ends_ = true;
    }
    more_.notify_all();
    for (std::thread & reader : readers_) {
        reader.join();
    }
    if (base_) {
        ::munmap(base_, n_pages_ * PAGE);
    }
}

void pager::drop(std::vector<int64_t> & pages) {
    std::sort(pages.begin(), pages.end());
    for (size_t i = 0; i < pages.size();) {
        size_t end = i + 1;
        while (end < pages.size() && pages[end] == pages[end - 1] + 1) {
            end++;
        }
        ::madvise(base_ + pages[i] * PAGE, (end - i) * PAGE, MADV_DONTNEED);
        i = end;
    }
    stats_.dropped += pages.size();
    stats_.resident -= pages.size();
}

#else  // not built elsewhere yet: `lzn_pager_new` says so

paged_file::paged_file(const char *, int64_t first_page) : first_(first_page) {}
paged_file::~paged_file() {}
int paged_file::read(int64_t, int64_t, char *) const { return ENOSYS; }
bool paged_file::has_changed() const { return false; }
pager::pager(const char * const *, int, int) : error_(ENOSYS) {}
pager::~pager() {}
void pager::drop(std::vector<int64_t> &) {}

#endif

paged_file::paged_file(paged_file && other) noexcept
    : fd_(other.fd_), first_(other.first_), pages_(other.pages_), size_(other.size_), changed_(other.changed_) {
    other.fd_ = -1;
}

int pager::take_error() {
    for (const paged_file & file : files_) {
        if (!error_ && file.has_changed()) {
            error_ = -2;
        }
    }
    const int error = error_;
    error_ = 0;
    return error;
}

void pager::start_counting() {
    const int64_t resident = stats_.resident;
    stats_ = {};
    stats_.resident = resident;
}

void pager::begin() {
    if (++turn_ == 0) {  // after 2^32 turns
        std::fill(wanted_.begin(), wanted_.end(), 0);
        turn_ = 1;
    }
    missing_.clear();
}

void pager::want(const char * address, size_t size) {
    const int64_t at = address - base_;
    if (size == 0 || at < 0 || at >= n_pages_ * PAGE) {
        return;
    }
    const int64_t last = (at + static_cast<int64_t>(size) - 1) / PAGE;
    for (int64_t page = at / PAGE; page <= last; page++) {
        if (wanted_[page] == turn_) {
            continue;
        }
        wanted_[page] = turn_;
        stats_.wanted++;
        if (states_[page] == ABSENT) {
            missing_.push_back(page);
        } else {
            states_[page] = std::min<uint8_t>(states_[page] + 1, HOT);
        }
    }
}

void pager::fetch(uint8_t state) {
    if (missing_.empty()) {
        return;
    }
    const auto began = std::chrono::steady_clock::now();
    if (!make_room(missing_.size())) {
        return fail(-3);
    }
    plan_runs();
    read_runs();
    for (const int64_t page : missing_) {
        states_[page] = error_ ? ABSENT : state;
    }
    if (error_) {  // what could not be read holds nothing
        drop(missing_);
        stats_.resident += missing_.size();
        stats_.dropped -= missing_.size();
    } else {
        stats_.resident += missing_.size();
        stats_.read += missing_.size();
        stats_.reads += runs_.size();
    }
    const auto took = std::chrono::steady_clock::now() - began;
    stats_.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(took).count();
}

// Drops pages that are not wanted now, those first that were wanted seldom: a hand goes round and lowers each page's
// state. False where too many are wanted.
bool pager::make_room(int64_t n) {
    const int64_t surplus = stats_.resident + n - limit_;
    std::vector<int64_t> dropped;
    for (int64_t steps = 0; static_cast<int64_t>(dropped.size()) < surplus; steps++) {
        if (steps == n_pages_ * (HOT + 1)) {
            drop(dropped);
            return false;
        }
        hand_ = hand_ + 1 < n_pages_ ? hand_ + 1 : 0;
        uint8_t & state = states_[hand_];
        if (state != ABSENT && wanted_[hand_] != turn_ && --state == ABSENT) {
            dropped.push_back(hand_);
        }
    }
    drop(dropped);
    return true;
}

// Pages that follow each other are one read, within a file and up to RUN.
void pager::plan_runs() {
    std::sort(missing_.begin(), missing_.end());
    runs_.clear();
    int64_t end = 0;  // of the file that the last run is in
    for (const int64_t page : missing_) {
        const bool follows = !runs_.empty() && page < end && page == runs_.back().first + runs_.back().n;
        if (follows && runs_.back().n < RUN) {
            runs_.back().n++;
            continue;
        }
        if (page >= end) {
            end = files_[file_of(page)].end_page();
        }
        runs_.push_back({page, 1});
    }
}

int pager::file_of(int64_t page) const {
    int i = 0;
    while (page >= files_[i].end_page()) {
        i++;
    }
    return i;
}

void pager::read_run(const run & r) {
    const int code = files_[file_of(r.first)].read(r.first, r.n, base_ + r.first * PAGE);
    if (code) {
        std::lock_guard<std::mutex> lock(mutex_);
        fail(code);
    }
}

void pager::fail(int code) { error_ = error_ ? error_ : code; }

void pager::read_runs() {
    if (runs_.size() == 1) {  // nobody needs to be woken
        return read_run(runs_[0]);
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        next_run_ = 0;
        unread_ = runs_.size();
    }
    if (runs_.size() > readers_.size()) {
        more_.notify_all();
    } else {
        for (size_t i = 1; i < runs_.size(); i++) {
            more_.notify_one();
        }
    }
    take_runs();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unread_ == 0; });
    next_run_ = runs_.size();
}

void pager::take_runs() {
    for (;;) {
        size_t mine;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (unread_ == 0 || next_run_ >= runs_.size()) {
                return;
            }
            mine = next_run_++;
        }
        read_run(runs_[mine]);
        std::lock_guard<std::mutex> lock(mutex_);
        if (--unread_ == 0) {
            done_.notify_one();
        }
    }
}

void pager::work() {
    for (;;) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            more_.wait(lock, [this] { return ends_ || (unread_ > 0 && next_run_ < runs_.size()); });
            if (ends_) {
                return;
            }
        }
        take_runs();
    }
}

}  // namespace lzn
