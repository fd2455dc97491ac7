"""Public bug reports of other projects as the smallest inputs, with the right behaviour.

Each test names its reports; inputs were written anew.
"""

from __future__ import annotations

import numpy as np
import pytest

from rmmformat.converters import get_exporter
from rmmformat.errors import NonFiniteError, SourceError, UnsupportedError
from rmmformat.model import Role


def test_empty_file_of_zero3__peft_2892_trl_4416_safetensors_498(kit):
    with pytest.raises(SourceError, match="holds no tensors") as caught:
        kit.open(kit.adapter({}))
    assert "ZeRO-3" in str(caught.value.hint)
    assert caught.value.exit_code != 0


def test_empty_tensors_of_zero3__peft_2892_trl_4416(kit):
    empty = np.zeros(0, np.float32)
    tensors = {f"{kit.prefix}q.lora_A.weight": empty, f"{kit.prefix}q.lora_B.weight": empty}
    with pytest.raises(SourceError, match=r"q\.lora_A\.weight' is empty"):
        kit.open(kit.adapter(tensors))


def test_adapter_without_factors(kit):
    with pytest.raises(SourceError, match="holds no LoRA tensors"):
        kit.open(kit.adapter({f"{kit.prefix}score.weight": np.ones((2, 2), np.float32)}))


def test_rslora_strength__trtllm_1668_vllm_6909(kit):
    folder = kit.adapter(kit.pair("q", rank=16), r=16, lora_alpha=16, use_rslora=True)
    assert kit.open(folder).targets["q"].scale == 4.0


@pytest.mark.parametrize("order", [("q", "k"), ("k", "q")])
def test_mixed_ranks_without_any_alpha__diffusers_14409(kit, order):
    ranks = {"q": 64, "k": 16}
    tensors = {key: v for m in order for key, v in kit.pair(m, rank=ranks[m]).items()}
    task = kit.open(kit.adapter(tensors, {"peft_type": "LORA", "target_modules": ["q", "k"]}))
    assert {name: info.rank for name, info in task.targets.items()} == ranks
    assert {info.scale for info in task.targets.values()} == {1.0}
    assert "scale 1" in next(n.detail for n in kit.notices(task) if n.item == "field lora_alpha")


def test_module_path_with_weight_in_it__peft_2772(kit):
    name = "msa_pair_weighted_avg.lin"
    task = kit.open(kit.adapter(kit.pair(name), target_modules=["lin"]))
    assert list(task.targets) == [name]
    get_exporter("peft").export(task, kit.root / "out")
    assert list(kit.open(kit.root / "out").targets) == [name]


def test_full_head_beside_one_pair__llamacpp_11554_vllm_9280(kit):
    head = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {**kit.pair("q"), f"{kit.prefix}lm_head.weight": head}
    task = kit.open(kit.adapter(tensors, modules_to_save=["lm_head"]))
    assert task.privates["lm_head.weight"].role is Role.MODULE
    np.testing.assert_array_equal(task.private_tensor("lm_head.weight"), head)


def test_resized_vocabulary__mergekit_328_axolotl_2277(kit):
    shapes = []
    for name, vocabulary in (("a", 32004), ("b", 32000)):
        tensors = {
            f"{kit.prefix}embed.lora_embedding_A": np.ones((8, vocabulary), np.float16),
            f"{kit.prefix}embed.lora_embedding_B": np.ones((4, 8), np.float16),
        }
        task = kit.open(kit.adapter(tensors, name=name, r=8, target_modules=["embed"]))
        shapes.append(task.targets["embed"].shape)
    assert [shape.n_in for shape in shapes] == [32004, 32000]
    assert shapes[0] != shapes[1]  # so that no basis is shared between them


def test_conv1d_base__peft_3531_mlxcel_925(kit):
    for n_in, n_out in ((4, 6), (4, 4)):
        folder = kit.adapter(
            kit.pair("q", n_in=n_in, n_out=n_out), name=f"{n_in}{n_out}", fan_in_fan_out=True
        )
        shape = kit.open(folder).targets["q"].shape
        assert (shape.n_in, shape.n_out, shape.transposed) == (n_in, n_out, True)


def test_alpha_zero_is_scale_zero__surogate_173(kit):
    task = kit.open(kit.adapter(kit.pair("q"), lora_alpha=0))
    assert task.targets["q"].scale == 0.0
    get_exporter("peft").export(task, kit.root / "out")
    assert kit.open(kit.root / "out").targets["q"].scale == 0.0


def test_one_nan__ainode_186_unsloth_3690(kit):
    tensors = kit.pair("q")
    tensors[f"{kit.prefix}q.lora_B.weight"][0, 0] = np.nan
    folder = kit.adapter(tensors)
    with pytest.raises(NonFiniteError, match=r"q\.lora_B\.weight"):
        kit.open(folder).factors("q")
    assert np.isnan(kit.open(folder, allow_nonfinite=True).factors("q").B[0, 0])


def test_nan_in_a_private_tensor(kit):
    tensors = {**kit.pair("q"), f"{kit.prefix}score.weight": np.full((2, 2), np.nan, np.float16)}
    task = kit.open(kit.adapter(tensors, modules_to_save=["score"]))
    with pytest.raises(NonFiniteError, match=r"score\.weight.*4 of 4"):
        task.private_tensor("score.weight")


def test_pissa_on_the_original_base__peft_1929_transformers_34468(kit):
    with pytest.raises(UnsupportedError, match="pissa") as caught:
        kit.open(kit.adapter(kit.pair("q"), init_lora_weights="pissa"))
    assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)
