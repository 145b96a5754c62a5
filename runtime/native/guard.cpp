#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#else
#include <unistd.h>
#endif

#include "lazyneuron.h"

namespace {

// Neither destructors nor exit handlers: other threads are still inside of ggml.
[[noreturn]] void leave(const char * what) {
    // ggml's message begins with the folder that it was built in.
    const char * slash = std::strrchr(what, '/');
    const char * shown = slash && std::strchr(slash, ':') ? slash + 1 : what;
    char line[1024];
    const int n = std::snprintf(line, sizeof line, "error: ggml gave up: %s\nhint: LAZYNEURON_LOG=1 shows what ggml says before; --device none computes without a device\n", shown);
    std::fflush(stdout);
    std::fwrite(line, 1, n < static_cast<int>(sizeof line) ? n : sizeof line - 1, stderr);
    std::fflush(stderr);
    _exit(1);
}

[[noreturn]] void on_terminate() {
    try {
        if (const std::exception_ptr thrown = std::current_exception()) {
            std::rethrow_exception(thrown);
        }
    } catch (const std::exception & error) {
        leave(error.what());
    } catch (...) {
    }
    leave("an exception of unknown type");
}

}  // namespace

void lzn_on_abort(const char * message) { leave(message); }
void lzn_guard(void) { std::set_terminate(on_terminate); }
