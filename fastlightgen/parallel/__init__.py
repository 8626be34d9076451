"""The processes of a run and how they share work: ranks, sequence parallelism, collectives' time, what is shown."""
