// Packed weights times a few activations:  y[t, n] = sum over k of W[n, k] x[t, k], summed in fp32.
//
// Variants, by what is rendered before this text:
//   NORM     x is RMS-normalised on the way in: x[k] norm[k] / sqrt(mean(x²) + EPS). The squares are
//            summed beside the products and divide the result at the end: x is read once.
//   GLU      W is gate over up, [2F, K]: y[t, f] = gelu(gate row f) * (up row f), both in one lane.
//   TIMES    y[t, n] = gelu(row n) * times[t, n].
//   GROW     multiplies x, FACTOR each result.
//   EXPERTS  W is [E, N, K]; row block z of the grid takes expert ids[z] and writes y[z]; x is shared
//            or, with EXPERT_X, x[z].
//
// Threads. A row belongs to LANES neighbouring lanes of each of SPLIT simdgroups; a lane works on ROWS
// rows at once, so that an activation, once converted, meets ROWS weights. A step of a lane is CHUNK
// weights of each of its rows; neighbouring lanes take neighbouring chunks, so LANES of them read one
// stretch of a row, 16 bytes a lane where the bits allow. The next step's weights are loaded while
// this step's are used. Then the lanes of a row add up by shuffles, and its simdgroups over threadgroup
// memory. SG simdgroups, threadgroup of 32 SG; grid (32 SG ceil(N / rows of a threadgroup), 1, experts).
//
// With STAGE, the threadgroup copies each step's x to threadgroup memory as fp32 (and normalised), one step
// ahead: for fp32 x and for NORM, where loads straight from memory by lanes a chunk apart were the limit.
//
// Memory. Every byte of codes, group_scales and block_scales is read once, in whole lines; x (and norm) once for each
// simdgroup's ROWS * 32 / LANES rows, from the cache. y is written once.
//
// A code becomes a float without conversion: its bits are shifted to the top of a mantissa under the
// exponent of 1, giving v = 1 + code / 2^BITS. With w = a code + b over a group of weights,
//   sum of w x  =  a 2^BITS (sum of v x - sum of x) + b sum of x,
// and the sums of x serve all rows. With PAIRS, one shift serves two codes; the lower has
// v = 1 + code / 2^(2 BITS), so even and odd k are summed apart. Look-up types read their 16 values from
// threadgroup memory, and formats with a grid its entries, whose bytes are codes of 8 bits then. INTEGER: on CUDA, one token's x of 16 bits becomes whole
// numbers of 16 bits, with one power of two for each group (fp16 down to a sixteenth of the largest exactly). The table's
// values come as bytes, four by one permutation of 8, those of rules as packed.metal makes them, and are multiplied so.
// uses: packed.metal

#define HALVES (PAIRS ? 2 : 1)                         // sums kept apart
#if RULE
#define STEP (256.0f / float(1 << BYTE_STEP))
#else
#define STEP float(1 << BITS)
#endif
#ifdef CUDA
#define INTEGER ((HAS_LUT || RULE) && TOKENS == 1 && !T_FLOAT && !NORM)
#endif
#if VALUES_IQ1_S || VALUES_IQ1_M
#define DOT_STEP 3  // sums in whole numbers are 2^DOT_STEP times what they stand for
#else
#define DOT_STEP BYTE_STEP
#endif

