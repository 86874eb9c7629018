"""SGLang's server arguments that follow from a run's configuration: set by the run, refused at another value in rollout.sglang."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import RunConfig


@dataclass(frozen=True)
class Followed:
    """The value that an argument has in this run, and how to change it."""

    value: object
    mend: str


def followed(config: RunConfig) -> dict[str, Followed]:
    """Arguments by SGLang's names. Those that need more than the configuration (addresses, folders) are sglang_owned in options.yaml."""
    stops = config.rollout.sampling.stop or config.eval.sampling.stop
    return {
        "dtype": Followed(config.model.dtype, "set model.dtype"),
        "max_running_requests": Followed(config.rollout.max_running_requests, "set rollout.max_running_requests"),
        "enable_return_routed_experts": Followed(config.rollout.return_routed_experts, "set rollout.return_routed_experts"),
        "skip_tokenizer_init": Followed(not stops, "leave it out (rollout.sampling.stop decides whether SGLang needs a tokenizer)"),
        "enable_metrics": Followed(True, "leave it out"),
        "skip_server_warmup": Followed(True, "leave it out"),
    }
