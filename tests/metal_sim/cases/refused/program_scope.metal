// case: global const
const float A = 2;
>> y[i]=A;

// case: global const array
const float A[2] = {1,2};
>> y[i]=A[i&1];

// case: global static const
static const int A = 2;
>> y[i]=A;

// case: global static constexpr
static constexpr int A = 2;
>> y[i]=A;

// case: global struct
struct P { float a; }; P A;
>> y[i]=A.a;

// case: global device
device float A;
>> y[i]=A;

// case: global namespace
namespace q { float A = 1; }
>> y[i]=q::A;

// case: global constexpr template
template<class T> constexpr T A = T(2);
>> y[i]=A<float>;

// case: global ptr
constant float* P;
>> y[i]=0;

// case: static member
struct S { static int n; };
>> y[i]=S::n;

// case: static constexpr member
struct S { static constexpr int n = 3; };
>> y[i]=S::n;

// case: static const member
struct S { static const int n = 3; };
>> int a[S::n]; a[0]=1; y[i]=a[0];

// case: template static constexpr member
template<int N> struct S { static constexpr int n = N; };
>> y[i]=S<3>::n;

// case: static local const
>> static const float k[2]={1,2}; y[i]=k[i&1];

// case: static local constexpr
>> static constexpr float k=2; y[i]=k;

// case: static local fn
int g() { static int n = 0; return n++; }
>> y[i]=g();

// case: anon ns
namespace { float A = 1; }
>> y[i]=A;

// case: global enum arr
enum E { a, b }; E A[2] = {a, b};
>> y[i]=A[0];

// case: global mlx [mlx]
constexpr float A[2] = {1,2};
>> y[i]=A[0];

// case: thread global
thread float A = 1;
>> y[i]=A;

// case: global threadgroup mlx [mlx]
threadgroup float s[32];
>> s[i&31]=1; y[i]=s[0];
