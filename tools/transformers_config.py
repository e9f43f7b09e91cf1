"""A config.json as Transformers 5 and trainers write it, in the released layout: dict to dict.

Transformers' DeepseekV4Config spells the layers' kinds, ratios and positions in keys of its own:
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/deepseek_v4/configuration_deepseek_v4.py
"""

from __future__ import annotations

import functools
import re
import sys

OWN = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters")
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
RATES = dict(zip(KINDS, (0, 4, 128), strict=True))
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
# Keys that change nothing here
IGNORED = re.compile(
    r"unsloth_\w+|router_(aux_loss_coef|jitter_noise)|partial_rotary_factor|\w*dropout|"
    r"use_flash_attn"
)
IGNORED_IF = dict(mlp_bias=False, output_router_logits=False)
SILENT = ("partial_rotary_factor", *IGNORED_IF)  # written by Transformers each time


def changes_nothing(key: str, value) -> bool:
    """Whether a key that V4 does not know may be ignored, with a warning."""
    ignored = bool(IGNORED.fullmatch(key)) or IGNORED_IF.get(key, ...) == value
    if ignored and key not in SILENT:
        warn_of(key)
    return ignored


@functools.cache  # once a process: commands read a file twice
def warn_of(key: str) -> None:
    print(f"config.json: {key} changes nothing here", file=sys.stderr)


def to_released(config: dict) -> dict:
    """The config with Transformers' own keys translated; one without them as it is.

    ValueError if they describe another model than V4.
    """
    if not any(key in config for key in OWN):
        return config
    released = {key: value for key, value in config.items() if key not in OWN}
    kinds, mlps = config.get("layer_types"), config.get("mlp_layer_types")
    rates = RATES | (config.get("compress_rates") or {})
    if kinds:
        unknown = next((kind for kind in kinds if kind not in KINDS), None)
        _require(unknown is None, f"layer_types holds {unknown!r}: V4 has {', '.join(KINDS)}")
        mtp = config.get("num_nextn_predict_layers") or 0
        released["compress_ratios"] = [rates[kind] for kind in kinds] + [0] * mtp
    if mlps:
        hashed = mlps.count("hash_moe")
        in_order = ["hash_moe"] * hashed + ["moe"] * (len(mlps) - hashed)
        _require(mlps == in_order, "mlp_layer_types is not some of hash_moe, then moe")
        released["num_hash_layers"] = hashed
    released |= _positions(config)
    quantization = config.get("quantization_config") or {}
    if "expert_dtype" in quantization:
        released.setdefault("expert_dtype", quantization["expert_dtype"])
    return released


def _positions(config: dict) -> dict:
    """Rotary positions: plain in sliding layers ("main"), YaRN in the others ("compress")."""
    rope = config.get("rope_parameters") or {}
    main, compress = rope.get("main") or {}, rope.get("compress") or rope
    found = {}
    if "rope_theta" in main:
        found["rope_theta"] = main["rope_theta"]
    if "rope_theta" in compress:
        found["compress_rope_theta"] = compress["rope_theta"]
    kind = compress.get("rope_type") or compress.get("type")
    if kind == "yarn":
        found["rope_scaling"] = {"type": kind, **{k: compress[k] for k in YARN if k in compress}}
        scale = compress.get("attention_factor", 1.0)
        _require(scale == 1.0, f"rope_parameters: attention_factor is {scale}, V4 has 1")
    else:
        _require(kind in (None, "default"), f"rope_parameters: rope_type {kind!r} is not 'yarn'")
    share = main.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is not None and config.get("head_dim"):
        found["qk_rope_head_dim"] = int(config["head_dim"] * share)
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
