"""ModelArgs reads both kinds of config.json, refuses other models, and has the published sizes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from config import HF_NAMES, HF_YARN, SWITCHES
from model import ModelArgs, Transformer
from tools.transformers_config import warn_of

INFERENCE_FLASH = dict(  # the keys of the official inference/config.json (docs/v4.md#checkpoint)
    vocab_size=129280,
    dim=4096,
    moe_inter_dim=2048,
    n_layers=43,
    n_hash_layers=3,
    n_heads=64,
    n_routed_experts=256,
    n_shared_experts=1,
    n_activated_experts=6,
    score_func="sqrtsoftplus",
    route_scale=1.5,
    swiglu_limit=10.0,
    q_lora_rank=1024,
    head_dim=512,
    rope_head_dim=64,
    o_groups=8,
    o_lora_rank=1024,
    window_size=128,
    original_seq_len=65536,
    rope_theta=10000,
    rope_factor=16,
    beta_fast=32,
    beta_slow=1,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    dtype="fp8",
    scale_fmt="ue8m0",
    expert_dtype="fp4",
    compress_rope_theta=160000,
    compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0],
)
RELEASED_FLASH = dict(  # the keys of the released config.json (docs/v4.md#checkpoint)
    architectures=["DeepseekV4ForCausalLM"],
    model_type="deepseek_v4",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=0,
    eos_token_id=1,
    expert_dtype="fp4",
    hc_eps=1e-06,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    head_dim=512,
    hidden_act="silu",
    index_head_dim=128,
    index_n_heads=64,
    initializer_range=0.02,
    max_position_embeddings=1048576,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=6,
    num_hash_layers=3,
    num_key_value_heads=1,
    num_nextn_predict_layers=1,
    o_lora_rank=1024,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-06,
    rope_theta=10000,
    compress_rope_theta=160000,
    scoring_func="sqrtsoftplus",
    sliding_window=128,
    swiglu_limit=10.0,
    tie_word_embeddings=False,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    transformers_version="4.57.1",
    use_cache=True,
    vocab_size=129280,
    rope_scaling=dict(
        beta_fast=32, beta_slow=1, factor=16, original_max_position_embeddings=65536, type="yarn"
    ),
    quantization_config=dict(
        activation_scheme="dynamic",
        fmt="e4m3",
        quant_method="fp8",
        scale_fmt="ue8m0",
        weight_block_size=[128, 128],
    ),
    compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0],
    hidden_size=4096,
    index_topk=512,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_attention_heads=64,
    num_hidden_layers=43,
    o_groups=8,
    q_lora_rank=1024,
    routed_scaling_factor=1.5,
)
RELEASED_PRO = RELEASED_FLASH | dict(
    hidden_size=7168,
    index_topk=1024,
    moe_intermediate_size=3072,
    n_routed_experts=384,
    num_attention_heads=128,
    num_hidden_layers=61,
    o_groups=16,
    q_lora_rank=1536,
    routed_scaling_factor=2.5,
    compress_ratios=[128, 128] + [4, 128] * 29 + [4, 0],
)


def read(tmp_path, config) -> ModelArgs:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return ModelArgs.from_json(tmp_path)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config, expected",
    [
        (RELEASED_FLASH, ModelArgs.flash()),
        (RELEASED_PRO, ModelArgs.pro()),
        (INFERENCE_FLASH, ModelArgs.flash()),
    ],
)
def test_released_configs_are_read(tmp_path, config, expected):
    """quantization_config (or the official "dtype": "fp8") turns activation quantisation on."""
    assert read(tmp_path, config) == dataclasses.replace(expected, act_quant=True)


@pytest.mark.parametrize(
    "args",
    (
        ModelArgs.flash(),
        ModelArgs.pro(),
        ModelArgs.tiny(),
        ModelArgs.debug(),
        dataclasses.replace(ModelArgs.debug(), original_seq_len=0, rope_factor=1.0),
    ),
)
def test_written_configs_are_read_back(tmp_path, args):
    assert read(tmp_path, args.to_hf()) == args


@pytest.mark.parametrize("key", ("eos_token_id", "num_nextn_predict_layers", "expert_dtype"))
def test_null_is_the_default_of_an_optional_key(tmp_path, key):
    assert read(tmp_path, RELEASED_FLASH | {key: None}) == read(
        tmp_path, without(RELEASED_FLASH, key)
    )


def test_several_tokens_may_end_a_text(tmp_path):
    args = read(tmp_path, RELEASED_FLASH | {"eos_token_id": [1, 128804]})
    assert args.eos_id == (1, 128804) and read(tmp_path, args.to_hf()).eos_id == args.eos_id
    assert json.loads(json.dumps(args.to_hf())) == args.to_hf()


@pytest.mark.parametrize(
    "key, value, warned",
    [
        ("router_aux_loss_coef", 0.001, True),
        ("router_jitter_noise", 0.0, True),
        ("unsloth_version", "2026.1", True),
        ("unsloth_fixed", True, True),
        ("mlp_bias", False, False),
        ("output_router_logits", False, False),
    ],
)
def test_keys_that_change_nothing_are_warned_of_once(tmp_path, capsys, key, value, warned):
    warn_of.cache_clear()
    for _ in range(2):
        args = read(tmp_path, RELEASED_FLASH | {key: value})
    assert args == read(tmp_path, RELEASED_FLASH)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"config.json: {key} changes nothing here"] * warned


def transformers_config(args: ModelArgs) -> dict:
    """The config.json of Transformers' own class."""
    known = without(args.to_hf(), "architectures", "model_type")
    return json.loads(transformers.DeepseekV4Config(**known).to_json_string())


