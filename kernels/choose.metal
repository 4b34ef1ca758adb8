// The choice of a token's experts.

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
