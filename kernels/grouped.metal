// Many rows, each through one expert's packed weight:
//   y[order[i] , n] = scale[r] * sum over k of W[e, n, k] x[r, k],   r = order[i] / USED,
// for all i of a tile of `order`, whose rows share expert e. With GLU, W is gate over up, [E, 2 F, K], and
//   y[order[i], f] = gelu(gate row f) * (up row f),   each times scale[r] first.
//
// x fp16 [rows, K], scale fp32 [rows, 1]; tiles int32 [.., 3]: expert, first i, one past the last, at most TOKENS of
// them (none in tiles that are left over). Packed planes as for matvec.metal; without a format (PLAIN) codes are W
// itself in 16-bit floats.
//
// Threads. A threadgroup of 4 simdgroups takes one tile and 128 rows of W (with GLU 64 of gate, 64 of up); grid
// (128 ceil(N / 128), tiles, 1). It walks along K in steps of 32. While the simdgroups multiply one step, each thread
// prepares the next: it converts 32 weights of one row to halves and loads 8 numbers of each of TOKENS / 32 rows of x.
// A simdgroup multiplies 64 rows of W by TOKENS / 2 rows of x on matrix units (matrix.metal), summed in fp32. The sums
// of a product may be in any order: of a row, lane t takes the 8 neighbouring numbers from 8 t on, 16 bytes at once.
//
// Memory. Packed weights are read once for each tile of their expert, mostly from the cache; x once for each 128 rows
// of W; y is written once. Threadgroup memory: two steps of halves, 24 KB with 64 TOKENS,
// and a format's grid, 8 KB at most.
//
// Rendered before: T (half), U (of y), USED, GLU, TOKENS (a multiple of 32), a format with CHUNK 32, or PLAIN and
// W_TYPE.
// uses: matrix.metal
// uses: packed.metal

#define BLOCKS (TOKENS / 16)                  // of 8 rows of x, a simdgroup
#define BRING (TOKENS / 32)                   // rows of x that a thread loads a part of
// Where lane g, t of a block finds its 16 bytes: neighbouring g as well as neighbouring t lie in different banks.
#define PLACE(g, t) ((g) * 4 + ((t) ^ (g) / 2))

// Two floats as halves in a word.
METAL_FUNC uint halves(float a, float b) { return pair(half(a), half(b)); }

// Store the eight numbers from 8 t on of row n of a second factor's block where its lanes read them.
METAL_FUNC void put_second(threadgroup uint4* block, int n, int t, const thread uint* eight) {
#ifdef CUDA
  uint4 u;
  u.x = eight[0];
  u.y = eight[1];
  u.z = eight[2];
  u.w = eight[3];
  block[PLACE(n, t)] = u;
#else
  UNROLL
  for (int i = 0; i < 8; i++) {  // number i: row 2 t + i % 2 of product i / 2, for lane (that row, n / 2)
    const int place = (PLACE(2 * t + i % 2, n / 2) * 4 + i / 2) * 2 + n % 2;
    ((threadgroup half*)block)[place] = as_type<half>(ushort(i % 2 ? eight[i / 2] >> 16 : eight[i / 2] & 0xFFFFu));
  }
#endif
}

#if PLAIN
METAL_FUNC void load_plain(const device half* p, thread uint* w) { load_words((const device uint*)p, 4, w); }
METAL_FUNC void load_plain(const device bfloat* p, thread uint* w) {
  float v[8];
  load8(p, v);
  UNROLL
  for (int i = 0; i < 4; i++) w[i] = halves(v[2 * i], v[2 * i + 1]);
}
#elif !RULE
// Code i of a chunk plus 2^23: its bits go into that number's mantissa, since a conversion is slow.
METAL_FUNC float raised_code(const thread uint* w, int i) {
  const int word = i * BITS / 32, at = i * BITS % 32;
  uint code = w[word] >> at;
  if (at + BITS > 32) code |= w[word + 1] << (32 - at);
  return as_type<float>(0x4B000000u | (code & ((1u << BITS) - 1)));
}
#endif

// kernel: grouped(x, scale, order, tiles, codes, group_scales?, block_scales?, grid?) -> (y)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup);
const int lane_g = LANE_G, lane_t = LANE_T;
const int tile = int(threadgroup_position_in_grid.y);
const int expert = tiles[3 * tile], first = tiles[3 * tile + 1], last = tiles[3 * tile + 2];
const int N = codes_shape[1], K = x_shape[1], outs = GLU ? N / 2 : N;
const int first_out = int(threadgroup_position_in_grid.x) * (GLU ? 64 : 128);

