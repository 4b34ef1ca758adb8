// Attention of a few new tokens over quantized keys and values (mlx_gemma4/kv/quantization.py), which are never
// expanded. With q' = H (rotation * q):
//   score_j = SCALE (scale_j / D  sum over i of level(code_j[i]) q'[i]  +  q . center),
//   sums = sum over j of 2^(score_j - top) scale'_j level(code'_j),
// still in the rotated space but for a part of the H that leads back: the H of D numbers is an H over each simdgroup's
// columns (a slice), done here, and one over the slices, which `merge_quantized` does while it adds up the pieces and
// those of the tail. So no threadgroup needs all columns of a row.
//
// q [tokens, H, D], the H heads in groups of GQA that share a KV head. rotation fp32 [2, D]: row 0 is used here,
// row 1 (signs alone) by `merge_quantized`; with CENTERED, G more rows: the centers. Part i: c [G, n_i, 2, WORDS],
// the codes of each token's key, then of its value; s [G, n_i, 2], their scales. Queries see all of every part. All
// MAX_QUANTIZED parts are bound, absent ones as copies of the first; lengths [8] has each n_i, 0 of an absent one.
//
// Threads. A threadgroup (SG simdgroups) takes 8 TILES of the GQA * tokens queries of one KV head and one piece of the
// length; grid (32 SG ceil(GQA tokens / 8 TILES), pieces, G). It walks through its piece in blocks of 16 SG tokens:
//   1. scores: a simdgroup takes 16 tokens and all of D: products of 16 x 16 codes and 16 x 8 queries, in half, summed
//      in fp32 by the matrix units;
//   2. softmax: a simdgroup takes whole queries, keeps their running maximum and sum;
//   3. values: a simdgroup takes D / SG columns of all tokens: products of 16 columns x 16 tokens and 16 tokens x 8
//      queries.
// matrix.metal says what a lane holds of a product's factors. The sums of a product may be in any order, so a lane's
// columns are those whose codes it has read: 16 bytes of a token at once.
//
// Memory. Codes and scales are read once for each 8 TILES queries; sums (fp32, [tokens H, pieces, D]) written once and
// read once.
//
// Rendered before: what quantized.metal needs; T (dtype of q), GQA, CENTERED, SG, TILES, SCALE.
// uses: matrix.metal
// uses: quantized.metal

#define BLOCK (16 * SG)
#define ROWS (8 * TILES)
#define SLOTS (D / 16)                           // products along D
#define K_WORDS (WORDS / 4 < 4 ? WORDS / 4 : 4)  // words of a key that a lane reads at once; 4 lanes share a key
#define K_STEPS (WORDS / (4 * K_WORDS))
#define V_WORDS (WORDS / (8 * SG))               // words of a value per lane; 8 lanes share a simdgroup's columns
// Loads issued before their results are needed, in steps of keys and groups of values: EARLY registers of each, fewer
// with two tiles of queries. Apple GPUs have fewer registers per thread.
#ifdef CUDA
#define EARLY 32
#else
#define EARLY 8
#endif
#define WITHIN(most, n) ((n) < 1 ? 1 : (n) < (most) ? (n) : (most))
#define EARLY_K WITHIN(K_STEPS, EARLY / (2 * K_WORDS * TILES))
#define EARLY_V WITHIN(SG, EARLY / (4 * V_WORDS * TILES))
// True if row r exists; simdgroups take rows sg, sg + SG, .. Mostly a constant.
#define OWNED(r) (ROWS % SG == 0 || (r) < ROWS)
#define UNSEEN -1e30f

#define MAX_QUANTIZED 7

#ifdef TILES  // for `quantized_attention`
struct QuantizedPart {
  const device uint* codes;
  const device half* scales;
  int length;
};

// Tokens that a threadgroup takes at a time: n of one part, at most BLOCK.
struct Block {
  const device uint* codes;
  const device half* scales;
  int n;
};

