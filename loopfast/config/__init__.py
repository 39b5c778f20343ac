"""The configuration of a run: its keys, reading, writing and validation.

A configuration is one YAML file. It is read by the rules of YAML 1.2: ``off`` and ``0:5`` are text, and ``1e-4`` is a
number. It is validated without conversion of types, and returned as frozen pydantic models. Every mistake in a file or
an override raises a `ConfigError` that names the key, the place and the allowed values.
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
