// How the bindings refuse an argument: an exception that Python sees as a RuntimeError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fused_rnn {
namespace bindings {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fused_rnn: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// A macro, so that the message is only made when it is needed: these checks run on every call.
#define FUSED_RNN_CHECK(condition, ...) \
  if (!(condition)) ::fused_rnn::bindings::fail(__VA_ARGS__)

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  bool first = true;
  for (int64_t size : sizes) {
    text << (first ? "" : ", ") << size;
    first = false;
  }
  text << "]";
  return text.str();
}

}  // namespace bindings
}  // namespace fused_rnn
