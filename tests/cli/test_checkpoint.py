"""The released layout in and out (docs/v4.md#checkpoint).

Exact formats, every error in one line, memory, interrupts, and other engines.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import CheckpointError, load, main, save
from model import ModelArgs, Transformer
from ops.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8
from tokenizer import load_tokenizer
from tools.released_layout import empty_model, layout

E8M0 = torch.float8_e8m0fnu
ROOT = Path(checkpoint.__file__).parent
DEBUG = ModelArgs.debug()
PARTIAL = dataclasses.replace(
    DEBUG,
    n_layers=1,
    n_hash_layers=1,
    compress_ratios=(0, 0),
    dim=136,
    moe_inter_dim=520,
    n_routed_experts=3,
)
W1 = "layers.0.ffn.experts.0.w1"


def make(args=DEBUG, dtype=torch.float32, seed=0) -> Transformer:
    """A model in which every tensor is random, so that a lost or misplaced one shows."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = Transformer(args)
    torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.randint(0, args.n_routed_experts, tensor.shape, generator=generator))
        else:
            std = 0.1 if tensor.dim() > 1 else 0.5
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator) * std + float("norm" in name)
            )
    return model


def same(a: Transformer, b: Transformer) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x
    )


def infos(file: Path) -> dict:
    return {name: (t.dtype, tuple(t.shape)) for name, t in load_file(file).items()}


def edit(folder: Path, change, file="model.safetensors") -> None:
    """Rewrite a safetensors file after `change(tensors)`."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved forms of one model: "bf16" and "fp4" in one file, "shards" in several."""
    base = tmp_path_factory.mktemp("folders")
    save(make(), base / "bf16", experts="bf16", linears="bf16")
    save(make(), base / "fp4", experts="fp4", linears="fp8")
    save(make(), base / "shards", experts="fp4", linears="fp8", shard_bytes=200_000)
    return base


