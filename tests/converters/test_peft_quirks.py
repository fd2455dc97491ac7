"""What real PEFT adapters look like: one test for every way in which they surprise."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rmmformat.converters import Options, collect, get_importer
from rmmformat.errors import NonFiniteError, SourceError, UnsupportedError
from rmmformat.model import Action, Role, TargetKind

# --- scaling ----------------------------------------------------------------------------------


def test_plain_scale_is_alpha_over_rank(kit):
    task = kit.open(kit.adapter(kit.pair("q")))
    assert task.targets["q"].scale == 2.0
    assert (task.targets["q"].shape.n_in, task.targets["q"].shape.n_out) == (3, 5)


def test_rslora_scale_is_alpha_over_root_of_rank(kit):
    folder = kit.adapter(kit.pair("q", rank=16), r=16, lora_alpha=16, use_rslora=True)
    assert kit.open(folder).targets["q"].scale == 4.0


def test_patterns_match_path_tails_and_the_first_one_decides(kit):
    tensors = {
        **kit.pair("layers.0.q", rank=2),
        **kit.pair("layers.1.q", rank=4),
        **kit.pair("layers.1.xq", rank=2),
    }
    folder = kit.adapter(
        tensors,
        target_modules=["q", "xq"],
        rank_pattern={"layers.1.q": 4, "q": 2},
        alpha_pattern={"1.q": 12, "q": 6},
    )
    task = kit.open(folder)
    scales = {name: info.scale for name, info in task.targets.items()}
    assert scales == {"layers.0.q": 3.0, "layers.1.q": 3.0, "layers.1.xq": 2.0}
    assert not kit.notices(task)


def test_caret_in_a_pattern_anchors_it(kit):
    tensors = {**kit.pair("q", rank=4), **kit.pair("inner.q", rank=2)}
    task = kit.open(kit.adapter(tensors, rank_pattern={"^q": 4}))
    assert {name: info.rank for name, info in task.targets.items()} == {"q": 4, "inner.q": 2}


def test_pattern_keys_that_match_nothing_are_noticed(kit):
    folder = kit.adapter(kit.pair("q"), alpha_pattern={"k": 8}, rank_pattern={"v": 1})
    items = [line.item for line in kit.notices(kit.open(folder))]
    assert items == ["field rank_pattern['v']", "field alpha_pattern['k']"]


@pytest.mark.parametrize(
    ("alpha", "scale"), [(0, 0.0), (-4, -2.0), (0.5, 0.25), (1e-3, 5e-4), (3, 1.5)]
)
def test_alpha_of_zero_negative_or_fractional(kit, alpha, scale):
    assert kit.open(kit.adapter(kit.pair("q"), lora_alpha=alpha)).targets["q"].scale == scale


def test_missing_alpha_beside_a_rank_is_pefts_default(kit):
    folder = kit.adapter(kit.pair("q"), lora_alpha=None)
    task = kit.open(folder)
    assert task.targets["q"].scale == 4.0  # 8 / 2
    assert "field lora_alpha" in [line.item for line in kit.notices(task)]


def test_missing_rank_is_taken_from_the_tensors(kit):
    task = kit.open(kit.adapter(kit.pair("q", rank=3), r=None, lora_alpha=6))
    assert task.targets["q"].rank == 3
    assert task.targets["q"].scale == 2.0
    assert "field r" in [line.item for line in kit.notices(task)]


def test_baked_scale_where_rank_equals_alpha(kit):
    assert kit.open(kit.adapter(kit.pair("q"), lora_alpha=2)).targets["q"].scale == 1.0


def test_alpha_tensors_beside_pefts_factors(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}q.alpha": np.ones((), np.float32)}
    with pytest.raises(UnsupportedError, match=r"q\.alpha.*alpha_pattern"):
        kit.open(kit.adapter(tensors))


# --- keys and names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "notice"),
    [
        ("base_model.model.", None),
        ("", "lack the prefix"),
        ("base_model.model.base_model.model.", "twice"),
        ("module.base_model.model.", None),
    ],
)
def test_prefix_missing_doubled_or_wrapped(kit, prefix, notice):
    task = kit.open(kit.adapter(kit.pair("model.q", prefix=prefix)))
    assert list(task.targets) == ["model.q"]
    said = [line.detail for line in kit.notices(task)]
    assert len(said) == (notice is not None)
    assert notice is None or notice in said[0]


def test_wrapper_segments_of_torch_are_dropped(kit):
    prefix = "base_model.model._orig_mod."
    task = kit.open(kit.adapter(kit.pair("layers.0._fsdp_wrapped_module.q", prefix=prefix)))
    assert list(task.targets) == ["layers.0.q"]


@pytest.mark.parametrize("adapter", ["default", "default_0", "ranking", "lora", "weight"])
def test_adapter_name_inside_tensor_names(kit, adapter):
    task = kit.open(kit.adapter(kit.pair("q", adapter=adapter)))
    assert list(task.targets) == ["q"]
    plain = kit.pair("q")
    np.testing.assert_array_equal(task.factors("q").A, plain[f"{kit.prefix}q.lora_A.weight"])


def test_several_adapters_in_one_file_are_refused(kit):
    tensors = {**kit.pair("q", adapter="a"), **kit.pair("q", adapter="b")}
    with pytest.raises(SourceError, match="several adapters: a, b"):
        kit.open(kit.adapter(tensors))


@pytest.mark.parametrize(
    "module",
    ["msa_pair_weighted_avg.lin", "weight", "a.weight.b", "lora", "lora_proj.lora", "lora_A"],
)
def test_modules_called_weight_or_lora(kit, module):
    task = kit.open(kit.adapter(kit.pair(module), target_modules=[module]))
    assert list(task.targets) == [module]
    assert not kit.notices(task)


def test_private_module_called_like_lora(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}lora_head.weight": np.ones((2, 2), np.float32)}
    task = kit.open(kit.adapter(tensors, modules_to_save=["lora_head"]))
    assert task.privates["lora_head.weight"].role is Role.MODULE


def test_base_layer_weights_inside_the_file_are_kept(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}q.base_layer.weight": np.ones((5, 3), np.float16)}
    task = kit.open(kit.adapter(tensors))
    assert task.privates["q.weight"].role is Role.MODULE
    assert task.private_tensor("q.weight").dtype == np.float16


def test_renested_and_wrapped_models_keep_their_names(kit):
    names = ["model.language_model.layers.0.q", "language_model.model.layers.0.q", "thinker.x.q"]
    task = kit.open(kit.adapter({k: v for n in names for k, v in kit.pair(n).items()}))
    assert sorted(task.targets) == sorted(names)


@pytest.mark.parametrize(
    ("target_modules", "noticed"),
    [
        (["q_proj"], False),
        (["self_attn.q_proj"], False),
        (["proj"], True),
        (r".*\.(q|v)_proj", False),
        (r".*mlp.*", True),
        ("all-linear", False),
        (None, False),
        (["q_proj", "no_such_module"], False),
    ],
)
def test_target_modules_that_pass_by_a_tensor_are_noticed(kit, target_modules, noticed):
    folder = kit.adapter(kit.pair("layers.0.self_attn.q_proj"), target_modules=target_modules)
    said = [line.detail for line in kit.notices(kit.open(folder))]
    assert bool(said) == noticed
    assert all("PEFT would not load it" in detail for detail in said)


def test_fused_projection_is_one_target(kit):
    task = kit.open(kit.adapter(kit.pair("qkv_proj", n_out=9), target_modules=["qkv_proj"]))
    assert task.targets["qkv_proj"].shape.n_out == 9


# --- other tools and methods ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune and MLX"),
        ("model.layers.0.self_attn.q_proj.lora_b", "torchtune and MLX"),
        ("lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight", "kohya"),
        ("lora_te1_text_model_encoder_layers_0_q_proj.alpha", "kohya"),
        ("x.lora_up.weight", "kohya"),
        ("x.lora_mid.weight", "Tucker"),
        ("x.dora_scale", "kohya"),
        ("x.hada_w1_a", "LoHa"),
        ("x.lokr_w1", "LoKr"),
        ("x.lokr_t2", "LoKr"),
        ("x.lora_E", "AdaLoRA"),
        ("x.lora_E.default", "AdaLoRA"),
        ("x.ranknum", "AdaLoRA"),
        ("x.vera_lambda_b", "VeRA"),
        ("x.ia3_l", "IA3"),
        ("x.oft_r", "OFT"),
        ("x.lora_diag", "KaSA"),
        ("prompt_embeddings", "prompt"),
        ("unet.attn1.processor.to_q_lora.down.weight", "old diffusers"),
    ],
)
def test_tensors_of_other_tools_are_refused_by_name(kit, name, what):
    tensors = {**kit.pair("q"), f"{kit.prefix}{name}": np.ones((2, 2), np.float32)}
    with pytest.raises(UnsupportedError) as caught:
        kit.open(kit.adapter(tensors))
    assert name in str(caught.value)
    assert what in str(caught.value)
    assert caught.value.hint


def test_unknown_lora_parameter_inside_a_target_is_refused(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}q.lora_zeta.default": np.ones((2,), np.float32)}
    with pytest.raises(UnsupportedError, match="lora_zeta"):
        kit.open(kit.adapter(tensors))


@pytest.mark.parametrize(
    "kind",
    ["IA3", "VERA", "LOHA", "LOKR", "ADALORA", "OFT", "PROMPT_TUNING", "XLORA", "BRAND_NEW"],
)
def test_other_peft_types_are_refused_by_name(kit, kind):
    with pytest.raises(UnsupportedError, match=kind) as caught:
        kit.open(kit.adapter(kit.pair("q"), peft_type=kind))
    assert "save_as_lora" in str(caught.value.hint)


@pytest.mark.parametrize(
    "init", ["pissa", "PiSSA", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"]
)
def test_initialisations_that_change_the_base_are_refused(kit, init):
    with pytest.raises(UnsupportedError, match="init_lora_weights") as caught:
        kit.open(kit.adapter(kit.pair("q"), init_lora_weights=init))
    if init != "loftq":
        assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_read(kit, init):
    assert kit.open(kit.adapter(kit.pair("q"), init_lora_weights=init)).targets["q"].rank == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 1}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("megatron_config", {"a": 1}),
        ("enable_lora", [True, False, True]),
    ],
)
def test_variants_of_lora_are_refused_by_field(kit, field, value):
    with pytest.raises(UnsupportedError, match=field) as caught:
        kit.open(kit.adapter(kit.pair("q"), **{field: value}))
    assert caught.value.hint


def test_fields_of_variants_that_are_not_set_are_no_obstacle(kit):
    folder = kit.adapter(
        kit.pair("q"), alora_invocation_tokens=None, use_qalora=False, layer_replication=[]
    )
    assert kit.open(folder).targets["q"].rank == 2


def test_moe_factors_of_bare_parameters_are_refused(kit):
    with pytest.raises(UnsupportedError, match="target_parameters"):
        kit.open(kit.adapter(kit.pair("mlp.experts.base_layer")))


def test_merged_linear_of_three_axes_is_refused(kit):
    tensors = {
        f"{kit.prefix}qkv.lora_A.weight": np.ones((4, 3), np.float32),
        f"{kit.prefix}qkv.lora_B.weight": np.ones((6, 2, 1), np.float32),
    }
    with pytest.raises(UnsupportedError, match="MergedLinear"):
        kit.open(kit.adapter(tensors))


# --- shapes and layers ------------------------------------------------------------------------


def test_embedding_factors(kit):
    a, b = np.ones((2, 7), np.float32), np.ones((4, 2), np.float32)
    name = f"{kit.prefix}embed.lora_embedding_"
    task = kit.open(
        kit.adapter({f"{name}A": a, f"{name}B": b}, target_modules=["embed"], fan_in_fan_out=True)
    )
    shape = task.targets["embed"].shape
    assert (shape.kind, shape.n_in, shape.n_out) == (TargetKind.EMBEDDING, 7, 4)
    assert not shape.transposed
    assert task.factors("embed").A.shape == (2, 7)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (2, 3, 4)])
def test_convolution_factors_are_flattened(kit, kernel):
    ones = (1,) * len(kernel)
    a = np.arange(2 * 3 * np.prod(kernel), dtype=np.float32).reshape(2, 3, *kernel)
    b = np.arange(10, dtype=np.float32).reshape(5, 2, *ones)
    name = f"{kit.prefix}q.lora_"
    task = kit.open(kit.adapter({f"{name}A.weight": a, f"{name}B.weight": b}))
    shape = task.targets["q"].shape
    assert shape.kind is TargetKind.CONV
    assert shape.kernel == kernel
    assert shape.n_in == 3 * np.prod(kernel)
    np.testing.assert_array_equal(task.factors("q").A, a.reshape(2, -1))
    np.testing.assert_array_equal(task.factors("q").B, b.reshape(5, 2))


def test_grouped_convolution_is_refused(kit):
    tensors = {
        f"{kit.prefix}q.lora_A.weight": np.ones((4, 6, 3), np.float32),
        f"{kit.prefix}q.lora_B.weight": np.ones((6, 2, 1), np.float32),
    }
    with pytest.raises(UnsupportedError, match="2 groups"):
        kit.open(kit.adapter(tensors, r=4))


def test_fan_in_fan_out_marks_linear_targets(kit):
    tensors = {**kit.pair("q"), **kit.pair("k", n_in=4, n_out=4)}
    task = kit.open(kit.adapter(tensors, fan_in_fan_out=True))
    assert all(info.shape.transposed for info in task.targets.values())


def test_layers_to_transform_are_recorded_and_held_against_the_tensors(kit):
    tensors = {**kit.pair("layers.0.q"), **kit.pair("layers.3.q")}
    folder = kit.adapter(tensors, layers_to_transform=[0], layers_pattern="layers")
    said = kit.notices(kit.open(folder))
    assert [line.item for line in said] == [
        f"tensor {kit.prefix}layers.3.q.lora_{letter}.weight" for letter in "AB"
    ]


def test_tasks_with_disjoint_targets_and_odd_ranks(kit):
    first = kit.adapter(kit.pair("q", rank=7), name="a", r=7)
    second = kit.adapter(kit.pair("k", rank=2), name="b", target_modules=["k"])
    tasks = collect([(None, first), (None, second)])
    assert [list(task.targets) for task in tasks] == [["q"], ["k"]]
    assert tasks[0].targets["q"].rank == 7


def test_torch_multihead_attention_nests_its_output_projection(kit):
    tensors = {
        **kit.pair("attn", n_in=4, n_out=12),
        **kit.pair("attn.base_layer.out_proj", n_in=4, n_out=4),
    }
    task = kit.open(kit.adapter(tensors, target_modules=["attn"], alpha_pattern={"attn": 6}))
    assert {name: info.scale for name, info in task.targets.items()} == {
        "attn": 3.0,
        "attn.out_proj": 3.0,
    }


@pytest.mark.parametrize(("missing", "left"), [("A", "B"), ("B", "A")])
def test_orphan_factor_is_named(kit, missing, left):
    tensors = {**kit.pair("k"), **kit.pair("q")}
    del tensors[f"{kit.prefix}q.lora_{missing}.weight"]
    with pytest.raises(SourceError, match=rf"q\.lora_{left}\.weight.*no lora_{missing}"):
        kit.open(kit.adapter(tensors))


def test_factors_of_different_ranks_are_named(kit):
    tensors = kit.pair("q")
    tensors[f"{kit.prefix}q.lora_B.weight"] = np.ones((5, 3), np.float32)
    with pytest.raises(SourceError, match=r"q\.lora_B\.weight.*rank 3.*rank 2"):
        kit.open(kit.adapter(tensors))


def test_rank_that_contradicts_the_config_is_named(kit):
    with pytest.raises(SourceError, match=r"q\.lora_A\.weight.*rank 2.*rank 16"):
        kit.open(kit.adapter(kit.pair("q"), r=16))


def test_transposed_factor_of_a_square_weight_cannot_pass_as_right(kit):
    tensors = kit.pair("q", n_in=4, n_out=4)
    name = f"{kit.prefix}q.lora_A.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(SourceError, match=r"q\.lora"):
        kit.open(kit.adapter(tensors))


# --- heads, embeddings, biases, tokens --------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "classifier.weight",
        "classifier.modules_to_save.weight",
        "classifier.modules_to_save.default.weight",
    ],
)
def test_heads_of_modules_to_save(kit, name):
    head = np.ones((3, 4), np.float16)
    tensors = {**kit.pair("q"), f"{kit.prefix}{name}": head}
    task = kit.open(kit.adapter(tensors, modules_to_save=["classifier"]))
    assert list(task.privates) == ["classifier.weight"]
    info = task.privates["classifier.weight"]
    assert (info.role, info.dtype, info.shape) == (Role.MODULE, np.float16, (3, 4))
    np.testing.assert_array_equal(task.private_tensor("classifier.weight"), head)


def test_head_of_two_layers_keeps_its_inner_names(kit):
    tensors = {
        **kit.pair("q"),
        f"{kit.prefix}classifier.modules_to_save.default.dense.weight": np.ones((2, 2), np.float32),
        f"{kit.prefix}classifier.modules_to_save.out.bias": np.ones((2,), np.float32),
    }
    task = kit.open(kit.adapter(tensors, modules_to_save=["classifier"], bias="all"))
    assert list(task.privates) == ["classifier.dense.weight", "classifier.out.bias"]
    assert {info.role for info in task.privates.values()} == {Role.MODULE}


def test_original_module_copies_are_left_out_and_said(kit):
    tensors = {
        **kit.pair("q"),
        f"{kit.prefix}score.modules_to_save.default.weight": np.ones((2, 2), np.float32),
        f"{kit.prefix}score.original_module.weight": np.zeros((2, 2), np.float32),
    }
    task = kit.open(kit.adapter(tensors, modules_to_save=["score"]))
    assert list(task.privates) == ["score.weight"]
    line = next(line for line in task.ledger if "original_module" in line.item)
    assert line.action is Action.IGNORED


def test_parameter_of_a_saved_module_under_two_names_is_the_one_peft_takes(kit):
    tensors = {
        **kit.pair("q"),
        f"{kit.prefix}score.bias": np.ones(2, np.float32),
        f"{kit.prefix}score.modules_to_save.default.bias": np.zeros(2, np.float32),
    }
    task = kit.open(kit.adapter(tensors, modules_to_save=["score"], bias="all"))
    assert task.private_tensor("score.bias").tolist() == [1, 1]
    line = next(line for line in task.ledger if "score.modules_to_save" in line.item)
    assert line.action is Action.IGNORED


def test_one_parameter_under_two_names_is_refused(kit):
    tensors = {
        **kit.pair("q"),
        f"{kit.prefix}q.bias": np.ones(5, np.float32),
        f"{kit.prefix}q.base_layer.bias": np.zeros(5, np.float32),
    }
    with pytest.raises(SourceError, match=r"are both 'q\.bias'"):
        kit.open(kit.adapter(tensors))


def test_norms_and_embeddings_outside_modules_to_save_are_private(kit):
    tensors = {
        **kit.pair("q"),
        f"{kit.prefix}norm.weight": np.ones(3, np.float32),
        f"{kit.prefix}embed_tokens.weight": np.ones((9, 3), np.float32),
        f"{kit.prefix}cls_token": np.ones((1, 3), np.float32),
    }
    task = kit.open(kit.adapter(tensors))
    assert set(task.privates) == {"norm.weight", "embed_tokens.weight", "cls_token"}


def test_tied_head_and_embedding_are_two_targets(kit):
    tensors = {
        f"{kit.prefix}embed.lora_embedding_A": np.ones((2, 9), np.float32),
        f"{kit.prefix}embed.lora_embedding_B": np.ones((3, 2), np.float32),
        **kit.pair("lm_head", n_in=3, n_out=9),
    }
    folder = kit.adapter(tensors, target_modules=["embed", "lm_head"], ensure_weight_tying=True)
    task = kit.open(folder)
    assert [task.targets[n].shape.kind.name for n in ("embed", "lm_head")] == [
        "EMBEDDING",
        "LINEAR",
    ]


def test_trainable_tokens_are_rows(kit):
    name = "embed.token_adapter.trainable_tokens_delta"
    tensors = {**kit.pair("q"), f"{kit.prefix}{name}": np.ones((2, 3), np.float32)}
    task = kit.open(kit.adapter(tensors, trainable_token_indices={"embed": [0, 4]}))
    assert task.privates[name].role is Role.ROWS


def test_trainable_tokens_without_indices_are_refused(kit):
    name = f"{kit.prefix}embed.token_adapter.trainable_tokens_delta"
    with pytest.raises(SourceError, match="trainable_token_indices"):
        kit.open(kit.adapter({**kit.pair("q"), name: np.ones((2, 3), np.float32)}))


@pytest.mark.parametrize(
    ("bias", "name", "role"),
    [
        ("lora_only", "q.base_layer.bias", Role.BIAS),
        ("lora_only", "q.bias", Role.BIAS),
        ("all", "norm.bias", Role.BIAS),
        ("none", "norm.bias", Role.MODULE),
        (None, "norm.bias", Role.MODULE),
        ("all", "score.bias", Role.MODULE),
    ],
)
def test_biases(kit, bias, name, role):
    tensors = {**kit.pair("q"), f"{kit.prefix}{name}": np.ones(5, np.float32)}
    task = kit.open(kit.adapter(tensors, bias=bias, modules_to_save=["score"]))
    assert {n: info.role for n, info in task.privates.items()} == {
        name.replace(".base_layer", ""): role
    }


def test_bias_null_is_noticed(kit):
    task = kit.open(kit.adapter(kit.pair("q"), bias=None))
    assert [line.item for line in kit.notices(task)] == ["field bias"]


@pytest.mark.parametrize("middle", ["", ".default"])
def test_factor_bias(kit, middle):
    tensors = {
        **kit.pair("q", adapter=middle[1:]),
        f"{kit.prefix}q.lora_B{middle}.bias": np.ones(5, np.float32),
    }
    task = kit.open(kit.adapter(tensors, lora_bias=True))
    assert task.privates["q.lora_B.bias"].role is Role.FACTOR_BIAS


def test_factor_bias_that_the_config_disowns_is_refused(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}q.lora_B.bias": np.ones(5, np.float32)}
    with pytest.raises(SourceError, match=r"q\.lora_B\.bias.*lora_bias"):
        kit.open(kit.adapter(tensors))


@pytest.mark.parametrize("tail", ["", ".default", ".default.weight", ".weight"])
def test_dora_magnitude(kit, tail):
    name = f"{kit.prefix}q.lora_magnitude_vector{tail}"
    tensors = {**kit.pair("q"), name: np.ones(5, np.float32)}
    task = kit.open(kit.adapter(tensors, use_dora=True))
    assert task.privates["q.lora_magnitude_vector"].role is Role.MAGNITUDE


def test_dora_magnitudes_and_config_must_agree(kit):
    name = f"{kit.prefix}q.lora_magnitude_vector"
    with pytest.raises(SourceError, match=r"q\.lora_magnitude_vector.*use_dora"):
        kit.open(kit.adapter({**kit.pair("q"), name: np.ones(5, np.float32)}, name="without"))
    tensors = {**kit.pair("q"), **kit.pair("k"), name: np.ones(5, np.float32)}
    with pytest.raises(SourceError, match="'k' has no lora_magnitude_vector"):
        kit.open(kit.adapter(tensors, name="partly", use_dora=True))


# --- values -----------------------------------------------------------------------------------


def test_untrained_b_of_zeros_is_valid(kit):
    tensors = kit.pair("q")
    tensors[f"{kit.prefix}q.lora_B.weight"][:] = 0
    assert not kit.delta(kit.open(kit.adapter(tensors)), "q").any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
def test_one_value_that_is_not_finite_is_refused_when_read(kit, value, dtype):
    tensors = kit.pair("q", dtype=kit.bfloat16 if dtype == "bfloat16" else dtype)
    tensors[f"{kit.prefix}q.lora_A.weight"][1, 2] = value
    folder = kit.adapter(tensors)
    with pytest.raises(NonFiniteError, match=r"q\.lora_A\.weight.*1 of 6"):
        kit.open(folder).factors("q")
    assert not np.isfinite(kit.open(folder, allow_nonfinite=True).factors("q").A[1, 2])


def test_mixed_dtypes_are_kept_bit_for_bit(kit):
    tensors = kit.pair("q", dtype=kit.bfloat16)
    name = f"{kit.prefix}q.lora_B.weight"
    tensors[name] = tensors[name].astype(np.float16)
    task = kit.open(kit.adapter(tensors))
    info, factors = task.targets["q"], task.factors("q")
    assert (info.dtype_a, info.dtype_b) == (kit.bfloat16, np.float16)
    assert (factors.A.dtype, factors.B.dtype) == (info.dtype_a, info.dtype_b)
    np.testing.assert_array_equal(
        factors.A.view(np.uint16), tensors[f"{kit.prefix}q.lora_A.weight"].view(np.uint16)
    )


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn"])
def test_factors_of_other_dtypes_are_refused(kit, dtype):
    import ml_dtypes

    tensors = kit.pair("q", dtype=getattr(ml_dtypes, dtype, dtype))
    with pytest.raises(UnsupportedError, match=rf"q\.lora_A\.weight.*{dtype}"):
        kit.open(kit.adapter(tensors))


def test_private_tensors_of_any_dtype_are_exact(kit):
    import ml_dtypes

    private = {
        f"{kit.prefix}head.{np.dtype(dtype).name}": np.arange(4).astype(dtype)
        for dtype in (np.float64, np.int64, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn)
    }
    task = kit.open(kit.adapter({**kit.pair("q"), **private}))
    for key, array in private.items():
        read = task.private_tensor(key.removeprefix(kit.prefix))
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()


# --- files ------------------------------------------------------------------------------------


def test_stale_pickle_beside_safetensors_is_said(kit):
    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    (line,) = kit.notices(kit.open(folder))
    assert line.item == "file adapter_model.bin"
    assert "superseded" in line.detail


def test_extra_files_and_checkpoints_are_listed_and_not_read(kit):
    folder = kit.adapter(kit.pair("q"))
    (folder / "training_args.bin").write_bytes(b"\x80\x04never opened")
    shutil.copytree(kit.adapter(kit.pair("k"), name="other"), folder / "checkpoint-5")
    task = kit.open(folder)
    assert list(task.targets) == ["q"]
    ignored = {line.item for line in task.ledger if line.action is Action.IGNORED}
    assert {"file training_args.bin", "file checkpoint-5/"} <= ignored


def _shard(folder, kit, **index):
    """Turn an adapter of q and k into two shards with an index."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    weight_map = {}
    for n, module in enumerate(("k", "q"), start=1):
        shard = f"adapter_model-0000{n}-of-00002.safetensors"
        part = {k: v for k, v in tensors.items() if f".{module}." in k}
        save_file(part, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    weight_map.update(index)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "adapter_model.safetensors.index.json").write_text(text)
    return folder


