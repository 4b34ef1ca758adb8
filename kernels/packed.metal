// A stretch of a packed row as it stands in memory, and what scales it: for kernels that read weights a stretch at a time.
//
// Rendered before: CHUNK (weights of a stretch: 32 or a multiple, or part of a group), VEC (words of a load), a packed format:
// BITS, GROUP, SUB_BITS, SUPER, OFFSET, HAS_MIN, HAS_LUT, SUB_*; without BITS, nothing is left of this.

#ifdef BITS
#define WORDS (CHUNK * BITS / 32)                      // of codes, a lane, a row and a step
#define SPAN (CHUNK < GROUP ? CHUNK : GROUP)           // weights that share a scale
#define SPANS (CHUNK / SPAN)                           // of them in a chunk
#define SUPERS (SUPER == 32 && CHUNK > 32 ? CHUNK / 32 : 1)  // fp16 scales (or pairs) in a chunk

// What a lane reads of one row in one step, as it stands in memory.
struct Chunk {
  uint codes[WORDS];
  uint sub;
  uint super[SUPERS];
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

#if SUB_BITS
// The per-group fields of chunk c of a row, first group in the lowest bits.
METAL_FUNC uint load_sub(const device uchar* p, int c) {
#define FIELD (SPANS * SUB_BITS)
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

#if SUPER
// fp16 scale, or scale and min, of super block i of a row.
METAL_FUNC uint load_super(const device half* p, int i) {
#if HAS_MIN
  return ((const device uint*)p)[i];
#else
  return ((const device ushort*)p)[i];
#endif
}
#endif

// Weight = a code + b for group g of a chunk (a look-up type: a value(code)), but for the offset.
METAL_FUNC void scales(uint sub, uint super, int g, thread float& a, thread float& b) {
  b = 0;
#if SUB_E8M0  // a power of two, halved as the table is doubled
  const uint e = (sub >> (8 * g)) & 0xFFu;
  a = as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#elif SUB_SCALE_MIN
  const uint field = sub >> (SUB_BITS * g), mask = (1u << (SUB_BITS / 2)) - 1;
  a = low_half(super) * float(field & mask);
  b = -high_half(super) * float((field >> (SUB_BITS / 2)) & mask);
#elif SUB_INT8
  a = low_half(super) * float(int(sub << (24 - 8 * g)) >> 24);
#elif SUB_SCALE_32
  a = low_half(super) * float(int((sub >> (6 * g)) & 63u) - 32);
#else
  a = low_half(super);
  if (HAS_MIN) b = high_half(super);
#endif
}
#endif
