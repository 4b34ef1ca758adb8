// Metal 3.1's standard library for compute kernels, as declarations: what threads do together. See types.h.
#pragma once
#include "functions.h"

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((int)a & (int)b); }
enum memory_order { memory_order_relaxed = 0 };  // others, and fences, from Metal 3.2 on
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

// ---- simdgroup and quadgroup functions: 8, 16 and 32 bits, alone or in vectors; not bool
template <class T> constexpr bool msl_is_lane = __is_arithmetic(T) && sizeof(T) <= 4 && !__is_same(T, bool) && !__is_same(T, bfloat);
template <class T, bool whole = false> using msl_lane = enable_if_t<msl_is_lane<msl::elem<T>> && (!whole || __is_integral(msl::elem<T>)), T>;
#define MSL_GROUP(group)                                                                                    \
  template <class T> msl_lane<T> group##_sum(T);                                                            \
  template <class T> msl_lane<T> group##_product(T);                                                        \
  template <class T> msl_lane<T> group##_max(T);                                                            \
  template <class T> msl_lane<T> group##_min(T);                                                            \
  template <class T> msl_lane<T, true> group##_and(T);                                                      \
  template <class T> msl_lane<T, true> group##_or(T);                                                       \
  template <class T> msl_lane<T, true> group##_xor(T);                                                      \
  template <class T> msl_lane<T> group##_prefix_inclusive_sum(T);                                           \
  template <class T> msl_lane<T> group##_prefix_exclusive_sum(T);                                           \
  template <class T> msl_lane<T> group##_prefix_inclusive_product(T);                                       \
  template <class T> msl_lane<T> group##_prefix_exclusive_product(T);                                       \
  template <class T> msl_lane<T> group##_broadcast(T, ushort);                                              \
  template <class T> msl_lane<T> group##_broadcast_first(T);                                                \
  template <class T> msl_lane<T> group##_shuffle(T, ushort);                                                \
  template <class T> msl_lane<T> group##_shuffle_xor(T, ushort);                                            \
  template <class T> msl_lane<T> group##_shuffle_up(T, ushort);                                             \
  template <class T> msl_lane<T> group##_shuffle_down(T, ushort);                                           \
  template <class T> msl_lane<T> group##_shuffle_rotate_up(T, ushort);                                      \
  template <class T> msl_lane<T> group##_shuffle_rotate_down(T, ushort);                                    \
  template <class T> msl_lane<T> group##_shuffle_and_fill_up(T, T, ushort);                                 \
  template <class T> msl_lane<T> group##_shuffle_and_fill_up(T, T, ushort, ushort);                         \
  template <class T> msl_lane<T> group##_shuffle_and_fill_down(T, T, ushort);                               \
  template <class T> msl_lane<T> group##_shuffle_and_fill_down(T, T, ushort, ushort);                       \
  bool group##_all(bool);                                                                                   \
  bool group##_any(bool);                                                                                   \
  bool group##_is_first();                                                                                  \
  bool group##_is_helper_thread();                                                                          \
  struct group##_vote {                                                                                     \
    typedef conditional_t<__is_same(struct group##_vote, struct simd_vote), ulong, ushort> vote_t;           \
    explicit constexpr group##_vote(vote_t v = 0) : v(v) {}                                                 \
    explicit constexpr operator vote_t() const { return v; }                                                \
    constexpr bool all() const { return ~v == 0; }                                                          \
    constexpr bool any() const { return v != 0; }                                                           \
    vote_t v;                                                                                               \
  };                                                                                                        \
  group##_vote group##_ballot(bool);                                                                        \
  group##_vote group##_active_threads_mask();
struct simd_vote;
MSL_GROUP(simd)
MSL_GROUP(quad)

