// case: alignas
struct alignas(16) P { float a; };
>> P p; p.a=1; y[i]=p.a+alignof(P);

// case: nested tmpl
template<class T> struct B { T w; }; template<class T> struct A { T v; };
>> A<B<float>> a; a.v.w=1; y[i]=a.v.w;

// case: private
class C { private: float v; public: C(float a) : v(a) {} float get() const { return v; } static float two() { return 2; } enum { K = 3 }; };
>> C c(2); y[i]=c.get();

// case: constexpr fn
constexpr int sq(int n) { return n*n; }
>> float a[sq(3)]={0}; y[i]=a[0];

// case: recursion
int fact(int n) { return n < 2 ? 1 : n * fact(n - 1); }
>> y[i]=fact(3);

// case: default args
float g(float v, float s = 2, bool n = false) { return n ? -v : v*s; }
>> y[i]=g(x[i]);

// case: half4 cast
>> const device half4* h=(const device half4*)x; float4 f=float4(h[i]); *(device float4*)(y+4*i)=f; *((device half4*)(y+i))=half4(f);

// case: auto range ref
>> float s[4]; for (auto& v : s) v=1; for (thread float& v : s) v=2; y[i]=s[0];

// case: atomic cast
>> atomic_fetch_add_explicit((device atomic_uint*)y, 1u, memory_order_relaxed); atomic_fetch_add_explicit((device atomic<float>*)&y[i], 1.0f, memory_order_relaxed);

// case: ref cast
>> (device uint&)y[i] = 1; device float4& v=reinterpret_cast<device float4&>(y[0]); v.x=1;

// case: auto dev ref
>> const device auto& p = x[0]; y[i]=p;

// case: int arr
>> int a[]={1,2,3}; const half h[2]={1,2}; y[i]=a[i%3]+h[0];

// case: constant params
struct Q { float a; int2 b[2]; };
kernel void f(device float* y [[buffer(0)]], constant Q* q [[buffer(2)]], constant float (&t)[4] [[buffer(3)]], uint i [[thread_position_in_grid]]) { y[i]=q->a+q[1].b[0].x+t[i&3]; }

// case: host name
[[host_name("foo")]] kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=1; }

// case: maybe unused
>> [[maybe_unused]] float a=1; y[i]=1;

// case: tmpl inst2
template<typename T>
kernel void g(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i]=T(1); }
typedef decltype(g<float>) g_t;
template [[host_name("g_f")]] kernel g_t g<float>;
template [[host_name("g_h")]] kernel void g<half>(device half* y, uint i);

// case: out of class
struct S { float v; float get() const; };
float S::get() const { return v; }
>> S s; s.v=1; y[i]=s.get();

// case: call op thread
struct F { float operator()(float v) const thread { return v; } };
>> F f; y[i]=f(x[i]);

// case: ref 2d
void g(thread float (&a)[2][3]) { a[0][0]=1; }
>> float a[2][3]={{0}}; g(a); y[i]=a[0][0];

// case: mat ctor
>> float3x3 m=float3x3(1,0,0,0,1,0,0,0,1); float4x4 n(float4(1),float4(2),float4(3),float4(4)); y[i]=m[0].x+n.columns[1].y+n[2].xyz.x; float3 v=m*float3(1); m=m*m; n*=2.0f;

// case: lane uint
>> uint l=i&31; y[i]=simd_shuffle(x[i],l)+simd_broadcast(x[i],ushort(l))+simd_shuffle_xor(x[i],l^1);

// case: vec generic
>> vec<float,4> v(1); metal::vec<half,2> h(1.0h,2.0h); vec<uint,3> u=vec<uint,3>(1,2,3); y[i]=v.x+h.y+u.z;

// case: char lit
>> char c='a'; y[i]=c; bool b=true; b &= false; y[i]+=b;

// case: mod int
>> int a=int(i)%3; uint b=i%7u; a<<=2; b>>=1; a^=b; y[i]=a|b;

// case: nested struct dev
struct B { half d; uchar q[4]; };
struct C { B b[2]; float s; };
kernel void f(device float* y [[buffer(0)]], const device C* c [[buffer(1)]], uint i [[thread_position_in_grid]]) { const device B& b = c[i].b[1]; const device uchar* q = b.q; y[i]=float(b.d)*q[2]+c->s; B l=c[0].b[0]; y[i]+=l.q[0]; }

// case: tg 2d ptr
>> threadgroup float t[4][8]; threadgroup float* r=t[1]; threadgroup float (*p)[8]=t; r[0]=1; p[1][2]=3; y[i]=t[1][0];

// case: tg struct with method
struct T { float a[4]; float sum() const { return a[0]; } };
>> threadgroup T s; s.a[0]=1; y[i]=s.a[0];

// case: simd bool vote
>> bool p = x[i] > 0.5; if (simd_any(p) && !simd_all(p)) y[i]=1;

// case: switch enum
enum class M { a, b };
>> switch (M::b) { case M::a: y[i]=1; break; case M::b: y[i]=2; }

// case: global using
using F = float; typedef struct { float a; float b; } T2;
>> y[i]=F(1)+sizeof(T2);

// case: const member fn tmpl
template<typename T, int N> struct Acc { T v[N]; Acc() { for (int j=0;j<N;j++) v[j]=T(0); } void add(const device T* p) { for (int j=0;j<N;j++) v[j]+=p[j]; } T sum() const { T s=0; for (int j=0;j<N;j++) s+=v[j]; return s; } };
>> Acc<float,4> a; a.add(x+i); y[i]=a.sum();

