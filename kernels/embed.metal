// Rows out of a table, packed or dense.
//
// Rendered before: T (dtype of proj), U (of out), K (row length), PACKED; a packed format as for matvec.metal (BITS,
// GROUP, GROUP_SCALE_BITS, SCALE_BLOCK, OFFSET, HAS_MIN, HAS_LUT, LUT, GROUP_SCALE_*) with CHUNK 32; EPS.
// uses: packed.metal

#if PACKED
// What a weight is read from: a row's planes, those that there are, and the format's grid.
struct Row {
  const device uint* codes;
  const device uchar* group_scales;
  const device half* block_scales;
#if RULE && GRID
  const device GRID_TYPE* grid;
#endif
};

// Weight k of a row.
METAL_FUNC float weight(const thread Row& from, int k) {
  const int chunk = k / 32;
#if GROUP_SCALE_BITS
  const uint field = load_group_scales(from.group_scales, chunk);
#else
  const uint field = 0;
#endif
#if SCALE_BLOCK
  const uint top = load_block_scales(from.block_scales, chunk * 32 / SCALE_BLOCK);
#else
  const uint top = 0;
#endif
  float a, b;
  scales(field, top, k % 32 / GROUP, a, b);
#if RULE
  uint words[WORDS];
  load_codes(from.codes + chunk * WORDS, words);
  EIGHT_BYTES(from.grid, words, field, k % 32 / 8, eight)
  return a * value_of(eight, k % 8);
#else
  const int bit = k * BITS, word = bit / 32, shift = bit % 32;
  uint code = from.codes[word] >> shift;
  if (shift + BITS > 32) code |= from.codes[word + 1] << (32 - shift);
  code &= (1u << BITS) - 1;
#if HAS_LUT
  const float values[16] = LUT;
  return a * values[code] + b;
#else
  return a * float(int(code) - OFFSET) + b;
#endif
#endif
}
#if GROUP_SCALE_BITS
#define GROUP_SCALES_OF(row) group_scales + ulong(row) * (K / GROUP * GROUP_SCALE_BITS / 8)
#else
#define GROUP_SCALES_OF(row) nullptr
#endif
#if SCALE_BLOCK
#define BLOCK_SCALES_OF(row) block_scales + ulong(row) * (K / SCALE_BLOCK * BLOCK_NUMBERS)
#else
#define BLOCK_SCALES_OF(row) nullptr
#endif
#if RULE && GRID
#define GRID_OF , grid
#else
#define GRID_OF
#endif
#define ROW(name, row) \
  const Row name = {codes + ulong(row) * (K * BITS / 32), GROUP_SCALES_OF(row), BLOCK_SCALES_OF(row) GRID_OF};
#define WEIGHT(row, k) weight(row, k)
#else
#define ROW(name, row) const ulong name = ulong(row) * K;
#define WEIGHT(row, k) float(codes[row + ulong(k)])
#endif

// kernel: embed(ids, codes, group_scales?, block_scales?, grid?, behind?) -> (out)
// out[t, k] = table[ids[t], k] FACTOR, and behind it out[t, K + j] = behind[t, j]. ids int32 [tokens], table [V, K],
// behind [tokens, BEHIND], out [tokens, K + BEHIND] in U. Where STOP is not 0, the table has the rows FIRST to STOP of a
// larger one, and others give zeros.
// Threads: one an element, threadgroup of 256, grid (256 ceil((K + BEHIND) / 256), tokens, 1). Reads a row once.
const int k = int(threadgroup_position_in_grid.x) * 256 + int(thread_index_in_threadgroup);
const int t = int(threadgroup_position_in_grid.y);
if (k < K) {
#if STOP
  const bool there = ids[t] >= FIRST && ids[t] < STOP;
  ROW(row, there ? ids[t] - FIRST : 0)
  out[t * (K + BEHIND) + k] = there ? U(WEIGHT(row, k) * FACTOR) : U(0);
#else
  ROW(row, ids[t])
  out[t * (K + BEHIND) + k] = U(WEIGHT(row, k) * FACTOR);
#endif
}
#if BEHIND
else if (k < K + BEHIND) out[t * (K + BEHIND) + k] = U(behind[t * BEHIND + k - K]);
#endif

// kernel: ple_inputs(ids, proj, norm, codes, group_scales?, block_scales?, grid?) -> (out)
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
  ROW(row, ids[t])
  const float factor = rsqrt(sum_lanes(squares, 32) / float(P) + EPS);
  UNROLL
  for (int i = 0; i < EACH; i++) {
    const int p = i * 32 + lane;
    if (p < P)
      out[(l * tokens + t) * P + p] =
          U((v[i] * factor * norm[p] + WEIGHT(row, l * P + p) * FACTOR) * 0.7071067811865476f);
  }
}
