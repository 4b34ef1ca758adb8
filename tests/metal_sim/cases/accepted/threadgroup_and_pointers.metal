// case: tg many
struct P { float a; };
>> threadgroup float a[32], b[4][8]; threadgroup half4 c; threadgroup P d[2]; a[i&31]=1; b[1][2]=2; c=half4(1); d[0].a=1; threadgroup_barrier(mem_flags::mem_threadgroup); y[i]=a[0]+b[1][2]+c.x+d[0].a;

// case: tg in block
>> if (i < 4) { threadgroup float a[4]; a[i]=1; y[i]=a[0]; }

// case: tg template kernel
template <typename T, int N>
[[kernel]] void g(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup T a[N * 4]; a[i & 3] = T(1); y[i] = a[0];
}
template [[host_name("g")]] [[kernel]] void g<half, 2>(device half* y [[buffer(0)]], uint i [[thread_position_in_grid]]);

// case: tg zero
>> threadgroup float a[4] = {0}; y[i]=a[0];

// case: tg to helper
METAL_FUNC void g(threadgroup float* p, uint i) { p[i & 7] = i; }
>> threadgroup float a[8]; g(a, i); y[i]=a[0];

// case: const dev copy
>> const device uchar* p=(const device uchar*)x; ushort v=*(const device ushort*)(p+2); y[i]=v;

// case: cast struct
struct B { half d; uchar q[16]; };
>> const device B* b=(const device B*)x + i; half d=b->d; y[i]=float(d)*b->q[0];

// case: reinterpret same
>> device uint* p=reinterpret_cast<device uint*>(y); p[i]=1;

// case: void cast
>> const device void* p=x; y[i]=((const device float*)p)[i];

// case: ptr diff
>> y[i]=float((x+4)-x);

// case: sizeof
>> y[i]=sizeof(float4)+sizeof(half)+alignof(float4);

// case: nullptr dev
>> const device float* p=nullptr; if (i>3) p=x; y[i]=p ? *p : 0;
