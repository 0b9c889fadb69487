/* Streams of a frozen RNN, LSTM or GRU from C, without Python and without torch.
 *
 * A model file is written by `fused_rnn.freeze(module, weights=...).save("model.frnn")`. Link against the library that
 * `fused_rnn.STREAM_LIBRARY` names, or open it with dlopen:
 *
 *     fused_rnn_model* model = fused_rnn_model_load("model.frnn");
 *     fused_rnn_stream* stream = model ? fused_rnn_stream_create(model, 1, 1) : NULL;
 *     if (!stream) fprintf(stderr, "%s\n", fused_rnn_error());
 *     fused_rnn_stream_step(stream, x, y);
 *
 * Numbers are 32-bit floats; arrays are row-major and belong to the caller. A stream must not be used by two threads at
 * the same time; a model may, and lives as long as it or a stream of it does. step, chunk, reset and the functions of
 * the state allocate nothing, take no lock and, with one thread, make no system call: they are safe in an audio
 * callback.
 *
 * Letters: T time steps, B rows of the batch, I inputs, P outputs, L layers, H hidden units (P = H without a
 * projection).
 */
#ifndef FUSED_RNN_STREAM_H
#define FUSED_RNN_STREAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FUSED_RNN_API __attribute__((visibility("default")))
#else
#define FUSED_RNN_API
#endif

typedef struct fused_rnn_model fused_rnn_model;
typedef struct fused_rnn_stream fused_rnn_stream;

/* Why the last call of this thread that returned NULL did so. */
FUSED_RNN_API const char* fused_rnn_error(void);

/* Reads and checks a model, and packs its weights for this processor. NULL if it is damaged, or memory is lacking. */
FUSED_RNN_API fused_rnn_model* fused_rnn_model_load(const char* path);
/* The same from the bytes of a file, which are copied. */
FUSED_RNN_API fused_rnn_model* fused_rnn_model_from_memory(const void* bytes, size_t size);
FUSED_RNN_API void fused_rnn_model_destroy(fused_rnn_model* model);
FUSED_RNN_API int64_t fused_rnn_model_input_size(const fused_rnn_model* model);  /* I */
FUSED_RNN_API int64_t fused_rnn_model_output_size(const fused_rnn_model* model); /* P */

/* A new stream whose state is zero. `threads` share a step: one is best unless the weights exceed the cache of a core.
 * NULL if the model is bidirectional, batch or threads (up to 1024) are out of range, or memory is lacking. */
FUSED_RNN_API fused_rnn_stream* fused_rnn_stream_create(const fused_rnn_model* model, int64_t batch, int64_t threads);
FUSED_RNN_API void fused_rnn_stream_destroy(fused_rnn_stream* stream);

/* One step: x [B, I], y [B, P] out. They must not overlap. */
FUSED_RNN_API void fused_rnn_stream_step(fused_rnn_stream* stream, const float* x, float* y);
/* Several steps: x [T, B, I], y [T, B, P] out. The results are those of single steps, and come sooner. */
FUSED_RNN_API void fused_rnn_stream_chunk(fused_rnn_stream* stream, const float* x, int64_t steps, float* y);
/* Sets the state of the rows that are not 0 in rows [B], or of all rows if it is NULL, to zeros. */
FUSED_RNN_API void fused_rnn_stream_reset(fused_rnn_stream* stream, const uint8_t* rows);

/* The state: h [L, B, P], then for an LSTM c [L, B, H], in one array of so many floats. */
FUSED_RNN_API int64_t fused_rnn_stream_state_size(const fused_rnn_stream* stream);
FUSED_RNN_API void fused_rnn_stream_get_state(const fused_rnn_stream* stream, float* state);
FUSED_RNN_API void fused_rnn_stream_set_state(fused_rnn_stream* stream, const float* state);

#ifdef __cplusplus
}
#endif
#endif
