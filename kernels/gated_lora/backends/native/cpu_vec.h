// Sixteen floats at a time, from and to the types of activations.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

using std::int64_t;

// Sixteen floats: one AVX-512 register, or as many smaller ones as the machine needs.
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));
constexpr int64_t W = 16;

namespace {

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const float* p, int64_t n) {
  Vec v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Vec load(const BFloat16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}
inline void store(BFloat16* p, Vec v) {  // to nearest, ties to even
  Bits b = (Bits)v;
  Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  Half h = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Half);
  std::memcpy(p, &h, sizeof h);
}
#if defined(__F16C__)
inline Vec load(const Float16* p) {
  Vec v;
  for (int i = 0; i < W; i++) v[i] = _cvtsh_ss(p[i].bits);
  return v;
}
inline void store(Float16* p, Vec v) {
  for (int i = 0; i < W; i++) p[i].bits = _cvtss_sh(v[i], 0);
}
#endif
template <typename Y>
inline Vec load(const Y* p, int64_t n) {
  Y part[W] = {};
  std::memcpy(part, p, n * sizeof(Y));
  return load(part);
}
template <typename Y>
inline void store(Y* p, Vec v, int64_t n) {
  Y part[W];
  store(part, v);
  std::memcpy(p, part, n * sizeof(Y));
}

// The two halves of v, added.
template <typename Part, typename Whole>
inline Part fold(const Whole& v) {
  Part half[2];
  std::memcpy(half, &v, sizeof v);
  return half[0] + half[1];
}
inline float sum(Vec v) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  typedef float V2 __attribute__((vector_size(8)));
  return fold<float>(fold<V2>(fold<V4>(fold<V8>(v))));
}

template <typename Y>
inline void widen(float* to, const Y* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

// Calls f with a pointer of the type that `type` names: 0 float32, 1 bfloat16, 2 float16.
template <typename F>
inline void typed(int64_t type, const void* p, F f) {
  switch (type) {
    case 0: return f((float*)p);
    case 1: return f((BFloat16*)p);
#if defined(__F16C__)
    case 2: return f((Float16*)p);
#endif
  }
}

}  // namespace
