// case: buffer twice
kernel void f(device float* y [[buffer(0)]], device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=x[i]; }

// case: no attr
kernel void f(device float* y [[buffer(0)]], uint i) { y[i]=1; }

// case: no attr float
kernel void f(device float* y [[buffer(0)]], float v, uint i [[thread_position_in_grid]]) { y[i]=v; }

// case: attr int
kernel void f(device float* y [[buffer(0)]], int i [[thread_position_in_grid]]) { y[i]=1; }

// case: attr ulong
kernel void f(device float* y [[buffer(0)]], ulong i [[thread_position_in_grid]]) { y[i]=1; }

// case: attr int3
kernel void f(device float* y [[buffer(0)]], int3 i [[thread_position_in_grid]]) { y[i.x]=1; }

// case: attr float3
kernel void f(device float* y [[buffer(0)]], float3 i [[thread_position_in_threadgroup]]) { y[int(i.x)]=1; }

// case: lane uint3
kernel void f(device float* y [[buffer(0)]], uint3 i [[thread_index_in_simdgroup]]) { y[i.x]=1; }

// case: tgindex uint2
kernel void f(device float* y [[buffer(0)]], uint2 i [[thread_index_in_threadgroup]]) { y[i.x]=1; }

// case: simd uint2
kernel void f(device float* y [[buffer(0)]], uint2 i [[simdgroup_index_in_threadgroup]]) { y[i.x]=1; }

// case: attr bool
kernel void f(device float* y [[buffer(0)]], bool i [[thread_position_in_grid]]) { y[i]=1; }

// case: attr uchar
kernel void f(device float* y [[buffer(0)]], uchar i [[thread_index_in_simdgroup]]) { y[i]=1; }

// case: attr typo
kernel void f(device float* y [[buffer(0)]], uint i [[thread_positon_in_grid]]) { y[i]=1; }

// case: buf struct val
struct P { float a; };
kernel void f(device float* y [[buffer(0)]], P p [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=p.a; }

// case: buf const val
kernel void f(device float* y [[buffer(0)]], constant float v [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=v; }

// case: buf neg
kernel void f(device float* y [[buffer(-1)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: buf 100
kernel void f(device float* y [[buffer(100)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: buf noindex
kernel void f(device float* y [[buffer]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: tg as buffer
kernel void f(device float* y [[buffer(0)]], threadgroup float* t [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=t[i]; }

// case: dev as tg
kernel void f(device float* y [[threadgroup(0)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: ret float
[[kernel]] float f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=1; return 1; }

// case: ret bool late
[[kernel]] bool f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=1; return true; }

// case: kernel main
kernel void main(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: buf pos swapped
kernel void f(device float* y [[thread_position_in_grid]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: template kernel by value
template <typename T>
[[kernel]] void g(device T* y [[buffer(0)]], float v [[buffer(1)]], uint i [[thread_position_in_grid]]) {
 y[i]=T(v);
}
template [[host_name("g")]] [[kernel]] void g<float>(device float* y [[buffer(0)]], float v [[buffer(1)]], uint i [[thread_position_in_grid]]);
