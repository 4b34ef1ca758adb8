// case: kw vertex
>> float vertex = x[i]; y[i]=vertex;

// case: kw kernel
>> float kernel = x[i]; y[i]=kernel;

// case: kw device
>> float device = x[i]; y[i]=device;

// case: kw constant
>> float constant = x[i]; y[i]=1;

// case: kw thread
>> float thread = x[i]; y[i]=1;

// case: kw threadgroup
>> int threadgroup = 1; y[i]=1;

// case: kw half
>> float half = x[i]; y[i]=half;

// case: kw bfloat
>> float bfloat = x[i]; y[i]=bfloat;

// case: kw fn name
float fragment(float v) { return v; }
>> y[i]=fragment(x[i]);

// case: kw param
float g(float vertex) { return vertex; }
>> y[i]=g(x[i]);

// case: vla2
>> int n=int(i); float a[n+1]; a[0]=1; y[i]=a[0];

// case: vla tg
>> int n=int(i); threadgroup float a[n]; a[0]=1; y[i]=a[0];

// case: vla constvar
>> const int n=int(i); float a[n]; a[0]=1; y[i]=a[0];

// case: long double
>> long double a=1; y[i]=a;

// case: long long
>> long long a=1; y[i]=a;

// case: ulonglong
>> unsigned long long a=1; y[i]=a;

// case: double fn
double g(float v) { return v; }
>> y[i]=g(x[i]);

// case: double cast
>> y[i]=(double)x[i];

// case: double cast2
>> y[i]=float(double(x[i]));

// case: double2
>> double2 v; y[i]=0;

// case: throw
>> if (i > 3) throw 1; y[i]=1;

// case: new
>> thread float* p = new float[4]; y[i]=p[0];

// case: delete
>> thread float* p = nullptr; delete p; y[i]=0;

// case: goto
>> if (i) goto e; y[i]=1; e: y[i]=2;

// case: typeid
>> y[i]=typeid(int)==typeid(float);

// case: dyn
struct S {};
>> S s; thread S* p=&s; y[i]=dynamic_cast<thread S*>(p)!=nullptr;

// case: asm
>> asm("nop"); y[i]=1;

// case: register
>> register float a=1; y[i]=a;

// case: noexcept op
>> y[i]=noexcept(x[i]);

// case: noexcept method
struct S { float g() noexcept { return 1; } };
>> y[i]=0;

// case: noexcept true
float g() noexcept(true) { return 1; }
>> y[i]=g();

// case: virtual pure
struct P { virtual float g() = 0; };
>> y[i]=0;

// case: override
struct P { virtual float g() { return 1; } }; struct Q : P { float g() override { return 2; } };
>> y[i]=0;

// case: std max
>> y[i]=std::fmax(x[i],0.0f);

// case: vector
#include <vector>
>> y[i]=0;

// case: math h
#include <math.h>
>> y[i]=0;

// case: stdint
#include <stdint.h>
>> y[i]=0;

// case: cstdint
#include <cstdint>
>> y[i]=0;

// case: algorithm [mlx]
#include <algorithm>
>> y[i]=0;

// case: string
#include "missing.h"
>> y[i]=0;

// case: assert
>> assert(i < 3); y[i]=0;

// case: memcpy
>> float a=x[i]; float b; memcpy(&b,&a,4); y[i]=b;

// case: malloc
>> y[i]=0; malloc(4);

// case: expf
>> y[i]=expf(x[i]);

// case: sqrtf
>> y[i]=sqrtf(x[i]);

// case: fabsf
>> y[i]=fabsf(x[i]);

// case: powf
>> y[i]=powf(x[i],2.0f);

// case: lgamma
>> y[i]=lgamma(x[i]);

// case: erf
>> y[i]=erf(x[i]);

// case: cbrt
>> y[i]=cbrt(x[i]);

// case: cuda sync
>> __syncthreads(); y[i]=0;

// case: opencl barrier
>> barrier(1); y[i]=0;

// case: glsl vec4
>> vec4 v; y[i]=0;

// case: inversesqrt
>> y[i]=inversesqrt(x[i]);

// case: lerp
>> y[i]=lerp(x[i],1.0f,0.5f);

// case: atan 2args
>> y[i]=atan(x[i],1.0f);

// case: static thread local
>> static thread_local int n=0; y[i]=n;

// case: wide
>> wchar_t c=0; y[i]=c;

// case: printf str
>> printf("hi\n"); y[i]=0;

// case: cout
>> std::cout << i; y[i]=0;

// case: size t std
>> std::size_t n=1; y[i]=n;
