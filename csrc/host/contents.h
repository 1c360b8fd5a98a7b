#pragma once

#include <pybind11/pybind11.h>

namespace sbert_fast::host {

/// Whether `containers` still hold the very objects that `contents` lists: each container, then its
/// entries. Those of a dict and of a class are keys and values in turn; those of a function are its
/// code, defaults and keyword defaults.
bool same_contents(const pybind11::list& containers, const pybind11::list& contents);

}  // namespace sbert_fast::host
