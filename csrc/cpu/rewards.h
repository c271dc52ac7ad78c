// Scatters segment rewards to the tokens of a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/elementary.h"
#include "cpu/flags.h"
#include "segk/rewards.h"
#include "segk/storage.h"

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

// Flags are bytes of 0 or 1 here.

// Gathers the ends among the `size` tokens from `start` on: their rewards, and the number of action
// tokens up to each, inclusively. Returns how many ends; writes up to eight elements more.
template <class Rewards>
int32_t gather_ends(const Rewards& rewards, int64_t start, const uint8_t* is_end,
                    const uint8_t* action, int32_t size, float* reward, int32_t* actions_upto) {
  int32_t found = 0;
  int32_t tokens = 0;
  int32_t i = 0;
#if defined(__AVX2__)
  static constexpr SetLanes set_lanes;
  for (; size - i >= 8; i += 8) {
    const uint64_t ends = eight_bytes(is_end + i);
    const uint64_t counts = eight_bytes(action + i) * kOneInEachByte;  // up to each, inclusively
    const __m256i chosen = widened(set_lanes.of[(ends * 0x0102040810204080) >> 56]);
    const __m256 all_rewards = eight_floats(rewards, start + i);
    const __m256i all_upto = _mm256_add_epi32(widened(counts), _mm256_set1_epi32(tokens));
    _mm256_storeu_ps(reward + found, _mm256_permutevar8x32_ps(all_rewards, chosen));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(actions_upto + found),
                        _mm256_permutevar8x32_epi32(all_upto, chosen));
    found += static_cast<int32_t>((ends * kOneInEachByte) >> 56);
    tokens += static_cast<int32_t>(counts >> 56);
  }
#endif
  for (; i < size; ++i) {
    tokens += action[i];
    actions_upto[found] = tokens;
    reward[found] = rewards[start + i];
    found += is_end[i];
  }
  return found;
}

// out[i] = token_rewards[how many of is_end[0 .. i) are 1] where `credited` is 1, else 0. There
// must be seven elements more of token_rewards than that.
inline void expand(const float* token_rewards, const uint8_t* is_end, const uint8_t* credited,
                   int32_t size, float* out) {
  int32_t i = 0;
#if defined(__AVX2__)
  for (; size - i >= 8; i += 8) {
    const uint64_t ends = eight_bytes(is_end + i);
    const uint64_t counts = ends * kOneInEachByte;
    const __m256 each =
        _mm256_permutevar8x32_ps(_mm256_loadu_ps(token_rewards), widened(counts - ends));
    const __m256i kept =
        _mm256_sub_epi32(_mm256_setzero_si256(), widened(eight_bytes(credited + i)));
    _mm256_storeu_ps(out + i, _mm256_and_ps(each, _mm256_castsi256_ps(kept)));
    token_rewards += counts >> 56;
  }
#endif
  for (; i < size; ++i) {
    out[i] = keep(credited[i], *token_rewards);
    token_rewards += is_end[i];
  }
}

}  // namespace detail

constexpr SegmentRun kNoSegments{0, -1, 0, 0};

template <class Rewards>
struct RewardScatter {
  Rewards rewards;
  Flags ends;
  Flags mask;
  const Credit& credit;
  float* out;

  void operator()(const Row& row, Scan<SegmentRun>& scan) const {
    scan.walk(
        row, [&](int64_t begin, int64_t end) { return summarize(begin, end); },
        [&](int64_t begin, int64_t end, SegmentRun before, SegmentRun after) {
          walk(begin, end, before, after);
        });
  }

 private:
  SegmentRun summarize(int64_t begin, int64_t end) const {
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
  static constexpr int32_t kPadding = 8;  // elements beyond a chunk that may be read and written

  // The token rewards [found] of segments k, k + 1 ... of a row's `total`. actions_upto counts
  // action tokens up to the end of each; `earlier` is that count where the first of them begins.
  // One step after the other, so that each is a loop that compilers vectorise.
  void credit_segments(int32_t found, float* reward, int32_t* actions_upto, int64_t earlier,
                       int64_t k, int64_t total, float* token_rewards) const {
    // Whole vectors: the last segment is repeated.
    for (; found % kPadding; ++found) {
      reward[found] = reward[found - 1];
      actions_upto[found] = actions_upto[found - 1];
    }
    const Credit terms = credit;  // a copy, which no store below can change
    const Curve& curve = terms.curve;
    const auto all = static_cast<float>(total);
    float position[kChunk];
    float log_position[kChunk];
    float length[kChunk];
    for (int32_t i = 0; i < found; ++i) {
      position[i] = static_cast<float>(static_cast<int32_t>(k) + i + 1) / all;
    }
    length[0] = static_cast<float>(actions_upto[0] - earlier);
    for (int32_t i = 1; i < found; ++i)
      length[i] = static_cast<float>(actions_upto[i] - actions_upto[i - 1]);
    const int32_t n_knots = curve.n_knots();
    if (n_knots > 0) {
      for (int32_t i = 0; i < found; ++i) log_position[i] = log_float(position[i]);
    }
    if (n_knots == 0) {
      for (int32_t i = 0; i < found; ++i) token_rewards[i] = reward[i];
    } else if (n_knots == 1) {
      const float mean_slope = curve.packed[0], std_slope = curve.packed[1];
      const float min_std = curve.packed[2];
      const float mean = curve.packed[5], std = curve.packed[6];
      for (int32_t i = 0; i < found; ++i) {
        token_rewards[i] = normalize(reward[i], mean + mean_slope * log_position[i],
                                     std + std_slope * log_position[i], min_std);
      }
    } else {
      for (int32_t i = 0; i < found; ++i) {
        token_rewards[i] = curve.normalize(reward[i], position[i], log_position[i]);
      }
    }
    for (int32_t i = 0; i < found; ++i) {
      token_rewards[i] = terms.spread_and_clip(reward[i], token_rewards[i], all, length[i]);
    }
  }

  // From the last token to the first, a chunk at a time: the token rewards of all segments that end
  // in it, then those of its tokens.
  void walk(int64_t begin, int64_t end, SegmentRun before, SegmentRun after) const {
    uint8_t action[kChunk];
    uint8_t is_end[kChunk];
    float reward[kChunk + kPadding];  // of the segments that end in the chunk
    int32_t actions_upto[kChunk + kPadding];
    float token_rewards[kChunk + kPadding];
    int64_t k = before.segments + count_true(begin, end, ends, mask);
    const int64_t total = k + after.segments;
    float open = 0;  // the token reward of tokens whose end lies behind the chunk
    if (after.segments) {
      open = credit.token_reward(credit.curve, rewards[after.first_end], k, total,
                                 tail(begin, end, before.tail) + after.head);
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
        is_end[i] = ends[start + i] & mask[start + i];
      }
      const int32_t found =
          detail::gather_ends(rewards, start, is_end, action, size, reward, actions_upto);
      k -= found;
      if (found)
        credit_segments(found, reward, actions_upto, -tail(begin, start, before.tail), k, total,
                        token_rewards);
      token_rewards[found] = open;
      const uint8_t* credited = credit.spread == Spread::last ? is_end : action;
      detail::expand(token_rewards, is_end, credited, size, out + start);
      open = token_rewards[0];
      stop = start;
    }
  }
};

}  // namespace segk
