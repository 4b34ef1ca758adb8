// Keys and values of several sequences in pages of one pool: where the tokens of a row lie.
//
// pool_k, pool_v [pages, G, PAGE, D]. places int32 [rows, 5 + ..]: of each row the position of its new token, the first
// token that it sees and one past the last, which is the new one, the tokens of a piece, how many of the last tokens the
// step itself writes (more than one where rows before are of the same sequence), then its pages in order. Tokens are
// counted from the beginning of the row's first page on, which with a window is not the sequence's.
//
// A pool is written in place, by launches that get it as an input (MLX gives none as an output): qkv.metal writes the
// new token's key and value, attention.metal reads them later. MLX knows nothing of it; what orders them is that
// attention takes q, an output of that write's launch, and that the next write takes what came of this attention.
//
// Rendered before: PAGE (tokens of a page).

#ifndef PAGE
#define PAGE 128
#endif

#define PLACE_POSITION 0
#define PLACE_FROM 1
#define PLACE_TO 2
#define PLACE_SHARE 3
#define PLACE_OWN 4
#define PLACE_PAGES 5

// Of token `at` of a row, the first number of KV head g, of `heads`.
METAL_FUNC ulong paged(const device int* place, int at, int g, int heads, int dim) {
  return (ulong(place[PLACE_PAGES + at / PAGE] * heads + g) * PAGE + ulong(at % PAGE)) * ulong(dim);
}