#if RULE
// Byte j of eight (packed.metal) as a float from 1 to 2, as codes are below.
METAL_FUNC float unit_byte(const thread uint* b, int j, uint one) {
  const int at = j % 4 * 8;
  const uint u = at > 15 ? b[j / 4] >> (at > 15 ? at - 15 : 0) : b[j / 4] << (at > 15 ? 0 : 15 - at);
  return as_type<float>((u & 0x007F8000u) | one);
}
#else
// Code i of a chunk as a float from 1 to 2: its bits under the exponent of 1. `one` is the bits of 1.0f.
// With PAIRS, codes 2j and 2j + 1 are shifted as one, so that an even code stands BITS lower in the mantissa.
METAL_FUNC float unit_code(const thread uint* w, int i, uint one) {
  const int first = PAIRS ? i / 2 * 2 : i, span = PAIRS ? 2 * BITS : BITS;  // of what is shifted: first code, bits
  const int word = first * BITS / 32, at = first * BITS % 32, low_end = 23 - span;
  uint u;
  if (at + span > 32)
    u = (w[word] >> (at - low_end)) | (w[word + 1] << (32 - at + low_end));
  else
    u = at >= low_end ? w[word] >> (at - low_end) : w[word] << (low_end - at);
  const uint mask = ((1u << BITS) - 1) << (low_end + (i - first) * BITS);
  return as_type<float>((u & mask) | one);
}
#endif

#if INTEGER
// The weight whose x is number j of a group's: those that one word of bytes meets.
#if VALUES_Q1_0  // bit i of each byte
#define WEIGHT(j) (j % 4 * 8 + j / 4)
#elif VALUES_IQ1_S || VALUES_IQ1_M  // place i of each byte of two entries
#define WEIGHT(j) (j / 16 * 16 + j % 4 * 4 + j % 16 / 4)
#else
#define WEIGHT(j) (j)
#endif

// The SPAN numbers of a group as 16-bit integers, a pair a word, and their unit: a power of two, 2^-14 to 2^-15 of the largest, or
// infinity if one of them is not finite.
METAL_FUNC float as_integers(const thread float* v, thread uint* pairs) {
  float most = 1e-30f;
  UNROLL
  for (int j = 0; j < SPAN; j++) most = max_or_nan(most, fabs(v[j]));
  const uint exponent = as_type<uint>(most) & 0x7F800000u;
  const float scale = as_type<float>((268u << 23) - exponent);
  UNROLL
  for (int j = 0; j < SPAN; j += 2) {  // under 1.5 * 2^23 the low bits are the number
    const uint low = as_type<uint>(v[WEIGHT(j)] * scale + 12582912.0f);
    const uint high = as_type<uint>(v[WEIGHT((j + 1))] * scale + 12582912.0f);
    pairs[j / 2] = (low & 0xFFFFu) | high << 16;
  }
  return as_type<float>(exponent) * 6.103515625e-05f;
}

#if VALUES_Q1_0
// sum + values . x of a group, 64 times what they stand for: half of 128 is in sum, -128 x is added where the bit is 0.
METAL_FUNC int bits_dot(uint word, const thread uint* x, int sum) {
  UNROLL
  for (int i = 0; i < 8; i++) sum = dot4(x[2 * i], x[2 * i + 1], ~(word << (7 - i)) & 0x80808080u, sum);
  return sum;
}
#elif VALUES_IQ1_S || VALUES_IQ1_M
// sum + places . x of 16 weights.
METAL_FUNC int places_dot(uint places, const thread uint* x, int sum) {
  UNROLL
  for (int i = 0; i < 4; i++) sum = dot4(x[2 * i], x[2 * i + 1], (places >> (2 * i)) & 0x03030303u, sum);
  return sum;
}
#elif RULE
// sum + values . x of weights 8 i to 8 i + 7 of a chunk, for b of FROM_GRID: 2^BYTE_STEP times what they stand for.
METAL_FUNC int bytes_dot(const thread uint* w, uint field, int i, thread uint* b, const thread uint* x, int sum) {
#if GRID
  uint signs[2];
  signs_of(w, field, i, signs[0], signs[1]);
#else
  eight_bytes(w, field, i, b);
#endif
  UNROLL
  for (int n = 0; n < 2; n++) {
#if GRID  // as signed bytes: no value of a grid is 0
    const uint minus = bits_as_bytes(signs[n]);
    sum = dot4(x[2 * n], x[2 * n + 1], (b[n] ^ (minus * 255u)) + minus, sum);
#else
    sum = dot4(x[2 * n], x[2 * n + 1], b[n] ^ 0x80808080u, sum);
#endif
  }
  return sum;
}
#else
// sum + values(codes) . x for 8 codes. A code's low 3 bits choose a byte of either half of the table; of the half that
// its bit 3 does not mean, the byte's sign comes instead, 0 or -1, for which the other half's byte makes up.
METAL_FUNC int table_dot(uint word, const thread uint* table, const thread uint* x, int sum) {
  UNROLL
  for (int i = 0; i < 2; i++) {
    const uint low = bytes_or_signs(table[0], table[1], word >> (16 * i));
    const uint high = bytes_or_signs(table[2], table[3], (word ^ 0x88888888u) >> (16 * i));
    sum = dot4(x[2 * i], x[2 * i + 1], low, sum);
    sum = dot4(x[2 * i], x[2 * i + 1], high, sum);
  }
  return sum;
}
#endif
#endif

