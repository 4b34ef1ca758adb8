// Rows of an unpacked weight times a few tokens: y[t, n] = sum over k of W[n, k] x[t, k], in fp32.
// With NORM x is RMS-normalised on the way in: x[k] norm[k] / sqrt(mean(x²) + EPS).
// With TIMES y is gelu(y) times[t, n]. The result goes out times FACTOR.
//
// Threads. SPLIT simdgroups take one row for one token, 8 neighbouring weights a lane and a step; SG simdgroups a
// threadgroup, grid (32 SG ceil(N SPLIT / SG), tokens, 1). K a multiple of 8.
//
// Memory. W once a token, 16 or 32 bytes a lane; x and norm once a row, from the cache; y once.
//
// Rendered before: T (dtype of x and times), U and U_HALF (of y), W_TYPE, SG, SPLIT, EPS, NORM, FACTOR, TIMES.

// kernel: dense(x, w, norm?, times?) -> (y)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int n = int(threadgroup_position_in_grid.x) * (SG / SPLIT) + sg / SPLIT, part = sg % SPLIT;
const int t = int(threadgroup_position_in_grid.y), N = w_shape[0], K = w_shape[1];

const device W_TYPE* row = w + ulong(min(n, N - 1)) * ulong(K);
const device T* xs = x + t * K;
float sum = 0, squares = 0;
#pragma unroll 4
for (int k = (part * 32 + lane) * 8; k < K; k += 256 * SPLIT) {
  float a[8], b[8];
  load8(row + k, a);
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
    sum += a[j] * b[j];
  }
}
sum = sum_lanes(sum, 32);
if (NORM) squares = sum_lanes(squares, 32);
#if SPLIT > 1
threadgroup float sums[2][SG];
if (lane == 0) {
  sums[0][sg] = sum;
  sums[1][sg] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = 1; i < SPLIT && part == 0; i++) {
  sum += sums[0][sg + i];
  squares += sums[1][sg + i];
}
#endif
if (lane == 0 && part == 0 && n < N) {
  if (NORM) sum *= rsqrt(squares / float(K) + EPS);
#if TIMES
  sum = gelu(sum) * float(times[t * N + n]);
#endif
  y[t * N + n] = U(WITHIN_U(sum * FACTOR));
}
