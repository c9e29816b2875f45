"""One loop, for pretraining and fine-tuning. Knows data, model and evaluation.

1. `run.py` takes a configuration to a folder: text, model, training, evaluation, `model/`.
2. `trainer.py` is the loop, the life of a run; `step.py` is one update.
3. `callbacks.py` names the moments of a run, at which a class of yours may act. Ours do:
   `grids.py` refines and moves grids, `penalties.py` adds penalties, `validation.py` evaluates,
   `lbfgs_polish.py` fits coefficients at the end, `sampling.py` writes samples, and `metrics.py`
   counts and writes log lines; `tracking.py` and `progress.py` are where all of it goes.
4. `optimizer.py`, `muon.py` and `schedule.py` say how weights move; `placement.py` and
   `sharding.py` where they live, `compilation.py` and `arithmetic.py` how they are computed with.
5. `checkpointing/` writes and reads checkpoints and `model/`; `run_folder.py` and
   `length.py` say whose a run's folder is; `stopping.py` heeds signals and time limits.
6. `resolve.py` completes the settings, `inheritance.py` with those of a run that fine-tuning
   starts from; `distributed.py` is what ranks do together; `gpus.py` knows peaks of GPUs.
7. `strategies/` is what fine-tuning does about forgetting, a class each: callbacks, which use what
   a `Trainer` offers. Of all the above `resolve.py` and `run.py` alone know them, by a registry.
"""
