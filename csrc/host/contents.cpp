#include "contents.h"

#include <utility>

namespace py = pybind11;

namespace sbert_fast::host {
namespace {

PyObject* dict_of(PyObject* table) {
  if (!PyType_Check(table)) return table;
#if PY_VERSION_HEX >= 0x030C0000
  PyObject* dict = PyType_GetDict(reinterpret_cast<PyTypeObject*>(table));
  Py_XDECREF(dict);  // the class keeps it
  return dict;
#else
  return reinterpret_cast<PyTypeObject*>(table)->tp_dict;
#endif
}

/// What every write to a dict or class renews; 0 where nothing does: the order of an OrderedDict is
/// kept beside its dict, and from Python 3.13 on there are no such numbers.
uint64_t version_of(PyObject* table) {
  if (PyODict_Check(table)) return 0;
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  if (PyType_Check(table)) return reinterpret_cast<PyTypeObject*>(table)->tp_version_tag;
  if (PyDict_Check(table)) return reinterpret_cast<PyDictObject*>(table)->ma_version_tag;
#pragma GCC diagnostic pop
#endif
  return 0;
}

/// The same, of a table that is compared from now on: a class has no number before it is asked.
uint64_t start_version_of(PyObject* table) {
  if (PyType_Check(table)) PyObject_HasAttrString(table, "forward");
  return version_of(table);
}

PyObject* found_in(PyObject* dict, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(dict, name);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

/// Calls `body` with every entry of a dict, class or set until it says false.
template <class Body>
bool all_entries(PyObject* table, const Body& body) {
  if (PyAnySet_Check(table)) {
    for (const py::handle item : py::reinterpret_borrow<py::object>(table)) {
      if (!body(item.ptr())) return false;
    }
    return true;
  }
  if (PyODict_Check(table)) {
    if (PyDict_GET_SIZE(table) == 0) return true;
    for (const py::handle key : py::reinterpret_borrow<py::object>(table)) {
      if (!body(key.ptr()) || !body(found_in(table, key.ptr()))) return false;
    }
    return true;
  }
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict_of(table), &at, &key, &value);) {
    if (!body(key) || !body(value)) return false;
  }
  return true;
}

}  // namespace

Contents::Contents(const py::list& containers, const py::list& places) {
  for (const py::handle container : containers) add_container(container.ptr());
  for (const py::handle place : places) {
    const auto [dict, names] = py::cast<std::pair<py::dict, py::tuple>>(place);
    add_table(dict.ptr(), &names);
  }
}

bool Contents::is_current() {
  for (const Word& word : words_) {
    if (*word.place != word.expected) return false;
  }
  for (Table& table : tables_) {
    if (table.version != 0 && version_of(table.container) == table.version) continue;
    const uint64_t version = start_version_of(table.container);
    if (!is_same(table)) return false;
    table.version = version;
  }
  return true;
}

template <class Field>
void Contents::add_word(const Field& field) {
  static_assert(sizeof(Field) == sizeof(uintptr_t));
  const auto* place = reinterpret_cast<const uintptr_t*>(&field);
  words_.push_back({place, *place});
}

void Contents::add_table(PyObject* container, const py::tuple* names) {
  tables_.push_back({container, names != nullptr, start_version_of(container), entries_.size(), 0});
  if (names == nullptr) {
    all_entries(container, [this](PyObject* entry) { return entries_.push_back(entry), true; });
  } else {
    for (const py::handle name : *names) {
      entries_.push_back(name.ptr());
      entries_.push_back(found_in(container, name.ptr()));
    }
  }
  tables_.back().end = entries_.size();
}

void Contents::add_container(PyObject* container) {
  if (PyDict_Check(container) || PyType_Check(container) || PyAnySet_Check(container)) {
    add_table(container, nullptr);
  } else if (PyList_Check(container)) {
    const auto* list = reinterpret_cast<PyListObject*>(container);
    add_word(list->ob_base.ob_size);
    add_word(list->ob_item);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) add_word(list->ob_item[i]);
  } else if (PyFunction_Check(container)) {
    const auto* function = reinterpret_cast<PyFunctionObject*>(container);
    add_word(function->func_code);
    add_word(function->func_defaults);
    add_word(function->func_kwdefaults);
    const Py_ssize_t cells = function->func_closure ? PyTuple_GET_SIZE(function->func_closure) : 0;
    for (Py_ssize_t i = 0; i < cells; ++i) {
      add_word(
          reinterpret_cast<PyCellObject*>(PyTuple_GET_ITEM(function->func_closure, i))->ob_ref);
    }
  } else if (!PyTuple_Check(container)) {
    add_word(container->ob_type);
    if (PyObject** dict = _PyObject_GetDictPtr(container)) add_word(*dict);
  }
}

bool Contents::is_same(const Table& table) const {
  size_t at = table.begin;
  if (table.is_place) {
    for (; at < table.end; at += 2) {
      if (found_in(table.container, entries_[at]) != entries_[at + 1]) return false;
    }
    return true;
  }
  const auto is_next = [&](PyObject* entry) { return at < table.end && entries_[at++] == entry; };
  return all_entries(table.container, is_next) && at == table.end;
}

}  // namespace sbert_fast::host
