// sbert_fast._host: the batch planner, the CPU's features, the comparison of snapshots and the
// watch over pages, for Python. No torch headers, so it builds and runs wherever there is a C++
// compiler.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "contents.h"
#include "cpu_features.h"
#include "planner.h"
#include "written_pages.h"

namespace py = pybind11;

namespace sbert_fast::host {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// Checks that `lengths` is a contiguous int32 [N] without negative values; a view of its memory.
std::span<const int32_t> checked_lengths(const py::array& lengths) {
  if (lengths.ndim() != 1 || !py::isinstance<py::array_t<int32_t>>(lengths)) {
    throw py::value_error(py::str("lengths must be int32 [N], got {} with shape {}")
                              .format(lengths.dtype(), py::list(lengths.attr("shape"))));
  }
  if (!(lengths.flags() & py::array::c_style)) {
    throw py::value_error("lengths must be contiguous, got a stride of " +
                          std::to_string(lengths.strides(0)) + " bytes");
  }
  const std::span<const int32_t> values(static_cast<const int32_t*>(lengths.data()),
                                        static_cast<size_t>(lengths.size()));
  const auto least = std::min_element(values.begin(), values.end());
  if (least != values.end() && *least < 0) {
    throw py::value_error("lengths must be at least 0, got " + std::to_string(*least) +
                          " at index " + std::to_string(least - values.begin()));
  }
  return values;
}

void check_limit(const char* name, int64_t limit) {
  if (limit > 0) return;
  throw py::value_error(std::string(name) + " must be at least 1, got " + std::to_string(limit));
}

py::tuple py_plan_batches(const py::array& lengths, int64_t budget) {
  const auto values = checked_lengths(lengths);
  check_limit("budget", budget);
  py::array_t<int64_t> order(lengths.size());
  const std::span<int64_t> order_values(order.mutable_data(), values.size());
  std::vector<int64_t> starts;
  {
    const py::gil_scoped_release release;
    starts = plan_batches(values, budget, order_values);
  }
  return py::make_tuple(
      order, py::array_t<int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data()));
}

py::array_t<int32_t> py_plan_tiles(const py::array& lengths, int64_t tile) {
  const auto values = checked_lengths(lengths);
  check_limit("tile", tile);
  int64_t total = 0;
  for (const int32_t length : values) total += length;
  if (total > kMaxInt32) {
    throw py::value_error("lengths must sum to less than 2^31 tokens, got " +
                          std::to_string(total));
  }
  const std::vector<Tile> tiles =
      plan_tiles(values, static_cast<int32_t>(std::min(tile, kMaxInt32)));
  static_assert(sizeof(Tile) == 4 * sizeof(int32_t),
                "a tile is one row of the int32 [n, 4] result");
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(tiles.size()), 4};
  return py::array_t<int32_t>(shape, reinterpret_cast<const int32_t*>(tiles.data()));
}

py::dict py_cpu_features() {
  py::dict features;
  for (const auto& [name, available] : cpu_features()) features[py::str(name)] = available;
  return features;
}

// std::system_error as OSError, with its number.
void raise_os_error(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const std::system_error& error) {
    const py::object arguments = py::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  py::register_local_exception_translator(&raise_os_error);
  module.doc() = "Batch planner and CPU features; needs no torch.";
  module.def("plan_batches", &py_plan_batches, py::arg("lengths"), py::arg("budget"),
             R"(Cut texts into batches of at most `budget` tokens, longest texts first.

Args:
    lengths: contiguous int32 [N], tokens per text, none negative.
    budget: positive int, tokens per batch; a longer text is a batch of its own.

Returns:
    order: int64 [N], text indices by falling length, equal lengths in their original order.
    starts: int64 [num_batches + 1]; batch b holds order[starts[b]:starts[b + 1]].

Raises:
    ValueError: lengths is not a contiguous int32 [N] or is negative somewhere, or budget is
        below 1; the message names the argument.)");
  module.def("plan_tiles", &py_plan_tiles, py::arg("lengths"), py::arg("tile"),
             R"(Group consecutive packed sequences into tiles of at most `tile` tokens.

Args:
    lengths: contiguous int32 [B], tokens per sequence, none negative, their sum below 2**31.
    tile: positive int, tokens per tile.

Returns:
    int32 [n, 4] of rows (q_start, q_end, first_seq, num_seqs), in packed token offsets.

Raises:
    ValueError: lengths is not a contiguous int32 [N], is negative somewhere or sums to 2**31 or
        more, or tile is below 1; the message names the argument.)");
  py::class_<Contents>(module, "Contents", "See sbert_fast.state.Contents.")
      .def(py::init<const py::list&, const py::list&>(), py::arg("containers"),
           py::arg("places") = py::list())
      .def("is_current", &Contents::is_current, "Whether all of it is as it was.");
  module.def("watch_pages", &watch_pages, py::arg("pages"), "See sbert_fast.watching.");
  module.def("are_pages_written", &are_pages_written, py::arg("pages"), "See sbert_fast.watching.");
  module.def("cpu_features", &py_cpu_features,
             "Every feature the package knows of, by name, with whether it can be used here.");
  module.def("cpu_name", &cpu_name, "The processor's name, or \"unknown\".");
}

}  // namespace sbert_fast::host
