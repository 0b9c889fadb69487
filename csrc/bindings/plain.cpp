// A module's or cell's plain call in inference, from the caller's arguments to the results: what Python takes to find
// out that nothing stands in the way of the kernels is more than small layers compute. The answer is None to all other
// calls, at which fused_rnn/modules.py and cells.py then look more closely; nothing is refused here.
//
// What the module is, they know: they do not ask while gradients are recorded or a compiler looks, for a module with
// options of ours, with dropout, with another backend, with weights that are missing or with checks of a subclass, nor
// where the user's table has a say.
#include "direct.h"

namespace fused_rnn {
namespace bindings {

namespace {

// Attributes and arguments, interned and never released.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* ndim = PyUnicode_InternFromString("ndim");
  PyObject* transpose = PyUnicode_InternFromString("transpose");
  PyObject* transpose_in_place = PyUnicode_InternFromString("transpose_");
  PyObject* current_level = PyUnicode_InternFromString("_current_level");
  PyObject* cpu = PyUnicode_InternFromString("cpu");
  PyObject* mkldnn = PyUnicode_InternFromString("mkldnn");
  PyObject* switches[2] = {PyUnicode_InternFromString("rnn"), PyUnicode_InternFromString("matmul")};
};
const Names& interned() {
  static const Names all;
  return all;
}

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}
int64_t number(py::handle object) { return object.cast<int64_t>(); }

// Whether a functorch transform or a forward-mode derivative rewrites torch's operations.
bool are_transformed() {
  const Torch& torch = torch_objects();
  return number(called(torch.transforms)) > 0 || number(attribute(torch.forward_mode, interned().current_level)) >= 0;
}

// As `precision` in fused_rnn/policy.py, of a sequence of float32 with more than one step.
bool wants_other_products() {
  if (!cpu::kernels().unit) return false;
  for (PyObject* switch_ : interned().switches) {
    PyObject* const arguments[] = {interned().mkldnn, switch_};
    const py::object precision = called(torch_objects().precision, arguments, 2);
    const auto is = [&](const char* name) { return PyUnicode_CompareWithASCIIString(precision.ptr(), name) == 0; };
    if (!PyUnicode_Check(precision.ptr()) || is("tf32") || is("bf16")) return true;
    if (!is("none")) return false;
  }
  return false;
}

// Whether every weight is the parameter of its name, and a plain tensor. `weights`: a list or tuple.
bool are_in_place(PyObject* parameters, PyObject* names, PyObject* weights) {
  if (!PyDict_Check(parameters) || !PyList_Check(names)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(weights);
  if (PyList_GET_SIZE(names) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const weight = PySequence_Fast_GET_ITEM(weights, i);
    if (!is_tensor(weight) || PyDict_GetItem(parameters, PyList_GET_ITEM(names, i)) != weight) return false;
  }
  return true;
}

bool is_tensor_or_none(const py::object& object) { return object.is_none() || is_tensor(object.ptr()); }

py::object transposed(PyObject* tensor, PyObject* method) {
  static PyObject* const dimensions[] = {PyLong_FromLong(0), PyLong_FromLong(1)};
  PyObject* const arguments[] = {tensor, dimensions[0], dimensions[1]};
  PyObject* const result = PyObject_VectorcallMethod(method, arguments, 3, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The arguments of `infer`: the caller's input, of `dim` dimensions, and states, and what the module is. A cell has 0
// layers.
struct ModuleCall {
  PyObject *input, *hx, *dim, *cell, *layers, *directions, *has_biases, *projected, *batch_first;
  PyObject *parameters, *weight_names, *weights;

  // Null if it is no plain call. What may change while Python's functions run is held here.
  py::object results() const {
    const Torch& torch = torch_objects();
    if (!torch.from_handles || !is_tensor(input) || !PyList_Check(weights) || !PyBool_Check(batch_first) ||
        number(called(torch.function_modes)) > 0) {  // which would see that a tensor is asked for its dtype
      return {};
    }
    const auto given = py::reinterpret_steal<py::object>(PyList_AsTuple(weights));
    if (!are_in_place(parameters, weight_names, given.ptr())) return {};
    const int64_t dimensions = number(attribute(input, interned().ndim));
    const py::object dtype = attribute(input, interned().dtype);
    const bool is_float32 = dtype.ptr() == torch.float32;
    if (dimensions != number(dim) || !(is_float32 || dtype.ptr() == torch.float64)) return {};
    const bool is_lstm = number(cell) == static_cast<int64_t>(CellKind::kLstm), is_cell = number(layers) == 0;
    py::object h0 = py::reinterpret_borrow<py::object>(hx), c0 = py::none();
    if (is_lstm && hx != Py_None) {
      if (!(PyTuple_CheckExact(hx) || PyList_CheckExact(hx)) || PySequence_Fast_GET_SIZE(hx) != 2) return {};
      h0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx, 0));
      c0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx, 1));
      if (h0.is_none() || c0.is_none()) return {};
    }
    const bool transposes = dimensions == 3 && batch_first == Py_True;  // which a watcher would see again from Python
    if (!is_tensor_or_none(h0) || !is_tensor_or_none(c0) || are_transformed() ||
        called(torch.autocast, interned().cpu).ptr() != Py_False ||
        (is_float32 && dimensions == 3 && wants_other_products()) || (transposes && dispatcher_is_watched())) {
      return {};
    }
    const py::object x =
        transposes ? transposed(input, interned().transpose) : py::reinterpret_borrow<py::object>(input);
    const py::object deterministic = called(torch.deterministic);
    PyObject* const arguments[] = {x.ptr(),    h0.ptr(),    c0.ptr(),   cell,      layers,
                                   directions, given.ptr(), has_biases, projected, deterministic.ptr(),
                                   Py_False};
    const py::object found = run(&stack, arguments, std::size(arguments), 0, 0);
    if (!found) return {};
    const auto result = [&](Py_ssize_t i) { return py::handle(PyTuple_GET_ITEM(found.ptr(), i)); };
    const py::handle y = result(0);
    if (is_cell && !is_lstm) return py::reinterpret_borrow<py::object>(y);
    if (is_cell) return py::make_tuple(y, result(2));
    if (transposes) transposed(y.ptr(), interned().transpose_in_place);  // in place, as torch.nn's own on a CPU
    if (!is_lstm) return py::make_tuple(y, result(1));
    return py::make_tuple(y, py::make_tuple(result(1), result(2)));
  }
};

