// What threads do together: barriers, simdgroup functions, simdgroup matrices, atomics; then the keywords.
// Every function that waits for other lanes names its call site by line and column, so that the runtime can tell
// lanes that wait in different places (divergence) apart.
#pragma once
#include "math.h"

struct msl_context {  // one per thread; the runtime fills it
  uint position_in_grid[3], group[3], position_in_group[3], groups[3], group_size[3], full_group_size[3], grid[3];
  uint index, lane, simdgroup, simdgroups, lanes;
};
extern "C" {
extern msl_context* msl_cur;
__attribute__((convergent)) void msl_threadgroup_barrier(int flags, ulong site);
__attribute__((convergent)) void msl_simdgroup_barrier(int flags, ulong site);
// Publishes `n` bytes, waits for all lanes of the simdgroup, returns 32 slots of 64 bytes.
__attribute__((convergent)) const char* msl_exchange(const void* p, uint n, ulong site);
void* msl_threadgroup_alloc(const void* key, ulong n, const char* name);
void msl_atomic_access(const void* p, uint n, bool write);
[[noreturn]] void msl_fail(const char* message);
}
#define MSL_SITE ulong site_ = __builtin_LINE() * 1000ul + __builtin_COLUMN()
#define MSL_QUIET __attribute__((no_sanitize("kernel-address")))            // its memory accesses are not the kernel's
#define MSL_TOGETHER __attribute__((noinline, convergent)) MSL_QUIET  // may not be cloned into divergent branches

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
enum memory_order { memory_order_relaxed = 0, memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_threadgroup, thread_scope_device };
MSL_TOGETHER inline void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_threadgroup_barrier((int)f, site_); }
MSL_TOGETHER inline void simdgroup_barrier(mem_flags f, MSL_SITE) { msl_simdgroup_barrier((int)f, site_); }
inline void atomic_thread_fence(mem_flags, memory_order = memory_order_seq_cst, thread_scope = thread_scope_device) {}

// ---- simdgroup functions; the runtime has made sure that every lane of the simdgroup takes part
template <class T> struct msl_lanes {
  const char* slots;
  MSL_QUIET T operator[](uint lane) const {
    if (lane >= msl_cur->lanes) msl_fail("simdgroup function reads a lane that does not exist");
    T v;
    __builtin_memcpy(&v, slots + lane * 64, sizeof v);
    return v;
  }
};
template <class T> MSL_QUIET inline msl_lanes<T> msl_share(const T& v, ulong site) {
  static_assert(sizeof(T) <= 64, "operand too large");
  return {msl_exchange(&v, sizeof v, site)};
}
#define MSL_OP(op, expr) struct op { template <class T> MSL_QUIET static T f(T a, T b) { return expr; } };
MSL_OP(msl_add, a + b) MSL_OP(msl_mul, a * b) MSL_OP(msl_and, a & b) MSL_OP(msl_or, a | b) MSL_OP(msl_xor, a ^ b)
MSL_OP(msl_min, min(a, b)) MSL_OP(msl_max, max(a, b))
template <class Op, class T> MSL_QUIET inline T msl_reduce(T v, ulong site) {  // pairwise, as hardware does
  auto t = msl_share(v, site);
  T x[32];
  uint n = msl_cur->lanes;
  for (uint i = 0; i < n; i++) x[i] = t[i];
  for (uint s = 16; s; s >>= 1)
    for (uint i = 0; i < s && i + s < n; i++) x[i] = Op::f(x[i], x[i + s]);
  return x[0];
}
#define MSL_REDUCE(name, Op) template <class T> MSL_TOGETHER T name(T v, MSL_SITE) { return msl_reduce<Op, T>(v, site_); }
MSL_REDUCE(simd_sum, msl_add) MSL_REDUCE(simd_product, msl_mul) MSL_REDUCE(simd_max, msl_max) MSL_REDUCE(simd_min, msl_min)
MSL_REDUCE(simd_and, msl_and) MSL_REDUCE(simd_or, msl_or) MSL_REDUCE(simd_xor, msl_xor)
MSL_TOGETHER inline bool simd_any(bool v, MSL_SITE) { return msl_reduce<msl_or, int>(v, site_); }
MSL_TOGETHER inline bool simd_all(bool v, MSL_SITE) { return msl_reduce<msl_and, int>(v, site_); }

