// Attention of a few new tokens over many fp16 keys and values, on matrix units. Gives what `attention` of
// attention.metal gives without a window: for each piece of the length
//   sums = sum over j of 2^(score_j - top) v[j], score_j = SCALE / ln 2 q . k[j],  and (top, sum of 2^(score_j - top));
// `merge` of attention.metal adds the pieces up.
//
// q [tokens, H, D], the H heads in groups of GQA that share a KV head; part i: k, v [.., G, capacity_i, D] with tokens
// spans[2 i] to spans[2 i + 1] in use. All tokens in use are one row, of which the last are the queries themselves:
// query t sees up to itself. parts.metal says how parts are cut into pieces; one without tokens in use gives (UNSEEN, 0)
// and zeros.
//
// Threads. A threadgroup (SG simdgroups, a divisor of D / 64) takes 8 TILES of the GQA * tokens queries of one KV head
// and one piece; grid (32 SG ceil(GQA tokens / 8 TILES), pieces, G). It walks through what is in use of its piece in
// blocks of 16 SG tokens:
//   1. scores: a simdgroup takes 16 tokens and all of D: products of 16 tokens x 16 numbers and 16 x 8 queries;
//   2. softmax, in fp32: a simdgroup takes whole queries, keeps their running maximum and sum;
//   3. values: a simdgroup takes D / SG columns of all tokens: products of 16 columns x 16 tokens and 16 tokens x 8
//      queries; weights are halves, sums fp32.
// matrix.metal says what a lane holds of a product's factors. The sums of a product may be in any order, so a lane
// multiplies the very numbers it has read, 16 bytes of a token at once, and the queries are laid out to match.
//
// Memory. Keys and values are read once for each 8 TILES queries, D / 16 loads of 16 bytes a lane and block of either,
// in batches of BATCH loads through two sets of registers: as soon as a batch is used, the one after the next is
// loaded, across the barriers around the softmax and into the next block, so that BATCH to 2 BATCH loads of each lane
// are always under way (a simdgroup_barrier keeps the compiler from loading later). sums (fp32, [tokens H, pieces, D])
// are written once and read once.
//
// Rendered before: T (half), D (a multiple of 64), GQA, SG, TILES, BATCH (a multiple of 4 that divides D / 16), RESIDENT
// (threadgroups that a core is to hold at once), SCALE. Pieces are multiples of BLOCK tokens.
// uses: matrix.metal
// uses: parts.metal

#define BLOCK (16 * SG)
#define ROWS (8 * TILES)
#define SLOTS (D / 16)               // products along D
#define CHUNKS (D / SG / 64)         // a simdgroup's columns, in 64s: 8 lanes of 8
#define BATCHES (D / 16 / BATCH)     // of keys, and as many of values, a block
#define UNSEEN -1e30f
#define LAUNCH_BOUNDS __launch_bounds__(32 * SG, RESIDENT)  // for CUDA: limits the registers of a thread

// Load one batch of a block of n tokens: the first BATCHES are of keys, the others of values. A token past the end is a
// copy of the last one, with weight 0.
METAL_FUNC void load_batch(const device half* k, const device half* v, int n, int batch, int sg, int lane,
                           thread uint* words) {
  const int lane_g = LANE_G, lane_t = LANE_T, last = (n - 1) * D;
  const int key = (sg * 16 + lane_g) * D, value = lane_t * 2 * D, column = sg * (D / SG) + lane_g * 8;
  UNROLL
  for (int i = 0; i < BATCH; i++) {
    if (batch < BATCHES) {
      const int load = batch * BATCH + i;
      const int token = min(key + load % 2 * 8 * D, last);
      load_words((const device uint*)(k + (token + lane_t * 8) + load / 2 * 32), 4, words + 4 * i);
    } else {
      const int load = (batch - BATCHES) * BATCH + i;
      const int token = min(value + (load / 4 / CHUNKS * 16 + load % 4 / 2 * 8 + load % 2) * D, last);
      load_words((const device uint*)(v + (token + column) + load / 4 % CHUNKS * 64), 4, words + 4 * i);
    }
  }
}

// kernel: long_attention(q, spans, cut, k0, v0, k1, v1, k2, v2, k3, v3, k4, v4, k5, v5, k6, v6, k7, v7) -> (sums, stats)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int lane_g = LANE_G, lane_t = LANE_T;
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int piece = int(threadgroup_position_in_grid.y), pieces = int(threadgroups_per_grid.y);
const int g = int(threadgroup_position_in_grid.z);
const int tokens = q_shape[0], heads = q_shape[1];

