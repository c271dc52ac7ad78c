// Memory that the system has not yet backed with pages.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>

namespace segk {

// Gets memory that is about to be written from the system in one call, not in a fault for each
// page, and says whether any of it had yet to come. A gradient's often has, and faults would take
// longer than the whole backward pass.
inline bool fetch_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  constexpr size_t kMost = 64;
  unsigned char resident[kMost];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes);
  const size_t pages = std::min((end - begin + page - 1) / page, kMost);
  auto* first = reinterpret_cast<void*>(begin);
  if (mincore(first, pages * page, resident) != 0) return false;
  if (std::all_of(resident, resident + pages, [](unsigned char r) { return r & 1; })) return false;
  // Where it is refused, the faults do it.
  madvise(first, end - begin, MADV_POPULATE_WRITE);
  return true;
#else
  (void)memory, (void)bytes;
  return false;
#endif
}

}  // namespace segk
