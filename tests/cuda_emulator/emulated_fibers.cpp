#include "emulated_fibers.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "emulated_context.h"

namespace sbert_fast::cuda::emulation {

Running running;

namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = kMaxThreads / kWarpThreads;

/// Sets of lanes: those that may run, that have met at `site`, that pause, that have returned.
struct Warp {
  uint32_t ready = kAllLanes;
  uint32_t met = 0;
  uint32_t paused = 0;
  uint32_t returned = 0;
  Site site;
  Site paused_at[kWarpThreads];
  void* operands[kWarpThreads];
};

struct Block {
  Warp warps[kMaxWarps];
  int num_warps = 0;
  int warps_at_barrier = 0;
  int returned = 0;
  bool advanced = false;  // since paused threads were last let run because nobody else could
  int order[kMaxWarps];   // of the warps, first the one that runs whenever it can
  Context threads[kMaxThreads];
  Context scheduler = nullptr;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  std::string error;
};
Block block;

uint64_t order_seed = 1;
uint64_t random_state = 1;

Warp& own_warp() { return block.warps[running.thread / kWarpThreads]; }
uint32_t own_lane() { return 1u << running.thread % kWarpThreads; }
int lowest(uint32_t lanes) { return __builtin_ctz(lanes); }

void suspend() { switch_context(&block.threads[running.thread], block.scheduler); }

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool operator==(const Site& a, const Site& b) {
  return a.location.line() == b.location.line() && a.location.column() == b.location.column() &&
         same_text(a.operation, b.operation) &&
         same_text(a.location.file_name(), b.location.file_name());
}

std::ostream& operator<<(std::ostream& out, const Site& site) {
  const char* file = site.location.file_name();
  const char* slash = std::strrchr(file, '/');
  return out << site.operation << " (" << (slash ? slash + 1 : file) << ':' << site.location.line()
             << ')';
}

void thread_entry() {
  block.body(block.argument);
  own_warp().returned |= own_lane();
  ++block.returned;
  suspend();
}

/// Whether all lanes of the warp have met now.
bool meet(const Site& site, void* operand) {
  Warp& warp = own_warp();
  if (warp.met == 0) {
    warp.site = site;
  } else if (!(warp.site == site)) {
    std::ostringstream text;
    text << "the lanes of warp " << running.thread / kWarpThreads << " have parted: lane "
         << lowest(warp.met) << " is in " << warp.site << ", lane " << running.thread % kWarpThreads
         << " in " << site;
    fail(text.str());
  }
  warp.operands[running.thread % kWarpThreads] = operand;
  warp.met |= own_lane();
  return warp.met == kAllLanes;
}

void release(Warp& warp) {
  warp.met = 0;
  warp.ready = kAllLanes;
}

/// A random order in which a warp runs far ahead of others shows a missing barrier best.
void reorder_warps() {
  for (int i = 0; i < block.num_warps; ++i) block.order[i] = i;
  if (order_seed == 0) return;
  for (int i = block.num_warps; i > 1; --i) {
    std::swap(block.order[i - 1], block.order[random_number() % static_cast<uint32_t>(i)]);
  }
}

/// The state of a lane that has not come to where others of its warp or block wait.
void describe_absent(std::ostream& out, const Warp& warp, int lane) {
  if (warp.returned >> lane & 1) {
    out << "has returned";
  } else if (warp.paused >> lane & 1) {
    out << "waits in " << warp.paused_at[lane];
  } else {
    out << "waits in " << warp.site;
  }
}

[[noreturn]] void report_deadlock() {
  std::ostringstream text;
  text << running.op << ": block " << running.block << ": nobody can go on: ";
  const Warp* begin = block.warps;
  const Warp* end = begin + block.num_warps;
  const Warp* split = std::find_if(
      begin, end, [](const Warp& warp) { return warp.met != 0 && warp.met != kAllLanes; });
  const Warp* barred =
      std::find_if(begin, end, [](const Warp& warp) { return warp.met == kAllLanes; });
  if (split != end) {
    const int absent = lowest(~split->met);
    text << "lane " << lowest(split->met) << " of warp " << split - begin << " waits in "
         << split->site << ", lane " << absent << ' ';
    describe_absent(text, *split, absent);
  } else if (barred != end) {
    const Warp* absent = std::find_if(begin, end, [](const Warp& warp) { return warp.met == 0; });
    text << "warp " << barred - begin << " waits in " << barred->site << ", warp " << absent - begin
         << ' ';
    describe_absent(text, *absent, 0);
  } else {
    const Warp* pausing = std::find_if(begin, end, [](const Warp& warp) { return warp.paused; });
    text << "lane " << lowest(pausing->paused) << " of warp " << pausing - begin << " waits in "
         << pausing->paused_at[lowest(pausing->paused)];
  }
  throw std::runtime_error(text.str());
}

void wake_paused() {
  for (int i = 0; i < block.num_warps; ++i) {
    block.warps[i].ready |= std::exchange(block.warps[i].paused, 0);
  }
}

int next_warp() {
  if (order_seed != 0) {
    const uint32_t chance = random_number();
    if (chance % 64 == 0) reorder_warps();
    if (chance / 64 % 8 == 0) wake_paused();
  }
  const auto find = [] {
    for (int i = 0; i < block.num_warps; ++i) {
      if (block.warps[block.order[i]].ready) return block.order[i];
    }
    return -1;
  };
  if (const int warp = find(); warp >= 0) return warp;
  if (!std::exchange(block.advanced, false)) report_deadlock();
  wake_paused();
  if (const int warp = find(); warp >= 0) return warp;
  report_deadlock();
}

/// Runs each lane that is ready until it waits, in some order.
void run_warp(int index) {
  Warp& warp = block.warps[index];
  const uint32_t chance = order_seed == 0 ? 0 : random_number();
  const uint32_t first = chance % kWarpThreads;
  const uint32_t step = chance / kWarpThreads % kWarpThreads | 1;  // odd: each lane once
  uint32_t waiting = std::exchange(warp.ready, 0);
  for (uint32_t i = 0; waiting != 0; ++i) {
    const uint32_t lane = (first + i * step) % kWarpThreads;
    if ((waiting >> lane & 1) == 0) continue;
    waiting &= ~(1u << lane);
    running.thread = index * kWarpThreads + static_cast<int>(lane);
    switch_context(&block.scheduler, block.threads[running.thread]);
    if (!block.error.empty()) throw std::runtime_error(std::exchange(block.error, {}));
  }
}

}  // namespace

