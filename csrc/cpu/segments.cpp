#include "cpu/segments.h"

#include "cpu/blocks.h"
#include "cpu/flags.h"
#include "segk/storage.h"

namespace segk {

int64_t segment_ends(Floats entropy, const bool* mask, Rows rows, Boundaries boundaries, bool* ends,
                     Executor executor) {
  FirstToken nan;
  const Flags actions = flags_of(mask);
  auto* out = reinterpret_cast<uint8_t*>(ends);
  with_storage(
      [&](auto h) {
        const EndFinder<decltype(h)> find{h, actions, boundaries, out, &nan};
        Scan<TokensAhead> scan(kNoTokens);
        for_each_row(rows, actions, kQuickTokensPerTask, executor,
                     [&](const Row& row) { find(row, scan); });
      },
      entropy);
  return nan.get();
}

}  // namespace segk
