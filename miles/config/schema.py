"""The typed run configuration: every field with its unit and meaning. The descriptions are the help text.

A run is one RunConfig. Sections answer one question each: where (cluster), what (model), from which prompts (data),
how samples are made (rollout), how they are weighed (algorithm), how weights move (train), and what is kept (checkpoint).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from miles.config.allocation import Groups, Slurm
from miles.config.raw_options import check_name
from miles.config.section import Section
from miles.config.trackers import Trackers
from miles.config.units import bytes_of

Device = Literal["cpu", "cuda"]
Placement = Literal["colocate", "split", "het", "jobs"]


class Cluster(Section):
    """Where the run lives: executor, devices, addresses, threads."""

    executor: Literal["local", "slurm"] = Field("local", description="who starts the processes")
    placement: Placement = Field("colocate", description="how trainer and engines share the allocation")
    device: Device = Field("cpu", description="device of trainer ranks and embedded engines")
    gpus_per_node: int = Field(8, ge=1, description="accelerators of one node (device cpu: processes of one node); a group may say otherwise")
    gpu_memory: float | None = Field(None, gt=0, description="memory of one accelerator [GiB]; known, it is held against the estimate")
    threads: int = Field(1, ge=1, description="threads of every process; pinned and recorded, since bits depend on it")
    host: str = Field("auto", description="address that servers bind to; auto: loopback on one machine, under Slurm each node's own address")
    port: int = Field(0, ge=0, le=65535, description="TCP port of the rollout service; 0 picks a free one")
    restarts: int = Field(3, ge=0, description="new attempts in a row after a process was killed or lost (exit code 75); other failures end the run")
    stop_seconds: float = Field(60.0, gt=0, description="seconds between a stop request and the kill")
    hang_seconds: float = Field(1800.0, gt=0, description="seconds without progress of any trainer rank after which stacks are dumped and the attempt is given up")
    slurm: Slurm = Field(default_factory=lambda: Slurm(), description="how jobs are submitted, signalled and requeued")
    groups: Groups = Field(default_factory=lambda: Groups(), description="what is asked of Slurm for each group of nodes")


class Shape(Section):
    """Dimensions of a model, for arithmetic before any file is read. The checkpoint's own config.json wins where it exists."""

    family: str | None = Field(None, description="transformers' model_type")
    layers: int = Field(ge=1, description="layers, without multi-token prediction [layers]")
    hidden: int = Field(ge=1, description="width of the residual stream")
    ffn: int = Field(ge=1, description="inner width of a dense MLP")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads; default: heads")
    head_dim: int | None = Field(None, ge=1, description="width of a head; default: hidden / heads")
    vocab: int = Field(ge=1, description="rows of the embedding [tokens]")
    tied: bool = Field(False, description="the output layer is the embedding")
    qkv_bias: bool = Field(False, description="query, key and value have biases")
    qk_norm: bool = Field(False, description="query and key heads are normalised")
    experts: int = Field(0, ge=0, description="routed experts of a MoE layer; 0: dense")
    top_k: int = Field(0, ge=0, description="routed experts of a token")
    expert_ffn: int = Field(0, ge=0, description="inner width of a routed expert")
    shared_ffn: int = Field(0, ge=0, description="inner width of the shared experts together")
    dense_layers: int = Field(0, ge=0, description="layers before the first MoE layer [layers]")
    moe_every: int = Field(1, ge=1, description="of so many layers after the dense ones, the last has experts [layers]")
    q_lora: int = Field(0, ge=0, description="rank of the query's compression (multi-head latent attention)")
    kv_lora: int = Field(0, ge=0, description="rank of the key-value compression; 0: no latent attention")
    qk_nope: int = Field(0, ge=0, description="width of a query head without position")
    qk_rope: int = Field(0, ge=0, description="width of a query head with position")
    v_head: int = Field(0, ge=0, description="width of a value head under latent attention")

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return (self.layers - self.dense_layers) // self.moe_every if self.experts else 0


class Model(Section):
    """What is trained."""

    name: str | None = Field(None, description="a name from configs/models, for memory and layout arithmetic")
    hf_checkpoint: str | None = Field(None, description="Hugging Face folder with config, weights and tokenizer")
    build: str | None = Field(None, description="import path of a function(folder, seed) that makes hf_checkpoint when it is missing")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the forward pass in training and rollout")
    shape: Shape | None = Field(None, description="dimensions; default: from hf_checkpoint, else from configs/models by name")
    mtp_num_layers: int | None = Field(None, ge=0, description="multi-token-prediction layers [layers]")