void set_order(uint64_t seed) { order_seed = seed; }

void begin_order() { random_state = order_seed * 0x9e3779b97f4a7c15u + 1; }

uint32_t random_number() {
  random_state += 0x9e3779b97f4a7c15u;
  uint64_t x = random_state;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(x >> 32);
}

void run_block(void (*body)(const void*), const void* argument) {
  block.num_warps = running.threads / kWarpThreads;
  block.warps_at_barrier = block.returned = 0;
  block.advanced = true;
  block.body = body;
  block.argument = argument;
  std::fill_n(block.warps, block.num_warps, Warp());
  for (int thread = 0; thread < running.threads; ++thread) {
    block.threads[thread] = new_context(stack_of(thread), thread_entry);
  }
  reorder_warps();
  while (block.returned < running.threads) run_warp(next_warp());
}

void fail(const std::string& what) {
  std::ostringstream text;
  text << running.op << ": block " << running.block << ", thread " << running.thread << ": "
       << what;
  block.error = text.str();
  suspend();
  __builtin_unreachable();
}

void meet_warp(const Site& site, void* operand, void (*work)(Operands)) {
  if (meet(site, operand)) {
    work(own_warp().operands);
    release(own_warp());
  }
  suspend();
}

void meet_block(const Site& site) {
  if (meet(site, nullptr) && ++block.warps_at_barrier == block.num_warps) {
    block.warps_at_barrier = 0;
    std::for_each(block.warps, block.warps + block.num_warps, release);
    reorder_warps();
  }
  suspend();
}

void pause(const Site& site) {
  Warp& warp = own_warp();
  warp.paused |= own_lane();
  warp.paused_at[running.thread % kWarpThreads] = site;
  suspend();
}

void go_on() { block.advanced = true; }

}  // namespace sbert_fast::cuda::emulation
