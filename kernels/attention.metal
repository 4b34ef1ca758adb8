// Attention of a few new tokens over keys and values that lie in several parts:
//   out[t, h] = sum over j of softmax_j(SCALE q[t, h] . k[j]) v[j],  for the tokens j that t may see.
//
// q [tokens, H, D], the H heads in groups of GQA that share a KV head; part i: k, v [.., G, capacity_i, D] with tokens
// spans[2 i] to spans[2 i + 1] in use (start and end). All parts one after another are one row of tokens, of which the
// last are the queries themselves: query t sees up to itself, and with a window only that many of those. parts.metal
// says how parts are cut into pieces.
//
// With PAGED each of q's tokens is another sequence's newest, and its keys and values lie in pages (paged.metal): piece
// p of a row are its tokens from p share to (p + 1) share, share a multiple of BLOCK, which divides PAGE. Grid
// (32 SG ceil(GQA / ROWS), pieces, G rows). A piece without tokens leaves its sums unwritten.
//
// Threads. A threadgroup (SG simdgroups) takes ROWS of the GQA * tokens queries of one KV head and one piece of the
// length; grid (32 SG ceil(GQA tokens / ROWS), pieces, G). It walks through the tokens in use of its piece, a block of
// BLOCK tokens at a time:
//   1. scores: 8 lanes share a token, a lane holds KEYS of them, so that a piece of q read from threadgroup
//      memory meets KEYS keys and a piece of k meets ROWS queries;
//   2. softmax: a simdgroup takes whole rows, keeps their running maximum and sum;
//   3. values: a thread owns 8 columns of all rows, and every KEY_GROUPS-th token.
// Most pieces are one block, whose time is a chain of waits: for spans, for k, for v, for q. So all loads of a step are
// issued together; a simdgroup_barrier keeps them so: without it NVIDIA's compiler waits after every four. And what
// no launch of a step writes is read before INPUTS_READY: the numbers that tell which tokens are a piece's and, with
// EARLY, the first block's keys and values, of all tokens but the step's own. A block with one of these is loaded again.
// Each piece leaves its unnormalised sum and (maximum, sum of exponentials) to `merge`, zeros and UNSEEN if no token of
// it is in use. Sums, maxima and exponentials are fp32, with powers of 2 instead of e.
//
// Memory. Each k and v in use is read once for each ROWS queries, 16 bytes a lane, 128 bytes of a token at once; q
// once; sums (fp32, [tokens H, pieces, D]) are written once and read once.
//
// Rendered before: T (dtype of q, k, v), D, GQA, ROWS, SG, KEYS, SCALE, PAGED, PAGE; for `merge` T, U (dtype of out),
// SG.
// uses: parts.metal
// uses: paged.metal

#define CHUNKS (D / 8)
#define BLOCK (4 * KEYS * SG)
#define KEY_GROUPS (32 * SG / CHUNKS)  // threads that share columns, each with its own tokens
#define UNSEEN -1e30f
// The sums of a piece without tokens count for nothing, whatever they are.
#define ADDED(weight, value) ((weight) > 0.0f ? (weight) * (value) : 0.0f)
#define TURNS ((BLOCK + KEY_GROUPS - 1) / KEY_GROUPS)
// Loads issued together: chunks of KEYS tokens, and tokens; with EARLY a block's first keys and values before all else.
// As many as registers hold: Apple GPUs have fewer per thread, and fp32 takes twice as many.
#ifndef EAGER
#if defined(CUDA) && !T_FLOAT
#define EAGER 1
#else
#define EAGER 0
#endif
#endif
#define K_AHEAD (EAGER ? 4 : 2)
#define V_MOST (EAGER && ROWS <= 4 ? 16 : 8)
#define V_AHEAD (TURNS < V_MOST ? TURNS : V_MOST)
#define EARLY (EAGER && ROWS <= 4)