threadgroup uint4 weights[2][16 * 32];        // first factors of a step: blocks of 8 rows of W, [block][PLACE]
threadgroup uint4 rows[2][TOKENS / 8 * 32];   // second ones: blocks of 8 rows of x
#if RULE && GRID
threadgroup GRID_TYPE table[GRID];
for (int i = thread_index; i < GRID; i += 128) table[i] = grid[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
#elif HAS_LUT
threadgroup float lut[16];
if (thread_index < 16) {
  const float values[16] = LUT;
  lut[thread_index] = values[thread_index];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#endif

if (first < last) {
  // This thread loads 32 weights of one row per step, and 8 numbers of each of BRING rows of x.
  const int out = min(first_out + (GLU ? thread_index % 64 : thread_index), outs - 1);
  const ulong row = ulong(expert) * ulong(N) + ulong(GLU && thread_index >= 64 ? outs + out : out);
  const device half* from[BRING];
  UNROLL
  for (int b = 0; b < BRING; b++) {
    const int i = min(first + thread_index / 4 + 32 * b, last - 1);
    from[b] = x + ulong(order[i] / USED) * ulong(K) + thread_index % 4 * 8;
  }
#if PLAIN
  const device W_TYPE* row_codes = codes + row * ulong(K);
  uint plain[16];
#define BRING_WEIGHTS(step)                                                                \
  UNROLL for (int j = 0; j < 4; j++) load_plain(row_codes + (step) * 32 + j * 8, plain + 4 * j);
#else
  const device uint* row_codes = codes + row * ulong(K / 32 * BITS);
#if GROUP_SCALE_BITS
  const device uchar* row_group_scales = group_scales + row * ulong(K / GROUP * GROUP_SCALE_BITS / 8);
#define BRING_GROUP_SCALES(step) chunk.group_scales = load_group_scales(row_group_scales, step);
#else
#define BRING_GROUP_SCALES(step) chunk.group_scales = 0;
#endif
#if SCALE_BLOCK
  const device half* row_block_scales = block_scales + row * ulong(K / SCALE_BLOCK * BLOCK_NUMBERS);
#define BRING_BLOCK_SCALES(step) chunk.block_scales[0] = load_block_scales(row_block_scales, (step) * 32 / SCALE_BLOCK);
#else
#define BRING_BLOCK_SCALES(step) chunk.block_scales[0] = 0;
#endif
  Chunk chunk;
#define BRING_WEIGHTS(step)                                                                \
  load_codes(row_codes + (step) * BITS, chunk.codes);                                      \
  BRING_GROUP_SCALES(step)                                                                          \
  BRING_BLOCK_SCALES(step)
#endif
  uint brought[BRING][4];
#define BRING_STEP(step)                                                                   \
  BRING_WEIGHTS(step)                                                                      \
  UNROLL for (int b = 0; b < BRING; b++)                                                   \
      load_words((const device uint*)(from[b] + (step) * 32), 4, brought[b]);

  float acc[4][BLOCKS][4];  // of blocks of 16 rows of W and 8 of x
  UNROLL
  for (int i = 0; i < 4 * BLOCKS * 4; i++) acc[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] = 0;

  const int steps = K / 32, own = PLACE(lane_g, lane_t);
  BRING_STEP(0)
  for (int step = 0; step < steps; step++) {
    // Store the loaded numbers as factors.
    UNROLL
    for (int j = 0; j < 4; j++) {
      uint4 u;
#if PLAIN
      u.x = plain[4 * j];
      u.y = plain[4 * j + 1];
      u.z = plain[4 * j + 2];
      u.w = plain[4 * j + 3];
#else
      float a, b, v[8];
      scales(chunk.group_scales, chunk.block_scales[0], j * 8 / GROUP, a, b);
#if RULE
      EIGHT_BYTES(table, chunk.codes, chunk.group_scales, j, eight)
#endif
      UNROLL
      for (int i = 0; i < 8; i++) {
#if RULE
        v[i] = a * value_of(eight, i);
#elif HAS_LUT
        v[i] = a * lut[(chunk.codes[j] >> (4 * i)) & 15u];
#else
        v[i] = a * (raised_code(chunk.codes, j * 8 + i) - float(0x800000 + OFFSET)) + b;
#endif
      }
      u.x = halves(v[0], v[1]);
      u.y = halves(v[2], v[3]);
      u.z = halves(v[4], v[5]);
      u.w = halves(v[6], v[7]);
#endif
      weights[step % 2][thread_index / 8 * 32 + PLACE(thread_index % 8, j)] = u;
    }
    UNROLL
    for (int b = 0; b < BRING; b++) {
      const int n = thread_index / 4 + 32 * b;
      put_second(rows[step % 2] + n / 8 * 32, n % 8, thread_index % 4, brought[b]);
    }
    if (step + 1 < steps) {
      BRING_STEP(step + 1)
    }
    // These places are written again only after the next barrier, which every thread passes after its reads.
    threadgroup_barrier(mem_flags::mem_threadgroup);

    uint4 second[BLOCKS];
    UNROLL
    for (int b = 0; b < BLOCKS; b++) second[b] = rows[step % 2][(sg / 2 * BLOCKS + b) * 32 + own];
    UNROLL
    for (int w = 0; w < 4; w++) {
      // With GLU a simdgroup takes two blocks of gate, and the two of up that go with them.
      const int block = GLU ? w / 2 * 4 + sg % 2 * 2 + w % 2 : sg % 2 * 4 + w;
      const uint4 upper = weights[step % 2][block * 64 + own], lower = weights[step % 2][block * 64 + 32 + own];
      const uint a[4] = {upper.x, lower.x, upper.y, lower.y}, a2[4] = {upper.z, lower.z, upper.w, lower.w};
      UNROLL
      for (int b = 0; b < BLOCKS; b++) {
        multiply(acc[w][b], a, second[b].x, second[b].y);
        multiply(acc[w][b], a2, second[b].z, second[b].w);
      }
    }
  }

  UNROLL
  for (int b = 0; b < BLOCKS; b++) {
    UNROLL
    for (int c = 0; c < 2; c++) {
      const int i = first + (sg / 2 * BLOCKS + b) * 8 + lane_t * 2 + c;
      if (i < last) {
        const int place = order[i];
        const float factor = scale[place / USED];
        device U* to = y + ulong(place) * ulong(outs);
        UNROLL
        for (int w = 0; w < (GLU ? 2 : 4); w++) {
          UNROLL
          for (int h = 0; h < 2; h++) {
            const int n = first_out + (GLU ? sg % 2 * 2 + w : sg % 2 * 4 + w) * 16 + h * 8 + lane_g;
            float value = acc[w][b][2 * h + c] * factor;
            if (GLU) value = gelu(value) * (acc[GLU ? w + 2 : w][b][2 * h + c] * factor);
            if (n < outs) to[n] = U(WITHIN_U(value));
          }
        }
      }
    }
  }
}
