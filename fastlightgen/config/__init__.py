"""Configuration of every command: keys (schema), presets and YAML (files), command line (cli). Imports no torch."""

from fastlightgen.config.cli import exit_code, load, main, report
from fastlightgen.config.commands import GPUS, Encode, Evaluate, Generate, Plan, Report, for_evaluate, parse_buckets
from fastlightgen.config.fields import ConfigError, UserError
from fastlightgen.config.files import diff, find_preset_weights, fingerprint, numbers, preset, presets, to_yaml
from fastlightgen.config.schema import Stage0, Stage1, Stage2, Stage3, StageAll, for_stage

__all__ = [
    "GPUS",
    "ConfigError",
    "Encode",
    "Evaluate",
    "Generate",
    "Plan",
    "Report",
    "Stage0",
    "Stage1",
    "Stage2",
    "Stage3",
    "StageAll",
    "UserError",
    "diff",
    "exit_code",
    "find_preset_weights",
    "fingerprint",
    "for_evaluate",
    "for_stage",
    "load",
    "main",
    "numbers",
    "parse_buckets",
    "preset",
    "presets",
    "report",
    "to_yaml",
]
