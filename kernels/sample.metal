// The next token of each row of logits: temperature, top-k, top-p, min-p and a seeded draw, in two launches.
//
// draws int32 [rows, 8], how each row's token is drawn, as `Draw` of ops/sample.py writes it: the bits of a float
// temperature (0: the likeliest token), top_k (0: all, else up to MOST), the bits of top_p and min_p, two words of a
// seed, position, the bits of the softcap that the logits still lack (0: none). A draw is the largest logit /
// temperature + noise (the Gumbel-max trick), where the noise follows from seed, position and token alone.
// Rendered: SG simdgroups a threadgroup, EACH numbers a thread, MOST; LEADS: of rows of temperature 0, by how much the
// likeliest token's logit, after any softcap, is above the next best is told too.
// uses: best.metal

#define LAUNCH_BOUNDS __launch_bounds__(32 * SG)  // for CUDA

struct Words {
  uint a, b;
};

// Threefry-2x32 in 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), as MLX has it: two
// words of noise from a key and a counter.
METAL_FUNC Words threefry(Words key, uint a, uint b) {
  const uint keys[3] = {key.a, key.b, key.a ^ key.b ^ 0x1BD11BDAu};
  const int turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  a += keys[0];
  b += keys[1];
  UNROLL
  for (int r = 0; r < 20; r++) {
    a += b;
    b = a ^ (b << turns[r % 8] | b >> (32 - turns[r % 8]));
    if (r % 4 == 3) {
      a += keys[(r / 4 + 1) % 3];
      b += keys[(r / 4 + 2) % 3] + uint(r / 4 + 1);
    }
  }
  Words made;
  made.a = a;
  made.b = b;
  return made;
}

// Noise of a token, with a Gumbel distribution: -log(-log(1 - u)). `key`: of the row's seed and position.
METAL_FUNC float noise(Words key, int token) {
  key.b ^= uint(token);
  const float u = min(max(float(threefry(key, 0, 0).a) * 2.3283064e-10f, 1.1641532e-10f), 0.99999994f);  // 2^-32, 2^-33
  // -log(1 - u) by its series where 1 - u would round u away
  const float series = 1.0f + u * (1.0f / 2 + u * (1.0f / 3 + u * (1.0f / 4 + u * (1.0f / 5 + u * (1.0f / 6 + u / 7)))));
  return -log(u < 0.125f ? u * series : -log(1.0f - u));
}

METAL_FUNC float capped(float logit, float cap) { return cap > 0.0f ? cap * tanh(logit / cap) : logit; }

