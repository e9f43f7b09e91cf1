"""Checkpoints in the released layout, in and out: FP4, FP8 and BF16 (docs/v4.md#checkpoint).

A checkpoint is a folder: `config.json`; `model.safetensors`, or shards
`model-00001-of-000NN.safetensors` with `model.safetensors.index.json`; the tokenizer's files.
tools/released_layout.py lists the tensors, tools/safetensors_folder.py reads and writes files.

    python checkpoint.py inspect PATH [--json]
    python checkpoint.py slice PATH OUT --layers N [--no-mtp]
    python checkpoint.py convert PATH OUT [--experts fp4|fp8|bf16] [--linears fp8|bf16]
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while modules load: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import collections
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model import Experts, Linear, ModelArgs, Transformer
from ops.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8
from tools import cli
from tools.released_layout import (
    BLOCK,
    E4M3,
    E8M0,
    FORMATS,
    PACKED,
    ExportPlan,
    check,
    checkpoint_tensors,
    empty_model,
    plan_export,
    problems,
    scale_name,
    tensor_infos,
)
from tools.safetensors_folder import (
    DTYPE_NAMES,
    INDEX,
    CheckpointError,
    Folder,
    TensorInfo,
    progress,
    replacing,
    split_shards,
    write_safetensors,
)
from tools.stats import free_memory

QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
SHARD_BYTES = 5_000_000_000


# --------------------------------------------------------------------------------------------------
# Folders


def open_folder(path, layers: int | None = None, mtp: bool = True) -> tuple[Folder, ModelArgs]:
    """A folder and its architecture, cut to the first `layers` layers and a usable MTP block.

    The -0731 release keeps its drafter under `mtp.*`, a block of another kind
    (docs/v4.md#later-variants), and some folders hold no `mtp.*` at all: then MTP is off, and the
    folder's note says so. CheckpointError if the folder or its config cannot be used.
    """
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{path}: no such folder; a checkpoint is a folder with config.json and "
            "model.safetensors"
        )
    try:
        args = ModelArgs.from_json(Path(path) / "config.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    folder = Folder(path)
    for name in folder.tensors:
        if name.startswith("model."):
            raise CheckpointError(
                f"{folder.files[name]}: '{name}' begins with 'model.', released names do not; "
                "rename tensors"
            )
    total = args.n_layers
    kept = total if layers is None else layers
    if not 1 <= kept <= total:
        raise CheckpointError(
            f"{path}: has {total} layers, so {layers} cannot be taken; choose 1 to {total}"
        )
    n_mtp = args.n_mtp_layers if mtp else 0
    if mtp:
        mtp_names = [name for name in folder.tensors if name.startswith("mtp.")]
        drafter = re.compile("main_proj|markov_head|confidence_head")
        if mtp_names and (not n_mtp or any(map(drafter.search, mtp_names))):
            n_mtp = 0
            folder.note = (
                f"{path}: mtp.* holds a drafter that is not the MTP block of V4; "
                "it is left out, MTP is off"
            )
        elif n_mtp and not mtp_names:
            n_mtp = 0
            folder.note = f"{path}: no mtp.* tensors, so MTP is off"
    left_out = tuple(f"layers.{i}." for i in range(kept, total))
    if not n_mtp:
        left_out += ("mtp.",)
    folder.tensors = {
        name: info for name, info in folder.tensors.items() if not name.startswith(left_out)
    }
    ratios = args.compress_ratios
    return folder, dataclasses.replace(
        args,
        n_layers=kept,
        n_hash_layers=min(args.n_hash_layers, kept),
        n_mtp_layers=n_mtp,
        compress_ratios=ratios[:kept] + ratios[total : total + n_mtp],
    )


# --------------------------------------------------------------------------------------------------
# Loading


def _dequantized(
    weight: torch.Tensor, scale: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """A stored matrix, BLOCK rows at a time: (rows, values); fp32 if packed."""
    for start in range(0, weight.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        if weight.dtype == torch.int8:
            yield rows, dequantize_fp4(weight[rows], scale[rows], torch.float32)
        elif weight.dtype == E4M3:
            scale_row = scale[start // BLOCK : start // BLOCK + 1]
            yield rows, dequantize_fp8(weight[rows], scale_row, torch.float32)
        else:
            yield rows, weight[rows]


def _require_space(where: str, need: int, free: float, remedy: str) -> None:
    if need > free:
        raise CheckpointError(
            f"{where}: needs {need / 1e9:.3g} GB, {free / 1e9:.3g} free; {remedy}"
        )


def _allocate_packed(model: Transformer, folder: Folder) -> None:
    """Replace parameters of a meta model by packed ones, as the folder holds them."""

    def replace(module, leaf: str, name: str, stack: tuple[int, ...] = (), times: int = 1):
        """leaf and its scale, from tensor `name`: [*stack, times * rows, columns]."""
        scale_leaf = "scale" if leaf == "weight" else f"{leaf}_scale"
        for attribute, part in ((leaf, name), (scale_leaf, scale_name(name))):
            dtype, (rows, cols) = folder.tensors[part]
            dtype = torch.uint8 if dtype == E8M0 else dtype
            tensor = torch.empty(*stack, times * rows, cols, dtype=dtype, device="meta")
            setattr(module, attribute, torch.nn.Parameter(tensor, requires_grad=False))

    def formats(name: str) -> tuple:
        parts = (name, scale_name(name))
        return tuple(folder.tensors[part].dtype for part in parts if part in folder.tensors)

    for prefix, module in model.named_modules():
        if isinstance(module, Linear) and module.fp8:
            if folder.tensors[f"{prefix}.weight"].dtype in PACKED:
                replace(module, "weight", f"{prefix}.weight")
        elif isinstance(module, Experts):
            n_experts = module.w2.shape[0]
            matrices = [f"{e}.{part}" for e in range(n_experts) for part in ("w1", "w2", "w3")]
            found = {formats(f"{prefix}.{matrix}.weight") for matrix in matrices}
            if len(found) > 1:
                raise CheckpointError(
                    f"{folder.path}: '{prefix}' mixes formats and cannot stay packed; "
                    'use weights="dequant"'
                )
            if found.pop()[0] in PACKED:
                replace(module, "w13", f"{prefix}.0.w1.weight", (n_experts,), times=2)
                replace(module, "w2", f"{prefix}.0.w2.weight", (n_experts,))


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
    """The model of a folder in the released layout, with any mix of FP4, FP8 and plain tensors.

    dtype      of the parameters, fp32 islands excepted
    weights    "dequant": value times scale, in `dtype`;
               "native": FP4 and FP8 stay packed beside their scales, frozen
    act_quant  activation fake-quantisation (docs/v4.md#quantised-points);
               None: on when the config carries quantization_config
    layers     only the first so many layers; the MTP block stays
    ops        as in Transformer

    Names, shapes and dtypes are checked before any data is read. Host memory holds one tensor at a
    time beside the model. CheckpointError says in one line what is wrong and where, or how much
    memory is lacking.
    """
    if weights not in ("dequant", "native"):
        raise ValueError(f"weights is {weights!r}: choose 'dequant' or 'native'")
    device = torch.device(device)
    folder, args = open_folder(path, layers)
    if act_quant is not None:
        args = dataclasses.replace(args, act_quant=act_quant)
    model = empty_model(args, dtype, ops)
    check(folder, checkpoint_tensors(model))
    if weights == "native":
        _allocate_packed(model, folder)
    need = sum(tensor.nbytes for tensor in model.state_dict().values())
    need += max(info.nbytes for info in folder.tensors.values())
    remedy = 'load fewer layers, or with weights="native"'
    _require_space(f"{path}: memory of {device}", need, free_memory(device), remedy)

    # As to_empty does; its empty_like of a meta tensor would import SymPy, half a second.
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    model.source = folder.path
    if device.type == "meta":
        return model
    tensors = checkpoint_tensors(model)
    for name in progress({name: t.view.nbytes for name, t in tensors.items()}, "loading"):
        view = tensors[name].view
        source = folder.get(name).to(device)
        if source.dtype in PACKED and view.dtype not in PACKED:
            scale = folder.get(scale_name(name)).to(device)
            for rows, values in _dequantized(source, scale):
                view[rows] = values
        else:
            view.copy_(source)
        del source  # before the next one is read
        if name.endswith("tid2eid") and not 0 <= view.min() <= view.max() < args.n_routed_experts:
            raise CheckpointError(
                f"{folder.files[name]}: tensor '{name}' leads to experts beyond "
                f"0..{args.n_routed_experts - 1}"
            )
    return model


# --------------------------------------------------------------------------------------------------
# Saving


def _requantized(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, fmt: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A stored matrix in another format; dtype if that is plain.

    FP4 -> FP8 loses nothing unless scales in a 128 x 128 block differ 2^14-fold: the scale that
    fits the largest value is no coarser than the official max(scale) / 2^6.
    """
    blocks = (values for _, values in _dequantized(weight, scale))
    if fmt == "bf16":
        return {name: torch.cat([values.to(dtype) for values in blocks])}
    quantize = quantize_fp4 if fmt == "fp4" else quantize_fp8
    codes, scales = zip(*map(quantize, blocks), strict=True)
    return {name: torch.cat(codes), scale_name(name): torch.cat(scales).view(E8M0)}


def _make_config(args: ModelArgs, infos: dict[str, TensorInfo], source: dict) -> dict:
    """config.json for these tensors. Other keys of `source`, the config they came with, stay."""
    config = {}
    if "dim" not in source:  # Hugging Face keys
        config = {k: v for k, v in source.items() if k != "dtype" and not k.startswith("dspark_")}
    config |= args.to_hf()
    config["torch_dtype"] = str(infos["embed.weight"].dtype).removeprefix("torch.")
    quantization = config.pop("quantization_config", None) or dict(QUANTIZATION_CONFIG)
    if any(i.dtype == torch.float32 for name, i in infos.items() if name.endswith(".scale")):
        quantization.pop("scale_fmt", None)
    if any(info.dtype in PACKED for info in infos.values()):
        config["quantization_config"] = quantization
    config.pop("expert_dtype")
    expert_format = PACKED.get(infos["layers.0.ffn.experts.0.w1.weight"].dtype)
    if expert_format:
        config["expert_dtype"] = expert_format
    return config


def _export(
    path,
    args: ModelArgs,
    plan: ExportPlan,
    get: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    tokenizer,
    source_config: dict,
) -> None:
    """Write a folder as planned; `get` gives the tensors as they are stored now."""
    path = Path(path)
    shards = split_shards(plan.tensors, shard_bytes)
    size = sum(info.nbytes for info in plan.tensors.values())
    scales = {}  # made with their matrix, written next

    def tensor(name: str) -> torch.Tensor:
        if name in scales:
            return scales.pop(name)
        if name not in plan.requantize:
            return get(name).to(plan.tensors[name].dtype)
        weight = get(name)
        scale = get(scale_name(name)) if weight.dtype in PACKED else None
        scales.update(_requantized(name, weight, scale, plan.requantize[name], dtype))
        return scales.pop(name)

    path.mkdir(parents=True, exist_ok=True)
    _require_space(f"{path}: disk", size, shutil.disk_usage(path).free, "choose another folder")
    with replacing(path) as temporary:
        for file, infos in shards.items():
            write_safetensors(temporary(file), infos, tensor)
        for file in TOKENIZER_FILES if tokenizer else ():
            if (Path(tokenizer) / file).exists() and not path.samefile(tokenizer):
                shutil.copyfile(Path(tokenizer) / file, temporary(file))
        written = set(shards)
        if len(shards) > 1:
            written.add(INDEX)
            weight_map = {name: file for file, infos in shards.items() for name in infos}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            temporary(INDEX).write_text(json.dumps(index, indent=2))
        config = _make_config(args, plan.tensors, source_config)
        temporary("config.json").write_text(json.dumps(config, indent=2) + "\n")
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for file in path.glob("model*.safetensors*"):  # the rest of the checkpoint that was here
        if ours.fullmatch(file.name) and file.name not in written:
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
    """Write a model as a folder in the released layout, which other engines read too.

    experts      "fp4", "fp8" or "bf16" (not quantised); None: as in the model, packed stay packed
    linears      "fp8", "bf16" or None, likewise, for the linears that the release stores in FP8
    dtype        of all that is not quantised, fp32 islands excepted; None: the model's own
    shard_bytes  a larger checkpoint is split into files of at most this size, or of one tensor
    tokenizer    folder whose tokenizer files are copied; None: the one the model came from
    get          name on disk -> tensor, called once for each, in the order of checkpoint_tensors;
                 None: the model holds them itself

    Holds one tensor at a time beside the model. Files get their names when all are complete, so an
    error or an interrupt leaves the checkpoint that was there. CheckpointError when the disk is too
    full or `tokenizer` holds none.
    """
    has_tokenizer = tokenizer and any((Path(tokenizer) / f).exists() for f in TOKENIZER_FILES)
    if tokenizer is not None and not has_tokenizer:
        raise CheckpointError(f"{tokenizer}: holds no {', '.join(TOKENIZER_FILES)}")
    tensors = checkpoint_tensors(model)
    plain = checkpoint_tensors(empty_model(model.args))
    _export(
        path,
        model.args,
        plan_export(plain, tensor_infos(tensors), experts, linears, dtype),
        get or (lambda name: tensors[name].view),
        dtype=dtype or torch.bfloat16,
        shard_bytes=shard_bytes,
        tokenizer=tokenizer or getattr(model, "source", None),
        source_config={},
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
    """Copy a checkpoint byte for byte, except the matrices whose format changes, as in `save`.

    layers takes the first ones. Holds one tensor at a time and no model. Errors as in `load` and
    `save`.
    """
    folder, args = open_folder(path, layers, mtp)
    tensors = checkpoint_tensors(empty_model(args))
    check(folder, tensors)
    _export(
        out,
        args,
        plan_export(tensors, folder.tensors, experts, linears, None),
        folder.get,
        dtype=torch.bfloat16,
        shard_bytes=SHARD_BYTES,
        tokenizer=path,
        source_config=json.loads((folder.path / "config.json").read_text(encoding="utf-8")),
    )


# --------------------------------------------------------------------------------------------------
# Command line


def inspect(path) -> dict:
    """Summary of a folder's headers: sizes, groups of like tensors, and `problems`."""
    folder, args = open_folder(path)
    counts = collections.Counter(
        (re.sub(r"\.\d+\.", ".*.", name), info) for name, info in folder.tensors.items()
    )
    groups = []
    for (name, info), count in sorted(counts.items(), key=lambda item: item[0][0]):
        dtype, size = DTYPE_NAMES[info.dtype], count * info.nbytes
        groups.append(dict(name=name, count=count, dtype=dtype, shape=info.shape, bytes=size))
    return {
        "path": str(path),
        "tensors": len(folder.tensors),
        "bytes": sum(info.nbytes for info in folder.tensors.values()),
        "layers": args.n_layers,
        "mtp": args.n_mtp_layers,
        "act_quant": args.act_quant,
        "groups": groups,
        "note": folder.note,
        "problems": problems(folder, checkpoint_tensors(empty_model(args))),
    }


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="checkpoint.py", description="Look at, cut and convert DeepSeek-V4 checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, text: str):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path")
        return command

    text = "list the tensors, and what is missing or unexpected; reads headers only"
    command = add_command("inspect", text)
    command.add_argument("--json", action="store_true", help="print one JSON object")

    command = add_command("slice", "copy the first layers, a small valid checkpoint")
    command.add_argument("out")
    command.add_argument("--layers", type=int, required=True)
    text = "leave the MTP block out"
    command.add_argument("--no-mtp", dest="mtp", action="store_false", help=text)

    command = add_command("convert", "change number formats; what is not named stays as it is")
    command.add_argument("out")
    for kind, formats in FORMATS.items():
        command.add_argument(f"--{kind}", choices=formats)
    return parser


def run(argv: list[str] | None) -> int:
    options = vars(make_parser().parse_args(argv))
    if options.pop("command") != "inspect":  # slice and convert
        convert(**options)
        return 0
    report = inspect(options["path"])
    if options["json"]:
        print(json.dumps(report))
    else:
        for group in report["groups"]:
            print("{count:7} {dtype:8} {shape!s:16} {bytes:15,}  {name}".format(**group))
        summary = "{tensors} tensors, {bytes:,} bytes, {layers} layers, {mtp} MTP blocks"
        print(summary.format(**report))
        for line in filter(None, (report["note"], *report["problems"])):
            print(line)
    return 2 if report["problems"] else 0


def main(argv: list[str] | None = None) -> int:
    return cli.main("checkpoint.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