def test_sharded_adapter(kit):
    folder = kit.adapter({**kit.pair("q"), **kit.pair("k")}, target_modules=["q", "k"])
    whole = kit.delta(kit.open(folder), "q")
    task = kit.open(_shard(folder, kit))
    np.testing.assert_array_equal(kit.delta(task, "q"), whole)
    assert len(task.files) == 4
    assert not kit.notices(task)


@pytest.mark.parametrize(
    ("tensor", "shard", "message"),
    [
        ("x", "adapter_model-00001-of-00002.safetensors", "found in no file"),
        ("k.lora_A.weight", "adapter_model-00002-of-00002.safetensors", "the index says"),
        ("x", "adapter_model-00003-of-00003.safetensors", "is missing"),
        ("x", "../adapter_model.safetensors", "not a plain file name"),
        ("x", "/etc/passwd", "not a plain file name"),
        ("x", 7, "not a plain file name"),
    ],
)
def test_index_that_disagrees_with_its_shards(kit, tensor, shard, message):
    folder = kit.adapter({**kit.pair("q"), **kit.pair("k")})
    with pytest.raises(SourceError, match=message):
        kit.open(_shard(folder, kit, **{kit.prefix + tensor: shard}))


def test_index_that_omits_a_tensor(kit):
    folder = _shard(kit.adapter({**kit.pair("q"), **kit.pair("k")}), kit)
    path = folder / "adapter_model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][f"{kit.prefix}q.lora_A.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"q\.lora_A\.weight.*says no file"):
        kit.open(folder)


