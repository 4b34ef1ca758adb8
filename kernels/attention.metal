// Attention of a few new tokens over keys and values that lie in several parts:
//   out[t, h] = sum over j of softmax_j(SCALE q[t, h] . k[j]) v[j],  for the tokens j that t may see.
//
// q [tokens, H, D], the H heads in groups of GQA that share a KV head; part i: k, v [.., G, capacity_i, D] with the tokens
// spans[2 i] to spans[2 i + 1] in use (start and end). All parts one after another are one row of `total` tokens, of
// which the last are the queries themselves: query t sees up to itself, and with WINDOW only the last WINDOW of those.
//
// Threads. A threadgroup (SG simdgroups) takes ROWS of the GQA * tokens queries of one KV head and one piece: SHARE
// blocks of BLOCK tokens of one part's capacity, in use or not. (Were pieces cut from the row of all tokens, some would
// reach across a part's end and take two blocks one after the other, and all would wait for those.) Grid
// (32 SG ceil(GQA tokens / ROWS), pieces of all parts, G). It walks through its piece block by block:
//   1. scores: 8 lanes share a token, a lane holds KEYS of them, so that a piece of q read from threadgroup
//      memory meets KEYS keys and a piece of k meets ROWS queries;
//   2. softmax: a simdgroup takes whole rows, keeps their running maximum and sum;
//   3. values: a thread owns 8 columns of all rows, and every THREADS * 8 / D-th token.
// With SPLIT each piece leaves its unnormalised sum and (maximum, sum of exponentials) to `merge`, which are zeros and
// (UNSEEN, 0) where nothing of it is in use; else there is one piece, and `out` is written at once. Sums, maxima and
// exponentials in fp32, powers of 2 instead of e.
//
// Memory. Every k and v in use once for each ROWS queries, 16 bytes a lane, 128 bytes of a token at once; q and out
// once; sums (fp32, [tokens H, pieces, D]) written once and read once.
//
// Rendered before: T (dtype of q, k, v), U (of out), D, GQA, ROWS, SG, KEYS, SHARE, PARTS, WINDOW (0: none), SCALE,
// SPLIT, LENGTHi (which dimension of part i is its capacity).

#define CHUNKS (D / 8)
#define BLOCK (4 * KEYS * SG)
#define KEY_GROUPS (32 * SG / CHUNKS)  // threads that share columns, each with its own tokens
#define UNSEEN -1e30f
#define AHEAD (ROWS <= 2 ? 4 : 2)  // loads in flight: as many as the rows' sums leave registers for

// kernel: attention(q, spans, k0, v0, k1?, v1?, k2?, v2?, k3?, v3?, k4?, v4?, k5?, v5?, k6?, v6?, k7?, v7?) -> (out?, sums?, stats?)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup);
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int piece = int(threadgroup_position_in_grid.y), pieces = int(threadgroups_per_grid.y);
const int g = int(threadgroup_position_in_grid.z);
const int tokens = q_shape[0], heads = q_shape[1];

// The part that this piece lies in, and its first row there. An array of parts would lie in memory, not in registers.
const device T* k_part = k0;
const device T* v_part = v0;
int total = 0, left = piece;  // tokens in use of the parts so far; pieces before this one that are not in those
int capacity = 0, begin = 0, end_of_used = 0, first = 0, before = 0;  // of that part; before: tokens of earlier ones
#define FIND(i, k, v, its_capacity)                                              \
  {                                                                              \
    const int its_first = spans[2 * i], its_end = spans[2 * i + 1];              \
    const int its_pieces = (its_capacity + SHARE * BLOCK - 1) / (SHARE * BLOCK); \
    if (left >= 0 && left < its_pieces) {                                        \
      k_part = k;                                                                \
      v_part = v;                                                                \
      capacity = its_capacity;                                                   \
      begin = left * (SHARE * BLOCK);                                            \
      first = its_first;                                                         \
      end_of_used = its_end;                                                     \
      before = total;                                                            \
    }                                                                            \
    left -= its_pieces;                                                          \
    total += its_end - its_first;                                                \
  }
