"""Faults that show before any process is started: one line with the fault and the mend, exit code 78, not a byte changed."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import inputs
import pytest
from inputs import MODEL, ROWS, Case, replace

from miles.config.compose import dump_config, load_config

AT_ONCE = 2
RUN = "run recipe --run-dir here"


def recipe(old: str, new: str):
    """Change a piece of recipe.yaml."""

    def make(folder: Path) -> None:
        text = (folder / "recipe.yaml").read_text()
        assert old in text
        replace(folder / "recipe.yaml", text.replace(old, new))

    return make


def file(name: str, content: str | bytes):
    """Another content of a file."""
    return lambda folder: replace(folder / name, content)


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def config_json(**changes: object):
    def make(folder: Path) -> None:
        replace(folder / "model/config.json", json.dumps({**json.loads((folder / "model/config.json").read_text()), **changes}))

    return make


def cut(name: str, keep: float):
    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        replace(folder / name, content[: int(len(content) * keep)])

    return make


def old_run(*overrides: str, run_yaml: str | None = None):
    """A run directory `here` that has been, with the given settings; nothing in it runs."""

    def make(folder: Path) -> None:
        (folder / "here/checkpoints/step_000001").mkdir(parents=True)
        (folder / "here/checkpoints/step_000001/COMPLETE").write_text("{}")
        config = load_config([folder / "recipe.yaml"], [f"model.hf_checkpoint={folder}/model", f"data.prompt_data={folder}/train.jsonl", *overrides])
        (folder / "here/run.yaml").write_text(dump_config(config) if run_yaml is None else run_yaml)

    return make


def both(*makes):
    return lambda folder: [make(folder) for make in makes]


LINES = "".join(ROWS)
EXTRA = 'eval.interval=1 eval.prompt_data=test.jsonl'

CASES = [
    # the recipe
    Case("recipe missing", "check recpie", ["recpie: no such file; did you mean recipe?"]),
    Case("recipe missing, run", "run recpie --run-dir here", ["recpie: no such file; did you mean recipe?"]),
    Case("shipped recipe misspelt", "check recipes/quikstart", ["did you mean recipes/quickstart?"]),
    Case("no recipe", "check", ["nothing to read; give a recipe, such as recipes/quickstart"]),
    Case("no recipe, run", "run", ["nothing to read; give a recipe"]),
    Case("recipe is a folder", "check model", ["model: is a folder, not a recipe; give a YAML file"]),
    Case("recipe is the folder of recipes", "check recipes", ["recipes: is a folder, not a recipe; give one of recipes/deepseek_v3, ", " recipes/quickstart, ", " recipes/smollm2_135m, recipes/tiny"]),
    Case("recipe is a run directory", "check here", ["here: is a folder, not a recipe; it holds a run: resume it with `miles-submit run here`, or give here/run.yaml"], old_run()),
    Case("unknown key", "check recipe", ["recipe.yaml:3: num_rolout: unknown key; did you mean num_rollout?"], recipe("num_rollout", "num_rolout")),
    Case("unknown section key", RUN, ["recipe.yaml:6: data.prompt_dta: unknown key; did you mean data.prompt_data?"], recipe("prompt_data", "prompt_dta")),
    Case("wrong type", RUN, ['recipe.yaml:3: num_rollout: expected a whole number, got "three"'], recipe("num_rollout: 1", "num_rollout: three")),
    Case("bad YAML", RUN, ["recipe.yaml:5: not YAML", "check indentation, quotes and colons there"], recipe("build: null}", "build: null")),
    Case("key given twice", "check recipe", ["recipe.yaml:10: name: given twice (first in line 2); keep one"], recipe("save_hf: false}", "save_hf: false}\nname: again")),
    Case("recipe not UTF-8", "check recipe", ["recipe.yaml: not UTF-8 text (byte 6); save it as UTF-8"], file("recipe.yaml", b"name: \xe9\n")),
    Case("recipe is a list", "check recipe", ["recipe.yaml:1: expected keys and values at the top, got a list"], file("recipe.yaml", "- a\n")),
    Case("defaults missing, nothing like it", "check recipe", ["own/base: no such file, named in defaults (recipe.yaml:1); give a YAML file's path from ., or a name below "], recipe("recipes/tiny", "own/base")),
    Case("number out of range", "run recipe num_rollout=-1 --run-dir here", ["miles-submit: num_rollout=-1: expected at least 0, got -1"]),
    Case("reward by type and by path", "check recipe rollout.reward.path=rewards.own", ["rollout.reward.type 'exact_match' is given too; set rollout.reward.type=null"]),
    Case("defaults missing", "check recipe", ["recipes/tny: no such file, named in defaults", "did you mean recipes/tiny?"], recipe("recipes/tiny", "recipes/tny")),
    # the command line
    Case("override without =", "run recipe seed --run-dir here", ["seed: no such file"]),
    Case("override of an unknown key", "run recipe train.optimizr.lr=1 --run-dir here", ["train.optimizr.lr: unknown key; did you mean train.optimizer.lr?"]),
    Case("override not YAML", "run recipe name=[1, --run-dir here", ["'[1,' is not a YAML value"]),
    Case("override of a tag that it is not", ["run", "recipe", "seed=!!int abc", "--run-dir", "here"], ["seed=!!int abc: '!!int abc' is not a YAML value (abc is no !!int); quote it"]),
    Case("override of 5000 digits", f"check recipe seed={'9' * 5000}", ["seed=999999", "…: ", "is not a YAML value (a number of 5000 digits); quote it"]),
    Case("override without end", ["check", "recipe", "rollout.sglang=&a {x: *a}"], ["rollout.sglang=&a {x: *a}: an anchor (&) holds an alias (*) of itself, so it has no end; remove the alias"]),
    Case("unknown option", "run recipe --lrr 1 --run-dir here", ["--lrr: unknown option"]),
    Case("unknown option with a neighbour", "check recipe --tis-clp 2", ["--tis-clp: unknown option; did you mean --tis-clip?"]),
    Case("option refused by name", "check recipe --critic-load DIR", ["--critic-load: not there yet: critics"]),
    Case("option without value", "check recipe --lr", ["--lr: expected a value after it"]),
    Case("option of the wrong type", "check recipe --num-rollout many", ["--num-rollout: expected a whole number, got 'many'"]),
    Case("unknown command", "chekc recipe", ["No such command 'chekc'"]),
    Case("unknown option of status", "status --jsn here", ["No such option", "--jsn"]),
    Case("status without a run", "status", ["Missing argument", "RUN_DIR"]),
    # what does not fit together
    Case("volumes that do not multiply", "check recipe train.global_batch_size=7 train.num_steps_per_rollout=3", ["4 prompts × 4 samples = 16 samples a rollout, but global_batch_size 7 × num_steps_per_rollout 3 = 21", "take global_batch_size 16 and num_steps_per_rollout 1"]),
    Case("volumes that do not multiply, run", "run recipe train.global_batch_size=5 --run-dir here", ["16 samples a rollout, which 5 does not divide; take global_batch_size 4"]),
    Case("not there yet", "run recipe train.backend=megatron --run-dir here", ["train.backend: megatron is not there yet; set train.backend=fsdp"]),
    Case("cache too small", "run recipe rollout.sampling.max_prompt_len=5000 --run-dir here", ["rollout.kv_cache_tokens: one sequence may have 5006 tokens, the cache has 2048; set rollout.kv_cache_tokens="]),
    Case("reward unknown", "run recipe rollout.reward.type=exact --run-dir here", ["rollout.reward.type: reward exact is not there yet; take one of exact_match, math"]),
    # prompts
    Case("prompt file missing", "run recipe data.prompt_data=trian.jsonl --run-dir here", ["trian.jsonl: no such file; did you mean", "train.jsonl?"]),
    Case("prompt file of unknown kind", "run recipe data.prompt_data=recipe.yaml --run-dir here", ["recipe.yaml: unknown kind of file; prompts come from .jsonl"]),
    Case("malformed JSONL line", RUN, ["train.jsonl:7: not a JSON object (", "mend or remove the line"], file("train.jsonl", "".join(ROWS[:6]) + '{"question": "1 +", \n' + "".join(ROWS[6:]))),
    Case("malformed JSONL line, check", "check recipe --json", [], file("train.jsonl", '{"question": "1 +", \n')),
    Case("row that is not an object", RUN, ["train.jsonl:17: expected a JSON object", "found a list"], file("train.jsonl", LINES + "[1]\n")),
    Case("row without the key", RUN, ["train.jsonl:3: no key 'question'; did you mean 'qestion'? set data.input_key"], file("train.jsonl", "".join(ROWS[:2]) + ROWS[2].replace("question", "qestion"))),
    Case("row without the label", RUN, ["train.jsonl:1: no key 'answer'; the row has 'question'; set data.label_key"], file("train.jsonl", '{"question": "1"}\n')),
    Case("prompt that is a number", RUN, ["train.jsonl:1: 'question' must be text, or a list of chat messages"], file("train.jsonl", '{"question": 1, "answer": "1"}\n')),
    Case("empty data set", RUN, ["train.jsonl: no rows; a data set needs at least one prompt"], file("train.jsonl", "")),
    Case("slice without rows", "run recipe data.prompt_data=train.jsonl@[90:99] --run-dir here", ["train.jsonl@[90:99]: the slice holds no rows; the file has 16"]),
    Case("Parquet that is none", "run recipe data.prompt_data=a.parquet --run-dir here", ["a.parquet: not a readable Parquet file"], file("a.parquet", "no parquet")),
    Case("evaluation prompts are training prompts", f"run recipe {EXTRA} eval.exclude=[data] --run-dir here", ["test.jsonl:2: this prompt occurs in", "train.jsonl:6 too, which eval.exclude forbids: '1 + 1 ='; remove one of them"], file("test.jsonl", '{"question": "9 + 9 =", "answer": "18"}\n{"question": " 1 +  1 =", "answer": "2"}\n')),
    Case("evaluation file malformed", f"run recipe {EXTRA} --run-dir here", ["test.jsonl:1: not a JSON object ("], file("test.jsonl", "{\n")),
    Case("reasoning-gym data set misspelt", "check recipes/tiny data.reasoning_gym=chain_sums", ["data.reasoning_gym: no data set 'chain_sums'; did you mean 'chain_sum'?"]),
    Case("reasoning-gym key misspelt", "run recipes/tiny eval.reasoning_gym_config.sise=3 --run-dir here", ["eval.reasoning_gym_config: chain_sum has no key 'sise'; did you mean 'size'?"]),
    Case("reasoning-gym value refused", "check recipes/tiny warm_start.reasoning_gym_config.min_terms=2.5", ["warm_start.reasoning_gym_config: chain_sum refuses it: "]),
    # the model
    Case("model folder missing", "run recipe model.hf_checkpoint=modle --run-dir here", ["modle: no such folder; did you mean", "model?"]),
    Case("no config.json", RUN, ["model.hf_checkpoint:", "has no config.json; give a Hugging Face folder"], without("model/config.json")),
    Case("config.json damaged", RUN, ["config.json: not JSON", "restore it from the checkpoint's origin"], cut("model/config.json", 0.5)),
    Case("unknown family", RUN, ["model: family gemma3 is not there yet; take a model of llama, qwen2, qwen3, qwen3_moe"], config_json(model_type="gemma3")),
    Case("tokenizer missing", RUN, ["model: has neither tokenizer.json nor an older vocabulary", "copy the tokenizer's files there"], without("model/tokenizer.json")),
    Case("tokenizer cut off", RUN, ["tokenizer.json: not JSON (", "restore it from the checkpoint's origin"], cut("model/tokenizer.json", 0.7)),
    Case("weights missing", RUN, ["model: no safetensors weights; convert them first"], without("model/model.safetensors")),
    Case("weights cut off", RUN, ["model.safetensors: damaged: 441264 bytes by its header, 220632 found; restore it"], cut("model/model.safetensors", 0.5)),
    Case("weights that are none", RUN, ["model.safetensors: damaged: its header does not fit in 16 bytes; restore it"], file("model/model.safetensors", struct.pack("<Q", 1 << 40) + b"x" * 8)),
    Case("shard missing", RUN, ["model-00002.safetensors: missing; restore it"], file("model/model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}')),
    # recorded batches
    Case("recorded run missing", "run recipe debug.train_only=nowhere --run-dir here", ["debug.train_only: ", "nowhere: no such run directory; name one whose batches are recorded"]),
    Case("recorded run without batches", "run recipe debug.rescore=model --run-dir here", ["debug.rescore: ", "model: not a run with recorded batches (run.yaml and batches/); name a run directory"]),
    Case("two modes", "check recipe debug.rollout_only=true debug.train_only=here", ["debug.train_only=here: debug.rollout_only is given too; keep one of them"]),
    # functions of the user
    Case("reward module missing", "run recipe rollout.reward.type=null rollout.reward.path=rewards.own --run-dir here", ["rollout.reward.path: no module rewards (rewards.own); mend the path, or put the module's folder on PYTHONPATH"]),
    Case("filter module missing", "run recipe rollout.filter_path=miles.rollout.filter.check --run-dir here", ["rollout.filter_path: no module miles.rollout.filter (miles.rollout.filter.check)"]),
    Case("generate path not a path", "run recipe rollout.generate_path=./own.py --run-dir here", ["rollout.generate_path: './own.py' is not an import path; write package.module.function"]),
    Case("model.build module missing", "run recipes/tiny model.build=nowhere.build --run-dir here", ["model.build: no module nowhere (nowhere.build)"]),
    Case("model.build is a module", "run recipes/tiny model.build=os.path --run-dir here", ["model.build: os.path is a module, not a function; write os.path.FUNCTION"]),
    Case("reward missing in its module", "check recipe rollout.reward.type=null rollout.reward.path=own_functions.riases", ["rollout.reward.path: own_functions has no function 'riases'; did you mean own_functions.raises?"], file("own_functions.py", (Path(__file__).parent / "own_functions.py").read_bytes())),
    Case("reward is a number of its module", "check recipe rollout.reward.type=null rollout.reward.path=own_functions.NOT_A_FUNCTION", ["rollout.reward.path: own_functions.NOT_A_FUNCTION is a number, not a function; give a function of own_functions"], file("own_functions.py", (Path(__file__).parent / "own_functions.py").read_bytes())),
    Case("model parallelism on fsdp", "check recipe train.parallel.tensor=4 train.num_gpus_per_node=2", ["train.parallel.tensor: TP 4 × PP 1 × CP 1 = 4 ranks for one copy of the model, but there are 1 node × 2 = 2 ranks; fsdp splits data only: set train.parallel.tensor=1"]),
    # addresses
    Case("host of another machine", "check recipe cluster.host=192.0.2.1", ["cluster.host: '192.0.2.1' can't be listened on here (Cannot assign requested address); give an address of this machine, or leave it out"]),
    Case("host that has no address", "run recipe cluster.host=no_such.invalid --run-dir here", ["cluster.host: 'no_such.invalid' can't be listened on here (", "give an address of this machine"]),
    Case("host that is empty", "check recipe cluster.host=", ["cluster.host"]),
    # the run directory
    Case("folder that is no run", RUN, ["here: not empty, and not a run; choose another --run-dir"], file("here/precious.txt", "mine")),
    Case("folder that is a file", RUN, ["here: is a file, so no run can live there; choose another --run-dir"], file("here", "mine")),
    Case("folder below a file", "run recipe --run-dir train.jsonl/run", ["train.jsonl: is a file, so no run can live there; choose another --run-dir"]),
    Case("folder that nobody may write", "run recipe --run-dir /sys/here", ["/sys/here: can't be made (", "choose another --run-dir"]),
    Case("run of another configuration", RUN, ["here: holds a run with another configuration (rollout.batch_size, rollout.over_sampling_batch_size, seed, train.global_batch_size); resume it with", "choose another --run-dir"], old_run("seed=99", "rollout.batch_size=8")),
    Case("another decay of the learning rate", "run recipe num_rollout=9 train.optimizer.lr_schedule=linear train.optimizer.lr_decay_steps=9 --run-dir here", ["train.optimizer.lr_decay_steps: 9 where the run has 5 would have given other learning rates to steps already done; leave it out (a run that is extended keeps its decay), or choose another --run-dir"], old_run("num_rollout=5", "train.optimizer.lr_schedule=linear")),
    Case("a run's flags of the wrong kind", "run here --num-rollout many", ["--num-rollout: expected a whole number, got 'many'"], old_run()),
    Case("a run's flags that make it another", "run here --num-rollout 9 --rollout-seed 7", ["here: holds a run with another configuration ("], old_run()),
    Case("run.yaml damaged", RUN, ["here/run.yaml:2: not YAML"], old_run(run_yaml="name: [own\nseed: 1\n")),
    Case("run.yaml damaged, resumed", "run here", ["here/run.yaml:1: seed: expected a whole number"], old_run(run_yaml="seed: many\n")),
    Case("resumed with what is no run", "run model", ["model: is a folder, not a recipe"]),
    Case("status of what is no run", "status model", ["model"]),
    Case("status of what is not there", "status nowhere --json", ["nowhere"]),
    Case("logs of what is no run", "logs model", ["model"]),
    Case("logs before any attempt", "logs here", ["here: no attempt has been made yet", "miles-submit run"], old_run()),
    Case("logs of an unknown component", "logs here referee", ["referee: attempt 1 has no such log; it has trainer"], both(old_run(), file("here/attempts/000001/logs/trainer.0.log", "hello\n"))),
    Case("report of what is no run", "report model", ["model"]),
    Case("report of what is not there", "report nowhere --json", ["nowhere"]),
    Case("lines of logs negative", "logs here -n -3", ["--lines", "greater than or equal to 0"], old_run()),
]


@pytest.fixture(scope="module")
def done(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Every chosen case, two at a time: what the command said, and the folder before and after."""
    top = tmp_path_factory.mktemp("refused")
    chosen = [item.callspec.params["case"] for item in request.session.items if getattr(item, "callspec", None) and "case" in item.callspec.params and item.path == request.path]

    folders, before = [top / f"{number:03d}" for number in range(len(chosen))], []
    for folder, case in zip(folders, chosen, strict=True):
        inputs.prepare(folder, tiny_model)
        case.make(folder)
        before.append(inputs.tree(folder))
    results = inputs.submit_all([(folder, case.command) for folder, case in zip(folders, chosen, strict=True)], AT_ONCE)
    return {case.name: (result, known, inputs.tree(folder)) for case, result, known, folder in zip(chosen, results, before, folders, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(case: Case, done) -> None:
    result, before, after = done[case.name]
    if case.command[0] == "check" and case.command[-1] == "--json":
        assert result.returncode == 78
        found = json.loads(result.stdout)
        assert not found["ok"]
        assert [finding["where"].endswith("train.jsonl:1") for finding in found["findings"] if finding["level"] == "error"] == [True]
        assert not result.stderr
    elif case.command[0] == "check" and not result.stderr:
        assert result.returncode == 78
        errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stdout
        assert all(part in errors[0] for part in case.parts)
    else:
        inputs.fault_line(result, case.parts)
    assert before == after


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_port_in_use(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    inputs.prepare(folder, tiny_model)
    old_run()(folder)
    before = inputs.tree(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for run_dir in ("here", "fresh"):
            done = inputs.submit(folder, f"run recipe cluster.port={port} --run-dir {run_dir}")
            inputs.fault_line(done, [f"cluster.port: 127.0.0.1:{port} can't be used (Address already in use); choose another, or 0 for a free one"])
    assert inputs.tree(folder) == before


def test_the_sound_run_is_sound(tiny_model: Path, tmp_path: Path) -> None:
    """What the cases change is what they are refused for."""
    inputs.prepare(tmp_path / "own", tiny_model)
    assert sorted(path.name for path in (tmp_path / "own/model").iterdir()) == sorted(MODEL)
    done = inputs.submit(tmp_path / "own", "check recipe")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.endswith("nothing is wrong\n")
