// Repack the blocks of a quantized tensor, as a GGUF has them, to the planes that the other kernels read.
//
// Rendered before: SIZE (weights of a block), N_BYTES (bytes of a block), BITS (of a code), CODE(block, c) (code c of a
// block, put together by `take`) or WORD_AT(c, w) (the byte where the file has word w of the c-th 32 codes) or
// CODE_TQ1_0, BLOCK_SCALES (0, 1 or 2 fp16 numbers of a block, at its bytes BLOCK_SCALE_0 and BLOCK_SCALE_1; or
// BLOCK_SCALE_NIBBLES, of the upper halves of 4 bytes 2 apart), GROUP_SCALE_BYTES (of a block's group scales, 0 if it
// has none), NUMBER_BITS (of one), GROUP_SCALE_AT (the byte where the file has them) and one of GROUP_SCALE_PLAIN and
// the names of other readers in quant/repack.py (how).
//
// kernel pack: threads, one for each word of codes; the first of a block's also make an fp16 number each, and all of
// them the bytes of its group scales. Threadgroup of 256, grid (256 ceil(blocks WORDS / 256), 1, 1). Memory: every block
// once (a word's bytes come one by one, but its neighbours' are in the same cache lines), every plane once.

#define WORDS (SIZE * BITS / 32)  // of a block's codes

// `bits` bits of code c, of a plane as quant/repack.py describes it.
METAL_FUNC uint take(const device uchar* block, uint c, uint at, uint bits, uint run) {
  const uint codes = run * 8 / bits;  // in a run of bytes
  const uint place = c % codes;
  const uint byte = uint(block[at + c / codes * run + place % run]);
  return (byte >> (place / run * bits)) & ((1u << bits) - 1);
}

#if CODE_TQ1_0
// Weight e of a block, a trit: 32 bytes hold those from 0 on, 16 those from 160 on, 4 those from 240 on, each such as
// are 32, 16 or 4 apart. The byte times 3^n, mod 256, has the n-th at its top.
METAL_FUNC uint trit(const device uchar* block, uint e) {
  const uint first = e < 160 ? 0 : e < 240 ? 160 : 240, apart = e < 160 ? 32 : e < 240 ? 16 : 4;
  uint byte = uint(block[first / 5 + (e - first) % apart]);
  for (uint n = (e - first) / apart; n > 0; n--) byte *= 3;
  return ((byte & 255u) * 3) >> 8;
}

// Weights from e on as a fraction of 2^bits: 5 trits in 8 bits, 2 in 4.
METAL_FUNC uint trits(const device uchar* block, uint e, uint count, uint bits) {
  uint whole = 0, all = 1;
  for (uint i = 0; i < count; i++) {
    whole = whole * 3 + trit(block, e + i);
    all *= 3;
  }
  return ((whole << bits) + all - 1) / all;
}
#endif

// Number n of a block's stream of group scales, for formats whose stream is not the file's bytes.
#if GROUP_SCALE_BYTES && !GROUP_SCALE_PLAIN
METAL_FUNC uint number(const device uchar* from, uint n) {
#if GROUP_SCALE_Q4_K
  // 8 pairs of scale and min. The file: d (scales) and m (mins), then x, 4 bytes each. Groups 0-3 are the lower 6 bits
  // of d and m; groups 4-7 have their lower 4 bits in x (scale low, min high), their upper 2 in the top of d and m.
  const uint group = n / 2, min = n % 2;
  const uint top = uint(from[group % 4 + 4 * min]);
  return group < 4 ? top & 63 : ((uint(from[group + 4]) >> (4 * min)) & 15) | (top >> 6) << 4;
#elif GROUP_SCALE_Q3_K
  // 16 scales: lower halves in 8 bytes (n, n + 8), then the upper 2 bits in 4 bytes (n, n + 4, n + 8, n + 12).
  return ((uint(from[n % 8]) >> (n / 8 * 4)) & 15) | ((uint(from[8 + n % 4]) >> (n / 4 * 2)) & 3) << 4;
#elif GROUP_SCALE_IQ4_XS
  // 8 scales: the upper 2 bits in 2 bytes, then the lower 4 in 4, in order.
  return ((uint(from[2 + n / 2]) >> (n % 2 * 4)) & 15) | ((uint(from[n / 4]) >> (n % 4 * 2)) & 3) << 4;
#elif GROUP_SCALE_IQ2_XXS  // a byte: the last 4 of each 8
  return uint(from[n / 4 * 8 + 4 + n % 4]);
#elif GROUP_SCALE_IQ2_S  // 4 upper bits of indices from the first 8 bytes, 4 of scale from the others
  return ((uint(from[n / 2]) >> (n % 2 * 4)) & 15) | ((uint(from[8 + n / 2]) >> (n % 2 * 4)) & 15) << 4;
#elif GROUP_SCALE_IQ3_S  // 8 top bits of indices, 4 of scale; between them the file has 32 bytes of signs
  return uint(from[n]) | ((uint(from[40 + n / 2]) >> (n % 2 * 4)) & 15) << 8;
#elif GROUP_SCALE_IQ1_M  // 8 bits about two indices; 3 of scale from words of 16 bits that have 4, and 4 bits of d
  const uint word = uint(from[16 + n / 4 * 2]) | uint(from[17 + n / 4 * 2]) << 8;
  return uint(from[n]) | ((word >> (n % 4 * 3)) & 7) << 8;
#else  // GROUP_SCALE_TQ1_0: the last 12 of each 32 weights
  return trits(from, n * 32 + 20, 5, 8) | trits(from, n * 32 + 25, 5, 8) << 8 | trits(from, n * 32 + 30, 2, 4) << 16;
#endif
}
#endif

