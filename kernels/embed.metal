// Rows out of a table, packed or dense.
//
// Rendered before: T (dtype of proj), U (of out), K (row length), PACKED; a packed format as for matvec.metal (BITS,
// GROUP, SUB_BITS, SUPER, OFFSET, HAS_MIN, HAS_LUT, LUT, SUB_*), EPS.

#if PACKED
// Weight k of a row.
METAL_FUNC float weight(const device uint* codes, const device uchar* sub, const device half* super, int k) {
  const int bit = k * BITS, word = bit / 32, shift = bit % 32;
  uint code = codes[word] >> shift;
  if (shift + BITS > 32) code |= codes[word + 1] << (32 - shift);
  code &= (1u << BITS) - 1;
#if HAS_LUT
  const float values[16] = LUT;
  const float value = values[code];
#else
  const float value = float(int(code) - OFFSET);
#endif

  uint field = 0;
#if SUB_BITS
  const int at = k / GROUP * SUB_BITS;
  field = uint(sub[at / 8]);
  if (at % 8 + SUB_BITS > 8) field |= uint(sub[at / 8 + 1]) << 8;
  field = (field >> (at % 8)) & ((1u << SUB_BITS) - 1);
#endif
#if SUB_E8M0
  return as_type<float>(field < 2 ? 0x00200000u << field : (field - 1) << 23) * value;
#else
  const float d = float(super[k / SUPER * (1 + HAS_MIN)]);
#if SUB_SCALE_MIN
  const uint half_mask = (1u << (SUB_BITS / 2)) - 1;
  const float m = float(super[k / SUPER * 2 + 1]) * float(field >> (SUB_BITS / 2));
  return d * float(field & half_mask) * value - m;
#elif SUB_SCALE_32
  return d * float(int(field) - 32) * value;
#elif SUB_INT8
  return d * float(int(field << 24) >> 24) * value;
#elif HAS_MIN
  return d * value + float(super[k / SUPER * 2 + 1]);
#else
  return d * value;
#endif
#endif
}
#define SUB_ROW (K / GROUP * SUB_BITS / 8)
#if SUB_BITS
#define SUB_AT(row) sub + ulong(row) * SUB_ROW
#else
#define SUB_AT(row) nullptr
#endif
#if SUPER
#define SUPER_AT(row) super + ulong(row) * (K / SUPER * (1 + HAS_MIN))
#else
#define SUPER_AT(row) nullptr
#endif
#define WEIGHT(row, k) weight(codes + ulong(row) * (K * BITS / 32), SUB_AT(row), SUPER_AT(row), k)
#else
#define WEIGHT(row, k) float(codes[ulong(row) * K + ulong(k)])
#endif

// kernel: embed(ids, codes, sub?, super?) -> (out)
// out[t, k] = table[ids[t], k] FACTOR. ids int32 [tokens], table [V, K], out [tokens, K] in U.
// Threads: one an element, threadgroup of 256, grid (256 ceil(K / 256), tokens, 1). Reads a row once.
const int k = int(threadgroup_position_in_grid.x) * 256 + int(thread_index_in_threadgroup);
const int t = int(threadgroup_position_in_grid.y);
if (k < K) out[t * K + k] = U(WEIGHT(ids[t], k) * FACTOR);

// kernel: ple_inputs(ids, proj, norm, codes, sub?, super?) -> (out)
// What each layer adds of the token itself:
//   out[l, t] = (rms(proj[t, l] PROJ_FACTOR) norm + table[ids[t], l] FACTOR) / sqrt(2)
// table [V, layers P], K = layers P; proj [tokens, layers P] in T; norm fp32 [P]; out [layers, tokens, P] in U.
// Threads: a simdgroup a layer and token, 4 a threadgroup; grid (128 ceil(layers / 4), tokens, 1). Reads a row once.
const int lane = int(thread_index_in_simdgroup);
const int l = int(threadgroup_position_in_grid.x) * 4 + int(simdgroup_index_in_threadgroup);
const int t = int(threadgroup_position_in_grid.y), tokens = ids_shape[0];
if (l < K / P) {
  constexpr int EACH = (P + 31) / 32;
  float v[EACH], squares = 0;
  UNROLL
  for (int i = 0; i < EACH; i++) {
    const int p = i * 32 + lane;
    v[i] = p < P ? float(proj[t * K + l * P + p]) * PROJ_FACTOR : 0.0f;
    squares += v[i] * v[i];
  }
  const float factor = rsqrt(sum_lanes(squares, 32) / float(P) + EPS);
  UNROLL
  for (int i = 0; i < EACH; i++) {
    const int p = i * 32 + lane;
    if (p < P)
      out[(l * tokens + t) * P + p] =
          U((v[i] * factor * norm[p] + WEIGHT(ids[t], l * P + p) * FACTOR) * 0.7071067811865476f);
  }
}
