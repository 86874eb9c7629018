"""Bad input by name, through the scripts: one line, exit code 78, and nothing left that looks whole."""

import json
import shutil

import pytest
import torch
from convert_models import write_model
from safetensors.torch import load_file, save_file
from scripts import script

from miles.config.exits import OK, WRONG

NAN = float("nan")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of each model that is damaged here; "fp8" is deepseek_v3 in FP8 blocks."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama", "deepseek_v3", "glm4_moe"):
        write_model(folder / family, family, mtp_layers=int(family == "glm4_moe"))
    assert script("quantize", folder / "deepseek_v3", folder / "fp8", "--method", "fp8").code == OK
    return folder


def change(folder, edit):
    """Rewrite the tensors."""
    given = load_file(folder / "model.safetensors")
    edit(given)
    save_file(given, folder / "model.safetensors", metadata={"format": "pt"})


def tensor(name, value):
    """A damage: a tensor has another value, or is gone (None)."""
    return lambda folder: change(folder, lambda given: given.pop(name) if value is None else given.update({name: value(given[name]) if callable(value) else value}))


def config(**fields):
    """A damage: config.json says something else."""
    return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))


def index(**where):
    """A damage: an index that names these files."""
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name.replace("_", "."): file for name, file in where.items()}}))


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def twice(folder):
    save_file({"model.norm.weight": torch.ones(64)}, folder / "other.safetensors")


def with_nan(value):
    value.view(torch.uint8 if value.dtype == torch.float8_e4m3fn else value.dtype).view(-1)[-1] = 0x7F if value.dtype == torch.float8_e4m3fn else NAN
    return value


def without_layer(number):
    return lambda folder: change(folder, lambda given: [given.pop(name) for name in list(given) if f"layers.{number}." in name])


