"""Modules with layer normalisation, zoneout, dropout of states and weights, layers of different sizes, recomputation.

They are tested against the papers' statements about training and evaluation, and the specification itself against loops
written out here. Single layers are tested in test_variants.py.
"""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

import fused_rnn
from contract import tensors
from fused_rnn import functional, policy
from fused_rnn.call import Arguments

NAMES = ("RNN", "LSTM", "GRU")
each_name = pytest.mark.parametrize("name", NAMES)


def lstm_written_out(x: Tensor, m: fused_rnn.LSTM) -> Tensor:
    """The equations of layer normalisation as in haste's LayerNormLSTM."""
    h = c = x.new_zeros(x.size(1), m.hidden_size)
    outputs = []
    for x_t in x:
        from_x = layer_norm(linear(x_t, m.weight_ih_l0), [4 * m.hidden_size]) * m.norm_ih_l0
        from_h = layer_norm(linear(h, m.weight_hh_l0), [4 * m.hidden_size]) * m.norm_hh_l0
        i, f, g, o = (from_x + from_h + m.bias_ih_l0 + m.bias_hh_l0).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, [m.hidden_size]) * m.norm_c_l0 + m.norm_c_bias_l0)
        outputs.append(h)
    return torch.stack(outputs)


def test_layer_norm_is_hastes() -> None:
    torch.manual_seed(0)
    m = fused_rnn.LSTM(4, 6, layer_norm=True, dtype=torch.float64)
    for name, norm in m.named_parameters():
        if name.startswith("norm"):
            nn.init.uniform_(norm)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(m(x)[0], lstm_written_out(x, m))


def module_and_input(name: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return getattr(fused_rnn, name)(4, options.pop("hidden_size", 6), **options), torch.randn(7, 5, 4)


OPTIONS: list[dict[str, Any]] = [
    {"layer_norm": True},
    {"zoneout": 0.3},
    {"recurrent_dropout": 0.3},
    {"weight_dropout": 0.3},
    {"hidden_size": [6, 9]},
    {"recompute": "full"},
    {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.2, "hidden_size": (5, 3, 4), "recompute": "full"},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))


