// Quantized keys and values (mlx_gemma4/kv/quantization.py): how codes are packed, and the Hadamard transform H that is
// part of their rotation. For quantized_attention.metal and quantize_kv.metal.
//
// Rendered before: D; BITS of a code: 8 or 4 (or 16: numbers in halves as they are); for 4 bits LEVELS (the 8 magnitudes,
// fp16 as bits) and LOW_0, LOW_1, HIGH_0, HIGH_1 (their low and high bytes).

#define PER (32 / BITS)  // codes in a word
#define WORDS (D / PER)  // words in a vector

#ifndef CUDA
// Subtract 1152 from two halves 1024 + code: code - 128. cuda.h has CUDA's.
METAL_FUNC uint less_1152(uint pair) {
  const half a = as_type<half>(ushort(pair & 0xFFFFu)) - half(1152), b = as_type<half>(ushort(pair >> 16)) - half(1152);
  return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16;
}
#endif

// The levels of a word's codes, as pairs of halves. table: for 4 bits on Metal, two codes -> their levels.
METAL_FUNC void levels(uint word, const threadgroup uint* table, thread uint* pairs) {
#if BITS == 16
  pairs[0] = word;
#elif BITS == 8
  UNROLL
  for (int i = 0; i < 2; i++) {
    const uint codes = word >> (16 * i);
    pairs[i] = less_1152((codes & 0xFFu) | (codes & 0xFF00u) << 8 | 0x64006400u);
  }
#elif defined(CUDA)
  levels_by_bytes(word, LOW_0, LOW_1, HIGH_0, HIGH_1, pairs);
#else
  UNROLL
  for (int i = 0; i < 4; i++) pairs[i] = table[(word >> (8 * i)) & 0xFFu];
#endif
}

// The part of H that combines the n numbers of one lane.
METAL_FUNC void hadamard_own(thread float* v, int n) {
  UNROLL
  for (int m = 1; m < n; m *= 2) {
    UNROLL
    for (int j = 0; j < n; j++) {
      if ((j & m) == 0) {
        const float a = v[j], b = v[j + m];
        v[j] = a + b;
        v[j + m] = a - b;
      }
    }
  }
}

// The part of H that combines each of n numbers with that of the lane whose number differs in the bit m.
METAL_FUNC void hadamard_lanes(thread float* v, int n, int lane, int m) {
  const float sign = lane & m ? -1.0f : 1.0f;
  UNROLL
  for (int j = 0; j < n; j++) v[j] = fma(sign, v[j], simd_shuffle_xor(v[j], ushort(m)));
}

// H v over a simdgroup; lane l holds the numbers l, l + 32, ..
METAL_FUNC void hadamard(thread float* v, int lane) {
  UNROLL
  for (int m = 1; m < 32; m *= 2) hadamard_lanes(v, D / 32, lane, m);
  hadamard_own(v, D / 32);
}