UP, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate.weight"
CODES = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
NOT = "; correct config.json, or restore the folder from its origin"
REFUSED = [  # model, damage, what the line says
    ("qwen3", truncated, "model.safetensors: truncated (model.norm.weight ends at byte "),
    ("qwen3", lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors: truncated or no safetensors file"),
    ("qwen3", lambda folder: (folder / "model.safetensors").unlink(), "no complete safetensors weights (missing: model.safetensors)"),
    ("qwen3", index(model_norm_weight="other.safetensors"), "no complete safetensors weights (missing: other.safetensors)"),
    ("qwen3", index(model_ghost_weight="model.safetensors"), "names model.ghost.weight, which model.safetensors does not hold (1 such)"),
    ("qwen3", index(model_norm_weight="../model.safetensors"), "names the file '../model.safetensors', which is not beside it"),
    ("qwen3", twice, "model.norm.weight is both in model.safetensors and in other.safetensors"),
    ("qwen3", lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    ("qwen3", lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read (No such file or directory)"),
    ("qwen3", tensor(UP, None), f"hf: {UP} is missing; restore the folder from its origin"),
    ("qwen3", tensor("model.layers.2.mlp.up_proj.weight", torch.zeros(3)), "model.layers.2.mlp.up_proj.weight is no tensor of a 'qwen3' model of this config.json (1 such)"),
    ("qwen3", tensor("model.norm.weight", torch.zeros(63)), "model.norm.weight has the shape [63], config.json says [64] (hidden_size = 64)"),
    ("qwen3", tensor(UP, lambda value: value.to(torch.int8)), f"{UP} is int8, which holds no weights that are known"),
    ("qwen3", config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), "weight_block_size [64, 64]"),
    ("qwen3", lambda folder: (folder / "model.safetensors").rename(folder / "model-00002-of-00003.safetensors"), "(missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors)"),
    # values that no config.json should have
    ("qwen3", config(model_type=["qwen3"]), "config.json: model_type ['qwen3'] is not known; known: llama"),
    ("qwen3", config(num_key_value_heads=0), "config.json: 4 attention heads can't share 0 key-value heads"),
    ("qwen3", config(quantization_config="fp8"), "config.json: quantization_config is 'fp8', an object is needed"),
    ("qwen3", config(quantization_config={"quant_method": "fp8", "weight_block_size": 128}), "weight_block_size 128"),
    ("deepseek_v3", config(mlp_layer_types=3), "config.json: mlp_layer_types is 3, a list is needed"),
    # config.json against the tensors
    ("qwen3", config(num_hidden_layers=3), "config.json: num_hidden_layers = 3 (2 would fit) contradicts the tensors: model.layers.2.self_attn.q_proj.weight is missing" + NOT),
    ("qwen3", config(num_hidden_layers=1), "config.json: num_hidden_layers = 1 (2 would fit) contradicts the tensors: model.layers.1."),
    ("qwen3", without_layer(1), "config.json: num_hidden_layers = 2 (1 would fit) contradicts the tensors: model.layers.1.self_attn.q_proj.weight is missing" + NOT),
    ("qwen3", config(hidden_size=128), "config.json: hidden_size = 128 (64 would fit) contradicts the tensors: model.embed_tokens.weight has the shape [96, 64]" + NOT),
    ("qwen3", config(vocab_size=100), "config.json: vocab_size = 100 (96 would fit) contradicts the tensors: model.embed_tokens.weight has the shape [96, 64]" + NOT),
    ("qwen3", config(num_attention_heads=8), "config.json: num_attention_heads = 8 (4 would fit) contradicts the tensors: model.layers.0.self_attn.q_proj.weight has the shape [64, 64]"),
    ("qwen3", config(num_key_value_heads=4), "config.json: num_key_value_heads = 4 (2 would fit) contradicts the tensors: model.layers.0.self_attn.k_proj.weight has the shape [32, 64]"),
    ("qwen3", config(head_dim=32), "config.json: head_dim = 32 (16 would fit) contradicts the tensors: model.layers.0.self_attn."),
    ("qwen3", config(intermediate_size=192), "config.json: intermediate_size = 192 (96 would fit) contradicts the tensors: model.layers.0.mlp."),
    ("qwen3", config(tie_word_embeddings=False), "config.json: tie_word_embeddings = false (true would fit) contradicts the tensors: lm_head.weight is missing" + NOT),
    ("llama", config(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight, of which Megatron keeps one"),
    ("llama", config(attention_bias=True), "config.json: attention_bias = true (false would fit) contradicts the tensors: model.layers.0.self_attn.q_proj.bias is missing"),
    ("deepseek_v3", config(n_routed_experts=8), f"config.json: n_routed_experts = 8 (4 would fit) contradicts the tensors: {GATE} has the shape [4, 64]" + NOT),
    ("deepseek_v3", config(n_routed_experts=2), "config.json: n_routed_experts = 2 (4 would fit) contradicts the tensors: "),
    ("deepseek_v3", config(first_k_dense_replace=0), "config.json: first_k_dense_replace = 0 (1 would fit) contradicts the tensors: model.layers.0.mlp.gate.weight is missing" + NOT),
    ("deepseek_v3", config(moe_intermediate_size=64), "config.json: moe_intermediate_size = 64 (32 would fit) contradicts the tensors: "),
    ("deepseek_v3", config(kv_lora_rank=64), "config.json: kv_lora_rank = 64 (32 would fit) contradicts the tensors: "),
    ("glm4_moe", config(num_hidden_layers=3), "config.json: num_hidden_layers = 3 (2 would fit) contradicts the tensors: model.layers.2."),
    ("glm4_moe", config(num_hidden_layers=1), "config.json: num_hidden_layers = 1 (2 would fit) contradicts the tensors: model.layers.1."),
    # FP8
    ("fp8", tensor(f"{CODES}_scale_inv", None), f"{CODES} is FP8, its scales {CODES}_scale_inv are missing"),
    ("fp8", tensor(f"{CODES}_scale_inv", torch.ones(2, 1)), f"{CODES}_scale_inv has the shape [2, 1], the blocks of {CODES} need [1, 1]"),
    ("fp8", tensor(f"{CODES}_scale_inv", torch.ones(1)), f"{CODES}_scale_inv has the shape [1], the blocks of {CODES} need [1, 1]"),
    ("fp8", tensor(f"{CODES}_scale_inv", torch.ones(1, 1, dtype=torch.int32)), f"{CODES}_scale_inv is int32, scales are float32, bfloat16 or float8_e8m0fnu"),
]  # fmt: skip


def refused(done, said, target):
    """One line with this text, and no checkpoint of either format."""
    assert done.code == WRONG, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert script("inspect", target).code == WRONG


@pytest.mark.parametrize(("model", "damage", "said"), REFUSED, ids=[f"{model}: {said[-60:]}" for model, _, said in REFUSED])
def test_a_bad_source_is_refused_by_name_before_anything_is_written(tmp_path, models, model, damage, said):
    shutil.copytree(models / model, tmp_path / "hf")
    damage(tmp_path / "hf")
    refused(script("hf_to_torch_dist", "--hf", tmp_path / "hf", "--output", tmp_path / "td"), said, tmp_path / "td")
    assert not (tmp_path / "td").exists()


@pytest.mark.parametrize(("model", "name"), [("qwen3", "model.layers.1.self_attn.k_proj.weight"), ("qwen3", "model.norm.weight"), ("fp8", CODES), ("fp8", f"{CODES}_scale_inv")])
def test_nan_is_said_by_name_and_refused_when_strict(tmp_path, models, model, name):
    source, weight = tmp_path / "hf", name.removesuffix("_scale_inv")
    shutil.copytree(models / model, source)
    change(source, lambda given: given.update({name: with_nan(given[name])}))
    strict = script("hf_to_torch_dist", "--hf", source, "--output", tmp_path / "strict", "--strict")
    refused(strict, f"NaN in {weight}; restore the source, or leave --strict out", tmp_path / "strict")
    done = script("hf_to_torch_dist", "--hf", source, "--output", tmp_path / "td")
    assert done.code == OK
    assert f"warning: NaN in {weight} (1 such tensor)" in done.out.splitlines()
    refused(script("torch_dist_to_hf", "--torch-dist", tmp_path / "td", "--output", tmp_path / "no", "--strict"), f"NaN in {weight}; restore", tmp_path / "no")
    back = script("torch_dist_to_hf", "--torch-dist", tmp_path / "td", "--output", tmp_path / "back")
    assert f"warning: NaN in {weight} (1 such tensor)" in back.out.splitlines()
    assert load_file(tmp_path / "back" / "model.safetensors")[weight].isnan().any()


def test_mtp_layers_that_config_json_promises_are_missed_by_name(tmp_path, models):
    source, missing = tmp_path / "hf", "num_nextn_predict_layers = 1, but model.layers.2.eh_proj.weight is missing"
    shutil.copytree(models / "deepseek_v3", source)
    config(num_nextn_predict_layers=1)(source)
    refused(script("hf_to_torch_dist", "--hf", source, "--output", tmp_path / "td", "--mtp-num-layers", 1), missing, tmp_path / "td")
    refused(script("hf_to_torch_dist", "--hf", source, "--output", tmp_path / "td", "--strict"), missing, tmp_path / "td")
    assert not (tmp_path / "td").exists()
    assert missing in script("hf_to_torch_dist", "--hf", source, "--output", tmp_path / "td").out.splitlines()[0]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.2.up_proj.weight"])
@pytest.mark.parametrize("method", ["fp8", "int4"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_a_quantised_block_cannot_hold_is_refused(tmp_path, models, method, name, value):
    shutil.copytree(models / "deepseek_v3", tmp_path / "hf")
    change(tmp_path / "hf", lambda given: given[name].__setitem__((3, 4), value))
    refused(script("quantize", tmp_path / "hf", tmp_path / "small", "--method", method), f"NaN or infinity in {name}", tmp_path / "small")


BACK = [  # damage, what the line says
    (tensor(f"{CODES}_scale_inv", None), f"{CODES} is FP8, its scales {CODES}_scale_inv are missing"),
    (tensor(f"{CODES}_scale_inv", torch.ones(2, 1)), f"{CODES}_scale_inv has the shape [2, 1]"),
    (truncated, "model.safetensors: truncated"),
    (index(model_ghost_weight="model.safetensors"), "names model.ghost.weight"),
]


@pytest.mark.parametrize(("damage", "said"), BACK, ids=[said[-40:] for _, said in BACK])
def test_a_bad_quantised_folder_is_refused_before_anything_is_written(tmp_path, models, damage, said):
    shutil.copytree(models / "fp8", tmp_path / "hf")
    damage(tmp_path / "hf")
    refused(script("quantize", tmp_path / "hf", tmp_path / "back", "--method", "bf16"), said, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("where", ["", "release"])
def test_a_destination_with_something_else_is_left_alone(tmp_path, models, where):
    folder = tmp_path / "to" / where
    folder.mkdir(parents=True)
    (folder / "mine").write_text("x")
    for words in (["hf_to_torch_dist", "--hf", models / "qwen3", "--output", tmp_path / "to"], ["quantize", models / "qwen3", folder, "--method", "fp8"]):
        refused(script(*words), "not empty, and no unfinished conversion", tmp_path / "to")
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_checkpoints_of_a_training_run_are_left_alone(tmp_path, models):
    (tmp_path / "run" / "iter_0000007").mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7\n")
    refused(script("hf_to_torch_dist", "--hf", models / "qwen3", "--output", tmp_path / "run"), "says '7', so", tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["iter_0000007", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "7\n"


def test_a_destination_that_is_a_file_is_left_alone(tmp_path, models):
    (tmp_path / "file").write_text("x")
    for words in (["hf_to_torch_dist", "--hf", models / "qwen3", "--output", tmp_path / "file"], ["quantize", models / "qwen3", tmp_path / "file", "--method", "fp8"]):
        refused(script(*words), "file: not a folder; choose another", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def distcp(damage):
    return lambda folder: damage(next((folder / "release").glob("*.distcp")))


CHECKPOINTS = [
    (distcp(lambda file: file.write_bytes(file.read_bytes()[:-5000])), "__0_0.distcp: truncated ("),
    (distcp(lambda file: file.unlink()), "__0_0.distcp: missing"),
    (lambda folder: (folder / "release" / ".metadata").write_bytes(b"cos\nsystem\n."), ".metadata: refused (UnpicklingError: os.system has no place"),
    (lambda folder: config(num_hidden_layers=3)(folder / "release" / "hf"), "config.json says [3, "),
    (lambda folder: config(hidden_size=32)(folder / "release" / "hf"), "embedding.word_embeddings.weight has the shape [96, 64], config.json says [96, 32]"),
]


@pytest.mark.parametrize(("damage", "said"), CHECKPOINTS, ids=[said[-40:] for _, said in CHECKPOINTS])
def test_a_bad_checkpoint_is_refused_before_anything_is_written(tmp_path, models, damage, said):
    assert script("hf_to_torch_dist", "--hf", models / "qwen3", "--output", tmp_path / "td").code == OK
    damage(tmp_path / "td")
    refused(script("torch_dist_to_hf", "--torch-dist", tmp_path / "td", "--output", tmp_path / "back"), said, tmp_path / "back")
    assert not (tmp_path / "back").exists()


EXPORTS = [  # model, what another config.json says, what the line says: a tensor that would be lost
    ("deepseek_v3", config(num_hidden_layers=1), "decoder.layers.1.input_layernorm.weight is no tensor of a 'deepseek_v3' model of "),
    ("qwen3", config(model_type="llama", use_sliding_window=None, layer_types=None), "decoder.layers.self_attention.k_layernorm.weight is no tensor of a 'llama' model of "),
    ("llama", config(tie_word_embeddings=True), "output_layer.weight is no tensor of a 'llama' model of "),
]  # fmt: skip


@pytest.mark.parametrize(("model", "damage", "said"), EXPORTS, ids=[said[:40] for _, _, said in EXPORTS])
def test_weights_that_the_config_does_not_know_are_not_dropped(tmp_path, models, model, damage, said):
    shutil.copytree(models / model, tmp_path / "hf")
    damage(tmp_path / "hf")
    assert script("hf_to_torch_dist", "--hf", models / model, "--output", tmp_path / "td").code == OK
    refused(script("torch_dist_to_hf", "--torch-dist", tmp_path / "td", "--hf", tmp_path / "hf", "--output", tmp_path / "back"), said, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_numbers_beyond_float16_are_refused_by_name(tmp_path, models):
    shutil.copytree(models / "qwen3", tmp_path / "hf")
    change(tmp_path / "hf", lambda given: given[UP].__setitem__((3, 4), 7e4))
    words = ("hf_to_torch_dist", "--hf", tmp_path / "hf", "--output", tmp_path / "td", "--dtype")
    refused(script(*words, "float16"), f"{UP} has numbers beyond float16's largest, 65504; choose --dtype bfloat16 or float32", tmp_path / "td")


WORDS = [  # script, options, what the line says
    ("hf_to_torch_dist", "--hf {} --output x --workers 0", "argument --workers: 0 is too small, at least 1"),
    ("hf_to_torch_dist", "--hf {} --output x --workers many", "argument --workers: invalid whole number value: 'many'"),
    ("hf_to_torch_dist", "--hf {} --output x --mtp-num-layers -1", "argument --mtp-num-layers: -1 is too small, at least 0"),
    ("hf_to_torch_dist", "--hf {} --output x --init-mtp random", "none are asked for; say how many with --mtp-num-layers"),
    ("hf_to_torch_dist", "--hf {} --estimate --mtp-num-layers 1", "model_type 'qwen3' has no MTP layers that this tool knows"),
    ("hf_to_torch_dist", "--hf {} --estimate --disk 0", "argument --disk: 0 is not a number above 0"),
    ("hf_to_torch_dist", "--hf {} --estimate --disk nan", "argument --disk: nan is not a number above 0"),
    ("hf_to_torch_dist", "--hf qwen3-8g --estimate", "qwen3-8g: no folder, and no name of configs/models (qwen3-8b is one)"),
    ("quantize", "{} x --method int4 --group-size 12", "--group-size 12: codes are packed by 8; give a multiple of that, such as 32"),
    ("quantize", "{} x --method int4 --group-size 4096", "no linear layers with rows that groups of 4096 divide, so nothing would be quantised"),
]


@pytest.mark.parametrize(("name", "words", "said"), WORDS, ids=[words for _, words, _ in WORDS])
def test_mistyped_options_are_refused_in_one_line(tmp_path, models, monkeypatch, name, words, said):
    monkeypatch.chdir(tmp_path)
    done = script(name, *words.format(models / "qwen3").split())
    assert done.code == WRONG
    (line,) = done.err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nowhere_is_no_destination(tmp_path, models):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(script("hf_to_torch_dist", "--hf", models / "qwen3", "--output", tmp_path / "link"), "link: not a folder; choose another", tmp_path / "link")


def test_inspect_shows_what_no_map_knows_and_says_so(tmp_path, models):
    shutil.copytree(models / "qwen3", tmp_path / "hf")
    config(model_type="mamba")(tmp_path / "hf")
    done = script("inspect", tmp_path / "hf")
    assert done.code == OK
    assert done.out.splitlines()[0] == f"{tmp_path}/hf: hf, mamba"
    assert f"converted   no: {tmp_path}/hf/config.json: model_type 'mamba' is not known; known: llama" in done.out
    assert json.loads(script("inspect", models / "qwen3", "--json").out)["refused"] is None