class Source(Section):
    """Prompts from a file or from reasoning-gym."""

    prompt_data: str | None = Field(None, description="JSONL or Parquet file of prompts; path@[a:b] takes rows a to b")
    reasoning_gym: str | None = Field(None, description="name of a reasoning-gym dataset, in place of a file")
    reasoning_gym_config: dict[str, Any] = Field(default_factory=dict, description="its configuration (seed and size included)")
    input_key: str = Field("input", description="key of the prompt: text, or a list of chat messages")
    label_key: str | None = Field(None, description="key of the reference answer")
    metadata_key: str = Field("metadata", description="key of an object that is passed to reward functions")
    apply_chat_template: bool = Field(False, description="turn the prompt into text by the tokenizer's chat template")
    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of the chat template")
    shuffle: bool = Field(False, description="a new order each epoch of the data, from the seed")
    exclude: list[str] = Field(default_factory=list, description="names of sources whose prompts must not occur here (warm_start, data, eval)")


class Data(Source):
    """Prompts of reinforcement learning."""

    shuffle_seed: int = Field(42, ge=0, lt=2**63, description="seed of the order of prompts")


class Reward(Section):
    """How a response is scored."""

    type: str | None = Field(None, description="exact_match, math, reasoning_gym, remote_rm; prefix boxed_ extracts \\boxed{} first")
    path: str | None = Field(None, description="import path of a reward function, in place of a type")
    url: str | None = Field(None, description="address that remote_rm posts to")
    key: str | None = Field(None, description="which entry is the reward when a function returns an object")
    timeout: float = Field(60.0, gt=0, description="seconds that one scoring may take")


class Sampling(Section):
    """Sampling of responses, as SGLang names it."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus probability")
    top_k: int = Field(-1, ge=-1, description="most likely tokens kept; -1 keeps all")
    max_prompt_len: int | None = Field(None, ge=1, description="longest prompt allowed [tokens]")
    max_response_len: int = Field(1024, ge=1, description="longest response [tokens]")
    max_context_len: int | None = Field(None, ge=2, description="longest prompt and response together [tokens]")
    stop: list[str] = Field(default_factory=list, description="texts that end a response")
    stop_token_ids: list[int] = Field(default_factory=list, description="token ids that end a response")


class Rollout(Section):
    """How samples are made."""

    engine: Literal["embedded", "sglang"] = Field("embedded", description="inference server")
    num_gpus: int = Field(1, ge=1, description="accelerators of all engines together (device cpu: engine processes)")
    num_gpus_per_engine: int = Field(1, ge=1, description="accelerators of one engine (its tensor parallelism)")
    batch_size: int = Field(32, ge=1, description="prompts of one rollout [prompts]")
    n_samples_per_prompt: int = Field(8, ge=1, description="responses of one prompt [samples]")
    over_sampling_batch_size: int | None = Field(None, ge=1, description="prompts asked for at a time when a filter drops some")
    sampling: Sampling = Field(default_factory=lambda: Sampling(), description="sampling of responses")
    max_concurrency: int = Field(64, ge=1, description="requests in flight at one engine")
    batch_invariant: bool = Field(True, description="log-probs have the same bits whatever else is in the batch, as the trainer recomputes them")
    max_running_requests: int = Field(32, ge=1, description="sequences that one engine decodes together")
    kv_cache_tokens: int = Field(65536, ge=1, description="size of the embedded engine's key-value cache [tokens]")
    return_routed_experts: bool = Field(False, description="record the experts of every token")
    generate_path: str | None = Field(None, description="import path of a generate function, in place of the single-turn one")
    reward: Reward = Field(default_factory=lambda: Reward(), description="scoring")
    filter_path: str | None = Field(None, description="import path of a filter of groups (dynamic sampling)")
    sglang: dict[str, Any] = Field(default_factory=dict, description="SGLang's own server arguments, checked against the pinned version")


class Optimizer(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, ge=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay after the warm-up")
    lr_warmup_steps: int = Field(0, ge=0, description="linear warm-up [optimizer steps]")
    lr_decay_steps: int | None = Field(None, ge=1, description="length of the decay [optimizer steps]; counted after the warm-up; default: to the end of the phase")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; not on norms and biases")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="largest global norm of the gradient; 0 does not clip")


class Parallel(Section):
    """How the model is split over ranks, as Megatron names it."""

    tensor: int = Field(1, ge=1, description="tensor parallelism [ranks]")
    pipeline: int = Field(1, ge=1, description="pipeline parallelism [ranks]")
    context: int = Field(1, ge=1, description="context parallelism [ranks]")
    expert: int = Field(1, ge=1, description="expert parallelism [ranks]")
    expert_tensor: int | None = Field(None, ge=1, description="tensor parallelism inside an expert [ranks]; default: tensor")

    @property
    def inside_expert(self) -> int:
        """Tensor parallelism inside an expert, its default put in."""
        return self.expert_tensor or self.tensor

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the dense part: TP × PP × CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of the experts: ETP × EP × PP."""
        return self.inside_expert * self.expert * self.pipeline


