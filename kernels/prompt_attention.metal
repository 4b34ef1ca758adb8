// Attention of many new tokens over keys and values in parts, on matrix units, with no matrix of scores in memory:
//   sums = sum over j of 2^(score_j - top) v[j], score_j = SCALE / ln 2 q . k[j],  and (top, sum of 2^(score_j - top)).
//
// One text for fp16 keys and values (BITS 16) and for quantized ones (mlx_gemma4/kv/quantization.py; BITS 8 or 4, with
// the formulas of quantized_attention.metal). It depends on a layer by D, BITS, SCALE and CENTERED alone: lengths,
// positions, window, number of parts and heads per KV head are inputs.
//
// q [H, T, D], the H heads in groups that share a KV head; this launch is for `count` tokens from `first` on. The key at
// position p is visible to token t if p < last[t] + 1 and p > position(t) - window. settings: first, count, position of
// q's token 0, window, pieces in `carried`, whether to divide, number of parts, 0; then first position and tokens of
// each part. Part i: k, v [G, tokens, D]; quantized: k the codes [G, tokens, 2, WORDS] of each key, then value, v their
// scales [G, tokens, 2]. carried, carried_stats: what a launch before this one left for the same tokens, added here.
// out fp32 [count H, pieces, D] and stats [count H, pieces, 2]: the sums above, divided if settings say so.
//
// Threads. A threadgroup (SG simdgroups) takes ROWS = 8 TILES rows, that is queries: all heads of a group for a token,
// then for the next. Of one KV head, and of one piece of the positions that any of its rows sees;
// grid (32 SG ceil(rows / ROWS), pieces, G). It walks through them in blocks of 16 SG tokens of one part:
//   1. scores: a simdgroup takes 16 tokens and all of D, for all rows. Each lane keeps its scores in registers;
//   2. softmax: the maximum over a simdgroup's tokens by shuffles, over simdgroups through threadgroup memory; weights
//      go there as halves, each written once. A lane sums the weights of its own tokens; the rest waits for the end;
//   3. values: a simdgroup takes D / SG columns of all tokens, for all rows.
// Two barriers a block. matrix.metal says what a lane holds of a product's factors. The sums of a product may be in any
// order, so a lane multiplies the very numbers it has read, 16 bytes of a token at once, and queries are laid out to
// match. At the end rows go through threadgroup memory, 8 at a time: a simdgroup has a whole one then, for the H that
// leads back from the space of the codes, for what is carried, and to write it.
//
// Why this tiling. Each key and value is used by one simdgroup alone, so neither passes threadgroup memory: they are
// read, and codes expanded, straight into factors. All simdgroups share queries and weights, 2 D ROWS and 32 SG ROWS
// bytes. With D 512, 16 rows and 8 simdgroups that is 20 KB, maxima included, so two threadgroups may fit a core; 32
// rows would take all 32 KB for queries. Sums are spread over the simdgroups: D ROWS / (32 SG), at most 32 registers a
// lane. Counted in fp32 registers a lane, fp16 and D 512: sums 32, scores 8, maxima and sums of weights 8, keys or
// values in two turns 32, factors 10, addresses and counts about 12: 102. D 256 (32 rows): 32, 16, 16, 16, 14, 12: 106.
// A token's key and value, 4 D bytes, are read for 4 D ROWS operations. Threadgroups of one KV head are neighbours in
// the grid and walk over the same tokens at the same time, so that most of these reads can end in a cache.
//
// Memory. Each part is read once for each ROWS rows; out is written once.
//
// Rendered before: what quantized.metal needs; SCALE, CENTERED, SG, TILES.
// uses: matrix.metal
// uses: quantized.metal

