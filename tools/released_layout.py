"""The released layout: the tensors of a checkpoint, their names, dtypes and shapes. Reads no data.

Number formats are mixed, and told apart by the dtype on disk alone (docs/v4.md#checkpoint):

    routed experts     fp4    two e2m1 codes a byte, I8 [o, i / 2]   scale F8_E8M0 [o, i / 32]
                       fp8    (Base) F8_E4M3 [o, i]                  scale F32 or F8_E8M0
    Linear(fp8=True)   fp8    F8_E4M3 [o, i]                         [o / 128, i / 128], rounded up
    both               bf16   not quantised
    everything else           BF16; hc_*, ape, attn_sink, gate.bias F32; tid2eid I64

The scale of `x.weight` is `x.scale`, and the matrix is value times scale. Names are the model's
parameter names, except for the routed experts: the model stacks them, files hold them one by one
as `ffn.experts.{e}.w1.weight`, w2, w3.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from model import Experts, Linear, ModelArgs, Transformer
from tools.safetensors_folder import DTYPE_NAMES, CheckpointError, Folder, TensorInfo

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
PACKED = {torch.int8: "fp4", E4M3: "fp8"}  # dtype on disk -> format
WEIGHT_DTYPES = {  # on disk, by kind of tensor (see CheckpointTensor)
    "experts": (torch.int8, E4M3, *FLOATS),
    "linears": (E4M3, *FLOATS),
    "float": FLOATS,
    "int": (torch.int64, torch.int32),
}
SCALE_DTYPES = {"fp4": (E8M0,), "fp8": (E8M0, torch.float32)}
FORMATS = {"experts": ("fp4", "fp8", "bf16"), "linears": ("fp8", "bf16")}
BLOCK = 128  # of FP8 scales; also rows converted at a time, so that fp32 intermediates stay small


class CheckpointTensor(NamedTuple):
    """A tensor of a checkpoint as a view of the model's memory: copying into it loads it.

    kind  "experts" or "linears" (matrices that may be quantised), "scale" (theirs), "float", "int"
    """

    kind: str
    view: torch.Tensor


def empty_model(
    args: ModelArgs, dtype: torch.dtype = torch.bfloat16, ops: dict[str, str] | None = None
) -> Transformer:
    """A Transformer on the meta device, with parameters of `dtype` (fp32 islands excepted)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Transformer(args, ops)
    finally:
        torch.set_default_dtype(default)


