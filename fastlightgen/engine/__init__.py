"""Running a stage: the only training loop, its engines, checkpoints, run folder, log, clips on the way, alarms."""
