"""What real adapters look like, one row a quirk, and the tests that hold for each.

:data:`QUIRKS` says for every one which tests cover it, or which words of ``rmm formats`` turn it
away.  Both are checked: a test that was renamed, or a refusal that was reworded, fails here.  Tests
that belong to no single format are at the end of the file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import rmmformat as rmm
from rmmformat.converters import Options, formats, get, get_exporter, get_importer

ROOT = Path(__file__).parents[2]
C = "tests/converters/"
PEFT = f"{C}test_peft_quirks.py::"
BUGS = f"{C}test_peft_bug_reports.py::"
EQUAL = f"{C}test_peft_equality.py::"
MATCH = f"{C}test_peft_match.py::"
HOSTILE = f"{C}test_peft_hostile.py::"
EXPORT = f"{C}test_export.py::"
GGUF = f"{C}test_gguf.py::"
KOHYA = f"{C}test_kohya.py::"
HERE = f"{C}test_quirks.py::"
SWITCH = "tests/runtimes/test_peft.py::"

#: Number of the quirk to what it is and where it is held.  ``FORMAT: words`` is a refusal.
QUIRKS: dict[int, tuple[str, tuple[str, ...]]] = {
    # --- scaling
    1: (
        "rsLoRA: alpha over the root of the rank",
        (
            PEFT + "test_rslora_scale_is_alpha_over_root_of_rank",
            BUGS + "test_rslora_strength__trtllm_1668_vllm_6909",
            HERE + "test_strength_of_rslora_in_every_format",
        ),
    ),
    2: (
        "alpha_pattern and rank_pattern as PEFT matches them",
        (
            PEFT + "test_patterns_match_path_tails_and_the_first_one_decides",
            PEFT + "test_caret_in_a_pattern_anchors_it",
            MATCH + "test_pattern_key_is_pefts",
            EXPORT + "test_order_of_patterns_outlives_a_change_elsewhere",
        ),
    ),
    3: (
        "pattern keys that match nothing",
        (PEFT + "test_pattern_keys_that_match_nothing_are_noticed",),
    ),
    4: (
        "mixed ranks and no alpha",
        (
            BUGS + "test_mixed_ranks_without_any_alpha__diffusers_14409",
            KOHYA + "test_no_alpha_anywhere_is_scale_1_for_all",
        ),
    ),
    5: (
        "alpha 0, or missing",
        (
            PEFT + "test_alpha_of_zero_negative_or_fractional",
            PEFT + "test_missing_alpha_beside_a_rank_is_pefts_default",
            GGUF + "test_alpha_that_says_scale_1",
            HERE + "test_scale_zero_is_zero_in_every_format",
            KOHYA + "test_alpha_of_zero_is_said_and_never_leaves_as_one",
        ),
    ),
    6: (
        "alpha negative or fractional",
        (
            PEFT + "test_alpha_of_zero_negative_or_fractional",
            EXPORT + "test_every_scale_survives",
            KOHYA + "test_alpha_over_rank_of_each_layer",
        ),
    ),
    7: (
        "an alpha tensor for each layer",
        (
            KOHYA + "test_alpha_over_rank_of_each_layer",
            KOHYA + "test_one_layer_without_alpha_is_noticed",
            PEFT + "test_alpha_tensors_beside_pefts_factors",
        ),
    ),
    8: (
        "scales after switching between adapters with patterns",
        (SWITCH + "test_any_task_after_any_switches_is_that_task",),
    ),
    9: ("tools that bake the scale in", (PEFT + "test_baked_scale_where_rank_equals_alpha",)),
    # --- names
    10: (
        "the prefix base_model.model. missing or doubled",
        (
            PEFT + "test_prefix_missing_doubled_or_wrapped",
            EQUAL + "test_stacked_wrappers_load_under_one_prefix",
        ),
    ),
    11: (
        "the adapter's name inside tensor names",
        (PEFT + "test_adapter_name_inside_tensor_names",),
    ),
    12: (
        "modules and adapters called weight or lora",
        (
            PEFT + "test_modules_called_weight_or_lora",
            BUGS + "test_module_path_with_weight_in_it__peft_2772",
            KOHYA + "test_names_that_hold_the_words_of_factors",
        ),
    ),
    13: (
        "base_layer weights inside the file",
        (PEFT + "test_base_layer_weights_inside_the_file_are_kept",),
    ),
    14: ("models nested anew", (PEFT + "test_renested_and_wrapped_models_keep_their_names",)),
    15: (
        "prefixes that training wrappers leave",
        (
            PEFT + "test_renested_and_wrapped_models_keep_their_names",
            PEFT + "test_wrapper_segments_of_torch_are_dropped",
        ),
    ),
    16: (
        "target_modules as list, pattern or all-linear",
        (
            PEFT + "test_target_modules_that_pass_by_a_tensor_are_noticed",
            MATCH + "test_target_rule_is_pefts",
        ),
    ),
    17: (
        "target_modules that name too much or too little",
        (PEFT + "test_target_modules_that_pass_by_a_tensor_are_noticed",),
    ),
    18: ("fused and split projections", (PEFT + "test_fused_projection_is_one_target",)),
    19: (
        "lower-case names of torchtune and MLX",
        (
            PEFT + "test_tensors_of_other_tools_are_refused_by_name",
            "peft: torchtune and MLX key names",
        ),
    ),
    20: (
        "flattened names, and embeddings in the same file",
        (
            KOHYA + "test_flattened_names_stay_as_they_are",
            KOHYA + "test_base_tells_where_the_dots_were",
            KOHYA + "test_tensors_beside_the_factors_are_kept_exactly",
        ),
    ),
    21: (
        "LoHa, LoKr, Tucker cores",
        (
            KOHYA + "test_other_methods_are_refused_by_name",
            f"{C}test_kohya_lycoris.py::test_other_methods_are_refused_by_name",
            "kohya: LyCORIS methods: LoHa (hada), LoKr, Tucker cores (lora_mid)",
        ),
    ),
    22: (
        "magnitudes of DoRA",
        (
            KOHYA + "test_tensors_beside_the_factors_are_kept_exactly",
            PEFT + "test_dora_magnitude",
            PEFT + "test_dora_magnitudes_and_config_must_agree",
            GGUF + "test_private_tensors",
        ),
    ),
    # --- shapes
    23: (
        "factors of embeddings",
        (PEFT + "test_embedding_factors", GGUF + "test_one_adapter_as_peft_folder_and_as_gguf"),
    ),
    24: (
        "convolutions, grouped ones too",
        (
            PEFT + "test_convolution_factors_are_flattened",
            PEFT + "test_grouped_convolution_is_refused",
            KOHYA + "test_shapes_of_layers",
            "peft: grouped convolutions",
        ),
    ),
    25: (
        "Conv1D of GPT-2",
        (
            BUGS + "test_conv1d_base__peft_3531_mlxcel_925",
            PEFT + "test_fan_in_fan_out_marks_linear_targets",
            EQUAL + "test_deltas_are_pefts_and_peft_loads_the_export",
        ),
    ),
    26: (
        "bare parameters of mixtures of experts",
        (PEFT + "test_moe_factors_of_bare_parameters_are_refused", "peft: target_parameters"),
    ),
    27: (
        "fused MergedLinear",
        (PEFT + "test_merged_linear_of_three_axes_is_refused", "peft: fused MergedLinear"),
    ),
    28: (
        "layers_to_transform",
        (PEFT + "test_layers_to_transform_are_recorded_and_held_against_the_tensors",),
    ),
    29: (
        "layer_replication",
        (PEFT + "test_variants_of_lora_are_refused_by_field", "peft: layer_replication"),
    ),
    30: (
        "modules that some tasks lack",
        (
            PEFT + "test_tasks_with_disjoint_targets_and_odd_ranks",
            HERE + "test_collection_of_tasks_with_little_in_common",
        ),
    ),
    31: ("ranks of any size", (PEFT + "test_tasks_with_disjoint_targets_and_odd_ranks",)),
    32: (
        "square weights whose factors are transposed",
        (PEFT + "test_transposed_factor_of_a_square_weight_cannot_pass_as_right",),
    ),
    33: (
        "rotary order of query and key rows",
        (
            GGUF + "test_one_adapter_as_peft_folder_and_as_gguf",
            GGUF + "test_heads_of_each_block",
            GGUF + "test_rotary_order_is_a_permutation_of_each_head",
        ),
    ),
    # --- heads, embeddings, biases, tokens
    34: (
        "whole heads",
        (
            PEFT + "test_heads_of_modules_to_save",
            BUGS + "test_full_head_beside_one_pair__llamacpp_11554_vllm_9280",
            GGUF + "test_private_tensors",
        ),
    ),
    35: (
        "a vocabulary of another size",
        (
            BUGS + "test_resized_vocabulary__mergekit_328_axolotl_2277",
            EQUAL + "test_vocabulary_that_was_resized",
            HERE + "test_vocabularies_of_two_sizes_share_no_basis",
        ),
    ),
    36: (
        "embeddings saved whole beside the adapter",
        (
            PEFT + "test_norms_and_embeddings_outside_modules_to_save_are_private",
            EQUAL + "test_embedding_saved_beside_its_adapter_comes_back",
        ),
    ),
    37: (
        "tied embeddings",
        (
            PEFT + "test_tied_head_and_embedding_are_two_targets",
            GGUF + "test_head_that_is_the_embedding_table",
        ),
    ),
    38: (
        "rows of trained tokens",
        (
            PEFT + "test_trainable_tokens_are_rows",
            PEFT + "test_trainable_tokens_without_indices_are_refused",
            EXPORT + "test_rows_without_their_indices_are_refused",
        ),
    ),
    39: (
        "biases of modules and of factors",
        (PEFT + "test_biases", PEFT + "test_bias_null_is_noticed", PEFT + "test_factor_bias"),
    ),
    40: ("norms", (PEFT + "test_norms_and_embeddings_outside_modules_to_save_are_private",)),
    # --- values and files
    41: (
        "empty adapters",
        (
            BUGS + "test_empty_file_of_zero3__peft_2892_trl_4416_safetensors_498",
            BUGS + "test_empty_tensors_of_zero3__peft_2892_trl_4416",
            KOHYA + "test_tensors_that_do_not_fit_are_named",
        ),
    ),
    42: (
        "NaN and infinity",
        (
            PEFT + "test_one_value_that_is_not_finite_is_refused_when_read",
            BUGS + "test_one_nan__ainode_186_unsloth_3690",
            f"{C}contract/test_contract.py::test_import",
        ),
    ),
    43: (
        "untrained factors of zeros",
        (PEFT + "test_untrained_b_of_zeros_is_valid", HERE + "test_task_of_zeros_in_every_method"),
    ),
    44: (
        "mixed dtypes, and overflow in half precision",
        (
            PEFT + "test_mixed_dtypes_are_kept_bit_for_bit",
            EXPORT + "test_dtype_that_is_none_or_too_small_writes_nothing",
            GGUF + "test_value_that_would_become_infinite",
        ),
    ),
    45: (
        "pickles",
        (
            HOSTILE + "test_pickle_that_runs_code_is_refused",
            HOSTILE + "test_pickles_are_read_only_when_asked_for",
            HOSTILE + "test_torch_with_an_unsound_unpickler_is_refused",
            KOHYA + "test_pickled_file",
        ),
    ),
    46: (
        "a stale pickle beside safetensors",
        (PEFT + "test_stale_pickle_beside_safetensors_is_said",),
    ),
    47: (
        "sharded adapters",
        (
            PEFT + "test_sharded_adapter",
            PEFT + "test_index_that_disagrees_with_its_shards",
            PEFT + "test_index_that_omits_a_tensor",
        ),
    ),
    48: (
        "configs of newer versions, or without a type",
        (
            PEFT + "test_unknown_fields_of_a_newer_peft_are_kept",
            PEFT + "test_missing_peft_type_and_base_model",
        ),
    ),
    49: (
        "base models that are not named, or by a path",
        (
            PEFT + "test_base_model_is_recorded_as_written",
            PEFT + "test_missing_peft_type_and_base_model",
        ),
    ),
    50: (
        "initialisations that change the base",
        (
            PEFT + "test_initialisations_that_change_the_base_are_refused",
            BUGS + "test_pissa_on_the_original_base__peft_1929_transformers_34468",
            "peft: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA",
        ),
    ),
    51: (
        "adapters of quantised training",
        (PEFT + "test_variants_of_lora_are_refused_by_field", "peft: QALoRA"),
    ),
    52: (
        "activated LoRA",
        (
            PEFT + "test_variants_of_lora_are_refused_by_field",
            GGUF + "test_metadata_that_is_refused",
            "peft: aLoRA",
            "gguf: activated LoRA",
        ),
    ),
    53: (
        "other types than LoRA",
        (
            PEFT + "test_other_peft_types_are_refused_by_name",
            PEFT + "test_tensors_of_other_tools_are_refused_by_name",
            "peft: PEFT types other than LORA",
        ),
    ),
    54: (
        "files of like names",
        (PEFT + "test_extra_files_and_checkpoints_are_listed_and_not_read",),
    ),
    55: ("other tensors inside GGUF adapters", (GGUF + "test_tensors_that_are_no_pairs",)),
    56: (
        "rows that make no blocks of Q8_0",
        (
            GGUF + "test_rows_that_make_no_blocks_become_f16",
            GGUF + "test_q8_0_is_what_the_gguf_package_makes_of_it",
        ),
    ),
    57: (
        "task names that could be confused",
        (PEFT + "test_task_names_that_could_be_confused_are_refused",),
    ),
    58: (
        "an adapter on top of another",
        (
            PEFT + "test_prefix_missing_doubled_or_wrapped",
            EQUAL + "test_stacked_wrappers_load_under_one_prefix",
        ),
    ),
    59: (
        "one folder with an adapter in each subfolder",
        (
            PEFT + "test_subfolder_per_adapter_name",
            PEFT + "test_several_adapters_in_one_file_are_refused",
        ),
    ),
    60: (
        "numbers in quotes, NaN, ranks as fractions",
        (
            HOSTILE + "test_config_field_of_the_wrong_type_is_named",
            HOSTILE + "test_config_that_is_not_strict_json",
            HOSTILE + "test_whole_number_written_as_a_float_is_a_rank",
        ),
    ),
}

#: Public bug reports of other projects, and where the smallest input of each is held.
REPORTS: dict[str, tuple[str, ...]] = {
    "peft 2892, trl 4416, safetensors 498": (
        BUGS + "test_empty_file_of_zero3__peft_2892_trl_4416_safetensors_498",
        BUGS + "test_empty_tensors_of_zero3__peft_2892_trl_4416",
    ),
    "TensorRT-LLM 1668, vllm 6909": (
        BUGS + "test_rslora_strength__trtllm_1668_vllm_6909",
        HERE + "test_strength_of_rslora_in_every_format",
        EQUAL + "test_deltas_are_pefts_and_peft_loads_the_export",
    ),
    "diffusers 14409": (
        BUGS + "test_mixed_ranks_without_any_alpha__diffusers_14409",
        KOHYA + "test_no_alpha_anywhere_is_scale_1_for_all",
        KOHYA + "test_diffusers_adds_the_same_deltas",
    ),
    "peft 2772": (BUGS + "test_module_path_with_weight_in_it__peft_2772",),
    "llama.cpp 11554, vllm 9280": (
        BUGS + "test_full_head_beside_one_pair__llamacpp_11554_vllm_9280",
        GGUF + "test_private_tensors",
    ),
    "mergekit 328, axolotl 2277": (
        BUGS + "test_resized_vocabulary__mergekit_328_axolotl_2277",
        HERE + "test_vocabularies_of_two_sizes_share_no_basis",
        GGUF + "test_base_gguf_says_which_weights_there_are",
    ),
    "peft 3531, mlxcel 925": (
        BUGS + "test_conv1d_base__peft_3531_mlxcel_925",
        EQUAL + "test_merged_weights_are_the_base_plus_our_delta",
    ),
    "llama.cpp 9114": (GGUF + "test_tensors_that_are_no_pairs",),
    "surogate 173": (
        BUGS + "test_alpha_zero_is_scale_zero__surogate_173",
        GGUF + "test_alpha_that_says_scale_1",
        HERE + "test_scale_zero_is_zero_in_every_format",
    ),
    "ainode 186, unsloth 3690": (BUGS + "test_one_nan__ainode_186_unsloth_3690",),
    "peft 1929, transformers 34468": (
        BUGS + "test_pissa_on_the_original_base__peft_1929_transformers_34468",
    ),
    "Olive convert-adapters": (HERE + "test_patterns_and_embeddings_in_every_format",),
}


def held_by():
    """Every test and every refusal that the tables name."""
    rows = [where for _, where in QUIRKS.values()] + list(REPORTS.values())
    named = [place for where in rows for place in where]
    return {p for p in named if "::" in p}, {p for p in named if "::" not in p}


def test_every_quirk_has_its_row():
    assert list(QUIRKS) == list(range(1, 61))
    assert len(REPORTS) == 12
    assert all(where for _, where in QUIRKS.values())
    assert all(REPORTS.values())


def test_the_tests_of_every_quirk_exist():
    tests, _ = held_by()
    files = sorted({test.partition("::")[0] for test in tests})
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    collected = {line.partition("[")[0] for line in run.stdout.splitlines() if "::" in line}
    assert tests <= collected, sorted(tests - collected)


def test_what_is_refused_stands_in_the_list_of_formats():
    _, refusals = held_by()
    assert refusals
    for refusal in refusals:
        name, _, words = refusal.partition(": ")
        assert any(words in text for text in get(name).refuses), refusal


# --- quirks that belong to no single format ---------------------------------------------------

MODULE = "model.layers.0.mlp.up_proj"
NAMES = {MODULE: "lora_unet_x"}


def deltas_in(fmt, out):
    """The deltas of MODULE's kind in an exported file, by the rule of its own ecosystem."""
    if fmt == "gguf":
        import gguf

        reader = gguf.GGUFReader(out)
        tensors = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
        a, b = (tensors[f"blk.0.ffn_up.weight.lora_{part}"] for part in "ab")
        return float(reader.fields["adapter.lora.alpha"].contents()) / len(a) * (b @ a)
    if fmt == "kohya":
        with safe_open(out, framework="numpy") as file:
            a = file.get_tensor("lora_unet_x.lora_down.weight").astype(np.float64)
            b = file.get_tensor("lora_unet_x.lora_up.weight").astype(np.float64)
            return float(file.get_tensor("lora_unet_x.alpha")) / len(a) * (b @ a)
    if fmt == "onnx":
        a, b, scale = onnx_parameters(out, MODULE)
        return scale * (b @ a)
    if fmt == "peft":
        (task,) = get_importer("peft").open(out)
        factors = task.factors(MODULE)
    else:
        import json

        with safe_open(out, framework="numpy") as file:
            about = json.loads(file.metadata()["rmmformat"])
            scale = about["targets"][MODULE]["scale"]
            a, b = (file.get_tensor(f"{MODULE}.lora_{part}") for part in "AB")
            return scale * (b.astype(np.float64) @ a.astype(np.float64))
    return factors.scale * (factors.B.astype(np.float64) @ factors.A.astype(np.float64))


