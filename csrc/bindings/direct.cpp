// The CPU's operators as functions of the Python module, called without torch's dispatcher (direct.h). They ask it
// where they cannot do without, so that errors are the dispatcher's, too.
#include "direct.h"

namespace fused_rnn {
namespace bindings {

namespace {

// An operator. Absent arguments at the end are None, False and 0, but the last one is `last`, as in its schema. x: the
// place of x among them.
template <auto function, const char* name, size_t x, int64_t last>
PyObject* direct(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    py::object results = run(function, arguments, static_cast<size_t>(count), x, last);
    if (!results) {
      const py::object torchs = py::module_::import("torch").attr("ops").attr("fused_rnn").attr(name).attr("default");
      results = called(torchs.ptr(), arguments, static_cast<size_t>(count));
    }
    return results.release().ptr();
  });
}

template <class R, class... A>
constexpr Py_ssize_t count_of_arguments(R (*)(A...)) {
  return sizeof...(A);
}

// What is no operator: None where the dispatcher would be asked.
template <auto function, size_t x>
PyObject* direct_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  py::object results;
  if (count == count_of_arguments(function)) results = run(function, arguments, static_cast<size_t>(count), x, 0);
  return (results ? results : py::none()).release().ptr();
}

constexpr char kForward[] = "forward", kBackward[] = "backward", kStep[] = "step";
PyMethodDef methods[] = {
    method(kForward, direct<&forward, kForward, 0, kPlanned>, "The operator forward, of positional arguments."),
    method(kBackward, direct<&backward, kBackward, 3, kPlanned>, "The operator backward, of positional arguments."),
    method(kStep, direct<&step, kStep, 0, 0>, "The operator step, of positional arguments."),
    // For tests, which give them what no module would; modules come through plain.cpp and node.cpp.
    method("stack", direct_or_none<&stack, 0>,
           "All layers forward: the arguments of csrc/bindings/cpu_operators.h; None if they have to be computed in "
           "turn."),
    method("stack_backward", direct_or_none<&stack_backward, 3>,
           "All layers backward: the arguments of csrc/bindings/cpu_operators.h; None if they have to be computed in "
           "turn."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_direct(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace bindings
}  // namespace fused_rnn
