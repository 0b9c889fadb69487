#include "frozen_model.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../cells/cell_info.h"
#include "memory.h"

namespace fused_rnn {
namespace cpu {

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a model's numbers are read as they lie");

[[noreturn]] void damaged(const std::string& what) { throw std::runtime_error("fused_rnn: the frozen model " + what); }

// Sizes as large as this occur in no layer, and products of two of them do not overflow.
constexpr uint64_t kMost = 1 << 30;

FrozenHeader checked_header(const void* bytes, int64_t size) {
  FrozenHeader h;
  if (size < static_cast<int64_t>(sizeof(h))) damaged("is cut off: it has " + std::to_string(size) + " bytes");
  std::memcpy(&h, bytes, sizeof(h));
  if (std::memcmp(h.magic, FrozenHeader::kMagic, sizeof(h.magic)) != 0)
    damaged("does not begin as one: another kind of file, or one that was transferred as text");
  if (h.version != FrozenHeader::kVersion) {
    damaged("has version " + std::to_string(h.version) + " of the format; this library reads version " +
            std::to_string(FrozenHeader::kVersion));
  }
  if (h.size != static_cast<uint64_t>(size) || size % 8 != 0) {
    damaged("says that it has " + std::to_string(h.size) + " bytes, and has " + std::to_string(size));
  }
  if (frozen_checksum(bytes, size) != h.checksum) damaged("is damaged: its checksum is another");
  const bool known = h.cell < kCellCount && h.weights >= static_cast<uint32_t>(WeightFormat::kFloat32) &&
                     h.weights <= static_cast<uint32_t>(WeightFormat::kInt8) && h.flags < 2 * FrozenHeader::kCell;
  if (!known) damaged("has a cell, weights or flags that this library does not know");
  for (const uint64_t n : {h.layers, h.input_size, h.hidden_size, h.proj_size + 1}) {
    if (n < 1 || n > kMost) damaged("has an impossible size: " + std::to_string(n));
  }
  if (h.proj_size > 0 && static_cast<CellKind>(h.cell) != CellKind::kLstm) damaged("has a projection, and no LSTM");
  const uint32_t of_layers = FrozenHeader::kBidirectional | FrozenHeader::kBatchFirst;
  if (h.flags & FrozenHeader::kCell && (h.layers > 1 || h.proj_size > 0 || h.flags & of_layers)) {
    damaged("is a cell with options of a layer");
  }
  return h;
}

// Hands out the parts of a file one by one.
class Reader {
 public:
  Reader(const char* begin, const char* end, WeightFormat weights) : at_(begin), end_(end), weights_(weights) {}

  const void* matrix(int64_t rows, int64_t columns, const float*& scale) {
    const int64_t size = weights_ == WeightFormat::kFloat32 ? 4 : weights_ == WeightFormat::kBfloat16 ? 2 : 1;
    const void* const data = take(rows * columns, size);
    scale = weights_ == WeightFormat::kInt8 ? floats(rows) : nullptr;
    return data;
  }
  const float* floats(int64_t count) { return static_cast<const float*>(take(count, 4)); }
  void finish() const {
    if (at_ != end_) damaged("has " + std::to_string(end_ - at_) + " bytes too many");
  }

 private:
  const void* take(int64_t count, int64_t size) {
    if (count > (end_ - at_) / size) damaged("is too short for its sizes");
    const char* const taken = at_;
    at_ += (count * size + 7) / 8 * 8;  // within the end: all of it is a multiple of 8
    return taken;
  }