PyObject* infer(PyObject*, PyObject* const* a, Py_ssize_t count) {
  return guarded([&] {
    py::object results;
    if (count == sizeof(ModuleCall) / sizeof(PyObject*)) {
      const ModuleCall call{a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]};
      try {
        results = call.results();
      } catch (const py::cast_error&) {  // of what should be a number
      }
    }
    return (results ? results : py::none()).release().ptr();
  });
}

PyObject* in_place(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&] {
    return PyBool_FromLong(count == 3 && PyList_Check(arguments[2]) &&
                           are_in_place(arguments[0], arguments[1], arguments[2]));
  });
}

PyObject* watched(PyObject*, PyObject* const*, Py_ssize_t) {
  return guarded([] {
    const Torch& torch = torch_objects();
    return PyBool_FromLong(!called(torch.tracer).is_none() || number(called(torch.modes)) > 0 || are_transformed());
  });
}

PyMethodDef methods[] = {
    method("infer", infer,
           "What a module without our options returns for input, hx, where no gradients are recorded and nothing "
           "watches; None if that has to be looked at more closely. Further arguments: the dimensions that the input "
           "must have, the cell's number, num_layers (0: a cell), directions, bias, whether it is projected, "
           "batch_first, the parameters, a dict, and the lists of the weights' names and of the weights."),
    method(
        "in_place", in_place,
        "Whether every weight is the parameter of its name and a plain tensor: of a dict, a list of names and one of "
        "weights."),
    method("watched", watched,
           "Whether a tracer, a mode of the dispatcher, a functorch transform or a forward-mode derivative looks at "
           "torch's operations."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_plain(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace bindings
}  // namespace fused_rnn
