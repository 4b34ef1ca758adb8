// A chunk of a packed row as it lies in memory, and its scales: for kernels that read weights a chunk at a time.
//
// Rendered before: CHUNK (weights of a chunk: 32 or a multiple, or part of a group), VEC (words of a load), a packed
// format: BITS, GROUP, GROUP_SCALE_BITS, SCALE_BLOCK, BLOCK_NUMBERS (1 or 2 fp16 numbers of a block), ROW_SCALE (these
// are an fp32 factor of the row), OFFSET, HAS_MIN, HAS_LUT, GROUP_SCALE_*. Without BITS, empty.
//
// Formats with RULE have codes that stand for several weights, CHUNK 32, and one of VALUES_*: eight weights become bytes.
// Those with a GRID (its length) have GRID_EACH weights in an entry of it: a byte each, or 2 bits each of 16 (IQ1).

#ifdef BITS
#define WORDS (CHUNK * BITS / 32)                      // of codes, a lane, a row and a step
#define SPAN (CHUNK < GROUP ? CHUNK : GROUP)           // weights that share a scale
#define SPANS (CHUNK / SPAN)                           // of them in a chunk
#define BLOCK_SCALES (SCALE_BLOCK == 32 && CHUNK > 32 ? CHUNK / 32 : 1)  // fp16 scales (or pairs) in a chunk

// What a lane reads of one row in one step, as it lies in memory.
struct Chunk {
  uint codes[WORDS];
  uint group_scales;
  uint block_scales[BLOCK_SCALES];
};

// Codes of one chunk, in loads of VEC words.
METAL_FUNC void load_codes(const device uint* p, thread uint* w) {
  UNROLL
  for (int i = 0; i < WORDS; i += VEC) {
#if VEC == 4
    const uint4 u = *(const device uint4*)(p + i);
    w[i] = u.x;
    w[i + 1] = u.y;
    w[i + 2] = u.z;
    w[i + 3] = u.w;
#elif VEC == 2
    const uint2 u = *(const device uint2*)(p + i);
    w[i] = u.x;
    w[i + 1] = u.y;
#else
    w[i] = p[i];
#endif
  }
}

#if GROUP_SCALE_BITS
// The per-group fields of chunk c of a row, first group in the lowest bits.
METAL_FUNC uint load_group_scales(const device uchar* p, int c) {
#define FIELD (SPANS * GROUP_SCALE_BITS)
#if CHUNK < GROUP
  c /= GROUP / CHUNK;
#endif
#if FIELD == 8
  return p[c];
#elif FIELD == 16
  return ((const device ushort*)p)[c];
#elif FIELD == 32
  return ((const device uint*)p)[c];
#elif FIELD == 24
  return uint(p[3 * c]) | uint(p[3 * c + 1]) << 8 | uint(p[3 * c + 2]) << 16;
#elif FIELD == 20 || FIELD == 22
  const int o = c * FIELD / 8, shift = c * FIELD % 8;
  const uint three = uint(p[o]) | uint(p[o + 1]) << 8 | uint(p[o + 2]) << 16;
  return (shift + FIELD > 24 ? three | uint(p[o + 3]) << 24 : three) >> shift;
#else
  // 6 or 12 bits: two bytes that hold them and end inside the row.
  const int o = FIELD == 12 ? c * 12 / 8 : c / 4 * 3 + (c / 2) % 2;
  return (uint(p[o]) | uint(p[o + 1]) << 8) >> (c * FIELD - o * 8);
#endif
}
#endif

#if SCALE_BLOCK
// fp16 scale, or scale and min, of block_scales block i of a row; or the row's factor.
METAL_FUNC uint load_block_scales(const device half* p, int i) {
#if BLOCK_NUMBERS == 2
  return ((const device uint*)p)[i];
#else
  return ((const device ushort*)p)[i];
#endif
}
#endif

#if GROUP_SCALE_UE4M3
// 4 bits of exponent (bias 7) and 3 of mantissa, halved as the table is doubled.
METAL_FUNC float ue4m3(uint x) {
  const uint e = (x >> 3) & 15u, m = x & 7u;
  if (x == 0x7Fu) return 0.0f;
  return e == 0 ? float(m) * 0.0009765625f : as_type<float>((e + 119u) << 23 | m << 20);
}
#endif

