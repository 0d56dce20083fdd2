"""Reading and writing published checkpoints: every layout, every refusal, and one stored tensor in memory at a time."""

import json
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import redraw, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_as_precise_in_bf16, assert_same_logits, draw_tokens, logits, original, twins
from safetensors.torch import load_file, save_file
from training import write_corpus

from llm.config import TrainConfig
from llm.data import open_tokens
from llm.generate import begin, load_run, write
from llm.generate import main as generate
from llm.hub_folder import Checkpoint
from llm.models import MODELS
from llm.models.llama import Llama, LlamaConfig
from llm.modules.position_encoding.rope_settings import normalise
from llm.name_table import PretrainedError, deinterleave, join, plan, read_config, same, split, transpose
from llm.pretrained import export_pretrained, load_pretrained
from llm.pretrained import main as pretrained
from llm.quantized import FP4_VALUES, dequantize_fp8, dequantize_mxfp4
from llm.train import train

SMALL = {"vocab_size": 97, "max_seq_len": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


def tiny_llama(**overrides) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SMALL | {"tie_embeddings": False} | overrides)).eval()
    redraw(model)
    return model


@pytest.fixture
def folder(tmp_path):
    return export_pretrained(tiny_llama(), tmp_path / "hub")


def edit_config(folder, **changes) -> None:
    """Change fields of config.json; None takes a field away."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8")


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def same_parameters(one, other) -> bool:
    ones, others = one.state_dict(), other.state_dict()
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


# --- what a folder may look like


def test_what_was_exported_is_loaded_again_in_one_file_or_in_shards(tmp_path):
    model = tiny_llama()
    for bytes_, n_files in ((5_000_000, 1), (20_000, 4)):
        out = export_pretrained(model, tmp_path / str(bytes_), shard_bytes=bytes_)
        assert len(list(out.glob("*.safetensors"))) >= n_files
        assert (out / "model.safetensors.index.json").exists() == (n_files > 1)
        assert same_parameters(load_pretrained(out), model)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "20000", attn_implementation="eager").eval()
    tokens = draw_tokens(20)
    torch.testing.assert_close(logits(theirs, tokens), model(tokens).detach(), rtol=0, atol=2e-5)


def test_shards_that_transformers_writes_are_read(tmp_path):
    theirs = original("LlamaForCausalLM")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = draw_tokens(20)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_each_precision_are_read_as_they_are_or_as_asked(tmp_path, stored):
    model = tiny_llama().to(stored)
    out = export_pretrained(model, tmp_path / "out")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == str(stored).removeprefix("torch.")
    assert same_parameters(load_pretrained(out), model)
    wide = load_pretrained(out, dtype=torch.float64)
    assert same_parameters(wide, model.double())


SCALINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": dict(factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0),
}
SCALED = {
    "MistralForCausalLM": {"head_dim": 32, "sliding_window": 6},
    "Qwen2ForCausalLM": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Olmo2ForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 6},
    "MixtralForCausalLM": {"head_dim": 32, "num_local_experts": 5},
    "Qwen3MoeForCausalLM": {"head_dim": 32, "num_experts": 5, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {"head_dim": 32, "num_local_experts": 5, "sliding_window": 6},
    "DeepseekV2ForCausalLM": {"qk_rope_head_dim": 32, "num_experts_per_tok": 2, "num_key_value_heads": None},
    "DeepseekV3ForCausalLM": {"qk_rope_head_dim": 32, "n_routed_experts": 16, "num_key_value_heads": None},
}


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("architecture", SCALED)
def test_scaled_positions_are_those_of_transformers(tmp_path, architecture, rope_type):
    """Beyond the trained length, too. Llama's are in test_llama.py."""
    rope = {"rope_type": rope_type, "rope_theta": 5e3, **SCALINGS[rope_type]}
    theirs, ours = twins(
        tmp_path, architecture, max_position_embeddings=16, rope_parameters=rope, **SCALED[architecture]
    )
    assert ours.config.rope_scaling["rope_type"] == rope_type
    assert_same_logits(theirs, ours)


BF16 = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 12},
    "Olmo2ForCausalLM": {},
    "Gemma3ForCausalLM": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 6},
}


