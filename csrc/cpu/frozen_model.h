// A frozen model: the bytes of a file as `fused_rnn.freeze(...).save` writes it, checked, and its weights packed for
// the kernels of this machine. Knows nothing of torch or Python.
//
// The file: a FrozenHeader, then for each layer and direction W_ih, W_hh, b_ih, b_hh (if there are biases), W_hr (if it
// is projected), each row-major in torch.nn's order and filled up with zeros to a multiple of 8 bytes. An int8 matrix
// is followed by the float32 scale of each row. Numbers are little-endian.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dispatch.h"

namespace fused_rnn {
namespace cpu {

struct FrozenHeader {
  static constexpr char kMagic[8] = {'f', 'r', 'n', 'n', '\r', '\n', 0x1a, '\n'};  // a transfer as text damages it
  static constexpr uint32_t kVersion = 1, kBias = 1, kBidirectional = 2;
  static constexpr uint32_t kBatchFirst = 4, kCell = 8;  // what Python makes of it; the kernels do not ask

  char magic[8];
  uint32_t version, flags;
  uint64_t size;                                        // of all, in bytes
  uint64_t checksum;                                    // of all, with this field as 0
  uint32_t cell;                                        // CellKind
  uint32_t weights;                                     // WeightFormat
  uint64_t layers, input_size, hidden_size, proj_size;  // proj_size: 0 without a projection
};
static_assert(sizeof(FrozenHeader) == 72, "the format has no gaps");

// The checksum of a model's bytes, whose size is a multiple of 8.
FUSED_RNN_EXPORT uint64_t frozen_checksum(const void* bytes, int64_t size);

class FUSED_RNN_EXPORT FrozenModel {
 public:
  // Copies all that it needs. Throws std::runtime_error, saying what is wrong with the bytes.
  FrozenModel(const void* bytes, int64_t size);

  CellKind cell;
  WeightFormat weights;
  int64_t layers, directions, input_size, hidden_size, state_size;  // state_size: of h, P
  bool has_c;

  // Of a layer, without rows or steps.
  LayerShape shape(int64_t layer) const;
  // Its weights and biases; all other pointers are null.
  const ForwardDirection& direction(int64_t layer, int64_t direction) const {
    return directions_[layer * directions + direction];
  }

 private:
  struct Free {
    void operator()(char* memory) const;
  };
  bool projected_;
  std::vector<ForwardDirection> directions_;
  std::vector<std::unique_ptr<char, Free>> memory_;
};

// The model of these bytes. While it lives it is found by its header, checksum included, so that to ask again for the
// same bytes costs little; copies of a module and its streams share one model. A module holds its model, and frees it.
// The operator may have a caller that holds none, an exported program: with `keep`, such a model is kept until so many
// calls with `keep` have passed without one for it, and another model comes.
constexpr int64_t kKeptCalls = 1 << 16;
FUSED_RNN_EXPORT std::shared_ptr<const FrozenModel> frozen_model(const void* bytes, int64_t size, bool keep = false);

}  // namespace cpu
}  // namespace fused_rnn
