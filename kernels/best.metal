// For choose.metal and sample.metal: the largest of numbers, and where it is.

#define NOTHING -3.0e38f

// The larger of (a, i) and (b, j); of equals, the lower index.
METAL_FUNC void better(thread float& a, thread int& i, float b, int j) {
  if (b > a || (b == a && j < i)) {
    a = b;
    i = j;
  }
}

// The best over the 32 lanes; every lane gets it.
METAL_FUNC void best_lane(thread float& a, thread int& i) {
  UNROLL
  for (int m = 16; m > 0; m /= 2) {
    const float b = simd_shuffle_xor(a, ushort(m));
    const int j = simd_shuffle_xor(i, ushort(m));
    better(a, i, b, j);
  }
}

// The best over a threadgroup of `count` full simdgroups; every thread of the first one gets it. `values`, `places`:
// room for `count` numbers each.
METAL_FUNC void best_group(
    thread float& a, thread int& i, threadgroup float* values, threadgroup int* places, int count, int simdgroup,
    int lane) {
  best_lane(a, i);
  if (lane == 0) {
    values[simdgroup] = a;
    places[simdgroup] = i;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    a = lane < count ? values[lane] : NOTHING;
    i = lane < count ? places[lane] : 0x7FFFFFFF;
    best_lane(a, i);
  }
}
