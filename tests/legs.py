"""Which tests CI runs in its first leg alone, and why; all others run on each Python it tests.

The second leg is there for what versions of Python, jax, flax and numpy change. A test belongs
in one of these lists when it cannot see those, or sees no more of them than one that stays.
conftest.py gives those listed the marker `one_leg`; structure_test.py refuses entries that name
nothing, and whole files that use JAX themselves.

An entry is a path in tests/, of a file or a folder, with `::function` and `[case]` behind it
where less is meant; `*` and `?` stand for what they do in a shell.
"""

import fnmatch

# Text, counts and files: the standard library and this project's own programs.
NOTHING_OF_JAX = (
    "audit",
    "book_test.py",
    "comparison_test.py",
    "decode_metrics_test.py",
    "docs_test.py",
    "endpoint_test.py",
    "experiments/audit_test.py",
    "experiments/bad_input_test.py",
    "experiments/plan_test.py",
    "experiments/report_test.py",
    "experiments/roofline_test.py",
    "experiments/validate_test.py",
    "gpu/goals_test.py",
    "hardware_test.py",
    "heldout_test.py",
    "interop/gguf_file_test.py",
    "interop/safetensors_file_test.py",
    "interop/tokenizer_test.py",
    "kernels/sass_test.py",
    "levers_test.py",
    "noise_forecast_test.py",
    "noise_meta_test.py",
    "page",
    "peer_test.py",
    "planner_test.py",
    "power_test.py",
    "prediction_test.py",
    "record_test.py",
    "roofline_test.py",
    "shapes_test.py",
    "speedtest_test.py",
    "table_test.py",
    "validation_test.py",
)

# Programs, guides and studies made of steps that both legs test one by one.
MADE_OF_OTHERS = (
    "card_test.py::test_a_finished_card_measures_nothing_again",
    "card_test.py::test_another_card_in_the_folder_is_refused",
    "card_test.py::test_every_contender_has_a_line_over_its_seeds",
    "card_test.py::test_the_table_and_the_plot",
    "checkpoint/split_test.py::test_stored_struck_and_saved_as_on_one_device",
    "checkpoint/training_test.py::test_kill_9_leaves_the_latest_whole",
    "experiments/compare_test.py",
    "experiments/crash_test.py::test_a_killed_run_goes_on_on_another_mesh",
    "experiments/convert_test.py::test_every_weight_is_a_record_and_all_of_them_another",
    "experiments/decode_stored_test.py::test_a_directory_is_decoded",
    "experiments/decode_stored_test.py::test_another_programs_model_is_decoded",
    "experiments/decode_stored_test.py::test_the_box_is_decoded_by_name",
    "experiments/decode_test.py::test_a_part_never_reads_as_the_model",
    "experiments/decode_test.py::test_ctrl_c_on_the_real_thing",
    "experiments/decode_test.py::test_scheme[[!i]*]",
    "experiments/evaluate_test.py::test_the_model_in_the_box_has_learned_something",
    "experiments/gpu_day_test.py::test_a_rehearsal",
    "experiments/mesh_flag_test.py::test_chat_and_evaluate",
    "experiments/robustness_test.py::test_a_folder_of_another_study",
    "experiments/robustness_test.py::test_what_is_foreseen_and_the_controls",
    "experiments/scaling_test.py",
    "experiments/untrained_table_test.py",
    "noise/new_noise_guide_test.py::test_the_command_studies_it",
    "quant/new_scheme_guide_test.py::test_the_*_command_runs*",
    "tour_test.py",
    "training_test.py::test_a_run_killed_at_random_ends_as_one_that_was_not",
)

# What a formula, a scheme or a noise claims, drawn or computed many times over.
CLAIMS = (
    "calibrate_test.py::test_statistics_are_those_of_a_forward_pass",
    "config_test.py::test_every_field_*",
    "convert_test.py",
    "engine_test.py::test_draws_follow_the_distribution[1.0-*]",
    "engine_test.py::test_generate_with_one_choice_is_greedy",
    "interop/bad_files_test.py",
    "noise/analog_test.py",
    "noise/bits_test.py",
    "noise/cells_test.py",
    "noise/predict_test.py",
    "noise/trits_test.py",
    "quant/calibrated_test.py",
    "quant/ternary_test.py::test_*optimum*",
    "response_test.py",
    "robustness_test.py::test_the_plug_in_holds_on_real_layers",
    "train_test.py::test_it_learns",
    "train_test.py::test_noise_is_new_each_step_and_the_same_each_run",
    "train_test.py::test_parts_of_a_batch_add_up",
    "untrained_test.py::test_one_layer_is_the_closed_form",
)

