"""Checkpoints in the released layout, in and out: FP4, FP8 and BF16, streamed tensor by tensor (docs/v4.md#checkpoint).

A checkpoint is a folder: `config.json` (docs/v4.md#checkpoint), `model.safetensors` or shards `model-00001-of-000NN.safetensors` with
`model.safetensors.index.json`, and the tokenizer's files. Formats are mixed, and told apart by dtype on disk alone:

    routed experts     fp4    two e2m1 codes a byte, I8 [o, i / 2]    scale F8_E8M0 [o, ceil(i / 32)]
                       fp8    (Base) F8_E4M3 [o, i]                   scale F32 or F8_E8M0 [ceil(o / 128), ceil(i / 128)]
    Linear(fp8=True)   fp8    F8_E4M3 [o, i]                          scale likewise
    either             bf16   not quantised
    the rest                  BF16; hc_*, ape, attn_sink, gate.bias F32; tid2eid I64

The scale of `x.weight` is `x.scale`, and the matrix is value times scale. Names are the model's own, except that the model
stacks the routed experts, which files hold one by one: `ffn.experts.{e}.w1.weight`, then w2, w3.

    python checkpoint.py inspect PATH [--json]
    python checkpoint.py slice PATH OUT --layers N [--no-mtp]
    python checkpoint.py convert PATH OUT [--experts fp4|fp8|bf16] [--linears fp8|bf16]
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from model import Experts, Linear, ModelArgs, Transformer
from ops.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8
from tools import cli

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": E4M3,
    "F8_E8M0": E8M0,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS, PACKED = (torch.bfloat16, torch.float32, torch.float16), {torch.int8: "fp4", E4M3: "fp8"}
ALLOWED = {
    "experts": (torch.int8, E4M3, *FLOATS),
    "linears": (E4M3, *FLOATS),
    "float": FLOATS,
    "int": (torch.int64, torch.int32),
    "fp4": (E8M0,),
    "fp8": (E8M0, torch.float32),
}  # dtypes on disk by kind of tensor; scales by format
FORMATS = {"experts": ("fp4", "fp8", "bf16"), "linears": ("fp8", "bf16")}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
BLOCK = (
    128  # of FP8; also the rows that are converted at a time, so that fp32 intermediates stay small
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line naming the file, the tensor and the remedy."""


