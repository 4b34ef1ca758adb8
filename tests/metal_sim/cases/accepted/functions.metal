// case: infinity
>> y[i]=INFINITY + NAN + FLT_MAX + M_PI_F + MAXFLOAT + HUGE_VALF + float(HALF_MAX) + M_SQRT2_F;

// case: limits
>> y[i]=numeric_limits<float>::infinity()+numeric_limits<float>::quiet_NaN()+numeric_limits<uint>::max()+numeric_limits<float>::lowest()+numeric_limits<float>::epsilon();

// case: simd ballot
>> simd_vote v=simd_ballot(x[i] > 0); ulong m=(ulong)v; y[i]=float(popcount(m)) + v.all() + v.any();

// case: simd ballot ctz
>> simd_vote::vote_t m = simd_vote::vote_t(simd_ballot(x[i] > 0)); y[i]=ctz(m);

// case: simd all types
>> y[i]=simd_sum(int(i))+simd_max(uint(i))+float(simd_min(half(1)))+simd_product(short(1))+simd_and(uint(1))+simd_or(int(1))+simd_xor(ushort(1))+simd_prefix_exclusive_sum(x[i])+simd_broadcast(x[i],0)+simd_broadcast_first(uchar(1))+simd_shuffle_xor(x[i],1)+simd_shuffle_rotate_up(x[i],1)+simd_shuffle_and_fill_up(x[i],0.0f,1)+simd_is_first()+quad_sum(x[i])+quad_shuffle_xor(x[i],1);

// case: simd vec2
>> uint2 u=simd_shuffle(uint2(i),ushort(3)); half4 h=simd_max(half4(1)); y[i]=u.x+h.x;

// case: mat all
>> threadgroup half t[64]; simdgroup_half8x8 a, b; simdgroup_float8x8 c(0), d; simdgroup_load(a,t,8); simdgroup_load(b,t,8,ulong2(0),true); simdgroup_multiply_accumulate(c,a,b,c); simdgroup_multiply(d,c,c); simdgroup_store(c,y,8); simdgroup_store(d,y+64,8,ulong2(0,0),false); c.thread_elements()[1]=2;

// case: mat bf
>> simdgroup_matrix<bfloat,8,8> m; simdgroup_bfloat8x8 n(bfloat(0)); m = n; y[i]=float(m.thread_elements()[0]);

// case: mat thread ref
void g(thread simdgroup_float8x8& m) { m.thread_elements()[0] = 1; }
>> simdgroup_float8x8 m(0); g(m); y[i]=m.thread_elements()[0];

// case: at types
kernel void f(device atomic_uint* a [[buffer(0)]], device atomic_int* b [[buffer(1)]], device atomic<float>* c [[buffer(2)]], device atomic_ulong* d [[buffer(3)]], volatile device atomic_bool* e [[buffer(4)]], uint i [[thread_position_in_grid]]) { threadgroup atomic_uint t; atomic_store_explicit(&t, 0, memory_order_relaxed); atomic_fetch_add_explicit(&t, 1, memory_order_relaxed); atomic_fetch_max_explicit(a, 1u, memory_order_relaxed); atomic_fetch_min_explicit(b, -1, memory_order_relaxed); atomic_exchange_explicit(c, 1.0f, memory_order_relaxed); atomic_max_explicit(d, 3ul, memory_order_relaxed); atomic_store_explicit(e, true, memory_order_relaxed); int x = 0; atomic_compare_exchange_weak_explicit(b, &x, 1, memory_order_relaxed, memory_order_relaxed); uint v = atomic_load_explicit(a + i, memory_order_relaxed); atomic_fetch_or_explicit(a, v, memory_order_relaxed); }

// case: int fns
>> uint a=mulhi(i,3u)+mad24(i,2u,1u)+mul24(i,2u)+insert_bits(i,3u,4,5)+absdiff(i,3u)+addsat(i,1u)+hadd(i,1u)+madhi(i,1u,2u)+clz(ushort(1))+max3(i,1u,2u)+rotate(uchar(1),uchar(2)); y[i]=a+abs(int(i)-3);

// case: float fns
>> y[i]=fma(x[i],2.0f,1.0f)+fmod(x[i],2.0f)+powr(x[i],2.0f)+ldexp(x[i],3)+trunc(x[i])+sign(x[i])+step(0.0f,x[i])+smoothstep(0.0f,1.0f,x[i])+saturate(x[i])+copysign(x[i],1.0f)+fract(x[i])+exp10(x[i])+sinpi(x[i])+atan2(x[i],1.0f)+median3(x[i],1.0f,2.0f)+fmin(x[i],1.0f)+rint(x[i])+round(x[i])+tanh(x[i])+asinh(x[i])+fdim(x[i],1.0f)+nextafter(x[i],2.0f)+precise::divide(x[i],2.0f)+fast::rsqrt(x[i])+ilogb(x[i]);

// case: out fns
>> float c; float s=sincos(x[i],c); int e; float m=frexp(x[i],e); float w; float r=modf(x[i],w); y[i]=s+c+m+e+w+r;

// case: pow lit
>> y[i]=pow(x[i], 2) + pow(x[i], 0.5) + max(x[i], 0.0) + min(1.0, x[i]) + clamp(x[i], 0.0, 1.0);

// case: half fns
>> half h=half(x[i]); h=exp(h)+sqrt(h)+max(h,half(0))+clamp(h,half(0),half(1))+abs(h); y[i]=h;

// case: int conv
>> ushort a=i; uchar b=a; int c=x[i]; half h=x[i]; y[i]=a+b+c+h;

// case: as types
>> y[i]=as_type<float>(i)+as_type<half2>(i).x+as_type<uint>(x[i])+as_type<uchar4>(i).y+float(as_type<ulong>(uint2(i)))+float(as_type<bfloat>(ushort(i)));

// case: arrays
>> array<float,4> a; a[0]=1; y[i]=a[0]+a.size();

// case: traits
template<class T, enable_if_t<is_floating_point_v<T>, bool> = true> T g(T v) { return v; }
static_assert(is_same<half, half>::value, "");
>> y[i]=g(x[i]);

// case: conditional
>> conditional_t<(sizeof(float)>2), float, half> v=x[i]; y[i]=v;

// case: pragma unroll
kernel void f(device float* y [[buffer(0)]], const device float* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  float s=0;
#pragma unroll
for (int j=0;j<4;j++) s+=x[j];
_Pragma("clang loop unroll(full)")
for (int j=0;j<4;j++) s+=x[j];
 y[i]=s;
}

// case: loops attr
>> float s=0; for (uint j=i;j<64;j+=32) { if (j==40) continue; s+=x[j]; if (s>9) break; } y[i]=s;

// case: literals without a suffix in a template
template <typename T> T g(T v) { return fmax(0, fmin(1, v / 6 + 0.5)) + T(1e-3); }
>> y[i] = g(x[i]) + 0x1p-3;
