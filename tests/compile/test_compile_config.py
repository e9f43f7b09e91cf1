"""Contracts of compile_config.py: presets compute as eager does, in as many graphs as they say."""

from __future__ import annotations

import copy

import pytest
import torch

import compile_config as C
from model import Transformer
from testing import randomize, rms, small
from tools.compile_count import CompileCount

QUICK = "aot_eager"  # traces and partitions like Inductor, but generates no code


def build(**changes) -> Transformer:
    return randomize(Transformer(small(**changes)), seed=1).eval()


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape)))


def fresh(model: Transformer, batch: int = 2, max_seq_len: int = 256) -> Transformer:
    model.setup_caches(batch, max_seq_len)
    return model


PHASES = {
    "prefill": (C.compile_prefill, 40),
    "decode": (C.compile_decode, 1),
    "verify": (C.compile_verify, 4),
}


@pytest.mark.parametrize("region", ("model", "layer"))
@pytest.mark.parametrize("phase", PHASES)
def test_phases_equal_eager_without_recompiling(phase, region):
    torch._dynamo.reset()
    compile_phase, T = PHASES[phase]
    model = fresh(build())
    eager = fresh(copy.deepcopy(model))
    count = CompileCount()
    run = compile_phase(model, C.CompileConfig(backend=QUICK, region=region))
    calls = ([3, 130], None), ([3, 130], [T, 1]), ([0, 0], [1, T]), ([127, 4], [T, T])
    for i, (at, lengths) in enumerate(calls):
        if i == 2:
            count.warm()
        at, lengths = torch.tensor(at), None if lengths is None else torch.tensor(lengths)
        tokens = (tokens_of(2, T) + i) % 256
        expected = eager(tokens, at, lengths, logits="last" if phase == "prefill" else "all")
        got = run(tokens, at, lengths)
        assert got.shape == expected.shape and not got.requires_grad
        for row in range(2):
            all_valid = lengths is None or phase == "prefill"
            valid = slice(None) if all_valid else slice(int(lengths[row]))
            assert rms(got[row, valid], expected[row, valid]) <= 1e-5
    kinds = 4
    assert count.graphs == 2 * (1 if region == "model" else kinds + 2)  # without and with lengths
    assert count.breaks == 0 and count.recompiles == 0


def test_layers_of_one_kind_share_a_graph():
    torch._dynamo.reset()
    ratios = (*(4, 128) * 4, 4, 0)
    model = fresh(build(n_layers=9, n_hash_layers=1, compress_ratios=ratios))
    count, call = CompileCount(), (tokens_of(2, 1), torch.tensor([3, 4]))
    with torch.no_grad():
        expected = copy.deepcopy(model)(*call)
    decode = C.compile_decode(model, C.CompileConfig(backend=QUICK, region="layer"))
    assert rms(decode(*call), expected) <= 1e-5
    assert count.graphs == 3 + 2  # CSA hashed, HCA, CSA; before and after


def test_deep_models_are_compiled_by_layer_and_prefill_always():
    shallow, deep = build(), build(n_layers=13, n_hash_layers=0, compress_ratios=(4,) * 13 + (0,))
    cfg = C.PRESETS["default"]
    assert [
        C.compiles_by_layer(model, cfg, phase)
        for model in (shallow, deep)
        for phase in ("prefill", "decode")
    ] == [True, False, True, True]
    assert not C.compiles_by_layer(deep, C.PRESETS["eager"], "prefill")


def test_new_caches_are_noticed():
    """Guards are off: a phase must not go on with the graph of other caches or another batch."""
    torch._dynamo.reset()
    model = fresh(build(), max_seq_len=64)
    run = C.compile_decode(model, C.CompileConfig(backend=QUICK))
    run(tokens_of(2, 1), torch.tensor([1, 2]))
    for batch, size in ((2, 512), (1, 512)):
        fresh(model, 2, size)
        eager = copy.deepcopy(model)
        at = torch.full((batch,), 300)
        assert rms(run(tokens_of(batch, 1), at), eager(tokens_of(batch, 1), at)) <= 1e-5


