// A chunk of 32 packed weights as pairs of halves, first factors of matrix.metal.
//
// Two codes 16 bits apart become two halves by one mask, without conversions, and meet x in the order of such pairs:
// pair i of a chunk is of its codes (i / APART * 2 APART + i % APART) and APART further on.
//
// Exactness. Of k-quants a pair is code * scale as whole numbers that fp16 holds; their blocks' fp16 d is for after the
// product, of 128 weights or 256. Of other types, and with FOLD, it is d * (code - OFFSET), rounded to fp16 once or twice.
//
// Rendered before: a format with CHUNK 32, as for packed.metal, which stands before this; FOLD, AHEAD. Needs matrix.metal.

// With FOLD also of k-quants, mins and all: what many rows of x would do after each product is done before.
#if FOLD && (GROUP_SCALE_SCALE_MIN || GROUP_SCALE_INT8 || GROUP_SCALE_SCALE_32)
#define FOLDED 1
#else
#define FOLDED 0
#endif
#define AFTER (!FOLDED && (SCALE_BLOCK == 256 || ROW_SCALE))  // d, or a row's factor, comes after the product
#define SUMMED (HAS_MIN && !FOLDED)                           // mins meet sums of x
#define GROUPS (GROUP == 16 ? 2 : 1)          // scales of a chunk
#define RUN (16 / BITS)                       // codes in 16 bits
#define VALUED (HAS_LUT || RULE)              // codes are not numbers to multiply with
#define FAR (!RULE && (BITS == 3 || BITS == 5 || BITS == 6))
// Pairs are codes APART of each other: 16 bits of a word; where these hold no whole codes, halves of a chunk; and of a
// table's or a grid's codes neighbours, which it is read for at once.
#define APART (VALUED ? 1 : FAR ? 16 : RUN)
// Where code * scale is a whole number: without an offset, a code's bits may lie at either end of the mantissa.
#if GROUP_SCALE_SCALE_MIN
#define WHOLE 1
#define IN_PLACE (2 * BITS <= 10)
#else
#define WHOLE (SCALE_BLOCK == 256 && !VALUED)
#define IN_PLACE 0
#endif

#ifndef CUDA
// a b + c, rounded once, and a b, a + b, of two halves each. cuda.h has CUDA's.
METAL_FUNC uint fma_halves(uint a, uint b, uint c) {
  return as_type<uint>(fma(as_type<half2>(a), as_type<half2>(b), as_type<half2>(c)));
}
METAL_FUNC uint mul_halves(uint a, uint b) { return as_type<uint>(as_type<half2>(a) * as_type<half2>(b)); }
METAL_FUNC uint add_halves(uint a, uint b) { return as_type<uint>(as_type<half2>(a) + as_type<half2>(b)); }
#endif

METAL_FUNC uint both(half a) { return pair(a, a); }
METAL_FUNC uint both_firsts(uint a) { return firsts(a, a); }
METAL_FUNC uint both_seconds(uint a) { return seconds(a, a); }

// The codes of a chunk such that those of a pair lie at the same place of 16 bits each.
METAL_FUNC void aligned(const thread uint* codes, thread uint* m) {
  UNROLL
  for (int i = 0; i < BITS; i++) {
    if (FAR) {
      const uint a = codes[i / 2], b = codes[(i + BITS) / 2];
      const bool upper = i % 2 == 1, b_upper = (i + BITS) % 2 == 1;
      m[i] = upper == b_upper ? (upper ? seconds(a, b) : firsts(a, b))
                              : (upper ? a >> 16 | b << 16 : (a & 0xFFFFu) | (b & 0xFFFF0000u));
    } else {
      m[i] = codes[i];
    }
  }
}

// The place in the mantissa of pair q's codes: 0, or BITS, or the top.
METAL_FUNC int place_of(int q) {
  const int s = q * BITS % 16;
  return !IN_PLACE ? 10 - BITS : s + BITS <= 16 && s / BITS % 2 == 1 ? BITS : 0;
}

