// A chunk of a packed row as it lies in memory, and its scales: for kernels that read weights a chunk at a time.
//
// Rendered before: CHUNK (weights of a chunk: 32 or a multiple, or part of a group), VEC (words of a load), a packed
// format: BITS, GROUP, GROUP_SCALE_BITS, SCALE_BLOCK, OFFSET, HAS_MIN, HAS_LUT, GROUP_SCALE_*. Without BITS, empty.

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
#else
  // 6 or 12 bits: two bytes that hold them and end inside the row.
  const int o = FIELD == 12 ? c * 12 / 8 : c / 4 * 3 + (c / 2) % 2;
  return (uint(p[o]) | uint(p[o + 1]) << 8) >> (c * FIELD - o * 8);
#endif
}
#endif

#if SCALE_BLOCK
// fp16 scale, or scale and min, of block_scales block i of a row.
METAL_FUNC uint load_block_scales(const device half* p, int i) {
#if HAS_MIN
  return ((const device uint*)p)[i];
#else
  return ((const device ushort*)p)[i];
#endif
}
#endif

// Weight = a code + b for group g of a chunk (a look-up type: a value(code)), but for the offset.
METAL_FUNC void scales(uint group_scales, uint block_scales, int g, thread float& a, thread float& b) {
  b = 0;
#if GROUP_SCALE_E8M0  // a power of two, halved as the table is doubled
  const uint e = (group_scales >> (8 * g)) & 0xFFu;
  a = as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
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