// The block of KV head g from token `start`, counted over all parts, that ends before `to`.
METAL_FUNC Block block_at(const thread QuantizedPart* parts, int g, int start, int to) {
  Block found = {parts[0].codes, parts[0].scales, 0};
  int first = 0;
  UNROLL
  for (int p = 0; p < MAX_QUANTIZED; p++) {
    const int last = first + parts[p].length;
    if (start >= first && start < last) {
      const ulong at = ulong(g) * ulong(parts[p].length) + ulong(start - first);
      found.codes = parts[p].codes + at * (2 * WORDS);
      found.scales = parts[p].scales + at * 2;
      found.n = min(BLOCK, min(to, last) - start);
    }
    first = last;
  }
  return found;
}

// Load the scales of this lane's two tokens of a block, a key's and its value's in a word. A lane past the end loads
// another token, whose numbers are never used; likewise for keys and values.
METAL_FUNC void load_scales(Block block, int sg, int lane, thread uint* pairs) {
  UNROLL
  for (int i = 0; i < 2; i++)
    pairs[i] = ((const device uint*)block.scales)[min(sg * 16 + LANE_G + 8 * i, block.n - 1)];
}

// Load words of the keys of those tokens, `step` of K_STEPS.
METAL_FUNC void load_keys(Block block, int step, int sg, int lane, thread uint* words) {
  const int lane_g = LANE_G, lane_t = LANE_T;
  UNROLL
  for (int i = 0; i < 2; i++) {
    const int token = min(sg * 16 + lane_g + 8 * i, block.n - 1);
    load_words(block.codes + token * (2 * WORDS) + (step * 4 + lane_t) * K_WORDS, K_WORDS, words + i * K_WORDS);
  }
}

// Load words of the values of this lane's four tokens among the 16 of `group`.
METAL_FUNC void load_values(Block block, int group, int sg, int lane, thread uint* words) {
  const int lane_g = LANE_G, lane_t = LANE_T;
  UNROLL
  for (int i = 0; i < 4; i++) {
    const int token = min(group * 16 + lane_t * 2 + i % 2 + i / 2 * 8, block.n - 1);
    load_words(block.codes + (token * 2 + 1) * WORDS + (sg * 8 + lane_g) * V_WORDS, V_WORDS, words + i * V_WORDS);
  }
}
#endif

// kernel: quantized_attention(q, rotation, lengths, c0, s0, c1, s1, c2, s2, c3, s3, c4, s4, c5, s5, c6, s6) -> (sums, stats)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int lane_g = LANE_G, lane_t = LANE_T;
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int piece = int(threadgroup_position_in_grid.y), pieces = int(threadgroups_per_grid.y);
const int g = int(threadgroup_position_in_grid.z);
const int tokens = q_shape[0], heads = q_shape[1];

const QuantizedPart parts[MAX_QUANTIZED] = {
    {c0, s0, lengths[0]}, {c1, s1, lengths[1]}, {c2, s2, lengths[2]}, {c3, s3, lengths[3]},
    {c4, s4, lengths[4]}, {c5, s5, lengths[5]}, {c6, s6, lengths[6]},
};

threadgroup uint2 queries[TILES * SLOTS * 32];  // second factors of scores, [tile][product][lane]
threadgroup uint2 weights[TILES * SG * 32];     // of values, [tile][16 tokens][lane]
threadgroup float scores[ROWS][BLOCK + 1];
threadgroup float value_scales[BLOCK];
threadgroup float shift[ROWS];                  // added to a query's scores by the center
threadgroup float shrink[ROWS];                 // factor of a query's old sums once its maximum has grown
#if BITS == 4 && !defined(CUDA)
threadgroup uint table[256];                    // two codes -> their levels
for (int i = sg * 32 + lane; i < 256; i += 32 * SG) {
  const uint level[8] = {LEVELS};
  const uint low = level[i & 7] | (i & 8 ? 0x8000u : 0u), high = level[i / 16 & 7] | (i & 128 ? 0x8000u : 0u);
  table[i] = low | high << 16;
}
#else
const threadgroup uint* table = 0;
#endif

