#include <map>
#include <mutex>

#include "../edge_program.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ngk {
namespace {

std::mutex guard;
std::map<const char*, const char*> ranges;  // begin to end

}  // namespace

void map_range(const void* begin, int64_t bytes, bool on) {
  const std::lock_guard<std::mutex> lock(guard);
  const char* p = static_cast<const char*>(begin);
  if (on) {
    ranges[p] = p + bytes;
  } else {
    ranges.erase(p);
  }
}

bool is_mapped(const void* p) {
  const std::lock_guard<std::mutex> lock(guard);
  auto next = ranges.upper_bound(static_cast<const char*>(p));
  return next != ranges.begin() && (--next)->second > p;
}

void give_back(const char* begin, const char* end) {
#if defined(__linux__)
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page, last = (reinterpret_cast<uintptr_t>(end) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);  // a range with pages of nobody is an error that changes nothing
#else
  (void)begin, (void)end;
#endif
}

}  // namespace ngk
