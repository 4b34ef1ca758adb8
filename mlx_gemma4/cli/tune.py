"""`mlx-gemma4 tune`: measure which launches of a model's kernels are fastest on this machine, and keep them."""

import click

from ..errors import InputError, reason
from .options import Lenient, alone, echo, find_model, model_option, output_options, progress, say


@click.command(cls=Lenient)
@model_option
@output_options
def tune(model: str | None) -> None:
    """Fit the kernels' launches to this machine's GPU.

    Measures a model's products and attention for at most a minute, prints what each takes before and after, and keeps
    what is faster: models loaded from then on use it. Nothing else should run on the GPU meanwhile.
    """
    from ..doctor import verdict
    from ..doctor.ready import make_ready
    from ..measure.bench import load_subject
    from ..measure.tune import lines, tune
    from ..ops import tuning

    alone("tune")
    if verdict.usable_kernels() is None:
        raise InputError("there is nothing to tune: a CPU, or MLX_GEMMA4_KERNELS=off, runs none of the kernels")
    path = find_model(model)
    with progress("Loading", 1e9, " GB") as update:
        loaded = load_subject(path, update).model
    with progress("Measuring", 1, " s") as update:
        found, kinds = tune(loaded, tuning.this_gpu(), progress=update)
    for line in lines(kinds, f"{verdict.device_name()}, {path.name}"):
        say(line)
    tuning.use(found)
    make_ready(loaded)  # now, so that the next load need not
    try:
        verdict.remember_tuning(found)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"what was found can't be kept ({reason(error)}); make that folder writable and tune again"
        ) from None
    echo("Kept for this GPU: models loaded from now on use it.")