#if RULE
// 2 s + 1 for the scale s of group g of a chunk.
METAL_FUNC float odd_scale(uint group_scales, int g) {
  return float(2 * ((group_scales >> (GROUP_SCALE_BITS * g + SCALE_AT)) & SCALE_MASK) + 1);
}

#if GRID
// The place in the grid of entry n of a chunk, whose codes are w.
METAL_FUNC uint grid_place(const thread uint* w, uint field, int n) {
#if VALUES_IQ2_XS
  return (w[n / 2] >> (n % 2 * 16)) & 511u;
#else
  const uint low = (w[n / 4] >> (n % 4 * 8)) & 255u;
#if VALUES_IQ2_S
  return low | ((field >> (n / 2 * 8 + n % 2 * 2)) & 3u) << 8;
#elif VALUES_IQ3_S
  return low | ((field >> n) & 1u) << 8;
#elif VALUES_IQ1_S
  return low | ((field >> (3 * n)) & 7u) << 8;
#elif VALUES_IQ1_M
  return low | ((field >> (n / 2 * 11 + n % 2 * 4)) & 7u) << 8;
#else  // IQ2_XXS, IQ3_XXS
  return low;
#endif
#endif
}
#endif

// Bits 0 to 3, of 7 at most, as bytes, 0 or 1.
METAL_FUNC uint bits_as_bytes(uint n) { return n * 0x00204081u & 0x01010101u; }

#if VALUES_IQ1_S || VALUES_IQ1_M
// True if weights 8 i to 8 i + 7 are an eighth less than their places, not more.
METAL_FUNC bool is_less(uint field, int i) {
#if VALUES_IQ1_S
  return (field >> 15) & 1u;
#else
  return (field >> (i / 2 * 11 + i % 2 * 4 + 3)) & 1u;
#endif
}
#elif GRID
// The signs of weights 8 i to 8 i + 7, a bit each: of the first four in low, with others above, and of the last in high.
METAL_FUNC void signs_of(const thread uint* w, uint field, int i, thread uint& low, thread uint& high) {
#if VALUES_IQ2_S || VALUES_IQ3_S
  low = (w[WORDS - 1] >> (8 * i)) & 127u;
  high = (w[WORDS - 1] >> (8 * i + 4)) & 15u;
#else
  // Seven signs; the eighth makes the number of minus signs even. 0x6996 has the parity of each 4 bits.
#if VALUES_IQ2_XS
  low = (w[i / 2] >> (i % 2 * 16 + 9)) & 127u;
#else
  low = (field >> (7 * i)) & 127u;
#endif
  high = low >> 4 | (((0x6996u << 3) >> ((low ^ low >> 4) & 15u)) & 8u);
#endif
}
#endif

// Eight weights of a chunk, from 8 i on, but for their scale: as bytes of b, each 128 + 2^BYTE_STEP value. b comes with
// what the grid has for them.
METAL_FUNC void eight_bytes(const thread uint* w, uint field, int i, thread uint* b) {
#if VALUES_Q1_0  // 1 or -1
  UNROLL
  for (int n = 0; n < 2; n++) b[n] = 0x40404040u + 128 * bits_as_bytes((w[0] >> (8 * i + 4 * n)) & 15u);
#elif VALUES_TQ1_0
  // Trit n of a byte is at the top of byte * 3^n mod 256. Bytes 0 to 3, 4 and 5, and the upper half of 6 have 5 each.
  UNROLL
  for (int n = 0; n < 2; n++) {
    b[n] = 0x40404040u;
    UNROLL
    for (int j = 0; j < 4; j++) {
      const int k = 8 * i + 4 * n + j, byte = k / 5, t = k % 5;
      const uint bits = byte < 4 ? w[0] >> (byte * 8) : byte < 6 ? field >> ((byte - 4) * 8) : field >> 16 << 4;
      const uint power = t == 0 ? 1 : t == 1 ? 3 : t == 2 ? 9 : t == 3 ? 27 : 81;
      b[n] += ((bits * power & 255u) * 3 >> 8) << (8 * j + 6);
    }
  }
#elif VALUES_IQ1_S || VALUES_IQ1_M
  // place - 1, and an eighth more, or less. The places' 2 bits move to bytes of their own.
  const uint places = b[0];
  UNROLL
  for (int n = 0; n < 2; n++) {
    uint u = (places >> (8 * n)) & 255u;
    u = (u | u << 12) & 0x000F000Fu;
    u = (u | u << 6) & 0x03030303u;
    b[n] = u * 64 + (is_less(field, i) ? 0x38383838u : 0x48484848u);
  }
#else
  uint signs[2];
  signs_of(w, field, i, signs[0], signs[1]);
  UNROLL
  for (int n = 0; n < 2; n++) {  // 128 + v is v ^ 128, 128 - v is (v ^ 127) + 1
    const uint minus = bits_as_bytes(signs[n]);
    b[n] = (b[n] ^ (0x80808080u - minus)) + minus;
  }
#endif
}

