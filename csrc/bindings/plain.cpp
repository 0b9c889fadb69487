// A module's or cell's plain call, also with resets and lengths, from the caller's arguments to the results: what
// Python takes to find out that nothing stands in the way of the kernels is more than small layers compute. The answer
// is None to all other calls, at which fused_rnn/modules.py and cells.py then look more closely; nothing is refused
// here.
//
// What the module is, they know: they do not ask while a compiler looks, for a module with options of ours, with
// dropout, with another backend, with weights that are missing or with checks of a subclass, nor where the user's table
// has a say. Of bfloat16, fused_rnn/policy.py is asked. Where gradients are recorded, the call is a node of
// fused_rnn/autograd.py.
#include <algorithm>
#include <utility>

#include "../cells/cell_info.h"
#include "direct.h"
#include "module_call.h"

namespace fused_rnn {
namespace bindings {

namespace {

// Attributes and arguments, interned and never released.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* ndim = PyUnicode_InternFromString("ndim");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* cpu = PyUnicode_InternFromString("cpu");
  PyObject* mkldnn = PyUnicode_InternFromString("mkldnn");
  PyObject* fused = PyUnicode_InternFromString("fused");
  PyObject* switches[2] = {PyUnicode_InternFromString("rnn"), PyUnicode_InternFromString("matmul")};
};
const Names& interned() {
  static const Names all;
  return all;
}

// What is needed of fused_rnn's Python.
struct Ours {
  PyObject *node, *refused, *choose;
  Ours() {
    const auto autograd = py::module_::import("fused_rnn.autograd");
    node = kept(autograd.attr("stack"));
    refused = kept(autograd.attr("Refused"));
    choose = kept(py::module_::import("fused_rnn.policy").attr("choose"));
  }
};
const Ours& ours() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Ours> storage;
  return storage.call_once_and_store_result([] { return Ours(); }).get_stored();
}

int64_t number(py::handle object) { return object.cast<int64_t>(); }

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
    if (PyList_GET_SIZE(names) != count) return false;  // a name's hash may be a function of Python
    const auto name = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(names, i));
    if (!is_tensor(weight) || PyDict_GetItem(parameters, name.ptr()) != weight) return false;
  }
  return true;
}

// A tensor's sizes; none of a nested one. What fails is torch's own code: a signal would be handled in Python's alone.
py::tuple sizes_of(PyObject* tensor) {
  PyObject* const shape = PyObject_GetAttr(tensor, interned().shape);
  if (!shape) PyErr_Clear();
  return shape ? py::reinterpret_steal<py::tuple>(shape) : py::tuple();
}
// Not len(), which is a function of Python.
int64_t length(PyObject* tensor) {
  const py::tuple sizes = sizes_of(tensor);
  return sizes.empty() ? 0 : sizes[0].cast<int64_t>();
}

// The arguments of `in_one_call`: all layers of a module, or a cell, which has 0 layers. `weights` is a list or tuple;
// whether its elements, x and the states are tensors is to be asked first.
struct Layers {
  PyObject *x, *h0, *c0, *weights, *cell, *layers, *directions, *has_biases, *projected, *layout, *resets, *lengths;

