// Masks and ends, read eight tokens at a time. Functions of several arrays mean the tokens where
// all of them are true.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "segk/dtype.h"

namespace segk {

// Bools as the bytes that they are, because compilers vectorise loops over bytes. A tensor that
// became one of bools by a change of view may hold any byte, so reads give 0 or 1.
struct Flags {
  const uint8_t* data;

  uint8_t operator[](int64_t t) const { return data[t] != 0; }
};

inline Flags flags_of(const bool* flags) { return {reinterpret_cast<const uint8_t*>(flags)}; }

// value where the flag is 1, else 0, without a branch.
inline float keep(uint8_t flag, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return detail::bits_to_float(bits & -static_cast<uint32_t>(flag));
}

inline double keep(uint8_t flag, double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= -static_cast<uint64_t>(flag);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

namespace detail {

constexpr uint64_t kOneInEachByte = 0x0101010101010101;

inline uint64_t eight_bytes(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// Flags of tokens t to t + 8 as the bytes of a word, 0 or 1, the first in the lowest.
inline uint64_t eight(Flags flags, int64_t t) {
  uint64_t word = eight_bytes(flags.data + t);
  for (const int shift : {4, 2, 1}) word |= word >> shift;
  word &= kOneInEachByte;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

template <class... All>
uint64_t eight_of_all(int64_t t, All... flags) {
  return (eight(flags, t) & ...);
}

}  // namespace detail

// How many tokens of [begin, end).
template <class... All>
int64_t count_true(int64_t begin, int64_t end, All... flags) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  constexpr int64_t kMostWords = 255;  // what a byte can count
  int64_t count = 0;
  int64_t t = begin;
  while (end - t >= 8) {
    const int64_t words = std::min((end - t) / 8, kMostWords);
    uint64_t bytes = 0;
    for (int64_t i = 0; i < words; ++i) bytes += detail::eight_of_all(t + 8 * i, flags...);
    const uint64_t pairs = (bytes & kEvenBytes) + ((bytes >> 8) & kEvenBytes);
    count += static_cast<int64_t>((pairs * 0x0001000100010001) >> 48);
    t += 8 * words;
  }
  for (; t < end; ++t) count += (flags[t] & ...);
  return count;
}

// The first token of [begin, end), or end.
template <class... All>
int64_t first_true(int64_t begin, int64_t end, All... flags) {
  int64_t t = begin;
  while (end - t >= 8 && !detail::eight_of_all(t, flags...)) t += 8;
  while (t < end && !(flags[t] & ...)) ++t;
  return t;
}

// The last token of [begin, end), or begin - 1.
template <class... All>
int64_t last_true(int64_t begin, int64_t end, All... flags) {
  int64_t t = end;
  while (t - begin >= 8 && !detail::eight_of_all(t - 8, flags...)) t -= 8;
  while (t > begin && !(flags[t - 1] & ...)) --t;
  return t - 1;
}

// The first token of the run of true ones that ends before `end`, or `end`.
inline int64_t run_true(int64_t begin, int64_t end, Flags flags) {
  int64_t t = end;
  while (t - begin >= 8 && detail::eight(flags, t - 8) == detail::kOneInEachByte) t -= 8;
  while (t > begin && flags[t - 1]) --t;
  return t;
}

// Sum of term(t) over the tokens of [begin, end) where all flags are true, in double; term is
// called for the others too. Lanes, because a chain of sums would wait for each of them.
template <class Term, class... All>
double sum_true(int64_t begin, int64_t end, const Term& term, All... flags) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t t = begin;
  for (; end - t >= kLanes; t += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lanes[k] += keep((flags[t + k] & ...), static_cast<double>(term(t + k)));
    }
  }
  for (int64_t k = 0; t < end; ++t, ++k) {
    lanes[k] += keep((flags[t] & ...), static_cast<double>(term(t)));
  }
  for (int64_t step = kLanes / 2; step > 0; step /= 2) {
    for (int64_t k = 0; k < step; ++k) lanes[k] += lanes[k + step];
  }
  return lanes[0];
}

// Calls visit(t) for tokens of [begin, end) from the last to the first.
template <class Visit, class... All>
void visit_true_backward(int64_t begin, int64_t end, Visit visit, All... flags) {
  int64_t t = end;
  for (; t - begin >= 8; t -= 8) {
    uint64_t word = detail::eight_of_all(t - 8, flags...);
    while (word) {
      const int top = 7 - __builtin_clzll(word) / 8;
      visit(t - 8 + top);
      word ^= uint64_t{1} << (8 * top);
    }
  }
  while (t-- > begin) {
    if ((flags[t] & ...)) visit(t);
  }
}

}  // namespace segk
