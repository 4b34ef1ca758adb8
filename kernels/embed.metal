// Rows out of a table, packed or dense.
//
// Rendered before: T (dtype of proj), U (of out), K (row length), PACKED; a packed format as for matvec.metal (BITS,
// GROUP, GROUP_SCALE_BITS, SCALE_BLOCK, OFFSET, HAS_MIN, HAS_LUT, LUT, GROUP_SCALE_*), EPS.

#if PACKED
// Weight k of a row.
METAL_FUNC float weight(
    const device uint* codes, const device uchar* group_scales, const device half* block_scales, int k) {
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
#if GROUP_SCALE_BITS
  const int at = k / GROUP * GROUP_SCALE_BITS;
  field = uint(group_scales[at / 8]);
  if (at % 8 + GROUP_SCALE_BITS > 8) field |= uint(group_scales[at / 8 + 1]) << 8;
  field = (field >> (at % 8)) & ((1u << GROUP_SCALE_BITS) - 1);
#endif
#if GROUP_SCALE_E8M0
  return as_type<float>(field < 2 ? 0x00200000u << field : (field - 1) << 23) * value;
#else
  const float d = float(block_scales[k / SCALE_BLOCK * (1 + HAS_MIN)]);
#if GROUP_SCALE_SCALE_MIN
  const uint half_mask = (1u << (GROUP_SCALE_BITS / 2)) - 1;
  const float m = float(block_scales[k / SCALE_BLOCK * 2 + 1]) * float(field >> (GROUP_SCALE_BITS / 2));
  return d * float(field & half_mask) * value - m;
#elif GROUP_SCALE_SCALE_32
  return d * float(int(field) - 32) * value;
#elif GROUP_SCALE_INT8
  return d * float(int(field << 24) >> 24) * value;
#elif HAS_MIN
  return d * value + float(block_scales[k / SCALE_BLOCK * 2 + 1]);
#else
  return d * value;
#endif
#endif
}
#define GROUP_SCALE_ROW (K / GROUP * GROUP_SCALE_BITS / 8)
#if GROUP_SCALE_BITS
#define GROUP_SCALE_AT(row) group_scales + ulong(row) * GROUP_SCALE_ROW
#else
#define GROUP_SCALE_AT(row) nullptr
#endif
#if SCALE_BLOCK
#define BLOCK_SCALE_AT(row) block_scales + ulong(row) * (K / SCALE_BLOCK * (1 + HAS_MIN))
#else
#define BLOCK_SCALE_AT(row) nullptr
#endif
#define WEIGHT(row, k) weight(codes + ulong(row) * (K * BITS / 32), GROUP_SCALE_AT(row), BLOCK_SCALE_AT(row), k)
#else
#define WEIGHT(row, k) float(codes[ulong(row) * K + ulong(k)])
#endif

// kernel: embed(ids, codes, group_scales?, block_scales?) -> (out)
// out[t, k] = table[ids[t], k] FACTOR. ids int32 [tokens], table [V, K], out [tokens, K] in U.
// Threads: one an element, threadgroup of 256, grid (256 ceil(K / 256), tokens, 1). Reads a row once.
const int k = int(threadgroup_position_in_grid.x) * 256 + int(thread_index_in_threadgroup);
const int t = int(threadgroup_position_in_grid.y);
if (k < K) out[t * K + k] = U(WEIGHT(ids[t], k) * FACTOR);

// kernel: ple_inputs(ids, proj, norm, codes, group_scales?, block_scales?) -> (out)
// The per-layer embeddings: what each layer adds for the token itself.
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