  bool are_tensors() const {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(weights); ++i) {
      if (!is_tensor(PySequence_Fast_GET_ITEM(weights, i))) return false;
    }
    for (PyObject* const optional : {h0, c0, resets, lengths}) {
      if (optional != Py_None && !is_tensor(optional)) return false;
    }
    return PySequence_Fast_GET_SIZE(weights) > 1 && is_tensor(x);
  }

  // An operator reads what lies in an option's memory, and the node may have to ask the operators.
  bool has_negated_options() const {
    const auto negated = [](PyObject* option) {
      return option != Py_None && called(torch_objects().is_neg, option).ptr() != Py_False;
    };
    return negated(resets) || negated(lengths);
  }

  // Whether x has the kernels' own dtype, or one of 16 bits, which is converted.
  bool is_of_the_kernels() const {
    const py::object dtype = attribute(x, interned().dtype);
    const Torch& torch = torch_objects();
    for (PyObject* const known : {torch.float32, torch.float64, torch.bfloat16, torch.float16}) {
      if (dtype.ptr() == known) return true;
    }
    return false;
  }
  bool is_bfloat16() const { return attribute(x, interned().dtype).ptr() == torch_objects().bfloat16; }

  // T and B of x; zeros if it has other dimensions than its layout.
  std::pair<int64_t, int64_t> steps_and_rows() const {
    const auto of = static_cast<Layout>(number(layout));
    const bool has_both = of == Layout::kTimeFirst || of == Layout::kBatchFirst;
    const py::tuple sizes = sizes_of(x);
    if (sizes.size() != (has_both ? 3 : 2)) return {0, 0};
    const auto first = sizes[0].cast<int64_t>(), second = sizes[1].cast<int64_t>();
    if (of == Layout::kStep) return {1, first};
    if (of == Layout::kUnbatched) return {first, 1};
    return of == Layout::kBatchFirst ? std::pair(second, first) : std::pair(first, second);
  }

  // Whether fused_rnn/policy.py gives the kernels a call of bfloat16 that torch.nn knows, too. It cannot be asked for
  // the sizes that a tracer follows.
  bool are_chosen(bool records) const {
    const int64_t kind = number(cell), count = number(layers);
    const bool on_cpu = attribute(x, interned().is_cpu).ptr() == Py_True;
    if (kind < 0 || kind >= kCellCount || !on_cpu || !called(torch_objects().tracer).is_none()) return false;
    const auto [T, B] = steps_and_rows();
    const py::tuple w_ih = sizes_of(PySequence_Fast_GET_ITEM(weights, 0));
    const py::tuple w_hh = sizes_of(PySequence_Fast_GET_ITEM(weights, 1));
    if (T == 0 || w_ih.size() != 2 || w_hh.size() != 2) return false;
    const CellInfo& info = kCells[kind];
    const int64_t I = w_ih[1].cast<int64_t>(), H = w_hh[0].cast<int64_t>() / info.gates, P = w_hh[1].cast<int64_t>();
    const py::object choice = py::handle(ours().choose)(
        info.name, attribute(x, interned().dtype), T, B, I, H, py::arg("kind") = count == 0 ? "cell" : "sequence",
        py::arg("num_layers") = std::max<int64_t>(count, 1), py::arg("directions") = py::handle(directions),
        py::arg("proj_size") = projected == Py_True ? P : 0, py::arg("differentiable") = records);
    return attribute(choice.ptr(), interned().fused).ptr() == Py_True;
  }

  // Whether autograd records what is computed from x, the states and the first `count` weights.
  bool records(Py_ssize_t count) const {
    if (called(torch_objects().grad_enabled).ptr() != Py_True) return false;
    const auto recorded = [](PyObject* tensor) {
      return tensor != Py_None && attribute(tensor, interned().requires_grad).ptr() == Py_True;
    };
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (recorded(PySequence_Fast_GET_ITEM(weights, i))) return true;
    }
    return recorded(x) || recorded(h0) || recorded(c0);
  }
  bool records() const { return records(PySequence_Fast_GET_SIZE(weights)); }

  // Layers that share a node keep what backward reads until it has passed all of them. Large ones, to which a node's
  // time is nothing, therefore have nodes of their own. So have layers on top of frozen ones, which then keep nothing.
  bool share_a_node() const {
    const int64_t count = number(layers);
    if (count < 2) return true;
    constexpr double kSmall = 1 << 20;  // elements of a layer's gates, in all steps and directions
    double elements = static_cast<double>(number(directions));
    elements *= static_cast<double>(length(PySequence_Fast_GET_ITEM(weights, 0)));
    const py::tuple sizes = sizes_of(x);
    for (size_t i = 0; i + 1 < sizes.size(); ++i) elements *= sizes[i].cast<double>();
    return elements <= kSmall && records(PySequence_Fast_GET_SIZE(weights) / count);
  }

  // y, h_n, c_n and more, from one call; null if the layers have to be called in turn. `records` is records().
  py::object in_one_call(bool records) const {
    const Torch& torch = torch_objects();
    if (!is_of_the_kernels() || has_negated_options()) return {};
    if (steps_and_rows().first > 1 && attribute(x, interned().dtype).ptr() == torch.float32 && wants_other_products())
      return {};
    const py::object deterministic = called(torch.deterministic);
    if (!records) {
      PyObject* const arguments[] = {x,
                                     h0,
                                     c0,
                                     weights,
                                     cell,
                                     layers,
                                     directions,
                                     has_biases,
                                     projected,
                                     layout,
                                     resets,
                                     lengths,
                                     deterministic.ptr(),
                                     Py_False};
      return run(&stack, arguments, std::size(arguments), 0, 0);
    }
    // Determinism is an option, of which this node has resets and lengths alone.
    const bool on_cpu = attribute(x, interned().is_cpu).ptr() == Py_True;
    if (!on_cpu || deterministic.ptr() == Py_True || !share_a_node()) return {};
    const auto object = [](PyObject* each) { return py::handle(each); };
    const py::tuple call = py::make_tuple(object(cell), object(layers), object(directions), object(has_biases),
                                          object(projected), object(layout), object(resets), object(lengths));
    std::vector<PyObject*> arguments{call.ptr(), x, h0, c0};
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(weights); ++i) {
      arguments.push_back(PySequence_Fast_GET_ITEM(weights, i));
    }
    return called(ours().node, arguments.data(), arguments.size());
  }
};

// The arguments of `plain`: input and states as the caller gave them, the dimensions of a batch's input, and the
// module.
struct ModuleCall {
  PyObject *input, *hx, *dim, *cell, *layers, *directions, *has_biases, *projected, *batch_first;
  PyObject *parameters, *weight_names, *weights, *resets, *lengths;

  // None if it has other dimensions than the call takes. Lengths are those of a batch.
  std::optional<Layout> layout_of_input() const {
    const int64_t expected = number(dim), dimensions = number(attribute(input, interned().ndim));
    if (expected == 2) return dimensions == 2 ? std::optional(Layout::kStep) : std::nullopt;
    if (dimensions == 2 && lengths == Py_None) return Layout::kUnbatched;
    if (dimensions != 3) return std::nullopt;
    return batch_first == Py_True ? Layout::kBatchFirst : Layout::kTimeFirst;
  }

