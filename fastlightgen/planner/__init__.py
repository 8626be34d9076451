"""What a run needs before it starts: memory, operations, traffic and time, by arithmetic."""
