"""The tests that a default run leaves out, by patterns of their names: `python -m pytest -m full`.

A default run takes nine minutes on two cores with nothing compiled before. It keeps a case of
most contracts; other cases, and tests that compile for long, are named here with the reason.
See docs/compile.md#not-covered-by-a-default-run.
"""

FULL = {
    # pattern of the node id: why it waits
    r"test_recipes\.py.*keeps.*\[(?!expert_activation)": "one recipe is run",
    r"test_model_cache\.py.*(rewinding|chunks).*\[(pro-like|other-ratios)": "Flash's shape is run",
    r"test_model_cache\.py.*rewinding.*\[flash-like-[24-8]\]": "three depths of a rewind are run",
    r"test_model_parity\.py.*200_decoded.*\[(no-yarn|pro-like)\]": "Flash's shape is run",
    r"test_compile_capture\.py::test_every_backend_computes": "minutes; test_compile_config is run",
    r"test_compile_capture\.py::test_inductor_decode_writes": "the census finds copies of caches",
    r"test_compile_capture\.py::test_training_forward.*\[reference\]": "the opaque form is run",
    r"test_compile_capture\.py::test_inference.*\[(verify 1|prefill-ref.*True)": "others are run",
    r"test_compile_config\.py::test_phases_equal_eager.*\[(prefill-model|verify)": "decode is run",
    r"test_compile_config\.py::test_a_compiled_training_step.*\[model\]": "by layer is run",
    r"test_compile_shapes\.py::test_flops_of_opaque": "the roofline's FLOPs are checked",
    r"test_ahead_training\.py.*of_the_step\[(?!True-options1)": "one set of options is run",
    r"test_ahead_training\.py::test_(a_run_does|what_parts_were)": "compiles; traces for long",
    r"test_ahead\.py::test_(tokens_do_not|a_precompiled|a_damaged_library|inputs_are)": "compiles",
    r"test_torch_private\.py::test_models.*names1": "the other order is run",
    r"test_report\.py::test_recompiles_are_counted": "sessions raise on a recompile",
    r"test_compile_faults\.py.*\[(an op that|a whole cache|expand)": "most faults are here",
    r"test_compile_time\.py": "compiles in fresh processes; test_torch_private counts compiles",
    r"test_compile_shapes\.py::test_(flash_decode_at_full|one_layer_of_each)": "a minute each",
    r"test_compile_census\.py::test_kernels_per_layer": "the snapshot of operators is run",
    r"test_launches\.py.*\[(decode, 8|verify|prefill|train)": "decode is run",
    r"test_launches\.py::test_figures": "lowers a training step",
    r"test_offline\.py::test_(kernels_fit|the_largest_tile|every)": "every kernel",
    r"test_bench_gpu\.py::test_(a_case|the_scoreboard_scores)": "lowers kernels",
    r"test_checkpoint\.py::test_quantised_round_trip.*\[dtype1.*debug": "the other dtype is run",
    r"test_generate\.py::test_an_error_anywhere.*Failure": "interrupts are run",
    r"test_generate\.py::test_turns_append.*\[(0-True|1-)": "one case is run",
    r"test_cli\.py::test_(closed.*train|training.*(both|written))": "generate, one stream are run",
    r"test_checkpoint\.py::test_memory_peaks": "a process of its own",
    r"test_generate\.py::test_(compiled_generation|top_k_joins)": "one compiled row is run",
    r"test_train_step\.py::test_200_steps": "half a minute a seed",
    r"test_train_step\.py::test_a_compiled_run": "compiles a minute",
    r"test_train_step\.py::test_a_resumed_run.*\[more[12]\]": "one combination is run",
    r"test_parallel\.py::test_a_resumed_run.*\[four": "two processes are run",
    r"test_parallel\.py::test_(four_proc|torchrun|processes_hold|the_released.*four)": "two run",
    r"test_model_training\.py.*changes_memory.*\[(layer|model)-": "compiled; eager cases are run",
}
# Those that wait in Triton's interpreter only, where they are slow: with kernels.
FULL_INTERPRETED = {
    r"test_contract\.py::test_ops_(pass_opcheck|are_pure)": "default of the plain run",
    r"test_contract\.py::test_each_gradient_alone": "all gradients at once are run",
    r"test_kernel_indexer_topk\.py::test_(tiles|splits|a_buffer)": "the smallest tiles are run",
    r"test_contract\.py::test_bf16_is_exact_up_to_rounding": "the kernels' own bf16 tests are run",
    r"test_sparse_attn\.py::test_bf16_gradients_of_popular_entries": "one case, half a minute",
    r"test_kernel_model\.py::(?!test_inference|test_one_graph.*decode)": "inference is run",
    r"test_kernel_(hc|moe)\.py.*(dtype1|bf16)": "fp32 is run",
    r"test_kernel_sums\.py": "long sums; short ones are in every case",
}
