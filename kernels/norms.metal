// The residual connection with the norms around it, in one launch:
//   c = h,  or with BRANCHES  c = rms(h) norm1 + rms(e) norm2,  e = sum over i < USED of share[i] experts[i]
// where h is the sum of PARTS arrays, and
//   y = (x + rms(c) post) scale,    normed = rms(y) next,  or with COPIES  y COPIED
// with rms(a) = a / sqrt(mean(a²) + EPS), of h and e with EPS_H. x and y [tokens, K] in dtype R, h
// [PARTS, tokens, K] and experts [tokens USED, K] in T, normed in U. With RANKS h, in one part, is this rank's part of a
// sum over ranks: exchange.metal says how.
//
// Threads. One threadgroup of SG simdgroups a token, 8 neighbouring elements a thread and a step, all kept in
// registers between the sums; grid (32 SG, tokens, 1). K a multiple of 8.
//
// Memory. Everything read once and written once, 16 bytes a lane.
//
// Rendered before: T, R, U, K, SG, PARTS, EPS, EPS_H, BRANCHES, USED, SCALED (scale is there), NEXT (next is there),
// COPIES, COPIED; RANKS, and with it RANK, CAP.
//
// uses: boxes.metal

#define STEPS ((K + 256 * SG - 1) / (256 * SG))
// For each i, the thread's 8 elements of step i, from element `at`.
#define EACH_STEP UNROLL for (int i = 0, at = thread_index * 8; i < STEPS; i++, at += 256 * SG) if (at < K)
#if RANKS
// Where a step's number j lies among a row's: neighbouring threads' beside each other.
#define BESIDE(j) (row + (j) * (K / 8) + at / 8)
#endif

// kernel: add_norm(x, h, post, experts?, share?, norm1?, norm2?, scale?, next?, flag?, boxes?, after?) -> (y, normed?)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup);
const int token = int(threadgroup_position_in_grid.y), row = token * K;
threadgroup float room[SG];

// All loads come before all sums, to wait only once; those of weights come even before the inputs are ready.
float c[STEPS][8], v[STEPS][8], w[STEPS][8], squares = 0;
EACH_STEP load8(post + at, w[i]);
#if NEXT
float n[STEPS][8];
EACH_STEP load8(next + at, n[i]);
#endif
#if BRANCHES
float w1[STEPS][8], w2[STEPS][8], parts[STEPS][USED][8];
EACH_STEP load8(norm1 + at, w1[i]);
EACH_STEP load8(norm2 + at, w2[i]);
#endif
#if SCALED
const float factor_of_layer = scale[0];
#endif
#if RANKS
const uint turn = uint(flag[0]);
volatile device ulong* box[RANKS];
UNROLL
for (int r = 0; r < RANKS; r++) box[r] = box_of(boxes, r);
#endif
INPUTS_READY();
EACH_STEP load8(h + row + at, c[i]);
#if PARTS > 1
float more[STEPS][PARTS - 1][8];
EACH_STEP {
  UNROLL
  for (int p = 1; p < PARTS; p++) load8(h + p * x_shape[0] * K + row + at, more[i][p - 1]);
}
#endif
EACH_STEP load8(x + row + at, v[i]);
#if BRANCHES
EACH_STEP {
  UNROLL
  for (int u = 0; u < USED; u++) load8(experts + (token * USED + u) * K + at, parts[i][u]);
}
#endif
simdgroup_barrier(mem_flags::mem_none);

#if RANKS
EACH_STEP {
  UNROLL
  for (int j = 0; j < 8; j++) {
    UNROLL
    for (int r = 0; r < RANKS; r++)
      if (r != RANK) box[r][place(turn, RANK, BESIDE(j))] = word_of(turn, c[i][j]);
  }
}
simdgroup_barrier(mem_flags::mem_none);  // all lanes have told before one waits
EACH_STEP {
  float sum[8];
  UNROLL
  for (int j = 0; j < 8; j++) sum[j] = 0;
  UNROLL
  for (int r = 0; r < RANKS; r++) {
    if (r != RANK) {
      ulong words[8];
      bool there;
      do {  // all loads at once
        UNROLL
        for (int j = 0; j < 8; j++) words[j] = box[RANK][place(turn, r, BESIDE(j))];
        there = true;
        UNROLL
        for (int j = 0; j < 8; j++) there = there && uint(words[j] >> 32) == turn;
      } while (!there);
      UNROLL
      for (int j = 0; j < 8; j++) sum[j] += as_type<float>(uint(words[j]));
    } else {
      UNROLL
      for (int j = 0; j < 8; j++) sum[j] += c[i][j];
    }
  }
  UNROLL
  for (int j = 0; j < 8; j++) c[i][j] = sum[j];
}
#endif

EACH_STEP {
#if PARTS > 1
  UNROLL
  for (int j = 0; j < 8 * (PARTS - 1); j++) c[i][j % 8] += more[i][j / 8][j % 8];
#endif
  UNROLL
  for (int j = 0; j < 8; j++) squares += c[i][j] * c[i][j];
}
squares = sum_group(squares, room, SG, sg, lane);

#if BRANCHES
float e[STEPS][8], e_squares = 0;
EACH_STEP {
  UNROLL
  for (int j = 0; j < 8; j++) e[i][j] = 0;
  UNROLL
  for (int u = 0; u < USED; u++) {
    UNROLL
    for (int j = 0; j < 8; j++) e[i][j] += share[token * USED + u] * parts[i][u][j];
  }
  UNROLL
  for (int j = 0; j < 8; j++) e_squares += e[i][j] * e[i][j];
}
e_squares = sum_group(e_squares, room, SG, sg, lane);
const float factor1 = rsqrt(squares / K + EPS_H), factor2 = rsqrt(e_squares / K + EPS_H);
squares = 0;
EACH_STEP {
  UNROLL
  for (int j = 0; j < 8; j++) {
    c[i][j] = c[i][j] * factor1 * w1[i][j] + e[i][j] * factor2 * w2[i][j];
    squares += c[i][j] * c[i][j];
  }
}
squares = sum_group(squares, room, SG, sg, lane);
#endif

const float factor = rsqrt(squares / K + (BRANCHES ? EPS : EPS_H));
squares = 0;
EACH_STEP {
  UNROLL
  for (int j = 0; j < 8; j++) {
    c[i][j] = v[i][j] + c[i][j] * factor * w[i][j];
#if SCALED
    c[i][j] *= factor_of_layer;
#endif
    squares += c[i][j] * c[i][j];
  }
  store8(y + row + at, c[i]);
}

#if NEXT
const float next_factor = rsqrt(sum_group(squares, room, SG, sg, lane) / K + EPS);
EACH_STEP {
  UNROLL
  for (int j = 0; j < 8; j++) n[i][j] = WITHIN_U(n[i][j] * c[i][j] * next_factor);
  store8(normed + row + at, n[i]);
}
#elif COPIES
EACH_STEP {
  UNROLL
  for (int j = 0; j < 8; j++) c[i][j] = WITHIN_U(c[i][j] * COPIED);
  store8(normed + row + at, c[i]);
}
#endif