// Eight numbers in their type in memory, so that few registers wait for them.
#if T_FLOAT
struct Eight {
  float4 a, b;
};
METAL_FUNC Eight eight(const device T* p) { return {*(const device float4*)p, *(const device float4*)(p + 4)}; }
METAL_FUNC void widen(Eight e, thread float* v) {
  v[0] = e.a.x;
  v[1] = e.a.y;
  v[2] = e.a.z;
  v[3] = e.a.w;
  v[4] = e.b.x;
  v[5] = e.b.y;
  v[6] = e.b.z;
  v[7] = e.b.w;
}
#else
struct Eight {
  uint4 a;
};
METAL_FUNC Eight eight(const device T* p) { return {*(const device uint4*)p}; }
METAL_FUNC void widen(Eight e, thread float* v) {
  const uint word[4] = {e.a.x, e.a.y, e.a.z, e.a.w};
  UNROLL
  for (int i = 0; i < 4; i++) {
#if T_HALF
    v[2 * i] = low_half(word[i]);
    v[2 * i + 1] = high_half(word[i]);
#else
    v[2 * i] = as_type<float>(word[i] << 16);
    v[2 * i + 1] = as_type<float>(word[i] & 0xFFFF0000u);
#endif
  }
}
#endif

#ifdef D  // for `attention`
// Load some of the keys that a lane scores, KEYS from `token` on: pieces `ahead` to ahead + 8 K_AHEAD of each. A token
// past the last of the block is a copy of that, whose scores are never used.
METAL_FUNC void load_keys(const device T* k, int last, int token, int ahead, int lane, thread Eight* keys) {
  UNROLL
  for (int a = 0; a < K_AHEAD; a++) {
    const int c = min(ahead + a * 8 + lane % 8, CHUNKS - 1);
    UNROLL
    for (int i = 0; i < KEYS; i++) keys[a * KEYS + i] = eight(k + min(token + i * 4, last) * D + c * 8);
  }
}

// Load a thread's columns of V_AHEAD values, of every KEY_GROUPS-th token from `token` on; past the last, again copies.
METAL_FUNC void load_values(const device T* v, int last, int token, thread Eight* values) {
  UNROLL
  for (int a = 0; a < V_AHEAD; a++) values[a] = eight(v + min(token + a * KEY_GROUPS, last) * D);
}
#endif

// kernel: attention(q, spans?, cut?, k0?, v0?, k1?, v1?, k2?, v2?, k3?, v3?, k4?, v4?, k5?, v5?, k6?, v6?, k7?, v7?, places?, pool_k?, pool_v?) -> (sums, stats)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup);
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int piece = int(threadgroup_position_in_grid.y), pieces = int(threadgroups_per_grid.y);
const int heads = q_shape[1];
#if PAGED
const int kv_heads = heads / GQA, g = int(threadgroup_position_in_grid.z) % kv_heads;
const int sequence = int(threadgroup_position_in_grid.z) / kv_heads;
const device int* place = places + sequence * int(places_shape[1]);
const int tokens = 1, own = place[PLACE_OWN];
const Piece mine = {pool_k, pool_v, max(place[PLACE_FROM], piece * place[PLACE_SHARE]),
                    min(place[PLACE_TO], (piece + 1) * place[PLACE_SHARE]), 0, place[PLACE_TO]};
const int window = mine.total - place[PLACE_FROM];
if (mine.from >= mine.to) {
  INPUTS_READY();  // a launch ends behind those before it
  if (thread_index < ROWS && first_row + thread_index < GQA) {
    const int query = sequence * heads + g * GQA + first_row + thread_index;
    stats[(query * pieces + piece) * 2] = UNSEEN;
    stats[(query * pieces + piece) * 2 + 1] = 0;
  }
  return;
}
#else
const int g = int(threadgroup_position_in_grid.z), sequence = 0;
const int tokens = q_shape[0], own = tokens, window = cut[WINDOW_AT];
const Part parts[MAX_PARTS] = {{k0, v0}, {k1, v1}, {k2, v2}, {k3, v3}, {k4, v4}, {k5, v5}, {k6, v6}, {k7, v7}};
const Piece mine = find_piece(parts, spans, cut, piece, g, D);
#endif