@pytest.mark.parametrize("args", (ModelArgs.flash(), ModelArgs.pro(), ModelArgs.debug()))
def test_transformers_own_configs_are_read(tmp_path, args):
    config = transformers_config(args)
    assert "layer_types" in config and "compress_ratios" not in config
    assert read(tmp_path, config) == args


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layer_types": ["full_attention"] * 43}, "layer_types holds 'full_attention'"),
        ({"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 41}, "mlp_layer_types"),
        ({"rope_parameters": {"main": {}, "compress": {"rope_type": "linear"}}}, "'linear'"),
        (
            {"rope_parameters": {"compress": {"rope_type": "yarn", "attention_factor": 1.3}}},
            "attention_factor is 1.3",
        ),
        ({"rope_parameters": {"compress": {"rope_type": "yarn", "factor": 2}}}, "original_max"),
        ({"layer_types": 5}, "wrong kind"),
        ({"mlp_layer_types": 3}, "wrong kind"),
        ({"compress_rates": [4]}, "wrong kind"),
        ({"rope_parameters": "yarn"}, "wrong kind"),
        ({"num_nextn_predict_layers": "1"}, "wrong kind"),
    ],
)
def test_transformers_configs_of_other_models_are_one_line(tmp_path, change, named):
    with pytest.raises(ValueError, match=named) as error:
        read(tmp_path, transformers_config(ModelArgs.flash()) | change)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_every_field_is_a_key_or_named_as_none():
    """A field without a key would be lost by saving."""
    fields = {field.name for field in dataclasses.fields(ModelArgs)}
    assert fields == {*HF_NAMES.values(), *HF_YARN.values(), *SWITCHES}


def test_older_and_later_flash_configs_are_read(tmp_path):
    old = read(tmp_path, without(RELEASED_FLASH, "expert_dtype", "quantization_config"))
    assert old == dataclasses.replace(ModelArgs.flash(), expert_dtype=None)
    later = RELEASED_FLASH | dict(
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_target_layer_ids=[40, 41, 42],
        dspark_markov_rank=256,
        compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0, 0, 0],
    )
    args = read(tmp_path, later)
    assert args.n_mtp_layers == 0 and args.compress_ratios == ModelArgs.flash().compress_ratios[:43]


