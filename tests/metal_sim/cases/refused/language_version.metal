// case: auto param
auto g(auto v) { return v; }
>> y[i]=g(x[i]);

// case: concept
template<class T> concept Num = sizeof(T) == 4; template<Num T> T g(T v) { return v; }
>> y[i]=g(x[i]);

// case: template lambda
>> auto g = []<class T>(T v) { return v; }; y[i]=g(x[i]);

// case: lambda capture
>> float s=2; auto g=[&](float v) { return v*s; }; y[i]=g(x[i]);

// case: lambda capture val
>> float s=2; auto g=[=](float v) { return v*s; }; y[i]=g(x[i]);

// case: lambda immediate
>> y[i]=[](float v){return v;}(x[i]);

// case: lambda arg
template<class F> float ap(float v, F f) { return f(v); }
>> y[i]=ap(x[i], [](float v){return v+1;});

// case: spaceship
>> y[i] = (int(i) <=> 3) < 0;

// case: ctad array
template<class T> struct P { T a; int b; P(T x, int y) : a(x), b(y) {} };
>> P p{x[i], 1}; y[i]=p.a;

// case: constinit
constinit constant int A = 3;
>> y[i]=1;

// case: using enum
enum class E { a, b };
>> using enum E; y[i]=float(int(a));

// case: range init
>> float a[2]={1,2}; float s=0; for (int n=0; float v : a) s+=v+n; y[i]=s;

// case: abbrev lambda
>> auto g=[](auto v){return v;}; y[i]=g(x[i]);

// case: template template auto
template<auto V> struct N { enum { v = V }; };
>> y[i]=N<4>::v;

// case: deducing this
struct S { float g(this S s) { return 1; } };
>> y[i]=1;

// case: coroutine
>> co_return;

// case: nontype class
struct P { int a; }; template<P p> int g() { return p.a; }
>> y[i]=g<P{1}>();
