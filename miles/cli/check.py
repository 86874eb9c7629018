"""`miles-submit check`: one page about a run that has not started."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from miles.cli.inputs import findings as find
from miles.config.exits import OK, WRONG
from miles.config.schema import RunConfig, Source
from miles.plan.judge import Finding
from miles.plan.tier import guarantee

STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}


def check(config: RunConfig, as_json: bool) -> int:
    """Print what the run will do and what is wrong with it. Returns OK, or WRONG when there is an error."""
    findings = find(config)
    wrong = any(finding.level == "error" for finding in findings)
    if as_json:
        tier = guarantee(config)
        page = {
            "ok": not wrong,
            "summary": dict(summary(config)),
            "tier": {"name": tier.name, "promise": tier.promise, "why": tier.why},
            "findings": [vars(finding) for finding in findings],
            "config": config.model_dump(mode="json"),
        }
        print(json.dumps(page, indent=1, ensure_ascii=False))
    else:
        show(config, findings)
    return WRONG if wrong else OK


def summary(config: RunConfig) -> list[tuple[str, str]]:
    """What the run will do, a line each."""
    cluster, rollout, train, optimizer, warm, evaluation = config.cluster, config.rollout, config.train, config.train.optimizer, config.warm_start, config.eval
    debug = config.debug
    ranks = train.num_nodes * train.num_gpus_per_node
    samples = rollout.batch_size * rollout.n_samples_per_prompt
    engines = rollout.num_gpus // rollout.num_gpus_per_engine
    tier = guarantee(config)
    rows = [
        ("run", f"{config.name}, seed {config.seed}"),
        *_mode(config),
        ("where", f"{cluster.executor}, {cluster.placement}, {cluster.device}, threads {cluster.threads}"),
        ("model", f"{_model(config)}, {config.model.dtype}"),
        ("prompts", _source(config.data)),
    ]
    if warm.steps:
        rows.append(("warm start", f"{warm.steps} steps × {warm.batch_size} samples, lr {warm.optimizer.lr:g}, {_source(warm)}"))
    rows += [
        ("rollout", f"{config.num_rollout} × ({rollout.batch_size} prompts × {rollout.n_samples_per_prompt} samples = {samples}), at most {rollout.sampling.max_response_len} tokens a response"),
        ("engines", f"{engines} {rollout.engine}, {_count(rollout.num_gpus_per_engine, 'rank')} each"),
        ("reward", rollout.reward.type or rollout.reward.path or "?"),
        ("training", f"{train.backend}, {train.num_nodes} × {train.num_gpus_per_node} = {_count(ranks, 'rank')}, {train.num_steps_per_rollout} × {train.global_batch_size} samples a rollout"),
        ("optimizer", f"AdamW, lr {optimizer.lr:g} {optimizer.lr_schedule}, {_count(config.num_rollout * (train.num_steps_per_rollout or 1), 'step')}"),
        ("algorithm", _algorithm(config)),
        ("evaluation", f"every {evaluation.interval} rollouts, {_source(evaluation)}" if evaluation.interval else "never"),
        ("guarantee", f"{tier.name}: {tier.promise} ({tier.why})"),
    ]
    left_out: tuple[str, ...] = ()
    if debug.recorded:
        left_out = ("prompts", "rollout", "engines", "reward", "evaluation", *(("warm start", "training", "optimizer", "algorithm") if debug.rescore else ()))
    elif debug.rollout_only:
        left_out = ("training", "optimizer", "algorithm")
    return [row for row in rows if row[0] not in left_out]


def _mode(config: RunConfig) -> list[tuple[str, str]]:
    """What a run in part does, and where it stops."""
    debug, said = config.debug, []
    if debug.rollout_only:
        said.append("rollout only: all batches by the weights at the start, nothing is trained")
    if debug.train_only:
        said.append(f"train only: on the recorded batches of {debug.train_only}, no engine is started")
    if debug.rescore:
        which = f"steps {', '.join(map(str, debug.rescore_steps))}" if debug.rescore_steps else "all steps"
        said.append(f"re-score: the recorded batches of {debug.rescore}, {which}, nothing is trained")
    if config.last_step < config.total_steps:
        said.append(f"stops after step {config.last_step} of {config.total_steps}")
    if config.profile.steps:
        said.append(f"traces steps {config.profile.steps[0]} to {config.profile.steps[1]}")
    return [("mode", "; ".join(said))] if said else []


def show(config: RunConfig, findings: list[Finding]) -> None:
    """The page; colours and wrapping on a terminal, plain lines otherwise."""
    out = Console(highlight=False, markup=False, emoji=False)
    if out.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, text in summary(config):
            table.add_row(name, text)
        out.print(table)
    else:
        out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        for name, text in summary(config):
            out.print(f"{name:<12}{text}")
    for finding in findings:
        out.print(f"{finding.level}: {finding}", style=STYLE[finding.level])
    errors, warnings = (sum(finding.level == level for finding in findings) for level in ("error", "warning"))
    out.print(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}" if errors or warnings else "nothing is wrong")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _model(config: RunConfig) -> str:
    model = config.model
    return model.name or model.hf_checkpoint or (f"made at the start by {model.build}" if model.build else "?")


def _source(source: Source) -> str:
    return source.prompt_data or (f"reasoning-gym {source.reasoning_gym}" if source.reasoning_gym else "no prompts")


def _algorithm(config: RunConfig) -> str:
    algorithm = config.algorithm
    parts = [algorithm.advantage_estimator, f"clip {algorithm.eps_clip:g}/{algorithm.eps_clip_high or algorithm.eps_clip:g}"]
    if algorithm.use_kl_loss:
        parts.append(f"KL {algorithm.kl_loss_type} × {algorithm.kl_loss_coef:g}")
    if algorithm.entropy_coef:
        parts.append(f"entropy × {algorithm.entropy_coef:g}")
    if algorithm.use_tis:
        parts.append(f"TIS {algorithm.tis_clip_low:g} to {algorithm.tis_clip:g}")
    return ", ".join(parts)