// Pair q's codes as halves: 2^BITS + code at the top of the mantissa, 1024 + code * 2^place elsewhere. ones: EXPONENTS.
#define EXPONENTS ((IN_PLACE ? 25u : 15u + BITS) * 0x04000400u)
#if !RULE
METAL_FUNC uint raised_pair(const thread uint* m, int q, uint ones) {
  const int at = q * BITS, word = at / 16, s = at % 16, place = place_of(q);
  if (s + BITS <= 16) {
    const uint mask = ((1u << BITS) - 1) << place;
    const uint u = s >= place ? m[word] >> (s >= place ? s - place : 0) : m[word] << (s >= place ? 0 : place - s);
    return (u & (mask | mask << 16)) | ones;
  }
  const int low = 16 - s;  // bits in the first word
  const uint mask = ((1u << low) - 1) << place, mask2 = ((1u << (BITS - low)) - 1) << (place + low);
  const uint u = s >= place ? m[word] >> (s >= place ? s - place : 0) : m[word] << (s >= place ? 0 : place - s);
  const uint u2 = m[FAR ? word + 1 : word] << (place + low);
  return (u2 & (mask2 | mask2 << 16)) | ((u & (mask | mask << 16)) | ones);
}
#endif

// What a row's chunk needs beside its codes.
struct Scale {
  uint by[GROUPS];   // pairs of halves: what multiplies a group's codes at the top of the mantissa, or at place 0
  uint add[GROUPS];  // and what is added then, or before
  uint by_high[GROUPS], add_high[GROUPS];  // the same at place BITS
  uint mins[GROUPS];
  float d, m;        // for after the product
  uint field;
};

METAL_FUNC void scale_of(const thread Chunk& chunk, thread Scale& s) {
  const uint field = chunk.group_scales, top = chunk.block_scales[0];
  s.d = ROW_SCALE ? as_type<float>(top) : low_half(top);
  s.m = HAS_MIN ? high_half(top) : 0.0f;
  s.field = field;
  UNROLL
  for (int i = 0; i < GROUPS; i++) s.mins[i] = 0;
#if GROUP_SCALE_SCALE_MIN
  const uint bits = GROUP_SCALE_BITS / 2, mask = (1u << bits) - 1;
  UNROLL
  for (int i = 0; i < GROUPS; i++) {
    const uint f = field >> (GROUP_SCALE_BITS * i);
    // 1024 + scale, 1024 + min as halves, less 1024
    const uint two = add_halves((f & mask) | (f << (16 - bits) & mask << 16) | 0x64006400u, 0xE400E400u);
#if FOLDED
    const uint scaled = mul_halves(two, top);
    s.by[i] = both_firsts(scaled);
    s.add[i] = both_seconds(scaled) ^ 0x80008000u;
  }
#else
    s.by[i] = both_firsts(two);
    s.mins[i] = both_seconds(two);
    s.add[i] = mul_halves(s.by[i], both(half(-1024.0f)));
    s.by_high[i] = mul_halves(s.by[i], both(half(1.0f / float(1 << BITS))));
    s.add_high[i] = mul_halves(s.add[i], both(half(1.0f / float(1 << BITS))));
  }
#endif
#elif GROUP_SCALE_INT8
  // bytes as 1024 + 128 + scale
  uint two = add_halves((((field & 0xFFu) | (field & 0xFF00u) << 8) ^ 0x00800080u) | 0x64006400u, 0xE480E480u);
#elif GROUP_SCALE_SCALE_32
  uint two = add_halves((field & 63u) | (field << 10 & 63u << 16) | 0x64006400u, 0xE420E420u);
#elif GROUP_SCALE_UE4M3 || GROUP_SCALE_ODD
  UNROLL
  for (int i = 0; i < GROUPS; i++) {
#if GROUP_SCALE_UE4M3
    s.by[i] = both(half(ue4m3((field >> (8 * i)) & 0xFFu)));
#else
    s.by[i] = both(half(odd_scale(field, i)));
#endif
  }
#if GROUP_SCALE_ODD
  s.d *= SCALE_FACTOR;
#endif
#elif GROUP_SCALE_E8M0
  float a, b;
  scales(field, top, 0, a, b);
  s.by[0] = both(half(a));
#elif AFTER
  s.by[0] = both(half(1.0f));
  s.add[0] = both(half(-float((1 << BITS) + OFFSET)));
#else
  s.by[0] = both_firsts(top);
  if (HAS_MIN) s.mins[0] = both_seconds(top);
#endif
#if GROUP_SCALE_INT8 || GROUP_SCALE_SCALE_32
  if (FOLDED) two = mul_halves(two, both_firsts(top));
  UNROLL
  for (int i = 0; i < GROUPS; i++) {
    // Of groups of 16, pairs have one code in each where they are far apart.
    s.by[i] = GROUPS == 2 && FAR ? two : i == 0 ? both_firsts(two) : both_seconds(two);
    s.add[i] = mul_halves(s.by[i], both(half(-float((1 << BITS) + OFFSET))));
  }
#endif
}

