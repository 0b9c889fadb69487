"""The recipe "Add a cell" of CONTRIBUTING.md, followed step by step in a copy of the sources.

The cell is the minimal gated unit (Zhou et al. 2016), its gate after the recurrent product as in torch.nn.GRU. After
the recipe's fourth step the kernels compute it in every instruction set, with its gradients and all options.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from processes import python, succeeded
from sources import ROOT, copied, needs_sources, run

pytestmark = [
    needs_sources,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)"),
]

POLICY = """// Minimal gated unit (Zhou et al. 2016), its gate after the recurrent product as in torch.nn.GRU:
//   f = sigmoid(W_if x + b_if + W_hf h + b_hf)
//   n = tanh   (W_in x + b_in + f * (W_hn h + b_hn))
//   h' = (1 - f) * h + f * n
#pragma once

#include "math.h"

namespace fused_rnn {

struct MguCell {
  static constexpr int kGates = 2;
  static constexpr int kSaved = 3;  // f, n, W_hn h + b_hn
  static constexpr int kGrads = 3;  // dn, df, dn * f: W_ih x has the first two, as n f; W_hh h the last two
  static constexpr int kInputShift = 1;
  static constexpr int kHiddenGrads = 1;
  static constexpr bool kHasC = false;
  static constexpr bool kUsesH = true;
  static constexpr bool kSavesH = false;

  template <class V>
  static FUSED_RNN_INLINE void forward(const V (&x)[2], const V (&wh)[2], const V& h_prev, V&, V (&saved)[3], V& h) {
    const V f = math::sigmoid(x[0] + wh[0]);
    const V n = math::tanh(x[1] + f * wh[1]);
    h = h_prev + f * (n - h_prev);
    saved[0] = f, saved[1] = n, saved[2] = wh[1];
  }

  template <class V>
  static FUSED_RNN_INLINE void backward(const V (&saved)[3], const V& h_prev, const V&, const V& dh, V&, V (&grads)[3],
                                        V& dh_prev) {
    const V f = saved[0], n = saved[1];
    const V dn = dh * f * math::tanh_slope(n);
    grads[0] = dn;
    grads[1] = (dh * (n - h_prev) + dn * saved[2]) * math::sigmoid_slope(f);
    grads[2] = dn * f;
    dh_prev = dh - dh * f;
  }
};

}  // namespace fused_rnn
"""
KERNELS = """#include "instances.cuh"

namespace fused_rnn {
namespace cuda {

const Recurrence kMgu = Instances<MguCell>::table();

}  // namespace cuda
}  // namespace fused_rnn
"""
NEW = {"csrc/cells/NAME.h": POLICY, "csrc/cuda/NAME.cu": KERNELS}
CHANGES = {
    "csrc/rnn_params.h": [("kLstm, kGru }", "kLstm, kGru, kMgu }")],
    "csrc/cells/cells.h": [
        ('X(kGru, GruCell, "gru")', 'X(kGru, GruCell, "gru") X(kMgu, MguCell, "mgu")'),
        ('#include "lstm.h"\n', '#include "lstm.h"\n#include "mgu.h"\n'),
    ],
    "fused_rnn/reference.py": [
        ('"lstm", "gru")', '"lstm", "gru", "mgu")'),
        ('"gru": 3}', '"gru": 3, "mgu": 2}'),
        (
            '    raise ValueError(f"unknown cell',
            """    if cell == "mgu":
        x_f, x_n = from_x.chunk(2, dim=1)
        h_f, h_n = from_h.chunk(2, dim=1)
        f = (x_f + h_f).sigmoid()
        n = (x_n + f * h_n).tanh()
        return _mixed(h, (1 - f) * h + f * n, zone_h), None
    raise ValueError(f"unknown cell""",
        ),
    ],
}

CHECK = """
import torch
from fused_rnn import _C, layers, reference
from fused_rnn.options import LayerOptions

T, B, I, H, D = 6, 5, 3, 19, 2
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
    def random(*shape):
        return torch.randn(shape, dtype=dtype).mul_(0.5).requires_grad_()
    weights = [w for _ in range(D) for w in (random(2 * H, I), random(2 * H, H), random(2 * H), random(2 * H), None)]
    x, h0, fresh = random(T, B, I), random(D, B, H), random(D, B, H)
    constants = dict(resets=torch.rand(T, B) < 0.3, lengths=torch.tensor([6, 2, 0, 5, 6]))
    for options in (
        LayerOptions(),
        LayerOptions(**constants, reset_h=fresh),
        LayerOptions(drop_h=torch.rand(D, B, H).to(dtype), zone_h=torch.rand(T, B, D * H).to(dtype)),
        LayerOptions(norm_ih=random(D, 2 * H), norm_hh=random(D, 2 * H)),
    ):
        inputs = [t for t in (x, h0, *weights, options.reset_h, options.norm_ih, options.norm_hh) if t is not None]
        results = []
        for layer in (layers.layer, reference.layer):
            y, h_n, _ = layer("mgu", x, h0, None, weights, options)
            results.append((y, h_n, *torch.autograd.grad(y.square().sum() + h_n.sum(), inputs)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
print(_C.cpu_isa(), *_C.supported_cpu_isas())
"""


def change(folder: Path, path: str) -> None:
    if path in NEW:
        (folder / path.replace("NAME", "mgu")).write_text(NEW[path])
    else:
        text = (folder / path).read_text()
        for old, new in CHANGES[path]:
            assert text.count(old) == 1, (path, old)
            text = text.replace(old, new)
        (folder / path).write_text(text)


def test_the_recipe_names_every_file() -> None:
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("### Add a cell")[1].split("###")[0]
    assert sorted(re.findall(r"`([\w/]+\.\w+)`:", recipe)) == sorted([*NEW, *CHANGES])


def test_a_cell_missing_in_the_list_does_not_compile(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    change(folder, "csrc/rnn_params.h")
    for source in ("csrc/cells/cell_info.h", "csrc/cuda/recurrence.cpp"):
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Werror=switch", "-x", "c++", folder / source]
        compiled = run(*command)
        assert compiled.returncode != 0 and "kMgu" in compiled.stderr, compiled.stderr


@pytest.mark.slow("compiles the CPU kernels")
def test_a_new_cell(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for path in [*NEW, *CHANGES]:
        change(folder, path)
    setup = (folder / "setup.py").read_text()
    assert '"-O3"' in setup
    (folder / "setup.py").write_text(setup.replace('"-O3"', '"-O1"'))  # compiles in half the time

    succeeded(python("setup.py", "-q", "build_ext", "--inplace", cwd=folder, FUSED_RNN_CUDA="0", MAX_JOBS="2"))

    def check(**environment: str) -> list[str]:
        return succeeded(python("-c", CHECK, cwd=folder, PYTHONPATH=str(folder), **environment)).split()

    best, *all_isas = check()
    for isa in all_isas:
        if isa != best:
            assert check(FUSED_RNN_CPU_ISA=isa)[0] == isa
