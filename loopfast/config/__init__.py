"""The configuration of a run: its vocabulary, how it is read, and what is checked.

A configuration is one YAML file. It is read by the rules of YAML 1.2, so that ``off`` and ``0:5`` are text
and ``1e-4`` is a number; validated without any conversion of types; and returned as frozen pydantic models.
Whatever is wrong with a file or an override ends in a `ConfigError` that names the key, the place and what is
allowed.
"""

from loopfast.config.loading import config_to_yaml, json_schema, load_config, parse_config, recipes
from loopfast.config.sections import (
    AdvantageConfig,
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DistributedConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    TrajectoriesConfig,
)

__all__ = [
    "AdvantageConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DistributedConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "TrajectoriesConfig",
    "config_to_yaml",
    "json_schema",
    "load_config",
    "parse_config",
    "recipes",
]
