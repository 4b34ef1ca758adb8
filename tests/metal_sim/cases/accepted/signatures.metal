// case: sig noattr buf
kernel void f(device float* y, const device float* x, constant int& n, uint i [[thread_position_in_grid]]) { if (int(i) < n) y[i]=x[i]; }

// case: sig ushort
kernel void f(device float* y [[buffer(0)]], ushort i [[thread_index_in_threadgroup]], ushort l [[thread_index_in_simdgroup]], uint s [[simdgroup_index_in_threadgroup]]) { y[i]=l+s; }

// case: sig ushort3
kernel void f(device float* y [[buffer(0)]], ushort3 i [[thread_position_in_threadgroup]], uint3 g [[threadgroup_position_in_grid]]) { y[i.x]=g.x; }

// case: sig uint2
kernel void f(device float* y [[buffer(0)]], uint2 i [[thread_position_in_grid]], uint2 n [[threads_per_grid]]) { y[i.y*n.x+i.x]=1; }

// case: sig all
kernel void f(device float* y [[buffer(0)]], uint3 a [[thread_position_in_grid]], uint3 b [[thread_position_in_threadgroup]], uint3 c [[threadgroup_position_in_grid]], uint3 d [[threadgroups_per_grid]], uint3 e [[threads_per_grid]], uint3 g [[threads_per_threadgroup]], uint3 h [[dispatch_threads_per_threadgroup]], uint k [[thread_index_in_threadgroup]], uint l [[simdgroups_per_threadgroup]], uint m [[threads_per_simdgroup]], uint n [[thread_execution_width]], uint o [[quadgroup_index_in_threadgroup]], uint p [[thread_index_in_quadgroup]]) { y[a.x]=b.x+c.x+d.x+e.x+g.x+h.x+k+l+m+n+o+p; }

// case: sig buf30
kernel void f(device float* y [[buffer(30)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: sig bool buf
kernel void f(device bool* y [[buffer(0)]], constant bool& b [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=b; }

// case: sig void ptr
kernel void f(device void* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { ((device float*)y)[i]=1; }

// case: sig struct ref
struct A { int n; float s; };
kernel void f(device float* y [[buffer(0)]], constant A& a [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=a.s*a.n; }

// case: sig macro index
enum { OUT = 2 };
#define IN 1
kernel void f(device float* y [[buffer(OUT)]], const device float* x [[buffer(IN)]], uint i [[thread_position_in_grid]]) { y[i]=x[i]; }

// case: sig tg two
kernel void f(device float* y [[buffer(0)]], threadgroup float* a [[threadgroup(0)]], threadgroup half* b [[threadgroup(1)]], uint i [[thread_position_in_grid]]) { a[i&31]=1; b[i&31]=2; y[i]=a[0]+b[0]; }

// case: sig fc arg
constant bool has [[function_constant(0)]];
kernel void f(device float* y [[buffer(0)]], const device float* x [[buffer(1), function_constant(has)]], uint i [[thread_position_in_grid]]) { y[i]=has ? x[i] : 0; }

// case: sig unused
kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]], uint l [[thread_index_in_simdgroup]]) { (void)l; y[i]=1; }

// case: two kernels
kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=1; }
kernel void g(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=2; }
