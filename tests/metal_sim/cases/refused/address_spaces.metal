// case: tg init scalar
>> threadgroup float t = 1; y[i]=t;

// case: tg init expr
>> threadgroup float t = x[0]; y[i]=t;

// case: tg init brace
>> threadgroup int t[3] = {1,2,3}; y[i]=t[i%3];

// case: dev arr auto
>> device float t[4]; t[0]=1; y[i]=t[0];

// case: const local
>> constant float t = 1; y[i]=t;

// case: dev to thread
float g(const thread float* p) { return p[0]; }
>> y[i]=g(x);

// case: dev to constant
float g(constant float* p) { return p[0]; }
>> y[i]=g(x);

// case: constant to device
constant float T[2]={1,2};
float g(const device float* p) { return p[0]; }
>> y[i]=g(T);

// case: thread to device
float g(const device float* p) { return p[0]; }
>> float a[2]={1,2}; y[i]=g(a);

// case: assign ptr
>> threadgroup float t[4]; device float* p = y; p = t; p[0]=1;

// case: cast dev tg
>> threadgroup float t[4]; ((device float*)t)[0]=1; y[i]=t[0];

// case: reinterpret dev thread
>> y[i]=*reinterpret_cast<thread float*>(y);

// case: write constant
constant float T[2]={1,2};
>> T[0]=1; y[i]=T[0];

// case: write const ref
kernel void f(device float* y [[buffer(0)]], constant float& v [[buffer(1)]], uint i [[thread_position_in_grid]]) { v = 1; y[i]=v; }

// case: write const ptr
>> x[i]=1;

// case: drop const
>> device float* p = x; p[0]=1;

// case: tg in helper loop
void g(device float* y) { for (int j=0;j<2;j++) { threadgroup float t[2]; t[0]=1; y[j]=t[0]; } }
>> g(y);

// case: tg in method
struct S { void g(device float* y) { threadgroup float t[2]; t[0]=1; y[0]=t[0]; } };
>> S s; s.g(y);

// case: tg in template helper
template<int N> void g(device float* y) { threadgroup float t[N]; t[0]=1; y[0]=t[0]; }
>> g<4>(y);

// case: tg scalar helper
float g() { threadgroup float t; t=1; return t; }
>> y[i]=g();

// case: tg member
struct S { threadgroup float t[4]; };
>> y[i]=0;

// case: dev ref to tg
void g(device float& v) { v = 1; }
>> threadgroup float t[4]; g(t[0]); y[i]=0;

// case: tern ptr
>> threadgroup float t[4]; t[0]=0; y[i]=*(i ? t : x);

// case: ret dev as thread
thread float* g(device float* p) { return p; }
>> y[i]=*g(y);

// case: barrier noargs
>> threadgroup_barrier(); y[i]=0;

// case: barrier int
>> threadgroup_barrier(1); y[i]=0;

// case: cmp ptr
>> threadgroup float t[4]; y[i] = (t == y);

// case: struct ptr mismatch
struct P { device float* k; };
>> threadgroup float t[4]; P p; p.k = t; y[i]=0;

// case: assign struct
struct P { float a; };
kernel void f(device P* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1.0f; }

// case: assign struct2
struct P { float a; }; struct Q { float a; };
kernel void f(device P* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { Q q{1}; y[i] = q; }

// case: init struct
struct P { float a; }; struct Q { float a; };
kernel void f(device Q* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { P p = y[i]; }