class Info(NamedTuple):
    """What a safetensors header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The layout


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


Slots = dict[
    str, tuple[str, torch.Tensor]
]  # released name -> (kind, "scale" or as in ALLOWED; view of the model's memory)


def released(model: Transformer) -> Slots:
    """What a checkpoint of `model` holds. Nothing is copied: writing to a view loads it."""
    slots = {}
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        tensor = tensor.view(E8M0) if tensor.dtype == torch.uint8 else tensor
        if isinstance(module, Experts):
            kind, suffix = ("scale", "scale") if leaf.endswith("_scale") else ("experts", "weight")
            for e, matrix in enumerate(tensor):
                for part, view in (
                    zip(("w1", "w3"), matrix.chunk(2))
                    if leaf.startswith("w13")
                    else [("w2", matrix)]
                ):
                    slots[f"{prefix}.{e}.{part}.{suffix}"] = kind, view
        elif isinstance(module, Linear) and module.fp8:
            slots[name] = "scale" if leaf == "scale" else "linears", tensor
        else:
            slots[name] = "float" if tensor.is_floating_point() else "int", tensor
    return slots


def scale_name(name: str) -> str:
    """`x.weight` -> `x.scale`."""
    return name.removesuffix("weight") + "scale"


def stored(name: str, shape: tuple[int, ...], fmt: str, dtype: torch.dtype) -> dict[str, Info]:
    """The tensors on disk that hold a tensor in format `fmt`, scales as e8m0; "bf16" is plain, in `dtype`."""
    if fmt == "bf16":
        return {name: Info(dtype, tuple(shape))}
    rows, cols = shape
    if fmt == "fp8":
        return {
            name: Info(E4M3, (rows, cols)),
            scale_name(name): Info(E8M0, (-(-rows // BLOCK), -(-cols // BLOCK))),
        }
    if cols % 2:
        raise CheckpointError(
            f"tensor '{name}' has {cols} columns, which fp4 cannot pack in pairs: choose fp8 or bf16"
        )
    return {
        name: Info(torch.int8, (rows, cols // 2)),
        scale_name(name): Info(E8M0, (rows, -(-cols // 32))),
    }


def infos(slots: Slots) -> dict[str, Info]:
    return {name: Info(view.dtype, tuple(view.shape)) for name, (_, view) in slots.items()}


def make_plan(
    slots: Slots,
    have: dict[str, Info],
    experts: str | None,
    linears: str | None,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Info], dict[str, tuple[str, torch.dtype]]]:
    """The tensors to write, and the matrices among them that change format: name -> (format, dtype if plain).

    `slots` are those of a plain model, `have` says how its tensors are stored. A format or dtype of None leaves them so.
    """
    chosen, plan, recode = {"experts": experts, "linears": linears}, {}, {}
    for kind, fmt in chosen.items():
        if fmt not in (None, *FORMATS[kind]):
            raise ValueError(f"{kind} is {fmt!r}: choose from {', '.join(FORMATS[kind])}")
    for name, (kind, view) in slots.items():
        fmt = PACKED.get(have[name].dtype, "bf16")
        if chosen.get(kind) not in (None, fmt):
            recode[name] = chosen[kind], dtype or torch.bfloat16
            plan.update(stored(name, view.shape, *recode[name]))
        elif fmt != "bf16":
            plan.update({part: have[part] for part in (name, scale_name(name))})
        elif (
            dtype is None
            or view.dtype in (torch.float32, torch.int64)
            and not name.endswith("norm.weight")
        ):
            plan[name] = have[name]  # fp32 islands stay so, except norm weights
        else:
            plan[name] = Info(dtype, have[name].shape)
    return plan, recode


def layout(
    args: ModelArgs, experts: str = "fp4", linears: str = "fp8", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Info]:
    """name -> (dtype, shape) of every tensor in a release of this architecture (docs/v4.md#checkpoint); dtype is that of plain tensors."""
    slots = released(empty_model(args))
    return make_plan(slots, infos(slots), experts, linears, dtype)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


class Folder:
    """A checkpoint on disk. Opening it reads headers only: `tensors` maps names to Info, `files` to the files that hold them.

    note is what the user should know about a sound folder, or empty.
    """

    note = ""

    def __init__(self, path):
        self.path, self.tensors, self.files, self._handles = Path(path), {}, {}, {}
        index, places = self.path / INDEX, None
        if index.exists():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                assert isinstance(places, dict) and all(
                    isinstance(file, str) for file in places.values()
                )
            except (OSError, ValueError, TypeError, KeyError, AssertionError):
                raise CheckpointError(
                    f"{index}: not a JSON object with a weight_map of tensors to files; download it"
                ) from None
        for file in ["model.safetensors"] if places is None else sorted(set(places.values())):
            self._read_header(self.path / file)
        held = {name: file.name for name, file in self.files.items()}
        if places not in (None, held):
            name = min(held.items() ^ places.items())[0]
            raise CheckpointError(
                f"{index}: '{name}' should be in {places.get(name)}, but is in {held.get(name)}; download both"
            )

    def _read_header(self, file: Path) -> None:
        try:
            # "pread" reads into plain memory: with "mmap" resident memory would grow by the pages of the whole checkpoint
            handle = self._handles[file] = safe_open(file, "pt", backend="pread")
            headers = {name: handle.get_slice(name) for name in handle.keys()}
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing; is the download complete?") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: damaged or incomplete ({error}); download it again"
            ) from None
        for name, header in headers.items():
            if (code := header.get_dtype()) not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor '{name}' is {code}, which no V4 release uses; convert it"
                )
            self.tensors[name], self.files[name] = (
                Info(DTYPES[code], tuple(header.get_shape())),
                file,
            )

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor into host memory."""
        return self._handles[self.files[name]].get_tensor(name)


def open_folder(path, layers: int | None = None, mtp: bool = True) -> tuple[Folder, ModelArgs]:
    """A folder and its architecture, both cut to the first `layers` layers and to the MTP block, if it is one.

    The -0731 release keeps its drafter under `mtp.*`, a block of another kind (docs/v4.md#later-variants), and some folders hold no `mtp.*`
    at all: then MTP is off, and the folder's note says so. CheckpointError if the folder or its config cannot be used.
    """
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{path}: no such folder; a checkpoint is a folder with config.json and model.safetensors"
        )
    try:
        args = ModelArgs.from_json(Path(path) / "config.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    folder = Folder(path)
    for name in folder.tensors:
        if name.startswith("model."):
            raise CheckpointError(
                f"{folder.files[name]}: '{name}' begins with 'model.', released names do not; rename tensors"
            )
    total, keep = args.n_layers, args.n_layers if layers is None else layers
    if not 1 <= keep <= total:
        raise CheckpointError(
            f"{path}: has {total} layers, so {layers} cannot be taken; choose 1 to {total}"
        )
    blocks = [name for name in folder.tensors if name.startswith("mtp.")]
    drafter = any(
        part in name for name in blocks for part in ("main_proj", "markov_head", "confidence_head")
    )
    n_mtp = args.n_mtp_layers if blocks and mtp and not drafter else 0
    if mtp and blocks and not n_mtp:
        folder.note = f"{path}: mtp.* holds a drafter that is not the MTP block of V4; it is left out, MTP is off"
    elif mtp and args.n_mtp_layers and not blocks:
        folder.note = f"{path}: no mtp.* tensors, so MTP is off"
    left_out = tuple(f"layers.{i}." for i in range(keep, total)) + ("mtp.",) * (not n_mtp)
    folder.tensors = {
        name: info for name, info in folder.tensors.items() if not name.startswith(left_out)
    }
    return folder, dataclasses.replace(
        args,
        n_layers=keep,
        n_hash_layers=min(args.n_hash_layers, keep),
        n_mtp_layers=n_mtp,
        compress_ratios=args.compress_ratios[:keep] + args.compress_ratios[total : total + n_mtp],
    )


def problems(folder: Folder, slots: Slots) -> list[str]:
    """A line for every tensor that is missing, of a wrong dtype or shape, or unexpected. Reads no data."""
    found, expected, lines = folder.tensors, set(), []
    for name, (kind, view) in slots.items():
        dtype = found[name].dtype if name in found else view.dtype
        fmt = PACKED.get(dtype, "bf16") if dtype in ALLOWED[kind] else "bf16"
        for part, want in stored(name, view.shape, fmt, dtype).items():
            expected.add(part)
            allowed = ALLOWED[kind] if part == name else ALLOWED[fmt]
            if part not in found:
                lines.append(
                    f"{folder.path}: tensor '{part}' is missing; is the download complete, is config.json its own?"
                )
            elif found[part].dtype not in allowed:
                lines.append(
                    f"{folder.files[part]}: tensor '{part}' is {CODES[found[part].dtype]}, not "
                    f"{' or '.join(CODES[dtype] for dtype in allowed)}; convert it"
                )
            elif found[part].shape != want.shape:
                lines.append(
                    f"{folder.files[part]}: tensor '{part}' has shape {list(found[part].shape)}, not {list(want.shape)} "
                    "as config.json makes it; is that its own?"
                )
    return lines + [
        f"{folder.files[name]}: tensor '{name}' is unexpected; is config.json its own?"
        for name in sorted(found.keys() - expected)
    ]


def check(folder: Folder, slots: Slots) -> None:
    """Raise CheckpointError with the first of `problems`; say the folder's note if there is none."""
    if lines := problems(folder, slots):
        raise CheckpointError(
            lines[0]
            + (f" ({len(lines) - 1} more: see `checkpoint.py inspect`)" if lines[1:] else "")
        )
    if folder.note:
        print(folder.note, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def _rows(weight: torch.Tensor, scale: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """A stored matrix, BLOCK rows at a time: which rows, and their values (in fp32 if packed: exact for e8m0 scales)."""
    for r in range(0, weight.shape[0], BLOCK):
        rows = slice(r, r + BLOCK)
        if weight.dtype == torch.int8:
            yield rows, dequantize_fp4(weight[rows], scale[rows], torch.float32)
        elif weight.dtype == E4M3:
            yield (
                rows,
                dequantize_fp8(weight[rows], scale[r // BLOCK : r // BLOCK + 1], torch.float32),
            )
        else:
            yield rows, weight[rows]


def _progress(sizes: dict[str, int], what: str) -> Iterator[str]:
    """Yield the names; if stderr is a terminal, rewrite a line on it about the bytes that are done."""
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        yield name
        done += size
        if sys.stderr.isatty():
            end = "" if done < total else "\n"
            print(
                f"\r{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB",
                end=end,
                file=sys.stderr,
                flush=True,
            )


def _require_room(what: str, need: int, free: float, remedy: str) -> None:
    if need > free:
        raise CheckpointError(f"{what}: needs {need / 1e9:.3g} GB, {free / 1e9:.3g} free; {remedy}")


def free_memory(device: torch.device) -> float:
    """Bytes that a load can take on a device; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = (
        Path("/proc/meminfo").read_text()
        if device.type == "cpu" and os.path.exists("/proc/meminfo")
        else ""
    )
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    return int(available[1]) * 1024 if available else math.inf


def _pack(model: Transformer, folder: Folder) -> None:
    """Replace parameters of a meta model by packed ones, as the folder holds them: weights, and scales beside them."""
    tensors = folder.tensors

    def give(module, leaves, name, stack=(), times=1):
        for leaf, (dtype, (rows, cols)) in zip(leaves, (tensors[name], tensors[scale_name(name)])):
            tensor = torch.empty(
                *stack,
                times * rows,
                cols,
                dtype=torch.uint8 if dtype == E8M0 else dtype,
                device="meta",
            )
            setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))

    for prefix, module in model.named_modules():
        if (
            isinstance(module, Linear)
            and module.fp8
            and tensors[f"{prefix}.weight"].dtype in PACKED
        ):
            give(module, ("weight", "scale"), f"{prefix}.weight")
        elif isinstance(module, Experts):
            stack = module.w2.shape[:1]
            names = [
                f"{prefix}.{e}.{part}.weight" for e in range(*stack) for part in ("w1", "w2", "w3")
            ]
            formats = {
                tuple(tensors[n].dtype for n in (name, scale_name(name)) if n in tensors)
                for name in names
            }
            if len(formats) > 1:
                raise CheckpointError(
                    f"{folder.path}: '{prefix}' mixes formats and cannot stay packed; use weights=\"dequant\""
                )
            if formats.pop()[0] in PACKED:
                give(module, ("w13", "w13_scale"), f"{prefix}.0.w1.weight", stack, 2)
                give(module, ("w2", "w2_scale"), f"{prefix}.0.w2.weight", stack)


def load(
    path,
    *,
    device="cpu",
    dtype: torch.dtype = torch.bfloat16,
    weights: str = "dequant",
    act_quant: bool | None = None,
    layers: int | None = None,
    ops: dict[str, str] | None = None,
) -> Transformer:
    """The model of a folder in the released layout, whatever mix of FP4, FP8 and plain tensors it holds (docs/v4.md#checkpoint).

    dtype      of the parameters, fp32 islands excepted
    weights    "dequant": value times scale, in `dtype`; "native": FP4 and FP8 stay packed beside their scales, frozen
    act_quant  activation fake-quantisation (docs/v4.md#quantised-points); None: on when the config carries quantization_config
    layers     only the first so many layers; the MTP block stays
    ops        as in Transformer

    Names, shapes and dtypes are checked before any data is read. Host memory holds one tensor at a time beside the model.
    CheckpointError says in one line what is wrong and where, or how much memory is lacking.
    """
    if weights not in ("dequant", "native"):
        raise ValueError(f"weights is {weights!r}: choose 'dequant' or 'native'")
    device, (folder, args) = torch.device(device), open_folder(path, layers)
    model = empty_model(
        args if act_quant is None else dataclasses.replace(args, act_quant=act_quant), dtype, ops
    )
    check(folder, released(model))
    if weights == "native":
        _pack(model, folder)
    need = sum(tensor.nbytes for tensor in model.state_dict().values()) + max(
        info.nbytes for info in folder.tensors.values()
    )
    _require_room(
        f"{path}: memory of {device}",
        need,
        free_memory(device),
        'load fewer layers, or with weights="native"',
    )
    slots, model.source = released(model.to_empty(device=device)), folder.path
    for name in _progress({name: view.nbytes for name, (_, view) in slots.items()}, "loading"):
        view, source = slots[name][1], folder.get(name).to(device)
        if source.dtype in PACKED and view.dtype not in PACKED:
            for rows, values in _rows(source, folder.get(scale_name(name)).to(device)):
                view[rows] = values
        else:
            view.copy_(source)
        del source  # before the next one is read
        if name.endswith("tid2eid") and not 0 <= view.min() <= view.max() < args.n_routed_experts:
            raise CheckpointError(
                f"{folder.files[name]}: tensor '{name}' leads to experts beyond 0..{args.n_routed_experts - 1}"
            )
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def _recode(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, fmt: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A stored matrix as another format stores it. FP4 -> FP8 loses nothing unless scales in a 128 x 128 block differ 2^14-fold:
    the scale that fits the largest value is no coarser than the official max(scale) / 2^6 (docs/v4.md#checkpoint)."""
    if fmt == "bf16":
        return {name: torch.cat([values.to(dtype) for _, values in _rows(weight, scale)])}
    quantize = quantize_fp4 if fmt == "fp4" else quantize_fp8
    codes, scales = zip(*(quantize(values) for _, values in _rows(weight, scale)))
    return {name: torch.cat(codes), scale_name(name): torch.cat(scales).view(E8M0)}


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Gives temporary paths for files of a folder. At the end all take their names, in order; on an error they are removed."""
    names = []

    def temporary(name: str) -> Path:
        names.append(name)
        return folder / f".{name}.tmp"

    try:
        yield temporary
        for name in names:
            os.replace(folder / f".{name}.tmp", folder / name)
    finally:
        for name in names:
            (folder / f".{name}.tmp").unlink(missing_ok=True)


def _write(path: Path, plan: dict[str, Info], get: Callable[[str], torch.Tensor]) -> None:
    """A safetensors file of the tensors in `plan`, in its order, holding one at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, info in plan.items():
        header[name] = {
            "dtype": CODES[info.dtype],
            "shape": info.shape,
            "data_offsets": [end, end := end + info.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in _progress(
            {name: info.nbytes for name, info in plan.items()}, "saving " + path.stem[1:]
        ):
            tensor = get(name).contiguous().cpu()
            assert plan[name] == (tensor.dtype, tensor.shape), name
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            del tensor  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


def _config(args: ModelArgs, plan: dict[str, Info], raw: dict) -> dict:
    """config.json for the tensors of `plan`. Keys of `raw`, the config that they come with, stay if they say more."""
    raw = (
        {}
        if "dim" in raw
        else {
            key: value
            for key, value in raw.items()
            if not key.startswith("dspark_") and key != "dtype"
        }
    )
    config = (
        raw | args.to_hf() | {"torch_dtype": str(plan["embed.weight"].dtype).removeprefix("torch.")}
    )
    quantization = config.pop("quantization_config", None) or dict(QUANTIZATION)
    if any(info.dtype == torch.float32 for name, info in plan.items() if name.endswith(".scale")):
        quantization.pop("scale_fmt", None)
    if any(info.dtype in PACKED for info in plan.values()):
        config["quantization_config"] = quantization
    config.pop("expert_dtype")
    if fmt := PACKED.get(plan["layers.0.ffn.experts.0.w1.weight"].dtype):
        config["expert_dtype"] = fmt
    return config


def _shard(plan: dict[str, Info], limit: int) -> dict[str, dict[str, Info]]:
    """File name -> its part of the plan, of at most `limit` bytes or one tensor."""
    shards, room = [{}], limit
    for name, info in plan.items():
        if info.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = info
        room -= info.nbytes
    # wide elements first, so that readers which map the file find every tensor aligned; a packed matrix stays next to its scale
    shards = [
        dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards
    ]
    n = len(shards)
    return {
        f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def _export(
    path,
    args: ModelArgs,
    plan: dict[str, Info],
    recode: dict[str, tuple[str, torch.dtype]],
    get: Callable[[str], torch.Tensor],
    shard_bytes: int,
    tokenizer,
    raw: dict,
) -> None:
    """Write a folder as `make_plan` says; `get` gives the tensors as they are stored now."""
    path, shards, pending, size = (
        Path(path),
        _shard(plan, shard_bytes),
        {},
        sum(info.nbytes for info in plan.values()),
    )

    def tensor(name: str) -> torch.Tensor:
        if name in recode:
            weight = get(name)
            pending.update(
                _recode(
                    name,
                    weight,
                    get(scale_name(name)) if weight.dtype in PACKED else None,
                    *recode[name],
                )
            )
        return pending.pop(name) if name in pending else get(name).to(plan[name].dtype)

    path.mkdir(parents=True, exist_ok=True)
    _require_room(f"{path}: disk", size, shutil.disk_usage(path).free, "choose another folder")
    with _replacing(path) as temporary:
        for file, shard in shards.items():
            _write(temporary(file), shard, tensor)
        for file in TOKENIZER_FILES if tokenizer else ():
            if (Path(tokenizer) / file).exists() and not path.samefile(tokenizer):
                shutil.copyfile(Path(tokenizer) / file, temporary(file))
        if len(shards) > 1:
            places = {name: file for file, shard in shards.items() for name in shard}
            temporary(INDEX).write_text(
                json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
            )
        temporary("config.json").write_text(json.dumps(_config(args, plan, raw), indent=2) + "\n")
    for file in path.glob("model*.safetensors*"):  # what is left of the checkpoint that was here
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name):
            if file.name not in (*shards, INDEX if len(shards) > 1 else ""):
                file.unlink()


@torch.no_grad()
def save(
    model: Transformer,
    path,
    *,
    experts: str | None = None,
    linears: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    tokenizer=None,
    get: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write a model as a folder in the released layout (docs/v4.md#checkpoint), which other engines read too.

    experts      "fp4", "fp8" or "bf16" (not quantised); None: as in the model, packed ones unchanged
    linears      "fp8", "bf16" or None, likewise, for the linears that the release stores in FP8
    dtype        of all that is not quantised, fp32 islands excepted; bfloat16 is the released one, None the model's own
    shard_bytes  a larger checkpoint is split into files of at most this size, or of one tensor
    tokenizer    folder whose tokenizer files are copied; None: the one that the model was loaded from, if it has any
    get          released name -> tensor, called once for each in the order of `released`; None: the model holds them itself

    Holds one tensor at a time beside the model. Files get their names when all are complete, so an error or an interrupt
    leaves the checkpoint that was there. CheckpointError when the disk is too full or `tokenizer` holds none.
    """
    if tokenizer is not None and not any(
        (Path(tokenizer) / file).exists() for file in TOKENIZER_FILES
    ):
        raise CheckpointError(f"{tokenizer}: holds no {', '.join(TOKENIZER_FILES)}")
    tokenizer, views = tokenizer or getattr(model, "source", None), released(model)
    plan, recode = make_plan(
        released(empty_model(model.args)), infos(views), experts, linears, dtype
    )
    _export(
        path,
        model.args,
        plan,
        recode,
        get or (lambda name: views[name][1]),
        shard_bytes,
        tokenizer,
        {},
    )


def convert(
    path,
    out,
    *,
    experts: str | None = None,
    linears: str | None = None,
    layers: int | None = None,
    mtp: bool = True,
) -> None:
    """Copy a checkpoint byte for byte, except the matrices whose format changes, as in `save`; `layers` takes the first ones.

    Holds one tensor at a time and no model. Errors as in `load` and `save`.
    """
    folder, args = open_folder(path, layers, mtp)
    slots, raw = (
        released(empty_model(args)),
        json.loads((folder.path / "config.json").read_text(encoding="utf-8")),
    )
    check(folder, slots)
    _export(
        out,
        args,
        *make_plan(slots, folder.tensors, experts, linears, None),
        folder.get,
        SHARD_BYTES,
        path,
        raw,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def inspect(path) -> dict:
    """What the headers of a folder say: sizes, groups of like tensors, and `problems`."""
    folder, args = open_folder(path)
    groups = collections.Counter(
        (re.sub(r"\.\d+\.", ".*.", name), info) for name, info in folder.tensors.items()
    )
    return {
        "path": str(path),
        "tensors": len(folder.tensors),
        "bytes": sum(info.nbytes for info in folder.tensors.values()),
        "layers": args.n_layers,
        "mtp": args.n_mtp_layers,
        "act_quant": args.act_quant,
        "groups": [
            {
                "name": name,
                "count": n,
                "dtype": CODES[info.dtype],
                "shape": info.shape,
                "bytes": n * info.nbytes,
            }
            for (name, info), n in sorted(groups.items(), key=lambda item: item[0][0])
        ],
        "note": folder.note,
        "problems": problems(folder, released(empty_model(args))),
    }


def run(argv: list[str] | None) -> int:
    parser = cli.Parser(
        prog="checkpoint.py", description="Look at, cut and convert DeepSeek-V4 checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "list the tensors, and what is missing or unexpected; reads headers only"),
        ("slice", "copy the first layers, a small valid checkpoint"),
        ("convert", "change number formats; what is not named stays as it is"),
    ):
        commands.add_parser(name, help=text, description=text).add_argument("path")
    inspect_, slice_, convert_ = commands.choices.values()
    inspect_.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (slice_, convert_):
        command.add_argument("out")
    slice_.add_argument("--layers", type=int, required=True)
    slice_.add_argument(
        "--no-mtp", dest="mtp", action="store_false", help="leave the MTP block out"
    )
    for kind, formats in FORMATS.items():
        convert_.add_argument(f"--{kind}", choices=formats)
    options = vars(parser.parse_args(argv))
    if options.pop("command") != "inspect":
        convert(**options)
        return 0
    report = inspect(options["path"])
    if options["json"]:
        print(json.dumps(report))
    else:
        for group in report["groups"]:
            print("{count:7} {dtype:8} {shape!s:16} {bytes:15,}  {name}".format(**group))
        print(
            "{tensors} tensors, {bytes:,} bytes, {layers} layers, {mtp} MTP blocks".format(**report)
        )
        for line in filter(None, (report["note"], *report["problems"])):
            print(line)
    return 2 if report["problems"] else 0


def main(argv: list[str] | None = None) -> int:
    return cli.main("checkpoint.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
