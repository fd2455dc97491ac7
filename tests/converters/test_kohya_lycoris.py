"""Files that the LyCORIS library itself writes: the same deltas, or a refusal by name."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from rmmformat.converters import Options, detect, get_exporter, get_importer
from rmmformat.errors import SourceError, UnsupportedError

torch = pytest.importorskip("torch")
lycoris = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.WARNING)


class Block(torch.nn.Module):
    """A linear layer and two convolutions."""

    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(12, 8)
        self.conv = torch.nn.Conv2d(6, 8, 3, padding=1)
        self.point = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.point(self.conv(x))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mid = Block()


def network(algo, **how):
    """A network around a small model, with random weights."""
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Block"], "target_name": []})
    model = Model()
    made = lycoris.create_lycoris(
        model, 1.0, linear_dim=4, linear_alpha=3.0, conv_dim=2, conv_alpha=1.0, algo=algo, **how
    )
    made.apply_to()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "dora" not in name and "org" not in name:
                value.copy_(0.1 * torch.randn(value.shape))
    return model, made


def save(made, path):
    made.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    return path


def deltas_of(made):
    return {
        layer.lora_name: layer.get_diff_weight(1.0)[0]
        .detach()
        .double()
        .numpy()
        .reshape(layer.shape[0], -1)
        for layer in made.loras
    }


def opened(path, **options):
    (task,) = get_importer("kohya").open(path, options=Options(**options))
    return task


def delta(task, target):
    factors = task.factors(target)
    return factors.scale * factors.B.astype(float) @ factors.A.astype(float)


@pytest.mark.parametrize(
    ("algo", "how"),
    [
        ("lora", {}),
        ("lora", {"rs_lora": True}),
        ("lora", {"use_scalar": True}),
        ("dylora", {"block_size": 2}),
    ],
    ids=str,
)
def test_plain_factors_are_what_the_library_adds(tmp_path, algo, how):
    _, made = network(algo, **how)
    path = save(made, tmp_path / "style.safetensors")
    assert detect(path) == "kohya"
    task = opened(path)
    wanted = deltas_of(made)
    assert list(task.targets) == sorted(wanted)
    for target, expected in wanted.items():
        if algo == "dylora":  # the library trains a random part of the rank at a time
            layer = next(layer for layer in made.loras if layer.lora_name == target)
            state = {key: value.detach() for key, value in layer.custom_state_dict().items()}
            up, down = state["lora_up.weight"].double(), state["lora_down.weight"].double()
            scale = float(layer.alpha) / len(down)
            expected = scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).numpy()
        np.testing.assert_allclose(delta(task, target), expected, rtol=1e-5, atol=1e-6)


def test_the_library_reads_what_is_written(tmp_path):
    _, made = network("lora")
    task = opened(save(made, tmp_path / "style.safetensors"))
    get_exporter("kohya").export(task, tmp_path / "again.safetensors")
    again, _ = lycoris.create_lycoris_from_weights(
        1.0, str(tmp_path / "again.safetensors"), Model()
    )
    again.apply_to()
    again.load_weights(str(tmp_path / "again.safetensors"))
    wanted = deltas_of(made)
    got = deltas_of(again)
    assert set(got) == set(wanted)
    for name, expected in wanted.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-7)


def test_magnitudes_are_kept(tmp_path):
    _, made = network("lora", dora_wd=True)
    task = opened(save(made, tmp_path / "style.safetensors"))
    names = {f"{layer.lora_name}.dora_scale" for layer in made.loras}
    assert set(task.privates) == names
    for layer in made.loras:
        np.testing.assert_array_equal(
            task.private_tensor(f"{layer.lora_name}.dora_scale"),
            layer.dora_scale.detach().numpy(),
        )


@pytest.mark.parametrize(
    ("algo", "how", "what"),
    [
        ("loha", {}, "LoHa"),
        ("lokr", {}, "LoKr"),
        ("lora", {"use_tucker": True}, "Tucker"),
        ("glora", {}, "GLoRA"),
        ("diag-oft", {}, "OFT"),
        ("boft", {}, "OFT"),
        ("ia3", {}, "IA3"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, algo, how, what):
    _, made = network(algo, **how)
    path = save(made, tmp_path / "style.safetensors")
    assert detect(path) == "kohya"
    with pytest.raises(UnsupportedError, match=what) as caught:
        opened(path)
    assert "lycoris_mid_" in str(caught.value)


def test_full_differences_alone_are_no_adapter(tmp_path):
    _, made = network("full")
    with pytest.raises(SourceError, match="holds no LoRA factors"):
        opened(save(made, tmp_path / "style.safetensors"))
