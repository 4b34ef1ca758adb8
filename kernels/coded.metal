// Attention of a few new tokens over keys and values in codes (mlx_gemma4/kv_codes.py), which stay codes:
//   with q' = H (turn * q):  score_j = SCALE (scale_j / D  sum over i of level(code_j[i]) q'[i]  +  q . center),
//   sums = sum over j of 2^(score_j - top) scale'_j level(code'_j),   still in the codes' space.
// `merge_coded` adds up the pieces and the tail's share, and turns the result back.
//
// q [tokens, H, D], the H heads in groups of GQA that share a KV head; turn fp32 [2, D], of which the first row is
// meant here, and the second (signs alone) by `merge_coded`; with CENTERED, G rows more: the centers. Part i: c [G, n_i, 2, WORDS], codes of each token's key,
// then its value, s [G, n_i, 2] their scales. Queries see all of every part.
//
// Threads. A threadgroup (SG simdgroups) takes 8 TILES of the GQA * tokens queries of one KV head and one piece of the
// length; grid (32 SG ceil(GQA tokens / 8 TILES), pieces, G). It walks through its piece in blocks of 16 SG tokens:
//   1. scores: a simdgroup takes 16 tokens and all of D: products of 16 x 16 codes and 16 x 8 queries, in half, summed
//      in fp32 by the matrix units;
//   2. softmax: a simdgroup takes whole queries, keeps their running maximum and sum;
//   3. values: a simdgroup takes D / SG columns of all tokens: products of 16 columns x 16 tokens and 16 tokens x 8
//      queries.
// What a lane holds of a product's factors: matrix.metal. Sums of a product may be in any order, so a lane's columns are
// those whose codes it has read: 16 bytes of a token at once.
//
// Memory. Codes and scales once for each 8 TILES queries; sums (fp32, [tokens H, pieces, D]) written once, read once.
//
// Rendered before: T (dtype of q), U (of out), D, GQA, BITS, CENTERED, SG, TILES, PARTS, SCALE; of 4 bits, LEVELS (8 fp16 as
// bits), LOW_0, LOW_1, HIGH_0, HIGH_1 (their low and high bytes). For `encode`: T (of keys and values), D, BITS, CENTERED, and
// MAGNITUDES, BOUNDS (the levels, and the 7 halfway between them) as floats.
// uses: matrix.metal

#define PER (32 / BITS)                        // codes a word
#define WORDS (D / PER)                        // a vector
#define BLOCK (16 * SG)
#define ROWS (8 * TILES)
#define SLOTS (D / 16)                         // products along D
#define K_WORDS (WORDS / 4 < 4 ? WORDS / 4 : 4)  // of a key that a lane reads at once; 4 lanes share a key
#define K_STEPS (WORDS / (4 * K_WORDS))
#define V_WORDS (WORDS / (8 * SG))             // of a value, a lane; 8 lanes share a simdgroup's columns
#define UNSEEN -1e30f

#ifndef CUDA
// Two numbers 1024 + code as halves, less 1152: code - 128.
METAL_FUNC uint less_1152(uint pair) {
  const half a = as_type<half>(ushort(pair & 0xFFFFu)) - half(1152), b = as_type<half>(ushort(pair >> 16)) - half(1152);
  return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16;
}
#endif

// The levels of a word's codes, as pairs of halves.
METAL_FUNC void levels(uint word, const threadgroup uint* table, thread uint* pairs) {
#if BITS == 8
  UNROLL
  for (int i = 0; i < 2; i++) {
    const uint codes = word >> (16 * i);
    pairs[i] = less_1152((codes & 0xFFu) | (codes & 0xFF00u) << 8 | 0x64006400u);
  }
#elif defined(CUDA)
  levels_by_bytes(word, LOW_0, LOW_1, HIGH_0, HIGH_1, pairs);
#else
  UNROLL
  for (int i = 0; i < 4; i++) pairs[i] = table[(word >> (8 * i)) & 0xFFu];
#endif
}

// H v over a simdgroup, which holds the numbers lane, lane + 32 ..
METAL_FUNC void hadamard(thread float* v, int lane) {
  UNROLL
  for (int m = 1; m < 32; m *= 2) {
    UNROLL
    for (int j = 0; j < D / 32; j++) {
      const float other = simd_shuffle_xor(v[j], ushort(m));
      v[j] = lane & m ? other - v[j] : v[j] + other;
    }
  }
  UNROLL
  for (int m = 1; m < D / 32; m *= 2) {
    UNROLL
    for (int j = 0; j < D / 32; j++) {
      if ((j & m) == 0) {
        const float a = v[j], b = v[j + m];
        v[j] = a + b;
        v[j + m] = a - b;
      }
    }
  }
}

