#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "loopfast.h"

namespace loopfast {
namespace {

// The library's own threads are started for the call, so that no state has to survive a fork. The caller's thread takes
// the end of the range, and all the pieces that no thread could be started for.
int32_t run_on_own_threads(int64_t begin, int64_t end, int64_t, loopfast_task task, void *state) {
  std::vector<std::thread> threads;
  int64_t next = begin;
  try {
    threads.reserve(static_cast<size_t>(end - begin));
    for (; next < end - 1; ++next) {
      threads.emplace_back([=] { task(next, next + 1, state); });
    }
  } catch (const std::exception &) {
  }
  task(next, end, state);
  for (std::thread &thread : threads) thread.join();
  return 0;
}

std::atomic<loopfast_parallel_for> host{nullptr};

struct Pieces {
  int64_t count, units;
  void (*body)(void *, int64_t, int64_t);
  void *state;
};

void run_some(int64_t begin, int64_t end, void *state) {
  const Pieces &work = *static_cast<const Pieces *>(state);
  for (int64_t piece = begin; piece < end; ++piece) {
    work.body(work.state, work.units * piece / work.count, work.units * (piece + 1) / work.count);
  }
}

}  // namespace

int64_t pieces(int32_t threads, int64_t elements) {
  const int64_t available = threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(elements / kSmallestPiece, 1, available);
}

void run_pieces(int64_t count, int64_t units, void (*body)(void *, int64_t, int64_t), void *state) {
  count = std::min(count, units);
  Pieces work{count, units, body, state};
  if (count <= 1) {
    run_some(0, count, &work);
    return;
  }
  const loopfast_parallel_for run = host.load();
  if (run == nullptr || run(0, count, 1, run_some, &work) != 0) run_on_own_threads(0, count, 1, run_some, &work);
}

}  // namespace loopfast

void loopfast_set_parallel_for(loopfast_parallel_for run) { loopfast::host.store(run); }