@pytest.mark.parametrize("architecture", BF16)
def test_in_bf16_logits_are_as_precise_as_those_of_transformers(tmp_path, architecture):
    assert_as_precise_in_bf16(tmp_path, original(architecture, **BF16[architecture]))


def test_a_tied_head_may_be_in_the_file_a_second_time_but_no_other_one(tmp_path):
    model = tiny_llama(tie_embeddings=True)
    out = export_pretrained(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    edit_weights(out, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert same_parameters(load_pretrained(out), model)
    edit_weights(out, lambda weights: weights["lm_head.weight"].add_(1))
    with pytest.raises(PretrainedError, match=r"ties the head to the embedding, but lm_head.weight is another matrix"):
        load_pretrained(out)


def test_angles_that_old_files_store_are_not_needed(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(4)}))
    load_pretrained(folder)


def test_loading_holds_one_stored_tensor_at_a_time(folder, monkeypatch):
    live, most = set(), []
    stored = Checkpoint.stored

    def watched(self, name):
        tensor = stored(self, name)
        live.add(name)
        weakref.finalize(tensor, live.discard, name)
        most.append(len(live))
        return tensor

    monkeypatch.setattr(Checkpoint, "stored", watched)
    load_pretrained(folder)
    assert len(most) == 2 * 9 + 3 and max(most) == 1


# --- what is refused


def drop_key(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def add_key(weights):
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)


