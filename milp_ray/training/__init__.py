"""Training one user's adapter over a frozen base, and answering with it.

The one entry is :func:`milp_ray.training.train.train`; nothing here needs Ray. torch, transformers, PEFT and
DeepSpeed are imported by the modules inside, so import those only where a model is about to be used.
"""
