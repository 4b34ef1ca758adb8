// The end of a layer with per-layer embeddings, one launch:
//   y = x + rms(h) post,   g = gelu(gate y) * p,   z = proj g,
//   out = (y + rms(z) post_norm) scale,   normed = rms(out) next
// with rms(a) = a / sqrt(mean(a²) + EPS), of h with EPS_H. x, h, out, normed [tokens, K], p [tokens, P]; gate packed
// [P, K], proj packed [K, P], in one format. Sums in fp32. K a multiple of 32 and of GROUP, P of 32 and of GROUP, up to 16 SG.
//
// Threads. One threadgroup of SG simdgroups a token; grid (32 SG, tokens, 1). A thread owns elements 32 SG apart of x, and
// keeps them in registers from the first norm to the last.
//
// Products. One core has all the work, so instructions count, and matrix units do most of it: a simdgroup takes 16 rows and
// 4 groups of weights (that share a scale) at a time, lane (g, t) of it (matrix.metal) group t of rows g and g + 8: its
// codes are loads of 16 bytes, where the bits allow. Codes become fp16 without conversion: as the low bits of a subnormal,
// code 2^-24, two with one shift and one mask (`two_codes`). The other factor has a column pair for each t, x as fp16 and
// what that leaves of it, another fp16; both are 0 in rows that are not lane t's. So result columns 2t and 2t + 1 are lane
// t's own group, whole sums of codes times x; their sum goes under the lane's scale in fp32. x's factor of each group is a power of
// two that brings its largest near 2^15. Which rows of the factors meet which codes is free, so x lies in threadgroup memory in
// the order in which codes come out of their words.
//
// Memory. Weights once a token: a simdgroup asks for the next as soon as it is done with these, which the others hide, and
// for the first of each product before the sums that come before it. All else once.
//
// Rendered before: T (of h), R (of x and out), U (of normed), K, P, SG, THREADS (32 SG), EPS, EPS_H, SCALED (scale is
// there); a packed format and CHUNK = GROUP, as for packed.metal.
// uses: packed.metal
// uses: matrix.metal

#define UNIT (4 * GROUP)                       // weights of a row that a simdgroup takes at a time
#define UNITS(n) (((n) + UNIT - 1) / UNIT)
#define PIECES ((UNITS(K) + UNITS(P)) * GROUP)  // of 16 bytes: y, then g, as fp16 and the rest
#define GROUPS ((UNITS(K) + UNITS(P)) * 4)
#define TILES (P / 16)                         // of gate
#define SPLIT (SG / TILES)                     // simdgroups that share one
#define RESULTS (K > SPLIT * P ? K : SPLIT * P)
#define LAUNCH_BOUNDS __launch_bounds__(THREADS)  // for CUDA: how many registers there are
#define STEPS ((K + THREADS - 1) / THREADS)
#define EACH_STEP UNROLL for (int i = 0, at = thread_index; i < STEPS; i++, at += THREADS) if (at < K)
#define HELD ((GROUP * BITS + 31) / 32)        // words of a group's codes (of Q3_K: the half of the second)
#define ALIGNED (BITS == 2 || BITS == 4 || BITS == 8)  // codes never lie across words
#define PER (16 / BITS)                        // pairs in a word, if so

// What a lane reads of rows g and g + 8 for one product: a group of each.
struct Part {
  uint codes[2][HELD];
  uint sub[2];
  uint super[2];
};

// Where a lane's rows begin.
struct Rows {
  const device uint* codes;
  const device uchar* sub;
  const device half* super;
};
#define CODES_ROW(length) (length * BITS / 32)
#define SUB_ROW(length) (length / GROUP * SUB_BITS / 8)
#define SUPER_ROW(length) (SUPER ? length / (SUPER ? SUPER : 1) * (1 + HAS_MIN) : 0)

// Row `row` of a weight [.., length], its codes from group t on.
METAL_FUNC Rows rows_from(
    const device uint* codes, const device uchar* sub, const device half* super, int length, int row, int t) {
  Rows rows;
  rows.codes = codes + row * CODES_ROW(length) + t * (GROUP * BITS) / 32;
  rows.sub = sub + row * SUB_ROW(length);
  rows.super = super + row * SUPER_ROW(length);
  return rows;
}

// Group t of unit u, `down` rows further down and 8 more.
METAL_FUNC void load(const thread Rows& rows, int length, int down, int u, int t, thread Part& part) {
  if (length % UNIT && 4 * u + t >= length / GROUP) {  // none is there; x is 0
    UNROLL
    for (int r = 0; r < 2; r++) part.sub[r] = part.super[r] = 0;
    return;
  }
  UNROLL
  for (int r = 0; r < 2; r++) {
    const device uint* words = rows.codes + (down * CODES_ROW(length) + u * (UNIT * BITS / 32)) + 8 * r * CODES_ROW(length);
#if GROUP * BITS % 32
    const uint first = words[0], second = words[1];
    part.codes[r][0] = t % 2 ? first >> 16 | second << 16 : first;
    part.codes[r][1] = t % 2 ? second >> 16 : second;
#else
    load_codes(words, part.codes[r]);
#endif
    part.sub[r] = part.super[r] = 0;
#if SUB_BITS
    part.sub[r] = load_sub(rows.sub + (down * SUB_ROW(length) + u * (4 * SUB_BITS / 8)) + 8 * r * SUB_ROW(length), t);
#endif
#if SUPER
    const int at = (4 * u + t) * GROUP / SUPER;
    part.super[r] = load_super(rows.super + down * SUPER_ROW(length) + 8 * r * SUPER_ROW(length), at);
#endif
  }
}

