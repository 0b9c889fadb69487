// The graph's nodes (fused_rnn/autograd.py): what they keep between forward and backward, and both passes of the node
// of all layers, because Python takes longer for them than the kernels for a small layer.
//
// The passes ask Python where the layers have to be computed in turn and where a derivative is differentiated again.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "direct.h"
#include "module_call.h"

namespace fused_rnn {
namespace bindings {

namespace {

// Attributes of tensors and of a node's context, interned and never released: torch's, and our own.
struct Names {
  PyObject* needs_input_grad = PyUnicode_InternFromString("needs_input_grad");
  PyObject* materialize_grads = PyUnicode_InternFromString("materialize_grads");
  PyObject* to_save = PyUnicode_InternFromString("to_save");
  PyObject* saved_tensors = PyUnicode_InternFromString("saved_tensors");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* is_inference = PyUnicode_InternFromString("is_inference");
  PyObject* call = PyUnicode_InternFromString("call");            // the node's Call without resets and lengths
  PyObject* kept = PyUnicode_InternFromString("kept");            // how many of the saved tensors forward made
  PyObject* constants = PyUnicode_InternFromString("constants");  // how many follow that are no arguments
  PyObject* is_saved = PyUnicode_InternFromString("is_saved");    // for each argument
  PyObject* aside = PyUnicode_InternFromString("aside");          // the other arguments, None for those that are saved
  PyObject* versions = PyUnicode_InternFromString("versions");    // of those kept aside
};
const Names& interned() {
  static const Names all;
  return all;
}

// What is needed of Python: the node's other ways, and what tells them.
struct Ours {
  PyObject *forward_in_turn, *backward_in_turn, *backward_again, *compilers_types, *is_batched, *keeps_graph;
  Ours() {
    const auto autograd = py::module_::import("fused_rnn.autograd"), c = py::module_::import("torch._C");
    forward_in_turn = kept(autograd.attr("forward_in_turn"));
    backward_in_turn = kept(autograd.attr("backward_in_turn"));
    backward_again = kept(autograd.attr("backward_again"));
    compilers_types = kept(py::tuple(py::module_::import("fused_rnn.policy").attr("COMPILERS_TYPES")));
    is_batched = kept(c.attr("_functorch").attr("is_legacy_batchedtensor"));
    keeps_graph = kept(c.attr("_autograd").attr("_get_current_graph_task_keep_graph"));
  }
};
const Ours& ours() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Ours> storage;
  return storage.call_once_and_store_result([] { return Ours(); }).get_stored();
}

// Of a context: whoever has the graph can write to its attributes.
void require_own(bool condition) { FUSED_RNN_CHECK(condition, "the context of a node is not its own"); }

void set_attribute(PyObject* object, PyObject* name, const py::object& value) {
  if (PyObject_SetAttr(object, name, value.ptr()) != 0) throw py::error_already_set();
}
py::tuple tuple_attribute(PyObject* object, PyObject* name) {
  py::object value = attribute(object, name);
  require_own(PyTuple_Check(value.ptr()));
  return py::reinterpret_steal<py::tuple>(value.release());
}
Py_ssize_t count_attribute(PyObject* object, PyObject* name) {
  const auto count = attribute(object, name).cast<int64_t>();
  require_own(count >= 0 && count <= std::numeric_limits<int32_t>::max());
  return count;
}

Py_ssize_t count_of(const py::tuple& tuple) { return PyTuple_GET_SIZE(tuple.ptr()); }
PyObject* at(const py::tuple& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }
py::tuple slice(const py::tuple& tuple, Py_ssize_t begin, Py_ssize_t end) {
  PyObject* const part = PyTuple_GetSlice(tuple.ptr(), begin, end);
  if (!part) throw py::error_already_set();
  return py::reinterpret_steal<py::tuple>(part);
}
py::tuple tuple_of(PyObject* const* objects, Py_ssize_t count) {
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
  const py::error_already_set error;
  PyObject* const inference = PyObject_VectorcallMethod(interned().is_inference, &tensor, 1, nullptr);
  if (!inference) throw py::error_already_set();
  if (py::reinterpret_steal<py::object>(inference).ptr() != Py_True) throw error;
  return py::none();
}

// The weights of a node, as `stack` takes them.
struct WeightsOfNode {
  int64_t layers, directions;
  bool has_biases, projected;
  Py_ssize_t each() const { return 2 + 2 * has_biases + projected; }
};

// Which of x, h0, c0, the weights and further options the first derivative reads.
std::vector<bool> read_by_first_derivative(const std::vector<bool>& needs, const WeightsOfNode& weights) {
  const Py_ssize_t all = static_cast<Py_ssize_t>(needs.size()), each = weights.each();
  FUSED_RNN_CHECK(weights.layers > 0 && weights.layers <= all && weights.directions > 0 && weights.directions <= all,
                  "expected 1 or 2 directions of at least one layer");
  const Py_ssize_t of_layer = weights.directions * each, count = weights.layers * of_layer;
  FUSED_RNN_CHECK(all >= 3 + count, "weights are missing");
  std::vector<bool> reads(all, true);
  // x and the first w_ih meet in one product: each is read for the other's gradient, and both for that of norm_ih, the
  // last of the options. The initial states and those of resets are guarded as torch.nn guards its own.
  const bool has_norm_ih = all > 3 + count && needs.back();
  reads[0] = has_norm_ih;
  for (Py_ssize_t w_ih = 3; w_ih < 3 + count; w_ih += each) {
    if (weights.has_biases) reads[w_ih + 2] = reads[w_ih + 3] = false;
    if (w_ih >= 3 + of_layer) continue;
    reads[w_ih] = needs[0] || has_norm_ih;
    if (needs[w_ih]) reads[0] = true;
  }
  return reads;
}

// Keeps for backward what forward made, constants, and `tensors`, the arguments that may need a gradient.
//
// A tensor that the first derivative reads is saved for it, which guards it against writing in place. One that only a
// second derivative reads is kept aside with its version, so that writing to it stays allowed until then. `weights`:
// null if the first derivative reads them all.
void save(PyObject* ctx, const py::tuple& kept, const py::tuple& constants, PyObject* const* tensors, Py_ssize_t count,
          const WeightsOfNode* weights) {
  const py::tuple all_needs = tuple_attribute(ctx, interned().needs_input_grad);
  const Py_ssize_t others = count_of(all_needs) - count;  // arguments that are no tensors
  require_own(others >= 0);
  std::vector<bool> needs(count), reads(count, true);
  for (Py_ssize_t i = 0; i < count; ++i) needs[i] = at(all_needs, others + i) == Py_True;
  if (weights) reads = read_by_first_derivative(needs, *weights);
  std::vector<PyObject*> to_save;
  append(to_save, kept);
  append(to_save, constants);
  py::tuple is_saved(count), aside(count), versions(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (reads[i]) to_save.push_back(tensors[i]);
    is_saved[i] = py::bool_(reads[i]);
    aside[i] = reads[i] ? py::handle(Py_None) : py::handle(tensors[i]);
    versions[i] = reads[i] ? py::none() : version_of(tensors[i]);
  }
  set_attribute(ctx, interned().materialize_grads, py::bool_(false));
  set_attribute(ctx, interned().to_save, tuple_of(to_save.data(), static_cast<Py_ssize_t>(to_save.size())));
  set_attribute(ctx, interned().kept, py::int_(count_of(kept)));
  set_attribute(ctx, interned().constants, py::int_(count_of(constants)));
  set_attribute(ctx, interned().is_saved, is_saved);
  set_attribute(ctx, interned().aside, aside);
  set_attribute(ctx, interned().versions, versions);
}

struct Saved {
  py::tuple kept, constants, tensors;
};

// `again`: for a second derivative. A context gives its tensors out once: a checkpoint computes them for it.
Saved saved_of(PyObject* ctx, bool again) {
  const py::tuple all = tuple_attribute(ctx, interned().saved_tensors);
  const py::tuple is_saved = tuple_attribute(ctx, interned().is_saved);
  const py::tuple aside = tuple_attribute(ctx, interned().aside), versions = tuple_attribute(ctx, interned().versions);
  const Py_ssize_t kept = count_attribute(ctx, interned().kept), count = count_of(is_saved);
  Py_ssize_t next = kept + count_attribute(ctx, interned().constants);
  require_own(next <= count_of(all) && count_of(aside) == count && count_of(versions) == count);
  Saved saved{slice(all, 0, kept), slice(all, kept, next), py::tuple(count)};
  for (Py_ssize_t i = 0; i < count; ++i) {
    const bool is_aside = at(is_saved, i) != Py_True;
    require_own(is_aside || next < count_of(all));
    PyObject* const tensor = is_aside ? at(aside, i) : at(all, next++);
    if (again && is_aside && at(versions, i) != Py_None) {
      const auto expected = py::handle(at(versions, i)).cast<int64_t>();
      const auto version = attribute(tensor, interned().version).cast<int64_t>();
      if (version != expected) {
        throw std::runtime_error(
            "one of the variables needed for the second derivative has been modified by an inplace operation: it is "
            "at version " +
            std::to_string(version) + "; expected version " + std::to_string(expected) + " instead");
      }
    }
    saved.tensors[i] = py::handle(tensor);
  }
  // As what is saved is released: an argument that was written to in place may hold this node.
  if (called(ours().keeps_graph).ptr() != Py_True) set_attribute(ctx, interned().aside, py::tuple());
  return saved;
}

// Whether backward is to be differentiated, or transformed: a gradient under vmap or with a tangent, which torch's own
// operations know how to take. is_grads_batched=True is a vmap of its own, which runs an operator row by row unless the
// operator has a list of tensors among its arguments: then, with `or_batched`, it counts, too.
bool is_again(PyObject* const* grads, Py_ssize_t count, bool or_batched) {
  if (called(torch_objects().grad_enabled).ptr() == Py_True || are_transformed()) return true;
  const auto is_known = [](PyObject* type) {
    PyObject* const types = ours().compilers_types;
    PyObject* const* const first = &PyTuple_GET_ITEM(types, 0);
    return std::find(first, first + PyTuple_GET_SIZE(types), type) != first + PyTuple_GET_SIZE(types);
  };
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (grads[i] == Py_None) continue;
    if (!is_known(reinterpret_cast<PyObject*>(Py_TYPE(grads[i])))) return true;
    if (or_batched && called(ours().is_batched, grads[i]).ptr() == Py_True) return true;
  }
  return false;
}

py::object forward_of_all(PyObject* ctx, PyObject* given, PyObject* const* tensors, Py_ssize_t count) {
  FUSED_RNN_CHECK(count > 4 && PyTuple_Check(given) && PyTuple_GET_SIZE(given) == kCallParts,
                  "expected a node's arguments");
  const auto call = py::reinterpret_borrow<py::tuple>(given);
  const py::tuple weights = tuple_of(tensors + 3, count - 3);
  std::vector<PyObject*> arguments{tensors[0], tensors[1], tensors[2], weights.ptr()};
  append(arguments, call);
  const size_t in_turn = arguments.size();
  arguments.insert(arguments.end(), {Py_False, Py_True});  // deterministic, train
  py::object results = run(&stack, arguments.data(), arguments.size(), 0, 0);
  if (!results) results = called(ours().forward_in_turn, arguments.data(), in_turn);
  const py::tuple found = results;  // y, h_n, c_n, and what is kept: between, reserve
  FUSED_RNN_CHECK(found.size() == 5, "forward must have 5 results, got ", found.size());
  const bool has_constants = at(call, kResets) != Py_None || at(call, kLengths) != Py_None;
  const auto number = [&](Py_ssize_t part) { return py::handle(at(call, part)).cast<int64_t>(); };
  const WeightsOfNode of_node{std::max<int64_t>(number(kLayers), 1), number(kDirections),
                              at(call, kHasBiases) == Py_True, at(call, kProjected) == Py_True};
  save(ctx, slice(found, 3, 5), slice(call, kResets, has_constants ? kCallParts : kResets), tensors, count, &of_node);
  set_attribute(ctx, interned().call, slice(call, 0, kResets));
  return slice(found, 0, 3);
}

py::object backward_of_all(PyObject* ctx, PyObject* const* grads) {
  const py::tuple call = tuple_attribute(ctx, interned().call);
  const py::tuple all_needs = tuple_attribute(ctx, interned().needs_input_grad);
  require_own(count_of(call) == kResets && count_of(all_needs) > 5);
  const py::tuple needs = slice(all_needs, 1, count_of(all_needs));
  // Of a cell, batched gradients take less time through the specification than row by row; options are a list.
  const bool is_cell = py::handle(at(call, kLayers)).cast<int64_t>() == 0;
  const bool again = is_again(grads, 3, is_cell || count_attribute(ctx, interned().constants) > 0);
  const Saved saved = saved_of(ctx, again);
  const Py_ssize_t constants = count_of(saved.constants);
  require_own(count_of(saved.tensors) == count_of(needs) && count_of(saved.kept) == 2);
  require_own(constants == 0 || constants == 2);
  PyObject* const resets = constants > 0 ? at(saved.constants, 0) : Py_None;
  PyObject* const lengths = constants > 0 ? at(saved.constants, 1) : Py_None;
  py::object found;
  if (again) {
    const py::tuple all_grads = tuple_of(grads, 3);
    PyObject* const arguments[] = {call.ptr(), resets, lengths, saved.tensors.ptr(), needs.ptr(), all_grads.ptr()};
    found = called(ours().backward_again, arguments, std::size(arguments));
  } else {
    const py::tuple weights = slice(saved.tensors, 3, count_of(saved.tensors));
    std::vector<PyObject*> arguments(grads, grads + 3);
    arguments.insert(arguments.end(), {at(saved.tensors, 0), at(saved.kept, 0), at(saved.kept, 1), weights.ptr()});
    append(arguments, call);
    arguments.insert(arguments.end(), {resets, lengths, needs.ptr()});
    found = run(&stack_backward, arguments.data(), arguments.size(), 3, 0);
    if (!found) found = called(ours().backward_in_turn, arguments.data(), arguments.size());
  }
  const py::tuple gradients = found;             // a list, of Python's ways
  std::vector<PyObject*> of_arguments{Py_None};  // of the call
  append(of_arguments, gradients);
  return tuple_of(of_arguments.data(), static_cast<Py_ssize_t>(of_arguments.size()));
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
    const auto given = [&](Py_ssize_t i) -> py::tuple { return py::reinterpret_borrow<py::object>(a[i]); };
    const py::tuple kept = given(1), constants = given(2), tensors = given(3);
    const WeightsOfNode weights{1, py::handle(a[4]).cast<int64_t>(), true, true};  // absent ones have a place, too
    const bool reads_all = a[5] == Py_True;
    save(a[0], kept, constants, &PyTuple_GET_ITEM(tensors.ptr(), 0), count_of(tensors), reads_all ? nullptr : &weights);
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
    return PyBool_FromLong(is_again(&PyTuple_GET_ITEM(grads.ptr(), 0), count_of(grads), a[1] == Py_True));
  });
}

PyMethodDef methods[] = {
    method("node_forward", node_forward,
           "Forward of the node of all layers: ctx, call, x, h0, c0 and all weights -> y, h_n, c_n."),
    method("node_backward", node_backward,
           "Backward of the node of all layers: ctx and the gradients of y, h_n, c_n -> those of forward's arguments."),
    method(
        "node_save", node_save,
        "Keeps for backward: ctx, what forward made, constants, x, h0, c0, five weights of each direction and further "
        "options, directions, whether the first derivative reads them all."),
    method("node_saved", node_saved,
           "What node_save kept: ctx, whether for a second derivative -> what forward made, constants, arguments."),
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
