"""The specification of AdamP and SGDP as code: the NumPy oracle, its error bounds, layouts and hyperparameters.

Imports NumPy and the standard library only. The normative text is SPEC.md.
"""

from adamp_spec.bounds import Bounded, Possible
from adamp_spec.hyperparameters import (
    DOMAINS,
    AdamPHyper,
    Domain,
    SGDPHyper,
    check_flag,
    check_hyperparameter,
    check_nesterov,
)
from adamp_spec.layout import Assignment, Layout, Rows, Rule, assign_layouts, format_layouts
from adamp_spec.oracle import (
    AdamPState,
    Branch,
    SGDPState,
    adamp_step,
    decide,
    first_that_passes,
    one_minus_power,
    sgdp_step,
    working_dtype,
)

SPEC_VERSION = "1.0"

__all__ = [
    "DOMAINS",
    "SPEC_VERSION",
    "AdamPHyper",
    "AdamPState",
    "Assignment",
    "Bounded",
    "Branch",
    "Domain",
    "Layout",
    "Possible",
    "Rows",
    "Rule",
    "SGDPHyper",
    "SGDPState",
    "adamp_step",
    "assign_layouts",
    "check_flag",
    "check_hyperparameter",
    "check_nesterov",
    "decide",
    "first_that_passes",
    "format_layouts",
    "one_minus_power",
    "sgdp_step",
    "working_dtype",
]
