"""Shared by the tests: builders of models and tokens, Transformers' deepseek_v4 as the oracle,
comparison of results.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from model import ModelArgs, Transformer

# --------------------------------------------------------------------------------------------------
# Models and tokens


def small(**changes) -> ModelArgs:
    """The debug config with some fields changed."""
    args = copy.copy(ModelArgs.debug())
    for name, value in changes.items():
        setattr(args, name, value)
    args.__post_init__()
    return args


@torch.no_grad()
def randomize(model: Transformer, seed: int) -> Transformer:
    """Weights under which every component moves the logits and discrete choices have clear
    margins.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1 and not name.endswith("ape"):
            p.normal_(0, _standard_deviation(name, p.shape[-1]), generator=generator)
        elif "norm" in name or name.endswith("_scale"):
            p.uniform_(0.5, 1.5, generator=generator)
        else:  # ape, sinks, gate and hc biases
            p.normal_(0, 0.5, generator=generator)
    for name, b in model.named_buffers():
        if name.endswith("tid2eid"):
            tokens, chosen = b.shape
            order = torch.rand(tokens, model.args.n_routed_experts, generator=generator).argsort(1)
            b.copy_(order[:, :chosen])
    return model


def _standard_deviation(name: str, fan_in: int) -> float:
    """Of a weight matrix. Scores that choose are spread wider than others."""
    if name == "embed.weight":
        return 1.0
    if name.endswith("weights_proj.weight"):
        return 8 * fan_in**-0.5
    if name.endswith("gate.weight"):
        return 2.4 * fan_in**-0.5
    return 1.2 * fan_in**-0.5


def random_model(args: ModelArgs | None = None, seed: int = 1, ops=None) -> Transformer:
    """A model with random weights (see `randomize`), by default of the debug config."""
    return randomize(Transformer(args or ModelArgs.debug(), ops=ops), seed)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids from 0 to 255, the vocabulary of the debug config."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def positions(*values: int) -> torch.Tensor:
    """int64 [B]: positions or lengths, one per row."""
    return torch.tensor(values, dtype=torch.int64)


def cache_shapes(module: torch.nn.Module) -> set[tuple[int, ...]]:
    """Shapes of a module's caches, with and without the trash slot, their last row: no graph should
    copy one.
    """
    names = ("ring.rows", "entries")
    shapes = [tuple(b.shape) for name, b in module.named_buffers() if name.endswith(names)]
    whole = set(shapes)
    return whole | {(batch, rows - 1, dim) for batch, rows, dim in shapes}


# --------------------------------------------------------------------------------------------------
# Comparison


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative RMS: of the difference, over the standard deviation of the reference b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).square().mean().sqrt() / b.std().clamp(min=1e-30))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over that of the reference b, which may be constant."""
    return float((a.double() - b).norm() / b.double().norm().clamp(min=1e-30))


def gradients(model: Transformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By parameter, in fp64; without parameters that the loss does not reach."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------
# Transformers as the oracle

# Our names of parameters -> Transformers', applied in this order.
HF_RENAMES = [
    (".attn.", ".self_attn."),
    (".ffn.", ".mlp."),
    (".indexer.compressor.", ".compressor.indexer."),
    ("embed.", "embed_tokens."),
    ("hc_head_", "hc_head.hc_"),
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn_sink", "sinks"),
    (".indexer.weights_proj.", ".compressor.indexer.scorer.weights_proj."),
    (".indexer.wq_b.", ".compressor.indexer.q_b_proj."),
    ("compressor.norm.", "compressor.kv_norm."),
    ("indexer.norm.", "indexer.kv_norm."),
    (".ape", ".position_bias"),
    (".wq_a.", ".q_a_proj."),
    (".wq_b.", ".q_b_proj."),
    (".wkv.", ".kv_proj."),
    (".wgate.", ".gate_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".q_norm.", ".q_a_norm."),
    ("gate.bias", "gate.e_score_correction_bias"),
    ("shared_experts.w1.", "shared_experts.gate_proj."),
    ("shared_experts.w2.", "shared_experts.down_proj."),
    ("shared_experts.w3.", "shared_experts.up_proj."),
    ("experts.w13", "experts.gate_up_proj"),
    ("experts.w2", "experts.down_proj"),
]


def hf_name(name: str) -> str:
    """Our parameter name -> Transformers' (docs/v4.md#checkpoint)."""
    if name == "head.weight":
        return "lm_head.weight"
    for old, new in HF_RENAMES:
        name = name.replace(old, new)
    return "model." + name


def hf_model(model: Transformer):
    """Transformers' model with the weights of `model` (fp32, eager)."""
    # Takes seconds to import.
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = model.args.to_hf()
    if config["rope_scaling"]:
        config["rope_scaling"] = {**config["rope_scaling"], "rope_type": "yarn"}
    hf = DeepseekV4ForCausalLM._from_config(DeepseekV4Config(**config), attn_implementation="eager")
    state = {hf_name(k): v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    missing = [name for name in missing if "inv_freq" not in name]
    assert not unexpected and not missing, (missing, unexpected)
    return hf.eval()


class Margins:
    """Smallest gap of any discrete choice, per position: hooks on Transformers' routers and
    indexers.

    `with Margins(hf) as margins: hf(tokens)`, then margins.smallest() is [B, S]: the least distance
    between the last chosen and the first rejected score, over all layers. Below about 3e-5 two
    correct fp32 implementations may choose differently.
    """

    def __init__(self, hf):
        self.hf = hf
        self.gaps = []
        self.scores = None  # of the indexer that runs

    def __enter__(self):
        self.handles = []
        for module in self.hf.modules():
            kind = type(module).__name__
            if kind == "DeepseekV4TopKRouter":
                self.handles.append(module.register_forward_hook(self._router))
            elif kind == "DeepseekV4Indexer":
                self.handles.append(module.scorer.register_forward_hook(self._scorer))
                self.handles.append(module.register_forward_hook(self._indexer, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _router(self, module, inputs, output):
        scores = F.softplus(output[0].float()).sqrt() + module.e_score_correction_bias
        top = scores.topk(module.top_k + 1, -1).values
        self.gaps.append((top[:, -2] - top[:, -1]).view(inputs[0].shape[:2]))

    def _scorer(self, module, inputs, output):
        self.scores = output

    def _indexer(self, module, args, kwargs, output):
        position_ids = kwargs.get("position_ids", args[2] if len(args) > 2 else None)
        entries, topk = self.scores.shape[-1], module.index_topk
        if entries <= topk:
            return  # all are chosen
        visible = (position_ids[..., None] + 1) // module.compress_rate
        hidden = torch.arange(entries) >= visible
        top = self.scores.float().masked_fill(hidden, float("-inf")).topk(topk + 1, -1).values
        gap = top[..., -2] - top[..., -1]
        gap = gap.masked_fill(top[..., -1] == float("-inf"), float("inf"))  # all visible are chosen
        self.gaps.append(gap.expand(self.scores.shape[:2]))

    def smallest(self) -> torch.Tensor:
        return torch.stack(self.gaps).amin(0)


def clear_choices(margin: torch.Tensor, least: float = 3e-5) -> torch.Tensor:
    """Positions before the first whose margin is too small, [B, S] bool: those where logits can be
    compared.
    """
    return (margin < least).cumsum(1) == 0
