// fused_rnn._C.Stream: a stream's step from Python, where what a call costs counts as much as what it computes.
//
// A tensor is read through the C functions that its class offers for DLPack, an array through Python's buffers: both
// tell where the numbers lie in some tens of nanoseconds, and take no part of torch's or numpy's own interface.
#include "../cpu/stream.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>
#include <string>

#include "check.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fused_rnn {
namespace bindings {

namespace {

// The exchange functions of torch.Tensor.
struct TensorClass {
  PyTypeObject* type;
  const dlpack::ExchangeApi* api;

  TensorClass() {
    const py::object cls = py::module_::import("torch").attr("Tensor");
    type = reinterpret_cast<PyTypeObject*>(cls.ptr());  // which lives as long as the process
    const py::object capsule = cls.attr("__dlpack_c_exchange_api__");
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->major != dlpack::kMajor || !api->tensor_from_object) fail("torch has another version of DLPack");
  }
};

// Where the float32 numbers of a tensor or an array lie, as long as this object lives.
class Numbers {
 public:
  float* data = nullptr;
  int64_t sizes[4] = {};
  int dim = 0;

  Numbers(py::handle from, const char* name, bool written) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TensorClass> storage;
    const TensorClass& tensor = storage.call_once_and_store_result([] { return TensorClass(); }).get_stored();
    if (PyObject_TypeCheck(from.ptr(), tensor.type)) {
      of_tensor(*tensor.api, from, name);
    } else {
      of_buffer(from, name, written);
    }
  }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  std::string shape() const { return shape_text(std::vector<int64_t>(sizes, sizes + dim)); }

 private:
  void of_tensor(const dlpack::ExchangeApi& api, py::handle from, const char* name) {
    dlpack::Tensor t;
    if (api.tensor_from_object(from.ptr(), &t) != 0) {
      PyErr_Clear();
      fail(name, " must be a float32 tensor on the CPU");
    }
    FUSED_RNN_CHECK(t.device_type == dlpack::kCpu, name, " must be on the CPU");
    FUSED_RNN_CHECK(t.code == dlpack::kFloat && t.bits == 32 && t.lanes == 1, name, " must be float32");
    take(t.ndim, t.shape, name);
    int64_t stride = 1;
    for (int i = dim; i-- > 0;) {
      FUSED_RNN_CHECK(!t.strides || sizes[i] == 1 || t.strides[i] == stride, name, " must be contiguous");
      stride *= sizes[i];
    }
    FUSED_RNN_CHECK(t.data || count() == 0, name, " has no storage");
    // DLPack does not tell of tensors that are the negatives of what lies in memory, imaginary parts of conjugates.
    // With more than one number they are not contiguous.
    FUSED_RNN_CHECK(count() != 1 || !py::cast<bool>(from.attr("is_neg")()), name,
                    " must not be a negated view: call resolve_neg()");
    data = reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
  }
  void of_buffer(py::handle from, const char* name, bool written) {
    const int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (written ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(from.ptr(), &buffer_, flags) != 0) {
      PyErr_Clear();
      fail(name, " must be a float32 tensor or a contiguous float32 array", written ? " that may be written to" : "",
           ", got ", Py_TYPE(from.ptr())->tp_name);
    }
    FUSED_RNN_CHECK(buffer_.format && std::strcmp(buffer_.format, "f") == 0, name, " must be float32");
    take(buffer_.ndim, buffer_.shape, name);
    data = static_cast<float*>(buffer_.buf);
  }
  template <class Size>
  void take(int ndim, const Size* shape, const char* name) {
    FUSED_RNN_CHECK(ndim <= 4, name, " must have at most 4 dimensions, got ", ndim);
    dim = ndim;
    for (int i = 0; i < dim; ++i) sizes[i] = shape[i];
  }

  struct Buffer : Py_buffer {
    Buffer() : Py_buffer{} {}
    ~Buffer() {
      if (obj) PyBuffer_Release(this);
    }
  };
  Buffer buffer_;
};

std::shared_ptr<const cpu::FrozenModel> shared(const py::buffer& model) {
  const py::buffer_info bytes = model.request();
  return cpu::frozen_model(bytes.ptr, bytes.size * bytes.itemsize);
}

class Stream {
 public:
  Stream(const py::buffer& model, int64_t batch, int64_t threads) : stream_(shared(model), batch, threads) {}

  // One step, or with `chunk` several: writes to `out` what comes of x.
  void run(py::handle x, py::handle out, bool chunk) {
    const Numbers in(x, "x", false), y(out, "out", true);
    const cpu::FrozenModel& m = stream_.model();
    const int64_t steps = check(in, "x", chunk, chunk ? in.sizes[0] : 1, m.input_size);
    check(y, "out", chunk, steps, m.state_size);
    FUSED_RNN_CHECK(y.dim == in.dim, "out must have as many dimensions as x, ", in.dim, ", got ", y.dim);
    FUSED_RNN_CHECK(in.data + in.count() <= y.data || y.data + y.count() <= in.data, "out must not overlap with x");
    const Use use(*this);
    // A step that takes a few microseconds is over before another thread could make use of the lock.
    if (work_ * steps < kWorthUnlocking) return stream_.run(in.data, y.data, steps);
    const py::gil_scoped_release unlocked;
    stream_.run(in.data, y.data, steps);
  }

