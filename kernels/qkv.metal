// Turn the raw products of q, k and v into queries, and into keys and values behind those that the tail already holds:
//   q' = rope(rms(q) q_norm),  k' = rope(rms(k) k_norm),  v' = rms(v) with VALUE_NORM, else v.
//
// q [tokens, H D], k and v [tokens, G D]. With JOINED_K the k of a token stands behind its q in the same array, with
// JOINED_V its v behind those; with V_IS_K v is the raw k; without KV there is q alone. tail_k, tail_v [1, G, room, D]
// hold count[0] tokens; new_k, new_v are copies of them with the new tokens behind (rows past those stay unwritten), or
// in recorded steps (gpu/recording.py) the same memory, where nothing is copied.
// With POOL each token is another sequence's newest, and its key and value go into its page (paged.metal), in place.
// RoPE rotates dimensions i and i + D/2 of token t by an angle of cosine rope[t, 0, i] and sine rope[t, 1, i], which
// `rotations` computes once a step: angles depend on the position and on the kind of layer alone.
//
// Threads. A simdgroup takes one head of one token, 4 a threadgroup, a lane 4 neighbouring pairs at a time; the
// threadgroups after those, if there is something to copy, take the old rows of the tails, 16 bytes of each a thread.
// grid (128 (ceil(tokens heads / 4) + ceil(G room D sizeof(C) / 16 / 128)), 1, 1). D a multiple of 8.
//
// Memory. Products are read once, results written once; all rows of both tails are read, the used ones written. A
// layer's weights evict all this from the cache before the next layer, so waiting for it takes most of the time. A
// thread waits once: it loads all that it may need together, a row of the tails before it knows count; norms, count and
// places even before the inputs are ready.
//
// Rendered before: T (dtype of the products), C (of q', k', v'), C_BYTES, H, G, D, EPS, KV, JOINED_K, JOINED_V,
// V_IS_K, VALUE_NORM, POOL, PAGE.
// uses: paged.metal

#define STEPS ((D / 2 + 127) / 128)
#define HEADS (KV ? H + 2 * G : H)
#define STRIDE (H * D + (JOINED_K ? G * D : 0) + (JOINED_V ? G * D : 0))  // of q from token to token
// For each p, the lane's 4 pairs of step p: dimensions from i on, and from i + D / 2 on.
#define EACH_STEP UNROLL for (int p = 0, i = lane * 4; p < STEPS; p++, i += 128) if (i < D / 2)

// Four numbers of 16 bits, 8-byte aligned; of fp32: common.metal.
METAL_FUNC void load4(const device half* p, thread float* v) {
  const uint2 u = *(const device uint2*)p;
  v[0] = low_half(u.x);
  v[1] = high_half(u.x);
  v[2] = low_half(u.y);
  v[3] = high_half(u.y);
}
METAL_FUNC void load4(const device bfloat* p, thread float* v) {
  const uint2 u = *(const device uint2*)p;
  v[0] = as_type<float>(u.x << 16);
  v[1] = as_type<float>(u.x & 0xFFFF0000u);
  v[2] = as_type<float>(u.y << 16);
  v[3] = as_type<float>(u.y & 0xFFFF0000u);
}
METAL_FUNC void store4(device half* p, const thread float* v) {
  uint2 u;
  u.x = pair(half(v[0]), half(v[1]));
  u.y = pair(half(v[2]), half(v[3]));
  *(device uint2*)p = u;
}
METAL_FUNC void store4(device bfloat* p, const thread float* v) {
  uint2 u;
  u.x = pair(bfloat(v[0]), bfloat(v[1]));
  u.y = pair(bfloat(v[2]), bfloat(v[3]));
  *(device uint2*)p = u;
}

// kernel: qkv_post(q, k?, v?, q_norm, k_norm?, rope, tail_k?, tail_v?, count?, places?, pool_k?, pool_v?) -> (q_out, new_k?, new_v?)
const int lane = int(thread_index_in_simdgroup), tokens = q_shape[0];
const int group = int(threadgroup_position_in_grid.x), units = tokens * HEADS, head_groups = (units + 3) / 4;
#if KV && !POOL
const int used = count[0], room = int(tail_k_shape[2]);
#endif