#if PAGED  // blocks end where pages do
#define END_OF_BLOCK(start) ((start) / BLOCK + 1) * BLOCK
#define AT(start) paged(place, start, g, kv_heads, D)
#else
#define END_OF_BLOCK(start) (start) + BLOCK
#define AT(start) ulong(start) * D
#endif
const int key_group = thread_index / CHUNKS, column = thread_index % CHUNKS * 8;
const int first_key = min(key_group, KEY_GROUPS - 1);  // the sums of threads in an incomplete group are never used
const int token = sg * 4 * KEYS + lane / 8;            // the first that this lane scores
int start = mine.from, n = min(END_OF_BLOCK(start), mine.to) - start;  // a block, of n tokens
const device T* k = mine.k + AT(start);
const device T* v = mine.v + AT(start) + column;
Eight keys[K_AHEAD * KEYS], values[V_AHEAD];
const int old = min(n, mine.total - own - mine.before - start);  // tokens of it that this step does not write
if (EARLY && old > 0) {
  load_keys(k, old - 1, token, 0, lane, keys);
  load_values(v, old - 1, first_key, values);
}
INPUTS_READY();
if (EARLY && old < n) {
  load_keys(k, n - 1, token, 0, lane, keys);
  load_values(v, n - 1, first_key, values);
}

// q, fp32, as float4s: the first halves of all chunks of 8, then the second; later the sums of HELD groups of threads.
constexpr int OF_GROUP = ROWS * D / 4;
constexpr int FITTING = OF_GROUP < 1024 ? 1024 / OF_GROUP : 1;
constexpr int HELD = KEY_GROUPS > FITTING ? FITTING : KEY_GROUPS > 1 ? KEY_GROUPS - 1 : 1;
constexpr int CELLS = ROWS * BLOCK;
threadgroup float4 room[HELD * OF_GROUP];
threadgroup float scores[CELLS];   // [row][token of the block]
threadgroup float weights[CELLS];  // [token][row]
threadgroup float shrink[ROWS];    // factor of a row's old sums once its maximum has grown