  // Null if it is no plain call. What may change while Python's functions run is held here.
  py::object results() const {
    const Torch& torch = torch_objects();
    if (!torch.from_handles || !is_tensor(input) || !PyList_Check(weights) || !PyBool_Check(batch_first) ||
        number(called(torch.function_modes)) > 0) {  // which would see that a tensor is asked for its dtype
      return {};
    }
    const auto given = py::reinterpret_steal<py::object>(PyList_AsTuple(weights));
    if (!are_in_place(parameters, weight_names, given.ptr())) return {};
    const std::optional<Layout> layout = layout_of_input();
    if (!layout) return {};
    const bool is_lstm = static_cast<CellKind>(number(cell)) == CellKind::kLstm, is_cell = number(layers) == 0;
    py::object h0 = py::reinterpret_borrow<py::object>(hx), c0 = py::none();
    if (is_lstm && hx != Py_None) {
      if (!(PyTuple_CheckExact(hx) || PyList_CheckExact(hx)) || PySequence_Fast_GET_SIZE(hx) != 2) return {};
      h0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx, 0));
      c0 = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(hx, 1));
      if (h0.is_none() || c0.is_none()) return {};
    }
    if (are_transformed() || called(torch.autocast, interned().cpu).ptr() != Py_False) return {};
    const py::int_ layout_number(static_cast<int64_t>(*layout));
    const Layers all{input,      h0.ptr(),   c0.ptr(),  given.ptr(),         cell,   layers,
                     directions, has_biases, projected, layout_number.ptr(), resets, lengths};
    if (!all.are_tensors()) return {};
    const bool records = all.records();
    if (records) {
      if (number(called(torch.modes)) > 0 || !called(torch.tracer).is_none()) return {};
      const int64_t dimensions = is_cell || *layout == Layout::kUnbatched ? 2 : 3;
      for (const py::object& state : {h0, c0}) {
        if (!state.is_none() && number(attribute(state.ptr(), interned().ndim)) != dimensions) return {};
      }
    }
    if (resets == Py_None && lengths == Py_None && all.is_bfloat16() && !all.are_chosen(records)) return {};
    const py::object found = all.in_one_call(records);
    if (!found) return {};
    const auto result = [&](Py_ssize_t i) { return py::handle(PyTuple_GET_ITEM(found.ptr(), i)); };
    const py::handle y = result(0);
    if (is_cell && !is_lstm) return py::reinterpret_borrow<py::object>(y);
    if (is_cell) return py::make_tuple(y, result(2));
    if (!is_lstm) return py::make_tuple(y, result(1));
    return py::make_tuple(y, py::make_tuple(result(1), result(2)));
  }
};

template <class Call>
constexpr Py_ssize_t kCount = sizeof(Call) / sizeof(PyObject*);

PyObject* plain(PyObject*, PyObject* const* a, Py_ssize_t count) {
  return guarded([&] {
    py::object results;
    if (count == kCount<ModuleCall>) {
      const ModuleCall call{a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]};
      try {
        results = call.results();
      } catch (const py::cast_error&) {  // of what should be a number
      } catch (const py::error_already_set& error) {
        if (!error.matches(ours().refused)) throw;
      }
    }
    return (results ? results : py::none()).release().ptr();
  });
}

PyObject* in_one_call(PyObject*, PyObject* const* a, Py_ssize_t count) {
  return guarded([&] {
    py::object results;
    if (count == kCount<Layers> && torch_objects().from_handles && (PyTuple_Check(a[3]) || PyList_Check(a[3]))) {
      const auto weights = py::reinterpret_steal<py::object>(PySequence_Tuple(a[3]));
      const Layers layers{a[0], a[1], a[2], weights.ptr(), a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]};
      try {
        if (layers.are_tensors()) results = layers.in_one_call(layers.records());
      } catch (const py::cast_error&) {
      }
    }
    return (results ? results : py::none()).release().ptr();
  });
}

PyObject* watched(PyObject*, PyObject* const*, Py_ssize_t) {
  return guarded([] {
    const Torch& torch = torch_objects();
    return PyBool_FromLong(!called(torch.tracer).is_none() || number(called(torch.modes)) > 0 || are_transformed());
  });
}

PyMethodDef methods[] = {
    method("plain", plain,
           "What a module without our options returns for input and hx where nothing watches; None if that has to be "
           "looked at more closely. Further arguments: the dimensions that the input must have, the cell's number, "
           "num_layers (0: a cell), directions, bias, whether it is projected, batch_first, the parameters (a dict), "
           "the lists of the weights' names and of the weights, resets and lengths."),
    method("in_one_call", in_one_call,
           "y, h_n, c_n and more of all layers; None if they have to be called in turn. Arguments: x, h0, c0, weights, "
           "the cell's number, layers (0: a cell), directions, whether there are biases and projections, layout, "
           "resets and lengths."),
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
