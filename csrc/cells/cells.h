// The list of all cells, from which every switch over cells is generated.
//
// A cell is a policy struct: its sizes and its equations, as templates of the lane type V (a SIMD vector or a scalar),
// so that the CPU and CUDA kernels share them. csrc/cells/rnn.h documents the members.
#pragma once

#include "../rnn_params.h"
#include "gru.h"
#include "lstm.h"
#include "rnn.h"

// X(CellKind, policy, name in messages and in Python)
#define FUSED_RNN_CELLS(X)               \
  X(kRnnTanh, RnnCell<Tanh>, "rnn_tanh") \
  X(kRnnRelu, RnnCell<Relu>, "rnn_relu") \
  X(kLstm, LstmCell, "lstm")             \
  X(kGru, GruCell, "gru")
