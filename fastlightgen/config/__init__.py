"""Configuration of every command: keys (run, training, stages, plan, commands), presets and YAML (files), command line
(cli). Imports no torch."""

from fastlightgen.config.cli import load, main
from fastlightgen.config.commands import (
    Encode,
    Evaluate,
    Generate,
    Report,
    for_evaluate,
    parse_buckets,
    parse_size,
)
from fastlightgen.config.errors import exit_code, guarded, report
from fastlightgen.config.fields import Checked, ConfigError, UserError, field
from fastlightgen.config.files import (
    built_in,
    diff,
    find_preset_weights,
    fingerprint,
    numbers,
    preset,
    presets,
    recipe,
    to_yaml,
)
from fastlightgen.config.following import (
    PROMPT,
    SHAPES_PROMPT,
    after_plan,
    after_stage,
    command,
    folder_name,
    keys_for,
    result_of,
    settings,
    unset_type,
    with_type,
    words,
)
from fastlightgen.config.gpus import GPUS, chip
from fastlightgen.config.help import called
from fastlightgen.config.measuring import Speed, VBench
from fastlightgen.config.plan import IN_TURN, Plan, another_stage, plan_for, plan_of_stage, plan_root
from fastlightgen.config.recipes import Recipe, recipes
from fastlightgen.config.run import EXPERTS, Run, compute_type
from fastlightgen.config.stages import StageConfig, declared, for_stage, method_for, register, root
from fastlightgen.config.training import GUIDANCES, TEACHER_GUIDANCE, TIMES, BatchKeys, StudentKeys, TrainingKeys

__all__ = [
    "EXPERTS",
    "GPUS",
    "GUIDANCES",
    "IN_TURN",
    "SHAPES_PROMPT",
    "TEACHER_GUIDANCE",
    "TIMES",
    "BatchKeys",
    "Checked",
    "ConfigError",
    "Encode",
    "Evaluate",
    "Generate",
    "PROMPT",
    "Plan",
    "Recipe",
    "Report",
    "Run",
    "Speed",
    "StageConfig",
    "StudentKeys",
    "TrainingKeys",
    "UserError",
    "VBench",
    "after_plan",
    "after_stage",
    "another_stage",
    "built_in",
    "called",
    "chip",
    "command",
    "compute_type",
    "declared",
    "diff",
    "exit_code",
    "field",
    "find_preset_weights",
    "fingerprint",
    "folder_name",
    "for_evaluate",
    "for_stage",
    "guarded",
    "keys_for",
    "load",
    "main",
    "method_for",
    "numbers",
    "parse_buckets",
    "parse_size",
    "plan_for",
    "plan_of_stage",
    "plan_root",
    "preset",
    "presets",
    "recipe",
    "recipes",
    "register",
    "report",
    "result_of",
    "root",
    "settings",
    "to_yaml",
    "unset_type",
    "with_type",
    "words",
]
