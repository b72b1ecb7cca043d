"""LIBERO's suites, LIBERO-PRO's and LIBERO-plus's (MuJoCo): tasks, scripted experts, and one scene stepped by action chunks."""

from pi_stepnft.envs.libero.simulator import Libero, LiberoSpec

__all__ = ["Libero", "LiberoSpec"]