  const char *at_, *end_;
  WeightFormat weights_;
};

char* zeroed(int64_t bytes) {
  char* const memory = allocate(bytes);
  if (!memory) throw std::runtime_error("fused_rnn: no memory for " + std::to_string(bytes) + " bytes of weights");
  std::memset(memory, 0, bytes);
  return memory;
}

}  // namespace

uint64_t frozen_checksum(const void* bytes, int64_t size) {
  constexpr int64_t kSkipped = offsetof(FrozenHeader, checksum);
  const char* const at = static_cast<const char*>(bytes);
  uint64_t sum = 0x9e3779b97f4a7c15;
  for (int64_t i = 0; i + 8 <= size; i += 8) {
    uint64_t word = 0;
    if (i != kSkipped) std::memcpy(&word, at + i, 8);
    sum = (sum ^ word) * 0xff51afd7ed558ccd;
    sum ^= sum >> 32;
  }
  return sum;
}

void FrozenModel::Free::operator()(char* memory) const { std::free(memory); }

FrozenModel::FrozenModel(const void* bytes, int64_t size) {
  std::vector<uint64_t> aligned;  // a copy of bytes that lie otherwise
  if (reinterpret_cast<uintptr_t>(bytes) % 8 != 0) {
    aligned.resize((size + 7) / 8);
    std::memcpy(aligned.data(), bytes, size);
    bytes = aligned.data();
  }
  const FrozenHeader h = checked_header(bytes, size);
  cell = static_cast<CellKind>(h.cell), weights = static_cast<WeightFormat>(h.weights);
  layers = h.layers, directions = h.flags & FrozenHeader::kBidirectional ? 2 : 1;
  input_size = h.input_size, hidden_size = h.hidden_size, projected_ = h.proj_size > 0;
  state_size = projected_ ? h.proj_size : h.hidden_size;
  has_c = cell_info(cell).has_c;
  const char* const begin = static_cast<const char*>(bytes);
  Reader reader(begin + sizeof(h), begin + size, weights);
  const int64_t rows = cell_info(cell).gates * hidden_size;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const LayerShape s = shape(layer);
    for (int64_t d = 0; d < directions; ++d) {
      PlainDirection from{};
      from.w_ih = reader.matrix(rows, s.I, from.scale_ih);
      from.w_hh = reader.matrix(rows, s.P, from.scale_hh);
      if (h.flags & FrozenHeader::kBias) from.b_ih = reader.floats(rows), from.b_hh = reader.floats(rows);
      if (projected_) from.w_hr = reader.matrix(s.P, s.H, from.scale_hr);
      ForwardDirection& to = directions_.emplace_back();
      memory_.emplace_back(zeroed(kernels().freeze(s, from, nullptr, to)));
      kernels().freeze(s, from, memory_.back().get(), to);
    }
  }
  reader.finish();
}

LayerShape FrozenModel::shape(int64_t layer) const {
  LayerShape s{};
  s.cell = cell, s.dtype = Dtype::kFloat32, s.weights = weights;
  s.I = layer ? state_size * directions : input_size, s.H = hidden_size, s.P = state_size;
  s.directions = directions, s.projected = projected_;
  return s;
}

namespace {

// The models that live, by their header and the size of their bytes, which need not be what the header says.
struct Known {
  struct Key {
    char bytes[sizeof(FrozenHeader) + sizeof(int64_t)];
    bool operator<(const Key& other) const { return std::memcmp(bytes, other.bytes, sizeof(bytes)) < 0; }
  };
  struct Entry {
    std::weak_ptr<const FrozenModel> model;
    std::shared_ptr<const FrozenModel> kept;  // null if others hold it
    int64_t last_call;
  };
  std::mutex mutex;
  std::map<Key, Entry> entries;
  int64_t calls = 0;  // with `keep`

  // Null if it is not there.
  std::shared_ptr<const FrozenModel> find(const Key& key, bool keep) {
    calls += keep;
    const auto found = entries.find(key);
    if (found == entries.end()) return nullptr;
    if (keep) found->second.last_call = calls;
    return found->second.model.lock();
  }
  void add(const Key& key, const std::shared_ptr<const FrozenModel>& model, bool keep) {
    for (auto entry = entries.begin(); entry != entries.end();) {
      if (entry->second.kept && calls - entry->second.last_call > kKeptCalls) entry->second.kept = nullptr;
      entry = entry->second.model.expired() ? entries.erase(entry) : std::next(entry);
    }
    entries[key] = {model, keep ? model : nullptr, calls};
  }
};

}  // namespace

std::shared_ptr<const FrozenModel> frozen_model(const void* bytes, int64_t size, bool keep) {
  static auto& known = *new Known;         // never destroyed: threads may run until the end
  if (!keep) checked_header(bytes, size);  // even if it is known by its header; an operator's bytes have been checked
  Known::Key key{};
  if (size >= static_cast<int64_t>(sizeof(FrozenHeader))) {
    std::memcpy(key.bytes, bytes, sizeof(FrozenHeader));
    std::memcpy(key.bytes + sizeof(FrozenHeader), &size, sizeof(size));
    const std::lock_guard<std::mutex> lock(known.mutex);
    if (auto found = known.find(key, keep)) return found;
  }
  auto model = std::make_shared<const FrozenModel>(bytes, size);  // throws where there is no header
  const std::lock_guard<std::mutex> lock(known.mutex);
  if (auto found = known.find(key, keep)) return found;  // another thread's
  known.add(key, model, keep);
  return model;
}

}  // namespace cpu
}  // namespace fused_rnn
