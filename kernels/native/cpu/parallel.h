// Cuts work into pieces and runs them on the available threads.
#pragma once

#include <cstdint>

namespace loopfast {

// A piece of fewer elements is not worth waking up a thread.
constexpr int64_t kSmallestPiece = 16384;

// Returns the number of pieces, at most `threads`, that `elements` elements are worth.
int64_t pieces(int32_t threads, int64_t elements);

// Calls body(begin, end) on `count` consecutive ranges that cover [0, units), all at once if possible.
void run_pieces(int64_t count, int64_t units, void (*body)(void *state, int64_t begin, int64_t end), void *state);

template <class Body>
void parallel(int64_t count, int64_t units, Body &&body) {
  run_pieces(
      count, units,
      [](void *state, int64_t begin, int64_t end) { (*static_cast<Body *>(state))(begin, end); },
      const_cast<void *>(static_cast<const void *>(&body)));
}

}  // namespace loopfast
