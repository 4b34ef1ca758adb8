// Metal's words for CUDA (NVRTC, through mx.fast.cuda_kernel). Stands before a rendered kernel whose address-space
// words have been taken out and whose threadgroup arrays have become __shared__ (kernels.py does both).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __nv_bfloat16 bfloat;
#define METAL_FUNC __device__ __forceinline__

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
