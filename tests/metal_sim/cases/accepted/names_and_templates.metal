// case: macro kernel
#define BODY(n) y[i] = n;
#define K(name, n) kernel void name(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { BODY(n) }
K(a, 1)
K(b, 2)

// case: ifdef version
kernel void f(device float* y [[buffer(0)]], const device float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  #if __METAL_VERSION__ >= 310
  y[i]=1;
#else
#error old
#endif
}

// case: inline fn
inline float g(float v) { return v; }
static inline float h(float v) { return v; }
static float u(float v) { return v; }
>> y[i]=g(x[i])+h(x[i]);

// case: overloads
float g(float v) { return v; }
float g(int v) { return v; }
float g(half v) { return v; }
>> y[i]=g(x[i])+g(int(i))+g(half(1));

// case: space overloads
constant float T[1]={1};
float g(const device float* p) { return *p; }
float g(const threadgroup float* p) { return *p; }
float g(const thread float* p) { return *p; }
float g(constant float* p) { return *p; }
>> threadgroup float t[1]; t[0]=1; float a[1]={1}; y[i]=g(x)+g(t)+g(a)+g(T);

// case: own fn names
float dot4(float4 v) { return dot(v, v); }
float sum(float4 v) { return v.x+v.y+v.z+v.w; }
>> y[i]=dot4(float4(x[i]))+sum(float4(1));

// case: own ns
namespace mine { float exp(float v) { return v; } }
>> y[i]=mine::exp(x[i]);

// case: no using [whole]
#include <metal_stdlib>
kernel void f(device float* y [[buffer(0)]], const device float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) { metal::float4 v = metal::float4(1); y[i] = metal::exp(x[i]) + metal::max(x[i], 0.0f) + v.x; metal::threadgroup_barrier(metal::mem_flags::mem_none); }

// case: const fn param
float g(const float v, const int n) { return v*n; }
>> y[i]=g(x[i], 3);

// case: template spec
template<class T> struct A { static float v() { return 1; } };
template<> struct A<half> { static float v() { return 2; } };
>> y[i]=A<float>::v()+A<half>::v();

// case: template tt
template<int N, class T> float g(const device T* p) { float s=0; for (int j=0;j<N;j++) s+=p[j]; return s; }
>> y[i]=g<4>(x);

// case: deduced thread
template<class T> float g(const thread T* p) { return p[0]; }
>> float a[2]={1,2}; y[i]=g(a);

// case: ctor struct
struct S { float a; int b; S(float x, int y) : a(x), b(y) {} };
>> S s(x[i], 2); y[i]=s.a;

// case: ctor thread
struct S { float a; S(float x) thread : a(x) {} };
>> S s(x[i]); y[i]=s.a;

// case: mem none
>> simdgroup_barrier(mem_flags::mem_none); threadgroup_barrier(mem_flags::mem_device); y[i]=0;

// case: goto free label
>> y[i]= i > 3 ? (i > 5 ? 1 : 2) : 3;

// case: comment words
kernel void f(device float* y [[buffer(0)]], const device float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  /* double goto static int* p; */ // new float* p; std::max
  y[i]=1;
}

// case: string pragma
#pragma METAL fp math_mode(safe)
>> y[i]=1;

// case: uchar arith
>> uchar q=uchar(i); y[i]=(q & 0xF) - 8 + (q >> 4);

// case: unsigned types
>> unsigned int a=1; unsigned short b=2; unsigned char c=3; unsigned long d=4; signed char e=-1; y[i]=a+b+c+d+e;

// case: local struct
>> struct L { float a; } l; l.a=1; y[i]=l.a;

// case: vec of template
template<class T> float g(const device float* x) { using V = vec<T,4>; V v = V(x[0],x[1],x[2],x[3]); vec<T,2> w(v.xy); T s = T(v.x) + w.y; return s; }
>> y[i]=g<half>(x);

// case: typename vec
struct A { typedef float2 V; };
template<class S> float g() { typename S::V v = typename S::V(1, 2); return v.y; }
>> y[i]=g<A>();
