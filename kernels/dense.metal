// Rows of an unpacked weight times a few tokens: y[t, n] = sum over k of W[n, k] x[t, k], in fp32.
// With NORM x is RMS-normalised on the way in: x[k] norm[k] / sqrt(mean(x²) + EPS).
// With TIMES y is gelu(y) times[t, n]. x goes in times GROW, the result goes out times FACTOR.
//
// Threads. SPLIT simdgroups take ROWS neighbouring rows for TOKENS tokens, of which those that are missing are copies of
// the last; a lane 8 neighbouring weights of each row per step; SG simdgroups a threadgroup, grid
// (32 SG ceil(N SPLIT / (SG ROWS)), ceil(tokens / TOKENS), 1). K a multiple of 8.
//
// Memory. W once in TOKENS tokens, 16 or 32 bytes a lane; x and norm once in ROWS rows, from the cache; y once.
//
// Rendered before: T (dtype of x and times), U and U_HALF (of y), W_TYPE, TOKENS, SG, SPLIT, ROWS, EPS, NORM, GROW,
// FACTOR, TIMES.

// kernel: dense(x, w, norm?, times?) -> (y)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int n = (int(threadgroup_position_in_grid.x) * (SG / SPLIT) + sg / SPLIT) * ROWS, part = sg % SPLIT;
const int first = int(threadgroup_position_in_grid.y) * TOKENS, tokens = x_shape[0], N = w_shape[0], K = w_shape[1];

float sum[TOKENS][ROWS] = {}, squares[TOKENS] = {};
#pragma unroll(TOKENS > 1 ? 1 : 4 / ROWS)
for (int k = (part * 32 + lane) * 8; k < K; k += 256 * SPLIT) {
  float a[ROWS][8];
  UNROLL
  for (int r = 0; r < ROWS; r++) load8(w + ulong(min(n + r, N - 1)) * ulong(K) + k, a[r]);
#if NORM
  float c[8];
  load8(norm + k, c);
#endif
  UNROLL
  for (int t = 0; t < TOKENS; t++) {
    float b[8];
    load8(x + min(first + t, tokens - 1) * K + k, b);
    UNROLL
    for (int j = 0; j < 8; j++) {
#if NORM
      squares[t] += b[j] * b[j];
      b[j] *= c[j];
#endif
      UNROLL
      for (int r = 0; r < ROWS; r++) sum[t][r] += a[r][j] * b[j];
    }
  }
}
UNROLL
for (int t = 0; t < TOKENS; t++) {
  UNROLL
  for (int r = 0; r < ROWS; r++) sum[t][r] = sum_lanes(sum[t][r], 32);
  if (NORM) squares[t] = sum_lanes(squares[t], 32);
}
#if SPLIT > 1
threadgroup float sums[SG][TOKENS][ROWS + 1];
if (lane == 0) {
  UNROLL
  for (int t = 0; t < TOKENS; t++) {
    UNROLL
    for (int r = 0; r < ROWS; r++) sums[sg][t][r] = sum[t][r];
    sums[sg][t][ROWS] = squares[t];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = 1; i < SPLIT && part == 0; i++) {
  UNROLL
  for (int t = 0; t < TOKENS; t++) {
    UNROLL
    for (int r = 0; r < ROWS; r++) sum[t][r] += sums[sg + i][t][r];
    squares[t] += sums[sg + i][t][ROWS];
  }
}
#endif
if (lane == 0 && part == 0) {
  UNROLL
  for (int t = 0; t < TOKENS; t++) {
    if (first + t >= tokens) break;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      const int at = (first + t) * N + n + r;
      float value = sum[t][r] * ((NORM ? rsqrt(squares[t] / float(K) + EPS) : 1.0f) * GROW);
#if TIMES
      if (n + r < N) value = gelu(value) * float(times[at]);
#endif
      if (n + r < N) y[at] = U(WITHIN_U(value * FACTOR));
    }
  }
}
