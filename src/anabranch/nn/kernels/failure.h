// How a kernel tells that it could not do its work. An exception that left a function of the C ABI or a parallel region would end the
// process; so it stops here and becomes the status that the function returns. Included by the kernels beside.

#pragma once

#include <atomic>

namespace {

enum Status : int { DONE = 0, NO_MEMORY = 1, OUT_OF_RANGE = 2 };  // mirrored by binding.py

// Of one call, for all of its threads.
class Failure {
 public:
  bool happened() const { return status_.load(std::memory_order_relaxed) != DONE; }
  int status() const { return status_; }

  // Do this unless something has failed before: what allocates inside of a parallel region.
  template <class Work>
  void guard(Work work) noexcept {
    if (happened()) return;
    try {
      work();
    } catch (...) {  // std::bad_alloc or std::length_error: nothing else is thrown
      status_ = NO_MEMORY;
    }
  }

 private:
  std::atomic<int> status_{DONE};
};

// What `work` returns, or NO_MEMORY.
template <class Work>
int status_of(Work work) noexcept {
  try {
    return work();
  } catch (...) {
    return NO_MEMORY;
  }
}

}  // namespace