@pytest.fixture
def copy(folders, tmp_path):
    """copy("fp4") -> a fresh copy of a saved folder, to damage."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / "copy"))


# --------------------------------------------------------------------------------------------------
# Layout


@pytest.fixture(scope="module")
def flash():
    return layout(ModelArgs.flash())


def test_layout_has_the_published_number_of_tensors(flash):
    assert len(flash) == 69_187
    pro = layout(ModelArgs.pro())
    assert len(pro) == 145_116 and sum(info.nbytes for info in pro.values()) == 864_704_792_696
    assert pro["layers.2.ffn.experts.383.w2.scale"] == (E8M0, (7168, 96))
    assert pro["layers.0.attn.wo_a.scale"] == (E8M0, (128, 32))


@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("embed.weight", torch.bfloat16, (129280, 4096)),
        ("norm.weight", torch.bfloat16, (4096,)),
        ("layers.0.ffn.gate.tid2eid", torch.int64, (129280, 6)),
        ("layers.3.ffn.gate.bias", torch.float32, (256,)),
        ("layers.2.attn.compressor.ape", torch.float32, (4, 1024)),
        ("layers.3.attn.compressor.ape", torch.float32, (128, 512)),
        ("layers.2.attn.compressor.wkv.weight", torch.bfloat16, (1024, 4096)),
        ("layers.2.attn.indexer.wq_b.scale", E8M0, (64, 8)),
        ("layers.2.attn.indexer.weights_proj.weight", torch.bfloat16, (64, 4096)),
        ("layers.0.attn.attn_sink", torch.float32, (64,)),
        ("layers.0.hc_attn_fn", torch.float32, (24, 16384)),
        ("layers.9.ffn.experts.255.w1.weight", torch.int8, (2048, 2048)),
        ("layers.9.ffn.experts.255.w3.scale", E8M0, (2048, 128)),
        ("layers.9.ffn.shared_experts.w2.weight", torch.float8_e4m3fn, (4096, 2048)),
        ("mtp.0.e_proj.scale", E8M0, (32, 32)),
    ],
)
def test_layout_of_flash_is_that_of_the_specification(name, dtype, shape, flash):
    assert flash[name] == (dtype, shape)


def test_a_saved_folder_has_the_layout(folders):
    for name, formats in {"bf16": ("bf16", "bf16"), "fp4": ("fp4", "fp8")}.items():
        assert infos(folders / name / "model.safetensors") == layout(DEBUG, *formats)


# --------------------------------------------------------------------------------------------------
# Round trips


def halves(name: str, stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """w1 and w3 of stacked experts, which have scale blocks of their own; else the tensor."""
    return stacked.chunk(2, 1) if name.endswith("w13") else (stacked,)


def rounded(name: str, w: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """A parameter as `fmt` stores it."""
    if fmt == "bf16":
        return w.bfloat16().to(dtype)
    quantize, dequantize = (
        (quantize_fp4, dequantize_fp4) if fmt == "fp4" else (quantize_fp8, dequantize_fp8)
    )
    return torch.cat([dequantize(*quantize(half), dtype) for half in halves(name, w)], -2)


def test_plain_round_trips_are_exact(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = make(dtype=dtype)
        save(model, tmp_path, dtype=None)
        assert same(model, load(tmp_path, dtype=dtype))


def test_the_release_rounds_norms_but_not_the_other_fp32_islands(folders):
    model, loaded = make().state_dict(), load(folders / "bf16").state_dict()
    for name, tensor in loaded.items():
        island = "hc_" in name or name.endswith(("ape", "attn_sink", "gate.bias"))
        if "tid2eid" in name or island:
            assert tensor.dtype == (torch.float32 if island else torch.int64) and torch.equal(
                tensor, model[name]
            ), name
        else:
            assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
            assert torch.equal(tensor, model[name].bfloat16().to(tensor.dtype)), name


@pytest.mark.parametrize("args", [DEBUG, PARTIAL], ids=["debug", "partial blocks"])
@pytest.mark.parametrize(
    "experts, linears", [("fp4", "fp8"), ("fp8", "fp8"), ("fp4", "bf16"), ("bf16", "fp8")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_round_trip_is_the_quantiser_exactly(args, experts, linears, dtype, tmp_path):
    model = make(args)
    save(model, tmp_path, experts=experts, linears=linears)
    quantised = {
        name for name in layout(args) if name.removesuffix("weight") + "scale" in layout(args)
    }
    want = {}
    for name, w in model.state_dict().items():
        if ".experts." in name:
            fmt = experts
        elif name in quantised:
            fmt = linears
        elif w.dim() == 2 and not any(key in name for key in ("hc_", "ape", "tid2eid")):
            fmt = "bf16"
        else:
            continue
        want[name] = rounded(name, w, fmt, dtype)
    loaded = load(tmp_path, dtype=dtype).state_dict()
    for name in want:
        assert torch.equal(loaded[name], want[name]), name

    native = load(tmp_path, weights="native", dtype=dtype)
    packed = {torch.int8: dequantize_fp4, torch.float8_e4m3fn: dequantize_fp8}
    state, seen = native.state_dict(), 0
    for name, codes in state.items():
        if codes.dtype not in packed:
            continue
        is_linear = name.endswith("weight")
        scale = state[name.removesuffix("weight") + "scale" if is_linear else f"{name}_scale"]
        assert scale.dtype == torch.uint8 and not native.get_parameter(name).requires_grad
        pairs = zip(halves(name, codes), halves(name, scale), strict=True)
        values = [packed[codes.dtype](c, s, dtype) for c, s in pairs]
        assert torch.equal(torch.cat(values, -2), want[name]), name
        seen += 1
    assert seen


@pytest.mark.parametrize("weights", ["dequant", "native"])
def test_bytes_mean_what_the_specification_says(weights, copy):
    """Independent of ops.formats: the low nibble is the even column, w1 comes before w3, and a
    scale byte means 2^(byte - 127) of its block."""
    folder = copy("fp4")

    def change(tensors):
        tensors[f"{W1}.weight"].fill_(0x21)  # .5, then 1
        tensors[f"{W1}.scale"] = torch.full((32, 2), 128, dtype=torch.uint8).view(E8M0)
        tensors[f"{W1}.scale"].view(torch.uint8)[5, 1] = 130
        tensors["layers.0.ffn.experts.0.w3.weight"].fill_(-1)  # two times -6
        tensors["layers.0.ffn.experts.0.w3.scale"].view(torch.uint8).fill_(127)
        tensors["layers.1.attn.indexer.wq_b.weight"] = torch.ones(256, 32).to(torch.float8_e4m3fn)
        tensors["layers.1.attn.indexer.wq_b.scale"] = torch.tensor(
            [[124], [129]], dtype=torch.uint8
        ).view(E8M0)

    edit(folder, change)
    model = load(folder, weights=weights)
    experts, wq_b = model.layers[0].ffn.experts, model.layers[1].attn.indexer.wq_b
    w13, wq_b = experts.w13[0], wq_b.weight
    if weights == "native":
        w13 = dequantize_fp4(w13, experts.w13_scale[0], torch.bfloat16)
        wq_b = dequantize_fp8(wq_b, model.layers[1].attn.indexer.wq_b.scale, torch.bfloat16)
    want = torch.tensor([1.0, 2.0]).repeat(32, 32)
    want[5, 32:] *= 4
    assert torch.equal(w13.float(), torch.cat([want, torch.full((32, 64), -6.0)]))
    assert torch.equal(wq_b.float()[:, 0], torch.tensor([0.125, 4.0]).repeat_interleave(128))


def test_native_and_dequantised_models_agree_and_save_the_same_bytes(folders, tmp_path):
    tokens = torch.randint(0, DEBUG.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    native = load(folders / "fp4", weights="native", dtype=torch.float32)
    plain = load(folders / "fp4", dtype=torch.float32)
    assert native.args.act_quant and plain.args.act_quant
    a, b = native(tokens), plain(tokens)
    assert (a - b).square().mean().sqrt() <= 1e-5 * b.std()
    save(native, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        folders / "fp4/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "again/config.json").read_bytes() == (
        folders / "fp4/config.json"
    ).read_bytes()
    save(
        native, tmp_path / "plain", experts="bf16", linears="bf16"
    )  # asked for, packed weights are converted
    assert same(load(tmp_path / "plain", dtype=torch.float32, act_quant=True), plain)


@pytest.mark.parametrize("act_quant", [None, True, False])
def test_act_quant_follows_the_config_unless_told(folders, act_quant):
    for name, carried in (("fp4", True), ("bf16", False)):
        assert load(folders / name, act_quant=act_quant).args.act_quant == (
            carried if act_quant is None else act_quant
        )


def test_one_file_and_shards_are_the_same(folders):
    assert len(list((folders / "shards").glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((folders / "shards/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in layout(DEBUG).values())
    assert same(load(folders / "shards"), load(folders / "fp4"))


def test_load_leaves_the_default_dtype_and_ops_choice_alone(folders):
    model = load(folders / "fp4", ops={"moe": "opaque"})
    assert torch.get_default_dtype() == torch.float32 and model.ops.modes["moe"] == "opaque"
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(model.freqs, make().freqs)


# --------------------------------------------------------------------------------------------------
# Older, newer and foreign folders


def test_formats_are_read_from_dtypes_not_from_the_config(copy, folders):
    folder = copy("fp4")
    edit_config(folder, expert_dtype=...)
    assert same(load(folder), load(folders / "fp4"))
    edit_config(folder, expert_dtype="fp8")
    assert same(load(folder), load(folders / "fp4"))


@pytest.mark.parametrize("weights", ["dequant", "native"])
def test_base_layout_with_fp32_scales_loads(weights, tmp_path):
    save(make(), tmp_path, experts="fp8", linears="fp8")

    def change(tensors):
        for name in list(tensors):
            if name.endswith(".scale"):
                tensors[name] = tensors[name].float() * 1.25  # no power of two

    edit(tmp_path, change)
    on_disk, model = (
        load_file(tmp_path / "model.safetensors"),
        load(tmp_path, weights=weights, dtype=torch.float32),
    )
    q, s = (on_disk[f"layers.3.ffn.experts.7.w3.{key}"] for key in ("weight", "scale"))
    w13, w13_scale = model.layers[3].ffn.experts.w13, model.layers[3].ffn.experts.w13_scale
    if weights == "native":
        assert (
            torch.equal(w13[7, 32:].float(), q.float())
            and torch.equal(w13_scale[7, 1:], s)
            and not w13_scale.requires_grad
        )
        save(model, tmp_path / "again")
        assert (
            "scale_fmt"
            not in json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
        )
        again = load_file(tmp_path / "again/model.safetensors")
        assert all(
            again[name].dtype == t.dtype and torch.equal(again[name].float(), t.float())
            for name, t in on_disk.items()
        )
    else:
        assert torch.equal(w13[7, 32:], q.float() * s)


def test_int32_hash_routes_load(copy, folders):
    folder = copy("fp4")
    edit(
        folder,
        lambda tensors: tensors.update({n: t.int() for n, t in tensors.items() if "tid2eid" in n}),
    )
    assert same(load(folder), load(folders / "fp4"))


def test_a_dspark_release_loads_without_mtp(copy, folders, capsys):
    folder = copy("fp4")
    edit_config(
        folder,
        dspark_block_size=5,
        dspark_target_layer_ids=[1, 2, 3],
        compress_ratios=[0, 4, 128, 4, 0, 0, 0],
    )
    edit(
        folder,
        lambda tensors: tensors.update(
            {"mtp.0.main_norm.weight": torch.ones(64), "mtp.2.norm.weight": torch.ones(64)}
        ),
    )
    model = load(folder)
    assert capsys.readouterr().err.count("MTP is off") == 1 and len(model.mtp) == 0
    assert torch.equal(
        model.layers[3].ffn.experts.w2, load(folders / "fp4").layers[3].ffn.experts.w2
    )
    main(["convert", str(folder), str(folder / "out"), "--experts", "bf16"])
    assert (
        load(folder / "out").args.n_mtp_layers == 0
        and "dspark" not in (folder / "out/config.json").read_text()
    )


def test_a_drafter_is_known_by_its_tensors_too(copy, capsys):
    """The config may not say that `mtp.*` is the -0731 drafter.

    A folder that does not load says only what is wrong.
    """
    folder = copy("fp4")
    edit(
        folder,
        lambda tensors: (
            [
                tensors.pop(n)
                for n in list(tensors)
                if n.startswith(("mtp.0.e_proj", "mtp.0.h_proj"))
            ]
            + [tensors.update({"mtp.0.main_proj.weight": torch.ones(64, 192)})]
        ),
    )
    assert len(load(folder).mtp) == 0 and capsys.readouterr().err.count("MTP is off") == 1
    edit(folder, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(CheckpointError, match="'norm.weight' is missing"):
        load(folder)
    assert not capsys.readouterr().err


def test_no_mtp_tensors_turn_mtp_off_but_some_missing_are_an_error(copy, capsys):
    folder = copy("fp4")
    edit(folder, lambda tensors: tensors.pop("mtp.0.h_proj.scale"))
    with pytest.raises(CheckpointError, match="mtp.0.h_proj.scale"):
        load(folder)
    edit(
        folder,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")],
    )
    assert len(load(folder).mtp) == 0
    assert capsys.readouterr().err.count("MTP is off") == 1


def test_layers_takes_the_first_layers_and_the_mtp_block(folders):
    full, part = load(folders / "shards"), load(folders / "shards", layers=1)
    assert (
        part.args.compress_ratios == (0, 0)
        and part.args.n_hash_layers == 1
        and len(part.layers) == 1
    )
    state = full.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())
    with pytest.raises(CheckpointError, match="4 layers"):
        load(folders / "shards", layers=5)


# --------------------------------------------------------------------------------------------------
# Errors: one line that names the culprit, before anything is built or written


def _pop(name):
    return lambda folder: edit(folder, lambda tensors: tensors.pop(name))


def _set(name, value):
    return lambda folder: edit(
        folder, lambda tensors: tensors.__setitem__(name, value(tensors.get(name)))
    )


def _write(name, data):
    return lambda folder: (folder / name).write_bytes(
        data if isinstance(data, bytes) else data((folder / name).read_bytes())
    )


def _rename(tensors):
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


def _duplicate(folder):
    shard = sorted(folder.glob("model-*"))[0]
    edit(folder, lambda tensors: tensors.update(extra=torch.ones(1)), shard.name)


ERRORS = {
    "missing tensor": (
        "fp4",
        _pop("layers.2.attn.kv_norm.weight"),
        "layers.2.attn.kv_norm.weight' is missing",
    ),
    "missing scale": ("fp4", _pop(f"{W1}.scale"), f"{W1}.scale' is missing"),
    "several missing": (
        "fp4",
        lambda f: (_pop("norm.weight")(f), _pop("head.weight")(f)),
        "1 more",
    ),
    "extra tensor": (
        "fp4",
        _set("layers.0.ffn.gate.bias_vl", lambda t: torch.ones(8)),
        "gate.bias_vl' is unexpected",
    ),
    "extra layer": (
        "fp4",
        _set("layers.4.attn.attn_sink", lambda t: torch.ones(4)),
        "layers.4.attn.attn_sink' is unexpected",
    ),
    "scale of a plain weight": (
        "bf16",
        _set(f"{W1}.scale", lambda t: torch.ones(1, 1)),
        f"{W1}.scale' is unexpected",
    ),
    "wrong shape": (
        "fp4",
        _set("layers.1.attn.wq_a.weight", lambda t: t[:16].clone()),
        r"model.safetensors: tensor 'layers.1.attn.wq_a.weight' has shape \[16, 64\], "
        r"not \[32, 64\] as config.json",
    ),
    "transposed": (
        "bf16",
        _set("layers.1.attn.wq_a.weight", lambda t: t.T.contiguous()),
        r"wq_a.weight' has shape \[64, 32\]",
    ),
    "wrong scale shape": (
        "fp4",
        _set(f"{W1}.scale", lambda t: t[:1].clone()),
        rf"{W1}.scale' has shape \[1, 2\].*\[32, 2\]",
    ),
    "scale not e8m0": (
        "fp4",
        _set(f"{W1}.scale", lambda t: t.float()),
        f"{W1}.scale' is F32, not F8_E8M0",
    ),
    "integer norm": (
        "fp4",
        _set("norm.weight", lambda t: t.int()),
        "norm.weight' is I32, not BF16",
    ),
    "fp4 linear": (
        "fp4",
        _set("layers.0.attn.wkv.weight", lambda t: t.view(torch.int8)),
        "wkv.weight' is I8, not F8_E4M3",
    ),
    "unknown dtype": ("fp4", _set("norm.weight", lambda t: t > 0), "norm.weight' is BOOL"),
    "float hash routes": (
        "fp4",
        _set("layers.0.ffn.gate.tid2eid", lambda t: t.float()),
        "tid2eid' is F32",
    ),
    "route out of range": (
        "fp4",
        _set("layers.1.ffn.gate.tid2eid", lambda t: t + 5),
        "tid2eid' leads to experts beyond 0..7",
    ),
    "negative route": (
        "fp4",
        _set("layers.1.ffn.gate.tid2eid", lambda t: t - 1),
        "1.ffn.gate.tid2eid' leads to experts",
    ),
    "model. prefix": ("fp4", lambda folder: edit(folder, _rename), "begins with 'model.'"),
    "V3 and its names": (
        "fp4",
        lambda f: (edit(f, _rename), edit_config(f, model_type="deepseek_v3")),
        "is 'deepseek_v3'",
    ),
    "truncated file": (
        "fp4",
        _write("model.safetensors", lambda data: data[:-100]),
        "model.safetensors: damaged or incomplete",
    ),
    "truncated header": (
        "fp4",
        _write("model.safetensors", lambda data: data[:100]),
        "model.safetensors: damaged or incomplete",
    ),
    "no weights": (
        "fp4",
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors: missing",
    ),
    "no config": (
        "fp4",
        lambda folder: (folder / "config.json").unlink(),
        "config.json: cannot be read",
    ),
    "broken config": ("fp4", _write("config.json", b"{"), "config.json: not valid JSON"),
    "config lacks a key": (
        "fp4",
        lambda folder: edit_config(folder, o_groups=...),
        "config.json: missing key 'o_groups'",
    ),
    "other architecture": (
        "fp4",
        lambda folder: edit_config(folder, model_type="llama"),
        "model_type is 'llama'",
    ),
    "V3": (
        "fp4",
        lambda folder: edit_config(folder, model_type="deepseek_v3"),
        "model_type is 'deepseek_v3'",
    ),
    "V4.1": (
        "fp4",
        lambda folder: edit_config(folder, model_type="deepseek_v41"),
        "model_type is 'deepseek_v41'",
    ),
    "no folder": ("fp4", lambda folder: shutil.rmtree(folder), "copy: no such folder"),
    "missing shard": (
        "shards",
        lambda folder: sorted(folder.glob("model-*"))[1].unlink(),
        "model-00002-of-.*: missing",
    ),
    "broken index": ("shards", _write(checkpoint.INDEX, b"[1"), "index.json: not a JSON object"),
    "index of another kind": (
        "shards",
        _write(checkpoint.INDEX, b"[1]"),
        "index.json: not a JSON object",
    ),
    "index without map": (
        "shards",
        _write(checkpoint.INDEX, b"{}"),
        "index.json: not a JSON object with a weight_map",
    ),
    "tensor not in index": (
        "shards",
        _duplicate,
        "index.json: 'extra' should be in None, but is in model-00001",
    ),
}


@pytest.mark.parametrize("name, damage, message", ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_that_names_the_culprit(name, damage, message, copy, tmp_path, capsys):
    folder = copy(name)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    if "leads to experts" in str(error.value):
        return  # values are not looked at when tensors are copied
    for command in (["slice", "--layers", "4"], ["convert"]):
        assert main([*command, str(folder), str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main(["inspect", str(folder)]) == 2


def _inverse(tensors):
    """DeepSeek-V3's name of scales."""
    for name in [name for name in tensors if name.endswith(".scale")]:
        tensors[f"{name.removesuffix('scale')}weight_scale_inv"] = tensors.pop(name)


