// Repack the blocks of a quantized tensor, as a GGUF has them, to the planes that the other kernels read.
//
// Rendered before: SIZE (weights of a block), N_BYTES (bytes of a block), BITS (of a code), CODE(block, c) (code c of a
// block, put together by `take`), BLOCK_SCALES (0, 1 or 2 fp16 numbers of a block, at its bytes BLOCK_SCALE_0 and
// BLOCK_SCALE_1), GROUP_SCALE_BYTES (of a block's group scales, 0 if it has none), GROUP_SCALE_AT (the byte where the
// file has them) and one of GROUP_SCALE_PLAIN, GROUP_SCALE_Q4_K, GROUP_SCALE_Q3_K, GROUP_SCALE_IQ4_XS (how).
//
// kernel pack: threads, one for each word of codes; the first of a block's also make a byte of its group scales and an
// fp16 number each. Threadgroup of 256, grid (256 ceil(blocks WORDS / 256), 1, 1). Memory: every block once (a word's
// bytes come one by one, but its neighbours' are in the same cache lines), every plane once.

#define WORDS (SIZE * BITS / 32)  // of a block's codes

// `bits` bits of code c, of a plane as quant/repack.py describes it.
METAL_FUNC uint take(const device uchar* block, uint c, uint at, uint bits, uint run) {
  const uint codes = run * 8 / bits;  // in a run of bytes
  const uint place = c % codes;
  const uint byte = uint(block[at + c / codes * run + place % run]);
  return (byte >> (place / run * bits)) & ((1u << bits) - 1);
}

// Number n of a block's stream of group scales, for formats whose stream has six bits a number.
METAL_FUNC uint six_bits(const device uchar* from, uint n) {
#if GROUP_SCALE_Q4_K
  // 8 pairs of scale and min. The file: d (scales) and m (mins), then x, 4 bytes each. Groups 0-3 are the lower 6 bits
  // of d and m; groups 4-7 have their lower 4 bits in x (scale low, min high), their upper 2 in the top of d and m.
  const uint group = n / 2, min = n % 2;
  const uint top = uint(from[group % 4 + 4 * min]);
  return group < 4 ? top & 63 : ((uint(from[group + 4]) >> (4 * min)) & 15) | (top >> 6) << 4;
#elif GROUP_SCALE_Q3_K
  // 16 scales: lower halves in 8 bytes (n, n + 8), then the upper 2 bits in 4 bytes (n, n + 4, n + 8, n + 12).
  return ((uint(from[n % 8]) >> (n / 8 * 4)) & 15) | ((uint(from[8 + n % 4]) >> (n / 4 * 2)) & 3) << 4;
#else  // GROUP_SCALE_IQ4_XS: 8 scales: the upper 2 bits in 2 bytes, then the lower 4 in 4, in order.
  return ((uint(from[2 + n / 2]) >> (n % 2 * 4)) & 15) | ((uint(from[n / 4]) >> (n % 4 * 2)) & 3) << 4;
#endif
}

// kernel: pack(raw) -> (codes, group_scales?, block_scales?)
// raw uint8 [blocks N_BYTES] -> codes uint32 [blocks WORDS], group_scales uint8 [blocks GROUP_SCALE_BYTES],
// block_scales half [blocks BLOCK_SCALES].
const uint i = uint(threadgroup_position_in_grid.x) * 256 + uint(thread_index_in_threadgroup);
const uint b = i / WORDS, j = i % WORDS;
if (b < uint(raw_shape[0]) / N_BYTES) {
  const device uchar* block = raw + ulong(b) * N_BYTES;

  // The codes that have bits in word j; the first and the last may have some in its neighbours.
  const int first = int(j * 32 / BITS);
  uint word = 0;
  UNROLL
  for (int n = 0; n < (30 + 2 * BITS) / BITS; n++) {
    const int c = first + n, at = c * BITS - int(j) * 32;
    if (at < 32) {
      const uint code = CODE(block, uint(c));
      word |= at < 0 ? code >> -at : code << at;
    }
  }
  codes[i] = word;

#if GROUP_SCALE_BYTES
  if (j < GROUP_SCALE_BYTES) {
    const device uchar* from = block + GROUP_SCALE_AT;
#if GROUP_SCALE_PLAIN
    group_scales[b * GROUP_SCALE_BYTES + j] = from[j];
#else
    // Eight bits, of two numbers.
    const uint n = j * 8 / 6, shift = j * 8 % 6;
    group_scales[b * GROUP_SCALE_BYTES + j] =
        uchar((six_bits(from, n) >> shift | six_bits(from, n + 1) << (6 - shift)) & 255);
#endif
  }
#endif

#if BLOCK_SCALES
  if (j < BLOCK_SCALES) {
    const device uchar* from = block + (j == 0 ? BLOCK_SCALE_0 : BLOCK_SCALE_1);
    block_scales[b * BLOCK_SCALES + j] = as_type<half>(ushort(uint(from[0]) | uint(from[1]) << 8));
  }
#endif
}
