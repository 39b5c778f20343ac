// Philox4x32 on as many counters as a vector has lanes. Compilers turn the 32 x 32 -> 64 bit products into slow 64-bit
// multiplications, although the processor has an instruction for such products.
#pragma once

#include "intrinsics.h"
#include "numeric.h"

namespace {

#if defined(__AVX512F__)

constexpr int kPhiloxLanes = 16;
using Words = __m512i;

inline Words splat(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
inline Words count_from(uint32_t first) {
  return _mm512_add_epi32(splat(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
inline Words exclusive_or(Words a, Words b, Words c) { return _mm512_xor_si512(_mm512_xor_si512(a, b), c); }
inline void multiply(Words x, Words by, Words &high, Words &low) {
  const Words even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
inline void put(uint32_t *to, Words words) { _mm512_store_si512(to, words); }

#elif defined(__AVX2__)

constexpr int kPhiloxLanes = 8;
using Words = __m256i;

inline Words splat(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
inline Words count_from(uint32_t first) {
  return _mm256_add_epi32(splat(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Words exclusive_or(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void multiply(Words x, Words by, Words &high, Words &low) {
  const Words even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
inline void put(uint32_t *to, Words words) { _mm256_store_si256(reinterpret_cast<__m256i *>(to), words); }

#endif

#if defined(__AVX2__)

// Writes the words of kPhiloxLanes counters from `first`, word by word, into arrays that are aligned to a vector.
inline void philox_block(uint32_t first, uint32_t step, uint32_t k0, uint32_t k1, uint32_t *const words[4]) {
  const Words multiplier0 = splat(kMultiplier0), multiplier1 = splat(kMultiplier1);
  Words x0 = count_from(first), x1 = splat(step), x2 = splat(0), x3 = splat(0);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply(x0, multiplier0, high0, low0);
    multiply(x2, multiplier1, high1, low1);
    x0 = exclusive_or(high1, x1, splat(k0));
    x2 = exclusive_or(high0, x3, splat(k1));
    x1 = low1;
    x3 = low0;
    k0 += kIncrement0;
    k1 += kIncrement1;
  }
  put(words[0], x0);
  put(words[1], x1);
  put(words[2], x2);
  put(words[3], x3);
}

#else

constexpr int kPhiloxLanes = 1;

inline void philox_block(uint32_t first, uint32_t step, uint32_t k0, uint32_t k1, uint32_t *const words[4]) {
  uint32_t x[4] = {first, step, 0, 0};
  philox(x, k0, k1);
  for (int word = 0; word < 4; ++word) *words[word] = x[word];
}

#endif

}  // namespace
