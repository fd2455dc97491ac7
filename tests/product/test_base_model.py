"""Bases are known by their weights: fingerprints, shapes, and collections of one base only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import rmmformat as rmm
from rmmformat.base_model import Fingerprint, fingerprint
from rmmformat.converters import Options
from rmmformat.converters.checkpoint_store import open_checkpoint
from rmmformat.errors import RmmError, SourceError
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert, open_sources

Tensors = dict[str, np.ndarray]
EXACT = choose_method(exact=True)


def model(seed: int = 0, dtype: Any = np.float32) -> Tensors:
    random = np.random.default_rng(seed)
    shapes = {
        "layer.0.k.weight": (12, 12),
        "layer.0.q.weight": (12, 12),
        "layer.0.up.weight": (200, 120),  # above 65,536 bytes: sampled
        "layer.0.up.bias": (200,),
    }
    return {name: random.standard_normal(s).astype(dtype) for name, s in shapes.items()}


def tuned(base: Tensors, *names: str, seed: int = 9) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        name: (value + 0.1 * random.standard_normal(value.shape)).astype(value.dtype)
        if name in names or not names
        else value
        for name, value in base.items()
    }


def save(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def adapter(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    base: str = "org/base",
    fan_in_fan_out: bool = False,
) -> Path:
    """A PEFT adapter of rank 2 on linear modules, (n_out, n_in) each."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    tensors = {}
    for name, (n_out, n_in) in shapes.items():
        key = f"base_model.model.{name}.lora"
        tensors[f"{key}_A.weight"] = random.standard_normal((2, n_in)).astype(np.float32)
        tensors[f"{key}_B.weight"] = random.standard_normal((n_out, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": 2,
        "lora_alpha": 2,
        "target_modules": sorted(shapes),
        "fan_in_fan_out": fan_in_fan_out,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def recorded(path: Path) -> dict[str, Any]:
    with rmm.open(path) as collection:
        return dict(collection.metadata["base_model"])


# --- the fingerprint --------------------------------------------------------------------------


def by_the_text(tensors: Tensors, targets: dict[str, str]) -> dict[str, Any]:
    """Section 9.1 of the specification, sentence by sentence."""
    digests = {}
    for name, value in tensors.items():
        raw = value.tobytes()
        n = len(raw)
        if n > 65_536:
            blocks = [raw[i * (n - 4096) // 15 :][:4096] for i in range(16)]
            raw = b"".join(blocks)
        sizes = ",".join(str(size) for size in value.shape)
        text = f"{value.dtype.name}\n{sizes}\n".encode("ascii")
        digests[name] = hashlib.sha256(text + raw).digest()
    whole = b"".join(
        name.encode() + b"\0" + digests[name] for name in sorted(digests, key=str.encode)
    )
    return {
        "algorithm": "rmm-base-1",
        "digest": hashlib.sha256(whole).hexdigest(),
        "targets": {target: digests[name].hex()[:8] for target, name in targets.items()},
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_fingerprint_is_what_the_specification_says(tmp_path: Path, dtype: Any) -> None:
    tensors = {
        **model(dtype=dtype),
        "just": np.arange(65_536, dtype=np.uint8),
        "more": np.arange(65_537, dtype=np.int64).astype(np.uint8),
        "scalar": np.array(3.0, np.float32),
        "flag": np.array([True, False]),
    }
    base = open_checkpoint(save(tmp_path / "base", tensors))
    targets = ["layer.0.q", "layer.0.up", "absent"]
    wanted = by_the_text(tensors, {t: f"{t}.weight" for t in targets[:2]})
    assert fingerprint(base, targets).as_metadata() == wanted


def test_fingerprint_does_not_depend_on_the_kind_of_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = model()
    one = fingerprint(open_checkpoint(save(tmp_path / "base", tensors)), ["layer.0.q"])
    folder = tmp_path / "bin"
    folder.mkdir()
    pickled = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(pickled, folder / "pytorch_model.bin")
    other = fingerprint(open_checkpoint(folder, Options(allow_pickle=True)), ["layer.0.q"])
    assert one == other


def test_one_changed_value_in_a_sample_changes_it(tmp_path: Path) -> None:
    tensors = model()
    one = fingerprint(open_checkpoint(save(tmp_path / "a", tensors)), ["layer.0.up", "layer.0.q"])
    tensors["layer.0.up.weight"].flat[-1] += 1
    other = fingerprint(open_checkpoint(save(tmp_path / "b", tensors)), ["layer.0.up", "layer.0.q"])
    assert one.digest != other.digest
    assert one.first_difference(other) == "layer.0.up"
    assert not one.agrees_with(other)


def test_agreement() -> None:
    a = Fingerprint("0" * 64, {"q": "1", "k": "2"})
    assert a.agrees_with(Fingerprint("0" * 64, {}))
    assert a.agrees_with(Fingerprint("1" * 64, {"q": "1", "v": "7"}))
    assert not a.agrees_with(Fingerprint("1" * 64, {"q": "1", "k": "3"}))
    assert not a.agrees_with(Fingerprint("1" * 64, {"v": "7"}))
    assert Fingerprint.of_metadata({"algorithm": "another", "digest": "0", "targets": {}}) is None
    assert Fingerprint.of_metadata(a.as_metadata()) == a


# --- what is recorded -------------------------------------------------------------------------


def test_recorded_where_the_base_is_at_hand(tmp_path: Path) -> None:
    tensors = model()
    base = save(tmp_path / "base", tensors)
    source = save(tmp_path / "t", tuned(tensors, "layer.0.q.weight"))
    rmm.convert(source, tmp_path / "x.rmm", exact=True, options=Options(base=base))
    print_of = by_the_text(tensors, {"layer.0.q": "layer.0.q.weight"})
    assert recorded(tmp_path / "x.rmm") == {"id": "base", "fingerprint": print_of}
    assert rmm.validate(tmp_path / "x.rmm").ok

    lora = adapter(tmp_path / "lora", {"layer.0.up": (200, 120)})
    rmm.convert(lora, tmp_path / "y.rmm", exact=True, options=Options(base=base))
    print_of = by_the_text(tensors, {"layer.0.up": "layer.0.up.weight"})
    assert recorded(tmp_path / "y.rmm") == {"id": "org/base", "fingerprint": print_of}
    rmm.convert(lora, tmp_path / "z.rmm", exact=True)
    assert recorded(tmp_path / "z.rmm") == {"id": "org/base"}


def test_extracted_and_trained_tasks_of_one_base_go_together(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model())
    sources = [
        save(tmp_path / "t", tuned(model(), "layer.0.q.weight")),
        adapter(tmp_path / "lora", {"layer.0.q": (12, 12)}),
    ]
    rmm.convert(sources, tmp_path / "x.rmm", exact=True, options=Options(base=base))
    assert recorded(tmp_path / "x.rmm")["id"] == "org/base"


def test_a_base_folder_without_weights_is_not_asked_for_any(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", {"layer.0.q": (12, 12)})
    (tmp_path / "config-only").mkdir()
    (tmp_path / "config-only" / "config.json").write_text("{}")
    options = Options(base=tmp_path / "config-only")
    rmm.convert(lora, tmp_path / "x.rmm", exact=True, options=options)
    assert recorded(tmp_path / "x.rmm") == {"id": "org/base"}


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", {"layer.0.q": (12, 12)})
    with pytest.raises(SourceError, match="no such file or folder"):
        rmm.convert(lora, tmp_path / "x.rmm", exact=True, options=Options(base=tmp_path / "typo"))


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"layer.0.q": (12, 12), "layer.0.up": (120, 200)}, r"'layer\.0\.up' adds .* \(200, 120\)"),
        ({"layer.0.up": (200, 121)}, r"'layer\.0\.up' adds 121 inputs to 200 outputs"),
        ({"layer.7.q": (12, 12)}, r"no weight for target 'layer\.7\.q'"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base(tmp_path: Path, shapes: Any, words: str) -> None:
    options = Options(base=save(tmp_path / "base", model()))
    lora = adapter(tmp_path / "lora", shapes)
    with pytest.raises(SourceError, match=words) as caught:
        rmm.convert(lora, tmp_path / "x.rmm", exact=True, options=options)
    assert "--allow-base-mismatch" in str(caught.value)
    assert not (tmp_path / "x.rmm").exists()
    rmm.convert(lora, tmp_path / "x.rmm", exact=True, options=options, allow_base_mismatch=True)


def test_transposed_weights_fit_either_way(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"h.0.c_attn.weight": np.zeros((8, 24), np.float32)})
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    for said in (False, True):  # PEFT corrects the field when it loads, and saves it as it was
        lora = adapter(tmp_path / f"lora{said}", {"h.0.c_attn": (24, 8)}, fan_in_fan_out=said)
        options = Options(base=base)
        rmm.convert(lora, tmp_path / f"{said}.rmm", exact=True, options=options)


def test_adding_tasks_of_a_base_with_other_weights(tmp_path: Path) -> None:
    one, two = model(), model()
    two["layer.0.up.weight"] = two["layer.0.up.weight"] + 1
    changed = ("layer.0.q.weight", "layer.0.up.weight")
    base, other = save(tmp_path / "a" / "base", one), save(tmp_path / "b" / "base", two)
    path = tmp_path / "x.rmm"
    rmm.convert(
        save(tmp_path / "t", tuned(one, *changed)), path, exact=True, options=Options(base=base)
    )
    before = recorded(path)
    late = save(tmp_path / "late", tuned(two, *changed))
    content = path.read_bytes()
    with pytest.raises(RmmError, match=r"'layer\.0\.up' is the first that differs") as caught:
        rmm.add(path, late, exact=True, options=Options(base=other))
    assert "--allow-base-mismatch" in str(caught.value)
    assert path.read_bytes() == content
    rmm.add(path, late, exact=True, options=Options(base=other), allow_base_mismatch=True)
    assert recorded(path) == before  # nothing is claimed of the new one
    assert rmm.validate(path).ok


def test_tasks_opened_beside_different_bases(tmp_path: Path) -> None:
    tasks = []
    for seed in (0, 1):
        base = save(tmp_path / str(seed) / "base", model(seed))
        source = save(tmp_path / f"t{seed}", tuned(model(seed), "layer.0.q.weight"))
        tasks += open_sources(source, options=Options(base=base))
    with pytest.raises(RmmError, match=r"'layer\.0\.q' is the first that differs"):
        convert(tasks, tmp_path / "x.rmm", EXACT)
    convert(tasks, tmp_path / "x.rmm", EXACT, allow_base_mismatch=True)
    assert "fingerprint" not in recorded(tmp_path / "x.rmm")


def test_a_base_saved_again_with_another_head_is_the_same(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model())
    headed = {f"bert.{name}": value for name, value in model().items()}
    headed["head.weight"] = np.ones((2, 12), np.float32)
    again = save(tmp_path / "again", headed)
    path = tmp_path / "x.rmm"
    first = save(tmp_path / "t", tuned(model(), "layer.0.q.weight"))
    rmm.convert(first, path, exact=True, options=Options(base=base))
    names = ("layer.0.q.weight", "layer.0.k.weight")
    late = save(tmp_path / "late", tuned(model(), *names))
    rmm.add(path, late, exact=True, options=Options(base=again))
    wanted = {n.removesuffix(".weight"): n for n in names}
    assert recorded(path)["fingerprint"] == by_the_text(model(), wanted)


def test_the_same_values_in_another_dtype_are_another_base(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first = save(tmp_path / "t", tuned(model(), "layer.0.q.weight"))
    options = Options(base=save(tmp_path / "base", model()))
    rmm.convert(first, path, exact=True, options=options)
    half = model(dtype=np.float16)
    late = save(tmp_path / "late", tuned(half, "layer.0.q.weight"))
    with pytest.raises(RmmError, match=r"layer\.0\.q"):
        rmm.add(path, late, exact=True, options=Options(base=save(tmp_path / "half", half)))


def test_a_file_without_a_fingerprint_is_compared_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    base = save(tmp_path / "base", model())
    rmm.convert(adapter(tmp_path / "lora", {"layer.0.q": (12, 12)}), path, exact=True)
    late = save(tmp_path / "late", tuned(model(), "layer.0.q.weight"))
    with pytest.raises(RmmError, match="belongs to 'base', the file to 'org/base'"):
        rmm.add(path, late, exact=True, options=Options(base=base))
    named = save(tmp_path / "models--org--base" / "snapshots" / "0", model())
    rmm.add(path, late, exact=True, options=Options(base=named))
    assert recorded(path) == {"id": "org/base"}  # the first task was not compared with it


def test_names_still_count_beside_weights(tmp_path: Path) -> None:
    options = Options(base=save(tmp_path / "base", model()))
    sources = [
        adapter(tmp_path / name, {"layer.0.q": (12, 12)}, f"org/{name}") for name in ("a", "b")
    ]
    with pytest.raises(RmmError, match="belongs to 'org/b'"):
        rmm.convert(sources, tmp_path / "x.rmm", exact=True, options=options)
    rmm.convert(sources[0], tmp_path / "x.rmm", exact=True, options=options)
    with pytest.raises(RmmError, match="the file to 'org/a'"):
        rmm.add(tmp_path / "x.rmm", sources[1], exact=True, options=options)
