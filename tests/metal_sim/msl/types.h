// Metal's scalar, vector and packed types for clang, with no host header behind them.
// Address spaces are erased: the code runs on the CPU (runtime.cpp). What it is checked against stands in ../spec.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef long int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;
constexpr half operator""h(long double v) { return (half)v; }
constexpr half operator""h(unsigned long long v) { return (half)v; }
constexpr half operator""H(long double v) { return (half)v; }
constexpr bfloat operator""bf(long double v) { return (bfloat)(float)v; }

// ---- type traits (Metal has its own <metal_type_traits>; there is no std)
namespace metal {
template <class T, T V> struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct remove_cv { using type = __remove_cv(T); };
template <class T> using remove_cv_t = __remove_cv(T);
template <class A, class B> constexpr bool is_same_v = __is_same(A, B);
template <class T> constexpr bool is_floating_point_v = __is_floating_point(T);
template <class T> constexpr bool is_integral_v = __is_integral(T);
template <class T> constexpr bool is_arithmetic_v = __is_arithmetic(T);
template <class T> constexpr bool is_signed_v = __is_signed(T);
template <class T> constexpr bool is_unsigned_v = __is_unsigned(T);
template <class A, class B> constexpr bool is_convertible_v = __is_convertible(A, B);
#define MSL_TRAIT(name) template <class T> struct name : bool_constant<name##_v<T>> {};
MSL_TRAIT(is_floating_point) MSL_TRAIT(is_integral) MSL_TRAIT(is_arithmetic) MSL_TRAIT(is_signed) MSL_TRAIT(is_unsigned)
template <class A, class B> struct is_same : bool_constant<is_same_v<A, B>> {};
template <class A, class B> struct is_convertible : bool_constant<is_convertible_v<A, B>> {};
template <class T> T&& declval();
template <class T> T msl_plain(const T&);  // the type without const and address space
template <class T> using remove_addrspace_t = decltype(msl_plain(*(T*)nullptr));
template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T v) { return v; }

// ---- numeric_limits
template <class T> struct numeric_limits;
#define MSL_LIMITS(T, lo, hi, tiny, eps)                                   \
  template <> struct numeric_limits<T> {                                   \
    static constexpr T max() { return (T)hi; }                             \
    static constexpr T min() { return (T)tiny; }                           \
    static constexpr T lowest() { return (T)lo; }                          \
    static constexpr T epsilon() { return (T)eps; }                        \
    static constexpr T infinity() { return (T)__builtin_inff(); }          \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }       \
  };
#define MSL_INT_LIMITS(T)                                                                                     \
  template <> struct numeric_limits<T> {                                                                      \
    static constexpr T max() { return (T)(is_signed_v<T> ? ((1ul << (sizeof(T) * 8 - 1)) - 1) : ~0ul); }      \
    static constexpr T min() { return (T)(is_signed_v<T> ? (1ul << (sizeof(T) * 8 - 1)) : 0ul); }             \
    static constexpr T lowest() { return min(); }                                                             \
  };
MSL_LIMITS(float, -__FLT_MAX__, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__)
MSL_LIMITS(half, -65504.0f, 65504.0f, 6.103515625e-05f, 0.0009765625f)
MSL_LIMITS(bfloat, -3.3895314e38f, 3.3895314e38f, 1.17549435e-38f, 0.0078125f)
MSL_INT_LIMITS(char) MSL_INT_LIMITS(signed char) MSL_INT_LIMITS(uchar) MSL_INT_LIMITS(short) MSL_INT_LIMITS(ushort)
MSL_INT_LIMITS(int) MSL_INT_LIMITS(uint) MSL_INT_LIMITS(long) MSL_INT_LIMITS(ulong)

// ---- vectors: clang's ext_vector_type gives swizzles, element-wise operators and address spaces
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
}  // namespace metal

namespace msl {
namespace metal = ::metal;
template <class V> struct traits { using E = V; static constexpr int n = 1; };
template <class T, int N> struct vector_traits { using E = T; static constexpr int n = N; };
template <class V> using elem = typename traits<V>::E;
template <class V> constexpr int count = traits<V>::n;
template <class V, class R = V> using if_vector = ::metal::enable_if_t<(count<V> > 1), R>;
template <class V, class R = V> using if_scalar = ::metal::enable_if_t<count<V> == 1, R>;
}  // namespace msl

#define MSL_VECTOR(T)                                                                    \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                    \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                    \
  typedef T T##4 __attribute__((ext_vector_type(4)));                                    \
  template <> struct msl::traits<T##2> : msl::vector_traits<T, 2> {};                    \
  template <> struct msl::traits<T##3> : msl::vector_traits<T, 3> {};                    \
  template <> struct msl::traits<T##4> : msl::vector_traits<T, 4> {};                    \
  namespace metal { using ::T##2; using ::T##3; using ::T##4; }
// packed vectors of 2 and 4 are the vector at the scalar's alignment; of 3, a struct (12 bytes, not 16)
#define MSL_PACKED(T)                                                                    \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T))));       \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));       \
  struct packed_##T##3 {                                                                 \
    T x, y, z;                                                                           \
    packed_##T##3() = default;                                                           \
    packed_##T##3(T a, T b, T c) : x(a), y(b), z(c) {}                                   \
    packed_##T##3(T##3 v) : x(v.x), y(v.y), z(v.z) {}                                    \
    operator T##3() const { return T##3{x, y, z}; }                                      \
    T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }                    \
  };                                                                                     \
  template <> struct msl::traits<packed_##T##3> : msl::vector_traits<T, 3> {};
MSL_VECTOR(char) MSL_VECTOR(uchar) MSL_VECTOR(short) MSL_VECTOR(ushort) MSL_VECTOR(int) MSL_VECTOR(uint)
MSL_VECTOR(long) MSL_VECTOR(ulong) MSL_VECTOR(half) MSL_VECTOR(float) MSL_VECTOR(bfloat) MSL_VECTOR(bool)
MSL_PACKED(char) MSL_PACKED(uchar) MSL_PACKED(short) MSL_PACKED(ushort) MSL_PACKED(int) MSL_PACKED(uint)
MSL_PACKED(half) MSL_PACKED(float) MSL_PACKED(bfloat)

namespace metal { namespace msl = ::msl; }  // metal::float4(...)
namespace msl {
// Metal's vector constructors: V(), V(scalar), V(other vector of the same length), V(a, b.xy, c)
template <class V, class A> constexpr int put(V& v, int i, A a) {
  if constexpr (count<A> == 1) v[i] = (elem<V>)a;
  else for (int k = 0; k < count<A>; k++) v[i + k] = (elem<V>)a[k];
  return i + count<A>;
}
template <class V, class... A> constexpr V make(A... a) {
  V v{};
  if constexpr (count<V> == 1) return V(a...);
  else if constexpr (sizeof...(A) == 1 && ((count<A> == 1) && ...)) {
    for (int i = 0; i < count<V>; i++) v[i] = (elem<V>)(a, ...);
  } else if constexpr (sizeof...(A) > 0) {
    static_assert((count<A> + ...) == count<V>, "wrong number of components in a vector constructor");
    int i = 0;
    ((i = put(v, i, a)), ...);
  }
  return v;
}
}  // namespace msl

template <class T, class U> inline T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different sizes");
  return __builtin_bit_cast(T, u);
}
