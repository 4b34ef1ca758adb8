// case: mlx bf math [mlx]
>> bfloat16_t b=bfloat16_t(x[i]); b=metal::exp(b); b=max(b, bfloat16_t(0)); y[i]=float(simd_max(b));

// case: mlx utils [mlx]
>> float16_t h=float16_t(x[i]); complex64_t c{1,2}; c=c*c+c; y[i]=ceildiv(int(i),3)+Limits<float>::max+float(h)+c.real+log1p(x[i])+float(simd_shuffle_down(ulong(i),ushort(1)));

// case: mlx elem to loc [mlx]
[[kernel]] void f(device float* y [[buffer(0)]], const device float* x [[buffer(1)]], const constant int* x_shape [[buffer(2)]], const constant int64_t* x_strides [[buffer(3)]], const constant int& x_ndim [[buffer(4)]], uint3 thread_position_in_grid [[thread_position_in_grid]]) {
 uint e = thread_position_in_grid.x; y[e] = x[elem_to_loc(e, x_shape, x_strides, x_ndim)];
}

// case: mlx template [mlx]
template <typename T, int N, bool B>
[[kernel]] void custom_kernel_g(const device T* x [[buffer(0)]], device T* y [[buffer(1)]], uint3 thread_position_in_grid [[thread_position_in_grid]], uint thread_index_in_simdgroup [[thread_index_in_simdgroup]]) {
 uint i = thread_position_in_grid.x; T v = x[i]; y[i] = T(N) * v + (B ? T(1) : T(0)); }
template [[host_name("g")]] [[kernel]] decltype(custom_kernel_g<half, 4, true>) custom_kernel_g<half, 4, true>;
