// Rows as fp16 with magnitudes under 2, for products of many rows:
//   scale[t] = the power of two at or below the largest |x[t, k]|, at least 2^-100;
//   h[t, k] = half(x[t, k] / scale[t]).
// With NORM the rows are x RMS-normalised: h is of x[t, k] norm[k], and scale[t] is divided by sqrt(mean(x²) + EPS) last.
//
// Threads. A threadgroup of SG simdgroups takes a row, 8 neighbouring numbers a thread and a step; threadgroup 32 SG,
// grid (32 SG, rows, 1). K a multiple of 8.
//
// Memory. x is read once, and once more from the cache; h written once.
//
// Rendered before: T (of x), SG, NORM, EPS.

// Eight numbers of a row, times norm's; adds their squares to `squares`.
METAL_FUNC void load_row(const device T* from, const device float* norm, int at, thread float* v, thread float& squares) {
  load8(from + at, v);
#if NORM
  float w[8];
  load8(norm + at, w);
  UNROLL
  for (int j = 0; j < 8; j++) {
    squares += v[j] * v[j];
    v[j] *= w[j];
  }
#endif
}

// kernel: halve(x, norm?) -> (h, scale)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup), row = int(threadgroup_position_in_grid.y), K = x_shape[1];
const device T* from = x + ulong(row) * ulong(K);
device half* to = h + ulong(row) * ulong(K);
threadgroup float room[SG];
threadgroup float room2[SG];

#if !NORM
const device float* norm = nullptr;
#endif

float most = 0, squares = 0, again = 0;
for (int at = thread_index * 8; at < K; at += 256 * SG) {
  float v[8];
  load_row(from, norm, at, v, squares);
  UNROLL
  for (int j = 0; j < 8; j++) most = max(most, max(v[j], -v[j]));
}
most = max_lanes(most);
if (lane == 0) room[sg] = most;
threadgroup_barrier(mem_flags::mem_threadgroup);
most = max_lanes(lane < SG ? room[lane] : 0.0f);

// The exponent's bits alone are the power of two.
const float power = max(as_type<float>(as_type<uint>(most) & 0x7F800000u), 7.888609052210118e-31f);
float total = power;
#if NORM
total *= rsqrt(sum_group(squares, room2, SG, sg, lane) / float(K) + EPS);
#endif
if (thread_index == 0) scale[row] = total;
for (int at = thread_index * 8; at < K; at += 256 * SG) {
  float v[8];
  load_row(from, norm, at, v, again);
  UNROLL
  for (int j = 0; j < 8; j++) v[j] /= power;
  store8(to + at, v);
}