// Pair i of a group's codes as two fp16, times 2^-24 (values of a look-up type: as they are).
METAL_FUNC uint two_codes(const thread uint* w, int i, const threadgroup uint* table) {
#if HAS_LUT
  return table[(w[i / 4] >> (i % 4 * 8)) & 0xFFu];
#elif ALIGNED  // both times 2^(at % 8), which x makes good
  const uint mask = (1u << BITS) - 1;
  const int at = i % PER * BITS;
  return (w[i / PER] >> (at / 8 * 8)) & ((mask | mask << 16) << (at % 8));
#else
  const uint mask = (1u << BITS) - 1;
  const int word = 2 * i * BITS / 32, at = 2 * i * BITS % 32;
  uint u = w[word] >> at;
  if (at + 2 * BITS > 32) u |= w[word + 1] << (32 - at);
  return (u & mask) | ((u << (16 - BITS)) & (mask << 16));
#endif
}

// One of a group's 32 or 16 numbers, held by as many neighbouring lanes, to where products read it.
METAL_FUNC void put(float v, int k, threadgroup half* pieces, threadgroup float* sums, threadgroup float* units) {
  const int group = k / GROUP, i = k % GROUP;
  float largest = abs(v);
  UNROLL
  for (int m = GROUP / 2; m > 0; m /= 2) largest = max(largest, simd_shuffle_xor(largest, ushort(m)));
  const uint exponent = min(max(as_type<uint>(largest) >> 23, 16u), 240u);
  const float sum = sum_lanes(v, GROUP);
  if (i == 0) {
    sums[group] = sum;
    units[group] = as_type<float>((exponent - 14 + (HAS_LUT ? 0 : 24)) << 23);
  }
#if ALIGNED && !HAS_LUT
  const int in_word = i % (2 * PER), second = in_word / PER, pair = i / (2 * PER) * PER + in_word % PER;
  const uint shift = uint(in_word % PER * BITS % 8);
#else
  const int second = i % 2, pair = i / 2;
  const uint shift = 0;
#endif
  const float scaled = v * as_type<float>((268 - exponent - shift) << 23);
  const half high = half(scaled), low = half(scaled - float(high));
  threadgroup half* at = pieces + ((group / 4 * (GROUP / 8) + pair / 4) * 8 + group % 4 * 2) * 8 + pair % 4 * 2;
#ifdef CUDA
  at[second] = high;
  at[8 + second] = low;
#else
  at[8 * second] = high;
  at[8 * second + 1] = low;
#endif
}

// sum[r] += the lane's group of row g + 8 r times x. `x`: the lane's first piece of it, `step` from one to the next.
METAL_FUNC void product(
    const thread Part& part, const threadgroup uint4* x, int step, float x_sum, float unit,
    const threadgroup uint* table, thread float* sum) {
  float dots[4] = {0, 0, 0, 0};
  UNROLL
  for (int q = 0; q < GROUP / 8; q++) {
    const uint4 four = x[q * step];
    const uint b[4] = {four.x, four.y, four.z, four.w};
    UNROLL
    for (int m = 0; m < 4; m += 2) {
      const int i = 4 * q + m;
      const uint a[4] = {
          two_codes(part.codes[0], i, table), two_codes(part.codes[1], i, table),
          two_codes(part.codes[0], i + 1, table), two_codes(part.codes[1], i + 1, table)};
      multiply(dots, a, b[m], b[m + 1]);
    }
  }
  UNROLL
  for (int r = 0; r < 2; r++) {
    float a, b;
    scales(part.sub[r], part.super[r], 0, a, b);
    float dot = (dots[2 * r] + dots[2 * r + 1]) * unit;
    if (OFFSET) dot -= float(OFFSET) * x_sum;
    sum[r] += a * dot;
    if (HAS_MIN) sum[r] += b * x_sum;
  }
}

// kernel: ple(x, h, post, gate, gate_sub?, gate_super?, p, proj, proj_sub?, proj_super?, post_norm, scale?, next) -> (out, normed)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup), token = int(threadgroup_position_in_grid.y);
const int g = LANE_G, t = LANE_T;

threadgroup float room[SG];
threadgroup uint4 pieces[PIECES + 1];           // the last of them 0
threadgroup float sums[GROUPS];                 // of x in each group
threadgroup float units[GROUPS];                // what result columns count in
threadgroup float results[RESULTS];             // of gate by simdgroups that share rows, then of proj

