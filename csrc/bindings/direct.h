// Calls of C++ functions with Python's tensors, without torch's dispatcher where it would find nothing but them.
//
// Through the dispatcher a call takes 2 to 4 microseconds more: arguments are looked up by name, boxed, and boxed again
// for the stable ABI. torch._C._aoti has two functions for the code that torch's own compiler generates, which turn
// Python's tensors into the stable ABI's handles and back in a tenth of a microsecond each.
//
// The dispatcher has to be asked if this thread's profiler, a mode or a tracer would see the call there, if a tensor is
// not a plain one on the CPU, and if the function refuses its arguments. That no functorch transform and no autocast is
// in force, the callers see to (fused_rnn/policy.py, plain.cpp).
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <array>
#include <type_traits>
#include <utility>

#include "cpu_operators.h"

namespace fused_rnn {
namespace bindings {

namespace py = pybind11;

// A reference that is never released.
inline PyObject* kept(py::object object) { return object.release().ptr(); }

// What is needed of torch: the process's own.
struct Torch {
  PyTypeObject *tensor, *parameter;
  PyObject *float32, *float64, *bfloat16, *float16;
  PyObject *deterministic, *precision, *autocast, *grad_enabled;
  PyObject *modes, *function_modes, *tracer, *transforms, *forward_mode;
  // Another torch may lack these; from_handles is null then.
  PyObject *is_neg = nullptr, *profiles = nullptr, *to_handles = nullptr, *from_handles = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch"), c = py::module_::import("torch._C");
    tensor = reinterpret_cast<PyTypeObject*>(kept(torch.attr("Tensor")));
    parameter = reinterpret_cast<PyTypeObject*>(kept(py::module_::import("torch.nn").attr("Parameter")));
    float32 = kept(torch.attr("float32"));
    float64 = kept(torch.attr("float64"));
    bfloat16 = kept(torch.attr("bfloat16"));
    float16 = kept(torch.attr("float16"));
    deterministic = kept(c.attr("_get_deterministic_algorithms"));
    precision = kept(c.attr("_get_fp32_precision_getter"));
    autocast = kept(torch.attr("is_autocast_enabled"));
    grad_enabled = kept(c.attr("is_grad_enabled"));
    modes = kept(c.attr("_len_torch_dispatch_stack"));
    function_modes = kept(c.attr("_len_torch_function_stack"));
    tracer = kept(c.attr("_get_tracing_state"));
    transforms = kept(c.attr("_functorch").attr("get_dynamic_layer_stack_depth"));
    forward_mode = kept(py::module_::import("torch.autograd.forward_ad"));
    try {
      is_neg = kept(torch.attr("Tensor").attr("is_neg"));
      profiles = kept(c.attr("_autograd").attr("_profiler_enabled"));
      to_handles = kept(c.attr("_aoti").attr("unsafe_alloc_void_ptrs_from_tensors"));
      from_handles = kept(c.attr("_aoti").attr("alloc_tensors_by_stealing_from_void_ptrs"));
    } catch (const py::error_already_set&) {
    }
  }
};

inline const Torch& torch_objects() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
  return storage.call_once_and_store_result([] { return Torch(); }).get_stored();
}

