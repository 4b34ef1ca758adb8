// Metal's math, common, integer, relational and geometric functions: declarations, with the overloads that Metal has.
// They are functions, not templates, so that calls with mixed types are ambiguous and numbers become vectors. There
// are none for bfloat: one converts to float (MLX's preamble adds its own).
#pragma once
#include "types.h"

namespace msl {
template <class T> using if_bfloat = ::metal::enable_if_t<__is_same(T, __bf16), float>;
}
namespace metal {
#define MSL_EACH_FLOAT(F, name) \
  F(name, float) F(name, float2) F(name, float3) F(name, float4) F(name, half) F(name, half2) F(name, half3) F(name, half4)
#define MSL_EACH_INT(F, name)                                                                                        \
  F(name, char) F(name, char2) F(name, char3) F(name, char4) F(name, uchar) F(name, uchar2) F(name, uchar3)         \
  F(name, uchar4) F(name, short) F(name, short2) F(name, short3) F(name, short4) F(name, ushort) F(name, ushort2)   \
  F(name, ushort3) F(name, ushort4) F(name, int) F(name, int2) F(name, int3) F(name, int4) F(name, uint)            \
  F(name, uint2) F(name, uint3) F(name, uint4) F(name, long) F(name, long2) F(name, long3) F(name, long4)           \
  F(name, ulong) F(name, ulong2) F(name, ulong3) F(name, ulong4) F(name, signed char)
#define MSL_1(name, T) T name(T);
#define MSL_2(name, T) T name(T, T);
#define MSL_3(name, T) T name(T, T, T);
#define MSL_FLOAT1(name) MSL_EACH_FLOAT(MSL_1, name) template <class B> msl::if_bfloat<B> name(B);
#define MSL_FLOAT2(name) MSL_EACH_FLOAT(MSL_2, name) template <class B> msl::if_bfloat<B> name(B, B);
#define MSL_FLOAT3(name) MSL_EACH_FLOAT(MSL_3, name) template <class B> msl::if_bfloat<B> name(B, B, B);

#define MSL_MATH                                                                                             \
  MSL_FLOAT1(acos) MSL_FLOAT1(acosh) MSL_FLOAT1(asin) MSL_FLOAT1(asinh) MSL_FLOAT1(atan) MSL_FLOAT1(atanh)    \
  MSL_FLOAT1(ceil) MSL_FLOAT1(cos) MSL_FLOAT1(cosh) MSL_FLOAT1(cospi) MSL_FLOAT1(exp) MSL_FLOAT1(exp2)        \
  MSL_FLOAT1(exp10) MSL_FLOAT1(fabs) MSL_FLOAT1(floor) MSL_FLOAT1(fract) MSL_FLOAT1(log) MSL_FLOAT1(log2)     \
  MSL_FLOAT1(log10) MSL_FLOAT1(rint) MSL_FLOAT1(round) MSL_FLOAT1(rsqrt) MSL_FLOAT1(sin) MSL_FLOAT1(sinh)     \
  MSL_FLOAT1(sinpi) MSL_FLOAT1(sqrt) MSL_FLOAT1(tan) MSL_FLOAT1(tanh) MSL_FLOAT1(tanpi) MSL_FLOAT1(trunc)     \
  MSL_FLOAT1(abs) MSL_FLOAT1(saturate) MSL_FLOAT1(sign)                                                      \
  MSL_FLOAT2(atan2) MSL_FLOAT2(copysign) MSL_FLOAT2(fdim) MSL_FLOAT2(fmax) MSL_FLOAT2(fmin) MSL_FLOAT2(fmod)  \
  MSL_FLOAT2(nextafter) MSL_FLOAT2(pow) MSL_FLOAT2(powr) MSL_FLOAT2(max) MSL_FLOAT2(min) MSL_FLOAT2(step)     \
  MSL_FLOAT2(divide)                                                                                         \
  MSL_FLOAT3(fma) MSL_FLOAT3(fmax3) MSL_FLOAT3(fmin3) MSL_FLOAT3(fmedian3) MSL_FLOAT3(max3) MSL_FLOAT3(min3)  \
  MSL_FLOAT3(median3) MSL_FLOAT3(clamp) MSL_FLOAT3(mix) MSL_FLOAT3(smoothstep)                                \
  MSL_OUT(sincos, float, float) MSL_OUT(sincos, half, half) MSL_OUT(modf, float, float) MSL_OUT(modf, half, half) \
  MSL_OUT(frexp, float, int) MSL_OUT(frexp, half, int)                                                       \
  MSL_EXPONENT(float) MSL_EXPONENT(half) MSL_GEOMETRY(float) MSL_GEOMETRY(half)
#define MSL_OUT(name, T, U) \
  T name(T, thread U&); T##2 name(T##2, thread U##2&); T##3 name(T##3, thread U##3&); T##4 name(T##4, thread U##4&);
#define MSL_EXPONENT(T)                                                                                         \
  T ldexp(T, int); T##2 ldexp(T##2, int2); T##3 ldexp(T##3, int3); T##4 ldexp(T##4, int4);                      \
  int ilogb(T); int2 ilogb(T##2); int3 ilogb(T##3); int4 ilogb(T##4);
#define MSL_PER_VECTOR(F, T) F(T, T##2) F(T, T##3) F(T, T##4)
#define MSL_MEASURE(T, V)                                                                             \
  T dot(V, V); T length(V); T length_squared(V); T distance(V, V); T distance_squared(V, V); V normalize(V); \
  V faceforward(V, V, V); V reflect(V, V); V refract(V, V, T); T norm_max(V);                          \
  V mix(V, V, T); V step(T, V); V smoothstep(T, T, V); V clamp(V, T, T);
#define MSL_GEOMETRY(T) MSL_PER_VECTOR(MSL_MEASURE, T) T##3 cross(T##3, T##3);
MSL_MATH
namespace fast { MSL_MATH }
namespace precise { MSL_MATH }

// ---- integers
#define MSL_CONST_ORDER(T)                                        \
  constexpr T min(T a, T b) { return b < a ? b : a; }             \
  constexpr T max(T a, T b) { return a < b ? b : a; }             \
  constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
#define MSL_VECTOR_ORDER(T, V) V min(V, V); V max(V, V); V clamp(V, V, V);
#define MSL_ORDER(T) MSL_CONST_ORDER(T) MSL_PER_VECTOR(MSL_VECTOR_ORDER, T)
MSL_ORDER(char) MSL_ORDER(uchar) MSL_ORDER(short) MSL_ORDER(ushort) MSL_ORDER(int) MSL_ORDER(uint) MSL_ORDER(long)
MSL_ORDER(ulong) MSL_CONST_ORDER(signed char)
#define MSL_INT1(name) MSL_EACH_INT(MSL_1, name)
#define MSL_INT2(name) MSL_EACH_INT(MSL_2, name)
#define MSL_INT3(name) MSL_EACH_INT(MSL_3, name)
#define MSL_BITS(name, T) T extract_bits(T, uint, uint); T insert_bits(T, T, uint, uint);
MSL_INT1(abs) MSL_INT1(clz) MSL_INT1(ctz) MSL_INT1(popcount) MSL_INT1(reverse_bits)
MSL_INT2(absdiff) MSL_INT2(addsat) MSL_INT2(subsat) MSL_INT2(hadd) MSL_INT2(rhadd) MSL_INT2(mulhi) MSL_INT2(rotate)
MSL_INT3(madhi) MSL_INT3(madsat) MSL_INT3(max3) MSL_INT3(min3) MSL_INT3(median3) MSL_EACH_INT(MSL_BITS, )
#define MSL_24(T) T mul24(T, T); T mad24(T, T, T);
MSL_24(int) MSL_24(int2) MSL_24(int3) MSL_24(int4) MSL_24(uint) MSL_24(uint2) MSL_24(uint3) MSL_24(uint4)

// ---- comparisons give vectors of int here: whatever bool2, bool3 or bool4 has in Metal takes them, too
template <class M> using msl_mask = enable_if_t<(msl::count<M> > 1) && (__is_integral(msl::elem<M>)), bool>;
bool any(bool);
bool all(bool);
template <class M> msl_mask<M> any(M);
template <class M> msl_mask<M> all(M);
#define MSL_TEST(name)                                                                        \
  bool name(float); bool2 name(float2); bool3 name(float3); bool4 name(float4);               \
  bool name(half); bool2 name(half2); bool3 name(half3); bool4 name(half4);                   \
  template <class B, class = msl::if_bfloat<B>> bool name(B);
MSL_TEST(isfinite) MSL_TEST(isinf) MSL_TEST(isnan) MSL_TEST(isnormal) MSL_TEST(signbit)
#define MSL_PAIR(name) bool name(float, float); bool name(half, half);
MSL_PAIR(isordered) MSL_PAIR(isunordered)
#define MSL_SELECT(T)                                                                                     \
  T select(T, T, bool);                                                                                   \
  template <class M, class = msl_mask<M>> enable_if_t<msl::count<M> == 2, T##2> select(T##2, T##2, M);     \
  template <class M, class = msl_mask<M>> enable_if_t<msl::count<M> == 3, T##3> select(T##3, T##3, M);     \
  template <class M, class = msl_mask<M>> enable_if_t<msl::count<M> == 4, T##4> select(T##4, T##4, M);
MSL_SELECT(char) MSL_SELECT(uchar) MSL_SELECT(short) MSL_SELECT(ushort) MSL_SELECT(int) MSL_SELECT(uint)
MSL_SELECT(long) MSL_SELECT(ulong) MSL_SELECT(bool) MSL_SELECT(float)
MSL_SELECT(half)
template <class B> enable_if_t<__is_same(B, bfloat), B> select(B, B, bool);

// ---- packing
float4 unpack_unorm4x8_to_float(uint);
float4 unpack_snorm4x8_to_float(uint);
float2 unpack_unorm2x16_to_float(uint);
float2 unpack_snorm2x16_to_float(uint);
half4 unpack_unorm4x8_to_half(uint);
half4 unpack_snorm4x8_to_half(uint);
half2 unpack_unorm2x16_to_half(uint);
half2 unpack_snorm2x16_to_half(uint);
uint pack_float_to_unorm4x8(float4);
uint pack_float_to_snorm4x8(float4);
uint pack_float_to_unorm2x16(float2);
uint pack_float_to_snorm2x16(float2);
uint pack_half_to_unorm4x8(half4);
uint pack_half_to_snorm4x8(half4);
uint pack_half_to_unorm2x16(half2);
uint pack_half_to_snorm2x16(half2);
}  // namespace metal

// ---- the builtins under Metal's functions that MLX's preamble calls
#define MSL_BUILTIN(name) template <class... A> float __metal_##name(float, A...);
MSL_BUILTIN(acos) MSL_BUILTIN(acosh) MSL_BUILTIN(asin) MSL_BUILTIN(asinh) MSL_BUILTIN(atan) MSL_BUILTIN(atan2)
MSL_BUILTIN(atanh) MSL_BUILTIN(ceil) MSL_BUILTIN(cos) MSL_BUILTIN(cosh) MSL_BUILTIN(cospi) MSL_BUILTIN(divide)
MSL_BUILTIN(exp) MSL_BUILTIN(exp10) MSL_BUILTIN(exp2) MSL_BUILTIN(fabs) MSL_BUILTIN(floor) MSL_BUILTIN(fma)
MSL_BUILTIN(fmax) MSL_BUILTIN(fmax3) MSL_BUILTIN(fmedian3) MSL_BUILTIN(fmin) MSL_BUILTIN(fmin3) MSL_BUILTIN(fmod)
MSL_BUILTIN(fract) MSL_BUILTIN(frexp) MSL_BUILTIN(ldexp) MSL_BUILTIN(log) MSL_BUILTIN(log10) MSL_BUILTIN(log2)
MSL_BUILTIN(nextafter) MSL_BUILTIN(pow) MSL_BUILTIN(powr) MSL_BUILTIN(rint) MSL_BUILTIN(round) MSL_BUILTIN(rsqrt)
MSL_BUILTIN(sin) MSL_BUILTIN(sinh) MSL_BUILTIN(sinpi) MSL_BUILTIN(sqrt) MSL_BUILTIN(tan) MSL_BUILTIN(tanh)
MSL_BUILTIN(tanpi) MSL_BUILTIN(trunc)
float __metal_frexp(float, int*);
#define MSL_LANES(name) template <class T, class... A> T __metal_simd_##name(T, A...);
MSL_LANES(broadcast) MSL_LANES(max) MSL_LANES(min) MSL_LANES(prefix_exclusive_product) MSL_LANES(prefix_exclusive_sum)
MSL_LANES(prefix_inclusive_product) MSL_LANES(prefix_inclusive_sum) MSL_LANES(product) MSL_LANES(shuffle)
MSL_LANES(shuffle_and_fill_down) MSL_LANES(shuffle_and_fill_up) MSL_LANES(shuffle_down)
MSL_LANES(shuffle_rotate_down) MSL_LANES(shuffle_rotate_up) MSL_LANES(shuffle_up) MSL_LANES(shuffle_xor)
MSL_LANES(sum) MSL_LANES(xor)
ushort __metal_get_simdgroup_size(ushort);
ushort __metal_get_thread_index_in_simdgroup(ushort);
