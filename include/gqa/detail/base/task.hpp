// SPDX-License-Identifier: Apache-2.0
/// \file
/// task_ref: a borrowed `f(task, worker)`, two pointers wide, handed to executors.
#pragma once

#include <gqa/config.hpp>

namespace gqa::detail {

class task_ref {
 public:
  template <class F>
  static task_ref to(const F& f) noexcept {
    return {&f, [](const void* self, index_t task, index_t worker) { (*static_cast<const F*>(self))(task, worker); }};
  }
  void operator()(index_t task, index_t worker) const { call_(self_, task, worker); }

 private:
  using function = void (*)(const void*, index_t, index_t);
  task_ref(const void* self, function call) noexcept : self_(self), call_(call) {}

  const void* self_;
  function call_;
};

}  // namespace gqa::detail
