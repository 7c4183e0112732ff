"""Which tests prove which row of the fault table.

``FAULTS`` names the rows in short; ``ROWS`` maps each to tests, as "file::test" below ``tests/``. All of them
start a script: by its ``main``, or as a process where signals, disks or pipes matter.
"""

from __future__ import annotations

FAULTS = {
    1: "unknown or misspelt flag: 2, nearest match",
    2: "sampling out of range: 2, range",
    3: "beam width or length below 1: 2; width above the draft vocabulary: cut with a warning",
    4: "no new tokens: 0, empty replies",
    5: "no mode, or modes that exclude each other: 2, the choices",
    6: "empty prompt and no BOS: 3",
    7: "empty, undecodable, malformed, incomplete or giant prompt files: 3 with the line; --skip_bad_rows counts",
    8: "prompt as long as the window: 3, both lengths",
    9: "prompt and new tokens over the window: finished by length",
    10: "special tokens in prompts, pad = EOS, no pad, several EOS: works",
    11: "EOS, stop strings and characters that end inside a block: cut exactly",
    12: "drafter of other sizes, tokenizer or base: 4, both values; an override for the base alone",
    13: "base without roll-back or 4-D masks: 4, named",
    14: "damaged weights: 4, file, expected, found",
    15: "pickles: 4, how to convert",
    16: "paths that lead out, huge headers, own code: 4 before reading; never run",
    17: "non-finite verifier logits: 6, step and row",
    18: "non-finite drafter logits: nothing is proposed, one warning",
    19: "out of memory: 5, bytes wanted and free; trees shrink while decoding",
    20: "no such device or dtype: 2, what there is",
    21: "non-finite loss: 6 before the optimizer's step",
    22: "disk full or kill -9 while saving: 5, or the last complete checkpoint",
    23: "SIGTERM, SIGINT in training: saves, 143 or 130; a second one exits at once",
    24: "resume of another run: 4, the differences",
    25: "output directory taken or read-only: 2",
    26: "two runs on one output directory: 2, lock named",
    27: "damaged or foreign hidden-state cache: 3, shard; --rebuild_cache",
    28: "a rank that dies, diverges or has other rows: all end within a minute",
    29: "nothing supervised, fewer rows than a batch: 3",
    30: "hub unreachable, 401, 404, 429, offline: 7; token never printed",
    31: "asset of a wrong hash or cut short: 7, nothing kept",
    32: "upload cut off: goes on, the repository never half-updated",
    33: "chat: end of input, Ctrl-C, long paste",
    34: "stdout closed: quiet exit",
    35: "wandb missing: 2; offline: the run is kept",
    36: "no writable home or cache: 5, the variable",
}

