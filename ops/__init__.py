"""The heavy regions of DeepSeek-V4, one file each: `ops.<name>(...)`. Forms: see registry.py."""

from .act_quant import act_quant
from .compress import compress
from .hc_post import hc_post
from .hc_post_pre import hc_post_pre
from .hc_pre import hc_pre
from .indexer_loss import indexer_loss, indexer_recall
from .indexer_topk import indexer_topk
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_fp32 import linear_fp32
from .moe import moe
from .quant_linear import quant_linear
from .registry import (
    INTERNAL,
    NAMESPACE,
    OPS,
    Op,
    Table,
    build_cpu_kernels,
    cpu_kernels,
    register,
    register_flops,
    use,
)
from .rope import rope
from .sinkhorn import sinkhorn
from .sparse_attn import sparse_attn

__all__ = [
    "INTERNAL",
    "NAMESPACE",
    "OPS",
    "Op",
    "Table",
    "act_quant",
    "build_cpu_kernels",
    "compress",
    "cpu_kernels",
    "hc_post",
    "hc_post_pre",
    "hc_pre",
    "indexer_loss",
    "indexer_recall",
    "indexer_topk",
    "linear",
    "linear_cross_entropy",
    "linear_fp32",
    "moe",
    "quant_linear",
    "register",
    "register_flops",
    "rope",
    "sinkhorn",
    "sparse_attn",
    "use",
]