FIND(0, k0, v0, int(k0_shape[LENGTH0]))
#if PARTS > 1
FIND(1, k1, v1, int(k1_shape[LENGTH1]))
#endif
#if PARTS > 2
FIND(2, k2, v2, int(k2_shape[LENGTH2]))
#endif
#if PARTS > 3
FIND(3, k3, v3, int(k3_shape[LENGTH3]))
#endif
#if PARTS > 4
FIND(4, k4, v4, int(k4_shape[LENGTH4]))
#endif
#if PARTS > 5
FIND(5, k5, v5, int(k5_shape[LENGTH5]))
#endif
#if PARTS > 6
FIND(6, k6, v6, int(k6_shape[LENGTH6]))
#endif
#if PARTS > 7
FIND(7, k7, v7, int(k7_shape[LENGTH7]))
#endif
const int from = max(begin, first), to = min(begin + SHARE * BLOCK, end_of_used);

// q, fp32, as float4s: the first halves of all chunks of 8, then the second; later the sums of KEY_GROUPS / 2 threads.
constexpr int ROOM = ROWS * D / 4 * (KEY_GROUPS > 2 ? (KEY_GROUPS + 1) / 2 : 1);
constexpr int CELLS = ROWS * BLOCK;
threadgroup float4 room[ROOM];
threadgroup float scores[CELLS];   // [row][token of the block]
threadgroup float weights[CELLS];  // [token][row]
threadgroup float shrink[ROWS];    // by how much a row's sums shrink, its maximum having grown
threadgroup float totals[ROWS];

UNROLL
for (int i = thread_index; i < ROWS * CHUNKS; i += 32 * SG) {
  const int r = first_row + i / CHUNKS, c = i % CHUNKS;
  float value[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (r < GQA * tokens) load8(q + (r / GQA * heads + g * GQA + r % GQA) * D + c * 8, value);
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
const int key_group = thread_index / CHUNKS, column = thread_index % CHUNKS * 8;
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int start = from; start < to; start += BLOCK) {
  const int n = min(BLOCK, to - start), place = before + start - first;  // place: in the row of all tokens
  const ulong at = (ulong(g) * ulong(capacity) + ulong(start)) * D;

  // 1. Scores. A token past the end of the block is another's copy, and never looked at.
  if (sg * 4 * KEYS < n) {
    const device T* k = k_part + at;
    int offset[KEYS];
    float s[KEYS][ROWS];
    UNROLL
    for (int i = 0; i < KEYS; i++) {
      offset[i] = min(sg * 4 * KEYS + i * 4 + lane / 8, n - 1) * D;
      UNROLL
      for (int r = 0; r < ROWS; r++) s[i][r] = 0;
    }
#pragma unroll AHEAD
    for (int eight = 0; eight < CHUNKS; eight += 8) {
      const int c = eight + lane % 8;
      if (CHUNKS % 8 > 0 && c >= CHUNKS) break;
      float kv[KEYS][8];
      UNROLL
      for (int i = 0; i < KEYS; i++) load8(k + offset[i] + c * 8, kv[i]);
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float4 a = room[r * (D / 4) + c], b = room[r * (D / 4) + CHUNKS + c];
        UNROLL
        for (int i = 0; i < KEYS; i++) {
          s[i][r] += kv[i][0] * a.x;
          s[i][r] += kv[i][1] * a.y;
          s[i][r] += kv[i][2] * a.z;
          s[i][r] += kv[i][3] * a.w;
          s[i][r] += kv[i][4] * b.x;
          s[i][r] += kv[i][5] * b.y;
          s[i][r] += kv[i][6] * b.z;
          s[i][r] += kv[i][7] * b.w;
        }
      }
    }
    UNROLL
    for (int i = 0; i < KEYS; i++) {
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float value = sum_lanes(s[i][r], 8);
        if (lane % 8 == r % 8) scores[r * BLOCK + sg * 4 * KEYS + i * 4 + lane / 8] = value;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. Softmax.
  UNROLL
  for (int i = 0; i < OWN; i++) {
    const int r = sg + i * SG;
    if (r < ROWS) {
      const int end = total - tokens + (first_row + r) / GQA + 1;  // what this row sees
      const int oldest = WINDOW > 0 ? end - WINDOW : 0;
      float s[(BLOCK + 31) / 32], best = top[i];
      UNROLL
      for (int b = 0; b < (BLOCK + 31) / 32; b++) {
        const int key = b * 32 + lane;
        const bool seen = key < n && place + key >= oldest && place + key < end;
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
        if (key < n) weights[key * ROWS + r] = weight;
      }
      const float factor = exp2(top[i] - best);
      sum[i] = sum[i] * factor + sum_lanes(part_sum, 32);
      top[i] = best;
      if (lane == 0) shrink[r] = factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3. Values.
  if (key_group < KEY_GROUPS) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int j = 0; j < 8; j++) acc[r][j] *= shrink[r];
    }
    const device T* v = v_part + at + column;
#pragma unroll(4 * AHEAD)
    for (int key = key_group; key < n; key += KEY_GROUPS) {
      float value[8];
      load8(v + key * D, value);
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float weight = weights[key * ROWS + r];
        UNROLL
        for (int j = 0; j < 8; j++) acc[r][j] += weight * value[j];
      }
    }
  }
}

