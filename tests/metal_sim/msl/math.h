// Metal's math, integer, relational and geometric functions. Precise everywhere: fast:: and precise:: are the same
// here. The bfloat overloads that return bfloat are those that MLX puts before every kernel (bf16_math.h).
#pragma once
#include "types.h"

namespace metal {
#define MSL_LIFT1(name) \
  template <class V> msl::if_vector<V> name(V x) { V r; for (int i = 0; i < msl::count<V>; i++) r[i] = name((msl::elem<V>)x[i]); return r; }
#define MSL_LIFT2(name) \
  template <class V> msl::if_vector<V> name(V x, V y) { V r; for (int i = 0; i < msl::count<V>; i++) r[i] = name((msl::elem<V>)x[i], (msl::elem<V>)y[i]); return r; }
#define MSL_LIFT3(name) \
  template <class V> msl::if_vector<V> name(V x, V y, V z) { V r; for (int i = 0; i < msl::count<V>; i++) r[i] = name((msl::elem<V>)x[i], (msl::elem<V>)y[i], (msl::elem<V>)z[i]); return r; }

#define MSL_FLOAT1(name, expr)                                     \
  inline float name(float x) { return expr; }                      \
  inline half name(half h) { float x = h; return (half)(expr); }   \
  inline bfloat name(bfloat h) { float x = h; return (bfloat)(expr); } \
  MSL_LIFT1(name)
MSL_FLOAT1(exp, __builtin_expf(x)) MSL_FLOAT1(exp2, __builtin_exp2f(x)) MSL_FLOAT1(exp10, __builtin_powf(10.0f, x))
MSL_FLOAT1(log, __builtin_logf(x)) MSL_FLOAT1(log2, __builtin_log2f(x)) MSL_FLOAT1(log10, __builtin_log10f(x))
MSL_FLOAT1(sqrt, __builtin_sqrtf(x)) MSL_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_FLOAT1(sin, __builtin_sinf(x)) MSL_FLOAT1(cos, __builtin_cosf(x)) MSL_FLOAT1(tan, __builtin_tanf(x))
MSL_FLOAT1(asin, __builtin_asinf(x)) MSL_FLOAT1(acos, __builtin_acosf(x)) MSL_FLOAT1(atan, __builtin_atanf(x))
MSL_FLOAT1(sinh, __builtin_sinhf(x)) MSL_FLOAT1(cosh, __builtin_coshf(x)) MSL_FLOAT1(tanh, __builtin_tanhf(x))
MSL_FLOAT1(floor, __builtin_floorf(x)) MSL_FLOAT1(ceil, __builtin_ceilf(x)) MSL_FLOAT1(trunc, __builtin_truncf(x))
MSL_FLOAT1(round, __builtin_roundf(x)) MSL_FLOAT1(rint, __builtin_rintf(x)) MSL_FLOAT1(fabs, __builtin_fabsf(x))
MSL_FLOAT1(fract, x - __builtin_floorf(x)) MSL_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MSL_FLOAT1(sign, (float)((x > 0) - (x < 0)))

#define MSL_FLOAT2(name, expr)                                                                  \
  inline float name(float x, float y) { return expr; }                                          \
  inline half name(half a, half b) { float x = a, y = b; return (half)(expr); }                 \
  inline bfloat name(bfloat a, bfloat b) { float x = a, y = b; return (bfloat)(expr); }         \
  MSL_LIFT2(name)
MSL_FLOAT2(pow, __builtin_powf(x, y)) MSL_FLOAT2(powr, __builtin_powf(x, y)) MSL_FLOAT2(atan2, __builtin_atan2f(x, y))
MSL_FLOAT2(fmin, __builtin_fminf(x, y)) MSL_FLOAT2(fmax, __builtin_fmaxf(x, y)) MSL_FLOAT2(fmod, __builtin_fmodf(x, y))
MSL_FLOAT2(copysign, __builtin_copysignf(x, y)) MSL_FLOAT2(step, y < x ? 0.0f : 1.0f)

#define MSL_FMA(T) inline T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); }
MSL_FMA(float) MSL_FMA(half) MSL_FMA(bfloat) MSL_LIFT3(fma)
inline float mix(float a, float b, float t) { return a + (b - a) * t; }
inline half mix(half a, half b, half t) { return a + (b - a) * t; }
MSL_LIFT3(mix)
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline half ldexp(half x, int e) { return (half)__builtin_ldexpf((float)x, e); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }

#define MSL_ORDER(T)                                            \
  inline T min(T a, T b) { return b < a ? b : a; }              \
  inline T max(T a, T b) { return a < b ? b : a; }              \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_ORDER(char) MSL_ORDER(signed char) MSL_ORDER(uchar) MSL_ORDER(short) MSL_ORDER(ushort) MSL_ORDER(int)
MSL_ORDER(uint) MSL_ORDER(long) MSL_ORDER(ulong) MSL_ORDER(float) MSL_ORDER(half) MSL_ORDER(bfloat)
MSL_LIFT2(min) MSL_LIFT2(max) MSL_LIFT3(clamp)
inline float max3(float a, float b, float c) { return max(max(a, b), c); }
inline float min3(float a, float b, float c) { return min(min(a, b), c); }
#define MSL_ABS(T) inline T abs(T x) { return x < (T)0 ? (T)-x : x; }
MSL_ABS(short) MSL_ABS(int) MSL_ABS(long) MSL_ABS(float) MSL_ABS(half) MSL_ABS(bfloat) MSL_LIFT1(abs)

// ---- integers
#define MSL_INT1(name, expr32) inline uint name(uint x) { return expr32; } inline int name(int v) { uint x = v; return expr32; }
MSL_INT1(popcount, __builtin_popcount(x)) MSL_INT1(clz, x ? __builtin_clz(x) : 32) MSL_INT1(ctz, x ? __builtin_ctz(x) : 32)
MSL_INT1(reverse_bits, __builtin_bitreverse32(x))
inline uint rotate(uint x, uint n) { return __builtin_rotateleft32(x, n); }
inline uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
inline int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
inline uint mad24(uint a, uint b, uint c) { return a * b + c; }
inline uint extract_bits(uint x, uint at, uint n) { return n == 0 ? 0 : n >= 32 ? x >> at : (x >> at) & ((1u << n) - 1); }
inline int extract_bits(int x, uint at, uint n) { return n == 0 ? 0 : (int)((uint)x << (32 - at - n)) >> (32 - n); }
inline uint insert_bits(uint base, uint v, uint at, uint n) {
  uint m = n >= 32 ? ~0u : ((1u << n) - 1) << at;
  return (base & ~m) | ((v << at) & m);
}

// ---- vectors
template <class V> msl::if_vector<V, msl::elem<V>> dot(V a, V b) {
  msl::elem<V> s = 0;
  for (int i = 0; i < msl::count<V>; i++) s += a[i] * b[i];
  return s;
}
template <class V> msl::if_vector<V, msl::elem<V>> length(V a) { return sqrt(dot(a, a)); }
template <class V> msl::if_vector<V> normalize(V a) { return a * rsqrt(dot(a, a)); }
template <class T> msl::if_scalar<T> select(T a, T b, bool c) { return c ? b : a; }
template <class V, class C> msl::if_vector<V> select(V a, V b, C c) {
  V r;
  for (int i = 0; i < msl::count<V>; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
inline bool any(bool c) { return c; }
inline bool all(bool c) { return c; }
template <class V> msl::if_vector<V, bool> any(V c) { bool r = false; for (int i = 0; i < msl::count<V>; i++) r |= c[i] != 0; return r; }
template <class V> msl::if_vector<V, bool> all(V c) { bool r = true; for (int i = 0; i < msl::count<V>; i++) r &= c[i] != 0; return r; }

inline float4 unpack_unorm4x8_to_float(uint x) { return msl::make<float4>(x & 255u, x >> 8 & 255u, x >> 16 & 255u, x >> 24) / 255.0f; }

#define MSL_SAME(ns)                                                                                               \
  namespace ns {                                                                                                   \
  using metal::exp; using metal::exp2; using metal::log; using metal::log2; using metal::sqrt; using metal::rsqrt; \
  using metal::sin; using metal::cos; using metal::tan; using metal::tanh; using metal::pow; using metal::powr;    \
  using metal::fabs; using metal::floor; using metal::ceil; using metal::fma; using metal::fmin; using metal::fmax; \
  using metal::min; using metal::max; using metal::clamp; using metal::round; using metal::rint; using metal::atan2; \
  inline float divide(float a, float b) { return a / b; }                                                          \
  }
MSL_SAME(precise)
MSL_SAME(fast)
}  // namespace metal
