// The graph's nodes (fused_rnn/autograd.py): what they keep between forward and backward, and both passes of the node
// of all layers. That one is a torch.autograd.Function with C++ functions for methods, because Python takes longer for
// them than the kernels for a small layer.
//
// The passes ask Python where the layers have to be computed in turn and where a derivative is differentiated again.
#include <algorithm>
#include <string>
#include <vector>

#include "direct.h"

namespace fused_rnn {
namespace bindings {

namespace {

// Attributes of a node's context, interned and never released: torch's, and our own.
struct Names {
  PyObject* needs_input_grad = PyUnicode_InternFromString("needs_input_grad");
  PyObject* materialize_grads = PyUnicode_InternFromString("materialize_grads");
  PyObject* to_save = PyUnicode_InternFromString("to_save");
  PyObject* saved_tensors = PyUnicode_InternFromString("saved_tensors");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* call = PyUnicode_InternFromString("call");      // of the node of all layers, but resets and lengths
  PyObject* kept = PyUnicode_InternFromString("kept");      // how many of the saved tensors are forward's own
  PyObject* first = PyUnicode_InternFromString("first");    // where the arguments begin among the saved tensors
  PyObject* places = PyUnicode_InternFromString("places");  // of the saved arguments
  PyObject* aside = PyUnicode_InternFromString("aside");    // place, argument and its version, for each of the others
};
const Names& interned() {
  static const Names all;
  return all;
}

// What is needed of Python: the node's other ways, and what tells them.
struct Ours {
  PyObject *forward_in_turn, *backward_in_turn, *backward_again, *compilers_types, *is_batched;
  Ours() {
    const auto autograd = py::module_::import("fused_rnn.autograd");
    forward_in_turn = kept(autograd.attr("forward_in_turn"));
    backward_in_turn = kept(autograd.attr("backward_in_turn"));
    backward_again = kept(autograd.attr("backward_again"));
    compilers_types = kept(py::module_::import("fused_rnn.policy").attr("COMPILERS_TYPES"));
    is_batched = kept(py::module_::import("torch._C").attr("_functorch").attr("is_legacy_batchedtensor"));
  }
};
const Ours& ours() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Ours> storage;
  return storage.call_once_and_store_result([] { return Ours(); }).get_stored();
}

void set_attribute(PyObject* object, PyObject* name, const py::object& value) {
  if (PyObject_SetAttr(object, name, value.ptr()) != 0) throw py::error_already_set();
}
py::tuple tuple_attribute(PyObject* object, PyObject* name) {
  py::object value = attribute(object, name);
  FUSED_RNN_CHECK(PyTuple_Check(value.ptr()), "the context of a node is not its own");
  return py::reinterpret_steal<py::tuple>(value.release());
}
py::tuple slice(const py::object& tuple, Py_ssize_t begin, Py_ssize_t end) {
  PyObject* const part = PyTuple_GetSlice(tuple.ptr(), begin, end);
  if (!part) throw py::error_already_set();
  return py::reinterpret_steal<py::tuple>(part);
}
PyObject* at(const py::tuple& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }
py::tuple from(PyObject* const* objects, Py_ssize_t count) {
  py::tuple all(count);
  for (Py_ssize_t i = 0; i < count; ++i) all[i] = py::handle(objects[i]);
  return all;
}

void append(std::vector<PyObject*>& objects, const py::tuple& more) {
  for (py::handle object : more) objects.push_back(object.ptr());
}

// None: of None, and of a tensor made in inference mode, which has no version.
py::object version_of(PyObject* tensor) {
  if (tensor == Py_None) return py::none();
  PyObject* const version = PyObject_GetAttr(tensor, interned().version);
  if (version) return py::reinterpret_steal<py::object>(version);
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
  PyErr_Clear();
  return py::none();
}

// The weights of a node, as `stack` takes them.
struct WeightsOfNode {
  int64_t layers, directions;
  bool has_biases, projected;
  Py_ssize_t each() const { return 2 + 2 * has_biases + projected; }
};

// Which of x, h0, c0, the weights and further options the first derivative reads.
std::vector<bool> that_derivatives_read(const std::vector<bool>& needs, const WeightsOfNode& weights) {
  std::vector<bool> reads(needs.size(), true);
  const Py_ssize_t each = weights.each(), of_layer = weights.directions * each, count = weights.layers * of_layer;
  FUSED_RNN_CHECK(count >= of_layer && static_cast<Py_ssize_t>(needs.size()) >= 3 + count, "weights are missing");
  // x and the first w_ih meet in one product: each is read for the other's gradient, and both for that of norm_ih, the
  // last of the options. The initial states and those of resets are guarded as torch.nn guards its own.
  const bool has_norm_ih = static_cast<Py_ssize_t>(needs.size()) > 3 + count && needs.back();
  reads[0] = has_norm_ih;
  for (Py_ssize_t w_ih = 3; w_ih < 3 + count; w_ih += each) {
    if (weights.has_biases) reads[w_ih + 2] = reads[w_ih + 3] = false;
    if (w_ih >= 3 + of_layer) continue;
    reads[w_ih] = needs[0] || has_norm_ih;
    if (needs[w_ih]) reads[0] = true;
  }
  return reads;
}

// Keeps for backward `first_saved`, of which `kept_count` are forward's own and the others constants, and `tensors`,
// the arguments that may need a gradient.
//
// A tensor that the first derivative reads is saved for it, which guards it against writing in place. One that only a
// second derivative reads is kept aside with its version, so that writing to it stays allowed until then. `weights`:
// null if the first derivative reads them all.
void save(PyObject* ctx, const py::tuple& first_saved, Py_ssize_t kept_count, PyObject* const* tensors,
          Py_ssize_t count, const WeightsOfNode* weights) {
  const py::tuple all_needs = tuple_attribute(ctx, interned().needs_input_grad);
  const Py_ssize_t others = static_cast<Py_ssize_t>(all_needs.size()) - count;  // arguments that are no tensors
  FUSED_RNN_CHECK(others >= 0, "the context of a node is not its own");
  std::vector<bool> needs(count), reads(count, true);
  for (Py_ssize_t i = 0; i < count; ++i) needs[i] = at(all_needs, others + i) == Py_True;
  if (weights) reads = that_derivatives_read(needs, *weights);
  const Py_ssize_t first = static_cast<Py_ssize_t>(first_saved.size());
  const Py_ssize_t read = std::count(reads.begin(), reads.end(), true);
  py::tuple to_save(first + read), places(read), aside(3 * (count - read));
  for (Py_ssize_t i = 0; i < first; ++i) to_save[i] = py::handle(at(first_saved, i));
  for (Py_ssize_t i = 0, saved = 0, kept_aside = 0; i < count; ++i) {
    py::int_ place(i);
    if (reads[i]) {
      to_save[first + saved] = py::handle(tensors[i]);
      places[saved++] = std::move(place);
    } else {
      aside[kept_aside++] = std::move(place);
      aside[kept_aside++] = py::handle(tensors[i]);
      aside[kept_aside++] = version_of(tensors[i]);
    }
  }
  set_attribute(ctx, interned().materialize_grads, py::bool_(false));
  set_attribute(ctx, interned().to_save, to_save);
  set_attribute(ctx, interned().places, places);
  set_attribute(ctx, interned().aside, aside);
  set_attribute(ctx, interned().kept, py::int_(kept_count));
  set_attribute(ctx, interned().first, py::int_(first));
}

struct Saved {
  py::tuple kept, constants;
  py::list tensors;
};

// `again`: for a second derivative. A context gives its tensors out once: a checkpoint computes them for it.
Saved saved_of(PyObject* ctx, bool again) {
  const py::tuple all = tuple_attribute(ctx, interned().saved_tensors);
  const py::tuple places = tuple_attribute(ctx, interned().places), aside = tuple_attribute(ctx, interned().aside);
  const auto kept_count = attribute(ctx, interned().kept).cast<Py_ssize_t>();
  const auto first = attribute(ctx, interned().first).cast<Py_ssize_t>();
  const Py_ssize_t read = static_cast<Py_ssize_t>(places.size()), others = static_cast<Py_ssize_t>(aside.size()) / 3;
  FUSED_RNN_CHECK(static_cast<Py_ssize_t>(all.size()) == first + read && kept_count <= first,
                  "the context of a node is not its own");
  py::list tensors(read + others);
  const auto put = [&](PyObject* place, PyObject* tensor) {
    const auto i = py::handle(place).cast<size_t>();
    const bool is_free = i < tensors.size() && !PyList_GET_ITEM(tensors.ptr(), i);  // so that none is left out
    FUSED_RNN_CHECK(is_free, "the context of a node is not its own");
    tensors[i] = py::handle(tensor);
  };
  for (Py_ssize_t i = 0; i < read; ++i) put(at(places, i), at(all, first + i));
  for (Py_ssize_t i = 0; i < 3 * others; i += 3) {
    PyObject *const tensor = at(aside, i + 1), *const version = at(aside, i + 2);
    if (again && version != Py_None) {
      const py::object now = attribute(tensor, interned().version);
      if (!now.equal(py::handle(version))) {
        throw std::runtime_error(
            "one of the variables needed for the second derivative has been modified by an inplace operation: it is "
            "at version " +
            std::string(py::str(now)) + "; expected version " + std::string(py::str(version)) + " instead");
      }
    }
    put(at(aside, i), tensor);
  }
  return {slice(all, 0, kept_count), slice(all, kept_count, first), std::move(tensors)};
}

// Whether backward is to be differentiated, or transformed: a gradient under vmap or with a tangent, which torch's own
// operations know how to take. is_grads_batched=True is a vmap of its own, which runs an operator row by row unless the
// operator has a list of tensors among its arguments: then, with `or_batched`, it counts, too.
bool is_again(PyObject* const* grads, Py_ssize_t count, bool or_batched) {
  if (called(torch_objects().grad_enabled).ptr() == Py_True || are_transformed()) return true;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (grads[i] == Py_None) continue;
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(grads[i]));
    if (!is_tensor(grads[i]) && PySequence_Contains(ours().compilers_types, type) != 1) return true;
    if (or_batched && called(ours().is_batched, grads[i]).ptr() == Py_True) return true;
  }
  return false;
}

