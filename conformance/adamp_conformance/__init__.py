"""The conformance harness of AdamP and SGDP: cases, adapters, judge, reports and the command `adamp-parity`."""

from adamp_conformance.adapter import Adapter, Capabilities, Parameter, State

__all__ = ["Adapter", "Capabilities", "Parameter", "State"]