if (group < head_groups) {
  const int own = group * 4 + int(simdgroup_index_in_threadgroup), unit = min(own, units - 1);
  const int t = unit / HEADS, head = unit % HEADS;
  const bool is_q = head < H, is_v = head >= H + G;
  const device T* from = q + t * STRIDE + head * D;
  const device float* norm = q_norm;
#if KV
  const int g = (head - H) % G;
  if (!is_q) {
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
    from = is_v ? from_v : from_k;
    norm = k_norm;
  }
#endif

#if POOL
  const device int* place = places + t * int(places_shape[1]);
  const ulong slot = paged(place, place[PLACE_TO] - 1, is_q ? 0 : g, G, D);
#endif
  // NVIDIA's compiler would begin sums before it has issued all loads: the barrier keeps the loads before it, the
  // branch the sums behind it. A simdgroup past the last head loads the last head.
  float low_norm[STEPS][4], high_norm[STEPS][4], cosine[STEPS][4], sine[STEPS][4];
  float low[STEPS][4], high[STEPS][4];  // dimensions i and i + D / 2
  EACH_STEP {
    load4(norm + i, low_norm[p]);
    load4(norm + i + D / 2, high_norm[p]);
  }
  INPUTS_READY();
  EACH_STEP {
    load4(rope + t * D + i, cosine[p]);
    load4(rope + t * D + i + D / 2, sine[p]);
  }
  EACH_STEP {
    load4(from + i, low[p]);
    load4(from + i + D / 2, high[p]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (own < units) {
    float squares = 0;
    EACH_STEP {
      UNROLL
      for (int j = 0; j < 4; j++) squares += low[p][j] * low[p][j] + high[p][j] * high[p][j];
    }
    const float scale = is_v && !VALUE_NORM ? 1.0f : rsqrt(sum_lanes(squares, 32) / float(D) + EPS);

    device C* to = q_out + (t * H + head) * D;
#if POOL
    if (!is_q) to = (device C*)(is_v ? pool_v : pool_k) + slot;
#elif KV
    if (!is_q) to = (is_v ? new_v : new_k) + (g * room + used + t) * D;
#endif
    EACH_STEP {
      UNROLL
      for (int j = 0; j < 4; j++) {
        float a = low[p][j] * scale, b = high[p][j] * scale;
        if (!is_v) {
          a *= low_norm[p][j];
          b *= high_norm[p][j];
          const float turned = a * cosine[p][j] - b * sine[p][j];
          b = b * cosine[p][j] + a * sine[p][j];
          a = turned;
        }
        low[p][j] = a;
        high[p][j] = b;
      }
      store4(to + i, low[p]);
      store4(to + i + D / 2, high[p]);
    }
  }
}
#if KV && !POOL
else {
  INPUTS_READY();
  constexpr int ROW = D * C_BYTES / 16;  // pieces of 16 bytes
  const int pieces = G * room * ROW;
  const int i = (group - head_groups) * 128 + int(thread_index_in_threadgroup), at = min(i, pieces - 1);
  const uint4 old_k = ((const device uint4*)tail_k)[at], old_v = ((const device uint4*)tail_v)[at];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i < pieces && i / ROW % room < used) {
    ((device uint4*)new_k)[i] = old_k;
    ((device uint4*)new_v)[i] = old_v;
  }
}
#endif

// kernel: rotations(position, wavelengths) -> (rope)
// rope[t, 0, i] = cos a, rope[t, 1, i] = sin a with a = (position[0] + t) / wavelengths[i] (infinity: a = 0), once for
// all layers of a kind. position int32 [1], wavelengths fp32 [HALF], rope fp32 [tokens, 2, HALF]. With BY_ROW each
// token has its own: position int32 [tokens, ..], of which the first of each row counts.
// Threads: one an angle, 32 a threadgroup, to spread slow sines over many cores; grid (32 ceil(HALF / 32), tokens, 1).
const int i = int(threadgroup_position_in_grid.x) * 32 + int(thread_index_in_threadgroup);
const int t = int(threadgroup_position_in_grid.y);
if (i < HALF) {
#if BY_ROW
  const int at = position[t * int(position_shape[1])];
#else
  const int at = position[0] + t;
#endif
  const float angle = float(at) * (1.0f / wavelengths[i]);
  rope[t * 2 * HALF + i] = cos(angle);
  rope[t * 2 * HALF + HALF + i] = sin(angle);
}

// kernel: fill_pages(new_k, new_v, places, pool_k, pool_v) -> (done)
// Copy keys and values of a sequence into its pages, in place: of new_k, new_v [1, G, rows, D] those from row
// PLACE_POSITION on become the tokens from PLACE_FROM to PLACE_TO of the one row of places. A thread copies 16 bytes of
// each. grid (128 ceil(n D sizeof(C) / 16 / 128), G, 1) for n tokens. Rendered before: C_BYTES, G, D, PAGE.
constexpr int CHUNKS = D * C_BYTES / 16;
const int from = places[PLACE_FROM], n = places[PLACE_TO] - from, g = int(threadgroup_position_in_grid.y);
const int i = int(threadgroup_position_in_grid.x) * 128 + int(thread_index_in_threadgroup);
if (i < n * CHUNKS) {
  const ulong to = paged(places, from + i / CHUNKS, g, G, CHUNKS) + ulong(i % CHUNKS);
  const ulong at = (ulong(g) * ulong(new_k_shape[2]) + ulong(places[PLACE_POSITION])) * CHUNKS + ulong(i);
  ((device uint4*)pool_k)[to] = ((const device uint4*)new_k)[at];
  ((device uint4*)pool_v)[to] = ((const device uint4*)new_v)[at];
}
if (i == 0 && g == 0) done[0] = n;
