// fused_rnn._C: what is not an operator. Importing it loads _cpu.so, beside it, which registers the operators.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cuda/plan.h"
#include "cell_number.h"
#include "dtypes.h"

namespace py = pybind11;

namespace fused_rnn::bindings {
void bind_direct(py::module_& m);  // direct.cpp
void bind_node(py::module_& m);    // node.cpp
void bind_plain(py::module_& m);   // plain.cpp
void bind_stream(py::module_& m);  // stream.cpp
}  // namespace fused_rnn::bindings
using fused_rnn::cpu::Kernels;

namespace {

const Kernels& find(const std::string& isa) {
  for (const Kernels* k : fused_rnn::cpu::supported()) {
    if (isa == k->name) return *k;
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not supported on this machine");
}

const fused_rnn::cpu::TileUnit& tile_unit(const std::string& isa) {
  const fused_rnn::cpu::TileUnit* const unit = find(isa).unit;
  if (!unit || !unit->available()) {
    throw std::invalid_argument("'" + isa + "' multiplies nothing narrower than float32");
  }
  return *unit;
}

int64_t bytes(const py::buffer_info& info) { return info.size * info.itemsize; }

char function_letter(const std::string& function) {
  if (function == "sigmoid") return 's';
  if (function == "tanh") return 't';
  throw std::invalid_argument("function must be 'sigmoid' or 'tanh', got '" + function + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fused_rnn::bindings::bind_direct(m);
  fused_rnn::bindings::bind_node(m);
  fused_rnn::bindings::bind_plain(m);
  fused_rnn::bindings::bind_stream(m);
  m.def("cpu_isa", [] { return std::string(fused_rnn::cpu::kernels().name); }, "The instruction set in use.");
  m.def(
      "cpu_bf16_unit",
      [] {
        const fused_rnn::cpu::TileUnit* unit = fused_rnn::cpu::kernels().unit;
        return std::string(unit ? unit->name : "");
      },
      "The instructions for products of bfloat16 that belong to the instruction set in use; empty: none.");
  m.def(
      "supported_cpu_isas",
      [] {
        std::vector<std::string> names;
        for (const Kernels* k : fused_rnn::cpu::supported()) names.push_back(k->name);
        return names;
      },
      "The instruction sets that run on this machine, the default first.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = FUSED_RNN_BUILT_WITH_TORCH;
        info["compiler"] = __VERSION__;
        info["openmp"] = _OPENMP;
        return info;
      },
      "What the extension was built with.");
  m.def(
      "openmp_threads",
      [] { return omp_get_dynamic() || omp_get_max_active_levels() < 1 ? 1 : omp_get_thread_limit(); },
      "The number of threads up to which OpenMP gives a parallel region as many as it asks for.");
  m.def(
      "cells",
      [] {
        py::list all;
        for (const fused_rnn::CellInfo& cell : fused_rnn::kCells) {
          py::dict d;
          d["name"] = cell.name;
          d["gates"] = cell.gates;
          d["saved"] = cell.saved;
          d["grads"] = cell.grads;
          d["input_shift"] = cell.input_shift;
          d["hidden_grads"] = cell.hidden_grads;
          d["has_c"] = cell.has_c;
          d["uses_h"] = cell.uses_h;
          d["saves_h"] = cell.saves_h;
          all.append(d);
        }
        return all;
      },
      "The cells in the order of their numbers, with the constants of csrc/cells/cell_info.h.");
  m.def(
      "dtypes",
      [] {
        std::vector<std::string> names;
#define FUSED_RNN_NAME(type, name) names.push_back(#name);
        FUSED_RNN_DTYPES(FUSED_RNN_NAME)
#undef FUSED_RNN_NAME
        return names;
      },
      "The dtypes of a layer's tensors, those that the CPU's kernels compute in first.");
  m.attr("NORM_EPS") = fused_rnn::kNormEps;
  m.def(
      "cpu_plan",
      [](int cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t directions, int64_t threads,
         bool is_double, int precision, bool deterministic, int weights, int64_t instance, bool backward) {
        const Kernels& k = fused_rnn::cpu::kernels(instance);
        fused_rnn::LayerShape shape{};
        shape.cell = fused_rnn::bindings::cell_by_number(cell).kind;
        shape.T = T, shape.B = B, shape.I = I, shape.H = H, shape.P = P, shape.N = T * B, shape.directions = directions;
        shape.projected = P != H;
        shape.dtype = is_double ? fused_rnn::Dtype::kFloat64 : fused_rnn::Dtype::kFloat32;
        shape.deterministic = deterministic;
        shape.weights = static_cast<fused_rnn::WeightFormat>(weights);
        fused_rnn::cpu::choose_products(k, shape, static_cast<fused_rnn::cpu::Precision>(precision), threads);
        const fused_rnn::cpu::Plan plan = fused_rnn::cpu::plan(k, shape, backward, threads);
        py::dict d;
        d["instruction_set"] = k.name;
        d["vector_bytes"] = k.vector_bytes;
        d["teams"] = plan.teams;
        d["workers"] = plan.workers;
        d["splits_units"] = plan.splits_units;
        d["block"] = k.block(backward ? 1 : fused_rnn::cell_info(shape.cell).gates, is_double ? 8 : 4);
        const char* const products[] = {"float32", "bfloat16", "int8x6", "int8x10"};
        d["products"] = is_double ? "float64" : products[static_cast<int>(shape.operands)];
        return d;
      },
      "How many threads take a layer on the CPU, how they share it, and of which numbers its products are: of float32, "
      "or for each 1 of bfloat16, or 6 to 10 of int8. weights: how they are given, 0 as torch has them, else as a "
      "frozen file says. instance: a place in supported_cpu_isas(); -1: the instruction set in use. backward: the plan "
      "of that pass. block: the units that the kernels compute together, a worker's least if units are split.",
      py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"), py::arg("P"), py::arg("directions"),
      py::arg("threads"), py::arg("is_double"), py::arg("precision"), py::arg("deterministic"), py::arg("weights") = 0,
      py::arg("instance") = -1, py::arg("backward") = false);
  m.def(
      "cuda_plans",
      [](int cell, int element_bytes, int64_t batch, int hidden_size, int directions, bool backward, int sms,
         int shared_bytes, int capability) {
        using namespace fused_rnn::cuda;
        const auto element = element_bytes == 4 ? Element::kTf32 : Element::kBf16;
        const Problem problem{
            fused_rnn::bindings::cell_by_number(cell).kind, element, batch, hidden_size, directions, backward};
        py::list all;
        for (const Plan& p : plans(problem, {sms, shared_bytes, capability})) {
          py::dict d;
          const char* const kernels[] = {"alone", "through_l2", "through_cluster", "split_columns"};
          d["kernel"] = kernels[static_cast<int>(p.instance.exchange)];
          d["instance"] = p.index;
          d["unit_warps"] = p.instance.unit_warps;
          d["depth_warps"] = p.instance.depth_warps;
          d["row_tiles"] = p.instance.row_tiles;
          d["parts"] = p.division.parts;
          d["teams"] = p.division.teams;
          d["tiles"] = p.division.tiles;
          d["rows"] = p.rows;
          d["blocks"] = p.blocks(directions);
          d["threads"] = p.instance.threads();
          d["shared_bytes"] = p.shared_bytes;
          d["microseconds"] = p.microseconds;
          all.append(d);
        }
        return all;
      },
      "The CUDA kernels that keep a layer's recurrent weights on the chip and fit the device, best first.");
  m.def(
      "tile_product",
      [](const std::string& isa, const py::buffer& sums, const py::buffer& a, const py::buffer& b) {
        using namespace fused_rnn::cpu;
        using fused_rnn::Bf16;
        const TileUnit& unit = tile_unit(isa);
        const py::buffer_info of_sums = sums.request(), of_a = a.request(), of_b = b.request();
        const int rows = static_cast<int>(bytes(of_sums) / kTileBytes);
        if (rows < 1 || rows > kTileHeight || bytes(of_sums) != rows * kTileBytes || bytes(of_a) != rows * kTileBytes ||
            bytes(of_b) != kTileHeight * kTileBytes) {
          throw std::invalid_argument("sums must be float32 [1 to 16, 16], a 16-bit [rows of sums, 32], b [16, 32]");
        }
        alignas(kTileBytes) float to[kTileHeight * kTileWidth];
        alignas(kTileBytes) Bf16 tile[kBf16Tile];
        std::memcpy(to, of_sums.ptr, bytes(of_sums));
        std::memcpy(tile, of_b.ptr, sizeof(tile));
        Bf16Product product{};
        product.sums = to, product.stride = product.columns = kTileWidth;
        product.tiles = 1, product.rows = rows, product.a = static_cast<const Bf16*>(of_a.ptr), product.b = tile;
        product.K = kBf16Depth;
        TileState state;
        unit.multiply(product, state);
        unit.release(state);
        return py::bytes(reinterpret_cast<const char*>(to), bytes(of_sums));
      },
      "sums + a b, of one tile each, computed by an instruction set's products of bfloat16; see csrc/cpu/tiles.h.");
  m.def(
      "digit_product",
      [](const std::string& isa, const py::buffer& a, const py::buffer& b, int planes, int products, int rows) {
        using namespace fused_rnn::cpu;
        const TileUnit& unit = tile_unit(isa);
        if (!unit.multiply_digits) throw std::invalid_argument("'" + isa + "' does not multiply digits");
        const int digits = products == 10 ? 4 : 3;
        if ((products != 6 && products != 8 && products != 10) || planes < digits || planes > kMostDigits) {
          throw std::invalid_argument("there are 6, 8 or 10 products, of 3 or 4 digits");
        }
        const py::buffer_info of_a = a.request(), of_b = b.request();
        const int64_t b_bytes = planes * kDigitTile, depth = bytes(of_b) / b_bytes;
        if (rows < 1 || rows > kTileHeight || depth < 1 || depth > kDigitRun / kDigitDepth ||
            bytes(of_b) != depth * b_bytes || bytes(of_a) != depth * planes * rows * kTileBytes) {
          throw std::invalid_argument("a must be int8 [1 to 4, planes, rows, 64], b [1 to 4, planes, 16, 64]");
        }
        alignas(kTileBytes) int32_t sums[kMostDigits + 1][kTileHeight][kTileWidth] = {};
        TileState state;
        unit.multiply_digits({sums[0][0], products, planes, rows, static_cast<const int8_t*>(of_a.ptr),
                              static_cast<const int8_t*>(of_b.ptr), static_cast<int>(depth)},
                             state);
        unit.release(state);
        return py::bytes(reinterpret_cast<const char*>(sums), (digits + 1) * sizeof(sums[0]));
      },
      "The levels of a tile of sums, int32 [digits + 1, 16, 16], from an instruction set's products of digits; see "
      "csrc/cpu/tiles.h.");
  m.def(
      "map_function",
      [](const std::string& function, const std::string& isa, const py::buffer& values) {
        const Kernels& k = find(isa);
        const char letter = function_letter(function);
        const py::buffer_info x = values.request();
        if (x.ndim != 1 || (x.size > 1 && x.strides[0] != x.itemsize)) {
          throw std::invalid_argument("values must be one-dimensional and contiguous");
        }
        py::bytearray out(nullptr, x.size * x.itemsize);
        void* y = PyByteArray_AS_STRING(out.ptr());
        if (x.format == py::format_descriptor<float>::format()) {
          k.map_float(letter, static_cast<const float*>(x.ptr), static_cast<float*>(y), x.size);
        } else if (x.format == py::format_descriptor<double>::format()) {
          k.map_double(letter, static_cast<const double*>(x.ptr), static_cast<double*>(y), x.size);
        } else {
          throw std::invalid_argument("values must be float32 or float64");
        }
        return out;
      },
      "The kernels' sigmoid or tanh of every value of a buffer, as bytes of the same type.");
}
