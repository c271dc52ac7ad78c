// Generalised advantage estimation over the action tokens of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "cpu/quad.h"
#include "segk/operators.h"

namespace segk {

// Arrays of numbers write nothing.
template <class Array>
void clear(const Array&, int64_t, int64_t) {}

// Rewards, values: arrays of numbers by token, for which there is a four(). Where there are no
// actions, clear(rewards, begin, end) is called instead of reading them.
template <class Rewards, class Values>
class Estimator {
 public:
  Estimator(Gae gae, Rewards rewards, Values values, Flags mask, float* advantages, float* returns)
      : gae_(gae),
        rewards_(rewards),
        values_(values),
        mask_(mask),
        advantages_(advantages),
        returns_(returns) {}

  void operator()(const Row& row, Scan<Affine<double>>& scan) const {
    scan.walk(
        row,
        [&](int64_t begin, int64_t end) {
          // Not the product of all scales: it would be subnormal for most of the way, and slow.
          const auto count = static_cast<double>(count_true(begin, end, mask_));
          return Affine<double>{std::pow(gae_.decay, count), walk<false>(begin, end, 0)};
        },
        [&](int64_t begin, int64_t end, Affine<double>, Affine<double> after) {
          walk<true>(begin, end, after(0));
        });
  }

 private:
  // Action tokens that are worked on together; part of every result.
  static constexpr int64_t kTogether = 8;
  // Action tokens between holes in the mask that are brought together; whole groups of those.
  static constexpr int64_t kGathered = 256;

  // What a token needs of the one behind it.
  struct Behind {
    double value;
    double advantage;
  };

  // Walks an unbroken run of action tokens from the last to the first.
  //
  // A_i = r_i - V_i + gamma V_{i+1} + decay A_{i+1} waits for the token behind it, but only once in
  // eight: within these, sums over two, four and eight tokens are found side by side.
  template <bool kWrite, class R, class V>
  Behind run(const R& rewards, const V& values, int64_t begin, int64_t end, Behind behind,
             float* advantages, float* returns) const {
    const double square = gae_.decay * gae_.decay;
    const double fourth = square * square;
    const Quad powers = quad(fourth, square * gae_.decay, square, gae_.decay);
    const Quad higher_powers = powers * all_of(fourth);
    const auto sums = [&](Quad surplus, Quad next) {
      Quad sum = surplus + all_of(gae_.gamma) * next;
      sum = sum + all_of(gae_.decay) * one_behind(sum);
      return sum + all_of(square) * two_behind(sum);
    };
    Quad advantage_behind = all_of(behind.advantage);
    int64_t t = end;
    for (; t - begin >= kTogether; t -= kTogether) {
      const Quad late_value = four(values, t - 4);
      const Quad early_value = four(values, t - 8);
      const Quad late_next = t < end
                                 ? four(values, t - 3)
                                 : quad(values[t - 3], values[t - 2], values[t - 1], behind.value);
      const Quad late = sums(four(rewards, t - 4) - late_value, late_next);
      const Quad early =
          sums(four(rewards, t - 8) - early_value, four(values, t - 7)) + powers * all_first(late);
      if constexpr (kWrite) {
        const Quad late_advantage = late + powers * advantage_behind;
        const Quad early_advantage = early + higher_powers * advantage_behind;
        store_floats(advantages + t - 4, late_advantage);
        store_floats(advantages + t - 8, early_advantage);
        store_floats(returns + t - 4, late_advantage + late_value);
        store_floats(returns + t - 8, early_advantage + early_value);
      }
      advantage_behind = all_first(early) + all_first(higher_powers) * advantage_behind;
    }
    if (t < end) behind = {values[t], first_of(advantage_behind)};
    while (t-- > begin) {
      const double value = values[t];
      behind.advantage =
          rewards[t] - value + gae_.gamma * behind.value + gae_.decay * behind.advantage;
      behind.value = value;
      if constexpr (kWrite) {
        advantages[t] = static_cast<float>(behind.advantage);
        returns[t] = static_cast<float>(behind.advantage + value);
      }
    }
    return behind;
  }

  // The same of tokens between which the mask has holes.
  template <bool kWrite>
  Behind gather(const int64_t* tokens, int64_t n, Behind behind) const {
    double rewards[kGathered];
    double values[kGathered];
    float advantages[kGathered];
    float returns[kGathered];
    for (int64_t i = 0; i < n; ++i) {
      rewards[i] = rewards_[tokens[i]];
      values[i] = values_[tokens[i]];
    }
    behind = run<kWrite>(rewards, values, 0, n, behind, advantages, returns);
    for (int64_t i = 0; kWrite && i < n; ++i) {
      advantages_[tokens[i]] = advantages[i];
      returns_[tokens[i]] = returns[i];
    }
    return behind;
  }

  // From the last action token of a block to its first. `left` is what the block behind leaves to
  // its last; returns what it leaves to those before. Tokens are grouped by their number from the
  // last on, so holes in the mask change no result.
  template <bool kWrite>
  double walk(int64_t begin, int64_t end, double left) const {
    Behind behind{gae_.gamma > 0 ? left / gae_.gamma : 0, 0};
    for (int64_t stop = end;;) {
      const int64_t last = last_true(begin, stop, mask_);
      if constexpr (kWrite) skip(last + 1, stop);
      if (last < begin) break;
      stop = last + 1;
      int64_t start = run_true(begin, stop, mask_);
      // A run that others precede leaves them what does not fill a group.
      if (last_true(begin, start, mask_) >= begin) start += (stop - start) % kTogether;
      if (start < stop) {
        behind = run<kWrite>(rewards_, values_, start, stop, behind, advantages_, returns_);
      } else {
        int64_t tokens[kGathered];
        int64_t first = kGathered;
        while (first > 0 && start > begin) {
          if (mask_[--start]) tokens[--first] = start;
        }
        if constexpr (kWrite) skip(start, stop);
        behind = gather<kWrite>(tokens + first, kGathered - first, behind);
      }
      stop = start;
    }
    return gae_.gamma * behind.value + gae_.decay * behind.advantage;
  }

  void skip(int64_t begin, int64_t end) const {
    clear(rewards_, begin, end);
    for (float* out : {advantages_, returns_}) std::fill(out + begin, out + end, 0.0f);
  }

  Gae gae_;
  Rewards rewards_;
  Values values_;
  Flags mask_;
  float* advantages_;
  float* returns_;
};

}  // namespace segk
