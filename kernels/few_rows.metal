// Packed weights times up to TOKENS (8, 16 or 32) rows of fp16 numbers, on matrix units (matrix.metal):
//   y[t, n] = scale[t] * sum over k of W[n, k] x[t, k], summed in fp32.
//
// Variants, by what is rendered before this text:
//   SCALED   rows have a scale each (halve.metal), else 1.
//   GLU      W is gate over up, [2F, K]: y[t, f] = gelu(gate row f) * (up row f), both in one lane.
//   TIMES    y[t, n] = gelu(row n) * times[t, n].
//   GROW     multiplies x, FACTOR each result.
//   EXPERTS  W is [E, N, K]. Threadgroup y of the grid takes tile y of `tiles`, int32 [.., 3]: expert, first and one
//            past the last of `order`, at most TOKENS. Row order[i] of y is of row order[i] / USED of x.
//
// Threads. A simdgroup takes BLOCKS blocks of 16 rows of W, and of K every (SPLIT PARTS)-th stretch of 128; the
// simdgroups of a threadgroup share the rows and add up at the end over threadgroup memory. PARTS threadgroups share
// rows, too, and y is [PARTS, T, N], whose sum is the product. Threadgroup of 32 SPLIT, grid
// (32 SPLIT ceil(N / (16 BLOCKS)), tiles, PARTS); with GLU half of the blocks are gate's, half up's.
//
// Weights go from memory to the matrix units through registers alone (pairs.metal). The sums of a product may be in any
// order, so of a row, lane t takes the 32 neighbouring weights from 32 t on, 16 bytes at once where a weight has 4 bits,
// and x is taken in the order of their pairs. Mins meet the sums of x over a group, which come from the matrix units too
// and go back as two halves.
//
// Memory. Every byte of the planes is read once; x once for each 16 BLOCKS rows, mostly from the cache; y written once.
//
// Rendered before: T (half), U (of y), a format with CHUNK 32, TOKENS, BLOCKS, SPLIT, PARTS (1 with GLU, TIMES and
// EXPERTS), FOLD, AHEAD (CUDA: codes go through threadgroup memory, too, and all that a step reads is on its way during
// the step before), TAIL (K is no multiple of 128), and the variants' names.
// uses: matrix.metal
// uses: packed.metal
// uses: pairs.metal

#define LAUNCH_BOUNDS __launch_bounds__(32 * SPLIT)  // for CUDA
#define NB (TOKENS / 8)                       // blocks of 8 rows of x
#ifdef CUDA
#define STAGE 1                               // x goes through threadgroup memory
#define EARLY AHEAD
#define X_ROWS 1                              // of a block of 8 rows of x, those that a lane reads
#else
#define STAGE 0
#define EARLY 0
#define X_ROWS 2
#endif

// The second factors of 8 pairs, those from 8 h on, of a chunk of a row of x (Metal: of two rows, of which e says
// which of a pair's numbers). x: the chunk's first numbers. On NVIDIA lanes would load from places far apart; there x
// goes through threadgroup memory, a step ahead.
#ifdef CUDA
METAL_FUNC void as_pairs(const thread uint* u, thread uint* pairs) {  // of 8 neighbouring numbers, and 8 more
  UNROLL
  for (int i = 0; i < 8; i++) {
    if (APART == 1) {
      pairs[i] = u[i];
    } else {
      const int first = APART == 16 ? i : i / APART * 2 * APART + i % APART, second = first + (APART == 16 ? 8 : APART);
      pairs[i] = i % 2 ? seconds(u[first / 2], u[second / 2]) : firsts(u[first / 2], u[second / 2]);
    }
  }
}

METAL_FUNC void load_pairs(const device half* x, const device half*, int h, int, thread uint* pairs) {
  uint u[8];
  load_words((const device uint*)(x + (APART == 16 ? 8 : 16) * h), 4, u);
  load_words((const device uint*)(x + (APART == 16 ? 8 * h + 16 : 16 * h + 8)), 4, u + 4);
  as_pairs(u, pairs);
}