// kernel: matvec(x, norm?, codes, group_scales?, block_scales?, grid?, ids?, times?) -> (y)
#if EXPERTS
INPUTS_READY();  // ids
#endif
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int slot = int(threadgroup_position_in_grid.z);
const int words = codes_shape[EXPERTS ? 2 : 1];                 // of codes in a row
const int chunks = words / WORDS, K = words / BITS * 32;
const int N = codes_shape[EXPERTS ? 1 : 0], outs = GLU ? N / 2 : N;
const int part = sg % SPLIT, col = lane % LANES;

// Rows: `OUTS` results a lane, 32 / LANES rows apart; with GLU their up rows follow.
constexpr int OUTS = GLU ? ROWS / 2 : ROWS, APART = 32 / LANES;
const int first = (int(threadgroup_position_in_grid.x) * (SG / SPLIT) + sg / SPLIT) * (OUTS * APART) + lane / LANES;
uint row[ROWS];
UNROLL
for (int r = 0; r < ROWS; r++) {
  row[r] = uint(min(first + r % OUTS * APART, outs - 1) + (r >= OUTS ? outs : 0));
#if EXPERTS
  row[r] += uint(ids[slot]) * uint(N);
#endif
}

// 0x3F800000, but no literal to the compiler: mask and or are then one instruction with one immediate (NVIDIA).
const uint one = max(uint(N), 0x3F800000u);

