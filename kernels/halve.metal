// Rows as fp16 with magnitudes under 2, for products of many rows:
//   scale[t] = the power of two at or below the largest |x[t, k]|, at least 2^-100;
//   h[t, k] = half(x[t, k] / scale[t]).
//
// Threads. A threadgroup of SG simdgroups takes a row, 8 neighbouring numbers a thread and a step; threadgroup 32 SG,
// grid (32 SG, rows, 1). K a multiple of 8.
//
// Memory. x is read once, and once more from the cache; h written once.
//
// Rendered before: T (of x), SG.

// kernel: halve(x) -> (h, scale)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup), row = int(threadgroup_position_in_grid.y), K = x_shape[1];
const device T* from = x + ulong(row) * ulong(K);
device half* to = h + ulong(row) * ulong(K);
threadgroup float room[SG];

float most = 0;
for (int at = thread_index * 8; at < K; at += 256 * SG) {
  float v[8];
  load8(from + at, v);
  UNROLL
  for (int j = 0; j < 8; j++) most = max(most, max(v[j], -v[j]));
}
most = max_lanes(most);
if (lane == 0) room[sg] = most;
threadgroup_barrier(mem_flags::mem_threadgroup);
most = max_lanes(lane < SG ? room[lane] : 0.0f);

// The exponent's bits alone are the power of two.
const float power = max(as_type<float>(as_type<uint>(most) & 0x7F800000u), 7.888609052210118e-31f);
if (thread_index == 0) scale[row] = power;
for (int at = thread_index * 8; at < K; at += 256 * SG) {
  float v[8];
  load8(from + at, v);
  UNROLL
  for (int j = 0; j < 8; j++) v[j] /= power;
  store8(to + at, v);
}