#define BLOCK (16 * SG)
#define ROWS (8 * TILES)
#define SLOTS (D / 16)                           // products along D
// Words of a key that a lane reads at once; 4 lanes share a key. Of long keys in fp16 a whole line of 128 bytes, which a
// small cache could have lost before its second half is wanted.
#define K_MOST (BITS == 16 && TILES == 2 ? 8 : 4)
#define K_WORDS (WORDS / 4 < K_MOST ? WORDS / 4 : K_MOST)
#define K_STEPS (WORDS / (4 * K_WORDS))
#define RUN (K_WORDS * PER)                      // numbers of a key that a lane reads at once
#define V_WORDS (WORDS / (8 * SG))               // words of a value per lane; 8 lanes share a simdgroup's columns
#define PAIRS (V_WORDS * PER / 2)                // pairs of columns of a lane
#define STRIDE (BITS == 16 ? WORDS : 2 * WORDS)  // words from token to token
#define UNSEEN -1e30f
#define TOP -1e29f  // a row's first maximum: above UNSEEN, so that 2^(UNSEEN - top) is 0 before it has seen any token
#define LAUNCH_BOUNDS __launch_bounds__(32 * SG)  // for CUDA

// Load words of the keys of this lane's two tokens of a block of n. Past the end it loads the last one.
METAL_FUNC void load_keys(const device uint* keys, int n, int step, int sg, int lane, thread uint* words) {
  const int lane_g = LANE_G, lane_t = LANE_T;
  UNROLL
  for (int i = 0; i < 2; i++) {
    const int token = min(sg * 16 + lane_g + 8 * i, n - 1);
    load_words(keys + token * STRIDE + (step * 4 + lane_t) * K_WORDS, K_WORDS, words + i * K_WORDS);
  }
}

// Load words of the values of this lane's four tokens among the 16 of `group`, likewise.
METAL_FUNC void load_values(const device uint* values, int n, int group, int sg, int lane, thread uint* words) {
  const int lane_g = LANE_G, lane_t = LANE_T;
  UNROLL
  for (int i = 0; i < 4; i++) {
    const int token = min(group * 16 + lane_t * 2 + i % 2 + i / 2 * 8, n - 1);
    load_words(values + token * STRIDE + (sg * 8 + lane_g) * V_WORDS, V_WORDS, words + i * V_WORDS);
  }
}

// kernel: prompt_attention(q, last, settings, carried, carried_stats, rotation?, k0, v0, k1, v1, k2, v2, k3, v3, k4, v4, k5, v5, k6, v6, k7, v7) -> (out, stats)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int lane_g = LANE_G, lane_t = LANE_T;
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int piece = int(threadgroup_position_in_grid.y), pieces = int(threadgroups_per_grid.y);
const int g = int(threadgroup_position_in_grid.z);
const int heads = q_shape[0], gqa = heads / int(threadgroups_per_grid.z);
const int first = settings[0], rows = settings[1] * gqa, position = settings[2], window = settings[3];

threadgroup uint2 queries[TILES * SLOTS * 32];  // second factors of scores, [tile][product][lane]
threadgroup uint2 weights[TILES * SG * 32];     // of values, [tile][16 tokens][lane]
threadgroup float of_group[SG][ROWS];           // maxima of each simdgroup's tokens; at the end, sums of their weights
threadgroup float of_row[ROWS];                 // a row's scores with the center; at the end, its maximum
threadgroup int low[ROWS];                      // first position that a row sees
threadgroup int high[ROWS];                     // one past the last
#if BITS == 4 && !defined(CUDA)
threadgroup uint table[256];                    // two codes -> their levels
for (int i = sg * 32 + lane; i < 256; i += 32 * SG) {
  const uint level[8] = {LEVELS};
  const uint even = level[i & 7] | (i & 8 ? 0x8000u : 0u), odd = level[i / 16 & 7] | (i & 128 ? 0x8000u : 0u);
  table[i] = even | odd << 16;
}
#else
const threadgroup uint* table = 0;
#endif

