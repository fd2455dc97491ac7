"""GGUF LoRA adapters: the same deltas as the PEFT adapter, both ways, and by llama.cpp's own rules.

Files are written here with the gguf package's writer, after llama.cpp's rules and independently of
the exporter.
"""

from __future__ import annotations

import json
import pickle

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from rmmformat.converters import Options, detect, get_exporter, get_importer
from rmmformat.converters.gguf_arch import rope_order
from rmmformat.errors import (
    LossyConversionError,
    NonFiniteError,
    NotFoundError,
    OptionError,
    RmmError,
    SourceError,
    UnsupportedError,
)
from rmmformat.model import Factors, PrivateInfo, Role, TargetInfo, TargetKind, TargetShape

F32 = np.dtype(np.float32)
HEADS, KV_HEADS, WIDTH, VOCABULARY, MLP = 4, 2, 32, 64, 96
SIDES = {  # module: (in, out)
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH // 2),
    "self_attn.v_proj": (WIDTH, WIDTH // 2),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, MLP),
    "mlp.up_proj": (WIDTH, MLP),
    "mlp.down_proj": (MLP, WIDTH),
}
TENSORS = dict(
    zip(
        SIDES,
        ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"],
        strict=True,
    )
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": False,
}


@pytest.fixture
def base(kit):
    folder = kit.root / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def llama_pairs(rank=4, dtype=np.float32, blocks=2, embedding=True, seed=0):
    """Factors of a tiny Llama by module, as PEFT has them: A (r, in), B (out, r)."""
    random = np.random.default_rng(seed)
    sides = {f"model.layers.{n}.{m}": s for n in range(blocks) for m, s in SIDES.items()}
    sides["lm_head"] = (WIDTH, VOCABULARY)
    if embedding:
        sides["model.embed_tokens"] = (VOCABULARY, WIDTH)
    return {
        module: (
            random.standard_normal((rank, n_in)).astype(dtype),
            random.standard_normal((n_out, rank)).astype(dtype),
        )
        for module, (n_in, n_out) in sides.items()
    }


def peft_folder(kit, pairs, *, name="task", **fields):
    tensors = {}
    for module, (a, b) in pairs.items():
        if module == "model.embed_tokens":
            tensors[f"{kit.prefix}{module}.lora_embedding_A"] = a
            tensors[f"{kit.prefix}{module}.lora_embedding_B"] = b
        else:
            tensors[f"{kit.prefix}{module}.lora_A.weight"] = a
            tensors[f"{kit.prefix}{module}.lora_B.weight"] = b
    rank = next(iter(pairs.values()))[0].shape[0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/tiny-llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
    }
    return kit.adapter(tensors, config, name=name, **fields)


def permuted(b, heads):
    """The rows of a query or key as llama.cpp's converter orders them."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def llamacpp_tensors(pairs):
    """The tensors that llama.cpp's converter writes for ``pairs``."""
    tensors = {}
    for module, (a, b) in pairs.items():
        *path, last = module.split(".")
        if module == "lm_head":
            name = "output.weight"
        elif module == "model.embed_tokens":
            name, a = "token_embd.weight", np.ascontiguousarray(a.T)
        else:
            name = f"blk.{path[2]}.{TENSORS[f'{path[3]}.{last}']}.weight"
            if last in ("q_proj", "k_proj"):
                b = permuted(b, HEADS if last == "q_proj" else KV_HEADS)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
    return tensors


def write_gguf(path, tensors, *, alpha=8.0, architecture="llama", kind=None, fields=None):
    """Write an adapter file; ``kind`` is what all tensors are stored as."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in (fields or {}).items():
        {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)](
            key, value
        )
    for name, array in tensors.items():
        if kind in (Kind.BF16, Kind.Q8_0):
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def heads_given(**more):
    return {
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        **more,
    }


def opened(path, **options):
    (task,) = get_importer("gguf").open(path, options=Options(**options))
    return task


def exported(kit, task, name="out.gguf", **options):
    ledger = get_exporter("gguf").export(task, kit.root / name, options=Options(**options))
    return kit.root / name, ledger


def same_deltas(kit, one, two, rtol=0.0):
    assert list(one.targets) == list(two.targets)
    for target in one.targets:
        assert one.targets[target].shape == two.targets[target].shape
        a, b = kit.delta(one, target), kit.delta(two, target)
        assert np.abs(a - b).max() <= rtol * np.abs(a).max(), target


# --- in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_one_adapter_as_peft_folder_and_as_gguf(kit, base, kind):
    dtype = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}[kind]
    pairs = llama_pairs(dtype=dtype)
    peft = kit.open(peft_folder(kit, pairs))
    tensors = llamacpp_tensors(pairs)
    if kind == Kind.BF16:
        tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    path = write_gguf(kit.root / "task.gguf", tensors, kind=kind)
    task = opened(path, base=base)
    same_deltas(kit, peft, task)
    assert task.name == "task"
    assert {i.dtype_a for i in task.targets.values()} == {np.dtype(dtype)}
    for target in peft.targets:  # not the deltas alone: the factors are the same, bit for bit
        for mine, theirs in zip(
            (peft.factors(target).A, peft.factors(target).B),
            (task.factors(target).A, task.factors(target).B),
            strict=True,
        ):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    assert task.targets["model.embed_tokens"].shape.kind is TargetKind.EMBEDDING
    said = {line.item for line in task.ledger}
    assert {f"tensor {name}" for name in tensors} <= said
    assert {"field adapter.lora.alpha", "field general.architecture", "file task.gguf"} <= said


def test_heads_come_from_the_adapter_a_base_gguf_a_folder_or_a_file(kit, base):
    tensors = llamacpp_tensors(llama_pairs())
    bare = write_gguf(kit.root / "bare.gguf", tensors)
    want = opened(bare, base=base)
    writer = gguf.GGUFWriter(kit.root / "base.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_token_list([f"token {n}" for n in range(5000)])  # longer than what is kept
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = write_gguf(kit.root / "own.gguf", tensors, fields=heads_given())
    for task in (
        opened(own),
        opened(bare, base=kit.root / "base.gguf"),
        opened(bare, base=base / "config.json"),
    ):
        same_deltas(kit, want, task)
    with pytest.raises(UnsupportedError, match="number of heads") as caught:
        opened(bare)
    assert "--base" in str(caught.value)


def test_heads_of_each_block(kit):
    pairs = llama_pairs(embedding=False)
    fields = {
        "llama.attention.head_count": [HEADS, HEADS],
        "llama.attention.head_count_kv": [KV_HEADS, KV_HEADS],
    }
    path = write_gguf(kit.root / "task.gguf", llamacpp_tensors(pairs), fields=fields)
    same_deltas(kit, kit.open(peft_folder(kit, pairs)), opened(path))
    fields["llama.attention.head_count"] = [HEADS]
    path = write_gguf(kit.root / "short.gguf", llamacpp_tensors(pairs), fields=fields)
    with pytest.raises(UnsupportedError, match=r"blk\.1\.attn_q"):
        opened(path)


def test_architecture_without_rotary_order_needs_no_base(kit):
    a, b = llama_pairs()["model.layers.0.self_attn.q_proj"]
    names = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b")
    path = write_gguf(
        kit.root / "q.gguf", dict(zip(names, (a, b), strict=True)), architecture="qwen2"
    )
    task = opened(path)
    np.testing.assert_array_equal(task.factors("model.layers.0.self_attn.q_proj").B, b)


def test_q8_0_is_what_the_gguf_package_makes_of_it(kit, base):
    pairs = llama_pairs(rank=32)
    tensors = llamacpp_tensors(pairs)
    path = write_gguf(kit.root / "task.gguf", tensors, kind=Kind.Q8_0)
    task = opened(path, base=base)
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def values(name):
        assert reader[name].tensor_type == Kind.Q8_0
        return gguf.quants.dequantize(reader[name].data, Kind.Q8_0)

    info = task.targets["model.layers.0.mlp.up_proj"]
    assert (info.dtype_a, info.dtype_b) == (F32, F32)
    up = task.factors("model.layers.0.mlp.up_proj")
    np.testing.assert_array_equal(up.A, values("blk.0.ffn_up.weight.lora_a"))
    np.testing.assert_array_equal(up.B, values("blk.0.ffn_up.weight.lora_b"))
    q = task.factors("model.layers.1.self_attn.q_proj")
    np.testing.assert_array_equal(permuted(q.B, HEADS), values("blk.1.attn_q.weight.lora_b"))
    embedding = task.factors("model.embed_tokens")
    np.testing.assert_array_equal(embedding.A, values("token_embd.weight.lora_a").T)


@pytest.mark.parametrize(("alpha", "said"), [(None, "is missing"), (0.0, "is 0")])
def test_alpha_that_says_scale_1(kit, base, alpha, said):
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(llama_pairs()), alpha=alpha)
    task = opened(path, base=base)
    assert {info.scale for info in task.targets.values()} == {1.0}
    (notice,) = kit.notices(task)
    assert "adapter.lora.alpha" in notice.item
    assert said in notice.detail


def test_alpha_over_each_rank(kit, base):
    a, b = llama_pairs(rank=3)["lm_head"]
    c, d = llama_pairs(rank=5)["model.layers.0.mlp.up_proj"]
    tensors = llamacpp_tensors({"lm_head": (a, b), "model.layers.0.mlp.up_proj": (c, d)})
    task = opened(write_gguf(kit.root / "t.gguf", tensors, alpha=-1.5), base=base)
    assert task.targets["lm_head"].scale == -0.5
    assert task.targets["model.layers.0.mlp.up_proj"].scale == -1.5 / 5


def test_tensors_that_are_no_pairs(kit, base):
    tensors = llamacpp_tensors(llama_pairs())
    extra = {
        "blk.0.attn_norm.weight": np.ones(WIDTH, np.float32),
        "rope_freqs.weight": np.ones(4, np.float32),
    }
    task = opened(write_gguf(kit.root / "t.gguf", {**tensors, **extra}), base=base)
    assert {line.item for line in kit.notices(task)} == {f"tensor {name}" for name in extra}
    bias = {**tensors, "blk.0.attn_q.bias": np.ones(WIDTH, np.float32)}
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.bias"):
        opened(write_gguf(kit.root / "bias.gguf", bias), base=base)


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"blk.0.attn_q.weight.lora_a": ones(2, WIDTH)}, r"blk\.0\.attn_q\.weight\.lora_b"),
        ({"blk.0.attn_q.weight.lora_b": ones(WIDTH, 2)}, r"blk\.0\.attn_q\.weight\.lora_a"),
        (
            {"output.weight.lora_a": ones(2, WIDTH), "output.weight.lora_b": ones(VOCABULARY, 3)},
            "no common rank",
        ),
        (
            {
                "token_embd.weight.lora_a": ones(2, VOCABULARY),  # not turned
                "token_embd.weight.lora_b": ones(WIDTH, 2),
            },
            "no common rank",
        ),
        (
            {
                "blk.0.attn_norm.weight.lora_a": ones(2, 1),
                "blk.0.attn_norm.weight.lora_b": ones(9, 2),
            },
            "applies no low-rank pair",
        ),
        (
            {
                "blk.0.ffn_gate_exps.weight.lora_a": ones(4, 2, WIDTH),
                "blk.0.ffn_gate_exps.weight.lora_b": ones(4, MLP, 2),
            },
            "ffn_gate_exps",
        ),
        (
            {
                "blk.0.ffn_up.weight.lora_a": ones(4, 2, WIDTH),
                "blk.0.ffn_up.weight.lora_b": ones(4, MLP, 2),
            },
            "expected a matrix",
        ),
        (
            {"my.tensor.weight.lora_a": ones(2, 3), "my.tensor.weight.lora_b": ones(3, 2)},
            "my.tensor",
        ),
        ({"blk.0.attn_q.bias.lora_a": ones(2, 3), "blk.0.attn_q.bias.lora_b": ones(3, 2)}, "bias"),
        (
            {
                "blk.0.attn_q.weight.lora_a": ones(2, WIDTH),
                "blk.0.attn_q.weight.lora_b": ones(30, 2),
            },
            "30 rows",
        ),
        ({}, "holds no tensors"),
        ({"rope_freqs.weight": ones(4)}, "holds no LoRA tensors"),
    ],
)
def test_tensors_that_are_refused_by_name(kit, base, tensors, named):
    path = write_gguf(kit.root / "t.gguf", tensors)
    with pytest.raises((SourceError, UnsupportedError), match=named) as caught:
        opened(path, base=base)
    assert "t.gguf" in str(caught.value) or str(base) in str(caught.value)


def test_quantised_types_that_are_not_read_are_named(kit, base):
    tensors = llamacpp_tensors({"lm_head": llama_pairs(rank=32)["lm_head"]})
    writer = gguf.GGUFWriter(kit.root / "t.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for name, array in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(array, Kind.Q4_0), raw_dtype=Kind.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"output\.weight\.lora_a.*Q4_0"):
        opened(kit.root / "t.gguf", base=base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter.alora.invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"adapter.alora.invocation_tokens": list(range(9000))}, "activated LoRA"),
        ({"adapter.lora.gate": 3}, "adapter.lora.gate"),
        ({"llama.attention.head_count": 3, "llama.attention.head_count_kv": 2}, "3 heads"),
        ({"llama.attention.head_count": "four"}, "head_count"),
        ({"adapter.type": "control_vector"}, "control_vector"),
        ({"general.type": "model"}, "general.type"),
    ],
)
def test_metadata_that_is_refused(kit, fields, message):
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(llama_pairs()), fields=fields)
    with pytest.raises((SourceError, UnsupportedError), match=message):
        opened(path)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_that_is_no_number(kit, base, alpha):
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(llama_pairs()), alpha=alpha)
    with pytest.raises(SourceError, match=r"adapter\.lora\.alpha"):
        opened(path, base=base)


def test_base_that_does_not_fit(kit, base):
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(llama_pairs()), fields=heads_given())
    (base / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(SourceError, match="qwen2"):
        opened(path, base=base)
    (base / "config.json").write_text(json.dumps({**CONFIG, "num_attention_heads": 8}))
    with pytest.raises(SourceError, match="4 heads, the base 8"):
        opened(path, base=base)
    (base / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["MyOwnModel"]}))
    with pytest.raises(UnsupportedError, match="MyOwnModel"):
        opened(path, base=base)
    with pytest.raises(SourceError, match="--base"):
        opened(path, base=path)
    with pytest.raises(SourceError, match="--base"):
        opened(path, base=kit.root / "nothing")


def test_architectures_that_are_not_known(kit):
    path = write_gguf(kit.root / "t.gguf", {"a.lora_a": ones(2, 2)}, architecture="rwkv7")
    with pytest.raises(UnsupportedError, match="rwkv7"):
        opened(path)


def test_names_that_are_given(kit, base):
    pair = {"blk.0.mystery.weight.lora_a": ones(2, 3), "blk.0.mystery.weight.lora_b": ones(3, 2)}
    path = write_gguf(kit.root / "t.gguf", pair)
    with pytest.raises(UnsupportedError, match="mystery"):
        opened(path, base=base, names={"mine": "blk.0.mystery.weight"})
    pair = {"blk.0.ffn_up.weight.lora_a": ones(2, 3), "blk.0.ffn_up.weight.lora_b": ones(3, 2)}
    path = write_gguf(kit.root / "u.gguf", pair)
    task = opened(path, base=base, names={"mine": "blk.0.ffn_up"})
    assert list(task.targets) == ["mine"]


def test_nan_is_refused_where_it_is_read(kit, base):
    pairs = llama_pairs()
    pairs["lm_head"][0][0, 0] = np.nan
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(pairs))
    task = opened(path, base=base)
    with pytest.raises(NonFiniteError, match=r"output\.weight\.lora_a"):
        task.factors("lm_head")
    assert np.isnan(opened(path, base=base, allow_nonfinite=True).factors("lm_head").A[0, 0])


def test_folder_of_adapters(kit, base):
    folder = kit.root / "folder"
    folder.mkdir()
    for n, name in enumerate(("b", "a")):
        write_gguf(folder / f"{name}.gguf", llamacpp_tensors(llama_pairs(seed=n)))
    (folder / "notes.txt").write_text("GGUF")
    assert detect(folder) == detect(folder / "a.gguf") == "gguf"
    tasks = get_importer("gguf").open(folder, options=Options(base=base))
    assert [task.name for task in tasks] == ["a", "b"]
    with pytest.raises(SourceError, match="can name only one"):
        get_importer("gguf").open(folder, name="x", options=Options(base=base))
    assert opened(folder / "a.gguf", base=base).name == "a"


def test_base_model_and_metadata_are_kept(kit, base):
    fields = {
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny Llama",
        "general.base_model.0.repo_url": "https://huggingface.co/org/tiny-llama",
        "general.license.text": "x" * 100_000,
        "tokenizer.list": list(range(5000)),
    }
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(llama_pairs()), fields=fields)
    task = opened(path, base=base)
    assert task.base_model == "org/tiny-llama"
    kept = json.loads(task.config_text)
    assert kept["general.base_model.0.name"] == "Tiny Llama"
    assert kept["llama.attention.head_count"] == HEADS  # from the base: written again without it
    ignored = {line.item for line in task.ledger if line.action.value == "ignored"}
    assert ignored == {"field general.license.text", "field tokenizer.list"}
    assert len(task.config_text) < 2000


def test_task_can_be_pickled_and_outlives_its_file_as_an_error(kit, base):
    path = write_gguf(kit.root / "t.gguf", llamacpp_tensors(llama_pairs()))
    task = pickle.loads(pickle.dumps(opened(path, base=base)))
    assert task.factors("lm_head").A.shape == (4, WIDTH)
    assert task.files[0].name == "t.gguf"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SourceError, match="the file ends within"):
        [task.factors(target) for target in task.targets]
    path.unlink()
    with pytest.raises(SourceError):
        task.factors("lm_head")
    with pytest.raises(NotFoundError):
        task.factors("nothing")


# --- out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("own", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_peft_to_rmm_to_gguf_and_back(kit, base, dtype, own):
    folder = peft_folder(kit, llama_pairs(rank=32, dtype=own))
    with rmmformat_collection(kit, folder) as collection:
        task = collection.source("task")
        path, ledger = exported(kit, task, base=base, dtype=dtype)
        back = opened(path)  # the file says its own head counts
        bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 7, None: 24}[dtype]
        exact = ml_dtypes.finfo(own).nmant + 1 <= bits
        exact = exact and (dtype, own) != ("f16", ml_dtypes.bfloat16)
        rtol = 0.0 if exact else 8 * 2.0**-bits  # of both factors, summed over the rank
        same_deltas(kit, kit.open(folder), back, rtol)
        kinds = {t.tensor_type for t in gguf.GGUFReader(path).tensors}
        want = dtype or {2: "f16", 4: "f32"}[np.dtype(own).itemsize]
        want = "bf16" if dtype is None and own is ml_dtypes.bfloat16 else want
        assert kinds == {Kind[want.upper()]}
        assert back.base_model == "org/tiny-llama"
        assert len(ledger) == 1 + 2 * len(task.targets)


def rmmformat_collection(kit, folder):
    import rmmformat

    rmmformat.convert([folder], kit.root / "c.rmm", exact=True)
    return rmmformat.open(kit.root / "c.rmm")


def test_file_is_as_llamacpp_lays_it_out(kit, base):
    """Tensor by tensor what the converter of llama.cpp would write, and in ggml's order."""
    pairs = llama_pairs()
    path, _ = exported(kit, kit.open(peft_folder(kit, pairs)), base=base)
    want = llamacpp_tensors(pairs)
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} == set(want)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, want[tensor.name])
        assert tensor.data_offset % 32 == 0
    field = {key: reader.get_field(key).contents() for key in ("general.type", "adapter.type")}
    assert field == {"general.type": "adapter", "adapter.type": "lora"}
    assert reader.get_field("adapter.lora.alpha").contents() == 8.0
    assert reader.get_field("general.architecture").contents() == "llama"


