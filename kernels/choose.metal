// Choices: the experts of a token, and its next token.

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

// kernel: argmax_pieces(logits) -> (best, at)
// The largest of each piece of a row of logits, and where (the lowest of equals): best fp32, at int32 [tokens, pieces].
// logits [tokens, V] in T. Threadgroup of 32 SG, grid (32 SG pieces, tokens, 1). Reads the logits once.
const int lane = int(thread_index_in_simdgroup), sg = int(simdgroup_index_in_threadgroup);
const int piece = int(threadgroup_position_in_grid.x), pieces = int(threadgroups_per_grid.x);
const int token = int(threadgroup_position_in_grid.y), V = logits_shape[1];
const int share = (V + pieces - 1) / pieces, from = piece * share, to = min(from + share, V);
float a = NOTHING;
int i = min(from, V - 1);
for (int v = from + int(thread_index_in_threadgroup); v < to; v += 32 * SG)
  better(a, i, float(logits[ulong(token) * ulong(V) + ulong(v)]), v);
threadgroup float values[SG];
threadgroup int places[SG];
best_group(a, i, values, places, SG, sg, lane);
if (thread_index_in_threadgroup == 0) {
  best[token * pieces + piece] = a;
  at[token * pieces + piece] = i;
}

// kernel: argmax_merge(best, at) -> (token)
// The best of the pieces: token int32 [tokens]. One simdgroup a token, grid (32, tokens, 1).
const int lane = int(thread_index_in_simdgroup), row = int(threadgroup_position_in_grid.y);
const int pieces = best_shape[1];
float a = NOTHING;
int i = 0x7FFFFFFF;
for (int p = lane; p < pieces; p += 32) better(a, i, best[row * pieces + p], at[row * pieces + p]);
best_lane(a, i);
if (lane == 0) token[row] = i;