// A source lane outside the simdgroup is undefined in Metal; there the lane's own value comes back, as on hardware.
#define MSL_SHUFFLE(name, from)                                                    \
  template <class T> MSL_TOGETHER T name(T v, ushort n, MSL_SITE) {                \
    auto t = msl_share(v, site_);                                                  \
    int lane = (int)msl_cur->lane, src = from;                                     \
    return src < 0 || src > 31 ? v : t[(uint)src];                                 \
  }
MSL_SHUFFLE(simd_shuffle, ((void)lane, n)) MSL_SHUFFLE(simd_broadcast, ((void)lane, n)) MSL_SHUFFLE(simd_shuffle_xor, lane ^ n)
MSL_SHUFFLE(simd_shuffle_down, lane + n) MSL_SHUFFLE(simd_shuffle_up, lane - n)
MSL_SHUFFLE(simd_shuffle_rotate_down, (lane + n) % 32) MSL_SHUFFLE(simd_shuffle_rotate_up, (lane - n + 32) % 32)
MSL_SHUFFLE(quad_shuffle, (lane & ~3) + n) MSL_SHUFFLE(quad_broadcast, (lane & ~3) + n) MSL_SHUFFLE(quad_shuffle_xor, lane ^ (n & 3))
#define MSL_FILL(name, from, inside, fill)                                         \
  template <class T> MSL_TOGETHER T name(T v, T f, ushort n, MSL_SITE) {           \
    struct pair { T v, f; } p{v, f};                                               \
    auto t = msl_share(p, site_);                                                  \
    int src = (int)msl_cur->lane from n;                                           \
    return inside ? t[(uint)src].v : t[(uint)(fill)].f;                            \
  }
MSL_FILL(simd_shuffle_and_fill_up, -, src >= 0, src + 32) MSL_FILL(simd_shuffle_and_fill_down, +, src < 32, src - 32)
template <class T> MSL_TOGETHER T simd_broadcast_first(T v, MSL_SITE) { return msl_share(v, site_)[0]; }
#define MSL_PREFIX(name, Op, start, first, op)                                     \
  template <class T> MSL_TOGETHER T name(T v, MSL_SITE) {                          \
    auto t = msl_share(v, site_);                                                  \
    T s = start;                                                                   \
    for (uint i = first; i < msl_cur->lane + first; i++) s = s op t[i];            \
    return s;                                                                      \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, , t[0], 1, +) MSL_PREFIX(simd_prefix_exclusive_sum, , T(0), 0, +)
MSL_PREFIX(simd_prefix_inclusive_product, , t[0], 1, *) MSL_PREFIX(simd_prefix_exclusive_product, , T(1), 0, *)
template <class T> MSL_TOGETHER T quad_sum(T v, MSL_SITE) {
  auto t = msl_share(v, site_);
  uint q = msl_cur->lane & ~3u;
  return (t[q] + t[q + 1]) + (t[q + 2] + t[q + 3]);
}
template <class T> MSL_TOGETHER T quad_max(T v, MSL_SITE) {
  auto t = msl_share(v, site_);
  uint q = msl_cur->lane & ~3u;
  return max(max(t[q], t[q + 1]), max(t[q + 2], t[q + 3]));
}

