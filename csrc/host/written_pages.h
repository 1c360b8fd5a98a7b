// Which pages of this process were written to, by whatever means: Linux 6.9 and later protects
// private pages against writes, lifts the protection of a page at the first one, and tells where it
// has gone, at some nanoseconds a page (userfaultfd with WP_ASYNC, PAGEMAP_SCAN).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace sbert_fast::host {

// Addresses [begin, end), multiples of the page size, of private mappings.
using Pages = std::pair<uint64_t, uint64_t>;

// Protects pages from now on. Returns those that were not protected, or were written to since.
// Throws std::system_error where the system cannot do that, or not with these pages.
std::vector<Pages> watch_pages(const std::vector<Pages>& pages);

// Whether any was written to since it was protected, or is mapped anew. Throws std::system_error in
// a process that was forked: it watches nothing.
bool are_pages_written(const std::vector<Pages>& pages);

}  // namespace sbert_fast::host
