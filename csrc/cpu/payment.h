// The rewards of segments, paid to their tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/elementary.h"
#include "cpu/flags.h"
#include "segk/advantages.h"
#include "segk/operators.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace segk {
namespace detail {

#if defined(__AVX2__)
// The lanes of the bits that are set in each byte, in the bytes of a word.
struct SetLanes {
  uint64_t of[256] = {};

  constexpr SetLanes() {
    for (int bits = 0; bits < 256; ++bits) {
      int found = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) of[bits] |= static_cast<uint64_t>(lane) << (8 * found++);
      }
    }
  }
};

inline __m256i widened(uint64_t bytes) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
}

template <class Rewards>
__m256 eight_floats(const Rewards& x, int64_t t) {
  return _mm256_setr_ps(x[t], x[t + 1], x[t + 2], x[t + 3], x[t + 4], x[t + 5], x[t + 6], x[t + 7]);
}

inline __m256 eight_floats(const Stored<DType::f32>& x, int64_t t) {
  return _mm256_loadu_ps(static_cast<const float*>(x.data) + t);
}
#endif

// Flags are bytes that are 0 or 1 here.

// Of the `size` tokens from `start` on, the rewards of those where `closes` is 1, and how many of
// `action` are 1 up to there. Returns how many; writes up to eight elements more.
template <class Rewards>
int32_t pick(const Rewards& rewards, int64_t start, const uint8_t* closes, const uint8_t* action,
             int32_t size, float* reward, int32_t* upto) {
  int32_t found = 0;
  int32_t tokens = 0;
  int32_t i = 0;
#if defined(__AVX2__)
  static constexpr SetLanes set_lanes;
  for (; size - i >= 8; i += 8) {
    const uint64_t ends = eight_bytes(closes + i);
    const uint64_t counts = eight_bytes(action + i) * kOfEachByte;  // up to each, inclusively
    const __m256i chosen = widened(set_lanes.of[(ends * 0x0102040810204080) >> 56]);
    const __m256 all_rewards = eight_floats(rewards, start + i);
    const __m256i all_upto = _mm256_add_epi32(widened(counts), _mm256_set1_epi32(tokens));
    _mm256_storeu_ps(reward + found, _mm256_permutevar8x32_ps(all_rewards, chosen));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(upto + found),
                        _mm256_permutevar8x32_epi32(all_upto, chosen));
    found += static_cast<int32_t>((ends * kOfEachByte) >> 56);
    tokens += static_cast<int32_t>(counts >> 56);
  }
#endif
  for (; i < size; ++i) {
    tokens += action[i];
    upto[found] = tokens;
    reward[found] = rewards[start + i];
    found += closes[i];
  }
  return found;
}

// out[i] = shares[how many of closes[0 .. i) are 1] where `paid` is 1, else 0. shares has seven
// elements more than that.
inline void deal(const float* shares, const uint8_t* closes, const uint8_t* paid, int32_t size,
                 float* out) {
  int32_t i = 0;
#if defined(__AVX2__)
  for (; size - i >= 8; i += 8) {
    const uint64_t ends = eight_bytes(closes + i);
    const uint64_t counts = ends * kOfEachByte;
    const __m256 each = _mm256_permutevar8x32_ps(_mm256_loadu_ps(shares), widened(counts - ends));
    const __m256i kept = _mm256_sub_epi32(_mm256_setzero_si256(), widened(eight_bytes(paid + i)));
    _mm256_storeu_ps(out + i, _mm256_and_ps(each, _mm256_castsi256_ps(kept)));
    shares += counts >> 56;
  }
#endif
  for (; i < size; ++i) {
    out[i] = keep(paid[i], *shares);
    shares += closes[i];
  }
}

}  // namespace detail

// Pays the rewards of segments to their tokens.
template <class Rewards>
struct Payment {
  Rewards rewards;
  Flags ends;
  Flags mask;
  const Credit& credit;
  float* out;

  void operator()(const Row& row, Scan<Pieces>& scan) const {
    scan.walk(
        row, [&](int64_t begin, int64_t end) { return summarize(begin, end); },
        [&](int64_t begin, int64_t end, Pieces before, Pieces after) {
          walk(begin, end, before, after);
        });
  }