// ---- 8x8 matrices: each lane holds two neighbours of a row, in Apple's layout
template <class T, int Rows = 8, int Cols = 8> struct simdgroup_matrix {
  static_assert(Rows == 8 && Cols == 8, "simdgroup matrices are 8x8");
  typedef vec<T, 2> storage_type;
  storage_type e;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T d) { for (int k = 0; k < 2; k++) e[k] = row(msl_cur->lane) == col(msl_cur->lane) + k ? d : T(0); }
  storage_type& thread_elements() { return e; }
  const storage_type& thread_elements() const { return e; }
  static MSL_QUIET uint row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
  static MSL_QUIET uint col(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.e[0] = m.e[1] = v;
  return m;
}
MSL_TOGETHER inline void msl_meet(ulong site) { char z = 0; msl_exchange(&z, 1, site); }
#define MSL_AT(p) p[tr ? (at.y + c + k) * stride + at.x + r : (at.y + r) * stride + at.x + c + k]
template <class T> __attribute__((noinline, convergent)) void simdgroup_load(simdgroup_matrix<T>& m, const T* p,
    ulong stride = 8, ulong2 at = ulong2{0, 0}, bool tr = false, MSL_SITE) {
  msl_meet(site_);
  uint r = m.row(msl_cur->lane), c = m.col(msl_cur->lane);
  for (uint k = 0; k < 2; k++) m.e[k] = MSL_AT(p);
}
template <class T> __attribute__((noinline, convergent)) void simdgroup_store(const simdgroup_matrix<T>& m, T* p,
    ulong stride = 8, ulong2 at = ulong2{0, 0}, bool tr = false, MSL_SITE) {
  msl_meet(site_);
  uint r = m.row(msl_cur->lane), c = m.col(msl_cur->lane);
  for (uint k = 0; k < 2; k++) MSL_AT(p) = m.e[k];
}
template <class D, class A, class B, class C>
MSL_TOGETHER void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                                                const simdgroup_matrix<B>& b, const simdgroup_matrix<C>& c, MSL_SITE) {
  auto t = msl_share(float4{(float)a.e[0], (float)a.e[1], (float)b.e[0], (float)b.e[1]}, site_);
  float fa[8][8], fb[8][8];
  for (uint l = 0; l < 32; l++) {
    float4 v = t[l];
    for (uint k = 0; k < 2; k++) fa[d.row(l)][d.col(l) + k] = v[k], fb[d.row(l)][d.col(l) + k] = v[2 + k];
  }
  uint row = d.row(msl_cur->lane), col = d.col(msl_cur->lane);
  for (uint k = 0; k < 2; k++) {
    float s = (float)c.e[k];
    for (uint i = 0; i < 8; i++) s += fa[row][i] * fb[i][col + k];
    d.e[k] = (D)s;
  }
}
template <class D, class A, class B>
MSL_TOGETHER void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a, const simdgroup_matrix<B>& b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), site_);
}

// ---- atomics: one OS thread runs everything, so plain operations are atomic
template <class T> struct _atomic { T v; };
template <class T> using atomic = _atomic<T>;
typedef _atomic<float> atomic_float;
typedef _atomic<int> atomic_int;
typedef _atomic<uint> atomic_uint;
#define MSL_FETCH(name, expr) \
  template <class T, class U> MSL_QUIET __attribute__((noinline)) T atomic_##name##_explicit(                     \
      volatile _atomic<T>* p, U u, memory_order) {                                                             \
    msl_atomic_access((const void*)p, sizeof(T), true);                                                           \
    T o = p->v, v = (T)u;                                                                                         \
    p->v = expr;                                                                                                  \
    return o;                                                                                                     \
  }
template <class T> MSL_QUIET __attribute__((noinline)) T atomic_load_explicit(const volatile _atomic<T>* p, memory_order) {
  msl_atomic_access((const void*)p, sizeof(T), false);
  return p->v;
}
template <class T, class U> MSL_QUIET __attribute__((noinline)) void atomic_store_explicit(volatile _atomic<T>* p, U u, memory_order) {
  msl_atomic_access((const void*)p, sizeof(T), true);
  p->v = (T)u;
}
template <class T, class U> MSL_QUIET __attribute__((noinline)) bool atomic_compare_exchange_weak_explicit(
    volatile _atomic<T>* p, T* want, U u, memory_order, memory_order) {
  msl_atomic_access((const void*)p, sizeof(T), true);
  T o = p->v;
  if (__builtin_memcmp(&o, want, sizeof o) == 0) { p->v = (T)u; return true; }
  *want = o;
  return false;
}
MSL_FETCH(exchange, v) MSL_FETCH(fetch_add, (T)(o + v)) MSL_FETCH(fetch_sub, (T)(o - v))
MSL_FETCH(fetch_max, o < v ? v : o) MSL_FETCH(fetch_min, v < o ? v : o)
MSL_FETCH(fetch_or, o | v) MSL_FETCH(fetch_and, o & v) MSL_FETCH(fetch_xor, o ^ v)
}  // namespace metal

