"""The heavy regions of DeepSeek-V4, one file each. Call `ops.<name>(...)`, or choose forms per model: see registry.py."""

from .act_quant import act_quant
from .compress import compress
from .hc_post import hc_post
from .hc_post_pre import hc_post_pre
from .hc_pre import hc_pre
from .indexer_loss import indexer_loss, indexer_recall
from .indexer_topk import indexer_topk
from .linear_cross_entropy import linear_cross_entropy
from .moe import moe
from .moe_few import moe_few
from .moe_kept import moe_kept
from .quant_linear import quant_linear
from .registry import NAMESPACE, OPS, Op, Table, register, use
from .rope import rope
from .sinkhorn import sinkhorn
from .sparse_attn import sparse_attn
