// Rows of logits are shared by threads, in spans of columns.
#include "segk/vocab.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/columns.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace segk {
namespace {

// Columns of a span. It decides how results are rounded: the states of a row's spans are merged in
// order, whichever threads computed them.
constexpr int64_t kSpan = 16384;

// How many columns make it worth waking a thread: some 20 microseconds of work.
constexpr int64_t kGrain = 65536;

// A gradient of this many bytes is in no cache by the time it is needed: written past the caches,
// it saves reading the memory that it goes to. A smaller one would then be slower to read, and its
// memory is seldom new. The sanitizers' build takes less, which its test then fills in less time.
#if defined(SEGK_STREAMED)
constexpr int64_t kStreamed = SEGK_STREAMED;
#else
constexpr int64_t kStreamed = int64_t{32} << 20;
#endif

int64_t width_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

int64_t spans_of(const VocabRows& rows) { return (rows.vocab + kSpan - 1) / kSpan; }

int64_t threads_for(const VocabRows& rows, int threads) {
  return std::min<int64_t>(threads, rows.count * rows.vocab / kGrain);
}

int64_t offset_of(const VocabRows& rows, int64_t row) {
  return row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

double temperature_of(const VocabRows& rows, int64_t row) {
  return rows.temperatures ? rows.temperatures[row] : rows.temperature;
}

// The target's column in `rows`, or -1.
int64_t target_of(const VocabRows& rows, int64_t row) {
  const int64_t column = rows.targets ? rows.targets[row] - rows.first : -1;
  return column >= 0 && column < rows.vocab ? column : -1;
}

RowState merged(const RowState& left, const RowState& right, double temperature) {
  RowState out{std::max(left.max, right.max), 0, 0, left.target_logit};
  for (const RowState* one : {&left, &right}) {
    const double lower = (one->max - out.max) / temperature;
    const double factor = std::exp(lower);
    out.sum_exp += factor * one->sum_exp;
    // The distance may be infinite where its factor has vanished.
    out.sum_exp_shift += factor * (one->sum_exp_shift + one->sum_exp * (factor > 0 ? lower : 0));
  }
  return out;
}

// Calls done(row, state) for each row; the state, null for a masked one, is without target.
template <class Done>
void each_row(const VocabRows& rows, const bool* mask, int threads, const Done& done) {
  const int64_t spans = spans_of(rows);
  const auto masked = [&](int64_t row) { return mask && !mask[row]; };
  const auto span_state = [&](int64_t row, int64_t span) {
    const int64_t begin = span * kSpan;
    const auto* logits = static_cast<const char*>(rows.logits) +
                         (offset_of(rows, row) + begin) * width_of(rows.dtype);
    return columns_forward(rows.dtype, logits, std::min(kSpan, rows.vocab - begin),
                           temperature_of(rows, row));
  };
  const auto finish = [&](int64_t row, const auto& state_of) {
    if (masked(row)) return done(row, nullptr);
    RowState state = state_of(row, 0);
    for (int64_t span = 1; span < spans; ++span)
      state = merged(state, state_of(row, span), temperature_of(rows, row));
    done(row, &state);
  };

  const int64_t useful = threads_for(rows, threads);
  if (spans == 1 || rows.count >= 16 * threads) {
    parallel_for(rows.count, 1, useful, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) finish(row, span_state);
    });
    return;
  }
  std::vector<RowState> states(static_cast<size_t>(rows.count * spans));
  parallel_for(rows.count * spans, 1, useful, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!masked(i / spans)) states[i] = span_state(i / spans, i % spans);
  });
  for (int64_t row = 0; row < rows.count; ++row)
    finish(row, [&](int64_t r, int64_t span) { return states[r * spans + span]; });
}

void read_target(const VocabRows& rows, int64_t row, RowState& state) {
  const int64_t target = target_of(rows, row);
  if (target >= 0)
    state.target_logit = Floats{rows.logits, rows.dtype}[offset_of(rows, row) + target];
}