ROWS: dict[int, tuple[str, ...]] = {
    1: (
        "faults/test_usage.py::test_a_misspelt_flag_names_the_nearest",
        "faults/test_usage.py::test_a_flag_like_none_is_refused_too",
        "test_train_speculator.py::test_parse_errors",
    ),
    2: (
        "faults/test_usage.py::test_sampling_out_of_range",
        "faults/test_usage.py::test_training_settings_out_of_range",
    ),
    3: (
        "faults/test_usage.py::test_no_beam",
        "faults/test_usage.py::test_no_beam_in_training",
        "faults/test_usage.py::test_a_width_above_the_draft_vocabulary_is_cut_with_a_warning",
    ),
    4: (
        "faults/test_usage.py::test_no_new_tokens_is_an_empty_reply",
        "faults/test_usage.py::test_no_new_tokens_in_an_evaluation",
    ),
    5: ("faults/test_usage.py::test_modes", "faults/test_usage.py::test_modes_of_training"),
    6: (
        "faults/test_prompts.py::test_an_empty_prompt",
        "faults/test_prompts.py::test_a_prompt_of_no_tokens_and_no_bos",
    ),
    7: (
        "faults/test_prompts.py::test_a_malformed_line_is_named",
        "faults/test_prompts.py::test_a_malformed_line_can_be_skipped_and_is_counted",
        "faults/test_prompts.py::test_a_row_without_its_fields",
        "faults/test_prompts.py::test_an_empty_file",
        "faults/test_prompts.py::test_a_list_that_does_not_parse",
        "faults/test_prompts.py::test_a_line_of_100_mb",
        "faults/test_prompts.py::test_a_prompt_file_of_100_mb",
        "faults/test_prompts.py::test_a_prompt_that_cannot_be_read",
        "faults/test_prompts.py::test_a_prompt_that_is_not_utf_8",
        "test_train_speculator.py::test_a_malformed_line_is_named_or_skipped_and_counted",
    ),
    8: ("faults/test_prompts.py::test_a_prompt_as_long_as_the_window",),
    9: ("faults/test_prompts.py::test_generation_stops_at_the_window",),
    10: (
        "faults/test_prompts.py::test_special_tokens_in_a_prompt",
        "faults/test_prompts.py::test_every_end_of_sequence_is_honoured",
    ),
    11: (
        "faults/test_prompts.py::test_a_stop_string_cuts_exactly",
        "faults/test_prompts.py::test_every_end_of_sequence_is_honoured",
        "faults/test_prompts.py::test_a_character_of_several_tokens_comes_whole_or_not_at_all",
    ),
    12: (
        "faults/test_models.py::test_a_drafter_that_does_not_fit",
        "faults/test_models.py::test_a_tokenizer_with_tokens_that_the_base_lacks",
        "faults/test_models.py::test_a_drafter_of_another_base_needs_the_override",
        "faults/test_models.py::test_a_drafter_of_a_base_that_was_tuned_since",
    ),
    13: ("faults/test_models.py::test_a_family_that_cannot_verify_a_tree",),
    14: (
        "faults/test_models.py::test_a_hostile_drafter_is_refused_by_every_command",
        "faults/test_models.py::test_a_hostile_base_is_refused_by_every_command",
    ),
    15: (
        "faults/test_models.py::test_a_hostile_drafter_is_refused_by_every_command",
        "faults/test_models.py::test_a_hostile_base_is_refused_by_every_command",
        "faults/test_network.py::test_a_repository_without_safetensors",
    ),
    16: (
        "faults/test_models.py::test_a_hostile_drafter_is_refused_by_every_command",
        "faults/test_models.py::test_a_hostile_base_is_refused_by_every_command",
        "faults/test_models.py::test_code_named_beside_a_known_family_is_not_run",
        "faults/test_models.py::test_a_hostile_chat_template",
        "faults/test_models.py::test_a_tokenizer_with_code_of_its_own",
        "faults/test_models.py::test_a_hostile_drafter_in_another_layout",
    ),
    17: (
        "faults/test_numerics.py::test_a_verifier_that_is_not_finite_names_step_and_row",
        "faults/test_numerics.py::test_the_row_of_a_batch_is_named",
    ),
    18: (
        "faults/test_numerics.py::test_a_drafter_that_is_not_finite_proposes_nothing",
        "faults/test_numerics.py::test_a_drafter_that_is_sometimes_not_finite",
    ),
    19: (
        "faults/test_numerics.py::test_trees_shrink_when_memory_runs_out",
        "faults/test_numerics.py::test_no_memory_for_a_single_node",
        "faults/test_numerics.py::test_no_memory_for_the_cache",
        "faults/test_numerics.py::test_no_memory_for_the_base",
    ),
    20: ("faults/test_usage.py::test_a_device_or_dtype_that_is_not_here",),
    21: ("test_train_speculator.py::test_a_non_finite_loss_keeps_the_last_checkpoint",),
    22: (
        "test_train_speculator.py::test_a_full_disk_keeps_what_was_saved",
        "test_train_speculator.py::test_resuming_takes_the_newest_complete_checkpoint",
        "faults/test_training.py::test_kill_9_inside_a_save_loses_nothing",
        "faults/test_training.py::test_no_space_for_stored_states",
        "faults/test_training.py::test_no_space_for_an_export",
    ),
    23: (
        "test_train_speculator.py::test_a_signal_in_training_saves_and_resuming_goes_on",
        "faults/test_training.py::test_a_signal_ends_a_process_in_good_order",
    ),
    24: (
        "faults/test_training.py::test_resuming_with_other_settings",
        "faults/test_training.py::test_resuming_with_other_data",
        "faults/test_training.py::test_resuming_with_another_world_size",
        "faults/test_training.py::test_a_damaged_checkpoint_that_is_named",
        "faults/test_training.py::test_no_checkpoint_to_go_on_from",
    ),
    25: (
        "faults/test_usage.py::test_an_output_directory_that_cannot_be_used",
        "faults/test_usage.py::test_a_result_file_that_cannot_be_written",
        "test_train_speculator.py::test_a_read_only_directory",
    ),
    26: ("faults/test_usage.py::test_two_runs_on_one_directory",),
    27: (
        "faults/test_training.py::test_a_damaged_shard_is_named_and_rebuilt_on_request",
        "faults/test_training.py::test_states_of_something_else",
    ),
    28: (
        "test_distributed.py::test_what_befalls_one_rank_ends_all",
        "test_distributed.py::test_one_rank_speaks_and_every_evaluation_row_counts_once",
    ),
    29: ("faults/test_training.py::test_nothing_to_learn_from", "test_train_speculator.py::test_too_little_data"),
    30: (
        "faults/test_network.py::test_a_hub_that_refuses",
        "faults/test_network.py::test_a_hub_that_is_not_there",
        "faults/test_network.py::test_a_data_set_of_the_hub_that_does_not_come",
        "faults/test_network.py::test_a_data_set_of_the_hub_that_does_not_read",
        "faults/test_secrets.py::test_a_download",
        "test_hub.py::test_no_hub_no_login_and_offline",
    ),
    31: (
        "faults/test_network.py::test_a_package_that_is_not_what_was_pinned",
        "faults/test_network.py::test_a_cached_file_that_was_changed_is_not_used",
    ),
    32: (
        "test_hub.py::test_failures_leave_the_repository_as_it_was",
        "test_hub.py::test_an_upload_that_was_cut_off_goes_on_where_it_was",
        "test_hub.py::test_a_fault_that_passes_is_waited_out",
    ),
    33: (
        "faults/test_prompts.py::test_a_chat_ends_with_its_input",
        "faults/test_prompts.py::test_a_very_long_paste_is_told_and_changes_nothing",
        "faults/test_prompts.py::test_bytes_that_are_no_text_cost_their_message_alone",
        "faults/test_prompts.py::test_ctrl_c_during_a_reply",
    ),
    34: ("faults/test_prompts.py::test_a_reader_that_leaves_ends_the_scripts_quietly",),
    35: (
        "faults/test_usage.py::test_wandb_that_is_not_installed",
        "faults/test_secrets.py::test_an_offline_tracker",
        "test_tracking.py::test_an_offline_run_holds_config_curves_and_the_evaluation_table",
    ),
    36: (
        "faults/test_network.py::test_a_cache_that_cannot_be_written",
        "faults/test_network.py::test_a_hub_cache_that_cannot_be_written",
    ),
}
