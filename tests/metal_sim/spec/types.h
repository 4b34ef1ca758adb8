// Metal's scalar, vector, packed and matrix types and its type traits, as far as a compiler's front end sees them.
// Nothing here is ever run. Address spaces: `device` is 1, `constant` 2, `threadgroup` 3; `thread` is the default.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel __attribute__((annotate("kernel")))
#define vertex __attribute__((annotate("vertex")))
#define fragment __attribute__((annotate("fragment")))

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;
typedef decltype(nullptr) nullptr_t;
constexpr half operator""h(long double v) { return (half)v; }
constexpr half operator""h(unsigned long long v) { return (half)v; }
constexpr half operator""H(long double v) { return (half)v; }
constexpr half operator""H(unsigned long long v) { return (half)v; }
constexpr bfloat operator""bf(long double v) { return (bfloat)(float)v; }
constexpr bfloat operator""bf(unsigned long long v) { return (bfloat)(float)v; }
constexpr bfloat operator""BF(long double v) { return (bfloat)(float)v; }

namespace metal {
template <class T, T V> struct integral_constant {
  static constexpr constant T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
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
template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T> struct remove_cv { using type = __remove_cv(T); };
template <class T> struct add_const { using type = const T; };
template <class T> struct remove_addrspace { using type = T; };
template <class T> struct remove_addrspace<device T> { using type = T; };
template <class T> struct remove_addrspace<__attribute__((address_space(2))) T> { using type = T; };
template <class T> struct remove_addrspace<threadgroup T> { using type = T; };
template <class T> struct remove_addrspace<const device T> { using type = const T; };
template <class T> struct remove_addrspace<constant T> { using type = const T; };
template <class T> struct remove_addrspace<const threadgroup T> { using type = const T; };
template <class T> struct remove_pointer { using type = T; };
template <class T> struct remove_pointer<T*> { using type = T; };
template <class T> struct remove_pointer<T* const> { using type = T; };
template <class T> struct remove_extent { using type = T; };
template <class T> struct remove_extent<T[]> { using type = T; };
template <class T, size_t N> struct remove_extent<T[N]> { using type = T; };
template <class T> struct decay { using type = __remove_cv(typename remove_reference<T>::type); };
template <class T> struct make_signed { using type = __make_signed(T); };
template <class T> struct make_unsigned { using type = __make_unsigned(T); };
template <class T> struct underlying_type { using type = __underlying_type(T); };
#define MSL_TYPE(name) template <class T> using name##_t = typename name<T>::type;
MSL_TYPE(remove_reference) MSL_TYPE(remove_const) MSL_TYPE(remove_volatile) MSL_TYPE(remove_cv) MSL_TYPE(add_const)
MSL_TYPE(remove_addrspace) MSL_TYPE(remove_pointer) MSL_TYPE(remove_extent) MSL_TYPE(decay)
MSL_TYPE(make_signed) MSL_TYPE(make_unsigned) MSL_TYPE(underlying_type)

template <class A, class B> constexpr constant bool is_same_v = __is_same(A, B);
template <class A, class B> constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class A, class B> constexpr constant bool is_base_of_v = __is_base_of(A, B);
template <class A, class... B> constexpr constant bool is_constructible_v = __is_constructible(A, B...);
#define MSL_TRAIT(name)                                              \
  template <class T> constexpr constant bool name##_v = __##name(T); \
  template <class T> struct name : bool_constant<__##name(T)> {};
MSL_TRAIT(is_floating_point) MSL_TRAIT(is_integral) MSL_TRAIT(is_arithmetic) MSL_TRAIT(is_signed)
MSL_TRAIT(is_unsigned) MSL_TRAIT(is_enum) MSL_TRAIT(is_class) MSL_TRAIT(is_union) MSL_TRAIT(is_const)
MSL_TRAIT(is_pointer) MSL_TRAIT(is_array) MSL_TRAIT(is_void) MSL_TRAIT(is_scalar) MSL_TRAIT(is_trivially_copyable)
MSL_TRAIT(is_reference) MSL_TRAIT(is_function) MSL_TRAIT(is_volatile) MSL_TRAIT(is_standard_layout)
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B> struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class...> struct _disjunction : false_type {};
template <class A, class... B> struct _disjunction<A, B...> : conditional_t<bool(A::value), A, _disjunction<B...>> {};
template <class...> struct _conjunction : true_type {};
template <class A, class... B> struct _conjunction<A, B...> : conditional_t<bool(A::value), _conjunction<B...>, A> {};
template <class A> struct _negation : bool_constant<!bool(A::value)> {};
template <class... A> using disjunction = _disjunction<A...>;
template <class... A> using conjunction = _conjunction<A...>;
template <class A> using negation = _negation<A>;
template <class... A> constexpr constant bool disjunction_v = _disjunction<A...>::value;
template <class... A> constexpr constant bool conjunction_v = _conjunction<A...>::value;
template <class T> T&& declval();
template <class T> constexpr remove_reference_t<T>&& move(T&& v) { return (remove_reference_t<T>&&)v; }
template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T v) { return v; }

template <class T> struct numeric_limits;
#define MSL_LIMITS(T, lo, hi, tiny, eps, mantissa)                                                     \
  template <> struct numeric_limits<T> {                                                               \
    static constexpr constant bool is_specialized = true, is_signed = true, is_integer = false;        \
    static constexpr constant bool has_infinity = true, has_quiet_NaN = true, is_iec559 = true;        \
    static constexpr constant int digits = mantissa, radix = 2;                                        \
    static constexpr T max() { return (T)hi; }                                                         \
    static constexpr T min() { return (T)tiny; }                                                       \
    static constexpr T lowest() { return (T)lo; }                                                      \
    static constexpr T epsilon() { return (T)eps; }                                                    \
    static constexpr T round_error() { return (T)0.5f; }                                               \
    static constexpr T infinity() { return (T)__builtin_inff(); }                                      \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }                                   \
    static constexpr T signaling_NaN() { return (T)__builtin_nanf(""); }                               \
    static constexpr T denorm_min() { return (T)tiny; }                                                \
  };
