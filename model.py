"""DeepSeek-V4 (Flash and Pro) in one file, for `torch.compile(fullgraph=True)`.

One forward serves training, prefill, verify and decode. They differ in T, the number of new tokens,
and in where older keys come from: zeros (training), or Ring and Compressor's buffers (generation).
Positions are values of tensors, shapes are static, and nothing is read back to the host. Formulas:
docs/v4.md, from DeepSeek's paper (arXiv 2606.19348) and inference code. Letters:
    B batch   T new tokens (training: S)   V vocabulary   d model dim   n = 4 residual streams
    H heads   D head dim   r rotated dims of a head   g output groups   W window
    R compression ratio   N compressed entries   topk chosen entries   Hi, Di index heads, their dim
    E routed experts   K chosen experts   I expert hidden dim   C channels of a Ring
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import model_sizes
from ops.formats import fake_quant_ste, keep_islands
from ops.hadamard import hadamard
from ops.indexer_loss import indexer_recall
from ops.registry import Table, require
from ops.rope import rope_frequencies
from ops.router_balance import router_balance
from ops.routing import largest, pick
from ops.swiglu import ACTIVATION, swiglu


@dataclasses.dataclass
class ModelArgs:
    """The architecture (docs/v4.md#dimensions), named as in the official inference config.

    compress_ratios has one entry per layer, then one per MTP block; see config.CSA_RATIOS.
    act_quant rounds activations as the released model does (docs/v4.md#quantised-points), and
    expert_qat ("fp4", "fp8") trains routed experts as that format stores them: both are static.
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
    hidden_act: str = ACTIVATION
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
    eos_id: int | tuple[int, ...] = 1  # any of them ends a text
    act_quant: bool = False
    expert_qat: str | None = None

    def __post_init__(self):
        config.check_fields(vars(self), {f.name: f for f in dataclasses.fields(self)})
        self.compress_ratios = tuple(self.compress_ratios)

    @classmethod
    def flash(cls) -> ModelArgs:
        """DeepSeek-V4-Flash: 284 B parameters, 13 B active."""
        return cls()

    @classmethod
    def pro(cls) -> ModelArgs:
        """DeepSeek-V4-Pro: 1.6 T parameters, 49 B active."""
        return cls(**model_sizes.PRO)

    @classmethod
    def tiny(cls) -> ModelArgs:
        """The embedded model: every layer kind at a size that two CPU cores train and serve."""
        return cls(**model_sizes.TINY)

    @classmethod
    def debug(cls) -> ModelArgs:
        """The smallest model with every layer kind."""
        return cls(**model_sizes.DEBUG)

    @classmethod
    def from_json(cls, path) -> ModelArgs:
        """Read a config.json, or a folder's. ValueErrors name the file and the key at fault."""
        with config.errors_name(path):
            return cls(**config.read_config(path, {f.name for f in dataclasses.fields(cls)}))

    def to_hf(self) -> dict:
        """The released config.json as a dict, without quantization_config."""
        return config.to_hf(vars(self))


# ------------------------------------------------------------------------------
# Building blocks


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim, in fp32, one cast back."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = x.float()
        rms_inverse = torch.rsqrt(v.square().mean(-1, keepdim=True) + self.eps)
        return (v * rms_inverse * self.weight.float()).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T without bias. `fp8`: the released checkpoint stores the weight in FP8.

    Such a linear sees fake-quantised inputs under act_quant (docs/v4.md#quantised-points), unless
    it is grouped. With weights="native" it stays float8_e4m3fn and scale holds its 128 x 128 block
    scales. groups > 1 is block-diagonal: x [..., g, in] -> [..., g, out / g].
    """

    def __init__(self, args: ModelArgs, ops: Table, dim_in: int, dim_out: int, fp8=False, groups=1):
        super().__init__()
        self.args, self.ops = args, ops
        self.fp8, self.groups = fp8, groups
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.register_parameter("scale", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, groups = self.weight, self.groups
        act_quant = self.args.act_quant and self.fp8 and groups == 1
        if self.scale is not None:
            return self.ops.quant_linear(x, weight, self.scale, groups, act_quant)
        if act_quant:
            x = self.ops.act_quant(x, 128, "fp8")
        return self.ops.linear(x, weight.unflatten(0, (groups, -1)) if groups > 1 else weight)


def quantize_kv(args: ModelArgs, ops: Table, kv: torch.Tensor) -> torch.Tensor:
    """Fake FP8 on all but the rotated dims of keys [..., D], in blocks of 64."""
    nope, rope = kv.tensor_split([kv.shape[-1] - args.rope_head_dim], -1)
    return torch.cat([ops.act_quant(nope, 64, "fp8"), rope], -1)


# ------------------------------------------------------------------------------
# Plan of a call: positions, windows, auxiliary outputs


class Aux(NamedTuple):
    """Which auxiliary outputs a training forward returns; static under torch.compile."""

    balance: bool = True  # load and balance loss of the routers that have a bias
    index_loss: bool = False  # the indexers' objective
    dense: bool = False  # attention sees all visible entries, not only chosen ones: warm-up
    recall: bool = False  # share of the most attended entries that are chosen; needs index_loss


class AuxOutputs(NamedTuple):
    """Auxiliary outputs of one layer; None where there are none."""

    load: torch.Tensor | None = None  # [E] tokens that chose each expert
    balance: torch.Tensor | None = None  # () mean over a row's tokens, summed over rows
    index_loss: torch.Tensor | None = None  # () ops.indexer_loss, likewise
    recall: torch.Tensor | None = None  # [2] sum of recall over tokens with a choice; their number


class Windows(NamedTuple):
    """Compression windows of one ratio R in a call (docs/v4.md#compressor).

    end     [B, N]  row of its last token of lookback + T; no meaning if it does not end here
    index   [B, N]  number w of the window in its document; its position is w R
    slot    [B, N]  cache slot of the entry, or the last, spare slot if it does not end here
    offset  [B, T]  position of a token in its window, t mod R
    lo, hi  [B, T]  a token sees the entries lo <= e < hi
    cos, sin [B, N, r/2]  RoPE of the entries
    """

    end: torch.Tensor
    index: torch.Tensor
    slot: torch.Tensor
    offset: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Plan(NamedTuple):
    """All that depends on positions alone: computed once per call, shared by the layers.

    row         [B, 1]  batch index
    pos         [B, T]  position of each token in its document or conversation
    window_len  [B, T]  keys of the sliding window that a token sees: min(pos + 1, W)
    input_pos   [B]     position of the first token; None in training
    lengths     [B]     valid tokens of each row; None in training
    rope        {compressed layer?: (cos, sin), each [B, T, r/2]}
    windows     {R: Windows}
    valid       [B, T]  False for padding of packed rows; None without packing
    aux         auxiliary outputs asked for; None in generation
    """

    row: torch.Tensor
    pos: torch.Tensor
    window_len: torch.Tensor
    input_pos: torch.Tensor | None
    lengths: torch.Tensor | None
    rope: dict[bool, tuple[torch.Tensor, torch.Tensor]]
    windows: dict[int, Windows]
    valid: torch.Tensor | None = None
    aux: Aux | None = None


def make_plan(
    # the model: frequencies [2, r/2] of sliding layers and of compressed ones
    args,
    freqs,
    # the call
    tokens,
    ratios,
    max_seq_len,
    # as in Transformer.forward
    input_pos=None,
    lengths=None,
    doc_ids=None,
    aux=None,
) -> Plan:
    """Plan a call on tokens [B, T] for layers of these compression ratios."""
    (B, T), device = tokens.shape, tokens.device
    row = torch.arange(B, device=device)[:, None]
    col = torch.arange(T, device=device)[None]

    # Positions count from the row's first token, or from the start of its document.
    if input_pos is not None:
        given = torch.full_like(input_pos, T) if lengths is None else lengths
        # Cut at the context: nothing is stored past it.
        lengths = torch.minimum(given, max_seq_len - input_pos).clamp(min=0)
        pos = input_pos[:, None] + col
    elif doc_ids is not None:
        starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))
        pos = col - torch.where(starts, col, 0).cummax(1).values
    else:
        pos = col.expand(B, T)
    windows = {}
    for R in sorted(ratios):
        if input_pos is not None:
            windows[R] = cached_windows(R, freqs, pos, input_pos, lengths, max_seq_len)
        else:
            windows[R] = document_windows(R, freqs, pos, col)
    rope = {compressed: rope_angles(freqs, pos, compressed) for compressed in (False, True)}
    window_len = (pos + 1).clamp(max=args.window_size)
    valid = None if doc_ids is None else doc_ids >= 0
    return Plan(row, pos, window_len, input_pos, lengths, rope, windows, valid, aux)


def layer_frequencies(args: ModelArgs) -> torch.Tensor:
    """RoPE frequencies [2, r/2] of sliding layers and of compressed ones (docs/v4.md#rope)."""
    yarn = args.rope_factor, args.original_seq_len, args.beta_fast, args.beta_slow
    sliding = rope_frequencies(args.rope_head_dim, args.rope_theta)
    compressed = rope_frequencies(args.rope_head_dim, args.compress_rope_theta, *yarn)
    return torch.stack([sliding, compressed])


def rope_angles(freqs: torch.Tensor, pos: torch.Tensor, compressed: bool):
    """cos and sin [..., r/2] of the angles at positions [...]."""
    angle = pos[..., None].float() * freqs[int(compressed)]
    return angle.cos(), angle.sin()


def cached_windows(R, freqs, pos, input_pos, lengths, max_seq_len) -> Windows:
    """Generation: the (T - 1) // R + 1 windows that may end among T tokens from input_pos."""
    e = torch.arange((pos.shape[1] - 1) // R + 1, device=pos.device)[None]
    index = input_pos[:, None] // R + e
    end = (index + 1) * R - 1 - input_pos[:, None]
    lo = torch.zeros_like(pos)
    slot = torch.where(end < lengths[:, None], index, -(-max_seq_len // R))  # else the spare slot
    angles = rope_angles(freqs, index * R, True)
    return Windows(end + config.lookback(R), index, slot, pos % R, lo, lo + (pos + 1) // R, *angles)


def document_windows(R, freqs, pos, col) -> Windows:
    """Training: the windows of every document of a row.

    At most one window ends among the tokens e R .. e R + R - 1; it is entry e. So the entries of a
    document are consecutive, after ceil(c / R) others if it starts at column c: its lo .. hi.
    """
    T = pos.shape[1]
    e = torch.arange((T - 1) // R + 1, device=pos.device)[None]
    ends = F.pad((pos + 1) % R == 0, (0, -T % R)).unflatten(1, (-1, R))  # [B, N, R]
    end = ends.to(torch.int32).argmax(2) + e * R  # if none ends, any: such an entry is never seen
    index = pos.gather(1, end.clamp(max=T - 1)) // R
    lo = (col - pos + R - 1) // R
    angles = rope_angles(freqs, index * R, True)
    return Windows(
        end + config.lookback(R), index, index, pos % R, lo, lo + (pos + 1) // R, *angles
    )


# ------------------------------------------------------------------------------
# Attention


class Ring(nn.Module):
    """The last rows of a per-token tensor, stored at position modulo the ring's size.

    `ring(new, plan)` returns the `lookback` rows before this call, in order, then the new ones, and
    only then stores the new ones. It has max_rewind spare rows, so rows of rejected tokens are
    overwritten before they can be read. Before position 0 rows are anything, in training zeros.
    """

    def __init__(self, lookback: int):
        super().__init__()
        self.lookback = lookback

    def setup(self, batch, dim, max_rewind, dtype, device):
        slots = self.lookback + 1 + max_rewind  # and one more, which takes what is not stored
        rows = torch.zeros(batch, slots + 1, dim, dtype=dtype, device=device)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, new: torch.Tensor, plan: Plan) -> torch.Tensor:
        """new [B, T, C] -> [B, lookback + T, C]"""
        if plan.input_pos is None:
            return F.pad(new, (0, 0, self.lookback, 0))
        slots, pos = self.rows.shape[1] - 1, plan.input_pos[:, None]
        before = torch.arange(-self.lookback, 0, device=new.device)
        old = self.rows[plan.row, (pos + before) % slots]
        rows = torch.cat([old, new.to(old.dtype)], 1)

        # Store the last valid rows, one per slot (duplicate indices would have no order).
        stored = min(new.shape[1], slots)
        col = plan.lengths[:, None] + torch.arange(-stored, 0, device=new.device)
        slot = torch.where(col >= 0, (pos + col) % slots, slots)
        # Values come from `rows`: the write depends on the read, and Inductor can write in place.
        values = rows.detach()[plan.row, (self.lookback + col).clamp(min=0)]
        self.rows.index_put_((plan.row, slot), values)
        return rows


class Compressor(nn.Module):
    """Pools windows of R tokens into entries by a softmax per channel (docs/v4.md#compressor).

    With overlap (CSA) an entry also pools the window before, from the first half of the channels.
    rotate=True is the indexer's: Hadamard and FP4 under act_quant instead of FP8.
    """

    def __init__(self, args: ModelArgs, ops: Table, ratio: int, dim: int, rotate: bool = False):
        super().__init__()
        self.args, self.ops = args, ops
        self.ratio, self.dim = ratio, dim
        self.rotate = rotate
        lanes = (1 + config.lookback(ratio)) // ratio
        self.ape = nn.Parameter(torch.empty(ratio, lanes * dim, dtype=torch.float32))
        self.wkv = Linear(args, ops, args.dim, lanes * dim)
        self.wgate = Linear(args, ops, args.dim, lanes * dim)
        self.norm = RMSNorm(dim, args.norm_eps)
        self.ring = Ring(config.lookback(ratio))

    def setup(self, batch, max_seq_len, max_rewind, dtype, device):
        width = 2 * self.wkv.weight.shape[0]
        self.ring.setup(batch, width, max_rewind, torch.float32, device)
        slots = -(-max_seq_len // self.ratio) + 1  # the last one is spare
        entries = torch.zeros(batch, slots, self.dim, dtype=dtype, device=device)
        self.register_buffer("entries", entries, persistent=False)

    def forward(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x [B, T, d] -> entries [B, N, D], of the cache all slots: lo .. hi says which exist."""
        windows = plan.windows[self.ratio]
        score = self.ops.linear_fp32(x, self.wgate.weight) + self.ape.float()[windows.offset]
        kv = self.ops.linear_fp32(x, self.wkv.weight)
        rows = self.ring(torch.cat([kv, score], -1), plan)  # [B, lookback + T, 2 lanes D]
        pooled = rows, windows.end, windows.index, self.norm.weight, windows.cos, windows.sin
        new = self.ops.compress(*pooled, self.ratio, self.args.norm_eps, x.dtype)
        if self.args.act_quant and self.rotate:
            new = self.ops.act_quant(hadamard(new), 32, "fp4")
        elif self.args.act_quant:
            new = quantize_kv(self.args, self.ops, new)
        if plan.input_pos is None:
            return new
        self.entries.index_put_((plan.row, windows.slot), new.detach().to(self.entries.dtype))
        return self.entries[: x.shape[0], :-1]


class Indexer(nn.Module):
    """q, k, u of scores sum_h u_h relu(q_h . k): a token attends to the index_topk best entries.

    docs/v4.md#indexer. It learns from its own objective.
    """

    def __init__(self, args: ModelArgs, ops: Table, ratio: int):
        super().__init__()
        self.args, self.ops = args, ops
        self.ratio = ratio
        q_dim = args.index_n_heads * args.index_head_dim
        self.wq_b = Linear(args, ops, args.q_lora_rank, q_dim, fp8=True)
        self.weights_proj = Linear(args, ops, args.dim, args.index_n_heads)
        self.compressor = Compressor(args, ops, ratio, args.index_head_dim, rotate=True)

    def forward(self, x: torch.Tensor, qr: torch.Tensor, plan: Plan):
        """x [B, T, d], qr [B, T, q_lora] -> q [B, T, Hi, Di], k [B, N, Di], u [B, T, Hi]."""
        args = self.args
        q = self.wq_b(qr).unflatten(-1, (args.index_n_heads, args.index_head_dim))
        q = self.ops.rope(q, *plan.rope[True], False)
        if args.act_quant:
            q = self.ops.act_quant(hadamard(q), 32, "fp4")
        return q, self.compressor(x, plan), self.weights_proj(x)

    def objective(self, attention: tuple, index: tuple, chosen, plan: Plan) -> AuxOutputs:
        """KL divergence between the main attention and the scores (docs/v4.md#training).

        attention: q, cos, sin, entries, lse of ops.sparse_attn; index: the outputs of forward.
        """
        windows = plan.windows[self.ratio]
        eps, topk = self.args.norm_eps, self.args.index_topk
        visible = windows.lo, windows.hi
        q, k, u = index
        index = q, k, u * (q.shape[2] * q.shape[3]) ** -0.5  # a scale changes no choice
        loss = self.ops.indexer_loss(*attention, *index, *visible, chosen, eps)  # [B, T]
        if plan.valid is not None:
            loss = loss * plan.valid
        recall = None
        if plan.aux.recall:
            found, _ = indexer_recall(*attention, *index, *visible, topk, eps)
            has_choice = windows.hi - windows.lo > topk
            recall = torch.stack([(found * has_choice).sum(), has_choice.sum()])
        return AuxOutputs(index_loss=loss.mean(1).sum(), recall=recall)


class Attention(nn.Module):
    """Multi-query attention over the window and the compressed entries (docs/v4.md#attention).

    One softmax, with a sink. Keys and values are one latent, shared by all heads; queries come from
    a low-rank projection, outputs go through a grouped one.
    """

    def __init__(self, args: ModelArgs, ops: Table, ratio: int):
        super().__init__()
        self.args, self.ops = args, ops
        self.ratio = ratio
        H, D = args.n_heads, args.head_dim
        groups = args.o_groups
        self.wq_a = Linear(args, ops, args.dim, args.q_lora_rank, fp8=True)
        self.q_norm = RMSNorm(args.q_lora_rank, args.norm_eps)
        self.wq_b = Linear(args, ops, args.q_lora_rank, H * D, fp8=True)
        self.wkv = Linear(args, ops, args.dim, D, fp8=True)
        self.kv_norm = RMSNorm(D, args.norm_eps)
        o_rank = groups * args.o_lora_rank
        self.wo_a = Linear(args, ops, H * D // groups, o_rank, fp8=True, groups=groups)
        self.wo_b = Linear(args, ops, o_rank, args.dim, fp8=True)
        self.attn_sink = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.ring = Ring(args.window_size - 1)
        self.compressor = Compressor(args, ops, ratio, D) if ratio else None
        self.indexer = Indexer(args, ops, ratio) if ratio in config.CSA_RATIOS else None

    def forward(self, x: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, AuxOutputs]:
        """x [B, T, d] -> [B, T, d], AuxOutputs."""
        args, rope = self.args, plan.rope[self.ratio > 0]
        qr = self.q_norm(self.wq_a(x))  # [B, T, q_lora]
        q = self.wq_b(qr).unflatten(-1, (args.n_heads, args.head_dim))  # [B, T, H, D]
        kv = self.ops.rope(self.kv_norm(self.wkv(x)), *rope, False)  # [B, T, D]
        if args.act_quant:
            kv = quantize_kv(args, self.ops, kv)
        keys = self.ring(kv, plan)  # [B, W - 1 + T, D]

        entries = lo = hi = chosen = None
        if self.compressor is not None:
            entries = self.compressor(x, plan)  # [B, N, D]
            lo, hi = plan.windows[self.ratio].lo, plan.windows[self.ratio].hi
        train_indexer = self.indexer is not None and plan.aux is not None and plan.aux.index_loss
        # With at most index_topk entries every visible one is chosen.
        needs_topk = self.indexer is not None and entries.shape[1] > args.index_topk
        if train_indexer:
            index = self.indexer(x.detach(), qr.detach(), plan)
        elif needs_topk:
            index = self.indexer(x, qr, plan)
        if needs_topk and not (train_indexer and plan.aux.dense):
            chosen = self.ops.indexer_topk(*index, lo, hi, args.index_topk)  # [B, T, topk]

        # The op normalises and rotates the queries, and rotates the output back: [B, T, H, D].
        window = q, keys, self.attn_sink, plan.window_len, *rope
        compressed = entries, lo, hi, chosen
        o = self.ops.sparse_attn(*window, *compressed, args.norm_eps, train_indexer)
        aux = AuxOutputs()
        if train_indexer:
            o, lse = o
            aux = self.indexer.objective((q, *rope, entries, lse), index, chosen, plan)
        o = o.flatten(2).unflatten(-1, (args.o_groups, -1))  # [B, T, g, H D / g]
        return self.wo_b(self.wo_a(o).flatten(2)), aux


# ------------------------------------------------------------------------------
# Mixture of experts


def call(function: Callable, *args):
    """Call directly: the default of MoE.dispatch and of run_block."""
    return function(*args)


class Gate(nn.Module):
    """The router (docs/v4.md#experts): by token id in hash layers, else by score plus bias."""

    def __init__(self, args: ModelArgs, ops: Table, hashed: bool):
        super().__init__()
        self.args, self.ops = args, ops
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        tid2eid = torch.empty(args.vocab_size, args.n_activated_experts, dtype=torch.int64)
        bias = nn.Parameter(torch.empty(args.n_routed_experts, dtype=torch.float32), False)
        self.register_buffer("tid2eid", tid2eid if hashed else None)
        self.register_parameter("bias", None if hashed else bias)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor):
        """x [B T, d], tokens [B T] -> chosen [B T, K], their weights [B T, K], scores [B T, E]."""
        score = F.softplus(self.ops.linear_fp32(x, self.weight)).sqrt()
        if self.tid2eid is not None:
            chosen = self.tid2eid[tokens].split(1, 1)  # K columns [B T, 1]
        else:
            biased = score.detach() + self.bias.float()  # the bias only selects
            chosen = largest(biased, self.args.n_activated_experts)
        weights = pick(score, chosen)
        total = sum(weights)
        weights = [weight / total * self.args.route_scale for weight in weights]
        return torch.cat(chosen, 1), torch.cat(weights, 1), score


class Expert(nn.Module):
    """The shared expert: w2(swiglu(w1 x, w3 x)), fp32 inside."""

    def __init__(self, args: ModelArgs, ops: Table):
        super().__init__()
        self.args = args
        self.w1 = Linear(args, ops, args.dim, args.moe_inter_dim, fp8=True)
        self.w2 = Linear(args, ops, args.moe_inter_dim, args.dim, fp8=True)
        self.w3 = Linear(args, ops, args.dim, args.moe_inter_dim, fp8=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = swiglu(self.w1(x).float(), self.w3(x).float(), self.args.swiglu_limit)
        return self.w2(h.to(x.dtype))


class Experts(nn.Module):
    """The routed experts, stacked: w13 [E, 2I, d] (w1 rows first), w2 [E, d, I].

    With weights="native" they stay packed (FP4 int8 [E, 2I, d/2], or FP8) beside their scales.
    """

    def __init__(self, args: ModelArgs, ops: Table):
        super().__init__()
        self.args, self.ops = args, ops
        E, I = args.n_routed_experts, args.moe_inter_dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * I, args.dim))
        self.w2 = nn.Parameter(torch.empty(E, args.dim, I))
        self.register_parameter("w13_scale", None)
        self.register_parameter("w2_scale", None)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [B T, d], chosen and weight [B T, K] -> [B T, d] fp32."""
        args = self.args
        w13, w2 = self.w13, self.w2
        if args.expert_qat:
            w1_w3 = w13.unflatten(1, (2, -1))  # each has scales of its own
            w13 = fake_quant_ste(w1_w3, args.expert_qat).flatten(1, 2)
            w2 = fake_quant_ste(w2, args.expert_qat)
        scales = self.w13_scale, self.w2_scale
        return self.ops.moe(x, w13, w2, chosen, weight, *scales, args.swiglu_limit, args.act_quant)


class MoE(nn.Module):
    """Routed experts plus one shared expert (docs/v4.md#experts).

    dispatch(experts, x, chosen, weight) brings tokens to their experts: a call of Experts, or
    the exchange between processes of training/expert_parallel.py.
    """

    def __init__(self, args: ModelArgs, ops: Table, hashed: bool):
        super().__init__()
        self.gate = Gate(args, ops, hashed)
        self.experts = Experts(args, ops)
        self.shared_experts = Expert(args, ops)
        self.dispatch: Callable = call

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, plan: Plan):
        """x [B, T, d], tokens [B, T] -> [B, T, d], AuxOutputs."""
        flat = x.flatten(0, 1)
        chosen, weight, score = self.gate(flat, tokens.flatten())
        aux = AuxOutputs()
        if plan.aux is not None and plan.aux.balance and self.gate.bias is not None:
            per_row = (*tokens.shape, -1)
            load, balance = router_balance(chosen.view(per_row), score.view(per_row), plan.valid)
            aux = AuxOutputs(load=load, balance=balance)
        routed = self.dispatch(self.experts, flat, chosen, weight)
        y = routed + self.shared_experts(flat).float()
        return y.to(x.dtype).view_as(x), aux


# ------------------------------------------------------------------------------
# Hyper-connections, blocks, model


def hc_params(args: ModelArgs, rows: int, scales: int) -> tuple[nn.Parameter, ...]:
    """fn [rows, n d], base [rows], scale [scales] of one hyper-connection site, fp32."""
    shapes = (rows, args.hc_mult * args.dim), rows, scales
    return tuple(nn.Parameter(torch.empty(shape, dtype=torch.float32)) for shape in shapes)


def hc_head(module: Transformer | MTPBlock, X: torch.Tensor) -> torch.Tensor:
    """Collapse the streams into the normed input of a head: [B, T, n, d] -> [B, T, d]."""
    args, v = module.args, X.flatten(2).float()
    rms_inverse = torch.rsqrt(v.square().mean(-1, keepdim=True) + args.norm_eps)
    mix = module.ops.linear(v, module.hc_head_fn.float()) * rms_inverse  # [B, T, n]
    pre = torch.sigmoid(mix * module.hc_head_scale.float() + module.hc_head_base.float())
    collapsed = ((pre + args.hc_eps)[..., None] * X.float()).sum(2)
    return module.norm(collapsed.to(X.dtype))


class Block(nn.Module):
    """Attention, then experts, on n residual streams (mHC, docs/v4.md#hyper-connections)."""

    def __init__(self, args: ModelArgs, ops: Table, layer: int):
        super().__init__()
        self.args, self.ops = args, ops
        self.attn = Attention(args, ops, args.compress_ratios[layer])
        self.ffn = MoE(args, ops, hashed=layer < args.n_hash_layers)
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        rows = (2 + args.hc_mult) * args.hc_mult
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = hc_params(args, rows, 3)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = hc_params(args, rows, 3)

    def forward(self, X: torch.Tensor, tokens: torch.Tensor, plan: Plan):
        """X [B, T, n, d], tokens [B, T] -> X, AuxOutputs."""
        args, ops = self.args, self.ops
        constants = args.norm_eps, args.hc_eps, args.hc_sinkhorn_iters
        attn_site = self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale
        ffn_site = self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale
        x, post, comb = ops.hc_pre(X, *attn_site, *constants)  # [B, T, d], [B, T, n], [B, T, n, n]
        y, aux = self.attn(self.attn_norm(x), plan)
        X, x, post, comb = ops.hc_post_pre(y, X, post, comb, *ffn_site, *constants)
        y, routing = self.ffn(self.ffn_norm(x), tokens, plan)
        aux = AuxOutputs(routing.load, routing.balance, aux.index_loss, aux.recall)
        return ops.hc_post(y, X, post, comb), aux


class MTPBlock(Block):
    """Predicts the token after next from the last streams and the next token (docs/v4.md#mtp)."""

    def __init__(self, args: ModelArgs, ops: Table, layer: int):
        super().__init__(args, ops, layer)
        self.e_proj = Linear(args, ops, args.dim, args.dim, fp8=True)
        self.h_proj = Linear(args, ops, args.dim, args.dim, fp8=True)
        self.enorm = RMSNorm(args.dim, args.norm_eps)
        self.hnorm = RMSNorm(args.dim, args.norm_eps)
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_params(args, args.hc_mult, 1)

    def forward(self, hidden: torch.Tensor, e: torch.Tensor, tokens: torch.Tensor, plan: Plan):
        """hidden [B, T, n, d], embedded next tokens e [B, T, d] -> streams, AuxOutputs."""
        X = self.e_proj(self.enorm(e))[:, :, None] + self.h_proj(self.hnorm(hidden))  # [B, T, n, d]
        return super().forward(X, tokens, plan)


class MTP(nn.ModuleList):
    """`model.mtp`: one MTP block or none; uses the model's embedding, head and plans."""

    def __init__(self, model: Transformer):
        args, first = model.args, model.args.n_layers
        super().__init__(MTPBlock(args, model.ops, first + i) for i in range(args.n_mtp_layers))
        self._model = (model,)  # in a tuple: the model is no submodule of its own MTP

    def forward(
        self,
        hidden: torch.Tensor,
        next_tokens: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        logits: str | None = "all",
        aux: Aux | None = None,
        run_block: Callable = call,
    ):
        """hidden [B, T, n, d] and the tokens that follow [B, T] -> logits [B, T, V], hidden'.

        Slot i has the position of hidden[:, i] and predicts the token two further. hidden' may be
        fed back to draft one more; such rows are provisional until the accepted positions are fed
        again with the true hidden. The rest as in Transformer.forward; aux appends [AuxOutputs].
        """
        require(len(self) > 0, "this model has no MTP block (n_mtp_layers is 0)")
        model, block = self._model[0], self[0]
        positions = input_pos, lengths, doc_ids
        tokens, plan, e = run_block(self.embed_inputs, next_tokens, *positions, aux)
        X, aux_outputs = run_block(block, hidden, e, tokens, plan)
        y = None
        if logits is not None:
            selected = self.head_input(model.select(X, plan, logits))
            y = model.ops.linear_fp32(selected, model.head.weight)
        return (y, X) if aux is None else (y, X, [aux_outputs])

    def embed_inputs(self, next_tokens, input_pos=None, lengths=None, doc_ids=None, aux=None):
        """-> checked tokens [B, T], plan, embedded tokens [B, T, d].

        In packed rows the last slot of a document sees no next token.
        """
        model = self._model[0]
        tokens, plan = model.prepare(next_tokens, set(), input_pos, lengths, doc_ids, aux)
        e = model.embed(tokens)
        if doc_ids is not None:
            same_document = F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (0, 1), value=True)
            e = e * same_document[..., None]
        return tokens, plan, e

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden' [B, T, n, d] -> the normed input of the head [B, T, d]."""
        return hc_head(self[0], hidden)


class Transformer(nn.Module):
    """The whole model (docs/v4.md#whole-model), in the default dtype but for its fp32 islands.

    ops maps op names to "reference" or "opaque" (ops/registry.py); the rest follow `ops.use`,
    then the device.
    """

    def __init__(self, args: ModelArgs, ops: dict[str, str] | None = None):
        super().__init__()
        self.args = args
        self.ops = Table(ops)
        self.cache_size = None  # (max_batch_size, max_seq_len, max_rewind)
        self.cache_generation = 0  # raised when caches are emptied, replaced, claimed by an Engine
        weight = torch.empty(args.vocab_size, args.dim)
        self.embed = nn.Embedding(*weight.shape, _weight=weight)
        self.layers = nn.ModuleList(Block(args, self.ops, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = Linear(args, self.ops, args.dim, args.vocab_size)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_params(args, args.hc_mult, 1)
        self.mtp = MTP(self)
        self.register_buffer("freqs", torch.empty(2, args.rope_head_dim // 2), persistent=False)
        self._fill_freqs()
        # A model built on the meta device gets its frequencies after its weights are loaded.
        self.register_load_state_dict_post_hook(Transformer._fill_freqs)
        self.reset_parameters()

    def _fill_freqs(self, *_) -> None:
        if not self.embed.weight.is_meta:
            self.freqs = layer_frequencies(self.args).to(self.embed.weight.device)

    def _apply(self, fn, recurse=True):
        """Moves and casts keep fp32 islands and frequencies; caches are emptied, not cast."""
        with keep_islands(self, fn):
            super()._apply(fn, recurse)
        self._fill_freqs()
        if self.cache_size:
            self.setup_caches(*self.cache_size)
        return self

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02):
        """Normal(0, std) matrices, unit norms and hc scales, zero biases and sinks, hash routes."""
        if self.embed.weight.is_meta:
            return
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(float("norm" in name or name.endswith("_scale")))
            else:
                p.normal_(0, std)
        for name, tid2eid in self.named_buffers():
            if name.endswith("tid2eid"):
                count = torch.arange(tid2eid.numel(), device=tid2eid.device)
                tid2eid.copy_((count % self.args.n_routed_experts).view_as(tid2eid))

    def setup_caches(self, max_batch_size: int, max_seq_len: int, max_rewind: int = 8) -> None:
        """Allocate empty caches: max_batch_size conversations of up to max_seq_len tokens.

        A row may be set back to position 0, or by up to max_rewind below the highest position it
        was fed since. Caches are constants to autograd: no gradient flows into earlier calls.
        """
        limit = self.args.max_seq_len
        require(
            max_batch_size > 0 and 0 < max_seq_len <= limit and max_rewind >= 0,
            f"setup_caches: max_batch_size must be positive, max_seq_len 1 to {limit}, max_rewind "
            f"non-negative, not {max_batch_size}, {max_seq_len}, {max_rewind}",
        )
        dtype, device = self.embed.weight.dtype, self.embed.weight.device
        with torch.inference_mode(False):  # inference mode's tensors could not be written outside
            for module in self.modules():
                if isinstance(module, Attention):
                    dim = self.args.head_dim
                    module.ring.setup(max_batch_size, dim, max_rewind, dtype, device)
                elif isinstance(module, Compressor):
                    module.setup(max_batch_size, max_seq_len, max_rewind, dtype, device)
        self.cache_size = (max_batch_size, max_seq_len, max_rewind)
        self.cache_generation += 1

    def reset_caches(self) -> None:
        """Empty the caches in place. Not needed for a new conversation: position 0 starts one."""
        for name, buffer in self.named_buffers():
            if name.endswith(("ring.rows", ".entries")):
                buffer.zero_()
        self.cache_generation += 1

    def prepare(self, tokens, ratios, input_pos, lengths, doc_ids, aux=None):
        """Check the arguments, set padding tokens to 0, make the plan -> tokens, plan."""
        max_seq_len = tokens.shape[1]
        if aux is not None and (aux.dense or aux.recall):
            require(aux.index_loss, f"{aux}: dense and recall need index_loss")
        if input_pos is None:
            require(lengths is None, "lengths needs input_pos")
        else:
            require(doc_ids is None, "doc_ids and input_pos exclude each other")
            require(self.cache_size is not None, "call setup_caches before passing input_pos")
            max_batch_size, max_seq_len, _ = self.cache_size
            fits = len(tokens) <= max_batch_size
            require(fits, f"batch {len(tokens)} exceeds max_batch_size {max_batch_size}")
        positions = max_seq_len, input_pos, lengths, doc_ids
        plan = make_plan(self.args, self.freqs, tokens, ratios, *positions, aux)
        if lengths is not None:
            col = torch.arange(tokens.shape[1], device=tokens.device)
            tokens = tokens.masked_fill(col >= lengths[:, None], 0)
        elif doc_ids is not None:
            tokens = tokens.masked_fill((doc_ids < 0) | (tokens < 0), 0)
        return tokens, plan

    def embed_inputs(self, tokens, input_pos=None, lengths=None, doc_ids=None, aux=None):
        """-> checked tokens [B, T], plan, n equal streams of embedded tokens [B, T, n, d]."""
        ratios = set(self.args.compress_ratios) - {0}
        tokens, plan = self.prepare(tokens, ratios, input_pos, lengths, doc_ids, aux)
        return tokens, plan, self.embed(tokens)[:, :, None].repeat(1, 1, self.args.hc_mult, 1)

    def forward(
        self,
        tokens: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        logits: str | None = "all",
        return_hidden: bool = False,
        aux: Aux | None = None,
        run_block: Callable = call,
    ):
        """tokens [B, T] int64 -> logits [B, T, V] fp32.

        input_pos      [B] int64: position of each row's first token; None: no cache (training)
        lengths        [B] int64: columns at or past it are padding: not stored, logits undefined
        doc_ids        [B, T]: isolated documents (training), non-decreasing, -1 = padding
        logits         "all", "last" (each row's last valid position, [B, 1, V]) or None (no head)
        return_hidden  -> (logits, hidden): the streams [B, T, n, d] after the last block
        aux            -> (logits, hidden, [AuxOutputs of each layer])
        run_block      run_block(function, *args) calls the embedding and each block: the seam
                       for code that compiles or wraps them
        """
        tokens, plan, X = run_block(self.embed_inputs, tokens, input_pos, lengths, doc_ids, aux)
        aux_outputs = []
        for layer in self.layers:
            X, layer_aux = run_block(layer, X, tokens, plan)
            aux_outputs.append(layer_aux)
        y = self.lm_logits(X, plan, logits)
        if aux is not None:
            return y, X, aux_outputs
        return (y, X) if return_hidden else y

    def select(self, X: torch.Tensor, plan: Plan, logits: str) -> torch.Tensor:
        """The positions that get logits: all, or each row's last valid one ([B, 1, ...])."""
        require(logits in ("all", "last"), f"logits is {logits!r}: choose 'all', 'last' or None")
        if logits == "all":
            return X
        if plan.lengths is None:
            return X[:, -1:]
        return X[plan.row, (plan.lengths[:, None] - 1).clamp(min=0)]

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual streams [B, T, n, d] -> the normed input of the head [B, T, d]."""
        return hc_head(self, hidden)

    def lm_logits(self, X: torch.Tensor, plan: Plan, logits: str | None) -> torch.Tensor | None:
        """Streams [B, T, n, d] -> the logits asked for, fp32."""
        if logits is None:
            return None
        selected = self.head_input(self.select(X, plan, logits))
        return self.ops.linear_fp32(selected, self.head.weight)