@pytest.mark.parametrize("region", ("model", "layer"))
def test_hooks_set_after_compiling_are_honoured_and_removed_ones_forgotten(region):
    torch._dynamo.reset()
    model = fresh(build())
    run = C.compile_decode(model, C.CompileConfig(backend="eager", region=region))
    args = tokens_of(2, 1), torch.tensor([0, 0])
    plain = run(*args)
    hook = model.layers[1].attn.register_forward_hook(lambda m, args, out: (2 * out[0], out[1]))
    changed = run(*args)
    assert rms(changed, plain) > 1e-3 and rms(changed, model(*args)) <= 1e-5
    hook.remove()
    assert rms(run(*args), plain) <= 1e-5


def test_hooks_that_compiled_code_would_not_call_are_refused():
    """Of all modules; of the whole model, by layer; in training, after compiling."""
    model = build()
    model.setup_caches(2, 64)
    args = tokens_of(2, 1), torch.tensor([3, 0])
    run = C.compile_decode(model, C.CompileConfig(backend="eager", region="layer"))
    for register, says in (
        (model.register_forward_hook, "hook of the whole model"),
        (torch.nn.modules.module.register_module_forward_hook, "hooks of all modules"),
    ):
        handle = register(lambda *args: None)
        with pytest.raises(ValueError, match=says):
            run(*args)
        handle.remove()
    assert run(*args).isfinite().all()
    cfg = C.CompileConfig(backend="eager", region="layer")
    step = C.compile_train_step(model, torch.optim.SGD(model.parameters()), cfg)
    model.layers[0].attn_norm.register_full_backward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hooks changed"):
        step(*2 * (tokens_of(2, 8) % 256,), None, torch.tensor(0.0))


def test_arguments_that_were_one_tensor_stay_independent():
    """A phase compiled by a call whose positions and lengths are one tensor keeps them apart."""
    torch._dynamo.reset()
    model = fresh(build())
    eager = copy.deepcopy(model)
    run = C.compile_decode(model, C.CompileConfig(backend=QUICK))
    ones = torch.ones(2, dtype=torch.int64)
    run(tokens_of(2, 1), ones, ones)
    eager(tokens_of(2, 1), ones, ones)
    at = torch.tensor([2, 2])
    assert rms(run(tokens_of(2, 1), at, ones), eager(tokens_of(2, 1), at, ones)) <= 1e-5


def test_an_epilogue_is_part_of_the_graph():
    torch._dynamo.reset()
    model, count = fresh(build()), CompileCount()

    def epilogue(logits, input_pos, lengths, bonus):
        return logits.argmax(-1) + bonus, input_pos + lengths

    run = C.compile_decode(model, C.CompileConfig(backend=QUICK), epilogue)
    positions = torch.tensor([5, 6]), torch.tensor([1, 0])
    token, pos = run(tokens_of(2, 1), *positions, torch.tensor(1000))
    assert token.min() >= 1000 and pos.tolist() == [6, 6] and count.graphs == 1


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="CUDA"):
        C.compile_decode(fresh(build()), C.PRESETS["cudagraphs"])


@pytest.mark.parametrize("region", ("model", "layer"))
def test_a_compiled_training_step_equals_an_eager_one(region):
    """Two steps of AdamW with documents and changing rates: equal parameters, no recompile."""
    torch._dynamo.reset()
    model, count = build().train(), CompileCount()
    eager = copy.deepcopy(model)

    def compile_step(model, cfg):
        adamw = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.0), eps=1e-4)
        return C.compile_train_step(model, adamw, cfg)

    compiled_step = compile_step(model, C.CompileConfig(backend=QUICK, region=region))
    eager_step = compile_step(eager, C.PRESETS["eager"])
    for i, rate in enumerate((1e-3, 5e-4)):
        tokens = tokens_of(2, 97 + i)[:, :96] % 256
        docs = (torch.arange(96) >= torch.tensor([[40 + i], [7]])).long()
        inputs = tokens, tokens.roll(-1, 1), docs, torch.tensor(rate)
        got, expected = compiled_step(*inputs), eager_step(*inputs)
        assert abs(float(got["loss"]) / float(expected["loss"]) - 1) < 1e-5
        assert abs(float(got["mtp_loss"]) / float(expected["mtp_loss"]) - 1) < 1e-5
        if i == 0:
            count.warm()
    assert count.recompiles == 0 and count.breaks == 0
    start = build()
    expected, before = dict(eager.named_parameters()), dict(start.named_parameters())
    for name, p in model.named_parameters():
        q, p0 = expected[name], before[name]
        assert (p - q).norm() <= 1e-3 * (q - p0).norm().clamp(min=1e-6), name
    assert (model.head.weight - start.head.weight).abs().max() > 1e-4