def onnx_parameters(out, target):
    import onnxruntime

    found = onnxruntime.AdapterFormat.read_adapter(str(out)).get_parameters()
    a, b, scale = (
        found[f"{target}.lora_{part}"].numpy().astype(np.float64) for part in ("A", "B", "scale")
    )
    return a, b, float(scale[0])


def exported(kit, task, fmt):
    base = kit.root / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, '
        '"tie_word_embeddings": false}'
    )
    out = kit.root / f"out-{fmt}"
    names = NAMES if fmt == "kohya" else {}
    options = Options(base=base if fmt == "gguf" else None, names=names)
    get_exporter(fmt).export(task, out, options=options)
    return out


FORMATS = ("peft", "safetensors", "gguf", "kohya", "onnx")


@pytest.mark.parametrize("fmt", FORMATS)
def test_strength_of_rslora_in_every_format(kit, fmt):
    pair = kit.pair(MODULE, rank=16, n_in=32, n_out=64)
    folder = kit.adapter(pair, r=16, lora_alpha=16, use_rslora=True, target_modules=["up_proj"])
    task = kit.open(folder)
    a, b = pair.values()
    got = deltas_in(fmt, exported(kit, task, fmt))
    np.testing.assert_allclose(got, 4.0 * (b.astype(float) @ a.astype(float)), rtol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_scale_zero_is_zero_in_every_format(kit, fmt):
    folder = kit.adapter(
        kit.pair(MODULE, rank=4, n_in=32, n_out=64), r=4, lora_alpha=0, target_modules=["up_proj"]
    )
    out = exported(kit, kit.open(folder), fmt)
    assert not deltas_in(fmt, out).any()
    if fmt == "gguf":  # there an alpha of 0 would mean scale 1
        import gguf

        reader = gguf.GGUFReader(out)
        assert reader.fields["adapter.lora.alpha"].contents() != 0


def test_patterns_and_embeddings_in_every_format(kit):
    tensors = {
        **kit.pair("a.up", rank=2),
        **kit.pair("b.up", rank=2),
        f"{kit.prefix}embed.lora_embedding_A": np.ones((2, 10), np.float32),
        f"{kit.prefix}embed.lora_embedding_B": np.ones((4, 2), np.float32),
    }
    folder = kit.adapter(
        tensors, lora_alpha=4, alpha_pattern={"a.up": 1}, target_modules=["up", "embed"]
    )
    rmm.convert([folder], kit.root / "x.rmm", exact=True)
    with rmm.open(kit.root / "x.rmm") as collection:
        task = collection.source("task")
        scales = {name: info.scale for name, info in task.targets.items()}
        assert scales == {"a.up": 0.5, "b.up": 2.0, "embed": 2.0}
        get_exporter("peft").export(task, kit.root / "out")
        get_exporter("onnx").export(task, kit.root / "out.onnx_adapter")
    again = kit.open(kit.root / "out")
    assert {name: info.scale for name, info in again.targets.items()} == scales
    for name in scales:
        a, b, scale = onnx_parameters(kit.root / "out.onnx_adapter", name)
        np.testing.assert_allclose(scale * (b @ a), kit.delta(again, name), rtol=1e-6)
    np.testing.assert_array_equal(kit.delta(again, "embed"), np.full((4, 10), 4.0))


def test_vocabularies_of_two_sizes_share_no_basis(kit):
    sizes = {"a": 40, "b": 32, "c": 32}
    deltas = {}
    for seed, (name, size) in enumerate(sizes.items()):
        random = np.random.default_rng(seed)
        tensors = {
            f"{kit.prefix}embed.lora_embedding_A": random.standard_normal((2, size), np.float32),
            f"{kit.prefix}embed.lora_embedding_B": random.standard_normal((4, 2), np.float32),
        }
        kit.adapter(tensors, name=f"in/{name}", target_modules=["embed"])
        a, b = tensors.values()
        deltas[name] = 2.0 * b @ a
    # One direction is exact for two tasks of one shape and for one alone, not for three.
    rmm.convert(kit.root / "in", kit.root / "x.rmm", components=1, encoding="f32")
    assert rmm.validate(kit.root / "x.rmm").ok
    with rmm.open(kit.root / "x.rmm") as collection:
        for name, size in sizes.items():
            factors = collection.load(name)["embed"]
            assert factors.A.shape == (2, size)
            np.testing.assert_allclose(
                factors.scale * factors.B @ factors.A, deltas[name], atol=1e-5
            )


def test_collection_of_tasks_with_little_in_common(kit):
    modules = {"a": {"q": 1, "k": 17}, "b": {"k": 17}, "c": {"other.v": 3}}
    for name, ranks in modules.items():
        tensors = {k: v for m, r in ranks.items() for k, v in kit.pair(m, rank=r).items()}
        kit.adapter(tensors, name=f"in/{name}", rank_pattern=ranks, target_modules=list(ranks))
    for method in ({"exact": True}, {"components": 1}, {"max_error": 0.01}):
        out = kit.root / f"{next(iter(method))}.rmm"
        rmm.convert(kit.root / "in", out, **method)
        with rmm.open(out) as collection:
            for name, ranks in modules.items():
                task = collection.load(name)
                assert {target: task[target].rank for target in task} == ranks


@pytest.mark.parametrize(
    "method",
    [
        {"exact": True},
        {"max_error": 0.05},
        {"size": 0.5},
        {"components": 1},
        {"components": 1, "align": "svd"},
        {"components": 1, "align": "procrustes"},
        {"encoding": "q4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "with another"])
def test_task_of_zeros_in_every_method(kit, method, together):
    pair = kit.pair("q", rank=4, n_in=32, n_out=32)
    zero = {k: np.zeros_like(v) if "lora_B" in k else v for k, v in pair.items()}
    kit.adapter(zero, name="in/zero", r=4)
    if together:
        kit.adapter(kit.pair("q", rank=4, n_in=32, n_out=32, seed=1), name="in/trained", r=4)
    rmm.convert(kit.root / "in", kit.root / "x.rmm", **method)
    assert rmm.validate(kit.root / "x.rmm").ok
    with rmm.open(kit.root / "x.rmm") as collection:
        factors = collection.load("zero")["q"]
        assert np.isfinite(factors.A).all()
        delta = factors.scale * factors.B @ factors.A
        # With p directions of two tasks, the published method is exact, too: p >= n - 1.
        np.testing.assert_allclose(delta, 0.0, atol=1e-5)


def test_formats_that_are_named_exist():
    assert set(FORMATS) <= {row.name for row in formats() if row.exporter}
