"""Running a stage: the only training loop (loop), one-process engine (local), checkpoints, EMA, run folder and log."""
