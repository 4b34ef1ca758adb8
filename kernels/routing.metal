// A few rows' chosen experts, sorted by expert and cut into tiles, for kernels that take a tile at a time.

// kernel: route(ids) -> (order, tiles)
// ids int32 [T, USED] -> order int32 [T USED]: numbers of the chosen, as if in one row, expert after expert; tiles
// int32 [.., 3]: expert, first and one past the last of `order`, at most ROWS; 0, 0, 0 in tiles that are left over.
// One threadgroup of 32 SG. Each thread counts for its own chosen and its own experts which come before: a few hundred.
// Rendered before: EXPERTS of them, MOST chosen at once, ROWS of a tile, SG.
threadgroup int chosen[MOST];
threadgroup int counts[EXPERTS];
const int thread_index = int(thread_index_in_threadgroup), threads = 32 * SG;
const int PAIRS = ids_shape[0] * ids_shape[1], TILES = min(PAIRS, PAIRS / ROWS + EXPERTS);
for (int i = thread_index; i < PAIRS; i += threads) chosen[i] = ids[i];
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int i = thread_index; i < PAIRS; i += threads) {
  const int own = chosen[i];
  int place = 0;
#pragma unroll(8)
  for (int j = 0; j < PAIRS; j++) place += chosen[j] < own || (chosen[j] == own && j < i) ? 1 : 0;
  order[place] = i;
}
for (int e = thread_index; e < EXPERTS; e += threads) {
  int count = 0;
#pragma unroll(8)
  for (int j = 0; j < PAIRS; j++) count += chosen[j] == e ? 1 : 0;
  counts[e] = count;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int e = thread_index; e <= EXPERTS; e += threads) {
  int first = 0, tile = 0;
#pragma unroll(8)
  for (int before = 0; before < EXPERTS; before++) {
    first += before < e ? counts[before] : 0;
    tile += before < e ? (counts[before] + ROWS - 1) / ROWS : 0;
  }
  const int last = e < EXPERTS ? first + counts[min(e, EXPERTS - 1)] : 0;
  if (e == EXPERTS) first = 0;
  for (int t = tile; e < EXPERTS ? first < last : t < TILES; t++) {  // behind the last expert: what is left over
    tiles[3 * t] = e < EXPERTS ? e : 0;
    tiles[3 * t + 1] = first;
    tiles[3 * t + 2] = min(first + ROWS, last);
    first += e < EXPERTS ? ROWS : 0;
  }
}
