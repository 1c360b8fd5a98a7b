#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace sbert_fast::host {

/// sbert_fast.state.Contents, compiled. What is compared before a forward pass has left the caches
/// since the last one, so no more is read than tells of a change: the number that every write to a
/// dict or class renews, and of everything else its words in memory. It owns nothing: the caller
/// keeps all containers and entries alive.
class Contents {
 public:
  Contents(const pybind11::list& containers, const pybind11::list& places);

  bool is_current();

 private:
  /// Where a pointer or size lies, and what it was.
  struct Word {
    const uintptr_t* place;
    uintptr_t expected;
  };

  /// A dict, class or set, and its part of `entries_`: keys and values, or items, or, of a place,
  /// names and what was found there.
  struct Table {
    PyObject* container;
    bool is_place;
    uint64_t version;
    size_t begin, end;
  };

  template <class Field>
  void add_word(const Field& field);
  void add_container(PyObject* container);
  void add_table(PyObject* container, const pybind11::tuple* names);
  bool is_same(const Table& table) const;

  std::vector<Word> words_;
  std::vector<Table> tables_;
  std::vector<PyObject*> entries_;
};

}  // namespace sbert_fast::host
