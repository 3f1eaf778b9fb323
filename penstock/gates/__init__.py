"""Gates: the contract, what may be done with any gate, and the gate types several systems share."""

from penstock.gates.ablate import ablate
from penstock.gates.core import (
    ClosedError,
    Gate,
    GateNotFoundError,
    Kind,
    Passes,
    Routing,
    Spec,
    mark,
    named_gates,
    observed,
    spec_of,
)
from penstock.gates.force import Forcing, GateWarning, force
from penstock.gates.twin import OpenGate, twin
from penstock.gates.types import FunctionGate, ParameterGate, SigmoidGate, TopKRouter
from penstock.gates.watch import GateStats, Table, WatchLog, watch

__all__ = [
    "ClosedError",
    "Forcing",
    "FunctionGate",
    "Gate",
    "GateNotFoundError",
    "GateStats",
    "GateWarning",
    "Kind",
    "OpenGate",
    "ParameterGate",
    "Passes",
    "Routing",
    "SigmoidGate",
    "Spec",
    "Table",
    "TopKRouter",
    "WatchLog",
    "ablate",
    "force",
    "mark",
    "named_gates",
    "observed",
    "spec_of",
    "twin",
    "watch",
]
