// Products of small fp16 matrices, summed in fp32, by a simdgroup.
//
// A lane has a g from 0 to 7 and a t from 0 to 3. Of a first factor or a result it holds, in each block of 8 x 8, row g's
// columns 2t and 2t + 1, the first in the low half of a word. Of a block of the second factor: on Metal the same; on
// CUDA rows 2t and 2t + 1 of column g.

#ifdef CUDA
#define LANE_G (lane / 4)
#define LANE_T (lane % 4)
#define LANE_OF(g, t) ((g) * 4 + (t))
// Where element (k, n) of an 8 x 8 block of the second factor lies: lane * 4 + which of its two numbers.
#define B_PLACE(k, n) (LANE_OF(n, (k) / 2) * 4 + (k) % 2)
#else
#define LANE_G ((lane / 4 & 4) + lane / 2 % 4)
#define LANE_T ((lane / 4 & 2) + lane % 2)
#define LANE_OF(g, t) (((g) & 4) * 4 + ((g) & 3) * 2 + ((t) & 2) * 4 + ((t) & 1))
#define B_PLACE(k, n) (LANE_OF(k, (n) / 2) * 4 + (n) % 2)

METAL_FUNC void set(thread simdgroup_half8x8& m, uint pair) {
  m.thread_elements()[0] = as_type<half>(ushort(pair & 0xFFFFu));
  m.thread_elements()[1] = as_type<half>(ushort(pair >> 16));
}

// c += a b for a [16, 16], b [16, 8]. a: rows 0-7 and 8-15 of columns 0-7, then of 8-15; b: rows 0-7, 8-15.
METAL_FUNC void multiply(thread float* c, const thread uint* a, uint b0, uint b1) {
  simdgroup_half8x8 left, right0, right1;
  set(right0, b0);
  set(right1, b1);
  UNROLL
  for (int i = 0; i < 2; i++) {
    simdgroup_float8x8 sum;
    sum.thread_elements()[0] = c[2 * i];
    sum.thread_elements()[1] = c[2 * i + 1];
    set(left, a[i]);
    simdgroup_multiply_accumulate(sum, left, right0, sum);
    set(left, a[2 + i]);
    simdgroup_multiply_accumulate(sum, left, right1, sum);
    c[2 * i] = sum.thread_elements()[0];
    c[2 * i + 1] = sum.thread_elements()[1];
  }
}
#endif