@each_option
@each_name
def test_kernels_and_specification_agree(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same module and generator: in training, in evaluation, with resets and with lengths."""
    module, x = module_and_input(
        name, **{"num_layers": 2, "bidirectional": True, **fitting(options)}, dtype=torch.float64
    )
    x = x.double()
    for training, more in itertools.product(
        (True, False), ({}, {"resets": torch.rand(7, 5) < 0.3}, {"return_state_sequence": True})
    ):
        module.train(training)
        results = []
        for fusible in (None, lambda *tensors: False):
            with monkeypatch.context() as patch:
                if fusible:
                    patch.setattr(policy, "fusible", fusible)
                torch.manual_seed(1)
                outputs = tensors(module(x, **more))
                grads = torch.autograd.grad([o.sum() for o in outputs], list(module.parameters()))
            results.append([*outputs, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def fitting(options: dict[str, Any]) -> dict[str, Any]:
    """Add num_layers if hidden_size is a list."""
    return options | ({"num_layers": len(options["hidden_size"])} if "hidden_size" in options else {})


@each_option
@each_name
def test_state_is_handed_on(name: str, options: dict[str, Any]) -> None:
    """In evaluation, a sequence processed in two parts, or step by step, gives the same results."""
    module, x = module_and_input(name, **options)
    module.eval()
    whole, last = module(x)
    first, hx = module(x[:3])
    second, end = module(x[3:], hx)
    steps, state = [], None
    for x_t in x:
        y, state = module.step(x_t, state)
        steps.append(y)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(torch.stack(steps), whole)
    for found in (end, state):
        for a, b in zip(tensors(found), tensors(last), strict=True):
            torch.testing.assert_close(a, b)


@each_option
@each_name
def test_lengths(name: str, options: dict[str, Any]) -> None:
    """In evaluation, every row gives the same results as alone."""
    module, x = module_and_input(name, **options, bidirectional=True, dtype=torch.float64)  # LN of few units magnifies
    x = x.double()
    module.eval()
    lengths = torch.tensor([7, 0, 3, 1, 7])
    output, final = module(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        assert not output[length:, b].any()
        if length:
            alone, state = module(x[:length, b : b + 1])
            torch.testing.assert_close(output[:length, b : b + 1], alone)
            for a, e in zip(tensors(final), tensors(state), strict=True):
                torch.testing.assert_close(a[:, b : b + 1], e)


@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout"])
@each_name
def test_random_in_training_alone(name: str, option: str) -> None:
    module, x = module_and_input(name, **{option: 0.5})

    def twice(seeds: tuple[int, int]) -> tuple[Tensor, Tensor]:
        results = []
        for seed in seeds:
            torch.manual_seed(seed)
            results.append(module(x)[0])
        return results[0], results[1]

    assert torch.equal(*twice((1, 1)))  # reproducible by torch's generator
    assert not torch.equal(*twice((1, 2)))
    module.eval()
    assert torch.equal(*twice((1, 2)))


@each_name
def test_zoneout_keeps_its_share(name: str) -> None:
    """In training each unit keeps its old value with the given probability; evaluation uses the expectation."""
    rates = (0.25, 0.6) if name == "LSTM" else (0.25,)
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(3, 40, zoneout=rates if name == "LSTM" else rates[0])
    x = torch.randn(30, 50, 3)
    states = module(x, return_state_sequence=True)[2]
    for state, rate in zip(states if name == "LSTM" else (states,), rates, strict=True):
        kept = (state[1:] == state[:-1]).double().mean().item()
        assert abs(kept - rate) < 0.01  # 58,000 draws: more than five standard deviations
    module.eval()
    plain = getattr(fused_rnn, name)(3, 40)
    plain.load_state_dict(module.state_dict())
    hx = tensors(module(x)[1])
    old = hx if name == "LSTM" else hx[0]
    mixed, new = tensors(module.step(x[0], old)[1]), tensors(plain.step(x[0], old)[1])
    for before, m, n, rate in zip(hx, mixed, new, rates, strict=True):
        torch.testing.assert_close(m, rate * before + (1 - rate) * n)


@each_name
def test_recurrent_dropout_drops_the_same_units_at_every_step(name: str) -> None:
    """One mask for all steps, with expectation one."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(3, 64, recurrent_dropout=0.4)
    x, spec = torch.zeros(9, 200, 3), module._spec()
    found = Arguments(spec, x, None).layer_options(0, x, [*spec._flat_weights, None]).drop_h
    assert found.shape == (1, 200, 64)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert abs(found.mean().item() - 1) < 0.04  # of 12,800 draws


@each_name
def test_weight_dropout_drops_weights(name: str) -> None:
    module, x = module_and_input(name, weight_dropout=0.5)
    torch.manual_seed(1)
    dropped = torch.dropout(module.weight_hh_l0, 0.5, True)
    torch.manual_seed(1)
    actual = module(x)[0]
    options = {"weight_hh_l0": dropped}
    plain = getattr(fused_rnn, name)(4, 6)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(actual, torch.func.functional_call(plain, options, x)[0])
    actual.sum().backward()
    assert (module.weight_hh_l0.grad[dropped == 0] == 0).all()


def test_forget_bias() -> None:
    module = fused_rnn.LSTM(3, 4, 2, bidirectional=True, forget_bias=2.0)
    for layer, suffix in itertools.product((0, 1), ("", "_reverse")):
        both = [getattr(module, f"bias_{kind}_l{layer}{suffix}").chunk(4) for kind in ("ih", "hh")]
        assert (both[0][1] + both[1][1] == 2.0).all()
        assert both[0][0].unique().numel() > 1  # the other biases are torch.nn's
    module.forget_bias = 2.0  # as it is
    with pytest.raises(ValueError, match=r"forget_bias can only be set in the constructor, got 1\.0"):
        module.forget_bias = 1
    assert module.forget_bias == 2.0


@each_name
def test_sizes_of_layers(name: str) -> None:
    """Layers of different sizes equal single layers in sequence; their states are concatenated."""
    sizes = [6, 9, 4]
    module, x = module_and_input(name, hidden_size=sizes, bidirectional=True)
    single, width = [], 4
    for index, size in enumerate(sizes):
        layer = getattr(nn, name)(width, size, bidirectional=True)
        layer.load_state_dict(
            {k.replace(f"l{index}", "l0"): v for k, v in module.state_dict().items() if f"_l{index}" in k}
        )
        single.append(layer)
        width = 2 * size
    y, finals = x, []
    for layer in single:
        y, final = layer(y)
        finals.append(tensors(final))
    output, final = module(x)
    torch.testing.assert_close(output, y)
    for kind, expected in zip(tensors(final), zip(*finals, strict=True), strict=True):
        assert kind.shape == (2, 5, sum(sizes))
        torch.testing.assert_close(kind, torch.cat(expected, -1))


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"layer_norm": True, "bidirectional": True}], ids=str)
@each_name
def test_recompute_keeps_no_gates(name: str, options: dict[str, Any]) -> None:
    saved: list[int] = []
    results = []
    for recompute in ("none", "full"):
        module, x = module_and_input(name, recompute=recompute, **options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            output = module(x)[0]
        output.sum().backward()
        results.append([p.grad for p in module.parameters()])
        saved.append(-1)
    first, second = saved[: saved.index(-1)], saved[saved.index(-1) + 1 : -1]
    own = 7 * 5 * 6 * (2 if "bidirectional" in options else 1)  # one value for each step, row and unit
    assert max(first) > own >= max(second)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_name
def test_off_is_torchs(name: str) -> None:
    off = {"layer_norm": False, "zoneout": 0.0, "recurrent_dropout": 0.0, "weight_dropout": 0.0, "recompute": "none"}
    module, x = module_and_input(name, **off)
    torch.manual_seed(0)
    theirs = getattr(nn, name)(4, 6)
    assert repr(module) == repr(theirs)
    assert list(module.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(module(x)[0], theirs(x)[0])


@each_option
@each_name
def test_copies_and_states(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    module, x = module_and_input(name, **options)
    module.eval()
    expected = module(x)[0]
    torch.save(module, tmp_path / "module.pt")
    other, _ = module_and_input(name, **options)
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False), other.eval()):
        assert repr(copied) == repr(module)
        assert torch.equal(copied(x)[0], expected)


def test_a_rate_may_change() -> None:
    module, x = module_and_input("LSTM")
    plain = module(x)[0]
    module.zoneout = (0.5, 0.0)
    assert not torch.equal(module(x)[0], plain)
    module.zoneout = 0.0
    assert torch.equal(module(x)[0], plain)
    with pytest.raises(ValueError, match="zoneout"):
        module.zoneout = 1.5


@pytest.mark.parametrize("rate", [numpy.float32(0.25), numpy.float64(0.25), [0.25, 0.25], (0.25, 0)], ids=repr)
def test_rates_of_any_kind(rate: Any) -> None:
    assert fused_rnn.LSTM(3, 4, zoneout=rate).zoneout in (0.25, (0.25, 0.25), (0.25, 0.0))


def test_no_rates_are_no_variant() -> None:
    module = fused_rnn.LSTM(3, 4, zoneout=(0, 0.0))
    assert repr(module) == repr(nn.LSTM(3, 4))
    assert type(module.to_torch()) is nn.LSTM


@pytest.mark.parametrize("before", [False, True])
@each_name
def test_layer_norm_is_the_constructors(name: str, before: bool) -> None:
    """It cannot be changed later, because it determines the parameters."""
    module, x = module_and_input(name, layer_norm=before)
    module.layer_norm = before
    with pytest.raises(ValueError, match=r"layer_norm .*constructor"):
        module.layer_norm = not before
    assert module(x)[0].shape == (7, 5, 6)


def test_norms_are_parameters_like_others() -> None:
    """They can be parametrised and frozen, and a checkpoint without them is refused."""
    module, x = module_and_input("LSTM", layer_norm=True)
    expected = module(x)[0]
    nn.utils.parametrize.register_parametrization(module, "norm_hh_l0", Doubled())
    module.norm_c_l0.requires_grad_(False)
    torch.testing.assert_close(module(x)[0], expected)
    module(x)[0].sum().backward()
    assert module.parametrizations.norm_hh_l0.original.grad.abs().max() > 0
    assert module.norm_c_l0.grad is None
    plain = fused_rnn.LSTM(4, 6)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_ih_l0"):
        fused_rnn.LSTM(4, 6, layer_norm=True).load_state_dict(plain.state_dict())


class Doubled(nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        return 2 * original

    def right_inverse(self, wanted: Tensor) -> Tensor:
        return wanted / 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"zoneout": 1.0}, ValueError, r"zoneout .*\[0, 1\), got 1.0"),
        ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout"),
        ({"zoneout": "much"}, ValueError, "zoneout"),
        ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout .*got -0.1"),
        ({"weight_dropout": True}, ValueError, "weight_dropout .*got True"),
        ({"layer_norm": 1}, TypeError, "layer_norm should be of type bool, got: int"),
        ({"recompute": "half"}, ValueError, "recompute must be one of 'none', 'full', got 'half'"),
        ({"forget_bias": "yes"}, TypeError, "forget_bias"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs bias=True"),
        ({"hidden_size": []}, ValueError, "hidden_size"),
        ({"hidden_size": [3, 0]}, ValueError, "hidden_size"),
        ({"hidden_size": [3, True]}, ValueError, "hidden_size"),
        ({"hidden_size": [3, 4], "num_layers": 3}, ValueError, "hidden_size names 2 layers, but num_layers is 3"),
        ({"hidden_size": [3, 4], "proj_size": 3}, ValueError, "proj_size has to be smaller than hidden_size"),
        ({"zone_out": 0.5}, TypeError, "zone_out"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fused_rnn.LSTM(3, **{"hidden_size": 4, **options})


@pytest.mark.parametrize("options", [{"forget_bias": 1.0}, {"zoneout": (0.1, 0.1)}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_what_needs_c_is_the_lstms(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only supported for LSTM"):
        getattr(fused_rnn, name)(3, 4, **options)
    module = getattr(fused_rnn, name)(3, 4)
    for option, value in options.items():
        with pytest.raises(ValueError, match="only supported for LSTM"):
            setattr(module, option, value)


def test_every_layer_is_wider_than_the_projection() -> None:
    for arguments, options in (((3, [8, 4], 2, True, False, 0.0, False, 6), {}), ((3, [8, 4]), {"proj_size": 6})):
        with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
            fused_rnn.LSTM(*arguments, **options)


def test_input_size_is_missed() -> None:
    with pytest.raises(TypeError, match="input_size"):
        fused_rnn.LSTM(hidden_size=[3, 4])


@each_name
def test_states_side_by_side_are_checked(name: str) -> None:
    module, x = module_and_input(name, hidden_size=[6, 9])
    state = torch.zeros(2, 5, 9)
    with pytest.raises(RuntimeError, match=r"\(1, 5, 15\), got \[2, 5, 9\]"):
        module(x, (state, state) if name == "LSTM" else state)


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if "recompute" not in o or len(o) > 1], ids=lambda o: "-".join(o)
)
def test_torch_nn_cannot_take_its_place(options: dict[str, Any]) -> None:
    module, _ = module_and_input("GRU", **options)
    with pytest.raises(TypeError, match=r"torch\.nn has nothing"):
        module.to_torch()


def test_functional() -> None:
    """The options as arguments of the functions; the gains of layer normalisation are a separate list of tensors."""
    module, x = module_and_input("GRU", layer_norm=True, zoneout=0.2, recurrent_dropout=0.3, num_layers=2)
    norms = [p for name, p in module.named_parameters() if name.startswith("norm")]
    for training in (True, False):
        module.train(training)
        torch.manual_seed(1)
        expected, _ = module(x)
        torch.manual_seed(1)
        actual, _ = functional.gru(
            x, module._flat_weights, norms=norms, zoneout=0.2, recurrent_dropout=0.3, training=training
        )
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="norms"):
        functional.gru(x, module._flat_weights, norms=norms[:-1])
    with pytest.raises(ValueError, match=r"expected norms to be tensors, got \['NoneType'\]"):
        functional.gru(x, module._flat_weights, norms=[None])
    weights = fused_rnn.LSTM(4, 6)._flat_weights
    pairs = [functional.lstm(x, weights, zoneout=rates)[0] for rates in ([0.1, 0.2], (0.1, 0.2))]
    assert torch.equal(*pairs)


def test_functional_sizes_of_layers() -> None:
    module, x = module_and_input("LSTM", hidden_size=[6, 9])
    actual, expected = functional.lstm(x, module._flat_weights), module(x)
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert torch.equal(a, e)


def test_a_pickle_from_before_its_derived_attributes() -> None:
    """Derived attributes are recomputed from the options."""
    module = fused_rnn.LSTM(3, 5, zoneout=0.5).eval()
    state = {name: value for name, value in module.__dict__.items() if name != "_regularisation"}
    again = object.__new__(fused_rnn.LSTM)
    again.__setstate__(state)
    x = torch.randn(4, 2, 3)
    assert torch.equal(again(x)[0], module(x)[0])


def test_weights_are_freed_with_the_results() -> None:
    """No call makes a reference cycle, so memory is freed without the garbage collector."""
    x, leaves = torch.randn(4, 2, 3), [torch.randn(20, 3, requires_grad=True), torch.randn(20, 5, requires_grad=True)]
    weights = [w * 1 for w in leaves]
    freed = weakref.ref(weights[1])
    gc.disable()
    try:
        result = functional.lstm(x, weights)
        del weights, result
        assert freed() is None
    finally:
        gc.enable()
