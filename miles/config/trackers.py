"""Where metrics go besides metrics.jsonl, which always has them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from miles.config.section import Section


class Trackers(Section):
    """Experiment trackers, fed from metrics.jsonl by a process of their own: what fails there is a warning, never the run's end."""

    tensorboard: bool = Field(False, description="write TensorBoard's event files")
    tensorboard_folder: str = Field("tensorboard", description="their folder; a relative path lies in the run directory")
    wandb: bool = Field(False, description="send to Weights & Biases")
    wandb_project: str | None = Field(None, description="project; default: miles")
    wandb_entity: str | None = Field(None, description="user or team; default: the account's own")
    wandb_mode: Literal["online", "offline"] = Field("online", description="offline: files in the run directory, for wandb sync where there is a network")
    mlflow: bool = Field(False, description="send to MLflow")
    mlflow_uri: str | None = Field(None, description="tracking server or store; default: MLflow's own (MLFLOW_TRACKING_URI)")
    mlflow_experiment: str | None = Field(None, description="experiment; default: miles")

    @property
    def names(self) -> list[str]:
        """Those that are on."""
        return [name for name in ("tensorboard", "wandb", "mlflow") if getattr(self, name)]
