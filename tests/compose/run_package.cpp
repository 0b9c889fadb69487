// A program without Python for test_export.py: loads the operators and an AOTInductor package, and runs the package.
//
//     run_package LIBRARY PACKAGE [FILE T B I]...
//
// Each FILE holds a float32 tensor [T, B, I]; the elements of the first result are written to FILE.out. Prints the
// memory map of the process, from which the test sees which libraries are loaded.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int count, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) {  // RTLD_NOW: fails if any symbol is missing
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  for (int i = 3; i + 3 < count; i += 4) {
    const std::string file = arguments[i];
    const std::vector<int64_t> shape{std::atoll(arguments[i + 1]), std::atoll(arguments[i + 2]),
                                     std::atoll(arguments[i + 3])};
    std::vector<float> values(shape[0] * shape[1] * shape[2]);
    std::ifstream(file, std::ios::binary).read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(float));
    const at::Tensor y = model.run({at::from_blob(values.data(), shape)}).front().contiguous();
    std::ofstream(file + ".out", std::ios::binary).write(static_cast<const char*>(y.const_data_ptr()), y.nbytes());
  }
  std::cout << std::ifstream("/proc/self/maps").rdbuf();
}
