// Expand a packed weight, or some of its rows, to floats, for products of many rows by MLX's own matmul.
//
// Rendered before: T (dtype of out), K (row length, a multiple of 32), a packed format as for matvec.metal (BITS,
// GROUP, GROUP_SCALE_BITS, SCALE_BLOCK, OFFSET, HAS_MIN, HAS_LUT, LUT, GROUP_SCALE_*).
//
// kernel expand: threads, one for eight neighbouring weights (they share a scale: groups are 16 or 32), threadgroup of
// 256, grid (256 ceil(rows K / 2048), 1, 1). Memory: every byte of the planes once, out once, 8 numbers a store.

// Weight = a value + b for all of group g of a row.
METAL_FUNC void scale_and_bias(
    const device uchar* group_scales, const device half* block_scales, int g, thread float& a, thread float& b) {
  uint field = 0;
  b = 0;
#if GROUP_SCALE_BITS
  const int at = g * GROUP_SCALE_BITS;
  field = uint(group_scales[at / 8]);
  if (at % 8 + GROUP_SCALE_BITS > 8) field |= uint(group_scales[at / 8 + 1]) << 8;
  field = (field >> (at % 8)) & ((1u << GROUP_SCALE_BITS) - 1);
#endif
#if GROUP_SCALE_E8M0
  a = as_type<float>(field < 2 ? 0x00200000u << field : (field - 1) << 23);
#else
  const device half* top = block_scales + g * GROUP / SCALE_BLOCK * (1 + HAS_MIN);
  a = float(top[0]);
#if GROUP_SCALE_SCALE_MIN
  a *= float(field & ((1u << (GROUP_SCALE_BITS / 2)) - 1));
  b = -(float(top[1]) * float(field >> (GROUP_SCALE_BITS / 2)));
#elif GROUP_SCALE_SCALE_32
  a *= float(int(field) - 32);
#elif GROUP_SCALE_INT8
  a *= float(int(field << 24) >> 24);
#elif HAS_MIN
  b = float(top[1]);
#endif
#endif
}

// kernel: expand(codes, group_scales?, block_scales?) -> (out)
// codes uint32 [rows, K BITS / 32] -> out [rows, K].
const uint i = uint(threadgroup_position_in_grid.x) * 256 + uint(thread_index_in_threadgroup);
const uint row = i / (K / 8), c = i % (K / 8);
if (row < uint(codes_shape[0])) {
#if HAS_LUT
  const float table[16] = LUT;
#endif
  // The eight codes: 8 BITS bits, in one word or two.
  const device uint* words = codes + ulong(row) * (K * BITS / 32) + c * BITS / 4;
  const uint shift = c * BITS % 4 * 8;
  const uint low = words[0], high = shift + 8 * BITS > 32 ? words[1] : 0;

  float a, b;
#if GROUP_SCALE_BITS
  const device uchar* group_scales_row = group_scales + ulong(row) * (K / GROUP * GROUP_SCALE_BITS / 8);
#else
  const device uchar* group_scales_row = nullptr;
#endif
#if SCALE_BLOCK
  const device half* block_scales_row = block_scales + ulong(row) * (K / SCALE_BLOCK * (1 + HAS_MIN));
#else
  const device half* block_scales_row = nullptr;
#endif
  scale_and_bias(group_scales_row, block_scales_row, int(c * 8 / GROUP), a, b);

  float v[8];
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
  store8(out + ulong(i) * 8, v);
}