// Add up the threads that share columns: the upper half gives, the lower half takes.
for (int count = KEY_GROUPS; count > 1; count = (count + 1) / 2) {
  const int half_count = (count + 1) / 2;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (key_group >= half_count && key_group < count) {
    threadgroup float* to_lower = (threadgroup float*)room + (key_group - half_count) * (ROWS * D) + column;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int j = 0; j < 8; j++) to_lower[r * D + j] = acc[r][j];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (key_group + half_count < count) {
    threadgroup float* from_upper = (threadgroup float*)room + key_group * (ROWS * D) + column;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      UNROLL
      for (int j = 0; j < 8; j++) acc[r][j] += from_upper[r * D + j];
    }
  }
}

UNROLL
for (int i = 0; i < OWN; i++) {
  const int r = sg + i * SG, row = first_row + r;
  if (r < ROWS && lane == 0) {
    totals[r] = sum[i];
#if SPLIT
    if (row < GQA * tokens) {
      const int query = row / GQA * heads + g * GQA + row % GQA;
      stats[(query * pieces + piece) * 2] = top[i];
      stats[(query * pieces + piece) * 2 + 1] = sum[i];
    }
#endif
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (key_group == 0) {
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int row = first_row + r;
    if (row < GQA * tokens) {
      const int query = row / GQA * heads + g * GQA + row % GQA;
#if SPLIT
      store8(sums + ulong(query * pieces + piece) * D + column, acc[r]);
#else
      UNROLL
      for (int j = 0; j < 8; j++) acc[r][j] /= totals[r];
      store8(out + query * D + column, acc[r]);
#endif
    }
  }
}

// kernel: merge(sums, stats) -> (out)
// The pieces of a row together: out[row] = sum of 2^(m_p - m) sums[row, p] / sum of 2^(m_p - m) l_p.
// sums [rows, pieces, D], stats [rows, pieces, (m, l)]; out [rows, D]. A lane takes 4 columns, SG simdgroups share
// the pieces; threadgroup 32 SG, grid (32 SG, ceil(D / 128), rows). Reads all once.
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int column = int(threadgroup_position_in_grid.y) * 128 + lane * 4, row = int(threadgroup_position_in_grid.z);
const int pieces = stats_shape[1];

float top = UNSEEN, total = 0;
for (int p = lane; p < pieces; p += 32) top = max(top, stats[(row * pieces + p) * 2]);
top = max_lanes(top);
for (int p = lane; p < pieces; p += 32)
  total += exp2(stats[(row * pieces + p) * 2] - top) * stats[(row * pieces + p) * 2 + 1];
total = sum_lanes(total, 32);

float acc[4] = {0, 0, 0, 0};
if (column < D) {
#pragma unroll 4
  for (int p = sg; p < pieces; p += SG) {
    float value[4];
    load4(sums + ulong(row * pieces + p) * D + column, value);
    const float weight = exp2(stats[(row * pieces + p) * 2] - top);
    UNROLL
    for (int j = 0; j < 4; j++) acc[j] += weight * value[j];
  }
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
  if (at < D) out[row * D + at] = U(value / total);
}