void finish_row(const VocabRows& rows, int64_t row, const RowState* state, float* logprobs,
                float* entropy, RowStats* stats) {
  if (!state) {
    if (logprobs) logprobs[row] = 0;
    entropy[row] = 0;
    stats[row] = {0, 0, 0};
    return;
  }
  // A row of -inf has an empty sum.
  const double sum = state->sum_exp > 0 ? state->sum_exp : std::numeric_limits<double>::quiet_NaN();
  const double log_sum = std::log(sum);
  const double mean_shift = state->sum_exp_shift / sum;
  entropy[row] = static_cast<float>(log_sum - mean_shift);
  stats[row] = {static_cast<float>(state->max), static_cast<float>(1 / sum),
                static_cast<float>(mean_shift)};
  if (!logprobs) return;
  const double logprob = (state->target_logit - state->max) / temperature_of(rows, row) - log_sum;
  logprobs[row] = rows.targets[row] >= 0 ? static_cast<float>(logprob) : 0.0f;
}

void fill_nan(DType dtype, void* out, int64_t n) {
  if (dtype == DType::f32) {
    std::fill_n(static_cast<float*>(out), n, std::numeric_limits<float>::quiet_NaN());
  } else {
    const uint16_t nan = dtype == DType::bf16 ? 0x7fc0 : 0x7e00;
    std::fill_n(static_cast<uint16_t*>(out), n, nan);
  }
}

}  // namespace

void vocab_accumulate(const VocabRows& rows, const bool* mask, RowState* states, int threads) {
  each_row(rows, mask, threads, [&](int64_t row, const RowState* state) {
    if (!state) return;
    states[row] = rows.first == 0 ? *state : merged(states[row], *state, temperature_of(rows, row));
    read_target(rows, row, states[row]);
  });
}

void vocab_finish(const VocabRows& rows, const bool* mask, const RowState* states, float* logprobs,
                  float* entropy, RowStats* stats, int threads) {
  parallel_for(rows.count, 4096, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const RowState* state = mask && !mask[row] ? nullptr : states + row;
      finish_row(rows, row, state, logprobs, entropy, stats);
    }
  });
}

void vocab_forward(const VocabRows& rows, const bool* mask, float* logprobs, float* entropy,
                   RowStats* stats, int threads) {
  each_row(rows, mask, threads, [&](int64_t row, RowState* state) {
    if (state) read_target(rows, row, *state);
    finish_row(rows, row, state, logprobs, entropy, stats);
  });
}

void vocab_backward(const VocabRows& rows, const RowStats* stats, const float* dlogprobs,
                    const float* dentropy, void* dlogits, int64_t stride, int threads) {
  const int64_t spans = spans_of(rows);
  const int64_t width = width_of(rows.dtype);
  const int64_t bytes = rows.count * rows.vocab * width;
  const bool large = dlogits != rows.logits && bytes >= kStreamed;
  const auto span_gradient = [&](int64_t row, int64_t begin) {
    const int64_t n = std::min(kSpan, rows.vocab - begin);
    const auto* x = static_cast<const char*>(rows.logits) + (offset_of(rows, row) + begin) * width;
    auto* dx = static_cast<char*>(dlogits) + (row * stride + begin) * width;
    const bool has_target = dlogprobs && rows.targets && rows.targets[row] >= 0;
    const float dlogprob = has_target ? dlogprobs[row] : 0.0f;
    const float dh = dentropy ? dentropy[row] : 0.0f;
    // What has just come from the system is in the cache, zeroed.
    const bool streaming = large && !fetch_pages(dx, n * width);
    if (stats[row].inverse_sum_exp == 0 || (dlogprob == 0 && dh == 0)) {
      std::memset(dx, 0, static_cast<size_t>(n * width));
    } else if (std::isnan(stats[row].inverse_sum_exp) || std::isnan(dlogprob) || std::isnan(dh)) {
      fill_nan(rows.dtype, dx, n);
    } else {
      const int64_t target = has_target ? target_of(rows, row) - begin : -1;
      const RowGradient gradient{stats[row], temperature_of(rows, row), dlogprob, dh,
                                 target >= 0 && target < n ? target : -1};
      columns_backward(rows.dtype, x, dx, n, gradient, streaming);
    }
  };
  parallel_for(rows.count * spans, 1, threads_for(rows, threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) span_gradient(i / spans, i % spans * kSpan);
  });
}

}  // namespace segk