// eight_bytes by way of a grid in any memory: 8 weights are two entries of a word, or one of two words, or half a word.
#if GRID && GRID_EACH == 4
#define FROM_GRID(grid, w, field, i, b)                \
  b[0] = grid[grid_place(w, field, 2 * (i))];          \
  b[1] = grid[grid_place(w, field, 2 * (i) + 1)];
#elif VALUES_IQ1_S || VALUES_IQ1_M
#define FROM_GRID(grid, w, field, i, b) b[0] = uint(grid[grid_place(w, field, i)]);
#elif GRID
#define FROM_GRID(grid, w, field, i, b)                \
  b[0] = grid[2 * grid_place(w, field, i)];            \
  b[1] = grid[2 * grid_place(w, field, i) + 1];
#else
#define FROM_GRID(grid, w, field, i, b)
#endif
#define EIGHT_BYTES(grid, w, field, i, b)              \
  uint b[2];                                           \
  FROM_GRID(grid, w, field, i, b)                      \
  eight_bytes(w, field, i, b);

// Byte j of eight as what it stands for: its bits go into the mantissa of 2^23 / 2^BYTE_STEP, since a conversion is slow.
METAL_FUNC float value_of(const thread uint* b, int j) {
  const uint raised = (0x4B000000u - (BYTE_STEP << 23)) | ((b[j / 4] >> (j % 4 * 8)) & 255u);
  return as_type<float>(raised) - 8388736.0f / float(1 << BYTE_STEP);
}
#endif

// Weight = a code + b for group g of a chunk (a look-up type: a value(code)), but for the offset.
METAL_FUNC void scales(uint group_scales, uint block_scales, int g, thread float& a, thread float& b) {
  b = 0;
#if GROUP_SCALE_E8M0  // a power of two, halved as the table is doubled
  const uint e = (group_scales >> (8 * g)) & 0xFFu;
  a = as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#elif GROUP_SCALE_UE4M3
  a = as_type<float>(block_scales) * ue4m3((group_scales >> (8 * g)) & 0xFFu);
#elif GROUP_SCALE_ODD
  a = low_half(block_scales) * SCALE_FACTOR * odd_scale(group_scales, g);
#elif GROUP_SCALE_SCALE_MIN
  const uint field = group_scales >> (GROUP_SCALE_BITS * g), mask = (1u << (GROUP_SCALE_BITS / 2)) - 1;
  a = low_half(block_scales) * float(field & mask);
  b = -high_half(block_scales) * float((field >> (GROUP_SCALE_BITS / 2)) & mask);
#elif GROUP_SCALE_INT8
  a = low_half(block_scales) * float(int(group_scales << (24 - 8 * g)) >> 24);
#elif GROUP_SCALE_SCALE_32
  a = low_half(block_scales) * float(int((group_scales >> (6 * g)) & 63u) - 32);
#else
  a = low_half(block_scales);
  if (HAS_MIN) b = high_half(block_scales);
#endif
}
#endif