@pytest.mark.parametrize(
    "config, named",
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (RELEASED_FLASH | {"model_type": "deepseek_v3"}, "deepseek_v3"),
        (RELEASED_FLASH | {"model_type": "deepseek_v41"}, "deepseek_v41"),
        (RELEASED_FLASH | {"engram_layers": [1, 14]}, "engram_layers"),
        (RELEASED_FLASH | {"attention_bias": True}, "attention_bias"),
        (
            RELEASED_FLASH | {"hidden_act": "gelu"},
            "hidden_act is 'gelu', but this model has 'silu'",
        ),
        (RELEASED_FLASH | {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (RELEASED_FLASH | {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', but"),
        (RELEASED_FLASH | {"n_shared_experts": 2}, "n_shared_experts"),
        (RELEASED_FLASH | {"hidden_size": "wide"}, "hidden_size must"),
        (RELEASED_FLASH | {"hc_mult": 0}, "hc_mult"),
        (RELEASED_FLASH | {"hidden_size": 96.5}, "hidden_size must"),
        (RELEASED_FLASH | {"num_hidden_layers": "43"}, "num_hidden_layers must"),
        (RELEASED_FLASH | {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers must"),
        (RELEASED_FLASH | {"num_hidden_layers": None}, "num_hidden_layers must"),
        (INFERENCE_FLASH | {"n_layers": "43"}, "n_layers must"),
        (RELEASED_FLASH | {"eos_token_id": [1, "2"]}, "eos_token_id must"),
        (RELEASED_FLASH | {"eos_token_id": [-1]}, "eos_token_id must"),
        (RELEASED_FLASH | {"mlp_bias": True}, "mlp_bias"),
        (RELEASED_FLASH | {"router_scale": 2.0}, "unknown key 'router_scale'"),
        (RELEASED_FLASH | {"rms_norm_eps": "x"}, "rms_norm_eps must"),
        (RELEASED_FLASH | {"routed_scaling_factor": float("inf")}, "routed_scaling_factor must"),
        (RELEASED_FLASH | {"compress_ratios": [0] * 42 + [4.5, 0]}, "compress_ratios"),
        (RELEASED_FLASH | {"rope_scaling": "yarn"}, "rope_scaling"),
        (
            RELEASED_FLASH
            | {
                "rope_scaling": RELEASED_FLASH["rope_scaling"]
                | {"original_max_position_embeddings": -5}
            },
            "original_max_position_embeddings must",
        ),
        (RELEASED_FLASH | {"quantization_config": "fp8"}, "quantization_config"),
        (RELEASED_FLASH | {"architectures": ["DeepseekV41ForCausalLM"]}, "DeepseekV41"),
        ("[" * 100000, "not valid JSON"),
        (RELEASED_FLASH | {"num_hash_layers": 44}, "num_hash_layers is 44 of"),
        (RELEASED_FLASH | {"compress_ratios": [0] * 43}, "compress_ratios"),
        (RELEASED_FLASH | {"compress_ratios": [1] * 44}, "compress_ratios"),
        (RELEASED_FLASH | {"compress_ratios": [0] * 43 + [4]}, "MTP"),
        (RELEASED_FLASH | {"compress_ratios": 4}, "compress_ratios"),
        (RELEASED_FLASH | {"o_groups": 7}, "o_groups"),
        (RELEASED_FLASH | {"num_experts_per_tok": 300}, "num_experts_per_tok 300"),
        (RELEASED_FLASH | {"qk_rope_head_dim": 1024}, "qk_rope_head_dim 1024"),
        (RELEASED_FLASH | {"index_head_dim": 96}, "index_head_dim"),
        (RELEASED_FLASH | {"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        (
            RELEASED_FLASH | {"rope_scaling": {"type": "yarn", "factor": 2}},
            "original_max_position_embeddings",
        ),
        (without(RELEASED_FLASH, "hidden_size"), "hidden_size"),
        (without(RELEASED_FLASH, "compress_ratios"), "compress_ratios"),
        (without(INFERENCE_FLASH, "rope_factor"), "rope_factor"),
    ],
)
def test_a_wrong_config_is_one_line_naming_file_and_key(tmp_path, config, named):
    with pytest.raises(ValueError) as error:
        read(tmp_path, config)
    message = str(error.value)
    assert named in message and "config.json" in message and "\n" not in message


def test_a_missing_config_is_one_line_naming_the_file(tmp_path):
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        ModelArgs.from_json(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "args, total, active, mtp",
    [
        (ModelArgs.flash(), 284.332e9, 13.27e9, 6.610e9),
        (ModelArgs.pro(), 1572.997e9, 48.85e9, 25.840e9),
    ],
)
def test_released_models_have_the_published_sizes(args, total, active, mtp):
    """Parameters without MTP; those a token uses, without the embedding; those of the MTP block.

    Source: docs/v4.md#dimensions.
    """
    with torch.device("meta"):
        model = Transformer(args)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    main = {name: n for name, n in sizes.items() if not name.startswith("mtp.")}
    share = args.n_activated_experts / args.n_routed_experts
    used = sum(
        n * (share if ".ffn.experts." in name else 1)
        for name, n in main.items()
        if name != "embed.weight"
    )
    assert abs(sum(main.values()) / total - 1) < 5e-6
    assert abs(used / active - 1) < 5e-4
    assert abs((sum(sizes.values()) - sum(main.values())) / mtp - 1) < 2e-4