class Train(Section):
    """How weights move."""

    backend: Literal["fsdp", "megatron"] = Field("fsdp", description="training backend")
    num_nodes: int = Field(1, ge=1, description="nodes of the trainer")
    num_gpus_per_node: int = Field(1, ge=1, description="trainer ranks on each node")
    parallel: Parallel = Field(default_factory=lambda: Parallel(), description="layout")
    global_batch_size: int | None = Field(None, ge=1, description="samples of one optimizer step; default: all of a rollout / num_steps_per_rollout")
    num_steps_per_rollout: int | None = Field(None, ge=1, description="optimizer steps on one rollout; default: 1, or what global_batch_size gives")
    micro_batch_size: int = Field(1, ge=1, description="sequences of one micro-batch when use_dynamic_batch_size is off")
    use_dynamic_batch_size: bool = Field(True, description="pack sequences into micro-batches of at most max_tokens_per_gpu")
    max_tokens_per_gpu: int = Field(8192, ge=1, description="token budget of one micro-batch [tokens]")
    balance_data: bool = Field(True, description="even out the tokens of the ranks (off: round robin)")
    update_weight_transport: Literal["disk", "tensor"] = Field(
        "disk", description="how new weights reach the engines: a folder that both see, or tensors over the engine's socket (embedded engine)"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer(), description="optimizer")
    enable_mtp_training: bool = Field(False, description="train the multi-token-prediction layers on the run's own tokens")
    mtp_loss_scaling_factor: float = Field(0.2, ge=0, description="weight of their loss")


class Algorithm(Section):
    """How samples are weighed. Formulas: docs/numerics.md."""

    advantage_estimator: Literal["grpo", "gspo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "cispo"] = Field("grpo", description="advantage estimator")
    grpo_std_normalization: bool = Field(True, description="divide by the group's standard deviation (off: Dr.GRPO)")
    rewards_normalization: bool = Field(True, description="subtract the group's mean reward")
    eps_clip: float = Field(0.2, ge=0, description="lower clip of the ratio, as an offset from 1")
    eps_clip_high: float | None = Field(None, ge=0, description="upper clip of the ratio, as an offset from 1; default: eps_clip")
    eps_clip_c: float | None = Field(None, gt=1, description="dual clip for negative advantages")
    use_kl_loss: bool = Field(False, description="add a KL loss against the reference model")
    kl_loss_coef: float = Field(0.0, ge=0, description="weight of the KL loss (0: watch only)")
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = Field("k1", description="estimator of the KL")
    entropy_coef: float = Field(0.0, description="weight of the entropy bonus")
    calculate_per_token_loss: bool = Field(False, description="mean over the tokens of the global batch (off: mean over samples of the mean over tokens)")
    use_tis: bool = Field(False, description="weigh tokens by the truncated ratio of trainer to engine probability")
    tis_clip: float = Field(2.0, gt=0, description="upper bound of that weight, absolute")
    tis_clip_low: float = Field(0.0, ge=0, description="lower bound of that weight, absolute")


class WarmStart(Source):
    """Supervised warm start before reinforcement learning (label_key is the response to learn)."""

    response_path: str | None = Field(None, description="import path of a function(prompt, label, metadata) that returns the responses to learn, an example each; default: the label")
    steps: int = Field(0, ge=0, description="optimizer steps; 0 skips the warm start")
    batch_size: int = Field(64, ge=1, description="examples of one step [samples]")
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer(lr=1e-4), description="its optimizer (states are not carried over)")