#define MSL_INT_LIMITS(T)                                                                                        \
  template <> struct numeric_limits<T> {                                                                         \
    static constexpr constant bool is_specialized = true, is_signed = __is_signed(T), is_integer = true;         \
    static constexpr constant bool has_infinity = false, has_quiet_NaN = false, is_iec559 = false;               \
    static constexpr constant int digits = sizeof(T) * 8 - __is_signed(T), radix = 2;                            \
    static constexpr T max() { return (T)(__is_signed(T) ? ((1ul << (sizeof(T) * 8 - 1)) - 1) : ~0ul); }         \
    static constexpr T min() { return (T)(__is_signed(T) ? (1ul << (sizeof(T) * 8 - 1)) : 0ul); }                \
    static constexpr T lowest() { return min(); }                                                                \
    static constexpr T infinity() { return 0; }                                                                  \
    static constexpr T quiet_NaN() { return 0; }                                                                 \
  };
MSL_LIMITS(float, -__FLT_MAX__, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__, 24)
MSL_LIMITS(half, -65504.0f, 65504.0f, 6.103515625e-05f, 0.0009765625f, 11)
MSL_LIMITS(bfloat, -3.3895314e38f, 3.3895314e38f, 1.17549435e-38f, 0.0078125f, 8)
MSL_INT_LIMITS(bool) MSL_INT_LIMITS(char) MSL_INT_LIMITS(signed char) MSL_INT_LIMITS(uchar) MSL_INT_LIMITS(short)
MSL_INT_LIMITS(ushort) MSL_INT_LIMITS(int) MSL_INT_LIMITS(uint) MSL_INT_LIMITS(long) MSL_INT_LIMITS(ulong)

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
}  // namespace metal

namespace msl {
template <class V> struct traits { using E = V; static constexpr int n = 1; };
template <class T, int N> struct vector_traits { using E = T; static constexpr int n = N; };
template <class V> using elem = typename traits<V>::E;
template <class V> constexpr int count = traits<V>::n;
}  // namespace msl