def _bytes(tensors):
    """All tensors of one-byte dtypes that few tools know, as their bytes."""
    for name, tensor in tensors.items():
        if tensor.dtype in (E8M0, torch.int8):
            tensors[name] = tensor.view(torch.uint8)


@pytest.mark.parametrize("spell", ((_inverse,), (_bytes,), (_inverse, _bytes)))
@pytest.mark.parametrize("name", ("fp4", "shards"))
def test_other_spellings_of_scales_and_bytes_are_read(copy, folders, tmp_path, name, spell):
    folder = copy(name)
    for change in spell:
        for file in folder.glob("*.safetensors"):
            edit(folder, change, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists() and _inverse in spell:
        index.write_text(index.read_text().replace(".scale", ".weight_scale_inv"))
    for weights in ("dequant", "native"):
        want = load(folders / name, weights=weights).state_dict()
        got = load(folder, weights=weights).state_dict()
        assert all(torch.equal(got[key], t) for key, t in want.items())
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert main(["convert", str(folders / name), str(tmp_path / "same")]) == 0
    out, same = (load_file(tmp_path / part / "model.safetensors") for part in ("out", "same"))
    assert out.keys() == same.keys() and all(torch.equal(out[key], same[key]) for key in same)


def test_a_scale_that_is_there_twice_is_refused(copy):
    folder = copy("fp4")
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith(".scale"))
    again = f"{name.removesuffix('scale')}weight_scale_inv"
    edit(folder, lambda tensors: tensors.__setitem__(again, tensors[name].clone()))
    with pytest.raises(CheckpointError, match=f"'{name}' is there twice"):
        load(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n"


def test_a_pointer_of_git_lfs_is_said_to_be_one(copy):
    folder = copy("fp4")
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="model.safetensors: is a Git LFS pointer.*download"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).write_bytes(POINTER)
        with pytest.raises(ValueError, match=f"{name}: is a Git LFS pointer.*hf download"):
            load_tokenizer(folder / name)


