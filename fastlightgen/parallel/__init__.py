"""The processes of a run: ranks, sequence parallelism, a clock of the steps, output on screen."""