// The arguments of the node of all layers: x, h0, c0 and the weights, after `call`: the cell's number, layers,
// directions, has_biases, projected, layout, resets, lengths (cpu_operators.h), one object because each takes its time.
enum Call : Py_ssize_t { kCell, kLayers, kDirections, kHasBiases, kProjected, kLayout, kResets, kLengths, kCalls };

py::object forward_of_all(PyObject* ctx, PyObject* given, PyObject* const* tensors, Py_ssize_t count) {
  FUSED_RNN_CHECK(count > 4 && PyTuple_Check(given) && PyTuple_GET_SIZE(given) == kCalls,
                  "expected a node's arguments");
  const auto call = py::reinterpret_borrow<py::tuple>(given);
  const py::tuple weights = from(tensors + 3, count - 3);
  std::vector<PyObject*> arguments{tensors[0], tensors[1], tensors[2], weights.ptr()};
  append(arguments, call);
  const size_t in_turn = arguments.size();
  arguments.insert(arguments.end(), {Py_False, Py_True});  // deterministic, train
  py::object results = run(&stack, arguments.data(), arguments.size(), 0, 0);
  if (!results) results = called(ours().forward_in_turn, arguments.data(), in_turn);
  const py::tuple found = results;  // y, h_n, c_n, between, reserve
  FUSED_RNN_CHECK(found.size() == 5, "forward must have 5 results, got ", found.size());
  PyObject *const resets = at(call, kResets), *const lengths = at(call, kLengths);
  const bool has_constants = resets != Py_None || lengths != Py_None;
  PyObject* const first_saved[] = {at(found, 3), at(found, 4), resets, lengths};
  const auto number = [&](Call which) { return py::handle(at(call, which)).cast<int64_t>(); };
  const WeightsOfNode of_node{std::max<int64_t>(number(kLayers), 1), number(kDirections),
                              at(call, kHasBiases) == Py_True, at(call, kProjected) == Py_True};
  save(ctx, from(first_saved, has_constants ? 4 : 2), 2, tensors, count, &of_node);
  set_attribute(ctx, interned().call, slice(call, 0, kResets));
  return slice(found, 0, 3);
}

