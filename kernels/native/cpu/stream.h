// Stores that go to memory past the caches.
#pragma once

#include <cstdint>
#include <cstring>

#include "intrinsics.h"

namespace {

#if defined(__AVX2__)

// Copies bytes from an aligned source. If the target is not aligned, and at its end, ordinary stores do it.
inline void stream(void *to, const void *from, int64_t bytes) {
  char *target = static_cast<char *>(to);
  const char *source = static_cast<const char *>(from);
  int64_t at = 0;
  if (reinterpret_cast<uintptr_t>(target) % 32 == 0) {
    for (; at + 32 <= bytes; at += 32) {
      const __m256i *vector = reinterpret_cast<const __m256i *>(source + at);
      _mm256_stream_si256(reinterpret_cast<__m256i *>(target + at), _mm256_load_si256(vector));
    }
  }
  std::memcpy(target + at, source + at, static_cast<size_t>(bytes - at));
}

// Has to be called before another thread reads the streamed bytes.
inline void finish_stream() { _mm_sfence(); }

#else

inline void stream(void *to, const void *from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
inline void finish_stream() {}

#endif

}  // namespace
