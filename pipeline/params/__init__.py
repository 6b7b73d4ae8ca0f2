"""params.yaml as strict sections; a stage receives its own, never the whole file. No torch."""

from pipeline.params.data import DemoParams, HubParams, ModelParams, PrepareParams, ScratchModel
from pipeline.params.file import Params, load_params
from pipeline.params.forms import ColumnNames, FormName, PreferredParams, RankedParams
from pipeline.params.objectives import AnyVariant, AuxDPO
from pipeline.params.sampling import PairRule, SampleParams, ScorerName
from pipeline.params.scoring import EvaluateParams, RayParams, ScoreParams, SketchParams
from pipeline.params.suites import SuiteParams
from pipeline.params.training import (
    LastFraction,
    LoopParams,
    Lora,
    LoraShape,
    SftParams,
    Trainable,
    TrainParams,
    variant_loop,
)

__all__ = [
    "AnyVariant",
    "AuxDPO",
    "ColumnNames",
    "DemoParams",
    "EvaluateParams",
    "FormName",
    "HubParams",
    "LastFraction",
    "LoopParams",
    "Lora",
    "LoraShape",
    "ModelParams",
    "PairRule",
    "Params",
    "PreferredParams",
    "PrepareParams",
    "RankedParams",
    "RayParams",
    "SampleParams",
    "ScoreParams",
    "ScorerName",
    "ScratchModel",
    "SftParams",
    "SketchParams",
    "SuiteParams",
    "TrainParams",
    "Trainable",
    "load_params",
    "variant_loop",
]
