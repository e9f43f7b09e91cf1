"""Lower a function for an H200 (sm_90) with Inductor on a machine without a GPU; nothing is run.

The function is captured on CPU; its AOT graphs are traced anew on fake CUDA tensors and lowered as
far as the code, while stand-ins answer the questions of Inductor to torch.cuda and to the driver.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=141 << 30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 << 20,
    uuid="0",
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
    max_threads_per_block=1024,
)


def answers(value) -> Callable:
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def pretend_h200():
    """torch.cuda, Dynamo's device interface and Triton's driver speak of one H200."""
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as triton_support
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    cuda = dict(
        is_available=True,
        get_device_properties=H200,
        get_device_capability=(9, 0),
        current_device=0,
        device_count=1,
        get_device_name=H200.name,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
        _lazy_init=None,
        synchronize=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
        _get_device_properties=H200,
        is_bf16_supported=True,
        mem_get_info=(140 << 30, 141 << 30),
    )
    patches = [
        mock.patch(f"torch.cuda.{name}", answers(value), create=True)
        for name, value in cuda.items()
    ]
    patches += [
        mock.patch("torch.cuda._CudaDeviceProperties", types.SimpleNamespace, create=True),
        mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"),
        mock.patch.object(fake_tensor, "init_gpu_context", answers(None)),
    ]
    interface = dict(
        is_available=True, get_compute_capability=90, current_device=0, is_bf16_supported=True
    )
    patches += [
        mock.patch.object(CudaInterface, name, staticmethod(answers(value)))
        for name, value in interface.items()
    ]
    patches += [
        mock.patch.object(CudaInterface.Worker, name, staticmethod(answers(value)))
        for name, value in (("get_device_properties", H200), ("current_device", 0))
    ]
    driver = types.SimpleNamespace(
        get_current_target=answers(GPUTarget("cuda", 90, 32)),
        get_current_device=answers(0),
        get_device_interface=answers(None),
        get_current_stream=answers(0),
        utils=types.SimpleNamespace(
            get_device_properties=answers({"max_shared_mem": 232448, "multiprocessor_count": 132})
        ),
    )
    before = getattr(triton.runtime.driver, "_active", None)
    cached = [f for f in vars(triton_support).values() if hasattr(f, "cache_clear")]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for function in cached:
            function.cache_clear()
        triton.runtime.driver.set_active(driver)
        try:
            yield
        finally:
            triton.runtime.driver._active = before
            for function in cached:
                function.cache_clear()


class _Written(Exception):
    pass


class Traced(NamedTuple):
    """A graph, and its inputs."""

    graph: torch.fx.GraphModule
    inputs: list


def trace(function: Callable, *args, grad: bool = False) -> list[Traced]:
    """The AOT graph of `function(*args)`, args on CPU or fake; with grad forward and backward, of
    the result's sum.
    """
    from torch._inductor.decomposition import select_decomp_table

    traced = []

    def keep(graph, inputs):
        traced.append(Traced(graph, inputs))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        function,
        fullgraph=True,
        dynamic=False,
        backend=aot_autograd(
            fw_compiler=keep,
            bw_compiler=keep,
            decompositions=select_decomp_table,
            keep_inference_input_mutations=True,
            partition_fn=min_cut_rematerialization_partition,
        ),
    )
    with torch.set_grad_enabled(grad):
        result = compiled(*args)
        if grad:
            result.sum().backward()
    return traced


def on_cuda(graph: torch.fx.GraphModule, inputs: list) -> Traced:
    """The same, traced anew on fake CUDA tensors."""
    for node in graph.graph.nodes:
        node.kwargs = tree_map(
            lambda value: torch.device("cuda", 0) if isinstance(value, torch.device) else value,
            dict(node.kwargs),
        )
    graph.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            if isinstance(t, torch.Tensor)
            else t
            for t in inputs
        ]
        return Traced(make_fx(graph, tracing_mode="fake")(*inputs), inputs)


def lower(graph: torch.fx.GraphModule, inputs: list, look: Callable = lambda lowering: None) -> str:
    """The Python that Inductor writes for a graph of `on_cuda`. look(lowering) sees Inductor's
    GraphLowering when it is written.
    """
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    written = []
    generate = GraphLowering.codegen

    def codegen(self, *args, **kwargs):
        code = generate(self, *args, **kwargs)[0]
        look(self)
        written.append(getattr(code, "value", str(code)))
        raise _Written

    with (
        pretend_h200(),
        config.patch(compile_threads=1, force_disable_caches=True),
        tracing(TracingContext(detect_fake_mode(inputs))),
        mock.patch.object(GraphLowering, "codegen", codegen),
    ):
        try:
            compile_fx_inner(graph, inputs)
        except Exception:  # _Written, as Inductor wraps it
            if not written:
                raise
    return written[0]
