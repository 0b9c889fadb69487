// The one list of cells. A cell is a policy struct: sizes, and its equations for one lane type V.
#pragma once

#include "../rnn_params.h"
#include "gru.h"
#include "lstm.h"
#include "rnn.h"

// X(kind, policy, name for messages)
#define FUSED_RNN_CELLS(X)               \
  X(kRnnTanh, RnnCell<Tanh>, "rnn_tanh") \
  X(kRnnRelu, RnnCell<Relu>, "rnn_relu") \
  X(kLstm, LstmCell, "lstm")             \
  X(kGru, GruCell, "gru")