// Where 16 bytes of a row lie in threadgroup memory, such that 8 lanes read from or write to all banks: piece i of
// chunk t of row g.
#define PIECE(g, t, i) ((g) * 16 + (t) * 4 + ((i) ^ ((t) / 2 + (g) % 2 * 2)))

METAL_FUNC void staged_pairs(const threadgroup uint4* rows, int g, int t, int h, thread uint* pairs) {
  const uint4 a = rows[PIECE(g, t, APART == 16 ? h : 2 * h)], b = rows[PIECE(g, t, APART == 16 ? h + 2 : 2 * h + 1)];
  const uint u[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  as_pairs(u, pairs);
}
#else
// Number e of each of 8 pairs of a row.
METAL_FUNC void load_row(const device half* x, int h, int e, thread uint* u) {
  if (APART == 1) {
    uint all[8];
    load_words((const device uint*)(x + 16 * h), 8, all);
    UNROLL
    for (int i = 0; i < 4; i++) u[i] = e ? seconds(all[2 * i], all[2 * i + 1]) : firsts(all[2 * i], all[2 * i + 1]);
  } else if (APART >= 8) {
    load_words((const device uint*)(x + (APART == 16 ? 8 * h : 16 * h) + APART * e), 4, u);
  } else {
    UNROLL
    for (int i = 0; i < 8 / APART; i++)
      load_words((const device uint*)(x + 16 * h + (2 * i + e) * APART), APART / 2, u + i * APART / 2);
  }
}

METAL_FUNC void load_pairs(const device half* x, const device half* x2, int h, int e, thread uint* pairs) {
  uint u[4], u2[4];
  load_row(x, h, e, u);
  load_row(x2, h, e, u2);
  UNROLL
  for (int i = 0; i < 8; i++) pairs[i] = i % 2 ? seconds(u[i / 2], u2[i / 2]) : firsts(u[i / 2], u2[i / 2]);
}
#endif

// kernel: few_rows(x, scale?, codes, group_scales?, block_scales?, grid?, order?, tiles?, times?) -> (y)
#if EXPERTS
INPUTS_READY();  // tiles
#endif
const int lane = int(thread_index_in_simdgroup), part = int(simdgroup_index_in_threadgroup);
const int lane_g = LANE_G, lane_t = LANE_T;
const int words = codes_shape[EXPERTS ? 2 : 1];  // of codes in a row
const int chunks = words / WORDS, K = chunks * 32;
const int N = codes_shape[EXPERTS ? 1 : 0], outs = GLU ? N / 2 : N;
#if EXPERTS
const int tile = int(threadgroup_position_in_grid.y);
const int first_place = tiles[3 * tile + 1], tokens = tiles[3 * tile + 2] - first_place;
const uint before = uint(tiles[3 * tile]) * uint(N);  // rows of experts before
#define X_ROW(t) (order[first_place + min(t, tokens - 1)] / USED)
#define Y_ROW(t) order[first_place + (t)]
if (tokens <= 0) return;  // a tile that is left over
#else
const int tokens = x_shape[0];
const uint before = 0;
#define X_ROW(t) min(t, tokens - 1)  // rows that are missing are copies of the last
#define Y_ROW(t) (t)
#endif

// No literal to the compiler: mask and or are then one instruction with one immediate (NVIDIA).
const uint ones = max(uint(N), EXPONENTS);

// Rows g and g + 8 of each block; with GLU the blocks of up follow those of gate.
constexpr int OUTS = GLU ? BLOCKS / 2 : BLOCKS;
const int first_out = int(threadgroup_position_in_grid.x) * (16 * OUTS);
uint row[2 * BLOCKS];
UNROLL
for (int r = 0; r < 2 * BLOCKS; r++)
  row[r] = before + uint(min(first_out + r % (2 * OUTS) * 8 + lane_g, outs - 1) + (r >= 2 * OUTS ? outs : 0));

#if RULE && GRID
threadgroup GRID_TYPE table[GRID];
for (int i = part * 32 + lane; i < GRID; i += 32 * SPLIT) table[i] = grid[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
#elif HAS_LUT
threadgroup uint table[256];
threadgroup half values[16];
if (part == 0 && lane < 16) {
  const float listed[16] = LUT;
  values[lane] = half(listed[lane]);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = part * 32 + lane; i < 256; i += 32 * SPLIT) table[i] = pair(values[i % 16], values[i / 16]);
threadgroup_barrier(mem_flags::mem_threadgroup);
#endif

// Of K this simdgroup takes share `share` of SHARES.
constexpr int SHARES = SPLIT * PARTS;
const int share = part + SPLIT * int(threadgroup_position_in_grid.z);

Chunk now[2 * BLOCKS];
#define LOAD(into, c)                                                            \
  UNROLL for (int r = 0; r < 2 * BLOCKS; r++) {                                  \
    load_codes(codes + row[r] * uint(words) + uint((c) * WORDS), into[r].codes); \
    LOAD_GROUP_SCALES(into, c)                                                   \
    LOAD_BLOCK_SCALES(into, c)                                                   \
  }
#if GROUP_SCALE_BITS
#define LOAD_GROUP_SCALES(into, c) \
  into[r].group_scales = load_group_scales(group_scales + row[r] * uint(K / GROUP * GROUP_SCALE_BITS / 8), c);
#define LOAD_PIECES(c) load_pieces(group_scales + row[r] * uint(K / GROUP * GROUP_SCALE_BITS / 8), c, pieces[r]);
#define FIELDS(c) fields_of(pieces[r], c)
#else
#define LOAD_GROUP_SCALES(into, c) into[r].group_scales = 0;
#define LOAD_PIECES(c)
#define FIELDS(c) 0
#endif
#if SCALE_BLOCK
#define LOAD_BLOCK_SCALES(into, c) \
  into[r].block_scales[0] =        \
      load_block_scales(block_scales + row[r] * uint(K / SCALE_BLOCK * BLOCK_NUMBERS), (c) * 32 / SCALE_BLOCK);
#else
#define LOAD_BLOCK_SCALES(into, c) into[r].block_scales[0] = 0;
#endif

// Threadgroup memory for x and codes, then for sums.
#define STAGED (STAGE ? SPLIT * (NB * 128 + EARLY * 16 * BLOCKS * WORDS) * (1 + EARLY) : 0)
#define SUMS (SPLIT > 1 ? SPLIT * BLOCKS * NB * 32 : 0)
#if STAGE || SPLIT > 1
threadgroup uint4 room[STAGED > SUMS ? STAGED : SUMS];
#endif

float acc[BLOCKS][NB][4];
UNROLL
for (int i = 0; i < BLOCKS * NB * 4; i++) acc[i / (NB * 4)][i / 4 % NB][i % 4] = 0;

const int steps = (chunks + 4 * SHARES - 1) / (4 * SHARES);
#if EARLY
threadgroup uint* staged_words = (threadgroup uint*)(room + SPLIT * NB * 256 + part * (32 * BLOCKS * WORDS));
#define CODES_AT(step, r) (staged_words + ((step) % 2 * 2 * BLOCKS + (r)) * 32 * WORDS + lane * VEC)
#define COPY_CODES(step)                                                                           \
  {                                                                                                \
    const uint at = uint(min(((step) * SHARES + share) * 4 + lane_t, chunks - 1) * WORDS);         \
    UNROLL for (int i = 0; i < 2 * BLOCKS * WORDS; i += VEC) copy_words<VEC>(                      \
        CODES_AT(step, i / WORDS) + i % WORDS * 32, codes + (row[i / WORDS] * uint(words) + at + uint(i % WORDS))); \
  }
#define ALIGNED(r, m) aligned_staged(CODES_AT(step, r), m);
Chunk next[2 * BLOCKS];
uint pieces[2 * BLOCKS][PIECES];
#define LOAD_NEXT(c) UNROLL for (int r = 0; r < 2 * BLOCKS; r++) { LOAD_PIECES(c) LOAD_BLOCK_SCALES(next, c) }
#define TAKE_NEXT(c)                                          \
  UNROLL for (int r = 0; r < 2 * BLOCKS; r++) {               \
    now[r].group_scales = FIELDS(c);                          \
    now[r].block_scales[0] = next[r].block_scales[0];         \
  }
COPY_CODES(0)
LOAD_NEXT(min(share * 4 + lane_t, chunks - 1))
#else
#define ALIGNED(r, m) aligned(now[r].codes, m);
LOAD(now, min(share * 4 + lane_t, chunks - 1))
#endif
#if !EXPERTS
INPUTS_READY();  // the first weights are being loaded
#endif
#ifdef CUDA
const int x_chunk = lane_t, which = 0;
#else
const int x_chunk = lane_g / 2, which = lane_g % 2;
#endif
const device half* from[NB][X_ROWS];
UNROLL
for (int n = 0; n < NB; n++) {
  UNROLL
  for (int i = 0; i < X_ROWS; i++) {
    const int t = n * 8 + (X_ROWS == 1 ? lane_g : 2 * lane_t + i);
    from[n][i] = x + ulong(X_ROW(t)) * ulong(K);
  }
}
// The first factor that picks the sums of chunk m into row m, and the lane with the sums that this one passes on.
const uint own = lane_g == lane_t ? 0x3C003C00u : 0u;
const uint pick[4] = {own, 0u, own, 0u};
#ifdef CUDA
const int sums_from = LANE_OF(lane_t, lane_g / 2);
#else
const int sums_from = LANE_OF(lane_g / 2, lane_t);
#endif

#if STAGE
// This lane copies 16 bytes of every second row (EARLY: or zeros, where rows are missing).
threadgroup uint4* staged = room + part * (NB * 128 * (1 + EARLY));
#define X_AT(step) (EARLY * ((step) % 2) * NB * 128)
threadgroup uint4* copy_to = staged + PIECE(lane / 16, lane % 16 / 4, lane % 4);
uint copy_from[4 * NB];
UNROLL
for (int i = 0; i < 4 * NB; i++) copy_from[i] = uint(X_ROW(2 * i + lane / 16)) * uint(K) + uint(lane % 4 * 8);
#define COPY_X(step)                                                                               \
  {                                                                                                \
    const int chunk = min(((step) * SHARES + share) * 4 + lane % 16 / 4, chunks - 1);              \
    UNROLL for (int i = 0; i < 4 * NB; i++)                                                        \
        copy_async(copy_to + X_AT(step) + 32 * i, x + (copy_from[i] + uint(chunk * 32)),           \
                   !EARLY || 2 * i < tokens);                                                      \
  }
COPY_X(0)
#endif
#if EARLY
TAKE_NEXT(min(share * 4 + lane_t, chunks - 1))
#endif

// The second factors of a chunk: 8 pairs of block n of rows, from pair 8 half on.
#define LOAD_X(step, n, half, pairs)                                                               \
  {                                                                                                \
    const int chunk = ((step) * SHARES + share) * 4 + x_chunk, at = (TAIL ? min(chunk, chunks - 1) : chunk) * 32; \
    LOAD_PAIRS(step, n, at, half, pairs)                                                           \
    UNROLL for (int p = 0; p < (TAIL ? 8 : 0); p++) pairs[p] = chunk < chunks ? pairs[p] : 0u;     \
  }
#if STAGE
#define LOAD_PAIRS(step, n, at, half, pairs) staged_pairs(staged + X_AT(step) + n * 128, lane_g, lane_t, half, pairs);
#else
#define LOAD_PAIRS(step, n, at, half, pairs) load_pairs(from[n][0] + at, from[n][X_ROWS - 1] + at, half, which, pairs);
#endif
#if SUMMED
// Adds the sums of x over a chunk's groups: 8 pairs of them.
#define ADD_SUMS(sums, half, pairs)                                                                \
  UNROLL for (int p = 0; p < 8; p += 2)                                                            \
      multiply(sums[GROUPS == 2 ? half : 0], pick, pairs[p], pairs[p + 1]);
// Sums as second factors, of two halves each, the second for what the first leaves.
#define AS_FACTORS(sums, factors)                                                                  \
  UNROLL for (int p = 0; p < GROUPS; p++) {                                                        \
    const float s0 = simd_shuffle(sums[p][0], ushort(sums_from)), s1 = simd_shuffle(sums[p][1], ushort(sums_from)); \
    const half h0 = half(WITHIN_HALF(s0)), h1 = half(WITHIN_HALF(s1));                             \
    const half low0 = half(WITHIN_HALF(s0 - float(h0))), low1 = half(WITHIN_HALF(s1 - float(h1))); \
    factors[p] = PAIR_OF_SUMS;                                                                     \
  }
#ifdef CUDA
#define PAIR_OF_SUMS (lane_g % 2 ? pair(h1, low1) : pair(h0, low0))
#else
#define PAIR_OF_SUMS (lane_g % 2 ? pair(low0, low1) : pair(h0, h1))
#endif
#else
#define ADD_SUMS(sums, half, pairs)
#define AS_FACTORS(sums, factors)
#endif

// With many rows, half of a chunk at a time: registers.
constexpr int TURNS = NB > 2 ? 2 : 1, HALVES = 2 / TURNS;
for (int step = 0; step < steps; step++) {
  const int c4 = (step * SHARES + share) * 4, c = c4 + lane_t;
#if STAGE
  copies_arrived();
#endif
#if EARLY
  const int c2 = min(c + 4 * SHARES, chunks - 1);
  if (step + 1 < steps) {  // what is loaded here is not looked at before this step's end
    LOAD_NEXT(c2)
    COPY_X(step + 1)
    COPY_CODES(step + 1)
  }
#endif
  if (c4 < chunks) {
    float dots[TURNS == 1 ? 1 : BLOCKS][NB][4], sums[NB][GROUPS][4];
    uint group_sums[NB][GROUPS];
    UNROLL
    for (int turn = 0; turn < TURNS; turn++) {
      uint xs[NB][HALVES][8];
      UNROLL
      for (int n = 0; n < NB; n++) {
        if (turn == 0) {
          UNROLL
          for (int i = 0; i < GROUPS * 4; i++) sums[n][i / 4][i % 4] = 0;
        }
        UNROLL
        for (int h = 0; h < HALVES; h++) {
          LOAD_X(step, n, turn * HALVES + h, xs[n][h])
          ADD_SUMS(sums[n], turn * HALVES + h, xs[n][h])
        }
        if (turn == TURNS - 1) {
          AS_FACTORS(sums[n], group_sums[n])
        }
      }
#if STAGE && !EARLY
      if (turn == TURNS - 1 && step + 1 < steps) {
        simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes have read this step's
        COPY_X(step + 1)
      }
#endif
      UNROLL
      for (int b = 0; b < BLOCKS; b++) {
        Scale scale0, scale1;
        scale_of(now[2 * b], scale0);
        scale_of(now[2 * b + 1], scale1);
        uint m0[WORDS], m1[WORDS];
        ALIGNED(2 * b, m0)
        ALIGNED(2 * b + 1, m1)
        if (AFTER && turn == 0) {
          UNROLL
          for (int i = 0; i < NB * 4; i++) dots[TURNS == 1 ? 0 : b][i / 4][i % 4] = 0;
        }
        UNROLL
        for (int i = 0; i < 4 * HALVES; i++) {
          const int q = turn * 8 * HALVES + 2 * i;
          const uint a[4] = {weight_pair(m0, scale0, q, ones TABLE), weight_pair(m1, scale1, q, ones TABLE),
                             weight_pair(m0, scale0, q + 1, ones TABLE), weight_pair(m1, scale1, q + 1, ones TABLE)};
          UNROLL
          for (int n = 0; n < NB; n++)
            multiply(AFTER ? dots[TURNS == 1 ? 0 : b][n] : acc[b][n], a, xs[n][i / 4][i % 4 * 2],
                     xs[n][i / 4][i % 4 * 2 + 1]);
        }
        if (turn == TURNS - 1) {
          UNROLL
          for (int n = 0; n < NB; n++) {
            const uint mins[4] = {scale0.mins[0], scale1.mins[0], GROUPS == 2 ? scale0.mins[GROUPS - 1] : 0u,
                                  GROUPS == 2 ? scale1.mins[GROUPS - 1] : 0u};
#if AFTER
            float low[4] = {0, 0, 0, 0};
            if (SUMMED) multiply(low, mins, group_sums[n][0], GROUPS == 2 ? group_sums[n][GROUPS - 1] : 0u);
            UNROLL
            for (int i = 0; i < 4; i++) {
              acc[b][n][i] += (i < 2 ? scale0.d : scale1.d) * dots[TURNS == 1 ? 0 : b][n][i];
              if (SUMMED) acc[b][n][i] -= (i < 2 ? scale0.m : scale1.m) * low[i];
            }
#elif SUMMED
            multiply(acc[b][n], mins, group_sums[n][0], 0u);
#endif
          }
        }
      }
    }
  }
#if EARLY
  TAKE_NEXT(c2)
#else
  if (step + 1 < steps) LOAD(now, min(c + 4 * SHARES, chunks - 1))
#endif
}

#if SPLIT > 1
// Each simdgroup stores its sums, and adds up all of every SPLIT-th block.
#if STAGE
threadgroup_barrier(mem_flags::mem_threadgroup);  // x was here
#endif
threadgroup float4* shared = (threadgroup float4*)room;
UNROLL
for (int f = 0; f < BLOCKS * NB; f++) {
  float4 four;
  four.x = acc[f / NB][f % NB][0];
  four.y = acc[f / NB][f % NB][1];
  four.z = acc[f / NB][f % NB][2];
  four.w = acc[f / NB][f % NB][3];
  shared[(part * BLOCKS * NB + f) * 32 + lane] = four;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#endif

UNROLL
for (int f = 0; f < OUTS * NB; f++) {
  if (f % SPLIT == part) {
    const int b = f / NB, n = f % NB;
#if SPLIT > 1
    UNROLL
    for (int u = 0; u < 1 + GLU; u++) {
      UNROLL
      for (int i = 0; i < 4; i++) acc[b + u * OUTS][n][i] = 0;
      for (int s = 0; s < SPLIT; s++) {
        const float4 four = shared[((s * BLOCKS + u * OUTS) * NB + f) * 32 + lane];
        acc[b + u * OUTS][n][0] += four.x;
        acc[b + u * OUTS][n][1] += four.y;
        acc[b + u * OUTS][n][2] += four.z;
        acc[b + u * OUTS][n][3] += four.w;
      }
    }
#endif
    UNROLL
    for (int i = 0; i < 4; i++) {
      const int t = n * 8 + lane_t * 2 + i % 2, out = first_out + b * 16 + i / 2 * 8 + lane_g;
      if (t < tokens && out < outs) {
#if SCALED
        const float factor = scale[X_ROW(t)] * GROW;
#else
        const float factor = GROW;
#endif
        float value = acc[b][n][i] * factor;
        if (GLU) value = gelu(value) * (acc[GLU ? b + OUTS : b][n][i] * factor);
        const ulong at = ulong(Y_ROW(t) + (PARTS > 1 ? int(threadgroup_position_in_grid.z) * tokens : 0)) * ulong(outs) + ulong(out);
#if TIMES
        value = gelu(value) * float(times[at]);
#endif
        y[at] = U(WITHIN_U(value * FACTOR));
      }
    }
  }
}