int total = 0;
UNROLL
for (int i = 0; i < MAX_QUANTIZED; i++) total += parts[i].length;
const int blocks = (total + BLOCK - 1) / BLOCK, share = (blocks + pieces - 1) / pieces * BLOCK;
const int from = piece * share, to = min(from + share, total);

// The first codes are loaded before the launch that computes the queries has ended.
Block block = block_at(parts, g, min(from, total - 1), to);
uint keys[EARLY_K][2 * K_WORDS], scales[2];
load_scales(block, sg, lane, scales);
UNROLL
for (int step = 0; step < EARLY_K; step++) load_keys(block, step, sg, lane, keys[step]);
float signs[D / 32], center[D / 32];
UNROLL
for (int j = 0; j < D / 32; j++) {
  signs[j] = rotation[j * 32 + lane] / D;
  center[j] = CENTERED ? rotation[(2 + g) * D + j * 32 + lane] : 0.0f;
}
INPUTS_READY();

// Rotate the queries: a simdgroup takes whole ones, sg, sg + SG, .., and lane l the numbers l, l + 32, .. of each.
constexpr int OWN = (ROWS + SG - 1) / SG, SUMS = V_WORDS * PER / 2;
float own[OWN][D / 32];
UNROLL
for (int i = 0; i < OWN; i++) {
  const int r = sg + i * SG, row = first_row + r;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    own[i][j] = 0;
    if (OWNED(r) && row < GQA * tokens)
      own[i][j] =
          float(q[(row / GQA * heads + g * GQA + row % GQA) * D + j * 32 + lane]) * (SCALE * 1.4426950408889634f);
  }
}
UNROLL
for (int i = 0; i < OWN; i++) {
  const int r = sg + i * SG;
  if (OWNED(r)) {
    float along = 0;
    UNROLL
    for (int j = 0; j < D / 32; j++) {
      along += own[i][j] * center[j];
      own[i][j] *= signs[j];
    }
    along = sum_lanes(along, 32);
    if (lane == 0) shift[r] = along;
    hadamard(own[i], lane);
    // A product takes 4 codes from each of 4 lanes: two for its first 8 rows, two for the other 8.
    UNROLL
    for (int j = 0; j < D / 32; j++) {
      const int d = j * 32 + lane, word = d / PER, c = d % 4;
      const int t = word / K_WORDS % 4, at = word / (4 * K_WORDS) * K_WORDS + word % K_WORDS;
      const int slot = at * (PER / 4) + d % PER / 4;
      const int place = (r / 8 * SLOTS + slot) * 128 + B_PLACE(2 * t + c % 2, r % 8) + c / 2 * 2;
      ((threadgroup half*)queries)[place] = half(own[i][j]);
    }
  }
}