py::object backward_of_all(PyObject* ctx, PyObject* const* grads) {
  const py::tuple call = tuple_attribute(ctx, interned().call);
  const py::tuple all_needs = tuple_attribute(ctx, interned().needs_input_grad);
  FUSED_RNN_CHECK(call.size() == kResets && all_needs.size() > 5, "the context of a node is not its own");
  const py::tuple needs = slice(all_needs, 1, static_cast<Py_ssize_t>(all_needs.size()));
  const bool is_cell = py::handle(at(call, kLayers)).cast<int64_t>() == 0;
  const bool has_constants = attribute(ctx, interned().first).cast<Py_ssize_t>() > 2;
  // Of a cell, batched gradients take less time through the specification than row by row; options are a list.
  const bool again = is_again(grads, 3, is_cell || has_constants);
  const Saved saved = saved_of(ctx, again);
  FUSED_RNN_CHECK(saved.tensors.size() == needs.size() && saved.kept.size() == 2 && saved.constants.size() != 1,
                  "the context of a node is not its own");
  PyObject* const resets = has_constants ? at(saved.constants, 0) : Py_None;
  PyObject* const lengths = has_constants ? at(saved.constants, 1) : Py_None;
  py::object found;
  if (again) {
    const py::tuple all_grads = from(grads, 3);
    PyObject* const arguments[] = {call.ptr(), resets, lengths, saved.tensors.ptr(), needs.ptr(), all_grads.ptr()};
    found = called(ours().backward_again, arguments, std::size(arguments));
  } else {
    const auto weights = py::reinterpret_steal<py::object>(PyList_GetSlice(saved.tensors.ptr(), 3, PY_SSIZE_T_MAX));
    std::vector<PyObject*> arguments(grads, grads + 3);
    PyObject* const x = PyList_GET_ITEM(saved.tensors.ptr(), 0);
    arguments.insert(arguments.end(), {x, at(saved.kept, 0), at(saved.kept, 1), weights.ptr()});
    append(arguments, call);
    arguments.insert(arguments.end(), {resets, lengths, needs.ptr()});
    found = run(&stack_backward, arguments.data(), arguments.size(), 3, 0);
    if (!found) found = called(ours().backward_in_turn, arguments.data(), arguments.size());
  }
  const auto gradients = py::reinterpret_steal<py::object>(PySequence_Tuple(found.ptr()));
  if (!gradients) throw py::error_already_set();
  py::tuple of_arguments(PyTuple_GET_SIZE(gradients.ptr()) + 1);
  of_arguments[0] = py::none();  // of `call`
  for (size_t i = 1; i < of_arguments.size(); ++i)
    of_arguments[i] = py::handle(PyTuple_GET_ITEM(gradients.ptr(), i - 1));
  return std::move(of_arguments);
}