def test_nothing_is_read_before_all_is_checked(copy, monkeypatch):
    folder = copy("fp4")
    _pop("norm.weight")(folder)
    monkeypatch.setattr(checkpoint.Folder, "get", lambda *args: pytest.fail("data was read"))
    for weights in ("dequant", "native"):
        with pytest.raises(CheckpointError, match="norm.weight"):
            load(folder, weights=weights)


def test_a_stack_of_mixed_formats_loads_dequantised_only(copy):
    folder = copy("fp4")
    _pop(f"{W1}.scale")(folder)
    _set(f"{W1}.weight", lambda t: torch.ones(32, 64))(folder)
    assert torch.equal(load(folder).layers[0].ffn.experts.w13[0, :32].float(), torch.ones(32, 64))
    with pytest.raises(CheckpointError, match="layers.0.ffn.experts' mixes formats"):
        load(folder, weights="native")


def test_a_lack_of_memory_or_disk_is_said_before_it_starts(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 24e3)
    with pytest.raises(CheckpointError, match="memory of cpu: needs 0.00.* GB, 2.4e-05 free"):
        load(folders / "bf16")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 24_000}))
    with pytest.raises(CheckpointError, match="disk: needs"):
        save(make(), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("arguments", [{"experts": "int4"}, {"linears": "fp4"}])
def test_a_format_that_no_release_has_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="choose from"):
        save(make(), tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match="choose from"):
        layout(DEBUG, **arguments)
    with pytest.raises(ValueError, match="native"):
        load(tmp_path, weights="packed")