class Made:
    """A task made of arrays."""

    name, path, base_model, config_text, ledger, files = "made", "", "", "", (), ()

    def __init__(self, scales, *, ranks=None, privates=None, dtype=F32, b=None, **shape):
        ranks = ranks or dict.fromkeys(scales, 4)
        shape = {"n_in": 32, "n_out": 32, **shape}
        self.targets = {
            target: TargetInfo(TargetShape(**shape), ranks[target], scale, dtype, dtype)
            for target, scale in scales.items()
        }
        self._privates = privates or {}
        self.privates = {
            name: PrivateInfo(role, array.dtype, array.shape)
            for name, (role, array) in self._privates.items()
        }
        self._b = b

    def factors(self, target):
        info = self.targets[target]
        random = np.random.default_rng(len(target))
        a = random.standard_normal((info.rank, info.shape.n_in)).astype(info.dtype_a)
        b = random.standard_normal((info.shape.n_out, info.rank)).astype(info.dtype_b)
        return Factors(a, b if self._b is None else np.full_like(b, self._b), info.scale)

    def private_tensor(self, name):
        return self._privates[name][1]


UP, DOWN, V = (f"model.layers.0.{m}_proj" for m in ("mlp.up", "mlp.down", "self_attn.v"))


def llamacpp_delta(path, target_tensor):
    """What llama.cpp adds: one alpha, the rank of lora_b, scale 1 where alpha is 0."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    alpha = np.float32(reader.get_field("adapter.lora.alpha").contents())
    a, b = tensors[f"{target_tensor}.lora_a"], tensors[f"{target_tensor}.lora_b"]
    scale = float(alpha / np.float32(b.shape[1])) if alpha else 1.0
    return scale * b @ a


@pytest.mark.parametrize(
    ("scales", "ranks", "exact"),
    [
        ({UP: 2.0}, {}, True),
        ({UP: 16 / 4**0.5}, {}, True),  # rsLoRA
        ({UP: 1 / 3}, {UP: 3}, True),
        ({UP: -0.7}, {}, True),
        ({UP: 0.0}, {}, True),
        ({UP: 0.0, DOWN: 0.5}, {}, True),
        ({UP: 2.0, DOWN: 0.5, V: -8.0}, {}, True),  # powers of two apart
        ({UP: 2.0, DOWN: 4.0}, {UP: 4, DOWN: 2}, True),
        ({UP: 2.0, DOWN: 2.0, V: 2.0}, {UP: 2, DOWN: 4, V: 16}, True),
        ({UP: 2.0, DOWN: 3.0}, {}, False),
        ({UP: 1.0, DOWN: 1.0}, {UP: 3, DOWN: 4}, False),
        ({UP: 1e-3, DOWN: 7.7e4, V: 0.0}, {}, False),
        ({UP: 1e-37}, {}, True),
        ({UP: 3e38}, {}, True),
    ],
)
def test_llamacpp_gets_every_scale(kit, base, scales, ranks, exact):
    ranks = {target: ranks.get(target, 4) for target in scales}
    task = Made(scales, ranks=ranks)
    path, ledger = exported(kit, task, base=base)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("adapter.lora.alpha").contents() != 0
    tensors = {UP: "blk.0.ffn_up", DOWN: "blk.0.ffn_down", V: "blk.0.attn_v"}
    for target, scale in scales.items():
        f = task.factors(target)
        want = float(np.float32(scale)) * f.B.astype(np.float64) @ f.A.astype(np.float64)
        got = llamacpp_delta(path, f"{tensors[target]}.weight")
        assert np.abs(got - want).max() <= (1e-12 if exact else 1e-6) * np.abs(want).max()
    notices = [line for line in ledger if line.detail.startswith("notice:")]
    assert bool(notices) != exact


def test_fold_that_rounds_makes_b_float32(kit, base):
    half = np.dtype(np.float16)
    path, _ = exported(kit, Made({UP: 2.0, DOWN: 3.0, V: 4.0}, dtype=half), base=base)
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight.lora_b"] == Kind.F32
    assert set(kinds.values()) == {Kind.F16, Kind.F32}
    assert list(kinds.values()).count(Kind.F32) == 1
    path, _ = exported(
        kit, Made({UP: 2.0, DOWN: 3.0}, dtype=half), "forced.gguf", base=base, dtype="f16"
    )
    assert {t.tensor_type for t in gguf.GGUFReader(path).tensors} == {Kind.F16}


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_value_that_would_become_infinite(kit, base, dtype):
    task = Made({UP: 1.0}, ranks={UP: 32}, b=1e20)
    with pytest.raises(LossyConversionError, match=r"ffn_up\.weight\.lora_b"):
        exported(kit, task, base=base, dtype=dtype)
    assert sorted(p.name for p in kit.root.iterdir()) == ["base"]


def test_rows_that_make_no_blocks_become_f16(kit, base):
    path, ledger = exported(kit, Made({UP: 1.0}, n_in=64), base=base, dtype="q8_0")
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
    assert kinds == {
        "blk.0.ffn_up.weight.lora_a": Kind.Q8_0,
        "blk.0.ffn_up.weight.lora_b": Kind.F16,
    }
    (notice,) = [line for line in ledger if line.detail.startswith("notice:")]
    assert notice.item == "tensor blk.0.ffn_up.weight.lora_b"
    assert "rows of 4 values" in notice.detail


@pytest.mark.parametrize(
    ("task", "named"),
    [
        (Made({"model.norm": 1.0}), "model.norm"),
        (Made({"model.layers.0.input_layernorm": 1.0}), "input_layernorm"),
        (Made({"model.layers.0.mlp.unheard_of": 1.0}), "unheard_of"),
        (Made({UP: 1.0}, transposed=True), "up_proj.*Conv1D"),
        (Made({UP: 1.0}, kind=TargetKind.CONV, kernel=(3,), n_in=96), "convolution"),
        (Made({UP: 1.0}, kind=TargetKind.EMBEDDING), "embedding"),
        (Made({"model.embed_tokens": 1.0}), "embed_tokens"),
        (Made({"model.layers.0.mlp.experts.0.up_proj": 1.0}), "experts"),
        (Made({"model.layers.0.self_attn.q_proj": 1.0}, n_out=20), "20 rows"),
        (Made({"model.layers.0.mlp.up_proj": 1.0, "language_model.model.layers.0.mlp.up_proj": 1}),
         "are both"),
    ],
)  # fmt: skip
def test_targets_that_llamacpp_has_not_or_ignores(kit, base, task, named):
    with pytest.raises(UnsupportedError, match=named):
        exported(kit, task, base=base)
    assert sorted(p.name for p in kit.root.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role.MODULE, "lm_head.weight"),
        (Role.MODULE, "model.norm.weight"),
        (Role.BIAS, f"{UP}.bias"),
        (Role.FACTOR_BIAS, f"{UP}.lora_B.bias"),
        (Role.MAGNITUDE, f"{UP}.lora_magnitude_vector"),
        (Role.ROWS, "model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ],
)
def test_private_tensors(kit, base, role, name):
    task = Made({UP: 1.0}, privates={name: (role, np.ones(32, np.float32))})
    with pytest.raises(LossyConversionError) as caught:
        exported(kit, task, base=base)
    assert name in str(caught.value)
    assert "--drop-private" in str(caught.value)
    _, ledger = exported(kit, task, base=base, drop_private=True)
    (line,) = [line for line in ledger if line.item == f"tensor {name}"]
    assert line.detail.startswith("notice:")


@pytest.mark.parametrize("target", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["config", "gguf", "gemma"])
def test_head_that_is_the_embedding_table(kit, base, target, how):
    kind = TargetKind.EMBEDDING if target == "model.embed_tokens" else TargetKind.LINEAR
    task = Made({target: 1.0}, kind=kind)
    place = base
    if how == "config":
        (base / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    elif how == "gemma":
        (base / "config.json").write_text(json.dumps({"architectures": ["GemmaForCausalLM"]}))
    else:
        place = base_gguf(kit, {"token_embd.weight": ones(32, 32)})
    with pytest.raises(UnsupportedError, match=target):
        exported(kit, task, base=place)


def base_gguf(kit, tensors):
    writer = gguf.GGUFWriter(kit.root / "base.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kit.root / "base.gguf"


def test_base_gguf_says_which_weights_there_are(kit):
    base = base_gguf(kit, {"blk.0.ffn_up.weight": ones(32, 32), "output.weight": ones(4, 4)})
    exported(kit, Made({UP: 1.0}), base=base)
    with pytest.raises(UnsupportedError, match="does not exist"):
        exported(kit, Made({DOWN: 1.0}), "x.gguf", base=base)
    with pytest.raises(UnsupportedError, match=r"\(64, 32\).*\(32, 32\)"):
        exported(kit, Made({UP: 1.0}, n_out=64), "x.gguf", base=base)


def test_base_that_is_not_given(kit):
    with pytest.raises(UnsupportedError, match="architectures") as caught:
        exported(kit, Made({UP: 1.0}))
    assert "--base" in str(caught.value)


def test_dtype_that_is_none(kit, base):
    with pytest.raises(OptionError, match="q9"):
        exported(kit, Made({UP: 1.0}), base=base, dtype="q9")


def test_names_that_are_given_on_the_way_out(kit, base):
    task = Made({"my.own.module": 1.0})
    path, _ = exported(kit, task, base=base, names={"my.own.module": "blk.7.ffn_gate"})
    assert {t.name for t in gguf.GGUFReader(path).tensors} == {
        "blk.7.ffn_gate.weight.lora_a",
        "blk.7.ffn_gate.weight.lora_b",
    }
    with pytest.raises(UnsupportedError, match="no low-rank pair"):
        exported(kit, task, "x.gguf", base=base, names={"my.own.module": f"blk.7.{'x' * 60}"})


def test_same_task_same_bytes_and_force(kit, base):
    one, _ = exported(kit, Made({UP: 1.0}), "one.gguf", base=base)
    two, _ = exported(kit, Made({UP: 1.0}), "two.gguf", base=base)
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(RmmError, match="exists already"):
        exported(kit, Made({DOWN: 1.0}), "one.gguf", base=base)
    get_exporter("gguf").export(Made({DOWN: 1.0}), one, force=True, options=Options(base=base))
    assert one.read_bytes() != two.read_bytes()
    assert sorted(p.name for p in kit.root.iterdir()) == ["base", "one.gguf", "two.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")])
def test_nothing_is_half_written(kit, base, error):
    class Failing(Made):
        def factors(self, target):
            raise error

    with pytest.raises((KeyboardInterrupt, RmmError)):
        exported(kit, Failing({UP: 1.0}), base=base)
    assert sorted(p.name for p in kit.root.iterdir()) == ["base"]


def test_gguf_to_rmm_to_peft(kit, base):
    """A GGUF adapter as a PEFT folder, through a collection: what no other tool does."""
    import rmmformat

    pairs = llama_pairs()
    path = write_gguf(kit.root / "task.gguf", llamacpp_tensors(pairs), fields=heads_given())
    rmmformat.convert([path], kit.root / "c.rmm", exact=True)
    with rmmformat.open(kit.root / "c.rmm") as collection:
        get_exporter("peft").export(collection.source("task"), kit.root / "out")
        # The collection has kept what the file said: no base is needed on the way back.
        back, _ = exported(kit, collection.source("task"), "back.gguf")
    same_deltas(kit, kit.open(peft_folder(kit, pairs, name="want")), kit.open(kit.root / "out"))
    for tensor in gguf.GGUFReader(back).tensors:
        np.testing.assert_array_equal(tensor.data, llamacpp_tensors(pairs)[tensor.name])


def test_demo_adapters_as_gguf(kit, demo):
    """Real adapters of an encoder: no rotary order, names of another family."""
    (kit.root / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    task = kit.open(demo / "spam")
    path, _ = exported(kit, task, base=kit.root, drop_private=True)
    # Which class it was made for (BertModel or one around it) the file does not tell.
    assert list(opened(path).targets) == [name.removeprefix("bert.") for name in task.targets]
    tensors = {"query": "attn_q", "value": "attn_v"}
    names = {
        name: f"blk.{name.split('.')[3]}.{tensors[name.rpartition('.')[2]]}"
        for name in task.targets
    }
    same_deltas(kit, task, opened(path, names=names))


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_rotary_order_is_a_permutation_of_each_head(heads):
    order = rope_order(heads * 6, heads)
    np.testing.assert_array_equal(order[:6], [0, 3, 1, 4, 2, 5])
    assert sorted(order) == list(range(heads * 6))
    assert all(set(order[6 * n : 6 * n + 6]) == set(range(6 * n, 6 * n + 6)) for n in range(heads))


MODELS = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi2": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder": "GPTBigCodeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gptneox": "GPTNeoXForCausalLM",
    "falcon": "FalconForCausalLM",
    "bloom": "BloomForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "bert": "BertModel",
    "modern-bert": "ModernBertModel",
}


@pytest.mark.parametrize("architecture", MODELS)
def test_names_are_those_of_the_model_class(architecture):
    """Every linear module and embedding of the real class, to llama.cpp and back."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from rmmformat.converters.gguf_arch import architecture_of_class
    from rmmformat.converters.gguf_names import NameMap

    assert architecture_of_class(MODELS[architecture]) == architecture
    model_class = getattr(transformers, MODELS[architecture])
    config = model_class.config_class(num_hidden_layers=2)
    with torch.device("meta"):
        model = model_class(config)
    names = NameMap(architecture, {}, "")
    mapped, refused = [], []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            try:
                place = names.place(name)
            except UnsupportedError:
                refused.append(name.replace(".0.", ".N.").replace(".1.", ".N."))
                continue
            assert names.target(place.tensor)[0] == name
            mapped.append(name)
    assert len(mapped) >= 7
    # What has no place is known by name: heads that share the table, positions, rewritten weights.
    known = ("lm_head", "embeddings", "pooler", "query_key_value", "wpe", "router")
    assert all(any(word in name for word in known) for name in refused), refused


def test_gguf_is_missing(monkeypatch, kit, base):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n))
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        get_importer("gguf")
    assert "pip install" in str(caught.value)
