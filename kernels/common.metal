// Helpers of all kernels: loads and stores of activations, sums over lanes, GELU.
//
// Rendered before this text: T (the activations' type) and one of T_FLOAT, T_HALF, T_BFLOAT as 1.
// The text is Metal that also compiles as CUDA once cuda.h stands before it: no swizzles, no vector
// arithmetic, vectors only to load and store 16 bytes at once.

#define UNROLL _Pragma("unroll")
// A result too large for fp16 becomes the largest number that fp16 holds.
#define WITHIN_HALF(v) min(max(v, -65504.0f), 65504.0f)
#if U_HALF  // rendered where U is half
#define WITHIN_U(v) WITHIN_HALF(v)
#else
#define WITHIN_U(v) (v)
#endif

// The two fp16 numbers in a word.
METAL_FUNC float low_half(uint u) { return float(as_type<half>(ushort(u & 0xFFFFu))); }
METAL_FUNC float high_half(uint u) { return float(as_type<half>(ushort(u >> 16))); }

// Four numbers, 16-byte aligned.
METAL_FUNC void load4(const device float* p, thread float* v) {
  const float4 a = *(const device float4*)p;
  v[0] = a.x;
  v[1] = a.y;
  v[2] = a.z;
  v[3] = a.w;
}

// Before INPUTS_READY a kernel may read only what no launch of a step writes: weights, keys and values of earlier
// tokens, the numbers that are uploaded for a step (tests/gpu/test_early.py names them). On NVIDIA a launch may begin
// while the one before it ends, and waits here (cuda.h); a kernel without INPUTS_READY waits before it does anything.
#ifndef INPUTS_READY
#define INPUTS_READY()
#endif

// Eight numbers of any float type, 16-byte aligned.
METAL_FUNC void load8(const device float* p, thread float* v) {
  load4(p, v);
  load4(p + 4, v + 4);
}
METAL_FUNC void load8(const device half* p, thread float* v) {
  const uint4 u = *(const device uint4*)p;
  v[0] = low_half(u.x);
  v[1] = high_half(u.x);
  v[2] = low_half(u.y);
  v[3] = high_half(u.y);
  v[4] = low_half(u.z);
  v[5] = high_half(u.z);
  v[6] = low_half(u.w);
  v[7] = high_half(u.w);
}
METAL_FUNC void load8(const device bfloat* p, thread float* v) {
  const uint4 u = *(const device uint4*)p;
  v[0] = as_type<float>(u.x << 16);
  v[1] = as_type<float>(u.x & 0xFFFF0000u);
  v[2] = as_type<float>(u.y << 16);
  v[3] = as_type<float>(u.y & 0xFFFF0000u);
  v[4] = as_type<float>(u.z << 16);
  v[5] = as_type<float>(u.z & 0xFFFF0000u);
  v[6] = as_type<float>(u.w << 16);
  v[7] = as_type<float>(u.w & 0xFFFF0000u);
}

// Store eight numbers, 16-byte aligned.
METAL_FUNC void store4(device float* p, const thread float* v) {
  float4 a;
  a.x = v[0];
  a.y = v[1];
  a.z = v[2];
  a.w = v[3];
  *(device float4*)p = a;
}
METAL_FUNC void store8(device float* p, const thread float* v) {
  store4(p, v);
  store4(p + 4, v + 4);
}
METAL_FUNC uint pair(half a, half b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }
METAL_FUNC uint pair(bfloat a, bfloat b) { return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16; }
METAL_FUNC void store8(device half* p, const thread float* v) {
  uint4 u;
  u.x = pair(half(v[0]), half(v[1]));
  u.y = pair(half(v[2]), half(v[3]));
  u.z = pair(half(v[4]), half(v[5]));
  u.w = pair(half(v[6]), half(v[7]));
  *(device uint4*)p = u;
}
METAL_FUNC void store8(device bfloat* p, const thread float* v) {
  uint4 u;
  u.x = pair(bfloat(v[0]), bfloat(v[1]));
  u.y = pair(bfloat(v[2]), bfloat(v[3]));
  u.z = pair(bfloat(v[4]), bfloat(v[5]));
  u.w = pair(bfloat(v[6]), bfloat(v[7]));
  *(device uint4*)p = u;
}

// Sum over aligned blocks of `width` lanes (a power of two); every lane of a block gets it.
METAL_FUNC float sum_lanes(float v, int width) {
  UNROLL
  for (int m = 16; m > 0; m /= 2)
    if (m < width) v += simd_shuffle_xor(v, ushort(m));
  return v;
}

// Largest over the 32 lanes; every lane gets it.
METAL_FUNC float max_lanes(float v) {
  UNROLL
  for (int m = 16; m > 0; m /= 2) v = max(v, simd_shuffle_xor(v, ushort(m)));
  return v;
}

// Sum over a threadgroup of `count` full simdgroups; every thread gets it. `room`: count floats.
METAL_FUNC float sum_group(float v, threadgroup float* room, int count, int simdgroup, int lane) {
  v = sum_lanes(v, 32);
  if (count == 1) return v;
  if (lane == 0) room[simdgroup] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  v = sum_lanes(lane < count ? room[lane] : 0.0f, 32);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return v;
}

// GELU in its tanh form, x/2 (1 + tanh u), written as x / (1 + e^-2u). The cap keeps e^ finite.
METAL_FUNC float gelu(float x) {
  const float u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
  return x / (1.0f + exp(min(-2.0f * u, 80.0f)));
}
