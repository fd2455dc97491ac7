"""LoRA files of image models: keys, scales, what is refused, and diffusers' own reading of them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import rmmformat as rmm
from rmmformat.converters import Options, collect, get_exporter, get_importer
from rmmformat.converters.kohya_names import parse_key
from rmmformat.errors import (
    LossyConversionError,
    NonFiniteError,
    RmmError,
    SourceError,
    UnsupportedError,
)
from rmmformat.model import Role, TargetKind


def values(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def pair(module, *, rank=2, n_in=6, n_out=4, kernel=(), alpha=None, seed=0, dtype=np.float32):
    tensors = {
        f"{module}.lora_down.weight": values(rank, n_in, *kernel, seed=seed, dtype=dtype),
        f"{module}.lora_up.weight": values(
            n_out, rank, *(1 for _ in kernel), seed=seed + 1, dtype=dtype
        ),
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = np.asarray(alpha, dtype)
    return tensors


class Place:
    def __init__(self, root):
        self.root = root

    def write(self, tensors, name="style", metadata=None):
        path = self.root / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, metadata=metadata)
        return path

    @staticmethod
    def open(path, **options):
        (task,) = get_importer("kohya").open(path, options=Options(**options))
        return task

    def read(self, tensors, metadata=None, name="style", **options):
        return self.open(self.write(tensors, name, metadata), **options)

    def export(self, task, name="out", **options):
        out = self.root / f"{name}.safetensors"
        ledger = get_exporter("kohya").export(task, out, options=Options(**options))
        with safe_open(out, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}, ledger

    @staticmethod
    def notices(task):
        return [line for line in task.ledger if line.detail.startswith("notice:")]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


Q = "lora_unet_down_blocks_0_attn1_to_q"
K = "lora_unet_down_blocks_0_attn1_to_k"


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up", "target"),
    [
        ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b.lora_up.weight", "lora_unet_a_b"),
        ("lora_te1_a.lora_down.weight", "lora_te1_a.lora_up.weight", "lora_te1_a"),
        ("lora_te2_a_b.lora_down.weight", "lora_te2_a_b.lora_up.weight", "lora_te2_a_b"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight", "unet.a.to_q"),
        (
            "unet.a.attn1.processor.to_q_lora.down.weight",
            "unet.a.attn1.processor.to_q_lora.up.weight",
            "unet.a.attn1.to_q",
        ),
        (
            "a.attn1.processor.to_out_lora.down.weight",
            "a.attn1.processor.to_out_lora.up.weight",
            "a.attn1.to_out.0",
        ),
        (
            "text_encoder.x.q_proj.lora_linear_layer.down.weight",
            "text_encoder.x.q_proj.lora_linear_layer.up.weight",
            "text_encoder.x.q_proj",
        ),
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "unet.a.to_q"),
        ("unet.a.lora_A.default.weight", "unet.a.lora_B.default.weight", "unet.a"),
        ("transformer.a.b.lora_down.weight", "transformer.a.b.lora_up.weight", "transformer.a.b"),
        ("diffusion_model.a.lora_A.weight", "diffusion_model.a.lora_B.weight", "diffusion_model.a"),
    ],
)
def test_every_spelling_of_the_two_factors(place, down, up, target):
    task = place.read({down: values(2, 6), up: values(4, 2)})
    assert get_importer("kohya").detect(Path(task.path))
    assert list(task.targets) == [target]
    np.testing.assert_array_equal(task.factors(target).A, values(2, 6))
    np.testing.assert_array_equal(task.factors(target).B, values(4, 2))


def test_names_that_hold_the_words_of_factors():
    assert parse_key("lora_unet_lora_down.lora_down.weight").module == "lora_unet_lora_down"
    assert parse_key("unet.lora_A.lora_A.weight").module == "unet.lora_A"
    assert parse_key("unet.weight") is None


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (3,), (1, 3, 3)])
def test_shapes_of_layers(place, kernel):
    tensors = pair(Q, kernel=kernel, alpha=1.0)
    task = place.read(tensors)
    shape = task.targets[Q].shape
    assert shape.kind is (TargetKind.CONV if kernel else TargetKind.LINEAR)
    assert (shape.n_in, shape.n_out, shape.kernel) == (6 * int(np.prod(kernel)), 4, kernel)
    back, _, _ = place.export(task)
    for key, array in tensors.items():
        np.testing.assert_array_equal(back[key], array)
        assert back[key].shape == array.shape


def test_one_file_with_several_components_is_one_task(place):
    tensors = {
        key: array
        for module in ("lora_unet_a", "lora_te1_a", "lora_te2_a")
        for key, array in pair(module, alpha=1).items()
    }
    assert list(place.read(tensors).targets) == ["lora_te1_a", "lora_te2_a", "lora_unet_a"]


# --- scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "scale"), [(1.0, 0.25), (4.0, 1.0), (0.3, 0.075), (-2.0, -0.5), (0.0, 0.0)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_over_rank_of_each_layer(place, alpha, scale, dtype, shape):
    tensors = pair(Q, rank=4, dtype=dtype)
    tensors[f"{Q}.alpha"] = np.full(shape, alpha, dtype)
    task = place.read({**tensors, **pair(K, rank=2, alpha=2.0)})
    assert task.targets[Q].scale == float(np.asarray(alpha, dtype)) / 4
    assert task.targets[Q].scale == pytest.approx(scale, rel=5e-3)
    assert task.factors(Q).B.dtype == dtype
    assert task.targets[K].scale == 1.0


@pytest.mark.parametrize("order", [(Q, K), (K, Q)])
def test_no_alpha_anywhere_is_scale_1_for_all(place, order):
    ranks = {Q: 64, K: 16}
    tensors = {key: a for m in order for key, a in pair(m, rank=ranks[m]).items()}
    task = place.read(tensors)
    assert {name: info.rank for name, info in task.targets.items()} == ranks
    assert {info.scale for info in task.targets.values()} == {1.0}
    (line,) = place.notices(task)
    assert (line.item, "scale 1 for all" in line.detail) == ("field alpha", True)


def test_one_layer_without_alpha_is_noticed(place):
    task = place.read({**pair(Q, alpha=8.0), **pair(K)})
    assert (task.targets[Q].scale, task.targets[K].scale) == (4.0, 1.0)
    assert [line.item for line in place.notices(task)] == [f"tensor {K}.lora_down.weight"]


def test_alpha_of_zero_is_said_and_never_leaves_as_one(place):
    task = place.read(pair(Q, alpha=0.0))
    assert "alpha is 0" in place.notices(task)[0].detail
    tensors, _, _ = place.export(task)
    # kohya's trainer takes an alpha of 0 for the rank: only a factor of zeros means nought to all.
    assert float(tensors[f"{Q}.alpha"]) == 2.0
    assert not tensors[f"{Q}.lora_up.weight"].any()


@pytest.mark.parametrize("alpha", [np.full((2,), 1.0, np.float32), np.float32("nan")])
def test_alpha_that_is_no_number(place, alpha):
    with pytest.raises(SourceError, match=rf"{Q}\.alpha"):
        place.read({**pair(Q), f"{Q}.alpha": np.asarray(alpha)})


def test_scales_of_diffusers_metadata(place):
    tensors = {}
    for module, rank in (("to_q", 4), ("to_k", 2)):
        tensors[f"unet.a.{module}.lora_A.weight"] = values(rank, 6)
        tensors[f"unet.a.{module}.lora_B.weight"] = values(4, rank)
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"to_k": 2}}
    metadata = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    task = place.read(tensors, metadata)
    assert {name: info.scale for name, info in task.targets.items()} == {
        "unet.a.to_k": 4.0,
        "unet.a.to_q": 2.0,
    }
    _, back, _ = place.export(task)
    assert back == metadata
    wrong = {"lora_adapter_metadata": json.dumps({**config, "unet.rank_pattern": {}})}
    with pytest.raises(SourceError, match="gives rank 4"):
        place.read(tensors, wrong)
    tensors["unet.a.to_q.alpha"] = np.asarray(4.0, np.float32)
    with pytest.raises(SourceError, match=r"unet\.a\.to_q\.alpha.*says scale 1 .* says 2"):
        place.read(tensors, metadata)


# --- names of modules -------------------------------------------------------------------------


def diffusers_folder(root):
    base = root / "pipeline"
    modules = {
        "unet": ["mid_block.attn.to_q", "mid_block.attn.to_out.0", "a.b_c", "a_b.c"],
        "text_encoder": ["text_model.layers.0.mlp.fc1"],
    }
    for component, paths in modules.items():
        (base / component).mkdir(parents=True)
        save_file(
            {f"{path}.weight": values(2, 2) for path in paths},
            base / component / "model.safetensors",
        )
    return base


def test_flattened_names_stay_as_they_are(place):
    assert list(place.read(pair("lora_unet_mid_block_attn_to_q")).targets) == [
        "lora_unet_mid_block_attn_to_q"
    ]


def test_base_tells_where_the_dots_were(place):
    base = diffusers_folder(place.root)
    tensors = {
        **pair("lora_unet_mid_block_attn_to_out_0", alpha=1),
        **pair("lora_te_text_model_layers_0_mlp_fc1", alpha=1),
        **pair("lora_unet_unknown", alpha=1),
    }
    task = place.read(tensors, base=base)
    assert list(task.targets) == [
        "lora_unet_unknown",
        "text_encoder.text_model.layers.0.mlp.fc1",
        "unet.mid_block.attn.to_out.0",
    ]
    assert [line.item for line in place.notices(task)] == ["module lora_unet_unknown"]
    with pytest.raises(SourceError, match="'lora_unet_a_b_c' could be several modules"):
        place.read(pair("lora_unet_a_b_c"), base=base)
    named = place.read(pair("lora_unet_a_b_c"), base=base, names={"unet.a.b_c": "lora_unet_a_b_c"})
    assert list(named.targets) == ["unet.a.b_c"]
    with pytest.raises(SourceError, match="a diffusers pipeline was saved to"):
        place.read(pair(Q), base=place.root / "absent")


def test_names_can_be_given_both_ways(place):
    names = {"unet.x.to_q": Q}
    tensors = pair(Q, alpha=1.0)
    task = place.read(tensors, names=names)
    assert list(task.targets) == ["unet.x.to_q"]
    back, _, _ = place.export(task, names=names)
    assert back.keys() == tensors.keys()
    dotted, _, _ = place.export(task, name="dotted")
    assert set(dotted) == {
        f"unet.x.to_q.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha")
    }


def test_names_of_no_component_are_refused(kit, place):
    task = kit.open(kit.adapter(kit.pair("model.layers.0.q")))
    with pytest.raises(UnsupportedError, match=r"--map model\.layers\.0\.q=lora_unet_"):
        place.export(task)
    assert not (place.root / "out.safetensors").exists()


# --- what is kept and what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("hada_w1_a", "LoHa"),
        ("hada_t1", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("lokr_t2", "LoKr"),
        ("lora_mid.weight", "Tucker"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("oft_blocks", "OFT"),
        ("scalar", "learnt scalar"),
        ("w_norm", "norm"),
        ("something", "no part of a LoRA that is known"),
    ],
)
def test_other_methods_are_refused_by_name(place, name, what):
    tensors = {**pair(Q, alpha=1), f"{Q}.{name}": values(2, 2)}
    with pytest.raises(UnsupportedError, match=what) as caught:
        place.read(tensors)
    assert f"{Q}.{name}" in str(caught.value)


def test_kronecker_file_alone_is_detected_and_refused(place):
    path = place.write({f"lycoris_{Q}.lokr_w1": values(2, 2), f"lycoris_{Q}.lokr_w2": values(2, 2)})
    assert get_importer("kohya").detect(path)
    with pytest.raises(UnsupportedError, match="LoKr"):
        place.open(path)


def test_tensors_beside_the_factors_are_kept_exactly(place):
    extra = {
        f"{Q}.dora_scale": values(4, 1, dtype=np.float16),
        "lora_unet_norm.diff": values(8),
        "lora_unet_norm.diff_b": values(8, seed=1),
        "bundle_emb.word.string_to_param.*": values(2, 4),
    }
    tensors = {**pair(Q, alpha=1), **extra}
    task = place.read(tensors)
    assert {name: info.role for name, info in task.privates.items()} == {
        f"{Q}.dora_scale": Role.MAGNITUDE,
        "lora_unet_norm.diff": Role.OTHER,
        "lora_unet_norm.diff_b": Role.OTHER,
        "bundle_emb.word.string_to_param.*": Role.OTHER,
    }
    back, _, _ = place.export(task)
    assert back.keys() == tensors.keys()
    for key, array in extra.items():
        np.testing.assert_array_equal(back[key], array)
    for fmt in ("peft", "safetensors"):
        out = place.root / fmt
        if fmt == "peft":
            with pytest.raises(RmmError, match=r"bundle_emb|dora_scale"):
                get_exporter(fmt).export(task, out)
        get_exporter(fmt).export(task, out, options=Options(drop_private=True))


def test_dropping_what_is_kept_is_said(place):
    task = place.read({**pair(Q, alpha=1), "lora_unet_norm.diff": values(8)}, drop_private=True)
    assert not task.privates
    assert [line.item for line in place.notices(task)] == ["tensor lora_unet_norm.diff"]


def test_head_of_a_text_model_has_no_place_in_the_file(kit, place):
    tensors = {**kit.pair("q"), f"{kit.prefix}score.weight": np.ones((2, 2), np.float32)}
    task = kit.open(kit.adapter(tensors, modules_to_save=["score"]))
    with pytest.raises(LossyConversionError, match=r"'score\.weight'.*--drop-private"):
        place.export(task, names={"q": Q})
    assert place.export(task, name="dropped", names={"q": Q}, drop_private=True)[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.lora_down.weight": values(2, 6)}, "no fellow: factor B"),
        ({f"{Q}.lora_up.weight": values(4, 2)}, "no fellow: factor A"),
        ({**pair(Q), f"{Q}.lora_up.weight": values(4, 3)}, "has rank 3"),
        ({**pair(Q), f"{Q}.lora_up.weight": values(4, 2, 1, 1)}, "does not fit"),
        (
            {**pair(Q, kernel=(3, 3)), f"{Q}.lora_up.weight": values(4, 2, 3, 3)},
            "not a 1x1 convolution",
        ),
        ({**pair(Q), f"{Q}.lora_A.weight": values(2, 6)}, "same part"),
        ({**pair(Q), f"{K}.alpha": np.ones((), np.float32)}, "no factors beside"),
        ({**pair(Q), f"{K}.dora_scale": values(4, 1)}, "no factors beside"),
        (pair(Q, dtype=np.float64), "dtype float64"),
        ({f"{Q}.lora_down.weight": values(0, 6), f"{Q}.lora_up.weight": values(4, 0)}, "is empty"),
        ({"lora_unet_norm.diff": values(8)}, "holds no LoRA factors"),
        ({"lora_unet_x.alpha": values(1)}, "holds no LoRA factors"),
        ({}, "holds no LoRA factors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(place, tensors, message):
    with pytest.raises((SourceError, UnsupportedError), match=message):
        place.read(tensors)


def test_nan_is_refused_where_it_is_read(place):
    tensors = pair(Q, alpha=1)
    tensors[f"{Q}.lora_up.weight"][0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=rf"{Q}\.lora_up\.weight"):
        place.read(tensors).factors(Q)


# --- metadata, files, folders -----------------------------------------------------------------


def test_metadata_is_kept_and_comes_back(place):
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_tag_frequency": json.dumps({"é": 1}),
        "modelspec.title": "style",
        "sshs_model_hash": "0" * 64,
    }
    task = place.read(pair(Q, alpha=1), metadata)
    assert task.base_model == "sdxl_base_v1-0"
    assert json.loads(task.config_text) == metadata
    assert {f"field {key}" for key in metadata} <= {line.item for line in task.ledger}
    _, back, ledger = place.export(task)
    # The digest is of bytes that a lossy file may have changed.
    assert back == {k: v for k, v in metadata.items() if k != "sshs_model_hash"}
    assert any(line.item == "field sshs_model_hash" for line in ledger)


def test_metadata_without_end_is_cut_and_said(place):
    metadata = {"ss_tag_frequency": "x" * (5 << 20), "ss_network_dim": "2"}
    task = place.read(pair(Q, alpha=1), metadata)
    assert json.loads(task.config_text) == {"ss_network_dim": "2"}
    assert [line.item for line in place.notices(task)] == ["field ss_tag_frequency"]


def test_config_of_another_format_is_not_taken_for_metadata(kit, place):
    task = kit.open(kit.adapter(kit.pair("q")))
    assert place.export(task, names={"q": Q})[1] == {}


def test_folder_of_files(place):
    for name in ("b", "a"):
        place.write(pair(Q, alpha=1), f"loras/{name}")
    place.write({"model.weight": values(2, 2)}, "loras/other")
    (place.root / "loras" / "preview.png").write_bytes(b"x")
    tasks = collect([(None, place.root / "loras")])
    assert [task.name for task in tasks] == ["a", "b"]
    items = [line.item for line in tasks[0].ledger]
    assert {"file a.safetensors", "file other.safetensors", "file preview.png"} <= set(items)
    with pytest.raises(SourceError, match="can name only one"):
        get_importer("kohya").open(place.root / "loras", name="x")


def test_diffusers_usual_file_name_gives_way_to_the_folders(place):
    for name in ("cats", "dogs"):
        place.write(pair(Q, alpha=1), f"hub/{name}/pytorch_lora_weights")
    assert [task.name for task in collect([(None, place.root / "hub")])] == ["cats", "dogs"]
    assert collect([(None, place.root / "hub" / "cats")])[0].name == "cats"


def test_pickled_file(place):
    torch = pytest.importorskip("torch")
    path = place.root / "style.pt"
    torch.save({k: torch.from_numpy(np.asarray(v)) for k, v in pair(Q, alpha=1.0).items()}, path)
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        place.open(path)
    assert place.open(path, allow_pickle=True).targets[Q].scale == 0.5


def test_collection_of_styles_there_and_back(place):
    metadata = {"ss_base_model_version": "sd_v1"}
    files = {
        name: {
            **pair(Q, alpha=3.0, seed=n, dtype=np.float16),
            **pair("lora_unet_conv", kernel=(3, 3), rank=4, alpha=1.5, seed=n),
        }
        for n, name in enumerate(("anime", "photo"))
    }
    for name, tensors in files.items():
        place.write(tensors, f"loras/{name}", metadata)
    rmm.convert(place.root / "loras", place.root / "styles.rmm", exact=True)
    with rmm.open(place.root / "styles.rmm") as collection:
        assert collection.tasks == ("anime", "photo")
        for name, tensors in files.items():
            back, texts, _ = place.export(collection.source(name), name=name)
            assert texts == metadata
            assert back.keys() == tensors.keys()
            for key, array in tensors.items():
                np.testing.assert_array_equal(back[key], array)


# --- diffusers itself -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    import torch

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )


LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 2.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (4, 8.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (2, 1.0),
}


def deltas_in(unet, path):
    """Load a file with diffusers and ask its layers for what they add."""
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    state, alphas, metadata = loaded
    unet.load_lora_adapter(
        state, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name="probe"
    )
    try:
        return {
            name: unet.get_submodule(name).get_delta_weight("probe").detach().double().numpy()
            for name in LAYERS
        }
    finally:
        unet.delete_adapters("probe")


@pytest.mark.parametrize("style", ["flat", "dotted"])
def test_diffusers_adds_the_same_deltas(place, unet, style):
    tensors, config = {}, {"unet.r": 8, "unet.lora_alpha": 2.0}
    config["unet.rank_pattern"] = {f"^{name}": rank for name, (rank, _) in LAYERS.items()}
    config["unet.alpha_pattern"] = {f"^{name}": alpha for name, (_, alpha) in LAYERS.items()}
    config["unet.target_modules"] = list(LAYERS)
    for name, (rank, _) in LAYERS.items():
        n_out, n_in = unet.get_submodule(name).weight.shape
        if style == "flat":
            module = f"lora_unet_{name.replace('.', '_')}"
            # One alpha for all: of several, diffusers 0.42 gives attention layers the commonest.
            tensors.update(pair(module, rank=rank, n_in=n_in, n_out=n_out, alpha=2.0))
        else:
            tensors[f"unet.{name}.lora_A.weight"] = values(rank, n_in)
            tensors[f"unet.{name}.lora_B.weight"] = values(n_out, rank)
    metadata = {"format": "pt"}
    if style == "dotted":
        metadata["lora_adapter_metadata"] = json.dumps(config)
    path = place.write(tensors, metadata=metadata)
    task = place.open(path)
    ours = {}
    for target, info in task.targets.items():
        factors = task.factors(target)
        ours[target] = info.scale * (factors.B.astype(float) @ factors.A.astype(float))
    theirs = deltas_in(unet, path)
    place.export(task)
    again = deltas_in(unet, place.root / "out.safetensors")
    for name in LAYERS:
        own = f"lora_unet_{name.replace('.', '_')}" if style == "flat" else f"unet.{name}"
        np.testing.assert_allclose(ours[own], theirs[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(again[name], theirs[name])
