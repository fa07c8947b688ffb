"""What the commands do with a run: its stages, and what else is measured on it or asked of it.

:mod:`~milp_ray.pipeline.work` holds what a command's parts share: users, recipe, Ray and the workers.
"""
