"""The sizes of V4 by name: the fields of ModelArgs (model.py) that differ from Flash's defaults.

Each becomes a model by a method of ModelArgs: `ModelArgs.pro()`, `.tiny()`, `.debug()`.
"""

PRO = dict(  # 1.6 T parameters, 49 B active
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
TINY = dict(  # the embedded model: every layer kind, for two CPU cores
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
DEBUG = dict(  # the smallest model with every layer kind
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
