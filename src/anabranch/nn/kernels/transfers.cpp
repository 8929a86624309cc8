// Threads that copy pieces of files or of memory to where they are wanted, beside an interpreter that need not know: they take the next
// transfer the moment one has ended. Urgent transfers go first; one that nobody waits for yet begins when none is urgent, and alone.

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <sys/types.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <utility>
#include <vector>

#include "failure.h"

extern "C" int64_t anabranch_read_direct(int, int64_t, int64_t, char *, char *, int64_t);

namespace {

constexpr int64_t BLOCK = 4096, CHUNK = 4 << 20;  // as in direct.py
constexpr int64_t CANCELLED = -1;                  // what a transfer ended with; else 0 or an errno
enum Kind : int64_t { MEMORY = 0, CACHED = 1, DIRECT = 2 };

struct Piece {  // as in transfers.py
  int64_t kind, handle;  // of a file
  int64_t from, bytes;   // an address of memory, an offset of a file
  char *target;
};

struct Transfer {
  int64_t id;
  bool urgent, cancelled = false;
  std::vector<Piece> pieces;
};

struct Buffer {  // of a thread, for reads past the page cache
  char *data = static_cast<char *>(std::aligned_alloc(BLOCK, CHUNK));
  ~Buffer() { std::free(data); }
};

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

class Transfers {
 public:
  Transfers(int64_t threads, double seconds_per_byte) : seconds_per_byte_(seconds_per_byte) {
    try {
      for (int64_t n = 0; n < threads; ++n) threads_.emplace_back([this] { run(); });
    } catch (...) {  // the destructor does not run then, and threads that nobody joins end the process
      stop();
      throw;
    }
  }

  ~Transfers() { stop(); }

  void stop() {
    Lock one_at_a_time(stopping_);
    {
      Lock lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    ended_.notify_all();
    idle_.notify_all();
    for (auto &thread : threads_) thread.join();
    threads_.clear();
    Lock lock(mutex_);
    left_.wait(lock, [&] { return inside_ == 0; });  // whoever is in `wait` or `feed` still looks at this
  }

  void begin(int64_t id, bool urgent, const Piece *pieces, int64_t count) {
    auto made = std::make_unique<Transfer>();
    made->id = id, made->urgent = urgent, made->pieces.assign(pieces, pieces + count);
    {
      Lock lock(mutex_);
      waiting_.push_back(std::move(made));
    }
    work_.notify_one();
  }

  void change(int64_t id, bool urgent, bool cancelled) {
    Lock lock(mutex_);
    for (Transfer *one : running_)
      if (one->id == id) one->urgent = urgent, one->cancelled = cancelled;
    for (auto one = waiting_.begin(); one != waiting_.end(); ++one) {
      if ((*one)->id != id) continue;
      (*one)->urgent = urgent;
      if (cancelled) {
        endings_.emplace_back(id, CANCELLED);
        waiting_.erase(one);
        tell(lock);
        return;
      }
      break;
    }
    lock.unlock();
    work_.notify_one();
  }

  // Until more than `seen` have ended, pokes included.
  int64_t wait(int64_t seen, double seconds) {
    Lock lock(mutex_);
    ++computing_, ++inside_;
    ended_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return count_ > seen || closing_; });
    --computing_;
    leave();
    return count_;
  }

  // Until `kick`, or until something ends while nobody is in `wait`. Returns whether all is over.
  bool feed() {
    Lock lock(mutex_);
    ++inside_;
    idle_.wait(lock, [&] { return kicked_ || closing_; });
    kicked_ = false;
    leave();
    return closing_;
  }

  void kick() {
    {
      Lock lock(mutex_);
      kicked_ = true;
    }
    idle_.notify_one();
  }

  void poke() {
    Lock lock(mutex_);
    tell(lock);
  }

  int64_t take(int64_t *ids, int64_t *results, int64_t room, int64_t *count) {
    Lock lock(mutex_);
    int64_t taken = 0;
    for (; taken < room && !endings_.empty(); ++taken) {
      std::tie(ids[taken], results[taken]) = endings_.front();
      endings_.pop_front();
    }
    *count = count_ - static_cast<int64_t>(endings_.size());
    return taken;
  }

 private:
  void leave() {
    if (--inside_ == 0) left_.notify_all();
  }

  void tell(Lock &lock) {
    ++count_;
    const bool someone = computing_ > 0;
    if (!someone) kicked_ = true;
    lock.unlock();
    (someone ? ended_ : idle_).notify_all();
  }

  std::unique_ptr<Transfer> next() {
    auto found = waiting_.begin();
    while (found != waiting_.end() && !(*found)->urgent) ++found;
    if (found == waiting_.end()) {
      if (!running_.empty() || waiting_.empty()) return nullptr;
      found = waiting_.begin();
    }
    auto taken = std::move(*found);
    waiting_.erase(found);
    return taken;
  }