// case: partial spec
template<class T> struct S { static constant constexpr int k = 1; }; template<> struct S<half> { static constant constexpr int k = 2; };
>> y[i]=S<half>::k+S<float>::k;

// case: pack unpack
>> y[i]=unpack_unorm4x8_to_float(i).x+float(pack_float_to_unorm4x8(float4(x[i])));

// case: int types
>> int8_t a=-1; uint8_t b=2; int16_t c=3; uint64_t d=4; size_t e=5; ptrdiff_t f=6; y[i]=a+b+c+d+e+f;

// case: bool arith
>> y[i]=(x[i]>0)+(x[i]<1)*2; y[i]+=float(x[i]==1);

// case: half cmp
>> half h=half(x[i]); if (h > 0.5h && h < 1) y[i]=h > 0 ? h : -h;

// case: half float mix
>> half h=half(x[i]); float f=h*2.0f+1; h*=2; h+=1.0h; f+=h; y[i]=f*h;

// case: half dbl lit
>> half h=half(x[i])*0.5; y[i]=h;

// case: vec half lit
>> half4 h=half4(x[i]); h*=half(0.5); float4 f=float4(h)*2.0+1.0; y[i]=f.x;

// case: unused param
float g(float a, float) { return a; }
>> y[i]=g(1,2);

// case: fn ptr param by tmpl
float g(float v) { return v; }
template<float (*F)(float)> float ap(float v) { return F(v); }
>> y[i]=ap<g>(x[i]);

// case: dequant tmpl
template<typename T> void dq(const device float* p, thread T& r) { r[0][0]=p[0]; }
template<typename T, void (*F)(const device float*, thread T&)> void ap(const device float* p, thread T& r) { F(p, r); }
>> float4x4 r; ap<float4x4, dq>(x, r); y[i]=r[0][0];

// case: texture
kernel void f(texture2d<float, access::read> a [[texture(0)]], texture2d<float, access::write> b [[texture(1)]], uint2 p [[thread_position_in_grid]]) { if (p.x < b.get_width()) b.write(a.read(p), p); }

// case: sampler
constexpr sampler s(filter::linear, address::clamp_to_edge);
kernel void f(texture2d<half> a [[texture(0)]], device half4* y [[buffer(0)]], uint2 p [[thread_position_in_grid]]) { y[p.x] = a.sample(s, float2(p) / 16.0f); }

// case: extern c
static inline __attribute__((always_inline)) float g(float v) { return v; }
>> y[i]=g(x[i]);

// case: attribute unroll
>> float s=0; y[i]=s;

// case: ull bits
>> ulong a=1ul<<40; ulong b=a|0xFFul; y[i]=float(b>>32)+float(uint(a>>8));

// case: hex bin
>> uint a=0xFFu; uint b=0b1010; uint c=1'000; y[i]=a+b+c;

// case: volatile dev
>> volatile device float* v=y; v[i]=1;

// case: coherent
>> threadgroup volatile float t[32]; t[i&31]=1; y[i]=t[0];

// case: const after
>> float const a=1; uint const b=2; float4 const v=float4(a); y[i]=v.x+b;

// case: dep template call
struct S { template<int N> static float m(float v) { return v*N; } };
template<class A> float w(float v) { return A::template m<3>(v); }
>> y[i]=w<S>(x[i]);

// case: comma decl ptrs
>> const device float *a = x, *b = x + 1; y[i]=*a+*b;

// case: thread decl ptrs
>> float s[2]={1,2}; thread float *a = s, *b = s + 1; y[i]=*a+*b;

// case: this use
struct S { float v; thread S& set(float a) { this->v=a; return *this; } };
>> S s; s.set(3); y[i]=s.v;

// case: tmpl struct ptr member
template<class T> struct L { const device T* p; int n; T get(int j) const { return p[j+n]; } };
>> L<float> l{x, 3}; y[i]=l.get(0);

// case: loader like
template<typename T> struct L { const device T* src; threadgroup T* dst; const short n; METAL_FUNC L(const device T* s_, threadgroup T* d_, ushort k) : src(s_ + k), dst(d_), n(k) {} METAL_FUNC void load() const { dst[0] = src[0]; } };
>> threadgroup float t[32]; L<float> l(x, t, i); l.load(); y[i]=t[0];

// case: mlx shape kernel [mlx]
[[kernel]] void custom_kernel_c(const device float16_t* a [[buffer(0)]], const constant int* a_shape [[buffer(1)]], const constant int64_t* a_strides [[buffer(2)]], const constant int& a_ndim [[buffer(3)]], const constant int32_t& n [[buffer(4)]], device bfloat16_t* out [[buffer(5)]], device atomic<uint32_t>* cnt [[buffer(6)]], uint3 thread_position_in_grid [[thread_position_in_grid]], uint3 threads_per_threadgroup [[threads_per_threadgroup]]) {
  uint e = thread_position_in_grid.x;
  auto loc = elem_to_loc(e, a_shape, a_strides, a_ndim);
  out[e] = static_cast<bfloat16_t>(a[loc]);
  atomic_fetch_add_explicit(cnt, 1, memory_order_relaxed);
}

// case: mlx fn [mlx]
METAL_FUNC float gelu(float v) { return 0.5f * v * (1.0f + metal::precise::tanh(0.79788456f * (v + 0.044715f * v * v * v))); }
[[max_total_threads_per_threadgroup(512)]]
[[kernel]] void custom_kernel_h(const device half* x [[buffer(0)]], device half* y [[buffer(1)]], uint3 thread_position_in_grid [[thread_position_in_grid]]) {
 uint i = thread_position_in_grid.x; y[i] = half(gelu(float(x[i]))); }
