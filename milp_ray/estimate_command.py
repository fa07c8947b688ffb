"""``milp-ray estimate``: what a run will cost; how it is reckoned is in :mod:`milp_ray.estimate`.

Nothing heavy is imported before the command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from milp_ray.arguments import AsJson, ConfigFile, Overrides


def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    users: Annotated[
        int | None, typer.Option("--users", min=1, help="So many users, in place of the configuration's.")
    ] = None,
    history_tokens: Annotated[
        int | None, typer.Option("--history-tokens", min=0, help="Tokens of each one's history [2000].")
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", min=0, help="Examples of each one, all splits [50].")
    ] = None,
    example_tokens: Annotated[
        int | None, typer.Option("--example-tokens", min=2, help="Tokens of an example [64].")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="a100, h100, h200 or cpu.")] = None,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="How many of them (CPU: cores).")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", help="FLOP/s of one device, in place of its known peak.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Share of the peak that is reached [GPU 0.35, CPU 0.25].")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the peak on this machine, for half a second.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Rank that users get [the space's middle one].")
    ] = None,
    lora_layers: Annotated[
        int | None, typer.Option("--lora-layers", min=1, help="Layers with a LoRA that users get [half].")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Draw memory by history to a .png file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will cost.

    Parameters, bytes, memory by part, FLOPs and expected time, from the configuration alone: no weights are
    needed, and for the paper's bases no network. The paper's figures stand beside ours.
    """
    from milp_ray.config_loader import load_config
    from milp_ray.estimate.inputs import Numbers
    from milp_ray.estimate.result import Options
    from milp_ray.estimate.view import print_estimate

    options = Options(
        numbers=Numbers.given(users, history_tokens, examples, example_tokens),
        device=device,
        n_devices=devices,
        peak=flops,
        share=share,
        measure=measure,
        rank=rank,
        n_lora_layers=lora_layers,
    )
    print_estimate(load_config(config, overrides or []), options, as_json=as_json, figure=figure)