// Logits as whole numbers of the same order, all over 0.
METAL_FUNC uint ordered(float logit) {
  uint bits = as_type<uint>(logit);
  if (bits == 0x80000000u) bits = 0;  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
METAL_FUNC float logit_of(uint key) { return as_type<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

// Where the k largest of a threadgroup's keys end, equal ones by the lower id: `least` and `end` for `in_front`. A key
// of 0 is none; with fewer than k others, all are in front. `room`: SG floats.
METAL_FUNC void cut(
    const thread uint* key, const thread int* id, int k, thread uint& least, thread int& end, threadgroup float* room,
    int sg, int lane) {
  least = 0;
  end = 0x7FFFFFFF;
  for (int bit = 31; bit >= 0; bit--) {
    const uint trial = least | 1u << bit;
    float count = 0;
    UNROLL
    for (int i = 0; i < EACH; i++) count += key[i] >= trial ? 1.0f : 0.0f;
    count = sum_group(count, room, SG, sg, lane);
    if (count >= float(k)) least = trial;
    if (count == float(k)) return;
  }
  end = 0;
  if (least == 0) return;
  for (int bit = 30; bit >= 0; bit--) {  // more than k: which of those that equal the least
    const int trial = end | 1 << bit;
    float count = 0;
    UNROLL
    for (int i = 0; i < EACH; i++) count += key[i] > least || (key[i] == least && id[i] < trial) ? 1.0f : 0.0f;
    if (sum_group(count, room, SG, sg, lane) <= float(k)) end = trial;
  }
}
METAL_FUNC bool in_front(uint key, int id, uint least, int end) { return key > least || (key == least && id < end); }

// Sum of `mine` over the threads before this one; `all`: over all. `room`: SG floats that nobody reads any more.
METAL_FUNC int sum_before(int mine, thread int& all, threadgroup float* room, int sg, int lane) {
  int upto = mine;
  UNROLL
  for (int m = 1; m < 32; m *= 2) {
    const int other = simd_shuffle(upto, ushort(max(lane - m, 0)));
    if (lane >= m) upto += other;
  }
  if (lane == 31) room[sg] = float(upto);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int before = upto - mine;
  all = 0;
  for (int s = 0; s < SG; s++) {
    if (s < sg) before += int(room[s]);
    all += int(room[s]);
  }
  return before;
}

// Largest over the threadgroup; every thread gets it. `room`: SG floats that nobody reads any more.
METAL_FUNC float max_group(float v, threadgroup float* room, int sg, int lane) {
  v = max_lanes(v);
  if (lane == 0) room[sg] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  v = max_lanes(lane < SG ? room[lane] : NOTHING);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return v;
}

#if LEADS
// `best_group` that also finds the second best, which may equal the best.
METAL_FUNC void two_lane(thread float& a, thread int& i, thread float& second) {
  UNROLL
  for (int m = 16; m > 0; m /= 2) {
    const float b = simd_shuffle_xor(a, ushort(m));
    const int j = simd_shuffle_xor(i, ushort(m));
    second = max(max(second, simd_shuffle_xor(second, ushort(m))), min(a, b));
    better(a, i, b, j);
  }
}
METAL_FUNC void two_group(
    thread float& a, thread int& i, thread float& second, threadgroup float* values, threadgroup int* places,
    threadgroup float* seconds, int simdgroup, int lane) {
  two_lane(a, i, second);
  if (lane == 0) {
    values[simdgroup] = a;
    places[simdgroup] = i;
    seconds[simdgroup] = second;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    a = lane < SG ? values[lane] : NOTHING;
    i = lane < SG ? places[lane] : 0x7FFFFFFF;
    second = lane < SG ? seconds[lane] : NOTHING;
    two_lane(a, i, second);
  }
}
#endif

// kernel: sample_pieces(logits, draws) -> (values, ids)
// Of each piece of a row, 32 SG EACH logits, the top_k largest, ids of -1 behind them if it has fewer. Without top_k
// and for temperature 0 the choice itself: its logit, id, and as the second value its noise, or the next best logit with
// LEADS. logits [rows, V] in T, values fp32 and ids int32 [rows, pieces, MOST]. Grid (32 SG pieces, rows, 1). Reads the
// logits once.
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int me = int(thread_index_in_threadgroup), row = int(threadgroup_position_in_grid.y);
const int piece = int(threadgroup_position_in_grid.x), pieces = int(threadgroups_per_grid.x), V = logits_shape[1];
const int first = piece * (32 * SG * EACH), at = (row * pieces + piece) * MOST;
const float temperature = as_type<float>(draws[row * 8]), cap = as_type<float>(draws[row * 8 + 7]);
const int k = draws[row * 8 + 1];
threadgroup float room[SG];
threadgroup int places[SG];
float logit[EACH];
int id[EACH];
UNROLL
for (int i = 0; i < EACH; i++) {
  id[i] = first + i * 32 * SG + me;
  logit[i] = id[i] < V ? float(logits[ulong(row) * ulong(V) + ulong(id[i])]) : 0.0f;
}
if (temperature == 0.0f || k == 0) {
  Words key;
  key.a = uint(draws[row * 8 + 4]);
  key.b = uint(draws[row * 8 + 5]);
  float best = NOTHING, top = NOTHING;
  int best_id = first;
  if (temperature != 0.0f) {
    key = threefry(key, uint(draws[row * 8 + 6]), 0);
    UNROLL
    for (int i = 0; i < EACH; i++) {
      logit[i] = capped(logit[i], cap);
      top = max(top, id[i] < V ? logit[i] : NOTHING);
    }
    top = max_group(top, room, sg, lane);  // noise added to a large number would be rounded away
    UNROLL
    for (int i = 0; i < EACH; i++) logit[i] = (logit[i] - top) / temperature + noise(key, id[i]);
  }
#if LEADS
  threadgroup float seconds[SG];
  float second = NOTHING;
#endif
  UNROLL
  for (int i = 0; i < EACH; i++) {
    if (id[i] < V) {
#if LEADS
      second = max(second, min(best, logit[i]));
#endif
      better(best, best_id, logit[i], id[i]);
    }
  }
#if LEADS
  two_group(best, best_id, second, room, places, seconds, sg, lane);
  if (me == 0 && temperature == 0.0f) values[at + 1] = second;
#else
  best_group(best, best_id, room, places, SG, sg, lane);
#endif
  if (me == 0) {
    if (temperature != 0.0f) {
      best = max(NOTHING, capped(float(logits[ulong(row) * ulong(V) + ulong(best_id)]), cap));
      values[at + 1] = noise(key, best_id);
    }
    values[at] = best;
    ids[at] = best_id;
  }
} else {
  uint key[EACH], least;
  int end, mine = 0, all;
  UNROLL
  for (int i = 0; i < EACH; i++) key[i] = id[i] < V ? ordered(logit[i]) : 0;
  cut(key, id, k, least, end, room, sg, lane);
  UNROLL
  for (int i = 0; i < EACH; i++) mine += in_front(key[i], id[i], least, end);
  int slot = sum_before(mine, all, room, sg, lane);
  UNROLL
  for (int i = 0; i < EACH; i++) {
    if (in_front(key[i], id[i], least, end)) {
      values[at + slot] = logit[i];
      ids[at + slot] = id[i];
      slot++;
    }
  }
  for (int i = all + me; i < k; i += 32 * SG) ids[at + i] = -1;
}

// kernel: sample_merge(values, ids, draws, before?) -> (token)
// The choice among the pieces' candidates: token int32 [rows], or with LEADS [2, rows], of which the second row has the
// bits of leads. With BEFORE, of one row, the tokens before int32 [n] stand before it. One threadgroup a row, 32 SG EACH candidates at most, grid (32 SG, rows, 1). Candidates need no order:
// each thread finds the sum of those before its own.
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int me = int(thread_index_in_threadgroup), row = int(threadgroup_position_in_grid.y);
const int pieces = values_shape[1], at = row * pieces * MOST;
const float temperature = as_type<float>(draws[row * 8]), cap = as_type<float>(draws[row * 8 + 7]);
const int k = draws[row * 8 + 1];
threadgroup float room[SG];
threadgroup int places[SG];
threadgroup float logit[MOST];
threadgroup float weight[MOST];
threadgroup int name[MOST];
float best = NOTHING;
int best_id = 0x7FFFFFFF;
#if LEADS
threadgroup float seconds[SG];
float second = NOTHING;
#endif
if (temperature == 0.0f || k == 0) {
  float top = NOTHING;
  if (temperature != 0.0f) {
    for (int p = me; p < pieces; p += 32 * SG) top = max(top, values[at + p * MOST]);
    top = max_group(top, room, sg, lane);
  }
  for (int p = me; p < pieces; p += 32 * SG) {
    float value = values[at + p * MOST];
    if (temperature != 0.0f) value = (value - top) / temperature + values[at + p * MOST + 1];
#if LEADS
    else second = max(max(second, values[at + p * MOST + 1]), min(best, value));
#endif
    better(best, best_id, value, ids[at + p * MOST]);
  }
} else {
  uint key[EACH], least;
  int id[EACH], end, mine = 0, n;
  UNROLL
  for (int i = 0; i < EACH; i++) {
    const int candidate = i * 32 * SG + me, from = at + candidate / k * MOST + candidate % k;
    id[i] = candidate < pieces * k ? ids[from] : -1;
    key[i] = id[i] >= 0 ? ordered(values[from]) : 0;
  }
  cut(key, id, k, least, end, room, sg, lane);
  UNROLL
  for (int i = 0; i < EACH; i++) mine += in_front(key[i], id[i], least, end) && key[i] > 0;
  int slot = sum_before(mine, n, room, sg, lane);
  UNROLL
  for (int i = 0; i < EACH; i++) {
    if (in_front(key[i], id[i], least, end) && key[i] > 0) {
      logit[slot] = logit_of(key[i]);
      name[slot] = id[i];
      slot++;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float top = NOTHING;
  if (me < n) {
    for (int i = 0; i < n; i++) top = max(top, logit[i]);
    top = capped(top, cap);
    weight[me] = exp(capped(logit[me], cap) - top);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (me < n) {
    float before = 0, all = 0;
    for (int i = 0; i < n; i++) {
      all += weight[i];
      if (logit[i] > logit[me] || (logit[i] == logit[me] && name[i] < name[me])) before += weight[i];
    }
    const float top_p = as_type<float>(draws[row * 8 + 2]), min_p = as_type<float>(draws[row * 8 + 3]);
    best_id = name[me];
    if ((top_p >= 1.0f || before < top_p * all) && weight[me] >= min_p) {
      Words seed;
      seed.a = uint(draws[row * 8 + 4]);
      seed.b = uint(draws[row * 8 + 5]);
      seed = threefry(seed, uint(draws[row * 8 + 6]), 0);
      best = max(best, (capped(logit[me], cap) - top) / temperature + noise(seed, best_id));
    }
  }
}
#if LEADS
two_group(best, best_id, second, room, places, seconds, sg, lane);
if (me == 0)
  token[int(threadgroups_per_grid.y) + row] =
      as_type<int>(temperature == 0.0f ? capped(best, cap) - capped(second, cap) : -NOTHING);
#else
best_group(best, best_id, room, places, SG, sg, lane);
#endif
#if BEFORE
const int earlier = int(before_shape[0]);
if (me < earlier) token[me] = before[me];
if (me == 0) token[earlier] = best_id;
#else
if (me == 0) token[row] = best_id;
#endif
