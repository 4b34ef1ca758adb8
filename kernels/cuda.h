// Metal's words for CUDA, compiled with NVRTC (mlx_gemma4/gpu/cuda_compiler.py). Stands before a rendered kernel whose
// address-space words have been removed and whose threadgroup arrays have become __shared__ (mlx_gemma4/gpu/render.py
// does both).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __nv_bfloat16 bfloat;
#define METAL_FUNC __device__ __forceinline__
#define CUDA 1

#define thread_index_in_threadgroup (threadIdx.x)
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define threadgroup_position_in_grid (blockIdx)
#define threadgroups_per_grid (gridDim)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()

template <class To, class From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
template <class V>
METAL_FUNC V simd_shuffle_xor(V v, ushort mask) { return __shfl_xor_sync(~0u, v, mask); }
template <class V>
METAL_FUNC V simd_shuffle(V v, ushort lane) { return __shfl_sync(~0u, v, lane); }

// In a CUDA graph with programmatic edges (gpu/cuda_graph.py) a launch begins once all threadgroups of the one before
// it have; elsewhere INPUTS_READY waits for nothing. Earlier launches have ended when what follows INPUTS_READY runs.
#if __CUDA_ARCH__ >= 900
#define LAUNCH_NEXT() asm volatile("griddepcontrol.launch_dependents;")
#define INPUTS_READY() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define LAUNCH_NEXT()
#define INPUTS_READY()
#endif

// For exchange_many.metal: what this thread knows of has been written before what it writes next, and what it reads next
// was written after what it has read, also by other GPUs.
#define SYSTEM_FENCE() asm volatile("fence.acq_rel.sys;" ::: "memory")

// For matrix.metal: what Metal does with simdgroup matrices.

// c += a b for a [16, 16], b [16, 8]. a: rows 0-7 and 8-15 of columns 0-7, then of 8-15; b: rows 0-7, 8-15.
METAL_FUNC void multiply(float* c, const uint* a, uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of two pairs of halves, both firsts, and both seconds.
METAL_FUNC uint firsts(uint a, uint b) { return __byte_perm(a, b, 0x5410); }
METAL_FUNC uint seconds(uint a, uint b) { return __byte_perm(a, b, 0x7632); }

// For few_rows.metal: a b + c, rounded once, and a b, a + b, of two halves each.
METAL_FUNC uint fma_halves(uint a, uint b, uint c) {
  return as_type<uint>(__hfma2(as_type<__half2>(a), as_type<__half2>(b), as_type<__half2>(c)));
}
METAL_FUNC uint mul_halves(uint a, uint b) { return as_type<uint>(__hmul2(as_type<__half2>(a), as_type<__half2>(b))); }
METAL_FUNC uint add_halves(uint a, uint b) { return as_type<uint>(__hadd2(as_type<__half2>(a), as_type<__half2>(b))); }

// Copies 16 bytes (zeros, unless `there`), or some words, to shared memory, without waiting for them; and waits for all of this lane's, and for the other lanes.
METAL_FUNC void copy_async(uint4* to, const __half* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
               :: "r"(uint(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0) : "memory");
}
template <int COUNT>  // of words, 1, 2 or 4
METAL_FUNC void copy_words(uint* to, const uint* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
               :: "r"(uint(__cvta_generic_to_shared(to))), "l"(from), "n"(4 * COUNT) : "memory");
}
METAL_FUNC void copies_arrived() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// For quantized.metal: what Metal does with halves apart, and with a table in threadgroup memory.

// Two numbers 1024 + code as halves, less 1152: code - 128.
METAL_FUNC uint less_1152(uint pair) {
  return as_type<uint>(__hsub2(as_type<__half2>(pair), as_type<__half2>(0x64806480u)));
}

// The levels of 8 codes of 4 bits, as pairs of halves: a code's low 3 bits choose the low and the high byte of a
// magnitude, its bit 3 is the sign.
METAL_FUNC void levels_by_bytes(uint word, uint low_0, uint low_1, uint high_0, uint high_1, uint* pairs) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint codes = word >> (16 * i), which = codes & 0x7777u;
    const uint low = __byte_perm(low_0, low_1, which);
    const uint two = __byte_perm(codes, 0, 0x1100);  // each byte twice: signs at bits 3, 15, 19, 31
    const uint high = __byte_perm(high_0, high_1, which) | (two & 0x80008000u) | ((two << 4) & 0x00800080u);
    pairs[2 * i] = __byte_perm(low, high, 0x5140);
    pairs[2 * i + 1] = __byte_perm(low, high, 0x7362);
  }
}

// For matvec.metal: products of a table's values and whole numbers, where Metal reads floats in threadgroup memory.

// Bytes of (b, a), lowest first: a selector's 4 bits choose one of 8, or with bit 3 its sign, 8 times.
METAL_FUNC uint bytes_or_signs(uint a, uint b, uint selector) {
  uint four;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(four) : "r"(a), "r"(b), "r"(selector));
  return four;
}

// The larger; not a number if either isn't.
METAL_FUNC float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// sum + x . w of two times two whole numbers of 16 bits and four of 8.
METAL_FUNC int dot4(uint x0, uint x1, uint w, int sum) {
  asm("dp2a.lo.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(x0), "r"(w));
  asm("dp2a.hi.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(x1), "r"(w));
  return sum;
}
