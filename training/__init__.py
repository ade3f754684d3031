"""Train a language model on a wafer: data, optimizer, step, checkpoints, metrics.

Run it as `python -m training`, or from Python:

    from training import Trainer, TrainingConfig

    result = Trainer(TrainingConfig(data="text.txt", wafer="2x4", steps=300)).fit()

A run passes through these modules, in this order:

    config          every choice of the run, and the command line
    initial_model   the preset or checkpoint that training starts from
    corpus, data    the text, its tokens, and the batches
    plan            the model's graph, the optimizer, the layout of the train state
    programs        the compiled step and evaluation (built from step and optimizer)
    loop            step after step, with checkpoint, metrics, console and signals
    trainer         all of it put together: `Trainer(config).fit()`

This package may import `wsekern`, `sharding` and `models`. Names are loaded when first used, so
that `from training import TrainingConfig` loads no jax.
"""

from typing import TYPE_CHECKING

from wsekern.moved import put_up_signposts
from wsekern.public_names import lazy_names

if TYPE_CHECKING:
    from training.config import TrainingConfig as TrainingConfig
    from training.config import load_config as load_config
    from training.config import save_config as save_config
    from training.loop import Diverged as Diverged
    from training.loop import RunResult as RunResult
    from training.metrics import read_metrics as read_metrics
    from training.trainer import Trainer as Trainer

# Public name -> the module below `training` that defines it.
_HOMES = {
    "Diverged": "loop",
    "RunResult": "loop",
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "load_config": "config",
    "read_metrics": "metrics",
    "save_config": "config",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)

put_up_signposts()  # `import training.start` names the module's new place
