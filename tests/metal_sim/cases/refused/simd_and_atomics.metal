// case: simd prod long
>> y[i]=float(simd_product(long(i)));

// case: simd min ulong
>> y[i]=float(simd_min(ulong(i)));

// case: simd bcast long
>> y[i]=float(simd_broadcast(long(i),0));

// case: simd shuffle ulong
>> y[i]=float(simd_shuffle(ulong(i),ushort(1)));

// case: simd down long
>> y[i]=float(simd_shuffle_down(long(i),ushort(1)));

// case: simd prefix long
>> y[i]=float(simd_prefix_inclusive_sum(long(i)));

// case: simd and float
>> y[i]=simd_and(x[i]);

// case: simd or half
>> y[i]=simd_or(half(1));

// case: simd xor float
>> y[i]=simd_xor(x[i]);

// case: simd ulong2
>> y[i]=float(simd_sum(ulong2(i)).x);

// case: simd quad long
>> y[i]=float(quad_sum(long(i)));

// case: simd float4x4
>> float4x4 m=float4x4(1.0f); m=simd_sum(m); y[i]=m[0][0];

// case: simd wrong args
>> y[i]=simd_shuffle(x[i]);

// case: simd name
>> y[i]=simd_add(x[i]);

// case: simd reduce
>> y[i]=simd_reduce_add(x[i]);

// case: simd all float4
>> y[i]=simd_all(float4(1));

// case: simd struct
struct P { float a; float b; };
>> P p{x[i],1}; P q=simd_shuffle(p,ushort(1)); y[i]=q.a;

// case: simd struct sum
struct P { float a; float b; };
>> P p{x[i],1}; P q=simd_sum(p); y[i]=q.a;

// case: simd array
>> float a[2]={1,2}; y[i]=simd_sum(a)[0];

// case: mat uint
>> simdgroup_matrix<uint,8,8> m; y[i]=0;

// case: mat uchar
>> simdgroup_matrix<uchar,8,8> m; y[i]=0;

// case: mat 4x4
>> simdgroup_matrix<float,4,4> m; y[i]=0;

// case: mat 16
>> simdgroup_matrix<half,16,16> m; y[i]=0;

// case: mat load const
constant float T[64] = {0};
>> simdgroup_float8x8 m; simdgroup_load(m, T, 8); y[i]=m.thread_elements()[0];

// case: mat store thread
>> float a[64]; simdgroup_float8x8 m(0); simdgroup_store(m, a, 8); y[i]=a[0];

// case: mat store type
>> threadgroup half a[64]; simdgroup_float8x8 m(0); simdgroup_store(m, a, 8); y[i]=a[0];

// case: mat store const
>> simdgroup_float8x8 m(0); simdgroup_store(m, x, 8);

// case: mat fill int
>> auto c = make_filled_simdgroup_matrix<int, 8>(1); y[i]=c.thread_elements()[0];

// case: mat dims
>> simdgroup_matrix<float,8,16> m; y[i]=0;

// case: at short
kernel void f(device atomic<short>* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, short(1), memory_order_relaxed); }

// case: at uchar
kernel void f(device atomic<uchar>* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_store_explicit(y, uchar(1), memory_order_relaxed); }

// case: at half mention
kernel void f(device atomic<half>* y [[buffer(0)]], device float* z [[buffer(1)]], uint i [[thread_position_in_grid]]) { z[i] = 1; }

// case: at bfloat
kernel void f(device atomic<bfloat>* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, bfloat(1), memory_order_relaxed); }

// case: at float4
kernel void f(device atomic<float4>* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, float4(1), memory_order_relaxed); }

// case: at float min
kernel void f(device atomic_float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_min_explicit(y, 1.0f, memory_order_relaxed); }

// case: at float and
kernel void f(device atomic_float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_and_explicit(y, 1.0f, memory_order_relaxed); }

// case: at ulong add
kernel void f(device atomic_ulong* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, 1ul, memory_order_relaxed); }

// case: at long
kernel void f(device atomic<long>* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, 1l, memory_order_relaxed); }

// case: at nofun
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add(y, 1u); }

// case: at plus
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] += 1; }

// case: at assign
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1; }

// case: at inc
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[0]++; }

// case: at on plain
kernel void f(device uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, 1u, memory_order_relaxed); }

// case: at release
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_store_explicit(y, 1u, memory_order_release); }

// case: at noorder
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_fetch_add_explicit(y, 1u); }

// case: at std
kernel void f(device std::atomic<uint>* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { }

// case: at const store
kernel void f(const device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { atomic_store_explicit(y, 1u, memory_order_relaxed); }

// case: at cas device expected
kernel void f(device atomic_uint* y [[buffer(0)]], device uint* e [[buffer(1)]], uint i [[thread_position_in_grid]]) { atomic_compare_exchange_weak_explicit(y, e, 1u, memory_order_relaxed, memory_order_relaxed); }

// case: at strong
kernel void f(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { uint e=0; atomic_compare_exchange_strong_explicit(y, &e, 1u, memory_order_relaxed, memory_order_relaxed); }