// Running maximum and sum of the queries of this simdgroup.
float top[OWN], sum[OWN];
UNROLL
for (int i = 0; i < OWN; i++) {
  top[i] = UNSEEN;
  sum[i] = 0;
}
float acc[TILES][SUMS][4];  // columns 2 i and 2 i + 1 of this lane, each for queries 2 t and 2 t + 1
UNROLL
for (int tile = 0; tile < TILES; tile++) {
  UNROLL
  for (int i = 0; i < SUMS; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) acc[tile][i][j] = 0;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int start = from; start < to;) {
  const int n = block.n;
  uint values[EARLY_V][4 * V_WORDS];
  UNROLL
  for (int group = 0; group < EARLY_V; group++) load_values(block, group, sg, lane, values[group]);
  simdgroup_barrier(mem_flags::mem_none);

  // 1. Scores.
  if (sg * 16 < n) {
    float s[TILES][2][4];  // two sums: a product waits for the one before it that adds to the same sum
    UNROLL
    for (int tile = 0; tile < TILES; tile++) {
      UNROLL
      for (int j = 0; j < 4; j++) s[tile][0][j] = s[tile][1][j] = 0;
    }
    UNROLL
    for (int step = 0; step < K_STEPS; step++) {
      uint late[2 * K_WORDS];
      if (step >= EARLY_K) load_keys(block, step, sg, lane, late);
      const thread uint* words = step < EARLY_K ? keys[step < EARLY_K ? step : 0] : late;
      UNROLL
      for (int w = 0; w < K_WORDS; w++) {
        uint pairs[2][PER / 2];
        levels(words[w], table, pairs[0]);
        levels(words[K_WORDS + w], table, pairs[1]);
        UNROLL
        for (int m = 0; m < PER / 4; m++) {
          const uint a[4] = {pairs[0][2 * m], pairs[1][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m + 1]};
          const int slot = (step * K_WORDS + w) * (PER / 4) + m;
          UNROLL
          for (int tile = 0; tile < TILES; tile++) {
            const uint2 b = queries[(tile * SLOTS + slot) * 32 + lane];
            multiply(s[tile][slot % 2], a, b.x, b.y);
          }
        }
      }
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
      const int key = sg * 16 + lane_g + 8 * i;
      const float scale = low_half(scales[i]);
      UNROLL
      for (int tile = 0; tile < TILES; tile++) {
        const int r = tile * 8 + lane_t * 2;
        scores[r][key] = (s[tile][0][2 * i] + s[tile][1][2 * i]) * scale + shift[r];
        scores[r + 1][key] = (s[tile][0][2 * i + 1] + s[tile][1][2 * i + 1]) * scale + shift[r + 1];
      }
      if (lane_t == 0) value_scales[key] = high_half(scales[i]);
    }
  }
  // After the last block its last token is loaded again: loads that need no branch do not wait for one.
  const Block next = block_at(parts, g, min(start + n, to - 1), to);
  load_scales(next, sg, lane, scales);
  UNROLL
  for (int step = 0; step < EARLY_K; step++) load_keys(next, step, sg, lane, keys[step]);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. Softmax.
  UNROLL
  for (int i = 0; i < OWN; i++) {
    const int r = sg + i * SG;
    if (OWNED(r)) {
      float s[(BLOCK + 31) / 32], best = top[i];
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        s[b] = key < n ? scores[r][key] : UNSEEN;
        best = max(best, s[b]);
      }
      best = max_lanes(best);
      float part_sum = 0;
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        const float weight = key < n ? exp2(s[b] - best) : 0.0f;
        part_sum += weight;
        const int place = (r / 8 * SG + key / 16) * 128 + B_PLACE(key % 8, r % 8) + key % 16 / 8 * 2;
        if (key < BLOCK) ((threadgroup half*)weights)[place] = half(key < n ? weight * value_scales[key] : 0.0f);
      }
      const float factor = exp2(top[i] - best);
      sum[i] = sum[i] * factor + sum_lanes(part_sum, 32);
      top[i] = best;
      if (lane == 0) shrink[r] = factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3. Values.
  UNROLL
  for (int tile = 0; tile < TILES; tile++) {
    const float low = shrink[tile * 8 + lane_t * 2], high = shrink[tile * 8 + lane_t * 2 + 1];
    UNROLL
    for (int i = 0; i < SUMS; i++) {
      acc[tile][i][0] *= low;
      acc[tile][i][1] *= high;
      acc[tile][i][2] *= low;
      acc[tile][i][3] *= high;
    }
  }
  UNROLL
  for (int group = 0; group < SG; group++) {
    if (group * 16 < n) {
      uint late[4 * V_WORDS];
      if (group >= EARLY_V) load_values(block, group, sg, lane, late);
      const thread uint* words = group < EARLY_V ? values[group < EARLY_V ? group : 0] : late;
      UNROLL
      for (int w = 0; w < V_WORDS; w++) {
        uint pairs[4][PER / 2];
        UNROLL
        for (int i = 0; i < 4; i++) levels(words[i * V_WORDS + w], table, pairs[i]);
        UNROLL
        for (int m = 0; m < PER / 2; m++) {
          const uint a[4] = {firsts(pairs[0][m], pairs[1][m]), seconds(pairs[0][m], pairs[1][m]),
                             firsts(pairs[2][m], pairs[3][m]), seconds(pairs[2][m], pairs[3][m])};
          UNROLL
          for (int tile = 0; tile < TILES; tile++) {
            const uint2 b = weights[(tile * SG + group) * 32 + lane];
            multiply(acc[tile][w * (PER / 2) + m], a, b.x, b.y);
          }
        }
      }
    }
  }
  start += n;
  block = next;
}

