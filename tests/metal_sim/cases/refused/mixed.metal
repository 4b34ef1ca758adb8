// case: const ptr const
float g(const float* const p) { return *p; }
>> float a=1; y[i]=g(&a);

// case: range ref
>> float s[2]={1,2}; for (float& v : s) v=1; y[i]=s[0];

// case: range cref
>> float s[2]={1,2}; for (const float& v : s) y[i]+=v;

// case: using ref
using R = float&;
>> y[i]=0;

// case: ptr arr param
void g(float* p[2]) {}
>> y[i]=0;

// case: macro type
#define PTR float*
>> float a=1; PTR p=&a; y[i]=*p;

// case: method tmpl
template<class T> struct S { T get(const T* p) { return p[0]; } };
>> y[i]=0;

// case: kernel tmpl ptr
template<typename T>
[[kernel]] void g(T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=T(1); }
template [[host_name("g")]] [[kernel]] void g<float>(float* y [[buffer(0)]], uint i [[thread_position_in_grid]]);

// case: ret ref member
struct S { float v; float& ref() { return v; } };
>> y[i]=0;

// case: static fn ptr
static inline void g(float* p, int n) { p[n]=0; }
>> y[i]=0;

// case: uchar ptr cast
>> half h=1; y[i]=((uchar*)&h)[0];

// case: vec ptr cast
>> float a[4]={0}; y[i]=(*(float4*)a).x;

// case: struct local ptr
>> struct L { float* p; } l; y[i]=0;

// case: init if ptr
>> float a=1; if (float* p = &a) y[i]=*p;

// case: ptr after ok
>> float a=1; thread float* q=&a; float* p=q; y[i]=*p;

// case: mixed params
float g(const device float* x, thread float* a, float* b, threadgroup float* c) { return 0; }
>> y[i]=0;

// case: conv op ptr
struct S { float v; operator float*() { return &v; } };
>> y[i]=0;

// case: friend ref
struct S { float v; friend S operator-(const S& a) { return a; } };
>> y[i]=0;

// case: ns constexpr
namespace q { constexpr int N = 4; }
>> float a[q::N]; a[0]=1; y[i]=a[0];

// case: static half4
static const half4 K = half4(1.0h);
>> y[i]=float(K.x);

// case: extern f
extern float e;
>> y[i]=e;

// case: inline constexpr
inline constexpr float A = 2;
>> y[i]=A;

// case: cls static inline
template<class T> struct S { static inline T k = 1; };
>> y[i]=S<float>::k;

// case: const enum table
const uchar T[2] = {1, 2};
>> y[i]=T[i&1];

// case: constexpr struct
struct P { float a; }; constexpr P A = {1};
>> y[i]=A.a;

// case: two globals
constant float A = 1;
float B = 2;
>> y[i]=A+B;

// case: static in loop
>> for (int j=0;j<2;j++) { static int n = 0; n++; y[i]=n; }

// case: static in tmpl
template<int N> int g() { static int n = N; return n; }
>> y[i]=g<3>();

// case: static in method
struct S { int g() { static int n = 0; return ++n; } };
>> S s; y[i]=s.g();

