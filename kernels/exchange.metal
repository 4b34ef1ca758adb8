// Sums, and rows of all logits, over ranks whose GPUs can write to each other's memory (model/exchange.py).
//
// Each rank has a box that all others write to: [2][RANKS][CAP] words of 64 bits, a number's bits below a flag. A rank
// writes its numbers to its place in each other's box, then waits until those of the others are in its own: one store
// brings number and flag, so nothing else has to be waited for. Flags count the exchanges, the same on all ranks. An odd
// one and an even one take turns: who is at exchange n + 1 has had all of n from everybody, and everybody has left n - 1.
// Sums are added in the order of ranks, so they are the same to the bit everywhere.
//
// Rendered before: RANK, RANKS, CAP, COUNT (numbers of this rank), STEP (threads of the grid).
//
// uses: boxes.metal

// kernel: exchange_sum(x, outputs?, share?, flag, boxes, after?) -> (out)
// out = x, summed over ranks. With outputs [T, USED, K] and share [T, USED], out [2, T, K] holds sums of x and of
// share * outputs. flag int32 [1], boxes uint32 [.., 2], their addresses, low half first; after: of an earlier
// exchange, so that they follow each other.
// Threads: any number, each takes every STEPth number. Reads everything once.
const int first = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
volatile device ulong* box = box_of(boxes, RANK);
INPUTS_READY();
const uint turn = uint(flag[0]);
for (int i = first; i < COUNT; i += STEP) {
#if USED
  float value = 0;
  if (i < COUNT / 2) {
    value = x[i];
  } else {
    const int t = (i - COUNT / 2) / K, k = i % K;
    for (int u = 0; u < USED; u++) value += share[t * USED + u] * outputs[(t * USED + u) * K + k];
  }
#else
  const float value = x[i];
#endif
  out[i] = value;
  tell(boxes, turn, i, value);
}
simdgroup_barrier(mem_flags::mem_none);  // all lanes have told before one waits
for (int i = first; i < COUNT; i += STEP) {
  float sum = 0;
  for (int r = 0; r < RANKS; r++) sum += r == RANK ? out[i] : told(box, turn, r, i);
  out[i] = sum;
}

// kernel: exchange_rows(x, flag, boxes, after?) -> (out)
// out [T, ALL], whose columns ranks have in their order, of x [T, COLUMNS]: rank r those from r ALL / RANKS on.
const int first = int(threadgroup_position_in_grid.x) * THREADS + int(thread_index_in_threadgroup);
volatile device ulong* box = box_of(boxes, RANK);
INPUTS_READY();
const uint turn = uint(flag[0]);
for (int i = first; i < COUNT; i += STEP) tell(boxes, turn, i, x[i]);
simdgroup_barrier(mem_flags::mem_none);
for (int r = 0; r < RANKS; r++) {
  const int start = int(long(r) * ALL / RANKS), columns = int(long(r + 1) * ALL / RANKS) - start;
  for (int i = first; i < COUNT / COLUMNS * columns; i += STEP) {
    out[i / columns * ALL + start + i % columns] = r == RANK ? x[i] : told(box, turn, r, i);
  }
}