#define MSL_VECTOR(T)                                                    \
  typedef T T##2 __attribute__((ext_vector_type(2)));                    \
  typedef T T##3 __attribute__((ext_vector_type(3)));                    \
  typedef T T##4 __attribute__((ext_vector_type(4)));                    \
  template <> struct msl::traits<T##2> : msl::vector_traits<T, 2> {};    \
  template <> struct msl::traits<T##3> : msl::vector_traits<T, 3> {};    \
  template <> struct msl::traits<T##4> : msl::vector_traits<T, 4> {};    \
  namespace metal { using ::T##2; using ::T##3; using ::T##4; }
#define MSL_PACKED(T)                                                                 \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T))));    \
  typedef T packed_##T##3 __attribute__((ext_vector_type(3), aligned(sizeof(T))));    \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));    \
  namespace metal { using ::packed_##T##2; using ::packed_##T##3; using ::packed_##T##4; }
MSL_VECTOR(char) MSL_VECTOR(uchar) MSL_VECTOR(short) MSL_VECTOR(ushort) MSL_VECTOR(int) MSL_VECTOR(uint)
MSL_VECTOR(long) MSL_VECTOR(ulong) MSL_VECTOR(float) MSL_VECTOR(bool)
MSL_PACKED(char) MSL_PACKED(uchar) MSL_PACKED(short) MSL_PACKED(ushort) MSL_PACKED(int) MSL_PACKED(uint)
MSL_PACKED(long) MSL_PACKED(ulong) MSL_PACKED(float)
MSL_VECTOR(half) MSL_VECTOR(bfloat) MSL_PACKED(half) MSL_PACKED(bfloat)
template <> struct msl::traits<signed char __attribute__((ext_vector_type(2)))> : msl::vector_traits<signed char, 2> {};
template <> struct msl::traits<signed char __attribute__((ext_vector_type(3)))> : msl::vector_traits<signed char, 3> {};
template <> struct msl::traits<signed char __attribute__((ext_vector_type(4)))> : msl::vector_traits<signed char, 4> {};

namespace metal { namespace msl = ::msl; }  // metal::float4(...), rewritten
namespace msl {
// Metal's vector constructors: V(), V(scalar), V(other vector of the same length), V(a, b.xy, c)
template <class... A> constexpr int total() { return (0 + ... + count<__remove_cv(A)>); }
template <class V, class... A> constexpr V make(A... a) {
  if constexpr (count<V> == 1) {
    return V(a...);
  } else {
    static_assert(sizeof...(A) == 0 || (sizeof...(A) == 1 && total<A...>() == 1) || total<A...>() == count<V>,
                  "wrong number of components in a vector constructor");
    static_assert(((__is_arithmetic(elem<A>)) && ...), "a vector is made of numbers and vectors");
    return V{};
  }
}
template <class V> constexpr V make(V v) { return v; }
}  // namespace msl

// ---- matrices: columns of vectors
namespace metal {
template <class T, int C, int R> struct matrix {
  static_assert(is_same_v<T, float> || is_same_v<T, half>, "matrices are of float or half");
  typedef vec<T, R> column;
  column columns[C];
  matrix() = default;
  matrix(const matrix&) = default;
  matrix(const device matrix&);
  matrix(constant matrix&);
  matrix(const threadgroup matrix&);
  explicit matrix(T diagonal);
  template <class... A, class = enable_if_t<sizeof...(A) + 2 == C>> matrix(column, column, A...);
  template <class... A, class = enable_if_t<sizeof...(A) + 4 == C * R>, class = void> matrix(T, T, T, T, A...);
  template <class U, class = enable_if_t<!is_same_v<U, T>>> explicit matrix(matrix<U, C, R>);
  column& operator[](int);
  const column& operator[](int) const;
  device column& operator[](this device matrix&, int);
  const device column& operator[](this const device matrix&, int);
  constant column& operator[](this constant matrix&, int);
  threadgroup column& operator[](this threadgroup matrix&, int);
  const threadgroup column& operator[](this const threadgroup matrix&, int);
  friend matrix operator+(matrix, matrix);
  friend matrix operator-(matrix, matrix);
  friend matrix operator-(matrix);
  friend matrix operator*(matrix, T);
  friend matrix operator*(T, matrix);
  friend column operator*(matrix, vec<T, C>);
  friend vec<T, C> operator*(column, matrix);
  friend bool operator==(matrix, matrix);
  friend bool operator!=(matrix, matrix);
  matrix& operator*=(T);
  matrix& operator+=(matrix);
  matrix& operator-=(matrix);
};
template <class T, int C, int R, int N> matrix<T, N, R> operator*(matrix<T, C, R>, matrix<T, N, C>);
template <class T, int C, int R> matrix<T, R, C> transpose(matrix<T, C, R>);
template <class T, int N> T determinant(matrix<T, N, N>);
#define MSL_MATRIX(T)                                                                                    \
  typedef metal::matrix<T, 2, 2> T##2x2; typedef metal::matrix<T, 2, 3> T##2x3;                          \
  typedef metal::matrix<T, 2, 4> T##2x4; typedef metal::matrix<T, 3, 2> T##3x2;                          \
  typedef metal::matrix<T, 3, 3> T##3x3; typedef metal::matrix<T, 3, 4> T##3x4;                          \
  typedef metal::matrix<T, 4, 2> T##4x2; typedef metal::matrix<T, 4, 3> T##4x3;                          \
  typedef metal::matrix<T, 4, 4> T##4x4;
}  // namespace metal
MSL_MATRIX(float) MSL_MATRIX(half)
namespace metal {
#define MSL_USE(T) using ::T##2x2; using ::T##2x3; using ::T##2x4; using ::T##3x2; using ::T##3x3; using ::T##3x4; \
  using ::T##4x2; using ::T##4x3; using ::T##4x4;
MSL_USE(float) MSL_USE(half)

// ---- arrays
template <class T, size_t N> struct array {
  T __elems[N];
  constexpr T& operator[](size_t i) { return __elems[i]; }
  constexpr const T& operator[](size_t i) const { return __elems[i]; }
  device T& operator[](this device array&, size_t);
  const device T& operator[](this const device array&, size_t);
  constant T& operator[](this constant array&, size_t);
  threadgroup T& operator[](this threadgroup array&, size_t);
  const threadgroup T& operator[](this const threadgroup array&, size_t);
  constexpr size_t size() const { return N; }
  constexpr bool empty() const { return N == 0; }
};
}  // namespace metal

template <class T, class U> constexpr T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different sizes");
  static_assert(__is_arithmetic(msl::elem<T>) && __is_arithmetic(msl::elem<U>), "as_type takes and gives numbers and vectors");
  return __builtin_bit_cast(T, u);
}
namespace metal { using ::as_type; }
template <class T> bool is_function_constant_defined(constant T&);