#if RULE && GRID
threadgroup GRID_TYPE table[GRID];
for (int i = sg * 32 + lane; i < GRID; i += SG * 32) table[i] = grid[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
#elif INTEGER && HAS_LUT
const uint table[4] = {LUT_0 ^ one ^ 0x3F800000u, LUT_1 ^ one ^ 0x3F800000u, LUT_2 ^ one ^ 0x3F800000u,
                       LUT_3 ^ one ^ 0x3F800000u};  // no literals either
#elif HAS_LUT
threadgroup float lut[16];
if (sg == 0 && lane < 16) {
  const float values[16] = LUT;
  lut[lane] = values[lane];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#endif

#if TOKENS > 1  // at most: one text serves a few tokens, and those that are missing are copies of the last
const int tokens = x_shape[0];
#define X_ROW(t) min(t, tokens - 1)
#else
const int tokens = 1;
#define X_ROW(t) t
#endif
const device T* xs = x + (EXPERT_X ? uint(slot) * uint(K) : 0u);
float acc[TOKENS][ROWS], squares[TOKENS];
UNROLL
for (int t = 0; t < TOKENS; t++) {
  squares[t] = 0;
  UNROLL
  for (int r = 0; r < ROWS; r++) acc[t][r] = 0;
}

Chunk now[ROWS], next[ROWS];
#define LOAD(into, c)                                                            \
  UNROLL for (int r = 0; r < ROWS; r++) {                                        \
    load_codes(codes + row[r] * uint(words) + uint((c) * WORDS), into[r].codes); \
    LOAD_GROUP_SCALES(into, c)                                                   \
    LOAD_BLOCK_SCALES(into, c)                                                   \
  }
#if GROUP_SCALE_BITS
#define LOAD_GROUP_SCALES(into, c) \
  into[r].group_scales = load_group_scales(group_scales + row[r] * uint(K / GROUP * GROUP_SCALE_BITS / 8), c);
#else
#define LOAD_GROUP_SCALES(into, c) into[r].group_scales = 0;
#endif
#if SCALE_BLOCK
#define LOAD_BLOCK_SCALES(into, c)                                        \
  UNROLL for (int i = 0; i < BLOCK_SCALES; i++) into[r].block_scales[i] = \
      load_block_scales(block_scales + row[r] * uint(K / SCALE_BLOCK * BLOCK_NUMBERS), (c) * CHUNK / SCALE_BLOCK + i);
#else
#define LOAD_BLOCK_SCALES(into, c) into[r].block_scales[0] = 0;
#endif

#if STAGE
// The next step's x in threadgroup memory: thread i copies 8 numbers of every SG * 256.
threadgroup float4 staged[2][TOKENS][CHUNK / 4][LANES * SPLIT];  // neighbouring lanes read neighbouring places
constexpr int BRING = (LANES * SPLIT * CHUNK / 8 + SG * 32 - 1) / (SG * 32);
float brought[TOKENS][BRING][8];
#define BRING_X(step)                                                                      \
  UNROLL for (int b = 0; b < BRING; b++) {                                                 \
    const int i = (b * SG * 32 + sg * 32 + lane) * 8, k = (step) * (LANES * SPLIT * CHUNK) + i; \
    if (i < LANES * SPLIT * CHUNK && k < K) {                                              \
      BRING_NORM(k)                                                                        \
      UNROLL for (int t = 0; t < TOKENS; t++) {                                            \
        load8(xs + X_ROW(t) * K + k, brought[t][b]);                                       \
        UNROLL for (int j = 0; j < 8 * NORM; j++) {                                        \
          squares[t] += brought[t][b][j] * brought[t][b][j];                               \
          brought[t][b][j] *= scale[j];                                                    \
        }                                                                                  \
      }                                                                                    \
    }                                                                                      \
  }
#if NORM
#define BRING_NORM(k) float scale[8]; load4(norm + (k), scale); load4(norm + (k) + 4, scale + 4);
#else
#define BRING_NORM(k) const float scale[8] = {1, 1, 1, 1, 1, 1, 1, 1};
#endif
#define STAGE_X(step)                                                                      \
  UNROLL for (int b = 0; b < BRING; b++) {                                                 \
    const int i = (b * SG * 32 + sg * 32 + lane) * 8, k = (step) * (LANES * SPLIT * CHUNK) + i; \
    if (i < LANES * SPLIT * CHUNK && k < K) {                                              \
      UNROLL for (int t = 0; t < TOKENS; t++) {                                            \
        UNROLL for (int q = 0; q < 2; q++) {                                               \
          float4 four;                                                                     \
          four.x = brought[t][b][q * 4];                                                   \
          four.y = brought[t][b][q * 4 + 1];                                               \
          four.z = brought[t][b][q * 4 + 2];                                               \
          four.w = brought[t][b][q * 4 + 3];                                               \
          staged[(step) % 2][t][i % CHUNK / 4 + q][i / CHUNK] = four;                      \
        }                                                                                  \
      }                                                                                    \
    }                                                                                      \
  }                                                                                        \
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif

const int place = part * LANES + col, steps = (chunks + LANES * SPLIT - 1) / (LANES * SPLIT);
if (place < chunks) LOAD(now, place)
#if !EXPERTS
INPUTS_READY();  // the first weights are being loaded
#endif
#if STAGE
BRING_X(0)
STAGE_X(0)
#endif
for (int step = 0; step < steps; step++) {
  const int c = step * (LANES * SPLIT) + place, c2 = c + LANES * SPLIT;
#if PREFETCH
  if (c2 < chunks) LOAD(next, c2)
#endif
#if STAGE
  if (step + 1 < steps) BRING_X(step + 1)
#endif
  if (c < chunks) {
    UNROLL
    for (int g = 0; g < SPANS; g++) {
#if INTEGER
      float v[SPAN];
      UNROLL
      for (int i = 0; i < SPAN; i += 8) load8(xs + c * CHUNK + g * SPAN + i, v + i);
      uint pairs[SPAN / 2];
      const float unit = as_integers(v, pairs) / float(1 << DOT_STEP);
#if VALUES_Q1_0 || VALUES_IQ1_S || VALUES_IQ1_M
      int sums[SPAN / 8];  // of the x of 8 weights, an entry's (of bits, in any order)
      UNROLL
      for (int i = 0; i < SPAN / 8; i++) {
        const thread uint* at = pairs + i / 2 * 8 + i % 2;
        sums[i] = dot4(at[4], at[6], 0x01010101u, dot4(at[0], at[2], 0x01010101u, 0));
      }
#endif
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        float a, b;
        scales(now[r].group_scales, now[r].block_scales[g * BLOCK_SCALES / SPANS], g, a, b);
        int dot = 0, places = 0;
#if VALUES_Q1_0
        dot = bits_dot(now[r].codes[0], pairs, 64 * (sums[0] + sums[1] + sums[2] + sums[3]));
#else
        UNROLL
        for (int i = 0; i < SPAN / 8; i++) {
          const int eighth = g * (SPAN / 8) + i;
#if VALUES_IQ1_S || VALUES_IQ1_M  // place - 1, and an eighth more, or less
          dot += (is_less(now[r].group_scales, eighth) ? -9 : -7) * sums[i];
          if (i % 2 == 0) {
            const uint first = table[grid_place(now[r].codes, now[r].group_scales, eighth)];
            const uint second = table[grid_place(now[r].codes, now[r].group_scales, eighth + 1)];
            places = places_dot(first | second << 16, pairs + 4 * i, places);
          }
#elif RULE
          uint eight[2];
          FROM_GRID(table, now[r].codes, now[r].group_scales, eighth, eight)
          dot = bytes_dot(now[r].codes, now[r].group_scales, eighth, eight, pairs + 4 * i, dot);
#else
          dot = table_dot(now[r].codes[eighth], table, pairs + 4 * i, dot);
#endif
        }
#endif
        acc[0][r] += a * (unit * float(dot + 8 * places));
      }
#else
      float dots[TOKENS][ROWS][HALVES], sums[TOKENS][HALVES];
      UNROLL
      for (int t = 0; t < TOKENS; t++) {
        UNROLL
        for (int h = 0; h < HALVES; h++) {
          sums[t][h] = 0;
          UNROLL
          for (int r = 0; r < ROWS; r++) dots[t][r][h] = 0;
        }
      }
      UNROLL
      for (int i = 0; i < SPAN; i += 8) {
        const int at = g * SPAN + i;
        float v[TOKENS][8];
#if NORM && !STAGE
        float scale[8];
        load4(norm + c * CHUNK + at, scale);
        load4(norm + c * CHUNK + at + 4, scale + 4);
#endif
        UNROLL
        for (int t = 0; t < TOKENS; t++) {
#if STAGE
          UNROLL
          for (int q = 0; q < 2; q++) {
            const float4 four = staged[step % 2][t][at / 4 + q][place];
            v[t][q * 4] = four.x;
            v[t][q * 4 + 1] = four.y;
            v[t][q * 4 + 2] = four.z;
            v[t][q * 4 + 3] = four.w;
          }
#else
          load8(xs + X_ROW(t) * K + c * CHUNK + at, v[t]);
#endif
          UNROLL
          for (int j = 0; j < 8; j++) {
#if NORM && !STAGE
            squares[t] += v[t][j] * v[t][j];
            v[t][j] *= scale[j];
#endif
            if (!HAS_LUT) sums[t][j % HALVES] += v[t][j];
          }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) {
#if RULE
          EIGHT_BYTES(table, now[r].codes, now[r].group_scales, at / 8, eight)
#endif
          UNROLL
          for (int j = 0; j < 8; j++) {
#if RULE
            const float w = unit_byte(eight, j, one);
#elif HAS_LUT
            const float w = lut[(now[r].codes[(at + j) / 8] >> ((at + j) % 8 * 4)) & 15u];
#else
            const float w = unit_code(now[r].codes, at + j, one);
#endif
            UNROLL
            for (int t = 0; t < TOKENS; t++) dots[t][r][j % HALVES] += w * v[t][j];
          }
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        float a, b;
        scales(now[r].group_scales, now[r].block_scales[g * BLOCK_SCALES / SPANS], g, a, b);
        UNROLL
        for (int t = 0; t < TOKENS; t++) {
#if HAS_LUT
          acc[t][r] += a * dots[t][r][0];
#else
          const float sum = sums[t][0] + (PAIRS ? sums[t][HALVES - 1] : 0.0f);
          float dot = STEP * dots[t][r][HALVES - 1] - (STEP * sums[t][HALVES - 1] + float(OFFSET) * sum);
          if (PAIRS) dot += STEP * STEP * (dots[t][r][0] - sums[t][0]);
          acc[t][r] += a * dot;
          if (HAS_MIN) acc[t][r] += b * sum;
#endif
        }
      }
#endif
    }
  }
#if PREFETCH
  UNROLL
  for (int r = 0; r < ROWS; r++) now[r] = next[r];
#else
  if (c2 < chunks) LOAD(now, c2)
#endif
#if STAGE
  if (step + 1 < steps) {
    STAGE_X(step + 1)
  }
#endif
}

UNROLL
for (int t = 0; t < TOKENS; t++) {
  if (NORM) squares[t] = sum_lanes(squares[t], STAGE ? 32 : LANES);
  UNROLL
  for (int r = 0; r < ROWS; r++) acc[t][r] = sum_lanes(acc[t][r], LANES);
}

#if SPLIT > 1 || (STAGE && NORM && SG > 1)
// Simdgroups that share rows store their sums; the first of them adds them up.
threadgroup float shared_acc[SG][TOKENS][ROWS][APART];
threadgroup float shared_squares[SG][TOKENS];
if (col == 0) {
  UNROLL
  for (int t = 0; t < TOKENS; t++) {
    if (lane == 0) shared_squares[sg][t] = squares[t];
    UNROLL
    for (int r = 0; r < ROWS; r++) shared_acc[sg][t][r][lane / LANES] = acc[t][r];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (part == 0 && col == 0) {
  if (STAGE && NORM) {  // each thread saw its own part of x
    UNROLL
    for (int t = 0; t < TOKENS; t++) {
      squares[t] = 0;
      for (int s = 0; s < SG; s++) squares[t] += shared_squares[s][t];
    }
  }
  for (int s = 1; s < SPLIT; s++) {
    UNROLL
    for (int t = 0; t < TOKENS; t++) {
      if (NORM && !STAGE) squares[t] += shared_squares[sg + s][t];
      UNROLL
      for (int r = 0; r < ROWS; r++) acc[t][r] += shared_acc[sg + s][t][r][lane / LANES];
    }
  }
}
#endif

if (part == 0 && col == 0) {
  UNROLL
  for (int t = 0; t < TOKENS; t++) {
    if (t >= tokens) break;
    const float normed = (NORM ? rsqrt(squares[t] / float(K) + EPS) : 1.0f) * GROW;
    UNROLL
    for (int r = 0; r < OUTS; r++) {
      const int n = first + r * APART;
      float value = acc[t][r] * normed;
      if (GLU) value = gelu(value) * (acc[t][GLU ? r + OUTS : r] * normed);
      const uint at = uint(slot * TOKENS + t) * uint(outs) + uint(n);
#if TIMES
      if (n < outs) value = gelu(value) * float(times[at]);
#endif
      if (n < outs) y[at] = U(WITHIN_U(value * FACTOR));
    }
  }
}
