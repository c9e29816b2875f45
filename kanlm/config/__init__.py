"""The configuration: its schema, and how it is read, merged, checked and written.

Torch is not imported here, so that mistakes in a config are told at once.
"""

from kanlm.config.checking import check, check_options, parse_json
from kanlm.config.load import (
    from_tree,
    load,
    parse_override,
    read_file,
    read_tree,
    to_tree,
    to_yaml,
)
from kanlm.config.merging import leaves, lies_in, merge, nested
from kanlm.config.schema import (
    Config,
    DataSettings,
    EvaluationSettings,
    GenerationSettings,
    OptimizerSettings,
    PenaltySettings,
    ScheduleSettings,
    StudySettings,
    TokenizerSettings,
    TrackingSettings,
    TrainingSettings,
)
from kanlm.config.schema.mixture import mixture_stages

__all__ = [
    "Config",
    "DataSettings",
    "EvaluationSettings",
    "GenerationSettings",
    "OptimizerSettings",
    "PenaltySettings",
    "ScheduleSettings",
    "StudySettings",
    "TokenizerSettings",
    "TrackingSettings",
    "TrainingSettings",
    "check",
    "check_options",
    "from_tree",
    "leaves",
    "lies_in",
    "load",
    "merge",
    "mixture_stages",
    "nested",
    "parse_json",
    "parse_override",
    "read_file",
    "read_tree",
    "to_tree",
    "to_yaml",
]
