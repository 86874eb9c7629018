"""The fsdp backend: a transformers model sharded over the ranks by PyTorch FSDP2, AdamW, packed micro-batches.

The log-probs of a training forward are computed once. With one optimizer step on a rollout they are, detached, the old log-probs
as well; with several, a pass before the first step gives those. Logits are made only where a token is predicted.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from miles.algorithms.reduction import weighted_sum
from miles.config.exits import UserError
from miles.config.schema import Optimizer, RunConfig
from miles.data.store.checkpoint import read_state
from miles.data.store.epoch import Fence
from miles.data.store.files import make_folder, sync_folder
from miles.data.store.manifest import Manifest
from miles.models.forward import PackedContext, forward
from miles.models.hf_folder import named_tensors, save_hf, tokenizer_files, weight_checksum
from miles.models.hf_names import to_hf_names
from miles.models.load import load_model
from miles.models.registry import family_of
from miles.precision.logprob import token_logprob
from miles.training import checkpoint, dcp
from miles.training.batch import Batch, Seen, open_batch
from miles.training.contract import Bucket, Phase, Role
from miles.training.distributed import Ranks, seed_everything
from miles.training.loss import StepSums, reinforcement_loss, supervised_loss, token_weight
from miles.training.lr_schedule import learning_rate
from miles.training.misses import Misses, misses
from miles.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from miles.training.packing import PackedBatch, unpack
from miles.training.record import write_record
from miles.training.rng import load_rng, save_rng

# Logits are a view of the model's output; nothing here changes them in place, which is what torch warns of.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FsdpTrainer:
    """Trainer (contract.py) over FSDP2. All methods are collective."""

    def __init__(self, config: RunConfig, model_folder: Path, ranks: Ranks) -> None:
        """config: the whole run's; model_folder: Hugging Face folder of the initial weights; ranks: of start_ranks."""
        self.config = config
        self.ranks = ranks
        self.model_folder = Path(model_folder)
        self.dtype = DTYPES[config.model.dtype]
        self.model: Any = self._load(self.model_folder, trained=True)
        self.experts = _experts(self.model.config)
        self.reference: Any = None
        self.reference_folder: Path | None = None
        self.phase: Phase | None = None
        self.optimizer: torch.optim.AdamW | None = None
        self.phase_steps = 0
        self.parent: str | None = None

    # --- construction ----------------------------------------------------------------------------------------------------------

    def _load(self, folder: Path, *, trained: bool) -> Any:
        """A model from a Hugging Face folder, sharded over the ranks: master weights fp32, forward in the configured dtype."""
        on_cpu = self.ranks.device.type == "cpu"
        # Weights that train are fp32. On a CPU the fp32 kernels would stay under a model loaded as fp32, so bf16 is loaded as such.
        wanted = torch.float32 if trained and not on_cpu else self.dtype
        model = load_model(folder, device=self.ranks.device, dtype=wanted, batch_invariant=self.config.rollout.batch_invariant)
        if trained:
            model.float()
        if trained and self.config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train(trained)
        model.requires_grad_(trained)
        mixed = self.dtype != torch.float32 and trained
        if self.ranks.world_size == 1 and not mixed:
            return model  # nothing to share: FSDP would copy every weight and gradient twice a step
        options: dict[str, Any] = {"mesh": self.ranks.mesh}
        if mixed:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
        for module in model.modules():
            # Gradients are summed over ranks: the loss carries the global denominator already.
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def start_phase(self, phase: Phase) -> None:
        """Begin a phase with a fresh optimizer and schedule; within the phase nothing happens."""
        if phase == self.phase:
            return
        self.phase, self.phase_steps = phase, 0
        self.optimizer = None  # frees the old states before new ones are made
        self.optimizer = make_optimizer(self.model.named_parameters(), self._optimizer_config())

    def load_reference(self, folder: Path) -> None:
        """Load the frozen reference model. A checkpoint remembers the folder, so that a resumed run has the same reference."""
        self.reference = None
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"checkpoint.ref_load: {folder} is not a Hugging Face folder; name one with config.json and weights")
        self.reference = self._load(Path(folder), trained=False)
        self.reference_folder = Path(folder)

    # --- batches ----------------------------------------------------------------------------------------------------------------

    def open_batch(self, manifest: Manifest, folder: Path) -> Batch:
        """Open a sealed batch; with several optimizer steps on it, compute the log-probs before the first."""
        assert manifest.kind == self.phase, f"a {manifest.kind} batch in phase {self.phase}: call start_phase first"
        batch = open_batch(manifest, folder, self.config.algorithm, self.ranks, self.experts)
        if batch.steps > 1 and manifest.kind == "rollout":
            batch.old = [self._passes(self.model, batch, step, routes=True) for step in range(batch.steps)]
        return batch

    def log_probs(self, batch: Batch, step: int, role: Role) -> list[Tensor]:
        """Log-probs f32 [R] of this rank's micro-batches in an optimizer step, without gradient."""
        model = self.model if role == "actor" else self.reference
        assert model is not None, "load_reference comes before a KL loss"
        return [logprob for logprob, _ in self._passes(model, batch, step)]

    @torch.no_grad()
    def _passes(self, model: Any, batch: Batch, step: int, routes: bool = False) -> list[tuple[Tensor, Misses | None]]:
        """Of each of this rank's micro-batches in an optimizer step: log-probs f32 [R], and with routes how they differ from the rollout's."""
        found = []
        for packed in batch.packed(step, routes):
            logprob = self._forward(model, packed, batch.temperature)[0]
            found.append((logprob, _misses(batch, packed) if routes else None))
        # The root stays gathered after a forward without backward; gathered weights would go stale at the next optimizer step.
        if isinstance(model, FSDPModule):
            model.reshard()
        return found

    def _forward(self, model: Any, packed: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-prob, entropy) f32 [R] of the predicted tokens; logits are made for their rows alone."""
        context = PackedContext(cu_seqlens=packed.cu_seqlens, rerouted=packed.rerouted)
        logits = forward(model, packed.token_id, packed.position_id, context, packed.row)
        return token_logprob(logits, packed.target, temperature)

    def train_step(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step; public metrics. Raises Diverged before anything moved when the gradient is not finite."""
        assert self.optimizer is not None, "start_phase comes first"
        reference = None
        if self.phase == "rollout" and self.config.algorithm.use_kl_loss:
            reference = self.log_probs(batch, step, "reference")
        sums = StepSums(self.ranks.device)
        kept: list[Seen] = []
        self.optimizer.zero_grad(set_to_none=True)
        whole = batch.whole(step)  # collective, and it reads, too: before the thread that reads ahead
        for number, packed in enumerate(batch.packed(step, routes=not batch.old)):
            logprob, entropy = self._forward(self.model, packed, batch.temperature)
            old = batch.old[step][number][0] if batch.old else logprob.detach()
            values = {"train_logprob": old, "entropy": entropy.detach()}
            if self.phase == "sft":
                loss = supervised_loss(packed, logprob, entropy, whole, sums)
            else:
                ref = reference[number] if reference is not None else None
                loss, weight = reinforcement_loss(packed, logprob, entropy, old, ref, whole, self.config.algorithm, sums)
                sums.add_mismatch(old, packed.rollout_logprob, packed.mask)
                values["advantage"] = packed.advantage[packed.sequence]
                values |= {name: value for name, value in (("ref_logprob", ref), ("weight", weight)) if value is not None}
            loss.backward()
            kept.append(_seen(packed, values, batch.old[step][number][1] if batch.old else _misses(batch, packed)))
        metrics = sums.finish(self.ranks)
        metrics["train/grad_norm"] = clip_gradients(self.model.parameters(), self._optimizer_config().clip_grad, self.ranks)
        rate = learning_rate(self._optimizer_config(), self.phase_steps, self._phase_length())
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.phase_steps += 1
        batch.kept[step] = kept
        return metrics | {"train/lr-pg_0": rate}

    @torch.no_grad()
    def score(self, batch: Batch, step: int) -> dict[str, float]:
        """Log-probs and entropies of an optimizer step's micro-batches under the present weights, kept for the record; public metrics."""
        sums = StepSums(self.ranks.device)
        kept: list[Seen] = []
        whole = batch.whole(step)  # as in train_step
        for packed in batch.packed(step, routes=True):
            logprob, entropy = self._forward(self.model, packed, batch.temperature)
            values = {"train_logprob": logprob, "entropy": entropy}
            if batch.manifest.kind == "sft":
                supervised_loss(packed, logprob, entropy, whole, sums)
            else:
                weight = token_weight(packed, self.config.algorithm.calculate_per_token_loss, whole)
                sums.add(entropy_loss=weighted_sum(entropy, packed.mask, weight))
                sums.add_mismatch(logprob, packed.rollout_logprob, packed.mask)
                values["advantage"] = packed.advantage[packed.sequence]
            kept.append(_seen(packed, values, _misses(batch, packed)))
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        batch.kept[step] = kept
        return sums.finish(self.ranks)

    def close_batch(self, batch: Batch, folder: Path, fence: Fence | None = None) -> None:
        """Write what training saw (train/step_…/node_0000.h5) and close the shards."""
        write_record(folder, batch, self._attributes(batch), fence)
        batch.close()
        batch.kept.clear()

    # --- weights ----------------------------------------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) in the forward's dtype, on the CPU; one tensor is gathered at a time.

        Collective: every rank iterates to the end, and only rank 0 may use the values.
        """
        for name, tensor in named_tensors(self.model):
            full = tensor.detach()
            full = full.full_tensor() if isinstance(full, DTensor) else full
            yield from to_hf_names([(name, full.to(self.dtype).cpu())])

    def export_weights(self, bucket_bytes: int) -> Iterator[Bucket]:
        """named_weights in buckets of about bucket_bytes; ranks but the first get empty buckets, as many of them."""
        bucket: Bucket = []
        size = 0
        for name, tensor in self.named_weights():
            if size and size + tensor.nbytes > bucket_bytes:
                yield bucket if self.ranks.rank == 0 else []
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if size:
            yield bucket if self.ranks.rank == 0 else []

    def weight_checksum(self) -> str:
        """Checksum of the exported weights, equal on all ranks."""
        found = None
        if self.ranks.rank == 0:
            found = weight_checksum(self.named_weights())
        else:
            _drain(self.named_weights())
        return str(self.ranks.broadcast_json(found))

    def export_hf(self, folder: Path, fence: Fence | None = None) -> None:
        """Write a Hugging Face folder with the present weights: whole or not at all. Raises Fenced when a newer attempt exists."""
        if self.ranks.rank == 0:
            draft = (make_folder(folder.parent) if fence is None else fence.staging) / f".{folder.name}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            self.write_hf(draft, self.named_weights())
            if fence is not None:
                fence.replace_folder(draft, folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)
                sync_folder(folder.parent)
        else:
            _drain(self.named_weights())
        self.ranks.barrier()

    def write_hf(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write these tensors with this model's config and tokenizer as a Hugging Face folder. One rank's business."""
        save_hf(folder, self.model.config, tokenizer_files(self.model_folder), tensors)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def save(self, checkpoints: Path, step: int, progress: dict[str, Any], fence: Fence | None = None) -> Path:
        """Save as step_NNNNNN, then delete what retention does not keep. `step`: steps that are done. Returns the folder."""
        state = {
            "step": step,
            "phase": self.phase,
            "phase_steps": self.phase_steps,
            "progress": progress,
            "weight_checksum": self.weight_checksum(),
            "parent": self.parent,
            "epoch": None if fence is None else fence.epoch,
            "config_hash": config_hash(self.config),
            "world_size": self.ranks.world_size,
            "threads": torch.get_num_threads(),
            "reference": None if self.reference_folder is None else _inside(self.reference_folder, checkpoints.parent),
        }

        def write(folder: Path) -> None:
            dcp.save_tensors(folder / "model", dict(self.model.named_parameters()))
            if self.optimizer is not None:
                dcp.save_tensors(folder / "optimizer", self._optimizer_tensors())
            (folder / "rng").mkdir(exist_ok=True)
            save_rng(_rng_file(folder, self.ranks.rank))

        path = checkpoint.write_checkpoint(checkpoints, step, self.ranks, write, state, fence)
        self.parent = path.name
        if self.ranks.rank == 0:
            checkpoint.retain(checkpoints, self.config.checkpoint.retain, written=path, fence=fence)
        return path

    def load(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint that newest_good found (its files are not read again); returns the progress saved with it.

        Raises UserError when the weights that are now in the model are not those that were saved.

        Any number of ranks may have written it. Generators of ranks that were not there are seeded anew.
        """
        folder = Path(folder)
        state = self.load_weights(folder)
        self.phase, self.optimizer = None, None
        if state["phase"] is not None:
            self.start_phase(state["phase"])
            dcp.load_tensors(folder / "optimizer", self._optimizer_tensors())
        self.phase_steps = int(state["phase_steps"])
        if state["reference"] is not None:
            self.load_reference(folder.parents[1] / state["reference"])
        rng = _rng_file(folder, self.ranks.rank)
        if rng.exists():
            load_rng(rng)
        else:
            seed_everything(self.config.seed + int(state["step"]), self.ranks.rank)
        self.parent = folder.name
        return dict(state["progress"])

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint and nothing else; returns its state. Raises UserError where they are not those that were saved."""
        state = read_state(folder)
        dcp.load_tensors(folder / "model", {name: parameter.detach() for name, parameter in self.model.named_parameters()})
        found = self.weight_checksum()
        if found != state["weight_checksum"]:
            raise UserError(
                f"{folder}: its weights have checksum {found}, its state.json says {state['weight_checksum']}; "
                "restore the folder, or remove it to go on from the checkpoint before"
            )
        return state

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        assert self.optimizer is not None, "in a phase"
        tensors = {}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}.{name}"] = value
        return tensors

    # --- small things -----------------------------------------------------------------------------------------------------------

    def _optimizer_config(self) -> Optimizer:
        return self.config.warm_start.optimizer if self.phase == "sft" else self.config.train.optimizer

    def _phase_length(self) -> int:
        """Optimizer steps of the whole phase."""
        if self.phase == "sft":
            return self.config.warm_start.steps
        return self.config.num_rollout * steps_per_rollout(self.config)

    def _attributes(self, batch: Batch) -> dict[str, Any]:
        return {
            "backend": "fsdp",
            "kind": batch.manifest.kind,
            "step": batch.manifest.step,
            "weight_checksum": batch.manifest.policy.weight_checksum,
            "node": self.ranks.node,
            "world_size": self.ranks.world_size,
            "device": self.ranks.device.type,
            "dtype": self.config.model.dtype,
            "batch_invariant": self.config.rollout.batch_invariant,
            "threads": torch.get_num_threads(),
            "temperature": batch.temperature,
            "torch": torch.__version__,
        }


