"""The parts of a sweep: which students, which stages they share."""
