"""DeepSeek-V4 (Flash and Pro) in one file, written to be captured whole by `torch.compile(fullgraph=True)`.

One forward serves training, prefill, verify and decode. They differ only in T, the number of new tokens, and in where
older keys come from: zeros (training) or rings and entry buffers (generation). Positions are tensors, shapes are
static, nothing on the forward path reads a value back to the host. "docs/v4.md#attention" and the like number the topics of the V4
specification (README.md has the key), which the docstrings restate from DeepSeek's paper (arXiv 2606.19348) and code.

    B batch   T new tokens   S = T in training   d model dim   H heads   D head dim   n = 4 residual streams
    W window  R compression ratio   E compressed entries   r low rank   K experts (or entries) chosen
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8
from ops.indexer_loss import indexer_recall
from ops.registry import Table, require

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class ModelArgs:
    """The architecture (docs/v4.md#dimensions). Names follow the official inference config; defaults are Flash.

    compress_ratios has one entry per layer, then one per MTP block: 0 is sliding window only, 4 is overlapping
    windows chosen by an indexer (CSA), any other ratio is plain windows, all of them visible (HCA: 128).
    act_quant switches the activation fake-quantisation of docs/v4.md#quantised-points, expert_qat ("fp4", "fp8") lets training see the routed
    experts as that format will store them (docs/v4.md#training); set them before tracing.
    """

    vocab_size: int = 129280
    dim: int = 4096
    moe_inter_dim: int = 2048
    n_layers: int = 43
    n_hash_layers: int = 3
    n_mtp_layers: int = 1
    n_heads: int = 64
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    n_activated_experts: int = 6
    score_func: str = "sqrtsoftplus"
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    q_lora_rank: int = 1024
    head_dim: int = 512
    rope_head_dim: int = 64
    norm_eps: float = 1e-6
    o_groups: int = 8
    o_lora_rank: int = 1024
    window_size: int = 128
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4, 0)
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    original_seq_len: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    max_seq_len: int = 1048576
    expert_dtype: str | None = "fp4"
    bos_id: int = 0
    eos_id: int = 1
    act_quant: bool = False
    expert_qat: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type in ("int", "float"):
                least = (
                    0
                    if name
                    in ("n_hash_layers", "n_mtp_layers", "original_seq_len", "bos_id", "eos_id")
                    else 1e-30
                )
                kind = int if field.type == "int" else (int, float)
                require(
                    isinstance(value, kind)
                    and not isinstance(value, bool)
                    and least <= value < math.inf,
                    f"{name} must be {'a positive' if least else 'a non-negative'} {field.type}, not {value!r}",
                )
        require(
            isinstance(self.compress_ratios, (list, tuple))
            and all(type(r) is int for r in self.compress_ratios),
            f"compress_ratios must be a list of ints, not {self.compress_ratios!r}",
        )
        self.compress_ratios = tuple(self.compress_ratios)
        for name, only in dict(score_func="sqrtsoftplus", n_shared_experts=1).items():
            require(
                getattr(self, name) == only, f"{name} must be {only!r}, not {getattr(self, name)!r}"
            )
        require(
            self.expert_qat in (None, "fp4", "fp8"),
            f"expert_qat must be 'fp4', 'fp8' or None, not {self.expert_qat!r}",
        )
        require(
            self.n_mtp_layers in (0, 1), f"n_mtp_layers must be 0 or 1, not {self.n_mtp_layers}"
        )
        require(
            0 <= self.n_hash_layers <= self.n_layers,
            f"n_hash_layers is {self.n_hash_layers} of {self.n_layers} layers",
        )
        count = self.n_layers + self.n_mtp_layers
        require(
            len(self.compress_ratios) == count,
            f"compress_ratios has {len(self.compress_ratios)} entries, not "
            f"{count} (one per layer, then one per MTP block)",
        )
        require(
            all(r == 0 or r > 1 for r in self.compress_ratios),
            f"compress_ratios holds an entry that is neither 0 nor > 1: {self.compress_ratios}",
        )
        require(
            not any(self.compress_ratios[self.n_layers :]),
            "compress_ratios of an MTP block must be 0",
        )
        require(
            self.n_heads % self.o_groups == 0,
            f"o_groups {self.o_groups} does not divide n_heads {self.n_heads}",
        )
        require(
            self.n_activated_experts <= self.n_routed_experts,
            f"n_activated_experts {self.n_activated_experts} exceeds "
            f"n_routed_experts {self.n_routed_experts}",
        )
        for name in ("head_dim", "index_head_dim"):
            require(
                self.rope_head_dim <= getattr(self, name),
                f"rope_head_dim {self.rope_head_dim} exceeds {name} {getattr(self, name)}",
            )
        for name in ("rope_theta", "compress_rope_theta"):
            require(getattr(self, name) > 1, f"{name} must be above 1, not {getattr(self, name)}")
        require(self.rope_head_dim % 2 == 0, f"rope_head_dim {self.rope_head_dim} is odd")
        require(
            not self.act_quant
            or self.index_head_dim & (self.index_head_dim - 1) == 0
            or 4 not in self.compress_ratios,
            f"index_head_dim {self.index_head_dim} is no power of two, as the Hadamard transform of act_quant needs",
        )

    @classmethod
    def flash(cls) -> ModelArgs:
        """DeepSeek-V4-Flash: 284 B parameters, 13 B active."""
        return cls()

    @classmethod
    def pro(cls) -> ModelArgs:
        """DeepSeek-V4-Pro: 1.6 T parameters, 49 B active."""
        return cls(
            dim=7168,
            moe_inter_dim=3072,
            n_layers=61,
            n_heads=128,
            n_routed_experts=384,
            route_scale=2.5,
            q_lora_rank=1536,
            o_groups=16,
            index_topk=1024,
            compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        )

    @classmethod
    def tiny(cls) -> ModelArgs:
        """The embedded model: every layer kind at a size that two CPU cores train and serve."""
        return cls(
            vocab_size=1024,
            dim=256,
            moe_inter_dim=128,
            n_layers=6,
            n_hash_layers=2,
            n_heads=8,
            n_routed_experts=16,
            n_activated_experts=4,
            q_lora_rank=128,
            head_dim=64,
            rope_head_dim=16,
            o_groups=2,
            o_lora_rank=128,
            index_n_heads=16,
            index_head_dim=32,
            index_topk=64,
            max_seq_len=2048,
            compress_ratios=(0, 0, 4, 128, 4, 128, 0),
        )

    @classmethod
    def debug(cls) -> ModelArgs:
        """The smallest model with every layer kind: ratios 0, 4 and 128, hash and score routing, MTP."""
        return cls(
            vocab_size=256,
            dim=64,
            moe_inter_dim=32,
            n_layers=4,
            n_hash_layers=2,
            n_heads=4,
            n_routed_experts=8,
            n_activated_experts=2,
            q_lora_rank=32,
            head_dim=32,
            rope_head_dim=16,
            o_groups=2,
            o_lora_rank=16,
            index_n_heads=16,
            index_head_dim=16,
            index_topk=16,
            max_seq_len=2048,
            compress_ratios=(0, 4, 128, 4, 0),
        )

    @classmethod
    def from_json(cls, path) -> ModelArgs:
        """Read a released `config.json` (Hugging Face keys) or the official inference `config.json`.

        A folder means its config.json. Keys that describe no V4, unknown keys, missing keys and impossible values are
        ValueErrors naming the file and the key.
        """
        path = str(path) if str(path).endswith(".json") else f"{path}/config.json"
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); a checkpoint folder holds a config.json"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        require(isinstance(config, dict), f"{path}: not a JSON object")
        try:
            return cls(**_translate(config))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_hf(self) -> dict:
        """The released `config.json` as a dict: Hugging Face keys, no quantization_config."""
        config = {key: getattr(self, name) for key, name in _HF_NAMES.items()} | _HF_FIXED
        config["compress_ratios"] = list(self.compress_ratios)
        config["rope_scaling"] = (
            None
            if not self.original_seq_len
            else {"type": "yarn", **{key: getattr(self, name) for key, name in _HF_YARN.items()}}
        )
        return {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", **config}


_HF_NAMES = dict(
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
_HF_YARN = dict(
    factor="rope_factor",
    original_max_position_embeddings="original_seq_len",
    beta_fast="beta_fast",
    beta_slow="beta_slow",
)
_HF_FIXED = dict(
    attention_bias=False,
    attention_dropout=0.0,
    hidden_act="silu",
    norm_topk_prob=True,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    topk_method="noaux_tc",
)  # V4 has no other value
_OPTIONAL = set(
    "expert_dtype bos_id eos_id n_mtp_layers max_seq_len hc_eps norm_eps n_shared_experts score_func".split()
)
_METADATA = set(
    "architectures model_type torch_dtype dtype transformers_version use_cache initializer_range "
    "quantization_config rope_scaling pad_token_id auto_map _name_or_path max_batch_size scale_fmt".split()
)


def _translate(config: dict) -> dict:
    """Config keys of either kind -> ModelArgs fields."""
    require(
        config.get("model_type", "deepseek_v4") == "deepseek_v4",
        f"model_type is {config.get('model_type')!r}, not 'deepseek_v4': this is DeepSeek-V4 only",
    )
    names = config.get("architectures") or []
    require(isinstance(names, list), f"architectures must be a list, not {names!r}")
    for name in names:
        require(
            re.match(r"DeepseekV4(?!\d)", str(name)),
            f"architectures names {name!r}: this is DeepSeek-V4 only",
        )
    for key in ("rope_scaling", "quantization_config"):
        require(
            isinstance(config.get(key) or {}, dict),
            f"{key} must be an object, not {config.get(key)!r}",
        )
    fields = {field.name for field in dataclasses.fields(ModelArgs)} - {
        "act_quant",
        "expert_qat",
        "bos_id",
        "eos_id",
    }
    official = "dim" in config
    names = {name: name for name in fields} if official else dict(_HF_NAMES)
    args, dspark = {}, any(key.startswith("dspark_") for key in config)
    for key, value in config.items():
        if key in names:
            args[names[key]] = value
        elif key in _HF_FIXED:
            require(value == _HF_FIXED[key], f"{key} is {value!r}; V4 has {_HF_FIXED[key]!r}")
        else:
            require(
                key in _METADATA or key.startswith("dspark_"),
                f"unknown key {key!r}: not a DeepSeek-V4 config",
            )
    if not official:
        yarn = config.get("rope_scaling") or dict(
            factor=1.0, original_max_position_embeddings=0, beta_fast=32, beta_slow=1
        )
        kind = yarn.get("type", yarn.get("rope_type", "yarn"))
        require(kind == "yarn", f"rope_scaling type {kind!r} is not 'yarn'")
        for key in _HF_YARN:
            require(key in yarn, f"rope_scaling lacks {key!r}")
            args[_HF_YARN[key]] = yarn[key]
    missing = sorted(
        key for key, name in names.items() if name not in args and name not in _OPTIONAL
    )
    require(
        not missing,
        f"missing key {missing[0] if missing else ''!r}: not a complete DeepSeek-V4 config",
    )
    args.setdefault("expert_dtype", None)
    args["act_quant"] = bool(config.get("quantization_config")) or (
        official and config.get("dtype") == "fp8"
    )
    ratios, n_layers = args["compress_ratios"], args["n_layers"]
    if isinstance(ratios, list) and isinstance(n_layers, int):
        if dspark:  # the -0731 drafter is another block (docs/v4.md#later-variants): the backbone loads, MTP is off
            args |= dict(n_mtp_layers=0, compress_ratios=ratios[:n_layers])
        args.setdefault("n_mtp_layers", len(ratios) - n_layers)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Positions


class Windows(NamedTuple):
    """The compression windows of one ratio R that end in this call, and which entries each token sees (docs/v4.md#attention, #compressor).

    end    [B, E]  row of the window's last token among this call's tokens (may lie outside for a window not ending here)
    index  [B, E]  number of the window in its document, w; its position is w * R
    slot   [B, E]  where the entry is cached; the last slot is a bin for windows that do not end in this call
    phase  [B, T]  position of a token in its window, t mod R
    lo, hi [B, T]  a token sees the entries lo <= e < hi
    cos, sin [B, E, r/2]  RoPE of the entries
    """

    end: torch.Tensor
    index: torch.Tensor
    slot: torch.Tensor
    phase: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Plan(NamedTuple):
    """Everything that depends on positions alone: computed once per call, shared by all layers.

    row       [B, 1]   batch index
    pos       [B, T]   position of each token in its document (or in its conversation)
    seen      [B, T]   keys of the sliding window that a token sees, itself included: min(pos + 1, W)
    input_pos [B] or None   position of the first token; None in training
    lengths   [B]      valid tokens of each row
    rope      {compressed?: (cos, sin) [B, T, r/2]}
    windows   {R: Windows}
    valid     [B, T] or None   in packed rows: what is not padding
    watch     what layers note down besides their output, see Transformer.forward
    """

    row: torch.Tensor
    pos: torch.Tensor
    seen: torch.Tensor
    input_pos: torch.Tensor | None
    lengths: torch.Tensor | None
    rope: dict[bool, tuple[torch.Tensor, torch.Tensor]]
    windows: dict[int, Windows]
    valid: torch.Tensor | None = None
    watch: str | None = None


Notes = dict[str, torch.Tensor]  # what a layer notes down: see Transformer.forward


def rope_frequencies(args: ModelArgs, compressed: bool) -> torch.Tensor:
    """Angular frequency of each rotated pair, [r/2] fp32 (docs/v4.md#rope): plain for sliding layers, YaRN for compressed ones."""
    dim, base = args.rope_head_dim, args.compress_rope_theta if compressed else args.rope_theta
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if compressed and args.original_seq_len:
        low, high = (
            dim * math.log(args.original_seq_len / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (args.beta_fast, args.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = (
            (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low)
            / max(high - low, 1e-3)
        ).clamp(0, 1)
        freqs = freqs / args.rope_factor * ramp + freqs * (1 - ramp)
    return freqs


def make_plan(
    args: ModelArgs,
    freqs: torch.Tensor,
    tokens: torch.Tensor,
    ratios: set[int],
    max_seq_len: int,
    input_pos: torch.Tensor | None,
    lengths: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
    watch: str | None = None,
) -> Plan:
    """Positions, window boundaries, visibility and RoPE angles of a call. freqs [2, r/2]: sliding, compressed."""
    (B, T), device = tokens.shape, tokens.device
    row, col = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None]
    if input_pos is not None:
        valid = torch.full_like(input_pos, T) if lengths is None else lengths
        lengths = torch.minimum(valid, max_seq_len - input_pos).clamp(
            min=0
        )  # beyond the context nothing is stored
        pos = input_pos[:, None] + col
    elif doc_ids is not None:
        new = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))
        pos = col - torch.where(new, col, 0).cummax(1).values
    else:
        pos = col.expand(B, T)

    def angles(position, compressed):
        angle = position[..., None].float() * freqs[int(compressed)]
        return angle.cos(), angle.sin()

    windows = {}
    for R in sorted(ratios):
        e = torch.arange((T - 1) // R + 1, device=device)[
            None
        ]  # no more windows than this end in T tokens
        if input_pos is not None:
            index = input_pos[:, None] // R + e
            end = (index + 1) * R - 1 - input_pos[:, None]
            lo, slot = (
                torch.zeros_like(pos),
                torch.where(end < lengths[:, None], index, -(-max_seq_len // R)),
            )
        else:  # a window ends in at most one of the tokens eR .. eR + R - 1, so a document's entries are consecutive
            last = F.pad((pos + 1) % R == 0, (0, -T % R)).unflatten(1, (-1, R))
            end = last.to(torch.int32).argmax(2) + e * R
            index = pos.gather(1, end.clamp(max=T - 1)) // R
            lo, slot = (col - pos + R - 1) // R, index
        windows[R] = Windows(
            end, index, slot, pos % R, lo, lo + (pos + 1) // R, *angles(index * R, True)
        )
    rope = {compressed: angles(pos, compressed) for compressed in (False, True)}
    return Plan(
        row,
        pos,
        (pos + 1).clamp(max=args.window_size),
        input_pos,
        lengths,
        rope,
        windows,
        None if doc_ids is None else doc_ids >= 0,
        watch,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim, in fp32, one cast back (docs/v4.md#whole-model)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = x.float()
        return (
            v * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        ).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T without bias. `fp8` marks the linears whose weight the released checkpoint stores in FP8 (docs/v4.md#quantised-points, #checkpoint).

    Those see fake-quantised inputs under act_quant. When a checkpoint is loaded natively, weight stays float8_e4m3fn and
    scale holds its 128 x 128 block scales. groups > 1 is block-diagonal: x [..., g, in] -> [..., g, out / g].
    """

    def __init__(
        self, model: Transformer, dim_in: int, dim_out: int, fp8: bool = False, groups: int = 1
    ):
        super().__init__()
        self.args, self.ops, self.fp8, self.groups = model.args, model.ops, fp8, groups
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.register_parameter("scale", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act_quant = (
            self.args.act_quant and self.fp8 and self.groups == 1
        )  # wo_a, the grouped one, reads plain inputs
        if self.scale is not None:
            return self.ops.quant_linear(x, self.weight, self.scale, self.groups, act_quant)
        if act_quant:
            x = self.ops.act_quant(x, 128, "fp8")
        if self.groups > 1:
            return torch.einsum("...gi,goi->...go", x, self.weight.unflatten(0, (self.groups, -1)))
        return F.linear(x, self.weight)


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T with fp32 arithmetic and result, whatever the dtypes: router, compressor, head (docs/v4.md#quantised-points)."""
    return F.linear(x.float(), weight.float())


def fake_quant_ste(w: torch.Tensor, fmt: str) -> torch.Tensor:
    """Weights [..., o, i] as "fp4" or "fp8" stores them (docs/v4.md#checkpoint); the gradient passes straight through."""
    quantize, dequantize = (
        (quantize_fp4, dequantize_fp4) if fmt == "fp4" else (quantize_fp8, dequantize_fp8)
    )
    return dequantize(*quantize(w.detach()), w.dtype) + (w - w.detach())


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dim (a power of two), natural order (docs/v4.md#indexer)."""
    n = x.shape[-1]
    require(
        n & (n - 1) == 0,
        f"the Hadamard transform of act_quant needs a power of two, not index_head_dim {n}",
    )
    i = torch.arange(n, device=x.device)
    parity = i[:, None] & i
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return ((x.float() @ (1 - 2 * (parity & 1)).float()) * n**-0.5).to(x.dtype)


class Ring(nn.Module):
    """The last rows of a per-token tensor, addressed by position modulo the ring's size.

    `ring(new, plan)` returns the `back` rows before this call, in order, followed by the new ones, and only then stores
    the new ones. The ring is max_rewind longer than it looks back, so setting positions back needs no other rollback:
    rows of rejected tokens lie out of sight until they are overwritten. In training the older rows are zeros.
    """

    def __init__(self, back: int):
        super().__init__()
        self.back = back

    def setup(
        self, batch: int, dim: int, max_rewind: int, dtype: torch.dtype, device: torch.device
    ):
        rows = torch.zeros(
            batch, self.back + 1 + max_rewind + 1, dim, dtype=dtype, device=device
        )  # last row: a bin
        self.register_buffer("rows", rows, persistent=False)

    def forward(
        self, new: torch.Tensor, plan: Plan
    ) -> torch.Tensor:  # [B, T, C] -> [B, back + T, C]
        if plan.input_pos is None:
            return F.pad(new, (0, 0, self.back, 0))
        size, pos = self.rows.shape[1] - 1, plan.input_pos[:, None]
        old = self.rows[plan.row, (pos + torch.arange(-self.back, 0, device=new.device)) % size]
        rows = torch.cat([old, new.to(old.dtype)], 1)
        stored = min(new.shape[1], size)  # the last valid rows, one per slot
        col = plan.lengths[:, None] + torch.arange(-stored, 0, device=new.device)
        slot = torch.where(col >= 0, (pos + col) % size, size)
        # Taking them from the rows read makes the write depend on the read, so that Inductor may write in place.
        self.rows.index_put_(
            (plan.row, slot), rows.detach()[plan.row, (self.back + col).clamp(min=0)]
        )
        return rows


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Compressor(nn.Module):
    """Pools windows of R tokens into entries, by a softmax per channel (docs/v4.md#compressor).

    With overlap (R = 4) an entry also pools the previous window, in the first half of the channels ("lookback lane").
    The indexer's own compressor has rotate=True: Hadamard and fp4 under act_quant, instead of fp8.
    """

    def __init__(self, model: Transformer, ratio: int, dim: int, rotate: bool = False):
        super().__init__()
        args = model.args
        self.args, self.ops, self.ratio, self.dim, self.rotate = args, model.ops, ratio, dim, rotate
        lanes = 2 if ratio == 4 else 1
        self.ape = nn.Parameter(torch.empty(ratio, lanes * dim, dtype=torch.float32))
        self.wkv = Linear(model, args.dim, lanes * dim)
        self.wgate = Linear(model, args.dim, lanes * dim)
        self.norm = RMSNorm(dim, args.norm_eps)
        self.ring = Ring(lanes * ratio - 1)

    def setup(
        self,
        batch: int,
        max_seq_len: int,
        max_rewind: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.ring.setup(batch, 2 * self.wkv.weight.shape[0], max_rewind, torch.float32, device)
        entries = torch.zeros(
            batch, -(-max_seq_len // self.ratio) + 1, self.dim, dtype=dtype, device=device
        )  # last: a bin
        self.register_buffer("entries", entries, persistent=False)

    def forward(
        self, x: torch.Tensor, plan: Plan
    ) -> torch.Tensor:  # [B, T, d] -> all entries so far [B, E, D]
        win = plan.windows[self.ratio]
        score = linear_fp32(x, self.wgate.weight) + self.ape.float()[win.phase]
        rows = self.ring(
            torch.cat([linear_fp32(x, self.wkv.weight), score], -1), plan
        )  # [B, back + T, 2 * lanes * D]
        new = self.ops.compress(
            rows,
            win.end + self.ring.back,
            win.index,
            self.norm.weight,
            win.cos,
            win.sin,
            self.ratio,
            self.args.norm_eps,
            x.dtype,
        )
        if self.args.act_quant:
            new = (
                self.ops.act_quant(hadamard(new), 32, "fp4")
                if self.rotate
                else quantize_kv(self, new)
            )
        if plan.input_pos is None:
            return new
        self.entries.index_put_((plan.row, win.slot), new.detach().to(self.entries.dtype))
        return self.entries[: x.shape[0], :-1]


def quantize_kv(module: nn.Module, kv: torch.Tensor) -> torch.Tensor:
    """Fake fp8 on all but the rotated dims of keys, in blocks of 64 (docs/v4.md#attention, #quantised-points)."""
    nope, rope = kv.tensor_split([kv.shape[-1] - module.args.rope_head_dim], -1)
    return torch.cat([module.ops.act_quant(nope, 64, "fp8"), rope], -1)


class Indexer(nn.Module):
    """Scores entries by sum_h u_h relu(q_h . k); a token attends to the index_topk best (docs/v4.md#indexer).

    It learns from an objective of its own alone (docs/v4.md#training): see judge.
    """

    def __init__(self, model: Transformer, ratio: int):
        super().__init__()
        args = model.args
        self.args, self.ops, self.ratio = args, model.ops, ratio
        self.wq_b = Linear(
            model, args.q_lora_rank, args.index_n_heads * args.index_head_dim, fp8=True
        )
        self.weights_proj = Linear(model, args.dim, args.index_n_heads)
        self.compressor = Compressor(model, ratio, args.index_head_dim, rotate=True)

    def forward(
        self, x: torch.Tensor, qr: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        args = self.args
        q = self.wq_b(qr).unflatten(-1, (args.index_n_heads, args.index_head_dim))  # [B, T, Hi, Di]
        q = self.ops.rope(q, *plan.rope[True], False)
        if args.act_quant:
            q = self.ops.act_quant(hadamard(q), 32, "fp4")
        u = self.weights_proj(x) * (
            args.index_head_dim**-0.5 * args.index_n_heads**-0.5
        )  # [B, T, Hi]
        return q, self.compressor(x, plan), u

    def judge(
        self,
        attention: tuple[torch.Tensor, ...],
        index: tuple[torch.Tensor, ...],
        chosen: torch.Tensor | None,
        plan: Plan,
    ) -> Notes:
        """How far scores are from the main attention, q, cos, sin, entries, lse of ops.sparse_attn; index is what forward returned.

        index_loss  ()   sum over rows of the mean over tokens of ops.indexer_loss
        recall      [2]  with watch = "recall": over tokens that see more than index_topk entries, the sum of the share of the
                         index_topk most attended entries that score among the index_topk best; and their number
        """
        win, eps = plan.windows[self.ratio], self.args.norm_eps
        loss = self.ops.indexer_loss(*attention, *index, win.lo, win.hi, chosen, eps)  # [B, T]
        notes = {"index_loss": (loss if plan.valid is None else loss * plan.valid).mean(1).sum()}
        if plan.watch == "recall":
            found, _ = indexer_recall(*attention, *index, win.lo, win.hi, self.args.index_topk, eps)
            some = win.hi - win.lo > self.args.index_topk
            notes["recall"] = torch.stack([(found * some).sum(), some.sum()])
        return notes


INDEXERS_LEARN = ("chosen", "dense", "recall")  # watch


class Attention(nn.Module):
    """Multi-query attention over the sliding window and the compressed entries, one softmax with a sink (docs/v4.md#attention).

    Keys and values are the same latent, shared by all heads. Queries come from a low-rank projection and are normalised
    per head (in the op); outputs are rotated back (there too) and go through a grouped low-rank projection.
    """

    def __init__(self, model: Transformer, ratio: int):
        super().__init__()
        args = model.args
        self.args, self.ops, self.ratio = args, model.ops, ratio
        H, D, g = args.n_heads, args.head_dim, args.o_groups
        self.wq_a = Linear(model, args.dim, args.q_lora_rank, fp8=True)
        self.q_norm = RMSNorm(args.q_lora_rank, args.norm_eps)
        self.wq_b = Linear(model, args.q_lora_rank, H * D, fp8=True)
        self.wkv = Linear(model, args.dim, D, fp8=True)
        self.kv_norm = RMSNorm(D, args.norm_eps)
        self.wo_a = Linear(model, H * D // g, g * args.o_lora_rank, fp8=True, groups=g)
        self.wo_b = Linear(model, g * args.o_lora_rank, args.dim, fp8=True)
        self.attn_sink = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.ring = Ring(args.window_size - 1)
        if ratio:
            self.compressor = Compressor(model, ratio, D)
        if ratio == 4:
            self.indexer = Indexer(model, ratio)

    def forward(
        self, x: torch.Tensor, plan: Plan, notes: Notes
    ) -> torch.Tensor:  # [B, T, d] -> [B, T, d]
        args, rope = self.args, plan.rope[self.ratio > 0]
        qr = self.q_norm(self.wq_a(x))  # [B, T, q_lora]
        q = self.wq_b(qr).unflatten(-1, (args.n_heads, args.head_dim))  # [B, T, H, D]
        kv = self.ops.rope(self.kv_norm(self.wkv(x)), *rope, False)  # [B, T, D]
        if args.act_quant:
            kv = quantize_kv(self, kv)
        keys = self.ring(kv, plan)  # [B, W - 1 + T, D]
        entries = lo = hi = chosen = None
        if self.ratio:
            win = plan.windows[self.ratio]
            entries, lo, hi = self.compressor(x, plan), win.lo, win.hi  # [B, E, D]
        learns = hasattr(self, "indexer") and plan.watch in INDEXERS_LEARN
        many = (
            hasattr(self, "indexer") and entries.shape[1] > args.index_topk
        )  # else every visible entry would be chosen
        if learns or many:
            index = (
                self.indexer(x.detach(), qr.detach(), plan) if learns else self.indexer(x, qr, plan)
            )
            if many and plan.watch not in ("dense", "recall"):
                chosen = self.ops.indexer_topk(
                    *index, lo, hi, args.index_topk
                )  # [B, T, K], -1 = none
        # The op normalises and rotates the queries, and rotates the output back: one pass over each, [B, T, H, D].
        o = self.ops.sparse_attn(
            q,
            keys,
            self.attn_sink,
            plan.seen,
            *rope,
            entries,
            lo,
            hi,
            chosen,
            args.norm_eps,
            learns,
        )
        if learns:
            o, lse = o
            notes |= self.indexer.judge((q, *rope, entries, lse), index, chosen, plan)
        return self.wo_b(self.wo_a(o.flatten(2).unflatten(-1, (args.o_groups, -1))).flatten(2))


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts


class Gate(nn.Module):
    """Chooses K experts per token and their weights (docs/v4.md#experts): by token id in hash layers, else by score plus bias."""

    def __init__(self, model: Transformer, hashed: bool):
        super().__init__()
        args = self.args = model.args
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        if hashed:
            self.register_buffer(
                "tid2eid", torch.empty(args.vocab_size, args.n_activated_experts, dtype=torch.int64)
            )
        else:
            self.bias = nn.Parameter(
                torch.empty(args.n_routed_experts, dtype=torch.float32), requires_grad=False
            )

    def forward(
        self, x: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [N, d], [N]
        score = F.softplus(linear_fp32(x, self.weight)).sqrt()  # [N, E]
        if hasattr(self, "tid2eid"):
            chosen = self.tid2eid[tokens]
        else:
            chosen = (
                (score + self.bias.float())
                .topk(self.args.n_activated_experts, sorted=False)
                .indices
            )  # [N, K]
        weight = score.gather(1, chosen)  # the bias only selects
        return chosen, weight / weight.sum(-1, keepdim=True) * self.args.route_scale, score


class Expert(nn.Module):
    """w2(silu(w1 x) * w3 x) with clamped pre-activations, fp32 inside (docs/v4.md#experts): the shared expert."""

    def __init__(self, model: Transformer):
        super().__init__()
        args = self.args = model.args
        self.w1 = Linear(model, args.dim, args.moe_inter_dim, fp8=True)
        self.w2 = Linear(model, args.moe_inter_dim, args.dim, fp8=True)
        self.w3 = Linear(model, args.dim, args.moe_inter_dim, fp8=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        limit = self.args.swiglu_limit
        gate, up = self.w1(x).float().clamp(max=limit), self.w3(x).float().clamp(-limit, limit)
        return self.w2((F.silu(gate) * up).to(x.dtype))


class Experts(nn.Module):
    """The routed experts, stacked: w13 [E, 2I, d] (w1 rows first), w2 [E, d, I].

    When a checkpoint is loaded natively they stay packed (FP4 int8 [E, 2I, d/2] or FP8) beside w13_scale, w2_scale.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        args = self.args = model.args
        self.ops = model.ops
        E, I, d = args.n_routed_experts, args.moe_inter_dim, args.dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * I, d))
        self.w2 = nn.Parameter(torch.empty(E, d, I))
        self.register_parameter("w13_scale", None)
        self.register_parameter("w2_scale", None)

    def forward(
        self, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:  # -> [N, d] fp32
        w13, w2 = self.w13, self.w2
        if self.args.expert_qat:
            w13 = fake_quant_ste(w13.unflatten(1, (2, -1)), self.args.expert_qat).flatten(
                1, 2
            )  # W1 and W3 have scales of their own
            w2 = fake_quant_ste(w2, self.args.expert_qat)
        return self.ops.moe(
            x,
            w13,
            w2,
            chosen,
            weight,
            self.w13_scale,
            self.w2_scale,
            self.args.swiglu_limit,
            self.args.act_quant,
        )


def dispatch_locally(
    experts: Experts, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """All routed experts live in this process; parallel.py has the dispatcher for several."""
    return experts(x, chosen, weight)


class MoE(nn.Module):
    """Routed experts plus one shared expert (docs/v4.md#experts).

    dispatch(experts, x [N, d], chosen [N, K], weight [N, K]) -> [N, d] fp32 brings tokens to their experts and back.
    """

    def __init__(self, model: Transformer, hashed: bool):
        super().__init__()
        self.gate = Gate(model, hashed)
        self.experts = Experts(model)
        self.shared_experts = Expert(model)
        self.dispatch: Callable[..., torch.Tensor] = dispatch_locally

    def forward(
        self, x: torch.Tensor, tokens: torch.Tensor, plan: Plan, notes: Notes
    ) -> torch.Tensor:  # -> [B, T, d]
        flat = x.flatten(0, 1)
        chosen, weight, score = self.gate(flat, tokens.flatten())
        if plan.watch and hasattr(self.gate, "bias"):
            notes |= balance(
                chosen.view(*tokens.shape, -1), score.view(*tokens.shape, -1), plan.valid
            )
        routed = self.dispatch(self.experts, flat, chosen, weight)
        return (routed + self.shared_experts(flat).float()).to(x.dtype).view_as(x)


def balance(chosen: torch.Tensor, score: torch.Tensor, valid: torch.Tensor | None) -> Notes:
    """How evenly a router spreads the tokens of a row (docs/v4.md#training). chosen [B, T, K], score [B, T, E], valid [B, T].

    load     [E]  tokens that chose each expert
    balance  ()   sum over rows of sum_e f_e P_e, f_e = E / (K T) tokens that chose e, P_e the mean share of e in the scores
    """
    E, valid = (
        score.shape[-1],
        torch.ones(chosen.shape[:2], device=score.device) if valid is None else valid.float(),
    )
    picked = (chosen[..., None] == torch.arange(E, device=score.device)).sum(2) * valid[
        ..., None
    ]  # [B, T, E]
    share = score / score.sum(-1, keepdim=True) * valid[..., None]
    load, T = picked.sum(1), valid.sum(1, keepdim=True).clamp(min=1)  # [B, E], [B, 1]
    return {
        "load": load.sum(0),
        "balance": (load * (E / chosen.shape[-1]) / T * share.sum(1) / T).sum(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-connections, blocks, model


def hc_params(
    args: ModelArgs, rows: int, scales: int
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """fn [rows, n d], base [rows], scale [scales] of one hyper-connection site, fp32 (docs/v4.md#hyper-connections)."""
    shapes = (rows, args.hc_mult * args.dim), rows, scales
    return tuple(nn.Parameter(torch.empty(shape, dtype=torch.float32)) for shape in shapes)


def hc_head(
    X: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, args: ModelArgs
) -> torch.Tensor:
    """Collapse the streams at the end of the model (docs/v4.md#hyper-connections): [B, T, n, d] -> [B, T, d]."""
    v = X.flatten(2).float()
    mix = F.linear(v, fn.float()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + args.norm_eps)
    pre = torch.sigmoid(mix * scale.float() + base.float()) + args.hc_eps  # [B, T, n]
    return (pre[..., None] * X.float()).sum(2).to(X.dtype)


class Block(nn.Module):
    """Attention, then mixture of experts, each reading and writing the n residual streams through mHC (docs/v4.md#whole-model, #hyper-connections)."""

    def __init__(self, model: Transformer, layer: int):
        super().__init__()
        args = self.args = model.args
        self.ops = model.ops
        self.attn = Attention(model, args.compress_ratios[layer])
        self.ffn = MoE(model, hashed=layer < args.n_hash_layers)
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        rows = (2 + args.hc_mult) * args.hc_mult
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = hc_params(args, rows, 3)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = hc_params(args, rows, 3)

    def forward(
        self, X: torch.Tensor, tokens: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, Notes]:  # X [B, T, n, d]
        notes: Notes = {}
        constants = self.args.norm_eps, self.args.hc_eps, self.args.hc_sinkhorn_iters
        x, post, comb = self.ops.hc_pre(
            X, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, *constants
        )
        y = self.attn(self.attn_norm(x), plan, notes)
        X, x, post, comb = self.ops.hc_post_pre(
            y, X, post, comb, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, *constants
        )
        return self.ops.hc_post(
            self.ffn(self.ffn_norm(x), tokens, plan, notes), X, post, comb
        ), notes


class MTPBlock(Block):
    """Predicts the token after next from the last residual streams and the next token (docs/v4.md#mtp)."""

    def __init__(self, model: Transformer, layer: int):
        super().__init__(model, layer)
        args = model.args
        self.e_proj = Linear(model, args.dim, args.dim, fp8=True)
        self.h_proj = Linear(model, args.dim, args.dim, fp8=True)
        self.enorm = RMSNorm(args.dim, args.norm_eps)
        self.hnorm = RMSNorm(args.dim, args.norm_eps)
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_params(args, args.hc_mult, 1)

    def forward(
        self, H: torch.Tensor, e: torch.Tensor, tokens: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, Notes]:
        X = self.e_proj(self.enorm(e))[:, :, None] + self.h_proj(self.hnorm(H))  # [B, T, n, d]
        return super().forward(X, tokens, plan)


class MTP(nn.ModuleList):
    """`model.mtp`: the MTP blocks (none or one), callable; it shares the model's embedding, head and plans."""

    def __init__(self, model: Transformer):
        args = model.args
        super().__init__(MTPBlock(model, args.n_layers + k) for k in range(args.n_mtp_layers))
        self._model = (model,)  # a tuple, so that the model is not its own grandchild

    def forward(
        self,
        hidden: torch.Tensor,
        next_tokens: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        logits: str | None = "all",
        watch: str | None = None,
    ):
        """hidden [B, T, n, d] and the tokens that follow its positions [B, T] -> (logits [B, T, V] or None, hidden').

        Slot i has the position of hidden[:, i] and predicts the token two further. hidden' can be fed back to draft
        one more; such rows are provisional until the accepted positions are fed again with the true hidden.
        Other arguments as in Transformer.forward (watch: the block's notes are returned, too). In packed rows a document's
        last slot sees no next token.
        """
        if not len(self):
            raise ValueError("this model has no MTP block (n_mtp_layers is 0)")
        model, block = self._model[0], self[0]
        tokens, plan, e = self.start(next_tokens, input_pos, lengths, doc_ids, watch)
        X, notes = block(hidden, e, tokens, plan)
        y = (
            None
            if logits is None
            else linear_fp32(self.head_input(model.select(X, plan, logits)), model.head.weight)
        )
        return (y, X, [notes]) if watch else (y, X)

    def start(
        self, next_tokens, input_pos=None, lengths=None, doc_ids=None, watch=None
    ) -> tuple[torch.Tensor, Plan, torch.Tensor]:
        """What comes before the block: checked tokens [B, T], the plan, and the embedded tokens [B, T, d]."""
        model = self._model[0]
        tokens, plan = model.prepare(next_tokens, set(), input_pos, lengths, doc_ids, watch)
        e = model.embed(tokens)
        if doc_ids is not None:
            e = e * F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (0, 1), value=True)[..., None]
        return tokens, plan, e

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden' [B, T, n, d] -> what the head multiplies, [B, T, d]."""
        block = self[0]
        return block.norm(
            hc_head(hidden, block.hc_head_fn, block.hc_head_base, block.hc_head_scale, block.args)
        )


class Transformer(nn.Module):
    """The whole model. Parameters are created in the default dtype (fp32 islands excepted) on the default device.

    ops maps op names to "reference" or "opaque" (see ops/registry.py); the rest follow `ops.use`, then the device.
    """

    def __init__(self, args: ModelArgs, ops: dict[str, str] | None = None):
        super().__init__()
        self.args, self.ops = args, Table(ops)
        self.cache_size: tuple[int, int, int] | None = (
            None  # (max_batch_size, max_seq_len, max_rewind)
        )
        self.cache_generation = 0  # raised by whoever empties, replaces or takes over the caches
        self.embed = nn.Embedding(
            args.vocab_size, args.dim, _weight=torch.empty(args.vocab_size, args.dim)
        )
        self.layers = nn.ModuleList(Block(self, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = Linear(self, args.dim, args.vocab_size)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_params(args, args.hc_mult, 1)
        self.mtp = MTP(self)
        self.register_buffer("freqs", torch.empty(2, args.rope_head_dim // 2), persistent=False)
        self._fill_freqs()
        self.register_load_state_dict_post_hook(
            Transformer._fill_freqs
        )  # a meta model may be given its weights
        self.reset_parameters()

    def _fill_freqs(self, *_) -> None:
        if not self.embed.weight.is_meta:
            freqs = [rope_frequencies(self.args, compressed) for compressed in (False, True)]
            self.freqs = torch.stack(freqs).to(self.embed.weight.device)

    def _apply(self, fn, recurse=True):
        """Moves and casts leave RoPE frequencies in fp32 and caches (emptied) in the dtypes that the spec gives them."""
        super()._apply(fn, recurse)
        self._fill_freqs()
        if self.cache_size:
            self.setup_caches(*self.cache_size)
        return self

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02):
        """Random weights: normal(0, std) matrices, unit norms and hc scales, zero biases and sinks, spread-out hash routes."""
        if self.embed.weight.is_meta:
            return
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(float("norm" in name or name.endswith("_scale")))
            else:
                p.normal_(0, std)
        for name, tid2eid in self.named_buffers():
            if name.endswith("tid2eid"):
                V, K = tid2eid.shape
                spread = torch.arange(V, device=tid2eid.device)[:, None] * K + torch.arange(
                    K, device=tid2eid.device
                )
                tid2eid.copy_(spread % self.args.n_routed_experts)

    def setup_caches(self, max_batch_size: int, max_seq_len: int, max_rewind: int = 8) -> None:
        """Allocate empty caches for generation; afterwards rows may hold conversations of up to max_seq_len tokens.

        A row may be set back to position 0, or by up to max_rewind below the highest position it has been fed since.
        Caches are constants to autograd: no gradient flows into earlier calls.
        """
        require(
            max_batch_size > 0 and max_seq_len > 0 and max_rewind >= 0,
            "setup_caches: max_batch_size and max_seq_len must be "
            f"positive, max_rewind non-negative, not {max_batch_size}, {max_seq_len}, {max_rewind}",
        )
        dtype, device = self.embed.weight.dtype, self.embed.weight.device
        with torch.inference_mode(False):  # buffers that any mode may write
            for module in self.modules():
                if isinstance(module, Attention):
                    module.ring.setup(max_batch_size, self.args.head_dim, max_rewind, dtype, device)
                elif isinstance(module, Compressor):
                    module.setup(max_batch_size, max_seq_len, max_rewind, dtype, device)
        self.cache_size = (max_batch_size, max_seq_len, max_rewind)
        self.cache_generation += 1

    def reset_caches(self) -> None:
        """Empty the caches in place (not needed before a new conversation: position 0 starts one)."""
        for name, buffer in self.named_buffers():
            if name.endswith(("ring.rows", ".entries")):
                buffer.zero_()
        self.cache_generation += 1

    def prepare(
        self, tokens, ratios, input_pos, lengths, doc_ids, watch=None
    ) -> tuple[torch.Tensor, Plan]:
        """Check the combination of arguments, blank padding tokens, and plan the call."""
        require(
            watch in (None, "routers", *INDEXERS_LEARN),
            f"watch {watch!r}: choose routers, {', '.join(INDEXERS_LEARN)} or None",
        )
        if input_pos is None and lengths is not None:
            raise ValueError("lengths needs input_pos")
        if input_pos is not None:
            if doc_ids is not None:
                raise ValueError(
                    "doc_ids and input_pos exclude each other: packed documents are for training"
                )
            if self.cache_size is None:
                raise ValueError(
                    "call setup_caches(max_batch_size, max_seq_len) before passing input_pos"
                )
            if tokens.shape[0] > self.cache_size[0]:
                raise ValueError(
                    f"batch {tokens.shape[0]} exceeds max_batch_size {self.cache_size[0]} of setup_caches"
                )
        max_seq_len = self.cache_size[1] if input_pos is not None else tokens.shape[1]
        plan = make_plan(
            self.args, self.freqs, tokens, ratios, max_seq_len, input_pos, lengths, doc_ids, watch
        )
        if lengths is not None:
            tokens = tokens.masked_fill(
                torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None], 0
            )
        elif doc_ids is not None:
            tokens = tokens.masked_fill((doc_ids < 0) | (tokens < 0), 0)
        return tokens, plan

    def select(self, X: torch.Tensor, plan: Plan, logits: str) -> torch.Tensor:
        """The positions that get logits: all of them, or each row's last valid one ([B, 1, ...])."""
        if logits not in ("all", "last"):
            raise ValueError(f"logits is {logits!r}: choose 'all', 'last' or None")
        if logits == "all":
            return X
        return (
            X[:, -1:]
            if plan.lengths is None
            else X[plan.row, (plan.lengths[:, None] - 1).clamp(min=0)]
        )

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual streams [B, T, n, d] -> what the head multiplies, [B, T, d]."""
        return self.norm(
            hc_head(hidden, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.args)
        )

    def forward(
        self,
        tokens: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        logits: str | None = "all",
        return_hidden: bool = False,
        watch: str | None = None,
    ):
        """tokens [B, T] int64 -> logits [B, T, V] fp32.

        input_pos [B] int64  position of each row's first token: read and extend the caches. None: no cache (training).
        lengths   [B] int64  columns at or past it are padding: nothing is stored, their logits mean nothing.
        doc_ids   [B, T]     packed documents (training), non-decreasing, -1 = padding: each one is on its own.
        logits    "all", "last" (each row's last valid position, [B, 1, V]) or None (skip the head)
        return_hidden        return (logits, hidden): the residual streams [B, T, n, d] after the last block
        watch                return (logits, hidden, notes): of each layer what training wants besides, a dict. "routers": see
                             balance. "chosen", "dense", "recall": see Indexer.judge as well; the latter two let attention see
                             every visible entry.
        """
        tokens, plan, X = self.start(tokens, input_pos, lengths, doc_ids, watch)
        notes = [{}] * len(self.layers)
        for i, layer in enumerate(self.layers):
            X, notes[i] = layer(X, tokens, plan)
        y = self.finish(X, plan, logits)
        return (y, X, notes) if watch else (y, X) if return_hidden else y

    def start(
        self, tokens, input_pos=None, lengths=None, doc_ids=None, watch=None
    ) -> tuple[torch.Tensor, Plan, torch.Tensor]:
        """What comes before the layers: checked tokens [B, T], the plan, and the streams [B, T, n, d], all equal."""
        tokens, plan = self.prepare(
            tokens, set(self.args.compress_ratios) - {0}, input_pos, lengths, doc_ids, watch
        )
        return tokens, plan, self.embed(tokens)[:, :, None].repeat(1, 1, self.args.hc_mult, 1)

    def finish(self, X: torch.Tensor, plan: Plan, logits: str | None) -> torch.Tensor | None:
        """What comes after the layers: the logits asked for, fp32."""
        return (
            None
            if logits is None
            else linear_fp32(self.head_input(self.select(X, plan, logits)), self.head.weight)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Training


class LossWeights(NamedTuple):
    """What the parts of the training loss weigh beside next-token cross-entropy (docs/v4.md#training)."""

    mtp: float = 0.3
    balance: float = 1e-4
    index: float = 1.0


class Targets(NamedTuple):
    """What some rows of a training step aim at.

    next       [B, S]  the token that follows each token; negative = ignored
    after      [B, S]  the token after that, the MTP block's target; -1 where it lies outside the document or row
    following  [B, S]  the token that follows, known even where it is no target
    counts     [3]     of the whole step, in all processes: targets, the MTP block's targets, rows (fp32)
    """

    next: torch.Tensor
    after: torch.Tensor
    following: torch.Tensor
    counts: torch.Tensor


def make_targets(
    tokens: torch.Tensor, targets: torch.Tensor, doc_ids: torch.Tensor | None
) -> Targets:
    """tokens, targets [B, S] int64, targets[:, i] follows tokens[:, i], negative is ignored; doc_ids as in forward."""
    after = F.pad(targets[:, 1:], (0, 1), value=-1)
    if doc_ids is not None:
        after = after.masked_fill(F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (0, 1)), -1)
    count = (targets >= 0).sum()
    counts = torch.stack([count, (after >= 0).sum(), torch.full_like(count, len(tokens))]).float()
    return Targets(
        targets, after, torch.cat([tokens[:, 1:], targets[:, -1:].clamp(min=0)], 1), counts
    )


def training_loss(
    model: Transformer,
    tokens: torch.Tensor,
    targets: Targets | torch.Tensor,
    doc_ids: torch.Tensor | None = None,
    weights: LossWeights = LossWeights(),
    watch: str = "routers",
    finish: Callable | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token cross-entropy, that of the MTP block on the token after, balanced routers, and the indexer's objective.

    tokens, targets, doc_ids: see aim. watch: which objectives there are, as in forward.
    -> total () fp32, and a dict of its parts without gradients: loss, mtp_loss (nats per token), balance, index_loss (nats),
       load [layers whose router has a bias, E].
    """
    if not isinstance(targets, Targets):
        targets = make_targets(tokens, targets, doc_ids)
    _, hidden, notes = model(tokens, doc_ids=doc_ids, logits=None, watch=watch)
    ahead = None
    if len(model.mtp):
        _, ahead, more = model.mtp(
            hidden, targets.following, doc_ids=doc_ids, logits=None, watch=watch
        )
        notes = notes + more
    return (finish or combine_losses)(model, hidden, ahead, notes, targets, weights)


def combine_losses(
    model: Transformer,
    hidden: torch.Tensor,
    ahead: torch.Tensor | None,
    notes: list[Notes],
    targets: Targets,
    weights: LossWeights,
):
    """What comes after the layers in training: see training_loss. ahead: the MTP block's residual streams."""

    def cross_entropy(x, target):
        return model.ops.linear_cross_entropy(
            x.flatten(0, 1), model.head.weight, target.flatten()
        ).sum()

    counts = targets.counts.clamp(min=1)
    parts = {"loss": cross_entropy(model.head_input(hidden), targets.next) / counts[0]}
    total = parts["loss"]
    if ahead is not None:
        parts["mtp_loss"] = cross_entropy(model.mtp.head_input(ahead), targets.after) / counts[1]
        total = total + weights.mtp * parts["mtp_loss"]
    for name, weight in (("balance", weights.balance), ("index_loss", weights.index)):
        values = [note[name] for note in notes if name in note]
        if values:
            parts[name] = torch.stack(values).sum() / counts[2]
            total = total + weight * parts[name]
    loads = [note["load"] for note in notes if "load" in note]
    if loads:
        parts["load"] = torch.stack(loads)
    return total, {name: part.detach() for name, part in parts.items()}