struct Coded {
  const device uint* codes;
  const device half* scales;
  int length;
};

// kernel: coded_attention(q, turn, c0, s0, c1?, s1?, c2?, s2?, c3?, s3?, c4?, s4?, c5?, s5?, c6?, s6?) -> (sums, stats)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int lane_g = LANE_G, lane_t = LANE_T;
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int piece = int(threadgroup_position_in_grid.y), pieces = int(threadgroups_per_grid.y);
const int g = int(threadgroup_position_in_grid.z);
const int tokens = q_shape[0], heads = q_shape[1];

const Coded parts[PARTS] = {
    {c0, s0, int(c0_shape[1])},
#if PARTS > 1
    {c1, s1, int(c1_shape[1])},
#endif
#if PARTS > 2
    {c2, s2, int(c2_shape[1])},
#endif
#if PARTS > 3
    {c3, s3, int(c3_shape[1])},
#endif
#if PARTS > 4
    {c4, s4, int(c4_shape[1])},
#endif
#if PARTS > 5
    {c5, s5, int(c5_shape[1])},
#endif
#if PARTS > 6
    {c6, s6, int(c6_shape[1])},
#endif
};

threadgroup uint2 queries[TILES * SLOTS * 32];  // second factors of scores, [tile][product][lane]
threadgroup uint2 weights[TILES * SG * 32];     // of values, [tile][16 tokens][lane]
threadgroup float scores[ROWS][BLOCK + 1];
threadgroup float value_scales[BLOCK];
threadgroup float shift[ROWS];                  // what the center adds to a query's scores
threadgroup float shrink[ROWS];                 // by how much a query's sums shrink, its maximum having grown
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

// Queries into the codes' space: a simdgroup takes whole ones, lane l the numbers l, l + 32 ..
for (int r = sg; r < ROWS; r += SG) {
  const int row = first_row + r;
  float v[D / 32], along = 0;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const int d = j * 32 + lane;
    v[j] = 0;
    if (row < GQA * tokens) {
      const float x = float(q[(row / GQA * heads + g * GQA + row % GQA) * D + d]) * (SCALE * 1.4426950408889634f);
      v[j] = x * turn[d] / D;
      if (CENTERED) along += x * turn[(2 + g) * D + d];
    }
  }
  along = sum_lanes(along, 32);
  if (lane == 0) shift[r] = along;
  hadamard(v, lane);
  // A product takes 4 codes of each of 4 lanes: two for its first 8 rows, two for the other 8.
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const int d = j * 32 + lane, word = d / PER, c = d % 4;
    const int t = word / K_WORDS % 4, at = word / (4 * K_WORDS) * K_WORDS + word % K_WORDS;
    const int slot = at * (PER / 4) + d % PER / 4;
    const int place = (r / 8 * SLOTS + slot) * 128 + B_PLACE(2 * t + c % 2, r % 8) + c / 2 * 2;
    ((threadgroup half*)queries)[place] = half(v[j]);
  }
}

int total = 0;
UNROLL
for (int i = 0; i < PARTS; i++) total += parts[i].length;
const int blocks = (total + BLOCK - 1) / BLOCK, share = (blocks + pieces - 1) / pieces * BLOCK;
const int from = piece * share, to = min(from + share, total);