UNROLL
for (int i = 0; i < OWN; i++) {
  const int r = sg + i * SG, row = first_row + r;
  if (OWNED(r) && lane == 0 && row < GQA * tokens) {
    const int query = row / GQA * heads + g * GQA + row % GQA;
    stats[(query * pieces + piece) * 2] = top[i];
    stats[(query * pieces + piece) * 2 + 1] = sum[i];
  }
}
UNROLL
for (int tile = 0; tile < TILES; tile++) {
  UNROLL
  for (int i = 0; i < 2; i++) {
    const int row = first_row + tile * 8 + lane_t * 2 + i;
    float v[2 * SUMS];
    UNROLL
    for (int j = 0; j < SUMS; j++) {
      v[2 * j] = acc[tile][j][i];
      v[2 * j + 1] = acc[tile][j][2 + i];
    }
    hadamard_own(v, 2 * SUMS);
    UNROLL
    for (int m = 1; m < 8; m *= 2) hadamard_lanes(v, 2 * SUMS, lane, LANE_OF(m, 0));
    if (row < GQA * tokens) {
      const int query = row / GQA * heads + g * GQA + row % GQA;
      device float* to_sums = sums + ulong(query * pieces + piece) * D + (sg * 8 + lane_g) * (2 * SUMS);
      UNROLL
      for (int j = 0; j < 2 * SUMS; j += 4) store4(to_sums + j, v + j);
    }
  }
}

// kernel: merge_quantized(sums, stats, tail_sums, tail_stats, rotation) -> (out)
// Merge the pieces of each row, as `merge` of attention.metal does:
//   out[row] = (rotation * H sum of 2^(m_p - m) sums[row, p] / D  +  sum of 2^(m_t - m) tail_sums[row, t])
//              / sum over both of 2^(..) l,
// where H is over the SLICES; `quantized_attention` did the rest of it.
// sums [rows, pieces, D], stats [rows, pieces, (m, l)]: of the quantized parts; tail_.. [rows, tail pieces, ..]: of the
// tail in full precision.
//
// Threads. A threadgroup of 32 SG threads takes 32 columns of each slice of a row; grid (32 SG, D / SLICES / 32, rows):
// a row's pieces are up to half a MB, which takes a core alone longer than all the rest here. A thread takes 4 columns
// of every GROUPS-th piece; LANES, all in one simdgroup, share a piece.
// Rendered before: T, U (dtype of out), D, SG, SLICES (simdgroups of `quantized_attention`: 1, 2 or 4), BITS, levels.
constexpr int LANES = 8 * SLICES, GROUPS = 32 * SG / LANES, WIDTH = D / SLICES;
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int i = int(thread_index_in_threadgroup), group = i / LANES, row = int(threadgroup_position_in_grid.z);
const int first_column = int(threadgroup_position_in_grid.y) * 32;  // of each slice
const int column = lane % LANES / 8 * WIDTH + first_column + lane % 8 * 4;
const int pieces = stats_shape[1], tail_pieces = tail_stats_shape[1];
const int start = row * pieces, tail_start = row * tail_pieces;
const device float* quantized = sums + ulong(start) * D + column;
const device float* plain = tail_sums + ulong(tail_start) * D + column;

