// case: const auto
>> const auto p = x + i; y[i]=*p;

// case: auto local ptr
>> float a[2]={1,2}; auto p = a; thread auto* q = a; y[i]=p[1]+q[0];

// case: auto ref dev
>> device auto& r = y[i]; r = 1;

// case: thread ptr
float g(const thread float* p) { return p[0]; }
>> float a[2]={1,2}; y[i]=g(a);

// case: thread ptr after
float g(float thread const* p) { return p[0]; }
>> float a[2]={1,2}; y[i]=g(a);

// case: east space
float g(float const device* p) { return p[0]; }
>> y[i]=g(x);

// case: const thread ref
float g(const thread float& v) { return v; }
>> float a=1; y[i]=g(a);

// case: thread const ref
float g(thread const float& v) { return v; }
>> float a=1; y[i]=g(a);

// case: thread arr param
float g(thread float p[4]) { return p[3]; }
>> float a[4]={1,2,3,4}; y[i]=g(a);

// case: thread arr ref
float g(thread float (&p)[4]) { return p[3]; }
>> float a[4]={1,2,3,4}; y[i]=g(a);

// case: dev arr param
float g(const device float p[4]) { return p[3]; }
>> y[i]=g(x);

// case: ref to dev ptr
void g(thread const device float*& p) { p += 1; }
>> const device float* p=x; g(p); y[i]=*p;

// case: ref to dev ptr mlx
void g(const device float*& p) { p += 1; }
>> const device float* p=x; g(p); y[i]=*p;

// case: two space ptr
void g(const device float* thread* p) { *p += 1; }
>> const device float* p=x; g(&p); y[i]=*p;

// case: tg ptr local
>> threadgroup float t[8]; threadgroup float* p = t + 1; p[0]=1; y[i]=t[1];

// case: constant ptr
constant float T[2]={1,2};
>> constant float* p = T; y[i]=p[i&1];

// case: static constant
static constant float T[2]={1,2};
>> y[i]=T[0];

// case: constexpr constant
constexpr constant int N = 4;
>> float a[N]; a[0]=1; y[i]=a[0];

// case: constant constexpr
constant constexpr int N = 4;
>> float a[N]; a[0]=1; y[i]=a[0];

// case: const constant
const constant float A = 2;
>> y[i]=A;

// case: constant struct
struct P { float a; int b; }; constant P A = {1, 2};
>> y[i]=A.a;

// case: constant 2d
constant float A[2][2] = {{1,2},{3,4}};
>> y[i]=A[1][0];

// case: constant vec
constant float4 A = float4(1,2,3,4);
constant float2 B[2] = {float2(1,2), float2(3,4)};
>> y[i]=A.x+B[1].y;

// case: static const member constant
template<int N> struct S { static constant constexpr int n = N; };
>> y[i]=S<3>::n;

// case: steel const
#define STEEL_CONST static constant constexpr const
struct S { STEEL_CONST int n = 3; };
>> y[i]=S::n;

// case: enum consts
enum { N = 4 };
>> float a[N]; a[0]=1; y[i]=a[0];

// case: local constexpr
>> constexpr int N=4; float a[N]={0}; y[i]=a[0];

// case: local const arr
>> const float k[4]={1,2,3,4}; y[i]=k[i&3];

// case: local constexpr arr
>> constexpr float k[4]={1,2,3,4}; y[i]=k[i&3];

// case: fc many
constant bool A [[function_constant(1)]];
constant int N [[function_constant(2)]];
constant bool D = is_function_constant_defined(N);
>> y[i]=(A ? 1 : 0) + N;

// case: fc derived
constant bool A [[function_constant(1)]];
constant bool B = !A;
>> y[i]=B ? 1 : 0;

// case: array argument without a space, as MLX's scan.h and llama.cpp have it
float g(const float v[4]) { return v[3]; }
>> float a[4] = {1, 2, 3, 4}; y[i] = g(a);

// case: array argument of a template
template <typename T, int N> float g(T v[N]) { return v[0]; }
>> float a[4] = {1, 2, 3, 4}; y[i] = g<float, 4>(a);