# --------------------------------------------------------------------------------------------------
# Saving: all or nothing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("when", [1, 40, 90])
@pytest.mark.parametrize("shard_bytes", [100_000, 10**9])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    error, when, shard_bytes, tmp_path, monkeypatch
):
    old = make(seed=1)
    save(old, tmp_path, dtype=None, shard_bytes=shard_bytes)
    before, calls = {file.name: file.read_bytes() for file in tmp_path.iterdir()}, []

    def quantize(w):
        calls.append(w)
        if len(calls) == when:
            raise error
        return quantize_fp4(w)

    monkeypatch.setattr(checkpoint, "quantize_fp4", quantize)
    with pytest.raises((KeyboardInterrupt, OSError)):
        save(make(seed=2), tmp_path, experts="fp4", shard_bytes=shard_bytes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same(load(tmp_path, dtype=torch.float32), old)


@pytest.mark.parametrize("first, second", [(10**9, 100_000), (100_000, 10**9), (100_000, 200_000)])
def test_a_save_replaces_all_of_the_old_checkpoint_and_nothing_else(first, second, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save(make(seed=1), tmp_path, dtype=None, shard_bytes=first)
    save(make(seed=2), tmp_path, dtype=None, shard_bytes=second)
    assert (
        same(load(tmp_path, dtype=torch.float32), make(seed=2))
        and (tmp_path / "notes.txt").exists()
    )
    held = {file.name for file in tmp_path.iterdir()} - {
        "notes.txt",
        "config.json",
        checkpoint.INDEX,
    }
    assert held == (
        set(json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"].values())
        if second < 10**9
        else {"model.safetensors"}
    )
    assert (tmp_path / checkpoint.INDEX).exists() == (second < 10**9)


def test_files_can_be_mapped_and_shards_keep_to_their_size(folders):
    shards = list((folders / "shards").glob("model-*"))
    assert len(shards) > 1
    for file in shards:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, info in header.items():
            if name != "__metadata__":
                size = {"I64": 8, "F32": 4, "BF16": 2}.get(info["dtype"], 1)
                assert (8 + length + info["data_offsets"][0]) % size == 0, name
        assert len(data) - 8 - length <= 200_000


def test_tokenizer_files_travel(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer.json"):
        save(make(), tmp_path / "out", tokenizer=source)
    (source / "tokenizer.json").write_text("{}")
    save(make(), tmp_path / "out", tokenizer=source)
    main(["slice", str(tmp_path / "out"), str(tmp_path / "slice"), "--layers", "1"])
    save(load(tmp_path / "slice"), tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_text() == "{}"


# --------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize("mtp", [True, False])
def test_slice_copies_bytes_and_edits_the_config(folders, tmp_path, mtp):
    out = tmp_path / "out"
    flags = ["--layers", "1"] if mtp else ["--layers", "1", "--no-mtp"]
    assert main(["slice", str(folders / "shards"), str(out), *flags]) == 0
    whole, part = load_file(folders / "fp4/model.safetensors"), load_file(out / "model.safetensors")
    left_out = ("layers.1", "layers.2", "layers.3", *(() if mtp else ("mtp.",)))
    assert part.keys() == {name for name in whole if not name.startswith(left_out)}
    for name, t in part.items():
        assert t.dtype == whole[name].dtype
        assert torch.equal(t.view(torch.uint8), whole[name].view(torch.uint8)), name
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == config["num_hash_layers"] == 1
    assert config["num_nextn_predict_layers"] == mtp
    assert config["compress_ratios"] == [0] * (1 + mtp)
    assert config["expert_dtype"] == "fp4" and config["quantization_config"]
    if mtp:
        assert same(load(out), load(folders / "fp4", layers=1))


@pytest.mark.parametrize(
    "source, flags, same_as",
    [
        ("bf16", ["--experts", "fp4", "--linears", "fp8"], ("fp4", "fp8")),
        ("shards", ["--experts", "bf16", "--linears", "bf16"], None),
        ("bf16", ["--experts", "fp8"], ("fp8", None)),
        ("fp4", ["--experts", "fp8"], None),
        ("fp4", [], None),
    ],
)
def test_convert_changes_the_format_and_keeps_the_rest(source, flags, same_as, folders, tmp_path):
    assert main(["convert", str(folders / source), str(tmp_path / "out"), *flags]) == 0
    if same_as:  # bf16 -> quantised is what saving the bf16 model does
        save(load(folders / source), tmp_path / "want", experts=same_as[0], linears=same_as[1])
        assert (tmp_path / "want/model.safetensors").read_bytes() == (
            tmp_path / "out/model.safetensors"
        ).read_bytes()
        assert json.loads((tmp_path / "want/config.json").read_text()) == json.loads(
            (tmp_path / "out/config.json").read_text()
        )
    else:  # every value of the source is one of bf16, and fp4 fits into fp8
        assert same(
            load(tmp_path / "out", dtype=torch.float32, act_quant=True),
            load(folders / source, dtype=torch.float32),
        )
        formats = {
            (): ("fp4", "fp8"),
            ("fp8",): ("fp8", "fp8"),
            ("bf16", "bf16"): ("bf16", "bf16"),
        }[tuple(flags[1::2])]
        assert infos(tmp_path / "out/model.safetensors") == layout(DEBUG, *formats)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expert_dtype = "fp4" if "fp4" in flags or not flags else "fp8"
    quantised = "bf16" not in flags
    assert ("quantization_config" in config) == quantised
    assert config.get("expert_dtype") == (expert_dtype if quantised else None)


def test_fp4_to_fp8_is_exact_while_scales_of_a_block_are_near(tmp_path):
    """2^14 between the scales of a 128 x 128 block still fits the range of e4m3."""
    save(make(PARTIAL), tmp_path / "a", experts="fp4", linears="fp8")
    generator = torch.Generator().manual_seed(0)

    def change(tensors):
        for name in tensors:
            if ".experts." in name and name.endswith("scale"):
                tensors[name] = torch.randint(
                    108, 123, tensors[name].shape, dtype=torch.uint8, generator=generator
                ).view(E8M0)

    edit(tmp_path / "a", change)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--experts", "fp8"]) == 0
    assert same(
        load(tmp_path / "a", dtype=torch.float32), load(tmp_path / "b", dtype=torch.float32)
    )


def test_convert_in_place_and_back(copy):
    folder = copy("shards")
    want = load(folder, dtype=torch.float32)
    assert main(["convert", str(folder), str(folder), "--experts", "bf16"]) == 0
    assert main(["convert", str(folder), str(folder), "--experts", "fp4"]) == 0
    assert same(load(folder, dtype=torch.float32), want)


def test_inspect_reads_headers_and_reports(copy, folders, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint.Folder, "get", lambda *args: pytest.fail("data was read"))
    assert main(["inspect", str(folders / "shards"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == len(layout(DEBUG)) and report["bytes"] == sum(
        info.nbytes for info in layout(DEBUG).values()
    )
    w1 = {
        "name": "layers.*.ffn.experts.*.w1.weight",
        "count": 32,
        "dtype": "I8",
        "shape": [32, 32],
        "bytes": 32768,
    }
    assert w1 in report["groups"] and report["problems"] == [] and report["mtp"] == 1
    folder = copy("fp4")
    _pop("norm.weight")(folder)
    _set("other", lambda t: torch.ones(1))(folder)
    assert main(["inspect", str(folder)]) == 2
    out = capsys.readouterr().out
    assert (
        "'norm.weight' is missing" in out
        and "'other' is unexpected" in out
        and "layers.*.attn.attn_sink" in out
    )


def test_command_line_exit_codes(capsys):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "checkpoint.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    missing = run("inspect", "no/such/folder")
    assert (
        missing.returncode == 2
        and missing.stderr.count("\n") == 1
        and "no/such/folder" in missing.stderr
    )
    for mistake in (["convert", "a", "b", "--linears", "fp4"], ["slice", "a", "b"], []):
        assert main(mistake) == 2
        assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Memory

_MEASURE = """
import sys, torch
from checkpoint import convert, load, save
def status(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
def peak(work):  # the kernel's own high-water mark of resident memory, reset first
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    result = work()
    return result, status("VmHWM") - before
folder, tiny = sys.argv[1:]
def work(folder):
    for weights in ("native", "dequant"):
        model, grown = peak(lambda: load(folder, weights=weights))
        print(weights, grown - sum(t.nbytes for t in model.state_dict().values()))
    del model
    print("convert", peak(lambda: convert(folder, folder + "/a", experts="bf16"))[1])
    print("back", peak(lambda: convert(folder + "/a", folder + "/b", experts="fp4"))[1])
work(tiny)  # first use of every operator
work(folder)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="needs Linux's resettable peak of resident memory",
)
def test_memory_peaks_at_the_model_and_one_tensor(folders, tmp_path):
    """A model of 161 MB whose largest tensors, some of them neighbours, have 16 MB; 7 shards."""
    args = dataclasses.replace(
        PARTIAL,
        vocab_size=8192,
        dim=1024,
        moe_inter_dim=1024,
        n_routed_experts=12,
        n_heads=256,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        n_mtp_layers=0,
        compress_ratios=(0,),
    )
    model = empty_model(args).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    save(model, tmp_path / "big", experts="fp4", shard_bytes=20_000_000)
    env = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # freed memory goes back at once, and hides no peak
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "big"), str(folders / "fp4")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines()[4:]:
        assert int(line.split()[1]) <= 20 * 2**20, line  # 4 MB of slack


# --------------------------------------------------------------------------------------------------
# Transformers reads saved folders (its router runs in the parameter dtype, so compare in fp32)


@pytest.mark.parametrize(
    "experts, linears", [("bf16", "bf16"), ("fp4", "fp8"), ("fp8", "fp8"), ("fp4", "bf16")]
)
def test_transformers_gives_the_same_logits(experts, linears, tmp_path):
    transformers = pytest.importorskip("transformers")
    if (experts, linears) != ("bf16", "bf16"):
        pytest.importorskip("accelerate", reason="Transformers needs it for FP8")
    save(
        make(),
        tmp_path,
        experts=experts,
        linears=linears,
        dtype=None if experts == linears == "bf16" else torch.bfloat16,
    )
    theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").float().eval()
    )
    ours = load(tmp_path, dtype=torch.float32, act_quant=False)
    tokens = torch.randint(
        0, DEBUG.vocab_size, (2, 61), generator=torch.Generator().manual_seed(0)
    )  # 15 entries < index_topk
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert (a - b).square().mean().sqrt() <= 1e-5 * b.std()
