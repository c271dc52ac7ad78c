// The vocabulary ops: which instruction set runs them, and their rows shared out to threads.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "segk/vocab.h"

namespace segk {
namespace {

struct Isa {
  const char* name;
  const VocabKernels* kernels;
  bool runs_here;
};

const Isa& isa() {
  // Best last.
  static const Isa all[] = {
      {"scalar", &scalar::kernels, true},
#if defined(SEGK_X86)
      {"avx2", &avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
      {"avx512", &avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
  };
  static const Isa& chosen = []() -> const Isa& {
    const char* asked = std::getenv("SEGKERNELS_ISA");
    const Isa* best = nullptr;
    std::string runnable;
    for (const Isa& one : all) {
      if (!one.runs_here) continue;
      best = &one;
      runnable += (runnable.empty() ? "" : ", ") + std::string(one.name);
      if (asked && std::string(asked) == one.name) return one;
    }
    if (asked && *asked) {
      throw std::invalid_argument(
          "SEGKERNELS_ISA: expected one that this processor and build run (" + runnable +
          "), got '" + asked + "'; unset it to use the best of them");
    }
    return *best;
  }();
  return chosen;
}

// About 64K columns a chunk: enough to pay for waking a thread.
int64_t grain_of(const VocabRows& rows) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(rows.vocab, 1));
}

void finish_rows(const VocabRows& rows, const bool* mask, const RowState* states, float* logprobs,
                 float* entropy, RowStats* stats, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const bool has_target = rows.targets && rows.targets[row] >= 0;
    if (mask && !mask[row]) {
      if (logprobs) logprobs[row] = 0;
      entropy[row] = 0;
      stats[row] = {0, 0, 0};
      continue;
    }
    const RowState& state = states[row - begin];
    // A row of -inf has no maximum and an empty sum.
    const double sum = state.sum > 0 ? state.sum : std::numeric_limits<double>::quiet_NaN();
    const double log_sum = std::log(sum);
    const double mean_shift = state.weighted / sum;
    entropy[row] = static_cast<float>(log_sum - mean_shift);
    stats[row] = {static_cast<float>(state.max), static_cast<float>(1 / sum),
                  static_cast<float>(mean_shift)};
    if (!logprobs) continue;
    const double temperature = rows.temperatures ? rows.temperatures[row] : rows.temperature;
    logprobs[row] =
        has_target ? static_cast<float>((state.target - state.max) / temperature - log_sum) : 0.0f;
  }
}

}  // namespace

void vocab_accumulate(const VocabRows& rows, const bool* mask, RowState* states, int threads) {
  const VocabKernels& kernels = *isa().kernels;
  parallel_for(rows.count, grain_of(rows), threads, [&](int64_t begin, int64_t end) {
    kernels.accumulate(rows, mask, states + begin, begin, end);
  });
}

void vocab_finish(const VocabRows& rows, const bool* mask, const RowState* states, float* logprobs,
                  float* entropy, RowStats* stats, int threads) {
  parallel_for(rows.count, 4096, threads, [&](int64_t begin, int64_t end) {
    finish_rows(rows, mask, states + begin, logprobs, entropy, stats, begin, end);
  });
}

void vocab_forward(const VocabRows& rows, const bool* mask, float* logprobs, float* entropy,
                   RowStats* stats, int threads) {
  const VocabKernels& kernels = *isa().kernels;
  parallel_for(rows.count, grain_of(rows), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      RowState state;
      kernels.accumulate(rows, mask, &state, row, row + 1);
      finish_rows(rows, mask, &state, logprobs, entropy, stats, row, row + 1);
    }
  });
}

void vocab_backward(const VocabRows& rows, const RowStats* stats, const float* dlogprobs,
                    const float* dentropy, void* dlogits, int threads) {
  const VocabKernels& kernels = *isa().kernels;
  parallel_for(rows.count, grain_of(rows), threads, [&](int64_t begin, int64_t end) {
    kernels.backward(rows, stats, dlogprobs, dentropy, dlogits, begin, end);
  });
}

void vocab_exp(const float* x, float* out, int64_t count) { isa().kernels->exp(x, out, count); }

const char* isa_name() { return isa().name; }

}  // namespace segk