UNROLL
for (int i = thread_index; i < ROWS * CHUNKS; i += 32 * SG) {
  const int r = first_row + i / CHUNKS, c = i % CHUNKS;
  float value[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (r < GQA * tokens) load8(q + ((sequence + r / GQA) * heads + g * GQA + r % GQA) * D + c * 8, value);
  UNROLL
  for (int j = 0; j < 8; j += 4) {
    float4 four;
    four.x = value[j] * (SCALE * 1.4426950408889634f);
    four.y = value[j + 1] * (SCALE * 1.4426950408889634f);
    four.z = value[j + 2] * (SCALE * 1.4426950408889634f);
    four.w = value[j + 3] * (SCALE * 1.4426950408889634f);
    room[i / CHUNKS * (D / 4) + j / 4 * CHUNKS + c] = four;
  }
}

// Running maximum and sum of the rows of this simdgroup: sg, sg + SG, ...
constexpr int OWN = (ROWS + SG - 1) / SG;
float top[OWN], sum[OWN];
UNROLL
for (int i = 0; i < OWN; i++) {
  top[i] = UNSEEN;
  sum[i] = 0;
}
float acc[ROWS][8];
UNROLL
for (int r = 0; r < ROWS; r++) {
  UNROLL
  for (int j = 0; j < 8; j++) acc[r][j] = 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

while (n > 0) {
  // 1. Scores.
  if (sg * 4 * KEYS < n) {
    float s[KEYS][ROWS];
    UNROLL
    for (int i = 0; i < KEYS; i++) {
      UNROLL
      for (int r = 0; r < ROWS; r++) s[i][r] = 0;
    }
#pragma unroll 1
    for (int ahead = 0; ahead < CHUNKS; ahead += 8 * K_AHEAD) {
      if (!EARLY || ahead > 0) load_keys(k, n - 1, token, ahead, lane, keys);
      simdgroup_barrier(mem_flags::mem_none);
      UNROLL
      for (int a = 0; a < K_AHEAD; a++) {
        const int c = ahead + a * 8 + lane % 8;
        if (CHUNKS % (8 * K_AHEAD) == 0 || c < CHUNKS) {
          float kv[KEYS][8];
          UNROLL
          for (int i = 0; i < KEYS; i++) widen(keys[a * KEYS + i], kv[i]);
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            const float4 x = room[r * (D / 4) + c], y = room[r * (D / 4) + CHUNKS + c];
            UNROLL
            for (int i = 0; i < KEYS; i++) {
              s[i][r] += kv[i][0] * x.x;
              s[i][r] += kv[i][1] * x.y;
              s[i][r] += kv[i][2] * x.z;
              s[i][r] += kv[i][3] * x.w;
              s[i][r] += kv[i][4] * y.x;
              s[i][r] += kv[i][5] * y.y;
              s[i][r] += kv[i][6] * y.z;
              s[i][r] += kv[i][7] * y.w;
            }
          }
        }
      }
    }
    UNROLL
    for (int i = 0; i < KEYS; i++) {
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float value = sum_lanes(s[i][r], 8);
        if (lane % 8 == r % 8) scores[r * BLOCK + token + i * 4] = value;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. Softmax.
  UNROLL
  for (int i = 0; i < OWN; i++) {
    const int r = sg + i * SG;
    if (r < ROWS) {
      // One past the last token that this row sees, and the first.
      const int end = mine.total - tokens + (first_row + r) / GQA + 1 - mine.before;
      const int begin = window > 0 ? end - window : 0;
      float s[(BLOCK + 31) / 32], best = top[i];
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        const bool seen = key < n && start + key >= begin && start + key < end;
        s[b] = seen ? scores[r * BLOCK + key] : UNSEEN;
        best = max(best, s[b]);
      }
      best = max_lanes(best);
      float part_sum = 0;
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        const float weight = s[b] > 0.5f * UNSEEN ? exp2(s[b] - best) : 0.0f;
        part_sum += weight;
        if (key < BLOCK) weights[key * ROWS + r] = weight;
      }
      const float factor = exp2(top[i] - best);
      sum[i] = sum[i] * factor + sum_lanes(part_sum, 32);
      top[i] = best;
      if (lane == 0) shrink[r] = factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3. Values. Past the end of the block, again copies, whose weights are 0.
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    UNROLL
    for (int j = 0; j < 8; j++) acc[r][j] *= shrink[r];
  }
#pragma unroll 1
  for (int ahead = 0; ahead < n; ahead += KEY_GROUPS * V_AHEAD) {
    if (!EARLY || ahead > 0) load_values(v, n - 1, first_key + ahead, values);
    simdgroup_barrier(mem_flags::mem_none);
    UNROLL
    for (int a = 0; a < V_AHEAD; a++) {
      const int key = ahead + a * KEY_GROUPS + first_key;
      float value[8];
      widen(values[a], value);
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float weight = BLOCK % (KEY_GROUPS * V_AHEAD) == 0 || key < BLOCK ? weights[key * ROWS + r] : 0.0f;
        UNROLL
        for (int j = 0; j < 8; j++) acc[r][j] += weight * value[j];
      }
    }
  }

  start = END_OF_BLOCK(start);
  n = min(END_OF_BLOCK(start), mine.to) - start;
  if (n > 0) {
    k = mine.k + AT(start);
    v = mine.v + AT(start) + column;
    if (EARLY) load_keys(k, n - 1, token, 0, lane, keys);
    if (EARLY) load_values(v, n - 1, first_key, values);
  }
}

UNROLL
for (int i = 0; i < OWN; i++) {
  const int r = sg + i * SG, row = first_row + r;
  if (r < ROWS && lane == 0 && row < GQA * tokens) {
    const int query = (sequence + row / GQA) * heads + g * GQA + row % GQA;
    stats[(query * pieces + piece) * 2] = top[i];
    stats[(query * pieces + piece) * 2 + 1] = sum[i];
  }
}

// Add up the groups of threads that share columns: the last ones write, as many as there is room for, the others add.
UNROLL
for (int count = KEY_GROUPS; count > 1; count = count > HELD ? count - HELD : 1) {
  const int takers = count > HELD ? count - HELD : 1, from_group = key_group - takers;
  if (count < KEY_GROUPS) threadgroup_barrier(mem_flags::mem_threadgroup);
  if (from_group >= 0 && key_group < count) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int j = 0; j < 8; j += 4) {
        float4 four;
        four.x = acc[r][j];
        four.y = acc[r][j + 1];
        four.z = acc[r][j + 2];
        four.w = acc[r][j + 3];
        room[from_group * OF_GROUP + r * (D / 4) + j / 4 * CHUNKS + column / 8] = four;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (key_group < takers) {
    UNROLL
    for (int given = 0; given < count - takers; given += takers) {
      if (given + key_group < count - takers) {
        UNROLL
        for (int r = 0; r < ROWS; r++) {
          UNROLL
          for (int j = 0; j < 8; j += 4) {
            const float4 four = room[(given + key_group) * OF_GROUP + r * (D / 4) + j / 4 * CHUNKS + column / 8];
            acc[r][j] += four.x;
            acc[r][j + 1] += four.y;
            acc[r][j + 2] += four.z;
            acc[r][j + 3] += four.w;
          }
        }
      }
    }
  }
}

if (key_group == 0) {
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int row = first_row + r;
    if (row < GQA * tokens) {
      const int query = (sequence + row / GQA) * heads + g * GQA + row % GQA;
      store8(sums + ulong(query * pieces + piece) * D + column, acc[r]);
    }
  }
}

