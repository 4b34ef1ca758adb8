// Metal's textures and samplers, as far as compute kernels read, sample and write them.
#pragma once
#include "metal.h"

namespace metal {
enum class access { sample, read, write, read_write };
enum class coord { normalized, pixel };
enum class filter { nearest, linear };
enum class mag_filter { nearest, linear };
enum class min_filter { nearest, linear };
enum class mip_filter { none, nearest, linear };
enum class address { clamp_to_zero, clamp_to_edge, repeat, mirrored_repeat, clamp_to_border };
enum class compare_func { never, less, less_equal, greater, greater_equal, equal, not_equal, always };
struct sampler {
  template <class... A> constexpr sampler(A...) {}
};
#define MSL_TEXTURE(name, place, at, size)                                                          \
  template <class T, access A = access::sample> struct name {                                       \
    vec<T, 4> sample(sampler, place) const;                                                         \
    vec<T, 4> read(at, uint = 0) const;                                                             \
    void write(vec<T, 4>, at, uint = 0) const;                                                      \
    uint get_width(uint = 0) const;                                                                 \
    size                                                                                            \
  };
MSL_TEXTURE(texture1d, float, uint, )
MSL_TEXTURE(texture2d, float2, uint2, uint get_height(uint = 0) const;)
MSL_TEXTURE(texture3d, float3, uint3, uint get_height(uint = 0) const; uint get_depth(uint = 0) const;)
template <class T, access A = access::sample> struct texture2d_array {
  vec<T, 4> sample(sampler, float2, uint) const;
  vec<T, 4> read(uint2, uint, uint = 0) const;
  void write(vec<T, 4>, uint2, uint, uint = 0) const;
  uint get_width(uint = 0) const;
  uint get_height(uint = 0) const;
  uint get_array_size() const;
};
template <class T, access A = access::read> struct texture_buffer {
  vec<T, 4> read(uint) const;
  void write(vec<T, 4>, uint) const;
  uint get_width() const;
};
}  // namespace metal

// keywords in Metal
#define half _Float16
#define bfloat __bf16