def test_unknown_fields_of_a_newer_peft_are_kept(kit):
    folder = kit.adapter(kit.pair("q"), brand_new=None, unsloth_fixed=True, eva_config={"rho": 2})
    task = kit.open(folder)
    assert task.config_text == (folder / "adapter_config.json").read_text()
    assert [line.item for line in kit.notices(task)] == ["field unsloth_fixed"]


def test_missing_peft_type_and_base_model(kit):
    folder = kit.adapter(kit.pair("q"), {"r": 2, "lora_alpha": 4, "target_modules": ["q"]})
    task = kit.open(folder)
    assert task.base_model == ""
    assert task.targets["q"].scale == 2.0
    assert {line.item for line in kit.notices(task)} == {
        "field peft_type",
        "field base_model_name_or_path",
    }


@pytest.mark.parametrize("base", ["/home/me/models/x", "unsloth/llama-bnb-4bit", "org/модель"])
def test_base_model_is_recorded_as_written(kit, base):
    assert kit.open(kit.adapter(kit.pair("q"), base_model_name_or_path=base)).base_model == base


def test_folder_of_folders(kit):
    kit.adapter(kit.pair("q"), name="all/b")
    kit.adapter(kit.pair("q"), name="all/a")
    (kit.root / "all" / "README.md").write_text("not a folder")
    (kit.root / "all" / "empty").mkdir()
    tasks = get_importer("peft").open(kit.root / "all")
    assert [task.name for task in tasks] == ["a", "b"]