PyObject* wrong_count(const char* name, Py_ssize_t expected) {
  return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments", name, expected);
}

PyObject* node_forward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count < 2) return wrong_count("node_forward", 2);
  return guarded([&] { return forward_of_all(a[0], a[1], a + 2, count - 2).release().ptr(); });
}

PyObject* node_backward(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 4) return wrong_count("node_backward", 4);
  return guarded([&] { return backward_of_all(a[0], a + 1).release().ptr(); });
}

PyObject* node_save(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 6) return wrong_count("node_save", 6);
  return guarded([&] {
    const py::tuple kept_tensors = py::reinterpret_borrow<py::object>(a[1]);
    const py::tuple constants = py::reinterpret_borrow<py::object>(a[2]),
                    tensors = py::reinterpret_borrow<py::object>(a[3]);
    const py::tuple first_saved =
        py::reinterpret_steal<py::tuple>(PySequence_Concat(kept_tensors.ptr(), constants.ptr()));
    const WeightsOfNode weights{1, py::handle(a[4]).cast<int64_t>(), true, true};
    save(a[0], first_saved, static_cast<Py_ssize_t>(kept_tensors.size()), &PyTuple_GET_ITEM(tensors.ptr(), 0),
         static_cast<Py_ssize_t>(tensors.size()), a[5] == Py_True ? nullptr : &weights);
    return py::none().release().ptr();
  });
}

PyObject* node_saved(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 2) return wrong_count("node_saved", 2);
  return guarded([&] {
    const Saved saved = saved_of(a[0], a[1] == Py_True);
    return py::make_tuple(saved.kept, saved.constants, saved.tensors).release().ptr();
  });
}

PyObject* node_is_again(PyObject*, PyObject* const* a, Py_ssize_t count) {
  if (count != 2) return wrong_count("node_is_again", 2);
  return guarded([&] {
    const py::tuple grads = py::reinterpret_borrow<py::object>(a[0]);
    return PyBool_FromLong(
        is_again(&PyTuple_GET_ITEM(grads.ptr(), 0), static_cast<Py_ssize_t>(grads.size()), a[1] == Py_True));
  });
}

PyMethodDef methods[] = {
    method("node_forward", node_forward,
           "Forward of the node of all layers: ctx, call, x, h0, c0 and all weights -> y, h_n, c_n."),
    method("node_backward", node_backward,
           "Backward of the node of all layers: ctx and the gradients of y, h_n, c_n -> those of forward's arguments."),
    method(
        "node_save", node_save,
        "Keeps for backward: ctx, what forward kept, constants, x, h0, c0, five weights of each direction and further "
        "options, directions, whether the first derivative reads them all."),
    method("node_saved", node_saved,
           "What node_save kept: ctx, whether for a second derivative -> what forward kept, constants, tensors."),
    method(
        "node_is_again", node_is_again,
        "Whether backward is to be differentiated or transformed: its gradients, whether legacy batched ones count."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_node(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace bindings
}  // namespace fused_rnn
