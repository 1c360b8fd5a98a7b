// How work is spread over torch's own thread pool.
//
// No result may depend on how a range is cut: kernels compute every row or item by itself.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace sbert_fast::cpu {

/// Elements below which waking another thread costs more than it saves.
inline constexpr int64_t kGrainElements = 1 << 16;

/// Runs `kernel` over `rows` rows of `width` elements, in equal parts; small inputs stay on this
/// thread.
template <class Params>
void parallel_rows(RangeKernel<Params> kernel, const Params& params, int64_t rows, int64_t width) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
  if (rows <= grain) return kernel(params, 0, rows);
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

/// Runs `work(next)` on as many threads as there are items for; next() is the next item, and at
/// least `items` once there is none left. A thread that was held up takes fewer of them.
template <class Work>
void parallel_workers(int64_t items, Work work) {
  std::atomic<int64_t> next_item{0};
  const auto next = [&] { return next_item.fetch_add(1, std::memory_order_relaxed); };
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), items);
  if (workers <= 1) return work(next);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { work(next); });
}

/// Runs `body(item)` for every item, each on the next thread that is free.
template <class Body>
void parallel_dynamic(int64_t items, Body body) {
  parallel_workers(items, [&](auto next) {
    for (int64_t item; (item = next()) < items;) body(item);
  });
}

/// Neighbouring work items of one cost, in elements touched.
struct ItemGroup {
  int64_t items;
  int64_t cost;  // of each
};

/// Runs `kernel` over the items of `groups` groups; `group(g)` is the ItemGroup g.
///
/// Neighbouring items are joined into chunks of about equal cost, several per thread, and every
/// thread takes the next chunk when it is done: one long sequence cannot hold up the others.
template <class Params, class Group>
void parallel_items(RangeKernel<Params> kernel, const Params& params, int64_t groups, Group group) {
  constexpr int64_t kChunksPerThread = 8;
  int64_t items = 0, total = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const ItemGroup next = group(g);
    items += next.items;
    total += next.items * next.cost;
  }
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || total <= kGrainElements) return kernel(params, 0, items);

  const int64_t chunk_cost = std::max(kGrainElements / 2, total / (threads * kChunksPerThread) + 1);
  std::vector<int64_t> bounds{0};
  int64_t gathered = 0, item = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const ItemGroup next = group(g);
    for (const int64_t last = item + next.items; item < last;) {
      ++item;
      gathered += next.cost;
      if (gathered < chunk_cost && item < items) continue;
      bounds.push_back(item);
      gathered = 0;
    }
  }
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1;
  parallel_dynamic(chunks,
                   [&](int64_t chunk) { kernel(params, bounds[chunk], bounds[chunk + 1]); });
}

}  // namespace sbert_fast::cpu
