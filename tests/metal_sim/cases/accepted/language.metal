// case: ns nested
namespace a::b { METAL_FUNC float g() { return 1; } }
>> y[i]=a::b::g();

// case: ns c14
namespace a { namespace b { METAL_FUNC float g() { return 1; } } }
>> y[i]=a::b::g();

// case: static assert nomsg
>> static_assert(sizeof(float)==4); y[i]=1;

// case: struct binding
struct P { float a,b; };
>> P p{1,2}; auto [a,b]=p; y[i]=a+b;

// case: fold
template<class... A> float g(A... a) { return (a + ...); }
>> y[i]=g(1.0f,2.0f);

// case: variadic
float g(float a) { return a; }
template<class... A> float g(float a, A... r) { return a + g(r...); }
>> y[i]=g(1.0f,2.0f);

// case: designated
struct P { float a,b; };
>> P p={.a=1,.b=2}; y[i]=p.a;

// case: range for
>> float a[3]={1,2,3}; float s=0; for (float v : a) s+=v; y[i]=s;

// case: auto ret
auto g(float v) { return v*2; }
>> y[i]=g(x[i]);

// case: decltype auto
template<class T> auto g(T v) -> decltype(v+v) { return v+v; }
>> y[i]=g(x[i]);

// case: alias template
template<class T> using V = vec<T,2>;
>> V<float> v=V<float>(1,2); y[i]=v.y;

// case: inherit
struct P { float a; }; struct Q : P { float b; };
>> Q q; q.a=1; q.b=2; y[i]=q.a+q.b;

// case: crtp
template<class D> struct B { float g() { return 1; } }; struct Q : B<Q> {};
>> Q q; y[i]=q.g();

// case: operator over
struct C { float r,i; };
C operator+(C a, C b) { return {a.r+b.r, a.i+b.i}; }
>> C a{1,2},b{3,4}; C c=a+b; y[i]=c.r;

// case: operator index
struct S { float v[4]; thread float& operator[](int j) { return v[j]; } };
>> S s; s[1]=2; y[i]=s[1];

// case: functor
struct Add { template<class T> T operator()(T a, T b) { return a+b; } };
>> Add op; y[i]=op(x[i],1.0f);

// case: union
union U { float a; uint b; };
>> U u; u.a=x[i]; y[i]=float(u.b);

// case: bitfield
struct B { uint a : 4; uint b : 28; };
>> B b; b.a=3; y[i]=b.a;

// case: enum class
enum class E : uint { a, b };
>> E e=E::b; y[i]=float(int(e));

// case: switch
>> switch (i & 3) { case 0: y[i]=1; break; case 1: y[i]=2; break; default: y[i]=3; }

// case: do while
>> int n=3; do { y[i]+=n; } while (--n);

// case: comma for
>> for (int a=0,b=3;a<b;a++,b--) y[i]+=a*b;

// case: struct copy dev
struct P { float a; half b[4]; };
kernel void f(device P* y [[buffer(0)]], const device P* x [[buffer(1)]], uint i [[thread_position_in_grid]]) { P p = x[i]; p.a += 1; y[i] = p; threadgroup P t[4]; t[i & 3] = p; P q = t[0]; y[i + 1] = q; y[i + 2] = x[i]; }

// case: dev method
struct S { float v; float get() const device { return v; } float get() const thread { return v; } void set(float a) device { v = a; } };
kernel void f(device S* s [[buffer(0)]], uint i [[thread_position_in_grid]]) { s[i].set(s[i].get() + 1); S l = s[i]; l.v = l.get(); s[i] = l; }

// case: constant method
struct S { float v; float get() const constant { return v; } };
kernel void f(device float* y [[buffer(0)]], constant S& s [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] = s.get(); }

// case: tg method
struct S { float v; void set(float a) threadgroup { v = a; } };
>> threadgroup S t; t.set(1); y[i]=t.v;