#if RULE && GRID
#define TABLE_PARAMETER , const threadgroup GRID_TYPE* table
#define TABLE , table
#elif HAS_LUT
#define TABLE_PARAMETER , const threadgroup uint* table  // two codes -> their values
#define TABLE , table
#else
#define TABLE_PARAMETER
#define TABLE
#endif

// Pair q of a row's chunk: what meets x.
METAL_FUNC uint weight_pair(
    const thread uint* m, const thread Scale& s, int q, uint ones TABLE_PARAMETER) {
  const int group = GROUPS == 2 ? q / 8 : 0;
#if RULE
  EIGHT_BYTES(table, m, s.field, q / 4, eight)
  const uint u = eight[q % 4 / 2] >> (q % 2 * 16);  // into the mantissa of 1024 / 2^BYTE_STEP
  const uint raised = 0x64006400u - 0x04000400u * BYTE_STEP;
  return mul_halves(add_halves((u & 0xFFu) | (u & 0xFF00u) << 8 | raised, raised + 0x80808080u), s.by[group]);
#elif HAS_LUT
  return mul_halves(table[m[q / 4] >> (q % 4 * 8) & 0xFFu], s.by[group]);
#elif FOLDED && HAS_MIN
  // 1024 + code * 2^place, or 2^BITS + code, to code
  const bool high = IN_PLACE && place_of(q) != 0;
  const half part = half(1.0f / float(1 << BITS)), less = half(IN_PLACE ? -1024.0f : -float(1 << BITS));
  const uint raised = raised_pair(m, q, ones);
  const uint code = high ? fma_halves(raised, both(part), both(half(-1024.0f * float(part)))) : add_halves(raised, both(less));
  return fma_halves(code, s.by[group], s.add[group]);
#elif WHOLE && !FOLDED
  const bool high = IN_PLACE && place_of(q) != 0;
  return fma_halves(raised_pair(m, q, ones), high ? s.by_high[group] : s.by[group], high ? s.add_high[group] : s.add[group]);
#else
  return mul_halves(add_halves(raised_pair(m, q, ones), both(half(-float((1 << BITS) + OFFSET)))), s.by[group]);
#endif
}

#if AHEAD && defined(CUDA)  // for what is read a step before it is looked at
#if GROUP_SCALE_BITS
// What load_group_scales (packed.metal) does, in two: PIECES loads, and the fields of what they bring.
#define PIECES (FIELD == 8 || FIELD == 16 || FIELD == 32 ? 1 : FIELD == 24 ? 3 : FIELD == 20 || FIELD == 22 ? 4 : 2)
#define FIELD_BYTE(c) (FIELD == 6 ? c / 4 * 3 + (c / 2) % 2 : c * FIELD / 8)
METAL_FUNC void load_pieces(const device uchar* p, int c, thread uint* pieces) {
  if (CHUNK < GROUP) c /= GROUP / CHUNK;
#if FIELD == 16
  pieces[0] = ((const device ushort*)p)[c];
#elif FIELD == 32
  pieces[0] = ((const device uint*)p)[c];
#else
  UNROLL
  for (int i = 0; i < PIECES; i++) pieces[i] = i < 3 || c * FIELD % 8 + FIELD > 24 ? p[FIELD_BYTE(c) + i] : 0;
#endif
}

METAL_FUNC uint fields_of(const thread uint* pieces, int c) {
  if (CHUNK < GROUP) c /= GROUP / CHUNK;
  uint u = pieces[0];
  UNROLL
  for (int i = 1; i < PIECES; i++) u |= pieces[i] << (8 * i);
  return PIECES == 1 ? u : u >> (c * FIELD - 8 * FIELD_BYTE(c));
}
#else
#define PIECES 1
#endif

// `aligned` of a chunk's codes in threadgroup memory: VEC words of all lanes side by side, then the next.
METAL_FUNC void aligned_staged(const threadgroup uint* p, thread uint* m) {
  uint w[WORDS];
  UNROLL
  for (int i = 0; i < WORDS; i += VEC) {
#if VEC == 4
    const uint4 u = *(const threadgroup uint4*)(p + 32 * i);
    w[i] = u.x;
    w[i + 1] = u.y;
    w[i + 2] = u.z;
    w[i + 3] = u.w;
#elif VEC == 2
    const uint2 u = *(const threadgroup uint2*)(p + 32 * i);
    w[i] = u.x;
    w[i + 1] = u.y;
#else
    w[i] = p[32 * i];
#endif
  }
  aligned(w, m);
}
#endif