// ---- arguments of the generated entry point: a buffer as pointer or reference, a position as 1 to 3 components
struct msl_buffer {
  void* p;
  template <class T> operator T*() const { return (T*)p; }
  template <class T> operator T&() const { return *(T*)p; }
};
struct msl_position {
  const uint* p;
  operator uint3() const { return uint3{p[0], p[1], p[2]}; }
  operator uint2() const { return uint2{p[0], p[1]}; }
  operator uint() const { return p[0]; }
  operator ushort3() const { return ushort3{(ushort)p[0], (ushort)p[1], (ushort)p[2]}; }
  operator ushort2() const { return ushort2{(ushort)p[0], (ushort)p[1]}; }
  operator ushort() const { return (ushort)p[0]; }
};

// ---- keywords
#define device
#define constant const
#define threadgroup
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 310
// functional casts: clang's vectors have no constructors
#define char2(...) msl::make<char2>(__VA_ARGS__)
#define char3(...) msl::make<char3>(__VA_ARGS__)
#define char4(...) msl::make<char4>(__VA_ARGS__)
#define uchar2(...) msl::make<uchar2>(__VA_ARGS__)
#define uchar3(...) msl::make<uchar3>(__VA_ARGS__)
#define uchar4(...) msl::make<uchar4>(__VA_ARGS__)
#define short2(...) msl::make<short2>(__VA_ARGS__)
#define short3(...) msl::make<short3>(__VA_ARGS__)
#define short4(...) msl::make<short4>(__VA_ARGS__)
#define ushort2(...) msl::make<ushort2>(__VA_ARGS__)
#define ushort3(...) msl::make<ushort3>(__VA_ARGS__)
#define ushort4(...) msl::make<ushort4>(__VA_ARGS__)
#define int2(...) msl::make<int2>(__VA_ARGS__)
#define int3(...) msl::make<int3>(__VA_ARGS__)
#define int4(...) msl::make<int4>(__VA_ARGS__)
#define uint2(...) msl::make<uint2>(__VA_ARGS__)
#define uint3(...) msl::make<uint3>(__VA_ARGS__)
#define uint4(...) msl::make<uint4>(__VA_ARGS__)
#define long2(...) msl::make<long2>(__VA_ARGS__)
#define long3(...) msl::make<long3>(__VA_ARGS__)
#define long4(...) msl::make<long4>(__VA_ARGS__)
#define ulong2(...) msl::make<ulong2>(__VA_ARGS__)
#define ulong3(...) msl::make<ulong3>(__VA_ARGS__)
#define ulong4(...) msl::make<ulong4>(__VA_ARGS__)
#define half2(...) msl::make<half2>(__VA_ARGS__)
#define half3(...) msl::make<half3>(__VA_ARGS__)
#define half4(...) msl::make<half4>(__VA_ARGS__)
#define float2(...) msl::make<float2>(__VA_ARGS__)
#define float3(...) msl::make<float3>(__VA_ARGS__)
#define float4(...) msl::make<float4>(__VA_ARGS__)
#define bfloat2(...) msl::make<bfloat2>(__VA_ARGS__)
#define bfloat3(...) msl::make<bfloat3>(__VA_ARGS__)
#define bfloat4(...) msl::make<bfloat4>(__VA_ARGS__)
#define bool2(...) msl::make<bool2>(__VA_ARGS__)
#define bool3(...) msl::make<bool3>(__VA_ARGS__)
#define bool4(...) msl::make<bool4>(__VA_ARGS__)
