// content_hash: 64 bits over what tensors hold, cheap enough to ask before every forward pass.
//
// It sees every change of shape, strides, dtype, device and address, every bit of a small tensor,
// and 32 bytes of each row of a large one, at columns that move on from row to row. The hash is a
// sum over pieces, each mixed with its position: no cut between threads changes it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ops.h"
#include "parallel.h"

namespace sbert_fast::cpu {
namespace {

// Bytes that are read of a row. Caches fetch twice as many anyway.
constexpr int64_t kPiece = 32;
// A tensor of no more elements is read whole.
constexpr int64_t kWhole = 4096;
// Rows that are asked for ahead: more than a core finds in its window of instructions.
constexpr int64_t kAhead = 16;
// Rows below which waking another thread costs more than it saves.
constexpr int64_t kGrain = 4096;

constexpr uint64_t kKeys[] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb,
                              0xd6e8feb86659fd93};

/// Both halves of a product, which every bit of `a` and `b` reaches.
uint64_t fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

/// Rows at equal distances; of row r the piece r % slots is read.
struct Rows {
  const char* base;
  int64_t first;  // position of row 0 among all rows
  int64_t count;
  int64_t stride;  // bytes
  int64_t slots;
};

using Words [[gnu::vector_size(16)]] = uint64_t;

/// The products of the halves of each word.
Words multiply_halves(Words x) {
#if defined(__SSE2__)
  return reinterpret_cast<Words>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(x >> 32)));
#else
  return (x & 0xffffffff) * (x >> 32);
#endif
}

/// Sums of the hashes of pieces, which follow one another from a position on. The time is that of
/// waiting for memory, and a core waits for as many rows as its window of instructions holds. So
/// there are few a row: half a multiplication, and the word beside it, which shows where that hides
/// a change.
class Sums {
 public:
  explicit Sums(int64_t position)
      : keys_{Words{kKeys[0], kKeys[1]}, Words{kKeys[2], kKeys[3]}}, values_{} {
    for (Words& key : keys_) key += static_cast<uint64_t>(position) * kStep;
  }

  void add(const char* piece) {
    for (int half = 0; half < 2; ++half) {
      Words words;
      std::memcpy(&words, piece + 16 * half, 16);
      values_[half] += multiply_halves(words ^ keys_[half]) + Words{words[1], words[0]};
      keys_[half] += kStep;
    }
  }

  void add_to(std::atomic<uint64_t>* totals) const {
    for (int i = 0; i < 4; ++i) totals[i].fetch_add(values_[i / 2][i % 2]);
  }

 private:
  static constexpr uint64_t kStep = 0xa0761d6478bd642f;
  Words keys_[2], values_[2];
};

void hash_rows(const std::vector<Rows>& rows, int64_t begin, int64_t end,
               std::atomic<uint64_t>* totals) {
  const auto after = [](int64_t position, const Rows& group) { return position < group.first; };
  auto group = std::upper_bound(rows.begin(), rows.end(), begin, after) - 1;
  Sums sums(begin);
  for (; begin < end; ++group) {
    const int64_t last = std::min(end - group->first, group->count);
    for (int64_t row = begin - group->first, next; row < last; row = next) {
      const int64_t slot = row % group->slots;
      next = std::min(last, row + group->slots - slot);
      const char* piece = group->base + row * group->stride + slot * kPiece;
      const int64_t step = group->stride + kPiece;
      for (; row < next; ++row, piece += step) {
        __builtin_prefetch(piece + kAhead * step);
        sums.add(piece);
      }
    }
    begin = group->first + last;
  }
  sums.add_to(totals);
}

/// A tensor as a kernel sees it; strides are in elements.
struct View {
  const char* data;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  int64_t itemsize;
};

/// Whether the storage has all elements of a tensor that has some: it may have been given back.
bool in_storage(const Tensor& tensor, const View& view) {
  int64_t bytes = 0, last = tensor.storage_offset();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  for (size_t dim = 0; dim < view.sizes.size(); ++dim) {
    last += (view.sizes[dim] - 1) * view.strides[dim];
  }
  return (last + 1) * view.itemsize <= bytes;
}

/// Calls `body` with the address of every row; what an expanded dim repeats comes once.
template <class Body>
void for_each_row(const View& view, size_t dim, const char* data, const Body& body) {
  if (dim + 1 >= view.sizes.size()) return body(data);
  const int64_t stride = view.strides[dim] * view.itemsize;
  for (int64_t i = 0; i < (stride == 0 ? 1 : view.sizes[dim]); ++i) {
    for_each_row(view, dim + 1, data + i * stride, body);
  }
}

class ContentHash {
 public:
  void add(const Tensor& tensor, bool read);
  int64_t finish() const;

