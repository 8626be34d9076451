"""Running a stage: the training loop, its engines, checkpoints, run folder, log, preview clips and alarms."""