// Queries: a simdgroup takes whole ones, sg, sg + SG, .., and lane l the numbers l, l + 32, .. of each.
for (int r = sg; r < ROWS; r += SG) {
  const int row = first_row + r;
  const device half* from = q + (ulong(g * gqa + row % gqa) * ulong(q_shape[1]) + ulong(first + row / gqa)) * D + lane;
  float own[D / 32];
  UNROLL
  for (int j = 0; j < D / 32; j++) own[j] = 0;
  if (row < rows) {
    UNROLL
    for (int j = 0; j < D / 32; j++) own[j] = float(from[j * 32]);
  }
#if BITS < 16
  float along = 0;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    own[j] *= SCALE * 1.4426950408889634f;
#if CENTERED
    along += own[j] * rotation[(2 + g) * D + j * 32 + lane];
#endif
    own[j] *= rotation[j * 32 + lane] / D;
  }
  along = sum_lanes(along, 32);
  if (lane == 0) of_row[r] = along;
  hadamard(own, lane);
#endif
  // A product takes 4 numbers from each of 4 lanes: two for its first 8 rows, two for the other 8.
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const int d = j * 32 + lane, slot = d / (4 * RUN) * (RUN / 4) + d % RUN / 4, t = d / RUN % 4;
    const int place = (r / 8 * SLOTS + slot) * 128 + B_PLACE(2 * t + d % 2, r % 8) + d % 4 / 2 * 2;
    ((threadgroup half*)queries)[place] = half(own[j]);
  }
  if (lane == 0) {  // past the last row: as that
    const int token = first + min(row, rows - 1) / gqa;
    low[r] = position + token - window + 1;
    high[r] = last[token] + 1;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Positions that some row sees, and those that all see; then this piece's.
int from = low[0], to = high[0], all_from = from, all_to = to;
for (int r = 1; r < ROWS; r++) {
  from = min(from, low[r]);
  to = max(to, high[r]);
  all_from = max(all_from, low[r]);
  all_to = min(all_to, high[r]);
}
const int parts = settings[6];
from = max(from, settings[8]);
const int share = ((to - from + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK;
from += piece * share;
to = min(to, from + share);

float acc[TILES][PAIRS][4];            // a pair's first column for rows 2 t and 2 t + 1, then its second
float top[TILES][2], sum[TILES][2];    // of rows 2 t and 2 t + 1; sums over this lane's tokens alone
UNROLL
for (int tile = 0; tile < TILES; tile++) {
  UNROLL
  for (int i = 0; i < PAIRS * 4; i++) acc[tile][i / 4][i % 4] = 0;
  UNROLL
  for (int i = 0; i < 2; i++) {
    top[tile][i] = TOP;
    sum[tile][i] = 0;
  }
}

for (int part = 0; part < parts; part++) {
  const int start = settings[8 + 2 * part], tokens = settings[9 + 2 * part];
  const device uint* keys = (const device uint*)k0;
  const device uint* values = (const device uint*)v0;
#define TAKE(n)                                \
  if (part == n) {                             \
    keys = (const device uint*)k##n;           \
    values = (const device uint*)v##n;         \
  }
  TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7)
  keys += ulong(g) * ulong(tokens) * STRIDE;
#if BITS < 16
  const device uint* scales = values + ulong(g) * ulong(tokens);  // a key's and its value's in a word
  values = keys + WORDS;
#else
  values += ulong(g) * ulong(tokens) * STRIDE;
#endif

  for (int at = max(from, start); at < min(to, start + tokens); at += BLOCK) {
    const int n = min(BLOCK, min(to, start + tokens) - at);
    const device uint* k = keys + ulong(at - start) * STRIDE;
    const device uint* v = values + ulong(at - start) * STRIDE;

    // 1. Scores.
    uint loaded[2][4 * V_WORDS > 2 * K_WORDS ? 4 * V_WORDS : 2 * K_WORDS];
    load_keys(k, n, 0, sg, lane, loaded[0]);
    float s[TILES][4];
    UNROLL
    for (int tile = 0; tile < TILES; tile++) {
      UNROLL
      for (int i = 0; i < 4; i++) s[tile][i] = 0;
    }
    UNROLL
    for (int step = 0; step < K_STEPS; step++) {
      const thread uint* words = loaded[step % 2];
      if (step + 1 < K_STEPS)
        load_keys(k, n, step + 1, sg, lane, loaded[(step + 1) % 2]);
      else
        load_values(v, n, 0, sg, lane, loaded[(step + 1) % 2]);
      simdgroup_barrier(mem_flags::mem_none);  // keeps the compiler from loading later
      uint pairs[2][RUN / 2];
      UNROLL
      for (int w = 0; w < K_WORDS; w++) {
        levels(words[w], table, pairs[0] + w * (PER / 2));
        levels(words[K_WORDS + w], table, pairs[1] + w * (PER / 2));
      }
      UNROLL
      for (int i = 0; i < RUN / 4; i++) {
        const uint a[4] = {pairs[0][2 * i], pairs[1][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i + 1]};
        UNROLL
        for (int tile = 0; tile < TILES; tile++) {
          const uint2 b = queries[(tile * SLOTS + step * (RUN / 4) + i) * 32 + lane];
          multiply(s[tile], a, b.x, b.y);
        }
      }
    }

    // 2. Softmax. A lane has the scores of tokens g and g + 8 with rows 2 t and 2 t + 1.
    float value_scales[2] = {1, 1};
    UNROLL
    for (int i = 0; i < 2; i++) {
#if BITS < 16
      const uint scale = scales[at - start + min(sg * 16 + lane_g + 8 * i, n - 1)];
      value_scales[i] = high_half(scale);
#endif
      UNROLL
      for (int j = 0; j < 2 * TILES; j++) {
#if BITS < 16
        s[j / 2][2 * i + j % 2] = s[j / 2][2 * i + j % 2] * low_half(scale) + of_row[j / 2 * 8 + lane_t * 2 + j % 2];
#else
        s[j / 2][2 * i + j % 2] *= SCALE * 1.4426950408889634f;
#endif
      }
    }
    if (n < BLOCK || at < all_from || at + n > all_to) {
      UNROLL
      for (int i = 0; i < 4 * TILES; i++) {
        const int r = i / 4 * 8 + lane_t * 2 + i % 2, in_block = sg * 16 + lane_g + i % 4 / 2 * 8;
        if (in_block >= n || at + in_block < low[r] || at + in_block >= high[r]) s[i / 4][i % 4] = UNSEEN;
      }
    }
    UNROLL
    for (int j = 0; j < 2 * TILES; j++) {
      float best = max(s[j / 2][j % 2], s[j / 2][2 + j % 2]);
      UNROLL
      for (int m = 1; m < 8; m *= 2) best = max(best, simd_shuffle_xor(best, ushort(LANE_OF(m, 0))));
      if (lane_g == 0) of_group[sg][j / 2 * 8 + lane_t * 2 + j % 2] = best;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float shrink[TILES][2];  // factor of a row's old sums once its maximum has grown
    UNROLL
    for (int j = 0; j < 2 * TILES; j++) {
      const int tile = j / 2, i = j % 2, r = tile * 8 + lane_t * 2 + i;
      float best = top[tile][i];
      UNROLL
      for (int other = 0; other < SG; other++) best = max(best, of_group[other][r]);
      shrink[tile][i] = exp2(top[tile][i] - best);
      top[tile][i] = best;
      const float weight[2] = {exp2(s[tile][i] - best), exp2(s[tile][2 + i] - best)};
      sum[tile][i] = sum[tile][i] * shrink[tile][i] + (weight[0] + weight[1]);
      UNROLL
      for (int m = 0; m < 2; m++)
        ((threadgroup half*)weights)[(tile * SG + sg) * 128 + B_PLACE(lane_g, lane_t * 2 + i) + m * 2] =
            half(weight[m] * value_scales[m]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 3. Values.
    UNROLL
    for (int tile = 0; tile < TILES; tile++) {
      UNROLL
      for (int i = 0; i < PAIRS * 4; i++) acc[tile][i / 4][i % 4] *= shrink[tile][i % 2];
    }
    UNROLL
    for (int group = 0; group < SG; group++) {
      if (group * 16 < n) {
        const thread uint* words = loaded[(K_STEPS + group) % 2];
        if (group + 1 < SG) load_values(v, n, group + 1, sg, lane, loaded[(K_STEPS + group + 1) % 2]);
        simdgroup_barrier(mem_flags::mem_none);
        uint2 b[TILES];
        UNROLL
        for (int tile = 0; tile < TILES; tile++) b[tile] = weights[(tile * SG + group) * 32 + lane];
        UNROLL
        for (int w = 0; w < V_WORDS; w++) {
          uint pairs[4][PER / 2];
          UNROLL
          for (int i = 0; i < 4; i++) levels(words[i * V_WORDS + w], table, pairs[i]);
          UNROLL
          for (int i = 0; i < PER / 2; i++) {
            const uint a[4] = {firsts(pairs[0][i], pairs[1][i]), seconds(pairs[0][i], pairs[1][i]),
                               firsts(pairs[2][i], pairs[3][i]), seconds(pairs[2][i], pairs[3][i])};
            UNROLL
            for (int tile = 0; tile < TILES; tile++) multiply(acc[tile][w * (PER / 2) + i], a, b[tile].x, b[tile].y);
          }
        }
      }
    }
  }
}

// The end: rows as a whole, 8 at a time, where the queries were. All have read these before the last block's weights.
UNROLL
for (int j = 0; j < 2 * TILES; j++) {
  UNROLL
  for (int m = 1; m < 8; m *= 2) sum[j / 2][j % 2] += simd_shuffle_xor(sum[j / 2][j % 2], ushort(LANE_OF(m, 0)));
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (lane_g == 0) {
  UNROLL
  for (int j = 0; j < 2 * TILES; j++) {
    const int r = j / 2 * 8 + lane_t * 2 + j % 2;
    of_group[sg][r] = sum[j / 2][j % 2];
    if (sg == 0) of_row[r] = top[j / 2][j % 2];
  }
}
UNROLL
for (int tile = 0; tile < TILES; tile++) {
  threadgroup float* whole = (threadgroup float*)queries;  // [8][D]
  UNROLL
  for (int i = 0; i < PAIRS * 4; i++)
    whole[(lane_t * 2 + i % 2) * D + (sg * 8 + lane_g) * (2 * PAIRS) + i / 2] = acc[tile][i / 4][i % 4];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int r = sg; r < 8; r += SG) {
    const int row = first_row + tile * 8 + r;
    float best = of_row[tile * 8 + r], total = 0, own[D / 32];
    UNROLL
    for (int i = 0; i < SG; i++) total += of_group[i][tile * 8 + r];
    UNROLL
    for (int j = 0; j < D / 32; j++) own[j] = whole[r * D + j * 32 + lane];
#if BITS < 16
    hadamard(own, lane);
    UNROLL
    for (int j = 0; j < D / 32; j++) own[j] *= rotation[D + j * 32 + lane] / D;
#endif
    if (row < rows) {
      const int place = row / gqa * heads + g * gqa + row % gqa;
      for (int old = place * settings[4]; piece == 0 && old < (place + 1) * settings[4]; old++) {
        const float its_best = carried_stats[2 * old], both = max(best, its_best);
        const float shrink = exp2(best - both), its_shrink = exp2(its_best - both);
        const device float* its = carried + ulong(old) * D + lane;
        UNROLL
        for (int j = 0; j < D / 32; j++) own[j] = own[j] * shrink + its[j * 32] * its_shrink;
        total = total * shrink + carried_stats[2 * old + 1] * its_shrink;
        best = both;
      }
      const int made = place * pieces + piece;
      const float factor = settings[5] && total > 0 ? 1 / total : 1.0f;
      UNROLL
      for (int j = 0; j < D / 32; j++) out[ulong(made) * D + j * 32 + lane] = own[j] * factor;
      if (lane == 0) {
        stats[2 * made] = best;
        stats[2 * made + 1] = total;
      }
    }
  }
  if (tile + 1 < TILES) threadgroup_barrier(mem_flags::mem_threadgroup);
}