// ---- 8x8 matrices of a simdgroup
template <class T, int Cols = 8, int Rows = Cols> struct simdgroup_matrix {
  static_assert(Rows == 8 && Cols == 8, "simdgroup matrices are 8x8");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>, "simdgroup matrices are of half, bfloat or float");
  typedef vec<T, 2> storage_type;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal);
  thread storage_type& thread_elements();
  const thread storage_type& thread_elements() const;
  storage_type elements;
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int Cols, int Rows = Cols> simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T);
template <class T, int Cols, int Rows = Cols> simdgroup_matrix<T, Cols, Rows> make_diagonal_simdgroup_matrix(T);
#define MSL_MOVE(AS)                                                                                           \
  template <class T, int C, int R> void simdgroup_load(thread simdgroup_matrix<T, C, R>&, const volatile AS T*, \
    ulong = C, ulong2 = 0, bool = false);                                                                      \
  template <class T, int C, int R> void simdgroup_store(simdgroup_matrix<T, C, R>, volatile AS T*, ulong = C,  \
    ulong2 = 0, bool = false);
MSL_MOVE(device)
MSL_MOVE(threadgroup)
template <class D, class A, class B, int N, int K, int M>
void simdgroup_multiply(thread simdgroup_matrix<D, N, M>&, simdgroup_matrix<A, K, M>, simdgroup_matrix<B, N, K>);
template <class D, class A, class B, class C, int N, int K, int M>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, N, M>&, simdgroup_matrix<A, K, M>, simdgroup_matrix<B, N, K>,
                                   simdgroup_matrix<C, N, M>);
template <class T, int N, int K, int M>
simdgroup_matrix<T, N, M> operator*(simdgroup_matrix<T, K, M>, simdgroup_matrix<T, N, K>);

// ---- atomics
template <class T> constexpr bool msl_is_atomic = is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, bool> || is_same_v<T, ulong> || is_same_v<T, float>;
template <class T, class = enable_if_t<msl_is_atomic<T>>> struct _atomic {
  T __s;
};
template <class T> using atomic = _atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
template <class T> constexpr bool msl_is_word = is_same_v<T, int> || is_same_v<T, uint>;
template <class T> using msl_value = typename remove_cv<T>::type;  // not deduced: any number that converts
#define MSL_FETCH(AS, name, allowed)                                                                    \
  template <class T> enable_if_t<allowed, T> atomic_fetch_##name##_explicit(volatile AS _atomic<T>*, msl_value<T>, memory_order);
#define MSL_ATOMIC(AS)                                                                                          \
  template <class T> enable_if_t<!is_same_v<T, ulong>, void> atomic_store_explicit(volatile AS _atomic<T>*, msl_value<T>, memory_order); \
  template <class T> enable_if_t<!is_same_v<T, ulong>, T> atomic_load_explicit(const volatile AS _atomic<T>*, memory_order); \
  template <class T> enable_if_t<!is_same_v<T, ulong>, T> atomic_exchange_explicit(volatile AS _atomic<T>*, msl_value<T>, memory_order); \
  template <class T> enable_if_t<!is_same_v<T, ulong>, bool> atomic_compare_exchange_weak_explicit(              \
      volatile AS _atomic<T>*, thread msl_value<T>*, msl_value<T>, memory_order, memory_order);                 \
  MSL_FETCH(AS, add, msl_is_word<T> || (is_same_v<T, float>)) MSL_FETCH(AS, sub, msl_is_word<T> || (is_same_v<T, float>)) \
  MSL_FETCH(AS, max, msl_is_word<T>) MSL_FETCH(AS, min, msl_is_word<T>) MSL_FETCH(AS, and, msl_is_word<T>)        \
  MSL_FETCH(AS, or, msl_is_word<T>) MSL_FETCH(AS, xor, msl_is_word<T>)                                            \
  void atomic_max_explicit(volatile AS _atomic<ulong>*, ulong, memory_order);                                   \
  void atomic_min_explicit(volatile AS _atomic<ulong>*, ulong, memory_order);
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)
}  // namespace metal
