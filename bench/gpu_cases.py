"""The kernels of the GPU suite: every op beside its baselines, at the shapes of Flash and Pro and
of published benchmarks. Importing this module registers their cases.

Baselines are written from the published formulas in eager PyTorch, and compute what ours computes
on the same inputs. Transformers' modules and other libraries take part where they can be imported.
Labels name the full sizes, also of toy runs.
"""

from bench import gpu_attention, gpu_experts, gpu_hyper_connections, gpu_indexer, gpu_linears

MODULES = (gpu_hyper_connections, gpu_indexer, gpu_attention, gpu_experts, gpu_linears)
