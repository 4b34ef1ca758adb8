// case: v4 ctor
>> float4 v(1,2,3,4); float4 w(v.xy, 3, 4); int2 q(1); y[i]=v.x+w.w+q.x;

// case: v4 brace
>> float4 v{1,2,3,4}; float4 w={1,2,3,4}; y[i]=v.x+w.w;

// case: v splat
>> float4 v = 1.0f; v += 2; y[i]=v.x;

// case: v swizzle
>> float4 v=float4(1); v.xyz = v.zyx; v.wx = float2(1,2); y[i]=v.r+v.ga.x;

// case: v index
>> float4 v=float4(1); for (int j=0;j<4;j++) v[j]=j; y[i]=v[i&3];

// case: v dev index
>> const device float4* p=(const device float4*)x; y[i]=p[0][1]+p[1].z;

// case: v convert
>> half4 h=half4(float4(1)); int4 n=int4(h); uchar4 u=uchar4(n); y[i]=float(u.x);

// case: v bool
>> float4 a=float4(x[i]); bool4 m = a > 0.5f; y[i] = any(m) + all(m) + (any(!m) ? 1 : 0);

// case: v bool2
>> float4 a=float4(x[i]); bool4 m = (a > 0.5f) && (a < 2.0f); y[i] = select(a, -a, m).x;

// case: v cmp member
>> float4 a=float4(x[i]); bool b=(a > 0.0f).x; y[i]=b;

// case: v cmp cast
>> float4 a=float4(x[i]); int4 m=int4(a > 0.0f); float4 z=float4(a > 0.0f); y[i]=m.x+z.y;

// case: v select cmp
>> float4 a=float4(x[i]); y[i]=select(a, float4(0), a < 0.0f).x + all(a == a);

// case: v isnan
>> float4 a=float4(x[i]); y[i]=any(isnan(a)) || isinf(x[i]);

// case: v max scalar
>> float4 a=max(float4(x[i]), 0.0f); a=clamp(a, 0.0f, 1.0f); a=mix(a, float4(1), 0.5f); y[i]=a.x;

// case: v min int
>> int4 a=min(int4(int(i)), int4(3)); y[i]=a.x;

// case: v shift
>> uint4 u=uint4(i); u = (u >> 4) & 0xF; u = u << uint4(1); y[i]=u.x;

// case: v neg
>> int4 a=-int4(1); a=~a; y[i]=a.x;

// case: v dot
>> y[i]=dot(half4(1),half4(2)) + length(float3(1)) + distance(float2(1),float2(2)) + normalize(float3(1)).x + cross(float3(1),float3(2)).x;

// case: m44 ops
>> float4x4 m(1.0f); m[1]=float4(1); float4x4 n=m*m; float4 v=n*float4(1); float4 w=v*n; m=transpose(m)*2.0f; y[i]=v.x+w.y+m[0][1]+determinant(m);

// case: m cols
>> float2x2 m=float2x2(float2(1,2),float2(3,4)); half3x3 h=half3x3(1.0h); y[i]=m[1].x+float(h[2][2]);

// case: m device
kernel void f(device float* y [[buffer(0)]], constant float4x4& m [[buffer(1)]], const device float4x4* n [[buffer(2)]], uint i [[thread_position_in_grid]]) { float4 v = m * float4(1); y[i] = v.x + m[0][1] + n[i][2].y; float4x4 k = n[0]; y[i] += k[0][0]; }

// case: packed3
struct P { packed_float3 a; float b; };
kernel void f(device P* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { float3 v = y[i].a; y[i].a = v * 2.0f; y[i].b = y[i].a.x + float3(y[i].a).y; packed_uchar4 c = packed_uchar4(uchar4(1)); y[i].b += c[0]; }

// case: half lit
>> half h=0.5h; h=h*2.0h+1.0h; h=max(h,0.0h); y[i]=h;

// case: bf ops
>> bfloat b=bfloat(x[i]); bfloat c=static_cast<bfloat>(2.0f); b=b*c+c; b=-b; y[i]=float(b)+b;

// case: bf int
>> bfloat b=bfloat(1); b=b+bfloat(int(i)); y[i]=float(b);

// case: bf half cast
>> half h=half(x[i]); bfloat b=static_cast<bfloat>(h); half k=static_cast<half>(b); y[i]=float(k);

// case: bf buf
kernel void f(device bfloat* y [[buffer(0)]], const device bfloat* x [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i]=x[i]*x[i+1]; y[i]=bfloat(float(x[i])*2.0f); }

// case: bf exp float
>> bfloat b=bfloat(x[i]); y[i]=exp(b); y[i]=exp(float(b));
