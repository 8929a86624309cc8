// Reading a part of a file past the page cache, in one call that holds no lock of the interpreter: threads that load experts would
// otherwise wait for their turn after each piece while another computes.

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <sys/types.h>
#include <unistd.h>

namespace {
constexpr int64_t BLOCK = 4096;  // as in direct.py
}

// `handle` was opened with O_DIRECT, `buffer` holds `chunk` bytes; both it and `chunk` are whole blocks. Returns the bytes read, fewer
// than `length` where the file ends, or -errno.
extern "C" int64_t anabranch_read_direct(
    int handle, int64_t offset, int64_t length, char *into, char *buffer, int64_t chunk) {
    int64_t done = 0;
    while (done < length) {
        const int64_t first = (offset + done) / BLOCK * BLOCK, skipped = offset + done - first;
        const int64_t whole = (skipped + length - done + BLOCK - 1) / BLOCK * BLOCK;
        const ssize_t got = pread(handle, buffer, static_cast<size_t>(whole < chunk ? whole : chunk), first);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -static_cast<int64_t>(errno);
        if (got <= skipped) break;
        const int64_t count = got - skipped < length - done ? got - skipped : length - done;
        std::memcpy(into + done, buffer + skipped, static_cast<size_t>(count));
        done += count;
    }
    return done;
}
