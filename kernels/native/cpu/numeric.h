// Arithmetic without branches, for loops that a compiler turns into vector instructions.
//
// Every operation is an IEEE operation that rounds once (no contraction to fused multiply-adds except where
// multiply_add asks for one), so that all instruction sets give the same bits. The namespace is unnamed, so that each
// instruction set keeps its own copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

inline float from_float16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  // The product shifts the exponent's bias and normalizes subnormals, exactly.
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return as_float(bits | (half & 0x8000u) << 16);
}

// To nearest, ties to even.
inline uint16_t to_float16(float value) {
  const uint32_t sign = as_bits(value) >> 16 & 0x8000;
  const uint32_t bits = as_bits(value) & 0x7fffffff;
  const uint32_t normal = (bits + 0x0fff + (bits >> 13 & 1) - 0x38000000) >> 13;
  // Added to 1/2, a subnormal's last place becomes the sum's: the addition rounds it.
  const uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000;
  uint32_t half = bits < 0x38800000 ? subnormal : normal;
  half = bits >= 0x477ff000 ? 0x7c00 : half;
  half = bits > 0x7f800000 ? 0x7e00 | (bits >> 13 & 0x3ff) : half;
  return static_cast<uint16_t>(sign | half);
}

// A word rounded to the nearest float. Most processors convert signed integers only: for them the word is converted in
// halves, which are exact, and their sum rounds once.
inline float from_word(uint32_t word) {
#if defined(__AVX512F__)
  return static_cast<float>(word);
#else
  const float high = static_cast<float>(static_cast<int32_t>(word >> 16));
  const float low = static_cast<float>(static_cast<int32_t>(word & 0xffff));
  return high * 65536.0f + low;
#endif
}

// ln x for x in [2^-33, 1], to 0.7 ulp: x = 2^e (1 + f) with f in [-0.29, 0.41], and a polynomial in f.
// Coefficients of Moshier's Cephes library (logf).
inline float log_of_uniform(float x) {
  const uint32_t offset = as_bits(x) - 0x3f3504f3;  // bits of sqrt(1/2)
  const int32_t exponent = static_cast<int32_t>(offset) >> 23;
  const float f = as_float((offset & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float square = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  // ln 2 has two parts, the first with few enough bits for an exact product. The rounding error of its sum with f is
  // added to the small terms.
  const float product = e * 0.693359375f;
  const float high = product + f;
  const float lost = (product - high) + f;
  return high + (lost + (f * square * p + e * -2.12194440e-4f - 0.5f * square));
}

// a b + c, rounded once.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in float64. A sum that is not exact is moved to its odd neighbor, in the direction of the
  // rounding error, so that the second rounding sees on which side of a tie the exact sum lies.
  const double product = static_cast<double>(a) * static_cast<double>(b), addend = static_cast<double>(c);
  const double sum = product + addend;
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (addend - part);
  int64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const int64_t away = (lost > 0.0) == (sum > 0.0) ? 1 : -1;
  bits += (bits & 1) == 0 && (lost > 0.0 || lost < 0.0) ? away : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
#endif
}

// e^x to 3 ulp, with x clamped to +-87: beyond it a sigmoid in float32 does not change. x = n ln 2 + r with
// |r| <= ln 2 / 2, and the polynomial of fifth degree in r with the least error relative to e^r.
inline float exp_for_sigmoid(float x) {
  // The clamp is one of integers: for a branch on x the compiler would compute one side beforehand, and blend.
  const uint32_t magnitude = as_bits(x) & 0x7fffffff, limit = 0x42ae0000;  // 87
  x = as_float((magnitude < limit ? magnitude : limit) | (as_bits(x) & 0x80000000));
  // Adding a number to 1.5 2^23 rounds it to a whole number, in the sum's last places.
  const float shifted = multiply_add(x, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = multiply_add(n, -0.693147182f, x);
  float p = 8.290272206e-3f;
  p = multiply_add(p, r, 4.189816117e-2f);
  p = multiply_add(p, r, 1.666763872e-1f);
  p = multiply_add(p, r, 4.999914765e-1f);
  p = multiply_add(p, r, 9.999997020e-1f);
  p = multiply_add(p, r, 1.0f);
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

// 1 / x for x in [1, 2^126], to 1 ulp; a division takes longer than the rest of a sigmoid. The difference of the bits
// is right to 5.1 %; one step cubes that error and one squares it.
inline float reciprocal(float x) {
  float r = as_float(0x7ef31000 - as_bits(x));
  const float cubed = multiply_add(-x, r, 1.0f);
  r = multiply_add(r, multiply_add(cubed, cubed, cubed), r);
  return multiply_add(r, multiply_add(-x, r, 1.0f), r);
}

// sin and cos of an angle in [0, 2 pi], to 0.7 ulp. The angle less the nearest multiple of pi/2 is x + tail; the
// polynomials have the coefficients of Moshier's Cephes library (sinf, cosf).
inline void sine_and_cosine(float angle, float &sine, float &cosine) {
  const int32_t quadrant = static_cast<int32_t>(angle * 0.636619772f + 0.5f);
  const float q = static_cast<float>(quadrant);
  // pi/2 has three parts. The first two have 22 bits: their products with q <= 4 are exact, and so is the difference.
  const float difference = angle - q * (0x3243F6 * 0x1p-21f);
  const float middle = q * (0x2A2216 * 0x1p-43f);
  const float x = difference - middle;
  const float tail = ((difference - x) - middle) - q * 6.223372e-14f;
  const float square = x * x;
  const float p = (-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f;
  const float s = x + (p * square * x + tail);
  const float r = (2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
  const float half = 0.5f * square, rest = 1.0f - half;
  const float c = rest + (((1.0f - rest) - half) + (r * (square * square) - x * tail));
  const bool swapped = (quadrant & 1) != 0;
  const uint32_t sine_sign = static_cast<uint32_t>(quadrant & 2) << 30;
  const uint32_t cosine_sign = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
  sine = as_float(as_bits(swapped ? c : s) ^ sine_sign);
  cosine = as_float(as_bits(swapped ? s : c) ^ cosine_sign);
}

// The multipliers of Philox4x32, and the increments of its keys.
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kIncrement0 = 0x9E3779B9u, kIncrement1 = 0xBB67AE85u;

// Ten rounds of Philox4x32.
inline void philox(uint32_t x[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(x[0]) * kMultiplier0;
    const uint64_t product1 = static_cast<uint64_t>(x[2]) * kMultiplier1;
    x[0] = static_cast<uint32_t>(product1 >> 32) ^ x[1] ^ k0;
    x[2] = static_cast<uint32_t>(product0 >> 32) ^ x[3] ^ k1;
    x[1] = static_cast<uint32_t>(product1);
    x[3] = static_cast<uint32_t>(product0);
    k0 += kIncrement0;
    k1 += kIncrement1;
  }
}

}  // namespace
