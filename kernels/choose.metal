// The choice of a token's experts, and of an assistant's tokens.

// uses: best.metal

// kernel: top_k(scores, scale?) -> (ids, share)
// The USED largest of E scores a token, best first, and their softmax, times scale[expert] with SCALED.
// scores fp32 [tokens, E], ids int32 and share fp32 [tokens, USED]. One simdgroup a token, E / 32 scores a lane;
// grid (32, tokens, 1). Moves a few hundred bytes.
const int lane = int(thread_index_in_simdgroup), token = int(threadgroup_position_in_grid.y);
constexpr int EACH = (E + 31) / 32;
float score[EACH];
UNROLL
for (int i = 0; i < EACH; i++) score[i] = i * 32 + lane < E ? float(scores[token * E + i * 32 + lane]) : NOTHING;

float top = 0, total = 0, mine = 0;
int my_id = 0;
for (int u = 0; u < USED; u++) {
  float best = NOTHING;
  int id = E - 1;
  UNROLL
  for (int i = 0; i < EACH; i++) better(best, id, score[i], i * 32 + lane);
  best_lane(best, id);
  if (u == 0) top = best;
  const float weight = exp(best - top);
  total += weight;
  if (u % 32 == lane) {
    mine = weight;
    my_id = id;
  }
  UNROLL
  for (int i = 0; i < EACH; i++) {
    if (i * 32 + lane == id) score[i] = NOTHING;
  }
}
if (lane < USED) {
  float weight = mine / total;
#if SCALED
  weight *= scale[my_id];
#endif
  ids[token * USED + lane] = my_id;
  share[token * USED + lane] = weight;
}

// kernel: spread(logits, near, ordering) -> (out)
// Logits of all tokens where some have been scored, others at the lowest less 1: out[0, ordering[c PER + i]] is
// logits[u, i] where near[u] is c. logits fp32 [USED, PER], near int32 [USED], ordering int32 [V], out fp32 [1, V].
// Threadgroup 256, grid (256 ceil(V / 2048), 1, 1). Each threadgroup reads all logits, for the lowest.
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int me = int(thread_index_in_threadgroup), first = int(threadgroup_position_in_grid.x) * 2048;
threadgroup float room[8];
float high = NOTHING;  // of negated logits
for (int i = me; i < USED * PER; i += 256) high = max(high, -logits[i]);
high = max_lanes(high);
if (lane == 0) room[sg] = high;
threadgroup_barrier(mem_flags::mem_threadgroup);
const float others = -max_lanes(room[lane % 8]) - 1.0f;
for (int at = first + me; at < min(first + 2048, V); at += 256) {
  float value = others;
  for (int u = 0; u < USED; u++) {
    if (near[u] == at / PER) value = logits[u * PER + at % PER];
  }
  out[ordering[at]] = value;
}
