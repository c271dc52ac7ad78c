// parallel_for over a small pool of sleeping threads.
//
// Not OpenMP: torch ships its own copy of that runtime, and a second one beside it spins against
// the first. Workers here sleep on a condition variable, so they never compete with torch's pool.
#pragma once

#include <cstdint>
#include <functional>

namespace segk {

// Calls body(begin, end) on disjoint ranges that cover [0, count), at most `threads` at a time and
// no more than get `grain` each, what pays for waking one. The calling thread takes part. Safe from
// several threads at once (a second caller runs alone, on its own thread) and after fork().
void parallel_for(int64_t count, int64_t grain, int64_t threads,
                  const std::function<void(int64_t, int64_t)>& body);

}  // namespace segk
