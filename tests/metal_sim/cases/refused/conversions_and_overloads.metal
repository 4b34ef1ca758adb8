// case: vec size
>> float3 a=float3(1); float4 b=a; y[i]=b.x;

// case: vec int float
>> int4 a=int4(1); float4 b=a; y[i]=b.x;

// case: vec add types
>> y[i]=(float4(1)+int4(1)).x;

// case: vec mul half float
>> y[i]=(half4(1)*float4(1)).x;

// case: vec arg
float g(float4 v) { return v.x; }
>> y[i]=g(half4(1));

// case: vec ret
float4 g() { return half4(1); }
>> y[i]=g().x;

// case: vec to scalar
>> float a=float4(1); y[i]=a;

// case: vec assign
>> float4 a; a=half4(1); y[i]=a.x;

// case: uint vec int vec
>> int4 a=int4(1); uint4 b=a; y[i]=b.x;

// case: vec and
>> float4 a=float4(1); if (a) y[i]=1;

// case: vec while
>> float4 a=float4(1); while (a > 0.0f) a-=1; y[i]=a.x;

// case: vec eq if
>> float4 a=float4(x[i]); if (a == float4(1)) y[i]=1;

// case: vec not if
>> bool4 m=bool4(true); if (m) y[i]=1;

// case: bool from vec
>> bool b = float4(1) > 0.0f; y[i]=b;

// case: cmp to uint4
>> uint4 m = float4(x[i]) > 0.0f; y[i]=m.x;

// case: cmp assign int4
>> int4 m; m = float4(x[i]) < 1.0f; y[i]=m.x;

// case: cmp add
>> int4 m = int4(1) + (float4(x[i]) < 1.0f); y[i]=m.x;

// case: cmp arg
int g(int4 v) { return v.x; }
>> y[i]=g(float4(x[i]) < 1.0f);

// case: cmp ret
int4 g(float4 v) { return v > 0.0f; }
>> y[i]=g(float4(x[i])).x;

// case: astype 2
>> y[i]=as_type<float2>(x[i]).x;

// case: astype 3
>> ushort a=1; y[i]=as_type<float>(a);

// case: astype struct
struct P { float a,b; };
>> P p{1,2}; y[i]=as_type<float2>(p).x;

// case: bf from half
>> bfloat b=half(1); y[i]=b;

// case: bf assign
>> bfloat b; b=x[i]; y[i]=b;

// case: bf lit f
>> bfloat b=0.5f; y[i]=b;

// case: bf lit
>> bfloat b=0.5; y[i]=b;

// case: bf arg
float g(bfloat v) { return v; }
>> y[i]=g(x[i]);

// case: bf ret
bfloat g(float v) { return v; }
>> y[i]=g(x[i]);

// case: bf mul assign
>> bfloat b=bfloat(1); b*=x[i]; y[i]=b;

// case: bf sum
>> bfloat b=bfloat(1); b=b+x[i]; y[i]=b;

// case: half from bf
>> half h=bfloat(1); y[i]=h;

// case: bf init brace
>> bfloat b{x[i]}; y[i]=b;

// case: bf store
kernel void f(device bfloat* y [[buffer(0)]], const device float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=x[i]; }

// case: bf exp
>> bfloat b=exp(bfloat(1)); y[i]=b;

// case: max mixed
>> y[i]=max(x[i], 0);

// case: max uint int
>> y[i]=max(i, 1);

// case: min long int
>> y[i]=float(min(long(i), 7));

// case: min half float
>> y[i]=min(half(1), x[i]);

// case: clamp mixed
>> y[i]=clamp(x[i], 0, 1.0f);

// case: pow int
>> y[i]=pow(2, int(i));

// case: sqrt int
>> y[i]=sqrt(int(i));

// case: abs uint half
>> y[i]=fmax(1, 2);

// case: mix int
>> y[i]=mix(0, 1, int(i));

// case: narrow brace
>> int a[2]={x[i], 1}; y[i]=a[0];

// case: narrow struct
struct P { uchar a; };
>> P p{int(i)}; y[i]=p.a;

// case: narrow half
>> half h{x[i]}; y[i]=h;

// case: undeclared fn
>> y[i]=foo(x[i]);

// case: undeclared type
>> Foo a; y[i]=0;

// case: wrong argc
>> y[i]=exp(x[i], 1.0f);

// case: wrong member
>> float4 v=float4(1); y[i]=v.q;

// case: wrong swizzle
>> float2 v=float2(1); y[i]=v.w;

// case: missing semicolon
kernel void f(device float* y [[buffer(0)]], const device float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  float a = 1
 y[i]=a;
}

// case: missing return type
g() { return 1; }
>> y[i]=g();

// case: ptr arith vec
>> y[i]=x+1;

// case: enum int
enum class E { a, b };
>> E e = 1; y[i]=float(int(e));

// case: string lit
>> y[i]="abc";

// case: vec too many
>> float2 v=float2(1,2,3); y[i]=v.x;

// case: vec too few
>> float4 v=float4(1,2); y[i]=v.x;

// case: dot sizes
>> y[i]=dot(float3(1),float4(1));

// case: dot types
>> y[i]=dot(float4(1),half4(1));

// case: cross4
>> y[i]=cross(float4(1),float4(1)).x;

// case: length int
>> y[i]=length(int4(1));

// case: popcount float
>> y[i]=popcount(x[i]);

// case: mod float
>> y[i]=x[i] % 2.0f;

// case: shift float
>> y[i]=x[i] << 1;

// case: and float
>> y[i]=x[i] & 1;

// case: uint lit2
>> y[i]=float(clamp(i, 0, 7));

// case: max size t
>> y[i]=float(max(size_t(i), 1u));