// Loaded all at once: the sums of AHEAD * GROUPS pieces (most often all) and of GROUPS of the tail's, and the stats of
// one piece and one tail piece per thread; the tail has no more pieces than there are threads.
#ifdef CUDA
constexpr int AHEAD = LANES < 16 ? LANES : 16;
#else
constexpr int AHEAD = 4;  // Apple GPUs have fewer registers per thread
#endif
float first[AHEAD][4], tail_first[4] = {0, 0, 0, 0}, back[4];
UNROLL
for (int j = 0; j < 4; j++) back[j] = rotation[D + column + j] / D;
INPUTS_READY();
UNROLL
for (int a = 0; a < AHEAD; a++) {
  UNROLL
  for (int j = 0; j < 4; j++) first[a][j] = 0;
  if (group + a * GROUPS < pieces) load4(quantized + (group + a * GROUPS) * D, first[a]);
}
if (group < tail_pieces) load4(plain + group * D, tail_first);
const float m = i < pieces ? stats[(start + i) * 2] : UNSEEN, l = i < pieces ? stats[(start + i) * 2 + 1] : 0.0f;
const float tail_m = i < tail_pieces ? tail_stats[(tail_start + i) * 2] : UNSEEN;
const float tail_l = i < tail_pieces ? tail_stats[(tail_start + i) * 2 + 1] : 0.0f;
simdgroup_barrier(mem_flags::mem_none);  // without it NVIDIA's compiler waits for stats first

threadgroup float tops[SG];
threadgroup float totals[SG];
threadgroup float weights[32 * SG];  // of the first pieces
threadgroup float tail_weights[32 * SG];
float top = max(m, tail_m);
#pragma unroll 1
for (int p = i + 32 * SG; p < pieces; p += 32 * SG) top = max(top, stats[(start + p) * 2]);
top = max_lanes(top);
if (lane == 0) tops[sg] = top;
threadgroup_barrier(mem_flags::mem_threadgroup);
top = max_lanes(lane < SG ? tops[lane] : UNSEEN);
weights[i] = exp2(m - top);
tail_weights[i] = exp2(tail_m - top);
float total = weights[i] * l + tail_weights[i] * tail_l;
#pragma unroll 1
for (int p = i + 32 * SG; p < pieces; p += 32 * SG)
  total += exp2(stats[(start + p) * 2] - top) * stats[(start + p) * 2 + 1];
total = sum_lanes(total, 32);
if (lane == 0) totals[sg] = total;
threadgroup_barrier(mem_flags::mem_threadgroup);

float acc[4] = {0, 0, 0, 0};
UNROLL
for (int a = 0; a < AHEAD; a++) {  // AHEAD * GROUPS is at most 32 SG
  UNROLL
  for (int j = 0; j < 4; j++) acc[j] += weights[group + a * GROUPS] * first[a][j];
}
#pragma unroll 4
for (int p = group + AHEAD * GROUPS; p < pieces; p += GROUPS) {
  float value[4];
  load4(quantized + p * D, value);
  const float weight = exp2(stats[(start + p) * 2] - top);
  UNROLL
  for (int j = 0; j < 4; j++) acc[j] += weight * value[j];
}
UNROLL
for (int bit = 8; bit < LANES; bit *= 2) hadamard_lanes(acc, 4, lane, bit);
UNROLL
for (int j = 0; j < 4; j++) acc[j] = acc[j] * back[j] + tail_weights[group] * tail_first[j];
#pragma unroll 1
for (int p = group + GROUPS; p < tail_pieces; p += GROUPS) {
  float value[4];
  load4(plain + p * D, value);
  UNROLL
  for (int j = 0; j < 4; j++) acc[j] += tail_weights[p] * value[j];
}

threadgroup float4 shares[32 * SG];  // [group][slice][columns of it]
float4 four;
four.x = acc[0];
four.y = acc[1];
four.z = acc[2];
four.w = acc[3];
shares[i] = four;
threadgroup_barrier(mem_flags::mem_threadgroup);
total = sum_lanes(lane < SG ? totals[lane] : 0.0f, 32);
if (i < 32 * SLICES) {
  float value = 0;
  UNROLL
  for (int k = 0; k < GROUPS; k++) value += ((const threadgroup float*)shares)[k * (32 * SLICES) + i];
  out[row * D + i / 32 * WIDTH + first_column + i % 32] = U(value / total);
}
