// A GPU on the host: the threads of a block are fibers that run one after the other up to what they do together. For tests; slow.
//
// What lanes of a warp do together counts their arrivals: lanes that meet at different instructions, or leave while others wait, are an
// error. Shared memory starts as NaN. Products truncate. Where a barrier is missing, results differ between the orders in which threads
// run: `backwards`, and `ahead`: each warp goes as far as it can before the next one.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace ngk::cuda {

// Into shared memory, `there` bytes of 16 and zeros. It happens when its thread waits for it or, with `backwards`, at once.
struct Copy {
  char* to;
  const char* from;
  int there;

  void happen() const {
    std::memcpy(to, from, static_cast<size_t>(there));
    std::memset(to + there, 0, static_cast<size_t>(16 - there));
  }
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool begun = false, done = false;
  std::vector<std::vector<Copy>> copies;  // by group, the last one open
};

// Where threads meet: of one warp, or of the block.
struct Meeting {
  int members = 0, arrived = 0;
  const char* what = nullptr;
  int64_t generation = 0;
};

struct Machine {
  static constexpr int STACK = 1 << 17;
  int64_t block = 0;
  int thread = 0, left = 0;
  bool backwards = false, ahead = false;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<float> given, taken;  // by thread, 8 numbers each: what lanes bring to a meeting and what they take from it
  std::vector<const void*> rows;
  std::unique_ptr<float[]> memory;
  uintptr_t bytes = 0;
  ucontext_t home;
  jmp_buf back;
  const std::function<void()>* body = nullptr;
};
inline Machine& machine() {
  static Machine m;
  return m;
}

[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "ngkernels, emulated GPU: %s\n", what);
  std::abort();
}

inline void give_way() {
  Machine& m = machine();
  if (!_setjmp(m.fibers[static_cast<size_t>(m.thread)].at)) _longjmp(m.back, 1);
}

inline void fiber_main() {
  (*machine().body)();
  machine().fibers[static_cast<size_t>(machine().thread)].done = true;
  ++machine().left;
  _longjmp(machine().back, 1);
}

// Runs thread k of a block up to where it waits.
inline void run_thread(int k) {
  Machine& m = machine();
  m.thread = k;
  Fiber& f = m.fibers[static_cast<size_t>(k)];
  if (f.done || _setjmp(m.back)) return;
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  if (!f.stack) f.stack.reset(new char[Machine::STACK]);
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = Machine::STACK;
  f.start.uc_link = nullptr;
  makecontext(&f.start, fiber_main, 0);
  setcontext(&f.start);
}
// What has happened so far: meetings of one warp, or of all; threads that have ended.
inline int64_t progress(int threads) {
  int64_t found = machine().left + machine().all.generation;
  for (int w = 0; w < (threads + 31) / 32; ++w) found += machine().warps[static_cast<size_t>(w)].generation;
  return found;
}

// Runs `body` on `threads` threads of one block.
inline void run_block(int64_t block, int threads, int64_t shared, const std::function<void()>& body) {
  Machine& m = machine();
  m.block = block;
  m.body = &body;
  m.left = 0;
  if (m.fibers.size() < static_cast<size_t>(threads)) m.fibers.resize(static_cast<size_t>(threads));
  m.warps.assign(static_cast<size_t>((threads + 31) / 32), Meeting{32, 0, nullptr, 0});
  m.all = Meeting{threads, 0, nullptr, 0};
  m.given.assign(static_cast<size_t>(threads) * 8, 0);
  m.taken.assign(static_cast<size_t>(threads) * 8, 0);
  m.rows.assign(static_cast<size_t>(threads), nullptr);
  m.bytes = static_cast<uintptr_t>(shared) + 256;
  m.memory.reset(new float[m.bytes / 4]);
  std::memset(m.memory.get(), 0xff, m.bytes);
  for (int k = 0; k < threads; ++k) {
    Fiber& f = m.fibers[static_cast<size_t>(k)];
    f.begun = f.done = false;
    f.copies.assign(1, {});
  }
  const int group = m.ahead ? 32 : threads;  // that goes on together until it waits for others
  while (m.left < threads) {
    const int64_t before = progress(threads);
    for (int first = 0; first < threads; first += group) {
      for (int64_t last = -1; last != progress(threads);) {
        last = progress(threads);
        for (int k = first; k < first + group && k < threads; ++k) run_thread(m.backwards ? threads - 1 - k : k);
        if (!m.ahead) break;
      }
    }
    if (before == progress(threads)) broken("threads wait for others that never come");
  }
}

// The last thread to come does `act` for all.
template <class F>
inline void meet(Meeting& at, const char* what, F&& act) {
  if (at.arrived && std::strcmp(at.what, what)) broken("threads of a warp or a block meet at different instructions");
  at.what = what;
  if (++at.arrived == at.members) {
    act();
    at.arrived = 0;
    ++at.generation;
    return;
  }
  for (const int64_t generation = at.generation; generation == at.generation;) give_way();
}