// Running maximum and sum of the queries of this simdgroup: sg, sg + SG, ...
constexpr int OWN = (ROWS + SG - 1) / SG, SUMS = V_WORDS * PER / 2;
float top[OWN], sum[OWN];
UNROLL
for (int i = 0; i < OWN; i++) {
  top[i] = UNSEEN;
  sum[i] = 0;
}
float acc[TILES][SUMS][4];  // columns 2 i and 2 i + 1 of this lane's, each of queries 2 t and 2 t + 1
UNROLL
for (int tile = 0; tile < TILES; tile++) {
  UNROLL
  for (int i = 0; i < SUMS; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) acc[tile][i][j] = 0;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

int part_start = 0;  // in the row of all tokens
for (int p = 0; p < PARTS; p++) {
  const int last = min(to, part_start + parts[p].length);
  for (int start = max(from, part_start); start < last; start += BLOCK) {
    const int n = min(BLOCK, last - start);
    const ulong at = ulong(g) * ulong(parts[p].length) + ulong(start - part_start);
    const device uint* codes = parts[p].codes + at * (2 * WORDS);
    const device half* scales = parts[p].scales + at * 2;

    // 1. Scores. A token past the end of the block is another's copy, and never looked at.
    if (sg * 16 < n) {
      const int token[2] = {min(sg * 16 + lane_g, n - 1), min(sg * 16 + lane_g + 8, n - 1)};
      float s[TILES][4];
      UNROLL
      for (int tile = 0; tile < TILES; tile++) {
        UNROLL
        for (int j = 0; j < 4; j++) s[tile][j] = 0;
      }
      UNROLL
      for (int step = 0; step < K_STEPS; step++) {
        uint words[2][K_WORDS];
        UNROLL
        for (int i = 0; i < 2; i++)
          load_words(codes + token[i] * (2 * WORDS) + (step * 4 + lane_t) * K_WORDS, K_WORDS, words[i]);
        UNROLL
        for (int w = 0; w < K_WORDS; w++) {
          uint pairs[2][PER / 2];
          levels(words[0][w], table, pairs[0]);
          levels(words[1][w], table, pairs[1]);
          UNROLL
          for (int m = 0; m < PER / 4; m++) {
            const uint a[4] = {pairs[0][2 * m], pairs[1][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m + 1]};
            UNROLL
            for (int tile = 0; tile < TILES; tile++) {
              const uint2 b = queries[(tile * SLOTS + (step * K_WORDS + w) * (PER / 4) + m) * 32 + lane];
              multiply(s[tile], a, b.x, b.y);
            }
          }
        }
      }
      UNROLL
      for (int i = 0; i < 2; i++) {
        const int key = sg * 16 + lane_g + 8 * i;
        const float scale = float(scales[token[i] * 2]);
        UNROLL
        for (int tile = 0; tile < TILES; tile++) {
          const int r = tile * 8 + lane_t * 2;
          scores[r][key] = s[tile][2 * i] * scale + shift[r];
          scores[r + 1][key] = s[tile][2 * i + 1] * scale + shift[r + 1];
        }
        if (lane_t == 0) value_scales[key] = float(scales[token[i] * 2 + 1]);
      }
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
        uint words[4][V_WORDS];
        UNROLL
        for (int i = 0; i < 4; i++) {
          const int token = min(group * 16 + lane_t * 2 + i % 2 + i / 2 * 8, n - 1);
          load_words(codes + (token * 2 + 1) * WORDS + (sg * 8 + lane_g) * V_WORDS, V_WORDS, words[i]);
        }
        UNROLL
        for (int w = 0; w < V_WORDS; w++) {
          uint pairs[4][PER / 2];
          UNROLL
          for (int i = 0; i < 4; i++) levels(words[i][w], table, pairs[i]);
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
  }
  part_start += parts[p].length;
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
      device float* to_sums = sums + ulong(query * pieces + piece) * D + (sg * 8 + lane_g) * (2 * SUMS);
      UNROLL
      for (int j = 0; j < SUMS; j += 2) {
        const float four[4] = {acc[tile][j][i], acc[tile][j][2 + i], acc[tile][j + 1][i], acc[tile][j + 1][2 + i]};
        store4(to_sums + 2 * j, four);
      }
    }
  }
}

// kernel: merge_coded(sums, stats, tail_sums, tail_stats, turn) -> (out)
// All pieces of a row together, as `merge` of attention.metal has them:
//   out[row] = (turn * H (sum of 2^(m_p - m) sums[row, p]) / D  +  2^(m_t - m) tail_sums[row]) / sum of 2^(..) l.
// sums [rows, pieces, D], stats [rows, pieces, (m, l)] of the coded parts, tail_.. [rows, 1, ..] of the plain one;
// A threadgroup of 32 SG threads takes a row; grid (32 SG, 1, rows). A thread takes 4 columns
// of every GROUPS-th piece.
constexpr int GROUPS = 32 * SG / (D / 4);
const int lane = int(thread_index_in_simdgroup), i = int(thread_index_in_threadgroup);
const int column = i % (D / 4) * 4, group = i / (D / 4), row = int(threadgroup_position_in_grid.z);
const int pieces = stats_shape[1];

float top = tail_stats[row * 2], total = 0;
for (int p = lane; p < pieces; p += 32) top = max(top, stats[(row * pieces + p) * 2]);
top = max_lanes(top);
for (int p = lane; p < pieces; p += 32)
  total += exp2(stats[(row * pieces + p) * 2] - top) * stats[(row * pieces + p) * 2 + 1];
const float tail_weight = exp2(tail_stats[row * 2] - top);
total = sum_lanes(total, 32) + tail_weight * tail_stats[row * 2 + 1];

float acc[4] = {0, 0, 0, 0};
#pragma unroll 4
for (int p = group; p < pieces; p += GROUPS) {
  float value[4];
  load4(sums + ulong(row * pieces + p) * D + column, value);
  const float weight = exp2(stats[(row * pieces + p) * 2] - top);
  UNROLL
  for (int j = 0; j < 4; j++) acc[j] += weight * value[j];
}
threadgroup float y[GROUPS][D];
UNROLL
for (int j = 0; j < 4; j++) y[group][column + j] = acc[j];
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int d = i; d < D; d += 32 * SG) {
  float value = 0;
  UNROLL
  for (int k = 0; k < GROUPS; k++) value += y[k][d];
  y[0][d] = value;
}
for (int m = 1; m < D; m *= 2) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int b = i; b < D / 2; b += 32 * SG) {
    const int low = b / m * (2 * m) + b % m;
    const float a = y[0][low], c = y[0][low + m];
    y[0][low] = a + c;
    y[0][low + m] = a - c;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int d = i; d < D; d += 32 * SG)
  out[row * D + d] = U((y[0][d] * turn[D + d] / D + tail_weight * tail_sums[row * D + d]) / total);