  void reset(py::handle rows) {
    const Use use(*this);
    if (rows.is_none()) return stream_.reset(nullptr);
    const std::string chosen = rows.cast<std::string>();  // a byte for each row
    FUSED_RNN_CHECK(static_cast<int64_t>(chosen.size()) == stream_.batch(), "rows must have ", stream_.batch(),
                    " values, got ", chosen.size());
    stream_.reset(reinterpret_cast<const uint8_t*>(chosen.data()));
  }

  void get_state(py::handle h, py::handle c) {
    each_state(h, c, true, [](float* own, float* given, int64_t bytes) { std::memcpy(given, own, bytes); });
  }
  void set_state(py::handle h, py::handle c) {
    each_state(h, c, false, [](float* own, float* given, int64_t bytes) { std::memcpy(own, given, bytes); });
  }

 private:
  static constexpr double kWorthUnlocking = 1e6;  // multiply-adds

  // That nobody else uses the stream in the meantime. Every use begins while the thread holds Python's lock.
  class Use {
   public:
    explicit Use(Stream& stream) : in_use_(stream.in_use_) {
      FUSED_RNN_CHECK(!in_use_, "another thread uses this stream: give each thread its own");
      in_use_ = true;
    }
    ~Use() { in_use_ = false; }

   private:
    bool& in_use_;
  };

  // x or y of `steps` steps: [B, width], or [width] of a single row, with the steps before. Returns steps.
  int64_t check(const Numbers& n, const char* name, bool chunk, int64_t steps, int64_t width) const {
    const int64_t B = stream_.batch(), *size = n.sizes + chunk;
    const int dim = n.dim - chunk;
    const bool fits = (dim == 2 ? size[0] == B && size[1] == width : dim == 1 && B == 1 && size[0] == width) &&
                      (!chunk || n.sizes[0] == steps);
    FUSED_RNN_CHECK(fits, "expected ", name, " of shape [", chunk ? "T, " : "", B, ", ", width, "]",
                    B == 1 ? chunk ? " or [T, " + std::to_string(width) + "]" : " or [" + std::to_string(width) + "]"
                           : std::string(),
                    chunk && n.dim > 0 ? ", T = " + std::to_string(steps) : std::string(), ", got ", n.shape());
    return steps;
  }

  template <class F>
  void each_state(py::handle h, py::handle c, bool written, const F& f) {
    const Use use(*this);
    const cpu::FrozenModel& m = stream_.model();
    const auto check = [&](const Numbers& n, const char* name, int64_t width) {
      const bool fits = n.dim == 3 && n.sizes[0] == m.layers && n.sizes[1] == stream_.batch() && n.sizes[2] == width;
      FUSED_RNN_CHECK(fits, "expected ", name, " of shape [", m.layers, ", ", stream_.batch(), ", ", width, "], got ",
                      n.shape());
    };
    const auto bytes = [](const Numbers& n) { return n.count() * static_cast<int64_t>(sizeof(float)); };
    const Numbers new_h(h, "h", written);
    check(new_h, "h", m.state_size);
    std::optional<Numbers> new_c;
    if (m.has_c) {
      new_c.emplace(c, "c", written);
      check(*new_c, "c", m.hidden_size);
    }
    f(stream_.h(), new_h.data, bytes(new_h));
    if (new_c) f(stream_.c(), new_c->data, bytes(*new_c));
  }

  cpu::Stream stream_;
  const double work_ = double(stream_.batch()) * double(stream_.model().layers) * double(stream_.model().hidden_size) *
                       4 * double(stream_.model().input_size + stream_.model().state_size);
  bool in_use_ = false;
};

}  // namespace

void bind_stream(py::module_& m) {
  py::class_<cpu::FrozenModel, std::shared_ptr<cpu::FrozenModel>>(
      m, "FrozenModel", "A frozen model with its packed weights, which live as long as this object.");
  py::class_<Stream>(m, "Stream", "A stream of a frozen model; fused_rnn.stream has its documentation.")
      .def(py::init<const py::buffer&, int64_t, int64_t>())
      .def("run", &Stream::run)
      .def("reset", &Stream::reset)
      .def("get_state", &Stream::get_state)
      .def("set_state", &Stream::set_state);
  m.def(
      "frozen_model",
      [](const py::buffer& model) {
        return std::const_pointer_cast<cpu::FrozenModel>(shared(model));  // pybind11 holds nothing const
      },
      "The model of these bytes, checked and packed; the same object as long as it lives.");
  m.def(
      "frozen_checksum",
      [](const py::buffer& model) {
        const py::buffer_info bytes = model.request();
        return cpu::frozen_checksum(bytes.ptr, bytes.size * bytes.itemsize);
      },
      "The checksum that belongs into the header of a frozen model.");
}

}  // namespace bindings
}  // namespace fused_rnn
