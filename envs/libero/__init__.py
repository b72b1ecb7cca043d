"""LIBERO's suites and LIBERO-PRO's (MuJoCo): tasks, scripted experts, and one scene stepped by action chunks."""