// case: uint buf
kernel void f(device float* y [[buffer(0)]], uint n [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=n; }

// case: int noattr
kernel void f(device float* y [[buffer(0)]], constant int n, uint i [[thread_position_in_grid]]) { y[i]=n; }

// case: three dup
kernel void f(device float* y [[buffer(0)]], device float* a [[buffer(1)]], device float* b [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: ret ptr
kernel device float* f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { return y; }

// case: ret uint tmpl
template<typename T>
[[kernel]] uint g(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=T(1); return 0; }
template [[host_name("g")]] [[kernel]] uint g<float>(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]);

// case: half3 attr
kernel void f(device float* y [[buffer(0)]], half3 i [[thread_position_in_grid]]) { y[0]=i.x; }

// case: short attr
kernel void f(device float* y [[buffer(0)]], short i [[thread_index_in_simdgroup]]) { y[i]=1; }

// case: ptr attr
kernel void f(device float* y [[buffer(0)]], device uint* i [[thread_position_in_grid]]) { y[0]=1; }

// case: ref attr
kernel void f(device float* y [[buffer(0)]], constant uint& i [[thread_position_in_grid]]) { y[0]=1; }

// case: upper attr
kernel void f(device float* y [[buffer(0)]], uint i [[Thread_Position_In_Grid]]) { y[0]=1; }

// case: vertex id
kernel void f(device float* y [[buffer(0)]], uint i [[vertex_id]]) { y[0]=1; }

// case: tg 32
kernel void f(device float* y [[buffer(0)]], threadgroup float* t [[threadgroup(31)]], uint i [[thread_position_in_grid]]) { t[i]=1; y[0]=1; }

// case: simd sum bool
>> y[i]=simd_sum(x[i] > 0);

// case: simd size t
>> y[i]=simd_sum(size_t(i));

// case: simd long2
>> y[i]=simd_max(long2(1)).x;

// case: simd bool2
>> y[i]=simd_shuffle(bool2(true), ushort(1)).x;

// case: simd ptr
>> const device float* p=simd_broadcast(x, ushort(0)); y[i]=*p;

// case: simd mat
>> simdgroup_float8x8 m(0); m=simd_shuffle(m, ushort(1)); y[i]=0;

// case: mat bool
>> simdgroup_matrix<bool,8,8> m; y[i]=0;

// case: mat short
>> simdgroup_matrix<short,8,8> m(1); y[i]=0;

// case: mat double load
>> simdgroup_half8x8 m; simdgroup_load(m, y, 8); y[i]=0;

// case: mat from half
>> simdgroup_half8x8 a(0.0h); simdgroup_float8x8 b = a; y[i]=b.thread_elements()[0];

// case: at local
>> atomic_uint a; atomic_fetch_add_explicit(&a, 1u, memory_order_relaxed); y[i]=0;

// case: at acqrel
kernel void f(device atomic_uint* y [[buffer(0)]]) { atomic_exchange_explicit(y, 1u, memory_order_acq_rel); }

// case: at constant
kernel void f(constant atomic_uint* a [[buffer(0)]], device uint* y [[buffer(1)]]) { y[0]=atomic_load_explicit(a, memory_order_relaxed); }

// case: at bool add
kernel void f(device atomic_bool* a [[buffer(0)]]) { atomic_fetch_add_explicit(a, true, memory_order_relaxed); }

// case: at cmp
kernel void f(device atomic_uint* a [[buffer(0)]], device uint* y [[buffer(1)]]) { if (a[0] > 3) y[0]=1; }

// case: at cast
kernel void f(device atomic_uint* a [[buffer(0)]], device uint* y [[buffer(1)]]) { y[0]=uint(a[0]); }

// case: at float xor
kernel void f(device atomic_float* a [[buffer(0)]]) { atomic_fetch_xor_explicit(a, 1, memory_order_relaxed); }

// case: at vec
kernel void f(device atomic<int2>* a [[buffer(0)]]) { }

// case: at struct
struct P { int a; };
kernel void f(device atomic<P>* a [[buffer(0)]]) { }

// case: mlx bf fn [mlx]
inline bfloat16_t uint16_to_bfloat16(const uint16_t x) { return as_type<bfloat16_t>(x); }
>> y[i]=0;

// case: mlx hypot [mlx]
inline float hypot(float a, float b) { return sqrt(a*a+b*b); }
>> y[i]=0;

// case: mlx cast to [mlx]
template <typename U, typename T> inline U cast_to(T val) { return U(val); }
>> y[i]=0;

// case: mlx wpt [mlx]
template <typename U> struct WorkPerThread { };
>> y[i]=0;

// case: mlx is complex [mlx]
template <typename T> constexpr constant bool is_complex_v = false;
>> y[i]=0;

// case: mlx macro ok [mlx]
struct complex_t { float a; };
>> y[i]=0;

// case: own max
float max(float a, float b) { return a > b ? a : b; }
>> y[i]=max(x[i], 2.0f);

// case: own floor4
float4 floor(float4 v) { return v; }
>> y[i]=floor(float4(x[i])).x;

// case: own as type
struct float4 { float a; };
>> y[i]=0;

// case: own uint
typedef int uint;
>> y[i]=0;

// case: own half
typedef float half;
>> y[i]=0;

// case: kw struct
struct kernel { float a; };
>> y[i]=0;

// case: kw ns
namespace device { float g(); }
>> y[i]=0;

// case: kw member
struct S { float vertex; };
>> y[i]=0;

// case: kw enum
enum E { fragment, other };
>> y[i]=0;

// case: kw tparam
template<class kernel> struct S { kernel v; };
>> y[i]=0;

// case: vla fn
float g(int n) { int m=n*2; half a[m]; a[0]=1; return a[0]; }
>> y[i]=g(3);

// case: vla 2d
>> int n=int(i); float a[2][n]; a[0][0]=1; y[i]=a[0][0];

// case: dbl tmpl
template<class T> float g() { return float(T(1)); }
>> y[i]=g<double>();

// case: dbl typedef
typedef double real;
>> y[i]=0;

// case: try fn
void g() try { } catch (...) { }
>> y[i]=0;

// case: new arr
>> thread int* p = new int[3]; y[i]=p[0];

// case: del arr
>> thread int* p = nullptr; delete[] p; y[i]=0;

// case: virt dtor
struct S { virtual ~S() {} };
>> y[i]=0;

// case: std fn
>> y[i]=std::exp(x[i]);

// case: std arr
>> std::array<float,2> a; y[i]=a[0];

// case: std int
>> std::uint32_t a=1; y[i]=a;

// case: inc string
#include <string>
>> y[i]=0;

// case: inc stdio
#include <stdio.h>
>> y[i]=0;

// case: inc type traits
#include <type_traits>
>> y[i]=0;

// case: inc limits
#include <limits>
>> y[i]=0;

// case: puts
>> puts("a"); y[i]=0;

// case: fprintf
>> fprintf(stderr, "a"); y[i]=0;

// case: abort
>> abort(); y[i]=0;

// case: tl static
thread_local int n;
>> y[i]=0;

// case: tg init fn
>> threadgroup float t = exp(x[i]); y[i]=t;

// case: tg init paren
>> threadgroup float t(1); y[i]=t;

// case: dev var init
>> device float t = 1; y[i]=t;

// case: tg ret
threadgroup float* g() { threadgroup float t[2]; return t; }
>> y[i]=*g();

// case: tg ptr to const dev
>> threadgroup float t[2]; const device float* p=t; y[i]=p[0];

// case: dev to tg fn
void g(threadgroup float* p) { p[0]=1; }
>> g(y);

// case: const dev to dev
void g(device float* p) { p[0]=1; }
>> g(x);

// case: constant write arr
kernel void f(device float* y [[buffer(0)]], constant float* c [[buffer(1)]], uint i [[thread_position_in_grid]]) { c[i]=1; }

// case: const member write
struct P { float a; };
kernel void f(device float* y [[buffer(0)]], constant P& p [[buffer(1)]], uint i [[thread_position_in_grid]]) { p.a=1; }

// case: thread ref dev
void g(thread float& v) { v=1; }
>> g(y[i]);

// case: plain method tg
struct S { float v; void set(float a) { v=a; } };
>> threadgroup S s; s.set(1); y[i]=s.v;

// case: plain method constant
struct S { float v; float get() const { return v; } };
kernel void f(device float* y [[buffer(0)]], constant S& s [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=s.get(); }

// case: vec bool int2
>> int2 m = int2(1) == int2(2); y[i]=m.x;

// case: vec lt if2
>> if (int2(1) < int2(2)) y[i]=1;

// case: vec tern2
>> half4 h=half4(1); h = h > 0.0h ? h : half4(0); y[i]=h.x;

// case: vec and if
>> bool2 b(true,false); if (b) y[i]=1;

// case: vec half f
>> float2 a=half2(1.0h); y[i]=a.x;

// case: vec assign2
>> int3 a=int3(1); uint3 b; b=a; y[i]=b.x;

// case: vec param2
float4 g(float4 v) { return v; }
>> y[i]=g(int4(1)).x;

// case: vec ret2
half4 g(float4 v) { return v; }
>> y[i]=g(float4(1)).x;

// case: astype 8 4
>> y[i]=float(as_type<uint>(half4(1)).x);

// case: astype bool
>> y[i]=as_type<float>(true);

// case: bf vec
>> bfloat b=float4(1).x; y[i]=b;

// case: bf tern
>> bfloat b = i ? 1.0f : 2.0f; y[i]=b;

// case: bf arr
>> bfloat b[2]={x[0], x[1]}; y[i]=b[0];

// case: bf from half2
>> half h=1; bfloat b; b=h; y[i]=b;

// case: min uint int2
>> y[i]=min(i, 3);

// case: max short int
>> short s=1; y[i]=max(s, 2);

// case: clamp uint
>> y[i]=clamp(int(i), 0u, 5u);

// case: min size uint
>> y[i]=float(min(size_t(3), i));

// case: log int
>> y[i]=log(int(i));

// case: floor uint
>> y[i]=floor(i);

// case: fmin ints
>> y[i]=fmin(int(i), 2);

// case: max half lit
>> half h=1; y[i]=max(h, 0.0);

// case: narrow u
>> uint a{int(i)}; y[i]=a;

// case: narrow arr
>> short a[2]={int(i), 2}; y[i]=a[0];

// case: lam global
constant auto g = [](float v) { return v; };
>> y[i]=0;

// case: lam in fn
float h(float v) { auto q=[v]() { return v; }; return q(); }
>> y[i]=h(x[i]);

// case: ctad vec
>> vec v(1.0f, 2.0f); y[i]=v.x;

// case: ctad pair
template<class A, class B> struct Pair { A a; B b; Pair(A x, B y) : a(x), b(y) {} };
>> Pair p(1, 2.0f); y[i]=p.b;

// case: auto tparam2
template<auto... V> struct S { static float f() { return 0; } };
>> y[i]=S<1>::f();

// case: requires after
template<class T> T g(T v) requires true { return v; }
>> y[i]=g(x[i]);

// case: concept auto
float g(auto v) { return v; }
>> y[i]=g(x[i]);

// case: paren arr
>> int a[2](1,2); y[i]=a[0];

// case: consteval m
struct S { static consteval int f() { return 1; } };
>> y[i]=S::f();

// case: char8
>> auto s = u8"a"; char8_t c=0; y[i]=c;

// case: bitcast
>> y[i]=std::bit_cast<float>(i);