// kernel: merge(sums, stats) -> (out)
// Merge the pieces of a row: out[row] = sum of 2^(m_p - m) sums[row, p] / sum of 2^(m_p - m) l_p.
// sums [rows, pieces, dim], stats [rows, pieces, (m, l)]; out [rows, dim]. A lane takes 4 columns, SG simdgroups share
// the pieces; threadgroup 32 SG, grid (32 SG, ceil(dim / 128), rows); SG divides 32. Everything is read once.
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int column = int(threadgroup_position_in_grid.y) * 128 + lane * 4, row = int(threadgroup_position_in_grid.z);
const int pieces = sums_shape[1], dim = sums_shape[2];

// The sums of 32 pieces are loaded at once.
constexpr int FIRST = 32 / SG;
float first[FIRST][4];
UNROLL
for (int i = 0; i < FIRST; i++)
  load4(sums + ulong(row * pieces + min(sg + i * SG, pieces - 1)) * dim + min(column, dim - 4), first[i]);
const float m = lane < pieces ? stats[(row * pieces + lane) * 2] : UNSEEN;
const float l = lane < pieces ? stats[(row * pieces + lane) * 2 + 1] : 0.0f;
float top = m;
for (int p = lane + 32; p < pieces; p += 32) top = max(top, stats[(row * pieces + p) * 2]);
top = max_lanes(top);
const float mine = lane < pieces ? exp2(m - top) : 0.0f;
float total = mine * l;
for (int p = lane + 32; p < pieces; p += 32)
  total += exp2(stats[(row * pieces + p) * 2] - top) * stats[(row * pieces + p) * 2 + 1];
total = sum_lanes(total, 32);

float acc[4] = {0, 0, 0, 0};
UNROLL
for (int i = 0; i < FIRST; i++) {
  const float weight = simd_shuffle(mine, ushort(sg + i * SG));
  UNROLL
  for (int j = 0; j < 4; j++) acc[j] += ADDED(weight, first[i][j]);
}
#pragma unroll 8
for (int p = 32 + sg; p < pieces; p += SG) {
  float value[4];
  load4(sums + ulong(row * pieces + p) * dim + min(column, dim - 4), value);
  const float weight = exp2(stats[(row * pieces + p) * 2] - top);
  UNROLL
  for (int j = 0; j < 4; j++) acc[j] += ADDED(weight, value[j]);
}
threadgroup float shared_acc[SG][128];
UNROLL
for (int j = 0; j < 4; j++) shared_acc[sg][lane * 4 + j] = acc[j];
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = int(thread_index_in_threadgroup); i < 128; i += 32 * SG) {
  float value = 0;
  UNROLL
  for (int s = 0; s < SG; s++) value += shared_acc[s][i];
  const int at = int(threadgroup_position_in_grid.y) * 128 + i;
  if (at < dim) out[row * dim + at] = U(value / total);
}
