// Products on matrix units: 16 x 16 halves times 16 x 8, summed in fp32.
//
// A lane holds row `g` = 0..7, and of it columns 2 t and 2 t + 1, of the 8 x 8 blocks of the first factor and of the
// result. Which lane has which g and t, and what a lane holds of the second factor, differs between Metal and CUDA:
// B_PLACE. `multiply`, `firsts` and `seconds` are Metal's here, CUDA's in cuda.h.
//
// Needs `lane`, the lane's number, where LANE_G or LANE_T stands.

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

// Of two pairs of halves, both firsts, and both seconds.
METAL_FUNC uint firsts(uint a, uint b) { return (a & 0xFFFFu) | b << 16; }
METAL_FUNC uint seconds(uint a, uint b) { return a >> 16 | (b & 0xFFFF0000u); }
#endif

// `count` words (1, 2 or a multiple of 4), aligned to as many.
METAL_FUNC void load_words(const device uint* p, int count, thread uint* w) {
  UNROLL
  for (int i = 0; i < count; i += 4) {
    if (count == 1) {
      w[0] = p[0];
    } else if (count == 2) {
      const uint2 u = *(const device uint2*)p;
      w[0] = u.x;
      w[1] = u.y;
    } else {
      const uint4 u = *(const device uint4*)(p + i);
      w[i] = u.x;
      w[i + 1] = u.y;
      w[i + 2] = u.z;
      w[i + 3] = u.w;
    }
  }
}
