"""Makes Triton's interpreter compute what a GPU computes. Used by conftest.py when
TRITON_INTERPRET=1.

The interpreter of every released Triton (3.6 to 3.9) keeps bfloat16 as uint16 and computes on those
bits, truncates where hardware rounds to nearest even, and loses carries and subnormals of e4m3.
Here values of these types pass through torch, whose casts are right, and arithmetic on bfloat16
happens in float32 with one rounding at the end, as on a GPU. And a kernel that touches memory of
none of its arguments is stopped, also where it makes nothing of what it reads there.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}  # conversions saturate, infinities too
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
COMPUTED_IN_FP32 = (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
)


def convert(array: np.ndarray, source, target) -> np.ndarray:
    """An array of the interpreter's, from one float type to another."""
    array = np.ascontiguousarray(array)
    values = torch.from_numpy(array.view(BITS[array.itemsize]).copy()).view(FLOATS[source])
    if target in LARGEST:
        values = values.float().clamp(-LARGEST[target], LARGEST[target])
    if values.dtype.itemsize == 1:
        values = values.float()
    values = values.to(FLOATS[target]).contiguous()
    bits = values.view(getattr(torch, f"uint{8 * values.dtype.itemsize}")).numpy()
    return bits.reshape(array.shape).view(interpreter._get_np_dtype(target))


def is_bf16(handle) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def widen(handle):
    return interpreter.TensorHandle(
        convert(handle.data, handle.dtype.scalar, tl.float32), tl.float32
    )


def narrow(handle):
    if handle.data.dtype == np.bool_:
        return handle
    return interpreter.TensorHandle(
        convert(np.asarray(handle.data, np.float32), tl.float32, tl.bfloat16), tl.bfloat16
    )


def install() -> None:
    """Replace what is wrong; once per process, before any kernel runs."""
    builder, original = interpreter.InterpreterBuilder, interpreter._convert_float
    if original is _convert_float:
        return
    _convert_float.original = original
    interpreter._convert_float = _convert_float
    builder.cast_impl = _cast
    builder.create_dot = _dot
    interpreter.GridExecutor.__call__ = _within_arguments(interpreter.GridExecutor.__call__)
    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
        setattr(builder, name, _guarded(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: narrow(
        interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
    )
    for name in COMPUTED_IN_FP32:
        setattr(builder, name, lambda self, handle, target: self.cast_impl(handle, target))
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, _in_fp32(getattr(builder, name)))


def _convert_float(array, source, target, rounding):
    if source in FLOATS and target in FLOATS:
        return convert(array, source, target)
    return _convert_float.original(array, source, target, rounding)


def _cast(self, handle, target_type):
    source, target = handle.dtype.scalar, target_type.scalar
    if source in FLOATS and target in FLOATS and source != target:
        return interpreter.TensorHandle(convert(handle.data, source, target), target)
    if source == tl.bfloat16:
        handle = widen(handle)
    if target == tl.bfloat16:
        return narrow(interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32))
    return interpreter.TensorHandle(handle.data.astype(interpreter._get_np_dtype(target)), target)


def _dot(self, a, b, accumulator, *_):
    a, b = (widen(t).data if t.dtype.scalar in (tl.bfloat16, *LARGEST) else t.data for t in (a, b))
    product = np.matmul(a, b, dtype=accumulator.data.dtype)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _in_fp32(operation):
    def call(self, *args):
        if any(is_bf16(a) for a in args):
            return narrow(operation(self, *[widen(a) if is_bf16(a) else a for a in args]))
        return operation(self, *args)

    return call


def _within_arguments(call):
    def launch(self, *args, **kwargs):
        """Note where the arguments lie: sorted starts and ends, after (0, 0)."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors]
        spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        starts, ends = np.array([(0, 0), *spans], np.uint64).T
        interpreter.interpreter_builder.memory = starts.copy(), np.maximum.accumulate(ends)
        return call(self, *args, **kwargs)

    return launch


def _guarded(access):
    """A load, store or atomic that stops where it touches no argument's memory."""
    names = list(inspect.signature(access).parameters)
    pointer = names.index("ptrs" if "ptrs" in names else "ptr") - 1  # without self
    mask = names.index("mask") - 1

    def checked(self, *args):
        pointers = args[pointer]
        addresses = pointers.data[args[mask].data.astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        starts, ends = self.memory

        def end_of(address):
            """End of the memory of the argument that begins last before the address."""
            return ends[np.searchsorted(starts, address, "right") - 1]

        # Mostly all lie in one tensor: the least and the largest tell
        if addresses.size and addresses.max() + size > end_of(addresses.min()):
            addresses = np.unique(addresses)
            outside = addresses[addresses + size > end_of(addresses)]
            if len(outside):
                message = f"{len(outside)} addresses outside of all arguments"
                raise IndexError(f"{access.__name__}: {message}")
        return access(self, *args)

    return checked