def checkpoint_tensors(model: Transformer) -> dict[str, CheckpointTensor]:
    """The tensors of a checkpoint of `model` by their names on disk. Nothing is copied."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        if tensor.dtype == torch.uint8:  # e8m0 scales; the model keeps their bits
            tensor = tensor.view(E8M0)
        if isinstance(module, Experts):
            is_scale = leaf.endswith("_scale")
            kind, suffix = ("scale", "scale") if is_scale else ("experts", "weight")
            for e, matrix in enumerate(tensor):
                if leaf.startswith("w13"):
                    w1, w3 = matrix.chunk(2)
                    tensors[f"{prefix}.{e}.w1.{suffix}"] = CheckpointTensor(kind, w1)
                    tensors[f"{prefix}.{e}.w3.{suffix}"] = CheckpointTensor(kind, w3)
                else:
                    tensors[f"{prefix}.{e}.w2.{suffix}"] = CheckpointTensor(kind, matrix)
            continue
        if isinstance(module, Linear) and module.fp8:
            kind = "scale" if leaf == "scale" else "linears"
        else:
            kind = "float" if tensor.is_floating_point() else "int"
        tensors[name] = CheckpointTensor(kind, tensor)
    return tensors


def scale_name(name: str) -> str:
    """`x.weight` -> `x.scale`."""
    return name.removesuffix("weight") + "scale"


def stored_as(
    name: str, shape: tuple[int, ...], fmt: str, dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """The tensors on disk that hold a tensor in format `fmt`; "bf16" is plain, in `dtype`."""
    if fmt == "bf16":
        return {name: TensorInfo(dtype, tuple(shape))}
    rows, cols = shape
    if fmt == "fp8":
        weight = TensorInfo(E4M3, (rows, cols))
        scale = TensorInfo(E8M0, (-(-rows // BLOCK), -(-cols // BLOCK)))
    elif cols % 2 == 0:
        weight = TensorInfo(torch.int8, (rows, cols // 2))
        scale = TensorInfo(E8M0, (rows, -(-cols // 32)))
    else:
        raise CheckpointError(
            f"tensor '{name}' has {cols} columns, which fp4 cannot pack in pairs: "
            "choose fp8 or bf16"
        )
    return {name: weight, scale_name(name): scale}


def tensor_infos(tensors: dict[str, CheckpointTensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.view.dtype, tuple(t.view.shape)) for name, t in tensors.items()}


class ExportPlan(NamedTuple):
    """The tensors that a checkpoint is to hold, in order, and the matrices that change format."""

    tensors: dict[str, TensorInfo]
    requantize: dict[str, str]  # name -> new format


def plan_export(
    plain: dict[str, CheckpointTensor],
    now: dict[str, TensorInfo],
    experts: str | None,
    linears: str | None,
    dtype: torch.dtype | None,
) -> ExportPlan:
    """`plain` are the tensors of an unquantised model, `now` says how they are stored at present.

    experts, linears: their new format; dtype: of plain tensors. None leaves either as it is.
    """
    chosen = {"experts": experts, "linears": linears}
    for kind, fmt in chosen.items():
        if fmt not in (None, *FORMATS[kind]):
            raise ValueError(f"{kind} is {fmt!r}: choose from {', '.join(FORMATS[kind])}")
    plan = ExportPlan({}, {})
    for name, (kind, view) in plain.items():
        old = PACKED.get(now[name].dtype, "bf16")
        new = chosen.get(kind) or old
        # fp32 islands and integers keep their dtype, except that norm weights are stored as plain
        island = view.dtype in (torch.float32, torch.int64) and not name.endswith("norm.weight")
        if new != old:
            plan.requantize[name] = new
            plan.tensors.update(stored_as(name, view.shape, new, dtype or torch.bfloat16))
        elif old != "bf16":
            plan.tensors.update({part: now[part] for part in (name, scale_name(name))})
        elif dtype is None or island:
            plan.tensors[name] = now[name]
        else:
            plan.tensors[name] = TensorInfo(dtype, now[name].shape)
    return plan


def layout(
    args: ModelArgs, experts: str = "fp4", linears: str = "fp8", dtype: torch.dtype = torch.bfloat16
) -> dict[str, TensorInfo]:
    """name -> (dtype, shape) of every tensor in a release of this architecture.

    dtype is that of plain tensors. Source: docs/v4.md#checkpoint.
    """
    tensors = checkpoint_tensors(empty_model(args))
    return plan_export(tensors, tensor_infos(tensors), experts, linears, dtype).tensors


def problems(folder: Folder, tensors: dict[str, CheckpointTensor]) -> list[str]:
    """A line for every tensor that is missing, misshapen, of a wrong dtype, or unexpected.

    `tensors` are those of an unquantised model. Reads no data.
    """
    found = folder.tensors
    expected, lines = set(), []
    for name, (kind, view) in tensors.items():
        dtype = found[name].dtype if name in found else view.dtype
        fmt = PACKED.get(dtype, "bf16") if dtype in WEIGHT_DTYPES[kind] else "bf16"
        for part, want in stored_as(name, view.shape, fmt, dtype).items():
            expected.add(part)
            allowed = WEIGHT_DTYPES[kind] if part == name else SCALE_DTYPES[fmt]
            if part not in found:
                lines.append(
                    f"{folder.path}: tensor '{part}' is missing; is the download complete, "
                    "is config.json its own?"
                )
                continue
            where, info = f"{folder.files[part]}: tensor '{part}'", found[part]
            if info.dtype not in allowed:
                names = " or ".join(DTYPE_NAMES[dtype] for dtype in allowed)
                lines.append(f"{where} is {DTYPE_NAMES[info.dtype]}, not {names}; convert it")
            elif info.shape != want.shape:
                lines.append(
                    f"{where} has shape {list(info.shape)}, not {list(want.shape)} "
                    "as config.json makes it; is that its own?"
                )
    for name in sorted(found.keys() - expected):
        lines.append(
            f"{folder.files[name]}: tensor '{name}' is unexpected; is config.json its own?"
        )
    return lines


def check(folder: Folder, tensors: dict[str, CheckpointTensor]) -> None:
    """Raise CheckpointError with the first of `problems`; print the folder's note if none."""
    lines = problems(folder, tensors)
    if lines:
        more = f" ({len(lines) - 1} more: see `checkpoint.py inspect`)" if lines[1:] else ""
        raise CheckpointError(lines[0] + more)
    if folder.note:
        print(folder.note, file=sys.stderr)
