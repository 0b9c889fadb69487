// Damaged model files, for test_frozen_file.py, which links this with the package's kernels.
//
//     frozen_fuzz ROUNDS FILE...
//
// Changes bytes, numbers of the header and the length of each file, half of the time with a checksum that fits, loads
// the result and, if that succeeds, runs it. Every whole file must load, and every file with another checksum must not.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/frozen_model.h"
#include "../../fused_rnn/stream.h"

using fused_rnn::cpu::FrozenHeader;

namespace {

int failures = 0;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s (%s)\n", what, fused_rnn_error());
  ++failures;
}

// Loads and runs the bytes, which lie at the end of their memory. Whether they were taken for a model.
bool runs(const std::string& bytes) {
  std::vector<char> exact(bytes.begin(), bytes.end());
  fused_rnn_model* const model = fused_rnn_model_from_memory(exact.data(), exact.size());
  if (!model) return false;
  const int64_t I = fused_rnn_model_input_size(model), P = fused_rnn_model_output_size(model);
  fused_rnn_stream* const stream = fused_rnn_stream_create(model, 2, 1);
  fused_rnn_model_destroy(model);
  if (stream) {
    std::vector<float> x(3 * 2 * I, 0.5f), y(3 * 2 * P), state(fused_rnn_stream_state_size(stream));
    const uint8_t rows[] = {0, 1};
    fused_rnn_stream_step(stream, x.data(), y.data());
    fused_rnn_stream_chunk(stream, x.data(), 3, y.data());
    fused_rnn_stream_get_state(stream, state.data());
    fused_rnn_stream_reset(stream, rows);
    fused_rnn_stream_set_state(stream, state.data());
    fused_rnn_stream_destroy(stream);
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 random(0);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  long loaded = 0, refused = 0;
  for (int i = 2; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    const std::string whole((std::istreambuf_iterator<char>(file)), {});
    require(runs(whole), arguments[i]);
    for (long round = 0; round < std::atol(arguments[1]); ++round) {
      std::string bytes = whole;
      switch (below(4)) {
        case 0:  // some bytes
          for (size_t n = below(4) + 1; n > 0; --n) bytes[below(bytes.size())] ^= 1 << below(8);
          break;
        case 1: {  // a number of the header
          const uint64_t values[] = {0, 1, 2, 3, 7, 64, 1 << 20, 1u << 31, 1ull << 32, 1ull << 62, ~0ull};
          std::memcpy(&bytes[8 + 4 * below(16)], &values[below(11)], below(2) ? 4 : 8);
          break;
        }
        case 2:
          bytes.resize(below(bytes.size()));
          break;
        case 3:
          bytes.append(below(64) + 1, '\0');
          break;
      }
      const bool sealed = bytes.size() >= sizeof(FrozenHeader) && below(2);
      if (sealed) {
        const uint64_t size = bytes.size();
        if (below(2)) std::memcpy(&bytes[offsetof(FrozenHeader, size)], &size, 8);
        const uint64_t sum = fused_rnn::cpu::frozen_checksum(bytes.data(), bytes.size());
        std::memcpy(&bytes[offsetof(FrozenHeader, checksum)], &sum, 8);
      }
      const bool taken = runs(bytes);
      ++(taken ? loaded : refused);
      require(sealed || !taken || bytes == whole, "a file with another checksum was loaded");
    }
  }
  std::printf("%ld loaded, %ld refused, %d failures\n", loaded, refused, failures);
  return failures != 0;
}
