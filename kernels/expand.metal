// Expand a packed weight, or some of its rows, to floats, for products of many rows by MLX's own matmul.
//
// Rendered before: T (dtype of out), K (row length, a multiple of 32), a packed format as for matvec.metal (BITS,
// GROUP, GROUP_SCALE_BITS, SCALE_BLOCK, OFFSET, HAS_MIN, HAS_LUT, LUT, GROUP_SCALE_*), with CHUNK 32.
//
// kernel expand: threads, one for eight neighbouring weights (they share a scale: groups are 16 or 32), threadgroup of
// 256, grid (256 ceil(rows K / 2048), 1, 1). Memory: every byte of the planes once, out once, 8 numbers a store.
// uses: packed.metal

// kernel: expand(codes, group_scales?, block_scales?, grid?) -> (out)
// codes uint32 [rows, K BITS / 32] -> out [rows, K].
const uint i = uint(threadgroup_position_in_grid.x) * 256 + uint(thread_index_in_threadgroup);
const uint row = i / (K / 8), c = i % (K / 8);
if (row < uint(codes_shape[0])) {
  // Of a chunk of 32 weights these are the eights number c % 4.
  const uint chunk = c / 4;
#if GROUP_SCALE_BITS
  const uint field = load_group_scales(group_scales + ulong(row) * (K / GROUP * GROUP_SCALE_BITS / 8), int(chunk));
#else
  const uint field = 0;
#endif
#if SCALE_BLOCK
  const uint top =
      load_block_scales(block_scales + ulong(row) * (K / SCALE_BLOCK * BLOCK_NUMBERS), int(chunk * 32 / SCALE_BLOCK));
#else
  const uint top = 0;
#endif
  float a, b;
  scales(field, top, int(c % 4 * 8 / GROUP), a, b);

  float v[8];
#if RULE
  uint words[WORDS];
  load_codes(codes + ulong(row) * (K * BITS / 32) + chunk * WORDS, words);
  EIGHT_BYTES(grid, words, field, int(c % 4), eight)
  UNROLL
  for (int j = 0; j < 8; j++) v[j] = a * value_of(eight, j);
#else
#if HAS_LUT
  const float table[16] = LUT;
#endif
  // The eight codes: 8 BITS bits, in one word or two.
  const device uint* words = codes + ulong(row) * (K * BITS / 32) + c * BITS / 4;
  const uint shift = c * BITS % 4 * 8;
  const uint low = words[0], high = shift + 8 * BITS > 32 ? words[1] : 0;
  UNROLL
  for (uint j = 0; j < 8; j++) {
    const uint at = shift + j * BITS;
    uint code = at < 32 ? low >> at : high >> (at - 32);
    if (at < 32 && at + BITS > 32) code |= high << (32 - at);
    code &= (1u << BITS) - 1;
#if HAS_LUT
    v[j] = a * table[code] + b;
#else
    // The code goes into the mantissa of 2^23, since a conversion is slow; exact, as is subtracting the offset.
    v[j] = a * (as_type<float>(0x4B000000u | code) - float(0x800000 + OFFSET)) + b;
#endif
  }
#endif
  store8(out + ulong(i) * 8, v);
}