  void run() {
    Buffer buffer;
    Lock lock(mutex_);
    for (;;) {
      std::unique_ptr<Transfer> one;
      work_.wait(lock, [&] { return closing_ || (one = next()) != nullptr; });
      if (one == nullptr) return;
      running_.push_back(one.get());
      lock.unlock();
      const int64_t result = seconds_per_byte_ > 0 ? paced(*one, buffer) : moved(*one, buffer, [](int64_t) {});
      lock.lock();
      running_.remove(one.get());
      endings_.emplace_back(one->id, result);
      tell(lock);
      work_.notify_one();  // what was held back may begin
      lock.lock();
    }
  }

  // As over a wire: one at a time, each of its pieces in the time that its bytes take.
  int64_t paced(const Transfer &one, Buffer &buffer) {
    Lock wire(wire_);
    const auto start = Clock::now();
    return moved(one, buffer, [&](int64_t bytes) {
      std::this_thread::sleep_until(start + std::chrono::duration<double>(seconds_per_byte_ * bytes));
    });
  }

  // `after` is called behind each piece, with the bytes so far.
  template <typename After>
  int64_t moved(const Transfer &one, Buffer &buffer, After after) {
    int64_t bytes = 0;
    for (const Piece &piece : one.pieces) {
      if (is_cancelled(one)) return CANCELLED;
      if (piece.kind == MEMORY) {
        std::memcpy(piece.target, reinterpret_cast<const char *>(piece.from), static_cast<size_t>(piece.bytes));
      } else {
        const int64_t got = piece.kind == DIRECT ? direct(piece, buffer) : cached(piece);
        if (got != piece.bytes) return got < 0 ? -got : EIO;
      }
      after(bytes += piece.bytes);
    }
    return 0;
  }

  bool is_cancelled(const Transfer &one) {
    Lock lock(mutex_);
    return one.cancelled;
  }

  static int64_t direct(const Piece &piece, Buffer &buffer) {
    if (buffer.data == nullptr) return -ENOMEM;
    const auto place = reinterpret_cast<uintptr_t>(piece.target);
    if ((piece.from | piece.bytes | static_cast<int64_t>(place)) % BLOCK == 0) {  // straight to its place
      for (int64_t done = 0; done < piece.bytes;) {
        const auto left = static_cast<size_t>(piece.bytes - done);
        const ssize_t got = pread(static_cast<int>(piece.handle), piece.target + done, left, piece.from + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? -static_cast<int64_t>(errno) : done;
        done += got;
      }
      return piece.bytes;
    }
    return anabranch_read_direct(
        static_cast<int>(piece.handle), piece.from, piece.bytes, piece.target, buffer.data, CHUNK);
  }

  static int64_t cached(const Piece &piece) {
    int64_t done = 0;
    while (done < piece.bytes) {
      const ssize_t got = pread(
          static_cast<int>(piece.handle), piece.target + done, static_cast<size_t>(piece.bytes - done), piece.from + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return -static_cast<int64_t>(errno);
      if (got == 0) break;
      done += got;
    }
    return done;
  }

  std::mutex mutex_, wire_, stopping_;
  std::condition_variable work_, ended_, idle_, left_;
  std::list<std::unique_ptr<Transfer>> waiting_;
  std::list<Transfer *> running_;
  std::deque<std::pair<int64_t, int64_t>> endings_;
  int64_t count_ = 0, computing_ = 0, inside_ = 0;
  bool closing_ = false, kicked_ = false;
  const double seconds_per_byte_;
  std::vector<std::thread> threads_;
};

}  // namespace

extern "C" {

void *anabranch_transfers_new(int64_t threads, double seconds_per_byte) {
  try {
    return new Transfers(threads, seconds_per_byte);
  } catch (...) {  // no memory, or no more threads
    return nullptr;
  }
}

void anabranch_transfers_delete(void *transfers) { delete static_cast<Transfers *>(transfers); }

void anabranch_transfers_stop(void *transfers) { static_cast<Transfers *>(transfers)->stop(); }

int anabranch_transfers_begin(void *transfers, int64_t id, int urgent, const void *pieces, int64_t count) {
  return status_of([&] {
    static_cast<Transfers *>(transfers)->begin(id, urgent != 0, static_cast<const Piece *>(pieces), count);
    return DONE;
  });
}

void anabranch_transfers_change(void *transfers, int64_t id, int urgent, int cancelled) {
  static_cast<Transfers *>(transfers)->change(id, urgent != 0, cancelled != 0);
}

int64_t anabranch_transfers_wait(void *transfers, int64_t seen, double seconds) {
  return static_cast<Transfers *>(transfers)->wait(seen, seconds);
}

int anabranch_transfers_feed(void *transfers) {
  return static_cast<Transfers *>(transfers)->feed();
}

void anabranch_transfers_kick(void *transfers) { static_cast<Transfers *>(transfers)->kick(); }

void anabranch_transfers_poke(void *transfers) { static_cast<Transfers *>(transfers)->poke(); }

int64_t anabranch_transfers_take(void *transfers, int64_t *ids, int64_t *results, int64_t room, int64_t *count) {
  return static_cast<Transfers *>(transfers)->take(ids, results, room, count);
}

}  // extern "C"
