// Boxes: memory of each rank that the others write to (exchange.metal, exchange_many.metal, norms.metal).
//
// Rendered before: RANK, RANKS (0: there is but one); CAP where a box holds words of a number and its flag: exchange.metal
// says how.

#if RANKS
METAL_FUNC volatile device ulong* box_of(const device uint* boxes, int rank) {
  return (volatile device ulong*)(ulong(boxes[2 * rank + 1]) << 32 | ulong(boxes[2 * rank]));
}
#endif

#ifdef CAP
// Where number i of rank `from` lies in a box.
METAL_FUNC ulong place(uint flag, int from, int i) { return ulong((flag & 1) * RANKS + from) * CAP + i; }

METAL_FUNC ulong word_of(uint flag, float value) { return ulong(flag) << 32 | ulong(as_type<uint>(value)); }

METAL_FUNC void tell(const device uint* boxes, uint flag, int i, float value) {
  for (int r = 0; r < RANKS; r++) {
    if (r != RANK) box_of(boxes, r)[place(flag, RANK, i)] = word_of(flag, value);
  }
}

METAL_FUNC float told(volatile device ulong* box, uint flag, int from, int i) {
  ulong word;
  do word = box[place(flag, from, i)];
  while (uint(word >> 32) != flag);
  return as_type<float>(uint(word));
}
#endif
