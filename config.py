"""Reading, checking and writing `config.json`, dicts to dicts: `ModelArgs` (model.py) stands on it.

Three dialects are read: the released file with Hugging Face keys, Transformers 5's own
(tools/transformers_config.py), and the official inference config, whose names ModelArgs uses.
`fields` is a dict of ModelArgs' fields. Every error is a ValueError that names the key at fault.

To add a field: a line with its default in ModelArgs, and here a line in HF_NAMES with its key, and
its name in OPTIONAL, for files that lack the key. It is then read, written, and checked to be a
positive number if it is one; MAY_BE_ZERO and `check_fields` hold other conditions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

from tools.transformers_config import changes_nothing, to_released

# The kinds of attention by compression ratio (docs/v4.md#attention): 0 sees the window alone,
# one of CSA_RATIOS the entries of overlapping windows that an indexer chooses, any other ratio all
# entries of plain windows (HCA).
CSA_RATIOS = (4,)

HF_NAMES = dict(  # Hugging Face key -> field
    vocab_size="vocab_size",
    hidden_size="dim",
    moe_intermediate_size="moe_inter_dim",
    num_hidden_layers="n_layers",
    num_hash_layers="n_hash_layers",
    num_nextn_predict_layers="n_mtp_layers",
    num_attention_heads="n_heads",
    n_routed_experts="n_routed_experts",
    n_shared_experts="n_shared_experts",
    num_experts_per_tok="n_activated_experts",
    scoring_func="score_func",
    hidden_act="hidden_act",
    routed_scaling_factor="route_scale",
    swiglu_limit="swiglu_limit",
    q_lora_rank="q_lora_rank",
    head_dim="head_dim",
    qk_rope_head_dim="rope_head_dim",
    rms_norm_eps="norm_eps",
    o_groups="o_groups",
    o_lora_rank="o_lora_rank",
    sliding_window="window_size",
    compress_ratios="compress_ratios",
    rope_theta="rope_theta",
    compress_rope_theta="compress_rope_theta",
    index_n_heads="index_n_heads",
    index_head_dim="index_head_dim",
    index_topk="index_topk",
    hc_mult="hc_mult",
    hc_sinkhorn_iters="hc_sinkhorn_iters",
    hc_eps="hc_eps",
    max_position_embeddings="max_seq_len",
    expert_dtype="expert_dtype",
    bos_token_id="bos_id",
    eos_token_id="eos_id",
)
HF_YARN = dict(
    factor="rope_factor",
    original_max_position_embeddings="original_seq_len",
    beta_fast="beta_fast",
    beta_slow="beta_slow",
)
NO_YARN = dict(factor=1.0, original_max_position_embeddings=0, beta_fast=32, beta_slow=1)
# Keys with one value each
HF_FIXED = dict(
    attention_bias=False,
    attention_dropout=0.0,
    norm_topk_prob=True,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    topk_method="noaux_tc",
)
# Fields with one value each, their default in ModelArgs. A model that computes something else says
# so there; then its checkpoints do, too, and those of V4 are refused.
FIXED = ("score_func", "hidden_act", "n_shared_experts")
SWITCHES = {"act_quant", "expert_qat"}  # fields that are no keys of a config.json
HF_ONLY = {"bos_id", "eos_id", "hidden_act"}  # fields that the official inference config lacks
OPTIONAL = {
    *("expert_dtype", "bos_id", "eos_id", "n_mtp_layers", "max_seq_len", "hc_eps", "norm_eps"),
    *("n_shared_experts", "score_func", "hidden_act"),
}
METADATA = {  # keys that say nothing about the architecture, or are read by hand below
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("initializer_range", "quantization_config", "rope_scaling", "pad_token_id", "auto_map"),
    *("_name_or_path", "max_batch_size", "scale_fmt"),
}
MAY_BE_ZERO = ("n_hash_layers", "n_mtp_layers", "original_seq_len", "bos_id", "eos_id")


def lookback(R: int) -> int:
    """Tokens before a call that entries which end in it pool: of one window of R, in CSA of two."""
    return (2 if R in CSA_RATIOS else 1) * R - 1


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def config_file(path) -> str:
    """The path of a config.json, given itself or its folder."""
    return str(path) if str(path).endswith(".json") else f"{path}/config.json"


@contextlib.contextmanager
def errors_name(path):
    """Within it ValueErrors begin with the name of the config.json, and name its keys."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{config_file(path)}: {_in_keys_of(path, str(error))}") from None
    except (TypeError, AttributeError) as error:  # a list in the place of a number, say
        raise ValueError(f"{config_file(path)}: a value is of the wrong kind ({error})") from None