const Part parts[MAX_PARTS] = {{k0, v0}, {k1, v1}, {k2, v2}, {k3, v3}, {k4, v4}, {k5, v5}, {k6, v6}, {k7, v7}};
const Piece mine = find_piece(parts, spans, cut, piece, g, D);
const int from = mine.from, to = mine.to;

threadgroup uint2 queries[TILES * SLOTS * 32];  // second factors of scores, [tile][product][lane]
threadgroup uint2 weights[TILES * SG * 32];     // of values, [tile][16 tokens][lane]
threadgroup float scores[ROWS][BLOCK + 1];
threadgroup float shrink[ROWS];                 // factor of a query's old sums once its maximum has grown

const device half* k = mine.k + ulong(from) * D;
const device half* v = mine.v + ulong(from) * D;
uint words[2][4 * BATCH];
#define LOAD_FIRST                                                \
  load_batch(k, v, min(BLOCK, to - from), 0, sg, lane, words[0]); \
  load_batch(k, v, min(BLOCK, to - from), 1, sg, lane, words[1]);
// Before the launch that computes q has ended, where the block has none of the queries' own tokens, which that writes.
const bool early = min(BLOCK, to - from) <= mine.total - tokens - mine.before - from;
if (from < to && early) {
  LOAD_FIRST
}
INPUTS_READY();
if (from < to && !early) {
  LOAD_FIRST
}

// A product takes 4 of a lane's 8 numbers: two for its first 8 rows, two for the other 8.
UNROLL
for (int i = int(thread_index_in_threadgroup); i < ROWS * D / 8; i += 32 * SG) {
  const int r = i / (D / 8), c = i % (D / 8), row = first_row + r;
  uint eight[4] = {0, 0, 0, 0};
  if (row < GQA * tokens)
    load_words((const device uint*)(q + (row / GQA * heads + g * GQA + row % GQA) * D + c * 8), 4, eight);
  UNROLL
  for (int j = 0; j < 8; j++) {
    const int slot = c / 4 * 2 + j / 4,
              place = (r / 8 * SLOTS + slot) * 128 + B_PLACE(c % 4 * 2 + j % 2, r % 8) + j % 4 / 2 * 2;
    ((threadgroup half*)queries)[place] = as_type<half>(ushort(j % 2 ? eight[j / 2] >> 16 : eight[j / 2] & 0xFFFFu));
  }
}

