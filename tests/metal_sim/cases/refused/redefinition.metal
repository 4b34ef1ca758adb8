// case: mlx struct [mlx]
struct complex64_t { float re, im; };
>> y[i]=0;

// case: mlx limits [mlx]
template<typename U> struct Limits { static constexpr constant U max = 1; };
>> y[i]=0;

// case: mlx elem [mlx]
template <typename IdxT = int64_t> METAL_FUNC IdxT elem_to_loc_1(uint elem, constant const int64_t& stride) { return elem; }
>> y[i]=0;

// case: mlx using bf [mlx]
struct bfloat16_t { ushort v; };
>> y[i]=0;

// case: mlx typedef [mlx]
typedef float float16_t;
>> y[i]=0;

// case: mlx cond [mlx]
template <bool B, typename T, typename U> struct ConditionalType { using type = U; };
>> y[i]=0;

// case: mlx const [mlx]
constant int RMS_N_READS = 4;
>> y[i]=0;

// case: mlx shuffle [mlx]
inline uint64_t simd_shuffle_down(uint64_t d, uint16_t n) { return d; }
>> y[i]=float(simd_shuffle_down(ulong(i), ushort(1)));

// case: mlx const2 [mlx]
enum { REDUCE_N_READS = 4 };
>> y[i]=0;

// case: own twice
float g(float v) { return v; }
float g(float v) { return v + 1; }
>> y[i]=g(1);

// case: struct twice
struct P { float a; }; struct P { float b; };
>> y[i]=0;

// case: own min
float min(float a, float b) { return a; }
>> y[i]=min(x[i], 1.0f);

// case: own exp
METAL_FUNC float exp(float a) { return a; }
>> y[i]=exp(x[i]);

// case: own sum simd [mlx]
template<class T> T simd_sum(T v) { return v; }
>> y[i]=simd_sum(x[i]);

// case: own select [mlx]
float select(float a, float b, bool c) { return c ? b : a; }
>> y[i]=select(x[i], 0.0f, true);

// case: redecl var
>> float a=1; int a=2; y[i]=a;

// case: param shadow
>> float x = 1; y[i]=x;

// case: own abs int
int abs(int a) { return a < 0 ? -a : a; }
>> y[i]=abs(int(i));