def steps_per_rollout(config: RunConfig) -> int:
    """Optimizer steps on one rollout, as the configuration says it one way or the other."""
    if config.train.num_steps_per_rollout is not None:
        return config.train.num_steps_per_rollout
    if config.train.global_batch_size is not None:
        return max(config.rollout.batch_size * config.rollout.n_samples_per_prompt // config.train.global_batch_size, 1)
    return 1


def config_hash(config: RunConfig) -> str:
    """xxh3_64 of the resolved configuration [hex]."""
    return xxhash.xxh3_64(config.model_dump_json().encode()).hexdigest()


def _experts(config: Any) -> tuple[int, int] | None:
    """(layers, experts of a token) of a mixture of experts."""
    return (config.num_hidden_layers, config.num_experts_per_tok) if family_of(config).experts else None


def _misses(batch: Batch, packed: PackedBatch) -> Misses | None:
    return misses(packed, batch.layers) if batch.layers else None


def _seen(packed: PackedBatch, values: dict[str, Tensor], routed: Misses | None) -> Seen:
    """Values of predicted tokens spread over all tokens, NaN elsewhere."""
    columns = {name: unpack(packed, value.float(), float("nan")) for name, value in values.items()}
    columns["used"] = unpack(packed, packed.mask.to(torch.uint8), 0)
    columns.setdefault("advantage", np.full(len(columns["used"]), np.nan, np.float32))
    if routed is None:
        return Seen(packed.shard, packed.shard_row, packed.lengths, columns)
    return Seen(packed.shard, packed.shard_row, packed.lengths, columns | {"route_miss": routed.token}, routed.layers)


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank_{rank:05d}.safetensors"


def _inside(folder: Path, run_dir: Path) -> str:
    """A folder relative to the run directory that holds it, so that the run can be moved; absolute elsewhere."""
    folder, run_dir = folder.absolute(), run_dir.absolute()
    return str(folder.relative_to(run_dir) if folder.is_relative_to(run_dir) else folder)


def _drain(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass
