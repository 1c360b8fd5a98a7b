#include "contents.h"

namespace py = pybind11;

namespace sbert_fast::host {
namespace {

// Goes through a flat list of objects in step with what is compared to it.
class Expected {
 public:
  explicit Expected(const py::list& contents)
      : contents_(contents.ptr()), left_(PyList_GET_SIZE(contents_)) {}

  bool next(PyObject* found) {
    return position_ < left_ && PyList_GET_ITEM(contents_, position_++) == found;
  }

  bool dict(PyObject* dict) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      if (!next(key) || !next(value)) return false;
    }
    return true;
  }

  bool function(PyObject* function) {
    const auto part = [this](PyObject* found) { return next(found == nullptr ? Py_None : found); };
    return part(PyFunction_GetCode(function)) && part(PyFunction_GetDefaults(function)) &&
           part(PyFunction_GetKwDefaults(function));
  }

  bool items(PyObject* iterable) {
    for (const py::handle item : py::reinterpret_borrow<py::object>(iterable)) {
      if (!next(item.ptr())) return false;
    }
    return true;
  }

  bool at_end() const { return position_ == left_; }

 private:
  PyObject* contents_;
  Py_ssize_t left_;
  Py_ssize_t position_ = 0;
};

bool same(Expected& expected, PyObject* container) {
  if (!expected.next(container)) return false;
  if (PyDict_Check(container)) return expected.dict(container);
  if (PyFunction_Check(container)) return expected.function(container);
  if (PyType_Check(container)) {
    return expected.dict(reinterpret_cast<PyTypeObject*>(container)->tp_dict);
  }
  return expected.items(container);
}

}  // namespace

bool same_contents(const py::list& containers, const py::list& contents) {
  Expected expected(contents);
  for (const py::handle container : containers) {
    if (!same(expected, container.ptr())) return false;
  }
  return expected.at_end();
}

}  // namespace sbert_fast::host