 private:
  void add_word(uint64_t word) { sum_ += fold(word ^ kKeys[0], ++words_ * kKeys[2]); }
  void add_rows(const char* base, int64_t count, int64_t stride, int64_t slots);
  void add_bytes(const char* data, int64_t bytes);
  void add_elements(const View& view, bool whole);

  std::vector<Rows> rows_;
  int64_t num_rows_ = 0;
  uint64_t sum_ = 0, words_ = 0;
};

void ContentHash::add_rows(const char* base, int64_t count, int64_t stride, int64_t slots) {
  rows_.push_back({base, num_rows_, count, stride, slots});
  num_rows_ += count;
}

void ContentHash::add_bytes(const char* data, int64_t bytes) {
  const int64_t pieces = bytes / kPiece;
  if (pieces > 0) add_rows(data, pieces, 0, pieces);
  for (int64_t at = pieces * kPiece; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, std::min<int64_t>(8, bytes - at));
    add_word(word);
  }
}

void ContentHash::add_elements(const View& view, bool whole) {
  const int64_t columns = view.sizes.back(), stride = view.strides.back() * view.itemsize;
  const int64_t taken = whole ? columns : std::min(kPiece / view.itemsize, columns);
  int64_t row = 0;
  for_each_row(view, 0, view.data, [&](const char* data) {
    const char* element = data + row++ % (columns / taken) * taken * stride;
    for (int64_t i = 0; i < taken; ++i, element += stride) {
      uint64_t word = 0;
      std::memcpy(&word, element, view.itemsize);
      add_word(word);
    }
  });
}

void ContentHash::add(const Tensor& tensor, bool read) {
  int32_t dtype = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  const View view{static_cast<const char*>(tensor.data_ptr()), tensor.sizes(), tensor.strides(),
                  static_cast<int64_t>(aoti_torch_dtype_element_size(dtype))};
  SBF_CHECK(view.itemsize <= 8, "content_hash", "tensors must have elements of up to 8 bytes, got ",
            dtype_name(tensor.scalar_type()));
  add_word(reinterpret_cast<uintptr_t>(view.data));
  add_word(static_cast<uint64_t>(dtype) << 32 | static_cast<uint32_t>(device));
  add_word(static_cast<uint64_t>(view.sizes.size()) << 32 |
           static_cast<uint32_t>(tensor.get_device_index()));
  int64_t numel = 1;
  for (size_t dim = 0; dim < view.sizes.size(); ++dim) {
    numel *= view.sizes[dim];
    add_word(static_cast<uint64_t>(view.sizes[dim]));
    add_word(static_cast<uint64_t>(view.strides[dim]));
  }
  if (!read || device != aoti_torch_device_type_cpu() || numel == 0) return;
  if (!in_storage(tensor, view)) return;

  const size_t dims = view.sizes.size();
  const bool whole = dims < 2 || numel <= kWhole, contiguous = tensor.is_contiguous();
  const int64_t columns = dims == 0 ? 1 : view.sizes.back(), row_bytes = columns * view.itemsize;
  if (contiguous && (whole || row_bytes <= kPiece)) {
    return add_bytes(view.data, numel * view.itemsize);
  }
  const bool even = contiguous || (dims == 2 && view.strides[1] == 1 && view.strides[0] != 0);
  if (whole || !even || row_bytes < kPiece) return add_elements(view, whole);
  // A piece that begins at a multiple of its size lies in one cache line.
  const int64_t over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) % kPiece);
  const int64_t lead = over > 0 && row_bytes >= 2 * kPiece ? kPiece - over : 0;
  const int64_t stride = contiguous ? row_bytes : view.strides[0] * view.itemsize;
  add_rows(view.data + lead, numel / columns, stride, (row_bytes - lead) / kPiece);
}

int64_t ContentHash::finish() const {
  std::atomic<uint64_t> totals[4] = {};
  const auto add = [&](int64_t begin, int64_t end) { hash_rows(rows_, begin, end, totals); };
  if (num_rows_ > kGrain) {
    torch::stable::parallel_for(0, num_rows_, kGrain, add);
  } else if (num_rows_ > 0) {
    add(0, num_rows_);
  }
  uint64_t hash = sum_;
  for (const auto& total : totals) hash = fold(hash ^ kKeys[0], total ^ kKeys[1]) + total;
  return static_cast<int64_t>(hash);
}

}  // namespace

int64_t content_hash(std::vector<Tensor> tensors, int64_t read) {
  ContentHash hash;
  for (const Tensor& tensor : tensors) hash.add(tensor, read-- > 0);
  return hash.finish();
}

}  // namespace sbert_fast::cpu
