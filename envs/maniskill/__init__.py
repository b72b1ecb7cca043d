"""ManiSkill (SAPIEN): tasks, their out-of-distribution variants, scripted experts, and one scene stepped by action chunks."""

from pi_stepnft.envs.maniskill import varied  # noqa: F401 (registers the variants with gymnasium)
from pi_stepnft.envs.maniskill.simulator import Camera, ManiSkill, ManiSkillSpec

__all__ = ["Camera", "ManiSkill", "ManiSkillSpec"]