#if SUB_BITS
#define GATE gate, gate_sub, gate_super
#define PROJ proj, proj_sub, proj_super
#else
#define GATE gate, nullptr, gate_super
#define PROJ proj, nullptr, proj_super
#endif
#if !SUPER
#define gate_super nullptr
#define proj_super nullptr
#endif

// The first of gate, on its way during the norm.
const int tile = sg / SPLIT, first = sg % SPLIT;
Part now;
const Rows gate_rows = rows_from(GATE, K, tile * 16 + g, t);
if (tile < TILES && first < UNITS(K)) load(gate_rows, K, 0, first, t, now);

#if HAS_LUT
threadgroup uint table[256];                    // two codes -> their values
for (int i = thread_index; i < 256; i += THREADS) {
  const float values[16] = LUT;
  table[i] = pair(half(values[i % 16]), half(values[i / 16]));
}
#else
const threadgroup uint* table = 0;
#endif
for (int i = thread_index; i <= PIECES; i += THREADS) {
  uint4 zero;
  zero.x = zero.y = zero.z = zero.w = 0;
  pieces[i] = zero;
}
for (int i = thread_index; i < GROUPS; i += THREADS) sums[i] = units[i] = 0;

// y
float y[STEPS], squares = 0;
EACH_STEP {
  y[i] = float(h[token * K + at]);
  squares += y[i] * y[i];
}
float residual[STEPS], weight[STEPS];
EACH_STEP {
  residual[i] = float(x[token * K + at]);
  weight[i] = post[at];
}
const float factor = rsqrt(sum_group(squares, room, SG, sg, lane) * (1.0f / K) + EPS_H);
EACH_STEP {
  y[i] = residual[i] + y[i] * factor * weight[i];
  put(y[i], at, (threadgroup half*)pieces, sums, units);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// gate y: a lane's own pieces of x, or the zeros.
const bool own = g / 2 == t;
const int x_first = own ? t * 2 + g % 2 : PIECES, x_unit = own ? GROUP : 0, step = own ? 8 : 0;
float sum[2] = {0, 0};
if (tile < TILES) {
#pragma unroll 1
  for (int u = first; u < UNITS(K); u += SPLIT) {
    const int group = u * 4 + t;
    product(now, pieces + x_first + u * x_unit, step, sums[group], units[group], table, sum);
    if (u + SPLIT < UNITS(K)) load(gate_rows, K, 0, u + SPLIT, t, now);
  }
}

// The first of proj, and p, on their way.
const Rows proj_rows = rows_from(PROJ, P, sg * 16 + g, t);
if (sg * 16 < K) load(proj_rows, P, 0, 0, t, now);
const float times = thread_index < P ? float(p[token * P + thread_index]) : 0.0f;
#define SUM_OVER_T(v)                       \
  v += simd_shuffle_xor(v, ushort(1));      \
  v += simd_shuffle_xor(v, ushort(LANE_OF(0, 2)));
UNROLL
for (int r = 0; r < 2; r++) {
  SUM_OVER_T(sum[r])
  if (t == 0 && tile < TILES) results[first * P + tile * 16 + g + 8 * r] = sum[r];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index < P) {
  float v = 0;
  UNROLL
  for (int s = 0; s < SPLIT; s++) v += results[s * P + thread_index];
  put(gelu(v) * times, thread_index, (threadgroup half*)(pieces + UNITS(K) * GROUP), sums + UNITS(K) * 4,
      units + UNITS(K) * 4);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// proj g
#pragma unroll 1
for (int row = sg * 16; row < K; row += SG * 16) {
  sum[0] = sum[1] = 0;
#pragma unroll 1
  for (int u = 0; u < UNITS(P); u++) {
    const int group = (UNITS(K) + u) * 4 + t;
    product(now, pieces + x_first + (UNITS(K) + u) * x_unit, step, sums[group], units[group], table, sum);
    const int following = u + 1 < UNITS(P) ? row : row + SG * 16;
    if (following < K) load(proj_rows, P, following - sg * 16, (u + 1) % UNITS(P), t, now);
  }
  UNROLL
  for (int r = 0; r < 2; r++) {
    SUM_OVER_T(sum[r])
    if (t == 0) results[row + g + 8 * r] = sum[r];
  }
}
float next_weight[STEPS];
EACH_STEP {
  weight[i] = post_norm[at];
  next_weight[i] = next[at];
}
#if SCALED
const float layer_scale = scale[0];
#else
const float layer_scale = 1;
#endif
threadgroup_barrier(mem_flags::mem_threadgroup);

squares = 0;
EACH_STEP squares += results[at] * results[at];
const float z_factor = rsqrt(sum_group(squares, room, SG, sg, lane) * (1.0f / K) + EPS);
squares = 0;
EACH_STEP {
  y[i] = (y[i] + results[at] * z_factor * weight[i]) * layer_scale;
  squares += y[i] * y[i];
  out[token * K + at] = R(y[i]);
}
const float next_factor = rsqrt(sum_group(squares, room, SG, sg, lane) * (1.0f / K) + EPS);
EACH_STEP {
  const float value = y[i] * next_factor * next_weight[i];
  normed[token * K + at] = U(WITHIN_U(value));
}
