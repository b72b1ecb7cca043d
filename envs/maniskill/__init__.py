"""ManiSkill (SAPIEN): tasks, their out-of-distribution variants, scripted experts, and one scene stepped by action chunks."""
