/* Runs a frozen model on the numbers of a file, one step at a time, and says how long a step takes. No Python, no
 * torch.
 *
 *     stream MODEL.frnn INPUT OUTPUT
 *
 * INPUT holds float32 [T, I], OUTPUT receives float32 [T, P]. Build it against the header and the library of the
 * installed package, whose paths Python prints:
 *
 *     library=$(python -c "import fused_rnn; print(fused_rnn.STREAM_LIBRARY)")
 *     cc -O2 stream.c -I$(python -c "import fused_rnn; print(fused_rnn.INCLUDE)") \
 *         $library -Wl,-rpath,$(dirname $library) -o stream
 */
#define _POSIX_C_SOURCE 199309L
#include <fused_rnn/stream.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int count, char** arguments) {
  if (count != 4) {
    fprintf(stderr, "usage: %s MODEL.frnn INPUT OUTPUT\n", arguments[0]);
    return 2;
  }
  fused_rnn_model* model = fused_rnn_model_load(arguments[1]);
  fused_rnn_stream* stream = model ? fused_rnn_stream_create(model, 1, 1) : NULL;
  if (!stream) {
    fprintf(stderr, "%s\n", fused_rnn_error());
    return 1;
  }
  size_t inputs = (size_t)fused_rnn_model_input_size(model), outputs = (size_t)fused_rnn_model_output_size(model);
  fused_rnn_model_destroy(model); /* the stream keeps what it needs */
  float *x = malloc(inputs * sizeof(float)), *y = malloc(outputs * sizeof(float));
  FILE *in = fopen(arguments[2], "rb"), *out = fopen(arguments[3], "wb");
  if (!x || !y || !in || !out) {
    perror(arguments[0]);
    return 1;
  }
  long steps = 0;
  double spent = 0;
  while (fread(x, sizeof(float), inputs, in) == inputs) {
    double start = seconds();
    fused_rnn_stream_step(stream, x, y);
    spent += seconds() - start;
    if (fwrite(y, sizeof(float), outputs, out) != outputs) {
      perror(arguments[3]);
      return 1;
    }
    ++steps;
  }
  printf("%ld steps, %.2f us each\n", steps, steps ? spent / (double)steps * 1e6 : 0.0);
  fused_rnn_stream_destroy(stream);
  free(x);
  free(y);
  fclose(in);
  return fclose(out) == 0 ? 0 : 1;
}