// Of torch.Tensor itself or a parameter: a subclass may mean something else by any operation.
inline bool is_tensor(PyObject* object) {
  const Torch& torch = torch_objects();
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

inline py::object called(PyObject* function, PyObject* const* arguments, size_t count) {
  PyObject* const result = PyObject_Vectorcall(function, arguments, count, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
inline py::object called(PyObject* function, PyObject* argument) { return called(function, &argument, 1); }

inline py::object called(PyObject* function) { return called(function, nullptr, 0); }

inline py::object attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Whether a mode or a tracer sees calls of the dispatcher, or this thread's profiler.
inline bool dispatcher_is_watched() {
  const Torch& torch = torch_objects();
  return called(torch.profiles).ptr() == Py_True || called(torch.modes).cast<int64_t>() > 0 ||
         !called(torch.tracer).is_none();
}

// Whether a functorch transform or a forward-mode derivative rewrites torch's operations.
inline bool are_transformed() {
  static PyObject* const level = PyUnicode_InternFromString("_current_level");
  const Torch& torch = torch_objects();
  return called(torch.transforms).cast<int64_t>() > 0 || attribute(torch.forward_mode, level).cast<int64_t>() >= 0;
}

// The tensors among a call's arguments, and in lists among them, in order.
class Handles {
 public:
  // x: the place of x among the arguments.
  Handles(PyObject* const* arguments, size_t count, size_t x) {
    for (size_t i = 0; i < count; ++i) {
      if (i == x) x_ = objects_.size();
      if (PyTuple_Check(arguments[i]) || PyList_Check(arguments[i])) {
        for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(arguments[i]); ++j) {
          add(PySequence_Fast_GET_ITEM(arguments[i], j));
        }
      } else {
        add(arguments[i]);
      }
    }
    const py::list capsules = called(torch_objects().to_handles, objects_.ptr());
    tensors_.reserve(capsules.size());
    for (py::handle capsule : capsules) {
      tensors_.emplace_back(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(capsule.ptr(), nullptr)));
    }
  }
  Tensor next() {
    FUSED_RNN_CHECK(used_ < tensors_.size(), "a list of tensors has changed meanwhile");
    return std::move(tensors_[used_++]);
  }
  bool on_cpu() const {
    for (const Tensor& tensor : tensors_) {
      if (!tensor.is_cpu()) return false;
    }
    return true;
  }
  // At most so many multiply-adds: every row of x meets all that the other tensors hold.
  double work() const {
    if (x_ >= tensors_.size() || tensors_[x_].dim() == 0) return 0;
    double elements = 0;
    for (const Tensor& tensor : tensors_) elements += static_cast<double>(tensor.numel());
    const Tensor& x = tensors_[x_];
    const int64_t width = x.size(x.dim() - 1);
    return elements * static_cast<double>(x.numel() / (width > 0 ? width : 1));
  }

 private:
  void add(PyObject* object) {
    if (!is_tensor(object)) return;
    objects_.append(py::handle(object));
    // It may stand for the negative of what lies in its memory, which the dispatcher would compute.
    FUSED_RNN_CHECK(called(torch_objects().is_neg, object).ptr() == Py_False, "a tensor is a negated view");
  }

  py::list objects_;
  std::vector<Tensor> tensors_;
  size_t x_ = 0, used_ = 0;
};

// An argument as the type that the operator takes; null: absent.
template <class T>
T taken(PyObject* object, Handles& handles);
template <>
inline Tensor taken(PyObject* object, Handles& handles) {
  FUSED_RNN_CHECK(object && is_tensor(object), "expected a tensor");
  return handles.next();
}
template <>
inline OptionalTensor taken(PyObject* object, Handles& handles) {
  if (!object || object == Py_None) return std::nullopt;
  return taken<Tensor>(object, handles);
}
template <>
inline int64_t taken(PyObject* object, Handles&) {
  return object ? py::handle(object).cast<int64_t>() : 0;
}
template <>
inline bool taken(PyObject* object, Handles&) {
  FUSED_RNN_CHECK(!object || PyBool_Check(object), "expected a bool");
  return object == Py_True;
}
template <class Element>
std::vector<Element> elements(PyObject* object, Handles& handles) {
  FUSED_RNN_CHECK(object && (PyTuple_Check(object) || PyList_Check(object)), "expected a list");
  std::vector<Element> all;
  all.reserve(PySequence_Fast_GET_SIZE(object));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
    all.push_back(taken<Element>(PySequence_Fast_GET_ITEM(object, i), handles));
  }
  return all;
}
template <>
inline std::vector<Tensor> taken(PyObject* object, Handles& handles) {
  return elements<Tensor>(object, handles);
}
template <>
inline std::vector<OptionalTensor> taken(PyObject* object, Handles& handles) {
  return elements<OptionalTensor>(object, handles);
}
template <>
inline std::vector<bool> taken(PyObject* object, Handles& handles) {
  return elements<bool>(object, handles);
}
template <>
inline GivenOptions taken(PyObject* object, Handles& handles) {
  if (!object || object == Py_None) return std::nullopt;
  return elements<OptionalTensor>(object, handles);
}

// A tuple of tensors, with None for the undefined ones.
inline py::object given_back(const Tensor* const* all, size_t count) {
  py::list capsules;
  for (size_t i = 0; i < count; ++i) {
    if (!all[i]->defined()) continue;
    AtenTensorHandle handle;
    FUSED_RNN_CHECK(aoti_torch_new_tensor_handle(all[i]->get(), &handle) == AOTI_TORCH_SUCCESS, "no memory");
    capsules.append(py::capsule(handle));
  }
  const py::list tensors = called(torch_objects().from_handles, capsules.ptr());
  py::tuple out(count);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    out[i] = all[i]->defined() ? py::object(tensors[next++]) : py::none();
  }
  return out;
}
template <class... Tensors>
py::object given_back(const std::tuple<Tensors...>& results) {
  const auto all = std::apply(
      [](const auto&... tensor) { return std::array<const Tensor*, sizeof...(tensor)>{&tensor...}; }, results);
  return given_back(all.data(), all.size());
}
inline py::object given_back(const std::vector<Tensor>& results) {
  std::vector<const Tensor*> all;
  all.reserve(results.size());
  for (const Tensor& tensor : results) all.push_back(&tensor);
  return given_back(all.data(), all.size());
}

// A call that takes a few microseconds is over before another thread could make use of Python's lock.
constexpr double kWorthUnlocking = 1e6;  // multiply-adds

// Null if the dispatcher has to be asked.
template <class R, class... A, size_t... i>
py::object run(R (*function)(A...), PyObject* const* given, size_t count, size_t x, int64_t last,
               std::index_sequence<i...>) {
  if (count > sizeof...(A) || !torch_objects().from_handles || dispatcher_is_watched()) return {};
  Handles handles(given, count, x);
  if (!handles.on_cpu()) return {};
  const bool unlock = handles.work() > kWorthUnlocking;
  std::tuple<A...> arguments{taken<A>(i < count ? given[i] : nullptr, handles)...};  // braces: in order
  auto& last_one = std::get<sizeof...(A) - 1>(arguments);
  if constexpr (std::is_arithmetic_v<std::decay_t<decltype(last_one)>>) {
    if (count < sizeof...(A)) last_one = last;
  }
  const R results = [&] {
    std::optional<py::gil_scoped_release> unlocked;
    if (unlock) unlocked.emplace();
    return std::apply(function, arguments);  // which are released with the lock: a tensor's last handle takes it
  }();
  return given_back(results);
}
template <class R, class... A>
py::object run(R (*function)(A...), PyObject* const* arguments, size_t count, size_t x, int64_t last) {
  try {
    return run(function, arguments, count, x, last, std::index_sequence_for<A...>());
  } catch (const std::exception&) {  // a mistake, or a tensor that only torch can read
    return {};
  }
}

// The result of a function that Python calls, or null with an exception of Python's for one of C++.
template <class Function>
PyObject* guarded(const Function& function) {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Not pybind11's functions, which take half a microsecond to find out what they were given.
using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
inline PyMethodDef method(const char* name, Fast function, const char* documentation) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, documentation};
}

}  // namespace bindings
}  // namespace fused_rnn
