// Quantizes keys and values to codes and scales, as mlx_gemma4/kv/quantization.py defines them; each byte is read and
// written once.
//
// keys, values [rows, D]; rotation fp32 [2, D]: for keys, for values; with CENTERED [2 + G, D]: a center for each KV
// head too; codes [rows, 2, WORDS], scales [rows, 2]. A simdgroup takes one vector, a threadgroup 8; grid
// (256 ceil(rows / 4), 1, 1).
//
// Rendered before: what quantized.metal needs; T (dtype of keys and values), CENTERED; for 4 bits MAGNITUDES (the
// levels) and BOUNDS (the 7 numbers halfway between them) as floats.
// uses: quantized.metal

// kernel: quantize_kv(keys, values, rotation) -> (codes, scales)
const int lane = int(thread_index_in_simdgroup);
const int unit = int(threadgroup_position_in_grid.x) * 8 + int(simdgroup_index_in_threadgroup);
if (unit < 2 * keys_shape[0]) {
  float v[D / 32], most = 0, squares = 0;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const int d = j * 32 + lane, at = unit / 2 * D + d;
    if (unit % 2 == 0) {
#if CENTERED
      const int g = unit / 2 / (keys_shape[0] / (rotation_shape[0] - 2));
      v[j] = (float(keys[at]) - rotation[(2 + g) * D + d]) / rotation[d];
#else
      v[j] = float(keys[at]) / rotation[d];
#endif
    } else {
      v[j] = float(values[at]) * rotation[D + d];
    }
  }
  hadamard(v, lane);
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    most = max(most, fabs(v[j]));
    squares += v[j] * v[j];
  }
  uint code[D / 32];
#if BITS == 8
  const half scale = half(max_lanes(most) / 127.0f);
  const float step = float(scale) > 0 ? float(scale) : 1.0f;
  UNROLL
  for (int j = 0; j < D / 32; j++) code[j] = uint(int(rint(max(-127.0f, min(127.0f, v[j] / step)))) + 128);
#else
  const float bounds[7] = BOUNDS, magnitudes[8] = MAGNITUDES;
  squares = sum_lanes(squares, 32);
  const float norm = squares > 0 ? sqrt(squares / D) : 1.0f;
  float along = 0;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    const float size = fabs(v[j]);
    float magnitude = magnitudes[0];
    code[j] = 0;
    UNROLL
    for (int i = 0; i < 7; i++) {
      const bool over = size / norm > bounds[i];
      code[j] += over ? 1u : 0u;
      magnitude = over ? magnitudes[i + 1] : magnitude;
    }
    along += size * magnitude;
    if (v[j] < 0) code[j] |= 8u;
  }
  along = sum_lanes(along, 32);
  const half scale = half(along > 0 ? squares / along : 0.0f);
#endif
  if (lane == 0) scales[unit] = scale;
  UNROLL
  for (int j = 0; j < D / 32; j++) {
    uint word = code[j] << (lane % PER * BITS);
    UNROLL
    for (int m = 1; m < PER; m *= 2) word |= simd_shuffle_xor(word, ushort(m));
    if (lane % PER == 0) codes[unit * WORDS + j * BITS + lane / PER] = word;
  }
}