def cut_key(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_key, r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (add_key, r"1 left over: model\.layers\.2\.mlp\.up_proj\.weight"),
        (cut_key, r"1 of another shape: model\.norm\.weight \(31,\), not \(32,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, says):
    edit_weights(folder, change)
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(folder)


def test_a_missing_and_a_truncated_shard_are_named(tmp_path):
    folder = export_pretrained(tiny_llama(), tmp_path / "out", shard_bytes=20_000)
    second = sorted(folder.glob("*.safetensors"))[1]
    raw = second.read_bytes()
    second.write_bytes(raw[:-100])
    with pytest.raises(PretrainedError, match=rf"{second.name} cannot be read: .*download it again"):
        load_pretrained(folder)
    second.write_bytes(raw[:5])
    with pytest.raises(PretrainedError, match=rf"{second.name} cannot be read: .*download it again"):
        load_pretrained(folder)
    second.unlink()
    with pytest.raises(PretrainedError, match=rf"{second.name} is missing.*download it again"):
        load_pretrained(folder)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder = export_pretrained(tiny_llama(), tmp_path / "out", shard_bytes=20_000)
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(PretrainedError, match="is missing"):
        load_pretrained(folder)


def test_pickled_weights_are_refused_unopened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match=r"pytorch_model\.bin only.*can run code.*take the \.safetensors"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(PretrainedError, match=r"neither model\.safetensors nor"):
        load_pretrained(folder)


def test_a_folder_without_a_readable_config_is_refused(folder):
    for text in ("{", "[]", '"llama"'):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(PretrainedError, match=r"config\.json"):
            load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(PretrainedError, match=r"config\.json cannot be read"):
        load_pretrained(folder)


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bloom"}, r"'bloom' is not known; known are .*llama, mistral"),
        ({"model_type": "gemma3"}, r"sees images.*gemma3_text"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu': this model knows 'silu' only"),
        ({"attention_bias": True}, r"attention_bias = True: this model knows False only"),
        ({"logits_scaling": 8.0}, r"sets logits_scaling = 8\.0, which this code does not know"),
        ({"num_key_value_heads": 3}, r"n_kv_heads = 3 does not divide n_heads = 4"),
        ({"hidden_size": "wide"}, r"sets hidden_size to \"wide\": this model needs a number"),
        ({"head_dim": 7}, r"rotary_dim = 7 must be even"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, r"rope_type = 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "su"}}, r"rope_type = 'su' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' lacks factor"),
        ({"rope_scaling": YARN | {"long_factor": [1.0]}}, r"'yarn' has unknown long_factor"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0\.5.*turns whole heads"),
        ({"partial_rotary_factor": 0.5}, r"sets partial_rotary_factor = 0\.5"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config \{'quant_method': 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config .*weight_block_size"),
    ],
)
def test_a_config_that_would_be_read_wrongly_is_refused_by_name(folder, changes, says):
    edit_config(folder, **changes)
    with pytest.raises(PretrainedError, match=rf"config\.json.*{says}"):
        load_pretrained(folder)


def test_fields_that_change_nothing_are_passed_over(folder):
    extra = {"pretraining_tp": 1, "torch_dtype": "float32", "use_cache": True, "some_switch": False, "_name": "x"}
    edit_config(folder, **extra, eos_token_id=[1, 2])
    assert same_parameters(load_pretrained(folder), tiny_llama())


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_fields_left_out_are_what_transformers_takes(name):
    theirs = getattr(pytest.importorskip("transformers"), name)()
    Model, Config = next(pair for pair in MODELS.values() if pair[1].__name__ == name)
    empty, whole = (Config(**read_config(Model.published, config)) for config in ({}, theirs.to_dict()))
    assert replace(empty, head_dim=empty.head_width) == replace(whole, head_dim=whole.head_width)


# --- the table of names


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_every_operation_undoes_itself(size, n, dim):
    x = torch.randn(n * size * 2, n * size * 4, n * size * 6)
    pieces = [piece.clone() for piece in x.chunk(n, dim)]
    cases = [(same, [x]), (transpose, [x]), (split(n, dim), [x]), (join(n, dim), pieces), (deinterleave(dim - 3), [x])]
    for operation, theirs in [*cases, (transpose.then(split(n, dim)), [x])]:
        back = operation.save(operation.load(theirs))
        assert len(back) == len(theirs) and all(map(torch.equal, back, theirs))


def test_operations_do_what_they_are_called():
    x = torch.arange(6.0).reshape(1, 6)
    assert [part.tolist() for part in split(3, 1).load([x])] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert join(2, 0).load([x, -x])[0].tolist() == [x[0].tolist(), (-x)[0].tolist()]
    assert deinterleave(-1).load([x])[0].tolist() == [[0, 2, 4, 1, 3, 5]]
    assert transpose.load([x])[0].shape == (6, 1)
    assert transpose.then(split(3)).load([x])[1].tolist() == [[2], [3]]


ROWS = (
    ("blocks.{layer}.gate_up[{expert}]", ("l.{layer}.e.{expert}.gate", "l.{layer}.e.{expert}.up"), join(2)),
    ("blocks.{layer}.gate_up", "l.{layer}.fused", same),
    (("blocks.{layer}.q", "blocks.{layer}.k"), "l.{layer}.qk", split(2)),
    ("blocks.{layer}.*", "l.{layer}.*", same),
)


def test_rows_find_their_tensors_and_experts():
    tensors = {"blocks.7.gate_up": torch.zeros(2, 4, 3), "blocks.7.k": torch.zeros(2), "blocks.7.q": torch.zeros(2)}
    steps = plan(ROWS, tensors | {"blocks.7.o.bias": torch.zeros(1)})
    assert [(step.ours, step.theirs) for step in steps] == [
        ([("blocks.7.gate_up", 0)], ["l.7.e.0.gate", "l.7.e.0.up"]),
        ([("blocks.7.gate_up", 1)], ["l.7.e.1.gate", "l.7.e.1.up"]),
        ([("blocks.7.q", None), ("blocks.7.k", None)], ["l.7.qk"]),
        ([("blocks.7.o.bias", None)], ["l.7.o.bias"]),
    ]
    with pytest.raises(PretrainedError, match="no row of the name table has a place for norm"):
        plan(ROWS, {"norm": torch.zeros(1)})


def test_the_layout_that_the_checkpoint_has_is_taken():
    tensors = {"blocks.0.gate_up": torch.zeros(2, 4, 3)}
    assert [step.theirs for step in plan(ROWS, tensors, {"l.0.fused"})] == [["l.0.fused"]]
    assert len(plan(ROWS, tensors, {"l.0.e.1.up"})) == 2  # the rest of it is then missing by name


def test_dynamic_scaling_knows_its_trained_length_and_nothing_else_guesses():
    read = normalise({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 5}, 1e4, 100)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 100}
    assert read == {"rope_theta": 1e4, "rope_scaling": scaling, "max_seq_len": 200}
    assert normalise({}, 5e5, 100) == {"rope_theta": 5e5, "rope_scaling": {}}


# --- weights in 4 and 8 bits


def mxfp4(n_experts=3, n_out=6, n_blocks=2):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (n_experts, n_out, n_blocks, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(120, 134, (n_experts, n_out, n_blocks), generator=generator).to(torch.uint8)
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_equals_transformers_and_a_loop(dtype):
    blocks, scales = mxfp4()
    ours = dequantize_mxfp4(blocks, scales, dtype)
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    assert torch.equal(ours, convert(blocks, scales, dtype=dtype))
    for e, o, i in [(0, 0, 0), (0, 0, 1), (2, 5, 63), (1, 3, 32), (1, 2, 31)]:
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        value = FP4_VALUES[byte >> 4 if i % 2 else byte & 15] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        assert ours[e, i, o].item() == value


def test_fp8_equals_transformers_and_a_loop_also_where_blocks_are_cut_off():
    weight = (100 * torch.randn(256, 384, generator=torch.Generator().manual_seed(0))).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    theirs = module.Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scales, torch.float32)
    assert torch.equal(dequantize_fp8(weight, scales, torch.float32), theirs)
    cut = dequantize_fp8(weight[:130, :200].contiguous(), scales[:2, :2], torch.float32)
    expected = [[float(weight[i, j].float() * scales[i // 128, j // 128]) for j in range(200)] for i in range(130)]
    assert torch.equal(cut, torch.tensor(expected))
    with pytest.raises(ValueError, match=r"scales \(2, 3\) do not fit \(130, 200\)"):
        dequantize_fp8(weight[:130, :200], scales, torch.float32)


def test_a_checkpoint_in_fp8_is_expanded_while_it_is_read(folder):
    scales = {}

    def quantize(weights):
        for name in [name for name in weights if "proj" in name]:
            rows, columns = weights[name].shape
            scale = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
            whole = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
            weights[name] = (weights[name] / whole).to(torch.float8_e4m3fn)
            weights[name + "_scale_inv"] = scale
            scales[name] = weights[name].float() * whole

    edit_weights(folder, quantize)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    model = load_pretrained(folder)
    assert len(scales) == 14 and model.norm.weight.dtype == torch.float32
    for name in ("q_proj", "o_proj"):
        expected = scales[f"model.layers.1.self_attn.{name}.weight"]
        assert torch.equal(getattr(model.blocks[1].mixer, name).weight.detach(), expected)


# --- export


def test_a_model_that_transformers_has_not_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(PretrainedError, match=r"can hold a Baseline; the models that can be exported are .*llama"):
        export_pretrained(tiny_model("baseline"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_overwrites_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(PretrainedError, match="exists and is not an empty folder"):
        export_pretrained(tiny_llama(), out)
    (out / "notes.txt").unlink()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llm.export.save_file", full)
        with pytest.raises(PretrainedError, match=r"cannot write .*No space left"):
            export_pretrained(tiny_llama(), out)
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())
    export_pretrained(tiny_llama(), out)
    assert same_parameters(load_pretrained(out), tiny_llama())


def test_a_trained_run_writes_the_same_text_in_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "data").mkdir()
    data = write_corpus(tmp_path / "data")
    flags = {"tokens_per_step": 512, "micro_batch_size": 8, "warmup_steps": 2, "eval_windows": 2, "eval_every": 20}
    config = TrainConfig(data=data, out=tmp_path / "run", steps=20, max_lr=1e-2, device="cpu", wandb="off", **flags)
    tokens = open_tokens(data)
    run = train(Llama, LlamaConfig(**SMALL | {"vocab_size": tokens.vocab_size}), config, tokens)
    pretrained(["export", str(run), str(tmp_path / "out")])
    model, tokenizer = load_run(run, torch.device("cpu"))
    (expected,) = write(model, tokenizer, ["Once upon a"], 40)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = their_tokenizer("Once upon a", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == begin(tokenizer, "Once upon a")  # after <|endoftext|>, as in training
    generated = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert their_tokenizer.decode(generated[0], skip_special_tokens=True) == expected
    capsys.readouterr()
    generate([str(tmp_path / "out"), "--prompt", "Once upon a", "--temperature", "0", "--max-new-tokens", "40"])
    assert capsys.readouterr().out == expected + "\n"