inline int thread() { return machine().thread; }
inline int64_t block() { return machine().block; }
inline char* shared_memory() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(machine().memory.get()) + 127) / 128 * 128); }
inline void sync_block() {
  meet(machine().all, "sync_block", [] {});
}
inline Meeting& own_warp() { return machine().warps[static_cast<size_t>(thread() / 32)]; }
inline void sync_warp() {
  meet(own_warp(), "sync_warp", [] {});
}
inline void copy_async16(char* to, const char* from, int there, bool) {
  const auto shared = reinterpret_cast<uintptr_t>(machine().memory.get()), at = reinterpret_cast<uintptr_t>(to);
  if (at % 16 || reinterpret_cast<uintptr_t>(from) % 16) broken("a copy between misaligned addresses");
  if (at < shared || at + 16 > shared + machine().bytes) broken("a copy to what is no shared memory");
  const Copy copy{to, from, there};
  if (machine().backwards) return copy.happen();
  machine().fibers[static_cast<size_t>(thread())].copies.back().push_back(copy);
}
inline void copies_end() { machine().fibers[static_cast<size_t>(thread())].copies.emplace_back(); }
template <int N>
inline void wait_for_copies() {
  auto& groups = machine().fibers[static_cast<size_t>(thread())].copies;
  for (; groups.size() > N + 1; groups.erase(groups.begin()))
    for (const Copy& c : groups.front()) c.happen();
}
inline float* given(int t) { return &machine().given[static_cast<size_t>(t) * 8]; }
inline float* taken(int t) { return &machine().taken[static_cast<size_t>(t) * 8]; }

inline float shuffle_xor(float x, int mask) {
  const int first = thread() / 32 * 32;
  given(thread())[0] = x;
  meet(own_warp(), "shuffle", [&] {
    for (int l = 0; l < 32; ++l) taken(first + l)[1] = given(first + (l ^ mask))[0];
  });
  return taken(thread())[1];
}

inline float low_half(float packed, int k) {  // k-th bf16 of a pair
  uint32_t u;
  std::memcpy(&u, &packed, 4);
  u = k ? u & 0xffff0000u : u << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// The sum of n numbers as tensor cores have it: all cut off, towards zero, two bits below the last one of the largest, and so the result.
inline float truncating_sum(const double* x, int n) {
  double largest = 0, sum = 0;
  for (int k = 0; k < n; ++k) sum += x[k], largest = std::fabs(x[k]) > largest ? std::fabs(x[k]) : largest;
  if (!(std::fabs(sum) <= 1e300) || largest == 0) return static_cast<float>(sum);
  const int exponent = std::ilogb(largest) - 25;
  const double unit = std::ldexp(1.0, exponent), inverse = std::ldexp(1.0, -exponent);
  int64_t units = 0;
  for (int k = 0; k < n; ++k) units += static_cast<int64_t>(x[k] * inverse);
  const double exact = static_cast<double>(units) * unit;
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}
// d += a b by the layouts of the PTX manual; `a_at`, `b_at`: (row, k) of a and (k, column) of b, in the given numbers of a lane.
template <int K, class A, class B>
inline void multiply_all(int first, A&& a_at, B&& b_at) {
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      double terms[K + 1];
      for (int k = 0; k < K; ++k) terms[k] = static_cast<double>(a_at(row, k)) * static_cast<double>(b_at(k, column));
      terms[K] = taken(first + l)[e];
      taken(first + l)[4 + e] = truncating_sum(terms, K + 1);
    }
}
inline void bring(float* d, const void* a, const void* b) {
  std::memcpy(given(thread()), a, 16);
  std::memcpy(given(thread()) + 4, b, 8);
  std::memcpy(taken(thread()), d, 16);
}
inline void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  const int first = thread() / 32 * 32;
  bring(d, a, b);
  meet(own_warp(), "mma bf16", [first] {
    multiply_all<16>(
        first, [first](int row, int k) { return low_half(given(first + row % 8 * 4 + k % 8 / 2)[k / 8 * 2 + row / 8], k % 2); },
        [first](int k, int column) { return low_half(given(first + column * 4 + k % 8 / 2)[4 + k / 8], k % 2); });
  });
  std::memcpy(d, taken(thread()) + 4, 16);
}
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }
inline float truncated(float x) {  // what the tensor cores read of a number
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u &= ~0x1fffu;
  std::memcpy(&x, &u, 4);
  return x;
}
inline void mma_tf32(float* d, const float* a, const float* b) {
  const int first = thread() / 32 * 32;
  bring(d, a, b);
  meet(own_warp(), "mma tf32", [first] {
    multiply_all<8>(
        first, [first](int row, int k) { return truncated(given(first + row % 8 * 4 + k % 4)[k / 4 * 2 + row / 8]); },
        [first](int k, int column) { return truncated(given(first + column * 4 + k % 4)[4 + k / 4]); });
  });
  std::memcpy(d, taken(thread()) + 4, 16);
}
inline void load_transposed(uint32_t* r, const uint16_t* row) {
  const int first = thread() / 32 * 32;
  if (reinterpret_cast<uintptr_t>(row) % 16) broken("a row of a matrix that does not begin at a multiple of 16 bytes");
  machine().rows[static_cast<size_t>(thread())] = row;
  meet(own_warp(), "load matrices", [first] {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        uint32_t pair = 0;
        for (int k = 0; k < 2; ++k)
          pair |=
              static_cast<uint32_t>(static_cast<const uint16_t*>(machine().rows[static_cast<size_t>(first + 8 * m + l % 4 * 2 + k)])[l / 4])
              << (16 * k);
        std::memcpy(taken(first + l) + m, &pair, 4);
      }
  });
  std::memcpy(r, taken(thread()), 16);
}
inline uint32_t round_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64 : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline float to_tf32(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7f800000u) != 0x7f800000u) u += 0x1000u;
  u &= ~0x1fffu;
  std::memcpy(&x, &u, 4);
  return x;
}

}  // namespace ngk::cuda
