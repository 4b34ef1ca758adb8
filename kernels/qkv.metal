// From the raw products of q, k and v to queries, and to keys and values behind those that the tail already holds:
//   q' = rope(rms(q) q_norm),  k' = rope(rms(k) k_norm),  v' = rms(v) with VALUE_NORM, else v.
//
// q [tokens, H D], k and v [tokens, G D]. With JOINED_K the k of a token stands behind its q in the same array, with
// JOINED_V its v behind those; with V_IS_K v is the raw k; without KV there is q alone. tail_k, tail_v [G, TAIL, D]
// hold count[0] tokens; new_k, new_v are copies of them with the new tokens behind (rows past those stay unwritten).
// RoPE turns dimensions i and i + D/2 by position / wavelengths[i] (infinity: not at all).
//
// Threads. A simdgroup takes one head of one token, 8 a threadgroup; the threadgroups after those copy the old rows of
// the tails, 16 bytes of each a thread. grid (256 (ceil(tokens heads / 8) + ceil(G TAIL D sizeof(C) / 16 / 256)), 1, 1).
//
// Memory. Products read once, results written once, the used rows of both tails read and written once.
//
// Rendered before: T (dtype of the products), C (of q', k', v'), C_BYTES, H, G, D, TAIL, EPS, KV, JOINED_K, JOINED_V,
// V_IS_K, VALUE_NORM.

#define PAIRS ((D / 2 + 31) / 32)  // pairs of dimensions a lane holds
#define HEADS (KV ? H + 2 * G : H)
#define STRIDE (H * D + (JOINED_K ? G * D : 0) + (JOINED_V ? G * D : 0))  // of q from token to token

// kernel: qkv_post(q, k?, v?, q_norm, k_norm?, wavelengths, position, tail_k?, tail_v?, count?) -> (q_out, new_k?, new_v?)
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int tokens = q_shape[0];
const int unit = int(threadgroup_position_in_grid.x) * 8 + sg;
const int head_groups = (tokens * HEADS + 7) / 8;

if (unit < tokens * HEADS) {
  const int t = unit / HEADS, head = unit % HEADS;
  const bool is_q = head < H, is_k = !is_q && head < H + G;
  const int g = is_q ? 0 : (head - H) % (KV ? G : 1);
  const device T* from = q + t * STRIDE + head * D;
#if KV
#if JOINED_K
  const device T* from_k = q + t * STRIDE + (H + g) * D;
#else
  const device T* from_k = k + (t * G + g) * D;
#endif
#if V_IS_K
  const device T* from_v = from_k;
#elif JOINED_V
  const device T* from_v = q + t * STRIDE + (H + (JOINED_K ? G : 0) + g) * D;
#else
  const device T* from_v = v + (t * G + g) * D;
#endif
  if (!is_q) from = is_k ? from_k : from_v;
#endif

  float low[PAIRS], high[PAIRS], squares = 0;  // dimension i and i + D / 2
  UNROLL
  for (int p = 0; p < PAIRS; p++) {
    const int i = p * 32 + lane;
    const bool inside = i < D / 2;
    low[p] = inside ? float(from[i]) : 0.0f;
    high[p] = inside ? float(from[i + D / 2]) : 0.0f;
    squares += low[p] * low[p] + high[p] * high[p];
  }
  const float scale = rsqrt(sum_lanes(squares, 32) / float(D) + EPS);

  UNROLL
  for (int p = 0; p < PAIRS; p++) {
    const int i = p * 32 + lane;
    if (i < D / 2) {
      float a = low[p], b = high[p];
      if (is_q) {
        a *= scale * q_norm[i];
        b *= scale * q_norm[i + D / 2];
      }
#if KV
      if (is_k) {
        a *= scale * k_norm[i];
        b *= scale * k_norm[i + D / 2];
      }
      if (VALUE_NORM && !is_q && !is_k) {
        a *= scale;
        b *= scale;
      }
#endif
      if (is_q || is_k) {
        const float angle = float(position[0] + t) * (1.0f / wavelengths[i]);
        const float c = cos(angle), s = sin(angle), turned = a * c - b * s;
        b = b * c + a * s;
        a = turned;
      }
      if (is_q) {
        q_out[(t * H + head) * D + i] = C(a);
        q_out[(t * H + head) * D + i + D / 2] = C(b);
      }
#if KV
      const int at = (g * TAIL + count[0] + t) * D + i;
      if (is_k) {
        new_k[at] = C(a);
        new_k[at + D / 2] = C(b);
      } else if (!is_q) {
        new_v[at] = C(a);
        new_v[at + D / 2] = C(b);
      }
#endif
    }
  }
}
#if KV
constexpr int PIECES = D * C_BYTES / 16;  // of 16 bytes in a row of a tail
const int i = (int(threadgroup_position_in_grid.x) - head_groups) * 256 + int(thread_index_in_threadgroup);
if (i >= 0 && i < G * TAIL * PIECES && i / PIECES % TAIL < count[0]) {
  ((device uint4*)new_k)[i] = ((const device uint4*)tail_k)[i];
  ((device uint4*)new_v)[i] = ((const device uint4*)tail_v)[i];
}
#endif
