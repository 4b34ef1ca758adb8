// Keys and values of one sequence in up to 8 parts, cut into pieces that threadgroups take: what `attention` and
// `long_attention` share.
//
// All parts are bound: absent ones are copies of the first, with an empty span. How the parts are cut is an input, `cut`
// (mlx_gemma4/ops/parts.py), so that one text serves a conversation however long it grows: a piece is `share` tokens of
// the capacity of one part, the last of a part perhaps shorter; pieces are numbered through all parts. So they do not
// move as spans grow, and one outside of the spans is empty.
//
// Rendered before: T (dtype of keys and values).

#define MAX_PARTS 8
#define SHARE_AT 0                  // in `cut`: tokens of a piece
#define WINDOW_AT 1                 // tokens that a query sees; 0: all
#define CAPACITY_AT 2               // of each part, in tokens
#define FIRST_AT (2 + MAX_PARTS)    // the first piece of each part; of an absent one, the number of all pieces

struct Part {
  const device T* k;
  const device T* v;
};

struct Piece {
  const device T* k;  // of token 0 of its part, KV head g
  const device T* v;
  int from;    // first token in use, within the part
  int to;      // and one past the last
  int before;  // tokens in use in the parts before, less the part's first one in use: token i is number before + i of all
  int total;   // tokens in use in all parts
};

// Indices of parts are constants, so that pointers stay in registers.
METAL_FUNC Piece find_piece(const thread Part* parts, const device int* spans, const device int* cut, int piece, int g,
                            int dim) {
  Piece found = {parts[0].k, parts[0].v, 0, 0, 0, 0};
  int capacity = 0;
  UNROLL
  for (int i = 0; i < MAX_PARTS; i++) {
    const int begin = spans[2 * i], end = spans[2 * i + 1], first = cut[FIRST_AT + i];
    if (piece >= first) {
      found.k = parts[i].k;
      found.v = parts[i].v;
      capacity = cut[CAPACITY_AT + i];
      found.from = max(begin, (piece - first) * cut[SHARE_AT]);
      found.to = min(end, (piece - first + 1) * cut[SHARE_AT]);
      found.before = found.total - begin;
    }
    found.total += end - begin;
  }
  const ulong at = ulong(g) * ulong(capacity) * ulong(dim);
  found.k += at;
  found.v += at;
  return found;
}
