// case: const ref
float g(const float& v) { return v; }
>> float a=1; y[i]=g(a);

// case: member ptr
struct S { float* p; };
>> float a=1; S s{&a}; y[i]=*s.p;

// case: member const ptr
struct S { const float* p; int n; };
>> y[i]=0;

// case: member ref
struct S { float& p; S(thread float& q) : p(q) {} };
>> y[i]=0;

// case: ptr ptr
void g(float** p) {}
>> y[i]=0;

// case: void ptr
void g(void* p) {}
>> y[i]=0;

// case: struct ptr
struct P { float a; }; float g(const P* p) { return p->a; }
>> P p; y[i]=g(&p);

// case: vec ref
void g(float4& v) { v.x = 1; }
>> float4 v = float4(x[i]); g(v); y[i] = v.x;

// case: out param second
void g(const device float* p, float& o) { o = p[0]; }
>> float a=0; g(x,a); y[i]=a;

// case: lambda like functor
struct F { void operator()(float& v) const { v = 1; } };
>> y[i]=0;

// case: method param
struct F { float get(const float* v) { return v[0]; } };
>> y[i]=0;

// case: static cast ptr
>> float a[4]; y[i] = *static_cast<float*>(a);

// case: reinterpret ptr
>> uint a[4]={0}; y[i] = *reinterpret_cast<float*>(a);

// case: ccast local
>> uint a[4]={0}; y[i] = *(float*)a;

// case: ccast const
>> uint a[4]={0}; y[i] = ((const float*)&a)[1];

// case: typedef ptr
typedef float* fp;
>> float a=1; fp p=&a; y[i]=*p;

// case: using ptr
using fp = float*;
>> float a=1; fp p=&a; y[i]=*p;

// case: template arg ptr
template<class T> struct B { T v; }; struct C { B<float*> b; };
>> y[i]=0;

// case: two decl
>> float a=1; float *p=&a, *q=&a; y[i]=*p+*q;

// case: for ptr
>> float a[4]={0}; for (float* p = a; p < a+4; p++) y[i] += 1;

// case: ref array
float g(float (&v)[4]) { return v[0]; }
>> float a[4]={0}; y[i]=g(a);

// case: ref to template
template<class T> void g(T& v) { v = T(1); }
>> y[i]=0;

// case: local const ref
>> float a=x[i]; const float& r=a; y[i]=r;

// case: rvalue ref
float g(float&& v) { return v; }
>> y[i]=g(x[i]);

// case: return ref
float& g(thread float& v) { return v; }
>> float a=1; y[i]=g(a);

// case: kernel param ptr
kernel void f(device float* y [[buffer(0)]], float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] = x[i]; }

// case: kernel param ref
kernel void f(device float* y [[buffer(0)]], const float& x [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] = x; }

// case: kernel param thread ptr
kernel void f(device float* y [[buffer(0)]], thread float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] = x[i]; }

// case: macro ptr
#define ARG(T, n) T* n
float g(ARG(float, p)) { return p[0]; }
>> float a=1; y[i]=g(&a);

// case: copy ctor ref
struct S { float a; S() {} S(const S& o) : a(o.a) {} };
>> y[i]=0;

// case: operator ref
struct S { float a; }; S operator+(const S& a, const S& b) { S r; r.a=a.a+b.a; return r; }
>> y[i]=0;

// case: null ptr
>> float* p = nullptr; y[i] = p == nullptr;

// case: mlx form ptr [mlx]
METAL_FUNC float g(float* p) { return *p; }
>> float a=1; y[i]=g(&a);

// case: array of ptr
>> float a=1; float* p[2] = {&a,&a}; y[i]=*p[0];