// Running maximum and sum of the queries of this simdgroup: sg, sg + SG, ...
constexpr int OWN = (ROWS + SG - 1) / SG;
float top[OWN], sum[OWN];
int seen[OWN];  // tokens that each query sees of what is left of the piece
UNROLL
for (int i = 0; i < OWN; i++) {
  seen[i] = min(to - from, mine.total - tokens + (first_row + sg + i * SG) / GQA + 1 - mine.before - from);
  top[i] = UNSEEN;
  sum[i] = 0;
}
float acc[TILES][CHUNKS][4][4];  // per pair of columns: the first for queries 2 t, 2 t + 1, then the second
UNROLL
for (int tile = 0; tile < TILES; tile++) {
  UNROLL
  for (int i = 0; i < CHUNKS * 16; i++) acc[tile][i / 16][i / 4 % 4][i % 4] = 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int left = to - from; left > 0; left -= BLOCK) {
  // After the last block its first token is loaded again: loads that need no branch do not wait for one.
  const int n = min(BLOCK, left), next_n = left > BLOCK ? min(BLOCK, left - BLOCK) : 1;
  const int next = left > BLOCK ? BLOCK * D : 0;

  // 1. Scores.
  float s[TILES][4];
  UNROLL
  for (int tile = 0; tile < TILES; tile++) {
    UNROLL
    for (int j = 0; j < 4; j++) s[tile][j] = 0;
  }
  UNROLL
  for (int batch = 0; batch < BATCHES; batch++) {
    UNROLL
    for (int i = 0; i < BATCH; i++) {
      const thread uint* two = words[batch % 2] + i / 2 * 8 + i % 2 * 2;  // of a token, and 4 on of another
      const uint a[4] = {two[0], two[4], two[1], two[5]};
      UNROLL
      for (int tile = 0; tile < TILES; tile++) {
        const uint2 b = queries[(tile * SLOTS + batch * BATCH + i) * 32 + lane];
        multiply(s[tile], a, b.x, b.y);
      }
    }
    if (batch + 2 < 2 * BATCHES)
      load_batch(k, v, n, batch + 2, sg, lane, words[batch % 2]);
    else
      load_batch(k + next, v + next, next_n, batch + 2 - 2 * BATCHES, sg, lane, words[batch % 2]);
    simdgroup_barrier(mem_flags::mem_none);
  }
  UNROLL
  for (int tile = 0; tile < TILES; tile++) {
    UNROLL
    for (int j = 0; j < 4; j++)
      scores[tile * 8 + lane_t * 2 + j % 2][sg * 16 + lane_g + j / 2 * 8] = s[tile][j] * (SCALE * 1.4426950408889634f);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. Softmax.
  UNROLL
  for (int i = 0; i < OWN; i++) {
    const int r = sg + i * SG;
    if (r < ROWS) {
      float s[(BLOCK + 31) / 32], best = top[i];
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        s[b] = key < min(BLOCK, seen[i]) ? scores[r][key] : UNSEEN;
        best = max(best, s[b]);
      }
      best = max_lanes(best);
      float part_sum = 0;
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        const float weight = key < min(BLOCK, seen[i]) ? exp2(s[b] - best) : 0.0f;
        part_sum += weight;
        const int place = (r / 8 * SG + key / 16) * 128 + B_PLACE(key % 8, r % 8) + key % 16 / 8 * 2;
        if (key < BLOCK) ((threadgroup half*)weights)[place] = half(weight);
      }
      const float factor = exp2(top[i] - best);
      sum[i] = sum[i] * factor + sum_lanes(part_sum, 32);
      top[i] = best;
      seen[i] -= BLOCK;
      if (lane == 0) shrink[r] = factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3. Values.
  UNROLL
  for (int tile = 0; tile < TILES; tile++) {
    const float low = shrink[tile * 8 + lane_t * 2], high = shrink[tile * 8 + lane_t * 2 + 1];
    UNROLL
    for (int i = 0; i < CHUNKS * 16; i++) acc[tile][i / 16][i / 4 % 4][i % 4] *= i % 2 ? high : low;
  }
  UNROLL
  for (int batch = 0; batch < BATCHES; batch++) {
    const int turn = (BATCHES + batch) % 2;
    UNROLL
    for (int i = 0; i < BATCH; i++) {
      const int four = batch * (BATCH / 4) + i / 4;  // which 4 loads: of 16 tokens and one chunk
      const thread uint* pair = words[turn] + i / 4 * 16 + i % 4;  // 2 columns of the first token; 4 on, of the second
      const uint a[4] = {firsts(pair[0], pair[4]), seconds(pair[0], pair[4]),
                         firsts(pair[8], pair[12]), seconds(pair[8], pair[12])};
      UNROLL
      for (int tile = 0; tile < TILES; tile++) {
        const uint2 b = weights[(tile * SG + four / CHUNKS) * 32 + lane];
        multiply(acc[tile][four % CHUNKS][i % 4], a, b.x, b.y);
      }
    }
    if (batch + 2 < BATCHES)
      load_batch(k, v, n, BATCHES + batch + 2, sg, lane, words[turn]);
    else
      load_batch(k + next, v + next, next_n, batch + 2 - BATCHES, sg, lane, words[turn]);
    simdgroup_barrier(mem_flags::mem_none);
  }
  k += next;
  v += next;
}

UNROLL
for (int i = 0; i < OWN; i++) {
  const int r = sg + i * SG, row = first_row + r;
  if (r < ROWS && lane == 0 && row < GQA * tokens) {
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
    if (row < GQA * tokens) {
      const int query = row / GQA * heads + g * GQA + row % GQA;
      device float* to_sums = sums + ulong(query * pieces + piece) * D + sg * (D / SG) + lane_g * 8;
      UNROLL
      for (int c = 0; c < CHUNKS; c++) {
        float eight[8];
        UNROLL
        for (int j = 0; j < 8; j++) eight[j] = acc[tile][c][j / 2][j % 2 * 2 + i];
        store8(to_sums + c * 64, eight);
      }
    }
  }
}