// kernel: pack(raw) -> (codes, group_scales?, block_scales?)
// raw uint8 [blocks N_BYTES] -> codes uint32 [blocks WORDS], group_scales uint8 [blocks GROUP_SCALE_BYTES],
// block_scales half [blocks BLOCK_SCALES].
const uint i = uint(threadgroup_position_in_grid.x) * 256 + uint(thread_index_in_threadgroup);
const uint b = i / WORDS, j = i % WORDS;
if (b < uint(raw_shape[0]) / N_BYTES) {
  const device uchar* block = raw + ulong(b) * N_BYTES;

  uint word = 0;
#if CODE_TQ1_0
  UNROLL
  for (uint n = 0; n < 4; n++) word |= trits(block, j * 32 + n * 5, 5, 8) << (8 * n);
#elif defined(WORD_AT)
  const uint at = WORD_AT(j / BITS, j % BITS);
  UNROLL
  for (uint n = 0; n < 4; n++) word |= uint(block[at + n]) << (8 * n);
#else
  // The codes that have bits in word j; the first and the last may have some in its neighbours.
  const int first = int(j * 32 / BITS);
  UNROLL
  for (int n = 0; n < (30 + 2 * BITS) / BITS; n++) {
    const int c = first + n, at = c * BITS - int(j) * 32;
    if (at < 32) {
      const uint code = CODE(block, uint(c));
      word |= at < 0 ? code >> -at : code << at;
    }
  }
#endif
  codes[i] = word;

#if GROUP_SCALE_BYTES
  const device uchar* scales_from = block + GROUP_SCALE_AT;
  for (uint byte = j; byte < GROUP_SCALE_BYTES; byte += WORDS) {
#if GROUP_SCALE_PLAIN
    group_scales[b * GROUP_SCALE_BYTES + byte] = scales_from[byte];
#else
    // Eight bits, of one number or two.
    const uint n = byte * 8 / NUMBER_BITS, shift = byte * 8 % NUMBER_BITS;
    uint bits = number(scales_from, n) >> shift;
    if (shift + 8 > NUMBER_BITS) bits |= number(scales_from, n + 1) << (NUMBER_BITS - shift);
    group_scales[b * GROUP_SCALE_BYTES + byte] = uchar(bits & 255);
#endif
  }
#endif

#if BLOCK_SCALES
  if (j < BLOCK_SCALES) {
#if BLOCK_SCALE_NIBBLES
    const device uchar* from = block + BLOCK_SCALE_0;
    const uint low = uint(from[0]) >> 4 | uint(from[2] & 0xF0), high = uint(from[4]) >> 4 | uint(from[6] & 0xF0);
    block_scales[b] = as_type<half>(ushort(low | high << 8));
#else
    const device uchar* from = block + (j == 0 ? BLOCK_SCALE_0 : BLOCK_SCALE_1);
    block_scales[b * BLOCK_SCALES + j] = as_type<half>(ushort(uint(from[0]) | uint(from[1]) << 8));
#endif
  }
#endif
}
