// Sums of many rows over ranks whose GPUs can write to each other's memory: those of prompts (model/exchange.py).
//
// A number with a flag beside it, as in exchange.metal, would take twice the way, and here bytes count. So each
// threadgroup writes its share of numbers, 16 bytes a store, to its place in each other rank's box, then one flag for all
// of them, and waits for the same threadgroup of each other rank. A share too large for that place goes over in pieces,
// which turn between two halves of the box as exchanges do there. Each threadgroup counts its pieces, in its own box: so
// a launch needs nothing from the host, and is the same each time. All threadgroups take part in all pieces, also those
// for which no numbers are left: a count has to be the same on all ranks, and follow the halves' turns.
// Sums are fp32, added in the order of ranks.
//
// A box: counts uint [GROUPS], flags uint [2][RANKS][GROUPS], from byte HEAD on words [2][RANKS][GROUPS][ROOM]. A word is
// 16 bytes, or a number where rows are no multiple of that. All zeros before the first launch.
//
// Rendered before: T, RANK, RANKS, GROUPS, THREADS, ROOM, HEAD, WIDE (words of 16 bytes), KX, KY (numbers of a row).
//
// uses: boxes.metal

#ifndef SYSTEM_FENCE  // cuda.h: earlier writes are seen before later ones, also by other GPUs
#define SYSTEM_FENCE()  // Metal's GPUs share no memory
#endif
#ifdef CUDA
#define LAUNCH_BOUNDS __launch_bounds__(THREADS)
#endif
#if !WIDE
#define WORD 1
#define LOAD_WORD(p, v) v[0] = float(*(p))
#define STORE_WORD(p, v) *(p) = T(v[0])
#elif T_FLOAT
#define WORD 4
#define LOAD_WORD(p, v) load4(p, v)
#define STORE_WORD(p, v) store4(p, v)
#else
#define WORD 8
#define LOAD_WORD(p, v) load8(p, v)
#define STORE_WORD(p, v) store8(p, v)
#endif
#if KY
#define WORD_AT(x, y, i) ((i) < in_x ? (x) + (i) * WORD : (y) + ((i) - in_x) * WORD)
#else
#define WORD_AT(x, y, i) ((x) + (i) * WORD)
#endif

#define AT_ONCE (WORD == 8 || KY ? 2 : 4)  // words that a thread has under way
// For each n, the word `i` of those.
#define EACH_WORD UNROLL for (int n = 0, i = at; n < AT_ONCE; n++, i += THREADS) if (i < stop)

// What rank `from` writes to another's box, for the threadgroup: its flag, its words.
METAL_FUNC volatile device uint* flag_of(const device uint* boxes, int rank, uint turn, int from, int group) {
  return (volatile device uint*)box_of(boxes, rank) + GROUPS + (turn * RANKS + from) * GROUPS + group;
}
METAL_FUNC device T* words_of(const device uint* boxes, int rank, uint turn, int from, int group) {
  const ulong place = ulong((turn * RANKS + from) * GROUPS + group) * ROOM * WORD;
  return (device T*)((device char*)box_of(boxes, rank) + HEAD) + place;
}

// kernel: exchange_many(x, y?, boxes) -> (out, out_y?)
// out = x and out_y = y, summed over ranks: T [rows, KX], [rows, KY]. boxes uint32 [.., 2], their addresses, low half
// first.
// Threads: GROUPS threadgroups, which have to be on the GPU all at once. Reads x twice, all else once.
const int thread_index = int(thread_index_in_threadgroup), group = int(threadgroup_position_in_grid.x);
INPUTS_READY();
const int in_x = x_shape[0] * KX / WORD, words = in_x + x_shape[0] * KY / WORD;
const int pieces = (words + GROUPS * ROOM - 1) / (GROUPS * ROOM);
const int share = (words + GROUPS * pieces - 1) / (GROUPS * pieces);
volatile device uint* count = (volatile device uint*)box_of(boxes, RANK) + group;
uint number = *count;
for (int p = 0; p < pieces; p++) {
  const uint turn = ++number & 1;
  const int start = min((p * GROUPS + group) * share, words), stop = min(start + share, words);
  device T* theirs[RANKS];        // this rank's words in the others' boxes
  const device T* found[RANKS];  // theirs in this one's
  UNROLL
  for (int r = 0; r < RANKS; r++) {
    theirs[r] = words_of(boxes, r, turn, RANK, group) - ulong(start) * WORD;
    found[r] = words_of(boxes, RANK, turn, r, group) - ulong(start) * WORD;
  }
  for (int at = start + thread_index; at < stop; at += AT_ONCE * THREADS) {
    float v[AT_ONCE][WORD];
    EACH_WORD LOAD_WORD(WORD_AT(x, y, i), v[n]);
    EACH_WORD {
      UNROLL
      for (int r = 0; r < RANKS; r++)
        if (r != RANK) STORE_WORD(theirs[r] + i * WORD, v[n]);
    }
  }
  threadgroup_barrier(mem_flags::mem_device);
  if (thread_index < RANKS && thread_index != RANK) {
    SYSTEM_FENCE();
    *flag_of(boxes, thread_index, turn, RANK, group) = number;
    while (*flag_of(boxes, RANK, turn, thread_index, group) != number) {
    }
    SYSTEM_FENCE();
  }
  threadgroup_barrier(mem_flags::mem_device);
  for (int at = start + thread_index; at < stop; at += AT_ONCE * THREADS) {
    float sum[AT_ONCE][WORD], v[AT_ONCE][WORD];
    UNROLL
    for (int r = 0; r < RANKS; r++) {
      EACH_WORD LOAD_WORD(r == RANK ? WORD_AT(x, y, i) : found[r] + i * WORD, v[n]);
      EACH_WORD {
        UNROLL
        for (int j = 0; j < WORD; j++) sum[n][j] = r ? sum[n][j] + v[n][j] : v[n][j];
      }
    }
    EACH_WORD STORE_WORD(WORD_AT(out, out_y, i), sum[n]);
  }
}
threadgroup_barrier(mem_flags::mem_device);
if (thread_index == 0) *count = number;