# Further cases, which go through the same functions of JAX as the ones that stay.
FURTHER_CASES = (
    "checkpoint/loading_test.py::test_a_float_model_under_every_scheme[[!at]*]",
    "checkpoint/loading_test.py::test_float_round_trip[tiny-llama]",
    "checkpoint/loading_test.py::test_packed_round_trip[*-tiny-llama]",
    "checkpoint/loading_test.py::test_packed_round_trip[[!anp]*]",
    "checkpoint/loading_test.py::test_what_is_not_whole_is_refused_by_name",
    "edit_test.py::test_packed_logits_equal_fake_quantized[[!ain]*]",
    "engine_test.py::test_stop_tokens_end_each_row_alone[places[02]]",
    "injection_test.py::test_chunks_change_no_draw",
    "injection_test.py::test_order_and_selection_change_no_draw",
    "injection_test.py::test_packed_words_are_struck_as_codes_are[s*]",
    "injection_test.py::test_tables_and_raw_codes",
    "interop/gguf_test.py::test_a_*",
    "interop/gguf_test.py::test_blocks_of_their_own_scale_become_groups",
    "interop/gguf_test.py::test_floats_of_ternary_weights",
    "interop/gguf_test.py::test_tables_keep_their_codes",
    "interop/gguf_test.py::test_what_no_file_can_hold",
    "interop/hf_test.py::test_what_transformers_has_no_form_of",
    "kernels/cpu_test.py::test_a_projection_with_all_that_stands_round_it[[!0]*]",
    "kernels/cpu_test.py::test_one_token_of_groups_that_are_whole_vectors",
    "kernels/rows_test.py::test_all_ways_agree",
    "kernels/ternary_matmul_test.py::test_a_row_does_not_depend_on_its_batch[*-33-*]",
    "kernels/ternary_matmul_test.py::test_scales_and_zeros_against_float64[cpu-*]",
    "kernels/ternary_matmul_test.py::test_block_rows_change_nothing",
    "models/decoder_test.py::test_decoding_equals_the_full_forward_everywhere[*-bf16-*]",
    "nn/attention_test.py::test_a_step_rotates_appends_and_attends[*-bf16]",
    "nn/attention_test.py::test_a_step_rotates_appends_and_attends[decode, three*]",
    "nn/attention_test.py::test_cached_equals_numpy[*-bf16-*]",
    "nn/attention_test.py::test_cached_equals_numpy[decode, [!r]*]",
    "nn/linear_test.py::test_what_stands_round_a_projection[*-None]",
    "nn/linear_test.py::test_what_stands_round_a_projection[*-relu2]",
    "noise/conformance_test.py::test_contract[*,*]",
    "quant/conformance_test.py::*[*granularity=group*]",
    "quant/conformance_test.py::*[*granularity=row*]",
    "quant/conformance_test.py::test_constant_weights_are_answered",
    "quant/conformance_test.py::test_single_rows_and_columns_are_answered",
    "sharding_test.py::test_logits_and_texts_are_those_of_one_device[close]",
)

LISTED = (*NOTHING_OF_JAX, *MADE_OF_OTHERS, *CLAIMS, *FURTHER_CASES)


def in_one_leg(test: str) -> bool:
    """Whether an entry names `test`, as pytest writes it: file::function[case], from tests/."""
    return any(names(entry, test) for entry in LISTED)


def names(entry: str, test: str) -> bool:
    """Whether `entry` is `test`, or a folder, a file or a function that it belongs to."""
    place, _, case = entry.partition("[")
    found, _, of = test.partition("[")
    if case and not fnmatch.fnmatchcase(of.removesuffix("]"), case.removesuffix("]")):
        return False
    if "::" in place:
        return fnmatch.fnmatchcase(found, place)
    return found.startswith((f"{place}::", f"{place}/"))