def test_subfolder_per_adapter_name(kit):
    kit.adapter(kit.pair("q"), name="all/sst2/default")
    kit.adapter(kit.pair("q"), name="all/multi/en")
    kit.adapter(kit.pair("q"), name="all/multi/de")
    tasks = get_importer("peft").open(kit.root / "all")
    assert [task.name for task in tasks] == ["multi-de", "multi-en", "sst2"]


def test_name_for_one_task_and_not_for_several(kit):
    folder = kit.adapter(kit.pair("q"), name="all/a")
    importer = get_importer("peft")
    assert importer.open(folder, name="mine")[0].name == "mine"
    kit.adapter(kit.pair("q"), name="all/b")
    with pytest.raises(SourceError, match="can name only one"):
        importer.open(kit.root / "all", name="mine")


def test_file_of_an_adapter_stands_for_its_folder(kit):
    folder = kit.adapter(kit.pair("q"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert kit.open(folder / name).name == "task"


def test_folder_in_the_hubs_cache_is_named_after_its_repository(kit):
    folder = kit.adapter(kit.pair("q"), name="models--org--my-lora/snapshots/0123abcd")
    assert kit.open(folder).name == "my-lora"


@pytest.mark.parametrize("name", ["weights", "config"])
def test_half_an_adapter_is_named(kit, name):
    folder = kit.adapter(kit.pair("q"), name="all/half")
    lost = {"weights": "adapter_model.safetensors", "config": "adapter_config.json"}[name]
    (folder / lost).unlink()
    with pytest.raises(SourceError, match=lost):
        get_importer("peft").open(kit.root / "all")


def test_every_tensor_field_and_file_is_in_the_ledger(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}score.weight": np.ones((2, 2), np.float32)}
    folder = kit.adapter(tensors, modules_to_save=["score"])
    items = [line.item for line in kit.open(folder).ledger]
    config = json.loads((folder / "adapter_config.json").read_text())
    for wanted in (
        *(f"tensor {name}" for name in tensors),
        *(f"field {name}" for name in config),
        *(f"file {entry.name}" for entry in folder.iterdir()),
    ):
        assert items.count(wanted) == 1


def test_private_tensors_dropped_on_request_are_said(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}score.weight": np.ones((2, 2), np.float32)}
    task = kit.open(kit.adapter(tensors, modules_to_save=["score"]), drop_private=True)
    assert not task.privates
    assert [line.item for line in kit.notices(task)] == [f"tensor {kit.prefix}score.weight"]


def test_files_are_hashed(kit):
    import hashlib

    folder = kit.adapter(kit.pair("q"))
    files = kit.open(folder).files
    assert [file.name for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        data = (folder / file.name).read_bytes()
        assert (file.n_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_task_travels_between_processes(kit):
    import pickle

    task = kit.open(kit.adapter(kit.pair("q")))
    before = kit.delta(task, "q")
    np.testing.assert_array_equal(kit.delta(pickle.loads(pickle.dumps(task)), "q"), before)


def test_task_keeps_to_the_file_that_it_described(kit):
    folder = kit.adapter(kit.pair("q", seed=1))
    task = kit.open(folder)
    before = kit.delta(task, "q")
    save_file(kit.pair("q", seed=2), folder / "new")
    (folder / "new").replace(folder / "adapter_model.safetensors")
    np.testing.assert_array_equal(kit.delta(task, "q"), before)


# --- names of tasks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "a"),
        ("A", "a"),
        ("é", "e\u0301"),
        ("org/a", "org_a"),
        ("ﬁne", "fine"),
        ("Straße", "STRASSE"),
        ("\U0001d400", "a"),
    ],
)
def test_task_names_that_could_be_confused_are_refused(kit, first, second):
    one, two = kit.adapter(kit.pair("q"), name="1"), kit.adapter(kit.pair("q"), name="2")
    with pytest.raises(SourceError, match="task names") as caught:
        collect([(first, one), (second, two)], options=Options())
    assert "NAME=SOURCE" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["", "..", " a", "a\n", "a\x7f", "\ud800", "x" * 1025])
def test_task_names_that_cannot_be_stored_are_refused(kit, name):
    with pytest.raises(SourceError, match="name"):
        collect([(name, kit.adapter(kit.pair("q")))])