def _in_keys_of(path, message: str) -> str:
    """A message about fields, about the keys of a config.json."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if "dim" in json.loads(Path(config_file(path)).read_text(encoding="utf-8")):
            return message  # the official dialect has the fields' names
    keys = {field: key for key, field in (HF_NAMES | HF_YARN).items() if field != key}
    return re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), message)


def read_config(path, field_names: set[str]) -> dict:
    """The fields of a config.json, or of a folder's."""
    try:
        config = json.loads(Path(config_file(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot be read ({error.strerror}); a checkpoint folder holds a config.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    require(isinstance(config, dict), "not a JSON object")
    return to_fields(config, field_names)


def to_fields(config: dict, field_names: set[str]) -> dict:
    """The object of a config.json, of either dialect -> fields."""
    _check_is_v4(config)
    config = to_released(config)
    official = "dim" in config
    names = HF_NAMES
    if official:
        names = {name: name for name in field_names - SWITCHES - HF_ONLY}
    fields = {}
    for key, value in config.items():
        if key in names and value is None and names[key] in OPTIONAL:
            continue
        if key in names:
            fields[names[key]] = value
        elif key in HF_FIXED:
            fixed = HF_FIXED[key]
            require(
                value == fixed,
                f"{key} is {value!r}, but this model has {fixed!r} (HF_FIXED in config.py): "
                "choose another checkpoint",
            )
        else:
            known = key in METADATA or key.startswith("dspark_") or changes_nothing(key, value)
            require(known, f"unknown key {key!r}: not a DeepSeek-V4 config")
    if not official:
        fields |= _yarn_fields(config.get("rope_scaling") or NO_YARN)
    missing = sorted(k for k, name in names.items() if name not in fields and name not in OPTIONAL)
    if missing:
        raise ValueError(f"missing key {missing[0]!r}: not a complete DeepSeek-V4 config")
    if isinstance(fields.get("eos_id"), list):
        fields["eos_id"] = tuple(fields["eos_id"])
    fields.setdefault("expert_dtype", None)
    quantised = bool(config.get("quantization_config"))
    fields["act_quant"] = quantised or (official and config.get("dtype") == "fp8")
    ratios, n_layers = fields["compress_ratios"], fields["n_layers"]
    if isinstance(ratios, list) and isinstance(n_layers, int):
        # The drafter of the -0731 releases is another block (docs/v4.md#later-variants): no MTP.
        if any(key.startswith("dspark_") for key in config):
            fields |= dict(n_mtp_layers=0, compress_ratios=ratios[:n_layers])
        fields.setdefault("n_mtp_layers", len(ratios) - n_layers)
    return fields


def to_hf(fields: dict) -> dict:
    """Fields -> the object of a released config.json: Hugging Face keys, no quantization_config."""
    config = {key: fields[name] for key, name in HF_NAMES.items()} | HF_FIXED
    config["compress_ratios"] = list(fields["compress_ratios"])
    if isinstance(fields["eos_id"], tuple):
        config["eos_token_id"] = list(fields["eos_id"])  # as json would read it again
    yarn = {"type": "yarn", **{key: fields[name] for key, name in HF_YARN.items()}}
    config["rope_scaling"] = yarn if fields["original_seq_len"] else None
    about = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    return about | config


def check_fields(fields: dict, declared: dict[str, dataclasses.Field]) -> None:
    """A ValueError names a field that is no number, out of range, or impossible beside another."""
    for name, value in fields.items():
        if declared[name].type in ("int", "float"):
            _check_number(name, value, declared[name].type)
    ratios = fields["compress_ratios"]
    eos = fields["eos_id"]
    for token in eos if isinstance(eos, (list, tuple)) else (eos,):
        _check_number("eos_id", token, "int")
    are_ints = isinstance(ratios, (list, tuple)) and all(type(ratio) is int for ratio in ratios)
    require(are_ints, f"compress_ratios must be a list of ints, not {ratios!r}")
    for name in FIXED:
        value, only = fields[name], declared[name].default
        require(value == only, f"{name} is {value!r}, but this model has {only!r}: choose another")
    qat = fields["expert_qat"]
    require(qat in (None, "fp4", "fp8"), f"expert_qat must be 'fp4', 'fp8' or None, not {qat!r}")
    _check_layers(fields)
    _check_dims(fields)


def _check_number(name: str, value, kind: str) -> None:
    least = 0 if name in MAY_BE_ZERO else 1e-30
    number = isinstance(value, int if kind == "int" else (int, float))
    fits = number and not isinstance(value, bool) and least <= value < math.inf
    article = "a positive" if least else "a non-negative"
    require(fits, f"{name} must be {article} {kind}, not {value!r}")


def _check_layers(fields: dict) -> None:
    ratios, n_layers, n_mtp = (fields[k] for k in ("compress_ratios", "n_layers", "n_mtp_layers"))
    n_hash = fields["n_hash_layers"]
    require(n_mtp in (0, 1), f"n_mtp_layers must be 0 or 1, not {n_mtp}")
    require(0 <= n_hash <= n_layers, f"n_hash_layers is {n_hash} of {n_layers} layers")
    require(
        len(ratios) == n_layers + n_mtp,
        f"compress_ratios has {len(ratios)} entries, not {n_layers + n_mtp} "
        "(one per layer, then one per MTP block)",
    )
    require(
        all(ratio == 0 or ratio > 1 for ratio in ratios),
        f"compress_ratios holds an entry that is neither 0 nor > 1: {tuple(ratios)}",
    )
    require(not any(ratios[n_layers:]), "compress_ratios of an MTP block must be 0")


def _check_dims(fields: dict) -> None:
    heads, groups = fields["n_heads"], fields["o_groups"]
    require(heads % groups == 0, f"o_groups {groups} does not divide n_heads {heads}")
    chosen, experts = fields["n_activated_experts"], fields["n_routed_experts"]
    require(chosen <= experts, f"n_activated_experts {chosen} exceeds n_routed_experts {experts}")
    rope_dim = fields["rope_head_dim"]
    for name in ("head_dim", "index_head_dim"):
        require(rope_dim <= fields[name], f"rope_head_dim {rope_dim} exceeds {name} {fields[name]}")
    for name in ("rope_theta", "compress_rope_theta"):
        require(fields[name] > 1, f"{name} must be above 1, not {fields[name]}")
    require(rope_dim % 2 == 0, f"rope_head_dim {rope_dim} is odd")
    index_dim, indexed = fields["index_head_dim"], set(CSA_RATIOS) & set(fields["compress_ratios"])
    require(
        not (fields["act_quant"] and indexed) or index_dim & (index_dim - 1) == 0,
        f"index_head_dim {index_dim} is no power of two, "
        "as the Hadamard transform of act_quant needs",
    )


def _check_is_v4(config: dict) -> None:
    kind = config.get("model_type", "deepseek_v4")
    require(
        kind == "deepseek_v4",
        f"model_type is {kind!r}, not 'deepseek_v4': this is DeepSeek-V4 only",
    )
    names = config.get("architectures") or []
    require(isinstance(names, list), f"architectures must be a list, not {names!r}")
    for name in names:
        is_v4 = re.match(r"DeepseekV4(?!\d)", str(name))
        require(bool(is_v4), f"architectures names {name!r}: this is DeepSeek-V4 only")
    for key in ("rope_scaling", "quantization_config"):
        value = config.get(key)
        require(isinstance(value or {}, dict), f"{key} must be an object, not {value!r}")


def _yarn_fields(yarn: dict) -> dict:
    kind = yarn.get("type", yarn.get("rope_type", "yarn"))
    require(kind == "yarn", f"rope_scaling type {kind!r} is not 'yarn'")
    for key in HF_YARN:
        require(key in yarn, f"rope_scaling lacks {key!r}")
    return {name: yarn[key] for key, name in HF_YARN.items()}
