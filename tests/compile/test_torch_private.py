"""Contracts of tools/torch_private.py: compiles that share nothing, and the compiler for CPU."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.cpp_builder as builder
from torch._inductor.runtime import cache_dir_utils

import compile_config as C
from model import Transformer
from testing import randomize, rms, small
from tools import torch_private

pytestmark = pytest.mark.compile
SHAPES = {"wide": dict(dim=96), "narrow": dict(dim=64)}
AT = torch.tensor([3, 7])


def build(name: str) -> Transformer:
    layers = dict(n_layers=2, n_hash_layers=1, n_mtp_layers=0, compress_ratios=(0, 4))
    model = randomize(Transformer(small(**layers, **SHAPES[name])), seed=1)
    model.eval().setup_caches(2, 64)
    return model


def tokens() -> torch.Tensor:
    return torch.tensor([[5], [9]])


@pytest.fixture(params=("isolated", "cloned"))
def isolation(request, monkeypatch):
    """As on torch 2.13, and as on torch 2.11, which cannot isolate compiles."""
    if request.param == "isolated" and not torch_private.ISOLATES_RECOMPILES:
        pytest.skip("torch.compile has no isolate_recompiles here")
    monkeypatch.setattr(torch_private, "ISOLATES_RECOMPILES", request.param == "isolated")
    torch._dynamo.reset()


@pytest.fixture
def unguarded(monkeypatch):
    """Phases of every backend drop their guards, not of Inductor alone."""
    isolated = torch_private.compile_isolated

    def compile_unguarded(function, name, **options):
        options["options"] = {"guard_filter_fn": torch_private.skip_all_guards}
        return isolated(function, name, **options)

    monkeypatch.setattr(torch_private, "compile_isolated", compile_unguarded)


def test_entries_without_guards_are_found_by_their_own_compile_alone(isolation, unguarded):
    def rows_times(x):
        return x * x.shape[0]

    options = dict(backend="eager", fullgraph=True, dynamic=False)
    two, three = (torch_private.compile_isolated(rows_times, "f", **options) for _ in range(2))
    for _ in range(2):
        assert two(torch.ones(2)).tolist() == [2, 2]
        assert three(torch.ones(3)).tolist() == [3, 3, 3]
    assert two(torch.ones(3)).tolist() == [2, 2, 2]  # unsafe, as its name says


@pytest.mark.parametrize("region", ("model", "layer"))
@pytest.mark.parametrize("names", [("wide", "narrow"), ("narrow", "wide")])
def test_models_of_different_shapes_in_one_process_each_get_their_own_graphs(
    isolation, unguarded, names, region
):
    """Phases drop their guards: an entry found by another model's phase would match any call."""
    cfg = C.CompileConfig(backend="eager", region=region)
    models = {name: build(name) for name in names}
    expected = {name: model(tokens(), AT) for name, model in models.items()}
    phases = {name: C.compile_decode(model, cfg) for name, model in models.items()}
    for name in (*names, *names):  # the second round finds its entries
        assert rms(phases[name](tokens(), AT), expected[name]) <= 1e-5, name


@pytest.mark.parametrize("guarded_first", (True, False))
def test_a_phase_and_a_guarded_compile_of_the_same_model_do_not_meet(
    isolation, unguarded, guarded_first
):
    """The model compiled as a whole by its user, beside a phase of another model."""
    wide, narrow = build("wide"), build("narrow")
    expected = wide(tokens(), AT), narrow(tokens(), AT)
    phase = C.compile_decode(wide, C.CompileConfig(backend="eager", region="model"))
    compiled = torch.compile(narrow, backend="eager", fullgraph=True, dynamic=False)
    calls = [(phase, expected[0]), (compiled, expected[1])]
    for run, result in calls[:: -1 if guarded_first else 1] * 2:
        with torch.no_grad():
            assert rms(run(tokens(), AT), result) <= 1e-5


def test_isolated_compiles_are_counted_each_on_its_own(isolation):
    """More compiles of one function than Dynamo's limit for one of them allows."""

    def double(x):
        return 2 * x

    for i in range(2 * torch._dynamo.config.recompile_limit):
        run = torch_private.compile_isolated(
            double, "double", backend="eager", fullgraph=True, dynamic=False
        )
        assert run(torch.ones(i + 1)).sum() == 2 * (i + 1)


def test_phases_are_not_limited_by_their_number(isolation):
    model, cfg = build("narrow"), C.CompileConfig(backend="eager", region="model")
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        for _ in range(4):
            C.compile_decode(model, cfg)(tokens(), AT)


def test_a_missing_compiler_for_cpu_is_named(monkeypatch):
    assert torch_private.missing_cpu_toolchain() is None
    monkeypatch.setattr(torch_private.sysconfig, "get_path", lambda name: "/nowhere")
    assert "Python.h" in torch_private.missing_cpu_toolchain()

    def fail():
        raise RuntimeError("none")

    monkeypatch.setattr(builder, "get_cpp_compiler", fail)
    assert "g++" in torch_private.missing_cpu_toolchain()


SCRIPTS = {  # compilers that say their version and compile nothing
    "fails": "#!/bin/sh\n[ $1 = --version ] && echo g++ 13 || { echo internal error >&2; exit 1; }",
    "dies": "#!/bin/sh\n[ $1 = --version ] && echo g++ 13 || kill -9 $$",
    "writes nothing": "#!/bin/sh\necho g++ 13",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiler_that_does_not_work_is_missing(monkeypatch, tmp_path, name):
    (tmp_path / "g++").write_text(SCRIPTS[name])
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setattr(builder, "get_cpp_compiler", lambda: str(tmp_path / "g++"))
    lacks = torch_private.missing_cpu_toolchain()
    assert "a C++ compiler that works" in lacks and "\n" not in lacks


@pytest.mark.parametrize("name", ("{}/file", "{}/file/cache", "/proc/cache", "/sys/kernel"))
def test_a_cache_folder_that_cannot_be_used_is_named(monkeypatch, tmp_path, name):
    (tmp_path / "file").touch()
    path = name.format(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
    lacks = torch_private.missing_cpu_toolchain()
    assert path in lacks and "TORCHINDUCTOR_CACHE_DIR" in lacks and "\n" not in lacks


def test_a_disabled_compiler_is_missing():
    with torch._dynamo.config.patch(disable=True):
        assert "TORCH_COMPILE_DISABLE" in torch_private.missing_cpu_toolchain()


@pytest.mark.parametrize("named", (True, False))
def test_the_cache_folder_is_that_of_inductor(monkeypatch, tmp_path, named):
    if named:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    else:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    ours = torch_private.cache_dir()
    assert str(ours) == cache_dir_utils.cache_dir() and ours.is_dir()
    assert str(torch_private.default_cache_dir()) == cache_dir_utils.default_cache_dir()
