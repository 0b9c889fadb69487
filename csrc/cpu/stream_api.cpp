// The C interface of streams, fused_rnn/stream.h: no exception leaves it.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "../../fused_rnn/stream.h"
#include "stream.h"

using fused_rnn::cpu::FrozenModel;
using fused_rnn::cpu::Stream;

struct fused_rnn_model {
  std::shared_ptr<const FrozenModel> shared;
};
struct fused_rnn_stream {
  mutable Stream stream;
};

namespace {

thread_local char error[256] = "";

// What f returns; null if it throws, and the reason in `error`.
template <class F>
auto or_null(const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& e) {
    std::snprintf(error, sizeof(error), "%s", e.what());
  }
  return nullptr;
}

std::string contents(const char* path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), std::fclose);
  if (!file) throw std::runtime_error("fused_rnn: cannot open " + std::string(path));
  std::string bytes;
  char part[1 << 16];
  while (const size_t n = std::fread(part, 1, sizeof(part), file.get())) bytes.append(part, n);
  if (std::ferror(file.get())) throw std::runtime_error("fused_rnn: cannot read " + std::string(path));
  return bytes;
}

}  // namespace

const char* fused_rnn_error(void) { return error; }

fused_rnn_model* fused_rnn_model_from_memory(const void* bytes, size_t size) {
  return or_null([&] { return new fused_rnn_model{std::make_shared<const FrozenModel>(bytes, size)}; });
}
fused_rnn_model* fused_rnn_model_load(const char* path) {
  return or_null([&] {
    const std::string bytes = contents(path);
    return new fused_rnn_model{std::make_shared<const FrozenModel>(bytes.data(), bytes.size())};
  });
}
void fused_rnn_model_destroy(fused_rnn_model* model) { delete model; }
int64_t fused_rnn_model_input_size(const fused_rnn_model* model) { return model->shared->input_size; }
int64_t fused_rnn_model_output_size(const fused_rnn_model* model) { return model->shared->state_size; }

fused_rnn_stream* fused_rnn_stream_create(const fused_rnn_model* model, int64_t batch, int64_t threads) {
  return or_null([&] { return new fused_rnn_stream{Stream(model->shared, batch, threads)}; });
}
void fused_rnn_stream_destroy(fused_rnn_stream* stream) { delete stream; }
void fused_rnn_stream_step(fused_rnn_stream* stream, const float* x, float* y) { stream->stream.run(x, y, 1); }
void fused_rnn_stream_chunk(fused_rnn_stream* stream, const float* x, int64_t steps, float* y) {
  stream->stream.run(x, y, steps);
}
void fused_rnn_stream_reset(fused_rnn_stream* stream, const uint8_t* rows) { stream->stream.reset(rows); }

int64_t fused_rnn_stream_state_size(const fused_rnn_stream* stream) {
  return stream->stream.h_size() + stream->stream.c_size();
}
void fused_rnn_stream_get_state(const fused_rnn_stream* stream, float* state) {
  Stream& s = stream->stream;
  std::memcpy(state, s.h(), s.h_size() * sizeof(float));
  if (s.c_size()) std::memcpy(state + s.h_size(), s.c(), s.c_size() * sizeof(float));
}
void fused_rnn_stream_set_state(fused_rnn_stream* stream, const float* state) {
  Stream& s = stream->stream;
  std::memcpy(s.h(), state, s.h_size() * sizeof(float));
  if (s.c_size()) std::memcpy(s.c(), state + s.h_size(), s.c_size() * sizeof(float));
}