 private:
  Pieces summarize(int64_t begin, int64_t end) const {
    const int64_t segments = count_true(begin, end, ends, mask);
    const int64_t first = first_true(begin, end, ends, mask);
    return {segments, segments ? first : -1, count_true(begin, std::min(first + 1, end), mask),
            tail(begin, end, 0)};
  }

  // Action tokens of [begin, end) behind the last end; without one, all of them and `earlier`.
  int64_t tail(int64_t begin, int64_t end, int64_t earlier) const {
    const int64_t last = last_true(begin, end, ends, mask);
    return count_true(last + 1, end, mask) + (last < begin ? earlier : 0);
  }

  static constexpr int32_t kChunk = 256;
  static constexpr int32_t kMore = 8;  // what is read and written beyond the last of a chunk

  // shares [found] of segments k, k + 1 ... of a row's `total`, with their rewards, where the row
  // has had `upto` action tokens at their ends, `earlier` of them before these segments. Step by
  // step, so that each is a loop that compilers vectorise.
  void pay(int32_t found, float* reward, int32_t* upto, int64_t earlier, int64_t k, int64_t total,
           float* shares) const {
    // Whole vectors: as many more of the last one.
    for (; found % kMore; ++found) {
      reward[found] = reward[found - 1];
      upto[found] = upto[found - 1];
    }
    const Credit terms = credit;  // no store below can change a copy
    const Curve& curve = terms.curve;
    const auto all = static_cast<float>(total);
    float position[kChunk];
    float log_position[kChunk];
    float length[kChunk];
    for (int32_t i = 0; i < found; ++i) {
      position[i] = static_cast<float>(static_cast<int32_t>(k) + i + 1) / all;
    }
    length[0] = static_cast<float>(upto[0] - earlier);
    for (int32_t i = 1; i < found; ++i) length[i] = static_cast<float>(upto[i] - upto[i - 1]);
    if (curve.n_knots > 0) {
      for (int32_t i = 0; i < found; ++i) log_position[i] = log_float(position[i]);
    }
    if (curve.n_knots == 0) {
      for (int32_t i = 0; i < found; ++i) shares[i] = reward[i];
    } else if (curve.n_knots == 1) {
      const float mean = curve.knots[1];
      const float std = curve.knots[2];
      for (int32_t i = 0; i < found; ++i) {
        shares[i] = curve.line(reward[i], log_position[i], mean, std);
      }
    } else {
      for (int32_t i = 0; i < found; ++i) {
        shares[i] = curve(reward[i], position[i], log_position[i]);
      }
    }
    for (int32_t i = 0; i < found; ++i) {
      shares[i] = terms.paid(reward[i], shares[i], all, length[i]);
    }
  }

  // From the last token to the first, some at a time: first all shares, then who gets which.
  void walk(int64_t begin, int64_t end, Pieces before, Pieces after) const {
    uint8_t action[kChunk];
    uint8_t closes[kChunk];        // whether a segment ends there
    float reward[kChunk + kMore];  // of the segments that end in the chunk
    int32_t upto[kChunk + kMore];  // action tokens up to their ends
    float shares[kChunk + kMore];  // what they pay
    int64_t k = before.segments + count_true(begin, end, ends, mask);
    const int64_t total = k + after.segments;
    float open = 0;  // the share of tokens whose end comes later
    if (after.segments) {
      open = credit(rewards[after.first_end], k, total, tail(begin, end, before.tail) + after.head);
    }
    for (int64_t stop = end; stop > begin;) {
      const int64_t start = std::max<int64_t>(stop - kChunk, begin);
      if (first_true(start, stop, mask) == stop) {  // padding
        std::fill(out + start, out + stop, 0.0f);
        stop = start;
        continue;
      }
      const auto size = static_cast<int32_t>(stop - start);
      for (int32_t i = 0; i < size; ++i) {
        action[i] = mask[start + i];
        closes[i] = ends[start + i] & mask[start + i];
      }
      const int32_t found = detail::pick(rewards, start, closes, action, size, reward, upto);
      k -= found;
      if (found) pay(found, reward, upto, -tail(begin, start, before.tail), k, total, shares);
      shares[found] = open;
      const uint8_t* paid = credit.spread == Spread::last ? closes : action;
      detail::deal(shares, closes, paid, size, out + start);
      open = shares[0];
      stop = start;
    }
  }
};

}  // namespace segk
