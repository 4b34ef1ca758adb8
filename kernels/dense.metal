// Rows of an unpacked weight times a few tokens: y[t, n] = sum over k of W[n, k] x[t, k], in fp32.
// With NORM x is RMS-normalised on the way in: x[k] norm[k] / sqrt(mean(x²) + EPS).
// With TIMES y is gelu(y) times[t, n]. The result goes out times FACTOR.
//
// Threads. SPLIT simdgroups take ROWS neighbouring rows for one token, a lane 8 neighbouring weights of each per step;
// SG simdgroups a threadgroup, grid (32 SG ceil(N SPLIT / (SG ROWS)), tokens, 1). K a multiple of 8.
//
// Memory. W once a token, 16 or 32 bytes a lane; x and norm once in ROWS rows, from the cache; y once.
//
// Rendered before: T (dtype of x and times), U and U_HALF (of y), W_TYPE, SG, SPLIT, ROWS, EPS, NORM, FACTOR, TIMES.

// kernel: dense(x, w, norm?, times?) -> (y)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int n = (int(threadgroup_position_in_grid.x) * (SG / SPLIT) + sg / SPLIT) * ROWS, part = sg % SPLIT;
const int t = int(threadgroup_position_in_grid.y), N = w_shape[0], K = w_shape[1];

const device T* xs = x + t * K;
float sum[ROWS] = {}, squares = 0;
#pragma unroll(4 / ROWS)
for (int k = (part * 32 + lane) * 8; k < K; k += 256 * SPLIT) {
  float a[ROWS][8], b[8];
  UNROLL
  for (int r = 0; r < ROWS; r++) load8(w + ulong(min(n + r, N - 1)) * ulong(K) + k, a[r]);
  load8(xs + k, b);
#if NORM
  float c[8];
  load8(norm + k, c);
#endif
  UNROLL
  for (int j = 0; j < 8; j++) {
#if NORM
    squares += b[j] * b[j];
    b[j] *= c[j];
#endif
    UNROLL
    for (int r = 0; r < ROWS; r++) sum[r] += a[r][j] * b[j];
  }
}
UNROLL
for (int r = 0; r < ROWS; r++) sum[r] = sum_lanes(sum[r], 32);
if (NORM) squares = sum_lanes(squares, 32);
#if SPLIT > 1
threadgroup float sums[SG][ROWS + 1];
if (lane == 0) {
  UNROLL
  for (int r = 0; r < ROWS; r++) sums[sg][r] = sum[r];
  sums[sg][ROWS] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = 1; i < SPLIT && part == 0; i++) {
  UNROLL
  for (int r = 0; r < ROWS; r++) sum[r] += sums[sg + i][r];
  squares += sums[sg + i][ROWS];
}
#endif
if (lane == 0 && part == 0) {
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int at = t * N + n + r;
    float value = NORM ? sum[r] * rsqrt(squares / float(K) + EPS) : sum[r];
#if TIMES
    if (n + r < N) value = gelu(value) * float(times[at]);
#endif
    if (n + r < N) y[at] = U(WITHIN_U(value * FACTOR));
  }
}
