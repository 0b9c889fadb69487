/* Proves for test_stream.py that a step allocates nothing, takes no lock and makes no system call.
 *
 *     stream_check MODEL.frnn STEPS
 *
 * Counts calls of malloc and its kin and of pthread_mutex_lock, which this program defines in the place of the C
 * library's, and forbids system calls: in strict mode the kernel ends a process at any but read, write and exit.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fused_rnn/stream.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static long counted[2];

void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* memory, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  ++counted[0];
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  ++counted[0];
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  ++counted[0];
  return __libc_realloc(memory, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  ++counted[0];
  return __libc_memalign(alignment, size);
}

int pthread_mutex_lock(pthread_mutex_t* mutex) {
  static int (*real)(pthread_mutex_t*);
  ++counted[1];
  if (!real) *(void**)&real = dlsym(RTLD_NEXT, "pthread_mutex_lock");
  return real(mutex);
}

int main(int count, char** arguments) {
  fused_rnn_model* model = count == 3 ? fused_rnn_model_load(arguments[1]) : NULL;
  fused_rnn_stream* stream = model ? fused_rnn_stream_create(model, 1, 1) : NULL;
  if (!stream) {
    fprintf(stderr, "%s\n", fused_rnn_error());
    return 1;
  }
  const size_t chunk = 30;
  float* x = calloc(chunk * (size_t)fused_rnn_model_input_size(model), sizeof(float));
  float* y = calloc(chunk * (size_t)fused_rnn_model_output_size(model), sizeof(float));
  const long steps = atol(arguments[2]);
  const int sees = counted[0] > 0; /* that creating the stream did allocate */
  const long before[2] = {counted[0], counted[1]};
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) {
    fprintf(stderr, "no seccomp\n");
    return 3;
  }
  for (long i = 0; i < steps; ++i) fused_rnn_stream_step(stream, x, y);
  fused_rnn_stream_chunk(stream, x, (int64_t)chunk, y);
  fused_rnn_stream_reset(stream, NULL);
  const int clean = sees && counted[0] == before[0] && counted[1] == before[1];
  const char* const message = clean ? "nothing\n" : "an allocation or a lock\n";
  if (write(1, message, strlen(message)) < 0) return 1;
  syscall(SYS_exit, !clean);
}