// kernel: encode(keys, values, turn) -> (codes, scales)
// Codes and scales of keys and values [rows, D], as kv_codes.py has them: codes [rows, 2, WORDS], scales [rows, 2];
// turn as above. A simdgroup takes one vector, 8 a threadgroup; grid (256 ceil(rows / 4), 1, 1). Each byte once.
const int lane = int(thread_index_in_simdgroup);
const int unit = int(threadgroup_position_in_grid.x) * 8 + int(simdgroup_index_in_threadgroup);
if (unit < 2 * keys_shape[0]) {
  float v[D / 32], most = 0, squares = 0;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const int d = j * 32 + lane, at = unit / 2 * D + d;
    if (unit % 2 == 0) {
#if CENTERED
      const int g = unit / 2 / (keys_shape[0] / (turn_shape[0] - 2));
      v[j] = (float(keys[at]) - turn[(2 + g) * D + d]) / turn[d];
#else
      v[j] = float(keys[at]) / turn[d];
#endif
    } else {
      v[j] = float(values[at]) * turn[D + d];
    }
  }
  hadamard(v, lane);
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    most = max(most, fabs(v[j]));
    squares += v[j] * v[j];
  }
  uint code[D / 32];
#if BITS == 8
  const half scale = half(max_lanes(most) / 127.0f);
  const float step = float(scale) > 0 ? float(scale) : 1.0f;
  UNROLL
  for (int j = 0; j < D / 32; j++) code[j] = uint(int(rint(max(-127.0f, min(127.0f, v[j] / step)))) + 128);
#else
  const float bounds[7] = BOUNDS, magnitudes[8] = MAGNITUDES;
  squares = sum_lanes(squares, 32);
  const float norm = squares > 0 ? sqrt(squares / D) : 1.0f;
  float along = 0;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const float size = fabs(v[j]);
    float magnitude = magnitudes[0];
    code[j] = 0;
    UNROLL
    for (int i = 0; i < 7; i++) {
      const bool over = size / norm > bounds[i];
      code[j] += over ? 1u : 0u;
      magnitude = over ? magnitudes[i + 1] : magnitude;
    }
    along += size * magnitude;
    if (v[j] < 0) code[j] |= 8u;
  }
  along = sum_lanes(along, 32);
  const half scale = half(along > 0 ? squares / along : 0.0f);
#endif
  if (lane == 0) scales[unit] = scale;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    uint word = code[j] << (lane % PER * BITS);
    UNROLL
    for (int m = 1; m < PER; m *= 2) word |= simd_shuffle_xor(word, ushort(m));
    if (lane % PER == 0) codes[unit * WORDS + j * BITS + lane / PER] = word;
  }
}
