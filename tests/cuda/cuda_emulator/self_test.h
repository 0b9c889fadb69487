// The assertions of the emulator's self test, and the parts of it that are in other files.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

#include "device.h"
#include "launch.h"

namespace self_test {

using namespace fused_rnn::cuda;

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

template <class Params>
std::string error_of(void (*kernel)(Params), const Grid& grid, const Params& params) {
  try {
    launch(kernel, grid, nullptr, params);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

template <class Params>
void expect_error(const std::string& part, void (*kernel)(Params), const Grid& grid, const Params& params) {
  const std::string error = error_of(kernel, grid, params);
  expect(error.find(part) != std::string::npos, "an error with '" + part + "', got '" + error + "'");
}

template <class Params>
void expect_success(const std::string& what, void (*kernel)(Params), const Grid& grid, const Params& params) {
  const std::string error = error_of(kernel, grid, params);
  expect(error.empty(), what + ": " + error);
}

void test_races();
void test_words_on_their_way();
void test_resets();
void test_ring();
void test_products();
void test_conversions();
void test_clusters();

}  // namespace self_test
