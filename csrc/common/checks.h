// Argument checks shared by the API layers of the compiled ops (stable ABI).
//
// Every message reads "op: name must be <expected>, got <actual>". STD_TORCH_CHECK would put the
// source path of the check in front of it, so the checks here throw by themselves.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sbert_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// A size that a check leaves open.
inline constexpr int64_t kAnySize = -1;

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << op << ": ";
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

/// Throws "op: ..." unless `condition` holds; the message is built only then.
#define SBF_CHECK(condition, op, ...)                      \
  do {                                                     \
    if (!(condition)) ::sbert_fast::fail(op, __VA_ARGS__); \
  } while (false)

/// The name of a dtype as torch prints it in Python.
inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

/// "[3, *, 64]": sizes as they read in a message; an open size is a star.
template <class Sizes>
std::string sizes_string(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  const char* separator = "";
  for (const int64_t size : sizes) {
    text << separator;
    size == kAnySize ? text << '*' : text << size;
    separator = ", ";
  }
  text << ']';
  return text.str();
}

/// "float64 [3, 4], strides [4, 1]": what the caller passed.
inline std::string describe(const Tensor& tensor) {
  std::string text = dtype_name(tensor.scalar_type());
  text += ' ' + sizes_string(tensor.sizes());
  if (!tensor.is_contiguous()) text += ", strides " + sizes_string(tensor.strides());
  return text;
}

inline bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> expected) {
  if (tensor.dim() != static_cast<int64_t>(expected.size())) return false;
  int64_t dim = 0;
  for (const int64_t size : expected) {
    if (size != kAnySize && size != tensor.size(dim)) return false;
    ++dim;
  }
  return true;
}

/// Requires a contiguous tensor of `dtype` with `sizes`; `dims` names them, as in "[T, E]".
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         const char* dims, std::initializer_list<int64_t> sizes) {
  SBF_CHECK(tensor.scalar_type() == dtype && has_sizes(tensor, sizes) && tensor.is_contiguous(), op,
            name, " must be contiguous ", dtype_name(dtype), ' ', dims, " = ", sizes_string(sizes),
            ", got ", describe(tensor));
}

/// The same for an optional argument: an absent one passes.
inline void check_tensor(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         ScalarType dtype, const char* dims, std::initializer_list<int64_t> sizes) {
  if (tensor.has_value()) check_tensor(op, name, *tensor, dtype, dims, sizes);
}

/// Data of an optional tensor; null where it is absent.
template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace sbert_fast