class Evaluation(Source):
    """Evaluation on its own prompts."""

    interval: int | None = Field(None, ge=1, description="every so many rollouts; default: never")
    before_train: bool = Field(True, description="also before the first rollout")
    n_samples_per_prompt: int = Field(1, ge=1, description="responses of one prompt [samples]")
    sampling: Sampling = Field(default_factory=lambda: Sampling(temperature=0.0), description="sampling; greedy by default")
    reward: Reward | None = Field(None, description="scoring; default: the rollout's")


class Checkpoint(Section):
    """What is kept."""

    save_interval: int | None = Field(None, ge=1, description="every so many steps; the last step is always saved")
    retain: int = Field(2, ge=1, description="complete checkpoints kept (the newest ones)")
    load: str | None = Field(None, description="checkpoint folder to start from (weights only)")
    ref_load: str | None = Field(None, description="Hugging Face folder of the reference model; default: the weights before the first rollout")
    save_hf: bool = Field(True, description="export the final weights as a Hugging Face folder")
    retain_batches: int | None = Field(None, ge=1, description="batches kept on disk (the newest ones); default: all")
    retain_batches_days: float | None = Field(None, gt=0, description="age up to which batches and evaluations are kept [days]; default: any")
    retain_batches_bytes: int | None = Field(None, ge=1, description="room for batches, train records and evaluations together [bytes], or text such as 200GB or 1.5TiB; routes go first; default: no limit")

    @field_validator("retain_batches_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return bytes_of(value) if isinstance(value, str) else value


class Debug(Section):
    """A part of a run alone, on the files that every run leaves (docs/debugging.md)."""

    rollout_only: bool = Field(False, description="make and seal the batches of all steps with the weights at the start; nothing is trained")
    train_only: str | None = Field(None, description="run directory whose recorded batches are trained on; no engine is started")
    reassign: bool = Field(False, description="with train_only: divide the recorded batches anew, for another number of ranks or optimizer steps")
    rescore: str | None = Field(None, description="run directory whose recorded batches are scored with this run's weights; nothing is trained")
    rescore_steps: list[int] = Field(default_factory=list, description="which of its steps; empty: all that are recorded [steps]")
    stop_after: int | None = Field(None, ge=1, description="save a checkpoint after this step, warm start counted in, and end there [steps]")

    @property
    def trains(self) -> bool:
        """Whether weights move."""
        return not self.rollout_only and self.rescore is None

    @property
    def recorded(self) -> str | None:
        """The run directory whose batches are read in place of new ones."""
        return self.train_only or self.rescore


class Profile(Section):
    """Traces of chosen training steps."""

    steps: list[int] = Field(default_factory=list, description="first and last step that is traced by torch's profiler, one file a trainer rank; empty: none [steps]")
    record_shapes: bool = Field(False, description="with the shapes of every operation's inputs")
    with_stack: bool = Field(False, description="with the Python lines that called it; slow")


class RunConfig(Section):
    """One run."""

    name: str = Field("run", description="name of the run, shown in the report")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of everything that is drawn: weights made on the spot, order, sampling")
    num_rollout: int = Field(1, ge=0, description="rollouts (steps of reinforcement learning)")
    cluster: Cluster = Field(default_factory=lambda: Cluster())
    model: Model = Field(default_factory=lambda: Model())
    data: Data = Field(default_factory=lambda: Data())
    rollout: Rollout = Field(default_factory=lambda: Rollout())
    algorithm: Algorithm = Field(default_factory=lambda: Algorithm())
    train: Train = Field(default_factory=lambda: Train())
    warm_start: WarmStart = Field(default_factory=lambda: WarmStart())
    eval: Evaluation = Field(default_factory=lambda: Evaluation())
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint())
    debug: Debug = Field(default_factory=lambda: Debug())
    profile: Profile = Field(default_factory=lambda: Profile())
    trackers: Trackers = Field(default_factory=lambda: Trackers())

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        check_name(value)
        return value

    @property
    def total_steps(self) -> int:
        """Warm-start steps and rollouts together."""
        return self.warm_start.steps + self.num_rollout

    @property
    def last_step(self) -> int:
        """The step after which an attempt ends: the run's last, or the one that debug.stop_after names."""
        return min(self.total_steps, self.debug.stop_after or self.total_steps)
